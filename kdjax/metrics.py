"""Where numbers go: jsonl and TensorBoard."""

import contextlib
import json
import math
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from kdjax import files

NAME = "metrics.jsonl"
_SHOWN_AFTER = 60.0  # seconds in which TensorBoard sees an event


class Writer:
  """Writes `{name: number}` of a step to `metrics.jsonl` and TensorBoard.

  What an interrupted run wrote after the step it resumes from is dropped, so a
  file holds every step once. A number that is not finite is null in the one and
  absent from the other. In a bucket it is there from the next `send` on.
  """

  def __init__(self, folder: Path, *, resume_step: int = 0):
    self._staged = files.Staged(folder)
    here = self._staged.here
    self._path = here / NAME
    files.write(self._path, _until(folder / NAME, resume_step))
    with files.room(here):
      self._jsonl = self._path.open("a")
      self._events = _Events(here / "tensorboard", resume_step)
    self.send()  # so that a bucket that refuses it does so now

  def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
    line = {"step": step, **{k: _finite(v) for k, v in metrics.items()}}
    with files.room(self._path):
      self._jsonl.write(json.dumps(line) + "\n")
      self._jsonl.flush()
      self._events.add(step, metrics)

  def send(self) -> None:
    """Brings all until now to the bucket, where the folder is one's."""
    with files.room(self._path):
      self._events.flush()
    self._staged.send()

  def __enter__(self) -> "Writer":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    with contextlib.ExitStack() as stack:
      # A disk that was full is full here too: what was told first is told.
      stack.enter_context(
        files.room(self._path)
        if error is None
        else contextlib.suppress(OSError)
      )
      stack.callback(self._staged.close)
      stack.callback(self._events.close)
      stack.callback(self._jsonl.close)


class _Events:
  """TensorBoard's file of one start, without a thread that would outlive it.

  What an earlier start wrote after the step that this one resumes from is
  hidden there.
  """

  def __init__(self, folder: Path, resume_step: int):
    # They load PyTorch, where that is installed: seconds of every import.
    from tensorboardX.proto import event_pb2, summary_pb2
    from tensorboardX.record_writer import RecordWriter

    # Made without types.
    self._event: Any = event_pb2.Event  # pyright: ignore
    self._summary: Any = summary_pb2.Summary  # pyright: ignore
    folder.mkdir(parents=True, exist_ok=True)
    now = time.time()
    name = f"events.out.tfevents.{now:.0f}.{socket.gethostname()}"
    self._file = RecordWriter(str(folder / name))
    self._flushed = now
    starts = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # pyright: ignore
    self._write(file_version="brain.Event:2")
    self._write(step=resume_step + 1, session_log=starts)

  def add(self, step: int, metrics: Mapping[str, float]) -> None:
    """One event for all numbers of a step."""
    values = [
      self._summary.Value(tag=name, simple_value=value)
      for name, value in metrics.items()
      if math.isfinite(value)
    ]
    self._write(step=step, summary=self._summary(value=values))
    if time.time() > self._flushed + _SHOWN_AFTER:
      self.flush()

  def _write(self, **of_event: Any) -> None:
    event = self._event(wall_time=time.time(), **of_event)
    self._file.write(event.SerializeToString())

  def flush(self) -> None:
    self._flushed = time.time()
    self._file.flush()

  def close(self) -> None:
    self._file.close()


def last_step(path: Path) -> int:
  """The last step of a `metrics.jsonl`; 0 where there is none."""
  lines = path.read_text().splitlines() if path.exists() else []
  return max((step for line in lines if (step := _step(line))), default=0)


def _until(path: Path, step: int) -> bytes:
  """The lines of a `metrics.jsonl` up to a step."""
  lines = path.read_text().splitlines() if path.exists() else []
  kept = [
    line + "\n"
    for line in lines
    if (at := _step(line)) is not None and at <= step
  ]
  return "".join(kept).encode()


def _step(line: str) -> int | None:
  try:
    return json.loads(line)["step"]
  except (ValueError, KeyError):  # cut off in the middle by a kill
    return None


def _finite(value: float) -> float | None:
  return float(value) if math.isfinite(value) else None  # JSON has no NaN
