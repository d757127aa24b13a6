"""Networks whose initialisers never run: they take longer than the tests."""

import jax
import numpy as np
from flax import nnx


class OneKey(nnx.Rngs):
  """The same key at every draw: counting them takes most of a large trace."""

  def params(self):
    return jax.random.key(0)


def abstract(make):
  """The module `make(rngs)` with shapes for arrays."""
  return nnx.eval_shape(lambda: make(OneKey(0)))


def filled(make):
  """The module `make(rngs)`, in evaluation mode, with values of no meaning.

  Parameters lie in +-0.5, statistics in 0.5 to 1.5.
  """
  module = abstract(make)
  module.eval()
  rng = np.random.default_rng(0)
  for kind, low in ((nnx.Param, -0.5), (nnx.BatchStat, 0.5)):
    nnx.update(
      module,
      jax.tree.map(
        # `jnp.asarray` would compile a program for each shape.
        lambda x, low=low: jax.device_put(
          rng.uniform(low, low + 1, x.shape).astype(x.dtype)
        ),
        nnx.state(module, kind),
      ),
    )
  return module


def run(module, *inputs):
  """What the module returns, as NumPy arrays; compiled as one program."""
  graphdef, state = nnx.split(module)
  call = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))
  return jax.tree.map(np.asarray, call(state, *inputs))
