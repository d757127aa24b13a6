"""The objective: terms, their weights and schedules, masks, means and T².

    total = alpha · hard + (1 − alpha) · T² · soft + Σ weight · term

alpha weights the labels. A term's loss gives one number per example; here, and
nowhere else, it is masked, averaged, multiplied by its power of T and weighted.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from kdjax import errors, losses, schedules
from kdjax.types import Batch, Output, ScalarOrSchedule, Schedule

# {name: (sum, weight)}: divided once, after microbatches and devices.
Sums = dict[str, tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class Term:
  """A loss bound to the networks' outputs, with its weight.

  Attributes:
    name: its name in the metrics (`loss/<name>`, `weight/<name>`).
    loss: without `taps`, one of `kdjax.losses` or any function declared by
      `losses.logit_loss`. With `taps`, `(student, teacher, **hparams) -> [B]`
      on the two activations. With `init`, `(params, state, student, teacher,
      batch, key, **hparams) -> ([B], state)` on two whole `Output`s.
    weight: a number or a schedule.
    temperature: T > 0, a number or a schedule, for a loss that takes it; of
      several, the term is the mean over them, each after its own scale.
    hparams: the loss's other arguments. Schedules are evaluated at each update;
      whatever else stays a constant of the compiled step.
    group: what the term's gradient counts as, for optimizers that treat the
      labels' and the teacher's gradients apart.
    taps: the names of the student's and the teacher's activation.
    init: `(key, student_spec, teacher_spec) -> (params, state)`, both specs
      being `Output`s of `ShapeDtypeStruct`s, where the term owns variables.
    scale_by_temperature: multiply by T to the power that the loss declares.
  """

  name: str
  loss: Callable[..., Any]
  weight: ScalarOrSchedule = 1.0
  temperature: ScalarOrSchedule | Sequence[ScalarOrSchedule] | None = None
  hparams: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  group: str = "extra"
  taps: tuple[str, str] | None = None
  init: Callable[..., tuple[PyTree, PyTree]] | None = None
  scale_by_temperature: bool = True

  @property
  def reads_logits(self) -> bool:
    return self.taps is None and self.init is None

  @property
  def temperatures(self) -> tuple[Schedule, ...]:
    t = self.temperature
    if t is None:
      return ()
    several = isinstance(t, (tuple, list))
    return tuple(schedules.schedule(x) for x in (t if several else (t,)))

  @property
  def couples(self) -> bool:
    """Whether examples of a batch meet in this term."""
    return self.reads_logits and losses.traits(self.loss).couples

  @property
  def needs_labels(self) -> bool:
    return self.reads_logits and losses.traits(self.loss).labels


@dataclasses.dataclass(frozen=True)
class Objective:
  """Terms, and the schedules that the metrics show under their own names."""

  terms: tuple[Term, ...]
  shown: Mapping[str, Schedule] = dataclasses.field(default_factory=dict)

  def __add__(self, terms: Iterable[Term]) -> "Objective":
    return dataclasses.replace(self, terms=(*self.terms, *terms))

  def taps(self, side: int) -> tuple[str, ...]:
    """The tap names asked of the student (side 0) or the teacher (side 1)."""
    return tuple(dict.fromkeys(t.taps[side] for t in self.terms if t.taps))


def hinton(
  *,
  alpha: ScalarOrSchedule | None = None,
  temperature: ScalarOrSchedule | Sequence[ScalarOrSchedule] = 1.0,
  hard_weight: ScalarOrSchedule | None = None,
  soft_weight: ScalarOrSchedule | None = None,
  soft: Callable[..., Any] = losses.kl,
  hard: Callable[..., Any] = losses.cross_entropy,
  soft_hparams: Mapping[str, Any] | None = None,
  hard_hparams: Mapping[str, Any] | None = None,
) -> Objective:
  """alpha · hard + (1 − alpha) · T² · soft (Hinton et al. 2015, section 2).

  Args:
    alpha: weight of the labels, in [0, 1].
    temperature: T of the soft loss, on both sets of logits.
    hard_weight, soft_weight: instead of alpha, where a recipe's two weights do
      not add up to one.
    soft, hard: the losses. `nkd` becomes its two parts, as their powers of T
      differ.
    soft_hparams, hard_hparams: further arguments of the losses.

  Raises:
    UserError: if both alpha and a weight are given, or neither.
  """
  shown = {}
  if alpha is not None and hard_weight is None and soft_weight is None:
    share = schedules.schedule(alpha, "alpha")
    shown["alpha"] = hard_weight = share
    soft_weight = _complement(share)
  elif alpha is not None or hard_weight is None or soft_weight is None:
    raise errors.UserError(
      f"got alpha={alpha}, hard_weight={hard_weight}, soft_weight={soft_weight}"
      ": give alpha alone, or both weights"
    )
  soft_hparams, hard_hparams = (
    dict(soft_hparams or {}),
    dict(hard_hparams or {}),
  )
  term = functools.partial(Term, group="soft")
  if inspect.unwrap(soft) is losses.nkd and soft is not losses.nkd:
    raise errors.UserError(
      "got a transformed nkd, whose two parts have two powers of T: give two "
      "terms, of the transformed nkd_target and nkd_nontarget"
    )
  if soft is losses.nkd:
    gamma = soft_hparams.pop("gamma", 1.5)
    soft_terms = [
      term("nkd_target", losses.nkd_target, soft_weight),
      term(
        "nkd_nontarget",
        losses.nkd_nontarget,
        _product(soft_weight, gamma),
        temperature,
      ),
    ]
  else:
    soft_terms = [
      term("soft", soft, soft_weight, temperature, hparams=soft_hparams)
    ]
  if not isinstance(temperature, (tuple, list)):
    shown["temperature"] = schedules.schedule(temperature, "temperature")
  hard_term = Term(
    "hard", hard, hard_weight, hparams=hard_hparams, group="hard"
  )
  return Objective((hard_term, *soft_terms), shown)


def _complement(share: Schedule) -> Schedule:
  return lambda step: 1.0 - share(step)


def _product(weight: ScalarOrSchedule, factor: float) -> Schedule:
  values = schedules.schedule(weight)
  return lambda step: factor * values(step)


def row_weights(term: Term, batch: Batch) -> Float[Array, " *batch"]:
  """How much each example counts in the term: from the batch alone."""
  weights = jnp.asarray(batch["mask"], jnp.float32)
  if term.needs_labels and "labelled" in batch:
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
) -> tuple[dict[str, Array], Sums]:
  """All terms that read logits, in one call.

  Args:
    terms: those with `reads_logits`.
    student, teacher: `[*batch, classes]`; no teacher where no term needs one.
    batch: with `mask`, and `label` where a term needs it.
    divide_by: `denominators` of the whole batch, of which this may be a part.
    step: the update count that schedules read.

  Returns:
    `{group: weighted total}`, this part's share of it, and `{term: (sum,
    weight)}` before the term's weight, T² included. `kl_at_1` is the KL at
    T = 1, always there, so that runs with different temperatures compare.
  """
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


def _per_example(
  term: Term, student: Array, teacher: Array | None, batch: Batch, step: Array
) -> Float[Array, " *batch"]:
  """The term's loss times T**power, 0 where the example weighs nothing."""
  traits = losses.traits(term.loss)
  counts = row_weights(term, batch) > 0

  # Examples without weight are replaced before the loss, not after: a NaN there
  # would come back through the gradient of a `where`.
  def counted(x: Array) -> Array:
    return jnp.where(
      counts.reshape(counts.shape + (1,) * (x.ndim - counts.ndim)), x, 0
    )

  arguments = [counted(student)]
  if traits.teacher:
    assert teacher is not None, term.name  # refused by name in `check`
    arguments.append(counted(teacher))
  if traits.labels:
    arguments.append(counted(batch["label"]))
  hparams = _hparams(term, step)
  if traits.couples:
    hparams["where"] = counts
  if not term.temperatures:
    return counted(term.loss(*arguments, **hparams))
  scaled = []
  for temperature in term.temperatures:
    t = temperature(step)
    power = traits.power if term.scale_by_temperature else 0
    scaled.append(t**power * term.loss(*arguments, temperature=t, **hparams))
  return counted(functools.reduce(jnp.add, scaled) / len(scaled))


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
    hparams = _hparams(term, step)
    if term.init is not None:
      values, new_state[term.name] = term.loss(
        term_params[term.name],
        term_state[term.name],
        student,
        teacher,
        batch,
        jax.random.fold_in(key, n),
        **hparams,
      )
    else:
      assert teacher is not None
      assert term.taps is not None
      ours, theirs = term.taps
      values = term.loss(
        student.taps[ours],
        teacher.taps[theirs],
        **hparams,
      )
    _add(term, values, batch, divide_by, step, totals, sums)
  return totals, sums, new_state


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


def check(objective: Objective, steps: int, *, has_teacher: bool) -> None:
  """Refuses what no step should begin with.

  Raises:
    UserError: two terms of one name; a term that needs the teacher there is
      none of; T <= 0, alpha outside [0, 1] or a negative weight at any update.
  """
  names = [t.name for t in objective.terms]
  for name in names:
    if names.count(name) > 1:
      raise errors.UserError(
        f"two terms are named {name!r}: the metrics need a name for each"
      )
  for term in objective.terms:
    wants = not term.reads_logits or losses.traits(term.loss).teacher
    if wants and not has_teacher:
      raise errors.UserError(
        f"term {term.name!r} compares with a teacher and there is none: give "
        "one, or leave the term out"
      )
    for t in term.temperatures:
      schedules.check_range(
        t, steps, f"temperature of {term.name!r}", 0, open_low=True
      )
  if "alpha" in objective.shown:
    schedules.check_range(objective.shown["alpha"], steps, "alpha", 0, 1)
  for term in objective.terms:
    schedules.check_range(
      schedules.schedule(term.weight), steps, f"weight of {term.name!r}", 0
    )


def _hparams(term: Term, step: Array) -> dict[str, Any]:
  return {k: v(step) if callable(v) else v for k, v in term.hparams.items()}


def _nonzero(weight: Array) -> Array:
  # A batch without, say, any label: 0 / 1 and not 0 / 0.
  return jnp.where(weight > 0, weight, 1.0)
