"""Where the wall time of a run goes, and when it last moved."""

import collections
import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

# In these the next step is near.
STEPPING = ("steps", "input")
# In these and those something is to be expected, in all others nothing.
_MOVING = ("evaluation", "saving")

T = TypeVar("T")


class Clock:
  """Seconds by what the host is at. It is at one thing at a time.

      clock = Clock()                  # at "setup"
      with clock.at("steps"):
        with clock.at("input"): ...    # not counted as "steps"
        clock.tick()                   # a step has ended

  Attributes:
    doing: what the host is at.
    steps: how many have ended.
  """

  def __init__(self, now: Callable[[], float] = time.monotonic):
    self._now, self._seconds = now, dict[str, float]()
    self._since = self._sign = now()
    self._durations: collections.deque[float] = collections.deque(maxlen=64)
    self._ticked = 0.0
    self.doing, self.steps = "setup", 0

  @contextlib.contextmanager
  def at(self, what: str) -> Iterator[None]:
    """The host is at `what`, and afterwards where it was before."""
    before = self.doing
    self._turn(what)
    try:
      yield
    finally:
      self._turn(before)

  def current(self) -> tuple[str, float]:
    """What the host is at, and for how many seconds it has been."""
    return self.doing, self._now() - self._since

  def tick(self) -> None:
    """A step has ended."""
    spent = self.read()
    stepping = sum(spent.get(what, 0.0) for what in STEPPING)
    self._durations.append(stepping - self._ticked)
    self._ticked, self._sign = stepping, self._now()
    self.steps += 1

  def signs(self, items: Iterable[T]) -> Iterator[T]:
    """The same items; that one is there is a sign that something moves."""
    for item in items:
      self._sign = self._now()
      yield item

  def read(self) -> dict[str, float]:
    """Seconds by what the host was at until now; together the wall time."""
    running = {self.doing: self._now() - self._since}
    return {
      what: self._seconds.get(what, 0.0) + running.get(what, 0.0)
      for what in {**self._seconds, **running}
    }

  def overdue(self) -> tuple[float, float] | None:
    """How long nothing has moved, and the median step; None amid else.

    Among steps that is since the last one ended; in an evaluation since it
    began or took a batch, in a save since it began to be waited for.
    """
    if self.doing not in (*STEPPING, *_MOVING):
      return None
    # A copy: this is asked from another thread.
    durations = list(self._durations)
    median = statistics.median(durations) if durations else 0.0
    return self._now() - self._sign, median

  def _turn(self, what: str) -> None:
    now = self._now()
    spent = self._seconds.get(self.doing, 0.0)
    self._seconds[self.doing] = spent + now - self._since
    if not {self.doing, what} <= {*STEPPING}:
      self._sign = now
    self.doing, self._since = what, now
