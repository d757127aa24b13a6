"""Config values -> optax schedules.

A number stands for itself at every update. A mapping names one of optax's
schedules and its arguments:

    dict(schedule="linear_schedule", init_value=8.0, end_value=2.0,
         transition_steps=1000)

`join_schedules` takes `schedules`, a sequence of such values, and `boundaries`.
Every schedule counts optimizer updates, whatever the microbatches.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdjax import errors
from kdjax.types import Schedule


def schedule(value: Any, what: str = "schedule") -> Schedule:
  """A schedule from a number, a mapping (above), or a schedule as it is."""
  if callable(value):
    return value
  if isinstance(value, Mapping):
    return _named(dict(value), what)
  try:
    return optax.constant_schedule(float(value))
  except (TypeError, ValueError):
    raise errors.UserError(
      f"{what} is {value!r}, must be a number or a schedule: write "
      "dict(schedule=<name of an optax schedule>, <its arguments>)"
    ) from None


def _named(arguments: dict[str, Any], what: str) -> Schedule:
  if "schedule" not in arguments:
    raise errors.UserError(
      f"{what} has the keys {sorted(arguments)}, needs 'schedule' among them: "
      "name an optax schedule"
    )
  name = arguments.pop("schedule")
  known = {
    n: f
    for n, f in vars(optax.schedules).items()
    if n.endswith(("_schedule", "_schedules", "_decay"))
    and inspect.isfunction(f)
  }
  make = errors.choose(f"schedule for {what}", name, known)
  if "schedules" in arguments:
    arguments["schedules"] = [schedule(s, what) for s in arguments["schedules"]]
  if "boundaries_and_scales" in arguments:  # config keys can only be strings
    arguments["boundaries_and_scales"] = {
      int(step): scale
      for step, scale in dict(arguments["boundaries_and_scales"]).items()
    }
  return errors.call(f"{name} ({what})", make, arguments)


def check_range(
  values: Schedule,
  steps: int,
  what: str,
  low: float,
  high: float = np.inf,
  *,
  open_low: bool = False,
) -> None:
  """Refuses a schedule that leaves [low, high] at any update before `steps`.

  Raises:
    UserError: names the first such update and the value there.
  """
  at = jnp.arange(max(steps, 1))
  got = np.broadcast_to(np.asarray(jax.vmap(values)(at), np.float64), at.shape)
  inside = (got > low if open_low else got >= low) & (got <= high)
  if not inside.all():
    n = int(np.argmin(inside))
    left = "(" if open_low else "["
    right = "inf)" if high == np.inf else f"{high:g}]"
    raise errors.UserError(
      f"{what} is {got[n]:g} at update {n}, must stay in {left}{low:g}, {right}"
      f": change {what}"
    )
