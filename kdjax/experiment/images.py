"""Image classifiers: the data and networks of a config, and their phases."""

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
  examples,
  losses,
  models,
  objective,
  parallel,
  processes,
  simkd,
)
from kdjax.experiment import phases
from kdjax.loggers import OnMetrics
from kdjax.loop import distill
from kdjax.objective import Term
from kdjax.preflight import check_outputs
from kdjax.types import Model, Variables


class ImageExperiment:
  """See `phases.Experiment`.

  Args:
    config: the whole.
    blank: sizes alone: images of zeros, and no weights are read.

  Attributes:
    parts: of the distilled step.
  """

  def __init__(self, config: Any, *, blank: bool = False):
    self.config = config
    self.source, self.held_out = self._sources(blank)
    channels = int(self.source.image_shape[-1] or 0)
    self.teacher, self.student = (
      configuration.model(network, self.source.num_classes, channels)
      for network in (config.teacher, config.student)
    )
    self.mesh = parallel.make_mesh(**config.mesh)
    self.partition = {
      side: configuration.partition(
        config,
        side,
        self.mesh,
        models.PARTITIONS.get(config[side].model["name"], ()),
      )
      for side in ("teacher", "student")
    }
    self.optimizers = phases.optimizers(config, self.mesh)
    self.eval_batches = data.eval_batches(
      self.held_out,
      batch_size=phases.eval_rows(config, self.mesh),
      mean=config.data.mean,
      std=config.data.std,
      transform=configuration.eval_transform(config.data),
      **phases.share(self.mesh),
    )
    self.example = next(iter(self.eval_batches))
    self.start = self.loaded = None
    if not blank:
      self.start = configuration.loaded(
        config.student, self.student, self.example
      )
    # Once for both: SimKD's student is traced to be made.
    frozen = self._frozen_shapes()
    student, _ = self._distilled(frozen, 0)
    self.goal = self._goal(student, frozen)
    self.parts = self._parts(student, frozen)
    phases.trace(self.parts)
    self.evaluators: dict[Model, Any] = {}
    if not blank:
      phases.check_goal(config, self.goal, key="checkpoint")
      self.loaded = self._teacher_loaded()

  def train(
    self,
    phase: str,
    folder: Path,
    seed: int,
    frozen: PyTree = (),
    on_metrics: OnMetrics | None = None,
    *,
    finished: bool = False,
  ) -> Variables:
    """`(params, stats)` of the phase's network, trained from where it was."""
    c = self.config
    labelled, source = None, self.source
    if c.data.labelled:
      labelled = data.labelled_mask(self.source, c.data.labelled, seed=seed)
    if phase == "teacher":
      network, start, labelled = self.teacher, None, None
      terms: Any = [Term("hard", losses.cross_entropy, group="hard")]
    elif phase == "alone":
      network, start = self.student, self.start
      terms = [dataclasses.replace(self.goal.terms[0], weight=1.0)]
      if labelled is not None:
        source, labelled = data.select(self.source, labelled), None
    else:
      network, start = self._distilled(frozen, seed)
      terms = self.goal
    taught = phase == "distilled"
    batches = data.train_batches(
      source,
      batch_size=c.data.batch_size,
      seed=seed,
      mean=c.data.mean,
      std=c.data.std,
      augment=configuration.augment(c.data),
      labelled=labelled,
      **phases.share(self.mesh),
    )
    return distill(
      student=network,
      teacher=self.teacher if taught else None,
      teacher_variables=frozen if taught else (),
      train=batches,
      evaluate_on=None if finished else self.eval_batches,
      terms=terms,
      student_variables=start,
      transform=configuration.mixup(c.phases[phase], source.num_classes),
      mesh=self.mesh,
      partition=self.partition["student" if phase != "teacher" else phase],
      teacher_partition=self.partition["teacher"],
      folder=folder,
      on_metrics=on_metrics,
      **phases.of_distill(c, phase, seed, self.optimizers[phase]),
    ).variables

  def stored(self, variables: Variables) -> Variables:
    """The teacher's parameters in its dtype; statistics stay float32."""
    params, stats = variables
    dtype = configuration.dtype(self.config.teacher.dtype)
    return adapters.cast(params, dtype), stats

  def measure(
    self, phase: str, variables: Variables, frozen: PyTree, signs: phases.Signs
  ) -> tuple[dict[str, float], examples.Facts]:
    """Size, cost and quality of a phase's network on the held-out images."""
    network = {
      "teacher": lambda: self.teacher,
      "alone": lambda: self.student,
      "distilled": lambda: self._distilled(frozen, 0)[0],
    }[phase]()
    if network not in self.evaluators:
      side = "teacher" if phase == "teacher" else "student"
      ours, theirs = self.partition[side], self.partition["teacher"]
      self.evaluators[network] = evaluate.make_examine(
        parallel.gathered(network, self.mesh, ours),
        parallel.gathered(self.teacher, self.mesh, theirs),
        self.mesh,
        most=examples.MOST,
      )
    examine = self.evaluators[network]
    metrics, facts = examine(variables, frozen, signs(self.eval_batches))
    deployed = simkd.deployed(variables)
    found = {
      "parameters": evaluate.num_parameters(deployed),
      "flops": evaluate.flops_per_example(network, variables, self.example),
      **metrics,
    }
    if not processes.lead():
      return found, facts
    source = self.held_out
    return found, examples.with_images(
      facts, source.examples, source.class_names
    )

  def _sources(self, blank: bool) -> tuple[data.Source, data.Source]:
    """The images to train on and those held out."""
    c, load = self.config.data, data.blank if blank else data.load
    train, held_out = (
      load(c.name, split, data_dir=c.data_dir or None)
      for split in (c.train_split, c.eval_split)
    )
    for part in (train, held_out):
      data.check_labels(part)
    if c.labelled:  # refused now, if there are not as many
      data.labelled_mask(train, c.labelled, seed=self.config.seed)
    return train, held_out

  def _teacher_loaded(self) -> Variables | None:
    """The teacher's variables, seen to fit; None where it is to be trained."""
    theirs = configuration.loaded(
      self.config.teacher, self.teacher, self.example
    )
    if theirs is not None:
      ours = jax.eval_shape(self.student.init, jax.random.key(0), self.example)
      check_outputs(self.student, self.teacher, ours, theirs, self.example)
    return theirs

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

  def _parts(self, student: Model, frozen: PyTree) -> phases.Parts:
    c = self.config
    rows = dict(self.example)
    if c.data.labelled:
      rows["labelled"] = rows["mask"]
    return phases.Parts(
      student,
      self.teacher,
      self.goal,
      self.optimizers["distilled"],
      phases.batch_shapes(rows, c.data.batch_size),
      jax.eval_shape(self.stored, frozen),
      microbatches=c.phases.distilled.microbatches,
      transform=configuration.mixup(
        c.phases.distilled, self.source.num_classes
      ),
    )
