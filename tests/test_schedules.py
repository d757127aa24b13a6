"""Config values become optax's schedules, by optax's names."""

import jax
import numpy as np
import optax
import pytest

from kdjax.errors import UserError
from kdjax.schedules import check_range, schedule

CASES = {
  "number": (3, optax.constant_schedule(3.0)),
  "constant": (
    dict(schedule="constant_schedule", value=2.0),
    optax.constant_schedule(2.0),
  ),
  "linear": (
    dict(
      schedule="linear_schedule",
      init_value=8.0,
      end_value=2.0,
      transition_steps=10,
    ),
    optax.linear_schedule(8.0, 2.0, 10),
  ),
  "cosine": (
    dict(schedule="cosine_decay_schedule", init_value=1.0, decay_steps=10),
    optax.cosine_decay_schedule(1.0, 10),
  ),
  "exponential": (
    dict(
      schedule="exponential_decay",
      init_value=1.0,
      transition_steps=5,
      decay_rate=0.5,
    ),
    optax.exponential_decay(1.0, 5, 0.5),
  ),
  "piecewise": (
    dict(
      schedule="piecewise_constant_schedule",
      init_value=1.0,
      boundaries_and_scales={"3": 0.1, "6": 0.5},
    ),
    optax.piecewise_constant_schedule(1.0, {3: 0.1, 6: 0.5}),
  ),
  "warm-up": (
    dict(
      schedule="warmup_cosine_decay_schedule",
      init_value=0.0,
      peak_value=1.0,
      warmup_steps=3,
      decay_steps=10,
    ),
    optax.warmup_cosine_decay_schedule(0.0, 1.0, 3, 10),
  ),
  "joined": (
    dict(
      schedule="join_schedules",
      schedules=[4.0, dict(schedule="constant_schedule", value=1.0)],
      boundaries=[5],
    ),
    optax.join_schedules(
      [optax.constant_schedule(4.0), optax.constant_schedule(1.0)], [5]
    ),
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_is_the_schedule_of_optax(name):
  value, want = CASES[name]
  got = jax.jit(schedule(value))
  for step in range(12):
    np.testing.assert_allclose(got(step), want(step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("value", "says"),
  [
    (dict(schedule="linear_shedule"), "linear_schedule"),
    (dict(init_value=1.0), "needs 'schedule'"),
    (
      dict(schedule="linear_schedule", init_valu=1.0, end_value=0.0),
      "init_value",
    ),
    (dict(schedule="linear_schedule", init_value=1.0), "end_value"),
    ("warm", "must be a number or a schedule"),
  ],
)
def test_mistakes_are_named(value, says):
  with pytest.raises(UserError, match=says):
    schedule(value, "temperature")


def test_a_schedule_that_leaves_its_range_is_refused_at_that_update():
  falling = optax.linear_schedule(2.0, -2.0, 8)
  with pytest.raises(UserError, match=r"is 0 at update 4, must stay in \(0"):
    check_range(falling, 10, "temperature", 0, open_low=True)
  check_range(falling, 4, "temperature", 0, open_low=True)
  with pytest.raises(UserError, match=r"2 at update 0, must stay in \[0, 1\]"):
    check_range(falling, 10, "alpha", 0, 1)
  with pytest.raises(UserError, match="nan at update 0"):
    check_range(lambda step: float("nan"), 3, "alpha", 0, 1)
