"""Taps out of a scan: room for the layers that are asked, and for no other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kdjax.models.decoder.architecture import Architecture
from kdjax.models.decoder.block import Layer

# Taps of each layer, from the first; then those of the whole network.
LAYER_TAPS = ("block", "attention", "queries", "keys", "values")
OTHER_TAPS = ("embed", "final")
ALL_TAPS = ("*",)  # as in `adapters`


def tap_names(net: Architecture) -> list[str]:
  numbers = range(1, net.depth + 1)
  return [*OTHER_TAPS, *(f"{kind}_{n}" for kind in LAYER_TAPS for n in numbers)]


def slots(net: Architecture, taps: tuple[str, ...]) -> dict[str, np.ndarray]:
  """For each kind that is asked of some layer, where a layer's is kept.

  -1 for the layers that are not asked.
  """
  found = {}
  for kind, numbers in asked(net, taps).items():
    if numbers:
      found[kind] = np.full(net.depth, -1, np.int32)
      found[kind][numbers] = np.arange(len(numbers))
  return found


def asked(net: Architecture, taps: tuple[str, ...]) -> dict[str, list[int]]:
  """Kind of tap -> the numbers of the layers that are asked for theirs."""
  return {
    kind: [n for n in range(net.depth) if f"{kind}_{n + 1}" in taps]
    for kind in LAYER_TAPS
  }


def as_tap(kind: str, x: Array) -> Array:
  heads = kind in ("queries", "keys", "values")
  return x.swapaxes(1, 2) if heads else x  # [B, heads, S, d], as everywhere


def buffers(
  step: Callable[..., Any], x: Array, stack: Layer
) -> dict[str, Array]:
  """Room for the taps that were asked for, and for no other layer's."""
  first = jax.tree.map(lambda a: a[0], stack)
  _, seen = jax.eval_shape(step, x, first)
  return {
    kind: jnp.zeros((int(at.max()) + 1, *seen[kind].shape), seen[kind].dtype)
    for kind, at in stack.slots.items()
  }


def keep(
  kept: dict[str, Array], seen: dict[str, Array], slots: dict[str, Array]
) -> dict[str, Array]:
  """Writes in place; a layer that was not asked writes back what was there."""

  def write(buffer: Array, value: Array, slot: Array) -> Array:
    at = jnp.maximum(slot, 0)
    old = jax.lax.dynamic_index_in_dim(buffer, at, keepdims=False)
    new = jnp.where(slot >= 0, value, old)
    return jax.lax.dynamic_update_index_in_dim(buffer, new, at, 0)

  return {kind: write(kept[kind], seen[kind], slots[kind]) for kind in kept}
