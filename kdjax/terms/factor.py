"""Factor transfer: the student learns a summary of the teacher's map."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from kdjax import errors
from kdjax.losses import maps, transfer
from kdjax.objective import Names, Term
from kdjax.projectors import batch_norm, convolve
from kdjax.types import Batch, ScalarOrSchedule

Spec = Any  # jax.ShapeDtypeStruct
_he = jax.nn.initializers.he_normal()


def factor(
  name: str,
  taps: tuple[Names, Names],
  *,
  weight: ScalarOrSchedule,
  factor_ratio: float = 0.5,
  power_in: ScalarOrSchedule = 2,
  power_out: ScalarOrSchedule = 1,
  reconstruction_weight: ScalarOrSchedule = 0.005,
) -> Term:
  """`losses.factor`(T(s), P(t)) + reconstruction_weight · mean (D(P(t)) − t)².

  The paraphraser P has three 3x3 convolutions, to factor_ratio times the
  teacher's channels; D undoes it. The translator T has three, batch-normalised,
  from the student's channels. Each convolution has a leaky ReLU of slope 0.1.

  P and D learn from the reconstruction alone, T and the student from the
  factors alone. All learn at once, so early targets are those of an untrained
  P; the authors train P first, in a stage of its own.

  Args:
    taps: a map of each network; they may differ in size and channels.
    factor_ratio: k of the paper, above 0.
    power_in, power_out: of `losses.factor`.
    reconstruction_weight: before `weight`, which multiplies both; the default
      undoes the usual weight of 200.

  Raises:
    UserError: if the ratio is not above 0; when initialised, if an activation
      is no map.

  Source: Kim et al. 2018 (FT), arXiv 1802.04977, section 3; the layers are
    those of RepDistiller.
  """
  if factor_ratio <= 0:
    raise errors.UserError(
      f"term {name!r} got factor_ratio={factor_ratio}: give a number above 0"
    )

  def init(key: Array, student: Spec, teacher: Spec) -> tuple[PyTree, PyTree]:
    maps.spatial_size(student)
    maps.spatial_size(teacher)
    ours, theirs = student.shape[-1], teacher.shape[-1]
    factors = max(1, int(theirs * factor_ratio))
    keys = jax.random.split(key, 3)
    return {
      "paraphraser": _layers(keys[0], theirs, theirs, factors, factors),
      "inverse": _layers(keys[1], factors, factors, theirs, theirs),
      "translator": [
        {**layer, "scale": jnp.ones_like(layer["bias"])}
        for layer in _layers(keys[2], ours, ours, factors, factors)
      ],
    }, {}

  def loss(
    params: PyTree,
    state: PyTree,
    student: Array,
    teacher: Array,
    batch: Batch,
    key: Array,
    *,
    power_in: Array,
    power_out: Array,
    reconstruction_weight: Array,
  ) -> tuple[Array, PyTree]:
    student, teacher = maps.both(student, teacher)
    where = jnp.asarray(batch["mask"]) > 0
    theirs = _apply(params["paraphraser"], teacher, where)
    ours = _apply(params["translator"], student, where)
    again = _apply(params["inverse"], theirs, where)
    # `losses.factor` stops the gradient on its way to the paraphraser.
    values = transfer.factor(
      ours, theirs, power_in=power_in, power_out=power_out
    )
    missed = maps.example_mean((again - teacher) ** 2)
    return values + reconstruction_weight * missed, state

  return Term(
    name,
    loss,
    weight,
    hparams={
      "power_in": power_in,
      "power_out": power_out,
      "reconstruction_weight": reconstruction_weight,
    },
    taps=taps,
    init=init,
    couples=True,
  )


def _layers(key: Array, *channels: int) -> list[dict[str, Array]]:
  keys = jax.random.split(key, len(channels) - 1)
  return [
    {"kernel": _he(k, (3, 3, a, b), jnp.float32), "bias": jnp.zeros(b)}
    for k, (a, b) in zip(keys, itertools.pairwise(channels))
  ]


def _apply(layers: list[dict[str, Array]], x: Array, where: Array) -> Array:
  for layer in layers:
    x = convolve(x, layer["kernel"])
    if "scale" in layer:
      x = batch_norm(x, where) * layer["scale"].reshape(1, 1, 1, -1)
    x = jax.nn.leaky_relu(x + layer["bias"].reshape(1, 1, 1, -1), 0.1)
  return x
