"""Losses on logits themselves, or with the temperature on the teacher alone."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32

from kdjax.losses.softmax import (
  class_sum,
  over_common_support,
  soften,
  softmax_kl,
)
from kdjax.losses.traits import logit_loss


@logit_loss(power=2)
def logit_mse(
  student: Float[Array, "*batch classes"],
  teacher: Float[Array, "*batch classes"],
  *,
  temperature: ArrayLike = 1.0,
) -> Float32[Array, "*batch"]:
  """Mean over the classes of ((student − teacher) / T)², in squared logits.

  The mean, not the sum, over classes where neither logit is -inf. Nothing is
  centred: a constant added to the student changes the loss, not its softmax.

  Args:
    student: logits that receive the gradient.
    teacher: logits that receive none.
    temperature: T > 0. May be traced.

  Returns:
    One number an example; NaN where the support is empty.

  Source: Ba and Caruana 2014, arXiv 1312.6184, section 2 (there ½ and the sum);
    Jafari et al. 2021, arXiv 2104.07163, section 3.
  """
  student, teacher, where = over_common_support(student, teacher)
  t = jnp.asarray(temperature, jnp.float32)
  gap = jnp.where(where, student - teacher, 0.0)
  num_classes = jnp.maximum(jnp.sum(where, axis=-1), 1)
  return class_sum((gap / t) ** 2, where) / num_classes


@logit_loss(power=0)
def ttm(
  student: Float[Array, "*batch classes"],
  teacher: Float[Array, "*batch classes"],
  *,
  temperature: ArrayLike = 1.0,
  exponent: ArrayLike = 0.1,
) -> Float32[Array, "*batch"]:
  """KL(pᵉ / Σ pᵉ ‖ q), e the exponent, in nats.

  Softens the teacher alone: an exponent of 1/T is a teacher at temperature T
  beside a student at 1. Its gradient does not vanish with the exponent, so the
  paper has no factor T², and none is declared.

  Args:
    student: logits that receive the gradient.
    teacher: logits that receive none.
    temperature: divides both logits beforehand; 1 in the paper.
    exponent: in (0, 1], of the teacher's probabilities. May be traced.

  Returns:
    One number an example; NaN where the support is empty.

  Source: Zheng and Yang 2024, arXiv 2402.11148, section 3.
  """
  log_p, log_q, _, _, where = soften(student, teacher, temperature)
  return _transformed_kl(log_p, log_q, where, exponent)


@logit_loss(power=0)
def wttm(
  student: Float[Array, "*batch classes"],
  teacher: Float[Array, "*batch classes"],
  *,
  temperature: ArrayLike = 1.0,
  exponent: ArrayLike = 0.2,
) -> Float32[Array, "*batch"]:
  """Z · KL(pᵉ / Z ‖ q), Z = Σ pᵉ, e the exponent, in nats.

  `ttm`, with more weight where the teacher is unsure: Z runs from 1 up to
  num_classes¹⁻ᵉ. Arguments as `ttm`.

  Source: Zheng and Yang 2024, arXiv 2402.11148, section 4.
  """
  log_p, log_q, _, _, where = soften(student, teacher, temperature)
  e = jnp.asarray(exponent, jnp.float32)
  weight = class_sum(jnp.exp(e * log_p), where)
  return weight * _transformed_kl(log_p, log_q, where, e)


def _transformed_kl(
  log_p: Array, log_q: Array, where: Array, exponent: ArrayLike
) -> Array:
  powered = jnp.asarray(exponent, jnp.float32) * log_p
  return softmax_kl(powered, log_q, 1.0, where)
