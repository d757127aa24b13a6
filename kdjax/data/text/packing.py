"""Tokens -> batches: the causal shift, rows of several documents, their order.

A row of length S holds pieces of documents end to end. Position t reads a
token and predicts the next of the same document, so a document of n tokens
takes n - 1 positions, and each of its tokens but the first is predicted once.

  tokens      [B, S] int32    what position t reads
  label       [B, S] int32    what it predicts: the token after it
  mask        [B, S] float32  1 = the prediction counts
  segment_ids [B, S] int32    1, 2, ... for the row's pieces, 0 = padding;
                              attention stays within a segment
  positions   [B, S] int32    0, 1, ... within each segment

Label and mask are shifted already: a loss compares logits[:, t] with
label[:, t].
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import grain
import numpy as np

from kdjax.data import pipeline
from kdjax.data.text.tokens import Tokens
from kdjax.types import UserError

# The first words of the generators' seeds; 1 and 2 are `data.pipeline`'s.
_ORDER, _PACK, _ROWS = 3, 4, 6

_OPEN_ROWS = 64  # rows that first_fit fills at once

# (document, first position, one past its last position)
Piece = tuple[int, int, int]
Row = TypeVar("Row")


def next_token(
  tokens: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The causal shift, in one place: position t predicts token t + 1.

  Args:
    tokens: [..., n] of one document.
    target: [..., n], whether the loss may ask for each token.

  Returns:
    What each position reads, what it predicts and whether that counts, all
    [..., n - 1].
  """
  return tokens[..., :-1], tokens[..., 1:], target[..., 1:]


def train_batches(
  tokens: Tokens,
  *,
  batch_size: int,
  sequence_length: int,
  seed: int,
  cut: bool = True,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int = 4,
  prefetch: int = 4,
) -> grain.IterDataset:
  """Endless shuffled batches; batch n is a function of seed and n alone.

  With `cut`, for texts: each epoch's documents stand end to end in the order
  `default_rng((3, seed, epoch)).permutation(N)`, and every S positions are a
  row. No position is padding; a document that a row's end cuts goes on in
  another row, as a new segment.

  Without, for conversations: rows hold whole documents, laid into them by first
  fit in an order drawn from the seed. A document longer than a row keeps its
  beginning; see `num_shortened`.

  Either way each epoch permutes the rows: the rows of one batch are of many
  documents, not one document's neighbours.

  Args:
    tokens: what to read.
    batch_size: rows of the global batch.
    sequence_length: S.
    seed: >= 0.
    cut: whether a row's end may cut a document.
    process_index: which contiguous block of rows to give.
    process_count: number of blocks.
    num_threads: batches made at once; 0 makes each when it is asked for.
    prefetch: batches held ready.

  Returns:
    An iterable of dicts of arrays as at the top of this file. Its iterator has
    `get_state` and `set_state`; the state is `{"next_index": step}`.

  Raises:
    UserError: an argument out of range, or documents without any target.
  """
  if seed < 0:
    raise UserError(f"got seed={seed}, needs 0 or more: choose another seed")
  check_length(sequence_length)
  rows = local_rows(batch_size, process_index, process_count)
  if cut:
    pieces_of = _shuffled_stream(tokens, sequence_length, seed)
  else:
    pieces_of = shuffled(_whole(tokens, sequence_length, seed), seed)

  def batch(step: int) -> dict[str, np.ndarray]:
    pieces = [pieces_of(row) for row in (step * batch_size + rows).tolist()]
    return fill(tokens, pieces, sequence_length)

  steps = sys.maxsize // max(batch_size * sequence_length, 1)
  return pipeline._iterable(steps, batch, num_threads, prefetch)


