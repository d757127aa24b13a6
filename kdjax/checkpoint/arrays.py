"""Arrays by name: the form in which a checkpoint holds a tree.

The name of an array is its path ("params/dense/kernel"). A typed PRNG key is
held as its integers and the name of its generator.
"""

import asyncio
import concurrent.futures
import contextlib
import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from kdjax.errors import UserError


def fingerprint(tree: PyTree) -> str:
  """128-bit BLAKE2b, in hex, of a tree's names, dtypes, shapes and bytes.

  It depends neither on the order of insertion nor on the sharding.
  """
  digest = hashlib.blake2b(digest_size=16)
  for name, leaf in sorted(named(tree).items()):
    array = np.asarray(_data(leaf))
    digest.update(f"{name} {_dtype(leaf)} {array.shape}\n".encode())
    digest.update(_bytes(array))
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


def to_host(
  state: PyTree,
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
  """Copies of the arrays by name, and for each what must be recorded of it."""
  leaves = named(state)
  data = {name: _data(leaf) for name, leaf in leaves.items()}
  for leaf in data.values():
    if isinstance(leaf, jax.Array):
      leaf.copy_to_host_async()
  # On CPU `asarray` would be a view into buffers about to be donated.
  arrays = {name: np.array(leaf) for name, leaf in data.items()}
  # An array sharded over processes will need one checksum for each shard, under
  # the shard's index; here every array is whole.
  records = {
    name: {
      "dtype": _dtype(leaves[name]),
      "shape": list(array.shape),
      "stored": str(array.dtype),
      "crc32": crc32,
    }
    for (name, array), crc32 in zip(arrays.items(), _checksums(arrays.values()))
  }
  for name, leaf in leaves.items():
    if _is_key(leaf):
      records[name]["impl"] = str(jax.random.key_impl(leaf))
  # Orbax refuses an array without elements; its record says all there is.
  return {name: a for name, a in arrays.items() if a.size}, records


def place(value: np.ndarray, like: Any, record: Mapping[str, Any]) -> Any:
  """The value as `like` is: a key or numbers, where it lay."""
  if not isinstance(like, jax.Array | jax.ShapeDtypeStruct):
    return value
  array = value
  if _is_key(like):
    array = jax.random.wrap_key_data(jnp.asarray(value), impl=record["impl"])
  # An uncommitted array stays so: committed to one device it could not meet
  # those that span several.
  committed = getattr(like, "committed", True)
  return jax.device_put(array, like.sharding if committed else None)


def read(path: epath.Path, records: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The recorded arrays from an Orbax folder; raises if any is damaged."""
  empty = {
    name: np.zeros(record["shape"], jnp.dtype(record["stored"]))
    for name, record in records.items()
    if 0 in record["shape"]
  }
  stored = {name: 0 for name in records if name not in empty}
  to_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
  with (
    _patient_loops(),
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader,
  ):
    values = reader.restore(
      path,
      args=ocp.args.PyTreeRestore(
        stored,
        restore_args=jax.tree.map(lambda _: to_numpy, stored),
        partial_restore=True,
      ),
    )
  bad = [
    name
    for name, crc32 in zip(values, _checksums(values.values()))
    if crc32 != records[name]["crc32"]
  ]
  if bad:
    raise ValueError(f"checksum differs: {', '.join(bad)}")
  return {**values, **empty}


class _PatientLoop(asyncio.SelectorEventLoop):
  def close(self) -> None:
    if rest := asyncio.all_tasks(self):
      self.run_until_complete(asyncio.gather(*rest, return_exceptions=True))
    super().close()


class _PatientLoops(asyncio.DefaultEventLoopPolicy):
  def new_event_loop(self) -> asyncio.AbstractEventLoop:
    return _PatientLoop()


@contextlib.contextmanager
def _patient_loops() -> Iterator[None]:
  """Event loops that see every task to its end before they close.

  Orbax reads all arrays at once and closes its loop when one fails; each of the
  others would then print a traceback.
  """
  policy = asyncio.get_event_loop_policy()
  asyncio.set_event_loop_policy(_PatientLoops())
  try:
    yield
  finally:
    asyncio.set_event_loop_policy(policy)


def _checksums(arrays: Iterable[np.ndarray]) -> list[int]:
  """CRC-32 of each array's dtype, shape and bytes."""

  def checksum(array: np.ndarray) -> int:
    head = f"{array.dtype} {array.shape}".encode()
    return zlib.crc32(_bytes(array), zlib.crc32(head))

  with concurrent.futures.ThreadPoolExecutor() as pool:  # crc32 frees the GIL
    return list(pool.map(checksum, arrays))


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


def _bytes(array: np.ndarray) -> memoryview:
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
