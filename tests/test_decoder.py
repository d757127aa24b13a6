"""The decoder against what transformers computed, and against itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_decoders import NAMES, assert_close, golden

from kdjax import parallel, pins
from kdjax.errors import UserError
from kdjax.models.decoder import attention, decoder, network
from kdjax.models.decoder.block import linear
from kdjax.types import LinearLogits


@functools.cache
def compiled(net, taps=(), **options):
  model = decoder(net, **options)
  return jax.jit(
    lambda params, batch: model.apply(
      params, {}, batch, train=False, taps=taps
    )[0]
  )


def logits(net, params, batch, **options):
  return np.asarray(compiled(net, **options)(params, batch).logits)


# Variants of a field or of the rotation, whose numbers test_decoder_config has.
VARIANTS = (
  "gpt2_scaled",
  "llama",
  "llama_biases",
  "llama_dynamic",
  "llama_linear",
  "llama_yarn",
  "llama_yarn_scaled",
  "qwen3_biases",
)


def slow_if(condition):
  return [pytest.mark.slow] if condition else []


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=slow_if(n in VARIANTS)) for n in NAMES]
)
def test_equals_transformers(name):
  stored = golden(name)
  taps = tuple(stored.taps)
  output = compiled(stored.net, taps)(stored.params, {"tokens": stored.tokens})
  assert set(output.taps) == set(taps)
  for tap in taps:
    assert_close(output.taps[tap], stored.taps[tap], tap)
  assert_close(output.logits, stored.logits, "logits")


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(n, marks=slow_if(n != "gpt2"))
    for n in ("gpt2", "mistral", "gemma3")
  ],
)
def test_packed_documents_are_as_if_apart(name):
  net, params, tokens = (getattr(golden(name), f) for f in _NET)
  whole = golden(name).logits
  # One row holds both rows' first tokens, and padding; 9 is longer than a
  # window, and the second begins inside one of the first.
  first, second = tokens[0, :9], tokens[1, :6]
  packed = np.concatenate([first, second, [0, 0]])[None]
  segments = np.array([[1] * 9 + [2] * 6 + [0] * 2])
  batch = {"tokens": packed, "segment_ids": segments}
  apart = logits(net, params, batch)
  assert_close(apart[0, :9], whole[0, :9], "first")
  assert_close(apart[0, 9:15], whole[1, :6], "second")
  assert np.isfinite(apart).all()
  if name != "gpt2":
    return  # the rotations of others only know differences of positions
  positions = np.array([[*range(9), *range(6), 0, 1]])
  given = logits(net, params, {**batch, "positions": positions})
  assert_close(given, apart, "positions")


_NET = ("net", "params", "tokens")


def test_a_token_changes_what_its_window_sees_and_no_more():
  stored = golden("mistral")
  one_layer = {**stored.config, "num_hidden_layers": 1}
  model = decoder(one_layer)
  params = {
    **stored.params,
    "layers": jax.tree.map(lambda x: x[:1], stored.params["layers"]),
  }
  tokens = stored.tokens[:1]
  other = tokens.copy()
  other[0, 4] = (other[0, 4] + 1) % 61
  run = jax.jit(lambda t: model.apply(params, {}, {"tokens": t}, train=False))
  changed = np.abs(run(tokens)[0].logits - run(other)[0].logits).max((0, 2)) > 0
  # Token 4 and the four after it: the window of 5 has the query in it.
  np.testing.assert_array_equal(np.flatnonzero(changed), range(4, 9))


@pytest.mark.slow
def test_taps_are_those_of_the_layers_that_were_asked():
  net, params, tokens = (getattr(golden("qwen3"), f) for f in _NET)
  batch = {"tokens": tokens}
  every = compiled(net, ("*",))(params, batch).taps
  asked = ("keys_3", "block_1", "attention_2", "block_3", "queries_1")
  some = compiled(net, asked)(params, batch).taps
  assert set(some) == set(asked)
  for name in asked:
    assert_close(some[name], every[name], name, 1e-6)


def test_attention_is_of_the_queries_and_keys_that_are_tapped():
  net, params, tokens = (getattr(golden("qwen3"), f) for f in _NET)
  taps = compiled(net, ("*",))(params, {"tokens": tokens}).taps
  assert len(taps) == 2 + 5 * 3
  assert taps["values_1"].shape == (2, 2, 17, 10)  # heads before tokens
  q, k = taps["queries_2"], np.repeat(taps["keys_2"], 2, axis=1)
  scores = np.einsum("bhqd,bhkd->bhqk", q, k) * 10**-0.5
  scores = np.where(np.tri(17, dtype=bool), scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  assert_close(weights, taps["attention_2"])
  sums = np.sum(taps["attention_1"], -1)
  np.testing.assert_allclose(sums, np.ones_like(sums), rtol=1e-6)


def abstract(net):
  model = decoder(net)
  return jax.eval_shape(model.init, jax.random.key(0), {})[0]


def program(net, taps=(), **options):
  model = decoder(net, **options)
  loss = lambda p, b: model.apply(  # noqa: E731
    p, {}, b, train=True, taps=taps
  )[0].logits.sum()
  batch = {"tokens": jax.ShapeDtypeStruct((1, 8), jnp.int32)}
  return jax.jit(jax.grad(loss)).lower(abstract(net), batch).as_text()


def test_the_program_does_not_grow_with_the_depth():
  config = {**golden("gemma3").config, "layer_types": None}
  texts = [program({**config, "num_hidden_layers": n}) for n in (3, 12)]
  shallow, deep = (text.count("\n") for text in texts)
  assert deep == shallow


def test_a_kernels_gradient_is_a_product_over_one_axis():
  # Over rows and tokens apart, a CPU copies an operand transposed first.
  x, w = jnp.ones((2, 3, 4)), {"kernel": jnp.ones((4, 5))}
  gradient = jax.grad(lambda w: linear(x, w).sum())
  made = str(jax.make_jaxpr(gradient)(w))
  assert "dimension_numbers=(([0], [0])" in made


@pytest.mark.slow
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, 2.0)])
def test_the_kernel_for_tpus_is_the_equation(segmented, window, softcap):
  """Values and gradients, the kernel interpreted."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(2, 128, h, 8)) for h in (4, 2, 2))
  q, k, v = (x.astype(np.float32) for x in (q, k, v))
  segments = np.sort(rng.integers(0, 4, (2, 128))) if segmented else None
  slots = np.arange(128)

  def kernel(q, k, v):
    return attention.splash(
      q, k, v, segments, window, scale=0.3, softcap=softcap, interpret=True
    )

  def equation(q, k, v):
    seen = attention.visible(slots, slots, window, segments, segments)
    return attention.dense(q, k, v, seen, scale=0.3, softcap=softcap)[0]

  for ours, theirs in zip(jax.vjp(kernel, q, k, v), jax.vjp(equation, q, k, v)):
    ours, theirs = (x(q) if callable(x) else (x,) for x in (ours, theirs))
    for a, b in zip(ours, theirs):
      assert_close(a, b)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(
  ("window", "softcap"), [(None, None), (5, 2.0), (1, None), (40, None)]
)
def test_attention_by_blocks_is_the_equation(
  monkeypatch, segmented, window, softcap
):
  """Values and gradients in float64; 3 blocks, of 8, 8 and 5 queries."""
  monkeypatch.setattr(attention, "BLOCK", 8)
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(2, 21, h, 4)) for h in (4, 2, 2))
  segments = np.sort(rng.integers(0, 4, (2, 21))) if segmented else None
  slots, how = np.arange(21), dict(scale=0.3, softcap=softcap)

  def blocks(q, k, v):
    return attention.by_blocks(q, k, v, segments, window, **how)

  def equation(q, k, v):
    seen = attention.visible(slots, slots, window, segments, segments)
    return attention.dense(q, k, v, seen, **how)[0]

  with jax.enable_x64(True):
    (y, back), (want, want_back) = (
      jax.vjp(f, q, k, v) for f in (blocks, equation)
    )
    # The scores are float32 in both.
    for a, b in zip((y, *back(y)), (want, *want_back(want))):
      assert a.dtype == np.float64
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_attention_by_blocks_never_makes_the_square():
  """Of 8 blocks 36 of 64 squares; where two suffice for a window, 15."""
  shape = jax.ShapeDtypeStruct((1, 1024, 1, 8), jnp.float32)

  def flops(attend):
    made = jax.jit(attend).lower(shape, shape, shape)
    return made.cost_analysis()["flops"]

  def equation(window, q, k, v):
    slots = jnp.arange(1024)
    seen = attention.visible(slots, slots, window, None, None)
    return attention.dense(q, k, v, seen, scale=1.0)

  for window, share in ((None, 36 / 64), (129, 15 / 64)):
    blocks = functools.partial(
      attention.by_blocks, segments=None, window=window, scale=1.0
    )
    whole = functools.partial(equation, window)
    assert flops(blocks) == pytest.approx(share * flops(whole), rel=0.01)


