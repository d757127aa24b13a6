"""Language models: the texts and decoders of a config, and their phases."""

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import kdjax.config as configuration
from kdjax import adapters, evaluate, losses, parallel
from kdjax.data import text
from kdjax.experiment import phases
from kdjax.generate import generate
from kdjax.loop import distill
from kdjax.losses import fused
from kdjax.models.decoder import flops_per_token
from kdjax.objective import Term
from kdjax.preflight import check_outputs
from kdjax.types import Batch, Variables

SIDES = ("teacher", "student")


class TextExperiment:
  """See `phases.Experiment`."""

  def __init__(self, config: Any):
    self.config, self.mesh = config, parallel.make_mesh()
    self.optimizers = phases.optimizers(config, self.mesh)
    made = configuration.decoders_of(config)
    for line in made.warnings:
      print(f"kdjax: {line}", file=sys.stderr)
    self.nets, self.num_classes = made.nets, made.num_classes
    self.tokenizer = made.tokenizer
    self._read_texts()
    c = config.data
    for side in SIDES:
      text.check_length(c.sequence_length, self.nets[side].context)
    self.models = {
      side: configuration.causal_lm(
        self.nets[side], config[side], config.head, self.num_classes
      )
      for side in SIDES
    }
    self.layout = fused.over(self.mesh)
    self.example = next(iter(self._eval_batches()))
    frozen = self._shapes("teacher")
    ours, theirs = self._taps()
    self.goal = configuration.goal(config, ours, theirs)
    phases.check_goal(config, self.goal, named=bool(config.teacher.path))
    phases.trace(
      config,
      self.models["student"],
      self.models["teacher"],
      self.goal,
      self.optimizers["distilled"],
      frozen,
      phases.batch_shapes(self.example, c.batch_size),
      layout=self.layout,
    )
    self.start = self._loaded("student")
    self.loaded = self._loaded("teacher")
    if self.loaded is not None:
      check_outputs(
        self.models["student"],
        self.models["teacher"],
        self._shapes("student"),
        self.loaded,
        self.example,
      )
    self.evaluators: dict[str, Any] = {}

  def train(
    self, phase: str, folder: Path, seed: int, frozen: PyTree = ()
  ) -> Variables:
    """`(params, stats)` of the phase's network, trained from where it was."""
    c = self.config
    side = "teacher" if phase == "teacher" else "student"
    terms: Any = {
      "teacher": [Term("hard", losses.cross_entropy, group="hard")],
      "alone": [dataclasses.replace(self.goal.terms[0], weight=1.0)],
      "distilled": self.goal,
    }[phase]
    taught = phase == "distilled"
    return distill(
      student=self.models[side],
      teacher=self.models["teacher"] if taught else None,
      teacher_variables=frozen if taught else (),
      train=text.train_batches(
        self.tokens,
        batch_size=c.data.batch_size,
        sequence_length=c.data.sequence_length,
        seed=seed,
        cut=self.cut,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
      ),
      evaluate_on=self._eval_batches(),
      terms=terms,
      student_variables=None if phase == "teacher" else self.start,
      layout=self.layout,
      mesh=self.mesh,
      folder=folder,
      **phases.of_distill(c, phase, seed, self.optimizers[phase]),
    ).variables

  def stored(self, variables: Variables) -> Variables:
    """The teacher's parameters in its dtype."""
    dtype = configuration.dtype(self.config.teacher.dtype)
    return adapters.cast(variables[0], dtype), variables[1]

  def measure(
    self, phase: str, variables: Variables, frozen: PyTree
  ) -> dict[str, Any]:
    """Size, cost, quality on the held-out texts, and what it writes."""
    side = "teacher" if phase == "teacher" else "student"
    if side not in self.evaluators:
      self.evaluators[side] = evaluate.make_evaluate(
        self.models[side], self.models["teacher"], self.mesh, self.layout
      )
    length = self.config.data.sequence_length
    return {
      "parameters": evaluate.num_parameters(variables[0]),
      "flops_per_token": flops_per_token(self.nets[side], length),
      **self.evaluators[side](variables, frozen, self._eval_batches()),
      "samples": self._samples(side, variables),
    }

  def _read_texts(self) -> None:
    c = self.config.data
    documents, held_out = configuration.documents(c)
    self.tokens, self.held_out = (
      text.tokenize(
        part,
        self.tokenizer,
        folder=configuration.token_folder(c),
        skip_empty=c.skip_empty,
      )
      for part in (documents, held_out)
    )
    # Conversations are laid into rows whole, texts are cut where a row ends.
    self.cut = isinstance(documents.examples[0], str)

  def _eval_batches(self) -> Iterable[Batch]:
    c = self.config.data
    return text.eval_batches(
      self.held_out,
      batch_size=phases.eval_rows(self.config, self.mesh),
      sequence_length=c.sequence_length,
      cut=self.cut,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )

  def _shapes(self, side: str) -> Variables:
    init = self.models[side].init
    return jax.eval_shape(init, jax.random.key(0), self.example)

  def _taps(self) -> list[Iterable[str]]:
    """Those of the student and of the teacher, where a term may ask."""
    if not self.config.terms:
      return [(), ()]
    return [
      adapters.tap_specs(self.models[side], self._shapes(side), self.example)
      for side in ("student", "teacher")
    ]

  def _loaded(self, side: str) -> Variables | None:
    c = self.config[side]
    stored = configuration.dtype(c.dtype) if side == "teacher" else None
    params = configuration.decoder_params(
      c, self.nets[side], self.models[side], self.mesh, stored=stored
    )
    return None if params is None else (params, {})

  def _samples(self, side: str, variables: Variables) -> list[list[str]]:
    """[prompt, what the network writes after it] of each prompt."""
    c = self.config.sample
    greedy = not c.temperature
    written = []
    for n, prompt in enumerate(c.prompts):
      (encoded,) = self.tokenizer.encode([prompt])
      ids = np.concatenate([self.tokenizer.prefix, encoded.ids]).astype(int)
      eos = self.tokenizer.eos
      made = generate(
        self.nets[side],
        variables[0],
        jnp.asarray(ids)[None],
        max_new_tokens=c.max_new_tokens,
        key=None if greedy else jax.random.key(n),
        sampling_temperature=c.temperature or 1.0,
        top_p=c.top_p,
        stop_tokens=() if eos is None else (eos,),
        pad_token=self.tokenizer.pad,
        num_classes=self.num_classes,
        dtype=jnp.float32,
      )
      tokens = np.asarray(made.tokens[0])[: int(made.lengths[0])]
      written.append([prompt, self.tokenizer.decode(tokens.tolist())])
    return written
