"""What a decoder writes after a prompt: greedily or sampled, one program."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Float32, Int

from kdjax.errors import UserError
from kdjax.models.decoder import Architecture
from kdjax.models.decoder.cache import empty, extend
from kdjax.models.decoder.network import dense_head
from kdjax.types import Params


class Generated(NamedTuple):
  """The tokens after each prompt.

  Attributes:
    tokens: `[B, max_new_tokens]`; `pad_token` after the one that ended a row.
    lengths: `[B]`, how many there are, the one that ended a row included.
    log_probs: `[B, max_new_tokens]`, of each token by the model itself, at
      temperature 1 and out of all classes; 0 after the one that ended a row.
  """

  tokens: Int[Array, "b n"]
  lengths: Int[Array, " b"]
  log_probs: Float32[Array, "b n"]


def generate(
  net: Architecture,
  params: Params,
  prompts: Int[Array, "b s"],
  *,
  max_new_tokens: int,
  mask: Bool[Array, "b s"] | None = None,
  key: Array | None = None,
  sampling_temperature: ArrayLike = 1.0,
  top_p: ArrayLike = 1.0,
  stop_tokens: tuple[int, ...] = (),
  pad_token: int = 0,
  num_classes: int | None = None,
  dtype: Any = jnp.float32,
) -> Generated:
  """Continues each prompt, until a stop token or `max_new_tokens`.

  Args:
    net, params: the decoder.
    prompts: token numbers.
    mask: where a prompt has tokens and not padding, left or right of them.
    key: for sampling; None takes the most probable token each time.
    sampling_temperature: divides the logits, > 0; traced.
    top_p: draws from the fewest tokens whose probabilities reach so much, in
      (0, 1]; traced. Holtzman et al. 2019, arXiv 1904.09751, section 3.1.
    stop_tokens: any of these ends a row.
    pad_token: what follows it.
    num_classes: the tokenizer's size where the embeddings are padded: no token
      from it on is drawn.
    dtype: of the computation and of the cache.

  Raises:
    UserError: prompts that leave too little of the context, or are empty; a
      temperature or top_p out of range.
  """
  _check(net, prompts, mask, max_new_tokens, sampling_temperature, top_p)
  run = functools.partial(
    _generate,
    net,
    max_new_tokens=max_new_tokens,
    stop_tokens=tuple(stop_tokens),
    pad_token=pad_token,
    num_classes=num_classes,
    dtype=jnp.dtype(dtype),
  )
  prompts = jnp.asarray(prompts)
  whole = jnp.ones(prompts.shape, bool) if mask is None else jnp.asarray(mask)
  drawn = None
  if key is not None:
    drawn = (key, jnp.float32(sampling_temperature), jnp.float32(top_p))
  return run(params, prompts, whole.astype(bool), drawn)


@functools.partial(
  jax.jit,
  static_argnums=0,
  static_argnames=(
    "max_new_tokens",
    "stop_tokens",
    "pad_token",
    "num_classes",
    "dtype",
  ),
)
def _generate(
  net: Architecture,
  params: Params,
  prompts: Array,
  mask: Array,
  sampling: tuple[Array, Array, Array] | None,
  *,
  max_new_tokens: int,
  stop_tokens: tuple[int, ...],
  pad_token: int,
  num_classes: int | None,
  dtype: Any,
) -> Generated:
  rows, prompt_length = prompts.shape
  prompts, padded = _to_the_right(prompts, mask)
  lengths = padded.sum(axis=1)
  positions = jnp.maximum(jnp.cumsum(padded, axis=1) - 1, 0)
  segments = jnp.pad(padded, ((0, 0), (0, max_new_tokens)), constant_values=1)
  stops = jnp.asarray(stop_tokens, jnp.int32)

  def choose(x: Array, n: Array | int) -> tuple[Array, Array]:
    logits = dense_head(net, params, x[:, -1:], num_classes)[:, 0]
    return _chosen(logits, sampling, n)

  def going(state: Any) -> Array:
    n, *_, done = state
    return (n < max_new_tokens) & ~done.all()

  def step(state: Any) -> Any:
    n, written, log_probs, token, cache, done = state
    x, cache = extend(
      net,
      params,
      cache,
      token[:, None],
      (lengths + n - 1)[:, None],
      prompt_length + n - 1,
      segments,
    )
    token, log_p = choose(x, n)
    token = jnp.where(done, pad_token, token)
    written = written.at[:, n].set(token)
    log_probs = log_probs.at[:, n].set(jnp.where(done, 0.0, log_p))
    return n + 1, written, log_probs, token, cache, done | _among(token, stops)

  cache = empty(net, rows, segments.shape[1], dtype)
  x, cache = extend(net, params, cache, prompts, positions, 0, segments)
  token, log_p = choose(x, 0)
  shape = (rows, max_new_tokens)
  written = jnp.full(shape, pad_token, jnp.int32).at[:, 0].set(token)
  log_probs = jnp.zeros(shape, jnp.float32).at[:, 0].set(log_p)
  done = _among(token, stops)
  state = (jnp.int32(1), written, log_probs, token, cache, done)
  _, written, log_probs, *_ = jax.lax.while_loop(going, step, state)
  stopped = _among(written, stops)
  first = jnp.argmax(stopped, axis=1) + 1
  ended = jnp.where(stopped.any(axis=1), first, max_new_tokens)
  return Generated(written, ended, log_probs)


def _to_the_right(prompts: Array, mask: Array) -> tuple[Array, Array]:
  """Prompts and mask with the padding to the left: all rows write one slot."""
  order = jnp.argsort(mask, axis=1, stable=True)
  prompts = jnp.take_along_axis(prompts, order, axis=1)
  return prompts, jnp.take_along_axis(mask, order, axis=1).astype(jnp.int32)


def _chosen(
  logits: Array, sampling: tuple[Array, Array, Array] | None, n: Array | int
) -> tuple[Array, Array]:
  """The n-th tokens, and their log-probabilities."""
  if sampling is None:
    token = jnp.argmax(logits, axis=-1)
  else:
    key, temperature, top_p = sampling
    drawn = nucleus(logits / temperature, top_p)
    token = jax.random.categorical(jax.random.fold_in(key, n), drawn)
  log_p = jax.nn.log_softmax(logits)
  chosen = jnp.take_along_axis(log_p, token[:, None], axis=-1)[:, 0]
  return token.astype(jnp.int32), chosen


def _among(tokens: Array, stops: Array) -> Array:
  stops = stops.reshape((1,) * tokens.ndim + (-1,))
  return (tokens[..., None] == stops).any(axis=-1)


def nucleus(
  logits: Float[Array, "b v"], top_p: Float[Array, ""]
) -> Float[Array, "b v"]:
  """-inf outside the fewest classes whose probabilities reach `top_p`."""
  ranked = -jnp.sort(-logits, axis=-1)
  p = jax.nn.softmax(ranked, axis=-1)
  before = jnp.cumsum(p, axis=-1) - p
  # At least one; with rounding the sum of all may stay below 1.
  kept = (before < top_p) | (top_p >= 1)
  last = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits >= last, logits, -jnp.inf)


def _check(
  net: Architecture,
  prompts: Any,
  mask: Any,
  new: int,
  temperature: ArrayLike,
  top_p: ArrayLike,
) -> None:
  if new < 1 or prompts.shape[1] + new > net.context:
    raise UserError(
      f"prompts of {prompts.shape[1]} tokens and {new} new ones, the model's "
      f"context is {net.context}: shorten them, or ask for fewer (at least 1)"
    )
  if isinstance(temperature, float | int) and temperature <= 0:
    raise UserError(
      f"sampling_temperature is {temperature}, must be above 0: for the most "
      "probable token give no key"
    )
  if isinstance(top_p, float | int) and not 0 < top_p <= 1:
    raise UserError(f"top_p is {top_p}, must be in (0, 1]: change it")
  if mask is not None and not isinstance(mask, Tracer):
    empty_rows = np.flatnonzero(~np.asarray(mask, bool).any(axis=1))
    if len(empty_rows):
      raise UserError(
        f"prompt {int(empty_rows[0])} has no token, needs one to go on from: "
        "begin it with the tokenizer's first token"
      )
