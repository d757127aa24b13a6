"""The processes of a run: they begin together, and none outlives the others.

What ends a process that is not alone, and what becomes of the others:

- an exception, Ctrl-C: `run` tells the others through jax's key-value store,
  and they end within some seconds with the same exit code.
- a process that is killed: on CPU the others' next collective fails at once and
  `run` knows the error. A GPU or a TPU may wait for ever instead: there process
  0 finds the connection to it closed, and ends all within some seconds.
- a machine that goes away, or a process that stands still: jax's heartbeats end
  all processes (exit code 134, SIGABRT) at most `lost_seconds` after the last
  sign of life. At half of it process 0 says so.
- process 0 killed: it held jax's service, whose loss ends the others at once.
"""

import collections
import dataclasses
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from kdjax.errors import UserError
from kdjax.processes import meeting, signs
from kdjax.processes.agreement import Facts, numbers
from kdjax.processes.place import Place

_LOOK = 1.0  # seconds between two looks at the store
_LOST = "lost another process of the run"
_GRACE = 5.0  # seconds in which a process may find another's mistake itself


@dataclasses.dataclass
class _Crew:
  """Of a process that is not alone."""

  place: Place
  lost_seconds: float
  links: meeting.Links
  ending: bool = False


_crew: _Crew | None = None


def initialize(
  place: Place | None,
  facts: Facts,
  *,
  start_seconds: float = 300,
  lost_seconds: float = 60,
) -> None:
  """Begins a run of several processes; does nothing for one that is alone.

  To be called before any computation, once.

  Args:
    place: what `find` returned.
    facts: what all processes must have in common, as JSON: group -> name ->
      value.
    start_seconds: how long to wait for the others.
    lost_seconds: after so long without a sign of life a process counts as lost,
      and all end.

  Raises:
    UserError: on every process alike, if one does not belong here, or differs
      in its facts or devices; an AbsentError if one is missing.
  """
  global _crew
  if place is None or place.count == 1 or _crew is not None:
    return
  links = meeting.meet(place, facts, start_seconds)
  local = meeting.is_local(place.address)
  jax.distributed.initialize(
    place.address,
    place.count,
    place.index,
    local_device_ids=place.devices,
    cluster_detection_method="deactivate",
    initialization_timeout=int(start_seconds) + 30,
    heartbeat_timeout_seconds=max(int(lost_seconds), 2),
    # Nobody else on the network is to speak to a run on one machine.
    coordinator_bind_address=place.address if local else None,
  )
  _crew = _Crew(place, lost_seconds, links)
  threading.Thread(target=_watch, args=(_crew,), daemon=True).start()
  _check_devices(place)


def alone() -> bool:
  return _crew is None


def lead() -> bool:
  """Whether this process prints and writes what is written once.

  By jax's own number: a program may have begun the processes itself.
  """
  return jax.process_index() == 0


def wait_for_all(name: str) -> None:
  """Returns when every process has called this with the same, new `name`."""
  if _crew is not None:
    # Without an end: one that never comes has ended, which `_watch` sees.
    signs.client().wait_at_barrier(f"kdjax/{name}", 24 * 3600 * 1000)


def run(body: Callable[[], int], codes: Mapping[type[Exception], int]) -> int:
  """`body()`, whose failure ends the other processes too; the exit code.

  Args:
    body: all that the process does, `initialize` included.
    codes: exceptions whose text tells the user enough, and the exit code of
      each; the first that fits counts.

  Returns:
    What `body` returns, or the code of its exception; 130 after Ctrl-C, 75
    where another process was lost, 1 after any other error. One of several
    processes does not return from a failure: an ordinary end of the interpreter
    would wait for the others.

  Raises:
    Exception: any other, of a process that is alone.
  """
  try:
    code = body()
    if _crew is not None:  # the others may now end too
      _crew.ending = True
    return code
  except KeyboardInterrupt:
    return _leave(130, "kdjax: stopped; the same command goes on from here")
  except Exception as error:
    for kind, code in codes.items():
      if isinstance(error, kind):
        return _leave(code, f"kdjax: {error}")
    if _crew is None:
      raise
    if _was_lost(error):
      return _lost(_crew, error)
    said = f"kdjax: {type(error).__name__}: {error}"
    return _leave(1, said, detail=traceback.format_exc())


def _was_lost(error: BaseException) -> bool:
  """Whether this is how jax says that another process is no longer there."""
  # The status is XLA's; the class is not always: `float(array)` raises a
  # ValueError.
  signs = (
    r"^(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED)\b"
    r".*(gloo|nccl|connection|socket|broken pipe|coordination|heartbeat|rpc)"
  )
  found = re.search(signs, str(error), re.IGNORECASE | re.DOTALL)
  return found is not None


