"""Students cut out of a teacher: what must not change does not."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_decoders import NAMES, assert_close, golden

from kdjax import parallel
from kdjax.errors import UserError
from kdjax.importance import Importance, of_activations, of_weights
from kdjax.inherit import copy_embeddings, inherit
from kdjax.models.decoder import block as blocks
from kdjax.models.decoder import decoder
from kdjax.models.decoder.network import hidden
from kdjax.models.decoder.parameters import nested, shapes
from kdjax.pretrained import decoders

QUICK = ("gemma2", "gpt2_scaled")
FAMILIES = ("gemma2", "gemma3", "gpt2_scaled", "llama", "mistral", "qwen2")
FAMILIES += ("qwen3", "smollm3")
# Sizes that each family of the golden networks can have: 24 wide, 37 or 50 or
# 96 neurons, 4 heads, GPT-2's heads of 6 channels.
CUT = dict(layers=[1, 3], width=14, mlp_width=20, kv_heads=1)
GPT2 = {**CUT, "width": 18, "kv_heads": 3}


def logits(net, params, tokens):
  model = decoder(net)
  apply = lambda p, t: model.apply(p, {}, {"tokens": t}, train=False)  # noqa: E731
  return jax.jit(apply)(params, tokens)[0].logits


def slow_but(*quick):
  return [
    pytest.param(n, marks=() if n in quick else (pytest.mark.slow,))
    for n in NAMES
  ]


def drawn(net):
  """Some importance."""
  rng = np.random.default_rng(0)
  width, depth = (net.width,), net.depth
  per_layer = (depth, net.mlp_width), (depth, net.kv_heads)
  return Importance(*map(rng.random, [width, width, *per_layer]))


def size(net):
  return GPT2 if net.family == "gpt2" else CUT


def flat(params):
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  return {"/".join(k.key for k in path): x for path, x in leaves}


def changed(params, change):
  """`change(path, array)` of every array, in NumPy."""
  return nested({k: change(k, np.array(x)) for k, x in flat(params).items()})


@pytest.mark.parametrize("name", slow_but(*FAMILIES))
def test_of_every_family_there_is_a_student_that_is_written_and_read(
  name, tmp_path
):
  net, params = golden(name).net, golden(name).params
  if net.family == "gpt2":
    heads, kv_heads, width = 3, 3, 18
  else:
    heads, kv_heads, width = net.heads // net.kv_heads, 1, 14
  made, cut = inherit(net, params, importance=drawn(net), **size(net))
  # config.json was written anew, and read: it says what was meant.
  pick = lambda of: of and (of[0], of[2])  # noqa: E731
  assert made == dataclasses.replace(
    net,
    depth=2,
    width=width,
    mlp_width=20,
    heads=heads,
    kv_heads=kv_heads,
    windows=pick(net.windows),
    rotations=pick(net.rotations),
    embed_scale=14**0.5 if net.embed_scale != 1 else 1.0,
  )
  assert {k: x.shape for k, x in flat(cut).items()} == shapes(made)
  decoders.write(tmp_path / "out", cut, made)
  again, read = decoders.read(tmp_path / "out")
  assert again == made
  jax.tree.map(np.testing.assert_array_equal, read, cut)
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  if net.family != "gpt2":
    assert config["head_dim"] == net.head_dim
    assert config["num_hidden_layers"] == 2


def test_who_keeps_everything_is_the_teacher():
  """Bit for bit, in arrays of its own."""
  stored = golden("qwen3")
  made, params = inherit(
    stored.net, stored.params, layers=3, width=24, mlp_width=37, kv_heads=2
  )
  assert made.config["head_dim"] == 10
  assert made == stored.net
  jax.tree.map(np.testing.assert_array_equal, params, stored.params)
  for ours, theirs in zip(*map(jax.tree.leaves, (params, stored.params))):
    assert ours.unsafe_buffer_pointer() != theirs.unsafe_buffer_pointer()


def one_by_one(net, params, tokens, numbers):
  """A forward pass written by hand: these layers, one after another."""
  positions = jnp.arange(tokens.shape[1])[None]
  x = blocks.embed(net, params, tokens, positions, jnp.float32)
  turned, stack = blocks.angles(net, positions), blocks.layers(net, params)
  q, k = np.mgrid[: tokens.shape[1], : tokens.shape[1]]
  for n in numbers:
    layer = jax.tree.map(lambda x, n=n: jnp.asarray(x)[n], stack)
    window = net.windows[n] or 99

    def attend(query, key, value, layer, window=window):
      seen = (q >= k) & (q - k < window)
      return blocks_attention(net, query, key, value, seen), {}

    x, _ = blocks.block(net, x, layer, turned, attend, lambda x, *_: x)
  x = blocks.normalise(net, x, params["norm"])
  head = params["embed" if net.tied else "head"]["kernel"]
  z = x @ head.T
  cap = net.final_softcap
  return z if cap is None else cap * jnp.tanh(z / cap)


def blocks_attention(net, q, k, v, seen):
  k, v = (jnp.repeat(x, net.heads // net.kv_heads, axis=2) for x in (k, v))
  scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * net.score_scale
  if net.attention_softcap:
    cap = net.attention_softcap
    scores = cap * jnp.tanh(scores / cap)
  scores = jnp.where(jnp.broadcast_to(seen, scores.shape), scores, -np.inf)
  return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


@pytest.mark.parametrize("name", slow_but("gpt2_scaled", "smollm3"))
def test_a_dropped_layer_is_passed_by(name):
  """Windows, rotations and GPT-2's factor are those of the layers kept."""
  stored = golden(name)
  made, params = inherit(stored.net, stored.params, layers=[2, 3])
  by_hand = jax.jit(functools.partial(one_by_one, stored.net, numbers=[1, 2]))(
    stored.params, stored.tokens
  )
  found = logits(made, params, stored.tokens)
  assert_close(found, by_hand, relative=1e-5)
  assert np.abs(found - stored.logits).max() > 0.01 * np.abs(found).max()


