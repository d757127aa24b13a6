"""Devices: one mesh, the batch split over it, the rest on every device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from kdjax import errors

DATA_AXIS = "data"


def make_mesh(num_devices: int | None = None) -> Mesh:
  """All devices (or the first `num_devices`) along one axis, `data`."""
  devices = jax.devices()[:num_devices]
  # `jax.make_mesh` makes Explicit axes, under which code that does not name
  # shardings is refused; the compiler shall place what lies between.
  return jax.make_mesh(
    (len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices
  )


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Examples split over the data axis."""
  return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def put(tree: PyTree, mesh: Mesh) -> PyTree:
  """`tree` on every device of the mesh."""
  return place(tree, replicated(mesh))


def place(tree: PyTree, shardings: PyTree) -> PyTree:
  """`tree`, which every process holds whole, as its shardings say."""
  if all(s.is_fully_addressable for s in jax.tree.leaves(shardings)):
    return jax.device_put(tree, shardings)
  # What is committed to one device would not be taken for everyone's.
  host = jax.tree.map(lambda x: x if _is_key(x) else np.asarray(x), tree)
  return jax.jit(lambda x: x, out_shardings=shardings)(host)


def _is_key(x: Any) -> bool:
  return isinstance(x, jax.Array) and jnp.issubdtype(
    x.dtype, jax.dtypes.prng_key
  )


def put_batch(batch: Any, mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows of a batch -> the global batch, split over the mesh."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, np.asarray(rows))
    for name, rows in batch.items()
  }


def check_batch_size(
  batch_size: int, mesh: Mesh, *, microbatches: int = 1
) -> None:
  """Refuses a batch that devices and microbatches do not divide.

  Raises:
    UserError: with the nearest sizes that they do divide.
  """
  parts = mesh.size * microbatches
  if batch_size < 1 or batch_size % parts:
    below = batch_size // parts * parts
    sizes = f"{below} or {below + parts}" if below > 0 else f"{parts}"
    raise errors.UserError(
      f"batch_size is {batch_size}, must be divisible by {parts} "
      f"({mesh.size} devices x {microbatches} microbatches): use {sizes}"
    )


# For code written with `jax.pmap`: a leading axis of devices on everything.


def pmap_replicate(tree: PyTree, num_devices: int | None = None) -> PyTree:
  """A copy of `tree` for each device, along a new leading axis."""
  mesh = make_mesh(num_devices)
  copies = jax.tree.map(
    lambda x: jnp.broadcast_to(x, (mesh.size, *jnp.shape(x))), tree
  )
  return jax.device_put(copies, batch_sharding(mesh))


def pmap_split(batch: Any, num_devices: int | None = None) -> PyTree:
  """`[B, ...]` -> `[devices, B / devices, ...]`."""
  n = num_devices or jax.local_device_count()
  return jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch)


def pmap_first(tree: PyTree) -> PyTree:
  """One device's copy of what `pmap_replicate` made."""
  return jax.tree.map(lambda x: x[0], tree)
