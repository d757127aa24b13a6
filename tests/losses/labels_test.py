import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from kdjax.types import UserError

from . import oracle
from .oracle import LABELS, NUM_CLASSES, STUDENT, TEACHER, log_softmax, softmax

ROWS = np.arange(len(LABELS))
SOFT = softmax(TEACHER, 3.0)


def cross_entropy(student, labels, *, label_smoothing):
  y = np.eye(NUM_CLASSES)[labels] if labels.ndim == 1 else labels
  y = (1 - label_smoothing) * y + label_smoothing / NUM_CLASSES
  return -np.sum(y * log_softmax(student), axis=-1)


def without_label(logits, labels):
  kept = np.arange(NUM_CLASSES) != labels[:, None]
  return logits[kept].reshape(len(labels), -1)


def dkd(
  student, teacher, labels, *, temperature, target_weight, nontarget_weight
):
  p, q = softmax(teacher, temperature), softmax(student, temperature)
  hit_p, hit_q = p[ROWS, labels], q[ROWS, labels]
  tckd = hit_p * np.log(hit_p / hit_q)
  tckd += (1 - hit_p) * np.log((1 - hit_p) / (1 - hit_q))
  p = softmax(without_label(teacher, labels), temperature)
  q = softmax(without_label(student, labels), temperature)
  nckd = np.sum(p * np.log(p / q), axis=-1)
  return target_weight * tckd + nontarget_weight * nckd


def nkd_target(student, teacher, labels):
  hit = log_softmax(student)[ROWS, labels]
  return -softmax(teacher)[ROWS, labels] * hit


def nkd_nontarget(student, teacher, labels, *, temperature):
  p = softmax(without_label(teacher, labels), temperature)
  log_q = log_softmax(without_label(student, labels), temperature)
  return -np.sum(p * log_q, axis=-1)


def nkd(student, teacher, labels, *, temperature, gamma):
  others = nkd_nontarget(student, teacher, labels, temperature=temperature)
  return nkd_target(student, teacher, labels) + gamma * others


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("labels", [LABELS, SOFT], ids=["integer", "soft"])
def test_cross_entropy_matches_its_equation(labels, label_smoothing):
  oracle.agree(
    losses.cross_entropy, cross_entropy, STUDENT, labels,
    label_smoothing=label_smoothing,
  )  # fmt: skip


@pytest.mark.parametrize("temperature", oracle.TEMPERATURES)
def test_dkd_matches_its_equation(temperature):
  oracle.agree(
    losses.dkd, dkd, STUDENT, TEACHER, LABELS, temperature=temperature,
    target_weight=1.5, nontarget_weight=8.0, rtol=2e-5, atol=2e-6,
  )  # fmt: skip


@pytest.mark.parametrize("temperature", oracle.TEMPERATURES)
def test_nkd_and_its_parts_match_their_equations(temperature):
  arguments = (STUDENT, TEACHER, LABELS)
  at = {"temperature": temperature}
  oracle.agree(losses.nkd_target, nkd_target, *arguments)
  oracle.agree(losses.nkd_nontarget, nkd_nontarget, *arguments, **at)
  oracle.agree(losses.nkd, nkd, *arguments, **at, gamma=1.5)


def test_dkd_with_the_teachers_own_weights_is_kl():
  weight = 1 - softmax(TEACHER, 2.0)[ROWS, LABELS]
  target, _, _ = oracle.compiled(losses.dkd)(
    STUDENT, TEACHER, LABELS, temperature=2.0, nontarget_weight=0.0
  )
  others, _, _ = oracle.compiled(losses.dkd)(
    STUDENT, TEACHER, LABELS, temperature=2.0, target_weight=0.0,
    nontarget_weight=1.0,
  )  # fmt: skip
  kl, _, _ = oracle.compiled(losses.kl)(STUDENT, TEACHER, temperature=2.0)
  oracle.close(target + weight * others, kl)


def test_dkd_of_a_saturated_student_is_finite_and_right():
  student = np.zeros((2, 4))
  student[:, 1] = 1e4  # q_y is 0 in float32, and 1 in the second row
  teacher = np.tile([1.0, 0.0, 2.0, -1.0], (2, 1))
  labels = np.array([0, 1])
  values, gradient, _ = oracle.compiled(losses.dkd)(student, teacher, labels)
  p = softmax(teacher[0])
  entropy = np.sum(p[[0]] * np.log(p[[0]])) + (1 - p[0]) * np.log(1 - p[0])
  q = softmax(teacher[0, 1:])
  nckd = np.sum(q * np.log(q)) + 1e4 * (q[1] + q[2])
  oracle.close(values[0], entropy + 1e4 * p[0] + 8 * nckd)
  assert np.isfinite(values).all()
  assert np.isfinite(gradient).all()
  assert gradient[0, 0] < 0 < gradient[0, 1]


