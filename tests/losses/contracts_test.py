"""What every loss in `LOGIT_LOSSES` promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from kdjax.losses import LOGIT_LOSSES
from kdjax.types import UserError

from . import oracle
from .oracle import LABELS, STUDENT, TEACHER

NAMES = sorted(LOGIT_LOSSES)
TRAITS = {name: losses.traits(LOGIT_LOSSES[name]) for name in NAMES}
WITH_TEACHER = [n for n in NAMES if TRAITS[n].teacher]
PER_EXAMPLE = [n for n in NAMES if not TRAITS[n].couples]
WITH_TEMPERATURE = sorted(
  set(WITH_TEACHER)
  - {"nkd_target", "teacher_label"}  # at T = 1 by their definition
)
CROSS_ENTROPIES = {"nkd", "nkd_target", "nkd_nontarget", "teacher_label"}
VANISH = sorted(set(WITH_TEACHER) - CROSS_ENTROPIES - {"ttm", "wttm"})


def arguments(name, student=STUDENT, teacher=TEACHER, labels=LABELS):
  traits = TRAITS[name]
  return [
    student,
    *([teacher] if traits.teacher else []),
    *([labels] if traits.labels else []),
  ]


def evaluate(name, *args, **kwargs):
  """Values and the student's gradient, compiled."""
  values, gradient, d_temperature = oracle.compiled(LOGIT_LOSSES[name])(
    *arguments(name, *args), **kwargs
  )
  # No input here may spoil one gradient alone.
  assert np.isfinite(d_temperature) == np.isfinite(gradient).all()
  return np.asarray(values), np.asarray(gradient)


def saturated():
  student, teacher = STUDENT.copy(), TEACHER.copy()
  student[0], teacher[0] = 1e4 * np.sign(student[0]), 1e4 * np.sign(teacher[0])
  student[1] = -1e4
  student[1, 3] = 1e4  # all mass on the label
  student[2] = -1e4
  student[2, 6] = 1e4  # all mass elsewhere
  teacher[3] = 1e4 * np.eye(7)[0]
  student[4] = teacher[4] = 1e4 * np.eye(7)[3]
  return student, teacher


def test_every_loss_is_listed_under_its_own_name():
  assert {f.__name__ for f in LOGIT_LOSSES.values()} == set(LOGIT_LOSSES)
  for name, loss in LOGIT_LOSSES.items():
    assert getattr(losses, name) is loss
    assert name in losses.__all__


@pytest.mark.parametrize("name", PER_EXAMPLE)
def test_editing_one_example_moves_no_other(name):
  values, gradient = evaluate(name)
  student, teacher = STUDENT.copy(), TEACHER.copy()
  student[2], teacher[2] = np.roll(student[2], 1), np.roll(teacher[2], 2)
  again, gradient_again = evaluate(name, student, teacher)
  edited = np.arange(5) == 2
  np.testing.assert_array_equal(values != again, edited)
  np.testing.assert_array_equal((gradient != gradient_again).any(1), edited)


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_float32_whatever_comes_in(name):
  loss = LOGIT_LOSSES[name]
  with jax.enable_x64(True):
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float64):
      student, teacher = (jnp.asarray(x, dtype) for x in (STUDENT, TEACHER))
      assert student.dtype == dtype
      out = jax.eval_shape(loss, *arguments(name, student, teacher))
      assert (out.shape, out.dtype) == ((5,), jnp.float32)
  # A product or a sum in the narrower type would lose more than this.
  student = jnp.bfloat16(STUDENT)
  want, _ = evaluate(name, np.float32(student))
  oracle.close(jax.jit(loss)(student, *arguments(name)[1:]), want)


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_teacher_receives_no_gradient(name):
  def total(teacher):
    given = arguments(name, jnp.float32(STUDENT), teacher)
    return LOGIT_LOSSES[name](*given).sum()

  gradient = jax.jit(jax.grad(total))(jnp.float32(TEACHER))
  np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", NAMES)
def test_class_at_minus_infinity_on_either_side_leaves_both(name):
  want, want_gradient = evaluate(name, STUDENT[:, :5], TEACHER[:, :5])
  student, teacher = STUDENT.copy(), TEACHER.copy()
  student[:, 5] = -np.inf
  teacher[:, 6] = -np.inf
  student[1, 5:], teacher[1, 5:] = [4.0, -np.inf], [-np.inf, 4.0]
  student[2, 5:], teacher[2, 5:] = -np.inf, [4.0, 4.0]
  student[3, 5:], teacher[3, 5:] = [4.0, 4.0], -np.inf
  student[4, 5:], teacher[4, 5:] = -np.inf, -np.inf
  if not TRAITS[name].teacher:
    student[:, 5:] = -np.inf
  values, gradient = evaluate(name, student, teacher)
  oracle.close(values, want)
  oracle.close(gradient[:, :5], want_gradient)
  np.testing.assert_array_equal(gradient[:, 5:], 0)


