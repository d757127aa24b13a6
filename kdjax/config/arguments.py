"""The command line of a program that takes a config."""

from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from kdjax import errors


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
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file(
    "config", flag_values=values, sys_argv=list(argv)
  )
  names = set(values)
  define(values)
  names = {"config", *(set(values) - names)}
  try:
    rest = values(list(argv))[1:]
    if config.value is not None:
      config.value.keys()  # a file that failed to load says so only when read
  # A config is a program, and anything may go wrong in it.
  except Exception as error:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raise errors.UserError(
      f"cannot use the arguments: {'; '.join(lines)}"
    ) from (error)
  if config.value is None:
    raise errors.UserError("--config is missing: see --help")
  if rest:
    raise errors.UserError(f"got {' '.join(rest)}: see --help")
  return {name: values[name].value for name in names}
