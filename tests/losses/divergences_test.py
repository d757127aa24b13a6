import decimal
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from kdjax.losses import divergences
from kdjax.types import UserError

from . import oracle
from .oracle import STUDENT, TEACHER, log_softmax, softmax

D = decimal.Decimal


def kl_of(a, b):
  return np.sum(a * (np.log(a) - np.log(b)), axis=-1)


def both(student, teacher, temperature):
  return softmax(teacher, temperature), softmax(student, temperature)


def kl(student, teacher, *, temperature):
  return kl_of(*both(student, teacher, temperature))


def reverse_kl(student, teacher, *, temperature):
  p, q = both(student, teacher, temperature)
  return kl_of(q, p)


def jeffreys(student, teacher, *, temperature):
  p, q = both(student, teacher, temperature)
  return kl_of(p, q) + kl_of(q, p)


def total_variation(student, teacher, *, temperature):
  p, q = both(student, teacher, temperature)
  return 0.5 * np.sum(np.abs(p - q), axis=-1)


def jsd(student, teacher, *, temperature, mix, scale="none"):
  p, q = both(student, teacher, temperature)
  m = mix * p + (1 - mix) * q
  value = mix * kl_of(p, m) + (1 - mix) * kl_of(q, m)
  return value / (mix * (1 - mix)) if scale == "unit" else value


def skew_kl(student, teacher, *, temperature, skew):
  p, q = both(student, teacher, temperature)
  return kl_of(p, skew * p + (1 - skew) * q)


def skew_reverse_kl(student, teacher, *, temperature, skew):
  p, q = both(student, teacher, temperature)
  return kl_of(q, skew * q + (1 - skew) * p)


@pytest.mark.parametrize("temperature", oracle.TEMPERATURES)
@pytest.mark.parametrize(
  "equation", [kl, reverse_kl, jeffreys, total_variation]
)
def test_divergence_matches_its_equation(equation, temperature):
  loss = getattr(losses, equation.__name__)
  oracle.agree(loss, equation, STUDENT, TEACHER, temperature=temperature)


