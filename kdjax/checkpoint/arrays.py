"""Arrays by name: the form in which a checkpoint holds a tree.

The name of an array is its path ("params/dense/kernel"). A typed PRNG key is
held as its integers and the name of its generator. An array may be spread over
the devices of several processes: each writes and reads its own part.
"""

import contextlib
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from kdjax.checkpoint import loops
from kdjax.checkpoint.sums import sums
from kdjax.errors import UserError


def fingerprint(tree: PyTree) -> str:
  """128-bit BLAKE2b, in hex, of a tree's names, dtypes, shapes and `sums`.

  It depends neither on the order of insertion nor on the sharding. With arrays
  over several processes, all of them must call it.
  """
  digest = hashlib.blake2b(digest_size=16)
  leaves = named(tree)
  found = sums({name: _data(leaf) for name, leaf in leaves.items()})
  for name, leaf in sorted(leaves.items()):
    shape = tuple(_data_shape(leaf))
    digest.update(f"{name} {_dtype(leaf)} {shape} {found[name]}\n".encode())
  return digest.hexdigest()


def named(tree: PyTree) -> dict[str, Any]:
  """Leaves by path, in the tree's order."""
  flat = jax.tree_util.tree_leaves_with_path(tree)
  named = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in flat
  }
  if len(named) < len(flat):
    raise UserError(
      f"{len(flat)} arrays share {len(named)} names: no two paths may read "
      'alike, as ["a/b"] and ["a"]["b"] do; rename one'
    )
  return named


def mismatches(
  records: Mapping[str, Any], wanted: Mapping[str, Any]
) -> list[str]:
  """Every name that is missing, surplus, or of another shape or dtype."""

  def told(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"

  got = {n: told(r["dtype"], r["shape"]) for n, r in records.items()}
  needed = {n: told(_dtype(x), _data_shape(x)) for n, x in wanted.items()}
  return [
    *(f"missing {n} {needed[n]}" for n in needed if n not in got),
    *(f"surplus {n} {got[n]}" for n in got if n not in needed),
    *(
      f"{n} is {got[n]}, needs to be {needed[n]}"
      for n in needed
      if n in got and got[n] != needed[n]
    ),
  ]


def to_save(
  state: PyTree,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
  """The arrays by name, and for each what must be recorded of it.

  The state may be donated as soon as Orbax has taken them.
  """
  leaves = named(state)
  arrays = _owned({name: _data(leaf) for name, leaf in leaves.items()})
  records = {
    name: {
      "dtype": _dtype(leaves[name]),
      "shape": list(arrays[name].shape),
      "stored": str(arrays[name].dtype),
      "sum": checksum,
    }
    for name, checksum in sums(arrays).items()
  }
  for name, leaf in leaves.items():
    if _is_key(leaf):
      records[name]["impl"] = str(jax.random.key_impl(leaf))
  # Orbax refuses an array without elements; its record says all there is.
  return {name: a for name, a in arrays.items() if a.size}, records


def read(
  path: epath.Path,
  records: Mapping[str, Any],
  wanted: Mapping[str, Any],
) -> dict[str, Any]:
  """The recorded arrays from an Orbax folder, where those wanted lie.

  It neither waits for other processes nor checks what was read, see `damaged`.
  """
  arrays = {
    name: np.zeros(record["shape"], jnp.dtype(record["stored"]))
    for name, record in records.items()
    if 0 in record["shape"]
  }
  stored = {name: 0 for name in records if name not in arrays}
  targets = {
    name: ocp.ArrayRestoreArgs(
      sharding=wanted[name].sharding,
      global_shape=tuple(records[name]["shape"]),
    )
    if _is_placed(wanted[name])
    else ocp.RestoreArgs(restore_type=np.ndarray)
    for name in stored
  }
  # Not by Orbax's Checkpointer: it waits for all processes after a read, and so
  # for ever where one of them failed.
  handler = ocp.PyTreeCheckpointHandler()
  loops.see_to_the_end()
  with contextlib.closing(handler):
    arrays |= handler.restore(
      path,
      args=ocp.args.PyTreeRestore(
        stored, restore_args=targets, partial_restore=True
      ),
    )
  return _owned(arrays)


def damaged(arrays: Mapping[str, Any], records: Mapping[str, Any]) -> list[str]:
  """The names of what is not as it was saved. All processes must call it."""
  found = sums(arrays)
  return [
    name
    for name, array in arrays.items()
    if found[name] != records[name]["sum"]
    or str(array.dtype) != records[name]["stored"]
  ]


def place(value: Any, like: Any, record: Mapping[str, Any]) -> Any:
  """What was read as `like` is: a key or numbers, where it lay."""
  if not isinstance(like, jax.Array | jax.ShapeDtypeStruct):
    return value
  sharding = like.sharding if _is_placed(like) else None
  if _is_key(like):
    wrap = functools.partial(jax.random.wrap_key_data, impl=record["impl"])
    value = jax.jit(wrap, out_shardings=sharding)(value)
  if isinstance(value, np.ndarray) or sharding is None:
    return jax.device_put(value, sharding)
  return value


def _owned(arrays: Mapping[str, Any]) -> dict[str, Any]:
  """The same in memory that nothing else uses, where that is not plain.

  What NumPy and Orbax see of an array on a CPU, and the copies of one array
  that Orbax has read for several, may be one buffer, which a step that takes
  the state in donation would write into.
  """
  on_cpu = {
    name: x
    for name, x in arrays.items()
    if isinstance(x, jax.Array) and _platform(x) == "cpu"
  }
  shardings = {name: x.sharding for name, x in on_cpu.items()}
  return {
    **{
      n: x if isinstance(x, jax.Array) else np.array(x)
      for n, x in arrays.items()
    },
    **jax.device_put(on_cpu, shardings, may_alias=False),
  }


def _platform(x: jax.Array) -> str:
  return next(iter(x.sharding.device_set)).platform


def _is_placed(like: Any) -> bool:
  """Whether it is bound to devices.

  An uncommitted array must stay so: committed to one device it could not meet
  those that span several.
  """
  return (
    isinstance(like, jax.Array | jax.ShapeDtypeStruct)
    and like.sharding is not None
    and getattr(like, "committed", True)
  )


def _is_key(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jnp.issubdtype(
    leaf.dtype, jax.dtypes.prng_key
  )


def _data(leaf: Any) -> Any:
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _data_shape(leaf: Any) -> tuple[int, ...]:
  if _is_key(leaf):
    return jax.eval_shape(jax.random.key_data, leaf).shape
  return np.shape(leaf)


def _dtype(leaf: Any) -> str:
  return str(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype)
