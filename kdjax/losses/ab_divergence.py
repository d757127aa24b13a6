"""The Alpha-Beta divergence, through all its limits."""

import math

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32

from kdjax.losses.softmax import class_sum, soften
from kdjax.losses.traits import logit_loss


@logit_loss(power=2)
def alpha_beta(
  student: Float[Array, "*batch classes"],
  teacher: Float[Array, "*batch classes"],
  *,
  temperature: ArrayLike = 1.0,
  a: ArrayLike = 0.2,
  b: ArrayLike = 0.7,
) -> Float32[Array, "*batch"]:
  """−1/(ab) Σ (pᵃ qᵇ − a/(a+b) pᵃ⁺ᵇ − b/(a+b) qᵃ⁺ᵇ), p teacher, q student.

  p and q are the softmax of teacher / T and student / T over the classes where
  neither logit is -inf. Where a, b or a + b is 0 the value is the limit: (1, 0)
  gives KL(p‖q), (0, 1) KL(q‖p), (0, 0) ½ Σ (log p − log q)², (½, ½) four times
  the squared Hellinger distance Σ (√p − √q)² / 2, (1, 1) half the squared
  distance. It is 0 where p = q.

  Args:
    student: logits that receive the gradient.
    teacher: logits that receive none.
    temperature: T > 0. May be traced.
    a, b: the exponents of teacher and student; may be traced. Both >= 0 is
      finite for all logits; with a negative one the equation itself divides by
      probabilities, and overflows for saturated ones.

  Returns:
    One number an example; NaN where the support is empty.

  Source: Cichocki, Cruces and Amari 2011, doi 10.3390/e13010134, section 2.
    Distillation: ABKD, Wang et al. 2025, arXiv 2505.04560, section 4.
  """
  log_p, log_q, _, _, where = soften(student, teacher, temperature)
  a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
  # The divergence is Σ d² e[s log p, a log p + b log q, s log q], s = a + b,
  # d = log q − log p, with e[x, y, z] the second divided difference of exp: it
  # is positive, and smooth in its nodes, so that the limits need no case.
  # `one` and `other` are the two smaller nodes, seen from the largest.
  d = log_q - log_p
  step_a, step_b, step = a * d, b * d, (a + b) * d
  at_p = (step <= 0) & (step_b <= 0)
  at_q = ~at_p & (step >= 0) & (step_a >= 0)
  # Products of d, not differences of nodes: near 1e4 those keep three digits.
  one = jnp.where(at_p, step, jnp.where(at_q, -step, -step_b))
  other = jnp.where(at_p, step_b, jnp.where(at_q, -step_a, step_a))
  largest = jnp.where(
    at_p,
    (a + b) * log_p,
    jnp.where(at_q, (a + b) * log_q, (a + b) * log_p + step_b),
  )
  return class_sum(d * d * jnp.exp(largest) * _divided(one, other), where)


def _divided(x: Array, y: Array) -> Array:
  """Second divided difference of exp at (0, x, y), for x, y <= 0.

  With f(x) = (eˣ − 1) / x it is (f(x) − f(y)) / (x − y).
  """
  low, high = jnp.minimum(x, y), jnp.maximum(x, y)
  near = high - low <= 0.25 * jnp.maximum(1.0, -low)
  gap = jnp.where(near, 1.0, high - low)
  apart = (_mean_exp(high) - _mean_exp(low)) / gap
  # The mean of f' between the two, by Gauss and Legendre: f' is so smooth over
  # this width that three points leave less than float32's rounding.
  mean = sum(
    weight * _mean_exp_slope(low + point * (high - low))
    for weight, point in (
      (5 / 18, 0.5 - math.sqrt(0.15)),
      (8 / 18, 0.5),
      (5 / 18, 0.5 + math.sqrt(0.15)),
    )
  )
  return jnp.where(near, mean, apart)


def _mean_exp(x: Array) -> Array:
  """(eˣ − 1) / x for x <= 0: the mean of exp between x and 0."""
  near = x > -1
  series = _taylor(jnp.where(near, x, 0.0), lambda k: 1 / (k + 1))
  x = jnp.where(near, -1.0, x)
  return jnp.where(near, series, jnp.expm1(x) / x)


def _mean_exp_slope(x: Array) -> Array:
  """The derivative of `_mean_exp`: (1 + (x − 1) eˣ) / x², for x <= 0."""
  near = x > -1
  series = _taylor(jnp.where(near, x, 0.0), lambda k: 1 / (k + 2))
  x = jnp.where(near, -1.0, x)
  return jnp.where(near, series, (1 + (x - 1) * jnp.exp(x)) / (x * x))


def _taylor(x: Array, factor) -> Array:
  """Σ factor(k) xᵏ / k!, to float32's precision for |x| <= 1."""
  terms = [factor(k) / math.factorial(k) for k in range(11)]
  return jnp.polyval(jnp.asarray(terms[::-1], x.dtype), x, unroll=len(terms))
