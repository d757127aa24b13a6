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
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from kdjax.data import pipeline
from kdjax.data.text import packing
from kdjax.data.text import tokens as tokenizing
from kdjax.data.text.documents import Documents
from kdjax.data.text.marks import Marked
from kdjax.data.text.tokenizer import Encoded, Tokenizer
from kdjax.data.text.tokens import Tokens
from kdjax.types import UserError

# The first word of the generator's seed, as in `packing`.
_PAIRS = 7

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


class _Spans(NamedTuple):
  """One document's spans: [K] each.

  first, last: the token with which each begins and ends, on both sides [2, K].
  counts: whether all tokens of it, on both sides, stand for what both have.
  """

  first: np.ndarray
  last: np.ndarray
  counts: np.ndarray


class _Piece(NamedTuple):
  """Positions start .. stop - 1 of a document, on both sides."""

  document: int
  starts: tuple[int, int]
  stops: tuple[int, int]
  read: int  # the span that it begins with, which is read and not predicted


def pair_batches(
  pairs: Pairs,
  *,
  batch_size: int,
  sequence_length: int,
  teacher_length: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int = 4,
  prefetch: int = 4,
) -> grain.IterDataset:
  """Endless shuffled batches of both tokenizations; a function of seed and n.

  Rows hold the same text on both sides. A document that does not fit is cut
  where both sides have a boundary, and each further piece begins with the last
  span of the one before, read and not predicted again, so that both networks
  have seen the same when the next begins. The first span of a document counts
  only where both tokenizers put something before it.

  Returns:
    An iterable as of `train_batches`, of the student's arrays under their names
    and the teacher's as `teacher_tokens` and so on, [B, S] and [B, S'], and
      span          [B, S]  int32    of the token that the position predicts:
                                     0, 1, ... in its row, -1 = none
      teacher_span  [B, S'] int32    likewise
      span_mask     [B, S]  float32  1 at n where the row has a span n

  Raises:
    UserError: as `train_batches`; no span of any document fits.
  """
  for length in (sequence_length, teacher_length):
    packing.check_length(length)
  if seed < 0:
    raise UserError(f"got seed={seed}, needs 0 or more: choose another seed")
  local = packing.local_rows(batch_size, process_index, process_count)
  lengths = (sequence_length, teacher_length)
  rows = _rows(pairs, lengths, seed)
  order = packing.shuffled(rows, seed)

  def batch(step: int) -> dict[str, np.ndarray]:
    chosen = [order(row) for row in (step * batch_size + local).tolist()]
    return fill(pairs, chosen, lengths)

  steps = sys.maxsize // (batch_size * max(lengths))
  return pipeline._iterable(steps, batch, num_threads, prefetch)


def fill(
  pairs: Pairs, rows: Sequence[Sequence[_Piece]], lengths: tuple[int, int]
) -> dict[str, np.ndarray]:
  """The arrays of rows given as pieces; see `pair_batches`."""
  batch = {}
  sides = (("", pairs.student.tokens), ("teacher_", pairs.teacher.tokens))
  for side, (prefix, tokens) in enumerate(sides):
    pieces = [
      [(p.document, p.starts[side], p.stops[side]) for p in row] for row in rows
    ]
    made = packing.fill(tokens, pieces, lengths[side])
    batch |= {prefix + name: array for name, array in made.items()}
    batch[prefix + "span"] = np.full((len(rows), lengths[side]), -1, np.int32)
  mask = np.zeros((len(rows), lengths[0]), np.float32)
  for b, row in enumerate(rows):
    at, count = [0, 0], 0
    for document, starts, stops, read in row:
      spans = _spans_of(pairs, document)
      # The spans that count, numbered on from those of the row so far.
      number = np.cumsum(spans.counts) - 1
      number = number - (number[read] + 1 - count)
      last = np.searchsorted(spans.last[0], stops[0])
      for side, (prefix, _) in enumerate(sides):
        start, stop = starts[side], stops[side]
        label = np.searchsorted(
          spans.last[side], np.arange(start + 1, stop + 1)
        )
        place = b, slice(at[side], at[side] + stop - start)
        inside = spans.counts[label] & (label > read)
        batch[prefix + "span"][place] = np.where(inside, number[label], -1)
        if start > 0:  # the piece before has predicted these
          batch[prefix + "mask"][place][label <= read] = 0
        at[side] += stop - start
      count = int(number[last]) + 1
    mask[b, :count] = 1
  return batch | {"span_mask": mask}


def _rows(
  pairs: Pairs, lengths: tuple[int, int], seed: int
) -> list[list[_Piece]]:
  pieces = [
    piece
    for document in range(len(pairs.student.tokens))
    for piece in _pieces(_spans_of(pairs, document), document, lengths)
  ]
  if not pieces:
    raise UserError(
      f"{pairs.student.tokens.name}: no span that both tokenizers share fits "
      f"into rows of {lengths[0]} and {lengths[1]} tokens, needs one at least: "
      "raise them, or check that both write the assistant's words unchanged"
    )
  sizes = np.array([np.subtract(piece.stops, piece.starts) for piece in pieces])
  generator = np.random.default_rng((_PAIRS, seed))
  order = generator.permutation(len(pieces))
  laid = packing.first_fit(sizes, lengths, order)
  return [[pieces[n] for n in row] for row in laid]


def _pieces(
  spans: _Spans, document: int, lengths: tuple[int, int]
) -> Iterator[_Piece]:
  read, count = 0, len(spans.counts)
  while read < count - 1:
    # The last span whose end is within reach of the first token read.
    last = min(
      int(np.searchsorted(ends, first[read] + length, side="right")) - 1
      for first, ends, length in zip(spans.first, spans.last, lengths)
    )
    if last <= read:
      read += 1  # no row holds it and the next
      continue
    if spans.counts[read + 1 : last + 1].any():
      (a, b), (c, d) = (
        spans.first[:, read].tolist(),
        spans.last[:, last].tolist(),
      )
      yield _Piece(document, (a, b), (c, d), read)
    read = last


def _spans_of(pairs: Pairs, document: int) -> _Spans:
  firsts, lasts, counts = [], [], True
  for tokens, spans, shared in pairs:
    where = slice(*tokens.offsets[document : document + 2])
    kept = spans[where][spans[where] >= 0]  # those that are none come last
    numbers = np.arange(kept.max(initial=-1) + 1)
    first = np.searchsorted(kept, numbers, side="left")
    firsts.append(first)
    lasts.append(np.searchsorted(kept, numbers, side="right") - 1)
    every = np.logical_and.reduceat(shared[where][: len(kept)], first)
    counts = counts & every
  return _Spans(np.stack(firsts), np.stack(lasts), np.asarray(counts))