@pytest.mark.parametrize("by_weights", [True, False])
@pytest.mark.parametrize("name", slow_but(*QUICK))
def test_neurons_and_heads_that_write_nothing_go_first(name, by_weights):
  """Or through which nothing passes, however large their other side is."""
  stored = golden(name)
  net, tokens = stored.net, stored.tokens
  rng = np.random.default_rng(0)
  dead = [rng.permutation(net.mlp_width)[:9] for _ in range(net.depth)]
  group = rng.integers(0, net.kv_heads, net.depth)
  per_group = net.heads // net.kv_heads * net.head_dim
  inwards, outwards = (10, 0) if by_weights else (0, 10)

  def silence(path, x):
    module = path.split("/")[-2]
    for n in range(net.depth):
      keys, queries = (
        slice(group[n] * size, (group[n] + 1) * size)
        for size in (net.head_dim, per_group)
      )
      if module == "up":
        x[n][..., dead[n]] *= inwards
      if module == "value":
        x[n][..., keys] *= inwards
      if path == "layers/down/kernel":
        x[n, dead[n]] *= outwards
      if path == "layers/output/kernel":
        x[n, queries] *= outwards
    return x

  params = changed(stored.params, silence)
  score = (
    of_weights(net, params)
    if by_weights
    else of_activations(net, params, [{"tokens": tokens}])
  )
  cut = dict(mlp_width=net.mlp_width - 9)
  if net.family != "gpt2":
    cut |= dict(kv_heads=net.kv_heads - 1)
  else:  # its width would have to shrink too
    assert (np.argmin(score.groups, -1) == group).all()
  whole = logits(*inherit(net, params, layers=[1, 3], importance=score), tokens)
  student = inherit(net, params, layers=[1, 3], importance=score, **cut)
  # Fewer numbers are added in another order.
  assert_close(logits(*student, tokens), whole, relative=1e-5)


