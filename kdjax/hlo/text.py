"""Instructions of a compiled program, read from its text."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_BITS = re.compile(r"[a-z]+?(\d+)")


class Array(NamedTuple):
  """An array of the program: its bytes, and whether it lies in HBM."""

  bytes: int
  in_hbm: bool
  shape: str


class Instruction(NamedTuple):
  name: str
  arrays: tuple[Array, ...]
  kind: str
  operands: tuple[str, ...]
  rest: str
  root: bool


def instruction(line: str) -> Instruction | None:
  """What a line of the text is; None: no instruction."""
  named = re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line)
  if not named:
    return None
  shape, rest = _until_closed(line[named.end() :])
  kind = re.match(r" ([\w-]+)\(", rest)
  if not kind:
    return None
  operands, rest = _until_closed(rest[kind.end() - 1 :])
  names = re.findall(r"%([\w.-]+)", operands)
  if not names:
    names = [x.split()[-1] for x in operands[1:-1].split(",") if x.strip()]
  arrays = tuple(_arrays(shape))
  return Instruction(
    named[2], arrays, kind[1], tuple(names), rest, bool(named[1])
  )


def _until_closed(text: str) -> tuple[str, str]:
  """What stands before the first space or comma outside brackets; the rest."""
  depth = 0
  for n, letter in enumerate(text):
    depth += (letter in "([{") - (letter in ")]}")
    if depth == 0 and (letter == ")" or text[n + 1 : n + 2] in ("", " ", ",")):
      return text[: n + 1], text[n + 1 :]
  return text, ""


def _arrays(shape: str) -> Iterator[Array]:
  for dtype, sizes, layout in _ARRAY.findall(shape):
    bits = _BITS.match(dtype)
    width = int(bits[1]) / 8 if bits else 1  # pred; a token has no size
    count = math.prod(int(n) for n in sizes.split(",") if n)
    size = 0 if dtype == "token" else math.ceil(count * width)
    elsewhere = re.search(r"S\([1-9]\)", layout)
    yield Array(size, not elsewhere, f"{dtype}[{sizes}]")
