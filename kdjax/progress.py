"""How far a run is: a line that moves on a terminal, plain lines in a log."""

import contextlib
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from typing import TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from kdjax.clock import STEPPING, Clock

_BAR = 30  # columns at most


class Progress:
  """What a run is at, in the last line of a terminal.

      distilled (seed 0)  42% ━━━━━━━━━────────────  252/600  loss 0.3393 ...

  A thread of its own draws it, so that a step costs nothing and a long
  compilation is seen to go on. Where the output is no terminal there is a plain
  line now and then instead.

  Args:
    name: of the run.
    steps: of the run in all; 0 has none.
    clock: says what the host is at.
    start: the step that it goes on from.
    quiet: shows nothing.
    file: default, stderr.
    every_seconds: between two lines in a log.
  """

  def __init__(
    self,
    name: str,
    steps: int,
    clock: Clock | None = None,
    *,
    start: int = 0,
    quiet: bool = False,
    file: TextIO | None = None,
    every_seconds: float = 10.0,
  ):
    self._name, self._steps, self._clock = name, steps, clock or Clock()
    self._step, self._loss = start, None
    self._first: tuple[int, float] | None = None
    self._rate, self._closed = 0.0, False
    self._every, self._told = every_seconds, time.monotonic()
    out = file or sys.stderr
    # Without force_*, FORCE_COLOR or a notebook makes a terminal of a log.
    self._console = Console(
      file=out,
      quiet=quiet,
      force_terminal=out.isatty(),
      force_jupyter=False,
      markup=False,
      emoji=False,
      highlight=False,
    )
    # What else is printed to a terminal goes above the line, to a pipe not.
    self._live = Live(
      get_renderable=self._line,
      console=self._console,
      refresh_per_second=10,
      redirect_stdout=sys.stdout.isatty(),
      redirect_stderr=sys.stderr.isatty(),
    )
    if not quiet and self._console.is_interactive:
      self._live.start(refresh=True)
      # Seen all the time: a process that is killed could not bring it back.
      self._console.show_cursor()

  def update(self, step: int, loss: float) -> None:
    """After update `step` (counted from 1)."""
    now = time.monotonic()
    self._step, self._loss = step, loss
    # The first step counts from its end: before it lies the compilation.
    self._first = self._first or (step, now)
    if step > self._first[0]:
      self._rate = (step - self._first[0]) / max(now - self._first[1], 1e-9)
    if self._live.is_started:
      return
    if step >= self._steps or now - self._told >= self._every:
      self._told = now
      self.note(f"{self._name}: step {', '.join(self._fields())}")

  def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
    """A line of what step `step` came to on held-out data."""
    shown = ", ".join(
      f"{name.removeprefix('eval/')} {value:.4g}"
      for name, value in metrics.items()
    )
    self.note(f"{self._name}: step {step}: {shown}")

  def note(self, text: str) -> None:
    """A line that stays, above the one that moves."""
    if self._console.is_interactive and "\n" not in text:
      text = textwrap.fill(
        text,
        self._console.width,
        subsequent_indent="  ",
        break_on_hyphens=False,
      )
    # As it is: a log's lines and tables are not broken.
    self._console.print(text, soft_wrap=True)

  def close(self) -> None:
    """Leaves the line as it is, where there were steps."""
    self._closed = True
    self._live.transient = self._loss is None
    self._live.stop()

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _line(self) -> RenderableType:
    doing, since = self._clock.current()
    columns = self._console.width - len("^C")  # which stays in the line
    if doing not in STEPPING and not self._closed:
      return f"{self._name}  {doing} {_clock(since)}"[:columns]
    total, fields = max(self._steps, 1), self._fields()
    head = f"{self._name} {self._step / total:4.0%}"
    # What matters less goes first; the bar has what is left.
    while fields and len("  ".join([head, *fields])) > columns:
      fields.pop()
    told = "  ".join(fields)
    width = min(_BAR, columns - len(head) - len(told) - len("   "))
    if width < 5:
      return f"{head}  {told}"[:columns]
    row = Table.grid(padding=(0, 1))
    row.add_row(head, ProgressBar(total, self._step, width), f" {told}")
    return row

  def _fields(self) -> list[str]:
    """What is said of the steps, what matters most first."""
    fields = [f"{self._step}/{self._steps}"]
    if self._loss is not None:
      fields.append(f"loss {self._loss:.4f}")
    if self._rate:
      left = (self._steps - self._step) / self._rate
      fields += [f"{_clock(left)} left", f"{self._rate:.3g} steps/s"]
    return fields


@contextlib.contextmanager
def at(name: str, what: str, *, quiet: bool = False) -> Iterator[None]:
  """A terminal shows what is done, and for how long; afterwards it does not."""
  clock = Clock()
  with clock.at(what), Progress(name, 0, clock, quiet=quiet):
    yield


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (
    f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
  )
