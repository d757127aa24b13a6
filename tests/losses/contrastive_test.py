"""CRD's equation and its banks; `info_nce` is in relations_test."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.losses import contrastive

from . import oracle

_random = np.random.default_rng(11)
PATH = pathlib.Path(__file__).parents[1] / "data" / "relation_losses.json"
BANK = np.float64(np.float32(_random.standard_normal((12, 3))))
ANCHOR = np.float64(np.float32(_random.standard_normal((4, 3))))
CHOSEN = _random.integers(0, 12, (4, 6))


def noise_contrastive(log_p, n, epsilon=1e-7):
  p, m = np.exp(log_p), (log_p.shape[1] - 1) / n
  d1 = p[:, 0] / (p[:, 0] + m + epsilon)
  d0 = m / (p[:, 1:] + m + epsilon)
  return -np.log(d1) - np.log(d0).sum(1)


@pytest.mark.parametrize("n", [3, 50_000])
def test_noise_contrastive_is_its_equation(n):
  log_p = _random.standard_normal((4, 6)) * 3 - 2
  run = jax.jit(
    jax.value_and_grad(
      lambda x: contrastive.noise_contrastive(x, n).sum(), has_aux=False
    )
  )
  value, slope = run(jnp.float32(log_p))
  log_p = np.float64(np.float32(log_p))
  oracle.close(value, noise_contrastive(log_p, n).sum())
  want = oracle.slope(lambda x: noise_contrastive(x, n).sum(), log_p)
  oracle.close(slope, want)
  rows = contrastive.noise_contrastive(jnp.float32(log_p), n)
  oracle.close(rows, noise_contrastive(log_p, n))


def test_noise_contrastive_neither_over_nor_underflows():
  log_p = jnp.float32([[200.0, -200.0], [-200.0, 200.0]])
  run = jax.value_and_grad(lambda x: contrastive.noise_contrastive(x, 10).sum())
  value, slope = run(log_p)
  oracle.close(value, 400)  # log 0.1 comes with both signs
  oracle.close(slope, [[0, 0], [-1, 1]])


def against_bank(anchor, log_z=0.0, is_set=True, exists=None, n=12):
  return contrastive.bank_contrastive(
    anchor, jnp.float32(BANK), jnp.asarray(CHOSEN),
    jnp.ones(4, bool) if exists is None else jnp.asarray(exists),
    jnp.float32(log_z), jnp.asarray(is_set), num_examples=n,
  )  # fmt: skip


@pytest.mark.parametrize("jit", [False, True])
def test_bank_contrastive_is_of_the_chosen_rows(jit):
  weight = np.array([1.0, 0.0, -2.0, 3.0])

  def rows(anchor):
    scores = np.einsum("bd,bkd->bk", anchor, BANK[CHOSEN])
    return noise_contrastive(scores - 0.7, 12)

  def total(anchor):
    of_row, log_z, later = against_bank(anchor, 0.7)
    return weight @ of_row, (of_row, log_z, later)

  run = jax.grad(total, has_aux=True)
  slope, (got, log_z, later) = (jax.jit(run) if jit else run)(
    jnp.float32(ANCHOR)
  )
  oracle.close(got, rows(ANCHOR))
  oracle.close(log_z, 0.7)
  np.testing.assert_array_equal(later, np.zeros((4, 3)))
  # A row that is chosen twice counts twice.
  assert any(len(set(row)) < 6 for row in CHOSEN.tolist())
  oracle.close(slope, oracle.slope(lambda a: weight @ rows(a), ANCHOR))
  # The same without a gradient.
  oracle.close(against_bank(jnp.float32(ANCHOR), 0.7)[0], got)


def test_bank_contrastive_sets_z_once():
  scores = np.einsum("bd,bkd->bk", ANCHOR, BANK[CHOSEN])
  exists = np.array([True, False, True, True])
  want = np.log(12 * np.exp(scores[exists]).mean())
  rows, log_z, _ = against_bank(
    jnp.float32(ANCHOR), 99.0, is_set=False, exists=exists
  )
  oracle.close(log_z, want)
  oracle.close(rows, noise_contrastive(scores - want, 12))


def test_bank_contrastive_gives_the_anchor_alone_a_gradient():
  def total(anchor, bank, log_z):
    rows, z, later = contrastive.bank_contrastive(
      anchor, bank, jnp.asarray(CHOSEN), jnp.ones(4, bool), log_z,
      jnp.asarray(True), num_examples=12,
    )  # fmt: skip
    return jnp.sum(rows) + z + jnp.sum(later)

  slopes = jax.grad(total, argnums=(0, 1, 2))(
    jnp.float32(ANCHOR), jnp.float32(BANK), 0.7
  )
  assert np.any(slopes[0])
  for slope in slopes[1:]:
    np.testing.assert_array_equal(slope, 0)


def test_log_normalizer_is_over_rows_that_exist():
  scores = ANCHOR @ BANK.T
  exists = np.array([True, False, True, True])
  got = contrastive.log_normalizer(
    jnp.float32(scores), jnp.asarray(exists), 1000
  )
  oracle.close(got, np.log(1000 * np.exp(scores[exists]).mean()))
  large = contrastive.log_normalizer(
    jnp.full((2, 3), 500.0), jnp.ones(2, bool), 10
  )
  oracle.close(large, 500 + np.log(10))
  none = contrastive.log_normalizer(jnp.float32(scores), jnp.zeros(4, bool), 10)
  assert np.isfinite(none)


def test_remembered_rows_have_momentum_and_length_one():
  index, rows = np.array([3, 0, 7]), ANCHOR[:3]
  got = contrastive.remembered(
    jnp.float32(BANK), jnp.asarray(index), jnp.float32(rows),
    jnp.ones(3, bool), 0.25,
  )  # fmt: skip
  want = BANK.copy()
  moved = 0.25 * BANK[index] + 0.75 * rows
  want[index] = moved / np.linalg.norm(moved, axis=1, keepdims=True)
  oracle.close(got, want)


@pytest.mark.parametrize("jit", [False, True])
def test_of_one_index_the_last_row_that_exists_is_remembered(jit):
  remembered = contrastive.remembered
  if jit:
    remembered = jax.jit(remembered, static_argnames="momentum")
  got = remembered(
    jnp.float32(BANK), jnp.array([2, 5, 2, 2]), jnp.float32(ANCHOR),
    jnp.array([True, False, True, False]), momentum=0.5,
  )  # fmt: skip
  want = BANK.copy()
  moved = 0.5 * (BANK[2] + ANCHOR[2])
  want[2] = moved / np.linalg.norm(moved)
  oracle.close(got, want)


def test_no_gradient_reaches_the_bank_or_what_it_remembers():
  def total(bank, rows):
    new = contrastive.remembered(
      bank, jnp.arange(4), rows, jnp.ones(4, bool), 0.5
    )
    return jnp.sum(new**3)

  slopes = jax.grad(total, argnums=(0, 1))(
    jnp.float32(BANK), jnp.float32(ANCHOR)
  )
  for slope in slopes:
    np.testing.assert_array_equal(slope, 0)


def test_reference_data_of_crd_is_here():
  data = json.loads(PATH.read_text())
  case = next(c for c in data["cases"] if c["name"].startswith("crd"))
  given = data["inputs"][case["inputs"]]
  bank, chosen = np.array(given["memory_v2"]), np.array(given["contrast_idx"])
  student = np.array(given["f_s"]) @ np.array(given["w_s"]).T + given["b_s"]
  student /= np.linalg.norm(student, axis=1, keepdims=True)
  scores = np.einsum("bd,bkd->bk", student, bank[chosen]) / 0.07
  log_z = contrastive.log_normalizer(jnp.float32(scores), jnp.ones(3, bool), 12)
  oracle.close(np.exp(log_z), case["expected_extra"]["Z_v1"])
