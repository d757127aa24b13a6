import numpy as np
import pytest
from sklearn import datasets

from kdjax import data
from kdjax.types import UserError


def halved(name):
  photo = datasets.load_sample_image(name).astype(np.float64)[:426, :640]
  return np.floor(photo.reshape(213, 2, 320, 2, 3).mean((1, 3)))


COUNTS = {"train": 1_152, "validation": 384, "test": 384}


@pytest.mark.parametrize("split", COUNTS)
def test_each_region_has_as_many_tiles(split):
  source = data.load("photos", split)
  assert len(source) == COUNTS[split]
  assert source.image_shape == (8, 8, 3)
  assert source.num_classes == 24
  counts = np.bincount(np.asarray(source.labels), minlength=24)
  np.testing.assert_array_equal(counts, COUNTS[split] // 24)


@pytest.mark.parametrize(
  ("split", "position", "photo", "top", "left"),
  [
    # Of the first row of ten tiles, six train, two each are held out.
    ("train", 0, "china.jpg", 0, 0),
    ("validation", 0, "china.jpg", 0, 8),
    ("train", 1, "china.jpg", 0, 16),
    ("test", 0, "china.jpg", 0, 24),
    # The next row begins two tiles on.
    ("train", 6, "china.jpg", 8, 0),
    ("test", 2, "china.jpg", 8, 8),
    # Region 5 is the second row's second column.
    ("test", 5 * 16, "china.jpg", 71, 80 + 24),
    ("validation", 23 * 16 + 1, "flower.jpg", 142, 240 + 48),
  ],
)
def test_a_tile_is_that_part_of_the_photograph(
  split, position, photo, top, left
):
  image = data.load("photos", split).examples[position]["image"]
  assert image.dtype == np.uint8
  want = halved(photo)[top : top + 8, left : left + 8]
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
