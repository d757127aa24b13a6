"""The convolutions of CPUs are XLA's own, and so are their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from kdjax import convolution
from kdjax.models import layers

LAYOUT = ("NHWC", "HWIO", "NHWC")


def arrays(size, kernel, channels=5, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  shapes = (3, *size, channels), (*kernel, 1, channels)
  return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def loss(conv, strides, padding, groups=None):
  def total(x, kernel):
    y = conv(
      x,
      kernel,
      strides,
      padding,
      dimension_numbers=LAYOUT,
      feature_group_count=groups or x.shape[-1],
    )
    return jnp.sum(jnp.sin(jnp.float32(y))), y

  return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize(
  ("size", "kernel", "strides", "padding"),
  [
    ((8, 8), (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((7, 9), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((8, 6), (5, 5), (2, 2), ((2, 2), (2, 2))),
    ((8, 8), (3, 3), (2, 2), ((0, 1), (0, 1))),  # TensorFlow's "same"
    ((4, 4), (7, 7), (1, 1), ((3, 3), (3, 3))),
    ((9, 7), (3, 5), (2, 1), ((0, 2), (1, 3))),
  ],
)
def test_values_and_gradients_are_xlas(size, kernel, strides, padding):
  given = arrays(size, kernel)
  gradients, y = loss(convolution.conv_general_dilated, strides, padding)(
    *given
  )
  want, want_y = loss(lax.conv_general_dilated, strides, padding)(*given)
  np.testing.assert_allclose(y, want_y, rtol=1e-5, atol=1e-6)
  for ours, theirs in zip(gradients, want):
    # Sums of some hundred products of numbers near 1.
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 5), (5, 3)])
@pytest.mark.parametrize(
  ("batch", "size", "kernel", "strides", "padding"),
  [
    (4, (8, 6), (3, 3), (1, 1), ((1, 1), (1, 1))),
    (4, (7, 9), (3, 3), (2, 2), ((1, 1), (1, 1))),
    (4, (8, 8), (1, 1), (2, 2), ((0, 0), (0, 0))),
    (4, (8, 6), (1, 1), (1, 1), ((0, 0), (0, 0))),
    (2, (9, 9), (7, 7), (2, 2), ((3, 3), (3, 3))),
    (3, (6, 7), (3, 2), (1, 1), ((0, 2), (1, 0))),
    (6, (5, 5), (2, 2), (1, 1), ((3, 0), (0, 2))),  # wider than the kernel
  ],
)
def test_dense_ones_too(
  monkeypatch, batch, size, kernel, strides, padding, inputs, outputs
):
  # Two examples of the largest of these maps a part.
  monkeypatch.setattr(convolution, "_POSITIONS", 170)
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  rng = np.random.default_rng(0)
  shapes = (batch, *size, inputs), (*kernel, inputs, outputs)
  given = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
  conv = loss(convolution.conv_general_dilated, strides, padding, 1)
  gradients, y = conv(*given)
  want, want_y = loss(lax.conv_general_dilated, strides, padding, 1)(*given)
  np.testing.assert_allclose(y, want_y, rtol=1e-5, atol=1e-5)
  for ours, theirs in zip(gradients, want):
    # Sums of some hundred products of numbers near 1.
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)


def test_bfloat16_gradients_keep_their_dtype():
  given = arrays((8, 8), (3, 3), dtype=jnp.bfloat16)
  padding = ((1, 1), (1, 1))
  ours, _ = loss(convolution.conv_general_dilated, (1, 1), padding)(*given)
  want, _ = loss(convolution.conv_general_dilated, (1, 1), padding)(
    *map(jnp.float32, given)
  )
  for got, exact in zip(ours, want):
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(jnp.float32(got), exact, rtol=0.05, atol=0.1)


def test_the_kernels_gradient_costs_what_the_convolution_does():
  given = arrays((16, 16), (3, 3), channels=32)
  counts = [
    loss(conv, (1, 1), ((1, 1), (1, 1))).lower(*given).compile()
    for conv in (convolution.conv_general_dilated, lax.conv_general_dilated)
  ]
  ours, xlas = (c.cost_analysis()["flops"] for c in counts)
  assert xlas > 5 * ours


@pytest.mark.parametrize(
  ("groups", "padding", "dilation"),
  [(2, ((1, 1), (1, 1)), None), (4, "SAME", None), (4, ((1, 1),) * 2, (2, 2))],
)
def test_all_other_convolutions_are_left_to_xla(groups, padding, dilation):
  x, _ = arrays((8, 8), (3, 3), channels=4)
  kernel = jnp.ones((3, 3, 4 // groups, 4))
  options = dict(
    dimension_numbers=LAYOUT,
    feature_group_count=groups,
    rhs_dilation=dilation,
  )
  np.testing.assert_array_equal(
    convolution.conv_general_dilated(x, kernel, (1, 1), padding, **options),
    lax.conv_general_dilated(x, kernel, (1, 1), padding, **options),
  )


def test_the_networks_convolutions_are_these():
  conv = layers.conv(4, 4, 3, groups=4, dtype=jnp.float32, rngs=nnx.Rngs(0))
  assert "custom_vjp" in str(jax.make_jaxpr(conv)(jnp.ones((1, 8, 8, 4))))
