"""A run's folder of checkpoints, written in the background.

A checkpoint is the folder `<directory>/<step>`: in `state` Orbax holds the
arrays, each process writing its own part; in `meta` a JSON of process 0 holds
everything else, with a checksum for each array and one for itself. Orbax alone
returns a flipped byte as a value and does not look past a newest checkpoint
that it cannot read (`newest` does).
"""

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import orbax.checkpoint as ocp

from kdjax import processes
from kdjax.checkpoint import arrays, disk, loops, newest
from kdjax.checkpoint.newest import Note, Position, Restored
from kdjax.errors import UserError, unknown
from kdjax.types import TrainState


class Checkpointer:
  """Writes the checkpoints of one run in the background.

  Only one run may write into a folder at a time: opening an existing one
  removes what a killed run left half-written. To read the folder of a run that
  may be alive, use `restore` and `load_params`, which change nothing. A run of
  several processes makes one of these in each and calls its methods in all.

  Args:
    directory: where the numbered folders go; made by the first `save`.
    keep_last: how many of the newest to keep, at least 1.
    keep_best: how many of the best by `metric` to keep beside them.
    metric: a name in what `save` gets as metrics, such as "eval/nll". A
      checkpoint without it, or where it is not finite, is never a best one.
    higher_is_better: whether the best is the largest.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    keep_last: int = 2,
    keep_best: int = 1,
    metric: str | None = None,
    higher_is_better: bool = False,
  ):
    if keep_last < 1 or keep_best < 0:
      raise UserError(
        f"got keep_last={keep_last}, keep_best={keep_best}: needs at least 1 "
        "and 0; a run without a newest checkpoint cannot be resumed"
      )
    self._directory = newest.absolute(directory)
    self._keep = _Keep(keep_last, keep_best, {})
    self._metric, self._sign = metric, 1 if higher_is_better else -1
    self._sound: set[int] = set()  # steps written or verified by this object
    self._resumed: int | None = None
    self._manager: ocp.CheckpointManager | None = None
    self._saving = 0, 0  # step, bytes
    self._failed = False
    self._barrier = disk.Barrier()
    if processes.of_first(self._directory.exists()):
      self._open()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  @property
  def steps(self) -> list[int]:
    """The complete checkpoints, oldest first."""
    return newest.steps(self._directory)

  def save(
    self,
    step: int,
    state: TrainState,
    *,
    position: Position = None,
    facts: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
  ) -> None:
    """Copies the state to the hosts, starts writing it, and returns.

    The caller may donate the state at once. A save that is still being written
    is waited for; its failure is raised here or in `wait`. A step that this
    object has already saved or restored is skipped; one of unknown origin is
    written anew.

    Args:
      step: number of batches taken.
      state: arrays over any devices of any processes.
      position: of this process's input, as JSON (keys become strings, tuples
        lists) or bytes.
      facts: JSON; whatever a later run must compare, such as the teacher's
        fingerprint.
      metrics: name -> number, or None when nothing was evaluated.

    Raises:
      UserError: the folder holds a newer step that was not resumed from,
        `metrics` lacks the metric to keep the best by, or the folder cannot be
        written into.
    """
    metrics = {name: float(value) for name, value in (metrics or {}).items()}
    if metrics and self._metric is not None and self._metric not in metrics:
      raise unknown("metric", self._metric, metrics)
    manager = self._open()
    self.wait()
    have = processes.of_first(self.steps)
    if step in self._sound and step in have:
      return
    self._make_way(manager, step, have)
    self._score(step, metrics)
    values, records = arrays.to_save(state)
    meta = {
      "step": step,
      "position": newest.packed(position),
      "facts": dict(facts or {}),
      "metrics": metrics,
      "arrays": records,
    }
    self._saving = step, sum(x.nbytes for x in values.values())
    with self._told():
      manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(values),
          meta=ocp.args.JsonSave(newest.sealed(meta)),
        ),
        force=True,
      )
    self._sound.add(step)

  def restore(self, like: TrainState, note: Note = print) -> Restored | None:
    """`restore` of this folder; training then goes on from what it returns.

    Newer checkpoints, which it found damaged, are removed by the next `save`.
    """
    self.wait()
    restored = newest.restore(self._directory, like, note)
    if restored is not None:
      self._resumed = restored.step
      self._sound = {restored.step}
    return restored

  def wait(self) -> None:
    """Returns when the last save is on disk; raises what made it fail."""
    if self._manager is None:
      return
    with self._told():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then frees the threads."""
    try:
      self.wait()
    finally:
      manager, self._manager = self._manager, None
      if manager is not None:
        # After a failure that was told, Orbax raises it again.
        with contextlib.suppress(*[Exception] * self._failed):
          manager.close()

  def _open(self) -> ocp.CheckpointManager:
    if self._manager is None:
      logging.getLogger("absl").addFilter(_not_of_orbax)
      loops.see_to_the_end()
      with self._told():
        self._manager = _Manager(
          self._directory,
          options=ocp.CheckpointManagerOptions(
            preservation_policy=self._keep,
            cleanup_tmp_directories=True,
            save_root_metadata=False,
            async_options=ocp.AsyncOptions(barrier_sync_fn=self._barrier),
          ),
        )
      for step in self.steps if self._metric else []:
        # What is damaged cannot be a best one; `restore` reports it.
        with contextlib.suppress(Exception):
          meta = newest.read_meta(self._directory / str(step))
          self._score(step, meta["metrics"])
    return self._manager

  def _score(self, step: int, metrics: Mapping[str, float]) -> None:
    self._keep.scores.pop(step, None)
    value = metrics.get(self._metric or "", math.nan)
    if math.isfinite(value):
      self._keep.scores[step] = self._sign * value

  @contextlib.contextmanager
  def _told(self) -> Iterator[None]:
    """Turns what a full or forbidden disk raises into a line for the user."""
    try:
      yield
    except BaseException as error:
      self._failed = True
      self._barrier.fail()
      if self._manager is not None:
        # Orbax has struck the old steps off its list before it wrote the new.
        self._manager.reload()
      step, size = self._saving
      self._sound.discard(step)
      trouble = disk.trouble(
        error, self._directory, step=step, size=size, steps=self.steps
      )
      if trouble is None:
        raise
      raise trouble from error

  def _make_way(
    self, manager: ocp.CheckpointManager, step: int, have: Sequence[int]
  ) -> None:
    """Removes what `restore` found damaged, and a `step` of unknown origin."""
    at = math.inf if self._resumed is None else self._resumed
    old = [s for s in have if s not in self._sound]
    damaged = [s for s in old if s > at]
    last = max(set(have) - set(damaged), default=step)
    if step < last:
      raise UserError(
        f"cannot save step {step}: {self._directory} holds step {last}, "
        "which this run has not reached; resume from it, or use an empty folder"
      )
    for s in damaged:
      manager.delete(s)
    if step in old and step not in damaged:
      manager.delete(step)


class _Manager(ocp.CheckpointManager):
  """Orbax's, which asks for a preemption too, and at steps that are past.

  What it then tells JAX's service of the step would mislead the loop's own
  question (`kdjax.preemption`).
  """

  def reached_preemption(self, step: int) -> bool:
    return False


class _Keep(NamedTuple):
  """Orbax's preservation policy: the newest, and the highest scores.

  Not `best_fn`: with it Orbax deletes the newest checkpoint when enough older
  ones are better. Nor Orbax's own metrics: a manager with a policy forgets them
  when the process ends.
  """

  last: int
  best: int
  scores: dict[int, float]  # by step, higher is better, finite

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    steps = sorted(checkpoint.step for checkpoint in checkpoints)
    scored = sorted((self.scores[s], s) for s in steps if s in self.scores)
    best = [step for _, step in scored[::-1][: self.best]]
    kept = {*steps[-self.last :], *best}
    return [checkpoint.step in kept for checkpoint in checkpoints]


def _not_of_orbax(record: logging.LogRecord) -> bool:
  """Leaves out what Orbax logs: each of its failures is raised here too."""
  return "orbax" not in record.pathname
