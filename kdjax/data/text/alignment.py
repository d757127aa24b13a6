"""Two tokenizations of one text: the spans after which both have a boundary.

  student   |un|believ|able| story|
  teacher   |unbel|iev|able| st|ory|
  span        0     0    1    2  2

A span is minimal: no common boundary lies within it. Both networks have read
the same text when a span begins, so they can be compared there, and on the
span as a whole. Everything here runs on the host.
"""

import os
import pathlib
from typing import NamedTuple

import numpy as np

from kdjax.data.text import tokens as tokenizing
from kdjax.data.text.documents import Documents
from kdjax.data.text.marks import Marked
from kdjax.data.text.offsets import Encoded
from kdjax.data.text.tokenizer import Tokenizer
from kdjax.data.text.tokens import Tokens

_Ranges = Encoded | Marked


def align(student: _Ranges, teacher: _Ranges) -> tuple[np.ndarray, np.ndarray]:
  """The span of each token, on both sides: int32 [n], int32 [m].

  Spans count from 0. A boundary after token i is where all tokens up to i have
  ended and no later one has begun: one that lies within a character, which
  several tokens write together, is none. Tokens after the last common boundary,
  as where one side was cut off, have span -1.
  """
  ours, theirs = _boundaries(student), _boundaries(teacher)
  common = np.intersect1d(ours, theirs)
  return _spans(student, common), _spans(teacher, common)


def _boundaries(encoded: _Ranges) -> np.ndarray:
  """The byte after each token behind which there is a boundary."""
  reached = np.maximum.accumulate(encoded.ends)
  return reached[reached <= np.append(encoded.starts[1:], reached[-1:])]


def _spans(encoded: _Ranges, common: np.ndarray) -> np.ndarray:
  # A token's span is the number of common boundaries before its end: a token
  # without bytes belongs to the span that it follows.
  reached = np.maximum.accumulate(encoded.ends)
  spans = np.searchsorted(common, reached, side="left")
  return np.where(spans < len(common), spans, -1).astype(np.int32)


class Side(NamedTuple):
  """One tokenization of documents that are in two.

  Attributes:
    tokens: as for one tokenizer.
    spans: int32 [total], the span of each token within its document, -1 = none.
    shared: bool [total], whether the other side has what the token stands for.
  """

  tokens: Tokens
  spans: np.ndarray
  shared: np.ndarray


class Pairs(NamedTuple):
  """The same documents by two tokenizers; document n is the same text."""

  student: Side
  teacher: Side


def tokenize_pair(
  documents: Documents,
  student: Tokenizer,
  teacher: Tokenizer,
  *,
  folder: str | os.PathLike[str],
  skip_empty: bool = False,
) -> Pairs:
  """The documents' tokens by both tokenizers, with their common spans.

  The end of a text is a span of its own where both tokenizers have one. Of a
  conversation each side has its own template's text; spans lie within the
  assistant's words, and the end of its turn is one more.

  Arguments and errors as `tokenize`.
  """
  key = (
    documents.fingerprint,
    student.fingerprint,
    teacher.fingerprint,
    str(skip_empty),
  )
  made = tokenizing.folder_for(folder, "pairs", key)
  sides = (("student", student), ("teacher", teacher))

  def write(at: pathlib.Path) -> None:
    marked = (
      tokenizing.marked_documents(documents, tokenizer, skip_empty)
      for _, tokenizer in sides
    )
    more = {"span": np.dtype(np.int32), "shared": np.dtype(bool)}
    ours, theirs = (
      tokenizing.Writer(at / side, documents.name, tokenizer, **more)
      for side, tokenizer in sides
    )
    with ours, theirs:
      for a, b in zip(*marked):
        if a is None or b is None:
          ours.append(None)
          theirs.append(None)
        else:
          spans = align(a, b)
          ours.append(a, span=spans[0])
          theirs.append(b, span=spans[1])

  def side(name: str, tokenizer: Tokenizer) -> Side:
    tokens = tokenizing.open_tokens(made / name, documents.name, tokenizer)
    spans, shared = (
      np.load(made / name / f"{column}.npy", mmap_mode="r")
      for column in ("span", "shared")
    )
    return Side(tokens, spans, shared)

  if not made.is_dir():
    tokenizing.write_folder(made, write)
  return Pairs(*(side(*named) for named in sides))
