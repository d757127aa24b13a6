"""Language models: the texts and decoders of a config, and their phases."""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
from kdjax.experiment import phases
from kdjax.generate import generate
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
      self._read_texts()
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
    if blank:
      rows = text.blank_rows(0, config.data.sequence_length)
      self.example = phases.batch_shapes(rows, config.data.batch_size)
    else:
      self.example = next(iter(self._batches("student", 0)))
    self.goal = self._goal()
    self.start, self.loaded = None, None
    if not blank:
      phases.check_goal(config, self.goal, key="path")
      self.start = self._loaded("student")
    self.parts = self._parts()
    phases.trace(self.parts, self.layout)
    if blank:
      return
    theirs = self.start
    if not self._is_base():
      theirs = self._loaded("teacher")
    self.loaded = None if theirs is None else (theirs, {})
    if self.loaded is not None:
      check_outputs(
        self.models["student"],
        self.teacher,
        self._shapes("student"),
        self.loaded,
        self.example,
        mesh=self.mesh,
        comparable=not self.by_spans,
      )
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
      train=self._batches(side, seed),
      evaluate_on=None if finished else self._eval_batches(side),
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
    flops = flops_per_token(self.made.nets[side], self.lengths[side])
    batches = signs(self._eval_batches(side))
    metrics, facts = self.evaluators[side](variables, frozen, batches)
    return {
      "parameters": evaluate.num_parameters(variables[0]),
      "flops_per_token": flops,
      **metrics,
      "samples": self._samples(side, variables),
    }, examples.with_texts(facts, self.made.reads[side].decode)

  def _read_texts(self) -> None:
    """The tokens of both sides: the same where one tokenizer reads for both."""
    c, reads = self.config.data, self.made.reads
    folder = configuration.token_folder(c)
    documents, held_out = configuration.documents(c)
    self.lengths = {
      "student": c.sequence_length,
      "teacher": c.teacher_length or c.sequence_length,
    }
    if not self.by_spans:
      self.lengths["teacher"] = c.sequence_length
    for side, net in self.made.nets.items():
      text.check_length(self.lengths[side], net.context)
    tokens = functools.partial(
      text.tokenize, folder=folder, skip_empty=c.skip_empty
    )
    if self.by_spans:
      self.pairs = text.tokenize_pair(
        documents,
        reads["student"],
        reads["teacher"],
        folder=folder,
        skip_empty=c.skip_empty,
      )
      self.tokens = {
        "student": self.pairs.student.tokens,
        "teacher": self.pairs.teacher.tokens,
      }
    else:
      self.tokens = dict.fromkeys(reads, tokens(documents, reads["student"]))
    self.held_out = {side: tokens(held_out, reads[side]) for side in reads}
    # Conversations are laid into rows whole, texts are cut where a row ends.
    self.cut = isinstance(documents.examples[0], str)

  def _batches(self, side: str, seed: int) -> Iterable[Batch]:
    """What a network learns from; the student, alone too, from pairs if any."""
    rows = dict(
      batch_size=self.config.data.batch_size,
      seed=seed,
      **phases.share(self.mesh),
    )
    if side == "student" and self.by_spans:
      return text.pair_batches(
        self.pairs,
        sequence_length=self.lengths["student"],
        teacher_length=self.lengths["teacher"],
        **rows,
      )
    return text.train_batches(
      self.tokens[side],
      sequence_length=self.lengths[side],
      cut=self.cut,
      **rows,
    )

  def _eval_batches(self, side: str) -> Iterable[Batch]:
    return text.eval_batches(
      self.held_out[side],
      batch_size=phases.eval_rows(self.config, self.mesh),
      sequence_length=self.lengths[side],
      cut=self.cut,
      **phases.share(self.mesh),
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
          self._batches("teacher", seed), _CALIBRATION
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

  def _samples(self, side: str, variables: Variables) -> list[list[str]]:
    """[prompt, what the network writes after it] of each prompt."""
    c, reads = self.config.sample, self.made.reads[side]
    greedy = not c.temperature
    written = []
    for n, prompt in enumerate(c.prompts):
      (encoded,) = reads.encode([prompt])
      ids = np.concatenate([reads.prefix, encoded.ids]).astype(int)
      made = generate(
        self.made.nets[side],
        variables[0],
        jnp.asarray(ids)[None],
        max_new_tokens=c.max_new_tokens,
        key=None if greedy else jax.random.key(n),
        sampling_temperature=c.temperature or 1.0,
        top_p=c.top_p,
        stop_tokens=() if reads.eos is None else (reads.eos,),
        pad_token=reads.pad,
        num_classes=self.made.num_classes[side],
        dtype=configuration.dtype(self.config[side].dtype),
      )
      tokens = parallel.on_host(made.tokens)[0][: int(made.lengths[0])]
      written.append([prompt, reads.decode(tokens.tolist())])
    return written


def _side(phase: str) -> str:
  return "teacher" if phase == "teacher" else "student"
