"""Residual networks: `resnet_cifar` for 32 px (or 8), `resnet` for 224 px.

Taps, channel-last: `stem`; `stage_1` ... `stage_n` after the stage's last ReLU
and `preact_1` ... before it; `pooled`, the input of the classifier.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kdjax import errors
from kdjax.models.layers import (
  Activation,
  ConvNorm,
  max_pool,
  mean_over_space,
  through_stages,
)
from kdjax.types import Output


class Block(nnx.Module):
  """x + F(x); the ReLU that follows is the caller's.

  F is two 3x3 convolutions; with `expansion`, 1x1, 3x3, 1x1 (a bottleneck).
  """

  def __init__(
    self,
    inputs: int,
    width: int,
    stride: int,
    *,
    expansion: int,
    layer: Callable[..., ConvNorm],
  ):
    if expansion:
      outputs = width * expansion
      # The stride is in the 3x3 convolution, as in torchvision ("v1.5").
      layers = [
        layer(inputs, width, 1),
        layer(width, width, 3, stride),
        layer(width, outputs, 1),
      ]
    else:
      outputs = width
      layers = [layer(inputs, width, 3, stride), layer(width, width, 3)]
    self.layers = nnx.List(layers)
    matches = stride == 1 and inputs == outputs
    self.shortcut = None if matches else layer(inputs, outputs, 1, stride)

  def __call__(self, x: Array) -> Array:
    y = x
    for n, layer in enumerate(self.layers):
      y = layer(y) if n == 0 else layer(nnx.relu(y))
    return y + (x if self.shortcut is None else self.shortcut(x))


class ResNet(nnx.Module):
  """Stem, stages of blocks, mean over space, classifier."""

  def __init__(
    self,
    stem: ConvNorm,
    blocks: Sequence[int],
    widths: Sequence[int],
    *,
    pool: Activation,
    inputs: int,
    expansion: int,
    num_classes: int,
    layer: Callable[..., ConvNorm],
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    self.stem = stem
    self.pool = pool
    stages = []
    for n, (count, width) in enumerate(zip(blocks, widths)):
      stage = []
      for i in range(count):
        stride = 2 if n > 0 and i == 0 else 1
        stage.append(
          Block(inputs, width, stride, expansion=expansion, layer=layer)
        )
        inputs = width * (expansion or 1)
      stages.append(nnx.List(stage))
    self.stages = nnx.List(stages)
    self.classifier = nnx.Linear(inputs, num_classes, dtype=dtype, rngs=rngs)

  def __call__(self, image: Float[Array, "b h w c"]) -> Output:
    stem = self.pool(self.stem(image))
    x, taps = through_stages(self.stages, stem)
    x = mean_over_space(x)
    taps |= {"stem": stem, "pooled": x}
    return Output(self.classifier(x), taps)


def resnet_cifar(
  depth: int,
  *,
  num_classes: int,
  channels: int = 3,
  width: int = 16,
  stem_width: int = 0,
  axis_name: str | None = None,
  dtype: Any = jnp.float32,
  rngs: nnx.Rngs,
) -> ResNet:
  """ResNet-(6n+2) for small images (He et al. 2015, section 4.2).

  Shortcuts that change shape are 1x1 convolutions, as in the code of the
  distillation papers, not the paper's zero padding. Their "8x4" and "32x4" are
  `width=64, stem_width=32`.

  Args:
    depth: 8, 14, 20, 32, 44, 56, 110: 6n + 2.
    width: channels of the first stage; each further one doubles them.
    stem_width: channels of the stem; 0 = `width`.
    axis_name: averages batch statistics over this axis of `jax.pmap`.
    dtype: of the computation; parameters and statistics are float32.
  """
  blocks, rest = divmod(depth - 2, 6)
  if rest or blocks < 1:
    raise errors.UserError(
      f"resnet_cifar got depth={depth}, needs 6n + 2: take 8, 14, 20 ..."
    )
  layer = functools.partial(
    ConvNorm, axis_name=axis_name, dtype=dtype, rngs=rngs
  )
  inputs = stem_width or width
  return ResNet(
    layer(channels, inputs, 3, activation=nnx.relu),
    [blocks] * 3,
    [width, 2 * width, 4 * width],
    pool=jax.nn.identity,
    inputs=inputs,
    expansion=0,
    num_classes=num_classes,
    layer=layer,
    dtype=dtype,
    rngs=rngs,
  )


# depth: (blocks of each stage, expansion)
_DEPTHS = {
  18: ((2, 2, 2, 2), 0),
  34: ((3, 4, 6, 3), 0),
  50: ((3, 4, 6, 3), 4),
  101: ((3, 4, 23, 3), 4),
  152: ((3, 8, 36, 3), 4),
}


def resnet(
  depth: int,
  *,
  num_classes: int,
  channels: int = 3,
  width: int = 64,
  axis_name: str | None = None,
  dtype: Any = jnp.float32,
  rngs: nnx.Rngs,
) -> ResNet:
  """ResNet-18/34/50/101/152 for 224 px (He et al. 2015, table 1).

  The stem is a 7x7 convolution and max pooling, each halving the image.
  """
  if depth not in _DEPTHS:
    raise errors.UserError(
      f"resnet got depth={depth}, needs one of {sorted(_DEPTHS)}"
    )
  blocks, expansion = _DEPTHS[depth]
  layer = functools.partial(
    ConvNorm, axis_name=axis_name, dtype=dtype, rngs=rngs
  )
  return ResNet(
    layer(channels, width, 7, 2, activation=nnx.relu),
    blocks,
    [width * 2**n for n in range(4)],
    pool=max_pool,
    inputs=width,
    expansion=expansion,
    num_classes=num_classes,
    layer=layer,
    dtype=dtype,
    rngs=rngs,
  )
