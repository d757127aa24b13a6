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
  scaled = below_peak(logits, where) / jnp.asarray(temperature, jnp.float32)
  return jnp.where(where, scaled - log_sum(scaled, where), 0.0)


def log_sum_exp(
  values: Float32[Array, "*batch classes"],
  where: Bool[Array, "*batch classes"],
) -> Float32[Array, "*batch"]:
  """log Σ exp(values) over `where`; -inf where that is empty."""
  total = _peak(values, where) + log_sum(below_peak(values, where), where)
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


def softmax_kl(
  a: Float32[Array, "*batch classes"],
  b: Float32[Array, "*batch classes"],
  temperature: ArrayLike,
  where: Bool[Array, "*batch classes"],
) -> Float32[Array, "*batch"]:
  """KL(softmax(a / T) ‖ softmax(b / T)) over `where`; NaN where it is empty."""
  t = jnp.asarray(temperature, jnp.float32)
  total = _softmax_kl(below_peak(a, where) / t, below_peak(b, where) / t, where)
  return jnp.where(any_class(where), total, jnp.nan)


@jax.custom_jvp
def _softmax_kl(u: Array, v: Array, where: Array) -> Array:
  return _kl_and_sums(u, v, where)[0][..., 0]


# Through logarithms of a and b each derivative would bring a sum over the
# classes to subtract, which is 0.
@_softmax_kl.defjvp
def _(values, tangents):
  u, v, where = values
  along_u, along_v, _ = tangents
  kl, sum_u, sum_v = _kl_and_sums(u, v, where)
  a, b = jnp.exp(u) * (1 / sum_u), jnp.exp(v) * (1 / sum_v)
  log_ratio = u - v + jnp.log(sum_v / sum_u)
  along = a * (log_ratio - kl) * along_u + (b - a) * along_v
  return kl[..., 0], jnp.sum(along, axis=-1, where=where)


def _kl_and_sums(u: Array, v: Array, where: Array) -> tuple[Array, ...]:
  """KL(a‖b), Σ e^u, Σ e^v: a = e^u / Σ e^u, b = e^v / Σ e^v.

  With d = v − u, KL = log E[e^d] − E[d], E being the mean by a: one pass over
  the classes gives all of it. As E[e^d − 1 − d] + log(1 + y) − y, where 1 + y =
  E[e^d], both parts are small where a and b are close, as at high T. There Σ a
  (log a − log b) is a small difference of large terms: at T = 20 it keeps five
  digits of float32's seven.
  """
  # The peak alone gives 1: less is no class at all.
  total = lambda x: jnp.sum(x, -1, where=where, keepdims=True)  # noqa: E731
  sum_u, sum_v = (jnp.maximum(total(jnp.exp(x)), 1.0) for x in (u, v))
  mean_d = total(jnp.exp(u) * (v - u)) / sum_u
  mean_excess = total(_excess(u, v)) / sum_u
  y = mean_excess + mean_d
  near = jnp.abs(y) < 0.5
  close = mean_excess + _log1p_excess(jnp.where(near, y, 0.0))
  kl = jnp.where(near, close, jnp.log(sum_v / sum_u) - mean_d)
  return jnp.maximum(kl, 0.0), sum_u, sum_v


@jax.custom_jvp
def _excess(u: Array, v: Array) -> Array:
  """e^v − e^u − e^u d = e^u (e^d − 1 − d), d = v − u; never negative."""
  d = v - u
  # 1/2! + d/3! + ... + d⁴/6!
  series = 1 / 720
  for factorial in (120, 24, 6, 2):
    series = 1 / factorial + d * series
  scale = jnp.exp(u)
  near, apart = scale * d * d * series, jnp.exp(v) - scale - scale * d
  return jnp.where(jnp.abs(d) < 0.25, near, apart)


# Not through the series, which overflows where it is not taken.
@_excess.defjvp
def _(values, tangents):
  (u, v), (along_u, along_v) = values, tangents
  scale = jnp.exp(u)
  along = (jnp.exp(v) - scale) * along_v - scale * (v - u) * along_u
  return _excess(u, v), along


def _log1p_excess(y: Array) -> Array:
  """log(1 + y) − y for |y| < 1/2."""
  # log(1 + y) = 2 (w + w³/3 + w⁵/5 + ...), and y = 2 w / (1 − w).
  w = y / (2 + y)
  series = 1 / 13
  for odd in (11, 9, 7, 5, 3):
    series = 1 / odd + w * w * series
  return 2 * w * w * (w * series - 1 / (1 - w))


def relative_entropy(
  log_a: Float32[Array, "*batch classes"],
  log_b: Float32[Array, "*batch classes"],
  where: Bool[Array, "*batch classes"],
) -> Float32[Array, "*batch"]:
  """KL(a‖b) = Σ a (e^d − 1 − d), d = log b − log a, of two distributions.

  The added Σ (b − a) is 0, and no term is negative.
  """
  return class_sum(_excess(log_a, log_b), where)


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


def in_support(
  labels: Integer[Array, "*batch"], at_label: Bool[Array, "*batch classes"]
) -> Bool[Array, "*batch"]:
  """Whether `target` is true anywhere."""
  known = _KNOWN.get()
  if known is None:
    return any_class(at_label)
  return (labels >= 0) & (labels < min(known, at_label.shape[-1]))


def _peak(values: Array, where: Array) -> Array:
  peak = jnp.max(values, axis=-1, where=where, initial=-jnp.inf, keepdims=True)
  return jax.lax.stop_gradient(peak)


def below_peak(values: Array, where: Array) -> Array:
  return jnp.where(where, values - _peak(values, where), 0.0)


def log_sum(values: Array, where: Array) -> Array:
  total = jnp.sum(jnp.exp(values), axis=-1, where=where, keepdims=True)
  return jnp.log(total)
