"""The whole decoder: `decoder`, a `Model` whose layers are scanned."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from kdjax import errors, pins
from kdjax.models.decoder import attention, parameters
from kdjax.models.decoder.architecture import Architecture, architecture
from kdjax.models.decoder.block import (
  Attend,
  Layer,
  angles,
  block,
  dropout,
  embed,
  layers,
  normalise,
  window_sizes,
)
from kdjax.models.decoder.taps import (
  ALL_TAPS,
  as_tap,
  asked,
  buffers,
  keep,
  slots,
  tap_names,
)
from kdjax.types import (
  Batch,
  LinearLogits,
  Model,
  Output,
  Params,
  Stats,
  dense,
  run_once,
)

# What is recomputed in the backward pass instead of kept.
REMAT = {
  "none": None,
  "block": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def decoder(
  net: Architecture | Mapping[str, Any],
  *,
  head: str = "dense",
  num_classes: int | None = None,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  remat: str = "none",
) -> Model:
  """A causal language model; the logits at a token are of the one after it.

  A batch has `tokens [B, S]` and may have `segment_ids [B, S]`, the number of
  each token's document (no attention across documents; 0 = padding), and
  `positions [B, S]`, which otherwise count from each document's beginning.

  Taps, for n layers and heads of d channels:

      embed                        [B, S, D]        what the first layer reads
      block_1 ... block_n          [B, S, D]        the residual stream
      attention_1 ... attention_n  [B, heads, S, S] probabilities, float32
      queries_i, keys_i, values_i  [B, heads, S, d] as the scores multiply them:
                                                    normalised and rotated
      final                        [B, S, D]        what the head reads

  A tap that is not asked for costs nothing. An attention map has all layers
  compute theirs by the plain equation, and keeps the one.

  Args:
    net: the content of a config.json, or what `architecture` makes of it.
    head: "dense" gives logits `[B, S, V]`, float32; "linear" gives
      `LinearLogits`, for losses that never multiply them out.
    num_classes: the tokenizer's size, where the embeddings were padded beyond
      it: the classes after it are -inf.
    dtype: of the computation; norms, rotations and softmax are float32.
    param_dtype: of what `init` draws.
    remat: what the backward pass computes again: "none"; "dots", all but the
      matrix products; "block", all but what goes from layer to layer.

  Raises:
    UserError: an unknown option, an unsupported config.json; from `apply`, an
      unknown tap or a sequence longer than the context.
  """
  if not isinstance(net, Architecture):
    net = architecture(net)
  made = net
  head_of = errors.choose(
    "head", head, {"dense": dense_head, "linear": linear_head}
  )
  errors.choose("remat", remat, REMAT)
  names = tap_names(made)

  def init(key: Array, batch: Batch) -> tuple[Params, Stats]:
    del batch
    return parameters.init(made, key, param_dtype), {}

  def apply(
    params: Params,
    stats: Stats,
    batch: Batch,
    *,
    train: bool,
    key: Array | None = None,
    taps: tuple[str, ...] = (),
  ) -> tuple[Output, Stats]:
    asked = tuple(names) if taps == ALL_TAPS else taps
    for name in asked:
      if name not in names:
        raise errors.unknown("tap", name, names)
    x, found = hidden(
      made,
      params,
      batch,
      dtype=dtype,
      remat=remat,
      key=key if train else None,
      taps=asked,
    )
    logits = head_of(made, params, x, num_classes)
    return Output(logits, {name: found[name] for name in asked}), stats

  # Without the batch: nothing depends on it, and it may hold anything.
  drawn = run_once(init)
  return Model(lambda key, batch: drawn(key, {}), apply, pinned=True)


def linear_head(
  net: Architecture,
  params: Params,
  x: Float[Array, "b s width"],
  num_classes: int | None = None,
) -> LinearLogits:
  """The head, not multiplied out."""
  kernel = params["embed" if net.tied else "head"]["kernel"]
  return LinearLogits(
    x, kernel, softcap=net.final_softcap, num_classes=num_classes
  )


def dense_head(
  net: Architecture,
  params: Params,
  x: Float[Array, "b s width"],
  num_classes: int | None = None,
) -> Float32[Array, "b s vocab"]:
  """cap(x · kernelᵀ), float32, -inf from `num_classes` on."""
  return dense(linear_head(net, params, x, num_classes))


def document_positions(segments: Int[Array, "b s"]) -> Int[Array, "b s"]:
  """Positions that begin anew with each document of a row."""
  slots = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
  before = jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  starts = jnp.where(segments != before, slots, 0)
  return slots - jax.lax.cummax(starts, axis=1)


def hidden(
  net: Architecture,
  params: Params,
  batch: Batch,
  *,
  dtype: Any = jnp.float32,
  remat: str = "none",
  key: Array | None = None,
  taps: tuple[str, ...] = (),
) -> tuple[Float[Array, "b s width"], dict[str, Array]]:
  """What the head reads, and the taps.

  Args:
    batch: `tokens [B, S]`; `segment_ids [B, S]`, the number of each token's
      document, 0 = padding; `positions [B, S]`, otherwise counted from each
      document's beginning.
    dtype: of the computation; norms, angles and softmax are float32.
    remat: one of `REMAT`.
    key: for dropout; None = no dropout.
    taps: names of `tap_names`.
  """
  tokens = batch["tokens"]
  _check_length(net, tokens)
  segments = batch.get("segment_ids")
  positions = batch.get("positions")
  if positions is None:
    whole = jnp.arange(tokens.shape[1])[None]
    positions = whole if segments is None else document_positions(segments)
  drop = dropout(key)
  x = drop(embed(net, params, tokens, positions, dtype), net.embed_dropout, 2)
  x = pins.by_example(x)
  found = {"embed": x} if "embed" in taps else {}
  turned = angles(net, positions)
  stack = layers(net, params, slots(net, taps))
  kernel = None
  if "attention" not in stack.slots and not (
    key is not None and net.attention_dropout
  ):
    kernel = attention.kernel(
      dtype,
      tokens.shape[1],
      net.head_dim,
      net.attention_softcap,
      alone=jax.device_count() == 1
      or pins.divides(tokens.shape[0], net.kv_heads),
    )

  def step(x: Array, layer: Layer) -> tuple[Array, dict[str, Array]]:
    own = None if key is None else jax.random.fold_in(key, layer.number)
    attend = _attend(net, segments, own, kernel)
    x, taps = block(net, x, layer, turned, attend, dropout(own))
    return x, {kind: as_tap(kind, taps[kind]) for kind in layer.slots}

  if remat != "none":
    policy = errors.choose("remat", remat, REMAT)
    step = jax.checkpoint(step, policy=policy, prevent_cse=False)

  def body(carry: Any, layer: Layer) -> tuple[Any, None]:
    x, kept = carry
    x, seen = step(pins.by_example(x), layer)
    return (x, keep(kept, seen, layer.slots)), None

  (x, kept), _ = jax.lax.scan(body, (x, buffers(step, x, stack)), stack)
  for kind, numbers in asked(net, taps).items():
    for slot, n in enumerate(numbers):
      found[f"{kind}_{n + 1}"] = kept[kind][slot]
  x = normalise(net, x, params["norm"])
  if "final" in taps:
    found["final"] = x
  return x, found


def _attend(
  net: Architecture,
  segments: Array | None,
  key: Array | None,
  kernel: str | None,
) -> Attend:
  """Attention over the row itself, by a kernel or by the equation."""
  scale, softcap = net.score_scale, net.attention_softcap
  one_of = {
    "blocks": functools.partial(
      attention.by_blocks, scale=scale, softcap=softcap
    ),
    "cudnn": functools.partial(attention.cudnn, scale=scale),
    "splash": functools.partial(attention.splash, scale=scale, softcap=softcap),
  }

  def fused(
    q: Array, k: Array, v: Array, layer: Layer
  ) -> tuple[Array, dict[str, Array]]:
    # A kernel's window is a number of the program: one branch for each.
    attend = one_of[str(kernel)]
    branches = [
      functools.partial(attend, window=window)
      for window in dict.fromkeys(net.windows)
    ]
    if kernel == "splash":
      branches = [pins.apart(branch) for branch in branches]
    return jax.lax.switch(layer.window, branches, q, k, v, segments), {}

  def plain(
    q: Array, k: Array, v: Array, layer: Layer
  ) -> tuple[Array, dict[str, Array]]:
    slots, window = jnp.arange(q.shape[1]), None
    if any(net.windows):
      window = jnp.array(window_sizes(net))[layer.window]
    seen = attention.visible(slots, slots, window, segments, segments)
    dropped = None
    if key is not None and net.attention_dropout:
      dropped = (net.attention_dropout, jax.random.fold_in(key, 3))
    y, p = attention.dense(
      q, k, v, seen, scale=scale, softcap=softcap, dropout=dropped
    )
    return y, {"attention": p}

  return fused if kernel else plain


def _check_length(net: Architecture, tokens: Array) -> None:
  if tokens.shape[1] > net.context:
    raise errors.UserError(
      f"sequences have {tokens.shape[1]} tokens, the model's context "
      f"{net.context}: cut them, or take a model of a longer context"
    )
