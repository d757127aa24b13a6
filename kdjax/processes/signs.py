"""Signs of life and of ending, left in the key-value store of jax's service."""

import contextlib
import json
import time
from collections.abc import Mapping
from typing import Any

from jax._src import distributed


def client() -> Any:
  """jax's own, of a process that is not alone."""
  return distributed.global_state.client


def tell(index: int, code: int, said: str) -> None:
  """Process `index` ends with an exit code, and why."""
  # The service may be what was lost.
  with contextlib.suppress(Exception):
    value = json.dumps({"code": code, "said": said})
    client().key_value_set(f"kdjax/ended/{index}", value)


def ended() -> dict[int, dict[str, Any]]:
  """`code` and `said` of the processes that told of their end."""
  return {n: json.loads(value) for n, value in _all("kdjax/ended/").items()}


def live(index: int, beat: int) -> None:
  """Process `index` is alive: a number that it has not said before."""
  with contextlib.suppress(Exception):
    key = f"kdjax/alive/{index}"
    client().key_value_set(key, str(beat), allow_overwrite=True)


def living() -> dict[int, str]:
  """The last number of each process."""
  return _all("kdjax/alive/")


def _all(prefix: str) -> dict[int, str]:
  try:
    found = client().key_value_dir_get(prefix)
  except Exception:  # none there, or no service
    return {}
  return {int(key.rpartition("/")[2]): value for key, value in found}


class Ear:
  """Says who has not been heard of. Only jax ends them for it.

  jax's own signs come from threads that wait for nobody. These wait for
  Python's lock, which a file system that hangs can hold.

  Args:
    count: number of processes.
    lost_seconds: after which jax ends them.
  """

  def __init__(self, count: int, lost_seconds: float):
    self._count, self._lost_seconds = count, lost_seconds
    began = time.monotonic()
    self._heard: dict[int, tuple[str, float]] = {}
    self._heard.update(dict.fromkeys(range(count), ("", began)))
    self._told: set[int] = set()

  def hear(self, beats: Mapping[int, str], now: float) -> list[str]:
    """A line for each process that has been silent for half of the time."""
    lines = []
    for index, (last, since) in self._heard.items():
      beat = beats.get(index, "")
      if beat != last:
        self._heard[index] = beat, now
        self._told.discard(index)
      elif now - since > self._lost_seconds / 2 and index not in self._told:
        self._told.add(index)
        lines.append(
          f"kdjax: process {index} of {self._count} has not been heard of for "
          f"{now - since:.0f} s; if it stays away, jax ends all of them after "
          f"{self._lost_seconds:g} s, and the same command goes on from the "
          "last checkpoint"
        )
    return lines
