"""Checksums of arrays, made where the arrays are, whatever their sharding.

The sum of an array of n axes whose element at (i_1, ..., i_n) has the bits b(i)
is, in 32-bit arithmetic that wraps around,

    sum = sum over i of  m( b(i) xor h(i) )
    h(i) = m(seed) + sum over k of  m( seed + k * 0x9E3779B9 + i_k )

m is a bijection of 32 bits: a change of one element always changes the sum, and
two that change places change it with probability 1 - 2^-32. Two lanes, with two
m and two seeds, make 64 bits. An addition that wraps around does not care for
the order: the sum depends neither on the mesh nor on the number of processes,
and nobody reads more than the part he holds.

m: MurmurHash3's `fmix32` (Appleby), and `lowbias32` (Wellons, 2018).
"""

import concurrent.futures
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt32

from kdjax import processes

# (shift, factor, shift, factor, shift), seed
_LANES = (
  ((16, 0x85EBCA6B, 13, 0xC2B2AE35, 16), 0x243F6A88),
  ((16, 0x7FEB352D, 15, 0x846CA68B, 16), 0xB7E15162),
)
_AXIS = 0x9E3779B9
_PIECE = 1 << 16  # elements; what is made of them stays in a core's cache
_Start = tuple[int, ...]


def sums(arrays: Mapping[str, Any]) -> dict[str, str]:
  """Name -> 16 hex digits: the bits of an array, at their indices.

  Dtype and shape are no part of it. An element of 64 bits counts as two of 32
  along one more axis, the lower first; a complex one as its two parts. All
  processes must call it together, with their parts of the same arrays.

  Args:
    arrays: JAX arrays, over any devices of any processes, or NumPy arrays and
      numbers, which are the same in each process.
  """
  on_host, on_devices, in_parts = {}, {}, set()
  for name, leaf in arrays.items():
    if not isinstance(leaf, jax.Array):
      on_host[name] = [((), np.asarray(leaf))]
    elif next(iter(leaf.sharding.device_set)).platform == "cpu":
      on_host[name] = _parts(leaf)
      if not _is_whole(leaf):
        in_parts.add(name)
    else:
      on_devices[name] = _of_array(leaf)  # of all before any is waited for
  found = _of_parts(on_host)
  if in_parts and jax.process_count() > 1:
    own = {name: found[name].tolist() for name in in_parts}
    everyones = processes.gather(own)
    for name in in_parts:
      lanes = np.asarray([theirs[name] for theirs in everyones], np.uint32)
      found[name] = np.asarray(lanes.sum(0, np.uint32))
  found |= jax.device_get(on_devices)
  return {name: f"{found[name][0]:08x}{found[name][1]:08x}" for name in arrays}


# On accelerators, by the compiler: one fused reduction a device, whose operand
# is never written out. Compiled once for a shape, dtype and sharding.


@jax.jit
def _of_array(x: Array) -> UInt32[Array, " lanes"]:
  words = _words(x)

  def lane(mixer: tuple[int, ...], seed: int) -> Array:
    at = jnp.full(words.shape, _mix(jnp.uint32(seed), mixer))
    for axis, size in enumerate(words.shape):
      table = _mix(lax.iota(np.uint32, size) + _base(seed, axis), mixer)
      at += lax.broadcast_in_dim(table, words.shape, (axis,))
    return jnp.sum(_mix(words ^ at, mixer), dtype=jnp.uint32)

  return jnp.stack([lane(*one) for one in _LANES])


def _words(x: Array) -> UInt32[Array, "..."]:
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    words = _words(jnp.stack([x.real, x.imag], -1))
    return words.reshape(*x.shape, words.size // max(x.size, 1))
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  return lax.bitcast_convert_type(x, word).astype(jnp.uint32)


# On CPUs XLA would write the operand out twice, and compile for a quarter of a
# second an array; NumPy reads the buffers as they are.


def _is_whole(x: jax.Array) -> bool:
  return x.is_fully_addressable or x.is_fully_replicated


def _parts(x: jax.Array) -> list[tuple[_Start, np.ndarray]]:
  """Where this process's parts begin, and what they hold: each part once."""
  shards = x.addressable_shards
  if x.is_fully_replicated:
    shards = shards[:1]  # each process looks at a copy of its own
  else:
    shards = [shard for shard in shards if shard.replica_id == 0]
  return [
    (tuple(s.start or 0 for s in shard.index), np.asarray(shard.data))
    for shard in shards
  ]


def _of_parts(
  arrays: Mapping[str, list[tuple[_Start, np.ndarray]]],
) -> dict[str, np.ndarray]:
  pieces = [
    (name, piece)
    for name, parts in arrays.items()
    for start, part in parts
    for piece in _pieces(start or (0,) * part.ndim, part)
  ]
  found = {name: np.zeros(2, np.uint32) for name in arrays}
  with concurrent.futures.ThreadPoolExecutor() as pool:  # NumPy frees the GIL
    each = pool.map(_of_piece, *zip(*(piece for _, piece in pieces)))
    for (name, _), lanes in zip(pieces, each):
      found[name] += lanes
  return found


def _pieces(
  start: _Start, part: np.ndarray
) -> Iterator[tuple[_Start, np.ndarray]]:
  """Views that are small, and where they begin."""
  if part.size <= _PIECE:
    if part.size:
      yield start, part
    return
  axis = next(k for k, size in enumerate(part.shape) if size > 1)
  half = part.shape[axis] // 2
  low, high = np.split(part, [half], axis)
  yield from _pieces(start, low)
  moved = (*start[:axis], start[axis] + half, *start[axis + 1 :])
  yield from _pieces(moved, high)


def _of_piece(start: _Start, piece: np.ndarray) -> np.ndarray:
  piece = np.ascontiguousarray(piece).reshape(piece.shape)
  word = {1: np.uint8, 2: np.uint16}.get(piece.itemsize, np.uint32)
  words = piece.reshape(*piece.shape, 1).view(word)
  if words.shape[-1] == 1 and piece.ndim:
    words = words[..., 0]  # a number by itself keeps an axis: to NumPy it is
  elif words.shape[-1] > 1:  # no array, and warns where it wraps around
    start = (*start, 0)

  def lane(mixer: tuple[int, ...], seed: int) -> np.ndarray:
    at = _mix(np.full((1,) * words.ndim, seed, np.uint32), mixer)
    for axis, (first, size) in enumerate(zip(start, words.shape)):
      base = _base(seed, axis, first)
      table = _mix(np.arange(size, dtype=np.uint32) + base, mixer)
      at = at + table.reshape(-1, *(1,) * (words.ndim - axis - 1))
    return _mix(words ^ at, mixer).sum(dtype=np.uint32)

  return np.stack([lane(*one) for one in _LANES])


def _base(seed: int, axis: int, start: int = 0) -> np.uint32:
  return np.uint32((seed + (axis + 1) * _AXIS + start) & 0xFFFFFFFF)


def _mix(x: Any, mixer: tuple[int, ...]) -> Any:
  """A bijection of 32 bits; an array of NumPy is overwritten."""
  a, first, b, second, c = mixer
  x ^= x >> a
  x *= np.uint32(first)
  x ^= x >> b
  x *= np.uint32(second)
  x ^= x >> c
  return x
