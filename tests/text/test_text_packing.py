import re

import numpy as np
import pytest

from kdjax.data import text
from kdjax.data.text import packing
from kdjax.types import UserError

SIZES = (5, 1, 9, 3, 2, 14, 4)  # tokens of each document


def store(sizes=SIZES, target=None, pad=0):
  """Token k of document d is 100 d + k + 1; by default all are targets."""
  ids = np.concatenate(
    [100 * d + 1 + np.arange(n) for d, n in enumerate(sizes)]
  )
  total = len(ids)
  return text.Tokens(
    ids=ids.astype(np.uint16),
    target=np.ones(total, bool) if target is None else target,
    num_bytes=np.arange(total, dtype=np.uint32) % 7,
    offsets=np.cumsum([0, *sizes]),
    name="made",
    pad=pad,
    fingerprint="",
  )


def take(batches, count):
  steps = iter(batches)
  return [next(steps) for _ in range(count)]


def train(tokens, **changes):
  arguments = dict(batch_size=2, sequence_length=6, seed=3, num_threads=0)
  return text.train_batches(tokens, **(arguments | changes))


def evaluate(tokens, **changes):
  arguments = dict(batch_size=2, sequence_length=6, num_threads=0)
  return list(text.eval_batches(tokens, **(arguments | changes)))


def predictions(batches):
  """(token read, token predicted) where the prediction counts."""
  pairs = []
  for batch in batches:
    counts = batch["mask"] == 1
    pairs += zip(
      batch["tokens"][counts].tolist(), batch["label"][counts].tolist()
    )
  return pairs


def every_pair(sizes=SIZES):
  return [
    (100 * d + k, 100 * d + k + 1)
    for d, n in enumerate(sizes)
    for k in range(1, n)
  ]


@pytest.mark.parametrize("cut", [True, False])
def test_every_token_but_a_documents_first_is_predicted_once_from_its_own(cut):
  # No document is longer than a row, so that both ways keep all.
  batches = evaluate(store(), sequence_length=13, cut=cut)
  assert sorted(predictions(batches)) == sorted(every_pair())


def test_cutting_a_document_loses_no_prediction():
  for length in (1, 2, 5, 6):
    batches = evaluate(store(), sequence_length=length)
    assert sorted(predictions(batches)) == sorted(every_pair())


def test_a_row_by_hand():
  tokens = store((3, 4), target=np.array([1, 0, 1, 0, 1, 1, 0], bool), pad=9)
  (batch,) = evaluate(tokens, batch_size=1, sequence_length=7)
  want = {
    "tokens": [1, 2, 101, 102, 103, 9, 9],
    "label": [2, 3, 102, 103, 104, 9, 9],
    # Targets are 3 (of 2), 102 (of 101) and 103 (of 102): shifted with them.
    "mask": [0, 1, 1, 1, 0, 0, 0],
    "segment_ids": [1, 1, 2, 2, 2, 0, 0],
    "positions": [0, 1, 0, 1, 2, 0, 0],
    "num_bytes": [1, 2, 4, 5, 6, 0, 0],  # those of the label
  }
  assert set(batch) == set(want)
  for name, row in want.items():
    np.testing.assert_array_equal(batch[name][0], row, err_msg=name)
    kind = np.float32 if name == "mask" else np.int32
    assert batch[name].dtype == kind


def test_the_shift_by_hand():
  got = text.next_token(np.array([7, 8, 9]), np.array([True, True, False]))
  for array, want in zip(got, ([7, 8], [8, 9], [True, False])):
    np.testing.assert_array_equal(array, want)


