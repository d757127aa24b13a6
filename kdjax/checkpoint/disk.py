"""A disk or bucket that refuses, told to the user and to the processes."""

import errno
import itertools
import os
import re
import shutil
import time
from collections.abc import Sequence

import jax
from etils import epath
from jax._src import distributed  # JAX has no public way to its key-value store

from kdjax import files
from kdjax.errors import UserError, in_line

_FORBIDDEN = {
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
  errno.ENOTDIR,
  errno.EEXIST,
}
_BARRIERS = itertools.count()
_POLL = 0.05  # seconds


class SaveFailed(RuntimeError):
  """Another process could not write its part."""


def trouble(
  error: BaseException,
  directory: epath.Path,
  *,
  step: int,
  size: int,
  steps: Sequence[int],
) -> UserError | None:
  """What to tell the user of a write that failed; None if it is no such thing.

  Args:
    error: what was raised, by Python or by TensorStore.
    directory: that was to be written into.
    step: that was being saved.
    size: bytes of its arrays.
    steps: the complete checkpoints there are.
  """
  while isinstance(error, SaveFailed) and error.__context__ is not None:
    error = error.__context__  # this process's own, which the others' hides
  number = _number(error)
  if number in _FORBIDDEN:
    return files.cannot_write(directory, number)
  remedy = "make room"
  if isinstance(error, SaveFailed):
    why, remedy = str(error), "see there"
  elif number in files.FULL:
    why = os.strerror(number)
  elif why := _said_by_store(error, directory):
    remedy = "mend that"
  else:
    return None
  kept = (
    f"step {steps[-1]} is the last good checkpoint"
    if steps
    else "there is no checkpoint yet"
  )
  return UserError(
    f"cannot save step {step} into {directory} ({why}): its arrays take "
    f"{size / 1e6:,.1f} MB{_free(directory)}; {kept}: {remedy}, and the same "
    "command goes on from it"
  )


class Barrier:
  """Where processes wait for one another's writes, called by Orbax's thread.

  Orbax's own is left by nobody for 20 minutes if one process cannot write. One
  that calls `fail` frees the others at once, with `SaveFailed`. So does one
  that waits at another key: after a write that failed Orbax still comes to the
  barriers that end a save, while the others wait for the write. Passed as one,
  a checkpoint that lacks a part would count as complete.
  """

  def __init__(self):
    self._name = f"kdjax/barrier/{next(_BARRIERS)}"
    self._passed = 0
    self._failed = ""  # why nobody passes any more

  def __call__(self, *, key: str, timeout_ms: int) -> None:
    client = distributed.global_state.client
    if client is None:
      return
    if self._failed:
      raise SaveFailed(self._failed)
    here, me = f"{self._name}/{self._passed}", jax.process_index()
    client.key_value_set(f"{here}/{me}", key)
    deadline = time.monotonic() + timeout_ms / 1000
    while not self._all_at(key, dict(client.key_value_dir_get(here))):
      if time.monotonic() > deadline:
        raise TimeoutError(f"waited {timeout_ms / 1000:g} s at {key}")
      time.sleep(_POLL)
    if self._passed:  # all are here, so nobody reads the one before
      client.key_value_delete(f"{self._name}/{self._passed - 1}/{me}")
    self._passed += 1

  def _all_at(self, key: str, there: dict[str, str]) -> bool:
    failed = [who for at, who in there.items() if at.endswith("/failed")]
    failed += [at.split("/")[-1] for at, k in there.items() if k != key]
    if failed:
      self._failed = f"process {failed[0]} could not write its part"
      raise SaveFailed(self._failed)
    return len(there) == jax.process_count()

  def fail(self) -> None:
    """Frees those who wait for this process."""
    client = distributed.global_state.client
    if client is not None:
      here = f"{self._name}/{self._passed}/failed"
      client.key_value_set(here, str(jax.process_index()), allow_overwrite=True)


def _number(error: BaseException) -> int:
  """The system's for what went wrong, 0 if it has none."""
  if isinstance(error, OSError):
    return error.errno or 0
  # TensorStore raises a ValueError: "... File too large [os_error_code='27']".
  found = re.search(r"os_error_code='(\d+)'", str(error))
  return int(found[1]) if found else 0


def _said_by_store(error: BaseException, directory: epath.Path) -> str:
  """Why a bucket was not written into, "" if that is not what went wrong."""
  text = in_line(str(error))
  # TensorStore raises a ValueError: "... [http_response_body='...".
  of_store = files.refused(error) or "[http_response_" in text
  if not (files.in_bucket(directory) and of_store):
    return ""
  # After what the store said comes what TensorStore knows of the call.
  return re.split(r"\.? \[\w+='", text)[0][:400]


def _free(directory: epath.Path) -> str:
  try:
    free = shutil.disk_usage(directory).free
  except OSError:  # a bucket, or gone
    return ""
  return f", {free / 1e6:,.1f} MB are free"
