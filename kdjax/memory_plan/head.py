"""The losses on logits by themselves, compiled without networks."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from kdjax import totals
from kdjax.losses.fused import Layout
from kdjax.memory_plan.measured import held
from kdjax.objective import Objective, Term, as_objective
from kdjax.types import Batch, LinearLogits, Model, TrainState


def head_bytes(
  student: Model,
  teacher: Model | None,
  terms: Objective | Sequence[Term],
  state: TrainState,
  frozen: PyTree,
  batch: Batch,
  *,
  microbatches: int = 1,
  layout: Layout | None = None,
) -> int:
  """What the losses on logits take by themselves, compiled without networks.

  Their temporary memory and gradients and, where logits are multiplied out,
  the logits. In the whole step a part of it may be used again for something
  else. Arguments are those of `make_train_step`; `batch` as for `plan`.
  """
  terms = [t for t in as_objective(terms).terms if t.reads_logits]
  rows = {name: _part(x, microbatches) for name, x in batch.items()}
  ours = _logits(student, (state.params, state.stats), rows, train=True)
  theirs = teacher and _logits(teacher, frozen, rows, train=False)

  def loss(student: Any, teacher: Any, rows: Batch) -> tuple[Array, Any]:
    divide_by = totals.denominators(terms, rows)
    groups, sums = totals.logit_terms(
      terms, student, teacher, rows, divide_by, jnp.int32(0), layout
    )
    return sum(groups.values(), jnp.float32(0)), sums

  gradient = jax.jit(jax.grad(loss, has_aux=True))
  compiled = gradient.lower(ours, theirs, rows).compile()
  memory: Any = compiled.memory_analysis()
  made = memory.temp_size_in_bytes + memory.output_size_in_bytes
  return made if isinstance(ours, LinearLogits) else made + held((ours, theirs))


def _part(x: Any, microbatches: int) -> jax.ShapeDtypeStruct:
  """The shape of a microbatch, split as the batch is."""
  shape = (x.shape[0] // microbatches, *x.shape[1:])
  sharding = getattr(x, "sharding", None)
  return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)


def _logits(
  model: Model, variables: PyTree, rows: Batch, *, train: bool
) -> Any:
  """The shapes of a network's logits, split as the rows are."""
  apply = functools.partial(model.apply, train=train, key=jax.random.key(0))
  made = jax.eval_shape(apply, *variables, rows)[0].logits
  split = functools.partial(
    jax.ShapeDtypeStruct, sharding=rows["mask"].sharding
  )
  if not isinstance(made, LinearLogits):
    return split(made.shape, made.dtype)
  hidden = split(made.hidden.shape, made.hidden.dtype)
  return dataclasses.replace(made, hidden=hidden)
