"""Whether an update is sound: a bad one is skipped whole, a leap is told of."""

import collections
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from kdjax import errors
from kdjax.types import TrainState

ON_NAN = {
  "stop": "ends the run, naming the step",
  "skip": "leaves everything as it was and goes on to the next batch",
}
# Skipped updates in a row after which a run will not come back by itself.
MAX_IN_A_ROW = 20
_JUDGED = ("loss/total", "grad_norm", "eval/nll")


class DivergedError(errors.UserError):
  """A loss or gradient was not finite; the last good checkpoint stays."""


def check_settings(on_nan: str, profile: int, hang_minutes: float) -> None:
  """Refuses what no run can have.

  Raises:
    UserError: names the setting and what it may be.
  """
  errors.choose("on_nan", on_nan, ON_NAN)
  for name, value in (("profile", profile), ("hang_minutes", hang_minutes)):
    if value < 0:
      raise errors.UserError(
        f"{name} is {value}, must be at least 0: 0 turns it off"
      )


def guarded(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """`optimizer` that leaves out updates which are not finite, and counts them.

  It is `optax.apply_if_finite`, which after so many in a row would apply one
  all the same; here it never does, and the loop stops at `MAX_IN_A_ROW`.
  """
  return optax.apply_if_finite(optimizer, jnp.iinfo(jnp.int32).max)


def is_guarded(opt_state: PyTree) -> bool:
  return isinstance(opt_state, optax.ApplyIfFiniteState)


def spoil_unless_finite(gradients: PyTree, total: Array) -> PyTree:
  """The gradients, all NaN where the loss or their norm is not finite.

  optax looks at gradients alone. So it skips what `on_nan="stop"` stops at, a
  loss that is not finite beside finite gradients too, and nothing else.
  """
  finite = jnp.isfinite(total) & jnp.isfinite(optax.tree.norm(gradients))
  return jax.tree.map(lambda g: jnp.where(finite, g, jnp.nan), gradients)


def keep_if_bad(
  old: TrainState, new: TrainState
) -> tuple[TrainState, dict[str, Array]]:
  """The new state, or where its update was skipped the old one, bit by bit.

  `optax.apply_if_finite` keeps the optimizer's state and adds zeros to the
  parameters (which makes 0 of −0). All else, the count of updates, statistics
  and what terms own, is selected here by optax's own flag; so whatever a state
  has is covered. One selection for each array, which XLA joins with the update.

  Args:
    old, new: before and after an update by a `guarded` optimizer.

  Returns:
    The state, and the metrics `skipped` (0 or 1) and `skipped_in_a_row`.
  """
  guard = new.opt_state
  # The optimizer's is optax's to keep, and counts what was skipped.
  before, after = (s.replace(opt_state=(), key=()) for s in (old, new))
  kept = jax.tree.map(
    lambda a, b: jnp.where(guard.last_finite, a, b), after, before
  )
  told = {
    "skipped": 1.0 - guard.last_finite.astype(jnp.float32),
    "skipped_in_a_row": guard.notfinite_count.astype(jnp.float32),
  }
  return kept.replace(opt_state=guard, key=new.key), told


def judge(step: int, values: Mapping[str, float], on_nan: str) -> str | None:
  """None for a sound step; of one that was skipped, a line about it.

  Args:
    step: for the message.
    values: its metrics.
    on_nan: one of `ON_NAN`.

  Raises:
    DivergedError: the run cannot go on.
  """
  if all(math.isfinite(values.get(name, 0.0)) for name in _JUDGED):
    return None
  bad = [k for k, v in values.items() if not math.isfinite(v)]
  what = f"{', '.join(bad)} not finite at step {step}"
  if on_nan != "skip" or not values.get("skipped"):
    raise DivergedError(
      f"{what}: lower the learning rate or clip gradients; checkpoints before "
      "it are kept"
    )
  in_a_row = int(values["skipped_in_a_row"])
  if in_a_row >= MAX_IN_A_ROW:
    raise DivergedError(
      f"{what}, the last of {in_a_row} updates in a row that were skipped: "
      "lower the learning rate, clip gradients or look at the data; "
      "checkpoints before it are kept"
    )
  return f"{what}: skipped ({in_a_row} in a row), nothing was updated"


class Spikes:
  """Notes a loss that leaps: > mean + `deviations` · sd of the last `window`.

  Losses that are not finite are left out. It says nothing before the window
  is full, nor again within a window's length of what it said last.
  """

  def __init__(self, window: int = 100, deviations: float = 6.0):
    self._last: collections.deque[float] = collections.deque(maxlen=window)
    self._window, self._deviations = window, deviations
    self._quiet_until = 0

  def __call__(self, step: int, loss: float) -> str | None:
    """A line about the loss of this step, or None."""
    if not math.isfinite(loss):
      return None
    before = list(self._last)
    self._last.append(loss)
    if len(before) < self._window or step < self._quiet_until:
      return None
    mean = sum(before) / len(before)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in before) / len(before))
    if loss <= mean + self._deviations * deviation:
      return None
    self._quiet_until = step + self._window
    return (
      f"step {step}: loss/total {loss:.4g} leaps from {mean:.4g} ± "
      f"{deviation:.2g} of the {self._window} steps before"
    )
