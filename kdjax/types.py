"""The seams: what every part of kdjax exchanges. Imports nothing of kdjax."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
from jaxtyping import Array, PyTree

from kdjax.errors import UserError as UserError

# A mapping of arrays whose leading axis counts examples:
#   image    [B, H, W, C]
#   label    [B]  class number, or [B, classes] soft labels
#   mask     [B]  1 = counts in the loss and in every metric, 0 = padding
#   labelled [B]  1 = the label may be used; absent = all may. A loss that
#                 takes labels gives the other examples no weight.
#   index    [B]  the example's number, where a loss needs it
Batch = Mapping[str, Any]

Params = PyTree
Stats = PyTree
Variables = tuple[Any, Any]  # (params, stats)
Schedule = Callable[[Any], Any]  # optax's: update count -> value
ScalarOrSchedule = float | Array | Schedule


class LinearLogits(NamedTuple):
  """A head that is not multiplied out: softcap(scale · hidden kernelᵀ + bias).

  Attributes:
    hidden: `[*batch, D]`.
    kernel: `[V, D]`, row v is class v's weights (as embeddings lie).
    bias: `[V]`.
    softcap: c of c · tanh(x / c).
    scale: factor on the product.
    num_classes: only so many of the V rows are classes; None = all.
  """

  hidden: Any
  kernel: Any
  bias: Any = None
  softcap: Any = None
  scale: Any = None
  num_classes: Any = None


class Output(NamedTuple):
  """What a network returns.

  Attributes:
    logits: `[*batch, classes]`.
    taps: named activations, only those that were asked for.
  """

  logits: Any
  taps: Mapping[str, Array] = {}


class ApplyFn(Protocol):
  def __call__(
    self,
    params: Params,
    stats: Stats,
    batch: Batch,
    *,
    train: bool,
    key: Array | None = None,
    taps: tuple[str, ...] = (),
  ) -> tuple[Output, Stats]: ...


class Model(NamedTuple):
  """A network as two pure functions; `adapters` makes one from NNX or Linen.

  Attributes:
    init: `(key, batch) -> (params, stats)`. `stats` holds every variable that
      training changes but no gradient reaches (batch statistics); `{}` if none.
    apply: `(params, stats, batch, *, train, key=None, taps=()) ->
      (Output, stats)`. With `train=False` it returns the stats it was given.
      `taps` are the names of the activations to return, fixed at trace time.
  """

  init: Callable[[Array, Batch], tuple[Params, Stats]]
  apply: ApplyFn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a train step changes. The teacher is not in it.

  Attributes:
    step: number of optimizer updates made so far; schedules count it.
    params: the student's trained variables.
    stats: the student's other variables.
    opt_state: the optimizer's, over `trained`.
    key: the run's PRNG key, never advanced: step n draws from
      `fold_in(key, n)`, so a resumed run draws the same.
    term_params: what terms train beside the student, by term name.
    term_state: what terms carry from step to step, by term name.
  """

  step: Array
  params: Params
  stats: Stats
  opt_state: PyTree
  key: Array
  term_params: dict[str, PyTree] = dataclasses.field(default_factory=dict)
  term_state: dict[str, PyTree] = dataclasses.field(default_factory=dict)

  @property
  def trained(self) -> dict[str, PyTree]:
    """What the optimizer updates: the student and what terms own."""
    return {"student": self.params, "terms": self.term_params}

  def replace(self, **changes: Any) -> "TrainState":
    return dataclasses.replace(self, **changes)
