"""A head taken a chunk of tokens at a time, against the whole of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import softmax

from kdjax import evaluate, losses, totals
from kdjax.errors import UserError
from kdjax.losses import LOGIT_LOSSES, chunks, fused, head_gradients
from kdjax.objective import Objective, Term, hinton
from kdjax.types import LinearLogits, dense

RNG = np.random.default_rng(0)
BATCH, STUDENT_V, TEACHER_V, TRUE = (3, 7), 13, 12, 11
SOFTCAP, SCALE = 3.0, 0.7


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
  """13 classes are then two parts and a rest, a chunk of 4 two tiles."""
  monkeypatch.setattr(head_gradients, "_CLASSES", 5)
  monkeypatch.setattr(chunks, "_TILE", STUDENT_V)
  monkeypatch.setattr(chunks.os, "cpu_count", lambda: 2)


def normal(*shape):
  return RNG.normal(size=shape)


ARRAYS = (normal(*BATCH, 4), normal(STUDENT_V, 4), normal(STUDENT_V))
THEIRS = (normal(*BATCH, 6), normal(TEACHER_V, 6), None)
LABEL = RNG.integers(0, TRUE, BATCH)
# 13 of 21 tokens: a chunk of 4 divides neither.
MASK = np.isin(np.arange(21), [0, 3, 4, 8, 9, 15, 20, 17], invert=True)
MASK = np.float32(MASK.reshape(BATCH))
BATCH_OF = {"mask": MASK, "label": LABEL}


def single(x):
  return None if x is None else jnp.float32(x)


def student(arrays=ARRAYS):
  return LinearLogits(*map(single, arrays), SOFTCAP, SCALE, TRUE)


def teacher():
  return LinearLogits(*map(single, THEIRS))


def evaluated(goal, head, target, batch=BATCH_OF, chunk=4, step=0):
  """Totals and sums; chunk 0 stands for the whole logits."""
  divide_by = totals.denominators(goal.terms, batch)
  if not chunk:
    head = dense(head)[..., :TRUE]
    target = None if target is None else dense(target)[..., :TRUE]
  return totals.logit_terms(
    goal.terms,
    head,
    target,
    batch,
    divide_by,
    jnp.int32(step),
    fused.Layout(chunk=chunk),
  )


def values(goal, head, target, **how):
  run = jax.jit(lambda head, target: evaluated(goal, head, target, **how))
  return run(head, target)


def gradients(goal, chunk, groups=None, batch=BATCH_OF, head=None):
  """Totals, sums, and the student's gradient of the groups' sum."""

  @jax.jit
  def run(head, target):
    def total(head):
      parts, sums = evaluated(goal, head, target, batch, chunk)
      return sum(parts[g] for g in groups or parts), (parts, sums)

    return jax.grad(total, has_aux=True)(head)

  gradient, (parts, sums) = run(head or student(), teacher())
  return parts, sums, gradient


def close(got, want, rtol=1e-5, atol=1e-6):
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol),
    got,
    want,
  )


def equation(alpha, t):
  """Total and gradients of hidden, kernel and bias, in float64."""
  h, w, b = ARRAYS
  z = np.tanh(SCALE * (h @ w[:TRUE].T + b[:TRUE]) / SOFTCAP)
  slope, z = SCALE * (1 - z**2), SOFTCAP * z
  y = (THEIRS[0] @ THEIRS[1].T)[..., :TRUE]
  p, q, hard, onehot = *(softmax(x / t) for x in (y, z)), softmax(z), 0
  onehot = np.eye(TRUE)[LABEL]
  each = -alpha * np.log(np.sum(onehot * hard, -1))
  each += (1 - alpha) * t**2 * np.sum(p * np.log(p / q), -1)
  dz = alpha * (hard - onehot) + (1 - alpha) * t * (q - p)
  dz *= slope * (MASK / MASK.sum())[..., None]
  dw, db = np.zeros_like(w), np.zeros_like(b)
  dw[:TRUE], db[:TRUE] = np.einsum("bsv,bsd->vd", dz, h), dz.sum((0, 1))
  return np.sum(MASK * each) / MASK.sum(), (dz @ w[:TRUE], dw, db)


def test_total_and_gradients_are_the_equations():
  h = np.where(MASK[..., None] > 0, ARRAYS[0], np.nan)  # must not leak
  batch = {"mask": MASK, "label": np.where(MASK > 0, LABEL, -7)}
  goal = hinton(alpha=0.3, temperature=2.0)
  head = student((h, *ARRAYS[1:]))
  parts, _, got = gradients(goal, 4, batch=batch, head=head)
  total, (dh, dw, db) = equation(0.3, 2.0)
  close(sum(parts.values()), total)
  close((got.hidden, got.kernel, got.bias), (dh, dw, db))


def mine(student, teacher, *, temperature=1.0):
  gap = jax.nn.softmax(student / temperature) - jax.nn.softmax(teacher)
  return jnp.sum(gap**4, -1) + jnp.max(gap, -1)


ROW_LOSSES = {
  name: loss
  for name, loss in LOGIT_LOSSES.items()
  if not losses.traits(loss).couples
}
ROW_LOSSES["mine"] = losses.logit_loss(power=1)(mine)
ROW_LOSSES["zscore"] = losses.zscore(losses.kl)


def term(name, group, weight=1.0):
  loss = ROW_LOSSES[name]
  softens = name not in ("cross_entropy", "nkd_target", "teacher_label")
  temperature = (1.5, lambda step: 2.0 + step) if softens else None
  return Term(name, loss, weight, temperature, group=group)


def test_losses_of_every_kind_agree_with_the_whole_logits():
  # Some of each kind; the slow test below has them all.
  names = ("cross_entropy", "jsd", "nkd", "mine")
  goal = Objective(
    tuple(
      term(name, f"group {n % 2}", 1 + n / 4) for n, name in enumerate(names)
    )
  )
  batch = {**BATCH_OF, "labelled": np.float32(LABEL % 2)}
  close(gradients(goal, 4, batch=batch), gradients(goal, 0, batch=batch))


@pytest.mark.slow
@pytest.mark.parametrize("name", ROW_LOSSES)
def test_gradient_of_a_loss_agrees_with_the_whole_logits(name):
  goal = Objective((term(name, "one"),))
  close(gradients(goal, 4), gradients(goal, 0))


def test_a_group_has_its_own_gradient():
  goal = hinton(alpha=0.3, temperature=2.0)
  got = gradients(goal, 4, groups=["soft"])
  close(got, gradients(goal, 0, groups=["soft"]))
  assert np.abs(got[2].kernel).max() > 1e-3


def test_class_at_minus_infinity_leaves_both():
  theirs = teacher()
  logits = dense(theirs).at[..., 2].set(-jnp.inf)
  bias = jnp.float32(ARRAYS[2]).at[5].set(-jnp.inf)
  head = dataclasses.replace(student(), bias=bias, softcap=None)
  goal = hinton(alpha=0.0, temperature=2.0, soft=losses.jsd)
  found = [values(goal, head, logits, chunk=c) for c in (4, 0)]
  close(*found)
  assert np.isfinite(found[0][0]["soft"])


@pytest.mark.parametrize("size", [STUDENT_V - 2, STUDENT_V, STUDENT_V + 2])
def test_vocabularies_padded_differently(size):
  """Only the true vocabulary counts, whichever side says what it is."""
  kernel = np.zeros((size, 6))
  kernel[:TRUE] = THEIRS[1][:TRUE]
  kernel[TRUE:] = 9.0
  target = LinearLogits(single(THEIRS[0]), single(kernel), num_classes=TRUE)
  head = dataclasses.replace(student(), num_classes=None)
  goal = hinton(alpha=0.5, temperature=2.0)
  got, _ = values(goal, head, target)
  want, _ = values(goal, student(), teacher(), chunk=0)
  close(got, want)


@pytest.mark.parametrize("label", [-1, TRUE, STUDENT_V])
def test_a_label_that_is_no_class_gives_nan(label):
  """The padding, where the support is known beforehand, is no class."""
  head = LinearLogits(*map(single, ARRAYS[:2]), num_classes=TRUE)
  goal = Objective((Term("hard", losses.cross_entropy, group="hard"),))
  labels = LABEL.copy()
  labels[0, 1] = label
  (parts, _), (whole, _) = (
    values(goal, head, None, batch=BATCH_OF | {"label": labels}, chunk=chunk)
    for chunk in (4, 0)
  )
  assert np.isnan(parts["hard"])
  assert np.isnan(whole["hard"])


# A chunk of 3 is made one of 4, two tiles.
@pytest.mark.parametrize("chunk", [3, 4])
def test_masked_tokens_are_not_reached(chunk):
  def count(logits, _, rows, __):
    return {}, jnp.stack([jnp.float32(logits.shape[0]), rows["mask"].sum()])

  visited = lambda mask: fused.sum_rows(  # noqa: E731
    count, student(), None, {"mask": mask}, (), fused.Layout(chunk=chunk)
  )[1]
  np.testing.assert_array_equal(visited(MASK), [16, 13])
  np.testing.assert_array_equal(visited(0 * MASK), [0, 0])
  np.testing.assert_array_equal(visited(0 * MASK + 1), [24, 21])


def test_batch_without_a_token_that_counts():
  goal = hinton(alpha=0.5, temperature=2.0)
  batch = {**BATCH_OF, "mask": 0 * MASK}
  parts, _, gradient = gradients(goal, 4, batch=batch)
  assert all(value == 0 for value in parts.values())
  for x in jax.tree.leaves(gradient):
    np.testing.assert_array_equal(x, 0)


def equations(jaxpr):
  """All of them, those of inner programs too."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.tree.leaves(
      list(equation.params.values()),
      is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr),
    ):
      if isinstance(inner, jax.extend.core.ClosedJaxpr):
        yield from equations(inner.jaxpr)
      elif isinstance(inner, jax.extend.core.Jaxpr):
        yield from equations(inner)


