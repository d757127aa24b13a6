import decimal
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from kdjax.losses import ab_divergence

from . import oracle
from .oracle import STUDENT, TEACHER, softmax

D = decimal.Decimal

PLAIN = ([0.3, -1.2, 2.0, 0.1], [1.0, 0.4, -0.7, 0.2])
CLOSE = ([0.31, -1.2, 2.0, 0.1], [0.3, -1.19, 2.01, 0.1])
FAR = ([-40.0, 3.0, 0.5, -9.0], [20.0, -50.0, 1.0, -3.0])
SATURATED = ([1e4, -1e4, 0.0, 3.0], [-1e4, 1e4, 0.0, 1.0])


def divergence(a, b):
  """The equation and its four limits, written out."""
  a, b = D(float(np.float32(a))), D(float(np.float32(b)))

  def equation(p, q):
    s = a + b
    if a == 0 and b == 0:
      return sum((x.ln() - y.ln()) ** 2 for x, y in zip(p, q)) / 2
    if a == 0 or b == 0:  # between powers: 1/a² Σ(pᵃ log(pᵃ/qᵃ) − pᵃ + qᵃ)
      c, (p, q) = (a, (p, q)) if b == 0 else (b, (q, p))
      terms = (x**c * c * (x / y).ln() - x**c + y**c for x, y in zip(p, q))
      return sum(terms) / c**2
    if s == 0:
      terms = ((a * (y / x).ln() + (x / y) ** a - 1) for x, y in zip(p, q))
      return sum(terms) / a**2
    terms = (x**a * y**b - a / s * x**s - b / s * y**s for x, y in zip(p, q))
    return -sum(terms) / (a * b)

  return equation


def equation(student, teacher, *, temperature, a, b):
  p, q = softmax(teacher, temperature), softmax(student, temperature)
  s = a + b
  terms = p**a * q**b - a / s * p**s - b / s * q**s
  return -np.sum(terms, axis=-1) / (a * b)


@pytest.mark.parametrize("temperature", oracle.TEMPERATURES)
@pytest.mark.parametrize(("a", "b"), [(0.2, 0.7), (1.0, 1.0), (1.5, -0.5)])
def test_alpha_beta_matches_its_equation(a, b, temperature):
  oracle.agree(
    losses.alpha_beta, equation, STUDENT, TEACHER,
    temperature=temperature, a=a, b=b, rtol=2e-5, atol=2e-6,
  )  # fmt: skip


EXPONENTS = [
  (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, 0.0), (0.5, 0.5), (0.5, -0.5),
  (1e-4, 1e-4), (1e-4, 0.7), (1e-6, 0.5), (0.5, 1e-6), (1.0, 1e-3),
  (1e-30, 0.7),
  (0.3, -0.3 + 1e-5), (1e-5, -1e-5), (-0.2, 1.2), (2.0, -0.5), (-1.5, 2.5),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b"), EXPONENTS)
def test_alpha_beta_is_accurate_up_to_its_limits(a, b):
  student, teacher = (np.float32(x) for x in zip(PLAIN, CLOSE))
  want, want_gradient = oracle.exact(divergence(a, b), student, teacher)
  values, gradient, _ = oracle.compiled(losses.alpha_beta)(
    student, teacher, a=a, b=b
  )
  np.testing.assert_allclose(values, want, rtol=1e-4)
  oracle.close(gradient, want_gradient, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
  ("a", "b"), [(a, b) for a, b in EXPONENTS if min(a, b) >= 0]
)
def test_alpha_beta_of_saturated_networks_is_finite_and_right(a, b):
  student, teacher = (np.float32(x) for x in zip(FAR, SATURATED))
  want, want_gradient = oracle.exact(divergence(a, b), student, teacher)
  values, gradient, _ = oracle.compiled(losses.alpha_beta)(
    student, teacher, a=a, b=b
  )
  np.testing.assert_allclose(values, want, rtol=1e-4)
  oracle.close(gradient, want_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("a", "b"), [(0.3, -0.3), (-0.7, 0.7), (1e-6, 1e-6)])
def test_alpha_beta_compares_probabilities_that_underflow(a, b):
  student = np.float32([[0.0, -1e4, -9999.3, -1e4], [-1e4, 1.0, -1e4, 0.0]])
  teacher = np.float32([[0.0, -9998.6, -1e4, -1e4], [-9998.0, 0.5, -1e4, 0.0]])
  want, want_gradient = oracle.exact(divergence(a, b), student, teacher)
  values, gradient, _ = oracle.compiled(losses.alpha_beta)(
    student, teacher, a=a, b=b
  )
  # The second row's normaliser is not 0, and rounds log p to steps of 1e-3.
  np.testing.assert_allclose(values[0], want[0], rtol=1e-5)
  oracle.close(gradient[0], want_gradient[0], rtol=1e-5)
  np.testing.assert_allclose(values[1], want[1], rtol=2e-3)


def test_divided_difference_of_exp_is_exact_to_float32():
  points = [
    0,
    1e-6,
    1e-3,
    0.2,
    0.3,
    0.9,
    1.1,
    2,
    5,
    50,
    50.5,
    70,
    1e4,
    10001,
    3e4,
  ]
  x, y = np.float32(np.meshgrid(points, points)) * -1

  def exact(x, y):
    # Equal nodes are moved apart by what shows in no digit of the result.
    nodes = D(0), D(float(x)) - D("1e-20"), D(float(y)) - D("2e-20")
    total = D(0)
    for i, at in enumerate(nodes):
      others = [at - other for j, other in enumerate(nodes) if j != i]
      total += at.exp() / (others[0] * others[1])
    return float(total)

  with decimal.localcontext(prec=80):
    want = np.vectorize(exact)(x, y)
  np.testing.assert_allclose(ab_divergence._divided(x, y), want, rtol=2e-6)


def test_alpha_beta_holds_the_divergences_it_generalises():
  run = oracle.compiled(losses.alpha_beta)
  p, q = softmax(TEACHER), softmax(STUDENT)
  hellinger = 0.5 * np.sum((np.sqrt(p) - np.sqrt(q)) ** 2, axis=-1)
  for a, b, want in (
    (1.0, 0.0, np.sum(p * np.log(p / q), axis=-1)),
    (0.0, 1.0, np.sum(q * np.log(q / p), axis=-1)),
    (0.0, 0.0, 0.5 * np.sum(np.log(p / q) ** 2, axis=-1)),
    (0.5, 0.5, 4 * hellinger),
    (1.0, 1.0, 0.5 * np.sum((p - q) ** 2, axis=-1)),
  ):
    oracle.close(run(STUDENT, TEACHER, a=a, b=b)[0], want, what=f"{a}, {b}")


def test_exponents_receive_their_gradient_at_the_limits():
  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def gradient(a, b):
    student, teacher = jnp.float32(STUDENT), jnp.float32(TEACHER)
    return losses.alpha_beta(student, teacher, a=a, b=b).sum()

  def value(ab):
    kept = {"temperature": 1.0, "a": ab[0], "b": ab[1]}
    return equation(STUDENT, TEACHER, **kept).sum()

  for at in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, -0.5)):
    # Slightly beside the limit, where the float64 equation still has digits.
    beside = np.array(at) + [1e-4, 2e-4]
    np.testing.assert_allclose(
      gradient(*at), oracle.slope(value, beside, 2e-5), rtol=1e-2
    )
