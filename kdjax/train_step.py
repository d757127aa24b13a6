"""The train step: one pure function of state, teacher and batch.

    train_step(state, frozen, batch) -> (state, metrics)

The teacher's variables go in and do not come out, so no step can change them.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from kdjax import errors, gradients, health, parallel, pins, totals
from kdjax.losses.fused import Layout
from kdjax.objective import Objective, Term, as_objective
from kdjax.train_state import (
  Frozen,
  StudentOf,
  TeacherOf,
  all_frozen,
  all_trained,
)
from kdjax.train_state import create_state as create_state
from kdjax.train_state import init_state as init_state
from kdjax.train_state import state_shardings as state_shardings
from kdjax.types import Batch, Model, Schedule, TrainState

TrainStep = Callable[
  [TrainState, Frozen, Batch], tuple[TrainState, dict[str, Array]]
]


def make_train_step(
  student: Model,
  teacher: Model | None,
  terms: Objective | Sequence[Term],
  optimizer: optax.GradientTransformation,
  *,
  microbatches: int = 1,
  transform: Callable[[Batch, Array], Batch] | None = None,
  teacher_of: TeacherOf = all_frozen,
  student_of: StudentOf = all_trained,
  shown: Mapping[str, Schedule] | None = None,
  axis_name: str | None = None,
  synced_stats: bool = False,
  gradients_by_group: bool = False,
  layout: Layout | None = None,
) -> TrainStep:
  """The step for `jit_step`, or with `axis_name` for `pmap_step`.

  Gradients are those of the whole batch: each microbatch adds its sums, divided
  by the weights of all. Batch statistics move, and losses that couple examples
  see groups, microbatch by microbatch. A dropout mask is drawn per microbatch.

  Args:
    student, teacher: networks; the teacher may be None if no term needs it.
    terms: the objective.
    optimizer: over `{"student": params, "terms": term_params}`. A state begun
      with `health.guarded(optimizer)`, or another `optax.apply_if_finite`, is
      left whole by an update that is not finite (`health.keep_if_bad`).
    microbatches: parts that the batch is taken in, one after another.
    transform: `(batch, key) -> batch`, for mixup: once, for both networks.
    teacher_of: which variables the teacher has; a self-teacher reads the state.
    student_of: `(params, frozen) -> params` that the student's `apply` gets;
      where `params` are adapters, it finds the base in `frozen`.
    shown: further schedules for the metrics, such as the learning rate.
    axis_name: the axis of `jax.pmap`; None under `jax.jit`.
    synced_stats: under pmap, the network's batch statistics are averaged over
      `axis_name` by itself, hence equal on all devices.
    gradients_by_group: the optimizer also gets `{group: gradient}` as the
      argument `by_group`, at one backward pass for each group.
    layout: how the tokens are gone through where the logits are `LinearLogits`;
      over a mesh it must name it.

  Raises:
    UserError: under pmap, naming terms that couple examples (each device would
      see its own part only), or, when traced, statistics that would diverge.
  """
  goal = as_objective(terms)
  goal = Objective(goal.terms, {**goal.shown, **(shown or {})})
  _check_pmap_terms(goal, axis_name)
  of_part = gradients.of_microbatch(
    student, teacher, goal, student_of, layout, apart=gradients_by_group
  )

  def train_step(state: TrainState, frozen: Frozen, batch: Batch):
    key = jax.random.fold_in(state.key, state.step)
    if axis_name:
      _check_pmap_stats(state.stats, synced_stats)
      key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    if transform is not None:
      batch = transform(batch, jax.random.fold_in(key, 0))
    divide_by = totals.denominators(goal.terms, batch, axis_name)
    theirs = teacher_of(state, frozen) if teacher is not None else None
    carried, summed = gradients.accumulated(
      functools.partial(of_part, state, frozen, theirs, divide_by),
      (state.stats, state.term_state),
      batch,
      key,
      microbatches,
    )
    if axis_name:
      summed = jax.lax.psum(summed, axis_name)
    by_group, total, sums = summed
    gradient = jax.tree.map(
      lambda *g: functools.reduce(jnp.add, g), *by_group.values()
    )
    extra = {"by_group": by_group} if gradients_by_group else {}
    new_state, told = _update(
      optimizer, state, carried, gradient, jnp.asarray(total), **extra
    )
    return new_state, {
      **totals.metrics(goal, sums, state.step),
      "loss/total": jnp.asarray(total),
      "grad_norm": optax.tree.norm(gradient),
      **told,
    }

  return train_step


def _update(
  optimizer: optax.GradientTransformation,
  state: TrainState,
  carried: tuple[PyTree, PyTree],
  gradient: PyTree,
  total: Array,
  **extra: Any,
) -> tuple[TrainState, dict[str, Array]]:
  """The next state, and what a guard (`health.guarded`) tells of the update."""
  guarded = health.is_guarded(state.opt_state)
  if guarded:
    gradient = health.spoil_unless_finite(gradient, total)
  updates, opt_state = optimizer.update(
    gradient, state.opt_state, state.trained, **extra
  )
  trained: Any = optax.apply_updates(state.trained, updates)
  stats, term_state = carried
  new_state = state.replace(
    step=state.step + 1,
    params=trained["student"],
    stats=stats,
    opt_state=opt_state,
    term_params=trained["terms"],
    term_state=term_state,
  )
  return health.keep_if_bad(state, new_state) if guarded else (new_state, {})


def jit_step(
  train_step: TrainStep, mesh: Mesh, state_shardings: Any = None
) -> TrainStep:
  """`jax.jit` over the mesh: batch split, state donated, teacher as it lies.

  Args:
    train_step: of `make_train_step`.
    mesh: of `parallel.make_mesh`.
    state_shardings: of the function of that name; default, the whole state on
      every device.
  """
  everywhere = parallel.replicated(mesh)
  states = state_shardings or everywhere

  @functools.wraps(train_step)
  def pinned(state: TrainState, frozen: Frozen, batch: Batch):
    with pins.inside(mesh):
      return train_step(state, frozen, batch)

  return jax.jit(
    pinned,
    donate_argnums=0,
    in_shardings=(states, None, parallel.batch_sharding(mesh)),
    out_shardings=(states, everywhere),
  )


def pmap_step(train_step: TrainStep, axis_name: str = "data") -> TrainStep:
  """`jax.pmap` of a step made with the same `axis_name`.

  State and teacher come from `parallel.pmap_replicate`, the batch from
  `parallel.pmap_split`; the metrics are equal on all devices.
  """
  return jax.pmap(train_step, axis_name=axis_name, donate_argnums=0)


def _check_pmap_terms(goal: Objective, axis_name: str | None) -> None:
  coupled = [t.name for t in goal.terms if t.coupled]
  if axis_name and coupled:
    raise errors.UserError(
      f"terms {', '.join(coupled)} couple the examples of a batch, and under "
      "pmap each device sees its own part only: use jit_step"
    )


def _check_pmap_stats(stats: PyTree, synced: bool) -> None:
  paths = jax.tree_util.tree_flatten_with_path(stats)[0]
  if paths and not synced:
    raise errors.UserError(
      f"the student has batch statistics ({jax.tree_util.keystr(paths[0][0])} "
      f"and {len(paths) - 1} more), which would differ between devices under "
      "pmap: give its batch norms the axis_name and set synced_stats=True, or "
      "use jit_step"
    )
