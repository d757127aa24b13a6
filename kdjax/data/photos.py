"""scikit-learn's two sample photographs as a classification task.

From which of 24 regions is a patch of 16 x 16 pixels? Both photographs (a
palace by a lake, a dahlia) are halved in size and cut into 3 x 4 regions. Each
region is cut once more, from left to right: patches of the first 44 columns
train, of the next 18 validate, of the last 18 test. So no pixel is in two
splits, and what is tested lies beside what was learned, not within it.
"""

import functools

import numpy as np

from kdjax.data.sources import Source, from_arrays
from kdjax.errors import choose

ROWS, COLUMNS, SIZE, STRIDE = 3, 4, 16, 2
# Of a region's 80 columns.
BANDS = {"train": (0, 44), "validation": (44, 62), "test": (62, 80)}
PHOTOS = ("china.jpg", "flower.jpg")


def photos(split: str) -> Source:
  """The patches of `train` (10,080), `validation` or `test` (1,344 each).

  Raises:
    UserError: for another split.
  """
  first, last = choose("split of photos", split, BANDS)
  patches, labels = [], []
  for number, photo in enumerate(_halved()):
    height, width = photo.shape[0] // ROWS, photo.shape[1] // COLUMNS
    for region in range(ROWS * COLUMNS):
      row, column = divmod(region, COLUMNS)
      top, left = row * height, column * width
      band = photo[top : top + height, left + first : left + last]
      found = _patches(band)
      patches.append(found)
      labels.append(np.full(len(found), number * ROWS * COLUMNS + region))
  return from_arrays(
    np.concatenate(patches),
    np.concatenate(labels),
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


def _patches(band: np.ndarray) -> np.ndarray:
  views = np.lib.stride_tricks.sliding_window_view(band, (SIZE, SIZE), (0, 1))
  chosen = views[::STRIDE, ::STRIDE]  # [rows, columns, C, SIZE, SIZE]
  return np.moveaxis(chosen.reshape(-1, *chosen.shape[2:]), 1, -1).copy()
