"""What all commands share: --help, flags, and mistakes told in one line."""

import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from kdjax import errors


def run(
  argv: Sequence[str],
  text: str | None,
  body: Callable[[], int],
  *,
  stopped: str = "stopped",
) -> int:
  """`body()`, unless help is asked for; the exit code.

  Without any argument it shows the help, and `body` says what is missing.

  Args:
    argv: the program's name, and its arguments.
    text: what --help shows.
    body: all that the command does.
    stopped: what is said after Ctrl-C.
  """
  # Orbax and TFDS tell of their progress in the log.
  logging.getLogger().setLevel(logging.ERROR)
  own = argv[: argv.index("--")] if "--" in argv else argv
  asked = {"--help", "-h", "-help"} & set(own)
  if asked or len(argv) == 1:
    print((text or "").strip(), flush=True)
  if asked:
    return 0
  try:
    return body()
  except errors.UserError as error:
    print(f"kdjax: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(f"kdjax: {stopped}", file=sys.stderr)
    return 130


def parse(
  argv: Sequence[str], define: Callable[[flags.FlagValues], None]
) -> tuple[dict[str, Any], list[str]]:
  """The values of the flags by name, and the arguments that are no flags.

  Args:
    argv: the program's name, and its arguments.
    define: defines the flags.

  Raises:
    UserError: whatever is wrong with them.
  """
  values = flags.FlagValues()
  before = set(values)
  define(values)
  names = set(values) - before
  try:
    rest = values(list(argv))[1:]
    given = {name: values[name].value for name in names}
    if "config" in given and values["config"].present:
      _check_config(given["config"])
  # A config is a program, and anything may go wrong in it.
  except (Exception, SystemExit) as error:
    told = _told(error, "config" in names)
    raise errors.UserError(f"cannot use the arguments: {told}") from error
  return given, rest


def _told(error: BaseException, has_config: bool) -> str:
  """What went wrong in a flag, or in a config and where, in one line."""
  if error.args and isinstance(error.args[0], KeyError):
    error = error.args[0]
  if isinstance(error, KeyError):
    key, *hint = str(error.args[0]).splitlines()
    return "; ".join([f"the config has no key {key}", *hint])
  if isinstance(error, flags.Error) and "Traceback" not in str(error):
    return _in_words(errors.in_line(str(error)), has_config)
  while "Traceback" in str(error) and (inner := error.__context__):
    error = inner  # what failed in the config, without the text of its trace
  if isinstance(error, errors.UserError):
    return str(error)
  return errors.told(error)


def _in_words(text: str, has_config: bool) -> str:
  """What absl and ml_collections say, with what to do."""
  if group := re.match(r"flag --(\S+?)=.* as a ConfigDict", text):
    return (
      f"{group[1]} is no single value here, it has keys of its own: change "
      f"those, as in --{group[1]}.NAME=VALUE"
    )
  if number := re.match(r"flag (--\S+?)=(.*): (invalid|could not)", text):
    kind = "whole number" if number[3] == "invalid" else "number"
    return f"{number[1]} is {number[2]!r}, must be a {kind}"
  if text.startswith("Unknown command line flag") and "mean" not in text:
    hint = "; a key of the config is --config.NAME" if has_config else ""
    return f"{text}: see --help{hint}"
  return text


def _check_config(config: Any) -> None:
  if config is None:
    raise errors.UserError("get_config of --config returns None, no ConfigDict")
  config.keys()  # a file that failed to load says so when read


def refuse(rest: Sequence[str], hint: str = "see --help") -> None:
  """Refuses arguments that are no flags."""
  if rest and rest[0].split(":")[0].endswith(".py"):
    hint = f"give it as --config={rest[0]}"
  if rest:
    raise errors.UserError(f"got {' '.join(rest)}: {hint}")


def require(given: Mapping[str, Any], *names: str) -> None:
  """Refuses a command without one of these flags; names all that lack."""
  lacks = [name for name in names if given.get(name) in (None, "")]
  if lacks:
    verb = "is" if len(lacks) == 1 else "are"
    raise errors.UserError(
      f"--{' and --'.join(lacks)} {verb} missing: see --help"
    )
