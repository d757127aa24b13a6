"""For code written with `jax.pmap`: a leading axis of devices on everything."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from kdjax.parallel.mesh import batch_sharding, make_mesh


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
