"""scikit-learn's handwritten digits as a TFDS builder: no network, no TF.

1797 images of 8 x 8 pixels, ten classes. The splits are ranges of the file's
own order, because neighbours in it look alike (plausibly one writer's): a
shuffled split would put near-copies of the training images into the test.
"""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered

from kdjax.types import UserError

SPLITS = {
  "train": range(1200),
  "validation": range(1200, 1500),
  "test": range(1500, 1797),
}

# TFDS refuses to register a name twice, which reloading this module would do.
with registered.skip_registration():

  class Digits(tfds.core.GeneratorBasedBuilder):
    """`image` uint8 [8, 8, 1] and `label` 0..9, kept in the file's order."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
      return tfds.core.DatasetInfo(
        builder=self,
        description="Handwritten digits, UCI ML repository 80, test part.",
        homepage="https://archive.ics.uci.edu/dataset/80",
        features=tfds.features.FeaturesDict(
          {
            # `features.Image` needs TensorFlow to encode an array.
            "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=10),
          }
        ),
        supervised_keys=("image", "label"),
        disable_shuffling=True,
      )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
      del dl_manager
      return {
        split: self._generate_examples(rows) for split, rows in SPLITS.items()
      }

    def _generate_examples(self, rows: range) -> Iterator[tuple[int, Any]]:
      from sklearn import datasets

      digits: Any = datasets.load_digits()
      images = scale(digits.images)
      for row in rows:
        yield row, {"image": images[row], "label": int(digits.target[row])}


def scale(images: np.ndarray) -> np.ndarray:
  """floor(255 x / 16): the file's 0..16 as uint8 0..255, [N, 8, 8, 1]."""
  return (images.astype(np.int64) * 255 // 16).astype(np.uint8)[..., None]


def default_folder() -> pathlib.Path:
  """`$TFDS_DATA_DIR`, else `$XDG_CACHE_HOME/kdjax`, else `~/.cache/kdjax`."""
  if folder := os.environ.get("TFDS_DATA_DIR"):
    return pathlib.Path(folder)
  cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(cache) / "kdjax"


def builder(data_dir: str | os.PathLike[str] | None = None) -> Digits:
  """The prepared builder, written to `data_dir` first if it is not there.

  Any number of processes may call it at once, and any may be killed: the
  folder appears by one rename, complete or not at all.

  Raises:
    UserError: the folder cannot be written, or is there but incomplete.
  """
  root = pathlib.Path(data_dir or default_folder()).expanduser()
  folder = root / "digits" / str(Digits.VERSION)
  if not _is_complete(folder):
    try:
      _prepare(root, folder)
    except OSError as error:
      raise UserError(
        f"cannot write the digits to {root} ({error.strerror or error}): "
        "give a data_dir that can be written, or set TFDS_DATA_DIR"
      ) from error
  return Digits(data_dir=root, file_format="array_record")


def _is_complete(folder: pathlib.Path) -> bool:
  return (folder / "dataset_info.json").is_file()


def _prepare(root: pathlib.Path, folder: pathlib.Path) -> None:
  folder.parent.mkdir(parents=True, exist_ok=True)
  # Inside `root`, because a rename is atomic on one file system only.
  with tempfile.TemporaryDirectory(dir=root, prefix=".digits-") as scratch:
    made = Digits(data_dir=scratch, file_format="array_record")
    made.download_and_prepare()
    # Fails where another process was first; its folder holds the same bytes.
    with contextlib.suppress(OSError):
      os.rename(made.data_path, folder)
  if not _is_complete(folder):
    raise UserError(
      f"{folder} holds no complete digits and is in the way: delete it"
    )
