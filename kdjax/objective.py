"""The objective: terms with their weights and schedules.

    total = alpha · hard + (1 − alpha) · T² · soft + Σ weight · term

alpha weights the labels. What a term's loss gives, one number per example, is
masked, averaged, multiplied by its power of T and weighted in `totals`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxtyping import PyTree

from kdjax import errors, losses, schedules
from kdjax.types import ScalarOrSchedule, Schedule

# One tap, or several that a loss reads together.
Names = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Term:
  """A loss bound to the networks' outputs, with its weight.

  Attributes:
    name: its name in the metrics (`loss/<name>`, `weight/<name>`).
    loss: one of `kdjax.losses`, or any function like them: of two logits, or
      with `taps` of two activations. With `init` it is `(params, state,
      student, teacher, batch, key, **hparams) -> ([B], state)`.
    weight: a number or a schedule.
    temperature: T > 0, a number or a schedule, for a loss that takes it; of
      several, the term is the mean over them, each after its own scale.
    hparams: the loss's other arguments. Schedules are evaluated at each update;
      whatever else stays a constant of the compiled step.
    group: what the term's gradient counts as, for optimizers that treat the
      labels' and the teacher's gradients apart.
    taps: the names of the student's and the teacher's activation, or a tuple of
      names on each side, which the loss gets as a tuple. "logits" names the
      network's logits. None: the logits on both sides; with `init`, the whole
      `Output`s. Where the mask is [B, S], each token is an example: [B, S, D]
      and [B, heads, S, d] come as [B · S, ...], and a loss that couples
      examples costs O((B · S)²) unless its `group_size` says which meet.
    init: `(key, student_spec, teacher_spec) -> (params, state)` where the term
      owns variables: the specs are `ShapeDtypeStruct`s of what the loss gets.
      `params` are trained with the student; `state` is carried from step to
      step. Neither is part of the student.
    scale_by_temperature: multiply by T to the power that the loss declares.
    couples: whether examples of a batch meet in the term; None: as the loss
      declares.
    sharded: names of arrays of `state` (a dict) whose first axis lies split
      over the data axis.
  """

  name: str
  loss: Callable[..., Any]
  weight: ScalarOrSchedule = 1.0
  temperature: ScalarOrSchedule | Sequence[ScalarOrSchedule] | None = None
  hparams: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  group: str = "extra"
  taps: tuple[Names, Names] | None = None
  init: Callable[..., tuple[PyTree, PyTree]] | None = None
  scale_by_temperature: bool = True
  couples: bool | None = None
  sharded: tuple[str, ...] = ()

  @property
  def reads_logits(self) -> bool:
    return self.taps is None and self.init is None

  @property
  def traits(self) -> losses.Traits:
    """Those of its loss; a loss on taps need not declare any."""
    return losses.traits(
      self.loss, None if self.reads_logits else losses.Traits()
    )

  @property
  def coupled(self) -> bool:
    """Whether examples of a batch meet in this term."""
    return self.traits.couples if self.couples is None else self.couples

  @property
  def temperatures(self) -> tuple[Schedule, ...]:
    t = self.temperature
    if t is None:
      return ()
    several = isinstance(t, (tuple, list))
    return tuple(schedules.schedule(x) for x in (t if several else (t,)))


@dataclasses.dataclass(frozen=True)
class Objective:
  """Terms, and the schedules that the metrics show under their own names."""

  terms: tuple[Term, ...]
  shown: Mapping[str, Schedule] = dataclasses.field(default_factory=dict)

  def __add__(self, terms: Iterable[Term]) -> "Objective":
    return dataclasses.replace(self, terms=(*self.terms, *terms))

  @property
  def comparable(self) -> bool:
    """Whether the two networks' logits mean the same, position by position."""
    return comparable(self.terms)

  def taps(self, side: int) -> tuple[str, ...]:
    """The tap names asked of the student (side 0) or the teacher (side 1)."""
    names = [n for t in self.terms if t.taps for n in each(t.taps[side])]
    return tuple(n for n in dict.fromkeys(names) if n != "logits")


def as_objective(terms: Objective | Iterable[Term]) -> Objective:
  """Terms alone show nothing but themselves."""
  return terms if isinstance(terms, Objective) else Objective(tuple(terms))


def comparable(terms: Iterable[Term]) -> bool:
  """Whether no term has it that the two networks read other tokens."""
  return all(t.traits.takes != "spans" for t in terms)


def each(names: Names) -> tuple[str, ...]:
  return (names,) if isinstance(names, str) else tuple(names)


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
    temperature: T of the soft loss, on both sets of logits. Of
      `likelihood_matching` it is τ, which divides the likelihoods of spans.
    hard_weight, soft_weight: instead of alpha, where a recipe's two weights do
      not add up to one.
    soft, hard: the losses. `nkd` becomes its two parts, as their powers of T
      differ. `universal_logits` and `likelihood_matching` compare networks of
      two tokenizers: their T² is T¹, and the mean is over spans.
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


def check(objective: Objective, steps: int, *, has_teacher: bool) -> None:
  """Refuses what no step should begin with.

  Raises:
    UserError: two terms of one name; a term that needs the teacher there is
      none of; one that compares tokens beside one that compares spans; T <= 0,
      alpha outside [0, 1] or a negative weight at any update.
  """
  names = [t.name for t in objective.terms]
  for name in names:
    if names.count(name) > 1:
      raise errors.UserError(
        f"two terms are named {name!r}: the metrics need a name for each"
      )
  for term in objective.terms:
    if term.traits.teacher and not has_teacher:
      raise errors.UserError(
        f"term {term.name!r} compares with a teacher and there is none: give "
        "one, or leave the term out"
      )
    if term.traits.takes != "spans" and term.traits.teacher:
      _check_comparable(term, objective)
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


def _check_comparable(term: Term, objective: Objective) -> None:
  if not objective.comparable:
    raise errors.UserError(
      f"term {term.name!r} compares two networks token by token, and others "
      "have it that their tokenizers differ: leave it out, or those on spans"
    )
