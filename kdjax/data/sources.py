"""`Source`: random access to labelled images, and the choice among them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from kdjax.types import UserError


@runtime_checkable
class RandomAccess(Protocol):
  def __len__(self) -> int: ...
  def __getitem__(self, index: int, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Source:
  """Labelled images that can be read in any order.

  Attributes:
    examples: position -> mapping with `image`, uint8 [H, W, C], and `label`.
    labels: position -> label alone, without decoding the image.
    num_classes: labels lie in 0 .. num_classes - 1.
    image_shape: (H, W, C), with None where the images differ.
    name: what messages call the dataset.
    split: what messages call the part of it.
    class_names: what the classes are called, if known.
    logits: position -> a teacher's [classes], where they came with the images.
  """

  examples: RandomAccess
  labels: RandomAccess
  num_classes: int
  image_shape: tuple[int | None, ...]
  name: str
  split: str
  class_names: tuple[str, ...] = ()
  logits: RandomAccess | None = None

  def __len__(self) -> int:
    return len(self.examples)


def from_arrays(
  images: np.ndarray,
  labels: np.ndarray,
  *,
  num_classes: int,
  name: str = "arrays",
  split: str = "all",
) -> Source:
  """A `Source` over uint8 images [N, H, W, C] and integer labels [N].

  Raises:
    UserError: another dtype or rank, or as many labels as images are not given.
  """
  images, labels = np.asarray(images), np.asarray(labels)
  if images.dtype != np.uint8 or images.ndim != 4:
    raise UserError(
      f"{name} has {images.dtype} images of shape {images.shape}; needs uint8 "
      "[N, H, W, C]: scale to 0..255 and add the missing axis"
    )
  if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
    raise UserError(
      f"{name} has {labels.dtype} labels of shape {labels.shape}; needs "
      f"integers of shape {images.shape[:1]}: one class number an image"
    )
  return Source(
    _Arrays(images, labels), labels, num_classes, images.shape[1:], name, split
  )


def in_memory(source: Source) -> Source:
  """The same source, every image decoded once and kept (N H W C bytes).

  Raises:
    UserError: the images differ in size.
  """
  if None in source.image_shape:
    raise UserError(
      f"{source.name} has images of several sizes, which one array cannot "
      "hold: read it from disk"
    )
  shape = [side for side in source.image_shape if side is not None]
  images = np.empty((len(source), *shape), np.uint8)
  labels = np.empty(len(source), np.int64)
  for index in range(len(source)):
    example = source.examples[index]
    images[index], labels[index] = example["image"], example["label"]
  kept = from_arrays(
    images,
    labels,
    num_classes=source.num_classes,
    name=source.name,
    split=source.split,
  )
  return dataclasses.replace(kept, logits=source.logits)


def with_logits(source: Source, logits: np.ndarray) -> Source:
  """The source with a teacher's logits [N, classes], a row an example.

  Batches then have them as `teacher_logits`, float32, whatever the order, for
  `kdjax.from_batch`. They are of the images as they are here: where a batch
  has others (`augment`, mixup) it is refused. -inf is a class that the teacher
  does not have. The array may be memory-mapped; it is read once for the check.

  Raises:
    UserError: another shape, no floats, NaN or +inf.
  """
  shape = (len(source), source.num_classes)
  if logits.shape != shape or not jnp.issubdtype(logits.dtype, np.floating):
    raise UserError(
      f"got {logits.dtype} logits of shape {logits.shape}, needs floats of "
      f"shape {shape}: a row an example of {source.name} {source.split}, in "
      "its order, a column a class"
    )
  for start in range(0, len(logits), 4096):
    part = logits[start : start + 4096]
    bad = np.flatnonzero(~(part < np.inf).all(axis=1))
    if len(bad):
      raise UserError(
        f"the teacher's logits of example {start + bad[0]} of {source.name} "
        f"{source.split} hold NaN or +inf, needs numbers: run the teacher "
        "again, or leave the example out with kdjax.data.select"
      )
  return dataclasses.replace(source, logits=logits)


def check_labels(source: Source, *, limit: int = 10_000) -> None:
  """Reads up to `limit` labels, evenly spread, and refuses the first bad one.

  Raises:
    UserError: a label outside 0 .. num_classes - 1.
  """
  size = len(source)
  positions = range(size)
  if size > limit:
    positions = np.linspace(0, size - 1, limit).astype(int).tolist()
  for position in positions:
    check_label(source, position, int(source.labels[position]))


def check_label(source: Source, index: int, label: int) -> None:
  if not 0 <= label < source.num_classes:
    raise UserError(
      f"{source.name} {source.split}: example {index} has label {label}, needs "
      f"0..{source.num_classes - 1}: mend the label, or leave the example out "
      "with kdjax.data.select"
    )


def labelled_mask(source: Source, count: int, *, seed: int) -> np.ndarray:
  """Chooses `count` examples, as many of each class, to within one.

  Choices with one seed are nested: the mask for 100 lies in that for 200.

  Returns:
    bool [N], `count` of them True.

  Raises:
    UserError: `count` is out of range, or a class has too few examples.
  """
  if not 0 <= count <= len(source):
    raise UserError(
      f"asked for {count} labelled examples of {source.name} {source.split}, "
      f"needs 0..{len(source)}: ask for a number in that range"
    )
  generator = np.random.default_rng(seed)
  order = generator.permutation(len(source))
  labels = np.array([source.labels[index] for index in order.tolist()], int)
  share, extra = divmod(count, source.num_classes)
  # The classes that get one more come first in an order drawn from the seed.
  place = generator.permutation(source.num_classes)
  mask = np.zeros(len(source), bool)
  for label in range(source.num_classes):
    members = order[labels == label]
    wanted = share + int(place[label] < extra)
    if len(members) < wanted:
      raise UserError(
        f"{source.name} {source.split} has {len(members)} examples of class "
        f"{label}, needs {wanted} for {count} in all: ask for fewer"
      )
    mask[members[:wanted]] = True
  return mask


def select(source: Source, mask: np.ndarray) -> Source:
  """The examples where `mask`, bool [N], is True, renumbered from 0.

  Raises:
    UserError: the mask has another shape or is not boolean.
  """
  mask = np.asarray(mask)
  if mask.dtype != bool or mask.shape != (len(source),):
    raise UserError(
      f"got a {mask.dtype} mask of shape {mask.shape}, needs bool of shape "
      f"({len(source)},): one entry an example of {source.name}"
    )
  (kept,) = np.nonzero(mask)
  return dataclasses.replace(
    source,
    examples=_View(source.examples, kept),
    labels=_View(source.labels, kept),
    logits=None if source.logits is None else _View(source.logits, kept),
    split=f"{source.split} ({len(kept)} selected)",
  )


def subset(source: Source, count: int, *, seed: int = 0) -> Source:
  """`count` examples, balanced over the classes; see `labelled_mask`."""
  return select(source, labelled_mask(source, count, seed=seed))


@dataclasses.dataclass(frozen=True)
class _Arrays:
  images: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: int, /) -> Mapping[str, Any]:
    return {"image": self.images[index], "label": int(self.labels[index])}


@dataclasses.dataclass(frozen=True)
class _View:
  parent: RandomAccess
  kept: np.ndarray

  def __len__(self) -> int:
    return len(self.kept)

  def __getitem__(self, index: int, /) -> Any:
    return self.parent[int(self.kept[index])]
