"""Sums over the tokens of a head too large to multiply out.

    Σ over tokens  f(logits of the student, of the teacher, the token's row)

The tokens are taken a chunk at a time: two products give the chunk's logits,
f's gradient with respect to the student's is taken at once, and two products
more add it to those of hidden states and kernel. So no `[tokens, V]` array ever
is, each product is made once, and nothing is kept for the backward pass but the
gradients themselves. Tokens that are masked come last, and are not reached.

f is any function of rows of logits. Under a mesh each device goes through its
own tokens, and the classes may be split as well: f is then partitioned by the
compiler, which reduces over the classes by a few numbers a token.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, PyTree

from kdjax import pins
from kdjax.losses.layout import Layout as Layout
from kdjax.losses.layout import (
  added,
  apart,
  by_rows,
  chunk_of,
  class_parts,
  fewer,
  gathered,
  narrow,
  split_classes,
  together,
  turned,
)
from kdjax.losses.layout import over as over
from kdjax.losses.softmax import known_support
from kdjax.types import LinearLogits, UserError

# Classes whose part of the gradients is made at once.
_CLASSES = 8192
# Logits that f sees at once on CPU, for each core: what it makes of them stays
# in the core's cache.
_TILE = 2**13

# (student [n, V], teacher [n, V] | None, rows, constants) -> ({group: scalar},
# further sums), each the sum of what its rows give.
RowSums = Callable[..., tuple[dict[str, Array], PyTree]]


def sum_rows(
  f: RowSums,
  student: LinearLogits,
  teacher: LinearLogits | Float[Array, "*batch V"] | None,
  rows: dict[str, Array],
  constants: PyTree,
  layout: Layout | None = None,
) -> tuple[dict[str, Array], PyTree]:
  """f over all tokens, which receives and returns as `RowSums` says.

  Only the first of its two results has a gradient, and only with respect to
  the student's hidden states, kernel and bias. It is formed in the forward pass
  for the sum of the groups; a backward pass that weighs the groups apart makes
  it anew.

  Args:
    f: 0, with gradient 0, for a row whose `mask` is 0.
    student, teacher: their classes beyond the smaller true vocabulary are at
      -inf on both sides.
    rows: arrays `[*batch, ...]`, `mask` `[*batch]` among them.
    constants: further arguments of f, without gradient.
    layout: of the computation; by default on one device.

  Raises:
    UserError: for a mask of another shape than the hidden states'.
  """
  _check(student, teacher, rows)
  layout = fewer(layout or Layout(), student, teacher)
  num_classes, parts = student.vocabulary, class_parts(layout)
  student = _resized(student, -(-student.shape[-1] // parts) * parts)
  if isinstance(teacher, LinearLogits):
    num_classes = min(num_classes, teacher.vocabulary)
    teacher = dataclasses.replace(teacher, num_classes=num_classes)
    if layout.classes:
      # Once, beside the student's: in the loop it would move logits.
      teacher = _resized(teacher, student.shape[-1])
  elif teacher is not None:
    num_classes = min(num_classes, teacher.shape[-1])
  student = dataclasses.replace(student, num_classes=num_classes)
  run = functools.partial(_spread, f, layout)

  @jax.custom_vjp
  def sums(*arguments):
    return run(None, *arguments)[0]

  def forward(*arguments):
    result, gradient = run({}, *arguments)
    return result, (gradient, arguments)

  def backward(saved, cotangents):
    gradient, arguments = saved
    student, by_group = arguments[0], cotangents[0]
    one, *others = by_group.values()
    cast = lambda g, x: g.astype(x.dtype)  # noqa: E731
    # Where these are constants, as for a gradient of the sum, the compiler
    # keeps one branch.
    gradient = jax.lax.cond(
      functools.reduce(jnp.logical_and, [one == x for x in others], True),
      lambda: jax.tree.map(lambda g, x: cast(one * g, x), gradient, student),
      lambda: jax.tree.map(cast, run(by_group, *arguments)[1], student),
    )
    return gradient, None, None, None

  sums.defvjp(forward, backward)
  return sums(student, teacher, rows, constants)


def _check(student, teacher, rows):
  if rows["mask"].shape != student.shape[:-1]:
    raise UserError(
      f"mask has shape {rows['mask'].shape}, the student's hidden states "
      f"{student.hidden.shape}: give one mask value a hidden state"
    )
  if teacher is not None and teacher.shape[:-1] != student.shape[:-1]:
    raise UserError(
      f"student logits have shape {student.shape}, the teacher's "
      f"{teacher.shape}: give both the same tokens"
    )


def _resized(logits: LinearLogits, size: int) -> LinearLogits:
  """The same, its kernel with `size` rows."""

  def resized(x: Array | None) -> Array | None:
    if x is None or x.shape[0] == size:
      return x
    pad = [(0, max(size - x.shape[0], 0))] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x[:size], pad)

  return dataclasses.replace(
    logits, kernel=resized(logits.kernel), bias=resized(logits.bias)
  )


def _spread(f, layout, weights, student, teacher, rows, constants):
  """`_through` over the mesh: each device its own tokens."""
  through = functools.partial(_through, f, layout)
  if not layout.mesh or not layout.tokens:
    with pins.inside(layout.mesh):
      return through(weights, student, teacher, rows, constants)
  split, whole = PartitionSpec(layout.tokens), PartitionSpec()

  def total(weights, student, teacher, rows, constants):
    ours, theirs = gathered(layout, student), gathered(layout, teacher)
    sums, gradient = through(weights, ours, theirs, rows, constants)
    if gradient is None:
      return jax.lax.psum(sums, layout.tokens), None
    sums, bias = jax.lax.psum((sums, gradient.bias), layout.tokens)
    kernel = added(layout, gradient.kernel, student.kernel.shape)
    return sums, dataclasses.replace(gradient, kernel=kernel, bias=bias)

  def specs(logits):
    if not isinstance(logits, LinearLogits):
      return split
    bias = None if logits.bias is None else whole
    columns = layout.width if narrow(layout, logits) else None
    kernel = PartitionSpec(None, columns)
    return dataclasses.replace(logits, hidden=split, kernel=kernel, bias=bias)

  # By hand over the tokens alone: the classes are left to the compiler, which
  # partitions whatever f does with them.
  return jax.shard_map(
    total,
    mesh=layout.mesh,
    axis_names=set(layout.tokens),
    in_specs=(whole, specs(student), specs(teacher), split, whole),
    out_specs=(whole, None if weights is None else specs(student)),
    check_vma=False,
  )(weights, student, teacher, rows, constants)


def _through(f, layout, weights, student, teacher, rows, constants):
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
  # Products of finite numbers are at -inf where they pad, and nowhere else.
  linear = teacher is None or isinstance(teacher, LinearLogits)
  biased = (
    student.bias is not None or getattr(teacher, "bias", None) is not None
  )
  known = student.vocabulary if linear and not biased else None
  # Those that do not count come last; what is past the end reads as 0.
  order = jnp.argsort(~counts, stable=True)
  order = jnp.pad(order, (0, -counts.size % chunk), constant_values=counts.size)

  def multiply(number):
    index = jax.lax.dynamic_slice_in_dim(order, number * chunk, chunk)
    part = {name: _take(x, index) for name, x in rows.items()}
    # 0 · NaN would be NaN in the kernel's gradient.
    x = jnp.where(part["mask"][:, None] > 0, _take(hidden, index), 0)
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
    gradient, accumulate = _accumulators(student, hidden, layout)
  trips = (jnp.sum(counts) + chunk - 1) // chunk
  sums, gradient = jax.lax.fori_loop(0, trips, one_chunk, (sums, gradient))
  if gradient is not None:
    by_hidden, by_kernel, by_bias = gradient
    gradient = dataclasses.replace(
      student,
      hidden=apart(layout, _as(by_hidden, dtype)).reshape(student.hidden.shape),
      kernel=turned(layout, by_kernel),
      bias=by_bias,
    )
  return sums, gradient


def _targets(teacher, batch, layout, student):
  """index -> what there is of the teacher there; that -> logits [n, V]."""
  size = student.shape[-1]
  if teacher is None:
    return lambda index: None, lambda _: None
  if not isinstance(teacher, LinearLogits):
    logits, finish = _flat(teacher, batch), student.mask_padding
    return functools.partial(_take, logits), lambda x: finish(_as_wide(x, size))
  hidden = together(layout, _flat(teacher.hidden, batch))
  split = functools.partial(split_classes, layout)
  kernel = by_rows(layout, teacher.kernel.astype(hidden.dtype))
  return (
    lambda index: _product(split, _take(hidden, index), kernel),
    lambda product: _as_wide(teacher.finish(product), size),
  )


def _product(split, x: Array, kernel: Array) -> Float32[Array, "n V"]:
  product = jnp.einsum(
    "nd,vd->nv", x, kernel, preferred_element_type=jnp.float32
  )
  return split(product, 1)


def _accumulators(student, hidden, layout):
  """Zeros for the gradients of hidden, kernel and bias; what adds to them."""
  blocks = class_parts(layout)
  # A token's hidden state is met once: only shares of it are still to be added.
  dtype = hidden.dtype if blocks == 1 else jnp.float32
  zeros = (
    _bits(jnp.zeros((blocks, *hidden.shape), dtype)),
    jnp.zeros(student.kernel.shape, jnp.float32),
    None if student.bias is None else jnp.zeros(student.bias.shape),
  )
  if layout.classes is None:
    return zeros, _accumulate
  whole, rows = PartitionSpec(), PartitionSpec(layout.classes)
  columns = PartitionSpec(None, layout.classes)
  # By hand over the classes, too: what they give a hidden state is left in as
  # many shares as there are devices, and added up once, after the loop.
  accumulate = jax.shard_map(
    _accumulate,
    axis_names={layout.classes},
    in_specs=(rows, columns, whole, rows, whole),
    out_specs=rows,
    check_vma=False,
  )
  return jax.tree.map(
    functools.partial(split_classes, layout), zeros
  ), accumulate


def _accumulate(gradient, slope, x, kernel, index):
  """Adds what a chunk's slope [n, V] gives hidden states, kernel and bias."""
  by_hidden, by_kernel, by_bias = gradient
  multiply = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  cut = jax.lax.dynamic_slice_in_dim

  def add(start, width, sums):
    share, total = sums
    part = cut(slope, start, width, axis=1)
    rows = _moved(lambda x, start: cut(x, start, width), kernel, start)
    share += multiply("nv,vd->nd", part, rows)
    more = multiply("nv,nd->vd", part, x) + cut(total, start, width)
    return share, jax.lax.dynamic_update_slice_in_dim(total, more, start, 0)

  # A part of the classes at a time, so that no second array has the kernel's
  # size. A TPU adds in place.
  size = kernel.shape[0]
  step = size if jax.default_backend() == "tpu" else min(_CLASSES, size)
  sums = jax.lax.fori_loop(
    0,
    size // step,
    lambda n, sums: add(n * step, step, sums),
    (jnp.zeros(x.shape), by_kernel),
  )
  if size % step:
    sums = add(size - size % step, size % step, sums)
  share, by_kernel = sums
  if by_hidden.dtype != jnp.float32:
    share = _bits(share.astype(x.dtype))
  by_hidden = by_hidden.at[0, index].set(share, mode="drop")
  if by_bias is not None:
    by_bias += slope.sum(0, dtype=jnp.float32)
  return by_hidden, by_kernel, by_bias


def _flat(x: Array, batch: tuple[int, ...]) -> Array:
  return x.reshape(-1, *x.shape[len(batch) :])


def _take(x: Array, index: Array) -> Array:
  """Rows of x; 0 past its end."""
  take = functools.partial(jnp.take, axis=0, mode="fill", fill_value=0)
  return _moved(take, x, index)


def _moved(move: Callable[..., Array], x: Array, index: Array) -> Array:
  """move(x, index), which copies some rows of x."""
  # Otherwise all of x would be reinterpreted, and kept, ahead of the loop.
  x, index = jax.lax.optimization_barrier((x, index))
  return _as(move(_bits(x), index), x.dtype)


# On CPU a gather, scatter or slice of bfloat16 would convert the whole array to
# float32 and, in a loop, back.
def _bits(x: Array) -> Array:
  half = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
  half = half and jax.default_backend() == "cpu"
  return jax.lax.bitcast_convert_type(x, jnp.uint16) if half else x


def _as(bits: Array, dtype: Any) -> Array:
  if bits.dtype != jnp.uint16:
    return bits
  return jax.lax.bitcast_convert_type(bits, dtype)


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
