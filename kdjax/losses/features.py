"""Losses that compare two activations element by element.

`(student, teacher, **hparams)` -> float32 `[B]`. An activation is a map
`[B, H, W, C]`, tokens `[B, S, D]` or, where positions play no part, a vector
`[B, D]`; channels come last. The mean over the examples is the batch loss of
the source named, without its outer weight. The teacher gets no gradient.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32, Key, Shaped

from kdjax import errors
from kdjax.losses.maps import (
  adaptive_pool,
  both,
  example_mean,
  l2_normalize,
  magnitude,
  per_channel,
  same_shape,
  spatial_size,
  to_smaller,
)
from kdjax.losses.traits import tap_loss

_EQUAL = 1e-9


def _smooth_l1(student: Array, teacher: Array) -> Array:
  distance = magnitude(student - teacher)
  return jnp.where(distance < 1, 0.5 * distance**2, distance - 0.5)


def _cosine(student: Array, teacher: Array) -> Array:
  product = l2_normalize(student) * l2_normalize(teacher)
  return 1 - jnp.sum(product, axis=-1, keepdims=True)


_HINTS = {
  "mse": lambda student, teacher: (student - teacher) ** 2,
  "l1": lambda student, teacher: magnitude(student - teacher),
  "smooth_l1": _smooth_l1,
  "cosine": _cosine,
}


@tap_loss()
def hint(
  student: Float[Array, "b *s"],
  teacher: Float[Array, "b *t"],
  *,
  distance: Literal["mse", "l1", "cosine", "smooth_l1"] = "mse",
) -> Float32[Array, " b"]:
  """mean d(s, t) over positions and channels.

  d is (s − t)², |s − t|, or smooth L1: (s − t)² / 2 where |s − t| < 1, else
  |s − t| − 1/2. For `cosine` it is 1 − cos(s, t) of the two channel vectors at
  a position; a vector of zeros is at distance 1 from all and gets no gradient.
  The larger of two maps is pooled to the size of the other.

  Raises:
    UserError: if the channels or positions differ, or there is no such
      distance.

  Source: Romero et al. 2014 (FitNets), arXiv 1412.6550, section 2.2, there with
    a sum; the mean is that of the common reimplementations.
  """
  if jnp.ndim(student) == jnp.ndim(teacher) == 4:
    student, teacher = to_smaller(*both(student, teacher))
  student, teacher = same_shape(student, teacher)
  return example_mean(
    errors.choose("distance", distance, _HINTS)(student, teacher)
  )


@tap_loss()
def review(
  student: Float[Array, "b *s"],
  teacher: Float[Array, "b *t"],
  *,
  levels: Sequence[int] = (4, 2, 1),
) -> Float32[Array, " b"]:
  """Σ_n 2⁻ⁿ mse(pool_n(s), pool_n(t)) / Σ_n 2⁻ⁿ, the hierarchical context loss.

  n = 0 is the map as it is. Each further n pools both to l x l, for the next l
  of `levels`; an l at or above the height, or above the width, is skipped.

  Args:
    student, teacher: maps; a vector counts as a map of one position.
    levels: sizes, at least 1, largest first.

  Raises:
    UserError: if the shapes differ, they are tokens, or a level is below 1.

  Source: Chen et al. 2021 (ReviewKD), arXiv 2104.09044, section 3.3; the
    weights are those of the authors' code. The fusion that comes before it is
    `terms.review`.
  """
  if min(levels, default=1) < 1:
    raise errors.UserError(f"review got levels={levels}: give sizes >= 1")
  student, teacher = same_shape(student, teacher)
  if student.ndim == 2:
    student, teacher = student[:, None, None], teacher[:, None, None]
  height, width = spatial_size(student)
  difference = student - teacher  # pooled once: pooling is linear
  total, weight, weights = example_mean(difference**2), 1.0, 1.0
  for level in levels:
    if level < height and level <= width:
      weight /= 2
      weights += weight
      apart = adaptive_pool(difference, (level, level))
      total += weight * example_mean(apart**2)
  return total / weights


@tap_loss()
def masked_generative(
  student: Float[Array, "b *s"],
  teacher: Float[Array, "b *t"],
  mask: Shaped[Array, "b *m"],
  generate: Callable[[Array], Array],
) -> Float32[Array, " b"]:
  """mean (generate(mask · s) − t)² over positions and channels.

  Args:
    student, teacher: maps or tokens.
    mask: 1 = seen, 0 = hidden, the same for all channels: of `hide_positions`.
    generate: from the student's channels to the teacher's.

  Raises:
    UserError: if what it generates has not the teacher's shape.

  Source: Yang et al. 2022 (MGD), arXiv 2205.01529, section 3, there with a sum.
  """
  student, teacher = both(student, teacher)
  made, teacher = same_shape(generate(mask * student), teacher)
  return example_mean((made - teacher) ** 2)


def hide_positions(
  key: Key[Array, ""], x: Float[Array, "b *s c"], mask_ratio: ArrayLike
) -> Float32[Array, "b *s 1"]:
  """1 with probability 1 − mask_ratio at each position, else 0."""
  drawn = jax.random.uniform(key, (*x.shape[:-1], 1))
  return jnp.float32(drawn >= mask_ratio)


@tap_loss()
def variational_information(
  student: Float[Array, "b *s"],
  teacher: Float[Array, "b *t"],
  variance: Float[Array, " c"],
) -> Float32[Array, " b"]:
  """mean ½ ((t − s)² / variance + log variance) over positions and channels.

  Up to a constant this is −log N(t; s, variance), which bounds the mutual
  information of the two networks.

  Args:
    student: the mean μ(s) that the student, projected, predicts of the teacher.
    variance: [C], > 0; it receives a gradient.

  Raises:
    UserError: if the shapes differ, or there is not one variance a channel.

  Source: Ahn et al. 2019 (VID), arXiv 1904.05835, section 3.
  """
  student, teacher = same_shape(student, teacher)
  variance = per_channel(variance, teacher, "variance")
  return example_mean(
    0.5 * ((teacher - student) ** 2 / variance + jnp.log(variance))
  )


@tap_loss(couples=True)
def simple(
  student: Float[Array, "b *s"],
  teacher: Float[Array, "b *t"],
  *,
  exponent: ArrayLike = 4.0,
  where: Shaped[Array, " b"] | None = None,
) -> Float32[Array, " b"]:
  """2 log Σ |s − t|^exponent, the sum over everything, examples included.

  Both sides are meant to be batch-normalised, the student's after a linear
  projector, as `terms.simple` does. The gradient grows as 1 / |s − t| as they
  meet, and log has no value at s = t: where no difference exceeds 1e-9 the
  value is that of one difference of 1e-9, and the gradient 0.

  Args:
    exponent: at least 1. May be traced.
    where: true for the examples that exist; all by default.

  Returns:
    Every row has the whole value, so that their mean is the batch's.

  Raises:
    UserError: if the shapes differ.

  Source: Miles and Mikolajczyk 2023 (SRD), arXiv 2303.11098, section 3, with
    the 2 of the authors' code.
  """
  student, teacher = same_shape(student, teacher)
  apart = student - teacher
  if where is not None:
    exists = jnp.asarray(where, bool).reshape(-1, *(1,) * (apart.ndim - 1))
    apart = jnp.where(exists, apart, 0.0)
  # Divided by the largest, no power underflows, nor does its inverse overflow.
  # The value does not depend on what it is divided by, hence no gradient there.
  largest = jax.lax.stop_gradient(jnp.max(magnitude(apart)))
  differs = largest > _EQUAL
  scale = jnp.where(differs, largest, _EQUAL)
  total = jnp.sum((magnitude(apart) / scale) ** exponent)
  value = exponent * jnp.log(scale) + jnp.log(jnp.where(differs, total, 1.0))
  return jnp.broadcast_to(2 * value, student.shape[:1])