def traced(gradient):
  tokens, size, width = 64, 96, 4
  spec = jax.ShapeDtypeStruct
  head = LinearLogits(
    spec((tokens, width), np.float32), spec((size, width), np.float32)
  )
  batch = {"mask": spec((tokens,), np.float32), "label": spec((tokens,), int)}

  def total(head, target, batch):
    goal = hinton(alpha=0.5, temperature=2.0)
    return sum(evaluated(goal, head, target, batch, 8)[0].values())

  f = jax.grad(total) if gradient else total
  return list(equations(jax.make_jaxpr(f)(head, head, batch).jaxpr))


def test_no_array_of_tokens_times_vocabulary():
  sizes = [v.aval.size for e in traced(True) for v in e.outvars]
  assert len(sizes) > 100
  assert max(sizes) <= 8 * 96


def test_loss_alone_makes_no_gradient():
  products = [e for e in traced(False) if e.primitive.name == "dot_general"]
  assert len(products) == 2


def test_bfloat16_adds_up_in_float32():
  """As exact as the products' own rounding, however many chunks there are."""
  random = np.random.default_rng(1)
  half = lambda *s: jnp.bfloat16(random.normal(size=s))  # noqa: E731
  head = LinearLogits(half(256, 8), half(12, 8))
  mask, label = np.ones(256), random.integers(0, 12, 256)
  goal = Objective((Term("hard", losses.cross_entropy),))

  def total(head):
    batch = {"mask": mask, "label": label}
    parts, _ = evaluated(goal, head, None, batch, 4)
    return 256 * sum(parts.values())

  got = jax.jit(jax.grad(total))(head)
  assert got.hidden.dtype == got.kernel.dtype == jnp.bfloat16
  h, w = np.float64(head.hidden), np.float64(head.kernel)
  dz = softmax(h @ w.T) - np.eye(12)[label]
  for found, want in ((got.hidden, dz @ w), (got.kernel, dz.T @ h)):
    error = np.linalg.norm(np.float64(found) - want) / np.linalg.norm(want)
    assert error < 3e-3


