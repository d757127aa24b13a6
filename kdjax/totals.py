"""Terms and a batch -> weighted totals: masks, means, weights, powers of T.

Everything travels as (sum, weight) and is divided once, after microbatches and
devices; the weights come from the batch alone.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from kdjax import errors, losses, schedules
from kdjax.losses import fused
from kdjax.objective import Names, Objective, Term
from kdjax.types import Batch, LinearLogits, Output, dense

# {name: (sum, weight)}
Sums = dict[str, tuple[Array, Array]]


def row_weights(term: Term, batch: Batch) -> Float[Array, " *batch"]:
  """How much each example counts in the term: from the batch alone."""
  weights = jnp.asarray(batch["mask"], jnp.float32)
  if term.traits.labels and "labelled" in batch:
    weights = weights * batch["labelled"]
  return weights


def denominators(
  terms: Sequence[Term], batch: Batch, axis_name: str | None = None
) -> dict[str, Array]:
  """{term: sum of its row weights}, over the whole batch and all devices."""
  sums = {t.name: row_weights(t, batch).sum() for t in terms}
  sums["kl_at_1"] = jnp.asarray(batch["mask"], jnp.float32).sum()
  return jax.lax.psum(sums, axis_name) if axis_name else sums


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
    T = 1, always there, so that runs with different temperatures compare.

  Raises:
    UserError: with `LinearLogits`, for a term that couples examples.
  """
  if not isinstance(student, LinearLogits):
    constants = divide_by, step
    return _logit_sums(terms, student, dense(teacher), batch, constants)
  for term in terms:
    if term.coupled:
      raise errors.UserError(
        f"term {term.name!r} compares examples with one another, and a head "
        "that is not multiplied out shows a few at a time: give dense logits, "
        "or a loss per example"
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
    values = _per_example(term, student, teacher, batch, step)
    _add(term, values, batch, divide_by, step, totals, sums)
  if teacher is not None:
    rows = jnp.asarray(batch["mask"], jnp.float32)
    kl = Term("kl_at_1", losses.kl)
    value = _per_example(kl, student, teacher, batch, step)
    sums["kl_at_1"] = (jnp.sum(rows * value), rows.sum())
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
    ours, theirs = sides(term, student, teacher)
    if term.init is None:
      values = _per_example(term, ours, theirs, batch, step)
    else:
      values, new_state[term.name] = term.loss(
        term_params[term.name],
        term_state[term.name],
        *_counted(_counts(term, batch), (ours, theirs)),
        batch,
        jax.random.fold_in(key, n),
        **_hparams(term, step),
      )
    _add(term, values, batch, divide_by, step, totals, sums)
  return totals, sums, new_state


def sides(term: Term, student: Any, teacher: Any) -> tuple[Any, Any]:
  """What the term's loss gets of two `Output`s."""
  if term.taps is None:
    return student, teacher
  return activation(student, term.taps[0]), activation(teacher, term.taps[1])


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


def _per_example(
  term: Term, student: Any, teacher: Any | None, batch: Batch, step: Array
) -> Float[Array, " *batch"]:
  """The term's loss times T**power, 0 where the example weighs nothing."""
  traits, counts = term.traits, _counts(term, batch)
  arguments = [_counted(counts, student)]
  if traits.teacher:
    assert teacher is not None, term.name  # refused by name in `check`
    arguments.append(_counted(counts, teacher))
  if traits.labels:
    arguments.append(_counted(counts, batch["label"]))
  hparams = _hparams(term, step)
  if traits.couples:
    hparams["where"] = counts
  if not term.temperatures:
    return _fits(term, counts, term.loss(*arguments, **hparams))
  scaled = []
  for temperature in term.temperatures:
    t = temperature(step)
    power = traits.power if term.scale_by_temperature else 0
    scaled.append(t**power * term.loss(*arguments, temperature=t, **hparams))
  return _fits(term, counts, functools.reduce(jnp.add, scaled) / len(scaled))


def _counts(term: Term, batch: Batch) -> Array:
  return row_weights(term, batch) > 0


def _counted(counts: Array, tree: Any) -> Any:
  """`tree` with 0 where an example weighs nothing.

  Replaced before the loss, not after: a NaN there would come back through the
  gradient of a `where`.
  """

  def one(x: Any) -> Any:
    if isinstance(x, LinearLogits):
      return dataclasses.replace(x, hidden=one(x.hidden))
    shape = counts.shape + (1,) * (x.ndim - counts.ndim)
    return jnp.where(counts.reshape(shape), x, 0)

  return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, LinearLogits))


def _fits(term: Term, counts: Array, values: Array) -> Array:
  if jnp.shape(values) != counts.shape:
    raise errors.UserError(
      f"the loss of term {term.name!r} has shape {jnp.shape(values)}, must be "
      f"{counts.shape}: one number an example"
    )
  return _counted(counts, values)


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
  rows = row_weights(term, batch)
  value = jnp.sum(rows * jnp.where(rows > 0, values, 0.0))
  weight = schedules.schedule(term.weight)(step)
  share = weight * value / _nonzero(divide_by[term.name])
  totals[term.group] = totals.get(term.group, 0.0) + share
  sums[term.name] = (value, rows.sum())


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


def _hparams(term: Term, step: Array) -> dict[str, Any]:
  return {k: v(step) if callable(v) else v for k, v in term.hparams.items()}


def _nonzero(weight: Array) -> Array:
  # A batch without, say, any label: 0 / 1 and not 0 / 0.
  return jnp.where(weight > 0, weight, 1.0)
