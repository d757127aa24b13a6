"""A network whose parameters are gathered where it uses them: `gathered`."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from kdjax.parallel.partition import Rule, shardings
from kdjax.pins import BATCH_AXES
from kdjax.types import Batch, Model, Output, Params, Stats

_NAME = "gathered"


def gathered(model: Model, mesh: Mesh, rules: Sequence[Rule] = ()) -> Model:
  """The network on a mesh whose `fsdp` splits its parameters.

  Left alone, the compiler takes an array split over `fsdp` for a wish to split
  the work so, and sends activations instead of parameters. Here each array is
  gathered over what splits the batch, as often as it is read: once forward and
  once more backward, so that none is kept between (Rajbhandari et al. 2020,
  arXiv 1910.02054, section 5.3; Zhao et al. 2023, arXiv 2304.11277). What a
  rule splits over `model` stays split. A network that computes in another dtype
  than its parameters' keeps them in that one.

  Args:
    model: as it is returned where it is `pinned`, or the mesh has no `fsdp`.
    mesh, rules: as for `shardings`.
  """
  if model.pinned or dict(mesh.shape).get("fsdp", 1) == 1:
    return model

  def whole(sharding: NamedSharding, w: Array) -> Array:
    axes = (_without_batch(axis) for axis in sharding.spec)
    lies = NamedSharding(mesh, PartitionSpec(*axes))
    return checkpoint_name(jax.lax.with_sharding_constraint(w, lies), _NAME)

  def apply(
    params: Params,
    stats: Stats,
    batch: Batch,
    *,
    train: bool,
    key: Array | None = None,
    taps: tuple[str, ...] = (),
  ) -> tuple[Output, Stats]:
    def run(params, stats, batch, key):
      split = shardings(params, mesh, rules)
      params = jax.tree.map(whole, split, params)
      return model.apply(params, stats, batch, train=train, key=key, taps=taps)

    if train:
      policy = jax.checkpoint_policies.save_anything_except_these_names(_NAME)
      run = jax.checkpoint(run, policy=policy)
    return run(params, stats, dict(batch), key)

  return Model(model.init, apply)


def _without_batch(axis: Any) -> Any:
  names = (axis,) if isinstance(axis, str) else axis or ()
  kept = tuple(name for name in names if name not in BATCH_AXES)
  return kept or None
