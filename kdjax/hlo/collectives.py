"""Collective operations of a compiled program, and what each device sends."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from kdjax.hlo.text import Instruction

KINDS = (
  "all-gather",
  "reduce-scatter",
  "all-reduce",
  "all-to-all",
  "collective-permute",
)


class Collective(NamedTuple):
  """A collective operation, as often as a step runs it.

  Attributes:
    kind: one of `KINDS`.
    bytes: of the whole array: what is gathered, what is reduced.
    group: the devices that take part, one of several like groups.
    times: how often a step runs it.
    shape: the array, as the program writes it.
    source: the operation of the traced program that it comes from.
  """

  kind: str
  bytes: int
  group: tuple[int, ...]
  times: int
  shape: str
  source: str

  @property
  def sent(self) -> float:
    """Bytes that each device sends in a ring, once.

    n devices: (n - 1) / n of the array, twice that for an all-reduce, which is
    a reduce-scatter and an all-gather; a permutation sends all of it.
    """
    n = len(self.group)
    if self.kind == "collective-permute":
      return float(self.bytes)
    once = self.bytes * (n - 1) / n
    return 2 * once if self.kind == "all-reduce" else once


def collective(
  one: Instruction, slices: Sequence[int], times: int
) -> Collective | None:
  """The collective that an instruction is, if any."""
  kind = one.kind.removesuffix("-start")
  if kind == "send":
    return _across(one, slices, times)
  if kind not in KINDS:
    return None
  group = _group(one.rest, len(slices))
  arrays = [a for a in one.arrays if a.shape != "u32[]"]
  total, n = sum(a.bytes for a in arrays), len(group)
  if one.kind == "all-gather-start":  # what goes in stands there too
    total = total * n // (n + 1)
  elif one.kind == "collective-permute-start":
    total //= 2
  elif kind == "reduce-scatter":
    total *= n
  shape = max(arrays, key=lambda a: a.bytes).shape if arrays else ""
  return Collective(kind, total, group, times, shape, _source(one))


def _across(
  one: Instruction, slices: Sequence[int], times: int
) -> Collective | None:
  """A collective over slices, which the hosts do: a device hands its part out.

  The devices that hold the same part in each slice exchange it.
  """
  told = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.rest)
  if not told:
    return None
  kind = told[1].lower().replace("_", "-")
  group = tuple(slices.index(n) for n in sorted(set(slices)))
  size = one.arrays[0].bytes
  if kind in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all"):
    size *= len(group) if kind == "all-gather" else 1
  else:
    kind = "collective-permute"
  return Collective(kind, size, group, times, one.arrays[0].shape, _source(one))


def _source(one: Instruction) -> str:
  source = re.search(r'op_name="([^"]*)"', one.rest)
  return source[1] if source else ""


def _group(rest: str, num_devices: int) -> tuple[int, ...]:
  """The first of the groups of an operation.

  They are written as a list, as the axes of a mesh, or as a range that is
  shaped and transposed.
  """
  if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
    return int(pairs[1]), int(pairs[2])
  if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
    return tuple(int(n) for n in listed[1].split(","))
  if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
    sizes = [int(n) for n in re.findall(r"=(\d+)", mesh[1])]
    names = re.findall(r"'([^']+)'=", mesh[1])
    taken = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[2])
    return _along(names, sizes, taken)
  shaped = r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
  if found := re.search(shaped, rest):
    sizes = [int(n) for n in found[3].split(",")]
    axes = [int(n) for n in (found[4] or "").split(",") if n]
    ids = _transposed(sizes, axes or list(range(len(sizes))))
    return tuple(ids[: int(found[2])])
  return tuple(range(num_devices))


def _along(
  names: list[str], sizes: list[int], taken: list[tuple[str, str, str]]
) -> tuple[int, ...]:
  """Devices that differ along some axes of a mesh, from the first on."""
  ids = [0]
  for name, before, part in taken:
    at = names.index(name)
    stride, count = math.prod(sizes[at + 1 :]), sizes[at]
    if part:  # of the axis, taken apart, one factor
      stride *= count // (int(before) * int(part))
      count = int(part)
    ids = [i + stride * n for i in ids for n in range(count)]
  return tuple(ids)


def _transposed(sizes: list[int], axes: list[int]) -> list[int]:
  """0, 1, ... in this shape, transposed, in order."""
  strides = [math.prod(sizes[n + 1 :]) for n in range(len(sizes))]
  ids = [0]
  for axis in axes:
    ids = [i + strides[axis] * n for i in ids for n in range(sizes[axis])]
  return ids
