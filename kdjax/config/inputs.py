"""What a config does to images."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from kdjax import data
from kdjax.types import Batch


def augment(config: Mapping[str, Any]) -> Callable[..., Any] | None:
  """What happens to each training image, on the host."""
  size, padding, flip = (config[k] for k in ("image_size", "padding", "flip"))
  if size:
    return functools.partial(data.random_resized_crop, size=size, flip=flip)
  if padding or flip:
    return functools.partial(data.crop_and_flip, padding=padding, flip=flip)
  return None


def eval_transform(config: Mapping[str, Any]) -> Callable[..., Any] | None:
  """What happens to each evaluated image: the centre, if sizes differ."""
  size = config["image_size"]
  return functools.partial(data.center_crop, size=size) if size else None


def mixup(
  config: Mapping[str, Any], num_classes: int
) -> Callable[[Batch, jax.Array], Batch] | None:
  """What happens to a whole batch, in the step, once for both networks."""
  alpha = config["mixup"]
  if not alpha:
    return None
  return functools.partial(data.mixup, alpha=alpha, num_classes=num_classes)
