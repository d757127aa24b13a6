"""Adapters: what they compute, what they train, and what they leave alone."""

import functools
import re

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
from golden_decoders import NAMES, assert_close, golden

import kdjax
from kdjax import lora, losses, parallel
from kdjax.errors import UserError
from kdjax.generate import generate
from kdjax.models.decoder import architecture, decoder
from kdjax.objective import Term, hinton
from kdjax.pretrained import decoders
from kdjax.train_step import init_state, jit_step, make_train_step

MESH = parallel.make_mesh(1)
SCALE = 0.7


def moved(params, rank=3, **more):
  """Adapters after some training: neither part is zero."""
  adapters = lora.init(jax.random.key(1), params, rank=rank, **more)
  rng = np.random.default_rng(0)
  draw = lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
  return jax.tree.map(lambda x: x + draw(x), adapters)


def compiled(net, **options):
  model = decoder(net, **options)
  return jax.jit(
    lambda params, tokens: (
      model.apply(params, {}, {"tokens": tokens}, train=False)[0].logits
    )
  )


def slow_but(quick, name):
  marks = () if name == quick else (pytest.mark.slow,)
  return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [slow_but("gemma2", name) for name in NAMES])
def test_beside_their_kernels_they_compute_what_merged_ones_do(name, tmp_path):
  """Through a folder, which is what a student is exported as."""
  stored = golden(name)
  net, params = stored.net, stored.params
  fresh = lora.init(jax.random.key(0), params, rank=4)
  kinds = ["query", "key", "value", "output", "gate", "up", "down"]
  assert set(fresh["layers"]) == {k for k in kinds if k in params["layers"]}
  query = fresh["layers"]["query"]["kernel"]
  heads = net.heads * net.head_dim
  assert query["lora_in"].shape == (3, 24, 4)
  assert query["lora_out"].shape == (3, 4, heads)
  run = compiled(net)
  plain = run(params, stored.tokens)
  untrained = run(lora.attach(params, fresh, SCALE), stored.tokens)
  np.testing.assert_array_equal(untrained, plain)
  adapters = moved(params)
  found = run(lora.attach(params, adapters, SCALE), stored.tokens)
  assert np.abs(found - plain).max() > 0.1 * np.abs(plain).max()
  merged = lora.merge(params, adapters, SCALE)
  decoders.write(tmp_path / "out", merged, net)
  _, again = decoders.read(tmp_path / "out")
  # Another order of sums, in three layers: 2e-5 of the scale.
  assert_close(run(again, stored.tokens), found, relative=2e-5)


def test_the_sum_is_that_of_the_paper():
  """In float64, of each matrix of a stack and of a single one."""
  rng = np.random.default_rng(3)
  drawn = lambda *shape: rng.normal(size=shape)  # noqa: E731
  params = {
    "stack": {"kernel": drawn(2, 3, 5, 4), "bias": drawn(2, 4)},
    "one": drawn(4, 6),
  }
  adapters = moved(params, rank=2, targets=["stack/kernel", "one"])
  merged = lora.merge(params, adapters, 0.25)
  a, b = (
    np.float64(adapters["stack"]["kernel"][k]) for k in ("lora_in", "lora_out")
  )
  assert a.shape == (2, 3, 5, 2)
  for n in range(2):
    for m in range(3):
      want = params["stack"]["kernel"][n, m] + 0.25 * a[n, m] @ b[n, m]
      got = merged["stack"]["kernel"][n, m]
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  one = {k: np.float64(x) for k, x in adapters["one"].items()}
  want = params["one"] + 0.25 * one["lora_in"] @ one["lora_out"]
  np.testing.assert_allclose(merged["one"], want, rtol=1e-5, atol=1e-6)
  assert merged["stack"]["bias"] is params["stack"]["bias"]


def test_what_is_drawn():
  adapters = lora.init(
    jax.random.key(0),
    {"a": jnp.ones((400, 30)), "b": jnp.ones((400, 30), jnp.bfloat16)},
    rank=30,
    targets=["*"],
  )
  a, b = (adapters[k]["lora_in"] for k in "ab")
  assert a.dtype == b.dtype == jnp.float32
  assert not np.any(adapters["a"]["lora_out"])
  # 12,000 numbers: their variance is within 4 % of its own.
  np.testing.assert_allclose(np.var(a) * 400, 1, atol=0.04)
  assert np.abs(np.mean(a * b)) * 400 < 0.04  # another draw for each


