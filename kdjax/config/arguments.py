"""The command line of a program that takes a config."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from kdjax import commands, errors


def arguments(
  argv: Sequence[str],
  define: Callable[[flags.FlagValues], None],
  *required: str,
) -> dict[str, Any]:
  """The values of the flags by name, that of --config among them.

  Args:
    argv: the program's name, and its arguments.
    define: defines the other flags.
    required: those that must be given, beside --config.

  Raises:
    UserError: whatever is wrong with them.
  """
  _check_file(argv)

  def define_all(values: flags.FlagValues) -> None:
    config_flags.DEFINE_config_file(
      "config", flag_values=values, sys_argv=list(argv)
    )
    define(values)

  given, rest = commands.parse(argv, define_all)
  commands.refuse(rest)
  commands.require(given, "config", *required)
  return given


def _check_file(argv: Sequence[str]) -> None:
  """Refuses a --config that is no file."""
  for n, argument in enumerate(argv):
    name, bar, value = argument.partition("=")
    if name not in ("--config", "-config"):
      continue
    if not bar:
      value = argv[n + 1] if n + 1 < len(argv) else ""
    path = Path(value.partition(":")[0])
    if not path.is_file():
      kind = "is a folder" if path.is_dir() and value else "is no file"
      raise errors.UserError(
        f"--config={value} {kind}: give a config file, such as "
        "configs/digits.py"
      )
