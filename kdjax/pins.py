"""Where activations lie, said where the compiler would otherwise have to guess.

The axes `data` and `fsdp` of a mesh split the examples; `fsdp` splits the
parameters besides. So either may be moved where the two meet, and by itself the
compiler now and then moves the examples. Without a mesh around the trace, on
one device or under `jax.pmap`, these functions return what they get.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec

# The axes of a mesh that split the leading axis of a batch.
BATCH_AXES = ("data", "fsdp")


def batch_axes(mesh: Any) -> tuple[str, ...]:
  """Those of them that a mesh has, an abstract one too."""
  return tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)


def inside(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
  """What is traced in this context is pinned to that mesh."""
  if mesh is None or mesh.size == 1:
    return contextlib.nullcontext()
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def by_example(x: jax.Array) -> jax.Array:
  """`[B, ...]`, its examples where the batch has them, every device whole ones.

  But for the axis `model`: what it splits stays split.
  """
  axes = _axes()
  if not axes or x.shape[0] % _parts():
    return x
  free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
  return _constrain(x, PartitionSpec(axes, *free))


def looked_up(
  table: jax.Array, index: jax.Array, dtype: Any = None
) -> jax.Array:
  """`table[index]` in `dtype`: `[V, D]`, `[B, S]` -> `[B, S, D]`.

  Where `fsdp` splits the width, a device looks up, in its own columns, the
  examples of all devices along `fsdp`, and gets its own examples' other columns
  for theirs. The gradient goes back the same way. So nobody ever has the whole
  table, and what travels has the size of the result.

  Returns:
    NaN where an index is no row of the table.
  """
  dtype = dtype or table.dtype
  axes = _axes()
  parts = jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) if axes else 1
  if parts == 1:
    return jnp.take(table, index, axis=0).astype(dtype)
  if table.shape[1] % parts or index.shape[0] % _parts():
    whole = PartitionSpec(PartitionSpec.UNCONSTRAINED, None)
    return jnp.take(_constrain(table, whole), index, axis=0).astype(dtype)
  return _exchanged(axes, dtype, table, index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchanged(axes, dtype, table, index):
  """`looked_up`, where `fsdp`, one of the axes, splits the table's columns."""

  def own_columns(table, index):
    index = jax.lax.all_gather(index, "fsdp", tiled=True)
    x = jnp.take(table, index, axis=0).astype(dtype)
    return jax.lax.all_to_all(x, "fsdp", 0, x.ndim - 1, tiled=True)

  columns, rows = PartitionSpec(None, "fsdp"), PartitionSpec(axes)
  return _by_hand(own_columns, axes, (columns, rows), rows)(table, index)


def _forward(axes, dtype, table, index):
  return _exchanged(axes, dtype, table, index), (table, index)


def _backward(axes, dtype, saved, slope):
  table, index = saved

  def added(slope, index):
    index = jax.lax.all_gather(index, "fsdp", tiled=True)
    slope = jax.lax.all_to_all(slope, "fsdp", slope.ndim - 1, 0, tiled=True)
    zeros = jnp.zeros((table.shape[0], slope.shape[-1]), jnp.float32)
    share = zeros.at[index].add(slope, mode="drop")
    return jax.lax.psum(share, tuple(a for a in axes if a != "fsdp"))

  columns, rows = PartitionSpec(None, "fsdp"), PartitionSpec(axes)
  gradient = _by_hand(added, axes, (rows, rows), columns)(slope, index)
  return gradient.astype(table.dtype), None


_exchanged.defvjp(_forward, _backward)


def _by_hand(f, axes, given, returned):
  """f of a device's own parts along the axes."""
  return jax.shard_map(
    f,
    axis_names=set(axes),
    in_specs=given,
    out_specs=returned,
    check_vma=False,
  )


def divides(batch: int, heads: int) -> bool:
  """Whether the mesh around this trace splits so many examples and heads."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
    return False
  return batch % _parts() == 0 and heads % mesh.shape.get("model", 1) == 0


def apart(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """f(q, k, v, segments), each device its own examples and heads.

  For kernels that the compiler cannot split: f of `[B, S, heads, d]` three
  times and `[B, S]` or None, which `divides` says the mesh divides.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return f
  rows = batch_axes(mesh)
  heads = "model" if "model" in mesh.axis_names else None
  whole = PartitionSpec(rows, None, heads, None)
  return jax.shard_map(
    f,
    in_specs=(whole, whole, whole, PartitionSpec(rows, None)),
    out_specs=whole,
    check_vma=False,
  )


def _constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
  return jax.lax.with_sharding_constraint(x, spec)


def _axes() -> tuple[str, ...]:
  """The axes around this trace that split examples and that the compiler has.

  Under `shard_map` an axis is the caller's own, and nothing is to be said.
  """
  mesh = jax.sharding.get_abstract_mesh()
  kinds, axes = dict(zip(mesh.axis_names, mesh.axis_types)), batch_axes(mesh)
  auto = all(kinds[axis] == AxisType.Auto for axis in axes)
  return axes if auto and _parts() > 1 else ()


def _parts() -> int:
  """How many parts the mesh around this trace splits the examples into."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))
