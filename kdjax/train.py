"""Trains (or loads) a teacher, trains a student alone, distils it, compares.

    python -m kdjax.train --config=configs/digits.py --workdir=runs/digits

  --config=FILE[:ARG]   a config file; `configs/digits.py:smoke` takes seconds
  --config.NAME=VALUE   another value for one of its keys, such as
                        --config.alpha=0.5 or --config.phases.alone.steps=900
  --workdir=FOLDER      for checkpoints, metrics and results.json
  --help                this text

Killed and started again, the same line goes on where it was. Exit codes: 0
done, 2 a mistake that the message explains.
"""

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jaxtyping import PyTree
from ml_collections import config_flags

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
from kdjax.preflight import check_outputs
from kdjax.types import Model


def train(config: Any, workdir: str | Path) -> dict[str, Any]:
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

  def __init__(self, config: Any):
    self.config = config
    c = config.data
    source = data.load(c.name, c.train_split, data_dir=c.data_dir or None)
    held_out = data.load(c.name, c.eval_split, data_dir=c.data_dir or None)
    for part in (source, held_out):
      data.check_labels(part)
    if c.labelled:
      data.labelled_mask(source, c.labelled, seed=config.seed)
    self.source = source
    channels = int(source.image_shape[-1] or 0)
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
    objective.check(self.goal, config.phases.distilled.steps, has_teacher=True)
    # Rounded up to the devices: what is added is padding, and masked.
    rows = -(-c.eval_batch_size // self.mesh.size) * self.mesh.size
    self.eval_batches = data.eval_batches(
      held_out,
      batch_size=rows,
      mean=c.mean,
      std=c.std,
      transform=configuration.eval_transform(c),
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    self.example = next(iter(self.eval_batches))
    self.evaluators = {
      network: evaluate.make_evaluate(network, self.teacher, self.mesh)
      for network in (self.teacher, self.student)
    }
    self.loaded = None
    if config.teacher.checkpoint:
      self.loaded = self._load_teacher(config.teacher.checkpoint)

  def run(self, folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """One seed: teacher, student alone, student distilled; then the numbers."""
    c = self.config
    labelled, only = None, self.source
    if c.data.labelled:
      labelled = data.labelled_mask(self.source, c.data.labelled, seed=seed)
      only = data.select(self.source, labelled)
    hard = self.goal.terms[0]
    cross_entropy = Term("hard", losses.cross_entropy, group="hard")

    frozen = self.loaded
    if frozen is None:
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
        process_index=jax.process_index(),
        process_count=jax.process_count(),
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
    """A teacher from the folder of its run, shown to fit the student."""
    key = jax.random.key(0)
    like = jax.eval_shape(self.teacher.init, key, self.example)
    inside = Path(path) / "checkpoints"
    frozen = checkpoint.load_params(inside if inside.exists() else path, like)
    student = jax.eval_shape(self.student.init, key, self.example)
    check_outputs(self.student, self.teacher, student, frozen, self.example)
    return frozen

  def _measure(
    self, network: Model, variables: PyTree, frozen: PyTree
  ) -> dict[str, float]:
    return {
      "parameters": evaluate.num_parameters(variables[0]),
      "flops": evaluate.flops_per_example(network, variables, self.example),
      **self.evaluators[network](variables, frozen, self.eval_batches),
    }


def _claim(workdir: Path, config: Any) -> None:
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
  # A start that was killed leaves these two before there is a config.json.
  elif workdir.exists() and {p.name for p in workdir.iterdir()} - {
    "compiled",
    "config.json.part",
  }:
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
  # Orbax and TFDS tell of their progress in the log.
  logging.getLogger().setLevel(logging.ERROR)
  if len(argv) == 1 or set(argv) & {"--help", "-h"}:
    print((__doc__ or "").strip())
    return 2 if len(argv) == 1 else 0
  try:
    config, workdir = _arguments(argv)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
      # Seeds and restarts run the same programs: compile each of them once.
      folder = Path(workdir).absolute() / "compiled"
      jax.config.update("jax_compilation_cache_dir", str(folder))
    results = train(config, workdir)
  except errors.UserError as error:
    print(f"kdjax: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("kdjax: stopped; the same command goes on from here", file=sys.stderr)
    return 130
  print(report.table(results))
  return 0


def _arguments(argv: Sequence[str]) -> tuple[Any, str]:
  """(config, workdir); whatever is wrong with them as a UserError."""
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file(
    "config", flag_values=values, sys_argv=list(argv)
  )
  workdir = flags.DEFINE_string("workdir", None, "", flag_values=values)
  try:
    rest = values(list(argv))[1:]
    if config.value is not None:
      config.value.keys()  # a file that failed to load says so only when read
  # A config is a program, and anything may go wrong in it.
  except Exception as error:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raise errors.UserError(
      f"cannot use the arguments: {'; '.join(lines)}"
    ) from (error)
  for name, value in {"config": config.value, "workdir": workdir.value}.items():
    if value is None:
      raise errors.UserError(f"--{name} is missing: see --help")
  if rest:
    raise errors.UserError(f"got {' '.join(rest)}: see --help")
  return config.value, workdir.value or ""


if __name__ == "__main__":
  sys.exit(main(sys.argv))
