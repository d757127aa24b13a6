"""Documents in files: random access to texts and conversations.

A document is a text, or a conversation: a list of messages, each a mapping with
`role` and `content`. Nothing is read until it is asked for; of a jsonl file the
beginnings of its lines are kept, of a parquet file its row groups' sizes.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kdjax.data.sources import RandomAccess
from kdjax.types import UserError

Document = str | list[dict[str, Any]]

_HOLD_OUT = 5  # first word of the generator's seed, as in `data.pipeline`


@dataclasses.dataclass(frozen=True)
class Documents:
  """Texts or conversations that can be read in any order.

  Attributes:
    examples: position -> document.
    name: what messages call them.
    where: position -> "data.jsonl, line 7".
    fingerprint: changes when the documents may have.
  """

  examples: RandomAccess
  name: str
  where: Callable[[int], str]
  fingerprint: str

  def __len__(self) -> int:
    return len(self.examples)


def from_list(documents: Sequence[Document], name: str = "list") -> Documents:
  """Documents held in memory."""
  found = digest(json.dumps(list(documents), ensure_ascii=True))
  return Documents(documents, name, f"{name}, document {{}}".format, found)


def hold_out(documents: Documents, share: float) -> tuple[Documents, Documents]:
  """(the rest, `share` of them), drawn once and for all, in their order.

  Raises:
    UserError: if either is empty.
  """
  size = len(documents)
  count = round(share * size)
  if not 0 < count < size:
    raise UserError(
      f"{documents.name} has {size} documents, of which a share of {share} is "
      f"{count}; needs at least one on either side: change the share"
    )
  order = np.random.default_rng((_HOLD_OUT, size)).permutation(size)
  kept, held = np.sort(order[count:]), np.sort(order[:count])
  return _chosen(documents, kept, "rest"), _chosen(documents, held, "held out")


def check(document: Document, where: str) -> None:
  """Refuses what is neither a text nor a list of messages."""
  if isinstance(document, str):
    return
  if not isinstance(document, list):
    raise UserError(
      f"{where}: the document is a {type(document).__name__}, needs a text or "
      "a list of messages: name another field"
    )
  for n, message in enumerate(document):
    if not isinstance(message, Mapping) or not isinstance(
      message.get("role"), str
    ):
      raise UserError(
        f"{where}: message {n} is {short(message)}, needs a mapping with role "
        "and content: mend the line"
      )
    if "content" not in message:
      raise UserError(
        f"{where}: message {n} has the fields {', '.join(sorted(message))}, "
        "needs content too: mend the line"
      )


def joined(parts: Sequence[Documents], name: str) -> Documents:
  if len(parts) == 1:
    return parts[0]
  ends = np.cumsum([len(part) for part in parts])

  def find(index: int) -> tuple[Documents, int]:
    n = int(np.searchsorted(ends, index, side="right"))
    return parts[n], index - (int(ends[n - 1]) if n else 0)

  def document(index: int) -> Document:
    part, place = find(index)
    return part.examples[place]

  def where(index: int) -> str:
    part, place = find(index)
    return part.where(place)

  found = digest(*(part.fingerprint for part in parts))
  return Documents(Calls(int(ends[-1]), document), name, where, found)


def _chosen(documents: Documents, kept: np.ndarray, what: str) -> Documents:
  return Documents(
    Calls(len(kept), lambda index: documents.examples[int(kept[index])]),
    f"{documents.name} ({what})",
    lambda index: documents.where(int(kept[index])),
    digest(documents.fingerprint, kept.tobytes().hex()),
  )


@dataclasses.dataclass(frozen=True)
class Calls:
  size: int
  call: Callable[[int], Document]

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int, /) -> Document:
    if not 0 <= index < self.size:
      raise IndexError(index)  # so that iterating over it ends
    return self.call(index)


def digest(*parts: str) -> str:
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def short(value: Any) -> str:
  shown = repr(value)
  return shown if len(shown) <= 40 else shown[:37] + "..."
