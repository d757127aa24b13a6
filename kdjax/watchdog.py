"""A run that no longer moves says where it stands, and can be ended."""

import faulthandler
import os
import sys
import threading
import traceback
from collections.abc import Callable
from types import TracebackType

from kdjax.clock import STEPPING, Clock

# sysexits.h's EX_PROTOCOL: the other side did not answer.
EXIT_CODE = 76
# No step for longer than FLOOR seconds and TIMES the median step is told of.
FLOOR, TIMES = 60.0, 20.0


class Watchdog:
  """A thread that looks at the clock while `with` lasts.

  When no step has ended for max(`FLOOR`, `TIMES` · median step) seconds, it
  notes once where the thread that made it stands. An evaluation and a save take
  longer than a step, and are not told of; but they too must move. Compilation
  and all else take as long as they take: the clock is told of them.

  Args:
    clock: of the run.
    note: shows a line, or several.
    hang_minutes: without a step, a batch of an evaluation or the end of a save
      for this long the process ends with `EXIT_CODE`, every thread's stack on
      stderr: a lost peer is otherwise waited for without end. Nothing is saved;
      the last checkpoint stays. 0 never ends it.
    leave: ends the process.
  """

  def __init__(
    self,
    clock: Clock,
    note: Callable[[str], None],
    *,
    hang_minutes: float = 0.0,
    leave: Callable[[int], object] = os._exit,
  ):
    self._clock, self._note, self._leave = clock, note, leave
    self._limit = hang_minutes * 60
    self._of = threading.get_ident()
    self._noted: int | None = None
    self._over = threading.Event()
    self._thread = threading.Thread(
      target=self._watch, name="kdjax-watchdog", daemon=True
    )

  def __enter__(self) -> "Watchdog":
    self._thread.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self._over.set()
    self._thread.join()

  def look(self) -> None:
    """Once: note, or end, where it is time to."""
    overdue, steps = self._clock.overdue(), self._clock.steps
    if overdue is None:
      return
    waited, median = overdue
    if self._limit and waited > self._limit:
      self._end(waited)
    stepping = self._clock.doing in STEPPING
    late = waited > max(FLOOR, TIMES * median)
    if stepping and late and self._noted != steps:
      self._noted = steps
      frame = sys._current_frames().get(self._of)
      stack = "".join(traceback.format_stack(frame)) if frame else ""
      self._note(
        f"no step has ended for {waited:.0f} s (median step {median:.2g} s), "
        f"at {self._clock.doing}; the host is here:\n{stack.rstrip()}"
      )

  def _end(self, waited: float) -> None:
    what = {
      "evaluation": "no batch of the evaluation has come",
      "saving": "no save has ended",
    }.get(self._clock.doing, "no step has ended")
    print(
      f"kdjax: {what} for {waited / 60:.3g} minutes, at "
      f"{self._clock.doing} (hang_minutes is {self._limit / 60:.3g}): this "
      f"process ends with code {EXIT_CODE}. Another process of the run may be "
      "lost; started again, it goes on from its last checkpoint",
      file=sys.stderr,
      flush=True,
    )
    # Under a test's capture stderr has no file of its own.
    file = sys.__stderr__ or sys.stderr
    faulthandler.dump_traceback(file=file, all_threads=True)
    self._leave(EXIT_CODE)

  def _watch(self) -> None:
    limits = [FLOOR, *([self._limit] if self._limit else [])]
    while not self._over.wait(min(1.0, min(limits) / 4)):
      self.look()