def test_a_kernel_gets_each_layers_window(monkeypatch):
  """The kernels themselves need their devices: one that stands in."""
  stored = golden("gemma3")
  seen = []

  def stand_in(q, k, v, segments, window, *, scale, softcap):
    seen.append(window)
    slots = jnp.arange(q.shape[1])
    mask = attention.visible(slots, slots, window, segments, segments)
    return attention.dense(q, k, v, mask, scale=scale, softcap=softcap)[0]

  monkeypatch.setattr(attention, "splash", stand_in)
  monkeypatch.setattr(attention, "kernel", lambda *_, **__: "splash")
  model = decoder(stored.net)
  output, _ = jax.jit(
    lambda t: model.apply(stored.params, {}, {"tokens": t}, train=False)
  )(stored.tokens)
  assert_close(output.logits, stored.logits)
  assert set(seen) == {4, None}


def test_the_kernel_sees_each_devices_own_examples_and_heads(monkeypatch):
  """Interpreted, over a mesh: the equation's values and gradients."""
  monkeypatch.setattr(
    attention, "splash", functools.partial(attention.splash, interpret=True)
  )
  seen = []

  def chosen(*_, alone):
    seen.append(alone)
    return "splash" if alone else None

  monkeypatch.setattr(attention, "kernel", chosen)
  model = decoder(
    dict(
      model_type="llama",
      vocab_size=32,
      hidden_size=16,
      intermediate_size=16,
      num_hidden_layers=1,
      num_attention_heads=4,
      num_key_value_heads=2,
      max_position_embeddings=128,
    )
  )
  rng = np.random.default_rng(0)
  batch = {
    "tokens": rng.integers(0, 32, (4, 128)),
    "segment_ids": np.sort(rng.integers(1, 4, (4, 128))),
  }
  params, _ = model.init(jax.random.key(0), {})

  def loss(params, over):
    with pins.inside(over):
      output, _ = model.apply(params, {}, batch, train=True)
    return jnp.sum(jnp.sin(output.logits))

  mesh = parallel.make_mesh(data=2, fsdp=2, model=2)
  run = lambda over: jax.jit(  # noqa: E731
    jax.value_and_grad(functools.partial(loss, over=over))
  )
  everywhere = parallel.put(params, mesh)
  jax.tree.map(assert_close, run(mesh)(everywhere), run(None)(params))
  assert seen[0]
  assert not seen[-1]
  assert "shard_map" in str(jax.make_jaxpr(run(mesh))(params))


