"""What the logit losses share: the support and the softmax.

The support of an example is the set of classes where neither network's logit is
-inf; both distributions are renormalised over it. Outside it every quantity
here is 0, a number and not -inf: 0 · inf would be NaN in the value, and again
in the gradient of a `where` that hides it.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
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
  return student, teacher, support(student, teacher)


def support(
  *logits: Float32[Array, "*batch classes"],
) -> Bool[Array, "*batch classes"]:
  """Where no network's logit is -inf."""
  shape, known = logits[0].shape, _KNOWN.get()
  if known is None:
    return ~functools.reduce(jnp.logical_or, map(jnp.isneginf, logits))
  if known >= shape[-1]:
    return jnp.ones(shape, bool)
  return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) < known


@contextlib.contextmanager
def known_support(num_classes: int | None) -> Iterator[None]:
  """While a loss is traced here, the first `num_classes` are its support.

  For logits that can be -inf nowhere else: looking for it is a pass over all of
  them, and the compiler leaves out what a constant decides. None: it is looked
  for, as everywhere else.
  """
  token = _KNOWN.set(num_classes)
  try:
    yield
  finally:
    _KNOWN.reset(token)


_KNOWN: contextvars.ContextVar[int | None] = contextvars.ContextVar(
  "num_classes", default=None
)


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
  return jnp.where(any_class(where), total, jnp.nan)


def any_class(where: Bool[Array, "*batch classes"]) -> Bool[Array, "*batch"]:
  """Whether it is true of any class."""
  # A sum and not an `any`: compilers take it in one pass with other sums.
  return jnp.sum(where, axis=-1, dtype=jnp.float32) > 0


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
  return class_sum(_relative_entropy(log_a, log_b), where)


@jax.custom_jvp
def _relative_entropy(log_a: Array, log_b: Array) -> Array:
  """a (e^d − 1 − d)."""
  d = log_b - log_a
  x, near = _near(d)
  a = jnp.exp(log_a)
  apart = jnp.exp(log_b) - a - a * d
  series = _series(x, (40320, 5040, 720, 120, 24, 6, 2))
  return jnp.where(near, a * x * x * series, apart)


# The derivative by log b is b − a = a (e^d − 1), by log a it is −a d: less to
# do than the derivatives of series and difference, and as exact.
@_relative_entropy.defjvp
def _(values, tangents):
  (log_a, log_b), (along_a, along_b) = values, tangents
  d = log_b - log_a
  x, near = _near(d)
  a = jnp.exp(log_a)
  rise = a * x * _series(x, (40320, 5040, 720, 120, 24, 6, 2, 1))
  rise = jnp.where(near, rise, jnp.exp(log_b) - a)
  return _relative_entropy(log_a, log_b), rise * along_b - a * d * along_a


def _near(d: Array) -> tuple[Array, Array]:
  near = jnp.abs(d) < 0.5
  return jnp.where(near, d, 0.0), near


def _series(x: Array, factorials: tuple[int, ...]) -> Array:
  """Σ xⁿ / factorial, the highest power first."""
  total = jnp.zeros_like(x)
  for factorial in factorials:
    total = 1 / factorial + x * total
  return total


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
