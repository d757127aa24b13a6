"""The tokens of a config's texts, and the rows that the networks get."""

import functools
from collections.abc import Iterable
from typing import Any

from jax.sharding import Mesh

import kdjax.config as configuration
from kdjax.data import text
from kdjax.experiment import phases
from kdjax.types import Batch


class TokenRows:
  """The tokens of both sides: the same where one tokenizer reads for both.

  Args:
    config: the whole.
    mesh: whose processes share the rows.
    made: the networks and their tokenizers.
    pairs: whether the student's rows come with the teacher's of the same text.

  Attributes:
    lengths: of a row, by side.
  """

  def __init__(
    self, config: Any, mesh: Mesh, made: configuration.Decoders, *, pairs: bool
  ):
    self._config, self._mesh = config, mesh
    c, reads = config.data, made.reads
    length = c.sequence_length
    theirs = (pairs and c.teacher_length) or length
    self.lengths = {"student": length, "teacher": theirs}
    how: dict[str, Any] = dict(
      folder=configuration.token_folder(c), skip_empty=c.skip_empty
    )
    documents, held_out = configuration.documents(c)
    for side, net in made.nets.items():
      text.check_length(self.lengths[side], net.context)
    tokens = functools.partial(text.tokenize, **how)
    self._pairs = None
    if pairs:
      both = reads["student"], reads["teacher"]
      self._pairs = text.tokenize_pair(documents, *both, **how)
      self._tokens = {
        "student": self._pairs.student.tokens,
        "teacher": self._pairs.teacher.tokens,
      }
    else:
      self._tokens = dict.fromkeys(reads, tokens(documents, reads["student"]))
    self._held_out = {side: tokens(held_out, reads[side]) for side in reads}
    # Conversations are laid into rows whole, texts are cut where a row ends.
    self._cut = isinstance(documents.examples[0], str)

  def train_batches(self, side: str, seed: int) -> Iterable[Batch]:
    """What a network learns from; the student, alone too, from pairs if any."""
    rows = dict(
      batch_size=self._config.data.batch_size,
      seed=seed,
      **phases.share(self._mesh),
    )
    if side == "student" and self._pairs is not None:
      return text.pair_batches(
        self._pairs,
        sequence_length=self.lengths["student"],
        teacher_length=self.lengths["teacher"],
        **rows,
      )
    return text.train_batches(
      self._tokens[side],
      sequence_length=self.lengths[side],
      cut=self._cut,
      **rows,
    )

  def eval_batches(self, side: str) -> Iterable[Batch]:
    """The held-out texts, once."""
    return text.eval_batches(
      self._held_out[side],
      batch_size=phases.eval_rows(self._config, self._mesh),
      sequence_length=self.lengths[side],
      cut=self._cut,
      **phases.share(self._mesh),
    )
