"""Where numbers go: jsonl and TensorBoard."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from kdjax import files

NAME = "metrics.jsonl"


class Writer:
  """Writes `{name: number}` of a step to `metrics.jsonl` and TensorBoard.

  What an interrupted run wrote after the step it resumes from is dropped, so a
  file holds every step once. A number that is not finite is null in the one and
  absent from the other. In a bucket it is there from the next `send` on.
  """

  def __init__(self, folder: Path, *, resume_step: int = 0):
    # It loads PyTorch, where that is installed: seconds of every import.
    from tensorboardX import SummaryWriter
    from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore

    self._summary = Summary
    self._staged = files.Staged(folder)
    here = self._staged.here
    files.write(here / NAME, _until(folder / NAME, resume_step))
    self._jsonl = (here / NAME).open("a")
    self._events = SummaryWriter(
      str(here / "tensorboard"), purge_step=resume_step + 1
    )
    assert self._events.file_writer is not None
    self._writer = self._events.file_writer
    self.send()  # so that a bucket that refuses it does so now

  def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
    line = {"step": step, **{k: _finite(v) for k, v in metrics.items()}}
    self._jsonl.write(json.dumps(line) + "\n")
    self._jsonl.flush()
    # One event for all: `add_scalar` makes one each, which takes longer than
    # everything else that the host does in a step.
    summary = self._summary(
      value=[
        self._summary.Value(tag=name, simple_value=value)
        for name, value in metrics.items()
        if math.isfinite(value)
      ]
    )
    self._writer.add_summary(summary, step)

  def send(self) -> None:
    """Brings all until now to the bucket, where the folder is one's."""
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
    self._jsonl.close()
    self._events.close()
    self._staged.close()


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
