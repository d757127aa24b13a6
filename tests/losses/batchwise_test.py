import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses

from . import oracle
from .oracle import STUDENT, TEACHER, softmax

COUPLED = (losses.dist, losses.multi_level)


def pearson(x, y):
  x, y = x - x.mean(), y - y.mean()
  return np.sum(x * y) / (np.linalg.norm(x) * np.linalg.norm(y) + 1e-8)


def dist(student, teacher, *, temperature, inter_weight, intra_weight):
  p, q = softmax(teacher, temperature), softmax(student, temperature)
  inter = np.array([1 - pearson(x, y) for x, y in zip(q, p)])
  intra = 1 - np.mean([pearson(x, y) for x, y in zip(q.T, p.T)])
  return inter_weight * inter + intra_weight * intra


def multi_level(student, teacher, *, temperature, batch_weight, class_weight):
  p, q = softmax(teacher, temperature), softmax(student, temperature)
  of_batch = np.sum((p @ p.T - q @ q.T) ** 2, axis=1)
  of_classes = np.sum((p.T @ p - q.T @ q) ** 2) / p.shape[1]
  return batch_weight * of_batch + class_weight * of_classes


@pytest.mark.parametrize("temperature", oracle.TEMPERATURES)
def test_dist_matches_its_equation(temperature):
  oracle.agree(
    losses.dist, dist, STUDENT, TEACHER, temperature=temperature,
    inter_weight=1.0, intra_weight=2.0, atol=1e-5,
  )  # fmt: skip


@pytest.mark.parametrize("temperature", oracle.TEMPERATURES)
def test_multi_level_matches_its_equation(temperature):
  oracle.agree(
    losses.multi_level, multi_level, STUDENT, TEACHER, temperature=temperature,
    batch_weight=1.0, class_weight=2.0,
  )  # fmt: skip


@pytest.mark.parametrize("loss", COUPLED)
def test_rows_that_do_not_exist_move_nothing(loss):
  exists = np.array([True, False, True, True, False])
  padded = STUDENT.copy(), TEACHER.copy()
  run = oracle.compiled(loss)
  values, gradient, _ = run(*padded, where=exists)
  for garbage in (np.nan, -np.inf, 1e4):
    for side in padded:
      side[~exists] = garbage
    again, gradient_again, _ = run(*padded, where=exists)
    np.testing.assert_array_equal(again[exists], values[exists])
    np.testing.assert_array_equal(gradient_again[exists], gradient[exists])
    np.testing.assert_array_equal(gradient_again[~exists], 0)


@pytest.mark.parametrize("loss", COUPLED)
def test_masked_mean_has_the_gradient_of_the_batch_alone(loss):
  exists = np.array([1.0, 0.0, 1.0, 1.0, 0.0])

  def mean(student, teacher, *, where):
    values = loss(student, teacher, where=where)
    return jnp.where(where > 0, values, 0.0) / jnp.sum(where)

  padded = STUDENT.copy()
  padded[exists == 0] = np.nan
  values, gradient, _ = oracle.compiled(mean)(
    padded, TEACHER, where=jnp.float32(exists)
  )
  alone, gradient_alone, _ = oracle.compiled(loss)(
    STUDENT[exists > 0], TEACHER[exists > 0]
  )
  oracle.close(values.sum(), alone.mean())
  oracle.close(gradient[exists > 0], gradient_alone / 3)


def test_only_the_part_of_the_whole_batch_is_shared():
  run = oracle.compiled(losses.dist)
  rows, _, _ = run(STUDENT, TEACHER, inter_weight=1.0, intra_weight=0.0)
  shared, _, _ = run(STUDENT, TEACHER, inter_weight=0.0, intra_weight=1.0)
  assert len(set(np.asarray(rows).tolist())) == 5
  assert len(set(np.asarray(shared).tolist())) == 1


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("loss", COUPLED)
def test_constant_rows_send_a_finite_and_modest_gradient(loss, side):
  # A head that begins at zero gives constant rows and constant columns.
  student, teacher = STUDENT.copy(), TEACHER.copy()
  (student if side == "student" else teacher)[:] = 0.1
  values, gradient, _ = oracle.compiled(loss)(student, teacher)
  assert np.isfinite(values).all()
  assert np.abs(gradient).max() < 10
  student[0], teacher[0] = 0.0, 0.0
  values, gradient, _ = oracle.compiled(loss)(student, teacher)
  assert np.isfinite(values).all()
  assert np.abs(gradient).max() < 10


def test_rounding_of_a_constant_row_is_not_a_correlation():
  teacher = np.random.default_rng(1).standard_normal((5, 19))
  uniform = jax.nn.softmax(jnp.zeros((5, 19)))
  assert jnp.ptp(uniform - uniform.mean(axis=1, keepdims=True)) == 0
  assert jnp.abs(uniform - uniform.mean(axis=1, keepdims=True)).max() > 0
  values, gradient, _ = oracle.compiled(losses.dist)(0 * teacher, teacher)
  oracle.close(values, 2.0)
  np.testing.assert_array_equal(gradient, 0)


def test_gram_matrices_are_multiplied_in_full_precision():
  # On a CPU the default is full precision too, and no value would tell.
  program = jax.make_jaxpr(losses.multi_level)(STUDENT, TEACHER)
  products = [e for e in program.eqns if e.primitive.name == "dot_general"]
  assert len(products) == 4
  for product in products:
    assert set(product.params["precision"]) == {jax.lax.Precision.HIGHEST}


def test_a_single_example_correlates_with_nothing():
  values, gradient, _ = oracle.compiled(losses.dist)(STUDENT[:1], TEACHER[:1])
  oracle.close(
    values, 1 - pearson(softmax(STUDENT[0]), softmax(TEACHER[0])) + 1
  )
  assert np.isfinite(gradient).all()


def test_a_class_missing_from_some_rows_counts_over_the_others():
  student, teacher = STUDENT.copy(), TEACHER.copy()
  student[1, 6] = teacher[3, 6] = -np.inf  # leaves rows 0, 2 and 4
  student[:, 5] = -np.inf  # and this class leaves altogether
  kept = np.ones((5, 7), bool)
  kept[[1, 3], 6] = False
  kept[:, 5] = False
  p, q = np.zeros((5, 7)), np.zeros((5, 7))
  for i, here in enumerate(kept):
    p[i, here], q[i, here] = (
      softmax(teacher[i, here]),
      softmax(student[i, here]),
    )
  inter = [1 - pearson(q[i, k], p[i, k]) for i, k in enumerate(kept)]
  by_class = [
    pearson(q[k, j], p[k, j]) for j, k in enumerate(kept.T) if k.any()
  ]
  values, gradient, _ = oracle.compiled(losses.dist)(student, teacher)
  oracle.close(values, np.array(inter) + 1 - np.mean(by_class), atol=1e-5)
  assert np.isfinite(gradient).all()
  np.testing.assert_array_equal(gradient[~kept], 0)

  values, gradient, _ = oracle.compiled(losses.multi_level)(student, teacher)
  of_classes = np.sum((p.T @ p - q.T @ q) ** 2) / 6
  want = np.sum((p @ p.T - q @ q.T) ** 2, axis=1) + of_classes
  oracle.close(values, want)
  np.testing.assert_array_equal(gradient[~kept], 0)
