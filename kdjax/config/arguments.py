"""The command line of a program that takes a config."""

from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from kdjax import commands


def arguments(
  argv: Sequence[str], define: Callable[[flags.FlagValues], None]
) -> dict[str, Any]:
  """The values of the flags by name, that of --config among them.

  Args:
    argv: the program's name, and its arguments.
    define: defines the other flags.

  Raises:
    UserError: whatever is wrong with them.
  """

  def define_all(values: flags.FlagValues) -> None:
    config_flags.DEFINE_config_file(
      "config", flag_values=values, sys_argv=list(argv)
    )
    define(values)

  given, rest = commands.parse(argv, define_all)
  commands.refuse(rest)
  commands.require(given, "config")
  return given
