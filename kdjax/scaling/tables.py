"""The figures as a table, and for a JSON file."""

import collections
from collections.abc import Sequence
from typing import Any

import jax

from kdjax import chips, memory_plan
from kdjax.flops import peak
from kdjax.hlo import Collective
from kdjax.memory_plan import readable
from kdjax.scaling.figures import Figures


def table(figures: Figures) -> str:
  """What there is to be read of them."""
  axes = " x ".join(f"{name} {n}" for name, n in figures.mesh.items() if n > 1)
  count = len(figures.slices)
  slices = len(set(figures.slices))
  several = f", {slices} slices" if slices > 1 else ""
  lines = [
    f"{count} x {figures.kind}{several}: {axes or 'one device'}; compiled in "
    f"{figures.compile_seconds:.0f} s",
    "",
    # What this machine has says nothing of the devices.
    memory_plan.table(figures.memory._replace(limit=None)).rpartition("\n")[0],
  ]
  chip = chips.CHIPS.get(figures.kind)
  if chip is not None:
    fits = "fits" if figures.memory.total <= chip.hbm else "DOES NOT FIT"
    lines.append(f"{fits}: a chip has {readable(chip.hbm)}")
  lines += ["", *_of_collectives(figures), "", *_of_time(figures)]
  return "\n".join(lines)


def grouped(
  found: Sequence[Collective], slices: Sequence[int]
) -> list[dict[str, Any]]:
  """By kind and by whether a loop runs them, what travels most first."""
  sums: dict[Any, dict[str, Any]] = collections.defaultdict(
    lambda: {"operations": 0, "times": 0, "bytes": 0, "ici": 0.0, "dcn": 0.0}
  )
  for one in found:
    total = sums[one.kind, one.times > 1]
    within, across = chips.sent(one, slices)
    total["operations"] += 1
    total["times"] += one.times
    total["bytes"] += one.times * one.bytes
    total["ici"] += one.times * within
    total["dcn"] += one.times * across
  rows = [
    {"kind": kind, "in_loop": looped, **total}
    for (kind, looped), total in sums.items()
  ]
  return sorted(rows, key=lambda row: -row["ici"] - row["dcn"])


def _of_collectives(figures: Figures) -> list[str]:
  lines = [
    f"{'collectives of a step':<30}{'in the text':>12}{'times':>8}"
    f"{'bytes':>12}{'sent':>12}{'to slices':>12}"
  ]
  for row in grouped(figures.collectives, figures.slices):
    name = row["kind"] + (", in a loop" if row["in_loop"] else "")
    sizes = (readable(int(row[k])) for k in ("bytes", "ici", "dcn"))
    lines.append(
      f"{name:<30}{row['operations']:>12}{row['times']:>8}"
      + "".join(f"{size:>12}" for size in sizes)
    )
  return lines if len(lines) > 1 else ["no collectives"]


def _of_time(figures: Figures) -> list[str]:
  lines = [
    f"FLOPs of a device         {figures.flops:.4g}, of the model "
    f"{figures.of_model:.4g}",
    f"traffic of its memory     {readable(figures.traffic)}",
  ]
  if figures.seconds is None:
    return lines
  least = max(figures.seconds, key=lambda name: figures.seconds[name])  # type: ignore
  seconds = figures.seconds[least]
  told = ", ".join(f"{k} {1e3 * v:.4g}" for k, v in figures.seconds.items())
  most = figures.of_model / (seconds * (peak(figures.kind) or 1))
  return [
    *lines,
    f"a step takes at least     {1e3 * seconds:.4g} ms, by {least} ({told})",
    f"MFU is at most            {most:.1%}",
  ]


def content(figures: Figures) -> dict[str, Any]:
  """The figures, for a JSON file."""
  memory = figures.memory
  return {
    "device": figures.kind,
    "devices": len(figures.slices),
    "slices": len(set(figures.slices)),
    "mesh": figures.mesh,
    "memory": memory.figures(),
    "flops": figures.flops,
    "model_flops": figures.of_model,
    "traffic": figures.traffic,
    "collectives": grouped(figures.collectives, figures.slices),
    "seconds": figures.seconds,
    "compile_seconds": figures.compile_seconds,
    "jax": jax.__version__,
  }
