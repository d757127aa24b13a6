"""Language models: the texts and decoders of a config, and their phases."""

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

import kdjax.config as configuration
from kdjax import (
  adapters,
  evaluate,
  examples,
  lora,
  losses,
  parallel,
  processes,
)
from kdjax.data import text
from kdjax.experiment import phases, samples
from kdjax.experiment.token_rows import TokenRows
from kdjax.in_parts import in_parts
from kdjax.inherit import copy_embeddings
from kdjax.loggers import OnMetrics
from kdjax.loop import distill
from kdjax.losses import fused
from kdjax.models.decoder import PARTITION, flops_per_token
from kdjax.objective import Objective, Term
from kdjax.preflight import check_outputs
from kdjax.types import Batch, Params, Variables

# Batches that tell which channels of a teacher matter.
_CALIBRATION = 8


class TextExperiment:
  """See `phases.Experiment`.

  Args:
    config: the whole.
    blank: sizes alone: no texts, no tokenizers, no weights.

  Attributes:
    parts: of the distilled step.
  """

  def __init__(self, config: Any, *, blank: bool = False):
    self.config, self.mesh = config, parallel.make_mesh(**config.mesh)
    self.partition = {
      side: configuration.partition(config, side, self.mesh, PARTITION)
      for side in ("teacher", "student")
    }
    self.optimizers = phases.optimizers(config, self.mesh)
    made = configuration.blank_decoders if blank else configuration.decoders_of
    self.made = made(config)
    for line in self.made.warnings if processes.lead() else ():
      print(f"kdjax: {line}", file=sys.stderr)
    self.by_spans = configuration.by_spans(config)
    if not blank:
      self.rows = TokenRows(config, self.mesh, self.made, pairs=self.by_spans)
    self.models = {
      side: configuration.causal_lm(
        net, config[side], config.head, self.made.num_classes[side]
      )
      for side, net in self.made.nets.items()
    }
    # What teaches: a part of the batch at a time, and its own tokens.
    self.teacher = in_parts(self.models["teacher"], config.teacher.parts)
    if self.by_spans:
      self.teacher = adapters.reading(self.teacher, "teacher_")
    self.layout = fused.over(self.mesh)
    self.example = self._example(blank)
    self.goal = self._goal()
    self.start, self.loaded = None, None
    if not blank:
      phases.check_goal(config, self.goal, key="path")
      self.start = self._loaded("student")
    self.parts = self._parts()
    phases.trace(self.parts, self.layout)
    if not blank:
      self.loaded = self._teacher_loaded()
    self.evaluators: dict[str, Any] = {}

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
    side = _side(phase)
    terms: Any = {
      "teacher": [Term("hard", losses.cross_entropy, group="hard")],
      "alone": [dataclasses.replace(self.goal.terms[0], weight=1.0)],
      "distilled": self.goal,
    }[phase]
    taught = phase == "distilled"
    given = {} if side == "teacher" else self._student(frozen, seed, taught)
    done = distill(
      student=self.models[side],
      teacher=self.teacher if taught else None,
      teacher_variables=given.get("frozen", ()),
      train=self.rows.train_batches(side, seed),
      evaluate_on=None if finished else self.rows.eval_batches(side),
      terms=terms,
      student_variables=given.get("variables"),
      layout=self.layout,
      mesh=self.mesh,
      partition=self.partition[side],
      teacher_partition=self.partition["teacher"],
      folder=folder,
      on_metrics=on_metrics,
      **({} if side == "teacher" else self._views(taught=taught)),
      **phases.of_distill(self.config, phase, seed, self.optimizers[phase]),
    )
    if side == "teacher" or not self.config.student.lora.rank:
      return done.variables
    assert self.start is not None
    scale = configuration.adapter_scale(self.config)
    return lora.merge(self.start, done.state.params, scale), {}

  def stored(self, variables: Variables) -> Variables:
    """The teacher's parameters in its dtype."""
    dtype = configuration.dtype(self.config.teacher.dtype)
    return adapters.cast(variables[0], dtype), variables[1]

  def measure(
    self, phase: str, variables: Variables, frozen: PyTree, signs: phases.Signs
  ) -> tuple[dict[str, Any], examples.Facts]:
    """Size, cost, quality on the held-out texts, and what it writes."""
    side = _side(phase)
    if side not in self.evaluators:
      other = None if self.by_spans else self.teacher
      self.evaluators[side] = evaluate.make_examine(
        self.models[side], other, self.mesh, self.layout, most=examples.MOST
      )
    flops = flops_per_token(self.made.nets[side], self.rows.lengths[side])
    batches = signs(self.rows.eval_batches(side))
    metrics, facts = self.evaluators[side](variables, frozen, batches)
    return {
      "parameters": evaluate.num_parameters(variables[0]),
      "flops_per_token": flops,
      **metrics,
      "samples": samples.written(self.config, self.made, side, variables[0]),
    }, examples.with_texts(facts, self.made.reads[side].decode)

  def _example(self, blank: bool) -> Batch:
    """A batch; of a blank experiment its shapes."""
    if not blank:
      return next(iter(self.rows.train_batches("student", 0)))
    c = self.config.data
    return phases.batch_shapes(
      text.blank_rows(0, c.sequence_length), c.batch_size
    )

  def _parts(self) -> phases.Parts:
    c = self.config
    frozen = jax.eval_shape(self.stored, self._shapes("teacher"))
    given: dict[str, Any] = {"frozen": frozen}
    if c.student.lora.rank:
      given = jax.eval_shape(self._student, frozen)
    return phases.Parts(
      self.models["student"],
      self.teacher,
      self.goal,
      self.optimizers["distilled"],
      phases.batch_shapes(self.example, c.data.batch_size),
      **given,
      microbatches=c.phases.distilled.microbatches,
      views=self._views(taught=True),
    )

  def _shapes(self, side: str) -> Variables:
    init = self.models[side].init
    return jax.eval_shape(init, jax.random.key(0), self.example)

  def _goal(self) -> Objective:
    """The objective, its taps chosen from those that the networks have."""
    if not self.config.terms:
      return configuration.goal(self.config)
    ours, theirs = (
      adapters.tap_specs(network, self._shapes(side), self.example)
      for side, network in (
        ("student", self.models["student"]),
        ("teacher", self.teacher),
      )
    )
    return configuration.goal(self.config, ours, theirs)

  def _loaded(self, side: str) -> Params | None:
    """The weights of a checkpoint; what is trained of them is in float32."""
    c = self.config[side]
    trained = side == "student" and not c.lora.rank
    params = configuration.decoder_params(
      c,
      self.models[side],
      configuration.dtype("float32" if trained else c.dtype),
      self.mesh,
      self.partition[side],
    )
    # Each phase begins with a copy on the devices: no second one there.
    alone = jax.process_count() == 1
    return jax.device_get(params) if trained and alone else params

  def _teacher_loaded(self) -> Variables | None:
    """The teacher's variables, seen to fit; None where it is to be trained."""
    theirs = self.start if self._is_base() else self._loaded("teacher")
    if theirs is None:
      return None
    check_outputs(
      self.models["student"],
      self.teacher,
      self._shapes("student"),
      (theirs, {}),
      self.example,
      mesh=self.mesh,
      comparable=not self.by_spans,
    )
    return theirs, {}

  def _is_base(self) -> bool:
    """Whether the teacher is the student without its adapters."""
    ours, theirs = self.config.student, self.config.teacher
    same = (ours.path, ours.dtype) == (theirs.path, theirs.dtype)
    return bool(ours.lora.rank) and same

  def _student(
    self, frozen: PyTree, seed: int = 0, taught: bool = True
  ) -> dict[str, Any]:
    """What a student's phase starts from, and what it has beside it.

    Returns:
      `variables`, None to begin at random, and `frozen`: the teacher's
      variables and, where adapters are trained, the weights below them.
    """
    c, start = self.config, self.start
    if c.student.lora.rank:
      begin = configuration.adapters(c, start, seed)
      return {
        "variables": (begin, {}),
        "frozen": {"teacher": frozen if taught else (), "base": start},
      }
    if c.student.inherit.embeddings:
      own = self._drawn(seed)
      start = copy_embeddings(own, frozen[0])
    elif configuration.inherited_sizes(c.student):
      texts = (
        parallel.put_batch(rows, self.mesh)
        for rows in itertools.islice(
          self.rows.train_batches("teacher", seed), _CALIBRATION
        )
      )
      net = self.made.nets["teacher"]
      start = configuration.inherited(c, net, frozen[0], texts)
    variables = None if start is None else (start, {})
    return {"variables": variables, "frozen": frozen if taught else ()}

  def _drawn(self, seed: int) -> Params:
    """A student's first weights, as it would draw them itself."""
    like, _ = self._shapes("student")
    return parallel.create(
      lambda: self.models["student"].init(jax.random.key(seed), {})[0],
      parallel.shardings(like, self.mesh, self.partition["student"]),
    )

  def _views(self, *, taught: bool) -> dict[str, Any]:
    """Where the step finds the two networks, if not in the usual places."""
    if not self.config.student.lora.rank:
      return {}
    scale = configuration.adapter_scale(self.config)
    views: dict[str, Any] = {
      "student_of": lambda adapters, frozen: lora.attach(
        frozen["base"], adapters, scale
      )
    }
    if taught:
      views["teacher_of"] = lambda state, frozen: frozen["teacher"]
    return views


def _side(phase: str) -> str:
  return "teacher" if phase == "teacher" else "student"