def test_a_tap_that_is_not_asked_for_is_not_kept():
  net = golden("llama").net
  forward = lambda taps: jax.jit(  # noqa: E731
    lambda p, b: decoder(net).apply(p, {}, b, train=False, taps=taps)[0]
  )
  batch = {"tokens": jnp.zeros((2, 17), jnp.int32)}
  texts = {
    taps: forward(taps).lower(abstract(net), batch).as_text()
    for taps in ((), ("block_2",), ("block_1", "block_3"))
  }
  buffer = "tensor<{}x2x17x24xf32>"
  assert "3x2x17x24x" not in texts[()]
  assert buffer.format(1) in texts[("block_2",)]
  assert buffer.format(2) in texts[("block_1", "block_3")]
  assert buffer.format(3) not in texts[("block_1", "block_3")]


@pytest.mark.parametrize(
  "remat", ["block", pytest.param("dots", marks=pytest.mark.slow)]
)
def test_rematerialisation_computes_the_block_again(remat):
  net = golden("qwen2").net
  kept, again = (
    program(net, remat=r).count("dot_general") for r in ("none", remat)
  )
  assert again > kept


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["block", "dots"])
def test_rematerialisation_changes_no_value(remat):
  net, params, tokens = (getattr(golden("qwen2"), f) for f in _NET)

  def gradient(remat):
    model = decoder(net, remat=remat)
    batch = {"tokens": tokens}

    def loss(params):
      output, _ = model.apply(params, {}, batch, train=True, taps=("block_2",))
      return jnp.sum(output.logits**2) + jnp.sum(output.taps["block_2"] ** 2)

    return jax.jit(jax.value_and_grad(loss))(params)

  ours, theirs = (jax.tree.leaves(gradient(r)) for r in (remat, "none"))
  for a, b in zip(ours, theirs):
    assert_close(a, b, relative=1e-5)  # sums in another order


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "llama_3"])
def test_bfloat16_is_float32_within_its_digits(name):
  """2.5e-2 of the root mean square: every weight is rounded to 2^-9 of itself,
  every sum of 24 or 37 products to as much, in three layers and a head.
  """
  stored = golden(name)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), stored.params)
  batch = {"tokens": stored.tokens}
  output = compiled(stored.net, ("final",), dtype=jnp.bfloat16)(half, batch)
  assert output.logits.dtype == jnp.float32
  assert output.taps["final"].dtype == jnp.bfloat16
  error = np.square(output.logits - stored.logits).mean() ** 0.5
  assert error < 2.5e-2 * np.square(stored.logits).mean() ** 0.5


