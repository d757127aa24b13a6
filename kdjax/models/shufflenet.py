"""ShuffleNets: `shufflenet_v2` for 224 px; `shufflenet_v1_cifar` and
`shufflenet_v2_cifar` for 32 px, as in the distillation papers' code.

Taps, channel-last: `stem`; `stage_1` ... `stage_3` after the stage's last ReLU
and `preact_1` ... before it; `pooled`, the input of the classifier. In V2
that last ReLU follows the shuffle, so the two taps agree channel by channel;
the distillation papers' code takes the second one before the shuffle.
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
  mean_pool,
  through_stages,
  uniform_fan_in,
)
from kdjax.types import Output

_STEM_WIDTH = 24


def shuffle(x: Float[Array, "b h w c"], groups: int) -> Float[Array, "b h w c"]:
  """Channel i of group g becomes channel i * groups + g."""
  *bhw, c = x.shape
  x = x.reshape(*bhw, groups, c // groups)
  return jnp.swapaxes(x, -1, -2).reshape(*bhw, c)


class BlockV1(nnx.Module):
  """x + F(x), or [F(x), mean pooling of x] where it halves the image.

  F is a 1x1 convolution in groups, a shuffle, 3x3 depthwise, 1x1 in groups.
  The ReLU that follows is the caller's. The depthwise convolution is followed
  by a ReLU, which the paper (figure 2) does not have and the code has.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    stride: int,
    *,
    groups: int,
    layer: Callable[..., ConvNorm],
  ):
    self.halves = stride == 2
    # 24 channels are too few for groups (section 3.3).
    self.in_groups = 1 if inputs == _STEM_WIDTH else groups
    # Where the image is halved, x itself is `inputs` of the `outputs`.
    own = outputs - inputs if self.halves else outputs
    width = own // 4
    self.reduce = layer(
      inputs, width, 1, groups=self.in_groups, activation=nnx.relu
    )
    self.depthwise = layer(
      width, width, 3, stride, groups=width, activation=nnx.relu
    )
    self.expand = layer(width, own, 1, groups=groups)

  def __call__(self, x: Array) -> Array:
    y = self.depthwise(shuffle(self.reduce(x), self.in_groups))
    y = self.expand(y)
    if not self.halves:
      return x + y
    return jnp.concatenate([y, mean_pool(x)], axis=-1)


