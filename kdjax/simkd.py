"""SimKD: the student's features, projected, under the teacher's classifier.

    student = simkd(student, teacher, teacher_variables, example_batch)
    terms = [Term("features", losses.hint, taps=("projected", "stage_3"))]

There is no other loss: neither labels nor logits are learned from. The
projector is part of what is deployed.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from kdjax import errors
from kdjax.adapters import ALL_TAPS, from_nnx, tap_specs
from kdjax.layer_map import matching
from kdjax.losses import maps
from kdjax.models.layers import ConvNorm
from kdjax.types import Batch, Model, Output, Params, Stats, Variables


class Bottleneck(nnx.Module):
  """1x1, 3x3, 1x1 convolutions, each normalised, each followed by ReLU."""

  def __init__(self, inputs: int, outputs: int, factor: int, rngs: nnx.Rngs):
    width = max(outputs // factor, 1)
    kept: dict[str, Any] = dict(
      activation=nnx.relu, axis_name=None, dtype=jnp.float32, rngs=rngs
    )
    self.reduce = ConvNorm(inputs, width, 1, **kept)
    self.mix = ConvNorm(width, width, 3, **kept)
    self.expand = ConvNorm(width, outputs, 1, **kept)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    return self.expand(self.mix(self.reduce(x)))


def simkd(
  student: Model,
  teacher: Model,
  teacher_variables: Variables,
  batch: Batch,
  *,
  tap: str = "stage_*",
  teacher_tap: str = "stage_*",
  factor: int = 2,
) -> Model:
  """classifier_teacher(mean over space of projector(trunk_student(x))).

  Its parameters are `{"student": ..., "projector": ...}`, without the student's
  own classifier. The teacher's lies in its stats, where no gradient comes.

  Args:
    student, teacher: networks with maps as taps and a linear layer named
      `classifier`, such as those of `kdjax.models`.
    teacher_variables: `(params, stats)`.
    batch: an example batch, for shapes.
    tap, teacher_tap: of what a pattern matches, the last is taken.
    factor: the projector's inner width is the teacher's divided by it.

  Returns:
    A model with one more tap, `projected`, of the teacher's channels and the
    size of the smaller of the two maps.

  Raises:
    UserError: no such tap, or no `classifier`.

  Source: Chen et al. 2022, arXiv 2203.14001, section 3 and their code.
  """
  classifier = _inherited(teacher_variables[0])
  specs = jax.eval_shape(student.init, jax.random.key(0), batch)
  if "classifier" not in specs[0]:
    raise errors.UserError(
      f"the student has {sorted(specs[0])}, needs 'classifier' to replace"
    )
  source, ours = _last("student", tap, tap_specs(student, specs, batch))
  _, theirs = _last(
    "teacher", teacher_tap, tap_specs(teacher, teacher_variables, batch)
  )
  size = maps.smaller_size(ours, theirs)
  channels = ours.shape[-1], theirs.shape[-1]
  projector = from_nnx(
    lambda rngs: Bottleneck(*channels, factor, rngs),
    inputs=lambda batch: batch["map"],
  )

  def init(key: Array, batch: Batch) -> tuple[Params, Stats]:
    trunk_key, projector_key = jax.random.split(key)
    params, stats = student.init(trunk_key, batch)
    example = {"map": jnp.zeros((1, *size, channels[0]))}
    own, own_stats = projector.init(projector_key, example)
    trunk = {k: v for k, v in params.items() if k != "classifier"}
    # A copy: what the state holds is donated, the teacher's variables are not.
    fixed = jax.tree.map(jnp.array, dict(classifier))
    return {"student": trunk, "projector": own}, {
      "student": stats,
      "projector": own_stats,
      "classifier": fixed,
    }

  def apply(
    params: Params,
    stats: Stats,
    batch: Batch,
    *,
    train: bool,
    key: Array | None = None,
    taps: tuple[str, ...] = (),
  ) -> tuple[Output, Stats]:
    # Its classifier's output is asked of nobody, so that XLA leaves it out.
    unused = jax.tree.map(
      lambda s: jnp.zeros(s.shape, s.dtype), specs[0]["classifier"]
    )
    wanted = (*(t for t in taps if t != "projected"), source)
    inner, student_stats = student.apply(
      {**params["student"], "classifier": unused},
      stats["student"],
      batch,
      train=train,
      key=key,
      taps=taps if taps == ALL_TAPS else wanted,
    )
    pooled = maps.adaptive_pool(inner.taps[source], size)
    projected, projector_stats = projector.apply(
      params["projector"], stats["projector"], {"map": pooled}, train=train
    )
    features = jnp.mean(projected.logits, axis=(1, 2))
    logits = _classify(stats["classifier"], features)
    new_stats = {
      **stats,
      "student": student_stats,
      "projector": projector_stats,
    }
    there = {**inner.taps, "projected": projected.logits}
    chosen = there if taps == ALL_TAPS else {t: there[t] for t in taps}
    return Output(logits, chosen), new_stats

  return Model(init, apply)


def _inherited(params: Params) -> Mapping[str, Array]:
  """The teacher's classifier."""
  classifier = params.get("classifier")
  if not isinstance(classifier, Mapping) or "kernel" not in classifier:
    raise errors.UserError(
      f"the teacher has {sorted(params)}, needs 'classifier', a "
      "linear layer, for the student to inherit"
    )
  return classifier


def _classify(
  layer: Mapping[str, Array], features: Float[Array, "b d"]
) -> Float[Array, "b classes"]:
  logits = features @ layer["kernel"]
  return logits + layer["bias"][None, :] if "bias" in layer else logits


def _last(side: str, pattern: str, specs: Mapping[str, Any]) -> tuple[str, Any]:
  maps_only = {name: s for name, s in specs.items() if len(s.shape) == 4}
  name = matching(side, pattern, maps_only)[-1]
  return name, specs[name]


def deployed(variables: Variables) -> PyTree:
  """The parameters that are served: with SimKD's, the inherited classifier."""
  params, stats = variables
  if {"student", "projector"} == set(params):
    return {**params, "classifier": stats["classifier"]}
  return params
