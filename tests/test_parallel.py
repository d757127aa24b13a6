"""Meshes, rules, and a step whose state is split over them."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import adapters, models, parallel, pins
from kdjax.errors import UserError
from kdjax.losses import fused
from kdjax.models.decoder import PARTITION, decoder
from kdjax.objective import hinton
from kdjax.parallel.partition import spec
from kdjax.train_step import (
  create_state,
  init_state,
  jit_step,
  make_train_step,
)


@pytest.mark.parametrize(
  ("axes", "shape"),
  [
    ({}, (8, 1, 1)),
    ({"fsdp": 4}, (2, 4, 1)),
    ({"data": 1, "fsdp": -1}, (1, 8, 1)),
    ({"data": 2, "fsdp": 2, "model": 2}, (2, 2, 2)),
    ({"num_devices": 2}, (2, 1, 1)),
  ],
)
def test_axes_multiply_to_the_devices(axes, shape):
  mesh = parallel.make_mesh(**axes)
  assert tuple(mesh.shape.values()) == shape
  assert mesh.axis_names == ("data", "fsdp", "model")


@pytest.mark.parametrize(
  ("axes", "told"),
  [
    (
      {"fsdp": 3},
      r"fsdp=3, model=1, which makes 3 x n .* there are 8",
    ),
    ({"data": 2, "fsdp": 2}, r"makes 4 devices, and there are 8"),
    ({"data": -1, "fsdp": -1}, r"one of them may be -1"),
    ({"fsdp": 0}, r"fsdp=0.*must be at least 1"),
    ({"model": -2}, r"model=-2.*must be at least 1"),
  ],
)
def test_axes_that_do_not_are_refused(axes, told):
  with pytest.raises(UserError, match=told):
    parallel.make_mesh(**axes)


class Chip:
  """A device of one of several slices of 2 x 2, as TPU pods have them."""

  platform, device_kind, process_index = "tpu", "TPU v5 lite", 0
  core_on_chip = 0

  def __init__(self, n, slices):
    self.id, self.slice_index = n, n // (8 // slices)
    self.coords = (n % 2, n // 2 % 2, 0)

  def __repr__(self):
    return f"chip {self.id}"


def test_slices_divide_the_data_axis_alone():
  chips = [Chip(n, slices=2) for n in range(8)]
  mesh = parallel.make_mesh(fsdp=2, model=2, devices=chips)
  assert tuple(mesh.shape.values()) == (2, 2, 2)
  for n, rest in enumerate(mesh.devices):
    assert {chip.slice_index for chip in rest.flat} == {n}
  with pytest.raises(UserError, match=r"data is 1 over 2 slices.*divide 4"):
    parallel.make_mesh(fsdp=8, devices=chips)


MESH = functools.cache(lambda: parallel.make_mesh(data=2, fsdp=2, model=2))


@pytest.mark.parametrize(
  ("name", "shape", "want"),
  [
    ("layers/query/kernel", (3, 64, 32), P(None, "fsdp", "model")),
    ("opt/0/mu/layers/query/kernel", (3, 64, 32), P(None, "fsdp", "model")),
    ("layers/query/kernel", (3, 64, 31), P(None, "fsdp", None)),
    ("layers/down/kernel", (3, 64, 32), P(None, ("model", "fsdp"), None)),
    # As many axes as the rule has: the factors of a moment have not.
    ("layers/query/kernel", (3, 640), P(None, "fsdp")),
    ("layers/query/kernel", (640, 4), P("fsdp")),
    ("embed/kernel", (100, 64), P("model", "fsdp")),
    # No rule: the widest axis that fsdp divides.
    ("conv/kernel", (3, 3, 64, 128), P(None, None, None, "fsdp")),
    ("conv/kernel", (3, 3, 128, 63), P(None, None, "fsdp")),
    ("conv/kernel", (33, 33), P()),
    ("norm/scale", (64,), P()),  # small
  ],
)
def test_the_first_rule_that_fits_counts(name, shape, want):
  assert spec(name, shape, MESH(), PARTITION) == want


@pytest.mark.parametrize(
  ("rule", "told"),
  [
    (("kernel$",), r"key has .*needs \(pattern, axes\)"),
    (("(", ("data",)), r"key: '\(' is no regular expression"),
    (("kernel$", ("modle",)), r"axis of the mesh in key 'modle'.*'model'"),
    (("kernel$", ("fsdp", ("data", "fsdp"))), r"names an axis twice"),
  ],
)
def test_what_is_no_rule_is_refused(rule, told):
  with pytest.raises(UserError, match=told):
    parallel.check_rules([rule], MESH(), "key")


def test_examples_are_pinned_to_what_splits_the_batch():
  def lies(rows, over):
    def run(x):
      with pins.inside(over):
        return pins.by_example(x + 1)

    x = parallel.put(np.ones((rows, 3)), MESH())
    return jax.jit(run)(x).sharding.spec

  assert lies(8, MESH()) == P(("data", "fsdp"))
  # Neither without a mesh around the trace nor where its axes do not divide.
  assert lies(8, None) == lies(6, MESH()) == P()


def test_a_kernel_is_called_apart_where_the_mesh_divides_rows_and_heads():
  with pins.inside(MESH()):
    assert pins.divides(8, 2)
    assert not pins.divides(6, 2)
    assert not pins.divides(8, 3)
  assert not pins.divides(8, 2)


def lookup(table, tokens, dtype, over=None):
  """Rows of the table, and the gradient of some numbers' sum with them."""
  shape = (*tokens.shape, table.shape[1])
  weights = np.random.default_rng(1).normal(size=shape)

  def total(table):
    x = pins.looked_up(table, tokens, dtype)
    return jnp.sum(x.astype(jnp.float32) * weights), x

  with pins.inside(over):
    return jax.grad(total, has_aux=True)(table)


