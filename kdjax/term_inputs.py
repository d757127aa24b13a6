"""What a term's loss is given: which activations, and which examples of them.

Where the mask is [B, S], every token is an example: a term on activations gets
rows [B · S, ...], and one that owns variables the batch likewise. A loss that
takes sequences or spans gets both as they are.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from kdjax import errors
from kdjax.objective import Names, Term
from kdjax.types import Batch, LinearLogits, Output


def row_weights(term: Term, batch: Batch) -> Float[Array, " *batch"]:
  """How much each number of the term's loss counts: from the batch alone.

  Raises:
    UserError: if the batch lacks the array that says so.
  """
  traits = term.traits
  weights = jnp.asarray(_entry(term, traits.mask, batch), jnp.float32)
  if traits.labels and "labelled" in batch:
    weights = weights * batch["labelled"]
  return weights


def init_term(
  term: Term, key: Array, student: Output, teacher: Output | None, batch: Batch
) -> tuple[PyTree, PyTree]:
  """The term's own `(params, state)`.

  Args:
    term: one with `init`.
    key: seeds it.
    student, teacher, batch: shapes are enough.
  """
  assert term.init is not None
  ours, theirs, _ = jax.eval_shape(
    functools.partial(given, term), student, teacher, dict(batch)
  )
  return term.init(key, ours, theirs)


def given(
  term: Term, student: Any, teacher: Any, batch: Batch
) -> tuple[Any, Any, Batch]:
  """Both sides and the batch as a term that reads taps gets them.

  Args:
    term: of `taps`, or of `init` alone, which gets the whole outputs.
    student, teacher: `Output`s.
    batch: with `mask`.

  Returns:
    `(student's, teacher's, batch)`, tokens as examples; of the batch the arrays
    that have a value for each.

  Raises:
    UserError: for an activation that has no axis of tokens.
  """
  if term.taps is not None:
    student = activation(student, term.taps[0])
    teacher = activation(teacher, term.taps[1])
  shape = jnp.shape(batch["mask"])
  if len(shape) == 1 or term.traits.takes != "examples":
    return student, teacher, batch
  one = functools.partial(_tokens, term, shape)
  rows = {
    name: x.reshape(-1, *x.shape[2:])
    for name, x in batch.items()
    if x.shape[:2] == shape
  }
  return _map_arrays(one, student), _map_arrays(one, teacher), rows


def activation(output: Any, names: Names) -> Any:
  """The activation of a name, or the tuple of several."""
  if output is None or not isinstance(names, str):
    return output and tuple(activation(output, n) for n in names)
  if names != "logits":
    return output.taps[names]
  if isinstance(output.logits, LinearLogits):
    raise errors.UserError(
      "a term reads the tap 'logits', and the head is not multiplied out: "
      "leave taps out if its loss is one on logits, or give dense logits"
    )
  return output.logits


def arguments(
  term: Term, student: Any, teacher: Any | None, batch: Batch, step: Array
) -> tuple[list[Any], dict[str, Any]]:
  """Those of a loss without variables, but for its temperature."""
  traits = term.traits
  positional = [counting(term, batch, student)]
  if traits.teacher:
    assert teacher is not None, term.name  # refused by name in `check`
    positional.append(counting(term, batch, teacher))
  if traits.labels:
    positional.append(counting(term, batch, batch["label"]))
  named = hparams(term, step)
  for name in traits.reads:
    if name in batch or not _optional(term, name):
      named[name] = _entry(term, name, batch)
  if traits.couples:
    named["where"] = row_weights(term, batch) > 0
  return positional, named


def counting(term: Term, batch: Batch, tree: Any) -> Any:
  """`tree` with 0 where an example weighs nothing.

  Replaced before the loss, not after: a NaN there would come back through the
  gradient of a `where`. Losses of sequences and spans do it themselves: what a
  number of theirs rests on is more than one token.
  """
  if term.traits.takes != "examples":
    return tree
  counts = row_weights(term, batch) > 0

  def one(x: Array) -> Array:
    shape = counts.shape + (1,) * (x.ndim - counts.ndim)
    return jnp.where(counts.reshape(shape), x, 0)

  return _map_arrays(one, tree)


def hparams(term: Term, step: Array) -> dict[str, Any]:
  """The term's further arguments at an update."""
  return {k: v(step) if callable(v) else v for k, v in term.hparams.items()}


def _tokens(term: Term, shape: tuple[int, ...], x: Array) -> Array:
  """[B, S, D] -> [B · S, D], [B, heads, S, d] -> [B · S, heads, d]."""
  rows = jnp.swapaxes(x, 1, 2) if x.ndim == 4 else x
  if rows.shape[:2] != shape:
    raise errors.UserError(
      f"term {term.name!r} reads an activation of shape {x.shape}, and the "
      f"mask has {shape}: choose taps [B, S, D] or [B, heads, S, d]"
    )
  return rows.reshape(-1, *rows.shape[2:])


def _optional(term: Term, name: str) -> bool:
  default = inspect.signature(term.loss).parameters[name].default
  return default is not inspect.Parameter.empty


def _entry(term: Term, name: str, batch: Batch) -> Array:
  if name not in batch:
    there = ", ".join(sorted(batch))
    raise errors.UserError(
      f"term {term.name!r} reads batch[{name!r}], and the batch has {there}: "
      "give batches that have it; data.text.pair_batches makes those of two "
      "tokenizers"
    )
  return batch[name]


def _map_arrays(one: Callable[[Array], Array], tree: Any) -> Any:
  """`one` of every array that has the batch's axes."""

  def mapped(x: Any) -> Any:
    if isinstance(x, LinearLogits):
      return dataclasses.replace(x, hidden=one(x.hidden))
    return one(x)

  return jax.tree.map(
    mapped, tree, is_leaf=lambda x: isinstance(x, LinearLogits)
  )
