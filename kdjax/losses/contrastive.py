"""Contrastive losses: a student's row beside its teacher's, away from others.

`info_nce` finds the others in the batch. CRD finds them in two banks that hold
a row for every example of the data set; its parts are here, the banks
themselves are state of the term (`kdjax.terms.contrastive.crd`).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Float32, Integer, Shaped

from kdjax.losses.groups import HIGHEST, in_groups, same_size
from kdjax.losses.maps import both, l2_normalize
from kdjax.losses.softmax import log_softmax
from kdjax.losses.traits import tap_loss


@tap_loss(couples=True)
def info_nce(
  student: Float[Array, "b ..."],
  teacher: Float[Array, "b ..."],
  *,
  temperature: ArrayLike = 0.07,
  where: Shaped[Array, " b"] | None = None,
  group_size: int | None = None,
) -> Float32[Array, " b"]:
  """−½ (log softmaxⱼ(sᵢ · tⱼ / T)ᵢ + log softmaxⱼ(sⱼ · tᵢ / T)ᵢ), in nats.

  s and t are the rows scaled to length 1. The symmetric form: in the first part
  the student is the anchor and chooses among the teacher's rows, in the second
  the reverse; the loss is their mean, 0 at best, log n by chance. O(B²) memory,
  O(B² D) time.

  Args:
    student: activation that receives the gradient.
    teacher: activation of the same size that receives none.
    temperature: T > 0. May be traced.
    where, group_size: as in `kdjax.losses.relations`.

  Returns:
    Row i has its own two parts.

  Raises:
    UserError: if the sizes differ.

  Source: van den Oord et al. 2018, arXiv 1807.03748, section 2.3; symmetric as
    in Radford et al. 2021, arXiv 2103.00020, section 2.3. No power of T is
    declared.
  """
  of_group = functools.partial(two_sided, temperature)
  same_size(student, teacher)
  return in_groups(of_group, *both(student, teacher), where, group_size)


def two_sided(
  temperature: ArrayLike,
  a: Float32[Array, "n d"],
  b: Float32[Array, "n d"],
  exists: Bool[Array, " n"],
) -> Float32[Array, " n"]:
  """`info_nce` of one group, with a gradient to both sides."""
  cosine = jnp.matmul(l2_normalize(a), l2_normalize(b).T, precision=HIGHEST)
  pairs = exists[:, None] & exists[None, :]
  of_a = log_softmax(cosine, temperature, pairs)
  of_b = log_softmax(cosine.T, temperature, pairs)
  return -0.5 * (jnp.diagonal(of_a) + jnp.diagonal(of_b))


def noise_contrastive(
  log_p: Float32[Array, "b candidates"],
  num_examples: int,
  epsilon: float = 1e-7,
) -> Float32[Array, " b"]:
  """−log D₁(p₀) − Σₖ log D₀(pₖ), k = 1..K, m = K / N: CRD's NCE, in nats.

  D₁(p) = p / (p + m + ε) is the chance that a row is the anchor's own, where K
  rows of noise come with it; D₀(p) = m / (p + m + ε).

  In log space: exp(1 / 0.07) is 1.6e6, and overflows where T < 0.0113.

  Args:
    log_p: log p of the anchor's own row, then of the K others.
    num_examples: N.
    epsilon: ε of the authors' code.

  Source: Tian et al. 2020, arXiv 1910.10699, equation 18, and their code.
  """
  noise = (log_p.shape[-1] - 1) / num_examples
  # D₁ = σ(x) and D₀ = m / (m + ε) · σ(−x), with p = eˣ (m + ε).
  x = log_p - math.log(noise + epsilon)
  log_d1 = jax.nn.log_sigmoid(x[:, 0])
  log_d0 = jax.nn.log_sigmoid(-x[:, 1:]) - math.log1p(epsilon / noise)
  return -log_d1 - jnp.sum(log_d0, axis=1)


def bank_contrastive(
  anchor: Float[Array, "b d"],
  bank: Float32[Array, "rows d"],
  chosen: Integer[Array, "b candidates"],
  exists: Bool[Array, " b"],
  log_z: Float[Array, ""],
  is_set: Bool[Array, ""],
  *,
  num_examples: int,
) -> tuple[Float32[Array, " b"], Float32[Array, ""], Float32[Array, "b d"]]:
  """`noise_contrastive` of log p = anchorᵢ · bank[chosenᵢₖ] − log Z.

  All B × rows products are made, and few are taken: B · K rows of the bank
  would be K · D / rows times as much memory, and travel between devices. The
  anchor's gradient is made along with the loss, so nothing of that size stays.

  Args:
    anchor: divided by its temperature; it alone gets a gradient.
    bank: of which a batch changes some rows, after this.
    chosen: the anchor's own row, then K others, all within the bank.
    exists: the rows of which Z is made.
    log_z: the constant, where `is_set`; else it is `log_normalizer`'s.
    num_examples: N.

  Returns:
    The loss, log Z, and zeros that are known only when the bank has been read.
    Added to the rows that go into the bank, they let XLA put them where the
    bank lies; it would else copy the bank, not knowing which comes first.
  """
  return _contrast(num_examples, anchor, bank, chosen, exists, log_z, is_set)


def log_normalizer(
  scores: Float32[Array, "b candidates"],
  exists: Bool[Array, " b"],
  num_examples: int,
) -> Float32[Array, ""]:
  """log(N · mean of exp(score)) over the rows that exist: CRD's constant Z."""
  where = jnp.broadcast_to(exists[:, None], scores.shape)
  total = jax.nn.logsumexp(scores, where=where)
  mean = total - jnp.log(jnp.maximum(jnp.sum(where), 1))
  log_z = jnp.where(jnp.any(exists), mean + math.log(num_examples), 0.0)
  return jax.lax.stop_gradient(log_z)


