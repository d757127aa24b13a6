"""What was logged over the steps, as pictures."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kdjax.report.runs import Network, Run
from kdjax.report.style import (
  DASHES,
  MARKERS,
  Picture,
  Theme,
  headed,
  logarithmic,
  picture,
)

_POINTS = 150  # of a line; longer ones are averaged
_SCHEDULES = ("temperature", "alpha", "learning_rate")
_WIDE = 30.0  # a range that a logarithmic axis shows better


class Series(NamedTuple):
  """What is one line: the seeds of a network of a run.

  Attributes:
    look: the number of its colour, dashes and marker.
  """

  label: str
  look: int
  seeds: Sequence[Network]

  @property
  def names(self) -> set[str]:
    return set().union(*(net.metrics for net in self.seeds))


class Line(NamedTuple):
  """Means over seeds at some steps, and their standard errors or None."""

  steps: np.ndarray
  mean: np.ndarray
  error: np.ndarray | None


def series(runs: Sequence[Run]) -> list[Series]:
  """Of one run its networks, of several the student of each."""
  if len(runs) == 1:
    (run,) = runs
    return [
      Series(name.replace("_", " "), n, run.of(name))
      for n, name in enumerate(
        ("teacher", "student_alone", "student_distilled")
      )
      if run.of(name)
    ]
  return [
    Series(label_of(run), n, run.of(last_network(run)))
    for n, run in enumerate(runs)
  ]


def last_network(run: Run) -> str:
  """The distilled student, or the nearest that there is."""
  return [name for name in run.networks if run.of(name)][-1]


def label_of(run: Run) -> str:
  network = last_network(run)
  if network == "student_distilled":
    return run.name
  return f"{run.name} ({network.replace('_', ' ')})"


def line(seeds: Iterable[Network], name: str) -> Line | None:
  """The metric's mean over the seeds that have it, long ones in averages."""
  given = [net.metrics[name] for net in seeds if name in net.metrics]
  if not given:
    return None
  steps = np.unique(np.concatenate([x[:, 0] for x in given]))
  if len(steps) > _POINTS:
    edges = np.linspace(steps[0], steps[-1], _POINTS + 1)
    place = lambda x: np.clip(  # noqa: E731
      np.searchsorted(edges, x, "right") - 1, 0, _POINTS - 1
    )
    shown = (edges[:-1] + edges[1:]) / 2
  else:
    place = lambda x: np.searchsorted(steps, x)  # noqa: E731
    shown = steps
  values = np.stack([_binned(x, place, len(shown)) for x in given])
  there = np.isfinite(values)
  count = there.sum(0)
  kept = count > 0
  mean = np.where(there, values, 0).sum(0) / np.maximum(count, 1)
  if len(given) < 2:
    return Line(shown[kept], mean[kept], None)
  spread = np.where(there, values - mean, 0)
  variance = (spread**2).sum(0) / np.maximum(count - 1, 1)
  error = np.sqrt(variance / np.maximum(count, 1))
  return Line(shown[kept], mean[kept], error[kept])


def _binned(rows: np.ndarray, place: Callable[..., Any], size: int):
  rows = rows[np.isfinite(rows[:, 1])]
  bins = place(rows[:, 0])
  total = np.bincount(bins, rows[:, 1], size)
  with np.errstate(invalid="ignore"):
    return total / np.bincount(bins, minlength=size)


def held_out(shown: Sequence[Series]) -> list[Picture]:
  """One picture for each `eval/<metric>`."""
  return [_of_one(name, shown) for name in _all(shown, "eval/")]


def losses(shown: Sequence[Series], *, one_run: bool) -> list[Picture]:
  """Losses, and below them what weighs and softens them, on the same axis."""
  made = []
  if one_run:
    student = shown[-1]
    terms = [n for n in _all([student], "loss/") if n != "loss/total"]
    terms = ["loss/total", *terms]
    if "kl_at_1" in student.names:
      terms.append("kl_at_1")
    strips = _strips([student])
    lines = [Series(n, k, student.seeds) for k, n in enumerate(terms)]
    says = f"Loss of {student.label}, by term"
    made.append(
      _stacked(
        "loss_terms",
        says,
        [(s, s.label) for s in lines],
        [
          (
            title,
            [(Series(n, k, student.seeds), n) for k, n in enumerate(names)],
          )
          for title, names in strips
        ],
      )
    )
  # Of one run the student's other schedules are in the picture before.
  below = [n for title, names in _strips(shown) for n in names]
  if one_run:
    below = [n for n in below if n.startswith("learning_rate")]
  strips = [(n, [(s, n) for s in shown]) for n in below]
  made.append(
    _stacked(
      "loss_total",
      "Total loss",
      [(s, "loss/total") for s in shown],
      strips[:6],
    )
  )
  names = [n for n in [*_all(shown, "loss/"), "kl_at_1"] if n != "loss/total"]
  several = lambda n: sum(n in s.names for s in shown) > 1  # noqa: E731
  return made + [_of_one(n, shown) for n in names if several(n)]


