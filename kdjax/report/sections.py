"""The parts of the page: each a heading, what it says, and pictures."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kdjax.report import charts, curves, measures
from kdjax.report.charts import Bar
from kdjax.report.html import Html, el, image, join, pictures, table
from kdjax.report.runs import Run, outcomes
from kdjax.report.style import Picture
from kdjax.results import COLUMNS, NETWORKS, stderr

STUDENTS = NETWORKS[1:]


def beside(made: Sequence[Picture], says: str) -> Html:
  """A picture, and what it says at its side."""
  return el("div", *map(image, made), el("p", says), class_="pictures")


class Section(NamedTuple):
  title: str
  body: Html
  pictures: Sequence[Picture] = ()


def plain(network: str) -> str:
  return network.replace("_", " ")


def short(network: str) -> str:
  return network.removeprefix("student_")


def bars(runs: Sequence[Run]) -> list[Bar]:
  """A bar for each network of each run."""
  found = []
  for n, run in enumerate(runs):
    for network, values in outcomes(run).items():
      alone = len(runs) == 1
      label = plain(network) if alone else f"{run.name}: {plain(network)}"
      look = NETWORKS.index(network) if alone else n
      found.append(Bar(label, look, run.name, network, values))
  return found


def results(runs: Sequence[Run]) -> Section:
  """The table, what distillation gains, and bars."""
  shown = bars(runs)
  columns = [n for n in COLUMNS if any(bar.values.get(n) for bar in shown)]
  rows = [
    [bar.label, *(cell(bar.values.get(n), n) for n in columns)] for bar in shown
  ]
  head = ["", *(COLUMNS[n][0] for n in columns)]
  counts = {len(v) for bar in shown for v in bar.values.values() if v}
  seeds = f"{min(counts, default=0)}"
  if len(counts) > 1:
    seeds += f" to {max(counts)}"
  caption = "of the held-out data, after the last update"
  if max(counts, default=0) > 1:
    caption += f"; means over {seeds} seeds ± one standard error"
  gains = [_gain(run, named=len(runs) > 1) for run in runs]
  body = [table(head, rows, caption=caption), *gains]
  quality = [n for n in columns if n not in ("parameters", "flops")]
  quality = [n for n in quality if n != "flops_per_token"]
  made = [charts.side_by_side(shown, name) for name in quality]
  body.append(pictures(made))
  return Section("Results", join(body), made)


def cell(values: Sequence[float] | None, name: str) -> str:
  if not values:
    return "–"
  _, factor, form = COLUMNS[name]
  text = f"{factor * statistics.fmean(values):{form}}"
  error = stderr(values)
  return f"{text} ± {factor * error:{form}}" if error else text


def _gain(run: Run, *, named: bool) -> Html | None:
  """Distilled minus alone, seed by seed."""
  found = outcomes(run)
  name = _quality(found)
  alone, distilled = (found.get(n, {}).get(name, ()) for n in STUDENTS)
  if not alone or len(alone) != len(distilled):
    return None
  title, factor, form = COLUMNS[name]
  gains = [factor * (b - a) for a, b in zip(alone, distilled)]
  text = f"{statistics.fmean(gains):+{form}}"
  error = stderr(gains)
  if error is not None:
    text += f" ± {error:{form}} (standard error over {len(gains)} seeds)"
  where = f"{run.name}: d" if named else "D"
  return el("p", f"{where}istilled minus alone, {title}: ", el("b", text), ".")


def _quality(found: Mapping[str, Mapping[str, Any]]) -> str:
  """The metric that a task is judged by."""
  there = set().union(*found.values()) if found else set()
  return "bits_per_byte" if "bits_per_byte" in there else "accuracy"


def size(runs: Sequence[Run]) -> Section | None:
  shown = bars(runs)
  if not any(bar.values.get("parameters") for bar in shown):
    return None
  name = _quality({bar.label: bar.values for bar in shown})
  made = [charts.sizes(shown, name)]
  says = "Up and to the left is better."
  if name == "bits_per_byte":
    says = "Down and to the left is better."
  return Section("Size", beside(made, says), made)


def training(runs: Sequence[Run]) -> Section:
  shown = curves.series(runs)
  loss = curves.losses(shown, one_run=len(runs) == 1)
  held_out, others = curves.held_out(shown), curves.others(shown)
  several = any(len(s.seeds) > 1 for s in shown)
  band = "Bands are one standard error over the seeds. " if several else ""
  whose = "" if len(runs) == 1 else "Each line is the student of a run. "
  body = [
    el(
      "p",
      f"{whose}{band}Long runs are averaged over steps, to 150 points a line.",
      class_="faint",
    ),
    el("h3", "Held-out data") if held_out else None,
    pictures(held_out),
    el("h3", "Losses and schedules"),
    pictures(loss),
    el("h3", "What else was logged") if others else None,
    pictures(others),
  ]
  return Section("Curves", join(body), [*held_out, *loss, *others])


def calibration(runs: Sequence[Run]) -> Section | None:
  if len(runs) == 1:
    (run,) = runs
    given = [
      (plain(n), NETWORKS.index(n), run.facts(n))
      for n in run.networks
      if run.facts(n)
    ]
  else:
    given = [
      (curves.label_of(run), n, run.facts(curves.last_network(run)))
      for n, run in enumerate(runs)
      if run.facts(curves.last_network(run))
    ]
  if not given:
    return None
  lines = [(a, n, measures.calibration(facts)) for a, n, facts in given]
  made = [charts.reliability(lines)]
  says = (
    "Among the examples on which a network is so confident, the share on which "
    "it is right. Below the diagonal it is too sure of itself. The lower panel "
    "is how often it is so confident, and so is the size of the marks: small "
    "ones say little. Seeds are taken together."
  )
  return Section("Calibration", beside(made, says), made)


def of_run(part: Section, run: Run, number: int) -> Section:
  """The same part under the run's name, and its pictures too."""
  made = [p._replace(name=f"{p.name}_{number + 1}") for p in part.pictures]
  return Section(f"{run.name}: {part.title.lower()}", part.body, made)
