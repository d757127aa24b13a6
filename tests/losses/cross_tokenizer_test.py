import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from kdjax.types import UserError

from . import oracle
from .oracle import log_softmax, softmax

# Two rows, seven classes against five. Row 0: spans of 1 and 2, 2 and 1, 1 and
# 1 tokens; row 1: one span, a token of no span on either side, padding.
_random = np.random.default_rng(7)
STUDENT = np.float64(np.float32(2 * _random.standard_normal((2, 6, 7))))
TEACHER = np.float64(np.float32(2 * _random.standard_normal((2, 5, 5))))
SPAN = np.array([[0, 1, 1, 2, -1, -1], [-1, 0, 0, 0, -1, -1]])
TEACHER_SPAN = np.array([[0, 0, 1, 2, -1], [-1, 0, 0, -1, -1]])
LABEL = _random.integers(0, 7, (2, 6))
TEACHER_LABEL = _random.integers(0, 5, (2, 5))
EXISTS = np.array([[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]], bool)
TAUS = (0.5, 1.0, 100.0)


def universal(student, teacher, *, temperature):
  """Boizard et al., for the first token of each span."""
  out = np.zeros(student.shape[:2])
  for b, n in zip(*np.nonzero(EXISTS)):
    s = list(SPAN[b]).index(n)
    t = list(TEACHER_SPAN[b]).index(n)
    q = np.sort(softmax(student[b, s], temperature))[::-1]
    p = np.sort(softmax(teacher[b, t], temperature))[::-1]
    p = np.concatenate([p, np.zeros(len(q) - len(p))])
    out[b, n] = np.abs(p - q).sum()
  return out


def chances(logits, label, span):
  out = np.zeros((2, 6))
  for b, t in zip(*np.nonzero(span >= 0)):
    out[b, span[b, t]] += log_softmax(logits[b, t])[label[b, t]]
  return out


def matching(student, teacher, *, tau, f=None):
  """Minixhofer et al., f(p‖q) + f(1 − p‖1 − q)."""
  f = f or (lambda a, b: a * np.log(a / b))
  p = np.exp(chances(teacher, TEACHER_LABEL, TEACHER_SPAN) / tau)
  q = np.exp(chances(student, LABEL, SPAN) / tau)
  p, q = np.where(EXISTS, p, 0.5), np.where(EXISTS, q, 0.5)
  return np.where(EXISTS, f(p, q) + f(1 - p, 1 - q), 0.0)


def uld(student, teacher, span, teacher_span, *, temperature=1.0):
  return losses.universal_logits(
    student, teacher, span, teacher_span, temperature=temperature
  )


def alm(student, teacher, span, teacher_span, *, tau=100.0, **more):
  return losses.likelihood_matching(
    student,
    teacher,
    LABEL,
    TEACHER_LABEL,
    span,
    teacher_span,
    temperature=tau,
    **more,
  )


def evaluate(loss, student=STUDENT, teacher=TEACHER, theirs=TEACHER_SPAN, **kw):
  """Values and the student's gradient, compiled once a loss."""
  values, gradient, _ = oracle.compiled(loss)(
    jnp.float32(student), jnp.float32(teacher), SPAN, theirs, **kw
  )
  return np.asarray(values), np.asarray(gradient)


def agree(loss, equation, **kw):
  def of_four(student, teacher, span, teacher_span, **hparams):
    return equation(student, teacher, **hparams)

  oracle.agree(loss, of_four, STUDENT, TEACHER, SPAN, TEACHER_SPAN, **kw)


@pytest.mark.parametrize("temperature", oracle.TEMPERATURES)
def test_universal_logits_matches_its_equation(temperature):
  agree(uld, universal, temperature=temperature)


@pytest.mark.parametrize("tau", TAUS)
def test_likelihood_matching_matches_its_equation(tau):
  agree(alm, matching, tau=tau)


@pytest.mark.parametrize(
  ("divergence", "f"),
  [
    (losses.reverse_kl, lambda a, b: b * np.log(b / a)),
    (losses.total_variation, lambda a, b: 0.5 * np.abs(a - b)),
  ],
)
def test_likelihood_matching_takes_any_divergence(divergence, f):
  agree(
    functools.partial(alm, divergence=divergence),
    functools.partial(matching, f=f),
    tau=10.0,
  )


def test_the_larger_vocabulary_may_be_the_teachers():
  got = jax.jit(losses.universal_logits)(
    jnp.float32(TEACHER), jnp.float32(STUDENT), TEACHER_SPAN, SPAN
  )
  oracle.close(got, universal(STUDENT, TEACHER, temperature=1.0)[:, :5])


def test_one_tokenization_twice_is_zero():
  student = jnp.float32(STUDENT)
  other_order = student[..., ::-1]
  same = jax.jit(losses.universal_logits)(student, other_order, SPAN, SPAN)
  np.testing.assert_allclose(same, 0, atol=1e-6)
  matched = jax.jit(losses.likelihood_matching)(
    student, student, LABEL, LABEL, SPAN, SPAN
  )
  np.testing.assert_allclose(matched, 0, atol=1e-6)


