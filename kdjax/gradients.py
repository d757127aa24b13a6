"""Gradients: of a microbatch, of groups of terms, of microbatches in turn."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from kdjax import pins, totals
from kdjax.losses.fused import Layout
from kdjax.objective import Objective
from kdjax.types import Batch, LinearLogits, Model, Output


def of_microbatch(
  student: Model,
  teacher: Model | None,
  goal: Objective,
  student_of: Callable[[PyTree, Any], PyTree],
  layout: Layout | None,
  *,
  apart: bool,
) -> Callable[..., tuple[Any, Any]]:
  """A function of a microbatch: ∂ Σ terms / ∂ (student, what terms own).

  It returns `(carried, (gradients, total, sums))` for `accumulated`: statistics
  and the terms' state for the next microbatch; what `by_group` gives, and the
  terms' sums. The teacher is applied first, and has no gradient.

  Args:
    student, teacher, goal, student_of, layout: as for `make_train_step`.
    apart: as for `by_group`.
  """

  def of_part(state, frozen, theirs, divide_by, carried, part, key):
    target = _taught(teacher, theirs, part, goal.taps(1))
    stats, term_state = carried

    def loss(trained):
      params = student_of(trained["student"], frozen)
      output, new_stats = student.apply(
        params, stats, part, train=True, key=key, taps=goal.taps(0)
      )
      groups, sums, new_term_state = totals.all_terms(
        goal.terms,
        _pinned(output),
        target,
        part,
        divide_by,
        state.step,
        trained["terms"],
        term_state,
        jax.random.fold_in(key, 1),
        layout,
      )
      return groups, ((new_stats, new_term_state), sums)

    found, total, (carried, sums) = by_group(loss, state.trained, apart=apart)
    return carried, (found, total, sums)

  return of_part


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


def _taught(
  teacher: Model | None, variables: Any, batch: Batch, taps: tuple[str, ...]
) -> Output | None:
  """What the teacher says of a batch; no gradient goes through it."""
  if teacher is None:
    return None
  params, stats = variables
  output, _ = teacher.apply(params, stats, batch, train=False, taps=taps)
  return _pinned(jax.lax.stop_gradient(output))


def _pinned(output: Output) -> Output:
  """Its logits, or what they are made of, split as the batch is."""
  logits = output.logits
  if isinstance(logits, LinearLogits):
    hidden = pins.by_example(logits.hidden)
    return output._replace(logits=dataclasses.replace(logits, hidden=hidden))
  return output._replace(logits=pins.by_example(logits))
