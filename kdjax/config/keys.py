"""The keys of a config: every one of its task must be there, and no other."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from kdjax import errors, health
from kdjax.config.values import plain
from kdjax.parallel import AXES

_PHASES = ("teacher", "alone", "distilled")
_PHASE = {"steps": int, "microbatches": int, "optimizer": ...}
_IMAGE_PHASE = {**_PHASE, "mixup": float}
_IMAGE_NETWORK = {
  "model": ...,
  "num_classes": int,
  "checkpoint": str,
  "drop_head": bool,
  "dtype": str,
  "partition": tuple,
}
_TEXT_NETWORK = {
  "path": str,
  "model": ...,
  "tokenizer": str,
  "dtype": str,
  "remat": str,
  "partition": tuple,
}
_AT_LEAST_ONE = {
  "seeds",
  "microbatches",
  "parts",
  "batch_size",
  "eval_batch_size",
  "sequence_length",
  "save_every",
  "keep_last",
}
_EVERY_TASK: dict[str, Any] = {
  "task": str,
  "seed": int,
  "seeds": int,
  "alpha": ...,
  "hard_weight": ...,
  "soft_weight": ...,
  "temperature": ...,
  "hard": ...,
  "soft": ...,
  "terms": ...,
  "mesh": dict.fromkeys(AXES, int),
  "show_sharding": bool,
  "save_every": int,
  "save_minutes": float,
  "keep_last": int,
  "keep_best": int,
  "on_nan": str,
  "profile": int,
  "hang_minutes": float,
}
KEYS: dict[str, dict[str, Any]] = {
  "image": {
    **_EVERY_TASK,
    "data": {
      "name": str,
      "data_dir": str,
      "train_split": str,
      "eval_split": str,
      "labelled": int,
      "image_size": int,
      "padding": int,
      "flip": bool,
      "mean": tuple,
      "std": tuple,
      "batch_size": int,
      "eval_batch_size": int,
    },
    "teacher": _IMAGE_NETWORK,
    "student": {**_IMAGE_NETWORK, "classifier": str},
    "phases": dict.fromkeys(_PHASES, _IMAGE_PHASE),
  },
  "text": {
    **_EVERY_TASK,
    "data": {
      "name": str,
      "path": str,
      "field": str,
      "data_dir": str,
      "train_split": str,
      "eval_split": str,
      "eval_path": str,
      "eval_share": float,
      "skip_empty": bool,
      "sequence_length": int,
      "teacher_length": int,
      "batch_size": int,
      "eval_batch_size": int,
    },
    "teacher": {**_TEXT_NETWORK, "parts": int},
    "student": {
      **_TEXT_NETWORK,
      "inherit": {
        "layers": ...,
        "width": int,
        "mlp_width": int,
        "kv_heads": int,
        "importance": str,
        "embeddings": bool,
      },
      "lora": {"rank": int, "alpha": float, "targets": tuple},
    },
    "phases": dict.fromkeys(_PHASES, _PHASE),
    "head": str,
    "sample": {
      "prompts": tuple,
      "max_new_tokens": int,
      "temperature": float,
      "top_p": float,
    },
  },
}


def check_keys(config: Mapping[str, Any]) -> None:
  """Refuses unknown, missing and wrongly typed keys, and an unknown task.

  Raises:
    UserError: names the key and, for an unknown one, the nearest known.
  """
  if "task" not in config:
    raise errors.UserError(
      f"config.task is missing: add it to the config, one of {', '.join(KEYS)}"
    )
  _check(config, errors.choose("task", config["task"], KEYS))
  errors.choose("on_nan", config["on_nan"], health.ON_NAN)


def _check(
  config: Mapping[str, Any], keys: Mapping[str, Any], at: str = "config"
) -> None:
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
      _check(plain(value), kind, f"{at}.{name}")
    elif kind is not ...:
      accepted = {float: (int, float), tuple: (tuple, list)}.get(kind, kind)
      if not isinstance(value, accepted) or (
        kind is not bool and isinstance(value, bool)
      ):
        raise errors.UserError(
          f"{at}.{name} is {value!r}, must be a {kind.__name__}"
        )
      least = 1 if name in _AT_LEAST_ONE else -1 if name in AXES else 0
      if isinstance(value, int | float) and value < least:
        raise errors.UserError(
          f"{at}.{name} is {value}, must be at least {least}"
        )
