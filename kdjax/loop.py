"""The loop: `distill(student=..., teacher=..., ...)` trains, saves, goes on.

`kdjax.train` calls it with what a config names, notebooks with objects.
"""

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from kdjax import (
  checkpoint,
  errors,
  losses,
  memory_plan,
  objective,
  parallel,
  preemption,
)
from kdjax.evaluate import make_evaluate, num_parameters
from kdjax.feed import Feed
from kdjax.losses import fused
from kdjax.metrics import Progress, Writer
from kdjax.objective import Objective, Term, hinton
from kdjax.preflight import check_outputs
from kdjax.save_clock import SaveClock
from kdjax.train_step import (
  StudentOf,
  TeacherOf,
  all_frozen,
  all_trained,
  init_state,
  jit_step,
  make_train_step,
  state_shardings,
)
from kdjax.types import Batch, Model, Schedule, TrainState


class DivergedError(errors.UserError):
  """A loss or gradient was not finite; the last good checkpoint stays."""


@dataclasses.dataclass(frozen=True)
class Distilled:
  """What a finished run has.

  Attributes:
    state: the student after the last update.
    metrics: the last update's training metrics and, where there was an
      evaluation, its `eval/<metric>`.
  """

  state: TrainState
  metrics: dict[str, float]

  @property
  def variables(self) -> tuple[PyTree, PyTree]:
    """`(params, stats)` that were trained: with adapters, those alone."""
    return self.state.params, self.state.stats