@pytest.mark.parametrize("loss", [losses.dkd, losses.nkd_nontarget])
def test_no_class_beside_the_label_is_nan_and_sends_no_nan(loss):
  student, teacher = STUDENT.copy(), TEACHER.copy()
  student[2], teacher[2] = -np.inf, -np.inf
  student[2, LABELS[2]] = teacher[2, LABELS[2]] = 1.0
  values, gradient, _ = oracle.compiled(loss)(student, teacher, LABELS)
  np.testing.assert_array_equal(np.isnan(values), ROWS == 2)
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_label_smoothing_may_be_a_number_of_the_program(label_smoothing):
  def total(student):
    values = losses.cross_entropy(
      student, LABELS, label_smoothing=label_smoothing
    )
    return values.sum(), values

  run = jax.jit(jax.grad(total, has_aux=True))
  gradient, values = run(jnp.float32(STUDENT))
  target = (1 - label_smoothing) * np.eye(NUM_CLASSES)[LABELS]
  target += label_smoothing / NUM_CLASSES
  oracle.close(
    values, cross_entropy(STUDENT, LABELS, label_smoothing=label_smoothing)
  )
  oracle.close(gradient, softmax(STUDENT) - target)


def test_label_smoothing_is_spread_over_the_support():
  padded = np.concatenate([STUDENT, np.full((5, 3), -np.inf)], axis=1)
  values, gradient, _ = oracle.compiled(losses.cross_entropy)(
    padded, LABELS, label_smoothing=0.1
  )
  oracle.close(values, cross_entropy(STUDENT, LABELS, label_smoothing=0.1))
  np.testing.assert_array_equal(gradient[:, NUM_CLASSES:], 0)


def test_soft_label_with_mass_outside_the_support_is_nan():
  student = STUDENT.copy()
  student[1, 6] = -np.inf
  labels = SOFT.copy()
  labels[2, 6] = 0.0
  student[2, 6] = -np.inf
  values, gradient, _ = oracle.compiled(losses.cross_entropy)(student, labels)
  np.testing.assert_array_equal(np.isnan(values), ROWS == 1)
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
  "name", [n for n, f in losses.LOGIT_LOSSES.items() if losses.traits(f).labels]
)
@pytest.mark.parametrize("outside", [-1, -100, NUM_CLASSES, 5])
def test_label_outside_the_support_is_nan_and_sends_nothing(name, outside):
  loss = losses.LOGIT_LOSSES[name]
  labels = LABELS.copy()
  labels[2] = outside
  student = STUDENT.copy()
  student[2, 5] = -np.inf
  others = [TEACHER] if losses.traits(loss).teacher else []
  values, gradient, _ = oracle.compiled(loss)(student, *others, labels)
  np.testing.assert_array_equal(np.isnan(values), ROWS == 2)
  assert np.isfinite(gradient).all()
  np.testing.assert_array_equal(gradient[2], 0)


@pytest.mark.parametrize(
  ("labels", "message"),
  [
    (np.zeros((5, 3), np.float32), r"soft labels have shape \(5, 3\)"),
    (np.zeros(5, np.float32), r"labels are float32 of shape \(5,\)"),
    (np.zeros(4, np.int32), r"labels are int32 of shape \(4,\)"),
  ],
)
def test_labels_of_a_wrong_shape_or_type_are_refused(labels, message):
  with pytest.raises(UserError, match=message):
    losses.cross_entropy(jnp.float32(STUDENT), labels)


def test_soft_labels_are_refused_where_only_numbers_will_do():
  with pytest.raises(UserError, match="must be integers"):
    losses.dkd(jnp.float32(STUDENT), jnp.float32(TEACHER), SOFT)


def test_soft_labels_receive_no_gradient():
  def total(soft):
    return losses.cross_entropy(jnp.float32(STUDENT), soft).sum()

  np.testing.assert_array_equal(jax.grad(total)(jnp.float32(SOFT)), 0)


@pytest.mark.parametrize("temperature", oracle.TEMPERATURES)
def test_teacher_free_matches_its_equation(temperature):
  def equation(student, labels, *, temperature, correct):
    v = np.full(student.shape, (1 - correct) / (NUM_CLASSES - 1))
    v[ROWS, labels] = correct
    v = v ** (1 / temperature)
    v /= v.sum(-1, keepdims=True)
    return np.sum(v * (np.log(v) - log_softmax(student, temperature)), -1)

  oracle.agree(
    losses.teacher_free, equation, STUDENT, LABELS, temperature=temperature,
    static={"correct": 0.9},
  )  # fmt: skip
  with pytest.raises(UserError, match=r"correct is 1.0, must be in \(0, 1\)"):
    losses.teacher_free(STUDENT, LABELS, correct=1.0)


def test_teacher_label_is_the_teachers_choice():
  def equation(student, teacher):
    return -log_softmax(student)[ROWS, teacher.argmax(-1)]

  oracle.agree(losses.teacher_label, equation, STUDENT, TEACHER)
