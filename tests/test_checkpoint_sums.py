"""The checksum of an array: its equation, and what may not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdjax.checkpoint import sums as module
from kdjax.checkpoint.sums import sums

WORD = 2**32


def murmur(x):
  x = (x ^ x >> 16) * 0x85EBCA6B % WORD
  x = (x ^ x >> 13) * 0xC2B2AE35 % WORD
  return x ^ x >> 16


def lowbias(x):
  x = (x ^ x >> 16) * 0x7FEB352D % WORD
  x = (x ^ x >> 15) * 0x846CA68B % WORD
  return x ^ x >> 16


def oracle(words):
  """The equation in Python's integers."""
  lanes = []
  for mix, seed in ((murmur, 0x243F6A88), (lowbias, 0xB7E15162)):
    total = 0
    for index, word in np.ndenumerate(words):
      at = mix(seed)
      for axis, i in enumerate(index):
        at += mix((seed + (axis + 1) * 0x9E3779B9 + i) % WORD)
      total += mix(int(word) ^ at % WORD)
    lanes.append(total % WORD)
  return "{:08x}{:08x}".format(*lanes)


def one(x):
  return sums({"x": x})["x"]


def by_compiler(x):
  """As accelerators do it."""
  return "{:08x}{:08x}".format(*np.asarray(module._of_array(jnp.asarray(x))))


def draw(shape, dtype):
  values = np.random.default_rng(0).normal(size=shape) * 9
  return np.asarray(values).astype(dtype)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 0), (2, 3, 4)])
def test_the_equation(shape):
  x = draw(shape, np.float32)
  assert one(x) == oracle(x.view(np.uint32)) == by_compiler(x)


@pytest.mark.parametrize(
  ("dtype", "words"),
  [
    ("bfloat16", np.uint16),
    ("float16", np.uint16),
    ("float8_e4m3fn", np.uint8),
    ("int8", np.uint8),
    ("uint8", np.uint8),
    ("bool", np.uint8),
    ("int32", np.uint32),
  ],
)
def test_the_bits_of_each_dtype(dtype, words):
  x = draw((4, 3), jnp.dtype(dtype))
  assert one(x) == one(jnp.asarray(x)) == oracle(x.view(words))
  assert by_compiler(x) == one(x)


@pytest.mark.parametrize(
  ("dtype", "number"),
  [("int64", 2), ("float64", 2), ("complex64", 2), ("complex128", 4)],
)
def test_an_element_of_several_words(dtype, number):
  x = draw((4, 3), dtype)
  assert one(x) == oracle(x.view(np.uint32).reshape(4, 3, number))
  with jax.enable_x64(True):
    assert one(jnp.asarray(x)) == one(x) == by_compiler(x)


def test_neither_pieces_nor_sharding_change_it(monkeypatch):
  x = draw((24, 40, 6), np.float32)
  monkeypatch.setattr(module, "_PIECE", 50)
  want = oracle(x.view(np.uint32))
  assert one(x) == want
  assert one(np.asfortranarray(x)) == want
  for sizes in ((8, 1), (2, 4), (1, 2)):
    mesh = jax.make_mesh(
      sizes,
      ("a", "b"),
      axis_types=(AxisType.Auto,) * 2,
      devices=jax.devices()[: sizes[0] * sizes[1]],
    )
    for spec in ((), ("a",), ("a", "b"), (None, ("a", "b")), (None, "b", None)):
      split = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
      assert one(split) == want
      if sizes == (2, 4):
        assert by_compiler(split) == want


def test_every_change_of_one_element_changes_both_lanes():
  x = draw((60,), np.float32)
  want = one(x)
  for n in range(60):
    for bit in range(32):
      y = x.copy()
      y.view(np.uint32)[n] ^= np.uint32(1 << bit)
      got = one(y)
      assert got[:8] != want[:8]
      assert got[8:] != want[8:]


def test_two_that_change_places_change_it():
  x = draw((8, 8), np.float32)
  found = {one(x), one(x[::-1]), one(x.T), one(x.reshape(64)), one(x[:, ::-1])}
  assert len(found) == 5
  for at in np.ndindex(8, 8):
    if at != (0, 0):
      y = x.copy()
      y[0, 0], y[at] = x[at], x[0, 0]
      found.add(one(y))
  assert len(found) == 5 + 63


def test_zeros_are_seen():
  """Bytes that were lost and came back as zeros, in whatever number."""
  found = {one(np.zeros(shape, np.float32)) for shape in (0, 1, 2, 3, (1, 1))}
  assert len(found) == 5


def test_arrays_of_different_devices_together():
  x = np.arange(6, dtype=np.float32)
  at = [jax.device_put(x, d) for d in jax.devices()[:2]]
  found = sums({"a": at[0], "b": at[1], "c": x, "d": jnp.asarray(x), "e": 3.0})
  assert list(found) == list("abcde")
  assert len({found[name] for name in "abcd"}) == 1
