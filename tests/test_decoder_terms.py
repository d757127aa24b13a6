"""A config's terms on the taps of two decoders, over packed rows."""

import functools

import jax
import numpy as np
import optax
import pytest

from kdjax import adapters, config, parallel
from kdjax.models.decoder import decoder
from kdjax.train_step import init_state, jit_step, make_train_step

B, S, CLASSES = 4, 6, 11
RNG = np.random.default_rng(0)
SEGMENTS = np.array(
  [[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0], [1] * 6, [1, 2, 2, 2, 2, 3]]
)
BATCH = {
  "tokens": RNG.integers(0, CLASSES, (B, S)),
  "label": RNG.integers(0, CLASSES, (B, S)),
  "mask": np.float32((SEGMENTS > 0) & (RNG.random((B, S)) < 0.8)),
  "segment_ids": SEGMENTS,
}


def network(depth, width, heads):
  return decoder(
    dict(
      model_type="llama",
      vocab_size=CLASSES,
      hidden_size=width,
      intermediate_size=16,
      num_hidden_layers=depth,
      num_attention_heads=heads,
      num_key_value_heads=2,
      max_position_embeddings=16,
    )
  )


STUDENT, TEACHER = network(2, 8, 2), network(4, 24, 4)
FROZEN = jax.jit(TEACHER.init)(jax.random.key(1), BATCH)
FROZEN = jax.tree.map(lambda x: 6 * np.asarray(x), FROZEN)
BLOCKS = dict(student="block_*", teacher="block_*", map="evenly", weight=1.0)
SETTINGS = dict(
  alpha=0.5,
  hard_weight=None,
  soft_weight=None,
  temperature=2.0,
  hard=dict(name="cross_entropy"),
  soft=dict(name="kl"),
  terms=dict(
    hint=dict(name="hint", projector=dict(name="linear")) | BLOCKS,
    relation=dict(name="self_relations", num_relation_heads=4) | BLOCKS,
    attention=dict(name="attention_maps")
    | BLOCKS
    | dict(student="attention_2", teacher="attention_*", map="last"),
    similar=dict(name="similarity_preserving", group_size=S)
    | BLOCKS
    | dict(student="final", teacher="final"),
  ),
)
ADAM = optax.adam(2e-2)


@functools.cache
def specs():
  variables = jax.eval_shape(STUDENT.init, jax.random.key(0), BATCH)
  return (
    adapters.tap_specs(STUDENT, variables, BATCH),
    adapters.tap_specs(TEACHER, FROZEN, BATCH),
  )


@functools.cache
def goal():
  return config.goal(SETTINGS, *specs())


def test_patterns_and_maps_choose_among_the_taps_of_a_decoder():
  ours, theirs = specs()
  assert ours["block_2"].shape == (B, S, 8)
  assert ours["attention_1"].shape == (B, 2, S, S)
  assert theirs["keys_4"].shape == (B, 2, S, 6)
  names = {t.name: t.taps for t in goal().terms[2:]}
  assert names == {
    "attention": ("attention_2", "attention_4"),
    "hint/block_1": ("block_1", "block_2"),
    "hint/block_2": ("block_2", "block_4"),
    **{
      f"relation/block_{n}": tuple(
        tuple(f"{kind}_{layer}" for kind in ("queries", "keys", "values"))
        for layer in (n, 2 * n)
      )
      for n in (1, 2)
    },
    "similar": ("final", "final"),
  }


@functools.cache
def trained(devices, steps, microbatches=1):
  mesh = parallel.make_mesh(devices)
  args = STUDENT, TEACHER, goal(), ADAM
  state = jax.jit(lambda key: init_state(*args, key, BATCH, frozen=FROZEN))(
    jax.random.key(0)
  )
  start = jax.device_get(state.term_params)
  step = jit_step(make_train_step(*args, microbatches=microbatches), mesh)
  state, frozen = parallel.put(state, mesh), parallel.put(FROZEN, mesh)
  seen = []
  for _ in range(steps):
    state, metrics = step(state, frozen, parallel.put_batch(BATCH, mesh))
    seen.append(jax.device_get(metrics))
  return start, seen


def taps(model, variables, *names):
  run = jax.jit(functools.partial(model.apply, train=False, taps=names))
  output, _ = run(*variables, BATCH)
  return [np.float64(output.taps[name]) for name in names]


@pytest.mark.slow
def test_terms_are_those_of_the_tokens_that_count():
  start, seen = trained(1, 8)
  key = jax.random.split(jax.random.key(0), 3)[0]
  variables = jax.jit(STUDENT.init)(key, BATCH)
  keep = BATCH["mask"] > 0
  ours, q = taps(STUDENT, variables, "block_1", "attention_2")
  theirs, p = taps(TEACHER, FROZEN, "block_2", "attention_4")
  layer = start["hint/block_1"]["projector"]["0"]["layer_0"]
  ours = ours @ np.float64(layer["kernel"]) + layer["bias"]
  want = np.mean((ours - theirs)[keep] ** 2)
  np.testing.assert_allclose(seen[0]["loss/hint/block_1"], want, rtol=1e-4)
  q, p = (np.swapaxes(x, 1, 2)[keep].mean(1) for x in (q, p))
  seen_keys = p > 0
  ratio = np.log(np.where(seen_keys, p, 1)) - np.log(np.where(seen_keys, q, 1))
  want = np.mean(np.sum(p * ratio, -1))
  np.testing.assert_allclose(seen[0]["loss/attention"], want, rtol=1e-4)


@pytest.mark.slow
def test_every_term_is_learned_from():
  _, seen = trained(1, 8)
  for name in ("hint/block_2", "relation/block_1", "attention", "similar"):
    first, last = (float(m[f"loss/{name}"]) for m in (seen[0], seen[-1]))
    assert 0 < last < 0.9 * first, name
  assert "kl_at_1" in seen[0]


def test_devices_and_microbatches_change_nothing():
  """Groups of one row each, so that the coupled term agrees as well."""
  one, other = trained(1, 8)[1][0], trained(2, 1, microbatches=2)[1][0]
  for name in one:
    np.testing.assert_allclose(other[name], one[name], rtol=1e-4, err_msg=name)
