"""Documents -> tokens, once, in flat arrays that are mapped from disk."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kdjax.data.text.chat import Spans, render
from kdjax.data.text.documents import Document, Documents
from kdjax.data.text.marks import Marked, mark_text, mark_turns
from kdjax.data.text.tokenizer import Tokenizer
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
  key = (documents.fingerprint, tokenizer.fingerprint, str(skip_empty))
  made = folder_for(folder, "tokens", key)

  def write(at: pathlib.Path) -> None:
    with Writer(at, documents.name, tokenizer) as writer:
      for marked in marked_documents(documents, tokenizer, skip_empty):
        writer.append(marked)

  if not made.is_dir():
    write_folder(made, write)
  return open_tokens(made, documents.name, tokenizer)


def open_tokens(
  folder: pathlib.Path, name: str, tokenizer: Tokenizer
) -> Tokens:
  """The arrays that a `Writer` left."""
  arrays = {
    column: np.load(folder / f"{column}.npy", mmap_mode="r")
    for column in ("ids", "target", "num_bytes")
  }
  return Tokens(
    **arrays,
    offsets=np.load(folder / "offsets.npy"),
    name=name,
    pad=tokenizer.pad,
    fingerprint=folder.name,
    num_empty=int((folder / "num_empty").read_text()),
  )


def folder_for(
  root: str | os.PathLike[str], kind: str, key: tuple[str, ...]
) -> pathlib.Path:
  made = hashlib.sha256("\0".join((*key, _FORMAT)).encode()).hexdigest()
  return pathlib.Path(root).expanduser() / f"{kind}-{made[:16]}"


def write_folder(
  folder: pathlib.Path, write: Callable[[pathlib.Path], None]
) -> None:
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
    # The scratch folder itself is for its owner's eyes only.
    made = pathlib.Path(scratch) / "made"
    made.mkdir()
    write(made)
    try:
      os.rename(made, folder)
    except OSError:
      # Another process was first; its folder holds the same.
      if not folder.is_dir():
        raise
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


class Writer:
  """Writes documents' tokens one after another; the arrays come last."""

  def __init__(
    self, folder: pathlib.Path, name: str, tokenizer: Tokenizer, **more: Any
  ):
    folder.mkdir(exist_ok=True)
    self.folder, self.name = folder, name
    small = tokenizer.size <= 1 << 16
    self.kinds = {
      "ids": np.dtype(np.uint16 if small else np.uint32),
      "target": np.dtype(bool),
      "num_bytes": np.dtype(np.uint32),
      **more,
    }
    self.sizes, self.num_targets, self.num_empty = [0], 0, 0

  def __enter__(self) -> "Writer":
    self.raw = {
      column: (self.folder / f"{column}.raw").open("wb")
      for column in self.kinds
    }
    return self

  def append(self, marked: Marked | None, **more: np.ndarray) -> None:
    """A document's tokens and their further columns; None where it is empty."""
    if marked is None:
      self.num_empty += 1
      return
    self.sizes.append(len(marked.ids))
    self.num_targets += int(marked.target[1:].sum())
    for column, file in self.raw.items():
      values = more[column] if column in more else getattr(marked, column)
      file.write(values.astype(self.kinds[column]).tobytes())

  def __exit__(self, kind: type | None, *_: object) -> None:
    for file in self.raw.values():
      file.close()
    if kind is not None:
      return
    if not self.num_targets:
      raise UserError(
        f"{self.name}: none of {sum(self.sizes)} tokens in "
        f"{len(self.sizes) - 1} documents is a target of the loss, needs one "
        "at least: give texts of two tokens or more, or conversations in which "
        "the assistant speaks"
      )
    for column, dtype in self.kinds.items():
      _headed(self.folder, column, dtype, sum(self.sizes))
    (self.folder / "num_empty").write_text(str(self.num_empty))
    np.save(self.folder / "offsets.npy", np.cumsum(self.sizes, dtype=np.int64))


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


def marked_documents(
  documents: Documents, tokenizer: Tokenizer, skip_empty: bool
) -> Iterator[Marked | None]:
  """Each document's tokens, None for an empty one that is left out."""
  for first in range(0, len(documents), _AT_ONCE):
    rendered = []
    for index in range(first, min(first + _AT_ONCE, len(documents))):
      document, where = documents.examples[index], documents.where(index)
      if not document and not skip_empty:
        raise UserError(
          f"{where}: the document is empty, needs text or messages: delete it, "
          "or set skip_empty=True"
        )
      rendered.append(_rendered(document, tokenizer, where))
    encoded = iter(tokenizer.encode([text for text, *_ in rendered if text]))
    for text, said, words in rendered:
      if not text:
        yield None
      elif said is None:
        yield mark_text(next(encoded), tokenizer, len(text.encode()))
      else:
        yield mark_turns(next(encoded), text, said, words)


def _rendered(
  document: Document, tokenizer: Tokenizer, where: str
) -> tuple[str, Spans | None, list[str]]:
  """Its text; of a conversation the assistant's spans in it, and its words."""
  if isinstance(document, str):
    return document, None, []
  if not document:
    return "", None, []
  try:
    text, said = render(tokenizer, document)
  except UserError as error:
    raise UserError(f"{where}: {error}") from error
  words = [
    str(message.get("content") or "").strip()
    for message in document
    if message["role"] == "assistant"
  ]
  return text, said, words
