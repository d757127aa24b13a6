"""A run's results as numbers over seeds, and as a table."""

import statistics
from collections.abc import Sequence
from typing import Any

import jax

from kdjax import processes

NETWORKS = ("teacher", "student_alone", "student_distilled")
# metric: (heading, factor, format)
COLUMNS = {
  "parameters": ("parameters", 1, ",.0f"),
  "flops": ("MFLOP", 1e-6, ".2f"),
  "flops_per_token": ("MFLOP/token", 1e-6, ".2f"),
  "bits_per_byte": ("bits/byte", 1, ".4f"),
  "perplexity": ("perplexity", 1, ".2f"),
  "accuracy": ("accuracy %", 100, ".2f"),
  "nll": ("NLL", 1, ".4f"),
  "ece": ("ECE %", 100, ".2f"),
  "agreement": ("agreement %", 100, ".2f"),
  "kl": ("KL at T=1", 1, ".4f"),
}


def summary(runs: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
  """Means over seeds, and what lies behind them.

  Returns:
    `{network: {metric: mean}}` for those of `teacher`, `student_alone` and
    `student_distilled` that were trained; `stderr`, of the same form, the
    standard errors of these means (None for one seed); `gain`, distilled minus
    alone, seed by seed, as `{metric: {mean, stderr}}` where there are both;
    `seeds`, the runs; `versions`. Metrics are those that the task has.
  """
  there = [n for n in NETWORKS if n in runs[0]]
  values = {
    network: {
      m: [run[network][m] for run in runs]
      for m in COLUMNS
      if m in runs[0][network]
    }
    for network in there
  }
  results: dict[str, Any] = {
    network: {m: statistics.fmean(v) for m, v in metrics.items()}
    for network, metrics in values.items()
  }
  results["stderr"] = {
    network: {m: stderr(v) for m, v in metrics.items()}
    for network, metrics in values.items()
  }
  if {"student_alone", "student_distilled"} <= set(there):
    results["gain"] = {}
    for m, distilled in values["student_distilled"].items():
      pairs = zip(distilled, values["student_alone"][m])
      gains = [ours - alone for ours, alone in pairs]
      results["gain"][m] = {
        "mean": statistics.fmean(gains),
        "stderr": stderr(gains),
      }
  return results | {
    "seeds": list(runs),
    "versions": {
      **processes.versions(),
      "backend": jax.default_backend(),
      "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    },
  }


def table(results: dict[str, Any]) -> str:
  """A row a network, a column a metric; ± is one standard error.

  Of one seed, and images, it fits a terminal of 80 columns.
  """
  measured = set().union(*results["stderr"].values())
  columns = {m: COLUMNS[m] for m in COLUMNS if m in measured}
  rows = [["", *(heading for heading, _, _ in columns.values())]]
  for network, errors in results["stderr"].items():
    row = [network.removeprefix("student_")]
    for metric, (_, factor, form) in columns.items():
      if metric not in errors:  # no teacher to compare with
        row.append("")
        continue
      error = errors[metric]
      value = f"{results[network][metric] * factor:{form}}"
      row.append(f"{value} ± {error * factor:{form}}" if error else value)
    rows.append(row)
  lines = aligned(rows)
  if "gain" in results:
    lines.append(_gained(results))
  return "\n".join([*lines, *_samples(results["seeds"][0])])


def _gained(results: dict[str, Any]) -> str:
  """The line below the table: what distillation is good for."""
  gain, count = results["gain"], len(results["seeds"])
  if "bits_per_byte" in gain:
    metric, factor, form = "bits_per_byte", 1, ".4f"
    line = "distillation changes bits per byte by {}"
  else:
    metric, factor, form = "accuracy", 100, ".2f"
    line = "distillation gains {} points of accuracy"
  mean, error = gain[metric]["mean"], gain[metric]["stderr"]
  line = line.format(f"{factor * mean:+{form}}")
  if error is not None:
    line += f" ± {factor * error:{form}} (standard error, {count} seeds)"
  return line


def _samples(run: dict[str, dict[str, Any]]) -> list[str]:
  """What the first seed's networks write after the first prompt."""
  lines = []
  for network, measured in run.items():
    for prompt, written in measured.get("samples", ())[:1]:
      lines += [
        "",
        f"{network.replace('_', ' ')} writes:",
        f"{prompt}{written}",
      ]
  return lines


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of straight columns, the first to the left, a rule below row 0."""
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = [
    "  ".join(
      cell.ljust(width) if n == 0 else cell.rjust(width)
      for n, (cell, width) in enumerate(zip(row, widths))
    ).rstrip()
    for row in rows
  ]
  lines.insert(1, "-" * max(map(len, lines)))
  return lines


def stderr(values: Sequence[float]) -> float | None:
  if len(values) < 2:
    return None
  return statistics.stdev(values) / len(values) ** 0.5
