"""NNX, Linen and bare functions are one kind of Model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from kdjax.adapters import cast, from_linen, from_nnx, tap_specs
from kdjax.errors import UserError
from kdjax.types import Output

BATCH = {
  "image": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3),
  "mask": jnp.ones(4),
}


class NnxNet(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(3, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
    self.last = nnx.Linear(8, 5, rngs=rngs)

  def __call__(self, x):
    x = self.dropout(self.norm(self.first(x)))
    for block in self.blocks:
      x = nnx.relu(block(x))
    return self.last(x)


class LinenNet(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(8, name="first")(x)
    x = nn.BatchNorm(not train, momentum=0.9, name="norm")(x)
    x = nn.Dropout(0.5, deterministic=not train)(x)
    return nn.Dense(5, name="last")(x)


MODELS = {"nnx": from_nnx(NnxNet), "linen": from_linen(LinenNet())}


@pytest.mark.parametrize("name", MODELS)
def test_apply_is_pure_and_takes_its_randomness_from_the_key(name):
  model = MODELS[name]
  params, stats = model.init(jax.random.key(0), BATCH)
  apply = jax.jit(model.apply, static_argnames=("train", "taps"))

  def logits(train, seed=None):
    key = None if seed is None else jax.random.key(seed)
    return apply(params, stats, BATCH, train=train, key=key)[0].logits

  np.testing.assert_array_equal(logits(True, 1), logits(True, 1))
  assert not np.array_equal(logits(True, 1), logits(True, 2))
  np.testing.assert_array_equal(logits(False), logits(False, 3))


@pytest.mark.parametrize("name", MODELS)
def test_batch_statistics_move_in_training_only(name):
  model = MODELS[name]
  params, stats = model.init(jax.random.key(0), BATCH)
  apply = jax.jit(model.apply, static_argnames=("train", "taps"))
  first, new = apply(
    params, stats, BATCH, train=True, key=jax.random.key(1), taps=("first",)
  )
  same = apply(params, stats, BATCH, train=False)[1]
  jax.tree.map(np.testing.assert_array_equal, same, stats)
  mean = jax.tree.leaves(jax.tree.map(lambda x: x, new))[0]
  np.testing.assert_allclose(
    mean, 0.1 * first.taps["first"].mean(0), rtol=1e-5, atol=1e-6
  )
  assert jax.tree.structure(new) == jax.tree.structure(stats)


@pytest.mark.parametrize("name", MODELS)
def test_taps_are_the_activations_of_submodules_by_path(name):
  model = MODELS[name]
  params, stats = model.init(jax.random.key(0), BATCH)
  output, _ = model.apply(params, stats, BATCH, train=False, taps=("first",))
  first = params["first"]
  want = BATCH["image"] @ first["kernel"] + first["bias"][None]
  np.testing.assert_allclose(output.taps["first"], want, rtol=1e-5, atol=1e-6)
  assert set(output.taps) == {"first"}
  with pytest.raises(UserError, match="did you mean 'first'"):
    model.apply(params, stats, BATCH, train=False, taps=("firts",))


def test_a_linen_module_may_name_its_random_streams():
  class Paths(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      x = nn.Dense(5)(x)
      if not train:
        return x
      shape = (len(x), 1)
      first = jax.random.uniform(self.make_rng("drop_path"), shape)
      return x * first * jax.random.uniform(self.make_rng("dropout"), shape)

  model = from_linen(Paths())
  params, stats = model.init(jax.random.key(0), BATCH)

  def logits(seed):
    key = jax.random.key(seed)
    return model.apply(params, stats, BATCH, train=True, key=key)[0].logits

  np.testing.assert_array_equal(logits(1), logits(1))
  assert not np.array_equal(logits(1), logits(2))


def test_params_have_string_keys_all_the_way():
  params, _ = MODELS["nnx"].init(jax.random.key(0), BATCH)
  assert set(params["blocks"]) == {"0", "1"}


def test_a_module_that_exists_keeps_its_values():
  module = NnxNet(nnx.Rngs(3))
  params, _ = from_nnx(module).init(jax.random.key(0), BATCH)
  np.testing.assert_array_equal(
    params["last"]["kernel"], module.last.kernel[...]
  )


def test_state_that_would_be_lost_is_refused_by_name():
  class Counting(nnx.Module):
    def __init__(self, rngs):
      self.inner = nnx.Linear(3, 5, rngs=rngs)
      self.calls = nnx.Cache(jnp.zeros(()))

    def __call__(self, x):
      return self.inner(x)

  with pytest.raises(UserError, match="also holds calls"):
    from_nnx(Counting)
  kept = from_nnx(Counting, stats=(nnx.BatchStat, nnx.Cache))
  assert set(kept.init(jax.random.key(0), BATCH)[1]) == {"calls"}

  class Remembering(nn.Module):
    @nn.compact
    def __call__(self, x):
      self.variable("memory", "last", jnp.zeros, ())
      return nn.Dense(5)(x)

  with pytest.raises(UserError, match="collections memory"):
    from_linen(Remembering()).init(jax.random.key(0), BATCH)
  kept = from_linen(Remembering(), stats=("memory",))
  assert set(kept.init(jax.random.key(0), BATCH)[1]) == {"memory"}


def test_cast_changes_floating_arrays_alone():
  tree = {"a": jnp.ones(2), "n": jnp.arange(2), "k": jax.random.key(0)}
  got = cast(tree, jnp.bfloat16)
  assert got["a"].dtype == jnp.bfloat16
  assert got["n"].dtype == jnp.int32


class Tapped(nnx.Module):
  """A network that names taps of its own."""

  def __init__(self, rngs):
    self.first = nnx.Linear(3, 8, rngs=rngs)
    self.last = nnx.Linear(8, 5, rngs=rngs)

  def __call__(self, x):
    hidden = nnx.relu(self.first(x))
    return Output(self.last(hidden), {"hidden": hidden, "doubled": 2 * hidden})


SPECIFIED = {
  "own taps": (from_nnx(Tapped), {"hidden": (4, 8), "doubled": (4, 8)}),
  "nnx": (
    MODELS["nnx"],
    {
      "first": (4, 8),
      "norm": (4, 8),
      "dropout": (4, 8),
      "blocks/0": (4, 8),
      "blocks/1": (4, 8),
      "last": (4, 5),
    },
  ),
  "linen": (
    MODELS["linen"],
    {"first": (4, 8), "norm": (4, 8), "Dropout_0": (4, 8), "last": (4, 5)},
  ),
}


@pytest.mark.parametrize("name", SPECIFIED)
def test_tap_specs_are_the_taps_there_are_and_their_shapes(name):
  model, want = SPECIFIED[name]
  shapes = jax.eval_shape(model.init, jax.random.key(0), BATCH)
  specs = tap_specs(model, shapes, BATCH)
  assert {k: s.shape for k, s in specs.items()} == want
  assert all(isinstance(s, jax.ShapeDtypeStruct) for s in specs.values())
  # Each of them can be asked for, and is of that shape.
  for tap, shape in want.items():
    apply = functools.partial(model.apply, train=False, taps=(tap,))
    output, _ = jax.eval_shape(apply, *shapes, BATCH)
    assert {k: s.shape for k, s in output.taps.items()} == {tap: shape}


@pytest.mark.parametrize("name", SPECIFIED)
def test_a_tap_that_does_not_exist_lists_those_that_do(name):
  model, want = SPECIFIED[name]
  shapes = jax.eval_shape(model.init, jax.random.key(0), BATCH)
  apply = functools.partial(model.apply, train=False, taps=("absent",))
  with pytest.raises(UserError, match="unknown tap 'absent'") as told:
    jax.eval_shape(apply, *shapes, BATCH)
  for tap in want:
    assert tap in str(told.value)


def test_a_submodule_can_be_tapped_beside_a_networks_own_taps():
  model = SPECIFIED["own taps"][0]
  params, stats = model.init(jax.random.key(0), BATCH)
  output, _ = model.apply(
    params, stats, BATCH, train=False, taps=("first", "hidden")
  )
  np.testing.assert_array_equal(
    output.taps["hidden"], np.maximum(output.taps["first"], 0)
  )
  assert set(output.taps) == {"first", "hidden"}