class BlockV2(nnx.Module):
  """shuffle([x_1, F(x_2)]), or shuffle([G(x), F(x)]) where it halves the image.

  x_1 and x_2 are the halves of x. F is 1x1, 3x3 depthwise, 1x1; G is 3x3
  depthwise, 1x1. The ReLU that follows is the caller's: it commutes with the
  shuffle, and x_1, which has been through one, is unmoved by a second.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    stride: int,
    *,
    layer: Callable[..., ConvNorm],
  ):
    half = outputs // 2
    if stride == 2:
      self.shortcut = nnx.List(
        [layer(inputs, inputs, 3, 2, groups=inputs), layer(inputs, half, 1)]
      )
    else:
      self.shortcut = None
      inputs = half
    self.reduce = layer(inputs, half, 1, activation=nnx.relu)
    self.depthwise = layer(half, half, 3, stride, groups=half)
    self.expand = layer(half, half, 1)

  def __call__(self, x: Array) -> Array:
    if self.shortcut is None:
      x_1, x_2 = jnp.split(x, 2, axis=-1)
    else:
      depthwise, pointwise = self.shortcut
      x_1, x_2 = pointwise(depthwise(x)), x
    y = self.expand(self.depthwise(self.reduce(x_2)))
    return shuffle(jnp.concatenate([x_1, y], axis=-1), 2)


class ShuffleNet(nnx.Module):
  """Stem, stages of 4, 8 and 4 blocks, mean over space, classifier.

  `head`: width of the 1x1 convolution before the mean; 0 = none.
  """

  def __init__(
    self,
    stem: ConvNorm,
    block: Callable[..., nnx.Module],
    widths: Sequence[int],
    *,
    pool: Activation,
    head: int,
    num_classes: int,
    layer: Callable[..., ConvNorm],
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    self.stem = stem
    self.pool = pool
    inputs, stages = _STEM_WIDTH, []
    for count, width in zip((4, 8, 4), widths):
      stage = [block(inputs, width, 2, layer=layer)]
      stage += [block(width, width, 1, layer=layer) for _ in range(count - 1)]
      stages.append(nnx.List(stage))
      inputs = width
    self.stages = nnx.List(stages)
    self.head = layer(inputs, head, 1, activation=nnx.relu) if head else None
    self.classifier = nnx.Linear(
      head or inputs, num_classes, dtype=dtype, rngs=rngs
    )

  def __call__(self, image: Float[Array, "b h w c"]) -> Output:
    stem = self.pool(self.stem(image))
    x, taps = through_stages(self.stages, stem)
    x = mean_over_space(x if self.head is None else self.head(x))
    taps |= {"stem": stem, "pooled": x}
    return Output(self.classifier(x), taps)


def shufflenet_v1_cifar(
  *,
  num_classes: int,
  channels: int = 3,
  width: int = 240,
  axis_name: str | None = None,
  dtype: Any = jnp.float32,
  rngs: nnx.Rngs,
) -> ShuffleNet:
  """ShuffleNet, 3 groups, for 32 px (Zhang et al. 2018, table 1, g = 3).

  The stem is a 1x1 convolution at full resolution.

  Args:
    width: channels of the first stage, a multiple of 12 above 24; each further
      one doubles them.
    axis_name: averages batch statistics over this axis of `jax.pmap`.
    dtype: of the computation; parameters and statistics are float32.
  """
  groups = 3
  if width % (4 * groups) or width <= _STEM_WIDTH:
    raise errors.UserError(
      f"shufflenet_v1_cifar got width={width}, needs a multiple of 12 above "
      f"{_STEM_WIDTH}: take 60, 120, 240 ..."
    )
  layer = _layer(axis_name, dtype, rngs)
  return ShuffleNet(
    layer(channels, _STEM_WIDTH, 1, activation=nnx.relu),
    functools.partial(BlockV1, groups=groups),
    [width, 2 * width, 4 * width],
    pool=jax.nn.identity,
    head=0,
    num_classes=num_classes,
    layer=layer,
    dtype=dtype,
    rngs=rngs,
  )


# width: channels of the stages and of the last convolution
_WIDTHS = {
  0.5: (48, 96, 192, 1024),
  1.0: (116, 232, 464, 1024),
  1.5: (176, 352, 704, 1024),
  2.0: (244, 488, 976, 2048),
}


def shufflenet_v2(
  width: float = 1.0,
  *,
  num_classes: int,
  channels: int = 3,
  axis_name: str | None = None,
  dtype: Any = jnp.float32,
  rngs: nnx.Rngs,
) -> ShuffleNet:
  """ShuffleNetV2 for 224 px (Ma et al. 2018, table 5).

  The stem is a 3x3 convolution and max pooling, each halving the image.

  Args:
    width: 0.5, 1.0, 1.5 or 2.0.
    axis_name: averages batch statistics over this axis of `jax.pmap`.
    dtype: of the computation; parameters and statistics are float32.
  """
  return _v2(
    "shufflenet_v2",
    width,
    (3, 2),
    max_pool,
    num_classes=num_classes,
    channels=channels,
    axis_name=axis_name,
    dtype=dtype,
    rngs=rngs,
  )


def shufflenet_v2_cifar(
  width: float = 1.0,
  *,
  num_classes: int,
  channels: int = 3,
  axis_name: str | None = None,
  dtype: Any = jnp.float32,
  rngs: nnx.Rngs,
) -> ShuffleNet:
  """ShuffleNetV2 for 32 px: the stem is a 1x1 convolution at full resolution.

  The rest, and the arguments, are `shufflenet_v2`'s.
  """
  return _v2(
    "shufflenet_v2_cifar",
    width,
    (1, 1),
    jax.nn.identity,
    num_classes=num_classes,
    channels=channels,
    axis_name=axis_name,
    dtype=dtype,
    rngs=rngs,
  )


def _v2(
  name: str,
  width: float,
  stem: tuple[int, int],
  pool: Activation,
  *,
  num_classes: int,
  channels: int,
  axis_name: str | None,
  dtype: Any,
  rngs: nnx.Rngs,
) -> ShuffleNet:
  if width not in _WIDTHS:
    raise errors.UserError(
      f"{name} got width={width}, needs one of {sorted(_WIDTHS)}"
    )
  *widths, head = _WIDTHS[width]
  layer = _layer(axis_name, dtype, rngs)
  return ShuffleNet(
    layer(channels, _STEM_WIDTH, *stem, activation=nnx.relu),
    BlockV2,
    widths,
    pool=pool,
    head=head,
    num_classes=num_classes,
    layer=layer,
    dtype=dtype,
    rngs=rngs,
  )


def _layer(
  axis_name: str | None, dtype: Any, rngs: nnx.Rngs
) -> Callable[..., ConvNorm]:
  return functools.partial(
    ConvNorm,
    kernel_init=uniform_fan_in,
    axis_name=axis_name,
    dtype=dtype,
    rngs=rngs,
  )