@pytest.mark.parametrize(
  "name", ["gemma2", pytest.param("gpt2_scaled", marks=pytest.mark.slow)]
)
def test_the_linear_head_multiplies_out_to_the_dense_one(name):
  stored = golden(name)
  batch = {"tokens": stored.tokens}
  output = compiled(stored.net, head="linear")(stored.params, batch)
  head = output.logits
  assert isinstance(head, LinearLogits)
  z = np.einsum("bsd,vd->bsv", head.hidden, head.kernel)
  if head.softcap:
    z = head.softcap * np.tanh(z / head.softcap)
  assert_close(z, stored.logits)


def test_classes_that_the_tokenizer_lacks_are_left_out():
  stored = golden("gemma2")
  batch = {"tokens": stored.tokens}
  dense = logits(stored.net, stored.params, batch, num_classes=50)
  assert_close(dense[..., :50], stored.logits[..., :50])
  assert np.isneginf(dense[..., 50:]).all()
  head = compiled(stored.net, head="linear", num_classes=50)
  linear = head(stored.params, batch).logits
  assert linear.kernel.shape == (61, 24)
  assert linear.vocabulary == 50


def with_key(config, params, tokens, train):
  model = decoder(config)

  def apply(params, key):
    batch = {"tokens": tokens}
    return model.apply(params, {}, batch, train=train, key=key)[0].logits

  return lambda key: jax.jit(apply)(params, jax.random.key(key))