def test_the_gradient_is_that_through_merged_weights():
  stored = golden("qwen3")
  model, adapters = decoder(stored.net), moved(stored.params)
  batch = {"tokens": stored.tokens}

  def loss(join, adapters):
    params = join(stored.params, adapters, SCALE)
    logits = model.apply(params, {}, batch, train=True)[0].logits
    return jnp.mean(logits**2)

  ours, theirs = (
    jax.jit(jax.grad(functools.partial(loss, join)))(adapters)
    for join in (lora.attach, lora.merge)
  )
  jax.tree.map(functools.partial(assert_close, relative=2e-5), ours, theirs)


@pytest.mark.slow
def test_a_decoder_with_adapters_generates_as_the_merged_one():
  stored = golden("llama")
  adapters = moved(stored.params)
  ours, theirs = (
    generate(
      stored.net,
      join(stored.params, adapters, SCALE),
      stored.tokens[:, :5],
      max_new_tokens=4,
    ).tokens
    for join in (lora.attach, lora.merge)
  )
  np.testing.assert_array_equal(ours, theirs)


def text(seed=0, rows=4):
  tokens = np.random.default_rng(seed).integers(3, 61, (rows, 9))
  return {
    "tokens": tokens[:, :-1].astype(np.int32),
    "label": tokens[:, 1:].astype(np.int32),
    "mask": np.ones((rows, 8), np.float32),
  }


def attached(adapters, frozen):
  return lora.attach(frozen[0], adapters, SCALE)


def run(folder, steps, stored, adapters, **more):
  """The teacher is the student without its adapters, moved a little."""
  model = decoder(stored.net)
  return kdjax.distill(
    student=model,
    teacher=model,
    teacher_variables=(stored.params, {}),
    student_of=attached,
    student_variables=(adapters, {}),
    train=(text(n) for n in range(99)),
    evaluate_on=[text(100)],
    terms=hinton(alpha=0.3),
    optimizer=optax.adam(1e-2),
    steps=steps,
    save_every=2,
    folder=folder,
    mesh=MESH,
    quiet=True,
    **more,
  )


@pytest.mark.slow
def test_a_teacher_that_is_the_student_without_adapters(tmp_path):
  """The adapters alone are trained, saved and resumed, all else stays."""
  stored = golden("llama")
  adapters = lora.init(jax.random.key(0), stored.params, rank=2)
  before = jax.device_get((stored.params, adapters))
  whole = run(tmp_path / "whole", 4, stored, adapters)
  jax.tree.map(np.testing.assert_array_equal, (stored.params, adapters), before)
  state = whole.state
  assert jax.tree.structure(state.params) == jax.tree.structure(adapters)
  jax.tree.map(lambda a, b: np.any(a != b) or 1 / 0, state.params, adapters)
  sizes = {x.size for x in jax.tree.leaves((state.params, state.opt_state))}
  assert sizes <= {x.size for x in jax.tree.leaves(adapters)} | {1}
  # What was evaluated is the base with its adapters, beside the base alone.
  assert whole.metrics["eval/kl"] > 0
  run(tmp_path / "cut", 2, stored, adapters)
  again = run(tmp_path / "cut", 4, stored, adapters)
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get(again.state.replace(key=())),
    jax.device_get(state.replace(key=())),
  )
  assert again.metrics == whole.metrics
  # Another base is another teacher to the checkpoint.
  other = stored._replace(params=jax.tree.map(lambda x: 2 * x, stored.params))
  with pytest.raises(UserError, match="another teacher"):
    run(tmp_path / "cut", 6, other, adapters)


def test_any_network_with_a_teacher_of_its_own():
  """Merged anew in each step; two microbatches, a tree for `frozen`."""
  teacher, theirs = networks.teacher()
  student = networks.nnx_net()
  base, stats = student.init(jax.random.key(0), networks.batch())
  adapters = lora.init(
    jax.random.key(1), base, rank=2, targets=["*/kernel", "last/kernel"]
  )
  frozen = {"teacher": theirs, "base": base}
  before = jax.device_get(frozen)
  done = kdjax.distill(
    student=student,
    teacher=teacher,
    teacher_variables=frozen,
    teacher_of=lambda state, frozen: frozen["teacher"],
    student_of=lambda p, frozen: lora.merge(frozen["base"], p, 2.0),
    student_variables=(adapters, stats),
    train=[networks.batch()] * 40,
    evaluate_on=[networks.batch()],
    terms=hinton(alpha=0.0),
    optimizer=optax.adam(3e-2),
    steps=40,
    microbatches=2,
    mesh=MESH,
    quiet=True,
  )
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), before)
  whole = lora.merge(base, done.state.params, 2.0)
  batch = networks.batch()
  logits, target = (
    np.float64(m.apply(*v, batch, train=False)[0].logits)
    for m, v in ((student, (whole, stats)), (teacher, theirs))
  )
  p, q = networks.softmax(target), networks.softmax(logits)
  kl = np.mean(np.sum(p * np.log(p / q), -1))
  np.testing.assert_allclose(done.metrics["eval/kl"], kl, rtol=1e-4)
  assert done.metrics["loss/soft"] < 0.5 * 16 * start_kl(student, base, target)


