"""Causal attention of grouped heads: the equation, by blocks, and two kernels.

A query sees the keys at or before it, in its own document, and at most
`window` tokens back, itself included. Slots of the row count for that, not
positions: inside one document they differ by a constant.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

# Queries that `by_blocks` takes at a time, and how many times at most.
BLOCK, BLOCKS = 128, 8


def visible(
  query_slots: Int[Array, " s"],
  key_slots: Int[Array, " t"],
  window: Int[Array, ""] | int | None,
  query_segments: Int[Array, "b s"] | None,
  key_segments: Int[Array, "b t"] | None,
) -> Bool[Array, "b_or_1 s t"]:
  """Which keys each query sees.

  Padding sees padding: a row of no keys at all would be NaN, and its gradient
  would reach every weight.
  """
  back = query_slots[:, None] - key_slots[None, :]
  seen = back >= 0
  if window is not None:
    seen &= back < window
  if query_segments is None or key_segments is None:
    return seen[None]
  return seen[None] & (query_segments[:, :, None] == key_segments[:, None, :])


def dense(
  q: Float[Array, "b s h d"],
  k: Float[Array, "b t k d"],
  v: Float[Array, "b t k d"],
  seen: Bool[Array, "b_or_1 s t"],
  *,
  scale: float,
  softcap: float | None = None,
  dropout: tuple[float, Array] | None = None,
) -> tuple[Float[Array, "b s h d"], Float32[Array, "b h s t"]]:
  """Softmax(cap(q kᵀ · scale)) v and its probabilities, float32.

  Args:
    q, k, v: h is a multiple of k; head n reads key/value head n // (h / k).
    seen: of `visible`.
    scale: factor on q kᵀ.
    softcap: c of cap(x) = c · tanh(x / c), before the mask.
    dropout: (rate, key), on the probabilities that v is averaged with.
  """
  b, s, h, d = q.shape
  t, kv = k.shape[1:3]
  # The queries of a group on one axis: products over two, as the gradients
  # would have, XLA on a CPU begins by copying the scores transposed.
  groups = q.reshape(b, s, kv, -1, d).transpose(0, 2, 3, 1, 4)
  scores = jnp.einsum(
    "bknd,btkd->bknt",
    groups.reshape(b, kv, -1, d),
    k,
    preferred_element_type=jnp.float32,
  )
  scores = capped(scores * scale, softcap).reshape(b, kv, -1, s, t)
  scores = jnp.where(seen[:, None, None], scores, jnp.finfo(scores.dtype).min)
  probability = jax.nn.softmax(scores, axis=-1)
  kept = probability
  if dropout is not None:
    rate, key = dropout
    keep = jax.random.bernoulli(key, 1 - rate, probability.shape)
    kept = jnp.where(keep, probability / (1 - rate), 0.0)
  kept = kept.astype(v.dtype).reshape(b, kv, -1, t)
  y = jnp.einsum("bknt,btkd->bknd", kept, v).reshape(b, kv, -1, s, d)
  y = y.transpose(0, 3, 1, 2, 4).reshape(b, s, h, d)
  return y, probability.reshape(b, h, s, t)


def by_blocks(
  q: Float[Array, "b s h d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k d"],
  segments: Int[Array, "b s"] | None,
  window: int | None,
  *,
  scale: float,
  softcap: float | None = None,
) -> Float[Array, "b s h d"]:
  """The same, some queries at a time over the keys that any of them sees.

  n blocks make (n + 1) / (2 n) of the square, and fewer under a window.
  """
  made = []
  for start, stop in blocks(q.shape[1]):
    first = 0 if window is None else max(start - window + 1, 0)
    rows, keys = slice(start, stop), slice(first, stop)
    seen = visible(
      jnp.arange(start, stop),
      jnp.arange(first, stop),
      window,
      None if segments is None else segments[:, rows],
      None if segments is None else segments[:, keys],
    )
    block = q[:, rows], k[:, keys], v[:, keys]
    made.append(dense(*block, seen, scale=scale, softcap=softcap)[0])
  return jnp.concatenate(made, axis=1)


def blocks(length: int) -> list[tuple[int, int]]:
  """The first of each block's queries, and one past its last."""
  side = max(BLOCK, -(-length // BLOCKS))
  return [(n, min(n + side, length)) for n in range(0, length, side)]


def cudnn(
  q: Float[Array, "b s h d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k d"],
  segments: Int[Array, "b s"] | None,
  window: int | None,
  *,
  scale: float,
) -> Float[Array, "b s h d"]:
  """The same by cuDNN, which keeps no scores."""
  mask = None
  if segments is not None:
    slots = jnp.arange(q.shape[1])
    mask = visible(slots, slots, window, segments, segments)[:, None]
  return jax.nn.dot_product_attention(
    q,
    k,
    v,
    mask=mask,
    scale=scale,
    is_causal=mask is None,
    local_window_size=(window - 1, 0) if window and mask is None else None,
    implementation="cudnn",
  )


def splash(
  q: Float[Array, "b s h d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k d"],
  segments: Int[Array, "b s"] | None,
  window: int | None,
  *,
  scale: float,
  softcap: float | None = None,
  interpret: bool = False,
) -> Float[Array, "b s h d"]:
  """The same by JAX's kernel for TPUs, which keeps no scores.

  Args:
    segments, window: as for `visible`; the window is a number of the program.
    interpret: runs the kernel anywhere, slowly: for tests.
  """
  # Here, not above: the kernels take a second to import, and need a TPU.
  from jax.experimental.pallas.ops.tpu import splash_attention as kernels

  length = q.shape[1]
  shape = (length, length)
  one = kernels.CausalMask(shape)
  if window is not None:
    one = kernels.LocalMask(shape, (window - 1, 0), offset=0)
  side = next(n for n in (512, 256, 128) if length % n == 0)
  parts = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")
  sides: Any = {f"block_{part}": side for part in (*parts, "q_dq", "kv_dq")}
  attend = kernels.make_splash_mha(
    kernels.MultiHeadMask([one] * q.shape[2]),
    block_sizes=kernels.BlockSizes(**sides),
    attn_logits_soft_cap=softcap,
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  q, k, v = (x.swapaxes(1, 2) for x in (q * jnp.asarray(scale, q.dtype), k, v))
  own = None if segments is None else kernels.SegmentIds(segments, segments)
  y: Any = jax.vmap(attend)(q, k, v, own)
  return y.swapaxes(1, 2)


def kernel(
  dtype: jnp.dtype,
  length: int,
  head_dim: int,
  softcap: float | None,
  *,
  alone: bool,
) -> str | None:
  """The attention that beats the equation for these sizes, if any does.

  Args:
    alone: whether each device will see whole rows and heads, by itself or
      through `pins.apart`.
  """
  backend = jax.default_backend()
  if backend == "cpu":
    return "blocks" if length > BLOCK else None
  if backend == "gpu":
    half = jnp.dtype(dtype) in (jnp.dtype("bfloat16"), jnp.dtype("float16"))
    fits = head_dim % 8 == 0 and head_dim <= 128 and length % 2 == 0
    return "cudnn" if half and fits and softcap is None else None
  # The compiler does not split this kernel over a mesh.
  fits = length % 128 == 0 and alone
  return "splash" if backend == "tpu" and fits else None


def capped(x: Array, softcap: float | None) -> Array:
  """softcap · tanh(x / softcap); x where there is none."""
  return x if softcap is None else softcap * jnp.tanh(x / softcap)
