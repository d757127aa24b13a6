"""Rows of an array copied elsewhere, without a pass over all of it.

On CPU a gather, scatter or slice of bfloat16 would convert the whole array to
float32 and, in a loop, back: there its bits are moved.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def take(x: Array, index: Array) -> Array:
  """Rows of x; 0 past its end."""
  take = functools.partial(jnp.take, axis=0, mode="fill", fill_value=0)
  return moved(take, x, index)


def moved(move: Callable[..., Array], x: Array, index: Array) -> Array:
  """move(x, index), which copies some rows of x."""
  # Otherwise all of x would be reinterpreted, and kept, ahead of the loop.
  x, index = jax.lax.optimization_barrier((x, index))
  return restored(move(bits(x), index), x.dtype)


def bits(x: Array) -> Array:
  """x, or as uint16 what a CPU cannot move as it is."""
  half = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
  half = half and jax.default_backend() == "cpu"
  return jax.lax.bitcast_convert_type(x, jnp.uint16) if half else x


def restored(x: Array, dtype: Any) -> Array:
  """What `bits` made, in its own dtype again."""
  if x.dtype != jnp.uint16:
    return x
  return jax.lax.bitcast_convert_type(x, dtype)
