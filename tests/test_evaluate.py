"""Metrics against their definitions in float64, padding and batching aside."""

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from networks import softmax

from kdjax import parallel
from kdjax.errors import UserError
from kdjax.evaluate import finish, make_evaluate, make_examine, sums

RNG = np.random.default_rng(1)
S, T = RNG.normal(size=(2, 40, 5)) * 2
LABEL = RNG.integers(0, 5, 40)


def expected(s, t, label):
  q, p = softmax(s), softmax(t)
  right = q.argmax(-1) == label
  confidence = q.max(-1)
  ece = 0.0
  for low in np.arange(15) / 15:
    inside = (confidence > low) & (confidence <= low + 1 / 15)
    if inside.any():
      ece += inside.mean() * abs(
        right[inside].mean() - confidence[inside].mean()
      )
  return {
    "accuracy": right.mean(),
    "nll": -np.log(q)[np.arange(len(label)), label].mean(),
    "ece": ece,
    "agreement": (q.argmax(-1) == p.argmax(-1)).mean(),
    "kl": np.sum(p * np.log(p / q), -1).mean(),
  }


def test_metrics_are_their_definitions():
  got = finish(
    jax.jit(sums)(jnp.float32(S), LABEL, jnp.ones(40), jnp.float32(T))
  )
  want = expected(S, T, LABEL)
  assert set(got) == set(want)
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


def test_full_confidence_falls_into_the_last_bin():
  logits = jnp.array([[200.0, 0.0], [200.0, 0.0]])
  got = finish(jax.jit(sums)(logits, jnp.array([0, 1]), jnp.ones(2)))
  np.testing.assert_allclose(got["ece"], 0.5)


def test_padding_changes_nothing_even_when_it_is_nan():
  mask = np.ones(43)
  mask[40:] = 0
  s = np.concatenate([S, np.full((3, 5), np.nan)])
  t = np.concatenate([T, np.full((3, 5), np.nan)])
  label = np.concatenate([LABEL, [-1, 9, 0]])
  got = finish(jax.jit(sums)(jnp.float32(s), label, mask, jnp.float32(t)))
  for name, value in expected(S, T, LABEL).items():
    np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


def test_batches_and_devices_add_up():
  model, variables = networks.teacher(seed=1)
  teacher, frozen = networks.teacher()
  whole = networks.batch(48)
  parts = [{k: v[i : i + 16] for k, v in whole.items()} for i in (0, 16, 32)]
  parts[2]["mask"] = (np.arange(16) < 11).astype(np.float32)
  whole["mask"] = np.concatenate([p["mask"] for p in parts])
  one = make_evaluate(model, teacher, parallel.make_mesh(1))
  eight = make_evaluate(model, teacher, parallel.make_mesh(8))
  want = one(variables, frozen, [whole])
  for got in (one(variables, frozen, parts), eight(variables, frozen, parts)):
    for name, value in want.items():
      np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


def test_each_example_that_counts_is_told_of_once_and_in_order():
  model, variables = networks.teacher(seed=1)
  teacher, frozen = networks.teacher()
  whole = networks.batch(48)
  whole["mask"] = (np.arange(48) % 5 > 0).astype(np.float32)
  parts = [{k: v[i : i + 16] for k, v in whole.items()} for i in (0, 16, 32)]
  q, p = (
    softmax(np.float64(m.apply(*v, whole, train=False)[0].logits))
    for m, v in ((model, variables), (teacher, frozen))
  )
  at = np.flatnonzero(whole["mask"])[:30]
  want = {
    "row": at,
    "label": whole["label"][at],
    "guess": q.argmax(-1)[at],
    "confidence": q.max(-1)[at],
    "nll": -np.log(q[at, whole["label"][at]]),
    "teacher_guess": p.argmax(-1)[at],
    "kl": np.sum(p * np.log(p / q), -1)[at],
  }
  examine = make_examine(model, teacher, parallel.make_mesh(8), most=30)
  metrics, got = examine(variables, frozen, parts)
  assert set(got) == set(want)
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, 1e-4, 1e-6, err_msg=name)
  # The metrics are of all.
  counts = whole["mask"] > 0
  nll = -np.log(q[np.arange(48), whole["label"]])[counts].mean()
  np.testing.assert_allclose(metrics["nll"], nll, rtol=1e-5)


def test_nothing_to_evaluate_is_an_error():
  model, variables = networks.teacher()
  evaluate = make_evaluate(model)
  with pytest.raises(UserError, match="no batches"):
    evaluate(variables, (), [])
  masked = networks.batch(8, mask=np.zeros(8, np.float32))
  with pytest.raises(UserError, match="every example is masked"):
    evaluate(variables, (), [masked])
