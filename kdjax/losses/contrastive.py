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


def bank_scores(
  anchor: Float32[Array, "b d"],
  bank: Float32[Array, "rows d"],
  chosen: Integer[Array, "b candidates"],
  temperature: ArrayLike,
) -> Float32[Array, "b candidates"]:
  """anchorᵢ · bank[chosenᵢₖ] / T; the bank gets no gradient.

  All B × rows products are made, and few are taken: B · K rows of the bank
  would be K · D / rows times as much memory, and travel between devices.
  """
  return _products_at(anchor, bank, chosen) / temperature


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
  beyond = bank.shape[0]  # an index that `drop` leaves out
  return jax.lax.stop_gradient(
    bank.at[jnp.where(counts, index, beyond)].set(new, mode="drop")
  )


@jax.custom_vjp
def _products_at(anchor: Array, bank: Array, chosen: Array) -> Array:
  return _products_forward(anchor, bank, chosen)[0]


def _products_forward(anchor: Array, bank: Array, chosen: Array):
  products = jnp.matmul(anchor, bank.T, precision=HIGHEST)
  taken = jnp.take_along_axis(products, chosen, axis=1)
  return taken, (products, bank, chosen)


def _products_backward(residual: tuple[Array, Array, Array], slope: Array):
  products, bank, chosen = residual
  row = jnp.arange(len(chosen))[:, None]
  # 0 · products lies split as the bank does. Onto plain zeros, which would be
  # split over the batch, every device would gather the whole bank.
  spread = (0.0 * products).at[row, chosen].add(slope)
  back = jnp.matmul(spread, bank, precision=HIGHEST)
  return back, jnp.zeros_like(bank), None


_products_at.defvjp(_products_forward, _products_backward)
