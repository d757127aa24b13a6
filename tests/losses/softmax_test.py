import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.losses import softmax

from . import oracle
from .oracle import STUDENT


def test_log_softmax_keeps_its_digits_beside_a_large_constant():
  # Near 1e4 float32 has steps of 1e-3, which T may not widen any further.
  logits = np.float32(1e4 + STUDENT)
  got = softmax.log_softmax(logits, 3.0, jnp.ones((5, 7), bool))
  oracle.close(got, oracle.log_softmax(np.float64(logits), 3.0))


def test_log_softmax_is_zero_outside_the_support():
  where = np.arange(7) < 4
  logits = np.where(where, STUDENT, -np.inf)
  got = softmax.log_softmax(
    jnp.float32(logits), 2.0, jnp.broadcast_to(where, (5, 7))
  )
  oracle.close(got[:, :4], oracle.log_softmax(STUDENT[:, :4], 2.0))
  np.testing.assert_array_equal(got[:, 4:], 0)


def test_log_sum_exp_reaches_where_exp_underflows():
  values = np.float32(STUDENT - 2e4)
  where = np.arange(7) < 4
  got = softmax.log_sum_exp(values, jnp.broadcast_to(where, (5, 7)))
  shifted = np.float64(values[:, :4]) + 2e4
  want = np.log(np.sum(np.exp(shifted), axis=-1)) - 2e4
  oracle.close(got, want, rtol=1e-7)


def test_class_sum_of_nothing_is_nan_and_sends_no_gradient():
  where = jnp.array([[True, False], [False, False]])
  values = jnp.ones((2, 2))
  got = softmax.class_sum(values, where)
  np.testing.assert_array_equal(got, [1.0, np.nan])
  gradient = jax.grad(lambda v: softmax.class_sum(v, where).sum())(values)
  np.testing.assert_array_equal(gradient, [[1, 0], [0, 0]])


def test_a_support_that_is_known_is_not_looked_for():
  logits = jnp.array([[0.0, -jnp.inf, 1.0, 2.0]])
  with softmax.known_support(3):
    assert softmax.support(logits).tolist() == [[True, True, True, False]]
    with softmax.known_support(None):
      assert softmax.support(logits).tolist() == [[True, False, True, True]]
  with softmax.known_support(4):
    assert softmax.support(logits, logits).all()
  # An error in a loss leaves nothing behind.
  with pytest.raises(UserError), softmax.known_support(4):
    softmax.over_common_support(logits, logits[:, :3])
  assert softmax.support(logits).tolist() == [[True, False, True, True]]


def test_relative_entropy_has_the_derivatives_of_its_equation():
  rng = np.random.default_rng(0)
  log_a, log_b = oracle.log_softmax(3 * rng.normal(size=(2, 5, 7)), 1.0)
  where = jnp.ones((5, 7), bool)

  def plain(u, v):
    return jnp.sum(jnp.exp(v) - jnp.exp(u) * (1 + v - u))

  for n in (0, 1):
    ours = jax.grad(
      lambda u, v: softmax.relative_entropy(u, v, where).sum(), n
    )(jnp.float32(log_a), jnp.float32(log_b))
    with jax.enable_x64(True):
      want = jax.grad(plain, n)(jnp.float64(log_a), jnp.float64(log_b))
    oracle.close(ours, want)
