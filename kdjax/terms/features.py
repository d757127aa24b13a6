"""Terms of one activation each that own variables."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from kdjax import errors
from kdjax.losses import features, maps, preactivations
from kdjax.objective import Names, Term
from kdjax.projectors import batch_norm, convolve, normalizing
from kdjax.types import Batch, ScalarOrSchedule

Spec = Any  # jax.ShapeDtypeStruct
_he = jax.nn.initializers.he_normal()


def variational_information(
  name: str,
  taps: tuple[Names, Names],
  *,
  weight: ScalarOrSchedule,
  initial_variance: float = 5.0,
  minimum: float = 1e-5,
) -> Term:
  """`losses.variational_information` with its variances, one a channel.

  variance = softplus(a) + minimum, and a is trained. The mean μ(s) is a
  projector's: the paper has `mlp(num_hidden=2)`.

  Args:
    taps: one activation of each network.
    initial_variance: of every channel, above `minimum`.
    minimum: below which no variance falls.

  Raises:
    UserError: if the initial variance is not above the minimum.

  Source: Ahn et al. 2019 (VID), arXiv 1904.05835, section 3.1, equation 5.
  """
  above = initial_variance - minimum
  if above <= 0 or minimum < 0:
    raise errors.UserError(
      f"term {name!r} got initial_variance={initial_variance}, "
      f"minimum={minimum}: give initial_variance > minimum >= 0"
    )
  start = above + math.log(-math.expm1(-above))  # softplus⁻¹

  def init(key: Array, student: Spec, teacher: Spec) -> tuple[PyTree, PyTree]:
    return {"raw_variance": jnp.full(teacher.shape[-1], start)}, {}

  def loss(
    params: PyTree,
    state: PyTree,
    student: Array,
    teacher: Array,
    batch: Batch,
    key: Array,
  ) -> tuple[Array, PyTree]:
    variance = jax.nn.softplus(params["raw_variance"]) + minimum
    return features.variational_information(student, teacher, variance), state

  return Term(name, loss, weight, taps=taps, init=init)


def masked_generative(
  name: str,
  taps: tuple[Names, Names],
  *,
  weight: ScalarOrSchedule,
  mask_ratio: ScalarOrSchedule = 0.65,
) -> Term:
  """`losses.masked_generative` with its generator, conv3x3–ReLU–conv3x3.

  The generator takes the student's channels to the teacher's; a map that is
  larger than the teacher's needs a projector. Each step hides other positions.

  Args:
    taps: a map of each network.
    mask_ratio: share of the positions that are hidden, in [0, 1): 0.65 in the
      paper's detectors, 0.15 in its classifiers.

  Raises:
    UserError: when initialised, if an activation is no map.

  Source: Yang et al. 2022 (MGD), arXiv 2205.01529, section 3.
  """

  def init(key: Array, student: Spec, teacher: Spec) -> tuple[PyTree, PyTree]:
    maps.spatial_size(student)
    inputs, outputs = student.shape[-1], teacher.shape[-1]
    first, last = jax.random.split(key)
    return {
      "first": _he(first, (3, 3, inputs, outputs), jnp.float32),
      "first_bias": jnp.zeros(outputs),
      "last": _he(last, (3, 3, outputs, outputs), jnp.float32),
      "last_bias": jnp.zeros(outputs),
    }, {}

  def loss(
    params: PyTree,
    state: PyTree,
    student: Array,
    teacher: Array,
    batch: Batch,
    key: Array,
    *,
    mask_ratio: Array,
  ) -> tuple[Array, PyTree]:
    def bias(name: str) -> Array:
      return params[name].reshape(1, 1, 1, -1)

    def generate(x: Array) -> Array:
      x = convolve(x, params["first"]) + bias("first_bias")
      return convolve(jax.nn.relu(x), params["last"]) + bias("last_bias")

    mask = features.hide_positions(key, student, mask_ratio)
    values = features.masked_generative(student, teacher, mask, generate)
    return values, state

  return Term(
    name,
    loss,
    weight,
    hparams={"mask_ratio": mask_ratio},
    taps=taps,
    init=init,
  )


def overhaul(
  name: str, taps: tuple[Names, Names], *, weight: ScalarOrSchedule
) -> Term:
  """`losses.overhaul` with the margin measured while training.

  The margin of a channel is the mean of all the teacher's negative responses so
  far, this batch included; 0 until there is one. The paper allows it beside the
  expectation from the teacher's batch norm, `losses.overhaul_margin`, which is
  better where those parameters are at hand.

  Args:
    taps: one activation of each network, before its ReLU. The paper has one
      term a stage, the last with weight 1e-3, each before it with half the
      weight of the next, and `linear(norm=True)` as projector.

  Source: Heo et al. 2019 (OFD), arXiv 1904.01866, section 3.1.
  """

  def init(key: Array, student: Spec, teacher: Spec) -> tuple[PyTree, PyTree]:
    channels = teacher.shape[-1:]
    return {}, {"margin": jnp.zeros(channels), "count": jnp.zeros(channels)}

  def loss(
    params: PyTree,
    state: PyTree,
    student: Array,
    teacher: Array,
    batch: Batch,
    key: Array,
  ) -> tuple[Array, PyTree]:
    _, t = maps.both(student, teacher)
    axes = tuple(range(t.ndim - 1))
    negative = t < 0  # false for padding, which comes as zeros
    seen = jnp.sum(negative, axes, dtype=jnp.float32)
    count = state["count"] + seen
    excess = jnp.sum(t, axes, where=negative) - seen * state["margin"]
    margin = state["margin"] + excess / jnp.maximum(count, 1)
    values = preactivations.overhaul(student, teacher, margin)
    return values, {"margin": margin, "count": count}

  return Term(name, loss, weight, taps=taps, init=init, couples=True)


def simple(
  name: str,
  taps: tuple[Names, Names],
  *,
  weight: ScalarOrSchedule,
  exponent: ScalarOrSchedule = 4.0,
) -> Term:
  """`losses.simple` of BN(W s) and BN(t).

  W is a linear projector; the batch norms have no parameters and use the
  batch's own statistics. A bias before them would do nothing.

  Args:
    taps: one activation of each network, with equal positions: the paper has
      the pooled features before the classifier.
    exponent: at least 1.

  Source: Miles and Mikolajczyk 2023 (SRD), arXiv 2303.11098, section 3; epsilon
    1e-4 as in the authors' code.
  """

  def init(key: Array, student: Spec, teacher: Spec) -> tuple[PyTree, PyTree]:
    shape = (student.shape[-1], teacher.shape[-1])
    make = jax.nn.initializers.lecun_normal()
    return {"kernel": make(key, shape, jnp.float32)}, {}

  def loss(
    params: PyTree,
    state: PyTree,
    student: Array,
    teacher: Array,
    batch: Batch,
    key: Array,
    *,
    exponent: Array,
  ) -> tuple[Array, PyTree]:
    student, teacher = maps.both(student, teacher)
    where = jnp.asarray(batch["mask"]) > 0
    student = jnp.matmul(
      *normalizing(student, params["kernel"], where, epsilon=1e-4)
    )
    teacher = batch_norm(teacher, where, epsilon=1e-4)
    values = features.simple(student, teacher, exponent=exponent, where=where)
    return values, state

  return Term(
    name,
    loss,
    weight,
    hparams={"exponent": exponent},
    taps=taps,
    init=init,
    couples=True,
  )
