"""A head's logits, a chunk of one device's tokens at a time."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from kdjax.losses.head_gradients import accumulators, laid
from kdjax.losses.layout import (
  Layout,
  by_rows,
  chunk_of,
  class_parts,
  split_classes,
  together,
)
from kdjax.losses.moves import take
from kdjax.losses.softmax import known_support
from kdjax.types import LinearLogits

# Logits that f sees at once on CPU, for each core: what it makes of them stays
# in the core's cache.
_TILE = 2**13


def through(f, layout, weights, student, teacher, rows, constants):
  """One device's tokens: f's sums and, unless the weights are None, a gradient.

  The gradient is that of Σ weight · group, 1 where no weight is given.
  """
  batch, dtype = rows["mask"].shape, student.hidden.dtype
  counts = together(layout, rows["mask"].reshape(-1) > 0)
  hidden = together(layout, _flat(student.hidden, batch))
  rows = together(layout, {name: _flat(x, batch) for name, x in rows.items()})
  split = functools.partial(split_classes, layout)
  kernel = by_rows(layout, student.kernel.astype(dtype))
  target, finish_target = _targets(teacher, batch, layout, student)
  chunk, tile = _sizes(layout, counts.size, student.shape[-1])
  known = _known(student, teacher)
  order = _counting_first(counts, chunk)

  def multiply(number):
    index = jax.lax.dynamic_slice_in_dim(order, number * chunk, chunk)
    part = {name: take(x, index) for name, x in rows.items()}
    # 0 · NaN would be NaN in the kernel's gradient.
    x = jnp.where(part["mask"][:, None] > 0, take(hidden, index), 0)
    tiles = _product(split, x, kernel), target(index), part
    tiles = jax.tree.map(lambda x: x.reshape(-1, tile, *x.shape[1:]), tiles)
    return index, x, tiles

  def tile_sums(product, target, part):
    logits = student.finish(product), finish_target(target)
    with known_support(known):
      groups, further = f(*logits, part, constants)
    total = sum((weights or {}).get(g, 1.0) * x for g, x in groups.items())
    return total, (groups, further)

  def one_tile(sums, pieces):
    if weights is None:
      (_, more), slope = tile_sums(*pieces), None
    else:
      slope, more = jax.grad(tile_sums, has_aux=True)(*pieces)
      slope = slope.astype(_slope_dtype(dtype))
    return jax.tree.map(jnp.add, sums, more), slope

  def one_chunk(number, carry):
    sums, gradient = carry
    index, x, tiles = multiply(number)
    sums, slope = jax.lax.scan(one_tile, sums, tiles)
    if slope is not None:
      slope = split(slope.reshape(chunk, -1), 1)
      gradient = accumulate(gradient, slope, x, kernel, index)
    return sums, gradient

  shapes = jax.eval_shape(
    lambda: tile_sums(*jax.tree.map(lambda x: x[0], multiply(0)[-1]))[1]
  )
  sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  gradient = None
  if weights is not None:
    gradient, accumulate = accumulators(student, hidden, layout)
  trips = (jnp.sum(counts) + chunk - 1) // chunk
  sums, gradient = jax.lax.fori_loop(0, trips, one_chunk, (sums, gradient))
  return sums, gradient and laid(gradient, student, layout)


def _counting_first(counts, chunk):
  """The tokens' order: those that do not count last, up to whole chunks.

  What is past the end reads as 0.
  """
  order = jnp.argsort(~counts, stable=True)
  return jnp.pad(order, (0, -counts.size % chunk), constant_values=counts.size)


def _known(student, teacher):
  """How many classes are f's support; None where it has to look."""
  # Products of finite numbers are at -inf where they pad, and nowhere else.
  linear = teacher is None or isinstance(teacher, LinearLogits)
  biased = any(
    getattr(logits, "bias", None) is not None for logits in (student, teacher)
  )
  return student.vocabulary if linear and not biased else None


def _targets(teacher, batch, layout, student):
  """index -> what there is of the teacher there; that -> logits [n, V]."""
  size = student.shape[-1]
  if teacher is None:
    return lambda index: None, lambda _: None
  if not isinstance(teacher, LinearLogits):
    logits, finish = _flat(teacher, batch), student.mask_padding
    return functools.partial(take, logits), lambda x: finish(_as_wide(x, size))
  hidden = together(layout, _flat(teacher.hidden, batch))
  split = functools.partial(split_classes, layout)
  kernel = by_rows(layout, teacher.kernel.astype(hidden.dtype))
  return (
    lambda index: _product(split, take(hidden, index), kernel),
    lambda product: _as_wide(teacher.finish(product), size),
  )


def _product(split, x: Array, kernel: Array) -> Float32[Array, "n V"]:
  product = jnp.einsum(
    "nd,vd->nv", x, kernel, preferred_element_type=jnp.float32
  )
  return split(product, 1)


def _flat(x: Array, batch: tuple[int, ...]) -> Array:
  return x.reshape(-1, *x.shape[len(batch) :])


def _as_wide(logits: Array, size: int) -> Array:
  """Classes beyond `size` left out, missing ones at -inf."""
  logits = logits[..., :size]
  missing = size - logits.shape[-1]
  pad = [(0, 0)] * (logits.ndim - 1) + [(0, missing)]
  return jnp.pad(logits, pad, constant_values=-jnp.inf) if missing else logits


def _slope_dtype(dtype: Any) -> Any:
  # Rounded, as other devices' products need it, the slope costs the gradients
  # as much again as their own rounding. A CPU multiplies it as it is.
  return jnp.float32 if jax.default_backend() == "cpu" else dtype


def num_chunks(layout: Layout, num_tokens: int, size: int) -> int:
  """How often the loop over a device's tokens runs, where all of them count.

  Args:
    layout: of the head.
    num_tokens: on each device.
    size: classes.
  """
  return -(-num_tokens // _sizes(layout, num_tokens, size)[0])


def _sizes(layout: Layout, num_tokens: int, size: int) -> tuple[int, int]:
  """Tokens in a chunk, and of those how many f sees at once."""
  chunk = min(chunk_of(layout), max(num_tokens, 1))
  tile = chunk
  if jax.default_backend() == "cpu":
    rows = max(_TILE // size, 1) * (os.cpu_count() or 1)
    # Where classes are split each tile has its collectives: fewer, then.
    tile = min(rows if class_parts(layout) == 1 else max(rows, 32), chunk)
  return chunk + -chunk % tile, tile
