"""A trace of a few steps, for TensorBoard's profile page or xprof."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from kdjax import errors, files, processes

# The first steps fill caches and queues.
WARM_UP = 3


class Profile:
  """Traces `num_steps` steps into `<folder>/profile`, on process 0 alone.

  The trace is of that process's devices; on a pod the others do the same. It
  lies in `plugins/profile/<time>`, where `tensorboard --logdir=<folder>` finds
  it. The steps after the first `WARM_UP` are taken, or the last where there are
  fewer. After the last one the host waits once for the device.

  Args:
    folder: of the run.
    num_steps: 0 traces nothing.
    start, steps: as for the loop.
    note: shows a line.

  Raises:
    UserError: there is no folder to write into.
  """

  def __init__(
    self,
    folder: str | Path | None,
    num_steps: int,
    *,
    start: int,
    steps: int,
    note: Callable[[str], None],
  ):
    if num_steps and folder is None:
      raise errors.UserError(
        f"profile is {num_steps} and there is no folder: give one for the "
        "trace, or set profile to 0"
      )
    self._folder = files.path(folder or ".") / "profile"
    self._note, self._running = note, False
    spare = max(steps - start - num_steps, 0)
    self._first = start + 1 + min(WARM_UP, spare)
    self._last = min(self._first + num_steps - 1, steps)
    self._wanted = num_steps > 0 and processes.lead()

  def before(self, step: int) -> None:
    if self._wanted and step == self._first:
      self._staged = files.Staged(self._folder)
      jax.profiler.start_trace(self._staged.here)
      self._running = True

  def after(self, step: int, measured: Any) -> None:
    """`measured` is the step's, and ready when the step has ended."""
    if self._running and step == self._last:
      jax.block_until_ready(measured)
      self.close()
      self._note(
        f"steps {self._first} to {self._last} are traced: tensorboard "
        f"--logdir={self._folder.parent}"
      )

  def close(self) -> None:
    if self._running:
      self._running = False
      jax.profiler.stop_trace()
      self._staged.close()
