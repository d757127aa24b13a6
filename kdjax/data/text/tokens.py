"""Documents -> tokens, once, in flat arrays that are mapped from disk."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from kdjax.data.text.chat import Spans, render
from kdjax.data.text.documents import Document, Documents
from kdjax.data.text.tokenizer import Encoded, Tokenizer
from kdjax.types import UserError

_FORMAT = "1"  # of the folder; another number makes another folder
_AT_ONCE = 256  # documents that the tokenizer takes in one call


@dataclasses.dataclass(frozen=True)
class Tokens:
  """The tokens of many documents, end to end.

  Attributes:
    ids: int [total].
    target: bool [total]; whether the loss may ask for this token. Of a text all
      but its begin-of-text, of a conversation what the assistant says.
    num_bytes: int [total]; bytes of the text that end with this token and not
      before; of a document they add up to its length.
    offsets: int64 [N + 1]; document n is offsets[n] .. offsets[n + 1] - 1.
    name: what messages call them.
    pad: the id at positions that count nowhere.
    fingerprint: of the documents and the tokenizer.
    num_empty: documents that were empty and left out.
  """

  ids: np.ndarray
  target: np.ndarray
  num_bytes: np.ndarray
  offsets: np.ndarray
  name: str
  pad: int
  fingerprint: str
  num_empty: int = 0

  def __len__(self) -> int:
    return len(self.offsets) - 1

  @functools.cached_property
  def sizes(self) -> np.ndarray:
    """int64 [N]: positions of each document, one fewer than its tokens."""
    return np.maximum(np.diff(self.offsets) - 1, 0)


class Marked(NamedTuple):
  """One document's tokens, with what begins and ends it; as in `Tokens`."""

  ids: np.ndarray
  target: np.ndarray
  num_bytes: np.ndarray


def tokenize(
  documents: Documents,
  tokenizer: Tokenizer,
  *,
  folder: str | os.PathLike[str],
  skip_empty: bool = False,
) -> Tokens:
  """The documents' tokens, made at the first call and mapped from then on.

  A text becomes `prefix, tokens, eos`, each as far as the tokenizer has it; a
  conversation what its chat template writes. The folder appears by one rename:
  any number of processes may make it at once, and any may be killed.

  Args:
    documents: what to read.
    tokenizer: what makes tokens of it.
    folder: where the arrays are kept, in a folder by their fingerprint.
    skip_empty: whether an empty document is left out and counted; otherwise it
      is refused.

  Raises:
    UserError: an empty document, nothing that is a target, a conversation
      without a chat template; and as reading the documents.
  """
  key = "\0".join(
    (documents.fingerprint, tokenizer.fingerprint, str(skip_empty), _FORMAT)
  )
  fingerprint = hashlib.sha256(key.encode()).hexdigest()[:16]
  root = pathlib.Path(folder).expanduser()
  made = root / f"tokens-{fingerprint}"
  if not (made / "offsets.npy").is_file():
    write_folder(made, lambda at: _write(at, documents, tokenizer, skip_empty))
  arrays = {
    name: np.load(made / f"{name}.npy", mmap_mode="r")
    for name in ("ids", "target", "num_bytes")
  }
  return Tokens(
    **arrays,
    offsets=np.load(made / "offsets.npy"),
    name=documents.name,
    pad=tokenizer.pad,
    fingerprint=fingerprint,
    num_empty=int((made / "num_empty").read_text()),
  )


