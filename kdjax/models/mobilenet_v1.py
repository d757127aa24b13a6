"""MobileNet, the first, for 224 px.

Taps, channel-last: `stem`; `stage_1` ... `stage_5`, the last output at each
resolution, after its ReLU, and `preact_1` ... before it; `pooled`, the
input of the classifier.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kdjax.models.layers import (
  ConvNorm,
  mean_over_space,
  through_stages,
  uniform_fan_in,
)
from kdjax.types import Output


class Separable(nnx.Module):
  """3x3 depthwise, ReLU, 1x1; the ReLU that follows is the caller's."""

  def __init__(
    self,
    inputs: int,
    outputs: int,
    stride: int,
    *,
    layer: Callable[..., ConvNorm],
  ):
    self.depthwise = layer(
      inputs, inputs, 3, stride, groups=inputs, activation=nnx.relu
    )
    self.project = layer(inputs, outputs, 1)

  def __call__(self, x: Array) -> Array:
    return self.project(self.depthwise(x))


class MobileNetV1(nnx.Module):
  """Stem, separable convolutions, mean over space, classifier."""

  def __init__(
    self,
    widths: Sequence[int],
    *,
    num_classes: int,
    channels: int,
    layer: Callable[..., ConvNorm],
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    inputs, *outputs = widths
    self.stem = layer(channels, inputs, 3, 2, activation=nnx.relu)
    stages = []
    for n, (width, count) in enumerate(zip(outputs, (1, 2, 2, 6, 2))):
      stage = [Separable(inputs, width, 2 if n else 1, layer=layer)]
      stage += [
        Separable(width, width, 1, layer=layer) for _ in range(count - 1)
      ]
      stages.append(nnx.List(stage))
      inputs = width
    self.stages = nnx.List(stages)
    self.classifier = nnx.Linear(inputs, num_classes, dtype=dtype, rngs=rngs)

  def __call__(self, image: Float[Array, "b h w c"]) -> Output:
    stem = self.stem(image)
    x, taps = through_stages(self.stages, stem)
    x = mean_over_space(x)
    taps |= {"stem": stem, "pooled": x}
    return Output(self.classifier(x), taps)


def mobilenet_v1(
  width: float = 1.0,
  *,
  num_classes: int,
  channels: int = 3,
  axis_name: str | None = None,
  dtype: Any = jnp.float32,
  rngs: nnx.Rngs,
) -> MobileNetV1:
  """MobileNet for 224 px (Howard et al. 2017, table 1), with ReLU.

  The table's last stride, "s2" at 7 x 7, is 1, as in every implementation: the
  next row of the table is at 7 x 7 too.

  Args:
    width: multiplies all channels (the paper's alpha), rounded down.
    axis_name: averages batch statistics over this axis of `jax.pmap`.
    dtype: of the computation; parameters and statistics are float32.
  """
  return MobileNetV1(
    [int(c * width) for c in (32, 64, 128, 256, 512, 1024)],
    num_classes=num_classes,
    channels=channels,
    layer=functools.partial(
      ConvNorm,
      kernel_init=uniform_fan_in,
      axis_name=axis_name,
      dtype=dtype,
      rngs=rngs,
    ),
    dtype=dtype,
    rngs=rngs,
  )
