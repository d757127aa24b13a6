"""MiniLM's relations against the equation of the paper, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from kdjax.types import UserError

from . import oracle

_random = np.random.default_rng(11)
B, S, RELATION_HEADS = 2, 5, 3


def array(heads, channels):
  drawn = _random.standard_normal((B, heads, S, channels))
  return np.float64(np.float32(drawn))


# Queries, keys, values: heads of the keys and values are shared, and the
# teacher has other heads of other channels.
STUDENT = array(3, 4), array(1, 6), array(1, 6)
TEACHER = array(6, 5), array(2, 3), array(2, 3)
SEGMENTS = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]])


def relations(x, row, head, token, others):
  """R of one token: softmax over the others of a · a′ / √d."""
  sides = np.concatenate([x[row, h] for h in range(x.shape[1])], axis=-1)
  d = sides.shape[-1] // RELATION_HEADS
  a = sides[:, head * d : (head + 1) * d]
  return oracle.softmax(a[others] @ a[token] / np.sqrt(d))


def equation(*kinds, causal=True, segments=SEGMENTS):
  out = np.zeros((B, S))
  for row, token in np.ndindex(B, S):
    if segments[row, token] == 0:
      continue
    last = token + 1 if causal else S
    others = [
      n for n in range(last) if segments[row, n] == segments[row, token]
    ]
    found = []
    for ours, theirs in zip(kinds[: len(kinds) // 2], kinds[len(kinds) // 2 :]):
      for head in range(RELATION_HEADS):
        q = relations(ours, row, head, token, others)
        p = relations(theirs, row, head, token, others)
        found.append(np.sum(p * np.log(p / q)))
    out[row, token] = np.mean(found)
  return out


def loss(*kinds, segments=SEGMENTS, **more):
  half = len(kinds) // 2
  return losses.self_relations(
    kinds[:half],
    kinds[half:],
    segments,
    num_relation_heads=RELATION_HEADS,
    **more,
  )


@pytest.mark.parametrize("causal", [True, False])
def test_matches_the_equation(causal):
  static = dict(causal=causal)
  oracle.agree(loss, equation, *STUDENT, *TEACHER, static=static)


def test_the_gradient_of_each_kind_is_its_own():
  # `agree` takes the slope of the first argument: the values' turn.
  turned = STUDENT[::-1] + TEACHER[::-1]
  oracle.agree(loss, equation, *turned)


def test_one_kind_is_an_activation_alone():
  run = functools.partial(
    losses.self_relations, num_relation_heads=RELATION_HEADS
  )
  both = np.float32(STUDENT[0]), np.float32(TEACHER[0])
  got = jax.jit(run)(*both, SEGMENTS)
  oracle.close(got, equation(STUDENT[0], TEACHER[0]))


def test_a_row_without_documents_is_one():
  whole = np.ones((B, S), int)
  oracle.close(
    loss(*map(jnp.float32, STUDENT + TEACHER), segments=None),
    equation(*STUDENT, *TEACHER, segments=whole),
  )


run = jax.jit(
  jax.value_and_grad(
    lambda student, teacher, causal: loss(*student, *teacher, causal=causal)[
      0, :4
    ].sum()
  ),
  static_argnums=2,
)


@pytest.mark.parametrize(
  ("causal", "moved"), [(True, [2, 3]), (False, [2, 3, 4])]
)
def test_no_token_learns_from_other_documents_or_the_future(causal, moved):
  """The loss of the first row's tokens 0..3, of documents 1 1 2 2."""
  student, teacher = (
    [jnp.float32(x) for x in side] for side in (STUDENT, TEACHER)
  )
  value, gradient = run(student, teacher, causal)
  reached = [np.flatnonzero(np.abs(g[0]).sum((0, 2))) for g in gradient]
  for tokens in reached:
    assert tokens.tolist() == [0, 1, *moved]
  for n in range(S):
    other = [x.at[0, :, n].multiply(-2.0) for x in teacher]
    changes = bool(run(student, other, causal)[0] != value)
    assert changes == (n in (0, 1, *moved)), n


def test_padding_moves_nothing_even_when_it_is_nan():
  want = run_all(STUDENT, TEACHER)
  spoilt = [
    [np.where((SEGMENTS == 0)[:, None, :, None], np.nan, x) for x in side]
    for side in (STUDENT, TEACHER)
  ]
  jax.tree.map(np.testing.assert_array_equal, run_all(*spoilt), want)
  values, gradient = want
  np.testing.assert_array_equal(values[SEGMENTS == 0], 0)
  assert all(np.isfinite(g).all() for g in gradient)


@jax.jit
def run_all(student, teacher):
  def total(student):
    values = loss(*map(jnp.float32, (*student, *teacher)))
    return values.sum(), values

  gradient, values = jax.grad(total, has_aux=True)(
    [jnp.float32(x) for x in student]
  )
  return values, gradient


def test_cutting_heads_anew_is_what_makes_them_meet():
  """As many relation heads as heads of the student: its own products."""
  one = array(3, 2)
  own = np.einsum("bhsd,bhtd->bhst", one, one) / np.sqrt(2)
  seen = np.tril(np.ones((S, S), bool))
  q = oracle.softmax(np.where(seen, own, -np.inf))
  other = array(3, 2)
  p = np.einsum("bhsd,bhtd->bhst", other, other) / np.sqrt(2)
  p = oracle.softmax(np.where(seen, p, -np.inf))
  with np.errstate(divide="ignore", invalid="ignore"):
    want = np.nansum(p * np.log(p / q), -1).mean(1)
  got = loss(jnp.float32(one), jnp.float32(other), segments=None)
  oracle.close(got, want)


def test_the_teacher_gets_no_gradient_and_equal_networks_cost_nothing():
  def total(teacher):
    return loss(*map(jnp.float32, STUDENT), *teacher).sum()

  gradient = jax.jit(jax.grad(total))([jnp.float32(x) for x in TEACHER])
  assert all((g == 0).all() for g in gradient)
  values, slopes = run_all(STUDENT, STUDENT)
  np.testing.assert_allclose(values, 0, atol=1e-6)
  for g in slopes:
    np.testing.assert_allclose(g, 0, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e4, 1e-12])
def test_hard_activations_give_finite_values_and_gradients(scale):
  huge = [scale * x for x in STUDENT]
  for pair in ((huge, TEACHER), (STUDENT, [scale * x for x in TEACHER])):
    for x in jax.tree.leaves(run_all(*pair)):
      assert np.isfinite(x).all()


def test_values_are_float32_whatever_comes_in():
  half = [x.astype(jnp.bfloat16) for x in map(jnp.asarray, STUDENT + TEACHER)]
  got = jax.jit(loss)(*half)
  assert got.dtype == jnp.float32
  oracle.close(got, equation(*(np.float64(x) for x in half)))


@pytest.mark.parametrize(
  ("student", "teacher", "says"),
  [
    (STUDENT[:2], TEACHER, "got 2 activations of the student and 3"),
    ((), (), "got 0 activations"),
    (STUDENT[0][:, :, :3], TEACHER[0], r"shapes .*needs \[B, heads, S, d\]"),
    (STUDENT[0][:, 0], TEACHER[0], "choose queries, keys and values"),
    (array(2, 4), TEACHER[0], "got num_relation_heads=3 for 2 heads of 4"),
  ],
)
def test_what_cannot_be_related_is_refused(student, teacher, says):
  related = functools.partial(losses.self_relations, num_relation_heads=3)
  with pytest.raises(UserError, match=says) as told:
    related(student, teacher)
  assert "\n" not in str(told.value)