def test_evaluation_agrees_with_the_whole_logits():
  @jax.jit
  def both(student, teacher):
    whole = [dense(x)[..., :TRUE] for x in (student, teacher)]
    sums = functools.partial(evaluate.output_sums, each=True)
    want = sums(whole[0], LABEL, MASK, whole[1])
    layout = fused.Layout(chunk=4)
    return want, sums(student, LABEL, MASK, teacher, layout)

  (want, want_each), (got, each) = both(student(), teacher())
  close(want, got)
  assert set(each) == {"guess", "confidence", "nll", "teacher_guess", "kl"}
  close(want_each, each)


def test_what_is_refused():
  goal = Objective((Term("relations", losses.dist, 1.0, 2.0),))
  with pytest.raises(UserError, match=r"term 'relations' reads many examples"):
    evaluated(goal, student(), teacher())
  goal = hinton(alpha=0.5)
  with pytest.raises(UserError, match=r"mask has shape \(3,\), the student's"):
    evaluated(goal, student(), teacher(), {**BATCH_OF, "mask": MASK[:, 0]})
  theirs = dataclasses.replace(teacher(), hidden=jnp.zeros((3, 6, 6)))
  with pytest.raises(UserError, match=r"\(3, 7, 13\), the teacher's \(3, 6"):
    evaluated(goal, student(), theirs)
