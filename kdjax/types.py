"""The seams: what every part of kdjax exchanges. Imports nothing of kdjax."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Float32, PyTree

from kdjax.errors import UserError as UserError

# A mapping of arrays whose leading axis counts examples:
#   image    [B, H, W, C]
#   label    [B]  class number, or [B, classes] soft labels
#   mask     [B]  1 = counts in the loss and in every metric, 0 = padding
#   labelled [B]  1 = the label may be used; absent = all may. A loss that
#                 takes labels gives the other examples no weight.
#   index    [B]  the example's number, where a loss needs it
#   teacher_logits [B, classes]  of a teacher that ran before, for `from_batch`
Batch = Mapping[str, Any]

Params = PyTree
Stats = PyTree
Variables = tuple[Any, Any]  # (params, stats)
Schedule = Callable[[Any], Any]  # optax's: update count -> value
ScalarOrSchedule = float | Array | Schedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearLogits:
  """Logits of a head that is not multiplied out: `[*batch, V]` would not fit.

      logits = softcap · tanh(scale · (hidden · kernelᵀ + bias) / softcap)

  without the softcap where it is None. Classes from `num_classes` on pad the
  vocabulary and are at -inf. `dense` multiplies out.

  Attributes:
    hidden: `[*batch, D]`. Products are taken in its dtype, summed in float32.
    kernel: `[V, D]`, a row for each class: as embeddings lie, so that a tied
      head is the embedding itself and no copy, and as checkpoints store heads.
    bias: `[V]` or None.
    softcap, scale: numbers, constants of the compiled step. A learned scale
      belongs to `hidden`.
    num_classes: the true size of the vocabulary; None: V.
  """

  hidden: Float[Array, "*batch D"]
  kernel: Float[Array, "V D"]
  bias: Float[Array, " V"] | None = None
  softcap: float | None = dataclasses.field(
    default=None, metadata={"static": True}
  )
  scale: float | None = dataclasses.field(
    default=None, metadata={"static": True}
  )
  num_classes: int | None = dataclasses.field(
    default=None, metadata={"static": True}
  )

  @property
  def shape(self) -> tuple[int, ...]:
    """That of the logits, `[*batch, V]`."""
    return (*self.hidden.shape[:-1], self.kernel.shape[0])

  @property
  def vocabulary(self) -> int:
    """How many classes are no padding."""
    size = self.kernel.shape[0]
    return size if self.num_classes is None else min(self.num_classes, size)

  def finish(
    self, product: Float32[Array, "*batch V"]
  ) -> Float32[Array, "*batch V"]:
    """hidden · kernelᵀ -> logits."""
    if self.bias is not None:
      bias = self.bias.astype(jnp.float32)
      product += bias.reshape((1,) * (product.ndim - 1) + bias.shape)
    if self.scale is not None:
      product *= self.scale
    if self.softcap is not None:
      product = self.softcap * jnp.tanh(product / self.softcap)
    return self.mask_padding(product)

  def mask_padding(
    self, logits: Float[Array, "*batch V"]
  ) -> Float[Array, "*batch V"]:
    """-inf for the classes that pad the vocabulary."""
    if self.vocabulary == self.kernel.shape[0]:
      return logits
    classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(classes < self.vocabulary, logits, -jnp.inf)


def dense(logits: Any) -> Any:
  """`LinearLogits` multiplied out, float32 `[*batch, V]`; an array as it is."""
  if not isinstance(logits, LinearLogits):
    return logits
  product = jnp.einsum(
    "...d,vd->...v",
    logits.hidden,
    logits.kernel.astype(logits.hidden.dtype),
    preferred_element_type=jnp.float32,
  )
  return logits.finish(product)


class Output(NamedTuple):
  """What a network returns.

  Attributes:
    logits: `[*batch, classes]`, or the `LinearLogits` that they are.
    taps: named activations, only those that were asked for.
  """

  logits: Any
  taps: Mapping[str, Array] = {}


InitFn = Callable[[Array, Batch], tuple[Params, Stats]]


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
    pinned: whether `apply` says itself where on a mesh its arrays lie, by
      `kdjax.pins`. A network must whose layers are scanned; of another one
      `parallel.gathered` takes care.
  """

  init: InitFn
  apply: ApplyFn
  pinned: bool = False


def run_once(init: InitFn) -> InitFn:
  """`init`, compiled. On CPU without optimising what will run only once."""

  def compiled(key: Array, batch: Batch) -> tuple[Params, Stats]:
    if isinstance(key, Tracer):  # options are the outermost jit's
      return init(key, batch)
    return jax.jit(init, compiler_options=once_options())(key, batch)

  return compiled


def once_options() -> dict[str, Any] | None:
  """Of a compilation that is run once: on CPU optimising takes longer."""
  on_cpu = jax.default_backend() == "cpu"
  return {"xla_backend_optimization_level": 0} if on_cpu else None


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
