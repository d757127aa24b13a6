"""Losses that compare how the examples of a batch relate to one another.

Activations `[B, ...]` are flattened to `[B, D]`; D may differ between student
and teacher unless a loss says otherwise. `where` says which examples exist: the
others (padding) move no result, and get 0. The mean of the result over the n
examples that exist is the batch-wide loss. Only examples within consecutive
groups of `group_size` meet; by default all do. Under `jax.jit` that is the
global batch, whatever the sharding, where other libraries' losses see the part
of one device: `group_size` = that part's size reproduces them.

Each may be NaN or infinite in other libraries where rows are zero or identical,
or the batch holds one example; here such rows send a finite gradient or none.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32, Shaped

from kdjax import errors
from kdjax.losses.groups import count, gram, in_groups, same_size
from kdjax.losses.maps import both, l2_normalize
from kdjax.losses.pairwise import by_rows, distances
from kdjax.losses.softmax import relative_entropy
from kdjax.losses.traits import tap_loss
from kdjax.types import UserError


@tap_loss(couples=True)
def similarity_preserving(
  student: Float[Array, "b ..."],
  teacher: Float[Array, "b ..."],
  *,
  where: Shaped[Array, " b"] | None = None,
  group_size: int | None = None,
) -> Float32[Array, " b"]:
  """‖N(F_s F_sᵀ) − N(F_t F_tᵀ)‖² / n², N scaling each row to length 1 (SP).

  The norm is Frobenius'. O(B²) memory, O(B² D) time.

  Returns:
    Row i has the sum over row i, / n.

  Source: Tung and Mori 2019, arXiv 1907.09682, section 3.1.
  """

  def of_group(s: Array, t: Array, exists: Array) -> Array:
    gap = l2_normalize(gram(s)) - l2_normalize(gram(t))
    return jnp.sum(gap**2, axis=1) / count(exists)

  return in_groups(of_group, *both(student, teacher), where, group_size)


@tap_loss(couples=True)
def probabilistic(
  student: Float[Array, "b ..."],
  teacher: Float[Array, "b ..."],
  *,
  where: Shaped[Array, " b"] | None = None,
  group_size: int | None = None,
) -> Float32[Array, " b"]:
  """Σᵢⱼ pᵢⱼ log(pᵢⱼ / qᵢⱼ) / n², p and q cosines as probabilities (PKT).

  pᵢⱼ = kᵢⱼ / Σⱼ kᵢⱼ is the teacher's, q likewise the student's, of the kernel
  k = (cosine + 1) / 2; j = i is included. O(B²) memory, O(B² D) time.

  Returns:
    Row i has KL(pᵢ‖qᵢ) / n, in nats.

  Source: Passalis and Tefas 2018, arXiv 1803.10837, section 3, and their code:
    the mean over all pairs and not their sum, 1e-7 added to p and q.
  """

  def of_group(s: Array, t: Array, exists: Array) -> Array:
    pairs = exists[:, None] & exists[None, :]
    log_q, log_p = _log_affinity(s, pairs), _log_affinity(t, pairs)
    return relative_entropy(log_p, log_q, pairs) / count(exists)

  return in_groups(of_group, *both(student, teacher), where, group_size)


@tap_loss(couples=True)
def relational_distance(
  student: Float[Array, "b ..."],
  teacher: Float[Array, "b ..."],
  *,
  where: Shaped[Array, " b"] | None = None,
  group_size: int | None = None,
) -> Float32[Array, " b"]:
  """Σᵢⱼ h(dᵢⱼ(s) / μ(s) − dᵢⱼ(t) / μ(t)) / n², d = ‖xᵢ − xⱼ‖ (RKD-D).

  μ is the mean of the distances that are positive, h(x) = x² / 2 below |x| = 1
  and |x| − ½ above. O(B²) memory (and 16 MiB), O(B² D) time.

  Returns:
    Row i has the sum over j, / n.

  Source: Park et al. 2019, arXiv 1904.05068, section 3.2.1. As in their code
    the n pairs (i, i) count in the mean of h. There the distance of two equal
    rows is 1e-6, and counts in μ; here it is 0, and does not.
  """

  def of_group(s: Array, t: Array, exists: Array) -> Array:
    gap = _relative_distances(s, exists) - _relative_distances(t, exists)
    return jnp.sum(_smooth_l1(gap), axis=1) / count(exists)

  return in_groups(of_group, *both(student, teacher), where, group_size)


@tap_loss(couples=True)
def relational_angle(
  student: Float[Array, "b ..."],
  teacher: Float[Array, "b ..."],
  *,
  where: Shaped[Array, " b"] | None = None,
  group_size: int | None = None,
) -> Float32[Array, " b"]:
  """Σᵢⱼₖ h(cos ∠ⱼᵢₖ(s) − cos ∠ⱼᵢₖ(t)) / n³ (RKD-A).

  h is as in `relational_distance`. ∠ⱼᵢₖ is the angle at xᵢ between xⱼ and xₖ;
  its cosine is 0 where one of them is xᵢ. O(B³ D) time, O(B² + B D) memory (and
  16 MiB): B³ cosines would be 4 GiB at B = 1024, so they are computed again for
  the gradient.

  Returns:
    Row i has the sum over the angles at xᵢ, / n².

  Source: Park et al. 2019, arXiv 1904.05068, section 3.2.2. As in their code
    the triplets with j = k, i = j or i = k count in the mean.
  """

  def of_group(s: Array, t: Array, exists: Array) -> Array:
    def at_vertex(vertex: tuple[Array, Array, Array]) -> Array:
      sides = (exists & vertex[2])[:, None]
      cos_s, cos_t = (
        gram(l2_normalize(jnp.where(sides, x - x_i[None, :], 0.0)))
        for x, x_i in zip((s, t), vertex)
      )
      return jnp.sum(_smooth_l1(cos_s - cos_t)) / count(exists) ** 2

    floats = len(s) * (len(s) + s.shape[1] + t.shape[1])
    return by_rows(at_vertex, (s, t, exists), floats)

  return in_groups(of_group, *both(student, teacher), where, group_size)


@tap_loss(couples=True)
def correlation_congruence(
  student: Float[Array, "b ..."],
  teacher: Float[Array, "b ..."],
  *,
  kernel: str = "code",
  gamma: ArrayLike = 0.4,
  order: int = 2,
  where: Shaped[Array, " b"] | None = None,
  group_size: int | None = None,
) -> Float32[Array, " b"]:
  """The correlation of neighbours' errors, or the gap of two kernels (CC).

  kernel="code": Σᵢ Σ_d |δᵢ| |δᵢ₊₁| / (n − 1), δ = s − t: what the authors gave
  to those who compare with them. It depends on the order of the batch; the
  sizes of both sides must agree. O(B D).

  kernel="gaussian": Σᵢⱼ (k(sᵢ, sⱼ) − k(tᵢ, tⱼ))² / n² of the rows scaled to
  length 1, k(x, y) = exp(−2γ) Σ_p (2γ)ᵖ / p! (x · y)ᵖ, p = 0..order: the
  expansion of exp(−γ ‖x − y‖²). O(B²) memory, O(B² D) time.

  Args:
    student, teacher: activations.
    kernel: which of the two.
    gamma: γ > 0. May be traced.
    order: the last p.
    where, group_size: as in all of this module.

  Returns:
    Row i has its own summand, so scaled that the mean is the loss.

  Raises:
    UserError: another kernel, or sizes that differ with kernel="code".

  Source: Peng et al. 2019, arXiv 1904.01802, sections 3.3 and 3.4 (gaussian).
  """
  kernels = {"code": _neighbours, "gaussian": _taylor_gap(gamma, order)}
  of_group = errors.choose("kernel", kernel, kernels)
  if kernel == "code":
    same_size(student, teacher)
  return in_groups(of_group, *both(student, teacher), where, group_size)


@tap_loss()
def inter_channel(
  student: Float[Array, "b ... channels"],
  teacher: Float[Array, "b ... channels"],
) -> Float32[Array, " b"]:
  """‖N(Fᵀ F)_s − N(Fᵀ F)_t‖² / C of each example, F [positions, C] (ICKD-C).

  N scales each row to length 1. Channels are related, not examples: the loss is
  per example. Positions may differ in number, channels must agree. O(B C²)
  memory, O(B C² positions) time.

  Raises:
    UserError: if the channels differ.

  Source: Liu et al. 2021, ICCV, section 3.2, and their code. torchdistill's
    divides by B once more: its weight w is w / B here.
  """
  ours, theirs = jnp.shape(student)[-1], jnp.shape(teacher)[-1]
  if ours != theirs:
    raise UserError(
      f"student activation has {ours} channels, the teacher's {theirs}: give "
      "the term a projector"
    )
  g_s, g_t = (
    l2_normalize(gram(jnp.swapaxes(x.reshape(len(x), -1, x.shape[-1]), 1, 2)))
    for x in both(student, teacher)
  )
  return jnp.sum((g_s - g_t) ** 2, axis=(1, 2)) / g_s.shape[-1]


def _log_affinity(x: Array, pairs: Array) -> Array:
  # Rounding makes the cosine of opposite rows less than -1.
  affinity = jnp.maximum((gram(l2_normalize(x)) + 1.0) / 2.0, 0.0)
  affinity = jnp.where(pairs, affinity, 0.0)
  total = jnp.sum(affinity, axis=1, keepdims=True)
  return jnp.log(affinity / jnp.where(total > 0, total, 1.0) + 1e-7)


def _relative_distances(x: Array, exists: Array) -> Array:
  """[n, n]: distances over the mean of the positive ones."""
  d = jnp.where(exists[:, None] & exists[None, :], distances(x), 0.0)
  mean = jnp.sum(d) / jnp.maximum(jnp.sum(d > 0), 1)
  return d / jnp.where(mean > 0, mean, 1.0)


def _smooth_l1(x: Array) -> Array:
  size = jnp.abs(x)
  return jnp.where(size < 1.0, 0.5 * x * x, size - 0.5)


def _neighbours(s: Array, t: Array, exists: Array) -> Array:
  """n / (n − 1) Σ_d |δᵢ| |δ of the next row that exists|; 0 for the last."""
  b = len(exists)
  own = jnp.where(exists, jnp.arange(b), b)
  following = jnp.append(jax.lax.cummin(own, reverse=True)[1:], b)
  size = jnp.abs(s - t)
  beside = jnp.take(size, following, axis=0, mode="fill", fill_value=0.0)
  n = count(exists)
  return jnp.sum(size * beside, axis=1) * n / jnp.maximum(n - 1, 1)


def _taylor_gap(
  gamma: ArrayLike, order: int
) -> Callable[[Array, Array, Array], Array]:
  def kernel(x: Array) -> Array:
    cosine = gram(l2_normalize(x))
    term = total = jnp.exp(-2.0 * jnp.asarray(gamma, jnp.float32))
    for p in range(1, order + 1):
      term = term * (2.0 * gamma / p) * cosine
      total = total + term
    return total

  def of_group(s: Array, t: Array, exists: Array) -> Array:
    gap = jnp.broadcast_to(kernel(s) - kernel(t), (len(s), len(s)))
    return jnp.sum(gap**2, axis=1) / count(exists)

  return of_group
