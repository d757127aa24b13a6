"""How a table of names is read: our paths on one side, a file's names on other.

A line of a table is `kind  their.{i}.name  our/{i}/path`. The path is a module
of ours, and the kind says what its arrays are called there and how their axes
are ordered. `{i}` stands for one part of the path, `{i+1}` for the number plus
one. The first line that fits a path names it. Both directions use one line, so
what was written is read back.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Numbers = Callable[[Mapping[str, str], Collection[str]], Mapping[str, Any]]


class Place(NamedTuple):
  """Where one array of ours is in a file.

  Attributes:
    name: of the tensor.
    axes: ours is the tensor transposed so; () = as it is.
    part: ours is this one of `parts` equal blocks of its first axis.
    ones: so many axes of size 1 follow there, and not here.
  """

  name: str
  axes: tuple[int, ...] = ()
  part: int = 0
  parts: int = 1
  ones: int = 0


class Table(NamedTuple):
  """The names of one layout.

  Attributes:
    lines: (kind, their name, our path), the first that fits counts.
    numbers: further values for the braces of their names, from those that our
      path gave and all our paths.
  """

  lines: Sequence[tuple[str, str, str]]
  numbers: Numbers = lambda found, paths: {}


# kind: our array -> (its name there, and its place's other fields)
_KINDS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
  # [outputs, inputs, height, width]; depthwise too: its inputs are 1.
  "conv": {
    "kernel": (".weight", {"axes": (2, 3, 1, 0)}),
    "bias": (".bias", {}),
  },
  "linear": {"kernel": (".weight", {"axes": (1, 0)}), "bias": (".bias", {})},
  # A linear map that is stored as a 1x1 convolution.
  "pointwise": {
    "kernel": (".weight", {"axes": (1, 0), "ones": 2}),
    "bias": (".bias", {}),
  },
  # Normalisations of layers and of batches.
  "norm": {
    "scale": (".weight", {}),
    "bias": (".bias", {}),
    "mean": (".running_mean", {}),
    "var": (".running_var", {}),
  },
  "array": {"": ("", {})},
}
# Query, key and value in one matrix: [3 * width, inputs].
for _n, _kind in enumerate(("query", "key", "value")):
  _third = {"part": _n, "parts": 3}
  _KINDS[_kind] = {
    "kernel": ("weight", {"axes": (1, 0), **_third}),
    "bias": ("bias", _third),
  }


def table(text: str, numbers: Numbers | None = None) -> Table:
  """A table from its lines."""
  rows = [line.split() for line in text.strip().splitlines()]
  lines = [(kind, theirs, ours) for kind, theirs, ours in rows]
  return Table(lines) if numbers is None else Table(lines, numbers)


def places(table: Table, paths: Collection[str]) -> dict[str, Place]:
  """The place of each of our paths that the table has a line for."""
  found = {}
  for path in paths:
    for kind, theirs, ours in table.lines:
      if (values := _match(kind, ours, path)) is None:
        continue
      suffix, fields = _KINDS[kind][values.pop("leaf", "")]
      values |= table.numbers(values, paths)
      found[path] = Place(_fill(theirs, values) + suffix, **fields)
      break
  return found


def own_names(paths: Collection[str]) -> dict[str, Place]:
  """kdjax's own layout: the path with dots, the array as it is."""
  return {path: Place(path.replace("/", ".")) for path in paths}


def _match(kind: str, ours: str, path: str) -> dict[str, Any] | None:
  """What the braces of `ours` stand for in `path`; None where it differs."""
  pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", ours)
  leaves = "|".join(leaf for leaf in _KINDS[kind] if leaf)
  if leaves:
    pattern += f"/(?P<leaf>{leaves})"
  found = re.fullmatch(pattern, path)
  return found.groupdict() if found else None


def _fill(theirs: str, values: Mapping[str, Any]) -> str:
  def value(brace: re.Match[str]) -> str:
    name, offset = brace[1], brace[2]
    return str(int(values[name]) + int(offset) if offset else values[name])

  return re.sub(r"\{(\w+?)([+-]\d+)?\}", value, theirs)


def stored_shape(place: Place, shape: Sequence[int]) -> tuple[int, ...]:
  """The shape of the tensor that holds an array of ours of this shape."""
  inverse = np.argsort(place.axes) if place.axes else range(len(shape))
  theirs = [shape[i] for i in inverse]
  if place.parts > 1:
    theirs[0] *= place.parts
  return (*theirs, *[1] * place.ones)


def from_stored(place: Place, tensor: np.ndarray) -> np.ndarray:
  """Our array out of the tensor."""
  if place.ones:
    tensor = tensor.reshape(tensor.shape[: -place.ones])
  if place.parts > 1:
    tensor = np.split(tensor, place.parts)[place.part]
  return tensor.transpose(place.axes) if place.axes else tensor


def to_stored(
  found: Mapping[str, Place], arrays: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """The tensors of a file that hold our arrays, by their names."""
  blocks: dict[str, dict[int, np.ndarray]] = {}
  for path, place in found.items():
    array = np.asarray(arrays[path])
    if place.axes:
      array = array.transpose(np.argsort(place.axes))
    array = array.reshape(*array.shape, *[1] * place.ones)
    blocks.setdefault(place.name, {})[place.part] = array
  whole = {
    name: np.concatenate([parts[n] for n in sorted(parts)])
    for name, parts in blocks.items()
  }
  # safetensors writes memory as it lies: a transposed view would be scrambled.
  return {name: np.ascontiguousarray(x) for name, x in whole.items()}
