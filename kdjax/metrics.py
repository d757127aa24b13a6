"""Where numbers go: jsonl, TensorBoard, and the terminal."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import tqdm
from tensorboardX import SummaryWriter
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore


class Writer:
  """Writes `{name: number}` of a step to `metrics.jsonl` and TensorBoard.

  What an interrupted run wrote after the step it resumes from is dropped, so a
  file holds every step once. A number that is not finite is null in the one and
  absent from the other.
  """

  def __init__(self, folder: Path, *, resume_step: int = 0):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    _drop_after(path, resume_step)
    self._jsonl = path.open("a")
    self._events = SummaryWriter(
      str(folder / "tensorboard"), purge_step=resume_step + 1
    )
    assert self._events.file_writer is not None
    self._writer = self._events.file_writer

  def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
    line = {"step": step, **{k: _finite(v) for k, v in metrics.items()}}
    self._jsonl.write(json.dumps(line) + "\n")
    self._jsonl.flush()
    # One event for all: `add_scalar` makes one each, which takes longer than
    # everything else that the host does in a step.
    summary = Summary(
      value=[
        Summary.Value(tag=name, simple_value=value)
        for name, value in metrics.items()
        if math.isfinite(value)
      ]
    )
    self._writer.add_summary(summary, step)

  def __enter__(self) -> "Writer":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self._jsonl.close()
    self._events.close()


class Progress:
  """A bar on a terminal; elsewhere, or in a log, a plain line now and then."""

  def __init__(
    self,
    name: str,
    steps: int,
    *,
    start: int = 0,
    quiet: bool = False,
    file: TextIO | None = None,
    every_seconds: float = 10.0,
  ):
    self._name, self._steps, self._quiet = name, steps, quiet
    self._file = file or sys.stderr
    self._every, self._start = every_seconds, start
    self._began = self._last = time.monotonic()
    self._bar = None
    if not quiet and self._file.isatty():
      self._bar = tqdm.tqdm(
        total=steps,
        initial=start,
        desc=f"{name:<10}",
        unit="step",
        file=self._file,
        dynamic_ncols=True,
        leave=True,
      )

  def update(self, step: int, loss: float) -> None:
    """After update `step` (counted from 1)."""
    if self._bar is not None:
      self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
      self._bar.update(step - self._bar.n)
      return
    now = time.monotonic()
    if self._quiet or (now - self._last < self._every and step < self._steps):
      return
    self._last = now
    rate = (step - self._start) / max(now - self._began, 1e-9)
    left = (self._steps - step) / max(rate, 1e-9)
    print(
      f"{self._name}: step {step}/{self._steps}, loss {loss:.4f}, "
      f"{rate:.1f} steps/s, {_clock(left)} left",
      file=self._file,
      flush=True,
    )

  def note(self, text: str) -> None:
    """A line that does not break the bar."""
    if self._quiet:
      return
    if self._bar is not None:
      self._bar.write(text, file=self._file)
    else:
      print(text, file=self._file, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


def write_json(path: Path, value: Any) -> None:
  """Whole or not at all, whatever kills the process."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + ".part")
  with part.open("w") as file:
    json.dump(value, file, indent=2)
    file.write("\n")
    file.flush()
    os.fsync(file.fileno())
  part.replace(path)


def _drop_after(path: Path, step: int) -> None:
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines():
    try:
      if json.loads(line)["step"] <= step:
        kept.append(line + "\n")
    except (ValueError, KeyError):  # cut off in the middle by a kill
      continue
  part = path.with_name(path.name + ".part")
  part.write_text("".join(kept))
  part.replace(path)


def _finite(value: float) -> float | None:
  return float(value) if math.isfinite(value) else None  # JSON has no NaN


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (
    f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
  )
