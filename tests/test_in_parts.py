"""A network by parts is the network."""

import functools

import jax
import networks
import numpy as np
import pytest

from kdjax import parallel
from kdjax.errors import UserError
from kdjax.in_parts import in_parts
from kdjax.models.decoder import decoder
from kdjax.types import LinearLogits

LLAMA = dict(
  model_type="llama",
  vocab_size=23,
  hidden_size=8,
  intermediate_size=12,
  num_hidden_layers=2,
  num_attention_heads=2,
  max_position_embeddings=16,
)
TOKENS = np.random.default_rng(0).integers(0, 23, (8, 5))


@pytest.mark.parametrize("head", ["dense", "linear"])
@pytest.mark.parametrize("devices", [1, 2])
def test_outputs_and_taps_are_those_of_the_whole_batch(head, devices):
  model = decoder(LLAMA, head=head)
  batch = parallel.put_batch({"tokens": TOKENS}, parallel.make_mesh(devices))
  variables = jax.jit(model.init)(jax.random.key(0), batch)

  def outputs(model):
    apply = functools.partial(model.apply, train=False, taps=("block_1",))
    return jax.jit(apply)(*variables, batch)[0]

  want, got = outputs(model), outputs(in_parts(model, 4))
  assert isinstance(got.logits, LinearLogits) == (head == "linear")
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    got,
    want,
  )


def test_a_part_is_held_at_a_time():
  model = decoder(LLAMA, head="linear")
  batch = {"tokens": jax.ShapeDtypeStruct((64, 16), np.int32)}
  variables = jax.eval_shape(model.init, jax.random.key(0), batch)

  def temporary(model):
    apply = jax.jit(functools.partial(model.apply, train=False))
    compiled = apply.lower(*variables, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(in_parts(model, 8)) < 0.4 * temporary(model)


def test_training_is_left_alone_and_one_part_is_the_network():
  model = networks.nnx_net(norm=True)
  assert in_parts(model, 1) is model
  batch = networks.batch(8)
  variables = jax.jit(model.init)(jax.random.key(0), batch)
  want, got = (
    jax.jit(functools.partial(m.apply, train=True))(*variables, batch)
    for m in (model, in_parts(model, 2))
  )
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_batch_that_the_parts_do_not_divide_is_refused():
  model = networks.bare()
  batch = networks.batch(10)
  variables = jax.jit(model.init)(jax.random.key(0), batch)
  with pytest.raises(UserError, match="10 rows, which 4 parts"):
    in_parts(model, 4).apply(*variables, batch, train=False)