def remembered(
  bank: Float32[Array, "rows d"],
  index: Integer[Array, " b"],
  rows: Float32[Array, "b d"],
  exists: Bool[Array, " b"],
  momentum: float,
) -> Float32[Array, "rows d"]:
  """The bank with momentum · old + (1 − momentum) · new, of length 1, at index.

  Of several rows that exist with one index, the last one counts.
  """
  same = (index[:, None] == index[None, :]) & exists[None, :]
  later = jnp.triu(jnp.ones_like(same), 1)
  counts = exists & ~jnp.any(same & later, axis=1)
  old = jnp.take(bank, index, axis=0, mode="clip")
  new = l2_normalize(momentum * old + (1.0 - momentum) * rows)
  # Beyond the bank are indices that `drop` leaves out. All differ: where two
  # might be the same, XLA goes through the whole bank to keep the last.
  beyond = bank.shape[0] + jnp.arange(len(index))
  at = jnp.where(counts, index, beyond)
  return jax.lax.stop_gradient(
    bank.at[at].set(new, mode="drop", unique_indices=True)
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contrast(num_examples: int, *given: Array) -> tuple[Array, ...]:
  return _contrast_forward(num_examples, *given)[0]


def _contrast_forward(
  num_examples: int,
  anchor: Array,
  bank: Array,
  chosen: Array,
  exists: Array,
  log_z: Array,
  is_set: Array,
) -> tuple[tuple[Array, ...], Array]:
  products = jnp.matmul(anchor, bank.T, precision=HIGHEST)
  row = jnp.arange(len(chosen))[:, None]
  scores = products.at[row, chosen].get(mode="promise_in_bounds")
  log_z = jax.lax.cond(
    is_set,
    lambda: log_z,
    lambda: log_normalizer(scores, exists, num_examples),
  )
  loss, pull = jax.vjp(
    lambda x: noise_contrastive(x - log_z, num_examples), scores
  )
  (slope,) = pull(jnp.ones_like(loss))
  # 0 · products lies split as the bank does. Onto plain zeros, which would be
  # split over the batch, every device would gather the whole bank.
  spread = (0.0 * products).at[row, chosen].add(slope, mode="promise_in_bounds")
  gradient = jnp.matmul(spread, bank, precision=HIGHEST)
  return (loss, log_z, jnp.nan_to_num(0.0 * gradient)), gradient


def _contrast_backward(
  num_examples: int, gradient: Array, slopes: tuple[Array, ...]
) -> tuple[Array | None, ...]:
  return slopes[0][:, None] * gradient, None, None, None, None, None


_contrast.defvjp(_contrast_forward, _contrast_backward)
