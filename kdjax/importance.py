"""How much each channel, neuron and group of heads of a decoder does.

From its weights alone (`of_weights`), or from what passes through it on some
text (`of_activations`). `inherit` keeps the most important ones.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from kdjax.errors import UserError
from kdjax.models.decoder import Architecture, attention
from kdjax.models.decoder.block import (
  Layer,
  angles,
  block,
  embed,
  layers,
  normalise,
  window_sizes,
)
from kdjax.models.decoder.network import document_positions
from kdjax.types import Batch, Params


class Importance(NamedTuple):
  """Scores, the larger the more important; each is compared in its row alone.

  Attributes:
    channels: of the residual stream.
    energy: each channel's mean square in it, to any common scale.
    neurons: of each layer's MLP.
    groups: of each layer's key/value heads, each with its query heads.
  """

  channels: Float32[Array, " D"]
  energy: Float32[Array, " D"]
  neurons: Float32[Array, "L F"]
  groups: Float32[Array, "L K"]


@functools.partial(jax.jit, static_argnums=0)
def of_weights(net: Architecture, params: Params) -> Importance:
  """Norms of what comes in, times norms of what goes out.

      neurons   ‖gate‖ · ‖up‖ · ‖down‖, of the neuron's columns and its row
      groups    ‖value‖ · ‖output‖
      channels  √energy · ‖norms · all kernels that read the channel‖
      energy    Σ over the kernels that write the channel of their columns'
                squares: of embeddings the mean over tokens, of others the sum,
                as if their inputs had variance one

  A product, so that what writes nothing, or is read by nothing, has 0, and so
  that W up · c and W down / c, the same function, have the same score.
  """
  w = params["layers"]
  columns = functools.partial(_squares, axis=-2)
  rows = functools.partial(_squares, axis=-1)
  neurons = columns(w["up"]) * rows(w["down"])
  if net.gated:
    neurons *= columns(w["gate"])
  by_group = lambda x: x.reshape(*x.shape[:-1], net.kv_heads, -1).sum(-1)  # noqa: E731
  groups = by_group(columns(w["value"])) * by_group(rows(w["output"]))
  energy = net.embed_scale**2 * _mean_square(params["embed"])
  if not net.rotations:
    energy += _mean_square(params["positions"])
  for name, post in (
    ("output", "post_attention_norm"),
    ("down", "post_mlp_norm"),
  ):
    written = columns(w[name])
    if net.post_norms:
      share = written / written.mean(-1, keepdims=True)
      written = share * _scales(net, w[post]) ** 2
    energy += written.sum(0)
  read = _scales(net, params["norm"]) ** 2
  head = params["embed" if net.tied else "head"]
  read *= _mean_square(head) * head["kernel"].shape[0]
  for norm, names in (
    ("attention_norm", ("query", "key", "value")),
    ("mlp_norm", ("gate", "up") if net.gated else ("up",)),
  ):
    reads = sum(_squares({"kernel": w[n]["kernel"]}, axis=-1) for n in names)
    read += (_scales(net, w[norm]) ** 2 * reads).sum(0)
  channels = jnp.sqrt(energy * read)
  return Importance(channels, energy, jnp.sqrt(neurons), jnp.sqrt(groups))


def of_activations(
  net: Architecture,
  params: Params,
  batches: Iterable[Batch],
  *,
  dtype: Any = jnp.float32,
) -> Importance:
  """Means over the tokens of some batches; a thousand rows of text will do.

      neurons   |what `down` reads|
      groups    ‖what the head returns‖₂, added over the group's heads
      channels  |norm(x)|, added over all norms of the residual stream
      energy    (x / √mean x²)², at the same places

  Args:
    net, params: the decoder.
    batches: `tokens [B, S]`, and what else `decoder` reads; padding (segment 0)
      does not count.
    dtype: of the computation.

  Raises:
    UserError: there is no batch, or no token that counts.

  Source: Muralidharan et al. 2024, arXiv 2407.14679, section 2.2. They find an
  L2 norm over the rows of a batch a little better than the mean taken here,
  which is the same however the text is split into batches.
  """
  total, weight = None, 0.0
  for batch in batches:
    part, more = _sums(net, params, dict(batch), jnp.dtype(dtype))
    total = part if total is None else jax.tree.map(jnp.add, total, part)
    weight += float(more)
  if total is None or not weight:
    raise UserError(
      "importance got no token that counts: give batches of text, with tokens "
      "and, where rows are padded, segment_ids"
    )
  return Importance(*(x / weight for x in total))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _sums(
  net: Architecture, params: Params, batch: Mapping[str, Array], dtype: Any
) -> tuple[Importance, Array]:
  """Sums over a batch's tokens, and their number."""
  tokens, segments = batch["tokens"], batch.get("segment_ids")
  positions = batch.get("positions")
  if positions is None:
    whole = jnp.arange(tokens.shape[1])[None]
    positions = whole if segments is None else document_positions(segments)
  counts = jnp.ones(tokens.shape) if segments is None else segments != 0
  counts = counts.astype(jnp.float32)
  turned, slots = angles(net, positions), jnp.arange(tokens.shape[1])

  def summed(x: Array) -> Array:
    """Over the tokens."""
    return jnp.einsum("bs,bs...->...", counts, x.astype(jnp.float32))

  def stream(x: Array, w: dict[str, Array]) -> tuple[Array, Array]:
    """A channel's importance to a norm, and its energy."""
    one = jnp.full(net.width, 0.0 if net.norm == "rms_plus_one" else 1.0)
    plain = normalise(net, x.astype(jnp.float32), {"scale": one})
    return summed(jnp.abs(normalise(net, x, w))), summed(plain**2)

  def attend(
    q: Array, k: Array, v: Array, layer: Layer
  ) -> tuple[Array, dict[str, Array]]:
    window = jnp.array(window_sizes(net))[layer.window]
    seen = attention.visible(slots, slots, window, segments, segments)
    scale, softcap = net.score_scale, net.attention_softcap
    y, _ = attention.dense(q, k, v, seen, scale=scale, softcap=softcap)
    return y, {}

  def body(x: Array, layer: Layer) -> tuple[Array, Any]:
    y, seen = block(net, x, layer, turned, attend, lambda x, *_: x)
    w = layer.weights
    first = stream(x, w["attention_norm"])
    second = stream(seen["middle"], w["mlp_norm"])
    heads = jnp.linalg.norm(seen["heads"].astype(jnp.float32), axis=-1)
    groups = summed(heads).reshape(net.kv_heads, -1).sum(-1)
    both = jax.tree.map(jnp.add, first, second)
    return y, (*both, summed(jnp.abs(seen["neurons"])), groups)

  x = embed(net, params, tokens, positions, dtype)
  x, (channels, energy, *each) = jax.lax.scan(body, x, layers(net, params))
  last = stream(x, params["norm"])
  channels, energy = channels.sum(0) + last[0], energy.sum(0) + last[1]
  return Importance(channels, energy, *each), counts.sum()


def _squares(w: Mapping[str, Array], axis: int) -> Array:
  """Σ of squares along inputs (-2), with the bias, or along outputs (-1)."""
  found = (w["kernel"].astype(jnp.float32) ** 2).sum(axis)
  if axis == -2 and "bias" in w:
    found += w["bias"].astype(jnp.float32) ** 2
  return found


def _mean_square(w: Mapping[str, Array]) -> Array:
  return (w["kernel"].astype(jnp.float32) ** 2).mean(0)


def _scales(net: Architecture, w: Mapping[str, Array]) -> Array:
  """What a norm multiplies each channel with."""
  scale = w["scale"].astype(jnp.float32)
  return 1 + scale if net.norm == "rms_plus_one" else scale
