"""What a config describes: its data, networks and phases, run for a seed.

Everything that can be checked is, before anything trains.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

import kdjax.config as configuration
from kdjax import (
  adapters,
  data,
  errors,
  evaluate,
  losses,
  objective,
  parallel,
  simkd,
)
from kdjax.loop import distill
from kdjax.objective import Term
from kdjax.preflight import check_outputs
from kdjax.train_step import init_state, make_train_step
from kdjax.types import Model


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
    # Once for both: SimKD's student is traced to be made.
    frozen = self._frozen_shapes()
    student, _ = self._distilled(frozen, 0)
    self.goal = self._goal(student, frozen)
    steps = config.phases.distilled.steps
    objective.check(self.goal, max(steps, 1), has_teacher=True)
    if not (config.teacher.checkpoint or config.phases.teacher.steps):
      raise errors.UserError(
        "phases.teacher.steps is 0 and teacher.checkpoint is empty: train a "
        "teacher, or name one"
      )
    self._trace(student, frozen)
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

  def _goal(self, student: Model, frozen: PyTree) -> objective.Objective:
    """The objective, its taps chosen from those that the networks have."""
    if not self.config.terms:
      return configuration.goal(self.config)
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

  def _trace(self, student: Model, frozen: PyTree) -> None:
    """Follows the shapes through the distilled step, so that they do fit."""
    c, rule = self.config, self.phases["distilled"]
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
      transform=configuration.mixup(
        c.phases.distilled, self.source.num_classes
      ),
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
      transform=configuration.mixup(phase, source.num_classes),
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
