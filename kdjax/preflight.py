"""What is looked at before the first update, so that no run begins in vain."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from kdjax import errors, parallel
from kdjax.types import Batch, LinearLogits, Model, Variables


def check_outputs(
  student: Model,
  teacher: Model | None,
  variables: Variables,
  frozen: Any,
  batch: Batch,
  *,
  mesh: Mesh | None = None,
  comparable: bool = True,
) -> None:
  """Refuses networks that do not fit the data or each other.

  Args:
    student, teacher: the networks; the teacher is run once.
    variables: the student's `(params, stats)`; only their shapes matter.
    frozen: the teacher's.
    batch: any batch, this process's rows of it.
    mesh: what the teacher's variables lie on, where that is several devices.
    comparable: whether their classes must be as many: `Objective.comparable`.

  Raises:
    UserError: classes differ between teacher, student and labels, or the
      teacher's logits hold NaN.
  """
  shape = jax.eval_shape(functools.partial(_logits, student), variables, batch)
  num_classes = shape.shape[-1]
  # The padding of two vocabularies may differ: the terms leave it out.
  padded = isinstance(shape, LinearLogits)
  if padded:
    num_classes = shape.vocabulary
  if teacher is not None:
    free = padded or not comparable
    rows = batch if mesh is None else parallel.put_batch(batch, mesh)
    _check_teacher(teacher, frozen, rows, None if free else num_classes)
  _check_labels(batch, num_classes)


def _check_teacher(
  teacher: Model, frozen: Any, batch: Batch, num_classes: int | None
) -> None:
  @jax.jit
  def spoilt(frozen: Any, batch: Batch) -> Array:
    arrays = jax.tree.leaves(_logits(teacher, frozen, batch))
    return jnp.any(jnp.stack([jnp.isnan(x).any() for x in arrays]))

  shape = jax.eval_shape(functools.partial(_logits, teacher), frozen, batch)
  if num_classes is not None and shape.shape[-1] != num_classes:
    raise errors.UserError(
      f"teacher has {shape.shape[-1]} classes, student {num_classes}: logits "
      "are compared class by class; give both the same number of classes"
    )
  if bool(spoilt(frozen, batch)):
    raise errors.UserError(
      "the teacher's logits hold NaN on the first batch: check its checkpoint "
      "and how its inputs are normalised"
    )


def _check_labels(batch: Batch, num_classes: int) -> None:
  labels = np.asarray(batch.get("label", ()))
  if not np.issubdtype(labels.dtype, np.integer):
    return  # none, or soft ones
  counts = np.asarray(batch["mask"]) * np.asarray(batch.get("labelled", 1))
  used = labels[counts > 0]
  if used.size and (used.min() < 0 or used.max() >= num_classes):
    raise errors.UserError(
      f"labels run from {used.min()} to {used.max()}, the student has "
      f"{num_classes} classes: labels must lie in 0..{num_classes - 1}"
    )


def _logits(model: Model, variables: Variables, batch: Batch) -> Any:
  return model.apply(*variables, batch, train=False)[0].logits
