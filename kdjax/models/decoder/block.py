"""One layer of a decoder, and what comes before the first."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kdjax import pins
from kdjax.models.decoder import rotary
from kdjax.models.decoder.architecture import Architecture
from kdjax.models.decoder.fields import ACTIVATIONS
from kdjax.types import Params


def normalise(net: Architecture, x: Array, w: dict[str, Array]) -> Array:
  """LayerNorm, or x / √(mean x² + ε) · w; in float32, returned as x is."""
  y, scale = x.astype(jnp.float32), w["scale"].astype(jnp.float32)
  if net.norm == "layer":
    y = y - y.mean(-1, keepdims=True)
  y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + net.epsilon)
  y = y * _like(1 + scale if net.norm == "rms_plus_one" else scale, y)
  if "bias" in w:
    y = y + _like(w["bias"].astype(jnp.float32), y)
  return y.astype(x.dtype)


def linear(x: Array, w: dict[str, Array]) -> Array:
  """x · W, with what `lora.attach` put beside W; and its bias."""
  shape = x.shape[:-1]
  # With one axis of rows, XLA on a CPU takes the product that is the kernel's
  # gradient as it stands; with two, it copies x or dy transposed first.
  x = x.reshape(-1, x.shape[-1])
  y = x @ w["kernel"].astype(x.dtype)
  if "lora_in" in w:
    y = y + (x @ w["lora_in"].astype(x.dtype)) @ w["lora_out"].astype(x.dtype)
  y = y + _like(w["bias"].astype(x.dtype), y) if "bias" in w else y
  return y.reshape(*shape, -1)


class Layer(NamedTuple):
  """What a scan hands to one layer.

  Attributes:
    weights: its own.
    number: from 0.
    window: the number of its window among the distinct ones.
    rotation: the row of its angles in the tables.
    slots: kind of tap -> where it is kept, -1 = not asked for.
  """

  weights: Any
  number: Any
  window: Any
  rotation: Any
  slots: Any


# (q, k, v, layer) -> (what the heads return, further taps)
Attend = Callable[[Array, Array, Array, Layer], tuple[Array, dict[str, Array]]]
Dropout = Callable[[Array, float, int], Array]  # (x, rate, stream)


def layers(
  net: Architecture, params: Params, slots: Mapping[str, Any] | None = None
) -> Layer:
  """All layers, stacked."""
  return Layer(
    weights=params["layers"],
    number=np.arange(net.depth, dtype=np.int32),
    window=_numbers(net.windows),
    rotation=_numbers(net.rotations or (None,) * net.depth),
    slots=dict(slots or {}),
  )


def _numbers(of: tuple[Any, ...]) -> np.ndarray:
  """Each entry's number among the distinct ones."""
  distinct = list(dict.fromkeys(of))
  return np.array([distinct.index(x) for x in of], np.int32)


def window_sizes(net: Architecture) -> tuple[int, ...]:
  """The distinct windows; all that the context holds where there is none."""
  return tuple(w or net.context for w in dict.fromkeys(net.windows))


def dropout(key: Array | None) -> Dropout:
  """Zeroes a share of the numbers and divides the rest by theirs."""

  def drop(x: Array, rate: float, stream: int) -> Array:
    if key is None or not rate:
      return x
    own = jax.random.fold_in(key, stream)
    keep = jax.random.bernoulli(own, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)

  return drop


def block(
  net: Architecture,
  x: Float[Array, "b s width"],
  layer: Layer,
  angles: tuple[Array, Array] | None,
  attend: Attend,
  drop: Dropout,
) -> tuple[Array, dict[str, Array]]:
  """x += attention(norm(x)); x += mlp(norm(x)); and the layer's taps."""
  w = layer.weights
  y = normalise(net, x, w["attention_norm"])
  q, k, v = (
    linear(y, w[name]).reshape(*y.shape[:2], -1, net.head_dim)
    for name in ("query", "key", "value")
  )
  if net.qk_norm:
    q = normalise(net, q, w["query_norm"])
    k = normalise(net, k, w["key_norm"])
  if angles is not None:
    turn = [t[layer.rotation] for t in angles]
    q, k = rotary.rotate(q, *turn), rotary.rotate(k, *turn)
  if net.score_scale_by_layer:
    q = q / (layer.number + 1).astype(q.dtype)
  heads, taps = attend(q, k, v, layer)
  y = linear(heads.reshape(*y.shape[:2], -1), w["output"])
  if net.post_norms:
    y = normalise(net, y, w["post_attention_norm"])
  middle = x + drop(y, net.residual_dropout, 0)
  inner = neurons(net, normalise(net, middle, w["mlp_norm"]), w)
  y = linear(inner, w["down"])
  if net.post_norms:
    y = normalise(net, y, w["post_mlp_norm"])
  x = middle + drop(y, net.residual_dropout, 1)
  taps |= {"block": x, "queries": q, "keys": k, "values": v}
  # No taps of a network; `importance` reads them.
  return x, taps | {"middle": middle, "heads": heads, "neurons": inner}


def neurons(net: Architecture, x: Array, w: dict[str, Any]) -> Array:
  """f(gate x) · up x, or f(up x): what the MLP's `down` reads."""
  activation = ACTIVATIONS[net.activation]
  if net.gated:
    return activation(linear(x, w["gate"])) * linear(x, w["up"])
  return activation(linear(x, w["up"]))


def embed(
  net: Architecture,
  params: Params,
  tokens: Int[Array, "b s"],
  positions: Int[Array, "b s"],
  dtype: Any,
) -> Float[Array, "b s width"]:
  """Embeddings, scaled or with learned positions; NaN for no token of ours."""
  x = pins.looked_up(params["embed"]["kernel"], tokens, dtype)
  if net.embed_scale != 1:
    x = x * jnp.asarray(net.embed_scale, dtype)
  if not net.rotations:
    learned = jnp.take(params["positions"]["kernel"], positions, axis=0)
    x = x + jnp.broadcast_to(learned.astype(dtype), x.shape)
  return x


def angles(
  net: Architecture, positions: Int[Array, "b s"]
) -> tuple[Array, Array] | None:
  """The tables of every distinct rotation: most networks have one."""
  if not net.rotations:
    return None
  return rotary.tables(tuple(dict.fromkeys(net.rotations)), positions)


def _like(w: Array, x: Array) -> Array:
  return jnp.broadcast_to(w, x.shape)