@pytest.mark.parametrize("name", slow_but("gemma3", "llama_biases"))
def test_channels_that_nothing_writes_go_without_a_trace(name):
  """Their norms' root mean squares, and Gemma's √D, are made up for."""
  stored = golden(name)
  net, tokens = dataclasses.replace(stored.net, epsilon=0.0), stored.tokens
  kept = np.sort(np.random.default_rng(0).permutation(24)[:16])
  if net.norm == "layer":
    # Pairs of equal size: the mean is 0 before and after.
    kept = np.arange(18)
  writes = ("embed/kernel", "positions/kernel", "down/", "output/", "norm/bias")

  def silence(path, x):
    if any(part in path for part in writes):
      if net.norm == "layer" and "norm" not in path:
        x[..., 1:18:2] = -x[..., :18:2]
      x[..., np.setdiff1d(np.arange(24), kept)] = 0
    return x

  params = changed(stored.params, silence)
  score = of_weights(net, params)
  assert set(np.flatnonzero(score.channels)) == set(kept)
  more = {}
  if net.norm == "layer":
    more = dict(kv_heads=3)
    output = params["layers"]["output"]["kernel"]
    output[:, 6:12] = 0
    params["layers"]["value"]["kernel"][..., 6:12] = 0
    params["layers"]["value"]["bias"][..., 6:12] = 0
    score = of_weights(net, params)
  made, student = inherit(
    net, params, width=len(kept), importance=score, **more
  )
  made = dataclasses.replace(made, epsilon=0.0)
  whole = logits(net, params, tokens)
  assert_close(logits(made, student, tokens), whole, relative=2e-5)


def test_the_norms_follow_the_energy_that_stays():
  """Channels all alike: a half of them has the same mean square."""
  stored = golden("llama")
  width = stored.net.width
  score = of_weights(stored.net, stored.params)
  channels = np.arange(width, dtype=np.float32)
  even = score._replace(channels=channels, energy=np.ones(width))
  _, params = inherit(stored.net, stored.params, width=12, importance=even)
  theirs = stored.params["layers"]["mlp_norm"]["scale"]
  found = params["layers"]["mlp_norm"]["scale"]
  np.testing.assert_allclose(found, theirs[:, 12:], rtol=1e-6)
  # A tenth of the energy goes with a half of the channels.
  energy = np.r_[np.full(12, 0.1), np.full(12, 0.9)]
  _, params = inherit(
    stored.net,
    stored.params,
    width=12,
    importance=even._replace(energy=energy),
  )
  found = params["layers"]["mlp_norm"]["scale"]
  np.testing.assert_allclose(found, theirs[:, 12:] * 1.8**0.5, rtol=1e-6)


