"""The blocks of the convolutional networks against their equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract import abstract, filled, run
from flax import nnx

from kdjax import models
from kdjax.errors import UserError
from kdjax.models import layers
from kdjax.models.mobilenet import Bottleneck, Row, SqueezeExcite, divisible
from kdjax.models.shufflenet import BlockV1, BlockV2, shuffle
from kdjax.models.wrn import Block as WideBlock

X = np.random.default_rng(0).normal(size=(2, 4, 4, 24)).astype(np.float32)
TOLERANCE = dict(rtol=1e-5, atol=1e-6)


def common(rngs):
  return dict(dtype=jnp.float32, rngs=rngs)


def layer(rngs):
  return functools.partial(layers.ConvNorm, axis_name=None, **common(rngs))


def silence(layer):
  """Makes a ConvNorm return zeros, whatever it is given."""
  for variable in (layer.norm.scale, layer.norm.bias):
    variable[...] = jnp.zeros_like(variable)


def normalised(x, norm):
  """Batch normalisation by the running statistics, in float64."""
  mean, var, scale, bias = (
    np.float64(v[...]) for v in (norm.mean, norm.var, norm.scale, norm.bias)
  )
  return (x - mean) / np.sqrt(var + norm.epsilon) * scale + bias


def test_shuffle_sends_each_group_to_every_groups_th_channel():
  x = np.arange(12)[None, None, None]
  y = shuffle(jnp.asarray(x), 3)[0, 0, 0]
  np.testing.assert_array_equal(y, [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11])


def test_shufflenet_v2_passes_the_first_half_on_to_the_even_channels():
  block = filled(lambda rngs: BlockV2(24, 24, 1, layer=layer(rngs)))
  np.testing.assert_array_equal(run(block, X)[..., 0::2], X[..., :12])


def test_shufflenet_v2_halves_with_the_shortcut_in_the_even_channels():
  block = filled(lambda rngs: BlockV2(24, 32, 2, layer=layer(rngs)))
  silence(block.expand)
  y = run(block, X)
  assert y.shape == (2, 2, 2, 32)
  assert not np.any(y[..., 1::2])
  depthwise, pointwise = block.shortcut
  want = run(pointwise, run(depthwise, X))
  np.testing.assert_allclose(y[..., 0::2], want, **TOLERANCE)


def test_shufflenet_v1_adds_its_input_where_the_size_stays():
  block = filled(lambda rngs: BlockV1(24, 24, 1, groups=3, layer=layer(rngs)))
  silence(block.expand)
  np.testing.assert_array_equal(run(block, X), X)


def test_shufflenet_v1_appends_the_mean_of_its_input_where_it_halves():
  block = filled(lambda rngs: BlockV1(24, 48, 2, groups=3, layer=layer(rngs)))
  silence(block.expand)
  y = run(block, X)
  assert not np.any(y[..., :24])
  padded = np.pad(np.float64(X), [(0, 0), (1, 1), (1, 1), (0, 0)])
  for i, j in np.ndindex(2, 2):
    # Nine terms at the border too: the zeros outside count.
    window = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
    mean = window.sum((1, 2)) / 9
    np.testing.assert_allclose(y[:, i, j, 24:], mean, **TOLERANCE)


def test_shufflenet_v1_shuffles_between_its_groups():
  x = np.concatenate([X, X[::-1]], axis=-1)
  block = filled(lambda rngs: BlockV1(48, 48, 1, groups=3, layer=layer(rngs)))
  inner = run(block.reduce, x)
  shuffled = inner[..., [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]]
  y = run(block.expand, run(block.depthwise, shuffled))
  np.testing.assert_allclose(run(block, x), x + y, **TOLERANCE)


def test_shufflenet_v1_groups_all_but_the_first_convolution():
  def groups(inputs):
    block = abstract(
      lambda rngs: BlockV1(inputs, 48, 2, groups=3, layer=layer(rngs))
    )
    convs = (block.reduce.conv, block.expand.conv)
    return tuple(c.feature_group_count for c in convs)

  assert groups(24) == (1, 3)  # 24 channels come from the stem
  assert groups(36) == (3, 3)


def wrn_block(outputs, stride, rngs):
  norm = functools.partial(layers.norm, axis_name=None, **common(rngs))
  conv = functools.partial(layers.conv, **common(rngs))
  return WideBlock(24, outputs, stride, conv=conv, norm=norm)


@pytest.mark.parametrize(("outputs", "stride"), [(24, 1), (8, 2)])
def test_wrn_skips_around_the_activation_only_where_the_shape_stays(
  outputs, stride
):
  block = filled(lambda rngs: wrn_block(outputs, stride, rngs))
  block.conv_2.kernel[...] = jnp.zeros_like(block.conv_2.kernel)
  preact, y = run(block, X)
  want = normalised(X, block.norm_1)
  np.testing.assert_allclose(preact, want, **TOLERANCE)
  if stride == 1:
    np.testing.assert_array_equal(y, X)
  else:
    kernel = np.float64(block.shortcut.kernel[0, 0])
    skip = np.maximum(want, 0)[:, ::2, ::2] @ kernel
    np.testing.assert_allclose(y, skip, **TOLERANCE)


def test_wrn_taps_the_sums_and_what_the_next_relu_is_given():
  module = filled(lambda rngs: models.wrn(10, 1, num_classes=5, rngs=rngs))
  taps = run(module, X[..., :3]).taps
  norms = [stage[0].norm_1 for stage in module.stages][1:] + [module.norm]
  for n, norm in enumerate(norms, 1):
    want = normalised(np.float64(taps[f"stage_{n}"]), norm)
    np.testing.assert_allclose(taps[f"preact_{n}"], want, **TOLERANCE)
  last = np.maximum(np.float64(taps["preact_3"]), 0)
  np.testing.assert_allclose(taps["pooled"], last.mean((1, 2)), **TOLERANCE)


def test_squeeze_and_excitation_is_its_equation():
  module = filled(lambda rngs: SqueezeExcite(24, **common(rngs)))
  h = np.float64(X).mean((1, 2))
  for conv in (module.squeeze, module.excite):
    h = np.maximum(h, 0) if conv is module.excite else h
    h = h @ np.float64(conv.kernel[0, 0]) + np.float64(conv.bias[...])
  gate = np.clip(h / 6 + 0.5, 0, 1)[:, None, None]
  assert module.squeeze.kernel.shape == (1, 1, 24, 8)
  np.testing.assert_allclose(run(module, X), X * gate, **TOLERANCE)


def bottleneck(row):
  return filled(
    lambda rngs: Bottleneck(24, row, layer=layer(rngs), **common(rngs))
  )


@pytest.mark.parametrize(
  ("outputs", "stride", "skips"), [(24, 1, 1), (24, 2, 0), (16, 1, 0)]
)
def test_a_bottleneck_adds_its_input_only_where_the_shape_stays(
  outputs, stride, skips
):
  block = bottleneck(Row(5, 48, outputs, False, nnx.relu, stride))
  silence(block.project)
  want = X if skips else np.zeros((2, 4 // stride, 4 // stride, outputs))
  np.testing.assert_array_equal(run(block, X), want)


def test_a_bottleneck_excites_between_the_activation_and_the_projection():
  block = bottleneck(Row(3, 0, 16, True, nnx.relu, 1))
  h = normalised(run(block.depthwise.conv, X), block.depthwise.norm)
  h = run(block.excite, np.float32(np.maximum(h, 0)))
  want = normalised(run(block.project.conv, h), block.project.norm)
  np.testing.assert_allclose(run(block, X), want, **TOLERANCE)


def test_mobilenet_v3_normalises_with_its_own_epsilon_and_momentum():
  module = abstract(
    lambda rngs: models.mobilenet_v3("small", num_classes=5, rngs=rngs)
  )
  norms = [m for _, m in nnx.iter_modules(module) if type(m) is nnx.BatchNorm]
  assert {(m.epsilon, m.momentum) for m in norms} == {(1e-3, 0.99)}


@pytest.mark.parametrize(
  ("channels", "want"), [(2.0, 8), (11.2, 16), (18.0, 24), (22.4, 24), (60, 64)]
)
def test_divisible_rounds_to_eights_but_never_down_by_a_tenth(channels, want):
  assert divisible(channels) == want


def test_initial_kernels_have_the_published_scale():
  key = jax.random.key(0)
  shape = (3, 3, 1, 512)  # depthwise: one input, 512 outputs
  kernel = layers.he_fan_out(key, shape)
  np.testing.assert_allclose(np.std(kernel), (2 / (9 * 512)) ** 0.5, rtol=0.05)
  kernel = np.abs(layers.uniform_fan_in(key, shape))
  np.testing.assert_allclose(np.max(kernel), 1 / 3, rtol=0.01)
  np.testing.assert_allclose(np.mean(kernel), 1 / 6, rtol=0.05)


@pytest.mark.parametrize(
  ("name", "sizes", "message"),
  [
    ("wrn", dict(depth=18, width=1), "needs 6n \\+ 4"),
    ("vgg_cifar", dict(depth=12), "needs one of \\[8, 11, 13, 16, 19\\]"),
    ("mobilenet_v3", dict(size="lage"), "did you mean 'large'"),
    ("shufflenet_v1_cifar", dict(width=50), "multiple of 12"),
    ("shufflenet_v1_cifar", dict(width=24), "above 24"),
    ("shufflenet_v2", dict(width=0.75), "shufflenet_v2 got width=0.75"),
    ("shufflenet_v2_cifar", dict(width=3), "needs one of \\[0.5, 1.0, 1.5"),
  ],
)
def test_an_impossible_size_says_which_are_possible(name, sizes, message):
  with pytest.raises(UserError, match=message):
    models.MODELS[name](**sizes, num_classes=5, rngs=nnx.Rngs(0))
