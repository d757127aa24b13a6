"""Names -> `Source`: the digits, and whatever TFDS has prepared."""

import contextlib
import dataclasses
import importlib.util
import io
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from kdjax.data.sources import RandomAccess, Source, in_memory
from kdjax.errors import unknown
from kdjax.types import UserError

# Of the sets that papers distil on; a bank of features has a row for each.
_NUM_TRAINING = {"cifar100": 50_000, "imagenet2012": 1_281_167}


def load(
  name: str, split: str, *, data_dir: str | os.PathLike[str] | None = None
) -> Source:
  """A dataset by its name.

  `digits` comes with scikit-learn, is written to `data_dir` at the first call
  and held in memory. `photos` does too, and is never written. Every other name
  is a TFDS dataset already prepared in a format with random access
  (array_record); it is read without TensorFlow and never downloaded from here:
  a pod's processes would all do so at once.

  Args:
    name: `digits`, `photos`, or TFDS's `name[/config][:version]`.
    split: TFDS's split syntax, such as `train`, `train[:90%]`, `train+test`.
    data_dir: where datasets are kept. By default `$TFDS_DATA_DIR`; without it
      TFDS's own folder, and for the digits a cache folder.

  Raises:
    UserError: no such dataset or split, an empty split, a dataset that is not
      prepared or that has no image and class label.
  """
  with _quiet():
    if name == "digits":
      from kdjax.data import digits

      return in_memory(_open(name, split, digits.builder(data_dir)))
    if name == "photos":
      from kdjax.data import photos

      return photos.photos(split)
    return _open(name, split, _prepared_builder(name, data_dir))


def blank(
  name: str, split: str, *, data_dir: str | os.PathLike[str] | None = None
) -> Source:
  """A source as large as a dataset's, of images of zeros.

  What TFDS knows of a dataset that nobody has prepared: its classes and the
  shape of its images. Where these differ in size they are 256 px here, and
  there are a million where the number is not known either.

  Args:
    name, split, data_dir: as for `load`; `digits` and `photos` are loaded.

  Raises:
    UserError: no such dataset.
  """
  if name in ("digits", "photos"):
    return load(name, split, data_dir=data_dir)
  with _quiet():
    features = _builder(name, data_dir).info.features
  num_classes = features["label"].num_classes
  size = _NUM_TRAINING.get(name, 1_000_000)
  shape = tuple(side or 256 for side in features["image"].shape)
  return Source(
    _Zeros(size, shape, num_classes),
    np.resize(np.arange(num_classes), size),
    num_classes,
    shape,
    name,
    split,
  )


@dataclasses.dataclass(frozen=True)
class _Zeros:
  size: int
  shape: tuple[int, ...]
  num_classes: int

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int, /) -> Any:
    image = np.zeros(self.shape, np.uint8)
    return {"image": image, "label": index % self.num_classes}


@dataclasses.dataclass(frozen=True)
class _Labels:
  undecoded: RandomAccess

  def __len__(self) -> int:
    return len(self.undecoded)

  def __getitem__(self, index: int, /) -> int:
    return int(self.undecoded[index]["label"])


def _open(name: str, split: str, builder: Any) -> Source:
  import tensorflow_datasets as tfds

  features = dict(builder.info.features.items())
  splits = builder.info.splits
  label = features.get("label")
  num_classes = getattr(label, "num_classes", None)  # a class label's alone
  if "image" not in features or not num_classes:
    raise UserError(
      f"{name} has the features {', '.join(sorted(features))}; needs image and "
      "label (a class label): choose an image classification dataset"
    )
  known = ", ".join(f"{key} ({splits[key].num_examples})" for key in splits)
  try:
    size = splits[split].num_examples
  except (KeyError, ValueError) as error:
    raise UserError(
      f"{name} has no split {split!r} ({_first_line(error)}): choose of {known}"
    ) from error
  if not size:
    raise UserError(
      f"{name} {split!r} holds no examples: choose of {known or 'none'}"
    )
  try:
    examples = builder.as_data_source(split=split)
  except NotImplementedError as error:
    raise UserError(
      f"{builder.data_path} is in a format without random access, needs "
      "array_record: prepare it into another data_dir with "
      f"{_prepare_line(name, 'another_data_dir')}"
    ) from error
  skip = {"image": tfds.decode.SkipDecoding()}
  labels = builder.as_data_source(split=split, decoders=skip)
  examples[0]  # TFDS tells how it decodes with the first image: here, unheard
  shape = tuple(features["image"].shape)
  names = tuple(label.names)  # pyright: ignore
  return Source(
    examples, _Labels(labels), num_classes, shape, name, split, names
  )


def _builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
  import tensorflow_datasets as tfds

  folder = None if data_dir is None else os.path.expanduser(data_dir)
  try:
    return tfds.builder(name, data_dir=folder)
  except tfds.core.DatasetNotFoundError as error:
    known = tfds.list_builders(with_community_datasets=False)
    raise unknown("dataset", name, ["digits", "photos", *known]) from error
  except (AssertionError, ImportError, ValueError) as error:
    raise UserError(
      f"TFDS cannot open {name!r}: {_first_line(error)}: give it as "
      "name[/config][:version]"
    ) from error


def _prepared_builder(
  name: str, data_dir: str | os.PathLike[str] | None
) -> Any:
  builder = _builder(name, data_dir)
  if not builder.data_path.exists():
    folder = None if data_dir is None else os.path.expanduser(data_dir)
    lines = _prepare_line(name, folder)
    if importlib.util.find_spec("tensorflow") is None:
      lines = f"`pip install tensorflow-cpu` and {lines}"
    raise UserError(
      f"{name} is not prepared: nothing in {builder.data_path}. Run {lines} "
      "(preparing needs TensorFlow, reading does not)"
    )
  return builder


def _prepare_line(name: str, folder: str | None) -> str:
  where = "" if folder is None else f"data_dir={folder!r}, "
  return (
    '`python -c "import tensorflow_datasets as tfds; '
    f"tfds.builder({name!r}, {where}file_format='array_record')"
    '.download_and_prepare()"`'
  )


def _first_line(error: BaseException) -> str:
  return str(error).strip("'\"").splitlines()[0].rstrip(".")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps TFDS's prints, progress bars and warnings off the terminal."""
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    with (
      contextlib.redirect_stdout(io.StringIO()),
      contextlib.redirect_stderr(io.StringIO()),
    ):
      yield
  finally:
    logger.setLevel(level)
