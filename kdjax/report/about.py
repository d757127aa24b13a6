"""The parts of the page that say what was run, how long it took, and where."""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdjax import examples
from kdjax.memory_plan import readable
from kdjax.report import charts, curves
from kdjax.report.html import Html, el, join, pictures, table
from kdjax.report.runs import Network, Run, done
from kdjax.report.sections import Section, plain

# figure: (heading, factor, format)
_FIGURES = {
  "perf/steps_per_second": ("steps/s", 1, ".2f"),
  "perf/examples_per_second": ("examples/s", 1, ",.0f"),
  "perf/input_wait": ("input wait %", 100, ".1f"),
  "perf/memory_gib": ("memory GiB", 1, ".2f"),
  "perf/mfu": ("MFU %", 100, ".1f"),
}


def notes(run: Run) -> list[str]:
  """What is not there, and how to come by it."""
  found = []
  seeds = int(run.config.get("seeds") or 1)
  if len(run.seeds) < seeds:
    found.append(f"{len(run.seeds)} of {seeds} seeds have begun.")
  without, under_way = [], []
  for seed, nets in run.seeds.items():
    for network, net in nets.items():
      if not done(run, net, network):
        under_way.append(
          f"{plain(network)} of seed {seed} at step {net.step:,} of "
          f"{run.steps(network):,}"
        )
      elif net.facts is None:
        without.append(f"{plain(network)} of seed {seed}")
  if under_way:
    found.append(f"Still under way: {', '.join(under_way)}.")
  if without:
    found.append(
      f"No {examples.NAME} of {', '.join(without)}: calibration, confusion, "
      "classes and worst examples lack them. Start the training command again: "
      "it trains nothing anew and writes them."
    )
  for network in ("teacher", "student_alone", "student_distilled"):
    if network not in run.networks:
      left_out = not run.steps(network) and network != "teacher"
      why = "its phase has 0 steps" if left_out else "there is none yet"
      found.append(f"No {plain(network)}: {why}.")
  for network in run.networks:
    cut = [f for f in run.facts(network) if len(f["row"]) >= examples.MOST]
    if cut:
      found.append(
        f"Calibration, confusion, kinds and worst examples are of the first "
        f"{examples.MOST:,} held-out examples (of texts, tokens)."
      )
      break
  return found


def time(runs: Sequence[Run]) -> Section:
  """Seconds, speed and memory: means over the seeds."""
  rows, spent = [], []
  nets = [(run, n, run.of(n)) for run in runs for n in run.networks]
  nets = [(run, n, found) for run, n, found in nets if found]
  there = [m for m in _FIGURES if any(_mean(f, m) for _, _, f in nets)]
  for run, network, found in nets:
    label = plain(network)
    if len(runs) > 1:
      label = f"{run.name}: {label}"
    seconds = _seconds(found)
    if seconds:
      spent.append((label, seconds))
    told = [net.seconds for net in found if net.seconds]
    wall = statistics.fmean(x["wall_seconds"] for x in told) if told else None
    good = statistics.fmean(x["goodput"] for x in told) if told else None
    rate = _mean(found, "perf/steps_per_second")
    rows.append(
      [
        label,
        "–" if wall is None else f"{wall:,.1f}",
        f"{seconds['compilation']:,.1f}" if "compilation" in seconds else "–",
        "–" if good is None else f"{good:.1%}",
        "–" if not rate else f"{1000 / rate:,.1f}",
        _planned(found),
        *(_figure(found, m) for m in there),
      ]
    )
  head = ["", "wall s", "compiling s", "goodput", "ms a step", "planned"]
  head += [_FIGURES[m][0] for m in there]
  made = [charts.times(spent)] if spent else []
  made += curves.speed(curves.series(runs))
  says = (
    "Goodput is the share of the time that was spent in steps. Speeds are the "
    "medians of what was logged. Means over seeds; compiled programs are kept, "
    "so later seeds compile less. Planned is the memory of one device that a "
    "step takes, by the compiler's account."
  )
  if "perf/memory_gib" not in there:
    says += " These devices do not tell how much of it is in use."
  body = [el("p", says, class_="faint"), table(head, rows), pictures(made)]
  return Section("Time and memory", join(body), made)


def _planned(found: Sequence[Network]) -> str:
  told = [net.memory["total"] for net in found if net.memory]
  return readable(int(statistics.fmean(told))) if told else "–"


def _seconds(found: Sequence[Network]) -> dict[str, float]:
  told = [net.seconds.get("seconds", {}) for net in found if net.seconds]
  names = {name for one in told for name in one}
  return {
    n: statistics.fmean(one.get(n, 0.0) for one in told) for n in sorted(names)
  }


def _mean(found: Sequence[Network], name: str) -> float | None:
  """Over seeds, the median of what each logged."""
  medians = [
    float(np.nanmedian(net.metrics[name][:, 1]))
    for net in found
    if name in net.metrics
  ]
  return statistics.fmean(medians) if medians else None


def _figure(found: Sequence[Network], name: str) -> str:
  _, factor, form = _FIGURES[name]
  mean = _mean(found, name)
  return "–" if mean is None else f"{factor * mean:{form}}"


def differences(runs: Sequence[Run]) -> Section | None:
  """The keys in which the configs of several runs differ."""
  if len(runs) < 2:
    return None
  keys = sorted(set().union(*(run.config for run in runs)))
  rows = [
    [key, *(_value(run.config, key) for run in runs)]
    for key in keys
    if len({_value(run.config, key) for run in runs}) > 1
  ]
  body = table(["", *(run.name for run in runs)], rows)
  if not rows:
    body = el("p", "The configs are the same.")
  return Section("Differences of the configs", body)


def _value(config: Mapping[str, Any], key: str) -> str:
  return json.dumps(config[key]) if key in config else "–"


def config(runs: Sequence[Run]) -> Section:
  """All keys, and the versions that the run was made with."""
  blocks: list[Html] = []
  for run in runs:
    rows = [[key, _value(run.config, key)] for key in sorted(run.config)]
    made = el("div", table(["key", "value"], rows), class_="left")
    blocks.append(el("details", el("summary", f"Config of {run.name}"), made))
    if versions := run.results.get("versions"):
      told = ", ".join(f"{k} {v}" for k, v in versions.items() if v)
      blocks.append(
        el("p", f"{run.name} was made with {told}.", class_="faint")
      )
  return Section("Config and versions", join(blocks))


def line(run: Run) -> str:
  """The run in one line: its data, networks, goal and seeds."""
  get = run.config.get
  networks = [_network(run, side) for side in ("teacher", "student")]
  seeds = len(run.seeds)
  parts = [
    f"{get('task')}, {get('data.name') or get('data.path')}",
    " → ".join(networks),
    f"soft loss {get('soft.name')}, alpha {_value(run.config, 'alpha')}"
    if "alpha" in run.config
    else f"soft loss {get('soft.name')}",
    f"{seeds} seed{'s' if seeds > 1 else ''}",
  ]
  return "; ".join(parts)


def _network(run: Run, side: str) -> str:
  get = run.config.get
  name = get(f"{side}.model.name") or get(f"{side}.model.model_type")
  return f"{side} {name or get(f'{side}.path') or 'of the same weights'}"
