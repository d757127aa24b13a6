"""What every convolutional network returns, and how training moves it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract import abstract, filled
from flax import nnx

from kdjax import adapters, models
from kdjax.models.layers import ConvNorm
from kdjax.models.mobilenet import MobileNet, Row
from kdjax.models.mobilenet_v1 import MobileNetV1
from kdjax.models.shufflenet import BlockV1, BlockV2, ShuffleNet

# name, sizes, pixels, (pixels, channels) of stem, stage_1, ...; pooled channels
NETWORKS = [
  (
    "resnet_cifar",
    dict(depth=8, width=4),
    8,
    [(8, 4), (8, 4), (4, 8), (2, 16)],
    16,
  ),
  (
    "resnet",
    dict(depth=50, width=4),
    64,
    [(16, 4), (16, 16), (8, 32), (4, 64), (2, 128)],
    128,
  ),
  (
    "wrn",
    dict(depth=10, width=1),
    8,
    [(8, 16), (8, 16), (4, 32), (2, 64)],
    64,
  ),
  (
    "vgg_cifar",
    dict(depth=8, width=4),
    16,
    [(16, 4), (8, 8), (4, 16), (2, 32), (2, 32)],
    32,
  ),
  (
    "mobilenet_v1",
    dict(width=0.125),
    32,
    [(16, 4), (16, 8), (8, 16), (4, 32), (2, 64), (1, 128)],
    128,
  ),
  (
    "mobilenet_v2",
    dict(width=0.25),
    32,
    [(16, 8), (16, 8), (8, 8), (4, 8), (2, 24), (1, 80)],
    1280,
  ),
  (
    "mobilenet_v2_cifar",
    dict(width=0.25),
    16,
    [(8, 8), (8, 6), (4, 8), (2, 24), (1, 80)],
    1280,
  ),
  (
    "mobilenet_v3",
    dict(size="large", dropout=0.0),
    32,
    [(16, 16), (16, 16), (8, 24), (4, 40), (2, 112), (1, 160)],
    1280,
  ),
  (
    "mobilenet_v3",
    dict(size="small", dropout=0.0),
    32,
    [(16, 16), (8, 16), (4, 24), (2, 48), (1, 96)],
    1024,
  ),
  (
    "shufflenet_v1_cifar",
    dict(width=48),
    8,
    [(8, 24), (4, 48), (2, 96), (1, 192)],
    192,
  ),
  (
    "shufflenet_v2",
    dict(width=0.5),
    32,
    [(8, 24), (4, 48), (2, 96), (1, 192)],
    1024,
  ),
  (
    "shufflenet_v2_cifar",
    dict(width=0.5),
    8,
    [(8, 24), (4, 48), (2, 96), (1, 192)],
    1024,
  ),
]
# Their stages end linearly and have no value before an activation.
LINEAR = {"mobilenet_v2", "mobilenet_v2_cifar", "mobilenet_v3"}


def test_every_network_is_listed_by_the_name_of_its_function():
  assert {f.__name__: f for f in models.MODELS.values()} == models.MODELS
  assert {row[0] for row in NETWORKS} <= set(models.MODELS)


@pytest.mark.parametrize(
  ("name", "sizes", "pixels", "stages", "pooled"),
  NETWORKS,
  ids=["-".join([n, *map(str, s.values())]) for n, s, *_ in NETWORKS],
)
def test_taps_and_dtypes_are_what_the_convention_says(
  name, sizes, pixels, stages, pooled
):
  module = abstract(
    lambda rngs: models.MODELS[name](
      **sizes,
      num_classes=5,
      channels=2,
      axis_name="devices",
      dtype=jnp.bfloat16,
      rngs=rngs,
    )
  )
  norms = [m for _, m in nnx.iter_modules(module) if type(m) is nnx.BatchNorm]
  assert {norm.axis_name for norm in norms} == {"devices"}
  assert module.classifier.kernel.shape == (pooled, 5)

  module.eval()
  graphdef, state = nnx.split(module)
  image = jax.ShapeDtypeStruct((1, pixels, pixels, 2), jnp.float32)
  output = jax.eval_shape(lambda s, x: nnx.merge(graphdef, s)(x), state, image)
  (p, c), *ends = stages
  want = {"stem": (1, p, p, c), "pooled": (1, pooled)}
  for n, (p, c) in enumerate(ends, 1):
    want[f"stage_{n}"] = (1, p, p, c)
    if name not in LINEAR:
      want[f"preact_{n}"] = (1, p, p, c)
  assert {k: v.shape for k, v in output.taps.items()} == want
  # The computation is in bfloat16, what it computes with is not.
  assert {x.dtype for x in jax.tree.leaves(output)} == {np.dtype(jnp.bfloat16)}
  kept = nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat))
  assert {x.dtype for x in jax.tree.leaves(kept)} == {np.dtype(jnp.float32)}


def common(rngs):
  layer = functools.partial(
    ConvNorm, axis_name=None, dtype=jnp.float32, rngs=rngs
  )
  return dict(layer=layer, num_classes=5, dtype=jnp.float32, rngs=rngs)


def mobilenet_v1(rngs):
  return MobileNetV1((4, 8, 8), channels=3, **common(rngs))


ROWS = [
  Row(3, 0, 8, False, nnx.relu, 2),
  Row(3, 16, 8, False, nnx.relu6, 1),
  Row(5, 16, 8, True, nnx.hard_swish, 2),
]


def mobilenet(rngs, rows=ROWS, dropout=0.0):
  return MobileNet(
    rows,
    stem=8,
    head=16,
    hidden=8,
    activation=nnx.hard_swish,
    dropout=dropout,
    channels=3,
    **common(rngs),
  )


def shufflenet(block, rngs):
  kwargs = common(rngs)
  stem = kwargs["layer"](3, 24, 1, activation=nnx.relu)
  return ShuffleNet(stem, block, [48], pool=nnx.identity, head=0, **kwargs)


# One of each make, as small as it comes.
SMALL = {
  "resnet": lambda rngs: models.resnet_cifar(
    8, width=4, num_classes=5, rngs=rngs
  ),
  "wrn": lambda rngs: models.wrn(10, 1, num_classes=5, rngs=rngs),
  "vgg": lambda rngs: models.vgg_cifar(8, width=4, num_classes=5, rngs=rngs),
  "mobilenet_v1": mobilenet_v1,
  "mobilenet": mobilenet,
  "shufflenet_v1": lambda rngs: shufflenet(
    functools.partial(BlockV1, groups=3), rngs
  ),
  "shufflenet_v2": lambda rngs: shufflenet(BlockV2, rngs),
}
IMAGE = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)


@pytest.mark.parametrize("name", SMALL)
def test_training_uses_every_parameter_and_moves_every_statistic(name):
  module = filled(SMALL[name])
  module.train()
  graphdef, params, stats, rest = nnx.split(
    module, nnx.Param, nnx.BatchStat, ...
  )

  @jax.jit
  def step(params, stats):
    def loss(params):
      module = nnx.merge(graphdef, params, stats, rest, copy=True)
      output = module(IMAGE)
      loss = jnp.mean(jax.nn.logsumexp(output.logits, -1))
      return loss, (output, nnx.state(module, nnx.BatchStat))

    return jax.grad(loss, has_aux=True)(params)

  grads, (output, new) = step(params, stats)
  for path, gradient in jax.tree.leaves_with_path(grads):
    assert np.isfinite(gradient).all(), path
    assert np.any(gradient), path
  for old, moved in zip(jax.tree.leaves(stats), jax.tree.leaves(new)):
    assert not np.array_equal(old, moved)

  taps = jax.tree.map(np.asarray, output.taps)
  if name != "wrn":
    for preact in [tap for tap in taps if tap.startswith("preact_")]:
      np.testing.assert_array_equal(
        taps[preact.replace("preact", "stage")], np.maximum(taps[preact], 0)
      )
  for a, b in itertools.combinations(taps.values(), 2):
    assert not np.array_equal(a, b)
  classifier = jax.tree.map(np.float64, nnx.to_pure_dict(params)["classifier"])
  logits = taps["pooled"] @ classifier["kernel"] + classifier["bias"]
  np.testing.assert_allclose(output.logits, logits, rtol=1e-5, atol=1e-6)


def test_dropout_follows_the_key_in_training_and_is_off_in_evaluation():
  model = adapters.from_nnx(lambda rngs: mobilenet(rngs, ROWS[:1], 0.5))
  batch = {"image": IMAGE}
  params, stats = model.init(jax.random.key(0), batch)

  @functools.partial(jax.jit, static_argnames="train")
  def run(seed, train):
    output, new = model.apply(
      params,
      stats,
      batch,
      train=train,
      key=jax.random.key(seed),
      taps=("pooled",),
    )
    return output.logits, output.taps["pooled"], new

  logits, pooled, new = run(0, True)
  others, same, _ = run(1, True)
  assert not np.array_equal(logits, others)
  np.testing.assert_array_equal(pooled, same)
  assert not np.array_equal(
    new["stem"]["norm"]["mean"], stats["stem"]["norm"]["mean"]
  )
  logits, _, new = run(0, False)
  np.testing.assert_array_equal(logits, run(1, False)[0])
  np.testing.assert_array_equal(
    new["stem"]["norm"]["mean"], stats["stem"]["norm"]["mean"]
  )
