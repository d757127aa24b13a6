import functools
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from tfds_folder import encode, picture, write

from kdjax import data
from kdjax.types import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """A folder with cifar10 and imagenet2012 as TFDS prepares them, but tiny."""
  root = tmp_path_factory.mktemp("tfds")
  cifar = {
    "id": tfds.features.Text(),
    "image": tfds.features.Image(shape=(32, 32, 3)),
    "label": tfds.features.ClassLabel(num_classes=10),
  }

  def small(start, stop):
    for i in range(start, stop):
      image = encode(picture(i, (32, 32, 3)), "PNG")
      yield i, {"id": f"train_{i}", "image": image, "label": i * 7 % 10}

  splits = {"train": list(small(0, 20)), "test": list(small(20, 25))}
  write(root, "Cifar10", "3.0.2", cifar, splits)
  write(root, "NotRegistered", "1.0.0", cifar, {"train": list(small(0, 6))})
  imagenet = {
    "image": tfds.features.Image(encoding_format="jpeg"),
    "label": tfds.features.ClassLabel(num_classes=1000),
    "file_name": tfds.features.Text(),
  }

  def large():
    for i in range(5):
      image = encode(picture(i, (20 + i, 40 - 3 * i, 3)), "JPEG")
      yield i, {"image": image, "label": 199 * i, "file_name": f"{i}.JPEG"}

  write(root, "Imagenet2012", "5.1.0", imagenet, {"train": list(large())})
  only_text = {"text": tfds.features.Text()}
  write(root, "Words", "1.0.0", only_text, {"train": [(0, {"text": "a"})]})
  unlabelled = {"image": cifar["image"], "label": tfds.features.Text()}
  example = {"image": encode(picture(0, (32, 32, 3)), "PNG"), "label": "ship"}
  splits = {"train": [(0, example)]}
  write(root, "Unlabelled", "1.0.0", unlabelled, splits)
  return root


def by_id(source):
  """TFDS shuffles what it writes; the id tells which picture it was."""
  examples = [source.examples[i] for i in range(len(source))]
  return {int(e["id"].decode().split("_")[1]): e for e in examples}


@pytest.mark.parametrize("name", ["cifar10", "cifar10:3.0.2", "not_registered"])
def test_a_prepared_folder_is_read_bit_for_bit_without_tensorflow(root, name):
  source = data.load(name, "train", data_dir=root)
  assert source.num_classes == 10
  assert source.image_shape == (32, 32, 3)
  examples = by_id(source)
  assert sorted(examples) == list(range(6 if name == "not_registered" else 20))
  for i, example in examples.items():
    np.testing.assert_array_equal(example["image"], picture(i, (32, 32, 3)))
    assert example["label"] == i * 7 % 10
  assert "tensorflow" not in sys.modules


def test_reading_writes_nothing_to_the_terminal(root):
  # In a process of its own, because TFDS tells some things once a process.
  code = """if True:
    import sys
    from kdjax import data
    data.load("cifar10", "train", data_dir=sys.argv[1]).examples[1]
  """
  ran = subprocess.run(
    [sys.executable, "-c", code, root], capture_output=True, check=True
  )
  assert (ran.stdout, ran.stderr) == (b"", b"")


def test_splits_and_slices(root):
  load = functools.partial(data.load, "cifar10", data_dir=root)
  assert sorted(by_id(load("test"))) == list(range(20, 25))
  assert len(load("train+test")) == 25
  head, tail = by_id(load("train[:90%]")), by_id(load("train[90%:]"))
  assert (len(head), len(tail)) == (18, 2)
  assert sorted([*head, *tail]) == list(range(20))


def test_labels_come_without_decoding_the_images(root, monkeypatch):
  source = data.load("cifar10", "train", data_dir=root)
  want = [source.examples[i]["label"] for i in range(20)]
  monkeypatch.setattr(PIL.Image, "open", None)
  with pytest.raises(TypeError):
    source.examples[0]
  assert [source.labels[i] for i in range(20)] == want


def test_in_memory_holds_the_same(root):
  source = data.load("cifar10", "test", data_dir=root)
  held = data.in_memory(source)
  assert held.image_shape == source.image_shape
  for i in range(5):
    np.testing.assert_array_equal(
      held.examples[i]["image"], source.examples[i]["image"]
    )
    assert held.labels[i] == source.labels[i]
  with pytest.raises(UserError, match="several sizes"):
    data.in_memory(data.load("imagenet2012", "train", data_dir=root))


def test_images_of_many_sizes_become_batches(root):
  source = data.load("imagenet2012", "train", data_dir=root)
  assert source.image_shape == (None, None, 3)
  assert source.num_classes == 1000
  make = {"batch_size": 4, "mean": 0.0, "std": 1.0, "num_threads": 0}
  crop = functools.partial(data.random_resized_crop, size=16)
  train = data.train_batches(source, seed=0, augment=crop, **make)
  batch = next(iter(train))
  assert batch["image"].shape == (4, 16, 16, 3)
  assert set(batch["label"]) <= {0, 199, 398, 597, 796}
  center = functools.partial(data.center_crop, size=16)
  for batch in data.eval_batches(source, transform=center, **make):
    assert batch["image"].shape == (4, 16, 16, 3)
  with pytest.raises(UserError, match=r"augment=.*random_resized_crop"):
    data.train_batches(source, seed=0, **make)
  with pytest.raises(UserError, match=r"transform=.*center_crop"):
    data.eval_batches(source, **make)
  unfit = data.eval_batches(source, transform=lambda image: image, **make)
  with pytest.raises(UserError, match="in one batch"):
    next(iter(unfit))