def eval_batches(
  tokens: Tokens,
  *,
  batch_size: int,
  sequence_length: int,
  cut: bool = True,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int = 4,
  prefetch: int = 4,
) -> grain.IterDataset:
  """Every document once, in order; the rest of the last batch is padding.

  With `cut`, the first predictions after a row's end see little context; a
  longer row makes them fewer. Batches hold `num_bytes` too, int32 [B, S], the
  bytes that each label adds to the text: bits per byte are
  Σ mask · nll / (log 2 · Σ num_bytes · mask), what ends a document counting as
  no byte. Arguments, contents and errors otherwise as `train_batches`.
  """
  check_length(sequence_length)
  rows = local_rows(batch_size, process_index, process_count)
  if cut:
    total = int(tokens.sizes.sum())
    num_rows = -(-total // sequence_length)
    pieces_of = _stream(tokens, sequence_length, None)
  else:
    whole = _whole(tokens, sequence_length, None)
    num_rows, pieces_of = len(whole), whole.__getitem__

  def batch(step: int) -> dict[str, np.ndarray]:
    pieces = [
      pieces_of(row) if row < num_rows else []
      for row in (step * batch_size + rows).tolist()
    ]
    return fill(tokens, pieces, sequence_length, num_bytes=True)

  steps = -(-num_rows // batch_size)
  return pipeline._iterable(steps, batch, num_threads, prefetch)


def fill(
  tokens: Tokens,
  rows: Sequence[Sequence[Piece]],
  length: int,
  *,
  num_bytes: bool = False,
) -> dict[str, np.ndarray]:
  """The arrays of rows given as pieces, padded to `length`."""
  batch = blank_rows(len(rows), length, tokens.pad)
  if num_bytes:
    batch["num_bytes"] = np.zeros((len(rows), length), np.int32)
  for b, pieces in enumerate(rows):
    at = 0
    for segment, (document, start, stop) in enumerate(pieces, 1):
      first = tokens.offsets[document]
      source = slice(first + start, first + stop + 1)  # and the last's label
      place = b, slice(at, at + stop - start)
      (
        batch["tokens"][place],
        batch["label"][place],
        batch["mask"][place],
      ) = next_token(tokens.ids[source], tokens.target[source])
      batch["segment_ids"][place] = segment
      batch["positions"][place] = np.arange(stop - start)
      if num_bytes:
        batch["num_bytes"][place] = tokens.num_bytes[source][1:]
      at += stop - start
  return batch


def blank_rows(count: int, length: int, pad: int = 0) -> dict[str, np.ndarray]:
  """Rows of padding alone, `[count, length]`."""
  shape = (count, length)
  return {
    "tokens": np.full(shape, pad, np.int32),
    "label": np.full(shape, pad, np.int32),
    "mask": np.zeros(shape, np.float32),
    "segment_ids": np.zeros(shape, np.int32),
    "positions": np.zeros(shape, np.int32),
  }


def num_shortened(tokens: Tokens, sequence_length: int) -> int:
  """Documents that rows of this length do not hold whole."""
  return int((tokens.sizes > sequence_length).sum())


def check_length(sequence_length: int, context: int | None = None) -> None:
  """Refuses rows that are no rows, or longer than a model's context."""
  if sequence_length < 1:
    raise UserError(
      f"got sequence_length={sequence_length}, needs 1 or more: change it"
    )
  if context is not None and sequence_length > context:
    raise UserError(
      f"got sequence_length={sequence_length}, the model's context is {context}"
      f": set sequence_length to {context} or less"
    )


def first_fit(
  sizes: np.ndarray, capacity: Sequence[int], order: np.ndarray
) -> list[list[int]]:
  """Pieces -> rows: each piece into the first open row that has room for it.

  Args:
    sizes: int [P, K], none above the capacity; K lengths a piece.
    capacity: the K lengths of a row.
    order: int [P], which piece comes when.

  Returns:
    The pieces of each row. At most 64 rows are open at once, the oldest is
    closed for a new one, so that time grows with P alone.
  """
  room = np.zeros((_OPEN_ROWS, len(capacity)), np.int64)
  held: list[list[int]] = [[] for _ in range(_OPEN_ROWS)]
  closed: list[list[int]] = []
  oldest = 0
  for piece in order.tolist():
    fits = np.all(room >= sizes[piece], axis=1)
    place = int(fits.argmax())
    if not fits[place]:
      place, oldest = oldest, (oldest + 1) % _OPEN_ROWS
      closed.append(held[place])
      held[place] = []
      room[place] = capacity
    held[place].append(piece)
    room[place] -= sizes[piece]
  return [row for row in closed + held if row]


def shuffled(rows: Sequence[Row], seed: int) -> Callable[[int], Row]:
  """Row of the endless stream -> its pieces; each epoch permutes the rows."""
  places = _places(len(rows), seed)
  return lambda row: rows[places(row) % len(rows)]


def _places(count: int, seed: int) -> Callable[[int], int]:
  """0, 1, 2, ... -> the same numbers, permuted within every `count` of them."""

  @functools.lru_cache(maxsize=2)
  def order(epoch: int) -> np.ndarray:
    return np.random.default_rng((_ROWS, seed, epoch)).permutation(count)

  def place(n: int) -> int:
    epoch, at = divmod(n, count)
    return epoch * count + int(order(epoch)[at])

  return place


def local_rows(
  batch_size: int, process_index: int, process_count: int
) -> np.ndarray:
  """Which rows of the global batch a process reads."""
  if batch_size < 1 or process_count < 1 or batch_size % process_count:
    raise UserError(
      f"got batch_size={batch_size} for {process_count} processes, needs a "
      "positive multiple of their number: change batch_size"
    )
  if not 0 <= process_index < process_count:
    raise UserError(
      f"got process_index={process_index}, needs 0..{process_count - 1}: pass "
      "the process's own number and the number of processes"
    )
  local = batch_size // process_count
  return np.arange(process_index * local, (process_index + 1) * local)


def _shuffled_stream(
  tokens: Tokens, length: int, seed: int
) -> Callable[[int], list[Piece]]:
  """The rows of `_stream`, permuted by about an epoch at a time."""
  pieces_of = _stream(tokens, length, seed)
  places = _places(max(int(tokens.sizes.sum()) // length, 1), seed)
  return lambda row: pieces_of(places(row))


def _stream(
  tokens: Tokens, length: int, seed: int | None
) -> Callable[[int], list[Piece]]:
  """Row -> pieces of the documents end to end; without a seed, in order."""
  sizes = tokens.sizes
  total = int(sizes.sum())

  # A batch may span two runs of permuted rows, and these three epochs.
  @functools.lru_cache(maxsize=3)
  def laid_out(epoch: int) -> tuple[np.ndarray, np.ndarray]:
    documents = np.arange(len(tokens))
    if seed is not None:
      generator = np.random.default_rng((_ORDER, seed, epoch))
      documents = generator.permutation(len(tokens))
    return documents, np.cumsum(sizes[documents])

  def pieces(row: int) -> list[Piece]:
    found = []
    at, stop = row * length, (row + 1) * length
    if seed is None:
      stop = min(stop, total)
    while at < stop:
      epoch, place = divmod(at, total)
      documents, ends = laid_out(epoch)
      n = int(np.searchsorted(ends, place, side="right"))
      document = int(documents[n])
      start = place - int(ends[n] - sizes[document])
      count = min(int(sizes[document]) - start, stop - at)
      found.append((document, start, start + count))
      at += count
    return found

  return pieces


def _whole(tokens: Tokens, length: int, seed: int | None) -> list[list[Piece]]:
  """Rows of whole documents, each at most `length` long and with a target."""
  sizes = np.minimum(tokens.sizes, length)
  kept = np.array([
    n for n, size in enumerate(sizes.tolist())
    if tokens.target[tokens.offsets[n] + 1 : tokens.offsets[n] + 1 + size].any()
  ], int)  # fmt: skip
  if not len(kept):
    raise UserError(
      f"{tokens.name}: no document has a target among its first {length} "
      "positions, needs one at least: raise sequence_length"
    )
  order = np.arange(len(kept))
  if seed is not None:
    order = np.random.default_rng((_PACK, seed)).permutation(len(kept))
  rows = first_fit(sizes[kept, None], [length], order)
  return [[(int(kept[n]), 0, int(sizes[kept[n]])) for n in row] for row in rows]
