import numpy as np
import pytest
from sklearn import datasets

from kdjax import data
from kdjax.types import UserError

COUNTS = {"train": 10_080, "validation": 1_344, "test": 1_344}


def halved(name):
  photo = datasets.load_sample_image(name).astype(np.float64)[:426, :640]
  return np.floor(photo.reshape(213, 2, 320, 2, 3).mean((1, 3)))


@pytest.mark.parametrize("split", COUNTS)
def test_each_region_has_as_many_patches(split):
  source = data.load("photos", split)
  assert len(source) == COUNTS[split]
  assert source.image_shape == (16, 16, 3)
  assert source.num_classes == 24
  counts = np.bincount(np.asarray(source.labels), minlength=24)
  np.testing.assert_array_equal(counts, COUNTS[split] // 24)


@pytest.mark.parametrize(
  ("split", "position", "photo", "top", "left"),
  [
    ("train", 0, "china.jpg", 0, 0),
    # The second of a row of patches, and the first of the next row (15 wide).
    ("train", 1, "china.jpg", 0, 2),
    ("train", 15, "china.jpg", 2, 0),
    # The last patch of the first region ends at column 44.
    ("train", 419, "china.jpg", 54, 28),
    # Region 5 is the second row's second column.
    ("test", 5 * 56, "china.jpg", 71, 80 + 62),
    ("validation", 23 * 56 + 1, "flower.jpg", 142, 240 + 46),
  ],
)
def test_a_patch_is_that_part_of_the_photograph(
  split, position, photo, top, left
):
  image = data.load("photos", split).examples[position]["image"]
  assert image.dtype == np.uint8
  want = halved(photo)[top : top + 16, left : left + 16]
  np.testing.assert_array_equal(image, want)


def test_the_normalization_is_that_of_the_train_split():
  source = data.load("photos", "train")
  images = np.stack([source.examples[i]["image"] for i in range(len(source))])
  mean, std = data.NORMALIZATION["photos"]
  np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), atol=1e-3)
  np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), atol=1e-3)


def test_another_split_is_refused():
  with pytest.raises(
    UserError, match=r"unknown split of photos 'tset'.*'test'"
  ):
    data.load("photos", "tset")
