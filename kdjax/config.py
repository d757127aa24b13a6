"""A config file's values -> the objects that `distill` takes.

Every key below must be there and no other: nothing happens by a default that
the config does not show. What an open mapping (`...`) holds is checked against
the function that it names.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from kdjax import adapters, data, errors, losses, models, objective, schedules
from kdjax.objective import Objective, Term
from kdjax.types import Batch, Model, Schedule

_PHASE = {"steps": int, "microbatches": int, "optimizer": ...}
_AT_LEAST_ONE = {
  "seeds",
  "steps",
  "microbatches",
  "batch_size",
  "eval_batch_size",
  "save_every",
  "keep_last",
}
KEYS: dict[str, Any] = {
  "seed": int,
  "seeds": int,
  "data": {
    "name": str,
    "data_dir": str,
    "train_split": str,
    "eval_split": str,
    "labelled": int,
    "image_size": int,
    "padding": int,
    "flip": bool,
    "mixup": float,
    "mean": tuple,
    "std": tuple,
    "batch_size": int,
    "eval_batch_size": int,
  },
  "teacher": {"model": ..., "checkpoint": str, "dtype": str},
  "student": {"model": ..., "dtype": str},
  "phases": {"teacher": _PHASE, "alone": _PHASE, "distilled": _PHASE},
  "alpha": ...,
  "hard_weight": ...,
  "soft_weight": ...,
  "temperature": ...,
  "hard": ...,
  "soft": ...,
  "terms": ...,
  "save_every": int,
  "keep_last": int,
  "keep_best": int,
}


def check_keys(
  config: Mapping[str, Any], keys: Mapping[str, Any] = KEYS, at: str = "config"
) -> None:
  """Refuses unknown, missing and wrongly typed keys.

  Raises:
    UserError: names the key and, for an unknown one, the nearest known.
  """
  for name in config:
    if name not in keys:
      raise errors.unknown("key", f"{at}.{name}", [f"{at}.{k}" for k in keys])
  for name, kind in keys.items():
    if name not in config:
      raise errors.UserError(f"{at}.{name} is missing: add it to the config")
    value = config[name]
    if isinstance(kind, Mapping):
      if not isinstance(value, Mapping | ConfigDict):
        raise errors.UserError(f"{at}.{name} is {value!r}, must be a mapping")
      check_keys(_plain(value), kind, f"{at}.{name}")
    elif kind is not ...:
      accepted = {float: (int, float), tuple: (tuple, list)}.get(kind, kind)
      if not isinstance(value, accepted) or (
        kind is not bool and isinstance(value, bool)
      ):
        raise errors.UserError(
          f"{at}.{name} is {value!r}, must be a {kind.__name__}"
        )
      least = 1 if name in _AT_LEAST_ONE else 0
      if isinstance(value, int | float) and value < least:
        raise errors.UserError(
          f"{at}.{name} is {value}, must be at least {least}"
        )


def model(config: Mapping[str, Any], num_classes: int, channels: int) -> Model:
  """The network that `config` names, computing in its dtype."""
  arguments = dict(config["model"])
  make = errors.choose("model", _name(arguments, "model"), models.MODELS)
  arguments |= {"num_classes": num_classes, "channels": channels}
  arguments["dtype"] = dtype(config["dtype"])

  def build(rngs: nnx.Rngs) -> nnx.Module:
    return errors.call("model", make, {**arguments, "rngs": rngs})

  return adapters.from_nnx(build)


def optimizer(
  config: Mapping[str, Any], what: str
) -> tuple[optax.GradientTransformation, Schedule]:
  """An optax optimizer by its own name, and its learning rate.

  `clip` limits the gradient's global norm first (0 = not). `weight_decay` goes
  to the optimizer where it takes one (adamw: decoupled), else is added to the
  gradient (sgd: L2), on the arrays that `decay_on` names: "kernels" (two or
  more axes; no biases, no normalisation) or "all".
  """
  arguments = dict(config)
  name = _name(arguments, what)
  known = {
    n: f
    for n, f in vars(optax).items()
    if not n.startswith(("_", "scale_"))
    and callable(f)
    and "learning_rate" in _parameters(f)
  }
  make = errors.choose(f"optimizer of {what}", name, known)
  for needed in ("learning_rate", "clip", "weight_decay", "decay_on"):
    if needed not in arguments:
      raise errors.UserError(f"{what} lacks {needed!r}: add it to the config")
  rate = schedules.schedule(
    _plain(arguments.pop("learning_rate")), f"learning_rate of {what}"
  )
  clip, decay = arguments.pop("clip"), arguments.pop("weight_decay")
  mask = errors.choose(
    f"decay_on of {what}",
    arguments.pop("decay_on"),
    {"kernels": _kernels, "all": None},
  )
  chain = [optax.clip_by_global_norm(clip)] if clip else []
  if {"weight_decay", "mask"} <= set(_parameters(make)):
    arguments |= {"weight_decay": decay, "mask": mask}
  elif decay:
    chain.append(optax.add_decayed_weights(decay, mask))
  arguments["learning_rate"] = rate
  return optax.chain(
    *chain, errors.call(f"{what} {name}", make, arguments)
  ), rate


def goal(config: Mapping[str, Any]) -> Objective:
  """alpha · hard + (1 − alpha) · T² · soft + the further terms."""
  hard, soft = dict(_plain(config["hard"])), dict(_plain(config["soft"]))
  combined = objective.hinton(
    alpha=_schedule(config["alpha"], "alpha"),
    hard_weight=_schedule(config["hard_weight"], "hard_weight"),
    soft_weight=_schedule(config["soft_weight"], "soft_weight"),
    temperature=_schedule(config["temperature"], "temperature"),
    hard=_loss(hard, "hard"),
    soft=_loss(soft, "soft"),
    hard_hparams=_hparams(hard, "hard"),
    soft_hparams=_hparams(soft, "soft"),
  )
  terms = [
    _term(name, dict(value)) for name, value in _plain(config["terms"]).items()
  ]
  return combined + terms


def augment(config: Mapping[str, Any]) -> Callable[..., Any] | None:
  """What happens to each training image, on the host."""
  size, padding, flip = (config[k] for k in ("image_size", "padding", "flip"))
  if size:
    return functools.partial(data.random_resized_crop, size=size, flip=flip)
  if padding or flip:
    return functools.partial(data.crop_and_flip, padding=padding, flip=flip)
  return None


def eval_transform(config: Mapping[str, Any]) -> Callable[..., Any] | None:
  """What happens to each evaluated image: the centre, if sizes differ."""
  size = config["image_size"]
  return functools.partial(data.center_crop, size=size) if size else None


def mixup(
  config: Mapping[str, Any], num_classes: int
) -> Callable[[Batch, jax.Array], Batch] | None:
  """What happens to a whole batch, in the step, once for both networks."""
  alpha = config["mixup"]
  if not alpha:
    return None
  return functools.partial(data.mixup, alpha=alpha, num_classes=num_classes)


def _term(name: str, arguments: dict[str, Any]) -> Term:
  what = f"terms.{name}"
  for needed in ("name", "weight"):
    if needed not in arguments:
      raise errors.UserError(f"{what} lacks {needed!r}: add it to the config")
  weight = _schedule(arguments.pop("weight"), f"weight of {what}")
  temperature = _schedule(
    arguments.pop("temperature", None), f"temperature of {what}"
  )
  loss = _loss(arguments, what)
  return Term(name, loss, weight, temperature, _hparams(arguments, what))


def _loss(arguments: dict[str, Any], what: str) -> Callable[..., Any]:
  """The loss named; `name` and the transforms leave the arguments.

  `zscore=True` standardises both logits; `teacher_temperature` stays, as an
  argument that the transformed loss takes.
  """
  loss = errors.choose(
    f"loss of {what}", _name(arguments, what), losses.LOGIT_LOSSES
  )
  if "teacher_temperature" in arguments:
    loss = losses.with_teacher_temperature(loss)
  if arguments.pop("zscore", False):
    loss = losses.zscore(loss)
  takes = set(_parameters(loss)) - {
    "student",
    "teacher",
    "labels",
    "temperature",
    "where",
  }
  for name in arguments:
    if name not in takes:
      known = {*takes, "zscore", "teacher_temperature"}
      raise errors.unknown(f"argument of {what}", name, known)
  return loss


def _hparams(arguments: dict[str, Any], what: str) -> dict[str, Any]:
  """Numbers stay as they are; mappings become schedules."""
  return {
    k: schedules.schedule(v, f"{k} of {what}") if isinstance(v, dict) else v
    for k, v in arguments.items()
  }


def _schedule(value: Any, what: str) -> Any:
  value = _plain(value)
  if value is None:
    return None
  if isinstance(value, (tuple, list)):
    return tuple(schedules.schedule(v, what) for v in value)
  return schedules.schedule(value, what)


def _name(arguments: dict[str, Any], what: str) -> str:
  if "name" not in arguments:
    raise errors.UserError(f"{what} lacks 'name': add it to the config")
  return arguments.pop("name")


def dtype(name: str) -> Any:
  return errors.choose(
    "dtype", name, {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
  )


def _kernels(params: Any) -> Any:
  return jax.tree.map(lambda x: jnp.ndim(x) > 1, params)


def _parameters(fn: Callable[..., Any]) -> Mapping[str, Any]:
  try:
    return inspect.signature(fn).parameters
  except (TypeError, ValueError):
    return {}


def _plain(value: Any) -> Any:
  return value.to_dict() if isinstance(value, ConfigDict) else value
