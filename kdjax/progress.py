"""How far a run is: a line that moves on a terminal, plain lines in a log."""

import contextlib
import os
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TextIO

from kdjax.clock import STEPPING, Clock

_DRAW = 0.1  # seconds between two drawings
_IDLE = 1.0  # the same, while nothing happens
_BAR = 30  # columns at most


class Progress:
  """What a run is at, in the last line of a terminal.

      distilled (seed 0)  42% ━━━━━━━━━────────────  252/600  loss 0.3393 ...

  It is drawn at the steps and each second between them, so that a long
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
    self._file, self._quiet = file or sys.stderr, quiet
    self._every, self._step, self._loss = every_seconds, start, None
    self._first: tuple[int, float] | None = None
    self._rate = 0.0
    self._drawn = self._told = time.monotonic()
    self._lock, self._closed = threading.RLock(), threading.Event()
    self._live = not quiet and self._file.isatty()
    if self._live:
      self._draw()
      threading.Thread(target=self._keep_drawing, daemon=True).start()

  def update(self, step: int, loss: float) -> None:
    """After update `step` (counted from 1)."""
    now = time.monotonic()
    self._step, self._loss = step, loss
    # The first step counts from its end: before it lies the compilation.
    self._first = self._first or (step, now)
    if step > self._first[0]:
      self._rate = (step - self._first[0]) / max(now - self._first[1], 1e-9)
    last = step >= self._steps
    if self._live:
      if last or now - self._drawn >= _DRAW:
        self._draw()
    elif not self._quiet and (last or now - self._told >= self._every):
      self._told = now
      line = ", ".join(self._fields())
      print(f"{self._name}: step {line}", file=self._file, flush=True)

  def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
    """A line of what step `step` came to on held-out data."""
    shown = ", ".join(
      f"{name.removeprefix('eval/')} {value:.4g}"
      for name, value in metrics.items()
    )
    self.note(f"{self._name}: step {step}: {shown}")

  def note(self, text: str) -> None:
    """A line that stays, above the one that moves."""
    if self._quiet:
      return
    with self._lock:
      if self._live:
        self._erase()
        text = _wrapped(text, self._columns())
      print(text, file=self._file, flush=True)
      if self._live and not self._closed.is_set():
        self._draw()

  def close(self) -> None:
    """Leaves the line as it is, where there were steps."""
    if not self._live or self._closed.is_set():
      return
    with self._lock:
      self._closed.set()
      self._erase()
      if self._loss is not None:
        print(self._line(), file=self._file, flush=True)

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _keep_drawing(self) -> None:
    while not self._closed.wait(_IDLE):
      with self._lock:
        if not self._closed.is_set():
          self._draw()

  def _draw(self) -> None:
    with self._lock:
      self._drawn = time.monotonic()
      # Padded: what was longer before is drawn over.
      line = self._line().ljust(self._columns() - 1)
      self._file.write(f"\r{line}")
      self._file.flush()

  def _erase(self) -> None:
    self._file.write("\r" + " " * (self._columns() - 1) + "\r")

  def _line(self) -> str:
    columns = self._columns() - 1
    doing, since = self._clock.current()
    if doing not in STEPPING and not self._closed.is_set():
      return f"{self._name}  {doing} {_clock(since)}"[:columns]
    line, rest = self._name, self._fields()
    share = self._step / max(self._steps, 1)
    line += f" {share:4.0%}"
    told = ""
    while rest and len(line) + len(told) + 2 + len(rest[0]) <= columns:
      told += f"  {rest.pop(0)}"
    width = min(columns - len(line) - len(told) - 1, _BAR)
    if width >= 5:
      full = round(share * width)
      line += " " + self._sign("━", "#") * full
      line += self._sign("─", ".") * (width - full)
    return (line + told)[:columns]

  def _fields(self) -> list[str]:
    """What is said of the steps, what matters most first."""
    fields = [f"{self._step}/{self._steps}"]
    if self._loss is not None:
      fields.append(f"loss {self._loss:.4f}")
    if self._rate:
      left = (self._steps - self._step) / self._rate
      fields += [f"{_clock(left)} left", f"{self._rate:.3g} steps/s"]
    return fields

  def _columns(self) -> int:
    try:
      return os.get_terminal_size(self._file.fileno()).columns or 80
    except (OSError, ValueError):
      return shutil.get_terminal_size().columns

  def _sign(self, nice: str, plain: str) -> str:
    try:
      nice.encode(self._file.encoding or "ascii")
    except (UnicodeError, LookupError):
      return plain
    return nice


@contextlib.contextmanager
def at(name: str, what: str, *, quiet: bool = False) -> Iterator[None]:
  """A terminal shows what is done, and for how long; afterwards it does not."""
  clock = Clock()
  with clock.at(what), Progress(name, 0, clock, quiet=quiet):
    yield


def _wrapped(text: str, columns: int) -> str:
  """Broken between words; a table stays as it is."""
  if "\n" in text:
    return text
  return textwrap.fill(
    text, columns - 1, subsequent_indent="  ", break_on_hyphens=False
  )


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (
    f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
  )
