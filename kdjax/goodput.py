"""What share of a phase's time was spent in steps, over all its starts."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kdjax import files
from kdjax.clock import Clock


def account(
  clock: Clock, earlier: Mapping[str, Any], now: float
) -> dict[str, Any]:
  """What `goodput.json` holds.

      goodput = seconds in steps / seconds of the wall, of all starts

  Waiting for batches, compiling, evaluating, saving, restoring and setting up
  are no steps. Of a start that was killed what it did until its last save is
  counted. `goodput_elapsed` divides by all the time since the first start: by
  what was lost and by the pauses between starts too.

  Args:
    clock: of this start.
    earlier: what the last start left here, {} if there was none.
    now: seconds since the epoch.
  """
  spent, before = clock.read(), earlier.get("seconds", {})
  seconds = {
    what: spent.get(what, 0.0) + before.get(what, 0.0)
    for what in sorted({*spent, *before})
  }
  wall = sum(seconds.values())
  first = earlier.get("first_start", now - sum(spent.values()))
  elapsed = max(now - first, wall)
  in_steps = seconds.get("steps", 0.0)
  return {
    "goodput": in_steps / wall if wall else 0.0,
    "goodput_elapsed": in_steps / elapsed if elapsed else 0.0,
    "steps": clock.steps + earlier.get("steps", 0),
    "starts": 1 + earlier.get("starts", 0),
    "wall_seconds": wall,
    "seconds": seconds,
    "first_start": first,
  }


def line(found: Mapping[str, Any]) -> str:
  """The account in one line, the largest part first."""
  parts = sorted(found["seconds"].items(), key=lambda part: -part[1])
  shown = ", ".join(f"{what} {s:.1f}" for what, s in parts if s >= 0.05)
  starts = found["starts"]
  over = f" over {starts} starts" if starts > 1 else ""
  return (
    f"goodput {found['goodput']:.1%} of {found['wall_seconds']:.1f} s{over} "
    f"({shown} s)"
  )


class Goodput:
  """Keeps `<folder>/goodput.json`; without a folder, only the account."""

  def __init__(
    self,
    clock: Clock,
    folder: str | Path | None,
    *,
    now: Callable[[], float] = time.time,
  ):
    self._clock, self._now = clock, now
    self._path = None if folder is None else files.path(folder) / "goodput.json"
    self._earlier = {} if self._path is None else _read(self._path)

  def write(self) -> str:
    """Brings the file up to now; returns its line."""
    found = account(self._clock, self._earlier, self._now())
    if self._path is not None:
      files.write_json(self._path, found)
    return line(found)


def _read(path: Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):  # none yet, or damaged: it starts anew
    return {}
