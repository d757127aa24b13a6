"""VGG for 32 px: `vgg_cifar`, convolutions without the fully connected layers.

Taps, channel-last: `stem`, the first group of convolutions; `stage_1` ...
`stage_4`, the further ones, each after its last ReLU, and `preact_1` ...
before it; `pooled`, the input of the classifier. A group follows the halving
of the image, except the last, which works at the size of the one before it.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kdjax import errors
from kdjax.models.layers import ConvNorm, mean_over_space, through_stages
from kdjax.types import Output


class Group(nnx.Module):
  """Perhaps 2x2 max pooling, then 3x3 convolutions with ReLU between them.

  The ReLU that follows is the caller's.
  """

  def __init__(
    self,
    inputs: int,
    width: int,
    count: int,
    *,
    pool: bool,
    layer: Callable[..., ConvNorm],
  ):
    self.pool = pool
    widths = [inputs] + [width] * count
    self.layers = nnx.List(
      layer(a, b, 3) for a, b in itertools.pairwise(widths)
    )

  def __call__(self, x: Array) -> Array:
    if self.pool:
      x = nnx.max_pool(x, (2, 2), strides=(2, 2))
    for n, layer in enumerate(self.layers):
      x = layer(x) if n == 0 else layer(nnx.relu(x))
    return x


class VGG(nnx.Module):
  """Groups of convolutions, mean over space, classifier."""

  def __init__(
    self,
    counts: Sequence[int],
    widths: Sequence[int],
    *,
    num_classes: int,
    channels: int,
    layer: Callable[..., ConvNorm],
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    pools = (False, True, True, True, False)
    groups = [
      Group(a, b, count, pool=pool, layer=layer)
      for a, b, count, pool in zip((channels, *widths), widths, counts, pools)
    ]
    self.stem, *stages = groups
    self.stages = nnx.List(stages)
    self.classifier = nnx.Linear(
      widths[-1],
      num_classes,
      kernel_init=nnx.initializers.normal(0.01),
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(self, image: Float[Array, "b h w c"]) -> Output:
    stem = nnx.relu(self.stem(image))
    x, taps = through_stages([[stage] for stage in self.stages], stem)
    x = mean_over_space(x)
    taps |= {"stem": stem, "pooled": x}
    return Output(self.classifier(x), taps)


# depth: convolutions of each group
_COUNTS = {
  8: (1, 1, 1, 1, 1),
  11: (1, 1, 2, 2, 2),
  13: (2, 2, 2, 2, 2),
  16: (2, 2, 3, 3, 3),
  19: (2, 2, 4, 4, 4),
}


def vgg_cifar(
  depth: int,
  *,
  num_classes: int,
  channels: int = 3,
  width: int = 64,
  axis_name: str | None = None,
  dtype: Any = jnp.float32,
  rngs: nnx.Rngs,
) -> VGG:
  """VGG-8/11/13/16/19 with batch normalisation, as the distillation papers.

  After Simonyan & Zisserman 2014, table 1 (A, B, D, E; 8 is theirs, with one
  convolution a group): three poolings and a mean instead of five poolings, one
  linear layer instead of three. The convolutions keep the bias that batch
  normalisation makes idle, so that weights in that layout map one to one.

  Args:
    depth: 8, 11, 13, 16 or 19.
    width: channels of the first group; the next have 2, 4, 8 and 8 times it.
    axis_name: averages batch statistics over this axis of `jax.pmap`.
    dtype: of the computation; parameters and statistics are float32.
  """
  if depth not in _COUNTS:
    raise errors.UserError(
      f"vgg_cifar got depth={depth}, needs one of {sorted(_COUNTS)}"
    )
  return VGG(
    _COUNTS[depth],
    [width * k for k in (1, 2, 4, 8, 8)],
    num_classes=num_classes,
    channels=channels,
    layer=functools.partial(
      ConvNorm, use_bias=True, axis_name=axis_name, dtype=dtype, rngs=rngs
    ),
    dtype=dtype,
    rngs=rngs,
  )