@pytest.mark.parametrize(
  ("name", "split", "message"),
  [
    ("cifar10", "nope", r"no split 'nope'.*train \(20\)|test \(5\)"),
    ("cifar10", "train[", r"no split 'train\['"),
    ("cifar10", "train[:0]", r"'train\[:0\]' holds no examples.*train \(20\)"),
    ("cifar10", "train[30:]", "choose of"),
    ("cifa10", "train", "did you mean 'cifar10'"),
    ("digit", "train", "did you mean 'digits'"),
    ("cifar10:9.9.9", "train", "cannot open 'cifar10:9.9.9'.*only: 3.0.2"),
    ("unlabelled", "train", "has the features image, label; needs image and"),
    ("words", "train", "has the features text; needs image and label"),
  ],
)
def test_what_is_not_there_is_told(root, name, split, message):
  with pytest.raises(UserError, match=message) as caught:
    data.load(name, split, data_dir=root)
  assert "\n" not in str(caught.value)


def test_an_unprepared_dataset_tells_how_to_prepare_it(root, monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(UserError) as caught:
    data.load("mnist", "train", data_dir=root)
  message = str(caught.value)
  assert "pip install tensorflow-cpu" in message
  assert f"tfds.builder('mnist', data_dir={str(root)!r}, " in message
  assert "file_format='array_record').download_and_prepare()" in message
  monkeypatch.setattr("importlib.util.find_spec", lambda name: "found")
  with pytest.raises(UserError) as caught:
    data.load("mnist", "train", data_dir=root)
  assert "pip install" not in str(caught.value)


def test_a_format_without_random_access_is_told(root, tmp_path):
  folder = tmp_path / "cifar10" / "3.0.2"
  folder.mkdir(parents=True)
  for file in (root / "cifar10" / "3.0.2").glob("*.json"):
    text = file.read_text().replace("array_record", "tfrecord")
    (folder / file.name).write_text(text)
  with pytest.raises(UserError, match="needs array_record: prepare it into"):
    data.load("cifar10", "train", data_dir=tmp_path)


def arrays(labels, num_classes=3):
  labels = np.asarray(labels)
  images = np.arange(len(labels) * 12).reshape(-1, 2, 2, 3) % 256
  return data.from_arrays(
    images.astype(np.uint8), labels, num_classes=num_classes
  )


def test_arrays_of_the_wrong_kind_are_refused():
  good = np.zeros((4, 2, 2, 3), np.uint8)
  for images in (good.astype(np.float32), good[0]):
    with pytest.raises(UserError, match=r"scale to 0\.\.255"):
      data.from_arrays(images, np.zeros(4, int), num_classes=2)
  for labels in (np.zeros(3, int), np.zeros(4), np.zeros((4, 2), int)):
    with pytest.raises(UserError, match="one class number an image"):
      data.from_arrays(good, labels, num_classes=2)


@pytest.mark.parametrize("bad", [-1, 3])
def test_the_first_label_out_of_range_is_named(bad):
  data.check_labels(arrays([0, 1, 2]))
  source = arrays([0, 1, bad, 99, 2])
  with pytest.raises(UserError, match=f"example 2 has label {bad}, needs 0..2"):
    data.check_labels(source)


def test_large_sets_are_sampled_from_end_to_end():
  labels = np.zeros(1000, int)
  read = []

  class Spy:
    def __getitem__(self, index):
      read.append(index)
      return 0

    def __len__(self):
      return 1000

  source = arrays(labels)
  object.__setattr__(source, "labels", Spy())
  data.check_labels(source, limit=10)
  assert len(read) == 10
  assert (read[0], read[-1]) == (0, 999)


LABELS = np.random.default_rng(0).integers(0, 5, 200)


@pytest.mark.parametrize("count", [0, 1, 23, 25, 100])
def test_labelled_examples_are_balanced_to_within_one(count):
  mask = data.labelled_mask(arrays(LABELS, 5), count, seed=1)
  assert mask.dtype == bool
  assert mask.sum() == count
  per_class = np.bincount(LABELS[mask], minlength=5)
  assert per_class.max() - per_class.min() <= (count % 5 != 0)


def test_labelled_examples_follow_the_seed_and_are_nested():
  source = arrays(LABELS, 5)
  small, large, other = (
    data.labelled_mask(source, count, seed=seed)
    for count, seed in [(12, 1), (38, 1), (38, 2)]
  )
  assert not (small & ~large).any()
  assert (large != other).any()
  np.testing.assert_array_equal(large, data.labelled_mask(source, 38, seed=1))
  extra = {  # which classes get one more is drawn too
    tuple(np.bincount(LABELS[data.labelled_mask(source, 6, seed=s)]))
    for s in range(20)
  }
  assert len(extra) == 5


def test_too_few_examples_of_a_class_are_told():
  source = arrays([0, 0, 0, 1, 2])
  with pytest.raises(UserError, match=r"has 1 examples of class [12], needs 2"):
    data.labelled_mask(source, 5, seed=4)
  for count in (-1, 6):
    with pytest.raises(UserError, match=r"needs 0\.\.5"):
      data.labelled_mask(source, count, seed=0)


def test_select_and_subset_keep_image_and_label_together():
  source = arrays(LABELS, 5)
  mask = data.labelled_mask(source, 20, seed=3)
  part = data.subset(source, 20, seed=3)
  assert len(part) == 20
  assert part.num_classes == 5
  for position, index in enumerate(np.flatnonzero(mask)):
    example = part.examples[position]
    np.testing.assert_array_equal(
      example["image"], source.examples[int(index)]["image"]
    )
    assert example["label"] == part.labels[position] == LABELS[index]
  for wrong in (mask[:-1], mask.astype(int)):
    with pytest.raises(UserError, match="one entry an example"):
      data.select(source, wrong)