@pytest.mark.parametrize("axes", [(1, 8, 1), (2, 2, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_looked_up_without_the_table(axes, dtype):
  """97 rows divide by nothing; some tokens are none, some from the end."""
  mesh = parallel.make_mesh(**dict(zip(parallel.AXES, axes)))
  rng, over = np.random.default_rng(0), parallel.batch_sharding(mesh)
  table = jnp.asarray(rng.normal(size=(97, 64)), dtype)
  tokens = jnp.asarray(rng.integers(-3, 100, (16, 8)))
  tokens = tokens.at[:, 5:].set(0)  # padding: one row for many
  split = NamedSharding(mesh, P(None, "fsdp"))
  given = jax.device_put(table, split), jax.device_put(tokens, over)
  run = jax.jit(functools.partial(lookup, dtype=dtype, over=mesh))
  compiled = run.lower(*given).compile()
  gradient, x = compiled(*given)
  wanted, rows = lookup(table, tokens, dtype)
  assert x.dtype == dtype
  assert x.sharding.is_equivalent_to(over, 3)
  assert gradient.sharding.is_equivalent_to(split, 2)
  np.testing.assert_array_equal(np.float32(x), np.float32(rows))
  # Rows that many tokens share are sums in another order.
  close = dict(rtol=1e-6, atol=1e-6) if dtype == "float32" else dict(atol=0.25)
  np.testing.assert_allclose(np.float32(gradient), np.float32(wanted), **close)
  for shapes, kind in COLLECTIVE.findall(compiled.as_text()):
    whole = any(97 in s and 64 in s for s in sizes(shapes))
    assert not whole, (kind, shapes)


def test_a_table_that_fsdp_does_not_divide_is_looked_up_all_the_same():
  mesh = parallel.make_mesh(fsdp=8)
  table, tokens = jnp.arange(33.0 * 3).reshape(33, 3), jnp.arange(16) % 5
  tokens = tokens.reshape(8, 2)
  for rows in (8, 4):  # as do so few examples
    got = jax.jit(functools.partial(lookup, dtype=None, over=mesh))(
      table, tokens[:rows]
    )
    jax.tree.map(
      np.testing.assert_array_equal, got, lookup(table, tokens[:rows], None)
    )


def test_created_arrays_are_split_and_what_they_close_over_is_no_constant():
  given = jax.device_put(np.arange(64.0).reshape(8, 8))

  def make(key):
    return {"a": jax.random.normal(key, (64, 32)), "b": given + 1}

  key, mesh = jax.random.key(0), parallel.make_mesh(fsdp=8)
  split = parallel.shardings(jax.eval_shape(make, key), mesh)
  got = parallel.create(make, split, key)
  assert {s.data.shape for s in got["a"].addressable_shards} == {(8, 32)}
  jax.tree.map(np.testing.assert_array_equal, got, make(key))


def test_state_is_created_as_the_step_leaves_it():
  student, batch = networks.bare(width=512), networks.batch()
  given = (student, None, hinton(alpha=1.0).terms[:1], optax.adam(1e-3))
  mesh = parallel.make_mesh(data=2, fsdp=4)
  state, split = create_state(*given, 3, batch, mesh=mesh)
  wanted = init_state(*given, jax.random.key(3), batch)
  for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(wanted)):
    if not jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
      np.testing.assert_allclose(got, want, rtol=1e-6)
  moments = state.opt_state[0].mu["student"]
  assert moments["first"].sharding.spec == P(None, "fsdp")
  jax.tree.map(lambda x, s: _same(x.sharding, s), state, split)


def _same(a, b):
  assert a == b


def llama(width, depth, classes=96):
  return dict(
    model_type="llama",
    vocab_size=classes,
    hidden_size=width,
    intermediate_size=3 * width,
    num_hidden_layers=depth,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
    tie_word_embeddings=True,
  )


def language():
  """Two decoders and a batch of 16 rows of 32 tokens."""
  rng = np.random.default_rng(0)
  draw = lambda: rng.integers(0, 96, (16, 32)).astype(np.int32)  # noqa: E731
  batch = {
    "tokens": draw(),
    "label": draw(),
    "mask": np.float32(rng.random((16, 32)) > 0.3),
  }
  nets = (
    decoder(llama(64, 3), head="linear"),
    decoder(llama(96, 2), head="linear"),
  )
  return *nets, PARTITION, batch


def vocabulary():
  """Two decoders whose tables are nearly all of them, of a size that is odd."""
  *_, rules, batch = language()
  batch = {name: rows[:, :8] for name, rows in batch.items()}
  nets = (decoder(llama(d, 1, classes=8001), head="linear") for d in (128, 192))
  return *nets, rules, batch


def patches():
  """Two vision transformers and a batch of 32 images of 4 x 4 patches."""

  def net(**sizes):
    shared = dict(num_classes=10, image_size=8, patch=2, heads=4)
    return adapters.from_nnx(
      lambda rngs: models.vit("tiny", **shared, **sizes, rngs=rngs)
    )

  rng = np.random.default_rng(0)
  image = rng.normal(size=(32, 8, 8, 3)).astype(np.float32)
  batch = networks.batch(32, image=image)
  rules = models.PARTITIONS["vit"]
  return net(depth=3, width=64), net(depth=2, width=96), rules, batch


def images():
  """A bare network under a wider one; nothing in them knows of meshes."""
  return networks.bare(512), networks.bare(1024), (), networks.batch(32)


@functools.cache
def on(make, axes):
  """The compiled step over a mesh, and its arguments, to be used up once."""
  student, teacher, rules, batch = make()
  mesh = parallel.make_mesh(math.prod(axes), **dict(zip(parallel.AXES, axes)))
  frozen = teacher.init(jax.random.key(1), batch)
  frozen = parallel.place(frozen, parallel.shardings(frozen, mesh, rules))
  student = parallel.gathered(student, mesh, rules)
  teacher = parallel.gathered(teacher, mesh, rules)
  given = student, teacher, hinton(alpha=0.3, temperature=2.0), optax.adam(1e-2)
  state, split = create_state(
    *given, 0, batch, mesh=mesh, rules=rules, frozen=frozen
  )
  step = make_train_step(*given, layout=fused.over(mesh))
  rows = parallel.put_batch(batch, mesh)
  compiled = jit_step(step, mesh, split).lower(state, frozen, rows).compile()
  return compiled, (state, frozen, rows)


def two_steps(compiled, arguments):
  state, frozen, rows = arguments
  for _ in range(2):
    state, metrics = compiled(state, frozen, rows)
  return jax.device_get((state.params, metrics))


ONE, FSDP = (1, 1, 1), (1, 8, 1)


@functools.cache
def result_of_one(make):
  return two_steps(*on(make, ONE))


@pytest.mark.parametrize(
  "make", [language, images, pytest.param(patches, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
  "axes", [pytest.param(FSDP, marks=pytest.mark.slow), (2, 2, 2)]
)
def test_any_mesh_makes_the_same_steps(make, axes):
  got, want = two_steps(*on(make, axes)), result_of_one(make)
  # Adam divides by the root of a gradient's square: where that is near 0, what
  # float32 rounds in another order is of the size of the update, 1e-2. From a
  # vision transformer's small first weights one in thousands is that near.
  near = 1e-3 if make is patches else 0
  for g, w in zip(jax.tree.leaves(got[0]), jax.tree.leaves(want[0])):
    assert np.mean(np.abs(g - w) > 2e-4) <= near
  for name, value in want[1].items():
    np.testing.assert_allclose(got[1][name], value, rtol=2e-5, atol=1e-6)


COLLECTIVE = re.compile(
  r" = (.*?) (all-gather|all-to-all|collective-permute|all-reduce)"
  r"(?:-start)?\("
)


def sizes(shapes):
  """Of each array of a collective: its dimensions."""
  return [
    tuple(int(n) for n in dims.split(",") if n)
    for dims in re.findall(r"[a-z]\w*\[([\d,]*)\]", shapes)
  ]


def without_ones(shape):
  return tuple(n for n in shape if n > 1)


@pytest.mark.parametrize("make", [language, images, patches])
def test_parameters_travel_layer_by_layer_and_the_batch_stays(make):
  """Of a step over fsdp alone: no activation, no logits, no whole tree."""
  compiled, arguments = on(make, FSDP)
  trees = [x.params if hasattr(x, "params") else x for x in arguments[:2]]
  # Of what is scanned a layer's own, not all layers', as it is or turned.
  arrays = set()
  for path, x in jax.tree_util.tree_leaves_with_path(trees):
    scanned = re.search("layers|blocks", jax.tree_util.keystr(path))
    arrays.add(without_ones(x.shape[1:] if scanned else x.shape))
  arrays |= {shape[::-1] for shape in arrays}
  gathers = 0
  for shapes, kind in COLLECTIVE.findall(compiled.as_text()):
    if kind == "all-reduce":  # gradients, and sums over the batch
      rows = {(16,), (512,)} if make is language else {(32,)}
      assert not any(s[:1] in rows for s in sizes(shapes)), shapes
      continue
    if kind == "all-to-all":  # embeddings: own columns for own examples
      assert make is language
      assert set(sizes(shapes)) <= {(2, 32, 64 // 8), (2, 32, 96 // 8)}, shapes
      continue
    if shapes.startswith("s32[16,32]"):  # the tokens that are looked up
      assert make is language
      continue
    assert kind == "all-gather", (kind, shapes)
    (shape,) = sizes(shapes)
    assert without_ones(shape) in arrays, shape
    gathers += 1
  assert gathers >= 4


def test_fsdp_divides_what_a_device_holds():
  one, eight = (on(language, n)[0].memory_analysis() for n in (ONE, FSDP))
  arguments_of = lambda m: m.argument_size_in_bytes  # noqa: E731
  assert arguments_of(eight) <= (1 / 8 + 0.02) * arguments_of(one)


@pytest.mark.slow
def test_no_device_has_a_whole_table_of_the_vocabulary():
  """Neither embeddings nor head, of student or teacher, nor a gradient."""
  compiled, arguments = on(vocabulary, FSDP)
  for dims in re.findall(r"f32\[([\d,]+)\]", compiled.as_text()):
    rows, *rest = (int(n) for n in dims.split(","))
    assert rows < 8001 or rest not in ([128], [192]), dims
  of_one, of_eight = (
    each.memory_analysis().temp_size_in_bytes
    for each in (on(vocabulary, ONE)[0], compiled)
  )
  table = 4 * 8001 * 192
  assert of_eight <= 1.1 * (of_one / 8 + table)
  got, want = two_steps(compiled, arguments), result_of_one(vocabulary)
  for g, w in zip(jax.tree.leaves(got[0]), jax.tree.leaves(want[0])):
    assert np.mean(np.abs(g - w)) <= 1e-5  # of updates of 1e-2
  assert got[1]["loss/total"] == pytest.approx(want[1]["loss/total"], rel=2e-5)


def test_table_says_what_lies_where_and_what_is_on_every_device():
  mesh = parallel.make_mesh(data=2, fsdp=4)
  tree = {
    "wide": np.zeros((64, 32), np.float32),
    "also": np.zeros((64, 32), np.float32),
    "odd": np.zeros((33, 33), np.float32),
    "small": np.zeros(3, np.float32),
  }
  tree = parallel.place(tree, parallel.shardings(tree, mesh))
  lines = parallel.table(tree).splitlines()
  assert lines[1].split() == ["4,356", *["every", "device", "has", "all"]] + [
    "float32[33,33]",
    "odd",
  ]
  assert lines[2].split() == [
    "4,096",
    "fsdp",
    "·",
    "float32[64,32]",
    *["also", "and", "1", "more"],
  ]
  told = parallel.unsplit(tree)
  assert re.search(r"^1 arrays of 0\.0 MiB lie whole .*: odd$", told)
  assert parallel.unsplit(parallel.put(tree, parallel.make_mesh())) == ""


def test_one_process_reads_all_rows():
  assert parallel.data_share(MESH()) == (0, 1)
