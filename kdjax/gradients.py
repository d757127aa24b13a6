"""Gradients: of groups of terms apart, of microbatches one after another."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from kdjax.types import Batch


def by_group(
  loss: Callable[[PyTree], tuple[dict[str, Array], Any]],
  trained: PyTree,
  *,
  apart: bool,
) -> tuple[dict[str, PyTree], Array, Any]:
  """The gradient of Σ groups, or of each group, from one forward pass.

  Args:
    loss: `trained -> ({group: scalar}, what else it made)`.
    trained: where the gradient is taken.
    apart: one backward pass for each group; otherwise one, for their sum.

  Returns:
    `{group: gradient}`, or the sum's under the name ""; Σ groups; what else
    the loss made.
  """
  groups, pull_back, more = jax.vjp(loss, trained, has_aux=True)
  total: Any = functools.reduce(jnp.add, groups.values())
  # Pulling a 1 back from some of the groups gives those groups' gradient.
  wanted = {g: [g] for g in groups} if apart else {"": groups}
  found = {
    name: pull_back({g: jnp.float32(g in taken) for g in groups})[0]
    for name, taken in wanted.items()
  }
  return found, total, more


def accumulated(
  one_part: Callable[[Any, Batch, Array], tuple[Any, PyTree]],
  carry: Any,
  batch: Batch,
  key: Array,
  microbatches: int,
) -> tuple[Any, PyTree]:
  """`one_part` of each microbatch in turn: the last carry, and Σ sums.

  Args:
    one_part: `(carry, part, key) -> (carry, sums)`.
    carry: what goes from one microbatch to the next.
    batch: `[B, ...]`, of which each gets B / `microbatches`.
    key: folded with 1, 2, ... for the parts.
    microbatches: how many.
  """
  if microbatches == 1:
    return one_part(carry, batch, jax.random.fold_in(key, 1))
  parts = _split(batch, microbatches)
  first = jax.tree.map(lambda x: x[0], parts)
  _, shapes = jax.eval_shape(one_part, carry, first, key)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  def add(carry_and_sums, numbered_part):
    (carry, sums), (n, part) = carry_and_sums, numbered_part
    carry, more = one_part(carry, part, jax.random.fold_in(key, n))
    return (carry, jax.tree.map(jnp.add, sums, more)), None

  number = jnp.arange(1, 1 + microbatches)
  return jax.lax.scan(add, (carry, zeros), (number, parts))[0]


def _split(batch: Batch, count: int) -> Batch:
  """`[B, ...]` -> `[count, B / count, ...]`, each part spread over all devices.

  Every count-th example goes together: neighbours lie on one device, and taking
  them apart this way moves nothing between devices.
  """
  return {
    k: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)
    for k, x in batch.items()
  }