@pytest.mark.parametrize("cut", [True, False])
def test_an_epoch_holds_every_document_in_an_order_of_its_own(cut):
  tokens = store((5, 3, 6, 2, 4, 7) * 4)
  length = 6 if cut else 7  # of 84 positions: 6 leaves no rest
  rows = 14 if cut else len(packing._whole(tokens, length, 3))
  steps = iter(train(tokens, batch_size=1, sequence_length=length, cut=cut))
  epochs = [predictions([next(steps) for _ in range(rows)]) for _ in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == sorted(every_pair((5, 3, 6, 2, 4, 7) * 4))
  assert epochs[0] != epochs[1] != epochs[2]


def test_rows_that_do_not_divide_the_epoch_lose_nothing():
  # 10 rows of 3 positions a run, 31 positions an epoch.
  pairs = predictions(take(train(store(), sequence_length=3), 80))
  counts = np.unique(pairs, axis=0, return_counts=True)[1]
  assert len(counts) == len(every_pair())
  assert counts.max() - counts.min() <= 1


def test_the_rows_of_a_batch_are_not_one_documents_neighbours():
  tokens = store((60, 60, 60, 60))
  (batch,) = take(train(tokens, batch_size=8, sequence_length=5), 1)
  assert len(set(batch["tokens"][:, 0] // 100)) > 2


def test_a_training_row_has_no_padding_and_may_span_epochs():
  batches = take(train(store()), 20)
  assert all((batch["mask"] == 1).all() for batch in batches)


@pytest.mark.parametrize("cut", [True, False])
def test_segments_are_one_document_each_and_positions_count_in_them(cut):
  for batch in take(train(store(), cut=cut, sequence_length=13), 12):
    for b in range(2):
      segments = batch["segment_ids"][b]
      (filled,) = np.nonzero(segments)
      assert filled.tolist() == list(range(len(filled)))  # padding at the end
      assert (np.diff(segments[filled]) >= 0).all()
      for segment in range(1, segments.max() + 1):
        (inside,) = np.nonzero(segments == segment)
        read = batch["tokens"][b, inside]
        assert len(set(read // 100)) == 1
        np.testing.assert_array_equal(np.diff(read), 1)
        np.testing.assert_array_equal(batch["label"][b, inside], read + 1)
        np.testing.assert_array_equal(
          batch["positions"][b, inside], np.arange(len(inside))
        )


@pytest.mark.parametrize("cut", [True, False])
def test_batch_is_a_function_of_seed_and_step_however_many_processes(cut):
  def global_batches(processes, start=0):
    parts = []
    for index in range(processes):
      batches = train(
        store(),
        batch_size=4,
        cut=cut,
        process_index=index,
        process_count=processes,
      )
      steps = iter(batches)
      steps.set_state({"next_index": start})
      parts.append([next(steps) for _ in range(6)])
    return [
      {name: np.concatenate([p[name] for p in step]) for name in step[0]}
      for step in zip(*parts)
    ]

  want = global_batches(1)
  for got in (global_batches(2), global_batches(4)):
    for a, b in zip(want, got):
      for name in a:
        np.testing.assert_array_equal(a[name], b[name])
  later = global_batches(2, start=3)
  np.testing.assert_array_equal(later[0]["tokens"], want[3]["tokens"])
  other = take(train(store(), batch_size=4, cut=cut, seed=4), 6)
  assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(want, other))


def test_position_is_restored_exactly():
  steps = iter(train(store(), num_threads=2))
  for _ in range(3):
    next(steps)
  state = steps.get_state()
  want = [next(steps)["tokens"] for _ in range(3)]
  again = iter(train(store(), num_threads=2))
  again.set_state(state)
  for row in want:
    np.testing.assert_array_equal(next(again)["tokens"], row)


def test_whole_documents_are_never_cut_and_long_ones_keep_their_beginning():
  tokens = store()
  batches = evaluate(tokens, sequence_length=6, cut=False)
  want = [
    pair for d, n in enumerate(SIZES) for pair in every_pair(SIZES)
    if pair[0] // 100 == d and pair[1] % 100 <= min(n, 7)
  ]  # fmt: skip
  assert sorted(predictions(batches)) == sorted(want)
  assert text.num_shortened(tokens, 6) == 2
  assert text.num_shortened(tokens, 13) == 0


def test_a_document_whose_targets_are_all_cut_off_is_left_out():
  target = np.zeros(10, bool)
  # The first of document 0, which nothing predicts, and its last; the second
  # of document 1.
  target[[0, 4, 6]] = True
  tokens = store((5, 5), target=target)
  (batch,) = evaluate(tokens, sequence_length=3, batch_size=1, cut=False)
  assert predictions([batch]) == [(101, 102)]
  none = store((5, 5), target=np.arange(10) == 4)
  with pytest.raises(UserError, match="raise sequence_length"):
    train(none, sequence_length=3, cut=False)


def test_first_fit_fills_rows_without_overflow():
  random = np.random.default_rng(0)
  sizes = random.integers(1, 20, (300, 2))
  rows = packing.first_fit(sizes, [20, 24], random.permutation(300))
  assert sorted(n for row in rows for n in row) == list(range(300))
  for row in rows:
    assert (sizes[row].sum(0) <= [20, 24]).all()
  # The best possible is the sum over the capacity; one a row would be 300.
  assert len(rows) < 1.25 * (sizes.sum(0) / [20, 24]).max()


def test_eval_pads_the_last_batch_and_counts_every_byte_once():
  tokens = store()
  batches = evaluate(tokens, batch_size=3, sequence_length=7)
  assert {b["tokens"].shape for b in batches} == {(3, 7)}
  first = np.isin(np.arange(len(tokens.ids)), tokens.offsets)
  want = tokens.num_bytes[~first].sum()
  got = sum((b["num_bytes"] * b["mask"]).sum() for b in batches)
  assert got == want
  counts = [len(evaluate(tokens, batch_size=4, sequence_length=7,
            process_index=i, process_count=4)) for i in range(4)]  # fmt: skip
  assert counts == [2] * 4


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(seed=-1), "got seed=-1, needs 0 or more"),
    (dict(sequence_length=0), "got sequence_length=0, needs 1 or more"),
    (dict(batch_size=3, process_count=2), "batch_size=3 for 2 processes"),
    (dict(process_index=1), "got process_index=1, needs 0..0"),
  ],
)
def test_wrong_arguments_are_refused(changes, message):
  with pytest.raises(UserError, match=re.escape(message)):
    train(store(), **changes)


def test_rows_longer_than_the_context_are_refused():
  packing.check_length(2048, 2048)
  with pytest.raises(UserError, match="context is 2048: set sequence_length"):
    packing.check_length(2049, 2048)
