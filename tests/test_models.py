"""Sizes of the shipped networks against the published ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kdjax import adapters, evaluate, models
from kdjax.errors import UserError
from kdjax.models.layers import ConvNorm


def network(name, **sizes):
  return adapters.from_nnx(lambda rngs: models.MODELS[name](**sizes, rngs=rngs))


def variables_of(model, size, channels=3):
  batch = {
    "image": jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
  }
  return jax.eval_shape(model.init, jax.random.key(0), batch), batch


def conv(inputs, outputs, size):
  return inputs * outputs * size**2 + 2 * outputs  # and its normalisation


def test_resnet_cifar_has_the_parameters_of_its_layers():
  model = network(
    "resnet_cifar", depth=8, num_classes=100, width=64, stem_width=32
  )
  (params, _), _ = variables_of(model, 32)
  want = conv(3, 32, 3) + 256 * 100 + 100
  for a, b in [(32, 64), (64, 128), (128, 256)]:
    want += conv(a, b, 3) + conv(b, b, 3) + conv(a, b, 1)
  assert evaluate.num_parameters(params) == want


def test_resnet_cifar_counts_its_operations():
  model = network("resnet_cifar", depth=8, num_classes=10, channels=1, width=8)
  params, stats = model.init(
    jax.random.key(0), {"image": jnp.zeros((1, 8, 8, 1))}
  )
  batch = {"image": np.zeros((4, 8, 8, 1), np.float32)}
  flops = evaluate.flops_per_example(model, (params, stats), batch)
  # Multiply-adds of the convolutions, all taps inside the image: an upper
  # bound; padding, elementwise work and the classifier move it a little.
  macs = 64 * (9 * 8 + 2 * 9 * 64)
  macs += 16 * (9 * 8 * 16 + 9 * 256 + 128) + 4 * (9 * 16 * 32 + 9 * 1024 + 512)
  assert 0.75 * 2 * macs < flops < 1.1 * 2 * macs


def test_taps_halve_the_image_stage_by_stage():
  model = network("resnet_cifar", depth=8, num_classes=10, width=4)
  (params, stats), batch = variables_of(model, 16)
  names = ("stem", "stage_1", "stage_2", "stage_3", "pooled")
  output = jax.eval_shape(
    lambda p, s, b: model.apply(p, s, b, train=False, taps=names)[0],
    params,
    stats,
    batch,
  )
  shapes = [output.taps[name].shape for name in names]
  assert shapes == [
    (1, 16, 16, 4),
    (1, 16, 16, 4),
    (1, 8, 8, 8),
    (1, 4, 4, 16),
    (1, 16),
  ]


def test_a_stride_of_two_pads_both_sides_as_pretrained_weights_expect():
  layer = ConvNorm(
    1, 1, 3, 2, axis_name=None, dtype=jnp.float32, rngs=nnx.Rngs(0)
  )
  layer.conv.kernel[...] = jnp.ones((3, 3, 1, 1))
  image = np.zeros((1, 8, 8, 1), np.float32)
  image[0, 2, 2, 0] = 1.0
  seen = np.asarray(layer.conv(image))[0, :, :, 0]
  # Output 1 covers rows 1, 2, 3; "SAME" would have output 0 cover row 2 too.
  np.testing.assert_array_equal(np.argwhere(seen > 0), [[1, 1]])


def test_bfloat16_computes_in_it_and_keeps_float32_variables():
  model = network(
    "resnet_cifar", depth=8, num_classes=10, width=4, dtype=jnp.bfloat16
  )
  (params, stats), batch = variables_of(model, 8)
  output, new = jax.eval_shape(
    lambda p, s, b: model.apply(p, s, b, train=True, taps=("stage_2",)),
    params,
    stats,
    batch,
  )
  assert output.taps["stage_2"].dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves((params, new))} == {
    np.dtype("float32")
  }


def test_an_impossible_depth_says_which_are_possible():
  with pytest.raises(UserError, match="needs 6n \\+ 2"):
    network("resnet_cifar", depth=10, num_classes=10)
  with pytest.raises(UserError, match="152"):
    network("resnet", depth=51, num_classes=10)
