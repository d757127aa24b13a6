"""What the readers of config values share."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from kdjax import errors, schedules


def plain(value: Any) -> Any:
  return value.to_dict() if isinstance(value, ConfigDict) else value


def flat(tree: Any, at: str = "") -> dict[str, Any]:
  """{"a": {"b": x}} -> {"a.b": x}; an empty mapping is a value."""
  if not isinstance(tree, dict) or not tree:
    return {at: tree}
  return {
    k: v
    for name, node in tree.items()
    for k, v in flat(node, f"{at}.{name}" if at else name).items()
  }


def take_name(arguments: dict[str, Any], what: str) -> str:
  if "name" not in arguments:
    raise errors.UserError(f"{what} lacks 'name': add it to the config")
  return arguments.pop("name")


def schedule(value: Any, what: str) -> Any:
  value = plain(value)
  if value is None:
    return None
  if isinstance(value, (tuple, list)):
    return tuple(schedules.schedule(v, what) for v in value)
  return schedules.schedule(value, what)


def hparams(arguments: dict[str, Any], what: str) -> dict[str, Any]:
  """Numbers stay as they are; mappings become schedules."""
  return {
    k: schedules.schedule(v, f"{k} of {what}") if isinstance(v, dict) else v
    for k, v in arguments.items()
  }


def parameters(fn: Callable[..., Any]) -> Mapping[str, Any]:
  try:
    return inspect.signature(fn).parameters
  except (TypeError, ValueError):
    return {}
