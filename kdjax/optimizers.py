"""Optimizers that treat the labels' and the teacher's gradients apart."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from kdjax import errors
from kdjax.types import ScalarOrSchedule


class DotState(NamedTuple):
  """Momentum of the labels' gradients, of all others, and the update count."""

  hard: PyTree
  soft: PyTree
  step: Array


def dot(
  learning_rate: ScalarOrSchedule,
  *,
  momentum: float = 0.9,
  delta: float = 0.075,
  weight_decay: float = 0.0,
  mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """SGD with a momentum of its own for each of two gradients.

      v_hard <- (momentum − delta) v_hard + g_hard + weight_decay · params
      v_soft <- (momentum + delta) v_soft + g_soft
      params <- params − learning_rate (v_hard + v_soft)

  g_hard is the gradient of the terms of group "hard", g_soft that of all other
  terms: `make_train_step(..., gradients_by_group=True)` gives them. What terms
  own has only the second gradient, and the plain momentum.

  Args:
    learning_rate: a number or a schedule.
    momentum, delta: as above; 0 <= momentum ± delta < 1.
    weight_decay: L2, on the arrays of `mask` (a function of the parameters, as
      optax's; None: all).

  Source: Zhao et al., DOT: A Distillation-Oriented Trainer, ICCV 2023, section
    4; what it does with weight decay and with parameters that one gradient
    reaches is as in the authors' code.
  """
  if not (momentum - delta >= 0 and 0 <= momentum + delta < 1):
    raise errors.UserError(
      f"dot got momentum={momentum}, delta={delta}: needs momentum - delta >= "
      "0 and momentum + delta < 1"
    )

  def init(params: PyTree) -> DotState:
    # Two trees of zeros, not one twice: a step donates each of its buffers.
    hard, soft = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
    return DotState(hard, soft, jnp.zeros((), jnp.int32))

  def update(
    updates: PyTree,
    state: Any,
    params: PyTree = None,
    *,
    by_group: dict[str, PyTree] | None = None,
    **_: Any,
  ) -> tuple[PyTree, DotState]:
    if by_group is None:
      raise errors.UserError(
        "dot needs the gradients by group: make_train_step(..., "
        "gradients_by_group=True)"
      )
    hard = by_group.get("hard", jax.tree.map(jnp.zeros_like, updates))
    soft = jax.tree.map(jnp.subtract, updates, hard)
    decayed = optax.add_decayed_weights(weight_decay, mask)
    hard: Any = decayed.update(hard, decayed.init(params), params)[0]

    def moved(sign: int, velocity: PyTree, gradient: PyTree) -> PyTree:
      def one(path: Any, v: Array, g: Array) -> Array:
        owned = getattr(path[0], "key", None) == "terms" if path else False
        return (momentum + (0 if owned else sign * delta)) * v + g

      return jax.tree_util.tree_map_with_path(one, velocity, gradient)

    new = DotState(
      moved(-1, state.hard, hard), moved(1, state.soft, soft), state.step + 1
    )
    rate = (
      learning_rate(state.step) if callable(learning_rate) else learning_rate
    )
    return jax.tree.map(lambda a, b: -rate * (a + b), new.hard, new.soft), new

  return optax.GradientTransformationExtraArgs(init, update)
