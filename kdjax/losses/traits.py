"""What the objective must know of a loss: declared as data, by a decorator."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from kdjax.types import UserError

Loss = TypeVar("Loss", bound=Callable[..., Any])
Takes = Literal["examples", "sequences", "spans"]


@dataclasses.dataclass(frozen=True)
class Traits:
  """What a loss takes, and how it scales.

  Attributes:
    power: the power of the student's temperature by which the objective
      multiplies the loss, so that its gradient keeps its scale as T grows.
    labels: whether the labels are an argument.
    teacher: whether the teacher's side is an argument.
    couples: whether examples of a batch meet in it; such a loss takes `where`.
    takes: what one number of the result belongs to, and what the loss is given:
      "examples", of which each token of a text is one, those without weight
      replaced by 0; "sequences", whole rows [B, S, ...], to give a number a
      token; "spans", whole rows of two tokenizations, whose lengths and classes
      may differ, to give a number a span, weighed by `span_mask`. A loss of the
      latter two leaves out by itself what is padding.
    reads: names of arrays of the batch that it takes as arguments of that name.
      One with a default may be missing from the batch.
  """

  power: int = 0
  labels: bool = False
  teacher: bool = True
  couples: bool = False
  takes: Takes = "examples"
  reads: tuple[str, ...] = ()

  @property
  def mask(self) -> str:
    """The array of the batch that weighs its results."""
    return "span_mask" if self.takes == "spans" else "mask"


def logit_loss(
  *,
  power: int,
  labels: bool = False,
  teacher: bool = True,
  couples: bool = False,
  takes: Takes = "examples",
  reads: tuple[str, ...] = (),
) -> Callable[[Loss], Loss]:
  """Declares the `Traits` of a loss on logits; the function stays as it is."""
  return _declare(Traits(power, labels, teacher, couples, takes, reads))


def tap_loss(
  *,
  couples: bool = False,
  takes: Takes = "examples",
  reads: tuple[str, ...] = (),
) -> Callable[[Loss], Loss]:
  """Declares a loss on two activations, `(student, teacher, ...) -> [B]`.

  Without it a function of two activations counts as a loss per example.
  """
  return _declare(Traits(couples=couples, takes=takes, reads=reads))


def _declare(declared: Traits) -> Callable[[Loss], Loss]:
  def declare(loss: Loss) -> Loss:
    vars(loss)["traits"] = declared
    return loss

  return declare


def traits(loss: Callable[..., Any], default: Traits | None = None) -> Traits:
  """The traits of a loss, or of a `functools.partial` of one.

  Raises:
    UserError: if nothing is declared and there is no default.
  """
  while isinstance(loss, functools.partial):
    loss = loss.func
  declared = getattr(loss, "traits", default)
  if not isinstance(declared, Traits):
    name = getattr(loss, "__name__", repr(loss))
    raise UserError(
      f"{name} declares neither its power of T nor whether it takes labels: "
      "decorate it with @losses.logit_loss(power=...)"
    )
  return declared
