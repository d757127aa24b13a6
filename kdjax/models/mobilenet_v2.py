"""MobileNetV2: `mobilenet_v2` for 224 px, `mobilenet_v2_cifar` for 32 px.

Their taps are told in `kdjax/models/mobilenet.py`.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax.models.layers import Activation, ConvNorm
from kdjax.models.mobilenet import MobileNet, Row, divisible

# Rows of table 2 of the V2 paper: expansion t, channels, repeats, stride of the
# first. Its first row has t = 1, which is no convolution: 0 here.
_V2 = (
  (0, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)
# There t = 1 is a convolution; row 2 keeps the 16 px that the stem leaves.
_V2_CIFAR = ((1, 16, 1, 1), (6, 24, 2, 1), *_V2[2:])


def mobilenet_v2(
  width: float = 1.0,
  *,
  num_classes: int,
  channels: int = 3,
  dropout: float = 0.2,
  padding: str = "both",
  epsilon: float = 1e-5,
  axis_name: str | None = None,
  dtype: Any = jnp.float32,
  rngs: nnx.Rngs,
) -> MobileNet:
  """MobileNetV2 for 224 px (Sandler et al. 2018, table 2).

  Args:
    width: multiplies all channels but the last convolution's, which only grow;
      all are rounded to a multiple of 8, as in torchvision.
    dropout: share of the classifier's inputs that training drops.
    padding, epsilon: of the convolutions and of batch normalisation; for
      weights that TensorFlow trained "same" and 1e-3.
    axis_name: averages batch statistics over this axis of `jax.pmap`.
    dtype: of the computation; parameters and statistics are float32.
  """
  stem = divisible(32 * width)
  settings = [(t, divisible(c * width), n, s) for t, c, n, s in _V2]
  return MobileNet(
    _rows(settings, stem, jax.nn.relu6),
    stem=stem,
    head=divisible(1280 * max(1.0, width)),
    hidden=0,
    activation=jax.nn.relu6,
    dropout=dropout,
    num_classes=num_classes,
    channels=channels,
    layer=functools.partial(
      ConvNorm,
      padding=padding,
      epsilon=epsilon,
      axis_name=axis_name,
      dtype=dtype,
      rngs=rngs,
    ),
    dtype=dtype,
    rngs=rngs,
  )


def mobilenet_v2_cifar(
  width: float = 0.5,
  *,
  num_classes: int,
  channels: int = 3,
  axis_name: str | None = None,
  dtype: Any = jnp.float32,
  rngs: nnx.Rngs,
) -> MobileNet:
  """MobileNetV2 for 32 px, as in the distillation papers' code.

  It has ReLU, not ReLU6, no dropout, and channels rounded down.

  Args:
    width: multiplies all channels but the last convolution's, which only grow.
    axis_name: averages batch statistics over this axis of `jax.pmap`.
    dtype: of the computation; parameters and statistics are float32.
  """
  stem = int(32 * width)
  settings = [(t, int(c * width), n, s) for t, c, n, s in _V2_CIFAR]
  return MobileNet(
    _rows(settings, stem, nnx.relu),
    stem=stem,
    head=int(1280 * max(1.0, width)),
    hidden=0,
    activation=nnx.relu,
    dropout=0.0,
    num_classes=num_classes,
    channels=channels,
    layer=functools.partial(
      ConvNorm, axis_name=axis_name, dtype=dtype, rngs=rngs
    ),
    dtype=dtype,
    rngs=rngs,
  )


def _rows(
  settings: Iterable[tuple[int, int, int, int]],
  inputs: int,
  activation: Activation,
) -> list[Row]:
  """A bottleneck for each repeat of the settings."""
  rows = []
  for expansion, outputs, count, stride in settings:
    for i in range(count):
      s = 1 if i else stride
      rows.append(Row(3, expansion * inputs, outputs, False, activation, s))
      inputs = outputs
  return rows
