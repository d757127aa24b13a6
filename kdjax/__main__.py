"""Distils a large network into a small one.

    python -m kdjax COMMAND [--help | arguments]
    python -m kdjax --version

{commands}

`python -m kdjax train` is `python -m kdjax.train`, and so on. Exit codes: 0
done, 2 a mistake that one line explains, 130 Ctrl-C, 1 an error in the program;
`kdjax train --help` tells of more.
"""

import runpy
import sys
from collections.abc import Sequence

import kdjax
from kdjax import commands, errors, processes

# name: (what `python -m` runs, what it does)
COMMANDS = {
  "train": (
    "kdjax.train",
    "train a teacher, a student alone, distil it, and compare",
  ),
  "report": (
    "kdjax.report.__main__",
    "a page of curves, tables and pictures of runs",
  ),
  "export": (
    "kdjax.export.__main__",
    "write a run's student for others to load or to serve",
  ),
  "scaling": (
    "kdjax.scaling.__main__",
    "what a step takes on devices that are not here",
  ),
  "launch": (
    "kdjax.launch",
    "start the processes of one run on this machine",
  ),
}


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; returns the exit code."""
  argv = sys.argv if argv is None else list(argv)
  table = "\n".join(
    f"  {name:<9}{does}" for name, (_, does) in COMMANDS.items()
  )
  text = (__doc__ or "").replace("{commands}", table)
  return commands.run(argv[:2], text, lambda: _dispatch(argv[1:]))


def _dispatch(argv: Sequence[str]) -> int:
  """Runs a command as `python -m` would."""
  if not argv:
    raise errors.UserError(f"got no command: name one of {', '.join(COMMANDS)}")
  name, *rest = argv
  if name == "--version":
    print(_versions())
    return 0
  module, _ = errors.choose("command", name, COMMANDS)
  before = sys.argv
  sys.argv = [f"kdjax {name}", *rest]
  try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
  except SystemExit as end:
    return end.code if isinstance(end.code, int) else int(end.code is not None)
  finally:
    sys.argv = before
  return 0


def _versions() -> str:
  """What a report of an error should tell, in one line."""
  found = {"kdjax": kdjax.__version__, **processes.versions()}
  return ", ".join(f"{name} {value}" for name, value in found.items() if value)


if __name__ == "__main__":
  sys.exit(main())
