"""Information-theoretic representation distillation (ITRD), two losses.

Conventions as in `kdjax.losses.relations`: `[B, ...]` is flattened to `[B, D]`,
`where` says which examples exist, `group_size` which meet.
"""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32, Shaped

from kdjax.losses.groups import count, gram, in_groups, same_size
from kdjax.losses.maps import both, l2_normalize
from kdjax.losses.traits import tap_loss


@tap_loss(couples=True)
def correlation(
  student: Float[Array, "b ..."],
  teacher: Float[Array, "b ..."],
  *,
  alpha: ArrayLike = 1.5,
  where: Shaped[Array, " b"] | None = None,
  group_size: int | None = None,
) -> Float32[Array, " b"]:
  """log₂ Σ_d |c_d − 1|^(2 alpha), c_d = (n − 1) / n · ρ_d, in bits.

  ρ_d is Pearson's correlation over the batch of the student's and the teacher's
  dimension d. A dimension that is constant on either side correlates 0 and
  sends no gradient. O(B D).

  Args:
    student, teacher: activations of one size.
    alpha: the order of the entropy, > 0.5. May be traced.
    where, group_size: as in `kdjax.losses.relations`.

  Returns:
    The loss of the whole group, for each of its rows.

  Raises:
    UserError: if the sizes differ; the authors' linear embedding of the student
      is a projector here.

  Source: Miles et al. 2021, arXiv 2112.00459, section 3.2, and their code: it
    divides by n a product of deviations divided by n − 1. So c never reaches 1,
    nor the loss minus infinity.
  """
  same_size(student, teacher)

  def of_group(s: Array, t: Array, exists: Array) -> Array:
    rho = jnp.sum(_unit_columns(s, exists) * _unit_columns(t, exists), axis=0)
    n = count(exists)
    gap = ((n - 1) / n * rho - 1.0) ** 2
    return jnp.broadcast_to(jnp.log2(jnp.sum(gap**alpha)), exists.shape)

  return in_groups(of_group, *both(student, teacher), where, group_size)


@tap_loss(couples=True)
def mutual(
  student: Float[Array, "b ..."],
  teacher: Float[Array, "b ..."],
  *,
  where: Shaped[Array, " b"] | None = None,
  group_size: int | None = None,
) -> Float32[Array, " b"]:
  """‖G_s / tr G_s‖² − ‖G_st / tr G_st‖², G = Gram matrix, G_st = G_s ∘ G_t.

  The rows are scaled to length 1 before, the norm is Frobenius', ∘ goes element
  by element. It is negative where the teacher adds nothing to tell the examples
  apart. O(B²) memory, O(B² D) time.

  Returns:
    Row i has n times the sum over row i.

  Source: Miles et al. 2021, arXiv 2112.00459, section 3.3, and their code: the
    difference of Rényi's entropies of order 2 without their logarithms.
  """

  def of_group(s: Array, t: Array, exists: Array) -> Array:
    g_s = gram(l2_normalize(s))
    g_st = g_s * gram(l2_normalize(t))
    gap = _of_trace_1(g_s) ** 2 - _of_trace_1(g_st) ** 2
    return count(exists) * jnp.sum(gap, axis=1)

  return in_groups(of_group, *both(student, teacher), where, group_size)


def _of_trace_1(g: Array) -> Array:
  trace = jnp.trace(g)
  return g / jnp.where(trace > 0, trace, 1.0)


def _unit_columns(x: Array, exists: Array) -> Array:
  """Columns less their mean, of length 1; 0 where they are constant."""
  rows = exists[:, None]
  mean = jnp.sum(x, axis=0, keepdims=True) / count(exists)
  centred = jnp.where(rows, x - mean, 0.0)
  squares = jnp.sum(centred**2, axis=0, keepdims=True)
  # Below this the deviations are the rounding of x, and √ has no slope at 0.
  varies = squares > jnp.maximum(
    1e-12 * jnp.sum(x**2, axis=0, keepdims=True), 1e-30
  )
  norm = jnp.sqrt(jnp.where(varies, squares, 1.0))
  return jnp.where(varies, centred / norm, 0.0)
