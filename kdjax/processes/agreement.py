"""What the processes of a run must have in common, and where they differ."""

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What a process says of itself: group -> name -> value.
Facts = Mapping[str, Mapping[str, Any]]

# What decides which program is compiled.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "libtpu")
_VARIABLES = (
  "JAX_PLATFORMS",
  "JAX_ENABLE_X64",
  "JAX_DEFAULT_MATMUL_PRECISION",
  "XLA_FLAGS",
)
_SHOWN = 5  # differences that a message names


def code() -> dict[str, str]:
  """The digest of each of kdjax's source files."""
  root = Path(__file__).parents[1]
  return {
    str(path.relative_to(root.parent)): hashlib.sha256(
      path.read_bytes()
    ).hexdigest()[:16]
    for path in sorted(root.rglob("*.py"))
  }


def versions() -> dict[str, str]:
  """Python's, those of the packages and the variables that programs hang on."""
  found = {"python": ".".join(platform.python_version_tuple()[:2])}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "none"
  return found | {name: os.environ.get(name, "") for name in _VARIABLES}


def differences(said: Mapping[int, Facts]) -> str | None:
  """What differs from process 0, and in which processes; None if nothing does.

  Args:
    said: each process's facts, process 0's among them.
  """
  ours = said[0]
  by_name: dict[tuple[str, str], dict[int, Any]] = {}
  for index, theirs in sorted(said.items()):
    for group in sorted({*ours, *theirs}):
      a, b = ours.get(group, {}), theirs.get(group, {})
      for name in sorted({*a, *b}):
        if a.get(name) != b.get(name):
          by_name.setdefault((group, name), {})[index] = b.get(name)
  if not by_name:
    return None
  lines = [
    _line(group, name, ours.get(group, {}).get(name), values)
    for (group, name), values in by_name.items()
  ]
  more = len(lines) - _SHOWN
  rest = f"; and {more} more" if more > 0 else ""
  return (
    f"the processes differ: {'; '.join(lines[:_SHOWN])}{rest}: start all of "
    "them with the same command and the same code"
  )


def _line(group: str, name: str, ours: Any, values: Mapping[int, Any]) -> str:
  where = numbers(values)
  if group == "code":  # a digest tells nobody anything
    return f"{name} is another file in {where} than in process 0"
  first = next(iter(values.values()))
  return f"{group} {name} is {first!r} in {where}, {ours!r} in process 0"


def numbers(indices: Any) -> str:
  """`process 3`, or `processes 1, 2, 5`, of a long list its beginning."""
  found = sorted(indices)
  shown = ", ".join(map(str, found[:16])) + (", ..." if len(found) > 16 else "")
  return f"process{'es' if len(found) > 1 else ''} {shown}"
