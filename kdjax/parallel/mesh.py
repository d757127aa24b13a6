"""Devices as a mesh of three axes, and a batch split over it.

data     examples are split; parameters are not
fsdp     examples are split, and parameters and their optimizer state too:
         each is gathered where it is used and let go of
model    parameters are split, and the work on them: every device of a row
         along it has the same examples
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from kdjax import errors, pins
from kdjax.types import once_options

AXES = ("data", "fsdp", "model")


def make_mesh(
  num_devices: int | None = None,
  *,
  data: int = -1,
  fsdp: int = 1,
  model: int = 1,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """All devices (or the first `num_devices`) as `data` × `fsdp` × `model`.

  Where they lie in several slices of a pod, whose links are slow, the slices
  divide the axis `data`, and the two other axes stay within one.

  Args:
    num_devices: how many of the devices; default, all.
    data, fsdp, model: how many along each axis; one of them may be -1: what the
      others leave.
    devices: default, `jax.devices()`.

  Raises:
    UserError: the axes do not multiply to the devices.
  """
  devices = list(devices or jax.devices())[:num_devices]
  shape = _filled({"data": data, "fsdp": fsdp, "model": model}, len(devices))
  # `jax.make_mesh` makes Explicit axes, under which code that does not name
  # shardings is refused; the compiler shall place what lies between.
  types = (AxisType.Auto,) * len(AXES)
  slices = len(set(slice_of(devices)))
  if slices == 1:
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
  if shape[0] % slices:
    raise errors.UserError(
      f"mesh.data is {shape[0]} over {slices} slices, must be a multiple of "
      "them: fsdp and model stay within a slice; set mesh.data=-1 and make "
      f"fsdp x model divide {len(devices) // slices}"
    )
  within = (shape[0] // slices, *shape[1:])
  laid = mesh_utils.create_hybrid_device_mesh(
    within, (slices, 1, 1), devices, allow_split_physical_axes=True
  )
  return Mesh(laid, AXES, axis_types=types)


def slice_of(devices: Iterable[Any]) -> list[int]:
  """The slice of a pod that each device is in; 0 where there is one."""
  return [getattr(device, "slice_index", 0) for device in devices]


def _filled(axes: dict[str, int], count: int) -> tuple[int, ...]:
  """The sizes, where -1 stands for what the others leave."""
  told = ", ".join(f"{name}={size}" for name, size in axes.items())
  free = [name for name, size in axes.items() if size == -1]
  fixed = math.prod(size for size in axes.values() if size != -1)
  if len(free) > 1 or any(s < 1 and s != -1 for s in axes.values()):
    raise errors.UserError(
      f"the mesh is {told}: sizes must be at least 1, one of them may be -1"
    )
  if count % fixed or (not free and fixed != count):
    raise errors.UserError(
      f"the mesh is {told}, which makes {fixed}{' x n' if free else ''} "
      f"devices, and there are {count}: make them multiply to {count}, or set "
      "one to -1"
    )
  return tuple(count // fixed if s == -1 else s for s in axes.values())


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
  """The axes of the mesh that split a batch."""
  axes = pins.batch_axes(mesh)
  if not axes:
    raise errors.UserError(
      f"the mesh has the axes {', '.join(mesh.axis_names)}, needs "
      f"{' or '.join(pins.BATCH_AXES)} to split a batch over: see make_mesh"
    )
  return axes


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Examples split over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def batch_parts(mesh: Mesh) -> int:
  """How many parts a batch is split into."""
  return math.prod(mesh.shape[a] for a in batch_axes(mesh))


def data_share(mesh: Mesh) -> tuple[int, int]:
  """`(n, of)`: this process reads the n-th of so many equal blocks of rows.

  Processes along `model` read the same. Hence a batch, and what is learned from
  it, does not depend on how many processes there are.
  """
  parts = batch_parts(mesh)
  mine = batch_sharding(mesh).addressable_devices_indices_map((parts,))
  spans = [index[0].indices(parts) for index in mine.values() if index]
  rows = sorted({row for span in spans for row in range(*span)})
  count, first = len(rows), rows[0]
  if rows != list(range(first, first + count)) or first % count:
    raise errors.UserError(
      f"process {jax.process_index()} holds the parts {rows} of {parts} of a "
      "batch, which are no block: order the devices of the mesh by process"
    )
  return first // count, parts // count


def put_batch(batch: Any, mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows of a batch -> the global batch, split over the mesh."""
  sharding = batch_sharding(mesh)
  if jax.process_count() == 1:
    # One call for all arrays: half of the host's time.
    whole = {name: np.asarray(rows) for name, rows in batch.items()}
    return jax.device_put(whole, sharding)
  return {
    name: jax.make_array_from_process_local_data(sharding, np.asarray(rows))
    for name, rows in batch.items()
  }


def put(tree: PyTree, mesh: Mesh) -> PyTree:
  """`tree` on every device of the mesh."""
  return place(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def place(tree: PyTree, shardings: PyTree) -> PyTree:
  """`tree`, each array as its sharding says.

  What lies on this host is taken apart here: nothing is sent or compared, all
  processes must hold the same.
  """

  def one(x: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and x.sharding == sharding:
      return x
    if not getattr(x, "is_fully_addressable", True):
      return _moved(sharding)(x)
    if sharding.is_fully_addressable:
      return jax.device_put(x, sharding)
    if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
      return _moved(sharding)(x)  # NumPy has no keys
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])

  return jax.tree.map(one, tree, shardings)


@functools.cache  # compiled once for a shape, however many arrays have it
def _moved(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
  """An array of several processes, as the sharding says."""
  return jax.jit(lambda x: x, out_shardings=sharding)


def on_host(tree: PyTree) -> PyTree:
  """Whole NumPy arrays of what may lie on the devices of several processes."""

  def one(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      x = _moved(replicated(x.sharding.mesh))(x)  # type: ignore
    return np.asarray(x)

  return jax.tree.map(one, tree)


def create(make: Callable[..., PyTree], shardings: PyTree, *args: Any) -> Any:
  """`make(*args)`, each array made where its sharding says, whole nowhere.

  Arrays that `make` has closed over are arguments of the program, not constants
  in it. On CPU nothing is optimised that runs only once.
  """
  jaxpr, shapes = jax.make_jaxpr(make, return_shape=True)(*args)
  structure = jax.tree.structure(shapes)

  def run(constants: Any, args: Any) -> PyTree:
    closed = jax.extend.core.ClosedJaxpr(jaxpr.jaxpr, constants)
    leaves = jax.extend.core.jaxpr_as_fun(closed)(*jax.tree.leaves(args))
    return jax.tree.unflatten(structure, leaves)

  made = jax.jit(run, out_shardings=shardings, compiler_options=once_options())
  return made(jaxpr.consts, args)


def check_batch_size(
  batch_size: int, mesh: Mesh, *, microbatches: int = 1
) -> None:
  """Refuses a batch that devices and microbatches do not divide.

  Raises:
    UserError: with the nearest sizes that they do divide.
  """
  devices = batch_parts(mesh)
  parts = devices * microbatches
  if batch_size < 1 or batch_size % parts:
    below = batch_size // parts * parts
    sizes = f"{below} or {below + parts}" if below > 0 else f"{parts}"
    raise errors.UserError(
      f"batch_size is {batch_size}, must be divisible by {parts} "
      f"({devices} devices x {microbatches} microbatches): use {sizes}"
    )
