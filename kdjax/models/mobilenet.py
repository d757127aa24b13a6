"""The bottlenecks that MobileNetV2 and V3 are made of, and the network.

Taps, channel-last: `stem`; `stage_1` ... `stage_n`, the last output at each
resolution; `pooled`, the input of the classifier before dropout. The
bottlenecks end linearly, so `stage_n` itself is what losses on pre-activations
take: there is no `preact_n`.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kdjax.models.layers import Activation, ConvNorm, conv, mean_over_space
from kdjax.types import Output


class Row(NamedTuple):
  """One bottleneck, as in tables 1 and 2 of the V3 paper.

  `hidden` = 0 leaves the first 1x1 convolution out. `squeeze`: with squeeze and
  excitation.
  """

  size: int
  hidden: int
  outputs: int
  squeeze: bool
  activation: Activation
  stride: int


class SqueezeExcite(nnx.Module):
  """x * h(excite(relu(squeeze(mean x)))), h the hard sigmoid."""

  def __init__(self, channels: int, *, dtype: Any, rngs: nnx.Rngs):
    width = divisible(channels // 4)
    make = functools.partial(conv, use_bias=True, dtype=dtype, rngs=rngs)
    self.squeeze = make(channels, width, 1)
    self.excite = make(width, channels, 1)

  def __call__(self, x: Array) -> Array:
    mean = jnp.mean(x, axis=(1, 2), keepdims=True)
    return x * jax.nn.hard_sigmoid(self.excite(nnx.relu(self.squeeze(mean))))


class Bottleneck(nnx.Module):
  """x + F(x) where the shape stays, else F(x).

  F is 1x1, depthwise, perhaps squeeze and excitation, 1x1 without activation.
  """

  def __init__(
    self,
    inputs: int,
    row: Row,
    *,
    layer: Callable[..., ConvNorm],
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    size, hidden, outputs, squeeze, activation, stride = row
    self.residual = stride == 1 and inputs == outputs
    self.expand = (
      layer(inputs, hidden, 1, activation=activation) if hidden else None
    )
    hidden = hidden or inputs
    self.depthwise = layer(
      hidden, hidden, size, stride, groups=hidden, activation=activation
    )
    # After the activation, as in torchvision.
    self.excite = (
      SqueezeExcite(hidden, dtype=dtype, rngs=rngs) if squeeze else None
    )
    self.project = layer(hidden, outputs, 1)

  def __call__(self, x: Array) -> Array:
    y = x if self.expand is None else self.expand(x)
    y = self.depthwise(y)
    y = y if self.excite is None else self.excite(y)
    y = self.project(y)
    return x + y if self.residual else y


class MobileNet(nnx.Module):
  """Stem, bottlenecks, 1x1 convolution, mean over space, classifier.

  `hidden`: width of a linear layer before the classifier; 0 = none.
  """

  def __init__(
    self,
    rows: Iterable[Row],
    *,
    stem: int,
    head: int,
    hidden: int,
    activation: Activation,
    dropout: float,
    num_classes: int,
    channels: int,
    layer: Callable[..., ConvNorm],
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    self.activation = activation
    self.stem = layer(channels, stem, 3, 2, activation=activation)
    inputs, stages = stem, []
    for row in rows:
      if row.stride == 2 or not stages:  # a stage for each resolution
        stages.append([])
      stages[-1].append(
        Bottleneck(inputs, row, layer=layer, dtype=dtype, rngs=rngs)
      )
      inputs = row.outputs
    self.stages = nnx.List([nnx.List(stage) for stage in stages])
    self.head = layer(inputs, head, 1, activation=activation)
    linear = functools.partial(
      nnx.Linear,
      kernel_init=nnx.initializers.normal(0.01),
      dtype=dtype,
      rngs=rngs,
    )
    self.hidden = linear(head, hidden) if hidden else None
    self.dropout = nnx.Dropout(dropout, rngs=rngs)
    self.classifier = linear(hidden or head, num_classes)

  def __call__(self, image: Float[Array, "b h w c"]) -> Output:
    taps = {}
    x = taps["stem"] = self.stem(image)
    for n, stage in enumerate(self.stages, 1):
      for block in stage:
        x = block(x)
      taps[f"stage_{n}"] = x
    x = mean_over_space(self.head(x))
    if self.hidden is not None:
      x = self.activation(self.hidden(x))
    taps["pooled"] = x
    return Output(self.classifier(self.dropout(x)), taps)


def divisible(channels: float) -> int:
  """The nearest multiple of 8, at least 8, never 10 % below `channels`."""
  nearest = max(8, int(channels + 4) // 8 * 8)
  return nearest + 8 if nearest < 0.9 * channels else nearest
