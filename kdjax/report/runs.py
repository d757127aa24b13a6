"""What a run's folder holds, as far as the run has come."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import kdjax.config as configuration
from kdjax import examples, files
from kdjax.errors import UserError
from kdjax.results import NETWORKS

PHASES: Mapping[str, str] = dict(
  zip(NETWORKS, ("teacher", "alone", "distilled"))
)


class Network(NamedTuple):
  """One network of one seed.

  Attributes:
    metrics: name -> [n, 2], a step and the value there, NaN where it was not
      finite.
    seconds: of `goodput.json`, {} where there is none.
    memory: of `memory.json`, likewise.
    facts: of `kdjax.examples`, None where there are none.
  """

  metrics: Mapping[str, np.ndarray]
  seconds: Mapping[str, Any]
  memory: Mapping[str, Any]
  facts: Mapping[str, np.ndarray] | None

  @property
  def step(self) -> int:
    """The last one that was written of."""
    return max((int(x[-1, 0]) for x in self.metrics.values()), default=0)

  def last(self, name: str) -> float | None:
    found = self.metrics.get(name)
    return None if found is None else float(found[-1, 1])


class Run(NamedTuple):
  """A folder of `kdjax.train`.

  Attributes:
    name: what the report calls it; no two runs share one.
    config: key -> value.
    results: what results.json holds, {} while there is none.
    seeds: seed -> its networks.
  """

  name: str
  folder: Path
  config: Mapping[str, Any]
  results: Mapping[str, Any]
  seeds: Mapping[int, Mapping[str, Network]]

  @property
  def networks(self) -> list[str]:
    """Those that any seed has, in the order teacher, alone, distilled."""
    there = set().union(*self.seeds.values(), *self.results.get("seeds", ()))
    return [name for name in NETWORKS if name in there]

  def of(self, network: str) -> list[Network]:
    """The network of each seed that has it."""
    return [nets[network] for nets in self.seeds.values() if network in nets]

  def facts(self, network: str) -> list[Mapping[str, np.ndarray]]:
    found = (net.facts for net in self.of(network))
    return [facts for facts in found if facts is not None]

  def steps(self, network: str) -> int:
    """How many the config asks for."""
    return int(self.config.get(f"phases.{PHASES[network]}.steps") or 0)


def read(folders: Sequence[str | Path]) -> list[Run]:
  """The runs, each under a name of its own.

  Raises:
    UserError: a folder that is none, no run's, or a run's that has measured
      nothing yet; a file that is damaged.
  """
  paths = [files.path(folder) for folder in folders]
  if len({files.absolute(path) for path in paths}) < len(paths):
    raise UserError("a folder is named twice: name each run once")
  runs = []
  for path, name in zip(paths, _names(paths)):
    with files.reaching(path):
      runs.append(_run(path, name))
  return runs


def _names(paths: Sequence[Path]) -> list[str]:
  """As many of the last parts of each path as tell them apart."""
  parts = [files.absolute(path).parts for path in paths]
  for count in range(1, max(map(len, parts)) + 1):
    names = ["/".join(p[-count:]) for p in parts]
    if len(set(names)) == len(names):
      return names
  return [str(path) for path in paths]


def _run(folder: Path, name: str) -> Run:
  if not folder.is_dir():
    what = "is no folder" if folder.exists() else "does not exist"
    raise UserError(f"{folder} {what}: give the --workdir of kdjax.train")
  if not (folder / "config.json").exists():
    raise UserError(
      f"{folder} has no config.json, so it is no run: give the --workdir of "
      "kdjax.train"
    )
  config = configuration.flat(_json(folder / "config.json"))
  results = folder / "results.json"
  seeds = {}
  for path in folder.glob("seed_*"):
    number = path.name.removeprefix("seed_")
    found = {n: _network(path / n) for n in NETWORKS if (path / n).is_dir()}
    found = {n: net for n, net in found.items() if net.metrics or net.facts}
    if number.isdigit() and found:
      seeds[int(number)] = found
  if not seeds:
    raise UserError(
      f"{folder} has measured nothing yet: wait for its first step, or start "
      "the training command again"
    )
  return Run(
    name,
    folder,
    config,
    _json(results) if results.exists() else {},
    dict(sorted(seeds.items())),
  )


def _network(folder: Path) -> Network:
  seconds, memory = (folder / f"{x}.json" for x in ("goodput", "memory"))
  return Network(
    metrics(folder / "metrics.jsonl"),
    _json(seconds) if seconds.exists() else {},
    _json(memory) if memory.exists() else {},
    examples.read(folder / examples.NAME),
  )


def metrics(path: Path) -> dict[str, np.ndarray]:
  """Of each metric its [step, value] rows; {} where there is no file.

  The last line of a run that is under way may be half written: it is left out.

  Raises:
    UserError: another line is not what the run writes.
  """
  if not path.exists():
    return {}
  rows: dict[str, list[tuple[int, float]]] = {}
  lines = path.read_bytes().decode(errors="replace").split("\n")
  whole = len(lines) - 1  # what follows the last line's end is no whole line
  for number, line in enumerate(lines[:whole], 1):
    try:
      values = json.loads(line)
      step = int(values.pop("step"))
      for name, value in values.items():
        value = float("nan") if value is None else float(value)
        rows.setdefault(name, []).append((step, value))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(
        f"{path}, line {number} is damaged ({error}): delete that line, or put "
        "back a copy of the file"
      ) from error
  return {name: np.array(values, float) for name, values in rows.items()}


def _json(path: Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UserError(
      f"cannot read {path} ({error}): put back a copy, or start the training "
      "command again"
    ) from error
  if not isinstance(found, dict):
    raise UserError(
      f"{path} holds {type(found).__name__}, not a table: put back a copy, or "
      "start the training command again"
    )
  return found


def outcomes(run: Run) -> dict[str, dict[str, list[float]]]:
  """Network -> metric -> its value of each seed.

  From results.json, and of what it does not tell (yet) the last evaluation.
  """
  first = int(run.config.get("seed", 0))
  told = dict(enumerate(run.results.get("seeds", ()), first))
  found: dict[str, dict[str, list[float]]] = {}
  for network in run.networks:
    values: dict[str, list[float]] = {}
    for seed in sorted({*told, *run.seeds}):
      measured = told.get(seed, {}).get(network)
      if measured is None:
        measured = _evaluated(run, seed, network)
      for name, value in measured.items():
        if isinstance(value, (int, float)):
          values.setdefault(name, []).append(float(value))
    found[network] = values
  return found


def _evaluated(run: Run, seed: int, network: str) -> dict[str, float]:
  """What the last evaluation in metrics.jsonl said, if the training is done."""
  net = run.seeds.get(seed, {}).get(network)
  if net is None or not done(run, net, network):
    return {}
  return {
    name.removeprefix("eval/"): float(rows[-1, 1])
    for name, rows in net.metrics.items()
    if name.startswith("eval/")
  }


def done(run: Run, net: Network, network: str) -> bool:
  """Whether a network's training has come to its end."""
  return not net.metrics or net.step >= run.steps(network)
