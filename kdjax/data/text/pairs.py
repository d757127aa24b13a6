"""Batches of two tokenizations: rows that hold the same text on both sides."""

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from kdjax.data import pipeline
from kdjax.data.text import packing
from kdjax.data.text.alignment import Pairs
from kdjax.types import UserError

# The first word of the generator's seed, as in `packing`.
_PAIRS = 7


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