def start_kl(student, base, target):
  z = student.apply(base, {}, networks.batch(), train=False)[0].logits
  p, q = networks.softmax(target), networks.softmax(np.float64(z))
  return np.mean(np.sum(p * np.log(p / q), -1))


def steps_of(depth=1, **sizes):
  """The compiled steps of adapters and of all weights, one layer deep.

  XLA counts a loop's body once, so that one layer is counted as it is.
  """
  config = {**golden("llama").config, "num_hidden_layers": depth, **sizes}
  net = architecture(config)
  model, tx = decoder(net), optax.sgd(0.1)
  params, _ = jax.eval_shape(model.init, jax.random.key(0), {})
  adapters = jax.eval_shape(
    lambda p: lora.init(jax.random.key(0), p, rank=2), params
  )
  batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, text()))
  terms = [Term("hard", losses.cross_entropy, group="hard")]
  for variables, student_of in (
    (adapters, attached),
    (params, lambda p, _: p),
  ):
    state = jax.eval_shape(
      lambda v: init_state(
        model, None, terms, tx, jax.random.key(0), batch, variables=(v, {})
      ),
      variables,
    )
    step = make_train_step(model, None, terms, tx, student_of=student_of)
    yield jit_step(step, MESH).lower(state, (params, {}), batch).compile()


def test_no_gradient_of_the_base_is_computed():
  """Two products of three are left: forward, and back to the activations."""
  ours, theirs = steps_of(hidden_size=128, intermediate_size=512, vocab_size=61)
  flops = [x.cost_analysis()["flops"] for x in (ours, theirs)]
  assert 0.62 < flops[0] / flops[1] < 0.74
  shapes = [
    set(re.findall(r"f32\[([\d,]+)\]\S* dot\(", x.as_text()))
    for x in (ours, theirs)
  ]
  assert {"128,512", "512,128"} & shapes[1]
  assert not {"128,512", "512,128"} & shapes[0]
  # What is donated is the adapters alone: the state is updated in place.
  memory = [x.memory_analysis() for x in (ours, theirs)]
  assert memory[0].alias_size_in_bytes < 0.1 * memory[1].alias_size_in_bytes
  assert memory[0].temp_size_in_bytes < memory[1].temp_size_in_bytes


BAD = {
  "target of the adapters 'layers/qury/kernel': did you mean": dict(
    targets=["layers/qury/kernel"]
  ),
  "match layers/attention_norm/scale, .* are no matrices": dict(
    targets=["*_norm/scale"]
  ),
  "rank 25, needs 1 to 24": dict(rank=25),
  "rank 0, needs 1 to 24": dict(rank=0),
}


@pytest.mark.parametrize("message", BAD)
def test_mistakes_are_one_line(message):
  params = golden("llama").params
  if "targets" in BAD[message]:
    params = {"layers": {"attention_norm": {"scale": jnp.ones(3)}}}
    params["layers"]["query"] = {"kernel": jnp.ones((4, 4))}
  with pytest.raises(UserError, match=message) as caught:
    lora.init(jax.random.key(0), params, **{"rank": 2, **BAD[message]})
  assert "\n" not in str(caught.value)


def test_adapters_of_another_network_are_refused():
  params = {"first": jnp.ones((3, 3))}
  adapters = lora.init(jax.random.key(0), params, rank=1, targets=["first"])
  with pytest.raises(UserError, match="'first' cannot be attached"):
    lora.attach(params, adapters, 1.0)
  with pytest.raises(UserError, match="unknown array with an adapter 'first'"):
    lora.merge({"second": jnp.ones((3, 3))}, adapters, 1.0)
