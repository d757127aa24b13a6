"""Losses on activations before their ReLU; conventions as in `features`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32

from kdjax.losses.maps import per_channel, same_shape
from kdjax.losses.traits import tap_loss


@tap_loss()
def overhaul(
  student: Float[Array, "b *s"],
  teacher: Float[Array, "b *t"],
  margin: Float[Array, " c"],
) -> Float32[Array, " b"]:
  """Σ over positions and channels of (s − r)², but 0 where s <= r <= 0.

  r = max(t, margin) is the teacher's margin ReLU: how far below 0 the teacher
  goes does not matter, so the student need only be below r.

  Args:
    student, teacher: before their ReLU.
    margin: [C], <= 0: the mean of the teacher's negative responses, as from
      `overhaul_margin`.

  Raises:
    UserError: if the shapes differ, or the margin has not one value a channel.

  Source: Heo et al. 2019 (OFD), arXiv 1904.01866, sections 3.1 and 3.3.
  """
  student, teacher = same_shape(student, teacher)
  margin = jax.lax.stop_gradient(per_channel(margin, teacher, "margin"))
  target = jnp.maximum(teacher, margin)
  low_enough = (student <= target) & (target <= 0)
  squares = jnp.where(low_enough, 0.0, (student - target) ** 2)
  return jnp.sum(squares, axis=tuple(range(1, squares.ndim)))


def overhaul_margin(
  scale: Float[Array, " c"], bias: Float[Array, " c"]
) -> Float32[Array, " c"]:
  """E[x | x < 0] of x ~ N(bias, scale²): bias − |scale| φ(z) / Φ(−z).

  z = bias / |scale|; scale and bias are those of the teacher's batch norm. For
  scale 0, x is the constant bias: min(bias, 0).

  Source: as `overhaul`. The authors' code has −3 |scale| instead where Φ(−z) is
    below 0.001; here the ratio is exact in the tail too.
  """
  scale = jnp.abs(jnp.asarray(scale, jnp.float32))
  bias = jnp.asarray(bias, jnp.float32)
  varies = scale > 0
  z = bias / jnp.where(varies, scale, 1.0)
  # φ and Φ underflow beyond z = 13, and φ / Φ − z cancels long before. There it
  # is 1 / (z + 2 / (z + 3 / ...)) (Laplace), which is slow near 0.
  near, far = jnp.minimum(z, 3.0), jnp.maximum(z, 3.0)
  log_density = jax.scipy.stats.norm.logpdf(near)
  ratio = jnp.exp(log_density - jax.scipy.special.log_ndtr(-near))
  fraction = far
  for n in range(40, 1, -1):
    fraction = far + n / fraction
  excess = jnp.where(z < 3.0, ratio - near, 1 / fraction)
  return jnp.where(varies, -scale * excess, jnp.minimum(bias, 0.0))


@tap_loss()
def activation_boundary(
  student: Float[Array, "b *s"],
  teacher: Float[Array, "b *t"],
  *,
  margin: ArrayLike = 1.0,
) -> Float32[Array, " b"]:
  """Σ relu(s + margin)² where t <= 0, relu(margin − s)² where t > 0.

  The student is to be on the teacher's side of 0, by the margin: only the sign
  of the teacher's counts. The sum is over positions and channels.

  Args:
    student, teacher: before their ReLU.
    margin: μ of the paper, above 0. May be traced.

  Raises:
    UserError: if the shapes differ.

  Source: Heo et al. 2018 (AB), arXiv 1811.03233, section 3.2.
  """
  student, teacher = same_shape(student, teacher)
  side = jnp.where(teacher > 0, 1.0, -1.0)
  missing = jnp.maximum(margin - side * student, 0.0)
  return jnp.sum(missing**2, axis=tuple(range(1, missing.ndim)))
