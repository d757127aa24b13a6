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
import numpy as np
from absl import flags
from jaxtyping import PyTree
from ml_collections import config_flags

import kdjax.config as configuration
from kdjax import (
  adapters,
  data,
  errors,
  evaluate,
  losses,
  metrics,
  objective,
  parallel,
  report,
  simkd,
)
from kdjax.loop import distill
from kdjax.objective import Term
from kdjax.preflight import check_outputs
from kdjax.train_step import init_state, make_train_step
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
    self.phases = {
      name: configuration.optimizer(phase.optimizer, f"phases.{name}.optimizer")
      for name, phase in config.phases.items()
    }
    self.mesh = parallel.make_mesh()
    for phase in config.phases.values():
      parallel.check_batch_size(
        c.batch_size, self.mesh, microbatches=phase.microbatches
      )
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
    self.start = configuration.loaded(
      config.student, self.student, self.example
    )
    self.goal = self._goal()
    steps = config.phases.distilled.steps
    objective.check(self.goal, max(steps, 1), has_teacher=True)
    if not (config.teacher.checkpoint or config.phases.teacher.steps):
      raise errors.UserError(
        "phases.teacher.steps is 0 and teacher.checkpoint is empty: train a "
        "teacher, or name one"
      )
    self._trace()
    self.evaluators: dict[Model, Any] = {}
    self.loaded = configuration.loaded(
      config.teacher, self.teacher, self.example
    )
    if self.loaded is not None:
      student = jax.eval_shape(
        self.student.init, jax.random.key(0), self.example
      )
      check_outputs(
        self.student, self.teacher, student, self.loaded, self.example
      )

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
    measured = {"teacher": self._measure(self.teacher, frozen, frozen)}
    if c.phases.alone.steps:
      alone = self._train(
        "alone",
        folder / "student_alone",
        seed,
        self.student,
        only,
        [dataclasses.replace(hard, weight=1.0)],
        start=self.start,
      )
      measured["student_alone"] = self._measure(self.student, alone, frozen)
    if c.phases.distilled.steps:
      student, start = self._distilled(frozen, seed)
      distilled = self._train(
        "distilled",
        folder / "student_distilled",
        seed,
        student,
        self.source,
        self.goal,
        labelled=labelled,
        frozen=frozen,
        start=start,
      )
      measured["student_distilled"] = self._measure(student, distilled, frozen)
    return measured

  def _goal(self) -> objective.Objective:
    """The objective, its taps chosen from those that the networks have."""
    if not self.config.terms:
      return configuration.goal(self.config)
    frozen = self._frozen_shapes()
    student, _ = self._distilled(frozen, 0)
    variables = jax.eval_shape(student.init, jax.random.key(0), self.example)
    return configuration.goal(
      self.config,
      adapters.tap_specs(student, variables, self.example),
      adapters.tap_specs(self.teacher, frozen, self.example),
      len(self.source),
    )

  def _frozen_shapes(self) -> PyTree:
    """The shapes of the teacher's variables; its classifier in zeros."""
    params, stats = jax.eval_shape(
      self.teacher.init, jax.random.key(0), self.example
    )
    zeros = jax.tree.map(
      lambda s: np.zeros(s.shape, s.dtype), params["classifier"]
    )
    return {**params, "classifier": zeros}, stats

  def _distilled(self, frozen: PyTree, seed: int) -> tuple[Model, Any]:
    """The network that is distilled, and the variables it starts from."""
    inherits = {"own": False, "teacher": True}
    if not errors.choose(
      "student.classifier", self.config.student.classifier, inherits
    ):
      return self.student, self.start
    student = simkd.simkd(self.student, self.teacher, frozen, self.example)
    if self.start is None:
      return student, None
    params, stats = student.init(jax.random.key(seed), self.example)
    trunk = {k: v for k, v in self.start[0].items() if k != "classifier"}
    return student, (
      {**params, "student": trunk},
      {**stats, "student": self.start[1]},
    )

  def _trace(self) -> None:
    """Follows the shapes through the distilled step, so that they do fit."""
    c, rule = self.config, self.phases["distilled"]
    frozen = self._frozen_shapes()
    student, _ = self._distilled(frozen, 0)
    rows = dict(self.example)
    if c.data.labelled:
      rows["labelled"] = rows["mask"]
    batch = {
      name: jax.ShapeDtypeStruct((c.data.batch_size, *x.shape[1:]), x.dtype)
      for name, x in rows.items()
    }
    args = student, self.teacher, self.goal, rule.transformation
    state = jax.eval_shape(
      lambda key, frozen, batch: init_state(*args, key, batch, frozen=frozen),
      jax.random.key(0),
      frozen,
      batch,
    )
    step = make_train_step(
      *args,
      microbatches=c.phases.distilled.microbatches,
      transform=configuration.mixup(c.data, self.source.num_classes),
      gradients_by_group=rule.by_group,
    )
    jax.eval_shape(step, state, frozen, batch)

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
    start: Any = None,
  ) -> tuple[PyTree, PyTree]:
    """One phase, from where it was; returns `(params, stats)`."""
    c, phase = self.config, self.config.phases[name]
    rule = self.phases[name]
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
      optimizer=rule.transformation,
      seed=seed,
      student_variables=start,
      gradients_by_group=rule.by_group,
      microbatches=phase.microbatches,
      transform=configuration.mixup(c.data, source.num_classes),
      shown={"learning_rate": rule.learning_rate},
      mesh=self.mesh,
      folder=folder,
      save_every=c.save_every,
      keep_last=c.keep_last,
      keep_best=c.keep_best,
      name=f"{name} (seed {seed})",
    )
    return done.variables

  def _measure(
    self, network: Model, variables: PyTree, frozen: PyTree
  ) -> dict[str, float]:
    if network not in self.evaluators:
      self.evaluators[network] = evaluate.make_evaluate(
        network, self.teacher, self.mesh
      )
    deployed = simkd.deployed(variables)
    return {
      "parameters": evaluate.num_parameters(deployed),
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