def write_folder(folder: pathlib.Path, write: Any) -> None:
  """`write(path)` fills a folder that then appears whole, or not at all.

  Raises:
    UserError: it cannot be written.
  """
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, because a rename is atomic on one file system only.
    scratch = tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-")
  except OSError as error:
    raise UserError(
      f"cannot write to {folder.parent} ({error.strerror or error}): give a "
      "folder that can be written"
    ) from error
  try:
    write(pathlib.Path(scratch))
    try:
      os.rename(scratch, folder)
    except OSError:
      # Another process was first; its folder holds the same.
      if not folder.is_dir():
        raise
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def _write(
  folder: pathlib.Path,
  documents: Documents,
  tokenizer: Tokenizer,
  skip_empty: bool,
) -> None:
  kind = np.uint16 if tokenizer.size <= 1 << 16 else np.uint32
  kinds = {"ids": kind, "target": np.bool_, "num_bytes": np.uint32}
  sizes, num_targets, num_empty = [0], 0, 0
  raw = {name: (folder / f"{name}.raw").open("wb") for name in kinds}
  for marked in _marked(documents, tokenizer, skip_empty):
    if marked is None:
      num_empty += 1
      continue
    sizes.append(len(marked.ids))
    num_targets += int(marked.target[1:].sum())
    for name, file in raw.items():
      file.write(getattr(marked, name).astype(kinds[name]).tobytes())
  for file in raw.values():
    file.close()
  if not num_targets:
    raise UserError(
      f"{documents.name}: none of {sum(sizes)} tokens in {len(sizes) - 1} "
      "documents is a target of the loss, needs one at least: give texts of "
      "two tokens or more, or conversations in which the assistant speaks"
    )
  for name, dtype in kinds.items():
    _headed(folder, name, np.dtype(dtype), sum(sizes))
  (folder / "num_empty").write_text(str(num_empty))
  np.save(folder / "offsets.npy", np.cumsum(sizes, dtype=np.int64))


def _headed(
  folder: pathlib.Path, name: str, dtype: np.dtype, size: int
) -> None:
  """name.raw -> name.npy, whose header needs the length known only now."""
  with (folder / f"{name}.npy").open("wb") as file:
    header = {"descr": dtype.str, "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(file, header)
    with (folder / f"{name}.raw").open("rb") as raw:
      shutil.copyfileobj(raw, file, 1 << 24)
  (folder / f"{name}.raw").unlink()


def _marked(
  documents: Documents, tokenizer: Tokenizer, skip_empty: bool
) -> Iterator[Marked | None]:
  """Each document's tokens, None for an empty one that is left out."""
  for first in range(0, len(documents), _AT_ONCE):
    texts, spans = [], []
    for index in range(first, min(first + _AT_ONCE, len(documents))):
      document = documents.examples[index]
      if not document:
        if not skip_empty:
          raise UserError(
            f"{documents.where(index)}: the document is empty, needs text or "
            "messages: delete it, or set skip_empty=True"
          )
        yield None
        continue
      text, said = _rendered(document, tokenizer, documents.where(index))
      texts.append(text)
      spans.append(said)
    for text, said, encoded in zip(texts, spans, tokenizer.encode(texts)):
      if said is None:
        yield mark_text(encoded, tokenizer, len(text.encode()))
      else:
        yield mark_spans(encoded, byte_spans(text, said))


def _rendered(
  document: Document, tokenizer: Tokenizer, where: str
) -> tuple[str, Spans | None]:
  if isinstance(document, str):
    return document, None
  try:
    return render(tokenizer, document)
  except UserError as error:
    raise UserError(f"{where}: {error}") from error


def mark_text(encoded: Encoded, tokenizer: Tokenizer, num_bytes: int) -> Marked:
  """A text between what begins and ends it; every token of it a target."""
  prefix = np.asarray(tokenizer.prefix, np.int32)
  suffix = np.asarray(
    [] if tokenizer.eos is None else [tokenizer.eos], np.int32
  )
  ids = np.concatenate([prefix, encoded.ids, suffix])
  target = np.arange(len(ids)) >= len(prefix)
  sizes = np.zeros(len(ids), np.int64)
  inside = slice(len(prefix), len(prefix) + len(encoded.ids))
  sizes[inside] = _new_bytes(encoded, num_bytes)
  return Marked(ids, target, sizes)


def mark_spans(encoded: Encoded, spans: Spans) -> Marked:
  """Targets are the tokens that share a byte with one of the spans."""
  target = np.zeros(len(encoded.ids), bool)
  for start, stop in spans:
    target |= (encoded.starts < stop) & (encoded.ends > start)
  last = int(encoded.ends.max(initial=0))
  return Marked(encoded.ids, target, _new_bytes(encoded, last))


def byte_spans(text: str, spans: Spans) -> Spans:
  """Spans of characters as spans of bytes."""
  return [
    (len(text[:start].encode()), len(text[:stop].encode()))
    for start, stop in spans
  ]


def _new_bytes(encoded: Encoded, num_bytes: int) -> np.ndarray:
  """Bytes that each token adds to those before it; the last takes the rest."""
  if not len(encoded.ids):
    return np.zeros(0, np.int64)
  reached = np.maximum.accumulate(encoded.ends)
  reached[-1] = num_bytes
  return np.diff(reached, prepend=0)