def measured(net, params, tokens, segments):
  """The means of the docstring, in NumPy from the network's own taps."""
  names = [f"{k}_{n}" for k in ("attention", "values", "block") for n in (1, 2)]
  batch = {"tokens": tokens, "segment_ids": segments}
  run = jax.jit(functools.partial(hidden, net, taps=("embed", *names)))
  _, taps = run(params, batch)
  taps = {k: np.float64(x) for k, x in taps.items()}
  w = jax.tree.map(np.float64, params["layers"])
  counts = segments != 0
  mean = lambda x: x[counts].mean(0)  # noqa: E731

  def rms(x):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + net.epsilon)

  channels, energy, neurons, groups = 0, 0, [], []
  for n in range(2):
    x = taps["embed" if n == 0 else f"block_{n}"]
    v = np.repeat(taps[f"values_{n + 1}"], net.heads // net.kv_heads, 1)
    heads = np.einsum("bhqk,bhkd->bqhd", taps[f"attention_{n + 1}"], v)
    groups.append(mean(np.sqrt((heads**2).sum(-1))).reshape(2, -1).sum(-1))
    output = heads.reshape(*x.shape[:2], -1) @ w["output"]["kernel"][n]
    middle = x + output
    y = rms(middle) * w["mlp_norm"]["scale"][n]
    gate, up = (y @ w[k]["kernel"][n] for k in ("gate", "up"))
    neurons.append(mean(np.abs(gate / (1 + np.exp(-gate)) * up)))
    first = rms(x) * w["attention_norm"]["scale"][n]
    channels += mean(np.abs(first)) + mean(np.abs(y))
    energy += mean(rms(x) ** 2) + mean(rms(middle) ** 2)
  last = rms(taps["block_2"])
  channels += mean(np.abs(last * np.float64(params["norm"]["scale"])))
  return Importance(
    channels, energy + mean(last**2), np.array(neurons), np.array(groups)
  )


def test_activations_are_measured_as_written():
  """However the rows are split into batches, and padding does not count."""
  stored = golden("qwen2")
  net, params = inherit(stored.net, stored.params, layers=[1, 3])
  tokens = stored.tokens
  segments = np.ones(tokens.shape, np.int32)
  segments[0, 9:], segments[1, 14:] = 2, 0
  both = {"tokens": tokens, "segment_ids": segments}
  want = measured(net, params, tokens, segments)
  for batches in (
    [both],
    [{k: v[n : n + 1] for k, v in both.items()} for n in (0, 1)],
  ):
    found = of_activations(net, params, batches)
    for name in Importance._fields:
      got, wanted = getattr(found, name), getattr(want, name)
      np.testing.assert_allclose(got, wanted, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", slow_but("gemma2", "gpt2_scaled"))
def test_weights_are_scored_as_written(name):
  """The docstring's sums, a layer and a kernel at a time, in float64."""
  net = golden(name).net
  params = jax.tree.map(np.float64, golden(name).params)
  gemma = net.norm == "rms_plus_one"
  scale = lambda w: w["scale"] + 1 if gemma else w["scale"]  # noqa: E731
  embed = params["embed"]["kernel"]
  energy = net.embed_scale**2 * (embed**2).mean(0)
  if "positions" in params:
    energy += (params["positions"]["kernel"] ** 2).mean(0)
  head = params.get("head", params["embed"])["kernel"]
  read = scale(params["norm"]) ** 2 * (head**2).sum(0)
  neurons, groups = [], []
  for n in range(net.depth):
    w = jax.tree.map(lambda x, n=n: x[n], params["layers"])
    into = {
      k: (w[k]["kernel"] ** 2).sum(0) + w[k].get("bias", np.zeros(1)) ** 2
      for k in ("value", "output", "up", "down", "gate")
      if k in w
    }
    out = {k: (w[k]["kernel"] ** 2).sum(1) for k in w if "kernel" in w[k]}
    gate = into.get("gate", 1.0)
    neurons.append(np.sqrt(into["up"] * gate * out["down"]))
    values, outputs = (
      x.reshape(net.kv_heads, -1).sum(1) for x in (into["value"], out["output"])
    )
    groups.append(np.sqrt(values * outputs))
    for k, post in (("output", "attention"), ("down", "mlp")):
      written = into[k]
      if gemma:  # normalised, then scaled
        written = written / written.mean() * scale(w[f"post_{post}_norm"]) ** 2
      energy = energy + written
    read = read + scale(w["attention_norm"]) ** 2 * (
      out["query"] + out["key"] + out["value"]
    )
    read = read + scale(w["mlp_norm"]) ** 2 * (out["up"] + out.get("gate", 0))
  want = Importance(
    np.sqrt(energy * read), energy, np.array(neurons), np.array(groups)
  )
  found = of_weights(net, golden(name).params)
  for field in Importance._fields:
    np.testing.assert_allclose(
      getattr(found, field), getattr(want, field), rtol=2e-5, err_msg=field
    )


def test_a_number_of_layers_keeps_the_first_and_the_last():
  stored = golden("llama")
  deep = {
    k: np.concatenate([x] * 4) for k, x in flat(stored.params["layers"]).items()
  }
  marked = {**stored.params, "layers": nested(deep)}
  scale = marked["layers"]["mlp_norm"]["scale"]
  scale[:] = np.arange(12)[:, None]
  net = decoders.architecture({**stored.config, "num_hidden_layers": 12})
  for count, want in {1: [0], 2: [0, 11], 4: [0, 4, 7, 11]}.items():
    made, params = inherit(net, marked, layers=count, importance=drawn(net))
    assert made.depth == count
    np.testing.assert_array_equal(
      params["layers"]["mlp_norm"]["scale"][:, 0], want
    )


def test_embeddings_are_copied_between_families():
  teacher, student = golden("qwen3").params, golden("llama").params
  wider = np.random.default_rng(0).normal(size=(64, 24)).astype(np.float16)
  student = {**student, "embed": {"kernel": jnp.asarray(wider)}}
  copied = copy_embeddings(student, teacher)
  theirs = teacher["embed"]["kernel"]
  embed = copied["embed"]["kernel"]
  assert embed.dtype == np.float16
  np.testing.assert_array_equal(embed[:61], theirs.astype(np.float16))
  np.testing.assert_array_equal(embed[61:], wider[61:])
  # The teacher's head is its embedding, the student's is its own.
  np.testing.assert_array_equal(copied["head"]["kernel"], theirs)
  assert copied["layers"] is student["layers"]
  own = 2 * golden("llama").params["head"]["kernel"]
  with_head = copy_embeddings(student, {**teacher, "head": {"kernel": own}})
  np.testing.assert_array_equal(with_head["head"]["kernel"], own)
  np.testing.assert_array_equal(with_head["embed"]["kernel"], embed)
  back = copy_embeddings(teacher, copied)
  assert "head" not in back
  assert back["embed"]["kernel"].shape == (61, 24)
  narrow = {"embed": {"kernel": jnp.zeros((61, 12))}}
  with pytest.raises(UserError, match="12 wide, the teacher's 24"):
    copy_embeddings(narrow, teacher)


@pytest.mark.slow
def test_the_text_on_students_runs(tmp_path, monkeypatch):
  stored = golden("llama")
  text = (Path(__file__).parents[1] / "docs" / "decoder.md").read_text()
  text = text[text.index("## A student cut out of its teacher") :]
  code = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
  assert len(code) == 2
  monkeypatch.chdir(tmp_path)
  mesh = parallel.make_mesh(1)
  monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh)
  batch = {
    "tokens": stored.tokens,
    "label": np.roll(stored.tokens, -1),
    "mask": np.ones(stored.tokens.shape, np.float32),
  }
  names = dict(
    net=stored.net,
    params=stored.params,
    tokens=stored.tokens,
    batches=[batch] * 3,
    decoder=decoder,
    decoders=decoders,
    jax=jax,
  )
  for block in code:
    exec(compile(block, "docs/decoder.md", "exec"), names)
  small, _ = decoders.read("inherited")
  assert (small.depth, small.width) == (2, 12)
  merged, params = decoders.read("merged")
  assert merged == stored.net
  moved = (
    params["layers"]["up"]["kernel"] - stored.params["layers"]["up"]["kernel"]
  )
  assert np.abs(moved).max() > 0


BAD = {
  "layers=0, needs 1 to 3": dict(layers=0),
  "layers=4, needs 1 to 3": dict(layers=4),
  r"layers=\[0, 1\], needs numbers from 1 to 3": dict(layers=[0, 1]),
  r"layers=\[2, 1\], needs .* in order": dict(layers=[2, 1]),
  r"layers=\[\], needs": dict(layers=[]),
  "width=25, needs 1 to 24": dict(width=25),
  "mlp_width=0, needs 1 to 96": dict(mlp_width=0),
  "kv_heads=5, needs 1 to 4": dict(kv_heads=5),
  "4 heads of 6 channels has width 24, got 12": dict(width=12),
  "3 heads of 6 channels has width 18, got 24": dict(kv_heads=3),
}


@pytest.mark.parametrize("message", BAD)
def test_mistakes_are_one_line(message):
  stored = golden("gpt2")
  with pytest.raises(UserError, match=message) as caught:
    inherit(stored.net, stored.params, **BAD[message])
  assert "\n" not in str(caught.value)


def test_a_width_that_transformers_refuses_is_refused():
  stored = golden("gemma2")
  with pytest.raises(UserError, match="a width that 4 divides"):
    inherit(stored.net, stored.params, width=14, importance=drawn(stored.net))
  mixed = golden("qwen2")
  made, _ = inherit(
    mixed.net, mixed.params, width=15, importance=drawn(mixed.net)
  )
  assert made.width == 15


def test_an_importance_of_another_network_is_refused():
  stored, other = golden("gpt2"), golden("llama")
  score = of_weights(other.net, other.params)
  with pytest.raises(UserError, match="measure it on this teacher"):
    inherit(stored.net, stored.params, importance=score, mlp_width=3)
  with pytest.raises(UserError, match="no token that counts"):
    of_activations(stored.net, stored.params, [])