@pytest.mark.parametrize("name", NAMES)
def test_empty_support_is_nan_for_its_example_alone(name):
  student, teacher = STUDENT.copy(), TEACHER.copy()
  student[1, ::2], teacher[1, 1::2] = -np.inf, -np.inf  # nothing in common
  if not TRAITS[name].teacher:
    student[1] = -np.inf
  values, gradient = evaluate(name, student, teacher)
  np.testing.assert_array_equal(np.isnan(values), np.arange(5) == 1)
  # So that an example without weight sends no NaN through the objective.
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize("temperature", [0.5, 4.0])
@pytest.mark.parametrize("name", NAMES)
def test_saturated_logits_give_finite_values_and_gradients(name, temperature):
  kept = {"temperature": temperature} if name in WITH_TEMPERATURE else {}
  values, gradient = evaluate(name, *saturated(), **kept)
  assert np.isfinite(values).all()
  assert np.isfinite(gradient).all()
  values, gradient = evaluate(name, *reversed(saturated()), **kept)
  assert np.isfinite(values).all()
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", NAMES)
def test_student_equal_to_teacher_gives_no_nan(name):
  for student in (STUDENT, saturated()[0], np.zeros_like(STUDENT)):
    values, gradient = evaluate(name, student, student)
    assert np.isfinite(values).all()
    assert np.isfinite(gradient).all()
    if name in VANISH and student is STUDENT:
      np.testing.assert_allclose(values, 0, atol=2e-6)
      np.testing.assert_allclose(gradient, 0, atol=2e-6)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"logit_mse"}))
def test_shift_of_an_examples_logits_changes_nothing(name):
  shift = np.array([[8.0], [-3.0], [0.5], [100.0], [0.0]])
  values, gradient = evaluate(name)
  again, gradient_again = evaluate(name, STUDENT + shift, TEACHER - 2 * shift)
  oracle.close(again, values, rtol=2e-4, atol=2e-4)  # 100 + z rounds z
  oracle.close(gradient_again, gradient, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_batch_axes_may_be_several_or_none(name):
  loss = jax.jit(LOGIT_LOSSES[name])
  rows = arguments(name, jnp.float32(STUDENT), jnp.float32(TEACHER))
  several = [jnp.stack([x, x[::-1], jnp.roll(x, 1, 0)]) for x in rows]  # [3, 5]
  if TRAITS[name].couples:
    want = loss(*[x.reshape(15, 7) for x in several]).reshape(3, 5)
  else:
    want, _ = evaluate(name)
    want = np.stack([want, want[::-1], np.roll(want, 1)])
    one = jax.vmap(LOGIT_LOSSES[name])
    oracle.close(jax.jit(one)(*rows), want[0])
  oracle.close(loss(*several), want)


@pytest.mark.parametrize("name", NAMES)
def test_eager_agrees_with_jit(name):
  given = arguments(name, jnp.float32(STUDENT), jnp.float32(TEACHER))
  oracle.close(LOGIT_LOSSES[name](*given), evaluate(name)[0])


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_shapes_that_differ_are_refused(name):
  given = arguments(name, jnp.float32(STUDENT), jnp.float32(TEACHER[:, :1]))
  with pytest.raises(
    UserError, match=r"shape \(5, 7\), the teacher's \(5, 1\)"
  ):
    LOGIT_LOSSES[name](*given)


# These have the power of the authors' own code, whatever the gradient does.
BY_CONVENTION = {"dist": 2, "multi_level": 0, "nkd": 0, "ttm": 0, "wttm": 0}


@pytest.mark.parametrize(
  "name", sorted(set(WITH_TEMPERATURE) - set(BY_CONVENTION))
)
def test_power_of_temperature_makes_the_gradient_scale_free(name):
  power = TRAITS[name].power
  at = [t**power * evaluate(name, temperature=t)[1] for t in (128.0, 256.0)]
  assert np.abs(at[0]).max() > 1e-2
  np.testing.assert_allclose(
    at[0], at[1], rtol=0.1, atol=0.02 * np.abs(at[0]).max()
  )


def test_powers_that_are_conventions():
  got = {name: TRAITS[name].power for name in BY_CONVENTION}
  assert got == BY_CONVENTION
  assert TRAITS["cross_entropy"].power == TRAITS["nkd_target"].power == 0


def test_only_the_coupled_losses_say_so():
  assert {n for n in NAMES if TRAITS[n].couples} == {"dist", "multi_level"}
  assert not TRAITS["cross_entropy"].teacher


def test_traits_are_seen_through_partial():
  bound = functools.partial(
    functools.partial(losses.jsd, mix=0.3), scale="unit"
  )
  assert losses.traits(bound) == losses.Traits(power=2)


def test_undeclared_loss_is_refused():
  def mine(student, teacher):
    return student - teacher

  with pytest.raises(UserError, match=r"mine .*decorate it with"):
    losses.traits(mine)
  declared = losses.logit_loss(power=1, couples=True)(mine)
  assert declared is mine
  assert losses.traits(mine) == losses.Traits(power=1, couples=True)
