import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from kdjax.types import UserError

from . import oracle
from .oracle import LABELS, STUDENT, TEACHER, log_softmax

zscore_kl = losses.zscore(losses.kl)
apart_kl = losses.with_teacher_temperature(losses.kl)


def kl(student, teacher, t_student=1.0, t_teacher=1.0):
  log_p, log_q = (
    log_softmax(teacher, t_teacher),
    log_softmax(student, t_student),
  )
  return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)


def standard(logits):
  centred = logits - logits.mean(-1, keepdims=True)
  return centred / (1e-7 + logits.std(-1, ddof=1, keepdims=True))


def zscore_equation(student, teacher, *, temperature):
  return kl(standard(student), standard(teacher), temperature, temperature)


@pytest.mark.parametrize("temperature", oracle.TEMPERATURES)
def test_zscore_matches_its_equation(temperature):
  oracle.agree(
    zscore_kl, zscore_equation, STUDENT, TEACHER, temperature=temperature
  )


def test_zscore_forgets_the_scale_and_the_shift_of_both():
  run = oracle.compiled(zscore_kl)
  values, _, _ = run(STUDENT, TEACHER)
  again, _, _ = run(100 * STUDENT + 7, 0.01 * TEACHER - 3)
  oracle.close(again, values, rtol=1e-4)


def test_zscore_of_constant_logits_has_a_modest_gradient():
  student = STUDENT.copy()
  student[0], student[1] = 0.0, 0.1  # a head that begins at zero; rounding
  values, gradient, _ = oracle.compiled(zscore_kl)(student, TEACHER)
  uniform = kl(np.zeros_like(STUDENT), standard(TEACHER))
  oracle.close(values[:2], uniform[:2])
  assert np.isfinite(gradient).all()
  assert np.abs(gradient).max() < 10
  _, gradient, _ = oracle.compiled(zscore_kl)(STUDENT, np.zeros_like(TEACHER))
  assert np.isfinite(gradient).all()


def test_zscore_takes_its_moments_over_the_support():
  student, teacher = (
    np.concatenate([x, np.full((5, 2), -np.inf)], axis=1)
    for x in (STUDENT, TEACHER)
  )
  teacher[:, -1] = 50.0  # leaves as well: the student has no such class
  values, gradient, _ = oracle.compiled(zscore_kl)(student, teacher)
  oracle.close(values, zscore_equation(STUDENT, TEACHER, temperature=1.0))
  np.testing.assert_array_equal(gradient[:, -2:], 0)


def test_zscore_passes_labels_and_arguments_on():
  loss = losses.zscore(losses.dkd)
  got, _, _ = oracle.compiled(loss)(
    STUDENT, TEACHER, LABELS, temperature=2.0, nontarget_weight=3.0
  )
  want, _, _ = oracle.compiled(losses.dkd)(
    standard(STUDENT), standard(TEACHER), LABELS, temperature=2.0,
    nontarget_weight=3.0,
  )  # fmt: skip
  oracle.close(got, want)


@pytest.mark.parametrize("temperature", oracle.TEMPERATURES)
def test_two_temperatures_match_the_equation(temperature):
  def equation(student, teacher, *, temperature, teacher_temperature):
    return kl(student, teacher, temperature, teacher_temperature)

  oracle.agree(
    apart_kl, equation, STUDENT, TEACHER, temperature=temperature,
    teacher_temperature=3.0,
  )  # fmt: skip


def test_teacher_temperature_may_be_learnt():
  def total(t):
    student, teacher = jnp.float32(STUDENT), jnp.float32(TEACHER)
    return apart_kl(
      student, teacher, temperature=4.0, teacher_temperature=t
    ).sum()

  want = oracle.slope(lambda t: kl(STUDENT, TEACHER, 4.0, t).sum(), 2.0)
  oracle.close(jax.jit(jax.grad(total))(2.0), want)


@pytest.mark.parametrize(
  "transform", [losses.zscore, losses.with_teacher_temperature]
)
def test_traits_travel(transform):
  for loss in (losses.kl, losses.dkd, losses.dist, losses.total_variation):
    assert losses.traits(transform(loss)) == losses.traits(loss)
    assert losses.traits(transform(functools.partial(loss))) == losses.traits(
      loss
    )


def test_what_a_partial_fixed_stays_fixed():
  fixed = functools.partial(losses.kl, temperature=4.0)
  got, _, _ = oracle.compiled(losses.zscore(fixed))(
    STUDENT, TEACHER, temperature=4.0
  )
  want = kl(standard(STUDENT), standard(TEACHER), 4.0, 4.0)
  oracle.close(got, want)
  both = losses.with_teacher_temperature(fixed)
  got = both(
    jnp.float32(STUDENT), jnp.float32(TEACHER), teacher_temperature=2.0
  )
  oracle.close(got, kl(STUDENT, TEACHER, 4.0, 2.0))


def test_transforms_stack():
  loss = losses.zscore(apart_kl)
  got, _, _ = oracle.compiled(loss)(
    STUDENT, TEACHER, temperature=2.0, teacher_temperature=3.0
  )
  oracle.close(got, kl(standard(STUDENT), standard(TEACHER), 2.0, 3.0))


def test_signature_names_the_further_argument():
  names = list(inspect.signature(losses.zscore(apart_kl)).parameters)
  assert names == ["student", "teacher", "temperature", "teacher_temperature"]


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (
      lambda: losses.zscore(losses.cross_entropy),
      "cross_entropy, .* no teacher",
    ),
    (
      lambda: losses.with_teacher_temperature(losses.nkd_target),
      "nkd_target, needs a loss with one temperature",
    ),
    (
      lambda: losses.with_teacher_temperature(apart_kl),
      "kl, needs a loss with one temperature",
    ),
    (
      lambda: losses.with_teacher_temperature(functools.partial(zscore_kl)),
      r"write zscore\(with_teacher_temperature\(loss\)\)",
    ),
  ],
)
def test_a_loss_that_a_transform_cannot_change_is_refused(make, message):
  with pytest.raises(UserError, match=message):
    make()
