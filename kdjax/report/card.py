"""The run in one picture, `summary.png` and in dark: for a README."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from kdjax.report import curves, sections
from kdjax.report.runs import Run
from kdjax.report.style import DARK, LIGHT, Theme, png
from kdjax.results import COLUMNS

_SHOWN = ("accuracy", "bits_per_byte", "nll", "ece", "agreement", "kl")
_TITLES = {
  "accuracy": "accuracy %",
  "bits_per_byte": "bits per byte",
  "nll": "NLL",
}


def card(runs: Sequence[Run]) -> dict[str, bytes]:
  """1200 pixels wide: what was learned over the steps, and the table."""
  shown, bars = curves.series(runs), sections.bars(runs)
  logged = set().union(*(s.names for s in shown))
  quality = next(
    (
      f"eval/{n}"
      for n in ("bits_per_byte", "accuracy")
      if f"eval/{n}" in logged
    ),
    "loss/total",
  )
  second = "eval/nll" if "eval/nll" in logged else "loss/total"
  columns = [n for n in _SHOWN if any(bar.values.get(n) for bar in bars)]
  head = ["", "parameters", *(COLUMNS[n][0] for n in columns)]
  rows = [
    [
      bar.label,
      sections.cell(bar.values.get("parameters"), "parameters"),
      *(sections.cell(bar.values.get(n), n) for n in columns),
    ]
    for bar in bars
  ]

  def draw(figure: Figure, theme: Theme) -> None:
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.15, h_pad=0.1)
    ratios = [3.4, 0.5 + 0.36 * len(rows)]
    above, below = np.asarray(figure.subfigures(2, height_ratios=ratios)).flat
    for name, axes in zip((quality, second), above.subplots(1, 2)):
      curves.plot(axes, theme, [(s, name) for s in shown])
      what = name.removeprefix("eval/")
      axes.set_title(f"{_TITLES.get(what, what)}, held-out", fontsize=12)
      axes.set_xlabel("step", fontsize=11)
      axes.tick_params(labelsize=11)
      if what == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
      if name == quality:
        axes.legend(fontsize=11, loc="best", handlelength=2.6)
    _table(below.subplots(), theme, head, rows, [bar.look for bar in bars])

  height = 4.1 + 0.36 * len(rows)
  return {
    f"summary{ending}.png": png(draw, theme, 12, height, dpi=100)
    for ending, theme in (("", LIGHT), ("-dark", DARK))
  }


def _table(
  axes: Any,
  theme: Theme,
  head: Sequence[str],
  rows: Sequence[Sequence[str]],
  looks: Sequence[int],
) -> None:
  axes.set_axis_off()
  columns = list(zip(head, *rows))
  widths = [max(map(len, column)) + 2 for column in columns]
  total, at = sum(widths), 0
  axes.set(xlim=(0, total), ylim=(len(rows) + 0.5, -0.5))
  for n, (column, width) in enumerate(zip(columns, widths)):
    at += width
    x, side = (0.3, "left") if n == 0 else (at, "right")
    for y, text in enumerate(column):
      axes.text(
        x,
        y,
        text,
        ha=side,
        va="center",
        size=11,
        weight="bold" if y == 0 else "normal",
        color=(
          theme.lines[looks[y - 1] % len(theme.lines)]
          if n == 0 and y
          else theme.ink
        ),
      )
  axes.axhline(0.5, color=theme.grid, linewidth=1)
