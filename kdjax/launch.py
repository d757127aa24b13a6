"""Starts the processes of one run on this machine, each with CPU devices.

    python -m kdjax.launch --processes=4 --devices=2 -- \\
      --config=configs/digits.py --workdir=runs/digits

  --processes=N     how many
  --devices=N       CPU devices of each (1)
  --lost_seconds=S  after so long without a sign of life a process counts as
                    lost, and all end (20)
  --help            this text

What a pod does with many machines, this does on one: to try a config of several
processes, and for the tests. All that is after `--` goes to `kdjax.train`.
Process 0 writes to this terminal; of the others is shown what the first that
failed had to say. SIGINT and SIGTERM go to all of them. When one ends badly the
others get some seconds to end, then they are killed.

Exit codes: that of the process which failed first (see kdjax.train --help); 128
+ n where signal n killed it; 0 all done; 2 a mistake that the message explains.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import IO

from absl import flags

from kdjax import commands, errors

LOST_SECONDS = 20  # after which a process on this machine counts as lost
_GRACE = 15.0  # seconds to end in, when another has ended badly
_LOOK = 0.05
# Of another process: what Gloo says when all is well, and jax at SIGTERM; and
# that it ends because of process 0, which has said why.
_KNOWN = re.compile(
  r"^\[Gloo\] |preemption_notifier|"
  r"ends too, as process 0 did: see the log there"
)


def launch(
  command: Sequence[str],
  processes: int,
  devices: int,
  *,
  lost_seconds: float = LOST_SECONDS,
) -> int:
  """Runs `command` N times, told apart by --coordinator and --process.

  Args:
    command: the program and its arguments, without these flags.
    processes: N.
    devices: CPU devices of each.
    lost_seconds: as `kdjax.train` takes it.

  Returns:
    The exit code, as above.
  """
  address = f"localhost:{_free_port()}"
  crew: list[subprocess.Popen] = []
  with contextlib.ExitStack() as stack:
    outputs = [
      stack.enter_context(tempfile.TemporaryFile("w+"))
      for _ in range(1, processes)
    ]
    stack.callback(_kill, crew)
    forward = _Forward(crew)
    stack.enter_context(forward)
    for index in range(processes):
      output = None if index == 0 else outputs[index - 1]
      crew.append(
        subprocess.Popen(
          [
            *command,
            f"--coordinator={address}",
            f"--processes={processes}",
            f"--process={index}",
            f"--lost_seconds={lost_seconds:g}",
          ],
          env=_environment(os.environ, devices),
          stdout=output,
          stderr=output,
          # The terminal's Ctrl-C comes from here alone, once.
          start_new_session=True,
        )
      )
    failed = _first_failed(crew)
    if failed is None:
      return 0
    return _report(failed, crew, outputs, asked=forward.asked)


def _first_failed(crew: Sequence[subprocess.Popen]) -> int | None:
  """Waits for all, or for one that ends badly."""
  while True:
    codes = [process.poll() for process in crew]
    bad = [n for n, code in enumerate(codes) if code]
    if bad:
      # A signal from outside comes before what follows from it.
      return min(bad, key=lambda n: (codes[n] != -signal.SIGKILL, n))
    if None not in codes:
      return None
    time.sleep(_LOOK)


def _report(
  failed: int,
  crew: Sequence[subprocess.Popen],
  outputs: Sequence[IO[str]],
  *,
  asked: bool,
) -> int:
  """Ends the others and says what happened; returns the exit code."""
  until = time.monotonic() + _GRACE
  while any(p.poll() is None for p in crew):
    if time.monotonic() > until and not asked:
      break
    time.sleep(_LOOK)
  running = [n for n, p in enumerate(crew) if p.poll() is None]
  _kill(crew)
  code = crew[failed].returncode
  if failed:
    outputs[failed - 1].seek(0)
    lines = outputs[failed - 1].read().splitlines()
    for line in [x for x in lines if not _KNOWN.search(x)][-50:]:
      print(f"[{failed}] {line}", file=sys.stderr)
  if asked:
    return code if code >= 0 else 128 - code
  if code < 0:
    ended = "were killed" if running else "ended"
    print(
      f"kdjax: process {failed} was killed by {signal.Signals(-code).name}; "
      f"the others {ended}; the same command goes on from the last checkpoint",
      file=sys.stderr,
    )
    return 128 - code
  return code


class _Forward:
  """Passes SIGINT and SIGTERM on; `asked` says whether there was one."""

  def __init__(self, crew: Sequence[subprocess.Popen]):
    self.crew, self.asked = crew, False

  def __enter__(self) -> None:
    self._old = {
      number: signal.signal(number, self._pass)
      for number in (signal.SIGINT, signal.SIGTERM)
    }

  def __exit__(self, *_: object) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _pass(self, number: int, _: object) -> None:
    if self.asked:  # again: at once
      _kill(self.crew)
    self.asked = True
    for process in self.crew:
      if process.poll() is None:
        process.send_signal(number)


def _kill(crew: Sequence[subprocess.Popen]) -> None:
  for process in crew:
    if process.poll() is None:
      process.kill()
  for process in crew:
    process.wait()


def _environment(old: Mapping[str, str], devices: int) -> dict[str, str]:
  flag = r"--xla_force_host_platform_device_count=\d+"
  return {
    **old,
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices),
    "XLA_FLAGS": re.sub(flag, "", old.get("XLA_FLAGS", "")).strip(),
  }


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def main(argv: Sequence[str]) -> int:
  """The command line; returns the exit code."""
  return commands.run(argv, __doc__, lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
  at = argv.index("--") if "--" in argv else len(argv)
  ours, theirs = argv[:at], argv[at + 1 :]
  if not theirs:
    raise errors.UserError(
      "nothing to launch: put kdjax.train's arguments after --, such as "
      "-- --config=configs/digits.py --workdir=runs/digits"
    )
  given, rest = commands.parse(ours, _define)
  commands.refuse(rest)
  commands.require(given, "processes")
  return launch(
    [sys.executable, "-m", "kdjax.train", *theirs],
    given["processes"],
    given["devices"],
    lost_seconds=given["lost_seconds"],
  )


def _define(values: flags.FlagValues) -> None:
  for name, default in (("processes", None), ("devices", 1)):
    flags.DEFINE_integer(name, default, "", lower_bound=1, flag_values=values)
  flags.DEFINE_float(
    "lost_seconds", LOST_SECONDS, "", lower_bound=1.0, flag_values=values
  )


if __name__ == "__main__":
  sys.exit(main(sys.argv))
