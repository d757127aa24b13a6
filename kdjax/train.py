"""`python -m kdjax.train --config=configs/digits.py --workdir=runs/digits`

Trains (or loads) the teacher, trains the student alone, distils it, and prints
how the three compare. Killed and started again, the same line goes on.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jaxtyping import PyTree
from ml_collections import ConfigDict, config_flags

import kdjax.config as configuration
from kdjax import (
  adapters,
  checkpoint,
  data,
  errors,
  evaluate,
  losses,
  metrics,
  objective,
  parallel,
  report,
)
from kdjax.loop import distill
from kdjax.objective import Term
from kdjax.types import Model


def train(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
  """Runs what the config says; returns what it writes to `results.json`.

  Raises:
    UserError: for mistakes in the config, the data or the folder.
  """
  configuration.check_keys(config)
  workdir = Path(workdir)
  experiment = Experiment(config)
  _claim(workdir, config)
  seeds = range(config.seed, config.seed + config.seeds)
  runs = [experiment.run(workdir / f"seed_{s}", s) for s in seeds]
  results = report.summary(runs)
  metrics.write_json(workdir / "results.json", results)
  return results


class Experiment:
  """The data and networks of a config, everything checked that can be."""

  def __init__(self, config: ConfigDict):
    self.config = config
    c = config.data
    source = data.load(c.name, c.train_split, data_dir=c.data_dir or None)
    held_out = data.load(c.name, c.eval_split, data_dir=c.data_dir or None)
    for part in (source, held_out):
      data.check_labels(part)
    self.source, self.held_out = source, held_out
    channels = source.image_shape[-1]
    self.teacher, self.student = (
      configuration.model(network, source.num_classes, channels)
      for network in (config.teacher, config.student)
    )
    self.goal = configuration.goal(config)
    self.phases = {
      name: configuration.optimizer(phase.optimizer, f"phases.{name}.optimizer")
      for name, phase in config.phases.items()
    }
    self.mesh = parallel.make_mesh()
    for phase in config.phases.values():
      parallel.check_batch_size(
        c.batch_size, self.mesh, microbatches=phase.microbatches
      )
    parallel.check_batch_size(c.eval_batch_size, self.mesh)
    objective.check(self.goal, config.phases.distilled.steps, has_teacher=True)
    self.eval_batches = data.eval_batches(
      held_out,
      batch_size=c.eval_batch_size,
      mean=c.mean,
      std=c.std,
      transform=configuration.eval_transform(c),
    )
    self.example = next(iter(self.eval_batches))

  def run(self, folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """One seed: teacher, student alone, student distilled; then the numbers."""
    c = self.config
    labelled, only = None, self.source
    if c.data.labelled:
      labelled = data.labelled_mask(self.source, c.data.labelled, seed=seed)
      only = data.select(self.source, labelled)
    hard = self.goal.terms[0]
    cross_entropy = Term("hard", losses.cross_entropy, group="hard")

    if c.teacher.checkpoint:
      frozen = self._load_teacher(c.teacher.checkpoint)
    else:
      frozen = self._train(
        "teacher",
        folder / "teacher",
        seed,
        self.teacher,
        self.source,
        [cross_entropy],
      )
    frozen = (
      adapters.cast(frozen[0], configuration.dtype(c.teacher.dtype)),
      frozen[1],
    )
    alone = self._train(
      "alone",
      folder / "student_alone",
      seed,
      self.student,
      only,
      [dataclasses.replace(hard, weight=1.0)],
    )
    distilled = self._train(
      "distilled",
      folder / "student_distilled",
      seed,
      self.student,
      self.source,
      self.goal,
      labelled=labelled,
      frozen=frozen,
    )
    return {
      "teacher": self._measure(self.teacher, frozen, frozen),
      "student_alone": self._measure(self.student, alone, frozen),
      "student_distilled": self._measure(self.student, distilled, frozen),
    }

  def _train(
    self,
    name: str,
    folder: Path,
    seed: int,
    network: Model,
    source: data.Source,
    terms: Any,
    *,
    labelled: Any = None,
    frozen: PyTree = (),
  ) -> tuple[PyTree, PyTree]:
    """One phase, from where it was; returns `(params, stats)`."""
    c, phase = self.config, self.config.phases[name]
    optimizer, rate = self.phases[name]
    done = distill(
      student=network,
      teacher=self.teacher if frozen else None,
      teacher_variables=frozen,
      train=data.train_batches(
        source,
        batch_size=c.data.batch_size,
        seed=seed,
        mean=c.data.mean,
        std=c.data.std,
        augment=configuration.augment(c.data),
        labelled=labelled,
      ),
      steps=phase.steps,
      evaluate_on=self.eval_batches,
      terms=terms,
      optimizer=optimizer,
      seed=seed,
      microbatches=phase.microbatches,
      transform=configuration.mixup(c.data, source.num_classes),
      shown={"learning_rate": rate},
      mesh=self.mesh,
      folder=folder,
      save_every=c.save_every,
      keep_last=c.keep_last,
      keep_best=c.keep_best,
      name=f"{name} (seed {seed})",
    )
    return done.variables

  def _load_teacher(self, path: str) -> tuple[PyTree, PyTree]:
    like = jax.eval_shape(self.teacher.init, jax.random.key(0), self.example)
    folder = Path(path)
    inside = folder / "checkpoints"
    return checkpoint.load_params(inside if inside.exists() else folder, like)

  def _measure(
    self, network: Model, variables: PyTree, frozen: PyTree
  ) -> dict[str, float]:
    run = evaluate.make_evaluate(network, self.teacher, self.mesh)
    return {
      "parameters": evaluate.num_parameters(variables[0]),
      "flops": evaluate.flops_per_example(network, variables, self.example),
      **run(variables, frozen, self.eval_batches),
    }


def _claim(workdir: Path, config: ConfigDict) -> None:
  """Writes the config into a new folder; refuses one of another config."""
  ours = json.loads(config.to_json_best_effort())
  path = workdir / "config.json"
  if path.exists():
    theirs = json.loads(path.read_text())
    # More seeds may be added to what is there: each has a folder of its own.
    differing = [
      key
      for key in sorted({*_flat(ours), *_flat(theirs)})
      if key != "seeds" and _flat(ours).get(key) != _flat(theirs).get(key)
    ]
    if differing:
      raise errors.UserError(
        f"{workdir} was made by another config (differs in "
        f"{', '.join(differing)}): use a new --workdir, or the old config"
      )
  elif workdir.exists() and any(workdir.iterdir()):
    raise errors.UserError(
      f"{workdir} is not empty and has no config.json: use a new --workdir"
    )
  metrics.write_json(path, ours)


def _flat(tree: Any, at: str = "") -> dict[str, Any]:
  if not isinstance(tree, dict) or not tree:
    return {at: tree}
  return {
    k: v
    for name, node in tree.items()
    for k, v in _flat(node, f"{at}.{name}" if at else name).items()
  }


def main(argv: Sequence[str]) -> int:
  """The command line; returns the exit code."""
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file(
    "config",
    None,
    "Path of a config file, e.g. configs/digits.py; override "
    "any value with --config.name=value.",
    flag_values=values,
  )
  folder = flags.DEFINE_string(
    "workdir",
    None,
    "Folder for checkpoints, metrics and results.",
    flag_values=values,
  )
  ask = flags.DEFINE_bool(
    "help", False, "Show this.", short_name="h", flag_values=values
  )
  logging.getLogger().setLevel(logging.ERROR)
  try:
    rest = values(list(argv))[1:]
    if ask.value or len(argv) == 1:
      print(f"{__doc__}\n{values.main_module_help() or values}")
      return 0 if ask.value else 2
    for needed in (config, folder):
      if needed.value is None:
        raise errors.UserError(
          f"--{needed.name} is missing: {needed.help or 'give it'}"
        )
    if rest:
      raise errors.UserError(f"got {' '.join(rest)}: every option needs --")
    results = train(config.value, folder.value)
  except (errors.UserError, flags.Error) as error:
    print(f"kdjax: {error}", file=sys.stderr)
    return 2
  print(report.table(results))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
