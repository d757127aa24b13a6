"""Losses on what an activation is summed up to: attention, correlations.

Conventions as in `features`. Channels, or positions, may differ between the two
networks, as only the sums are compared.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32, Shaped

from kdjax import errors
from kdjax.losses.maps import (
  both,
  example_mean,
  l2_normalize,
  magnitude,
  same_positions,
)
from kdjax.losses.traits import tap_loss
from kdjax.types import UserError

_TINY = float(jnp.finfo(jnp.float32).tiny)


@tap_loss()
def attention_transfer(
  student: Float[Array, "b *s cs"],
  teacher: Float[Array, "b *t ct"],
  *,
  power: ArrayLike = 2,
  form: Literal["code", "paper"] = "code",
) -> Float32[Array, " b"]:
  """d(A_s, A_t), A = a / ‖a‖₂ over the positions, a = mean_c |f_c|^power.

  d is the mean of (A_s − A_t)² over the positions (`code`), or ‖A_s − A_t‖₂
  (`paper`). Of two maps of different size the larger one is pooled to the
  smaller before the power. The numbers of channels may differ. A map of zeros
  has A = 0 and gets no gradient; so does `paper`, whose value is then 0, where
  the two are within 1e-6.

  Args:
    student, teacher: maps or tokens.
    power: above 0. May be traced.
    form: `paper` is larger than `code` and needs another weight.

  Raises:
    UserError: if the positions cannot be matched, or there is no such form.

  Source: Zagoruyko and Komodakis 2016, arXiv 1612.03928, section 3.1, and the
    authors' code, which has the mean of squares. Their code has no absolute
    value, which matters for odd powers only.
  """
  student, teacher = same_positions(*both(student, teacher))
  ours, theirs = _attention(student, power), _attention(teacher, power)
  if form == "code":
    return jnp.mean((ours - theirs) ** 2, axis=-1)
  if form == "paper":
    squares = jnp.sum((ours - theirs) ** 2, axis=-1)
    # A has norm 1: below 1e-6 the distance is rounding, and the root has no
    # slope at 0. Twice `where`, as inf · 0 would be NaN.
    apart = squares > 1e-12
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1.0)), 0.0)
  raise errors.unknown("form", form, ("code", "paper"))


@tap_loss()
def factor(
  student: Float[Array, "b *s cs"],
  teacher: Float[Array, "b *t ct"],
  *,
  power_in: ArrayLike = 2,
  power_out: ArrayLike = 1,
) -> Float32[Array, " b"]:
  """mean |A_s − A_t|^power_out over the positions, A as in attention_transfer.

  It is meant for the factors of a translator and a paraphraser, as
  `terms.factor` has them.

  Args:
    student, teacher: maps or tokens.
    power_in: of the activations, above 0. May be traced.
    power_out: of the distance, at least 1. May be traced.

  Raises:
    UserError: if the positions cannot be matched.

  Source: Kim et al. 2018 (FT), arXiv 1802.04977, section 3.3, in the form of
    the reimplementation in RepDistiller. The paper normalises the whole factor,
    without a mean over the channels.
  """
  student, teacher = same_positions(*both(student, teacher))
  ours, theirs = _attention(student, power_in), _attention(teacher, power_in)
  return jnp.mean(magnitude(ours - theirs) ** power_out, axis=-1)


def _attention(x: Array, power: ArrayLike) -> Array:
  """[B, positions], of norm 1."""
  means = jnp.mean(magnitude(x) ** power, axis=-1)
  return l2_normalize(means.reshape(x.shape[0], -1))


@tap_loss()
def attention_maps(
  student: Float[Array, "b hs *qs ks"],
  teacher: Float[Array, "b ht *qt kt"],
  *,
  distance: Literal["kl", "mse"] = "kl",
  where: Shaped[Array, "b s"] | None = None,
) -> Float32[Array, " b"]:
  """mean over heads and queries of Σ over keys of p log(p / q), or of (p − q)².

  p and q are the teacher's and the student's attention probabilities. For `mse`
  the mean is over the keys too. If the numbers of heads differ, p and q are
  the means over the heads of each network.

  A key that p gives nothing adds nothing to the KL. Where q underflows to 0 and
  p does not, q counts as 1e-38 and gets no gradient there: the value is finite.

  Args:
    student, teacher: [B, heads, S, S], after the softmax over the last axis; or
      [B, heads, S] of one query each, as where tokens are examples.
    where: [B, S], true for the tokens that exist. The others are no queries,
      and as keys add nothing.

  Raises:
    UserError: if the numbers of tokens differ, or there is no such distance.

  Source: Wang et al. 2020 (MiniLM), arXiv 2002.10957, section 3.1, for the KL.
  """
  student, teacher = both(student, teacher)
  ours, theirs = student.shape, teacher.shape
  alike = (ours[0], *ours[2:]) == (theirs[0], *theirs[2:])
  if len(ours) not in (3, 4) or not alike:
    raise UserError(
      f"student attention has shape {ours}, the teacher's {theirs}, needs "
      "[B, heads, S, S] with equal B and S: choose other taps"
    )
  # One query, of an example that is a token.
  if len(ours) == 3:
    student, teacher = student[:, :, None], teacher[:, :, None]
  if ours[1] != theirs[1]:
    student = jnp.mean(student, axis=1, keepdims=True)
    teacher = jnp.mean(teacher, axis=1, keepdims=True)
  exists = pairs = jnp.ones((1, 1, 1, 1), bool)
  if where is not None:
    exists = jnp.asarray(where, bool)[:, None, :, None]
    pairs = exists & jnp.swapaxes(exists, 2, 3)
  q, p = jnp.where(pairs, student, 0.0), jnp.where(pairs, teacher, 0.0)
  if distance == "kl":
    log_ratio = jnp.log(jnp.maximum(p, _TINY)) - jnp.log(jnp.maximum(q, _TINY))
    return _mean_where(jnp.sum(p * log_ratio, axis=-1, keepdims=True), exists)
  if distance == "mse":
    return _mean_where((p - q) ** 2, pairs)
  raise errors.unknown("distance", distance, ("kl", "mse"))


def _mean_where(values: Array, where: Array) -> Array:
  axes = tuple(range(1, values.ndim))
  where = jnp.broadcast_to(where, values.shape)
  total = jnp.sum(values, axis=axes, where=where)
  return total / jnp.maximum(jnp.sum(where, axis=axes), 1)


@tap_loss()
def nst(
  student: Float[Array, "b *s cs"],
  teacher: Float[Array, "b *t ct"],
) -> Float32[Array, " b"]:
  """mean k(t, t′) + mean k(s, s′) − 2 mean k(s, t), with k(a, b) = (a · b)².

  The squared distance, in the space of k, of two sets of channels: each is one
  vector over the positions, of norm 1 or, if dead, 0. It holds three matrices
  C x C for each example. Of two maps the larger one is pooled to the smaller.

  Raises:
    UserError: if the positions cannot be matched.

  Source: Huang and Wang 2017 (NST), arXiv 1707.01219, section 3.2, with the
    polynomial kernel of degree 2.
  """
  student, teacher = same_positions(*both(student, teacher))
  ours, theirs = (l2_normalize(_rows(x), axis=1) for x in (student, teacher))

  def mean_kernel(a: Array, b: Array) -> Array:
    return example_mean(_products(a, b) ** 2)

  return (
    mean_kernel(theirs, theirs)
    + mean_kernel(ours, ours)
    - 2 * mean_kernel(ours, theirs)
  )


@tap_loss()
def flow(
  student: tuple[Float[Array, "b *s0 cl"], Float[Array, "b *s1 ch"]],
  teacher: tuple[Float[Array, "b *t0 dl"], Float[Array, "b *t1 dh"]],
) -> Float32[Array, " b"]:
  """mean (G_s − G_t)², G = mean over the positions of low · highᵀ.

  G, channels of the lower by channels of the higher activation, is how one
  turns into the other. The larger map of a pair is pooled to the smaller.

  Args:
    student, teacher: (low, high), two activations of each network. The two
      networks must agree in both numbers of channels, not in positions.

  Raises:
    UserError: if the positions of a pair cannot be matched, or the numbers of
      channels or examples differ.

  Source: Yim et al., A Gift from Knowledge Distillation (FSP), CVPR 2017,
    section 3; pooling by the mean, as in RepDistiller.
  """
  ours, theirs = _flow(*student), _flow(*teacher)
  if ours.shape != theirs.shape:
    raise UserError(
      f"student's flow [B, low, high] has shape {ours.shape}, the teacher's "
      f"{theirs.shape}: give the term a projector, or choose other taps"
    )
  return example_mean((ours - jax.lax.stop_gradient(theirs)) ** 2)


def _flow(low: Array, high: Array) -> Array:
  low, high = (jnp.asarray(x, jnp.float32) for x in (low, high))
  low, high = map(_rows, same_positions(low, high))
  return _products(low, high) / low.shape[1]


def _rows(x: Array) -> Array:
  """[B, positions, C]."""
  return x.reshape(x.shape[0], -1, x.shape[-1])


def _products(a: Array, b: Array) -> Array:
  """[B, C_a, C_b]: the products over the positions of two [B, positions, C]."""
  # GPUs and TPUs multiply in fewer bits by default, and what counts here is the
  # small difference of two products.
  return jnp.einsum("bpi,bpj->bij", a, b, precision=jax.lax.Precision.HIGHEST)