@pytest.mark.parametrize("temperature", oracle.TEMPERATURES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_mixture_matches_its_equation(share, temperature):
  agree = functools.partial(
    oracle.agree, temperature=temperature, rtol=2e-5, atol=2e-6
  )
  agree(losses.skew_kl, skew_kl, STUDENT, TEACHER, skew=share)
  agree(losses.skew_reverse_kl, skew_reverse_kl, STUDENT, TEACHER, skew=share)
  for scale in ("none", "unit"):
    static = {"scale": scale}
    agree(losses.jsd, jsd, STUDENT, TEACHER, mix=share, static=static)


def test_kl_gradient_has_the_closed_form():
  _, gradient, _ = oracle.compiled(losses.kl)(STUDENT, TEACHER, temperature=4.0)
  p, q = both(STUDENT, TEACHER, 4.0)
  oracle.close(gradient, (q - p) / 4.0)


def test_skew_kl_at_zero_is_kl_and_at_one_vanishes():
  run = oracle.compiled(losses.skew_kl)
  back = oracle.compiled(losses.skew_reverse_kl)
  oracle.close(
    run(STUDENT, TEACHER, skew=0.0)[0], kl(STUDENT, TEACHER, temperature=1)
  )
  want = reverse_kl(STUDENT, TEACHER, temperature=1)
  oracle.close(back(STUDENT, TEACHER, skew=0.0)[0], want)
  for values, gradient, _ in (
    run(STUDENT, TEACHER, skew=1.0),
    back(STUDENT, TEACHER, skew=1.0),
  ):
    oracle.close(values, np.zeros(5))
    oracle.close(gradient, np.zeros_like(STUDENT))


def test_detached_mixture_keeps_the_value_and_counts_as_constant():
  p, q = both(STUDENT, TEACHER, 2.0)
  mixture = 0.3 * q + 0.7 * p

  def equation(student):
    log_q = log_softmax(student, 2.0)
    return np.sum(np.exp(log_q) * (log_q - np.log(mixture)), axis=-1)

  values, gradient, _ = oracle.compiled(
    losses.skew_reverse_kl, detach_mixture=True
  )(STUDENT, TEACHER, temperature=2.0, skew=0.3)
  oracle.close(values, equation(STUDENT))
  want = oracle.slope(lambda s: equation(s).sum(), STUDENT)
  oracle.close(gradient, want)
  true = oracle.slope(
    lambda s: skew_reverse_kl(s, TEACHER, temperature=2.0, skew=0.3).sum(),
    STUDENT,
  )
  assert np.abs(true - want).max() > 1e-2  # the two do differ


# In float32: the ends, their neighbours, and what 1 - mix rounds away.
MIXES = [
  0.0,
  1e-30,
  1e-10,
  1e-5,
  0.01,
  0.3,
  0.5,
  0.99,
  1 - 1e-5,
  1 - 2**-24,
  1.0,
]


def unit_jsd(mix):
  mix = D(float(np.float32(mix)))

  def equation(p, q):
    if mix in (0, 1):
      a, b = (p, q) if mix == 0 else (q, p)
      return sum(x * (x / y).ln() for x, y in zip(a, b))
    m = [mix * x + (1 - mix) * y for x, y in zip(p, q)]
    towards_p = sum(x * (x / z).ln() for x, z in zip(p, m))
    towards_q = sum(y * (y / z).ln() for y, z in zip(q, m))
    return (mix * towards_p + (1 - mix) * towards_q) / (mix * (1 - mix))

  return equation


ROWS = {
  "plain": ([0.3, -1.2, 2.0, 0.1], [1.0, 0.4, -0.7, 0.2]),
  "close": ([0.31, -1.2, 2.0, 0.1], [0.3, -1.19, 2.01, 0.1]),
  "far": ([-40.0, 3.0, 0.5, -60.0], [20.0, -50.0, 1.0, -3.0]),
  "saturated": ([1e4, -1e4, 0.0, 3.0], [-1e4, 1e4, 0.0, 1.0]),
  "huge gap in the tail": ([9.0, 8.0, -300.0, 0.0], [9.5, 8.0, 7.0, -280.0]),
}


@pytest.mark.parametrize("mix", MIXES)
def test_unit_jsd_is_accurate_for_every_traced_mix(mix):
  student, teacher = (np.float32(x) for x in zip(*ROWS.values()))
  want, want_gradient = oracle.exact(unit_jsd(mix), student, teacher)
  values, gradient, _ = oracle.compiled(losses.jsd, scale="unit")(
    student, teacher, mix=mix
  )
  np.testing.assert_allclose(values, want, rtol=1e-4)
  oracle.close(gradient, want_gradient, rtol=1e-4)


def test_unit_jsd_of_nearly_equal_networks_keeps_its_digits():
  student = np.float32(STUDENT)
  teacher = student + np.float32(1e-2) * np.float32(TEACHER)
  want, _ = oracle.exact(unit_jsd(0.5), student, teacher)
  values, _, _ = oracle.compiled(losses.jsd, scale="unit")(
    student, teacher, mix=0.5
  )
  np.testing.assert_allclose(values, want, rtol=1e-4)
  assert want.max() < 1e-3


def test_the_pieces_of_jsd_are_exact_to_float32():
  sizes = np.float32(np.geomspace(1e-6, 1e4, 600))
  x = np.float64(np.concatenate([sizes, -sizes]))
  got, slope = jax.vmap(jax.value_and_grad(divergences._complement))(
    jnp.float32(x)
  )
  with np.errstate(over="ignore"):
    want = 1 - x / np.expm1(x)
  series = x / 2 - x**2 / 12 + x**4 / 720
  want = np.where(np.abs(x) < 1e-2, series, want)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  assert np.isfinite(slope).all()


def test_jsd_sends_no_gradient_to_its_mix():
  def total(mix):
    return losses.jsd(
      jnp.float32(STUDENT), jnp.float32(TEACHER), mix=mix, scale="unit"
    ).sum()

  assert jax.grad(total)(0.5) == 0


@pytest.mark.parametrize(
  ("loss", "hparams", "message"),
  [
    (
      losses.jsd,
      {"mix": 0.0},
      r"mix is 0.0, must be in \(0, 1\).*scale='unit'",
    ),
    (losses.jsd, {"mix": 1.5, "scale": "unit"}, r"mix is 1.5, .* \[0, 1\]"),
    (losses.jsd, {"scale": "half"}, "scale is 'half'"),
    (losses.skew_kl, {"skew": -0.1}, "skew is -0.1"),
    (losses.skew_reverse_kl, {"skew": 2}, "skew is 2"),
  ],
)
def test_a_share_out_of_range_is_refused(loss, hparams, message):
  with pytest.raises(UserError, match=message):
    loss(jnp.float32(STUDENT), jnp.float32(TEACHER), **hparams)


@pytest.mark.parametrize("temperature", [20.0, 100.0])
@pytest.mark.parametrize("name", ["kl", "reverse_kl"])
def test_close_distributions_keep_their_digits(name, temperature):
  draw = np.random.default_rng(3)
  student, teacher = np.float32(draw.normal(size=(2, 16, 50)) * 3)
  log_p, log_q = (
    np.float64(z) / temperature
    - np.log(np.exp(np.float64(z) / temperature).sum(-1, keepdims=True))
    for z in (teacher, student)
  )
  if name == "reverse_kl":
    log_p, log_q = log_q, log_p
  want = np.sum(np.exp(log_p) * (log_p - log_q), -1)
  got = getattr(losses, name)(student, teacher, temperature=temperature)
  np.testing.assert_allclose(got, want, rtol=1e-5)


# Rows that take each way through the sums: much more mass beside the peak on
# one side than on the other, peaks far apart, and ratios of the sums near where
# the way changes.
def _far(way: str) -> tuple[np.ndarray, np.ndarray]:
  flat, peaked = np.zeros(2000), np.r_[0.0, np.full(1999, -30.0)]
  small = np.random.default_rng(0).normal(size=2000)
  return {
    "flat teacher": (peaked + small, flat + small[::-1]),
    "flat student": (flat + small, peaked + small[::-1]),
    "apart": (np.roll(peaked, 7), peaked),
    "half": (small, small + np.where(np.arange(2000) % 2, 0.8, 0.0)),
    "offset": (small + 100.0, 0.5 * small - 50.0),
  }[way]


@pytest.mark.parametrize(
  "way", ["flat teacher", "flat student", "apart", "half", "offset"]
)
@pytest.mark.parametrize("equation", [kl, reverse_kl])
def test_far_distributions_keep_their_digits(equation, way):
  student, teacher = (np.float32(x)[None] for x in _far(way))
  loss = getattr(losses, equation.__name__)
  at = functools.partial(loss, teacher=teacher, temperature=1.5)
  value, slope = jax.value_and_grad(lambda z: at(z).sum())(student)
  z, y = np.float64(student), np.float64(teacher)
  divergence = equation(z, y, temperature=1.5)[0]
  np.testing.assert_allclose(value, divergence, 3e-6)
  p, q = both(z, y, 1.5)
  want = q - p
  if equation is reverse_kl:
    log_ratio = log_softmax(z, 1.5) - log_softmax(y, 1.5)
    want = q * (log_ratio - divergence)
  want /= 1.5
  # That of reverse_kl is what is left of two numbers as large as itself.
  error = np.linalg.norm(slope - want)
  assert error < 2e-6 * np.linalg.norm(want) + 2e-6 * divergence


def test_equal_logits_have_a_divergence_of_exactly_zero():
  z = 50 * np.random.default_rng(0).normal(size=(8, 300)).astype(np.float32)
  for loss in (losses.kl, losses.reverse_kl):
    np.testing.assert_array_equal(loss(z, z, temperature=3.0), 0.0)
