"""The keys of a config: every one must be there, and no other."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from kdjax import errors
from kdjax.config.values import plain

_PHASE = {"steps": int, "microbatches": int, "mixup": float, "optimizer": ...}
_NETWORK = {
  "model": ...,
  "num_classes": int,
  "checkpoint": str,
  "drop_head": bool,
  "dtype": str,
}
_AT_LEAST_ONE = {
  "seeds",
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
    "mean": tuple,
    "std": tuple,
    "batch_size": int,
    "eval_batch_size": int,
  },
  "teacher": _NETWORK,
  "student": {**_NETWORK, "classifier": str},
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
      check_keys(plain(value), kind, f"{at}.{name}")
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
