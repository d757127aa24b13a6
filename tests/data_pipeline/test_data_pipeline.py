import functools
import itertools
import json

import grain
import numpy as np
import pytest

from kdjax import data
from kdjax.types import UserError

SIZE = 11
PLAIN = {"mean": 0.0, "std": 1.0, "num_threads": 0}


def source(size=SIZE, num_classes=3, bad=None):
  images = np.random.default_rng(0).integers(0, 256, (size, 6, 5, 3), np.uint8)
  labels = np.arange(size) % num_classes
  if bad is not None:
    labels[bad] = num_classes
  return data.from_arrays(images, labels, num_classes=num_classes)


def train(batch_size=4, seed=0, **options):
  return data.train_batches(
    options.pop("of", source()),
    batch_size=batch_size,
    seed=seed,
    **{**PLAIN, **options},
  )


def take(batches, count):
  return list(itertools.islice(iter(batches), count))


def same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name])
    assert a[name].dtype == b[name].dtype


@pytest.mark.parametrize("batch_size", [1, 4, 11, 30])
def test_every_epoch_visits_every_example_once(batch_size):
  # 30 > N: one batch spans epochs, and none of them is cut.
  num_epochs = 30
  batches = take(train(batch_size), num_epochs * SIZE // batch_size)
  order = np.concatenate([batch["index"] for batch in batches])
  epochs = order[: len(order) // SIZE * SIZE].reshape(-1, SIZE)
  np.testing.assert_array_equal(
    np.sort(epochs, axis=1), np.tile(np.arange(SIZE), (len(epochs), 1))
  )
  assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_the_order_is_the_documented_permutation():
  batches = take(train(4, seed=7), 6)
  want = [np.random.default_rng((1, 7, e)).permutation(SIZE) for e in range(3)]
  got = np.concatenate([batch["index"] for batch in batches])
  np.testing.assert_array_equal(got, np.concatenate(want)[: len(got)])


def test_seeds_share_no_epoch():
  # A shuffle seeded by seed + epoch would give seed 1 the epochs of seed 0.
  epochs = [
    tuple(batch["index"])
    for seed in range(4)
    for batch in take(train(SIZE, seed=seed), 4)
  ]
  assert len(set(epochs)) == len(epochs)


@pytest.mark.parametrize("process_count", [2, 3])
def test_processes_together_read_the_global_batches(process_count):
  labelled = np.arange(SIZE) % 2
  make = functools.partial(
    train, 6, augment=data.crop_and_flip, labelled=labelled
  )
  parts = [
    take(make(process_index=p, process_count=process_count), 5)
    for p in range(process_count)
  ]
  for whole, *pieces in zip(take(make(), 5), *parts):
    joined = {
      name: np.concatenate([piece[name] for piece in pieces]) for name in whole
    }
    same(whole, joined)


def test_a_batch_holds_what_its_index_says():
  of, labelled = source(), np.arange(SIZE) % 2
  mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
  batches = take(train(of=of, mean=mean, std=std, labelled=labelled), 7)
  for batch in batches:
    assert {k: (v.dtype, v.shape) for k, v in batch.items()} == {
      "image": (np.float32, (4, 6, 5, 3)),
      "label": (np.int32, (4,)),
      "index": (np.int32, (4,)),
      "mask": (np.float32, (4,)),
      "labelled": (np.float32, (4,)),
    }
    for row, index in enumerate(batch["index"].tolist()):
      pixels = np.float64(of.examples[index]["image"])
      want = (pixels / 255 - np.array(mean)) / np.array(std)
      np.testing.assert_allclose(batch["image"][row], want, 1e-5, 1e-6)
      assert batch["label"][row] == index % 3
      assert batch["labelled"][row] == index % 2
    assert (batch["mask"] == 1).all()
  assert "labelled" not in take(train(), 1)[0]


def test_augmentation_differs_by_seed_step_and_row():
  one = data.from_arrays(  # every row of every batch reads the same example
    source().examples[0]["image"][None], np.array([0]), num_classes=1
  )

  def draw(image, generator):
    image = image.copy()
    image[0, 0] = generator.integers(0, 256, 3)
    return image

  marks = [
    tuple(image[0, 0])
    for seed in (0, 1)
    for batch in take(train(4, of=one, seed=seed, augment=draw), 8)
    for image in batch["image"]
  ]
  assert len(set(marks)) == len(marks)


@pytest.mark.parametrize("threads", [0, 3])
def test_resuming_anywhere_gives_the_uninterrupted_batches(threads):
  make = functools.partial(
    train, 4, augment=data.crop_and_flip, num_threads=threads
  )
  whole = take(make(), 9)  # three epochs and a bit
  running = iter(make())
  for done in range(8):
    state = json.loads(json.dumps(running.get_state()))
    assert state == {"next_index": done}
    fresh = iter(make())
    fresh.set_state(state)
    same(next(fresh), whole[done])
    same(next(fresh), whole[done + 1])
    same(next(running), whole[done])
  running.set_state({"next_index": 2})  # back, with batches already prefetched
  same(next(running), whole[2])


def test_starting_late_reads_nothing_before():
  read, of = [], source()

  class Spy:
    def __len__(self):
      return SIZE

    def __getitem__(self, index):
      read.append(index)
      return of.examples[index]

  spied = data.Source(Spy(), of.labels, 3, (6, 5, 3), "spied", "all")
  iterator = iter(train(of=spied))
  iterator.set_state({"next_index": 10**12})
  batch = next(iterator)
  assert read == batch["index"].tolist()
  assert iterator.get_state() == {"next_index": 10**12 + 1}


def test_threads_change_nothing():
  for a, b in zip(take(train(num_threads=4), 20), take(train(), 20)):
    same(a, b)


def evaluate(batch_size=4, **options):
  of = options.pop("of", source())
  return data.eval_batches(of, batch_size=batch_size, **{**PLAIN, **options})


@pytest.mark.parametrize("batch_size", [1, 4, 11, 16])
def test_evaluation_sees_each_example_once_in_order(batch_size):
  batches = list(evaluate(batch_size))
  assert len(batches) == -(-SIZE // batch_size)
  joined = {
    name: np.concatenate([batch[name] for batch in batches])
    for name in batches[0]
  }
  assert len(joined["mask"]) == len(batches) * batch_size
  real = joined["mask"] == 1
  assert joined["mask"].sum() == SIZE
  np.testing.assert_array_equal(joined["index"][real], np.arange(SIZE))
  np.testing.assert_array_equal(joined["label"][real], np.arange(SIZE) % 3)
  pixels = np.stack([source().examples[i]["image"] for i in range(SIZE)])
  np.testing.assert_allclose(
    joined["image"][real], pixels / 255.0, rtol=1e-5, atol=1e-6
  )
  assert (joined["index"][~real] == SIZE - 1).all()
  assert (joined["mask"][~real] == 0).all()


def test_evaluation_can_be_repeated():
  batches = evaluate()
  for a, b in zip(list(batches), list(batches), strict=True):
    same(a, b)


def test_processes_evaluate_the_same_number_of_batches():
  parts = [
    list(evaluate(8, process_index=p, process_count=4)) for p in range(4)
  ]
  for whole, *pieces in zip(list(evaluate(8)), *parts, strict=True):
    for name in whole:
      np.testing.assert_array_equal(
        whole[name], np.concatenate([piece[name] for piece in pieces])
      )
  assert parts[3][1]["mask"].sum() == 0  # nothing but padding


def test_evaluation_transforms_every_image():
  def corner(image):
    return image[:2, :2]

  batch = next(iter(evaluate(transform=corner)))
  want = np.stack([source().examples[i]["image"][:2, :2] for i in range(4)])
  np.testing.assert_allclose(batch["image"], want / 255.0, 1e-5, 1e-6)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_bad_label_never_reaches_the_step(threads):
  of = source(bad=5)
  told = "example 5 has label 3, needs 0..2"
  with pytest.raises(UserError, match=told):
    take(train(of=of, num_threads=threads), 3)
  with pytest.raises(UserError, match=told):
    list(evaluate(of=of, num_threads=threads))


@pytest.mark.parametrize("make", [train, evaluate])
@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"batch_size": 0}, "got batch_size=0 for 1 processes"),
    ({"batch_size": 4, "process_count": 3}, "got batch_size=4 for 3 processes"),
    ({"process_index": 2, "process_count": 2}, "process_index=2, needs 0..1"),
    ({"mean": (0.1, 0.2)}, "got mean of shape .*3 channels"),
    ({"std": [1.0] * 4}, "got std of shape .*3 channels"),
    ({"std": (1.0, 0.0, 1.0)}, "needs positive numbers"),
  ],
)
def test_wrong_arguments_are_told_before_the_first_batch(
  make, options, message
):
  with pytest.raises(UserError, match=message):
    make(**options)


def test_more_wrong_arguments_of_training():
  with pytest.raises(UserError, match="seed=-1"):
    train(seed=-1)
  with pytest.raises(UserError, match=r"labelled of shape \(3,\)"):
    train(labelled=np.ones(3))


@pytest.mark.parametrize("make", [train, evaluate])
def test_an_empty_source_is_told(make):
  empty = data.select(source(), np.zeros(SIZE, bool))
  with pytest.raises(UserError, match="holds no examples"):
    make(of=empty)


def test_grain_moves_the_iterator_by_its_own_name():
  iterator = iter(train())
  grain.experimental.set_next_index(iterator, 5)
  same(next(iterator), take(train(), 6)[5])
