"""A config's optimizers, objective and transforms are the ones it names."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from kdjax import config, losses, totals
from kdjax.errors import UserError

PARAMS = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full((3,), 2.0)}
GRADIENT = jax.tree.map(lambda x: 3 * jnp.ones_like(x), PARAMS)
BASE = dict(learning_rate=0.1, clip=0.0, weight_decay=0.0, decay_on="all")


def update(settings):
  optimizer, *_ = config.optimizer(ConfigDict(BASE | settings), "optimizer")
  return optimizer.update(GRADIENT, optimizer.init(PARAMS), PARAMS)[0]


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def by_optax(transform):
  return transform.update(GRADIENT, transform.init(PARAMS), PARAMS)[0]


def test_an_optimizer_is_optaxs_of_that_name_and_those_arguments():
  assert_equal(
    update(dict(name="sgd", momentum=0.9, nesterov=True)),
    by_optax(optax.sgd(0.1, momentum=0.9, nesterov=True)),
  )
  assert_equal(
    update(dict(name="adam", b1=0.5)), by_optax(optax.adam(0.1, b1=0.5))
  )


def test_weight_decay_of_sgd_is_added_to_the_gradient_of_kernels_alone():
  got = update(dict(name="sgd", weight_decay=0.5, decay_on="kernels"))
  np.testing.assert_allclose(got["kernel"], -0.1 * (3 + 0.5 * 2), rtol=1e-6)
  np.testing.assert_allclose(got["bias"], -0.1 * 3, rtol=1e-6)
  everywhere = update(dict(name="sgd", weight_decay=0.5))
  np.testing.assert_allclose(everywhere["bias"], -0.1 * 4, rtol=1e-6)


def test_norms_and_biases_of_stacked_layers_do_not_decay():
  # Each of their arrays has the layers as an axis more.
  params = {
    "norm": {"scale": jnp.ones((2, 3))},
    "query": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))},
    "lora_in": jnp.ones((2, 3, 1)),
    "class_token": jnp.ones((1, 1, 3)),
  }
  settings = BASE | dict(name="sgd", weight_decay=0.5, decay_on="kernels")
  optimizer, *_ = config.optimizer(ConfigDict(settings), "optimizer")
  zero = jax.tree.map(jnp.zeros_like, params)
  update = optimizer.update(zero, optimizer.init(params), params)[0]
  moved = jax.tree.map(lambda x: bool(jnp.any(x != 0)), update)
  assert moved == {
    "norm": {"scale": False},
    "query": {"kernel": True, "bias": False},
    "lora_in": True,
    "class_token": False,
  }


def test_weight_decay_of_adamw_is_its_own():
  def mask(params):
    return {"kernel": True, "bias": False}

  assert_equal(
    update(dict(name="adamw", weight_decay=0.5, decay_on="kernels")),
    by_optax(optax.adamw(0.1, weight_decay=0.5, mask=mask)),
  )
  # Not optax's default of 1e-4, which the config does not show.
  assert_equal(
    update(dict(name="adamw")), by_optax(optax.adamw(0.1, weight_decay=0.0))
  )


def test_clip_limits_the_norm_of_the_gradient():
  got = update(dict(name="sgd", clip=1.0))
  np.testing.assert_allclose(optax.tree.norm(got), 0.1, rtol=1e-6)


def test_the_learning_rate_is_a_schedule():
  rate = dict(
    schedule="linear_schedule",
    init_value=1.0,
    end_value=0.0,
    transition_steps=4,
  )
  _, got, _ = config.optimizer(
    ConfigDict(BASE | dict(name="sgd", learning_rate=rate)), "optimizer"
  )
  assert got(2) == 0.5


@pytest.mark.parametrize(
  ("settings", "says"),
  [
    (dict(name="sgdd"), "did you mean 'sgd'"),
    (dict(name="sgd", momentun=0.9), "did you mean 'momentum'"),
    (dict(momentum=0.9), "lacks 'name'"),
    (dict(name="sgd", decay_on="biases"), "unknown decay_on of optimizer"),
  ],
)
def test_mistakes_in_an_optimizer_are_named(settings, says):
  with pytest.raises(UserError, match=says):
    update(settings)


RNG = np.random.default_rng(0)
S, T = jnp.float32(RNG.normal(size=(2, 6, 5)) * 2)
BATCH = {"label": jnp.arange(6) % 5, "mask": jnp.ones(6)}


def total(step=0, **changes):
  settings = dict(
    alpha=0.25,
    hard_weight=None,
    soft_weight=None,
    temperature=2.0,
    hard=dict(name="cross_entropy", label_smoothing=0.0),
    soft=dict(name="kl"),
    terms={},
  )
  goal = config.goal(ConfigDict(settings | changes))
  parts, _ = totals.logit_terms(
    goal.terms,
    S,
    T,
    BATCH,
    totals.denominators(goal.terms, BATCH),
    jnp.int32(step),
  )
  return sum(parts.values())


HARD = losses.cross_entropy(S, BATCH["label"]).mean()


def test_the_goal_is_alpha_hard_and_the_rest_soft():
  soft = 4 * losses.kl(S, T, temperature=2.0).mean()
  np.testing.assert_allclose(total(), 0.25 * HARD + 0.75 * soft, rtol=1e-6)
  np.testing.assert_allclose(
    total(alpha=None, hard_weight=1.0, soft_weight=2.0),
    HARD + 2 * soft,
    rtol=1e-6,
  )


def test_arguments_and_transforms_reach_the_loss():
  got = total(alpha=0.0, soft=dict(name="jsd", mix=0.3, zscore=True))
  want = losses.zscore(losses.jsd)(S, T, temperature=2.0, mix=0.3)
  np.testing.assert_allclose(got, 4 * want.mean(), rtol=1e-6)
  got = total(alpha=0.0, soft=dict(name="kl", teacher_temperature=5.0))
  want = losses.kl(S / 2, T / 5)
  np.testing.assert_allclose(got, 4 * want.mean(), rtol=1e-5)
  got = total(alpha=1.0, hard=dict(name="cross_entropy", label_smoothing=0.2))
  want = losses.cross_entropy(S, BATCH["label"], label_smoothing=0.2)
  np.testing.assert_allclose(got, want.mean(), rtol=1e-6)


def test_several_temperatures_and_scheduled_arguments():
  want = np.mean(
    [t**2 * losses.kl(S, T, temperature=t).mean() for t in (1.0, 3.0)]
  )
  np.testing.assert_allclose(
    total(alpha=0.0, temperature=(1.0, 3.0)), want, rtol=1e-6
  )
  mix = dict(
    schedule="linear_schedule",
    init_value=0.1,
    end_value=0.5,
    transition_steps=4,
  )
  got = total(step=2, alpha=0.0, soft=dict(name="jsd", mix=mix))
  want = 4 * losses.jsd(S, T, temperature=2.0, mix=0.3).mean()
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_further_terms_have_their_own_weight_and_temperature():
  terms = dict(far=dict(name="total_variation", weight=0.5, temperature=4.0))
  want = (
    total() + 0.5 * 4 * losses.total_variation(S, T, temperature=4.0).mean()
  )
  np.testing.assert_allclose(total(terms=terms), want, rtol=1e-6)
