"""The loop: `distill(student=..., teacher=..., ...)` trains, saves, goes on.

`kdjax.train` calls it with what a config names, notebooks with objects.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from kdjax import (
  errors,
  files,
  health,
  loggers,
  objective,
  opening,
  parallel,
  preemption,
  processes,
  progress,
  stepping,
)
from kdjax.clock import Clock
from kdjax.evaluate import make_evaluate
from kdjax.feed import Feed
from kdjax.goodput import Goodput
from kdjax.health import DivergedError as DivergedError
from kdjax.loggers import OnMetrics
from kdjax.losses import fused
from kdjax.metrics import Writer
from kdjax.objective import Objective, Term
from kdjax.perf import Meter
from kdjax.profiling import Profile
from kdjax.progress import Progress
from kdjax.save_clock import SaveClock
from kdjax.saving import Saver
from kdjax.train_state import StudentOf, TeacherOf, all_frozen, all_trained
from kdjax.types import Batch, Model, Schedule, TrainState
from kdjax.watchdog import Watchdog


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
  partition: Sequence[parallel.Rule] = (),
  teacher_partition: Sequence[parallel.Rule] = (),
  layout: fused.Layout | None = None,
  show_sharding: bool = False,
  folder: str | Path | None = None,
  save_every: int = 1000,
  save_minutes: float = 0,
  keep_last: int = 2,
  keep_best: int = 1,
  on_nan: str = "stop",
  profile: int = 0,
  hang_minutes: float = 0.0,
  on_metrics: OnMetrics | None = None,
  name: str = "",
  quiet: bool = False,
) -> Distilled:
  """Trains `student` from the outputs of `teacher` and from labels.

  Args:
    student, teacher: networks (`adapters` makes them). Without a teacher the
      terms must not need one: plain training from labels.
    teacher_variables: `(params, stats)`, or any tree in which `teacher_of` and
      `student_of` find theirs; never changed, never saved. A teacher without
      variables (`from_batch`) needs none.
    train: batches of the whole batch's size. If its iterator has `get_state`
      and `set_state` (grain's do), the position is saved and restored;
      otherwise a resumed run reads and skips.
    steps: batches in all, and optimizer updates, but for those skipped.
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
    mesh: of `parallel.make_mesh`; default, all devices along `data`.
    partition, teacher_partition: rules of `parallel.shardings`, for what is
      trained and for what is frozen.
    layout: as for `make_train_step`; default, `fused.over(mesh)`.
    show_sharding: show a table of what is split how.
    folder: for checkpoints and metrics, in a bucket too (`gs://...`); started
      again with the same one, the run goes on where it was. None writes
      nothing.
    save_every: steps between evaluations and checkpoints.
    save_minutes: between checkpoints at other steps, without evaluation; 0
      makes none.
    keep_last, keep_best: checkpoints kept: the newest, and those with the
      lowest `eval/nll`.
    on_nan: what becomes of an update whose loss or gradient is not finite:
      "stop" ends the run; "skip" leaves the state as it was, on the device,
      and goes on to the next batch (`health`).
    profile: steps to trace into `<folder>/profile`; 0 traces none.
    hang_minutes: end the process when for so long no step has ended, or no
      batch of an evaluation, or no save (`watchdog`); 0 never ends it.
    on_metrics: called with the step and its metrics, on process 0 alone; once
      more where the step is evaluated, with the `eval/<metric>`. After a kill
      the steps since the last checkpoint come again, the same to the bit.
    name: shown in the terminal; default "distilling", "training" without a
      teacher.
    quiet: show nothing there.

  Raises:
    UserError: for mistakes found before the first update; whatever
      `on_metrics` raises.
    DivergedError: when a loss or gradient is not finite, naming the step; of
      skipped updates, when there are too many in a row.
    preemption.Preempted: on SIGTERM, after a checkpoint of the last update.
  """
  clock = Clock()
  health.check_settings(on_nan, profile, hang_minutes)
  if folder is not None:
    folder = files.path(folder)
    files.check(folder)
  mesh = mesh or parallel.make_mesh()
  layout = layout or fused.over(mesh)
  optimizer = optimizer or optax.adamw(1e-3)
  if on_nan == "skip":
    optimizer = health.guarded(optimizer)
  _check_counts(steps, save_every, save_minutes)
  goal = opening.goal(terms, teacher)
  objective.check(goal, steps, has_teacher=teacher is not None)
  feed = Feed(train)
  if teacher is not None and teacher_of is all_frozen:
    teacher_variables = opening.given(teacher_variables, teacher, feed.first)
  parallel.check_batch_size(
    len(feed.first["mask"]) * parallel.data_share(mesh)[1],
    mesh,
    microbatches=microbatches,
  )
  # One process prints and writes for all.
  lead = processes.lead()
  quiet = quiet or not lead
  name = name or ("distilling" if teacher is not None else "training")
  views: dict[str, Any] = dict(teacher_of=teacher_of, student_of=student_of)
  with progress.at(name, "setup", quiet=quiet):
    phase, state = opening.begin(
      student,
      teacher,
      goal,
      optimizer,
      feed.first,
      teacher_variables,
      seed=seed,
      mesh=mesh,
      partition=partition,
      teacher_partition=teacher_partition,
      variables=student_variables,
      microbatches=microbatches,
      gradients_by_group=gradients_by_group,
      transform=transform,
      shown=shown,
      layout=layout,
      **views,
    )
  frozen = phase.frozen
  evaluate = _evaluation(evaluate_on, phase, layout, clock, **views)
  with contextlib.ExitStack() as stack:
    told_to_stop = stack.enter_context(preemption.watched())
    saver, start = None, 0
    if folder is not None:
      saver = Saver(
        folder,
        feed,
        frozen,
        clock,
        keep_last=keep_last,
        keep_best=keep_best,
        metric="eval/nll" if evaluate is not None else None,
      )
      stack.callback(saver.close)
      start, state = saver.restore(state, name)
    bar = Progress(name, steps, clock, start=start, quiet=quiet)
    stack.callback(bar.close)
    note = lambda text: bar.note(f"{name}: {text}")  # noqa: E731
    note(opening.describe(phase, start, steps))
    if lies := opening.lies(state, frozen, table=show_sharding):
      note(lies)
    tracing = Profile(folder, profile, start=start, steps=steps, note=note)
    stack.callback(tracing.close)
    rows, of_step, plan = parallel.put_batch(feed.first, mesh), None, None
    if start < steps:
      with clock.at("compilation"):
        plan, words = opening.memory(phase, state, rows, settings or {})
        note(words)
        of_step = phase.flops(rows)
    writer, sinks = None, list[OnMetrics]()
    if folder is not None and lead:
      writer = stack.enter_context(Writer(folder, resume_step=start))
      sinks.append(writer)
      if plan is not None:
        files.write_json(folder / "memory.json", plan.figures())
    if on_metrics is not None and lead:
      sinks.append(loggers.guarded(on_metrics))
    account = Goodput(clock, folder if lead else None)
    meter = Meter(clock, len(rows["mask"]), list(mesh.devices.flat), of_step)
    stack.enter_context(Watchdog(clock, note, hang_minutes=hang_minutes))
    if saver is not None:  # first of all, so that the wait for it is watched
      stack.callback(saver.close)
    with clock.at("steps"):
      state, last = stepping.run(
        state,
        phase.step,
        frozen,
        lambda: parallel.put_batch(next(feed), mesh),
        start=start,
        report=stepping.Report(name, steps, bar, sinks, clock, meter, on_nan),
        profile=tracing,
        save_every=save_every,
        save_clock=SaveClock(save_minutes if saver is not None else 0),
        told_to_stop=told_to_stop,
        evaluate=evaluate,
        save=saver and _save(saver, writer, account),
      )
      if saver is not None:
        saver.wait()
    if start < steps:
      bar.close()
      note(account.write())
    if not last and evaluate is not None:
      with clock.at("evaluation"):
        last = evaluate(state)
  return Distilled(state, last)


def _check_counts(steps: int, save_every: int, save_minutes: float) -> None:
  if steps < 1 or save_every < 1 or save_minutes < 0:
    raise errors.UserError(
      f"got steps={steps}, save_every={save_every}, save_minutes="
      f"{save_minutes}: needs at least 1, 1 and 0"
    )


def _evaluation(
  batches: Iterable[Batch] | None,
  phase: opening.Phase,
  layout: fused.Layout,
  clock: Clock,
  *,
  teacher_of: TeacherOf,
  student_of: StudentOf,
) -> Callable[[TrainState], dict[str, float]] | None:
  """A state -> its `eval/<metric>`, where there are batches for it."""
  if batches is None:
    return None
  other = phase.teacher if phase.goal.comparable else None
  examine = make_evaluate(phase.student, other, phase.mesh, layout)

  def evaluate(state: TrainState) -> dict[str, float]:
    whole = student_of(state.params, phase.frozen), state.stats
    theirs = teacher_of(state, phase.frozen)
    got = examine(whole, theirs, clock.signs(batches))
    return {f"eval/{name}": value for name, value in got.items()}

  return evaluate


def _save(
  saver: Saver, writer: Writer | None, account: Goodput
) -> stepping.Save:
  """Keeps a state, what was measured until then, and the time it all took."""

  def save(
    step: int, state: TrainState, metrics: dict[str, float] | None
  ) -> None:
    if writer is not None:  # first: the run may go on from this checkpoint
      writer.send()
    saver.save(step, state, metrics)
    account.write()

  return save
