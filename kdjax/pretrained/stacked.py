"""Blocks that are stacked in a network, and lie one by one in files."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

# Which part of a family's network has the blocks as a first axis.
_STACKED = {"vit": "blocks"}


def apart(family: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
  """`blocks/norm/scale` `[n, D]` -> `blocks/0/norm/scale` `[D]`, and so on.

  Args:
    family: a name in `models.MODELS`.
    arrays: arrays or their shapes, by path.
  """
  found: dict[str, Any] = {}
  for path, x in arrays.items():
    names = _names(family, path, x)
    found |= zip(names, [x] if names == [path] else _rows(x))
  return found


def together(
  family: str, path: str, like: Any, value: Callable[[str], Any]
) -> Any:
  """The array of a path, out of the value of each that `apart` made of it."""
  names = _names(family, path, like)
  return value(path) if names == [path] else np.stack([*map(value, names)])


def _names(family: str, path: str, x: Any) -> list[str]:
  first, _, rest = path.partition("/")
  if first != _STACKED.get(family):
    return [path]
  return [f"{first}/{n}/{rest}" for n in range(x.shape[0])]


def _rows(x: Any) -> list[Any]:
  if isinstance(x, jax.ShapeDtypeStruct):
    return [x.update(shape=x.shape[1:])] * x.shape[0]
  return list(np.asarray(x))
