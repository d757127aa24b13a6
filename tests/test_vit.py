"""ViT and DeiT: published sizes, and the equations from float64 NumPy."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kdjax import adapters, evaluate, models
from kdjax.errors import UserError

TINY = dict(
  num_classes=7, image_size=(4, 6), patch=2, depth=2, width=12, heads=3
)


def network(size="tiny", **sizes):
  return adapters.from_nnx(lambda rngs: models.vit(size, **sizes, rngs=rngs))


def images(*shape):
  return {"image": np.random.default_rng(0).normal(size=shape).astype("f")}


def drawn(**sizes):
  """A tiny network, every variable of it drawn, and its batch."""
  model = network(**{**TINY, **sizes})
  batch = images(2, 4, 6, 3)
  like = jax.eval_shape(model.init, jax.random.key(0), batch)
  rng = np.random.default_rng(1)
  params, stats = jax.tree.map(
    lambda x: (rng.normal(size=x.shape) * 0.5).astype("f"), like
  )
  return model, params, stats, batch


@pytest.mark.parametrize(
  ("size", "distilled", "count"),
  # timm's vit_*_patch16_224 and deit_*_distilled_patch16_224.
  [
    ("tiny", True, 5_910_800),
    ("small", False, 22_050_664),
    ("base", False, 86_567_656),
  ],
)
def test_the_published_number_of_parameters(size, distilled, count):
  build = partial(models.vit, size, num_classes=1000, distilled=distilled)
  module = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
  params = jax.tree.leaves(nnx.state(module, nnx.Param))
  assert evaluate.num_parameters(params) == count


def multiply_adds(jaxpr):
  """Those of the convolutions and matrix products in a program."""
  total = 0
  for eqn in jaxpr.eqns:
    for value in eqn.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        total += eqn.params.get("length", 1) * multiply_adds(inner)
    shapes = [v.aval.shape for v in eqn.invars]
    outputs = math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      total += outputs * math.prod(shapes[0][i] for i in contracted)
    if eqn.primitive.name == "conv_general_dilated":
      total += outputs * math.prod(shapes[1]) // shapes[1][-1]
  return total


def test_base_makes_the_published_number_of_multiply_adds():
  model = network("base", num_classes=1000)
  batch = {"image": jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)}
  variables = jax.eval_shape(model.init, jax.random.key(0), batch)
  program = jax.make_jaxpr(partial(model.apply, train=False))
  count = multiply_adds(program(*variables, batch).jaxpr)
  assert round(count / 1e9, 3) == 17.564  # torchvision's vit_b_16


def layer_norm(x, norm, epsilon):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
  return x * norm["scale"] + norm["bias"]


def linear(x, layer):
  return x @ layer["kernel"] + layer["bias"]


def gelu(x):
  return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def oracle(params, image, heads, epsilon=1e-6):
  """The network of 2x2 patches in float64, head by head; its taps."""
  params, image = jax.tree.map(np.float64, (params, image))
  rows = []
  for i in range(0, image.shape[1], 2):
    for j in range(0, image.shape[2], 2):
      patch = image[:, i : i + 2, j : j + 2, :]
      kernel = params["patches"]["kernel"]
      rows.append(np.einsum("bhwc,hwcd->bd", patch, kernel))
  x = np.stack(rows, 1) + params["patches"]["bias"]
  names = ("class_token", "distillation_token")
  tokens = [params[n] for n in names if n in params]
  tokens = [np.repeat(t, len(image), axis=0) for t in tokens]
  x = np.concatenate([*tokens, x], 1) + params["positions"]
  taps = {"embed": x}
  for i in range(len(params["blocks"]["mlp_norm"]["scale"])):
    block = jax.tree.map(lambda w: w[i], params["blocks"])  # noqa: B023
    y = layer_norm(x, block["attention_norm"], epsilon)
    q, k, v = (
      np.split(linear(y, block["attention"][name]), heads, axis=-1)
      for name in ("query", "key", "value")
    )
    d = q[0].shape[-1]
    e = [np.exp(a @ b.swapaxes(1, 2) / np.sqrt(d)) for a, b in zip(q, k)]
    p = [s / s.sum(-1, keepdims=True) for s in e]
    y = np.concatenate([a @ b for a, b in zip(p, v)], -1)
    x = x + linear(y, block["attention"]["output"])
    y = layer_norm(x, block["mlp_norm"], epsilon)
    x = x + linear(
      gelu(linear(y, block["mlp"]["expand"])), block["mlp"]["contract"]
    )
    inner = {"attention": p, "queries": q, "keys": k, "values": v}
    taps |= {
      f"{name}_{i + 1}": np.stack(value, 1) for name, value in inner.items()
    }
    taps[f"block_{i + 1}"] = x
  x = layer_norm(x, params["norm"], epsilon)
  taps["pooled"] = x[:, 0]
  taps["class_logits"] = linear(x[:, 0], params["classifier"])
  if "distillation_classifier" in params:
    taps["distillation_logits"] = linear(
      x[:, 1], params["distillation_classifier"]
    )
  return taps


def assert_close(ours, exact):
  # Two blocks of float32 sums, read against the scale of the whole array.
  scale = np.abs(exact).max()
  np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("distilled", [False, True])
def test_every_tap_follows_the_equations(distilled):
  model, params, stats, batch = drawn(distilled=distilled, epsilon=1e-3)
  exact = oracle(params, batch["image"], heads=3, epsilon=1e-3)
  names = tuple(n for n in exact if distilled or n != "class_logits")
  output, _ = model.apply(params, stats, batch, train=False, taps=names)
  for name in names:
    assert output.taps[name].shape == exact[name].shape, name
    assert_close(output.taps[name], exact[name])
  logits = exact["class_logits"]
  if distilled:
    logits = (logits + exact["distillation_logits"]) / 2
  assert_close(output.logits, logits)


def test_a_token_without_its_classifier_leaves_the_class_token_to_decide():
  model, params, stats, batch = drawn(distilled=True, distillation_head=False)
  assert "distillation_classifier" not in params
  output, _ = model.apply(params, stats, batch, train=False)
  exact = oracle(params, batch["image"], heads=3)
  assert_close(output.logits, exact["class_logits"])


def test_training_returns_the_mean_of_the_two_classifiers_too():
  model, params, stats, batch = drawn(distilled=True)
  names = ("class_logits", "distillation_logits")
  output, new = model.apply(
    params, stats, batch, train=True, key=jax.random.key(0), taps=names
  )
  assert new == {}
  assert_close(output.logits, sum(output.taps[n] for n in names) / 2)


def test_the_classifier_is_where_every_network_has_it():
  _, params, _, _ = drawn()
  assert params["classifier"]["kernel"].shape == (12, 7)


def test_taps_that_nobody_asked_for_cost_nothing():
  class Plain(nnx.Module):
    """The same layers with nothing returned beside the logits."""

    def __init__(self, rngs):
      self.net = models.vit("tiny", **TINY, rngs=rngs)

    def __call__(self, image):
      kind, params = nnx.split(self.net.blocks)

      def step(x, of_one):
        block = nnx.merge(kind, of_one)
        y, _ = block.attention(block.attention_norm(x))
        x = x + y
        return x + block.mlp(block.mlp_norm(x)), None

      x, _ = jax.lax.scan(step, self.net.embed(image), params)
      return self.net.classifier(self.net.norm(x[:, :1])[:, 0])

  def cost(model):
    batch = images(2, 4, 6, 3)
    variables = jax.eval_shape(model.init, jax.random.key(0), batch)
    program = jax.jit(partial(model.apply, train=False))
    return program.lower(*variables, batch).compile().cost_analysis()["flops"]

  # The network normalises token 1 too, whether or not it is classified.
  one_token = 2 * 12 * 10
  assert abs(cost(network(**TINY)) - cost(adapters.from_nnx(Plain))) < one_token


def test_gradients_are_finite_and_reach_every_parameter():
  model, params, stats, batch = drawn(distilled=True)

  def loss(p):
    return jnp.sum(model.apply(p, stats, batch, train=True)[0].logits ** 2)

  gradient = jax.jit(jax.grad(loss))(params)
  for path, g in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.isfinite(g).all(), path
    # A key's bias shifts all scores of a query alike: the softmax drops it.
    if "key" not in str(path[3:4]) or "bias" not in str(path):
      assert np.abs(g).max() > 0, path


def test_bfloat16_computes_in_it_and_keeps_float32_parameters():
  model = network(**TINY, dtype=jnp.bfloat16)
  batch = images(2, 4, 6, 3)
  params, stats = jax.eval_shape(model.init, jax.random.key(0), batch)
  output, _ = jax.eval_shape(
    partial(model.apply, train=False, taps=("embed", "block_2", "pooled")),
    params,
    stats,
    batch,
  )
  assert {x.dtype for x in jax.tree.leaves(output)} == {jnp.dtype("bfloat16")}
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    (dict(size="huge"), "unknown size of vit 'huge'"),
    (dict(width=10), "multiple of the heads"),
    (dict(image_size=5), "multiple of the patch"),
  ],
)
def test_an_impossible_size_says_what_would_do(sizes, message):
  with pytest.raises(UserError, match=message):
    network(**{**TINY, **sizes})


def test_an_image_of_another_size_is_refused():
  model, params, stats, _ = drawn()
  with pytest.raises(UserError, match="image of 6x4, has positions for 4x6"):
    model.apply(params, stats, images(1, 6, 4, 3), train=False)
