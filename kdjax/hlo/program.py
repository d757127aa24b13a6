"""A compiled program: its loops, its collectives, its memory traffic."""

import collections
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kdjax.hlo.collectives import Collective, collective
from kdjax.hlo.text import Array, Instruction, instruction

_BEGIN = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"(to_apply|calls|body)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# Instructions that move nothing by themselves.
_FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while",
  "conditional", "call", "after-all", "partition-id", "replica-id", "iota",
  "opt-barrier", "add-dependency",
}  # fmt: skip


class Program:
  """The text of a compiled program, taken apart.

  Args:
    text: of `compiled.as_text()`.
    open_trips: how often a loop runs whose length the data decide.
  """

  def __init__(self, text: str, open_trips: int = 1):
    self._open_trips = open_trips
    self.computations: dict[str, list[Instruction]] = {}
    self.entry, inside = "", ""
    for line in text.splitlines():
      if begin := _BEGIN.match(line):
        inside = begin[2]
        self.entry = inside if begin[1] else self.entry
        self.computations[inside] = []
      elif inside and (found := instruction(line)):
        self.computations[inside].append(found)
    self._callers = self._found_callers()

  @functools.cached_property
  def times(self) -> Mapping[str, int]:
    """How often a step runs each computation."""

    @functools.cache
    def of(name: str) -> int:
      if name == self.entry:
        return 1
      return sum(of(by) * trips for by, trips, _ in self._callers[name])

    return {name: of(name) for name in self.computations}

  def collectives(self, slices: Sequence[int]) -> list[Collective]:
    """Those of a step, each operation of the program once.

    Args:
      slices: of each device of the program, the slice that it is in.
    """
    found: dict[Any, Collective] = {}
    for name, instructions in self.computations.items():
      times = self.times[name]
      for one in instructions if times else ():
        made = collective(one, slices, times)
        if made is None:
          continue
        # A TPU's reduce-scatter is written as an all-reduce that is cut.
        if name.startswith("all-reduce-scatter"):
          made = made._replace(kind="reduce-scatter")
        key: Any = name, one.name
        channel = re.search(r"channel_id=(\d+)", one.rest)
        # Overlapped with other work, one operation is a part of several.
        if channel and self._is_fused(name):
          key = channel[1], made.shape
        found[key] = made
    return list(found.values())

  def traffic(self) -> int:
    """Bytes that a step reads from and writes to HBM, at the least.

    What goes in and out of each instruction that is not part of a fused one. Of
    what is only sliced, gathered from, or updated in place, the slice counts.
    """
    return sum(
      self.times[name] * sum(self._moved(one, arrays) for one in instructions)
      for name, instructions in self.computations.items()
      if self.times[name] and not self._is_fused(name)
      for arrays in [{one.name: one.arrays for one in instructions}]
    )

  def _found_callers(self) -> dict[str, list[tuple[str, int, str]]]:
    """Computation -> (its caller, runs for each of the caller's, by what)."""
    callers = collections.defaultdict(list)
    for name, instructions in self.computations.items():
      for one in instructions:
        for how, called in _CALLED.findall(one.rest):
          trips = self._trips(one, name) if how == "body" else 1
          callers[called].append((name, trips, one.kind))
        for listed in _BRANCHES.findall(one.rest):
          for called in re.findall(r"[\w.-]+", listed):
            callers[called].append((name, 1, one.kind))
    return callers

  def _trips(self, loop: Instruction, around: str) -> int:
    """From the compiler's note, or from the loop's counter and its limit."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
      return int(known[1])
    called = dict(re.findall(r"(condition|body)=%?([\w.-]+)", loop.rest))
    condition, body = (called.get(k, "") for k in ("condition", "body"))
    test = self._root(condition)
    given = self._find(around, loop.operands[0])
    if test is None or test.kind != "compare" or given is None:
      return self._open_trips
    counter, limit = (self._find(condition, x) for x in test.operands)
    at = _index(counter)
    if at is None or limit is None:
      return self._open_trips

    def begins(index: int) -> int | None:
      return _value(self._find(around, given.operands[index]))

    end, start = _value(limit), begins(at)
    if (where := _index(limit)) is not None:
      end = begins(where)
    last = self._root(body)
    moved = last and self._find(body, last.operands[at])
    step = 1
    if moved and moved.kind == "add":
      added = [_value(self._find(body, x)) for x in moved.operands]
      step = next((n for n in added if n), 1)
    if end is None:
      return self._open_trips
    return max(-(-(end - (start or 0)) // step), 1)

  def _root(self, name: str) -> Instruction | None:
    inside = self.computations.get(name, [])
    return next((x for x in inside if x.root), None)

  def _find(self, inside: str, name: str) -> Instruction | None:
    """What an operand is, copies looked through."""
    by_name = self._by_name[inside]
    found = by_name.get(name)
    while found and found.kind in ("copy", "copy-start", "copy-done"):
      found = by_name.get(found.operands[0])
    return found

  @functools.cached_property
  def _by_name(self) -> Mapping[str, Mapping[str, Instruction]]:
    return {
      name: {x.name: x for x in instructions}
      for name, instructions in self.computations.items()
    }

  def _is_fused(self, name: str) -> bool:
    """Whether its caller is an instruction that counts as one."""
    if name == self.entry:
      return False
    kinds = {kind for _, _, kind in self._callers[name]}
    return not kinds & {"while", "conditional", "call"}

  def _moved(
    self, one: Instruction, arrays: Mapping[str, tuple[Array, ...]]
  ) -> int:
    kind = one.kind
    if kind in _FREE or kind.endswith(("-done", "-update")):
      return 0
    if kind in ("copy-start", "slice-start", "dynamic-slice-start"):
      # (destination, source, ...) or (source, destination, ...): what is
      # copied is the smaller, and each end counts that lies in HBM.
      ends = one.arrays[:2]
      return min(a.bytes for a in ends) * sum(a.in_hbm for a in ends)
    if kind in ("dynamic-slice", "gather"):
      return 2 * _in_hbm(one.arrays)
    if kind == "dynamic-update-slice":
      return 2 * _in_hbm(arrays.get(one.operands[1], ()))
    if inside := self._fused_into(one):
      return self._moved_by_fusion(one, inside, arrays)
    given = sum(_in_hbm(arrays.get(name, ())) for name in one.operands)
    return given + _in_hbm(one.arrays)

  def _moved_by_fusion(
    self,
    one: Instruction,
    inside: list[Instruction],
    arrays: Mapping[str, tuple[Array, ...]],
  ) -> int:
    by_name = {x.name: x for x in inside}
    total = 0
    for x in inside:
      if x.kind == "parameter":
        given = arrays.get(one.operands[int(x.operands[0])], ())
        total += int(min(self._read(x.name, inside), _in_hbm(given)))
    results = next(x for x in inside if x.root)
    made = results.operands if results.kind == "tuple" else (results.name,)
    for name, array in zip(made, one.arrays):
      while by_name[name].kind == "bitcast":
        name = by_name[name].operands[0]
      written, last = array.bytes, by_name[name]
      if last.kind == "dynamic-update-slice":
        written = by_name[last.operands[1]].arrays[0].bytes
      total += written if array.in_hbm else 0
    return total

  def _read(self, name: str, inside: list[Instruction]) -> float:
    """Bytes that a fusion reads of one of its parameters."""
    total = 0.0
    for x in inside:
      if name not in x.operands:
        continue
      called = self._fused_into(x)
      if x.kind in ("dynamic-slice", "gather") and x.operands[0] == name:
        total += x.arrays[0].bytes
      elif x.kind == "dynamic-update-slice" and x.operands[0] == name:
        continue
      elif x.kind == "bitcast":
        total += self._read(x.name, inside)
      elif called:
        at = x.operands.index(name)
        total += self._read(_parameter(called, at), called)
      else:
        return math.inf
    return total

  def _fused_into(self, one: Instruction) -> list[Instruction]:
    """What a fusion consists of; nothing for another instruction."""
    called = re.search(r"calls=%?([\w.-]+)", one.rest)
    if one.kind != "fusion" or not called:
      return []
    return self.computations.get(called[1], [])


def _index(one: Instruction | None) -> int | None:
  """Which element of a loop's variables it is."""
  if one is None or one.kind != "get-tuple-element":
    return None
  found = re.search(r"index=(\d+)", one.rest)
  return int(found[1]) if found else None


def _value(one: Instruction | None) -> int | None:
  """The number that a constant is."""
  if one is None or one.kind != "constant" or not one.operands:
    return None
  return int(one.operands[0]) if one.operands[0].lstrip("-").isdigit() else None


def _parameter(inside: list[Instruction], number: int) -> str:
  """The name of one parameter of a fused computation."""
  given = (x for x in inside if x.kind == "parameter")
  return next(x.name for x in given if int(x.operands[0]) == number)


def _in_hbm(arrays: tuple[Array, ...]) -> int:
  return sum(a.bytes for a in arrays if a.in_hbm)
