"""What the logit losses share: the support and the softmax.

The support of an example is the set of classes where neither network's logit is
-inf; both distributions are renormalised over it. Outside it every quantity
here is 0, a number and not -inf: 0 · inf would be NaN in the value, and again
in the gradient of a `where` that hides it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float32, Integer

from kdjax.types import UserError


class Softened(NamedTuple):
  """Two distributions over their common support, all `[*batch, classes]`.

  `log_p` and `p` are the teacher's, `log_q` and `q` the student's, 0 outside
  the support `where`.
  """

  log_p: Float32[Array, "*batch classes"]
  log_q: Float32[Array, "*batch classes"]
  p: Float32[Array, "*batch classes"]
  q: Float32[Array, "*batch classes"]
  where: Bool[Array, "*batch classes"]


def soften(student: Array, teacher: Array, temperature: ArrayLike) -> Softened:
  """The softmax of student / T and teacher / T over the common support."""
  student, teacher, where = over_common_support(student, teacher)
  log_p = log_softmax(teacher, temperature, where)
  log_q = log_softmax(student, temperature, where)
  p = jnp.where(where, jnp.exp(log_p), 0.0)
  q = jnp.where(where, jnp.exp(log_q), 0.0)
  return Softened(log_p, log_q, p, q, where)


def over_common_support(
  student: Array, teacher: Array
) -> tuple[Array, Array, Array]:
  """Both logits in float32, the teacher's without gradient; the support.

  Raises:
    UserError: if the shapes differ; broadcasting would hide the mistake.
  """
  if jnp.shape(student) != jnp.shape(teacher):
    raise UserError(
      f"student logits have shape {jnp.shape(student)}, the teacher's "
      f"{jnp.shape(teacher)}: give both the same examples and classes"
    )
  student = jnp.asarray(student, jnp.float32)
  teacher = jax.lax.stop_gradient(jnp.asarray(teacher, jnp.float32))
  return student, teacher, ~(jnp.isneginf(student) | jnp.isneginf(teacher))


def log_softmax(
  logits: Float32[Array, "*batch classes"],
  temperature: ArrayLike,
  where: Bool[Array, "*batch classes"],
) -> Float32[Array, "*batch classes"]:
  """log softmax(logits / T) over `where`, 0 outside it."""
  # The peak goes before T divides: the difference of two float32 logits near
  # 1e4 is nearly exact, that of two rounded quotients is not.
  scaled = _below_peak(logits, where) / jnp.asarray(temperature, jnp.float32)
  return jnp.where(where, scaled - _log_sum(scaled, where), 0.0)


def log_sum_exp(
  values: Float32[Array, "*batch classes"],
  where: Bool[Array, "*batch classes"],
) -> Float32[Array, "*batch"]:
  """log Σ exp(values) over `where`; -inf where that is empty."""
  total = _peak(values, where) + _log_sum(_below_peak(values, where), where)
  return total[..., 0]


def class_sum(
  values: Float32[Array, "*batch classes"],
  where: Bool[Array, "*batch classes"],
) -> Float32[Array, "*batch"]:
  """Σ values over `where`; NaN where it is empty."""
  total = jnp.sum(values, axis=-1, where=where)
  return jnp.where(jnp.any(where, axis=-1), total, jnp.nan)


def relative_entropy(
  log_a: Float32[Array, "*batch classes"],
  log_b: Float32[Array, "*batch classes"],
  where: Bool[Array, "*batch classes"],
) -> Float32[Array, "*batch"]:
  """KL(a‖b) = Σ a (e^d − 1 − d), d = log b − log a, of two distributions.

  The added Σ (b − a) is 0, and no term is negative. Σ a (log a − log b) itself
  is a small difference of large terms where a and b are close, as at high T:
  at T = 20 it keeps five digits of float32's seven.
  """
  d = log_b - log_a
  near = jnp.abs(d) < 0.5
  x = jnp.where(near, d, 0.0)
  series = 1 / 5040 + x / 40320
  for factorial in (720, 120, 24, 6, 2):
    series = 1 / factorial + x * series
  a = jnp.exp(log_a)
  apart = jnp.exp(log_b) - a - a * d
  return class_sum(jnp.where(near, a * x * x * series, apart), where)


def target(
  labels: Integer[Array, "*batch"], where: Bool[Array, "*batch classes"]
) -> Bool[Array, "*batch classes"]:
  """True at each example's label; nowhere if the support does not hold it.

  Raises:
    UserError: if the labels are not one class number an example.
  """
  labels = jnp.asarray(labels)
  integers = jnp.issubdtype(labels.dtype, jnp.integer)
  if not integers or labels.shape != where.shape[:-1]:
    raise UserError(
      f"labels are {labels.dtype} of shape {labels.shape}, must be integers of "
      f"shape {where.shape[:-1]}: give one class number an example"
    )
  classes = jax.lax.broadcasted_iota(jnp.int32, where.shape, where.ndim - 1)
  return (labels[..., None] == classes) & where


def _peak(values: Array, where: Array) -> Array:
  peak = jnp.max(values, axis=-1, where=where, initial=-jnp.inf, keepdims=True)
  return jax.lax.stop_gradient(peak)


def _below_peak(values: Array, where: Array) -> Array:
  return jnp.where(where, values - _peak(values, where), 0.0)


def _log_sum(values: Array, where: Array) -> Array:
  total = jnp.sum(jnp.exp(values), axis=-1, where=where, keepdims=True)
  return jnp.log(total)
