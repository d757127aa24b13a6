"""Every loss on activations against its equation, in float64 NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.losses import features, maps, preactivations, transfer
from kdjax.types import UserError

from . import oracle

_random = np.random.default_rng(1)


def array(*shape):
  return np.float64(np.float32(_random.standard_normal(shape)))


STUDENT, TEACHER = array(3, 3, 2, 4), array(3, 3, 2, 4)
LARGE, SMALL = array(2, 7, 5, 4), array(2, 3, 2, 3)
MARGIN = -np.abs(array(4))


def per_example(x):
  return x.reshape(len(x), -1)


def unit(x, axis=-1):
  return x / np.linalg.norm(x, axis=axis, keepdims=True)


def pool(x, height, width):
  """PyTorch's bins, by hand."""
  _, h, w, _ = x.shape
  out = np.zeros((len(x), height, width, x.shape[-1]))
  for i in range(height):
    for j in range(width):
      rows = slice(i * h // height, -(-(i + 1) * h // height))
      columns = slice(j * w // width, -(-(j + 1) * w // width))
      out[:, i, j] = x[:, rows, columns].mean((1, 2))
  return out


def alike(student, teacher):
  size = np.minimum(student.shape[1:3], teacher.shape[1:3])
  return pool(student, *size), pool(teacher, *size)


def hint(student, teacher, *, distance):
  apart = np.abs(student - teacher)
  if distance == "cosine":
    return 1 - np.mean(np.sum(unit(student) * unit(teacher), -1), (1, 2))
  values = {
    "mse": apart**2,
    "l1": apart,
    "smooth_l1": np.where(apart < 1, apart**2 / 2, apart - 0.5),
  }
  return per_example(values[distance]).mean(1)


@pytest.mark.parametrize("distance", ["mse", "l1", "cosine", "smooth_l1"])
def test_hint_matches_its_equation(distance):
  static = {"distance": distance}
  oracle.agree(features.hint, hint, STUDENT, TEACHER, static=static)


@pytest.mark.parametrize(
  ("ours", "theirs"), [((5, 4), (2, 4)), ((2, 6), (4, 3))]
)
def test_hint_pools_the_larger_of_two_maps(ours, theirs):
  def pooled_hint(student, teacher):
    return hint(*alike(student, teacher), distance="mse")

  student, teacher = array(2, *ours, 3), array(2, *theirs, 3)
  oracle.agree(features.hint, pooled_hint, student, teacher)


def attention(x, power):
  return unit(per_example(np.sum(np.abs(x) ** power, axis=-1)))


def attention_transfer(student, teacher, *, power, form="code"):
  student, teacher = alike(student, teacher)
  squares = (attention(student, power) - attention(teacher, power)) ** 2
  return np.sqrt(squares.sum(1)) if form == "paper" else squares.mean(1)


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
@pytest.mark.parametrize(
  ("student", "teacher"), [(LARGE, SMALL), (SMALL, LARGE), (STUDENT, TEACHER)]
)
def test_attention_transfer_matches_its_equation(student, teacher, power, form):
  oracle.agree(
    transfer.attention_transfer, attention_transfer, student, teacher,
    power=power, static={"form": form},
  )  # fmt: skip


def test_sizes_may_be_larger_on_a_different_side_for_each_axis():
  student, teacher = array(2, 5, 3, 2), array(2, 4, 7, 2)
  oracle.agree(
    transfer.attention_transfer, attention_transfer, student, teacher, power=2.0
  )


def factor(student, teacher, *, power_in, power_out):
  student, teacher = alike(student, teacher)
  apart = attention(student, power_in) - attention(teacher, power_in)
  return np.mean(np.abs(apart) ** power_out, axis=1)


@pytest.mark.parametrize("powers", [(2.0, 1.0), (1.5, 2.0)])
def test_factor_matches_its_equation(powers):
  oracle.agree(
    transfer.factor, factor, LARGE, SMALL,
    power_in=powers[0], power_out=powers[1],
  )  # fmt: skip


def attention_maps(student, teacher, *, distance="kl", where=None):
  """Written for each query of each head."""
  if student.shape[1] != teacher.shape[1]:
    student, teacher = (x.mean(1, keepdims=True) for x in (student, teacher))
  values = []
  for b in range(len(student)):
    kept = np.flatnonzero(
      np.ones(student.shape[2]) if where is None else where[b]
    )
    of_queries = []
    for head in range(student.shape[1]):
      for query in kept:
        p, q = teacher[b, head, query, kept], student[b, head, query, kept]
        kl, mse = np.sum(p * np.log(p / q)), np.mean((p - q) ** 2)
        of_queries.append(kl if distance == "kl" else mse)
    values.append(np.mean(of_queries))
  return np.array(values)


@pytest.mark.parametrize("heads", [(2, 2), (2, 3)])
@pytest.mark.parametrize("distance", ["kl", "mse"])
def test_attention_maps_match_their_equation(distance, heads):
  ours, theirs = (oracle.softmax(array(2, n, 3, 3)) for n in heads)
  static = {"distance": distance}
  oracle.agree(
    transfer.attention_maps, attention_maps, ours, theirs, static=static
  )
  where = np.array([[1, 1, 1], [1, 0, 1]])
  want = attention_maps(ours, theirs, distance=distance, where=where)
  ours[1, :, 1], theirs[1, :, :, 1] = np.nan, np.nan
  values, gradient, _ = oracle.compiled(transfer.attention_maps, **static)(
    ours, theirs, where=where
  )
  oracle.close(values, want)
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize("distance", ["kl", "mse"])
def test_a_query_may_be_an_example(distance):
  ours, theirs = (oracle.softmax(array(2, n, 4, 5)) for n in (2, 3))
  run = oracle.compiled(transfer.attention_maps, distance=distance)
  rows = [np.swapaxes(x, 1, 2).reshape(8, -1, 5) for x in (ours, theirs)]
  values, _, _ = run(*rows)
  q, p = (x.mean(1) for x in rows)
  want = np.sum(p * np.log(p / q), -1)
  if distance == "mse":
    want = np.mean((p - q) ** 2, -1)
  oracle.close(values, want)
  whole, _, _ = run(ours, theirs)
  oracle.close(values.reshape(2, 4).mean(1), whole)


def test_attention_to_masked_keys_is_finite():
  masked = np.array([0.0, 0.0, -np.inf])
  ours, theirs = (oracle.softmax(array(2, 2, 3, 3) + masked) for _ in range(2))
  values, gradient, _ = oracle.compiled(transfer.attention_maps)(ours, theirs)
  want = [
    np.mean(np.sum(p * np.log(p / q), axis=-1))
    for p, q in zip(theirs[..., :2], ours[..., :2])
  ]
  oracle.close(values, want)
  np.testing.assert_array_equal(gradient[..., 2], 0)
  theirs[0, 0, 0] = [0.5, 0.25, 0.25]  # where the student has none
  values, gradient, _ = oracle.compiled(transfer.attention_maps)(ours, theirs)
  assert np.isfinite(values).all()
  assert np.isfinite(gradient).all()


def review(student, teacher, *, levels):
  parts = [(1.0, student, teacher)]
  for level in levels:
    if level < student.shape[1]:
      pooled = (pool(x, level, level) for x in (student, teacher))
      parts.append((parts[-1][0] / 2, *pooled))
  total = sum(w * per_example((s - t) ** 2).mean(1) for w, s, t in parts)
  return total / sum(w for w, _, _ in parts)


@pytest.mark.parametrize("levels", [(4, 2, 1), (7, 3), ()])
def test_review_matches_its_equation(levels):
  other = array(*LARGE.shape)
  static = {"levels": levels}
  oracle.agree(features.review, review, LARGE, other, static=static)
  square = array(2, 4, 4, 2), array(2, 4, 4, 2)
  oracle.agree(features.review, review, *square, static=static)


def test_review_of_a_vector_is_of_one_position():
  student, teacher = array(3, 4), array(3, 4)
  oracle.close(
    features.review(student, teacher), np.mean((student - teacher) ** 2, axis=1)
  )


def test_review_skips_levels_wider_than_the_map():
  student, teacher = array(2, 5, 3, 2), array(2, 5, 3, 2)
  oracle.close(
    features.review(student, teacher, levels=(4, 2)),
    review(student, teacher, levels=(2,)),
  )


def overhaul(student, teacher, margin):
  """The three cases of the paper, one by one."""
  margin = np.broadcast_to(margin, teacher.shape)
  values = np.where(
    teacher > margin,
    (student - teacher) ** 2 * ((student > teacher) | (teacher > 0)),
    (student - margin) ** 2 * (student > margin),
  )
  return per_example(values).sum(1)


def test_overhaul_matches_its_equation():
  oracle.agree(preactivations.overhaul, overhaul, STUDENT, TEACHER, MARGIN)


def test_margin_is_the_mean_of_the_negative_part():
  scale = np.array([1.0, 2.0, 0.5, -1.5, 1.0, 1.0, 1.0, 0.1, 1.0])
  ratio = np.array([0.0, 1.0, -2.0, 2.9, 3.1, 6.0, -30.0, 13.5, 2.99])
  bias = ratio * np.abs(scale)
  want = []
  for s, m in zip(np.abs(scale), bias):
    # Simpson's rule from far below 0 (in units of the decay there) up to 0.
    width = 12 * min(s, s / max(m / s, 1e-9)) + max(-m, 0)
    low = -max(width, 12 * s if m <= 0 else 0)
    x = np.linspace(low, 0, 20001)
    simpson = np.ones(20001)
    simpson[1:-1:2], simpson[2:-1:2] = 4, 2
    density = simpson * np.exp(-((x - m) ** 2 - m**2 * (m > 0)) / (2 * s**2))
    want.append(np.sum(x * density) / np.sum(density))
  got = preactivations.overhaul_margin(jnp.float32(scale), jnp.float32(bias))
  oracle.close(got, want, rtol=2e-5)  # z − φ / Φ cancels a digit up to 3


def test_margin_keeps_its_digits_in_the_tails():
  got = preactivations.overhaul_margin(
    jnp.float32([1, 1, 1, 0, 0]), jnp.float32([1e3, 1e6, -1e6, 2, -2])
  )
  # −1 / z (1 − 2 / z² + ...), the bias itself, and constants.
  oracle.close(got, [-1e-3, -1e-6, -1e6, 0, -2], atol=1e-12)


def activation_boundary(student, teacher, *, margin):
  values = np.where(
    teacher > 0,
    (student - margin) ** 2 * (student <= margin),
    (student + margin) ** 2 * (student > -margin),
  )
  return per_example(values).sum(1)


@pytest.mark.parametrize("margin", [0.5, 1.0])
def test_activation_boundary_matches_its_equation(margin):
  oracle.agree(
    preactivations.activation_boundary, activation_boundary, STUDENT, TEACHER,
    margin=margin,
  )  # fmt: skip


def test_masked_generative_matches_its_equation():
  kernel, mask = array(4, 4), np.float64(_random.random((3, 3, 2, 1)) > 0.5)

  def equation(student, teacher, mask):
    made = np.tanh((mask * student) @ kernel)
    return per_example((made - teacher) ** 2).mean(1)

  def loss(student, teacher, mask):
    generate = lambda x: jnp.tanh(x @ jnp.float32(kernel))  # noqa: E731
    return features.masked_generative(student, teacher, mask, generate)

  oracle.agree(loss, equation, STUDENT, TEACHER, mask)


def test_hidden_positions_are_the_share_asked_for():
  x = jnp.zeros((8, 30, 30, 3))
  for ratio in (0.0, 0.3, 0.65):
    mask = features.hide_positions(jax.random.key(0), x, ratio)
    assert mask.shape == (8, 30, 30, 1)
    assert set(np.unique(mask)) <= {0.0, 1.0}
    # Four standard deviations of the mean of 7200 draws.
    np.testing.assert_allclose(mask.mean(), 1 - ratio, atol=0.024)
  other = features.hide_positions(jax.random.key(1), x, 0.65)
  assert (mask != other).any()


def variational_information(student, teacher, variance):
  values = (teacher - student) ** 2 / variance + np.log(variance)
  return per_example(values / 2).mean(1)


def test_variational_information_matches_its_equation():
  variance = np.exp(array(4))
  given = STUDENT, TEACHER, variance
  equation = variational_information
  oracle.agree(features.variational_information, equation, *given)

  def total(variance):
    return features.variational_information(*given[:2], variance).sum()

  want = oracle.slope(lambda v: equation(*given[:2], v).sum(), variance)
  oracle.close(jax.grad(total)(jnp.float32(variance)), want)


def simple(student, teacher, *, exponent):
  total = np.sum(np.abs(student - teacher) ** exponent)
  return np.full(len(student), 2 * np.log(total))


@pytest.mark.parametrize("exponent", [1.0, 2.5, 4.0])
def test_simple_matches_its_equation(exponent):
  oracle.agree(features.simple, simple, STUDENT, TEACHER, exponent=exponent)


def test_simple_keeps_its_digits_as_the_two_meet():
  for apart, exponent in ((1e-3, 4.0), (1e-8, 4.0), (1e-8, 6.0)):

    def at(student, exponent=exponent):
      teacher = jnp.zeros((2, 3))
      return features.simple(student, teacher, exponent=exponent)

    values, gradient, _ = oracle.compiled(at)(np.full((2, 3), apart))
    oracle.close(values, 2 * (exponent * math.log(apart) + math.log(6)))
    # Of two rows: each has 2 · exponent · apart^(e − 1) / (6 · apart^e).
    oracle.close(gradient, np.full((2, 3), 4 * exponent / (6 * apart)))


def test_simple_of_equal_activations_is_finite_and_still():
  for weight in (1.0, 1e4):

    def weighted(student, teacher, weight=weight):
      return weight * features.simple(student, teacher)

    values, gradient, _ = oracle.compiled(weighted)(STUDENT, STUDENT)
    oracle.close(values, weight * 8 * math.log(1e-9))
    np.testing.assert_array_equal(gradient, 0)


def nst(student, teacher):
  """From the channels one by one."""
  student, teacher = alike(student, teacher)
  values = []
  for s, t in zip(student, teacher):
    s, t = (unit(x.reshape(-1, x.shape[-1]).T) for x in (s, t))
    kernels = [np.mean([(a @ b) ** 2 for a in x for b in y])
               for x, y in ((t, t), (s, s), (s, t))]  # fmt: skip
    values.append(kernels[0] + kernels[1] - 2 * kernels[2])
  return np.array(values)


@pytest.mark.parametrize(
  ("student", "teacher"), [(LARGE, SMALL), (STUDENT, TEACHER)]
)
def test_nst_matches_its_equation(student, teacher):
  oracle.agree(transfer.nst, nst, student, teacher)


def gram(low, high):
  low, high = alike(low, high)
  return np.einsum("bhwi,bhwj->bij", low, high) / np.prod(low.shape[1:3])


def flow(low, high, teacher_low, teacher_high):
  apart = gram(low, high) - gram(teacher_low, teacher_high)
  return per_example(apart**2).mean(1)


def test_flow_matches_its_equation():
  low, high = LARGE, array(2, 3, 2, 5)
  theirs = array(2, 4, 4, 4), array(2, 4, 4, 5)

  def of_low(low, high, *teacher):
    return transfer.flow((low, high), teacher)

  def of_high(high, low, *teacher):
    return transfer.flow((low, high), teacher)

  oracle.agree(of_low, flow, low, high, *theirs)
  oracle.agree(of_high, lambda h, low, *t: flow(low, h, *t), high, low, *theirs)


@pytest.mark.parametrize("size", [(3, 2), (4, 5), (7, 1), (1, 1), (7, 5)])
def test_pooling_has_pytorchs_uneven_bins(size):
  oracle.close(maps.adaptive_pool(jnp.float32(LARGE), size), pool(LARGE, *size))


def test_products_are_taken_in_full_precision():
  # On a CPU the default is full precision too, and no value would tell.
  low, high = STUDENT, TEACHER
  for run in (
    functools.partial(transfer.nst, low, high),
    functools.partial(transfer.flow, (low, high), (low, high)),
    functools.partial(maps.adaptive_pool, jnp.float32(LARGE), (3, 2)),
  ):
    program = str(jax.make_jaxpr(run)())
    assert "precision=(Precision.HIGHEST" in program
    assert "precision=None" not in program


@pytest.mark.parametrize(
  ("loss", "message"),
  [
    (functools.partial(features.hint, distance="mes"), "did you mean 'mse'"),
    (functools.partial(transfer.attention_transfer, form="codes"), "'code'"),
    (functools.partial(features.review, levels=(2, 0)), "give sizes >= 1"),
  ],
)
def test_arguments_that_cannot_be_are_refused(loss, message):
  with pytest.raises(UserError, match=message):
    loss(STUDENT, TEACHER)


def test_unknown_distance_of_attention_is_refused():
  maps_of = oracle.softmax(array(2, 2, 3, 3))
  with pytest.raises(UserError, match="did you mean 'kl'"):
    transfer.attention_maps(maps_of, maps_of, distance="kll")
