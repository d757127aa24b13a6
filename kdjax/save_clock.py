"""When to save by the clock: the decision of process 0, taken by all."""

import math
import time
from collections.abc import Callable

from kdjax import processes


class SaveClock:
  """Says after which steps a checkpoint is due.

  Process 0 tells the others whether it is, or after how many steps to ask
  again: as many as would take half of the time that is left, by the pace since
  the last question. So there are some ten messages between two checkpoints,
  however many steps there are, and none in a run of one process.

  Args:
    minutes: between two checkpoints; 0 means never.
    clock: seconds that only grow.
  """

  def __init__(
    self, minutes: float, clock: Callable[[], float] = time.monotonic
  ):
    self._interval = 60 * minutes if minutes else math.inf
    self._clock = clock
    self._saved = self._asked = clock()
    self._steps, self._wait = 0, 1  # since the question, until the next

  def due(self) -> bool:
    """To be called once after every step, by all processes."""
    self._steps += 1
    if math.isinf(self._interval) or self._steps < self._wait:
      return False
    now = self._clock()
    left = self._saved + self._interval - now
    pace = (now - self._asked) / self._steps  # seconds a step
    half = int(left / 2 / max(pace, 1e-6))
    wait = processes.of_first(max(half, 1) if left > 0 else 0)
    self._asked, self._steps, self._wait = now, 0, max(wait, 1)
    return wait == 0

  def saved(self) -> None:
    """To be called after every checkpoint, whatever it was made for."""
    self._saved = self._clock()
