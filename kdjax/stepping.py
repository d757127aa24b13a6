"""The steps of a run: one dispatched, the one before reported, and so on."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
from jaxtyping import PyTree

from kdjax import health
from kdjax.clock import Clock
from kdjax.loggers import OnMetrics
from kdjax.perf import EVERY, Meter
from kdjax.preemption import Preempted
from kdjax.profiling import Profile
from kdjax.progress import Progress
from kdjax.save_clock import SaveClock
from kdjax.train_step import TrainStep
from kdjax.types import Batch, TrainState

Metrics = dict[str, float]
# (step, state, its metrics; None where it was not evaluated)
Save = Callable[[int, TrainState, Metrics | None], None]


@dataclasses.dataclass
class Report:
  """Fetches, checks, writes and shows what a step measured.

  Attributes:
    name: of the run, before its notes.
    steps: of the run in all.
    bar: shows progress and notes.
    sinks: keep the metrics, or show them elsewhere.
    clock: is told that a step has ended.
    meter: how fast the steps were, added to what is written now and then.
    on_nan: one of `health.ON_NAN`.
    spikes: watches the loss.
  """

  name: str
  steps: int
  bar: Progress
  sinks: Sequence[OnMetrics]
  clock: Clock
  meter: Meter
  on_nan: str = "stop"
  spikes: health.Spikes = dataclasses.field(default_factory=health.Spikes)

  def update(self, step: int, measured: Mapping[str, Any]) -> Metrics:
    """Of a training step; waits until the device has made it.

    Raises:
      DivergedError: see `health.judge`.
    """
    values = fetch(measured)
    self.clock.tick()
    self._keep(step, values, self._figures(step))
    loss = values["loss/total"]
    if leap := self.spikes(step, loss):
      self.bar.note(f"{self.name}: {leap}")
    self.bar.update(step, loss)
    return values

  def evaluation(self, step: int, measured: Mapping[str, Any]) -> Metrics:
    """Of held-out data."""
    values = fetch(measured)
    self._keep(step, values, {})
    self.bar.evaluated(step, values)
    return values

  def _keep(self, step: int, values: Metrics, figures: Metrics) -> None:
    if skipped := health.judge(step, values, self.on_nan):
      self.bar.note(f"{self.name}: {skipped}")
    for sink in self.sinks:
      sink(step, values | figures)

  def _figures(self, step: int) -> Metrics:
    if step % EVERY and step != self.steps:
      return {}
    return self.meter.read()


def run(
  state: TrainState,
  step_fn: TrainStep,
  frozen: PyTree,
  next_batch: Callable[[], Batch],
  *,
  start: int,
  report: Report,
  profile: Profile,
  save_every: int,
  save_clock: SaveClock,
  told_to_stop: Callable[[], bool],
  evaluate: Callable[[TrainState], Metrics] | None = None,
  save: Save | None = None,
) -> tuple[TrainState, Metrics]:
  """Steps `start` + 1 to the last; returns the state and the last metrics.

  A step takes the next batch, whether or not the step before was skipped.

  Args:
    state, step_fn, frozen: of `jit_step`, with what it takes.
    next_batch: the batch of step `start` + 1, then the one after it, and so on;
      on the mesh.
    report: gets every step's metrics.
    profile: traces some of them.
    save_every: steps between evaluations and saves; the last has both.
    save_clock: says when else to save, without evaluation.
    told_to_stop: asked before every step.
    evaluate: what a state comes to on held-out data.
    save: begins to keep a state; is waited for by whoever made it.

  Raises:
    Preempted: told to stop, and the last step is being saved.
    DivergedError: see `health.judge`.
  """
  clock = report.clock
  pending, last = None, {}
  for step in range(start + 1, report.steps + 1):
    if told_to_stop():
      if pending is not None:
        report.update(*pending)
      new = step > start + 1
      with clock.at("saving"):
        _leave(step - 1, state, save, report.name, new=new)
    profile.before(step)
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
      with clock.at("input"):
        batch = next_batch()
      state, measured = step_fn(state, frozen, batch)
      # The device computes this step while the host reads the one before.
      if pending is not None:
        last = report.update(*pending)
    pending = step, measured
    profile.after(step, measured)
    evaluates = step % save_every == 0 or step == report.steps
    if save_clock.due() or evaluates:
      # Saved only once the step's own metrics were seen to be finite.
      last, pending = report.update(*pending), None
      if evaluates and evaluate is not None:
        with clock.at("evaluation"):
          last |= report.evaluation(step, evaluate(state))
      if save is not None:
        with clock.at("saving"):
          save(step, state, last if evaluates else None)
      save_clock.saved()
  return state, last


def _leave(
  step: int, state: TrainState, save: Save | None, name: str, *, new: bool
) -> NoReturn:
  """Saves what is new and ends the run."""
  told = f"{name}: stopped by SIGTERM at step {step}"
  if save is None:
    raise Preempted(f"{told}; there is no folder to save it into")
  if new:
    save(step, state, None)
  saved = "which is saved" if step else "where there is nothing to save"
  raise Preempted(f"{told}, {saved}; the same command goes on from here")


def fetch(measured: Mapping[str, Any]) -> Metrics:
  return {k: float(v) for k, v in jax.device_get(measured).items()}
