"""Wide residual networks for 32 px (Zagoruyko & Komodakis 2016, section 2).

Taps, channel-last: `stem`, the first convolution's output; `stage_1` ...
`stage_3`, the sum x + F(x), which no ReLU follows; `preact_n`, that sum
after the batch normalisation that is next, so what the next ReLU is given (as
the distillation papers' code has it); `pooled`, the input of the classifier.
So here `stage_n` is not relu(`preact_n`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kdjax import errors
from kdjax.models.layers import conv, mean_over_space, norm
from kdjax.types import Output


class Block(nnx.Module):
  """x + F(x), F = conv ReLU BN conv ReLU BN; returns BN(x) as well.

  Where the shape changes, x is a 1x1 convolution of ReLU BN x instead.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    stride: int,
    *,
    conv: Callable[..., nnx.Conv],
    norm: Callable[..., nnx.BatchNorm],
  ):
    self.norm_1 = norm(inputs)
    self.conv_1 = conv(inputs, outputs, 3, stride)
    self.norm_2 = norm(outputs)
    self.conv_2 = conv(outputs, outputs, 3)
    matches = inputs == outputs
    self.shortcut = None if matches else conv(inputs, outputs, 1, stride)

  def __call__(self, x: Array) -> tuple[Array, Array]:
    preact = self.norm_1(x)
    h = nnx.relu(preact)
    y = self.conv_2(nnx.relu(self.norm_2(self.conv_1(h))))
    return preact, y + (x if self.shortcut is None else self.shortcut(h))


class WideResNet(nnx.Module):
  """Stem, three stages, BN, ReLU, mean over space, classifier."""

  def __init__(
    self,
    blocks: int,
    width: int,
    *,
    num_classes: int,
    channels: int,
    axis_name: str | None,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    make_conv = functools.partial(conv, dtype=dtype, rngs=rngs)
    make_norm = functools.partial(
      norm, axis_name=axis_name, dtype=dtype, rngs=rngs
    )
    self.stem = make_conv(channels, 16, 3)
    inputs, stages = 16, []
    for outputs, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
      stage = []
      for i in range(blocks):
        a, s = (inputs, stride) if i == 0 else (outputs, 1)
        stage.append(Block(a, outputs, s, conv=make_conv, norm=make_norm))
      stages.append(nnx.List(stage))
      inputs = outputs
    self.stages = nnx.List(stages)
    self.norm = make_norm(inputs)
    self.classifier = nnx.Linear(inputs, num_classes, dtype=dtype, rngs=rngs)

  def __call__(self, image: Float[Array, "b h w c"]) -> Output:
    x = self.stem(image)
    taps = {"stem": x}
    for n, stage in enumerate(self.stages, 1):
      for i, block in enumerate(stage):
        preact, x = block(x)
        if n > 1 and i == 0:
          taps[f"preact_{n - 1}"] = preact
      taps[f"stage_{n}"] = x
    x = taps[f"preact_{len(self.stages)}"] = self.norm(x)
    x = taps["pooled"] = mean_over_space(nnx.relu(x))
    return Output(self.classifier(x), taps)


def wrn(
  depth: int,
  width: int,
  *,
  num_classes: int,
  channels: int = 3,
  axis_name: str | None = None,
  dtype: Any = jnp.float32,
  rngs: nnx.Rngs,
) -> WideResNet:
  """WRN-`depth`-`width` without dropout, as in the distillation papers' code.

  Args:
    depth: 16, 40: 6n + 4.
    width: 1, 2: multiplies the 16, 32 and 64 channels of the stages.
    axis_name: averages batch statistics over this axis of `jax.pmap`.
    dtype: of the computation; parameters and statistics are float32.
  """
  blocks, rest = divmod(depth - 4, 6)
  if rest or blocks < 1:
    raise errors.UserError(
      f"wrn got depth={depth}, needs 6n + 4: take 10, 16, 22, 28, 40 ..."
    )
  return WideResNet(
    blocks,
    width,
    num_classes=num_classes,
    channels=channels,
    axis_name=axis_name,
    dtype=dtype,
    rngs=rngs,
  )
