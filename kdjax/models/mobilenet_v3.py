"""MobileNetV3, large and small, for 224 px.

Its taps are told in `kdjax/models/mobilenet.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax import errors
from kdjax.models.layers import ConvNorm
from kdjax.models.mobilenet import MobileNet, Row

_RE, _HS = nnx.relu, jax.nn.hard_swish

# size: bottlenecks, width of the last convolution, of the linear layer after it
_V3 = {
  "large": (
    (
      Row(3, 0, 16, False, _RE, 1),
      Row(3, 64, 24, False, _RE, 2),
      Row(3, 72, 24, False, _RE, 1),
      Row(5, 72, 40, True, _RE, 2),
      Row(5, 120, 40, True, _RE, 1),
      Row(5, 120, 40, True, _RE, 1),
      Row(3, 240, 80, False, _HS, 2),
      Row(3, 200, 80, False, _HS, 1),
      Row(3, 184, 80, False, _HS, 1),
      Row(3, 184, 80, False, _HS, 1),
      Row(3, 480, 112, True, _HS, 1),
      Row(3, 672, 112, True, _HS, 1),
      Row(5, 672, 160, True, _HS, 2),
      Row(5, 960, 160, True, _HS, 1),
      Row(5, 960, 160, True, _HS, 1),
    ),
    960,
    1280,
  ),
  "small": (
    (
      Row(3, 0, 16, True, _RE, 2),
      Row(3, 72, 24, False, _RE, 2),
      Row(3, 88, 24, False, _RE, 1),
      Row(5, 96, 40, True, _HS, 2),
      Row(5, 240, 40, True, _HS, 1),
      Row(5, 240, 40, True, _HS, 1),
      Row(5, 120, 48, True, _HS, 1),
      Row(5, 144, 48, True, _HS, 1),
      Row(5, 288, 96, True, _HS, 2),
      Row(5, 576, 96, True, _HS, 1),
      Row(5, 576, 96, True, _HS, 1),
    ),
    576,
    1024,
  ),
}


def mobilenet_v3(
  size: str,
  *,
  num_classes: int,
  channels: int = 3,
  dropout: float = 0.2,
  padding: str = "both",
  epsilon: float = 1e-3,
  axis_name: str | None = None,
  dtype: Any = jnp.float32,
  rngs: nnx.Rngs,
) -> MobileNet:
  """MobileNetV3 for 224 px (Howard et al. 2019, tables 1 and 2).

  Batch normalisation keeps 0.99 of its statistics, as in torchvision.

  Args:
    size: "large" or "small".
    dropout: share of the classifier's inputs that training drops.
    padding, epsilon: of the convolutions and of batch normalisation. The values
      here are torchvision's; timm's are "both" and 1e-5, and "same" and 1e-3
      for weights that TensorFlow trained.
    axis_name: averages batch statistics over this axis of `jax.pmap`.
    dtype: of the computation; parameters and statistics are float32.
  """
  rows, head, hidden = errors.choose("size of mobilenet_v3", size, _V3)
  return MobileNet(
    rows,
    stem=16,
    head=head,
    hidden=hidden,
    activation=_HS,
    dropout=dropout,
    num_classes=num_classes,
    channels=channels,
    layer=functools.partial(
      ConvNorm,
      padding=padding,
      epsilon=epsilon,
      momentum=0.99,
      axis_name=axis_name,
      dtype=dtype,
      rngs=rngs,
    ),
    dtype=dtype,
    rngs=rngs,
  )
