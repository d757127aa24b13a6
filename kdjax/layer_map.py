"""Which layer of the student learns from which of the teacher.

    layer_pairs(student_taps, teacher_taps, "block_*", "block_*", "evenly")

Names are sorted as people count: `block_2` before `block_10`.
"""

import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable

from kdjax import errors

# (i of n student layers, m teacher layers) -> teacher layer, all from 0.
MAPS: dict[str, Callable[[int, int, int], int]] = {
  # The last learns from the last, the others at equal distances before it.
  "evenly": lambda i, n, m: -(-(i + 1) * m // n) - 1,
  # The first from the first, the last from the last, others evenly between.
  "spread": lambda i, n, m: (2 * i * (m - 1) + n - 1) // max(2 * n - 2, 1),
  "first": lambda i, n, m: i,
  "last": lambda i, n, m: m - n + i,
}


def layer_pairs(
  student_taps: Iterable[str],
  teacher_taps: Iterable[str],
  student: str,
  teacher: str,
  rule: str | Callable[[int, int, int], int] = "one_to_one",
) -> list[tuple[str, str]]:
  """Pairs of tap names.

  Args:
    student_taps, teacher_taps: the names there are.
    student, teacher: a name, or a pattern such as "stage_*" or "stage_[23]".
    rule: "one_to_one" (as many on either side), "evenly", "spread", "first",
      "last", or f(i, n, m), the teacher's layer for the student's layer i.

  Raises:
    UserError: a name or pattern that no tap has (the taps there are, listed);
      counts that the rule does not bring together.
  """
  ours = matching("student", student, student_taps)
  theirs = matching("teacher", teacher, teacher_taps)
  n, m = len(ours), len(theirs)
  if rule == "one_to_one":
    if n != m:
      raise errors.UserError(
        f"{student!r} matches {n} student taps ({', '.join(ours)}), "
        f"{teacher!r} {m} teacher taps ({', '.join(theirs)}): name as many on "
        f"either side, or choose map={' or '.join(map(repr, MAPS))}"
      )
    return list(zip(ours, theirs))
  chosen = rule if callable(rule) else MAPS.get(str(rule))
  if chosen is None:
    raise errors.unknown("map", str(rule), ["one_to_one", *MAPS])
  pairs = []
  for i, name in enumerate(ours):
    layer = chosen(i, n, m)
    if not 0 <= layer < m:
      raise errors.UserError(
        f"the layer map sends student layer {i} of {n} to teacher layer {layer}"
        f", the teacher has 0..{m - 1}: choose map='evenly', or other patterns"
      )
    pairs.append((name, theirs[layer]))
  return pairs


def matching(side: str, pattern: str, taps: Iterable[str]) -> list[str]:
  """The taps that a name or pattern means, in order.

  Raises:
    UserError: if there is none; it lists the taps there are.
  """
  taps = sorted(taps, key=_counted)
  found = [t for t in taps if fnmatch.fnmatchcase(t, pattern)]
  if not found:
    raise errors.unknown(f"{side} tap", pattern, taps)
  return found


def consecutive(pairs: list[tuple[str, str]]) -> list[tuple[tuple, tuple]]:
  """[(a, x), (b, y), (c, z)] -> [((a, b), (x, y)), ((b, c), (y, z))].

  Raises:
    UserError: if there are fewer than two pairs.
  """
  if len(pairs) < 2:
    raise errors.UserError(
      f"got {len(pairs)} pair of taps, needs two or more that follow one "
      "another: name more stages"
    )
  return [((a, b), (x, y)) for (a, x), (b, y) in itertools.pairwise(pairs)]


def _counted(name: str) -> list[tuple[int, int, str]]:
  parts = re.split(r"(\d+)", name)
  return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in parts]
