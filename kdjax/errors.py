"""Mistakes that a user can mend, told in one line: got, needed, what to do."""

import difflib
import inspect
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


class UserError(ValueError):
  """A user's mistake. The command line prints it alone and exits with 2."""


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
  """The error for a name that does not exist; it offers the nearest one."""
  known = sorted(known)
  near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  hint = f"did you mean {near[0]!r}? " if near else ""
  shown = ", ".join(known) if len(known) <= 40 else f"{len(known)} names"
  return UserError(f"unknown {what} {name!r}: {hint}known: {shown}")


def choose(what: str, name: str, table: Mapping[str, Any]) -> Any:
  """`table[name]`, or the error that names the nearest."""
  if name not in table:
    raise unknown(what, name, table)
  return table[name]


def in_line(text: str) -> str:
  """The same text without its line breaks."""
  return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def told(error: BaseException) -> str:
  """An exception of a user's own code: its class, text, file and line.

  The line is the last one that is not a library's.
  """
  text = in_line(str(error))
  said = type(error).__name__ + (f": {text}" if text else "")
  if isinstance(error, SyntaxError):  # has its place in its text
    return said
  frames = traceback.extract_tb(error.__traceback__)
  libraries = [sysconfig.get_path(n) for n in ("stdlib", "purelib", "platlib")]
  known = [
    frame
    for frame in frames
    if not frame.filename.startswith(("<frozen", *libraries))
  ]
  if not known:
    return said
  return f"{said} ({Path(known[-1].filename).name}, line {known[-1].lineno})"


def call(
  what: str, fn: Callable[..., Any], arguments: Mapping[str, Any]
) -> Any:
  """`fn(**arguments)`, where an argument's name may have been mistyped."""
  parameters = inspect.signature(fn).parameters
  open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
  for name in arguments:
    if name not in parameters and not open_ended:
      raise unknown(f"argument of {what}", name, parameters)
  missing = [
    p.name
    for p in parameters.values()
    if p.default is p.empty
    and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    and p.name not in arguments
  ]
  if missing:
    raise UserError(
      f"{what} got {sorted(arguments)}, needs {', '.join(missing)} too"
    )
  return fn(**arguments)
