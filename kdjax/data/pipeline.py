"""Source -> batches: order, augmentation, padding, the rows of a process."""

import functools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grain
import numpy as np

from kdjax.data.sources import Source, check_label
from kdjax.types import UserError

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]
Transform = Callable[[np.ndarray], np.ndarray]
PerChannel = float | Sequence[float]

# Mean and standard deviation of the training pixels by channel, on 0..1. The
# digits' and the photos' come from their train split, the others are the
# customary ones.
NORMALIZATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
  "digits": ((0.3055,), (0.3754,)),
  "mnist": ((0.1307,), (0.3081,)),
  "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
  "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
  "photos": ((0.3900, 0.4297, 0.3912), (0.3687, 0.2966, 0.3259)),
  "imagenet2012": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

# The first word of each generator's seed: NumPy pads a seed with zeros, so
# that (seed, epoch) and (seed, epoch, 0) would draw the same.
_ORDER, _AUGMENT = 1, 2


def train_batches(
  source: Source,
  *,
  batch_size: int,
  seed: int,
  mean: PerChannel,
  std: PerChannel,
  augment: Augment | None = None,
  labelled: np.ndarray | None = None,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int = 4,
  prefetch: int = 4,
) -> grain.IterDataset:
  """Endless shuffled batches; batch n is a function of seed and n alone.

  Epoch e visits every example once, in the order
  `default_rng((1, seed, e)).permutation(N)`. A batch may span two epochs, so
  that none is dropped and a set smaller than a batch works. Augmentation draws
  by (seed, step, row of the global batch). Hence any number of processes reads
  the same global batches, and starting at step k reads nothing before it.

  Args:
    source: what to read.
    batch_size: rows of the global batch.
    seed: >= 0; decides order and augmentation.
    mean: of a channel on 0..1, one number or one a channel.
    std: likewise; the image becomes (x / 255 - mean) / std.
    augment: `(image, generator) -> image`, uint8 [H, W, C]. Bind its options
      with `functools.partial`.
    labelled: [N], nonzero where the label may be used.
    process_index: which contiguous block of rows to give; processes that hold
      the same rows pass the same index.
    process_count: number of blocks.
    num_threads: batches made at once; 0 makes each when it is asked for.
    prefetch: batches held ready, which bounds the memory.

  Returns:
    An iterable of dicts of arrays: `image` float32 [b, H, W, C], `label` int32,
    `mask` float32 ones, `index` int32 (position in `source`) and, where there
    are any, `labelled` and `teacher_logits` float32; b = batch_size /
    process_count. Its iterator has `get_state` and `set_state`; the state is
    `{"next_index": step}`.

  Raises:
    UserError: before the first batch, for a wrong argument; at a batch, for a
      label out of range or images of different sizes.
  """
  rows = _rows(source, batch_size, process_index, process_count)
  normalize = normalizer(source, mean, std)
  if seed < 0:
    raise UserError(f"got seed={seed}, needs 0 or more: choose another seed")
  if labelled is not None:
    labelled = np.asarray(labelled)
    if labelled.shape != (len(source),):
      raise UserError(
        f"got labelled of shape {labelled.shape}, needs ({len(source)},): one "
        f"entry an example of {source.name} {source.split}"
      )
  _check_sizes(source, augment, "augment", "random_resized_crop")
  if source.logits is not None and augment is not None:
    raise UserError(
      f"{source.name} {source.split} comes with a teacher's logits, which are "
      "of the images as they are, and augment= changes these: leave augment "
      "out, or let a teacher network see the same images"
    )

  def batch(step: int) -> dict[str, np.ndarray]:
    positions = step * batch_size + rows
    indices = _shuffled(len(source), seed, positions)
    transforms: Iterable[Transform] = [_unchanged] * len(rows)
    if augment is not None:
      transforms = (
        functools.partial(
          _augmented, augment, seed=(_AUGMENT, seed, step, int(row))
        )
        for row in rows
      )
    made = _read(source, indices, transforms, normalize)
    made["mask"] = np.ones(len(rows), np.float32)
    if labelled is not None:
      made["labelled"] = (labelled[indices] != 0).astype(np.float32)
    return made

  return _iterable(sys.maxsize // batch_size, batch, num_threads, prefetch)


def eval_batches(
  source: Source,
  *,
  batch_size: int,
  mean: PerChannel,
  std: PerChannel,
  transform: Transform | None = None,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int = 4,
  prefetch: int = 4,
) -> grain.IterDataset:
  """Every example once, in order, `ceil(N / batch_size)` batches.

  The last batch is filled up with copies of the last example at `mask` 0. All
  processes get the same number of batches, some perhaps nothing but padding.
  Each `iter()` starts anew. Arguments, contents and errors as `train_batches`.

  Args:
    transform: `image -> image`, such as `center_crop` with its size bound.
  """
  rows = _rows(source, batch_size, process_index, process_count)
  normalize = normalizer(source, mean, std)
  _check_sizes(source, transform, "transform", "center_crop")
  size = len(source)

  def batch(step: int) -> dict[str, np.ndarray]:
    positions = step * batch_size + rows
    indices = np.minimum(positions, size - 1)
    transforms = [transform or _unchanged] * len(rows)
    made = _read(source, indices, transforms, normalize)
    made["mask"] = (positions < size).astype(np.float32)
    return made

  num_batches = math.ceil(size / batch_size)
  return _iterable(num_batches, batch, num_threads, prefetch)


def _iterable(
  num_batches: int,
  batch: Callable[[int], dict[str, np.ndarray]],
  num_threads: int,
  prefetch: int,
) -> grain.IterDataset:
  options = grain.ReadOptions(
    num_threads=num_threads,
    prefetch_buffer_size=prefetch if num_threads else 0,
  )
  steps = grain.MapDataset.range(num_batches)
  return steps.map(batch).to_iter_dataset(options)


def _read(
  source: Source,
  indices: np.ndarray,
  transforms: Iterable[Transform],
  normalize: Callable[[np.ndarray], np.ndarray],
) -> dict[str, np.ndarray]:
  images, labels = [], []
  for index, transform in zip(indices.tolist(), transforms):
    example = source.examples[index]
    check_label(source, index, int(example["label"]))
    images.append(transform(example["image"]))
    labels.append(int(example["label"]))
  shapes = {image.shape for image in images}
  if len(shapes) > 1:
    raise UserError(
      f"{source.name} {source.split} gave images of the shapes "
      f"{sorted(shapes)} in one batch, needs one: use an augment or transform "
      "that fixes the size"
    )
  made = {
    "image": normalize(np.stack(images)),
    "label": np.array(labels, np.int32),
    "index": indices.astype(np.int32),
  }
  if source.logits is not None:
    rows = [source.logits[index] for index in indices.tolist()]
    made["teacher_logits"] = np.stack(rows).astype(np.float32)
  return made


def _shuffled(size: int, seed: int, positions: np.ndarray) -> np.ndarray:
  """Positions in the endless stream -> examples; each epoch a permutation."""
  epochs, places = np.divmod(positions, size)
  indices = np.empty_like(positions)
  for epoch in np.unique(epochs).tolist():
    here = epochs == epoch
    indices[here] = _order(size, seed, epoch)[places[here]]
  return indices


@functools.lru_cache(maxsize=4)
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng((_ORDER, seed, epoch)).permutation(size)


def _unchanged(image: np.ndarray) -> np.ndarray:
  return image


def _augmented(
  augment: Augment, image: np.ndarray, *, seed: tuple[int, ...]
) -> np.ndarray:
  return augment(image, np.random.default_rng(seed))


def _rows(
  source: Source, batch_size: int, process_index: int, process_count: int
) -> np.ndarray:
  if not len(source):
    raise UserError(
      f"{source.name} {source.split} holds no examples, needs one at least: "
      "choose another split or select more"
    )
  if batch_size < 1 or process_count < 1 or batch_size % process_count:
    raise UserError(
      f"got batch_size={batch_size} for {process_count} processes, needs a "
      "positive multiple of their number: change batch_size"
    )
  if not 0 <= process_index < process_count:
    raise UserError(
      f"got process_index={process_index}, needs 0..{process_count - 1}: pass "
      "the process's own number and the number of processes"
    )
  local = batch_size // process_count
  return np.arange(process_index * local, (process_index + 1) * local)


def normalizer(
  source: Source, mean: PerChannel, std: PerChannel
) -> Callable[[np.ndarray], np.ndarray]:
  """uint8 [B, H, W, C] -> float32 (x / 255 - mean) / std."""
  channels = source.image_shape[-1]
  means, stds = np.asarray(mean, np.float32), np.asarray(std, np.float32)
  for name, value in (("mean", means), ("std", stds)):
    if value.shape not in ((), (1,), (channels,)):
      raise UserError(
        f"got {name} of shape {value.shape}, needs one number or one for each "
        f"of the {channels} channels of {source.name}"
      )
  if not (stds > 0).all():
    raise UserError(f"got std={std}, needs positive numbers: see NORMALIZATION")

  def normalize(images: np.ndarray) -> np.ndarray:
    # Row by row of an image, in place: NumPy is slow where the last axis is
    # the channels, and new arrays of a batch's size are slow to come by.
    count, height, width, depth = images.shape
    row = lambda v: np.tile(np.broadcast_to(v, depth), width)  # noqa: E731
    row_means, row_stds = row(means), row(stds)
    made = np.empty(images.shape, np.float32)
    shape = count, height, width * depth
    for image, out in zip(images.reshape(shape), made.reshape(shape)):
      np.divide(image, np.float32(255), out=out)
      out -= row_means
      out /= row_stds
    return made

  return normalize


def _check_sizes(source: Source, given: Any, name: str, example: str) -> None:
  if given is None and None in source.image_shape:
    raise UserError(
      f"{source.name} has images of several sizes, needs {name}= to give them "
      f"one: such as functools.partial({example}, size=224)"
    )
