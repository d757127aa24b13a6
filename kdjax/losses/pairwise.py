"""All pairs of rows, of which the compiler holds some at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kdjax.losses.groups import HIGHEST

# Floats that differences and triplets take at once, about (16 MiB).
_CHUNK = 2**22


@jax.custom_vjp
def distances(x: Array) -> Array:
  """[n, D] -> [n, n]: ‖xᵢ − xⱼ‖, whose gradient is 0 where it is 0."""
  # Differences, not ‖x‖² + ‖y‖² − 2 x·y: that is the rounding of ‖x‖² where the
  # rows are close, and the root would make it large. The compiler sums them as
  # it makes them, and holds no n² D.
  return jnp.sqrt(jnp.sum((x[:, None] - x[None]) ** 2, axis=-1))


def _distances_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
  d = distances(x)
  return d, (x, d)


def _distances_backward(
  residual: tuple[Array, Array], slope: Array
) -> tuple[Array]:
  """Σⱼ (slopeᵢⱼ + slopeⱼᵢ) (xᵢ − xⱼ) / dᵢⱼ; the root has no slope at 0."""
  x, d = residual
  pull = jnp.where(d > 0, (slope + slope.T) / jnp.where(d > 0, d, 1.0), 0.0)

  def of_row(row: tuple[Array, Array]) -> Array:
    return jnp.matmul(row[0], row[1][None, :] - x, precision=HIGHEST)

  return (by_rows(of_row, (pull, x), x.size),)


distances.defvjp(_distances_forward, _distances_backward)


def by_rows(of_row: Callable[[Any], Array], rows: Any, floats: int) -> Array:
  """Maps over rows, each of which takes `floats`, some at a time.

  What they take is not kept for the backward pass, but computed again.
  """
  num_rows = len(jax.tree.leaves(rows)[0])
  at_once = min(num_rows, max(1, _CHUNK // max(1, floats)))
  return jax.lax.map(jax.checkpoint(of_row), rows, batch_size=at_once)
