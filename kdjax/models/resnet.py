"""Residual networks: `resnet_cifar` for 32 px (or 8), `resnet` for 224 px.

Taps: `stem`, `stage_1` ... `stage_n` (after the last ReLU of the stage) and
`pooled` (before the classifier), channel-last.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kdjax import errors
from kdjax.types import Output


class ConvNorm(nnx.Module):
  """Convolution without bias, then batch normalisation."""

  def __init__(
    self,
    inputs: int,
    outputs: int,
    size: int,
    stride: int = 1,
    *,
    axis_name: str | None,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    # Explicit padding: "SAME" pads a stride of 2 on one side only, and
    # pretrained weights of other libraries expect both.
    self.conv = nnx.Conv(
      inputs,
      outputs,
      (size, size),
      strides=stride,
      padding=size // 2,
      use_bias=False,
      dtype=dtype,
      rngs=rngs,
      kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
    )
    self.norm = nnx.BatchNorm(
      outputs,
      momentum=0.9,
      epsilon=1e-5,
      axis_name=axis_name,
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(self, x: Array) -> Array:
    return self.norm(self.conv(x))


class Block(nnx.Module):
  """Two 3x3 convolutions; with `expansion`, 1x1, 3x3, 1x1 (a bottleneck)."""

  def __init__(
    self,
    inputs: int,
    width: int,
    stride: int,
    *,
    expansion: int = 0,
    axis_name: str | None,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    def layer(a: int, b: int, size: int, stride: int = 1) -> ConvNorm:
      return ConvNorm(
        a, b, size, stride, axis_name=axis_name, dtype=dtype, rngs=rngs
      )

    if expansion:
      outputs = width * expansion
      # The stride is in the 3x3 convolution, as in torchvision ("v1.5").
      self.layers = nnx.List(
        [
          layer(inputs, width, 1),
          layer(width, width, 3, stride),
          layer(width, outputs, 1),
        ]
      )
    else:
      outputs = width
      self.layers = nnx.List(
        [layer(inputs, width, 3, stride), layer(width, width, 3)]
      )
    matches = stride == 1 and inputs == outputs
    self.shortcut = None if matches else layer(inputs, outputs, 1, stride)

  def __call__(self, x: Array) -> Array:
    y = x
    for n, layer in enumerate(self.layers):
      y = layer(y) if n == 0 else layer(nnx.relu(y))
    return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
  """Stem, stages of blocks, mean over space, classifier."""

  def __init__(
    self,
    blocks: Sequence[int],
    widths: Sequence[int],
    *,
    num_classes: int,
    channels: int,
    stem: Callable[..., nnx.Module],
    stem_width: int,
    expansion: int,
    axis_name: str | None,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    self.stem = stem(
      channels, stem_width, axis_name=axis_name, dtype=dtype, rngs=rngs
    )
    inputs, stages = stem_width, []
    for n, (count, width) in enumerate(zip(blocks, widths)):
      stage = []
      for i in range(count):
        stride = 2 if n > 0 and i == 0 else 1
        stage.append(
          Block(
            inputs,
            width,
            stride,
            expansion=expansion,
            axis_name=axis_name,
            dtype=dtype,
            rngs=rngs,
          )
        )
        inputs = width * (expansion or 1)
      stages.append(nnx.List(stage))
    self.stages = nnx.List(stages)
    self.classifier = nnx.Linear(inputs, num_classes, dtype=dtype, rngs=rngs)

  def __call__(self, image: Float[Array, "b h w c"]) -> Output:
    taps = {}
    x = taps["stem"] = self.stem(image)
    for n, stage in enumerate(self.stages, 1):
      for block in stage:
        x = block(x)
      taps[f"stage_{n}"] = x
    x = taps["pooled"] = jnp.mean(x, axis=(1, 2))
    return Output(self.classifier(x), taps)


class SmallStem(nnx.Module):
  """3x3 convolution at full resolution."""

  def __init__(
    self,
    inputs: int,
    outputs: int,
    *,
    axis_name: str | None,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    self.layer = ConvNorm(
      inputs, outputs, 3, axis_name=axis_name, dtype=dtype, rngs=rngs
    )

  def __call__(self, x: Array) -> Array:
    return nnx.relu(self.layer(x))


class LargeStem(nnx.Module):
  """7x7 convolution and max pooling, each halving the image."""

  def __init__(
    self,
    inputs: int,
    outputs: int,
    *,
    axis_name: str | None,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    self.layer = ConvNorm(
      inputs, outputs, 7, 2, axis_name=axis_name, dtype=dtype, rngs=rngs
    )

  def __call__(self, x: Array) -> Array:
    x = nnx.relu(self.layer(x))
    both_sides: Any = ((1, 1), (1, 1))  # nnx declares only the names
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=both_sides)


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
  return ResNet(
    [blocks] * 3,
    [width, 2 * width, 4 * width],
    num_classes=num_classes,
    channels=channels,
    stem=SmallStem,
    stem_width=stem_width or width,
    expansion=0,
    axis_name=axis_name,
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
  """ResNet-18/34/50/101/152 for 224 px (He et al. 2015, table 1)."""
  if depth not in _DEPTHS:
    raise errors.UserError(
      f"resnet got depth={depth}, needs one of {sorted(_DEPTHS)}"
    )
  blocks, expansion = _DEPTHS[depth]
  return ResNet(
    blocks,
    [width * 2**n for n in range(4)],
    num_classes=num_classes,
    channels=channels,
    stem=LargeStem,
    stem_width=width,
    expansion=expansion,
    axis_name=axis_name,
    dtype=dtype,
    rngs=rngs,
  )
