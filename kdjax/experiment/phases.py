"""The phases that every experiment has: teacher, student alone, distilled."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

import kdjax.config as configuration
from kdjax import (
  checkpoint,
  errors,
  examples,
  loggers,
  objective,
  parallel,
  processes,
  progress,
)
from kdjax.clock import Clock
from kdjax.config import Optimizer
from kdjax.loggers import Logger, OnMetrics
from kdjax.losses import fused
from kdjax.objective import Objective
from kdjax.train_state import init_state
from kdjax.train_step import TrainStep, make_train_step
from kdjax.types import Batch, Model, TrainState, Variables
from kdjax.watchdog import Watchdog

# The same batches, each of which is a sign that something moves.
Signs = Callable[[Iterable[Batch]], Iterable[Batch]]


class Experiment(Protocol):
  """What `run` needs: the data and networks of a config.

  Attributes:
    config: the whole.
    loaded: the teacher's variables, None where it is to be trained.
    train: trains the network of a phase, from where it was; one that has
      `finished` is read, and not evaluated on the way.
    stored: the teacher's variables as the student's phases read them.
    measure: what a phase's network comes to on held-out data, in all and on
      each example; its batches go through `signs`.
  """

  config: Any
  loaded: Variables | None

  def train(
    self,
    phase: str,
    folder: Path,
    seed: int,
    frozen: PyTree = (),
    on_metrics: OnMetrics | None = None,
    *,
    finished: bool = False,
  ) -> Variables: ...

  def stored(self, variables: Variables) -> Variables: ...

  def measure(
    self, phase: str, variables: Variables, frozen: PyTree, signs: Signs
  ) -> tuple[dict[str, Any], examples.Facts]: ...


def run(
  experiment: Experiment,
  folder: Path,
  seed: int,
  opens: Sequence[Logger] = (),
) -> dict[str, dict[str, Any]]:
  """One seed: teacher, student alone, student distilled; then the numbers.

  Args:
    experiment: of a config.
    folder: of the seed.
    seed: of initialisation, of the data's order and of dropout.
    opens: loggers, opened for each phase that trains.
  """

  def train(phase: str, name: str, frozen: PyTree = ()) -> Variables:
    config, inside = experiment.config, folder / name
    done = max(checkpoint.steps(inside / "checkpoints"), default=0)
    finished = done >= config.phases[phase].steps
    needed = () if finished else opens
    with loggers.opened(needed, inside, config.to_dict()) as on_metrics:
      return experiment.train(
        phase, inside, seed, frozen, on_metrics, finished=finished
      )

  measured = {}

  def measure(phase: str, name: str, variables: Variables) -> None:
    quiet = not processes.lead()
    clock, minutes = Clock(), experiment.config.hang_minutes
    with (
      progress.at(f"{phase} (seed {seed})", "measuring", quiet=quiet),
      Watchdog(clock, lambda _: None, hang_minutes=minutes),
      clock.at("evaluation"),
    ):
      measured[name], facts = experiment.measure(
        phase, variables, frozen, clock.signs
      )
    if processes.lead():
      examples.write(folder / name / examples.NAME, facts)

  frozen = experiment.loaded
  if frozen is None:
    frozen = train("teacher", "teacher")
  frozen = experiment.stored(frozen)
  measure("teacher", "teacher", frozen)
  for phase in ("alone", "distilled"):
    if experiment.config.phases[phase].steps:
      name = f"student_{phase}"
      measure(phase, name, train(phase, name, frozen))
  return measured


def share(mesh: Mesh) -> dict[str, int]:
  """Which rows of a batch this process reads, for the functions of `data`."""
  block, blocks = parallel.data_share(mesh)
  return dict(process_index=block, process_count=blocks)


def optimizers(config: Any, mesh: Mesh) -> dict[str, Optimizer]:
  """The optimizer of each phase, all of whose parts the devices divide."""
  for phase in config.phases.values():
    parallel.check_batch_size(
      config.data.batch_size, mesh, microbatches=phase.microbatches
    )
  return {
    name: configuration.optimizer(phase.optimizer, f"phases.{name}.optimizer")
    for name, phase in config.phases.items()
  }


def eval_rows(config: Any, mesh: Mesh) -> int:
  """Rounded up to the devices: what is added is padding, and masked."""
  parts = parallel.batch_parts(mesh)
  return -(-config.data.eval_batch_size // parts) * parts


def check_goal(config: Any, goal: Objective, *, key: str) -> None:
  """Refuses an objective that cannot be, and a config without a teacher.

  Args:
    key: of `config.teacher`, where a trained one is named.
  """
  steps = config.phases.distilled.steps
  objective.check(goal, max(steps, 1), has_teacher=True)
  if not (config.teacher[key] or config.phases.teacher.steps):
    raise errors.UserError(
      f"phases.teacher.steps is 0 and teacher.{key} is empty: train a teacher, "
      "or name one"
    )


def batch_shapes(rows: Mapping[str, Any], batch_size: int) -> Batch:
  """Those of a whole batch of rows like these."""
  return {
    name: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype)
    for name, x in rows.items()
  }


class Parts(NamedTuple):
  """What the distilled step of a config is made of, as shapes.

  Attributes:
    student, teacher, goal: as for `make_train_step`.
    rule: the optimizer.
    batch: the whole one, of shapes.
    frozen, variables: as for `init_state`, of shapes.
    microbatches, transform: as for `make_train_step`.
    views: its `teacher_of` and `student_of`, where they are not the usual ones.
  """

  student: Model
  teacher: Model
  goal: Objective
  rule: Optimizer
  batch: Batch
  frozen: PyTree
  variables: PyTree = None
  microbatches: int = 1
  transform: Callable[[Batch, Array], Batch] | None = None
  views: Mapping[str, Any] = {}


def begun(parts: Parts) -> TrainState:
  """The state before the first update, as shapes."""

  def begin(batch: Batch, frozen: PyTree, variables: PyTree) -> TrainState:
    return init_state(
      parts.student,
      parts.teacher,
      parts.goal,
      parts.rule.transformation,
      jax.random.key(0),
      batch,
      frozen=frozen,
      variables=variables,
      **parts.views,
    )

  given = dict(parts.batch), parts.frozen, parts.variables
  return jax.eval_shape(begin, *given)


def step_of(parts: Parts, layout: fused.Layout | None) -> TrainStep:
  """The step that is made of them.

  Args:
    layout: as for `make_train_step`.
  """
  return make_train_step(
    parts.student,
    parts.teacher,
    parts.goal,
    parts.rule.transformation,
    microbatches=parts.microbatches,
    gradients_by_group=parts.rule.by_group,
    transform=parts.transform,
    shown={"learning_rate": parts.rule.learning_rate},
    layout=layout,
    **parts.views,
  )


def trace(parts: Parts, layout: fused.Layout | None = None) -> None:
  """Follows the shapes through the distilled step, so that they do fit."""
  step = step_of(parts, layout)
  jax.eval_shape(step, begun(parts), parts.frozen, parts.batch)


def of_distill(
  config: Any, phase: str, seed: int, rule: Optimizer
) -> dict[str, Any]:
  """The arguments of `distill` that say nothing of data and networks."""
  return dict(
    steps=config.phases[phase].steps,
    microbatches=config.phases[phase].microbatches,
    optimizer=rule.transformation,
    gradients_by_group=rule.by_group,
    shown={"learning_rate": rule.learning_rate},
    settings={"phase": phase, **configuration.flat(config.to_dict())},
    seed=seed,
    show_sharding=config.show_sharding,
    save_every=config.save_every,
    save_minutes=config.save_minutes,
    keep_last=config.keep_last,
    keep_best=config.keep_best,
    on_nan=config.on_nan,
    profile=config.profile,
    hang_minutes=config.hang_minutes,
    name=f"{phase} (seed {seed})",
  )
