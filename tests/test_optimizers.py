"""DOT: a momentum of its own for the labels' gradient."""

import functools

import jax
import networks
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from kdjax import config, losses, parallel
from kdjax.errors import UserError
from kdjax.objective import Term, hinton
from kdjax.optimizers import dot
from kdjax.projectors import linear, project
from kdjax.train_step import init_state, jit_step, make_train_step

RNG = np.random.default_rng(0)
CLOSE = dict(rtol=1e-5, atol=1e-6)


def drawn():
  """A tree like the step's: the student's, and what a term owns."""
  shapes = {
    "student": {"kernel": (3, 2), "bias": (2,)},
    "terms": {"hint": {"kernel": (2, 4)}},
  }
  return jax.tree.map(
    lambda s: RNG.normal(size=s).astype(np.float32),
    shapes,
    is_leaf=lambda s: isinstance(s, tuple),
  )


PARAMS = drawn()
STEPS = 5
HARD = [drawn() for _ in range(STEPS)]
SOFT = [drawn() for _ in range(STEPS)]
FURTHER = [drawn() for _ in range(STEPS)]
for gradient in HARD:  # labels reach nothing that a term owns
  gradient["terms"]["hint"]["kernel"][:] = 0


def run(optimizer, groups):
  """Parameters after `STEPS` updates by `{group: gradient}`."""

  @jax.jit
  def update(params, state, by_group):
    total = jax.tree.map(lambda *g: sum(g), *by_group.values())
    updates, state = optimizer.update(total, state, params, by_group=by_group)
    return optax.apply_updates(params, updates), state

  params, state = PARAMS, optimizer.init(PARAMS)
  for n in range(STEPS):
    params, state = update(params, state, {g: v[n] for g, v in groups.items()})
  return params


def simulated(rate, momentum, delta, decay, *, decayed):
  """The same in float64 NumPy, leaf by leaf."""

  def leaf(path, w, *gradients):
    w = np.float64(w)
    hard, soft, further = np.split(np.float64(gradients), 3)
    owned = path[0].key == "terms"
    apart = 0.0 if owned else delta
    v_hard, v_soft = np.zeros_like(w), np.zeros_like(w)
    for n in range(STEPS):
      g = hard[n] + (decay * w if decayed(w) else 0)
      v_hard = (momentum - apart) * v_hard + g
      v_soft = (momentum + apart) * v_soft + soft[n] + further[n]
      w = w - rate(n) * (v_hard + v_soft)
    return w

  return jax.tree_util.tree_map_with_path(leaf, PARAMS, *HARD, *SOFT, *FURTHER)


def assert_close(got, want):
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, **CLOSE), got, want
  )


GROUPS = {"hard": HARD, "soft": SOFT, "extra": FURTHER}


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("delta", [0.0, 0.075, 0.4])
def test_dot_is_its_equation(delta, decay):
  rate = optax.linear_schedule(0.1, 0.02, STEPS)
  got = run(dot(rate, momentum=0.5, delta=delta, weight_decay=decay), GROUPS)
  want = simulated(
    lambda n: 0.1 - 0.016 * n, 0.5, delta, decay, decayed=lambda w: True
  )
  assert_close(got, want)


def test_weight_decay_keeps_to_its_mask():
  def kernels(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)

  got = run(dot(0.1, weight_decay=0.3, mask=kernels), GROUPS)
  want = simulated(lambda n: 0.1, 0.9, 0.075, 0.3, decayed=lambda w: w.ndim > 1)
  assert_close(got, want)


def test_without_a_difference_it_is_sgd():
  want = run(
    optax.with_extra_args_support(
      optax.chain(optax.add_decayed_weights(0.3), optax.sgd(0.1, momentum=0.9))
    ),
    GROUPS,
  )
  assert_close(run(dot(0.1, delta=0.0, weight_decay=0.3), GROUPS), want)
  none = run(dot(0.1, momentum=0.0, delta=0.0), GROUPS)
  assert_close(none, run(optax.with_extra_args_support(optax.sgd(0.1)), GROUPS))


