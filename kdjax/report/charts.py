"""What a run comes to in the end, as pictures."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from kdjax.report.measures import Bins, Share
from kdjax.report.style import (
  DASHES,
  HATCHES,
  MARKERS,
  Picture,
  Theme,
  headed,
  logarithmic,
  picture,
)
from kdjax.results import COLUMNS, NETWORKS, stderr

# Classes that one picture can hold.
FEW = 25


class Bar(NamedTuple):
  """A network's values of each metric over seeds, and how it looks.

  Attributes:
    look: the number of its colour, and of its hatches.
    run, network: which it is; `label` says so where it stands alone.
  """

  label: str
  look: int
  run: str
  network: str
  values: Mapping[str, Sequence[float]]


def side_by_side(bars: Sequence[Bar], name: str) -> Picture:
  """A bar a network; whiskers are one standard error."""

  def draw(figure: Figure, theme: Theme) -> None:
    _bars(figure.subplots(), theme, bars, name)

  height = 0.5 + 0.3 * len(bars)
  says = f"{COLUMNS[name][0]} of the networks side by side"
  return picture(f"result_{name}", says, draw, height=height)


def _bars(axes: Any, theme: Theme, bars: Sequence[Bar], name: str) -> None:
  title, factor, form = COLUMNS[name]
  widest = 0.0
  for n, bar in enumerate(bars):
    values = bar.values.get(name)
    if not values:
      axes.text(0, n, " not measured", va="center", color=theme.faint)
      continue
    mean, error = factor * np.mean(values), stderr(values)
    axes.barh(
      n,
      mean,
      height=0.72,
      color=theme.lines[bar.look % len(theme.lines)],
      hatch=HATCHES[bar.look % len(HATCHES)],
      xerr=None if error is None else factor * error,
      ecolor=theme.ink,
    )
    text = f"{mean:{form}}"
    if error:
      text += f" ± {factor * error:{form}}"
    end = mean + factor * (error or 0)
    axes.annotate(
      text,
      (end, n),
      (5, 0),
      textcoords="offset points",
      va="center",
      size=9,
    )
    widest = max(widest, end)
  axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
  axes.invert_yaxis()
  axes.set_xlim(0, (widest or 1.0) * 1.38)
  axes.set_title(title)
  axes.grid(visible=False)
  axes.set_xticks([])
  axes.spines["bottom"].set_visible(False)
  axes.tick_params(axis="y", length=0)


def sizes(bars: Sequence[Bar], name: str) -> Picture:
  """Parameters, on a logarithmic axis, against the quality."""
  title, factor, _ = COLUMNS[name]

  def draw(figure: Figure, theme: Theme) -> None:
    axes = figure.subplots()
    for bar in bars:
      if not (bar.values.get("parameters") and bar.values.get(name)):
        continue
      values = bar.values[name]
      error = stderr(values)
      axes.errorbar(
        np.mean(bar.values["parameters"]),
        factor * np.mean(values),
        yerr=None if error is None else factor * error,
        color=theme.lines[bar.look % len(theme.lines)],
        marker=_mark(bar.network),
        markersize=8,
        linestyle="none",
      )
    logarithmic(axes, "x")
    axes.margins(0.15)
    axes.set_xlabel("parameters")
    axes.set_ylabel(title)
    axes.set_title("Size against quality")
    axes.legend(handles=_who(bars, theme), loc="best")

  return picture("size", f"Number of parameters against {title}", draw)


def _mark(network: str) -> str:
  return MARKERS[NETWORKS.index(network)]


def _who(bars: Sequence[Bar], theme: Theme) -> list[Line2D]:
  """Marks are networks; their colours too, or those of several runs."""
  made = []
  several = len({bar.run for bar in bars}) > 1
  for network in [n for n in NETWORKS if n in {bar.network for bar in bars}]:
    look = next(bar.look for bar in bars if bar.network == network)
    colour = theme.faint if several else theme.lines[look]
    mark, label = _mark(network), network.replace("_", " ")
    made.append(Line2D([], [], color=colour, marker=mark, ls="", label=label))
  runs = {bar.run: bar.look for bar in bars} if several else {}
  for run, look in runs.items():
    colour = theme.lines[look % len(theme.lines)]
    made.append(Line2D([], [], color=colour, lw=5, label=run))
  return made


def reliability(lines: Sequence[tuple[str, int, Bins]]) -> Picture:
  """How often each is right where it is so confident; below, how often it is.

  Args:
    lines: (label, look, its bins).
  """

  def draw(figure: Figure, theme: Theme) -> None:
    top, below = figure.subplots(2, sharex=True, height_ratios=[3.2, 1])
    top.plot([0, 1], [0, 1], color=theme.faint, linewidth=1)
    edges = np.linspace(0, 1, len(lines[0][2].examples) + 1)
    for label, look, bins in lines:
      colour = theme.lines[look % len(theme.lines)]
      dashes = DASHES[look % len(DASHES)]
      there = bins.examples > 0
      share = bins.examples / bins.examples.sum()
      marker = MARKERS[look % len(MARKERS)]
      found = bins.confidence[there], bins.accuracy[there]
      top.plot(*found, color=colour, linestyle=dashes, linewidth=0.9)
      top.scatter(
        *found,
        4 + 150 * share[there] ** 0.5,
        color=colour,
        marker=marker,
        clip_on=False,
        zorder=3,
      )
      name = f"{label} (ECE {bins.ece:.1%})"
      top.plot(
        [], [], color=colour, linestyle=dashes, marker=marker, label=name
      )
      below.stairs(share, edges, color=colour, linestyle=dashes, linewidth=1.4)
    top.set_ylabel("accuracy")
    top.set_ylim(0, 1.03)
    headed(top, "Calibration", columns=2)
    below.set_xlim(0, 1)
    below.set_ylabel("share")
    below.set_xlabel("confidence")

  says = "Calibration: accuracy where the confidence is so high, in 15 bins"
  return picture("calibration", says, draw, height=4.4)


def matrix(
  file: str, title: str, counts: np.ndarray, names: Sequence[str]
) -> Picture:
  """Teacher's guesses down, the student's across; the diagonal is grey."""
  size = len(counts)
  apart = np.where(np.eye(size, dtype=bool), 0, counts)

  def draw(figure: Figure, theme: Theme) -> None:
    axes = figure.subplots()
    heat = LinearSegmentedColormap.from_list("heat", [theme.ground, theme.heat])
    most = max(int(apart.max()), 1)
    axes.imshow(apart, cmap=heat, vmin=0, vmax=most)
    for n in range(size):
      at = n - 0.5, n - 0.5
      axes.add_patch(Rectangle(at, 1, 1, color=theme.grid, linewidth=0))
    if size <= 14:
      for i, j in np.argwhere(counts).tolist():
        dark = i != j and apart[i, j] > 0.75 * most
        axes.text(
          j,
          i,
          f"{counts[i, j]}",
          ha="center",
          va="center",
          size=7,
          color=theme.ground if dark else theme.ink,
        )
    turned = max(map(len, names)) > 2
    axes.set_xticks(range(size), names, rotation=90 if turned else 0)
    axes.set_yticks(range(size), names)
    axes.grid(visible=False)
    axes.tick_params(length=0, labelsize=8 if size <= 14 else 6.5)
    axes.set_xlabel("student says")
    axes.set_ylabel("teacher says")
    axes.set_title(title)

  return picture(file, f"{title}: who says what", draw, width=5, height=4.8)


def dumbbells(
  file: str,
  title: str,
  label: str,
  groups: Sequence[str],
  lines: Sequence[tuple[str, int, Sequence[Share | None]]],
  name: str,
) -> Picture:
  """A row a class, a mark a network; a rule joins the marks.

  Args:
    label: of the axis.
    groups: the rows.
    lines: (network, look, its share in each row).
    name: which number of `Share`.
  """

  def draw(figure: Figure, theme: Theme) -> None:
    axes = figure.subplots()
    for n in range(len(groups)):
      marks = [getattr(s[n], name) for _, _, s in lines if s[n] is not None]
      axes.plot([min(marks), max(marks)], [n, n], color=theme.grid, lw=4)
    for size, (network, look, shares) in zip((9, 6.5, 4), lines):
      at = [n for n, share in enumerate(shares) if share is not None]
      there = [share for share in shares if share is not None]
      errors = [share.errors[name] for share in there]
      axes.errorbar(
        [getattr(share, name) for share in there],
        at,
        xerr=None if None in errors else np.array(errors, float),
        color=theme.lines[look % len(theme.lines)],
        marker=MARKERS[look % len(MARKERS)],
        markersize=size,
        linestyle="none",
        elinewidth=1,
        capsize=2,
        label=network,
      )
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlabel(label)
    headed(axes, title, columns=3)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)

  height = 1.25 + 0.27 * len(groups)
  return picture(file, f"{title}: {label} of each", draw, height=height)


def times(rows: Sequence[tuple[str, Mapping[str, float]]]) -> Picture:
  """What the seconds of each network went into.

  Args:
    rows: (label, {what: seconds}).
  """
  totals: dict[str, float] = {}
  for _, seconds in rows:
    for what, spent in seconds.items():
      totals[what] = totals.get(what, 0.0) + spent
  whole = sum(totals.values())
  # What is too short to be seen would be in the legend alone.
  parts = [what for what in totals if totals[what] >= 0.002 * whole]
  parts.sort(key=lambda what: -totals[what])

  def draw(figure: Figure, theme: Theme) -> None:
    axes = figure.subplots()
    left = np.zeros(len(rows))
    for n, what in enumerate(parts):
      spent = np.array([seconds.get(what, 0.0) for _, seconds in rows])
      axes.barh(
        range(len(rows)),
        spent,
        left=left,
        height=0.62,
        color=theme.lines[n % len(theme.lines)],
        hatch=HATCHES[n % len(HATCHES)],
        label=what,
      )
      left += spent
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    headed(axes, "Where the time went", columns=3)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)

  height = 1.9 + 0.34 * len(rows)
  return picture("time", "Where the time of each went", draw, height=height)
