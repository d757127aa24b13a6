"""Values and gradients beside PyTorch's own functions, run here and now."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

RNG = np.random.default_rng(0)
S, T = (RNG.normal(size=(2, 16, 10)) * 3).astype(np.float32)
LABEL = RNG.integers(0, 10, 16)


def assert_same(ours, theirs):
  """Both take logits to a scalar; values and gradients agree in float32."""
  value, gradient = jax.value_and_grad(ours)(jnp.asarray(S))
  logits = torch.tensor(S, requires_grad=True)
  expected = theirs(logits)
  expected.backward()
  np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
  np.testing.assert_allclose(gradient, logits.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_kl_div_of_the_softened_logits(temperature):
  f = torch.nn.functional
  assert_same(
    lambda s: losses.kl(s, jnp.asarray(T), temperature=temperature).mean(),
    lambda s: f.kl_div(
      f.log_softmax(s / temperature, -1),
      f.log_softmax(torch.tensor(T) / temperature, -1),
      reduction="batchmean",
      log_target=True,
    ),
  )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_cross_entropy(smoothing):
  assert_same(
    lambda s: losses.cross_entropy(
      s, jnp.asarray(LABEL), label_smoothing=smoothing
    ).mean(),
    lambda s: torch.nn.functional.cross_entropy(
      s, torch.tensor(LABEL), label_smoothing=smoothing
    ),
  )


def test_cross_entropy_takes_soft_labels_as_torch_does():
  soft = RNG.dirichlet(np.ones(10), 16).astype(np.float32)
  assert_same(
    lambda s: losses.cross_entropy(s, jnp.asarray(soft)).mean(),
    lambda s: torch.nn.functional.cross_entropy(s, torch.tensor(soft)),
  )
