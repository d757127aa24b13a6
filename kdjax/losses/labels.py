"""Losses that take labels: the hard loss, and distillation apart from it.

All are in nats, one number an example, and none multiplies by T². A label that
is out of range, or whose class has a logit of -inf, gives NaN and no gradient.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32, Integer

from kdjax.losses.softmax import (
  below_peak,
  class_sum,
  in_support,
  log_softmax,
  log_sum,
  log_sum_exp,
  over_common_support,
  softmax_kl,
  support,
  target,
)
from kdjax.losses.traits import logit_loss
from kdjax.types import UserError


@logit_loss(power=0, labels=True, teacher=False)
def cross_entropy(
  student: Float[Array, "*batch classes"],
  labels: Integer[Array, "*batch"] | Float[Array, "*batch classes"],
  *,
  label_smoothing: ArrayLike = 0.0,
) -> Float32[Array, "*batch"]:
  """−Σ y log q, y = (1 − ε) · labels + ε / num_classes, in nats.

  q is the student's softmax over its classes that are not at -inf; ε is spread
  over these, and `num_classes` counts them.

  Args:
    student: logits that receive the gradient.
    labels: class numbers, or a distribution over the classes. One that gives
      mass to a class at -inf makes the loss NaN.
    label_smoothing: ε in [0, 1]. May be traced.

  Raises:
    UserError: if the labels are neither.

  Source: Szegedy et al. 2015, arXiv 1512.00567, section 7.
  """
  student = jnp.asarray(student, jnp.float32)
  labels = jnp.asarray(labels)
  where = support(student)
  below = below_peak(student, where)
  log_total = log_sum(below, where)
  epsilon = jnp.asarray(label_smoothing, jnp.float32)
  if labels.shape == student.shape:
    soft = jax.lax.stop_gradient(labels.astype(jnp.float32))
    inside = jnp.all(where | (soft == 0), axis=-1)
  elif labels.ndim == student.ndim:
    raise UserError(
      f"soft labels have shape {labels.shape}, must have the logits' "
      f"{student.shape}: give one probability a class"
    )
  else:
    at_label = target(labels, where)
    if isinstance(label_smoothing, int | float) and label_smoothing == 0:
      # The same number, without three passes over all classes.
      hard = log_total[..., 0] - jnp.sum(below, axis=-1, where=at_label)
      return _at_labels(hard, labels, at_label)
    soft = at_label.astype(jnp.float32)
    inside = in_support(labels, at_label)
  log_q = jnp.where(where, below - log_total, 0.0)
  num_classes = jnp.maximum(jnp.sum(where, axis=-1, keepdims=True), 1)
  smooth = (1.0 - epsilon) * soft + epsilon / num_classes
  return jnp.where(inside, class_sum(-smooth * log_q, where), jnp.nan)


@logit_loss(power=2, labels=True)
def dkd(
  student: Float[Array, "*batch classes"],
  teacher: Float[Array, "*batch classes"],
  labels: Integer[Array, "*batch"],
  *,
  temperature: ArrayLike = 1.0,
  target_weight: ArrayLike = 1.0,
  nontarget_weight: ArrayLike = 8.0,
) -> Float32[Array, "*batch"]:
  """target_weight · TCKD + nontarget_weight · NCKD, in nats.

  TCKD is the KL divergence of (p_y, 1 − p_y) from (q_y, 1 − q_y), NCKD that of
  the two softmaxes over the classes other than y, all at T. With the weights 1
  and 1 − p_y the sum is `kl`.

  Args:
    student: logits that receive the gradient.
    teacher: logits that receive none.
    labels: the class numbers y.
    temperature: T > 0. May be traced.
    target_weight, nontarget_weight: α and β of the paper; may be traced.

  Returns:
    NaN also where the support holds no class but y.

  Source: Zhao et al. 2022, arXiv 2203.08679, equation 7. The authors' code adds
    −1000 to the logit of y and takes the logarithm of q_y, infinite for a
    saturated student; here y leaves the support and all is in log space.
  """
  student, teacher, where = over_common_support(student, teacher)
  at_label = target(labels, where)
  others = where & ~at_label

  def binary(logits: Array) -> tuple[Array, Array]:
    log_probs = log_softmax(logits, temperature, where)
    log_hit = jnp.sum(log_probs, axis=-1, where=at_label)
    return log_hit, log_sum_exp(log_probs, others)

  log_p, log_rest_p = binary(teacher)
  log_q, log_rest_q = binary(student)
  tckd = jnp.exp(log_p) * (log_p - log_q)
  tckd += jnp.exp(log_rest_p) * (log_rest_p - log_rest_q)
  nckd = softmax_kl(teacher, student, temperature, others)
  return _at_labels(
    target_weight * tckd + nontarget_weight * nckd, labels, at_label
  )


@logit_loss(power=0, labels=True)
def nkd_target(
  student: Float[Array, "*batch classes"],
  teacher: Float[Array, "*batch classes"],
  labels: Integer[Array, "*batch"],
) -> Float32[Array, "*batch"]:
  """−p_y log q_y, in nats, at T = 1 always: the target part of `nkd`."""
  student, teacher, where = over_common_support(student, teacher)
  at_label = target(labels, where)
  p = jnp.exp(log_softmax(teacher, 1.0, where))
  log_q = log_softmax(student, 1.0, where)
  return _at_labels(
    jnp.sum(-p * log_q, axis=-1, where=at_label), labels, at_label
  )


@logit_loss(power=2, labels=True)
def nkd_nontarget(
  student: Float[Array, "*batch classes"],
  teacher: Float[Array, "*batch classes"],
  labels: Integer[Array, "*batch"],
  *,
  temperature: ArrayLike = 1.0,
) -> Float32[Array, "*batch"]:
  """−Σ p̂ log q̂ over the classes other than y, in nats: the other part of `nkd`.

  p̂ and q̂ are the softmax of teacher / T and student / T over those classes. It
  is the cross-entropy, as in the authors' code, and so not 0 where p̂ = q̂. NaN
  also where the support holds no class but y.
  """
  student, teacher, where = over_common_support(student, teacher)
  at_label = target(labels, where)
  others = where & ~at_label
  p = jnp.exp(log_softmax(teacher, temperature, others))
  log_q = log_softmax(student, temperature, others)
  return _at_labels(class_sum(-p * log_q, others), labels, at_label)


@logit_loss(power=0, labels=True)
def nkd(
  student: Float[Array, "*batch classes"],
  teacher: Float[Array, "*batch classes"],
  labels: Integer[Array, "*batch"],
  *,
  temperature: ArrayLike = 1.0,
  gamma: ArrayLike = 1.5,
) -> Float32[Array, "*batch"]:
  """`nkd_target` + gamma · `nkd_nontarget`, in nats.

  The paper multiplies the second part by T² and the first by nothing, and a
  loss declares one power of T. So train on the two parts as two terms; this sum
  is the paper's at T = 1 alone.

  Args:
    student: logits that receive the gradient.
    teacher: logits that receive none.
    labels: the class numbers y.
    temperature: T > 0 of the second part. May be traced.
    gamma: weight of the second part. May be traced.

  Source: Yang et al. 2023, arXiv 2303.13005, section 3.1.
  """
  others = nkd_nontarget(student, teacher, labels, temperature=temperature)
  return nkd_target(student, teacher, labels) + gamma * others


@logit_loss(power=0)
def teacher_label(
  student: Float[Array, "*batch classes"],
  teacher: Float[Array, "*batch classes"],
) -> Float32[Array, "*batch"]:
  """−log q_c, c = argmax p, in nats: the teacher's own choice as the label.

  Of classes that tie, the first is c. Classes at -inf on either side are no
  choice.

  Source: Touvron et al. 2021, arXiv 2012.12877, section 4, hard-label
    distillation.
  """
  student, teacher, where = over_common_support(student, teacher)
  choice = jnp.argmax(jnp.where(where, teacher, -jnp.inf), axis=-1)
  at_choice = target(choice, where)
  log_q = log_softmax(student, 1.0, where)
  return _at_labels(
    -jnp.sum(log_q, axis=-1, where=at_choice), choice, at_choice
  )


@logit_loss(power=2, labels=True, teacher=False)
def teacher_free(
  student: Float[Array, "*batch classes"],
  labels: Integer[Array, "*batch"],
  *,
  temperature: ArrayLike = 1.0,
  correct: float = 0.99,
) -> Float32[Array, "*batch"]:
  """KL(v_T ‖ q_T), v a virtual teacher: v_y = a, (1 − a) / (C − 1) elsewhere.

  v_T is v with its logarithms divided by T, renormalised; q_T the student's
  softmax at T. C counts the classes that are not at -inf.

  Args:
    student: logits that receive the gradient.
    labels: the class numbers y.
    temperature: T > 0; 20 in the paper. May be traced.
    correct: a, in (0, 1).

  Raises:
    UserError: if a is not in (0, 1).

  Source: Yuan et al. 2020, arXiv 1909.11723, section 4.2 (Tf-KD_reg), equation
    9, which softens both sides; the authors' code divides the probabilities v
    themselves by T and softens v alone.
  """
  if not 0 < correct < 1:
    raise UserError(f"correct is {correct}, must be in (0, 1)")
  student = jnp.asarray(student, jnp.float32)
  where = support(student)
  at_label = target(labels, where)
  others = jnp.sum(where, axis=-1, keepdims=True) - 1
  wrong = math.log1p(-correct) - jnp.log(
    jnp.maximum(others, 1).astype(jnp.float32)
  )
  virtual = jnp.where(at_label, math.log(correct), wrong)
  return _at_labels(
    softmax_kl(virtual, student, temperature, where), labels, at_label
  )


def _at_labels(
  loss: ArrayLike, labels: ArrayLike, at_label: Array
) -> Float32[Array, "*batch"]:
  """NaN for a label that is none."""
  return jnp.where(in_support(jnp.asarray(labels), at_label), loss, jnp.nan)
