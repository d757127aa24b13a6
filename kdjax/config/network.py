"""A config's networks, and the variables that they start from."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from kdjax import (
  adapters,
  checkpoint,
  errors,
  files,
  models,
  parallel,
  pretrained,
)
from kdjax.config.values import take_name
from kdjax.types import Batch, Model, Variables


def model(config: Mapping[str, Any], num_classes: int, channels: int) -> Model:
  """The network that `config` names, computing in its dtype.

  Args:
    config: of a network.
    num_classes, channels: the data's; `config.num_classes` goes before, if it
      is not 0.
  """
  arguments = dict(config["model"])
  make = errors.choose("model", take_name(arguments, "model"), models.MODELS)
  classes = config["num_classes"] or num_classes
  arguments |= {"num_classes": classes, "channels": channels}
  arguments["dtype"] = dtype(config["dtype"])

  def build(rngs: nnx.Rngs) -> nnx.Module:
    return errors.call("model", make, {**arguments, "rngs": rngs})

  return adapters.from_nnx(build)


def loaded(
  config: Mapping[str, Any], network: Model, batch: Batch
) -> Variables | None:
  """The variables of `config.checkpoint`; None where it names nothing.

  It is the folder of a run's phase, or pretrained weights: a .safetensors file,
  a folder that holds one, or a name on the model hub. With `drop_head` the
  classifier keeps the values of its initialisation.

  Raises:
    UserError: what is there does not fit the network, or is damaged.
  """
  path, drop_head = config["checkpoint"], config["drop_head"]
  if not path:
    if drop_head:
      raise errors.UserError(
        "drop_head is set and there is no checkpoint: name one, or unset it"
      )
    return None
  key = jax.random.key(0)
  like = jax.eval_shape(network.init, key, batch)
  if not pretrained.is_weights(path):
    if drop_head:
      raise errors.UserError(
        f"drop_head is for pretrained weights, {path} is a run's folder: unset "
        "drop_head, or export the network first"
      )
    return of_run(path, like)
  arguments = dict(config["model"])
  family = arguments.pop("name")
  return pretrained.read(
    path,
    # The shapes are enough, but where a classifier keeps its first values.
    network.init(key, batch) if drop_head else like,
    family=family,
    arguments=arguments,
    drop_head=drop_head,
  )


def of_run(path: str, like: Variables) -> Variables:
  """What a phase has trained, from its folder or that of its checkpoints."""
  inside = files.path(path) / "checkpoints"
  return checkpoint.load_params(inside if inside.exists() else path, like)


def partition(
  config: Any, side: str, mesh: Mesh, usual: Sequence[parallel.Rule]
) -> tuple[parallel.Rule, ...]:
  """How a side's network lies on the mesh: as the config says, or as usual."""
  rules = tuple(config[side].partition)
  parallel.check_rules(rules, mesh, f"{side}.partition")
  return tuple((p, tuple(axes)) for p, axes in rules) or tuple(usual)


def dtype(name: str) -> Any:
  return errors.choose(
    "dtype", name, {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
  )