def test_without_labels_all_is_soft():
  got = run(dot(0.1, momentum=0.5, delta=0.3), {"soft": SOFT})["student"]
  want = run(
    optax.with_extra_args_support(optax.sgd(0.1, momentum=0.8)), {"soft": SOFT}
  )["student"]
  assert_close(got, want)


@pytest.mark.parametrize(
  ("momentum", "delta"), [(0.9, 0.1), (0.1, 0.2), (0.5, -0.6), (np.nan, 0.0)]
)
def test_momenta_outside_their_range_are_refused(momentum, delta):
  with pytest.raises(UserError, match="needs momentum - delta >= 0"):
    dot(0.1, momentum=momentum, delta=delta)


TEACHER, FROZEN = networks.teacher()
STUDENT = networks.bare()
MESH = parallel.make_mesh(1)
BATCH = networks.batch(16, mask=(np.arange(16) % 5 != 3).astype(np.float32))
GOAL = hinton(alpha=0.3, temperature=2.0) + [
  project(Term("hint", losses.hint, taps=("hidden", "hidden")), linear())
]


def by_step(optimizer, **kwargs):
  """A state after three donated steps, and the last metrics."""
  state = init_state(
    STUDENT, TEACHER, GOAL, optimizer, jax.random.key(0), BATCH, frozen=FROZEN
  )
  state = parallel.put(state, MESH)
  step = jit_step(
    make_train_step(STUDENT, TEACHER, GOAL, optimizer, **kwargs), MESH
  )
  frozen, batch = parallel.put(FROZEN, MESH), parallel.put_batch(BATCH, MESH)
  for _ in range(3):
    state, metrics = step(state, frozen, batch)
  return jax.device_get(state.replace(key=())), metrics


@functools.cache
def grouped():
  return by_step(dot(0.1), gradients_by_group=True)


def test_the_step_gives_the_gradients_by_group():
  state, _ = grouped()
  hard, soft = state.opt_state.hard, state.opt_state.soft
  for kernel in jax.tree.leaves([hard["student"], soft["student"]]):
    assert np.abs(kernel).max() > 1e-3
  # Labels do not reach a projector.
  for kernel in jax.tree.leaves(hard["terms"]):
    np.testing.assert_array_equal(kernel, 0)
  plain, _ = by_step(optax.sgd(0.1, momentum=0.9))
  apart = state.params["first"] - plain.params["first"]
  assert np.abs(apart).max() > 1e-4


def test_the_groups_add_up_to_the_gradient():
  state, metrics = by_step(dot(0.1, delta=0.0), gradients_by_group=True)
  plain, wanted = by_step(optax.sgd(0.1, momentum=0.9))
  # The sum is taken after the backward pass instead of within it.
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    (state.trained, metrics),
    (plain.trained, wanted),
  )


def test_microbatches_add_up_group_by_group():
  state, metrics = by_step(dot(0.1), gradients_by_group=True, microbatches=4)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    (state, metrics),
    grouped(),
  )


def test_the_missing_flag_is_named():
  with pytest.raises(UserError, match="gradients_by_group=True"):
    by_step(dot(0.1))


SETTINGS = dict(
  name="dot",
  learning_rate=0.1,
  clip=0.0,
  weight_decay=0.3,
  decay_on="kernels",
  momentum=0.5,
  delta=0.2,
)


def test_a_config_names_it():
  got = config.optimizer(ConfigDict(SETTINGS), "optimizer")
  assert got.by_group
  want = simulated(lambda n: 0.1, 0.5, 0.2, 0.3, decayed=lambda w: w.ndim > 1)
  assert_close(run(got.transformation, GROUPS), want)
  sgd = {k: v for k, v in SETTINGS.items() if k != "delta"} | dict(name="sgd")
  assert not config.optimizer(ConfigDict(sgd), "optimizer").by_group


def test_a_config_with_clip_is_refused():
  with pytest.raises(UserError, match=r"optimizer is dot with clip=1\.0"):
    config.optimizer(ConfigDict(SETTINGS | dict(clip=1.0)), "optimizer")
  with pytest.raises(UserError, match="did you mean 'delta'"):
    config.optimizer(ConfigDict(SETTINGS | dict(dleta=0.1)), "optimizer")
