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
  if not axes or x.shape[0] % math.prod(_sizes()[a] for a in axes):
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
  parts = math.prod(_sizes().get(axis, 1) for axis in BATCH_AXES)
  return batch % parts == 0 and heads % _sizes().get("model", 1) == 0


def apart(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """f(q, k, v, segments), each device its own examples and heads.

  For kernels that the compiler cannot split: f of `[B, S, heads, d]` three
  times and `[B, S]` or None, which `divides` says the mesh divides.
  """
  sizes = _sizes()
  if not sizes:
    return f
  rows = tuple(axis for axis in BATCH_AXES if axis in sizes)
  heads = "model" if "model" in sizes else None
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
  kinds = dict(zip(mesh.axis_names, mesh.axis_types))
  axes = tuple(a for a in BATCH_AXES if a in kinds)
  auto = all(kinds[a] == AxisType.Auto for a in axes)
  return axes if auto and any(_sizes()[a] > 1 for a in axes) else ()


def _sizes() -> dict[str, int]:
  return dict(jax.sharding.get_abstract_mesh().shape)
