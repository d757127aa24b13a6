"""From losses to losses; traits and arguments stay those of the loss."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from kdjax.losses.softmax import over_common_support
from kdjax.losses.traits import Traits, traits
from kdjax.types import UserError

Loss = Callable[..., Array]


def zscore(loss: Loss) -> Loss:
  """The loss on standardised logits (z − mean) / (1e-7 + std).

  Mean and standard deviation are those of each example and network over the
  classes where neither logit is -inf, the latter with classes − 1 below; the
  gradient flows through the student's. The student then need not match the
  scale of the teacher's logits.

  Args:
    loss: of `(student, teacher, ...)`.

  Returns:
    A loss with the same arguments, T among them, and the same traits.

  Raises:
    UserError: if the loss has no teacher.

  Source: Sun et al. 2024, arXiv 2403.01427, section 4, and the authors' code
    for the 1e-7. Logits that are constant within float32 are divided by 1: by
    1e-7, as in the code, the gradient would explode.
  """
  declared = _with_teacher("zscore", loss)

  @functools.wraps(loss)
  def on_scores(student: Array, teacher: Array, *args: Any, **kwargs: Any):
    student, teacher, where = over_common_support(student, teacher)
    student, teacher = _scores(student, where), _scores(teacher, where)
    return loss(student, teacher, *args, **kwargs)

  # Not left to `wraps`: a `functools.partial` keeps its traits elsewhere.
  vars(on_scores).update(traits=declared, forgets_scale=True)
  return on_scores


def with_teacher_temperature(loss: Loss) -> Loss:
  """The loss with the teacher at `teacher_temperature`, the student at T.

  Args:
    loss: of `(student, teacher, ..., temperature)`, which reads both logits
      divided by its temperature and not otherwise (`nkd` does otherwise). To
      standardise as well, write `zscore(with_teacher_temperature(loss))`.

  Returns:
    A loss with the further keyword `teacher_temperature` > 0, which must be
    given and may be traced. The power of T remains that of the student's.

  Raises:
    UserError: if the loss has no teacher, no temperature or two already, or if
      it is a `zscore`, which would undo the change.
  """
  declared = _with_teacher("with_teacher_temperature", loss)
  signature = inspect.signature(loss)
  parameters = signature.parameters
  scaled = getattr(_function(loss), "forgets_scale", False)
  if "temperature" not in parameters or "teacher_temperature" in parameters:
    raise UserError(
      f"with_teacher_temperature got {_name(loss)}, needs a loss with one "
      "temperature: give it the loss without this change"
    )
  if scaled:
    raise UserError(
      f"with_teacher_temperature got zscore({_name(loss)}), which forgets "
      "every scale: write zscore(with_teacher_temperature(loss))"
    )

  @functools.wraps(loss)
  def apart(
    student: Array,
    teacher: Array,
    *args: Any,
    teacher_temperature: ArrayLike,
    temperature: ArrayLike = parameters["temperature"].default,
    **kwargs: Any,
  ):
    # The loss divides both by the teacher's, which leaves student / T. With the
    # teacher changed instead, its stopped gradient would be part of T's.
    factor = jnp.asarray(teacher_temperature, jnp.float32) / temperature
    student = jnp.asarray(student, jnp.float32) * factor
    return loss(
      student, teacher, *args, temperature=teacher_temperature, **kwargs
    )

  extra = inspect.Parameter(
    "teacher_temperature", inspect.Parameter.KEYWORD_ONLY
  )
  vars(apart).update(
    traits=declared,
    __signature__=signature.replace(parameters=[*parameters.values(), extra]),
  )
  return apart


def _scores(logits: Array, where: Array) -> Array:
  num_classes = jnp.sum(where, axis=-1, keepdims=True)
  logits = jnp.where(where, logits, 0.0)
  mean = jnp.sum(logits, axis=-1, keepdims=True) / jnp.maximum(num_classes, 1)
  centred = jnp.where(where, logits - mean, 0.0)
  squares = jnp.sum(centred**2, axis=-1, keepdims=True)
  variance = squares / jnp.maximum(num_classes - 1, 1)
  # Below this the deviations are the rounding of the logits, and √ has no slope
  # at 0.
  varies = squares > 1e-12 * jnp.sum(logits**2, axis=-1, keepdims=True)
  std = jnp.sqrt(jnp.where(varies, variance, 1.0))
  return jnp.where(where, centred / (1e-7 + std), -jnp.inf)


def _with_teacher(transform: str, loss: Loss) -> Traits:
  declared = traits(loss)
  if not declared.teacher:
    raise UserError(
      f"{transform} got {_name(loss)}, which takes no teacher: give it a loss "
      "that compares two networks"
    )
  if declared.takes == "spans":
    raise UserError(
      f"{transform} got {_name(loss)}, which compares spans of two "
      "tokenizations: give it a loss that compares class by class"
    )
  return declared


def _function(loss: Loss) -> Loss:
  while isinstance(loss, functools.partial):
    loss = loss.func
  return loss


def _name(loss: Loss) -> str:
  return getattr(_function(loss), "__name__", repr(loss))
