"""A teacher that takes its batch a part at a time: `in_parts`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kdjax.errors import UserError
from kdjax.types import (
  Batch,
  LinearLogits,
  Model,
  Output,
  Params,
  Stats,
)


def in_parts(model: Model, count: int) -> Model:
  """The same network in evaluation, its batch taken in parts one by one.

  What its layers hold for a while is that of one part; what it returns is of
  the whole batch. For a teacher whose layers are wider than the student's: they
  would set the memory of the step. Gradient and training go on as before.

  Args:
    model: a network without dropout or batch statistics where `train=False`;
      all that it returns has the examples along its first axis.
    count: of the parts; 1 changes nothing.

  Raises:
    UserError: from `apply`, for a batch that the count does not divide.
  """
  if count == 1:
    return model

  def apply(
    params: Params,
    stats: Stats,
    batch: Batch,
    *,
    train: bool,
    key: Array | None = None,
    taps: tuple[str, ...] = (),
  ) -> tuple[Output, Stats]:
    if train:
      return model.apply(params, stats, batch, train=True, key=key, taps=taps)
    size = len(jax.tree.leaves(batch)[0])
    if size % count:
      raise UserError(
        f"the batch has {size} rows, which {count} parts do not divide: give "
        "another batch_size or number of parts"
      )

    def one(part: Batch) -> Output:
      return model.apply(params, stats, part, train=False, taps=taps)[0]

    def without_head(part: Batch) -> tuple[Array, Any]:
      logits, found = one(part)
      linear = isinstance(logits, LinearLogits)
      return logits.hidden if linear else logits, found

    parts = jax.tree.map(lambda x: _split(x, count), dict(batch))
    joined = jax.tree.map(_join, jax.lax.map(without_head, parts))
    # Of the head nothing depends on the batch: the rest of this is dropped.
    head = one(jax.tree.map(lambda x: x[0], parts)).logits
    logits, found = joined
    if isinstance(head, LinearLogits):
      logits = dataclasses.replace(head, hidden=logits)
    return Output(logits, found), stats

  return model._replace(apply=apply)


# Every count-th row goes together: neighbours lie on one device, and taking
# them apart this way moves nothing between devices.
def _split(x: Array, count: int) -> Array:
  return jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)


def _join(x: Array) -> Array:
  return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