def test_dropout_is_drawn_from_the_key_in_training_alone():
  stored = golden("gpt2")
  assert stored.config["resid_pdrop"] == 0.1
  arguments = stored.config, stored.params, stored.tokens
  run = with_key(*arguments, train=True)
  dropped = run(0)
  assert np.abs(dropped - stored.logits).max() > 0.1
  np.testing.assert_array_equal(run(0), dropped)
  assert np.abs(run(1) - dropped).max() > 0.1
  assert_close(with_key(*arguments, train=False)(0), stored.logits)


@pytest.mark.slow
@pytest.mark.parametrize("field", ["embd_pdrop", "resid_pdrop", "attn_pdrop"])
def test_each_dropout_is_its_own(field):
  stored = golden("gpt2")
  none = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
  twice = np.tile(stored.tokens[:1], (2, 1))

  def run(rate):
    config = {**stored.config, **none, field: rate}
    return with_key(config, stored.params, twice, train=True)(0)

  assert_close(run(0.0)[:1], stored.logits[:1])
  first, second = run(0.2)
  assert np.abs(first - second).max() > 0.01


def test_what_dropout_keeps_is_divided_by_its_share():
  key, ones = jax.random.key(0), np.ones((1, 50, 40), np.float32)
  kept = network.dropout(key)(ones, 0.25, 0)
  one = np.ones((1, 1, 2000, 1), np.float32)  # a head each, of one token
  attended, p = attention.dense(
    one, one, one, np.ones((1, 1, 1), bool), scale=1.0, dropout=(0.25, key)
  )
  assert (np.asarray(p) == 1).all()
  for found in (kept, attended):
    values, counts = np.unique(found, return_counts=True)
    np.testing.assert_allclose(values, [0, 4 / 3], rtol=1e-6)
    # Five deviations of 2000 draws.
    assert abs(counts[0] - 500) < 5 * np.sqrt(2000 * 0.25 * 0.75)


@pytest.mark.parametrize(
  "name", ["gemma2", pytest.param("gpt2", marks=pytest.mark.slow)]
)
def test_weights_are_drawn_as_the_config_says(name):
  net = golden(name).net
  model = decoder(net, param_dtype=jnp.bfloat16)
  params, stats = jax.jit(model.init)(jax.random.key(0), {})
  assert stats == {}
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
  assert jax.tree.structure(params) == jax.tree.structure(golden(name).params)
  kernel = np.asarray(params["layers"]["up"]["kernel"], np.float32)
  np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.05)
  down = np.asarray(params["layers"]["down"]["kernel"], np.float32)
  np.testing.assert_allclose(down.std(), 0.02 / 6**0.5, rtol=0.05)
  scale = np.asarray(params["norm"]["scale"], np.float32)
  assert (scale == (0 if name == "gemma2" else 1)).all()


def test_mistakes_are_told_in_a_line():
  net = golden("llama").net
  tokens = {"tokens": jnp.zeros((1, 41), jnp.int32)}
  shapes = abstract(net)
  with pytest.raises(UserError, match="41 tokens, the model's context 40: cut"):
    jax.eval_shape(
      lambda p: decoder(net).apply(p, {}, tokens, train=False), shapes
    )
  with pytest.raises(UserError, match="unknown tap 'blok_1': did you mean"):
    decoder(net).apply(shapes, {}, tokens, train=False, taps=("blok_1",))
  with pytest.raises(UserError, match="unknown remat 'all'"):
    decoder(net, remat="all")
  with pytest.raises(UserError, match="unknown head 'sparse'"):
    decoder(net, head="sparse")


@pytest.mark.slow
def test_a_token_that_is_none_of_ours_makes_its_row_nan():
  net, params, tokens = (getattr(golden("llama"), f) for f in _NET)
  wrong = tokens.copy()
  wrong[0, 3] = 61
  found = logits(net, params, {"tokens": wrong})
  assert np.isnan(found[0]).all()
  assert np.isfinite(found[1]).all()
