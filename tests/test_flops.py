"""FLOPs of a step by hand, loops as often as they run; peaks by kind."""

import math

import jax
import jax.numpy as jnp
import networks
import pytest
from golden_decoders import golden
from jax.experimental import pallas
from jax.sharding import PartitionSpec

from kdjax import flops, parallel
from kdjax.models.decoder import (
  architecture,
  decoder,
  flops_per_token,
  parameters,
)

TEACHER, FROZEN = networks.teacher()


def of(f, *shapes):
  specs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  return flops.of_program(jax.make_jaxpr(f)(*specs).jaxpr)


@pytest.mark.parametrize("taught", [True, False])
def test_a_step_of_two_layers_by_hand(taught):
  """2 · rows · (3 · width + width · 5) forward; the student's three times."""
  student, batch = networks.bare(width=8), networks.batch(16)
  variables = jax.eval_shape(student.init, jax.random.key(0), batch)
  theirs = (TEACHER, FROZEN) if taught else (None, ())
  found = flops.of_step(student, theirs[0], variables, theirs[1], batch)
  forward = lambda width: 2 * 16 * width * (3 + 5)  # noqa: E731
  assert found == 3 * forward(8) + taught * forward(16)


def test_a_loop_counts_as_often_as_it_runs():
  def scanned(x, w):
    return jax.lax.scan(lambda c, _: (c @ w, None), x, length=7)[0]

  assert of(scanned, (4, 8), (8, 8)) == 7 * 2 * 4 * 8 * 8
  nested = lambda x, w: jax.lax.map(lambda row: scanned(row, w), x)  # noqa: E731
  assert of(nested, (3, 4, 8), (8, 8)) == 3 * 7 * 2 * 4 * 8 * 8
  again = jax.jit(jax.checkpoint(scanned))
  assert of(again, (4, 8), (8, 8)) == 7 * 2 * 4 * 8 * 8


def test_of_branches_the_dearest():
  def f(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

  assert of(f, (4, 8), (8, 8)) == 2 * 2 * 4 * 8 * 8


def test_batched_products_and_grouped_convolutions():
  product = lambda a, b: jnp.einsum("bij,bjk->bik", a, b)  # noqa: E731
  assert of(product, (5, 2, 3), (5, 3, 4)) == 2 * 5 * 2 * 3 * 4

  def convolution(x, k):
    return jax.lax.conv_general_dilated(
      x,
      k,
      (2, 2),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=2,
    )

  shapes = (2, 8, 8, 6), (3, 3, 3, 10)
  assert of(convolution, *shapes) == 2 * (2 * 4 * 4 * 10) * 3 * 3 * 3


def test_every_device_of_a_shard_map_and_every_block_of_a_kernel():
  mesh = parallel.make_mesh(4)
  split = PartitionSpec("data")
  f = jax.shard_map(
    lambda x, w: x @ w, mesh=mesh, in_specs=(split, None), out_specs=split
  )
  assert of(f, (8, 16), (16, 2)) == 2 * 8 * 16 * 2

  def kernel(x, w, out):
    out[...] = x[...] @ w[...]

  def blocks(x, w):
    return pallas.pallas_call(
      kernel,
      grid=(4,),
      in_specs=[
        pallas.BlockSpec((8, 16), lambda i: (i, 0)),
        pallas.BlockSpec((16, 16), lambda i: (0, 0)),
      ],
      out_specs=pallas.BlockSpec((8, 16), lambda i: (i, 0)),
      out_shape=jax.ShapeDtypeStruct((32, 16), jnp.float32),
    )(x, w)

  assert of(blocks, (32, 16), (16, 16)) == 2 * 32 * 16 * 16


def test_peaks_by_the_names_that_devices_have():
  assert flops.peak("TPU v5 lite") == 197e12
  assert flops.peak("NVIDIA A100-SXM4-40GB") == 312e12
  assert flops.peak("NVIDIA H100 PCIe") == 756e12
  assert flops.peak("NVIDIA L40S") == 362e12
  assert flops.peak("NVIDIA L40") is None
  assert flops.peak("NVIDIA A10") is None
  assert flops.peak("cpu") is None
  # 2 · 197 TFLOP/s for 0.5 s are 197 TFLOP.
  assert flops.mfu(98.5e12, 0.5, "TPU v5e", 2) == 0.5
  assert flops.mfu(98.5e12, 0.5, "an abacus", 2) is None


def test_a_scanned_decoder_as_counted_by_hand():
  """2 · weights + 4 · heads · d · length a token and layer, and the head."""
  net = architecture(golden("qwen3").config)
  assert net.depth > 1
  model, length = decoder(net), 24
  batch = {"tokens": jax.ShapeDtypeStruct((3, length), jnp.int32)}
  variables = jax.eval_shape(model.init, jax.random.key(0), batch)
  weights = net.vocab_size * net.width + sum(
    math.prod(shape)
    for path, shape in parameters.shapes(net).items()
    if path.startswith("layers/") and path.endswith("kernel")
  )
  scores = 4 * net.depth * net.heads * net.head_dim * length
  forward = 3 * length * (2 * weights + scores)
  found = flops.of_step(model, None, variables, (), batch)
  # The angles of the rotation are a product too, of a few numbers.
  assert found == pytest.approx(3 * forward, rel=2e-3)
  # A causal mask leaves half of the scores, and those `cost` leaves out.
  mathematics = 3 * length * flops_per_token(net, length)
  halved = 3 * length * scores * (1 - (length + 1) / (2 * length))
  assert forward - halved == pytest.approx(mathematics)
