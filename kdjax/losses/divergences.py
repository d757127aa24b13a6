"""Divergences between the teacher's and the student's softened distributions.

p is the softmax of teacher / T, q that of student / T, over the classes where
neither logit is -inf. One number an example, 0 where p = q, NaN where the
support is empty; none multiplies by T². The student and T receive a gradient,
the teacher and the shares of a mixture none.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32

from kdjax.losses.softmax import (
  class_sum,
  over_common_support,
  soften,
  softmax_kl,
)
from kdjax.losses.traits import logit_loss
from kdjax.types import UserError


@logit_loss(power=2)
def kl(
  student: Float[Array, "*batch classes"],
  teacher: Float[Array, "*batch classes"],
  *,
  temperature: ArrayLike = 1.0,
) -> Float32[Array, "*batch"]:
  """Forward divergence KL(p‖q) = Σ p (log p − log q), in nats.

  Its gradient (q − p) / T falls as 1/T², since p and q themselves approach the
  uniform distribution.

  Args:
    student: logits that receive the gradient.
    teacher: logits that receive none.
    temperature: T > 0; larger is softer. May be traced.

  Source: Hinton et al. 2015, arXiv 1503.02531, section 2, where the objective
    has the cross-entropy: it differs by the teacher's entropy, a constant.
  """
  student, teacher, where = over_common_support(student, teacher)
  return softmax_kl(teacher, student, temperature, where)


@logit_loss(power=2)
def reverse_kl(
  student: Float[Array, "*batch classes"],
  teacher: Float[Array, "*batch classes"],
  *,
  temperature: ArrayLike = 1.0,
) -> Float32[Array, "*batch"]:
  """Reverse divergence KL(q‖p) = Σ q (log q − log p), in nats.

  Arguments as `kl`.

  Source: MiniLLM, Gu et al. 2023, arXiv 2306.08543, section 2.1, here between
    the distributions of one token and not of whole sequences.
  """
  student, teacher, where = over_common_support(student, teacher)
  return softmax_kl(student, teacher, temperature, where)


@logit_loss(power=2)
def jeffreys(
  student: Float[Array, "*batch classes"],
  teacher: Float[Array, "*batch classes"],
  *,
  temperature: ArrayLike = 1.0,
) -> Float32[Array, "*batch"]:
  """KL(p‖q) + KL(q‖p) = Σ (p − q) (log p − log q), in nats.

  The sum, not the mean, of the two directions. Arguments as `kl`.

  Source: Jeffreys 1946, doi 10.1098/rspa.1946.0056.
  """
  log_p, log_q, p, q, where = soften(student, teacher, temperature)
  return class_sum((p - q) * (log_p - log_q), where)


@logit_loss(power=1)
def total_variation(
  student: Float[Array, "*batch classes"],
  teacher: Float[Array, "*batch classes"],
  *,
  temperature: ArrayLike = 1.0,
) -> Float32[Array, "*batch"]:
  """½ Σ |p − q|, in [0, 1].

  Its gradient falls as 1/T, not 1/T²: the sign of p − q has no scale. A class
  where p = q has subgradient 0. Arguments as `kl`.

  Source: Wen et al. 2023, arXiv 2307.15190, section 3.
  """
  _, _, p, q, where = soften(student, teacher, temperature)
  return 0.5 * class_sum(jnp.abs(p - q), where)


@logit_loss(power=2)
def jsd(
  student: Float[Array, "*batch classes"],
  teacher: Float[Array, "*batch classes"],
  *,
  temperature: ArrayLike = 1.0,
  mix: ArrayLike = 0.5,
  scale: str = "none",
) -> Float32[Array, "*batch"]:
  """mix · KL(p‖m) + (1 − mix) · KL(q‖m), m = mix · p + (1 − mix) · q, in nats.

  It vanishes at both ends of mix. `scale="unit"` divides by mix · (1 − mix) and
  then runs from KL(p‖q) at mix = 0 to KL(q‖p) at mix = 1, both included: the
  form to use when mix is scheduled.

  Args:
    student: logits that receive the gradient.
    teacher: logits that receive none.
    temperature: T > 0. May be traced.
    mix: the teacher's share of m, in (0, 1), or [0, 1] with `scale="unit"`. May
      be traced; it receives no gradient.
    scale: "none" or "unit".

  Raises:
    UserError: for another scale, or a mix that is a Python number out of range.

  Source: GKD, Agarwal et al. 2023, arXiv 2306.13649, section 2, with mix = β.
    Code that returns the KLs at β = 0 and 1 jumps there, as this equation tends
    to 0; `scale="unit"` does not.
  """
  if scale not in ("none", "unit"):
    raise UserError(f"scale is {scale!r}, must be 'none' or 'unit': change it")
  _check_share("mix", mix, open_ends=scale == "none")
  log_p, log_q, p, q, where = soften(student, teacher, temperature)
  mix = _constant(mix)
  # With log(m/q) = L₁ and log(m/p) = L₂, unit = Σ (p − q) (h(L₁) − h(L₂)): from
  # expm1(L₁) = mix (p − q)/q and expm1(L₂) = (1 − mix)(q − p)/p. Nothing here
  # divides by mix, and near p = q both factors are small, so that no difference
  # of large terms remains.
  log_ratio = log_p - log_q
  towards_p = _complement(_log_mixture(log_ratio, mix, 1.0 - mix))
  towards_q = _complement(_log_mixture(-log_ratio, 1.0 - mix, mix))
  unit = class_sum((p - q) * (towards_p - towards_q), where)
  return unit if scale == "unit" else mix * (1.0 - mix) * unit


@logit_loss(power=2)
def skew_kl(
  student: Float[Array, "*batch classes"],
  teacher: Float[Array, "*batch classes"],
  *,
  temperature: ArrayLike = 1.0,
  skew: ArrayLike = 0.1,
) -> Float32[Array, "*batch"]:
  """KL(p ‖ skew · p + (1 − skew) · q), in nats; at most −log skew.

  Args:
    student: logits that receive the gradient.
    teacher: logits that receive none.
    temperature: T > 0. May be traced.
    skew: the teacher's share of the mixture, in [0, 1]; 0 is `kl`. May be
      traced; it receives no gradient.

  Source: DistiLLM, Ko et al. 2024, arXiv 2402.03898, section 3.1.
  """
  _check_share("skew", skew)
  log_p, log_q, p, _, where = soften(student, teacher, temperature)
  skew = _constant(skew)
  log_mixture = _log_mixture(log_q - log_p, 1.0 - skew, skew)  # log(m/p)
  return class_sum(-p * log_mixture, where)


@logit_loss(power=2)
def skew_reverse_kl(
  student: Float[Array, "*batch classes"],
  teacher: Float[Array, "*batch classes"],
  *,
  temperature: ArrayLike = 1.0,
  skew: ArrayLike = 0.1,
  detach_mixture: bool = False,
) -> Float32[Array, "*batch"]:
  """KL(q ‖ skew · q + (1 − skew) · p), in nats; at most −log skew.

  Args:
    student: logits that receive the gradient.
    teacher: logits that receive none.
    temperature: T > 0. May be traced.
    skew: the student's share of the mixture, in [0, 1]; 0 is `reverse_kl`. May
      be traced; it receives no gradient.
    detach_mixture: whether the mixture counts as a constant in the gradient. By
      default the gradient is that of the equation; the code of DistiLLM-2
      (arXiv 2503.07067) stops it.

  Source: DistiLLM, Ko et al. 2024, arXiv 2402.03898, section 3.1.
  """
  _check_share("skew", skew)
  log_p, log_q, _, q, where = soften(student, teacher, temperature)
  skew = _constant(skew)
  log_mixture = _log_mixture(log_p - log_q, 1.0 - skew, skew)  # log(m/q)
  if detach_mixture:
    # m constant leaves Σ ∂q (log q − log m) + Σ q ∂log q, and the second sum is
    # that of ∂q, 0: what remains is q times a constant ratio.
    log_mixture = jax.lax.stop_gradient(log_mixture)
  return class_sum(-q * log_mixture, where)


def _log_mixture(log_ratio: Array, share: Array, rest: Array) -> Array:
  """log(share · exp(log_ratio) + rest), where rest = 1 − share.

  Both shares are arguments because one that is tiny is lost in 1 − the other.
  """
  excess = share * jnp.expm1(jnp.minimum(log_ratio, 40.0))
  near = (jnp.abs(excess) < 0.5) & (log_ratio < 40.0)
  apart = jnp.logaddexp(jnp.log(share) + log_ratio, jnp.log(rest))
  return jnp.where(near, jnp.log1p(jnp.where(near, excess, 0.0)), apart)


def _complement(x: Array) -> Array:
  """1 − x / expm1(x), which is 0 at 0."""
  near = jnp.abs(x) < 0.5
  small = jnp.where(near, x, 0.0)
  square = small * small
  series = small / 2 - square / 12 + square**2 / 720 - square**3 / 30240
  large = jnp.where(near, 1.0, x)
  # Past 40 the quotient has vanished beside 1, and expm1 would overflow.
  quotient = large / jnp.expm1(jnp.minimum(large, 40.0))
  return jnp.where(near, series, 1 - quotient)


def _constant(share: ArrayLike) -> Array:
  return jax.lax.stop_gradient(jnp.asarray(share, jnp.float32))


def _check_share(
  name: str, share: ArrayLike, *, open_ends: bool = False
) -> None:
  if not isinstance(share, (int, float)):
    return  # an array may be traced
  if not 0 <= share <= 1 or (open_ends and share in (0, 1)):
    ends = "(0, 1)" if open_ends else "[0, 1]"
    hint = " or scale='unit'" if open_ends and share in (0, 1) else ""
    raise UserError(f"{name} is {share}, must be in {ends}: change it{hint}")
