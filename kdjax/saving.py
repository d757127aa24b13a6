"""What a run keeps to go on from: its state, and where its input stood."""

import functools
import sys
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from kdjax import checkpoint, errors, processes
from kdjax.clock import Clock
from kdjax.feed import Feed
from kdjax.types import TrainState


class Saver:
  """Checkpoints of a run, with the position of its input.

  Args:
    folder: of the run.
    feed: its input.
    frozen: whose fingerprint a checkpoint has, to go on with the same alone.
    clock: is told of the time that it takes.
    keep: as for `checkpoint.Checkpointer`.
  """

  def __init__(
    self, folder: Path, feed: Feed, frozen: PyTree, clock: Clock, **keep: Any
  ):
    self._feed, self._clock = feed, clock
    self._facts = {"teacher": checkpoint.fingerprint(frozen)}
    self._kept = checkpoint.Checkpointer(folder / "checkpoints", **keep)

  def restore(self, state: TrainState, name: str) -> tuple[int, TrainState]:
    """The step and state of the newest sound checkpoint; the input goes there.

    The step counts batches. The state's own counts updates, and skipped batches
    made none.

    Raises:
      UserError: it was trained with another teacher.
    """
    tell = functools.partial(print, file=sys.stderr)
    with self._clock.at("restoring"):
      restored = self._kept.restore(
        state, note=tell if processes.lead() else lambda _: None
      )
    if restored is None:
      return 0, state
    before, now = restored.facts["teacher"], self._facts["teacher"]
    if before != now:
      raise errors.UserError(
        f"{name}: the checkpoint was trained with another teacher (fingerprint "
        f"{before}, now {now}): use the same teacher, or another workdir"
      )
    self._feed.go_to(restored.position, restored.step)
    return restored.step, restored.state

  def save(
    self, step: int, state: TrainState, metrics: dict[str, float] | None
  ) -> None:
    """Begins to keep a state; metrics where it was evaluated."""
    self._kept.save(
      step,
      state,
      position=self._feed.position,
      facts=self._facts,
      metrics=metrics,
    )

  def wait(self) -> None:
    """Returns when the last save is on disk; raises what made it fail."""
    with self._clock.at("saving"):
      self._kept.wait()

  def close(self) -> None:
    """Waits, then frees the threads; a second time it does nothing."""
    with self._clock.at("saving"):
      self._kept.close()
