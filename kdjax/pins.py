"""Where activations lie, said where the compiler would otherwise have to guess.

The axes `data` and `fsdp` of a mesh split the examples; `fsdp` splits the
parameters besides. So either may be moved where the two meet, and by itself the
compiler now and then moves the examples. Without a mesh around the trace, on
one device or under `jax.pmap`, these functions return what they get.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
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


def gathered(w: jax.Array) -> jax.Array:
  """A table of rows, `[V, D]`, whole along D on every device that reads it."""
  if not _axes():
    return w
  return _constrain(w, PartitionSpec(PartitionSpec.UNCONSTRAINED, None))


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
