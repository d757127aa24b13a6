"""Losses between networks with different tokenizers, over aligned spans.

A span is a stretch of text after which both tokenizations have a boundary;
`span [B, S]` says of each position to which span the token belongs that it
predicts, -1 to none, and `kdjax.data.text` makes it. Entry n of a result [B, S]
is span n's, 0 where the row has no such span: to be averaged by `span_mask`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Float32, Integer

from kdjax.losses.divergences import kl
from kdjax.losses.softmax import log_softmax, log_sum_exp
from kdjax.losses.traits import logit_loss
from kdjax.types import UserError

# A float32 log-probability nearer to 0 than this is rounding. The probability
# of anything else would be 0 there, and its logarithm infinite.
_RESOLUTION = 1e-7


@logit_loss(power=1, takes="spans", reads=("span", "teacher_span"))
def universal_logits(
  student: Float[Array, "b s classes"],
  teacher: Float[Array, "b t other_classes"],
  span: Integer[Array, "b s"],
  teacher_span: Integer[Array, "b t"],
  *,
  temperature: ArrayLike = 1.0,
) -> Float32[Array, "b s"]:
  """Σᵢ |p₍ᵢ₎ − q₍ᵢ₎|, both sorted downwards, where a span begins (ULD).

  The smaller vocabulary is filled up with probability 0. The two distributions
  compared are those of the first token of the span: both networks have read the
  same text there. Further tokens of a span have no counterpart. The value is in
  [0, 2]. O(B S (V + V') log) time.

  Args:
    student: logits that receive the gradient; -inf is probability 0.
    teacher: logits that receive none; likewise.
    span: the student's, see above.
    teacher_span: the teacher's.
    temperature: T > 0, of both. May be traced.

  Returns:
    One number a span.

  Raises:
    UserError: spans whose shape is not that of the positions.

  Source: Boizard et al. 2024, arXiv 2402.12030, section 3.2, which compares
    position t with position t: those drift apart as one side's tokens are
    longer. The paper has no temperature.
  """
  _check(student, teacher, span, teacher_span)
  size = student.shape[1]
  ours, exists = _first(student, span, size)
  theirs, also = _first(jax.lax.stop_gradient(teacher), teacher_span, size)
  exists &= also
  classes = max(student.shape[-1], teacher.shape[-1])

  def sorted_softmax(logits: Array) -> Array:
    logits = jnp.where(exists[..., None], logits.astype(jnp.float32), 0.0)
    where = ~jnp.isneginf(logits)
    log_p = log_softmax(logits, temperature, where)
    p = jnp.sort(jnp.where(where, jnp.exp(log_p), 0.0), descending=True)
    return jnp.pad(p, ((0, 0), (0, 0), (0, classes - p.shape[-1])))

  gap = jnp.abs(sorted_softmax(ours) - sorted_softmax(theirs))
  return jnp.where(exists, jnp.sum(gap, axis=-1), 0.0)


@logit_loss(
  power=1,
  takes="spans",
  reads=("label", "teacher_label", "span", "teacher_span"),
)
def likelihood_matching(
  student: Float[Array, "b s classes"],
  teacher: Float[Array, "b t other_classes"],
  label: Integer[Array, "b s"],
  teacher_label: Integer[Array, "b t"],
  span: Integer[Array, "b s"],
  teacher_span: Integer[Array, "b t"],
  *,
  temperature: ArrayLike = 100.0,
  divergence: Callable[[Array, Array], Array] = kl,
) -> Float32[Array, "b s"]:
  """D(p^{1/τ}, 1 − p^{1/τ} ‖ q^{1/τ}, 1 − q^{1/τ}), p, q a span's chance (ALM).

  log p = Σ log p(token | all before) over the span's tokens, the teacher's; q
  likewise the student's. With D = `kl` this is f(p‖q) + f(1 − p‖1 − q) of the
  paper for f(a‖b) = a log(a / b). τ brings the chances of long spans, all near
  0, to where they differ; gradients fall as 1/τ.

  Args:
    student: logits that receive the gradient.
    teacher: logits that receive none.
    label: the token that each position of the student predicts.
    teacher_label: likewise.
    span: the student's, see above.
    teacher_span: the teacher's.
    temperature: τ > 0, which divides the log-likelihoods of spans, not the
      logits. May be traced; it receives no gradient.
    divergence: any loss of two logits [..., 2] of this library.

  Returns:
    One number a span; NaN where a token of it has no probability at all.

  Raises:
    UserError: spans or labels whose shape is not that of the positions.

  Source: Minixhofer et al. 2025, arXiv 2503.20083, section 3: the binarised
    f-divergence. Their code takes the cross-entropy, which differs by the
    teacher's entropy, and lowers log p and log q by 1e-6 τ; here only what is
    nearer to 0 than 1e-7 is. Their thresholds on the tokenization bias of
    spans, and hidden states as a second target, are not here.
  """
  _check(student, teacher, span, teacher_span)
  _check(student, teacher, label, teacher_label, "labels")
  size = student.shape[1]
  ours, exists = _log_likelihood(student, label, span, size)
  theirs, also = _log_likelihood(
    jax.lax.stop_gradient(teacher), teacher_label, teacher_span, size
  )
  exists &= also
  tau = jax.lax.stop_gradient(jnp.asarray(temperature, jnp.float32))

  def binary(log_likelihood: Array) -> Array:
    below = jnp.minimum(log_likelihood, -_RESOLUTION)
    scaled = jnp.where(exists, below, -1.0) / tau
    return jnp.stack([scaled, jax.nn.log1mexp(-scaled)], axis=-1)

  values = divergence(binary(ours), binary(theirs))
  return jnp.where(exists, values, 0.0)


def _first(
  logits: Float[Array, "b s classes"], span: Integer[Array, "b s"], size: int
) -> tuple[Float[Array, "b n classes"], Bool[Array, "b n"]]:
  """The logits that predict each span's first token, and which spans exist."""
  positions = span.shape[1]

  def of_row(spans: Array) -> Array:
    first = jnp.full(size, positions)
    return first.at[_slots(spans, size)].min(jnp.arange(positions), mode="drop")

  first = jax.vmap(of_row)(span)
  exists = first < positions
  at = jnp.where(exists, first, 0)[..., None]
  return jnp.take_along_axis(logits, at, axis=1), exists


def _log_likelihood(
  logits: Float[Array, "b s classes"],
  label: Integer[Array, "b s"],
  span: Integer[Array, "b s"],
  size: int,
) -> tuple[Float32[Array, "b n"], Bool[Array, "b n"]]:
  """Σ log softmax(logits)[label] over each span, and which spans exist."""
  inside = span >= 0
  logits = jnp.where(inside[..., None], logits.astype(jnp.float32), 0.0)
  at = jnp.where(inside, label, 0)[..., None]
  chosen = jnp.take_along_axis(logits, at, axis=-1)[..., 0]
  chosen = jnp.where(jnp.isneginf(chosen), jnp.nan, chosen)
  each = chosen - log_sum_exp(logits, ~jnp.isneginf(logits))

  def of_row(values: Array, spans: Array) -> tuple[Array, Array]:
    slots = _slots(spans, size)
    total = jnp.zeros(size).at[slots].add(values, mode="drop")
    count = jnp.zeros(size, jnp.int32).at[slots].add(1, mode="drop")
    return total, count > 0

  return jax.vmap(of_row)(each, span)


def _slots(spans: Integer[Array, " s"], size: int) -> Integer[Array, " s"]:
  """Spans as indices; those that are none lie outside, -1 being the last."""
  return jnp.where(spans < 0, size, spans)


def _check(
  student: Array,
  teacher: Array,
  ours: Array,
  theirs: Array,
  what: str = "spans",
) -> None:
  for logits, given, whose in (
    (student, ours, "student"),
    (teacher, theirs, "teacher"),
  ):
    if logits.ndim != 3 or given.shape != logits.shape[:2]:
      raise UserError(
        f"{whose} logits have shape {logits.shape}, its {what} {given.shape}: "
        "give logits [B, S, classes] and one number a position"
      )
  if student.shape[0] != teacher.shape[0]:
    raise UserError(
      f"student logits have {student.shape[0]} rows, the teacher's "
      f"{teacher.shape[0]}: give both the same texts"
    )
