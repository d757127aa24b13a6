"""What several convolutional networks are made of. Images are NHWC.

A network makes `functools.partial(ConvNorm, axis_name=..., dtype=...,
rngs=...)` once and hands it to its blocks as `layer`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kdjax import convolution, errors

Activation = Callable[[Array], Array]

# Variance 2 / (kernel area x outputs), groups not counted (He et al. 2015).
he_fan_out = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
# Uniform in +-1 / sqrt(fan in): where the published code leaves PyTorch's own.
uniform_fan_in = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def conv(
  inputs: int,
  outputs: int,
  size: int,
  stride: int = 1,
  *,
  groups: int = 1,
  use_bias: bool = False,
  padding: str = "both",
  kernel_init: nnx.Initializer = he_fan_out,
  dtype: Any,
  rngs: nnx.Rngs,
) -> nnx.Conv:
  """A square convolution, zeros on both sides: stride 1 keeps the size.

  With `padding="same"` a stride of 2 has its odd zero behind the image, as
  weights that TensorFlow trained expect; all others expect "both".
  """
  zeros = {"both": size // 2, "same": "SAME"}
  return nnx.Conv(
    inputs,
    outputs,
    (size, size),
    strides=stride,
    padding=errors.choose("padding", padding, zeros),
    feature_group_count=groups,
    use_bias=use_bias,
    kernel_init=kernel_init,
    conv_general_dilated=convolution.conv_general_dilated,
    dtype=dtype,
    rngs=rngs,
  )


def norm(
  channels: int,
  *,
  epsilon: float = 1e-5,
  momentum: float = 0.9,
  axis_name: str | None,
  dtype: Any,
  rngs: nnx.Rngs,
) -> nnx.BatchNorm:
  """Batch normalisation; `momentum` is the share of the old statistics."""
  return nnx.BatchNorm(
    channels,
    momentum=momentum,
    epsilon=epsilon,
    axis_name=axis_name,
    dtype=dtype,
    rngs=rngs,
  )


class ConvNorm(nnx.Module):
  """activation(BN(conv(x))); the convolution has no bias unless asked."""

  def __init__(
    self,
    inputs: int,
    outputs: int,
    size: int,
    stride: int = 1,
    *,
    groups: int = 1,
    activation: Activation = jax.nn.identity,
    use_bias: bool = False,
    padding: str = "both",
    kernel_init: nnx.Initializer = he_fan_out,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    axis_name: str | None,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    self.conv = conv(
      inputs,
      outputs,
      size,
      stride,
      groups=groups,
      use_bias=use_bias,
      padding=padding,
      kernel_init=kernel_init,
      dtype=dtype,
      rngs=rngs,
    )
    self.norm = norm(
      outputs,
      epsilon=epsilon,
      momentum=momentum,
      axis_name=axis_name,
      dtype=dtype,
      rngs=rngs,
    )
    self.activation = activation

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
    return self.activation(self.norm(self.conv(x)))


_BOTH_SIDES: Any = ((1, 1), (1, 1))  # nnx declares only the names


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
  """Maximum over 3x3 at a stride of 2, padded on both sides."""
  return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=_BOTH_SIDES)


def mean_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
  """Mean over 3x3 at a stride of 2, where zeros outside the image count."""
  return nnx.avg_pool(x, (3, 3), strides=(2, 2), padding=_BOTH_SIDES)


def mean_over_space(x: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
  return jnp.mean(x, axis=(1, 2))


def through_stages(
  stages: Iterable[Iterable[Callable[[Array], Array]]],
  x: Float[Array, "b h w c"],
) -> tuple[Float[Array, "b i j d"], dict[str, Array]]:
  """relu(block(x)) block after block, with each stage's end as taps.

  `stage_n` is the last block's output after ReLU, `preact_n` before it.
  """
  taps = {}
  for n, stage in enumerate(stages, 1):
    for block in stage:
      preact = taps[f"preact_{n}"] = block(x)
      x = taps[f"stage_{n}"] = nnx.relu(preact)
  return x, taps
