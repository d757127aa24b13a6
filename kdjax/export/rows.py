"""What an export tells of its networks, and its table."""

from collections.abc import Sequence
from typing import NamedTuple

from kdjax import results
from kdjax.export import serving


class Unit(NamedTuple):
  """What is measured: the headings of size and time, and what a call is."""

  size: str
  time: str
  call: str


IMAGE = Unit(
  "bytes on disk",
  "ms for one image",
  "of the exported program, from\nuint8 in host memory to logits in host "
  "memory, compilation and warm-up left out",
)
TOKEN = Unit(
  "bytes of weights",
  "ms a token",
  "of 32 greedy tokens after one,\nbatch 1, float32, compilation and warm-up "
  "left out",
)


class Exported(NamedTuple):
  """What is told of a network.

  Attributes:
    network: its name.
    parameters: how many numbers are trained, an inherited classifier's too.
    size: bytes on disk of the weights or of the program.
    latency: of the program, with one image; of a token.
    unit: which of the two.
  """

  network: str
  parameters: int
  size: int
  latency: serving.Latency
  unit: Unit


def table(rows: Sequence[Exported]) -> str:
  """A row a network; then, of two, the teacher's share to the student's."""
  unit = rows[-1].unit
  cells = [["", "parameters", unit.size, unit.time]]
  for row in rows:
    cells.append(
      [
        row.network.replace("_", " "),
        f"{row.parameters:,}",
        f"{row.size:,}",
        f"{1e3 * row.latency.median:.3f}",
      ]
    )
  if len(rows) == 2:
    teacher, student = rows
    cells.append(
      [
        "teacher / student",
        f"{teacher.parameters / student.parameters:.2f}",
        f"{teacher.size / student.size:.2f}",
        f"{teacher.latency.median / student.latency.median:.2f}",
      ]
    )
  calls = " and ".join(dict.fromkeys(str(r.latency.calls) for r in rows))
  lines = results.aligned(cells)
  lines.append(
    f"ms: median of {calls} calls on {serving.device()}, {unit.call}"
  )
  return "\n".join(lines)
