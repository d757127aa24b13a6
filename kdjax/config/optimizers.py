"""A config's optimizers: optax's by name, and kdjax's."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import optax
from jax.tree_util import keystr, tree_map_with_path

from kdjax import errors, optimizers, schedules
from kdjax.config.values import parameters, plain, take_name
from kdjax.types import Schedule


class Optimizer(NamedTuple):
  """An optimizer, its learning rate, whether it reads gradients by group."""

  transformation: optax.GradientTransformation
  learning_rate: Schedule
  by_group: bool


def optimizer(config: Mapping[str, Any], what: str) -> Optimizer:
  """An optax optimizer by its own name, or `dot` (`kdjax.optimizers`).

  `clip` limits the gradient's global norm first (0 = not). `weight_decay` goes
  to the optimizer where it takes one (adamw: decoupled), else is added to the
  gradient (sgd: L2), on the arrays that `decay_on` names: "kernels" (of linear
  maps, convolutions and embeddings; LoRA's factors) or "all".
  """
  arguments = dict(config)
  name = take_name(arguments, what)
  known = {
    n: f
    for n, f in vars(optax).items()
    if not n.startswith(("_", "scale_"))
    and callable(f)
    and "learning_rate" in parameters(f)
  } | {"dot": optimizers.dot}
  make = errors.choose(f"optimizer of {what}", name, known)
  for needed in ("learning_rate", "clip", "weight_decay", "decay_on"):
    if needed not in arguments:
      raise errors.UserError(f"{what} lacks {needed!r}: add it to the config")
  rate = schedules.schedule(
    plain(arguments.pop("learning_rate")), f"learning_rate of {what}"
  )
  clip, decay = arguments.pop("clip"), arguments.pop("weight_decay")
  mask = errors.choose(
    f"decay_on of {what}",
    arguments.pop("decay_on"),
    {"kernels": _kernels, "all": None},
  )
  chain = [optax.clip_by_global_norm(clip)] if clip else []
  if {"weight_decay", "mask"} <= set(parameters(make)):
    arguments |= {"weight_decay": decay, "mask": mask}
  elif decay:
    chain.append(optax.add_decayed_weights(decay, mask))
  arguments["learning_rate"] = rate
  chain.append(errors.call(f"{what} {name}", make, arguments))
  by_group = make is optimizers.dot
  if by_group and clip:
    raise errors.UserError(
      f"{what} is dot with clip={clip}: it reads the gradients as they are, "
      "set clip=0"
    )
  return Optimizer(optax.chain(*chain), rate, by_group)


def _kernels(params: Any) -> Any:
  # By name: a norm's scale has two axes where layers are stacked.
  names = ("kernel", "lora_in", "lora_out")
  return tree_map_with_path(
    lambda path, _: keystr(path[-1:], simple=True) in names, params
  )
