"""The decoder a few tokens at a time, with what earlier ones left behind."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.models.decoder import attention
from kdjax.models.decoder.architecture import Architecture
from kdjax.models.decoder.block import (
  Layer,
  angles,
  block,
  embed,
  layers,
  normalise,
  window_sizes,
)
from kdjax.types import Params


class Cache(NamedTuple):
  """Keys, rotated, and values of every layer and slot of a row."""

  keys: Float[Array, "layers b slots heads d"]
  values: Float[Array, "layers b slots heads d"]


def empty(net: Architecture, rows: int, slots: int, dtype: Any) -> Cache:
  shape = (net.depth, rows, slots, net.kv_heads, net.head_dim)
  return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def extend(
  net: Architecture,
  params: Params,
  cache: Cache,
  tokens: Int[Array, "b s"],
  positions: Int[Array, "b s"],
  slot: Int[Array, ""] | int,
  segments: Int[Array, "b slots"],
) -> tuple[Float[Array, "b s width"], Cache]:
  """What the head reads at new tokens, and the cache that holds them too.

  Args:
    tokens, positions: of the new tokens; they fill the slots from `slot` on.
    segments: the document of every slot of a row; 0 = padding.
  """
  x = embed(net, params, tokens, positions, cache.keys.dtype)
  turned = angles(net, positions)
  new = slot + jnp.arange(tokens.shape[1])
  own = jnp.take(segments, new, axis=1)
  all_slots = jnp.arange(segments.shape[1])

  def body(
    carry: tuple[Array, Cache], layer: Layer
  ) -> tuple[tuple[Array, Cache], None]:
    x, cache = carry

    def attend(
      q: Array, k: Array, v: Array, layer: Layer
    ) -> tuple[Array, dict[str, Any]]:
      at = (layer.number, 0, slot, 0, 0)
      grown = Cache(
        jax.lax.dynamic_update_slice(cache.keys, k[None], at),
        jax.lax.dynamic_update_slice(cache.values, v[None], at),
      )
      window = jnp.array(window_sizes(net))[layer.window]
      seen = attention.visible(new, all_slots, window, own, segments)
      y, _ = attention.dense(
        q,
        grown.keys[layer.number],
        grown.values[layer.number],
        seen,
        scale=net.score_scale,
        softcap=net.attention_softcap,
      )
      return y, {"cache": grown}

    x, found = block(net, x, layer, turned, attend, lambda x, *_: x)
    return (x, Cache(*found["cache"])), None

  stack = layers(net, params)
  (x, cache), _ = jax.lax.scan(body, (x, cache), stack)
  return normalise(net, x, params["norm"]), cache