def distill(
  *,
  student: Model,
  teacher: Model | None = None,
  teacher_variables: PyTree = (),
  train: Iterable[Batch],
  steps: int,
  evaluate_on: Iterable[Batch] | None = None,
  terms: Objective | Sequence[Term] | None = None,
  optimizer: optax.GradientTransformation | None = None,
  seed: int = 0,
  student_variables: tuple[PyTree, PyTree] | None = None,
  teacher_of: TeacherOf = all_frozen,
  student_of: StudentOf = all_trained,
  microbatches: int = 1,
  gradients_by_group: bool = False,
  transform: Callable[[Batch, Array], Batch] | None = None,
  shown: dict[str, Schedule] | None = None,
  settings: Mapping[str, Any] | None = None,
  mesh: Mesh | None = None,
  layout: fused.Layout | None = None,
  folder: str | Path | None = None,
  save_every: int = 1000,
  save_minutes: float = 0,
  keep_last: int = 2,
  keep_best: int = 1,
  name: str = "distilling",
  quiet: bool = False,
) -> Distilled:
  """Trains `student` from the outputs of `teacher` and from labels.

  Args:
    student, teacher: networks (`adapters` makes them). Without a teacher the
      terms must not need one: plain training from labels.
    teacher_variables: `(params, stats)`, or any tree in which `teacher_of` and
      `student_of` find theirs; never changed, never saved.
    train: batches of the whole batch's size. If its iterator has `get_state`
      and `set_state` (grain's do), the position is saved and restored;
      otherwise a resumed run reads and skips.
    steps: optimizer updates in all.
    evaluate_on: a finite iterable of batches, evaluated whenever saving.
    terms: the objective; default `hinton(alpha=0.1, temperature=4.0)`, or
      cross-entropy alone without a teacher.
    optimizer: default `optax.adamw(1e-3)`.
    seed: of initialisation and dropout; the data has its own.
    student_variables: `(params, stats)` to start from.
    teacher_of, student_of, microbatches, gradients_by_group, transform, shown:
      as for `make_train_step`.
    settings: what a config says, by key, for the advice where memory is short
      (`memory_plan.advice`); its "phase" is the phase's name.
    mesh: default, all devices along `data`.
    layout: as for `make_train_step`; default, tokens along `data`.
    folder: for checkpoints and metrics; started again with the same one, the
      run goes on where it was. None writes nothing.
    save_every: updates between evaluations and checkpoints.
    save_minutes: between checkpoints at other updates, without evaluation; 0
      makes none.
    keep_last, keep_best: checkpoints kept: the newest, and those with the
      lowest `eval/nll`.
    name: shown in the terminal.
    quiet: show nothing there.

  Raises:
    UserError: for mistakes found before the first update.
    DivergedError: when a loss or gradient is not finite, naming the update.
    preemption.Preempted: on SIGTERM, after a checkpoint of the last update.
  """
  mesh = mesh or parallel.make_mesh()
  layout = layout or fused.over(mesh)
  optimizer = optimizer or optax.adamw(1e-3)
  if steps < 1 or save_every < 1 or save_minutes < 0:
    raise errors.UserError(
      f"got steps={steps}, save_every={save_every}, save_minutes="
      f"{save_minutes}: needs at least 1, 1 and 0"
    )
  goal = _goal(terms, teacher)
  objective.check(goal, steps, has_teacher=teacher is not None)
  feed = Feed(train)
  parallel.check_batch_size(
    len(feed.first["mask"]), mesh, microbatches=microbatches
  )
  frozen = parallel.put(teacher_variables, mesh)
  state = init_state(
    student,
    teacher,
    goal,
    optimizer,
    jax.random.key(seed),
    feed.first,
    frozen=frozen,
    variables=student_variables,
    teacher_of=teacher_of,
    student_of=student_of,
  )
  # A teacher that is in the state is looked at as it begins.
  theirs = () if teacher is None else teacher_of(state, frozen)
  whole = jax.eval_shape(student_of, state.params, frozen)
  check_outputs(
    student,
    teacher,
    (whole, state.stats),
    theirs,
    feed.first,
    comparable=goal.comparable,
  )
  shardings = state_shardings(goal, state, mesh)
  state = jax.device_put(state, shardings)
  step_fn = jit_step(
    make_train_step(
      student,
      teacher,
      goal,
      optimizer,
      microbatches=microbatches,
      gradients_by_group=gradients_by_group,
      transform=transform,
      shown=shown,
      layout=layout,
      teacher_of=teacher_of,
      student_of=student_of,
    ),
    mesh,
    shardings,
  )
  tell = functools.partial(print, file=sys.stderr)
  facts = {"teacher": checkpoint.fingerprint(frozen)}
  with contextlib.ExitStack() as stack:
    saver, position = None, None
    told_to_stop = stack.enter_context(preemption.watched())
    if folder is not None:
      saver = checkpoint.Checkpointer(
        Path(folder) / "checkpoints",
        keep_last=keep_last,
        keep_best=keep_best,
        metric="eval/nll" if evaluate_on is not None else None,
      )
      stack.callback(saver.close)
      state, position = _restore(saver, state, facts, name, tell)
    start = int(state.step)
    feed.go_to(position, start)
    bar = Progress(name, steps, start=start, quiet=quiet)
    stack.callback(bar.close)
    bar.note(_describe(name, mesh, state, theirs, start, steps))
    if start < steps:
      rows = parallel.put_batch(feed.first, mesh)
      head = functools.partial(
        memory_plan.head_bytes,
        student,
        teacher,
        goal,
        state.replace(params=whole),
        theirs,
        rows,
        microbatches=microbatches,
        layout=layout,
      )
      plan = memory_plan.plan(step_fn, state, frozen, rows)
      bar.note(f"{name}: {_memory(plan, head, settings or {})}")
    write = None
    if folder is not None:
      write = stack.enter_context(Writer(Path(folder), resume_step=start))
    test = None
    if evaluate_on is not None:
      other = teacher if goal.comparable else None
      test = _test(
        make_evaluate(student, other, mesh, layout),
        evaluate_on,
        frozen,
        teacher_of,
        student_of,
      )
    pending, last = None, {}
    clock = SaveClock(save_minutes if saver is not None else 0)
    for step in range(start + 1, steps + 1):
      if told_to_stop():
        if pending is not None:
          _report(*pending, write, bar)
        _leave(saver, step - 1, state, start, name, feed.position, facts)
      batch = parallel.put_batch(next(feed), mesh)
      state, measured = step_fn(state, frozen, batch)
      # The device computes this step while the host reads the one before.
      if pending is not None:
        last = _report(*pending, write, bar)
      pending = step, measured
      evaluates = step % save_every == 0 or step == steps
      if clock.due() or evaluates:
        # Saved only once the step's own metrics were seen to be finite.
        last, pending = _report(*pending, write, bar), None
        if evaluates and test is not None:
          last |= _report(step, test(state), write, bar)
        if saver is not None:
          saver.save(
            step,
            state,
            position=feed.position,
            facts=facts,
            metrics=last if evaluates else None,
          )
        clock.saved()
    if not last and test is not None:
      last = test(state)
  return Distilled(state, last)


