"""The train step: one pure function of state, teacher and batch.

    train_step(state, frozen, batch) -> (state, metrics)

The teacher's variables go in and do not come out, so no step can change them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from kdjax import errors, health, parallel, pins, term_inputs, totals
from kdjax.losses.fused import Layout
from kdjax.objective import Objective, Term
from kdjax.types import (
  Batch,
  LinearLogits,
  Model,
  Output,
  Schedule,
  TrainState,
)

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


TrainStep = Callable[
  [TrainState, Frozen, Batch], tuple[TrainState, dict[str, Array]]
]


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
  goal = _objective(terms)
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
  goal = _objective(terms)
  if shown:
    goal = Objective(goal.terms, {**goal.shown, **shown})
  _check_pmap_terms(goal, axis_name)
  logit = [t for t in goal.terms if t.reads_logits]
  other = [t for t in goal.terms if not t.reads_logits]

  def loss_fn(whole, stats, term_state, step, target, batch, divide_by, key):
    output, stats = student.apply(
      whole["student"], stats, batch, train=True, key=key, taps=goal.taps(0)
    )
    output = _pinned(output)
    grouped, sums = totals.logit_terms(
      logit,
      output.logits,
      target and target.logits,
      batch,
      divide_by,
      step,
      layout,
    )
    more, more_sums, term_state = totals.other_terms(
      other,
      output,
      target,
      batch,
      divide_by,
      step,
      whole["terms"],
      term_state,
      jax.random.fold_in(key, 1),
    )
    groups = {
      g: grouped.get(g, 0) + more.get(g, 0) for g in {**grouped, **more}
    }
    return groups, (stats, term_state, {**sums, **more_sums})

  def part_step(state, frozen, theirs, divide_by, part, stats, term_state, key):
    """Gradients and sums of one microbatch."""
    target = None
    if teacher is not None:
      target, _ = teacher.apply(
        theirs[0], theirs[1], part, train=False, taps=goal.taps(1)
      )
      target = _pinned(jax.lax.stop_gradient(target))

    def loss_of(trained):
      whole = trained | {"student": student_of(trained["student"], frozen)}
      return loss_fn(
        whole, stats, term_state, state.step, target, part, divide_by, key
      )

    groups, pull_back, (stats, term_state, sums) = jax.vjp(
      loss_of, state.trained, has_aux=True
    )
    total: Any = functools.reduce(jnp.add, groups.values())
    # Pulling a 1 back from some of the groups gives those groups' gradient.
    wanted = {g: [g] for g in groups} if gradients_by_group else {"": groups}
    gradients = {
      name: pull_back({g: jnp.float32(g in taken) for g in groups})[0]
      for name, taken in wanted.items()
    }
    return stats, term_state, (gradients, total, sums)

  def train_step(state: TrainState, frozen: Frozen, batch: Batch):
    key = jax.random.fold_in(state.key, state.step)
    if axis_name:
      _check_pmap_stats(state.stats, synced_stats)
      key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    if transform is not None:
      batch = transform(batch, jax.random.fold_in(key, 0))
    divide_by = totals.denominators(goal.terms, batch, axis_name)
    theirs = teacher_of(state, frozen) if teacher is not None else None
    one_part = functools.partial(part_step, state, frozen, theirs, divide_by)
    if microbatches == 1:
      stats, term_state, summed = one_part(
        batch, state.stats, state.term_state, jax.random.fold_in(key, 1)
      )
    else:
      stats, term_state, summed = _accumulate(
        one_part, state, _parts(batch, microbatches), key
      )
    if axis_name:
      summed = jax.lax.psum(summed, axis_name)
    by_group, total, sums = summed
    gradients = jax.tree.map(
      lambda *g: functools.reduce(jnp.add, g), *by_group.values()
    )
    guarded = health.is_guarded(state.opt_state)
    followed = gradients
    if guarded:
      followed = health.spoil_unless_finite(gradients, jnp.asarray(total))
    extra = {"by_group": by_group} if gradients_by_group else {}
    updates, opt_state = optimizer.update(
      followed, state.opt_state, state.trained, **extra
    )
    trained: Any = optax.apply_updates(state.trained, updates)
    new_state = state.replace(
      step=state.step + 1,
      params=trained["student"],
      stats=stats,
      opt_state=opt_state,
      term_params=trained["terms"],
      term_state=term_state,
    )
    measured = totals.metrics(goal, sums, state.step)
    measured["loss/total"] = jnp.asarray(total)
    measured["grad_norm"] = optax.tree.norm(gradients)
    if guarded:
      new_state, told = health.keep_if_bad(state, new_state)
      measured |= told
    return new_state, measured

  return train_step


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
  for term in _objective(terms).terms:
    for name in term.sharded:
      if state.term_state[term.name][name].shape[0] % parts == 0:
        split = parallel.batch_sharding(mesh)
        found.term_state[term.name][name] = split
  return found


def pmap_step(train_step: TrainStep, axis_name: str = "data") -> TrainStep:
  """`jax.pmap` of a step made with the same `axis_name`.

  State and teacher come from `parallel.pmap_replicate`, the batch from
  `parallel.pmap_split`; the metrics are equal on all devices.
  """
  return jax.pmap(train_step, axis_name=axis_name, donate_argnums=0)


def _accumulate(one_part, state: TrainState, parts: Batch, key: Array):
  """The sum of the microbatches' gradients and sums, one after another."""
  first = jax.tree.map(lambda x: x[0], parts)
  shapes = jax.eval_shape(one_part, first, state.stats, state.term_state, key)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[2])

  def add(carry, numbered_part):
    stats, term_state, summed = carry
    n, part = numbered_part
    stats, term_state, new = one_part(
      part, stats, term_state, jax.random.fold_in(key, n)
    )
    return (stats, term_state, jax.tree.map(jnp.add, summed, new)), None

  number = jnp.arange(1, 1 + len(jax.tree.leaves(parts)[0]))
  carry = (state.stats, state.term_state, zeros)
  return jax.lax.scan(add, carry, (number, parts))[0]


def _parts(batch: Batch, count: int) -> Batch:
  """`[B, ...]` -> `[count, B / count, ...]`, each part spread over all devices.

  Every count-th example goes together: neighbours lie on one device, and taking
  them apart this way moves nothing between devices.
  """
  return {
    k: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)
    for k, x in batch.items()
  }


def _pinned(output: Output) -> Output:
  """Its logits, or what they are made of, split as the batch is."""
  logits = output.logits
  if isinstance(logits, LinearLogits):
    hidden = pins.by_example(logits.hidden)
    return output._replace(logits=dataclasses.replace(logits, hidden=hidden))
  return output._replace(logits=pins.by_example(logits))


def _objective(terms: Objective | Sequence[Term]) -> Objective:
  return terms if isinstance(terms, Objective) else Objective(tuple(terms))


def _spec(
  model: Model, variables: Any, batch: Batch, taps: tuple[str, ...]
) -> Output:
  apply = functools.partial(model.apply, train=False, taps=taps)
  return jax.eval_shape(apply, *variables, batch)[0]


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
