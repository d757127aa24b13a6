"""The gradients of a head, added up a chunk of tokens at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kdjax.losses.layout import apart, class_parts, split_classes, turned
from kdjax.losses.moves import bits, moved, restored

# Classes whose part of the gradients is made at once.
_CLASSES = 8192


def accumulators(student, hidden, layout):
  """Zeros for the gradients of hidden, kernel and bias; what adds to them."""
  blocks = class_parts(layout)
  # A token's hidden state is met once: only shares of it are still to be added.
  dtype = hidden.dtype if blocks == 1 else jnp.float32
  zeros = (
    bits(jnp.zeros((blocks, *hidden.shape), dtype)),
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
    rows = moved(lambda x, start: cut(x, start, width), kernel, start)
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
    share = bits(share.astype(x.dtype))
  by_hidden = by_hidden.at[0, index].set(share, mode="drop")
  if by_bias is not None:
    by_bias += slope.sum(0, dtype=jnp.float32)
  return by_hidden, by_kernel, by_bias


def laid(gradient, student, layout):
  """The sums as the student's logits are made of them, each in its place."""
  by_hidden, by_kernel, by_bias = gradient
  hidden = apart(layout, restored(by_hidden, student.hidden.dtype))
  return dataclasses.replace(
    student,
    hidden=hidden.reshape(student.hidden.shape),
    kernel=turned(layout, by_kernel),
    bias=by_bias,
  )