def speed(shown: Sequence[Series]) -> list[Picture]:
  """One picture for each `perf/<figure>`."""
  return [_of_one(name, shown) for name in _all(shown, "perf/")]


def others(shown: Sequence[Series]) -> list[Picture]:
  """One picture for each metric that no other picture has."""
  known = {n for _, names in _strips(shown) for n in names} | {"kl_at_1"}
  groups = ("eval/", "loss/", "perf/")
  return [
    _of_one(name, shown)
    for name in _all(shown, "")
    if name not in known and not name.startswith(groups)
  ]


def _all(shown: Sequence[Series], begins: str) -> list[str]:
  names = set().union(*(s.names for s in shown))
  return sorted(n for n in names if n.startswith(begins))


def _strips(shown: Sequence[Series]) -> list[tuple[str, list[str]]]:
  """(title, metrics) of what stands below the losses."""
  names = _all(shown, "")
  weights = [n for n in names if n == "alpha" or n.startswith("weight/")]
  temperatures = [n for n in names if n.startswith("temperature")]
  rates = [n for n in names if n.startswith("learning_rate")]
  found = [("T", temperatures), ("weights", weights), ("rate", rates)]
  return [(title, some) for title, some in found if some]


def _of_one(name: str, shown: Sequence[Series]) -> Picture:
  def draw(figure: Figure, theme: Theme) -> None:
    axes = figure.subplots()
    plot(axes, theme, [(s, name) for s in shown])
    headed(axes, name, columns=4)
    axes.set_xlabel("step")

  file = name.replace("/", "_")
  return picture(file, f"{name} over the steps", draw, height=3.2)


def _stacked(
  file: str,
  says: str,
  lines: Sequence[tuple[Series, str]],
  strips: Sequence[tuple[str, Sequence[tuple[Series, str]]]],
) -> Picture:
  """A large panel, and one a strip below it, that share their steps."""
  strips = [s for s in strips if any(x.names & {n} for x, n in s[1])]

  def draw(figure: Figure, theme: Theme) -> None:
    ratios = [3.2, *[1] * len(strips)]
    axes = figure.subplots(
      len(ratios), sharex=True, squeeze=False, height_ratios=ratios
    )[:, 0]
    plot(axes[0], theme, lines)
    headed(axes[0], says, columns=4)
    for (title, below), ax in zip(strips, axes[1:]):
      plot(ax, theme, below, logs=False)
      ax.set_ylabel(_short(title))
      ax.yaxis.set_major_locator(MaxNLocator(2))
      if len({n for _, n in below}) > 1:
        _legend(ax)
    axes[-1].set_xlabel("step")
    figure.align_ylabels(axes)

  return picture(file, says, draw, height=3.1 + 0.85 * len(strips))


def _short(name: str) -> str:
  return {"learning_rate": "rate", "temperature": "T"}.get(
    name, name.removeprefix("weight/")
  )


def plot(
  axes: Any,
  theme: Theme,
  lines: Sequence[tuple[Series, str]],
  *,
  logs: bool = True,
) -> None:
  """A line for each (series, metric) that was logged, seeds as a band.

  Args:
    logs: whether a wide range makes the axis logarithmic; False of schedules.
  """
  low, high = np.inf, -np.inf
  for place, (one, name) in enumerate(lines):
    found = line(one.seeds, name)
    if found is None or not len(found.steps):
      continue
    colour = theme.lines[one.look % len(theme.lines)]
    few = len(found.steps) <= 30
    width = 1.6 if few else 1.2
    if not logs:  # schedules are often the same: a later one lies in the first
      width = max(3.2 - 0.8 * place, 1.2)
    axes.plot(
      found.steps,
      found.mean,
      color=colour,
      linestyle=DASHES[one.look % len(DASHES)],
      marker=MARKERS[one.look % len(MARKERS)] if few else None,
      markersize=4,
      linewidth=width,
      label=one.label,
    )
    if found.error is not None:
      band = found.mean - found.error, found.mean + found.error
      axes.fill_between(found.steps, *band, color=colour, alpha=0.2, lw=0)
    low, high = min(low, found.mean.min()), max(high, found.mean.max())
  axes.xaxis.set_major_locator(
    MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
  )
  if logs and low > 0 and high / low > _WIDE:
    logarithmic(axes, "y")
    return
  axes.margins(y=0.08)
  if np.isfinite(low) and high - low < 1e-9 * max(abs(high), 1e-9):
    room = abs(high) * 0.5 or 1.0  # a constant, amid its strip
    axes.set_ylim(low - room, high + room)


def _legend(axes: Any) -> None:
  axes.legend(
    fontsize=7.5, loc="center right", handlelength=2.6, labelspacing=0.3
  )
