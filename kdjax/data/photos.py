"""scikit-learn's two sample photographs as a classification task.

From which of 24 regions is a tile of 8 x 8 pixels? Both photographs (a palace
by a lake, a dahlia) are halved in size and cut into 3 x 4 regions, and each
region into 8 x 10 tiles that share no pixel. Of every five tiles along a row
one is for the test, one for validation; the next row is shifted by two.
"""

import functools

import numpy as np

from kdjax.data.sources import Source, from_arrays
from kdjax.errors import choose

ROWS, COLUMNS, SIZE = 3, 4, 8
PHOTOS = ("china.jpg", "flower.jpg")
# What (column + 2 * row) % 5 may be, of a tile's place in its region.
SPLITS = {"train": (0, 2, 4), "validation": (1,), "test": (3,)}


def photos(split: str) -> Source:
  """The tiles of `train` (1,152), `validation` or `test` (384 each).

  Raises:
    UserError: for another split.
  """
  chosen = choose("split of photos", split, SPLITS)
  tiles, labels = [], []
  for number, photo in enumerate(_halved()):
    height, width = photo.shape[0] // ROWS, photo.shape[1] // COLUMNS
    for region in range(ROWS * COLUMNS):
      row, column = divmod(region, COLUMNS)
      top, left = row * height, column * width
      for i in range(height // SIZE):
        for j in range(width // SIZE):
          if (j + 2 * i) % 5 in chosen:
            y, x = top + i * SIZE, left + j * SIZE
            tiles.append(photo[y : y + SIZE, x : x + SIZE])
            labels.append(number * ROWS * COLUMNS + region)
  return from_arrays(
    np.stack(tiles),
    np.asarray(labels),
    num_classes=len(PHOTOS) * ROWS * COLUMNS,
    name="photos",
    split=split,
  )


@functools.cache
def _halved() -> tuple[np.ndarray, ...]:
  """Each photograph, uint8 [213, 320, 3]: the means of 2 x 2 pixels."""
  from sklearn import datasets

  halved = []
  for name in PHOTOS:
    photo = datasets.load_sample_image(name).astype(np.uint32)
    h, w = photo.shape[0] // 2, photo.shape[1] // 2
    blocks = photo[: 2 * h, : 2 * w].reshape(h, 2, w, 2, 3)
    halved.append((blocks.sum((1, 3)) // 4).astype(np.uint8))
  return tuple(halved)