@pytest.mark.parametrize("loss", [uld, alm])
def test_only_the_tokens_of_spans_matter_and_spans_stay_apart(loss):
  want, want_gradient = evaluate(loss)
  student, teacher = STUDENT.copy(), TEACHER.copy()
  student[SPAN < 0] = np.nan
  teacher[TEACHER_SPAN < 0] = np.nan
  values, gradient = evaluate(loss, student, teacher)
  np.testing.assert_array_equal(gradient[SPAN < 0], 0)
  np.testing.assert_array_equal(gradient, want_gradient)
  np.testing.assert_array_equal(values, want)
  student[0, 1] *= 0.5  # the first token of span 1 there
  moved = evaluate(loss, student, teacher)[0] != want
  assert np.argwhere(moved).tolist() == [[0, 1]]


@pytest.mark.parametrize("loss", [uld, alm])
def test_a_span_that_one_side_lacks_counts_nowhere(loss):
  theirs = np.where(TEACHER_SPAN == 2, -1, TEACHER_SPAN)
  got, gradient = evaluate(loss, theirs=theirs)
  want, want_gradient = evaluate(loss)
  np.testing.assert_array_equal(got, np.where(np.arange(6) == 2, 0, want))
  assert (gradient[0, 3] == 0).all()
  assert (want_gradient[0, 3] != 0).any()


def squared(student, teacher):
  """A divergence that does not by itself keep the teacher constant."""
  return jnp.sum((student - teacher) ** 2, axis=-1)


@pytest.mark.parametrize(
  "loss", [uld, alm, functools.partial(alm, divergence=squared)]
)
def test_teacher_receives_no_gradient(loss):
  def total(teacher):
    return loss(jnp.float32(STUDENT), teacher, SPAN, TEACHER_SPAN).sum()

  gradient = jax.jit(jax.grad(total))(jnp.float32(TEACHER))
  np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("loss", [uld, alm])
def test_values_are_float32_whatever_comes_in(loss):
  student, teacher = jnp.bfloat16(STUDENT), jnp.bfloat16(TEACHER)
  got = jax.jit(loss)(student, teacher, SPAN, TEACHER_SPAN)
  assert got.dtype == jnp.float32
  oracle.close(got, evaluate(loss, student, teacher)[0])


@pytest.mark.parametrize("loss", [uld, alm])
def test_padding_of_a_vocabulary_at_minus_infinity_changes_nothing(loss):
  def padded(logits):
    wide = np.full((*logits.shape[:2], 9), -np.inf)
    wide[..., : logits.shape[-1]] = logits
    return wide

  values, gradient = evaluate(loss, padded(STUDENT), padded(TEACHER))
  want, want_gradient = evaluate(loss)
  oracle.close(values, want)
  oracle.close(gradient[..., :7], want_gradient)
  np.testing.assert_array_equal(gradient[..., 7:], 0)


@pytest.mark.parametrize(
  ("loss", "softening"),
  [
    (uld, {"temperature": 1.0}),
    (uld, {"temperature": 100.0}),
    (alm, {"tau": 1.0}),
    (alm, {"tau": 100.0}),
  ],
)
def test_saturated_logits_give_finite_values_and_gradients(loss, softening):
  certain = 1e4 * np.eye(7)[LABEL]
  wrong = 1e4 * np.eye(7)[(LABEL + 1) % 7]
  for student in (certain, wrong):
    for teacher in (TEACHER, 1e4 * np.eye(5)[TEACHER_LABEL]):
      values, gradient = evaluate(loss, student, teacher, **softening)
      assert np.isfinite(values).all()
      assert np.isfinite(gradient).all()


def test_universal_logits_are_at_most_two_apart():
  student = 1e4 * np.eye(7)[LABEL]
  values, _ = evaluate(uld, student, np.zeros_like(TEACHER))
  oracle.close(values, np.where(EXISTS, 2 * (1 - 1 / 5), 0))


def test_a_token_without_any_probability_is_nan_for_its_span_alone():
  student = STUDENT.copy()
  student[0, 2, LABEL[0, 2]] = -np.inf
  values, _ = evaluate(alm, student)
  assert np.argwhere(np.isnan(values)).tolist() == [[0, 1]]


def test_shapes_that_do_not_fit_are_refused():
  student, teacher = jnp.float32(STUDENT), jnp.float32(TEACHER)
  with pytest.raises(UserError, match=r"teacher logits have shape \(2, 5, 5\)"):
    losses.universal_logits(student, teacher, SPAN, SPAN)
  with pytest.raises(UserError, match=r"its labels \(2, 5\)"):
    losses.likelihood_matching(
      student, teacher, TEACHER_LABEL, TEACHER_LABEL, SPAN, TEACHER_SPAN
    )
  with pytest.raises(UserError, match=r"2 rows, the teacher's 1"):
    losses.universal_logits(student, teacher[:1], SPAN, TEACHER_SPAN[:1])
