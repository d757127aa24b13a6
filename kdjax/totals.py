"""Terms and a batch -> weighted totals: masks, means, weights, powers of T.

Everything travels as (sum, weight) and is divided once, after microbatches and
devices; the weights come from the batch alone.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from kdjax import errors, losses, schedules, term_inputs
from kdjax.losses import fused
from kdjax.objective import Objective, Term, comparable
from kdjax.types import Batch, LinearLogits, Output, dense

# {name: (sum, weight)}
Sums = dict[str, tuple[Array, Array]]


def denominators(
  terms: Sequence[Term], batch: Batch, axis_name: str | None = None
) -> dict[str, Array]:
  """{term: sum of its row weights}, over the whole batch and all devices.

  `kl_at_1` is among them where the two networks are comparable.
  """
  sums = {t.name: term_inputs.row_weights(t, batch).sum() for t in terms}
  if comparable(terms):
    sums["kl_at_1"] = jnp.asarray(batch["mask"], jnp.float32).sum()
  return jax.lax.psum(sums, axis_name) if axis_name else sums


def all_terms(
  terms: Sequence[Term],
  student: Output,
  teacher: Output | None,
  batch: Batch,
  divide_by: Mapping[str, Array],
  step: Array,
  term_params: Mapping[str, PyTree],
  term_state: Mapping[str, PyTree],
  key: Array,
  layout: fused.Layout | None = None,
) -> tuple[dict[str, Array], Sums, dict[str, PyTree]]:
  """`{group: Σ weight · loss}`, the sums, and the terms' new state.

  Those that read logits by `logit_terms`, the rest by `other_terms`.
  """
  logits = [t for t in terms if t.reads_logits]
  others = [t for t in terms if not t.reads_logits]
  targets = teacher and teacher.logits
  ours, sums = logit_terms(
    logits, student.logits, targets, batch, divide_by, step, layout
  )
  more, more_sums, new_state = other_terms(
    others,
    student,
    teacher,
    batch,
    divide_by,
    step,
    term_params,
    term_state,
    key,
  )
  groups: dict[str, Any] = {
    g: ours.get(g, 0) + more.get(g, 0) for g in {**ours, **more}
  }
  return groups, {**sums, **more_sums}, new_state


def logit_terms(
  terms: Sequence[Term],
  student: Any,
  teacher: Any | None,
  batch: Batch,
  divide_by: Mapping[str, Array],
  step: Array,
  layout: fused.Layout | None = None,
) -> tuple[dict[str, Array], Sums]:
  """All terms that read logits, in one call.

  `LinearLogits` of the student are gone through a chunk of tokens at a time;
  the totals have a gradient then, the sums none.

  Args:
    terms: those with `reads_logits`.
    student, teacher: `[*batch, classes]` or `LinearLogits`; no teacher where no
      term needs one.
    batch: with `mask`, and `label` where a term needs it.
    divide_by: `denominators` of the whole batch, of which this may be a part.
    step: the update count that schedules read.
    layout: how the tokens of `LinearLogits` are gone through.

  Returns:
    `{group: weighted total}`, this part's share of it, and `{term: (sum,
    weight)}` before the term's weight, T² included. `kl_at_1` is the KL at
    T = 1, there wherever `divide_by` has it, so that runs with different
    temperatures compare.

  Raises:
    UserError: with `LinearLogits`, for a term that reads more than one example
      at a time.
  """
  if not isinstance(student, LinearLogits):
    constants = divide_by, step
    return _logit_sums(terms, student, dense(teacher), batch, constants)
  for term in terms:
    if term.coupled or term.traits.takes != "examples":
      raise errors.UserError(
        f"term {term.name!r} reads many examples or tokens together, and a "
        "head that is not multiplied out shows a few at a time: give dense "
        'logits (a decoder with head="dense"), or a loss per example'
      )
  if not terms:  # kl_at_1 alone: no gradient is to be made
    student = jax.lax.stop_gradient(student)
  read = {k: batch[k] for k in ("mask", "labelled", "label") if k in batch}
  return fused.sum_rows(
    functools.partial(_logit_sums, terms),
    student,
    teacher,
    read,
    (divide_by, step),
    layout,
  )


def _logit_sums(
  terms: Sequence[Term],
  student: Array,
  teacher: Array | None,
  batch: Batch,
  constants: tuple[Mapping[str, Array], Array],
) -> tuple[dict[str, Array], Sums]:
  """`logit_terms` of logits that are multiplied out: all, or some rows."""
  divide_by, step = constants
  totals: dict[str, Any] = {}
  sums: Sums = {}
  for term in terms:
    values = _values(term, student, teacher, batch, step)
    _add(term, values, batch, divide_by, step, totals, sums)
  if teacher is not None and "kl_at_1" in divide_by:
    kl = Term("kl_at_1", losses.kl)
    values = _values(kl, student, teacher, batch, step)
    sums["kl_at_1"] = _masked_sum(kl, values, batch)
  return totals, sums


def other_terms(
  terms: Sequence[Term],
  student: Output,
  teacher: Output | None,
  batch: Batch,
  divide_by: Mapping[str, Array],
  step: Array,
  term_params: Mapping[str, PyTree],
  term_state: Mapping[str, PyTree],
  key: Array,
) -> tuple[dict[str, Array], Sums, dict[str, PyTree]]:
  """The terms that read taps or own variables; otherwise as `logit_terms`."""
  totals: dict[str, Any] = {}
  sums: Sums = {}
  new_state = dict(term_state)
  for n, term in enumerate(terms):
    ours, theirs, rows = term_inputs.given(term, student, teacher, batch)
    if term.init is None:
      values = _values(term, ours, theirs, rows, step)
    else:
      values, new_state[term.name] = term.loss(
        term_params[term.name],
        term_state[term.name],
        *term_inputs.counting(term, rows, (ours, theirs)),
        rows,
        jax.random.fold_in(key, n),
        **term_inputs.hparams(term, step),
      )
    _add(term, values, rows, divide_by, step, totals, sums)
  return totals, sums, new_state


def _values(
  term: Term, student: Any, teacher: Any | None, batch: Batch, step: Array
) -> Float[Array, " *batch"]:
  """The term's loss times T**power; of several T, the mean."""
  arguments, hparams = term_inputs.arguments(
    term, student, teacher, batch, step
  )
  if not term.temperatures:
    return term.loss(*arguments, **hparams)
  power = term.traits.power if term.scale_by_temperature else 0
  scaled = []
  for temperature in term.temperatures:
    t = temperature(step)
    scaled.append(t**power * term.loss(*arguments, temperature=t, **hparams))
  return functools.reduce(jnp.add, scaled) / len(scaled)


def _masked_sum(
  term: Term, values: Float[Array, " *batch"], batch: Batch
) -> tuple[Array, Array]:
  """(Σ weight · value, Σ weight) over the rows that weigh anything."""
  rows = term_inputs.row_weights(term, batch)
  if jnp.shape(values) != rows.shape:
    raise errors.UserError(
      f"the loss of term {term.name!r} has shape {jnp.shape(values)}, must be "
      f"{rows.shape}: one number an example"
    )
  return jnp.sum(rows * jnp.where(rows > 0, values, 0.0)), rows.sum()


def _add(
  term: Term,
  values: Float[Array, " *batch"],
  batch: Batch,
  divide_by: Mapping[str, Array],
  step: Array,
  totals: dict[str, Any],
  sums: Sums,
) -> None:
  """Puts the masked sum of a term into `sums`, its share into `totals`."""
  sums[term.name] = _masked_sum(term, values, batch)
  share = schedules.schedule(term.weight)(step) * sums[term.name][0]
  share /= _nonzero(divide_by[term.name])
  totals[term.group] = totals.get(term.group, 0.0) + share


def metrics(objective: Objective, sums: Sums, step: Array) -> dict[str, Array]:
  """`loss/<term>`, `weight/<term>` and the schedules shown, at this update."""
  named: dict[str, Any] = {
    (name if name == "kl_at_1" else f"loss/{name}"): value / _nonzero(weight)
    for name, (value, weight) in sums.items()
  }
  for term in objective.terms:
    named[f"weight/{term.name}"] = schedules.schedule(term.weight)(step)
  for name, values in objective.shown.items():
    named[name] = values(step)
  return {k: jnp.asarray(v, jnp.float32) for k, v in named.items()}


def _nonzero(weight: Array) -> Array:
  # A batch without, say, any label: 0 / 1 and not 0 / 0.
  return jnp.where(weight > 0, weight, 1.0)