def _leave(code: int, said: str, *, detail: str = "") -> int:
  """Prints why this process ends and tells the others; alone, returns."""
  if _crew is None:
    print(said, file=sys.stderr)
    return code
  _crew.ending = True
  place = _crew.place
  signs.tell(place.index, code, said)
  ended = signs.ended()
  if place.index:
    # All find the same mistake at about the same time; process 0 prints it.
    until = time.monotonic() + _GRACE
    while 0 not in ended and time.monotonic() < until:
      time.sleep(0.1)
      ended = signs.ended()
  if place.index == 0 or ended.get(0, {}).get("said") != said:
    print(detail, end="", file=sys.stderr)
    _print(place, said)
  _exit(place, code)
  return code


def _lost(crew: _Crew, error: BaseException) -> int:
  """Says whose end it was, where that is known."""
  crew.ending = True
  place, until = crew.place, time.monotonic() + 2 * _LOOK
  told: dict[int, dict[str, Any]] = {}
  while not told and time.monotonic() < until:
    time.sleep(0.1)
    told = {k: v for k, v in signs.ended().items() if _LOST not in v["said"]}
  if told:
    _follow(place, told)
  why = next(iter(str(error).splitlines()), "")[:200]
  return _leave(
    75,  # EX_TEMPFAIL: try again
    f"{_head(place)} {_LOST} ({why}); the same command goes on from the last "
    "checkpoint",
  )


def _gone(place: Place, gone: Sequence[int]) -> str:
  is_it = "is" if len(gone) == 1 else "are"
  return (
    f"{_head(place)} {_LOST}: {numbers(gone)} {is_it} gone without a word; the "
    "same command goes on from the last checkpoint"
  )


def _follow(place: Place, ended: dict[int, dict[str, Any]]) -> None:
  """Ends because others did."""
  first = min(ended)
  code = ended[first]["code"]
  signs.tell(place.index, code, "")
  said = f"{_head(place)} ends too, as {numbers(ended)} did: see the log there"
  _print(place, said)
  _exit(place, code)


def _exit(place: Place, code: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  if place.index == 0:
    # jax aborts, with a stack trace, those whose service is gone.
    until = time.monotonic() + 2 * _GRACE
    others = _crew.links if _crew is not None else {}
    while time.monotonic() < until:
      gone = {n for n, link in others.items() if meeting.is_gone(link)}
      if len(gone | set(signs.ended())) >= place.count:
        break
      time.sleep(0.1)
    time.sleep(0.2)
  os._exit(code)


def _head(place: Place) -> str:
  return f"kdjax: process {place.index} of {place.count}"


def _print(place: Place, said: str) -> None:
  if place.index and not said.startswith(_head(place)):
    said = f"{_head(place)}: {said.removeprefix('kdjax: ')}"
  print(said, file=sys.stderr, flush=True)


def _check_devices(place: Place) -> None:
  """Every process sees all devices, and so all raise the same."""
  devices = jax.devices()
  counts = collections.Counter(d.process_index for d in devices)
  by_count: dict[int, list[int]] = {}
  for index in range(place.count):
    by_count.setdefault(counts[index], []).append(index)
  if len(by_count) > 1:
    shares = "; ".join(f"{n} in {numbers(p)}" for n, p in by_count.items())
    raise UserError(
      f"the processes have different numbers of {devices[0].platform} devices "
      f"({shares}): start all of them on machines, and with settings, alike"
    )


def _watch(crew: _Crew) -> None:
  """Gives signs of life, and ends this process after others have ended."""
  place = crew.place
  ear = signs.Ear(place.count, crew.lost_seconds)
  ended_since = gone_since = None
  beat, next_beat = 0, 0.0
  while True:
    now = time.monotonic()
    ended = {} if crew.ending else signs.ended()
    ended.pop(place.index, None)
    ended_since = (ended_since or now) if ended else None
    late = ended_since is not None and now - ended_since >= _GRACE
    if late and not crew.ending:
      _follow(place, ended)
    gone = [n for n, link in crew.links.items() if meeting.is_gone(link)]
    # That of process 0 is jax's to tell of: its service was there.
    gone_since = (gone_since or now) if place.index == 0 and gone else None
    late = gone_since is not None and now - gone_since >= _GRACE
    if late and not crew.ending and not ended:
      _leave(75, _gone(place, gone))
    if now >= next_beat:
      beat, next_beat = beat + 1, now + crew.lost_seconds / 10
      signs.live(place.index, beat)
      if place.index == 0 and not crew.ending:
        for line in ear.hear(signs.living(), now):
          print(line, file=sys.stderr, flush=True)
    time.sleep(_LOOK)
