"""The state before the first update, and how it lies on a mesh."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from kdjax import parallel, term_inputs
from kdjax.objective import Objective, Term, as_objective
from kdjax.types import Batch, Model, Output, TrainState

# What no step changes: the teacher's (params, stats), () where there is none;
# or any tree in which `teacher_of` and `student_of` find theirs.
Frozen = Any
TeacherOf = Callable[[TrainState, Frozen], Any]
StudentOf = Callable[[PyTree, Frozen], PyTree]


def all_frozen(state: TrainState, frozen: Frozen) -> Any:
  """The teacher's variables are all that is frozen."""
  del state
  return frozen


def all_trained(params: PyTree, frozen: Frozen) -> PyTree:
  """The student's params are all trained."""
  del frozen
  return params


def init_state(
  student: Model,
  teacher: Model | None,
  terms: Objective | Sequence[Term],
  optimizer: optax.GradientTransformation,
  key: Array,
  batch: Batch,
  *,
  frozen: Frozen = (),
  variables: tuple[PyTree, PyTree] | None = None,
  teacher_of: TeacherOf = all_frozen,
  student_of: StudentOf = all_trained,
) -> TrainState:
  """The state before the first update.

  Args:
    student, teacher, terms, optimizer: as for `make_train_step`.
    key: seeds the student's initialisation, the terms' and every step.
    batch: an example batch; only its shapes matter.
    frozen: as for the step; only its shapes matter.
    variables: `(params, stats)` to start from, instead of initialising.
    teacher_of, student_of: as for `make_train_step`.
  """
  goal = as_objective(terms)
  init_key, term_key, step_key = jax.random.split(key, 3)
  if variables is None:
    params, stats = student.init(init_key, batch)
  else:
    # Copies: a step donates its state, and the caller may start again.
    params, stats = jax.tree.map(jnp.array, variables)
  state = TrainState(jnp.zeros((), jnp.int32), params, stats, (), step_key)
  owners = [t for t in goal.terms if t.init is not None]
  term_params, term_state = {}, {}
  if owners:
    own = jax.eval_shape(student_of, params, frozen), stats
    ours = _spec(student, own, batch, goal.taps(0))
    theirs = teacher and _spec(
      teacher, teacher_of(state, frozen), batch, goal.taps(1)
    )
    for n, term in enumerate(owners):
      term_params[term.name], term_state[term.name] = term_inputs.init_term(
        term, jax.random.fold_in(term_key, n), ours, theirs, batch
      )
  state = state.replace(term_params=term_params, term_state=term_state)
  return state.replace(opt_state=optimizer.init(state.trained))


def create_state(
  student: Model,
  teacher: Model | None,
  terms: Objective | Sequence[Term],
  optimizer: optax.GradientTransformation,
  seed: int,
  batch: Batch,
  *,
  mesh: Mesh,
  rules: Sequence[parallel.Rule] = (),
  frozen: Frozen = (),
  variables: tuple[PyTree, PyTree] | None = None,
  teacher_of: TeacherOf = all_frozen,
  student_of: StudentOf = all_trained,
) -> tuple[TrainState, TrainState]:
  """`init_state` on a mesh, and its shardings: no device ever has all of it.

  Args:
    seed: of `jax.random.key`.
    mesh, rules: as for `state_shardings`.
    batch, frozen: only their shapes matter.
    variables: whole or split, on this host or the devices; left as they are.
  """
  shapes = jax.eval_shape(lambda: (dict(batch), frozen))

  def begin(variables: Any) -> TrainState:
    # Shapes alone, as the rows of a batch differ from process to process.
    rows = {k: jnp.zeros(s.shape, s.dtype) for k, s in shapes[0].items()}
    return init_state(
      student,
      teacher,
      terms,
      optimizer,
      jax.random.key(seed),
      rows,
      frozen=shapes[1],
      variables=variables,
      teacher_of=teacher_of,
      student_of=student_of,
    )

  split = state_shardings(terms, jax.eval_shape(begin, variables), mesh, rules)
  if variables is not None:
    variables = parallel.place(variables, (split.params, split.stats))
  return parallel.create(begin, split, variables), split


def state_shardings(
  terms: Objective | Sequence[Term],
  state: TrainState,
  mesh: Mesh,
  rules: Sequence[parallel.Rule] = (),
) -> TrainState:
  """What is trained by the rules, what terms declare `sharded` with the batch.

  The optimizer's state lies where its parameters do. All the rest is on every
  device: statistics, the key, and of a term's an array whose first axis the
  devices do not divide.
  """
  by_rules = functools.partial(parallel.shardings, mesh=mesh, rules=rules)
  everywhere = parallel.replicated(mesh)
  found = jax.tree.map(lambda _: everywhere, state).replace(
    params=by_rules(state.params),
    opt_state=by_rules(state.opt_state),
    term_params=by_rules(state.term_params),
  )
  parts = parallel.batch_parts(mesh)
  for term in as_objective(terms).terms:
    for name in term.sharded:
      if state.term_state[term.name][name].shape[0] % parts == 0:
        split = parallel.batch_sharding(mesh)
        found.term_state[term.name][name] = split
  return found


def _spec(
  model: Model, variables: Any, batch: Batch, taps: tuple[str, ...]
) -> Output:
  apply = functools.partial(model.apply, train=False, taps=taps)
  return jax.eval_shape(apply, *variables, batch)[0]
