"""Causal attention of grouped heads: the equation, and cuDNN's fused one.

A query sees the keys at or before it, in its own document, and at most
`window` tokens back, itself included. Slots of the row count for that, not
positions: inside one document they differ by a constant.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int


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
  groups = q.reshape(b, s, k.shape[2], -1, d)
  scores = jnp.einsum(
    "bskgd,btkd->bkgst", groups, k, preferred_element_type=jnp.float32
  )
  scores = capped(scores * scale, softcap)
  scores = jnp.where(seen[:, None, None], scores, jnp.finfo(scores.dtype).min)
  probability = jax.nn.softmax(scores, axis=-1)
  kept = probability
  if dropout is not None:
    rate, key = dropout
    keep = jax.random.bernoulli(key, 1 - rate, probability.shape)
    kept = jnp.where(keep, probability / (1 - rate), 0.0)
  y = jnp.einsum("bkgst,btkd->bskgd", kept.astype(v.dtype), v)
  return y.reshape(b, s, h, d), probability.reshape(b, h, s, -1)


def fused(
  q: Float[Array, "b s h d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k d"],
  seen: Bool[Array, "b_or_1 s s"] | None,
  *,
  scale: float,
) -> Float[Array, "b s h d"]:
  """The same by cuDNN, which keeps no scores; plainly causal without `seen`."""
  mask = None if seen is None else seen[:, None]
  return jax.nn.dot_product_attention(
    q,
    k,
    v,
    mask=mask,
    scale=scale,
    is_causal=seen is None,
    implementation="cudnn",
  )


def fuses(dtype: jnp.dtype, head_dim: int, softcap: float | None) -> bool:
  """Whether cuDNN has this attention, on the backend that runs."""
  half = jnp.dtype(dtype) in (jnp.dtype("bfloat16"), jnp.dtype("float16"))
  fits = half and head_dim % 8 == 0 and head_dim <= 128 and softcap is None
  return fits and jax.default_backend() == "gpu"


def capped(x: Array, softcap: float | None) -> Array:
  """softcap · tanh(x / softcap); x where there is none."""
  return x if softcap is None else softcap * jnp.tanh(x / softcap)