def _goal(
  terms: Objective | Sequence[Term] | None, teacher: Model | None
) -> Objective:
  if isinstance(terms, Objective):
    return terms
  if terms is not None:
    return Objective(tuple(terms))
  if teacher is not None:
    return hinton(alpha=0.1, temperature=4.0)
  return Objective((Term("hard", losses.cross_entropy, group="hard"),))


def _restore(
  saver: checkpoint.Checkpointer,
  state: TrainState,
  facts: dict[str, Any],
  name: str,
  tell: Callable[[str], None],
) -> tuple[TrainState, Any]:
  """The newest sound checkpoint's state and input position, or `state`."""
  restored = saver.restore(state, note=tell)
  if restored is None:
    return state, None
  if restored.facts["teacher"] != facts["teacher"]:
    raise errors.UserError(
      f"{name}: the checkpoint was trained with another teacher (fingerprint "
      f"{restored.facts['teacher']}, now {facts['teacher']}): use the same "
      "teacher, or another workdir"
    )
  return restored.state, restored.position


def _leave(
  saver: checkpoint.Checkpointer | None,
  step: int,
  state: TrainState,
  start: int,
  name: str,
  position: Any,
  facts: dict[str, Any],
) -> NoReturn:
  """Ends the run after `step`, which is on disk then.

  Raises:
    Preempted: always.
  """
  told = f"{name}: stopped by SIGTERM at step {step}"
  if saver is None:
    raise preemption.Preempted(f"{told}; there is no folder to save it into")
  if step > start:
    saver.save(step, state, position=position, facts=facts)
  saver.wait()
  saved = "which is saved" if step else "where there is nothing to save"
  raise preemption.Preempted(
    f"{told}, {saved}; the same command goes on from here"
  )


def _report(
  step: int, measured: Any, write: Writer | None, bar: Progress
) -> dict[str, float]:
  """Fetches, checks, writes and shows the metrics of a step."""
  values = {k: float(v) for k, v in jax.device_get(measured).items()}
  for name in ("loss/total", "grad_norm", "eval/nll"):
    if not math.isfinite(values.get(name, 0.0)):
      bad = [k for k, v in values.items() if not math.isfinite(v)]
      raise DivergedError(
        f"{', '.join(bad)} not finite at step {step}: lower the learning rate "
        "or clip gradients; checkpoints before it are kept"
      )
  if write is not None:
    write(step, values)
  if "loss/total" in values:
    bar.update(step, values["loss/total"])
  return values


def _memory(
  plan: memory_plan.Plan,
  head: Callable[[], int],
  settings: Mapping[str, Any],
) -> str:
  """What a step takes of each device: a line, or a table where it is much.

  Raises:
    UserError: the device has less.
  """
  if plan.limit is None or plan.total < plan.limit / 10:
    return memory_plan.line(plan)
  # To tell the head apart takes another compilation.
  plan = plan._replace(head=head())
  phase = settings.get("phase", "distilled")
  memory_plan.check_fits(plan, settings, phase=phase)
  return memory_plan.table(plan, settings, phase=phase)


def _test(
  run: Callable[..., dict[str, float]],
  batches: Iterable[Batch],
  frozen: PyTree,
  teacher_of: TeacherOf,
  student_of: StudentOf,
) -> Callable[[TrainState], dict[str, float]]:
  """A state -> its `eval/<metric>`."""

  def test(state: TrainState) -> dict[str, float]:
    whole = student_of(state.params, frozen), state.stats
    got = run(whole, teacher_of(state, frozen), batches)
    return {f"eval/{name}": value for name, value in got.items()}

  return test


def _describe(
  name: str,
  mesh: Mesh,
  state: TrainState,
  teacher_variables: PyTree,
  start: int,
  steps: int,
) -> str:
  size = f"{num_parameters(state.params):,} parameters"
  if jax.tree.leaves(teacher_variables):
    size += f", teacher of {num_parameters(teacher_variables[0]):,}"
  device = mesh.devices.flat[0]
  where = f"{mesh.size} {device.platform} device(s), {device.device_kind}"
  if start >= steps:
    return f"{name}: step {start} of {steps} is saved, nothing to train"
  at = f"from step {start} " if start else ""
  return (
    f"{name}: {at}to step {steps} on {where}; jax {jax.__version__} compiles "
    f"one train step: network of {size}"
  )
