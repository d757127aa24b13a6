"""total = alpha·hard + (1 − alpha)·T²·soft: masks, means and schedules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import softmax

from kdjax import losses, objective, totals
from kdjax.errors import UserError
from kdjax.objective import Objective, Term, hinton
from kdjax.types import Output

RNG = np.random.default_rng(0)
S, T = RNG.normal(size=(2, 6, 5)) * 2
LABEL = RNG.integers(0, 5, 6)


def kl(s, t, temperature):
  p, q = softmax(t / temperature), softmax(s / temperature)
  return np.sum(p * np.log(p / q), -1)


def cross_entropy(s, label):
  return -np.log(softmax(s))[np.arange(len(label)), label]


def evaluated(goal, batch=None, step=0, student=S, teacher=T):
  batch = {"label": LABEL, "mask": np.ones(6)} | (batch or {})

  @jax.jit
  def run(student, teacher, batch, step):
    divide_by = totals.denominators(goal.terms, batch)
    parts, sums = totals.logit_terms(
      goal.terms, student, teacher, batch, divide_by, step
    )
    return sum(parts.values()), totals.metrics(goal, sums, step)

  return run(jnp.float32(student), jnp.float32(teacher), batch, step)


@pytest.mark.parametrize("t", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_total_is_the_equation(t, alpha):
  total, metrics = evaluated(hinton(alpha=alpha, temperature=t))
  hard, soft = cross_entropy(S, LABEL).mean(), t**2 * kl(S, T, t).mean()
  np.testing.assert_allclose(
    total, alpha * hard + (1 - alpha) * soft, rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(metrics["loss/hard"], hard, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss/soft"], soft, rtol=1e-5)
  np.testing.assert_allclose(
    metrics["kl_at_1"], kl(S, T, 1.0).mean(), rtol=1e-5
  )


def test_gradient_is_the_equations():
  def total(s):
    return evaluated(hinton(alpha=0.3, temperature=4.0), student=s)[0]

  onehot = np.eye(5)[LABEL]
  want = 0.3 * (softmax(S) - onehot)
  want += 0.7 * 16 * (softmax(S / 4) - softmax(T / 4)) / 4
  np.testing.assert_allclose(
    jax.jit(jax.grad(total))(jnp.float32(S)), want / 6, rtol=1e-5, atol=1e-6
  )


def test_two_weights_stand_in_for_alpha():
  total, _ = evaluated(
    hinton(hard_weight=1.0, soft_weight=0.8, temperature=2.0)
  )
  want = cross_entropy(S, LABEL).mean() + 0.8 * 4 * kl(S, T, 2.0).mean()
  np.testing.assert_allclose(total, want, rtol=1e-5)
  for wrong in (
    dict(),
    dict(alpha=0.1, soft_weight=1.0),
    dict(hard_weight=1.0),
  ):
    with pytest.raises(UserError, match="give alpha alone, or both weights"):
      hinton(**wrong)


def test_masked_examples_weigh_nothing_even_when_they_are_nan():
  mask = np.array([1, 1, 0, 1, 0, 1.0])
  keep = mask > 0
  student, teacher = S.copy(), T.copy()
  student[2], teacher[4] = np.nan, np.nan
  label = np.where(keep, LABEL, -7)
  goal = hinton(alpha=0.5, temperature=2.0)

  def total(s):
    return evaluated(goal, {"mask": mask, "label": label}, 0, s, teacher)[0]

  want = 0.5 * cross_entropy(S, LABEL)[keep].mean()
  want += 0.5 * 4 * kl(S, T, 2.0)[keep].mean()
  value, gradient = jax.jit(jax.value_and_grad(total))(jnp.float32(student))
  np.testing.assert_allclose(value, want, rtol=1e-5)
  np.testing.assert_array_equal(gradient[~keep], 0)
  assert np.isfinite(gradient).all()


def test_labels_count_where_they_may_be_used_and_the_teacher_everywhere():
  labelled = np.array([1, 0, 0, 0, 1, 0.0])
  label = np.where(labelled > 0, LABEL, 99)
  total, metrics = evaluated(
    hinton(alpha=0.5, temperature=1.0), {"labelled": labelled, "label": label}
  )
  hard = cross_entropy(S, LABEL)[labelled > 0].mean()
  np.testing.assert_allclose(metrics["loss/hard"], hard, rtol=1e-5)
  np.testing.assert_allclose(
    total, 0.5 * hard + 0.5 * kl(S, T, 1.0).mean(), rtol=1e-5
  )


def test_a_batch_without_any_label_has_no_hard_loss():
  total, metrics = evaluated(
    hinton(alpha=0.5, temperature=1.0), {"labelled": np.zeros(6)}
  )
  assert metrics["loss/hard"] == 0
  np.testing.assert_allclose(total, 0.5 * kl(S, T, 1.0).mean(), rtol=1e-5)


def test_schedules_move_with_the_update_count_and_are_logged():
  alpha = optax.linear_schedule(1.0, 0.0, 10)
  temperature = optax.linear_schedule(8.0, 2.0, 10)
  goal = hinton(alpha=alpha, temperature=temperature)
  for step in (0, 5, 10):
    total, metrics = evaluated(goal, step=step)
    a, t = alpha(step), temperature(step)
    want = a * cross_entropy(S, LABEL).mean()
    want += (1 - a) * t**2 * kl(S, T, t).mean()
    np.testing.assert_allclose(total, want, rtol=1e-5)
    for name, value in {
      "alpha": a,
      "temperature": t,
      "weight/hard": a,
      "weight/soft": 1 - a,
    }.items():
      np.testing.assert_allclose(metrics[name], value, rtol=1e-6, atol=1e-7)


def test_several_temperatures_average_terms_each_after_its_own_scale():
  total, _ = evaluated(hinton(alpha=0.0, temperature=(2.0, 4.0)))
  want = np.mean([t**2 * kl(S, T, t).mean() for t in (2.0, 4.0)])
  np.testing.assert_allclose(total, want, rtol=1e-5)


@pytest.mark.parametrize(
  ("loss", "power"),
  [(losses.kl, 2), (losses.total_variation, 1), (losses.ttm, 0)],
)
def test_each_loss_is_scaled_by_its_own_power_of_t(loss, power):
  def value(**kwargs):
    return evaluated(Objective((Term("t", loss, temperature=3.0, **kwargs),)))[
      0
    ]

  plain = float(jnp.mean(loss(jnp.float32(S), jnp.float32(T), temperature=3.0)))
  np.testing.assert_allclose(value(), 3.0**power * plain, rtol=1e-5)
  np.testing.assert_allclose(
    value(scale_by_temperature=False), plain, rtol=1e-5
  )


def test_nkd_becomes_two_terms_with_their_own_powers():
  goal = hinton(
    hard_weight=1.0,
    soft_weight=1.0,
    temperature=3.0,
    soft=losses.nkd,
    soft_hparams=dict(gamma=2.0),
  )
  s, t, y = jnp.float32(S), jnp.float32(T), jnp.asarray(LABEL)
  want = losses.cross_entropy(s, y) + losses.nkd_target(s, t, y)
  want += 2.0 * 9 * losses.nkd_nontarget(s, t, y, temperature=3.0)
  np.testing.assert_allclose(evaluated(goal)[0], want.mean(), rtol=1e-5)


def test_a_transformed_nkd_is_refused_as_one_term():
  with pytest.raises(UserError, match="two powers of T"):
    hinton(alpha=0.1, soft=losses.zscore(losses.nkd))


def test_further_terms_are_added_by_their_weight_alone():
  extra = Term("tv", losses.total_variation, 0.5, temperature=1.0)
  goal = hinton(alpha=0.1, temperature=2.0) + [extra]
  p, q = softmax(T), softmax(S)
  want = evaluated(hinton(alpha=0.1, temperature=2.0))[0]
  want += 0.5 * 0.5 * np.abs(p - q).sum(-1).mean()
  np.testing.assert_allclose(evaluated(goal)[0], want, rtol=1e-5)


def test_scheduled_hyperparameters_reach_the_loss():
  mix = optax.linear_schedule(0.2, 0.8, 10)
  goal = Objective(
    (Term("jsd", losses.jsd, temperature=2.0, hparams=dict(mix=mix)),)
  )
  want = losses.jsd(jnp.float32(S), jnp.float32(T), temperature=2.0, mix=0.5)
  np.testing.assert_allclose(
    evaluated(goal, step=5)[0], 4 * want.mean(), rtol=1e-5
  )


def test_coupled_losses_see_no_masked_row():
  goal = Objective((Term("dist", losses.dist, temperature=1.0),))
  mask = np.array([1, 1, 0, 1, 0, 1.0])
  with_rows = evaluated(goal, {"mask": mask})[0]
  kept = mask > 0
  batch = {"label": LABEL[kept], "mask": np.ones(4)}
  alone = evaluated(goal, batch, student=S[kept], teacher=T[kept])[0]
  np.testing.assert_allclose(with_rows, alone, rtol=1e-5)


@pytest.mark.parametrize(
  ("goal", "says"),
  [
    (hinton(alpha=0.1, temperature=0.0), "temperature of 'soft' is 0"),
    (hinton(alpha=1.5, temperature=1.0), r"alpha is 1.5 .* \[0, 1\]"),
    (
      hinton(alpha=optax.linear_schedule(0.5, -0.5, 10), temperature=1.0),
      "alpha is -0.1 at update 6",
    ),
    (
      hinton(alpha=0.1, temperature=optax.linear_schedule(4.0, -4.0, 8)),
      "temperature of 'soft' is 0 at update 4",
    ),
    (
      hinton(hard_weight=-1.0, soft_weight=1.0, temperature=1.0),
      "weight of 'hard' is -1",
    ),
    (
      hinton(alpha=0.1, temperature=1.0) + [Term("soft", losses.kl)],
      "two terms are named 'soft'",
    ),
  ],
)
def test_what_no_step_should_begin_with_is_refused(goal, says):
  with pytest.raises(UserError, match=says):
    objective.check(goal, 10, has_teacher=True)


def test_a_term_that_needs_a_teacher_is_refused_without_one():
  with pytest.raises(UserError, match="'soft' compares with a teacher"):
    objective.check(hinton(alpha=0.1), 10, has_teacher=False)


LOGITS = ("logits", "logits")
OURS, THEIRS = RNG.normal(size=(2, 6, 4))


def on_taps(terms, mask=None, student=OURS, logits=S):
  """Shares of the total and sums of terms that read taps, with no variables."""
  batch = {"mask": np.ones(6) if mask is None else mask, "label": LABEL}
  other = [t for t in terms if not t.reads_logits]
  none = {t.name: {} for t in other}
  step, key = np.int32(0), jax.random.key(0)

  @jax.jit
  def run(student, teacher, batch):
    divide_by = totals.denominators(terms, batch)
    shares, sums, _ = totals.other_terms(
      other, student, teacher, batch, divide_by, step, none, none, key
    )
    return sum(shares.values()), totals.metrics(
      Objective(tuple(other)), sums, step
    )

  return run(
    Output(jnp.float32(logits), {"hidden": jnp.float32(student)}),
    Output(jnp.float32(T), {"hidden": jnp.float32(THEIRS)}),
    batch,
  )


@pytest.mark.parametrize("temperature", [3.0, (1.0, 4.0)])
@pytest.mark.parametrize(
  "loss", [losses.kl, losses.total_variation, losses.dkd, losses.dist]
)
def test_a_logit_loss_on_the_taps_named_logits_is_the_plain_term(
  loss, temperature
):
  plain = Term("t", loss, 0.5, temperature=temperature)
  mask = np.array([1, 1, 0, 1, 0, 1.0])
  named = dataclasses.replace(plain, taps=LOGITS)
  assert not named.reads_logits
  assert Objective((named,)).taps(0) == ()
  total, metrics = on_taps([named], mask)
  want, wanted = evaluated(Objective((plain,)), {"mask": mask})
  np.testing.assert_allclose(total, want, rtol=1e-6)
  np.testing.assert_allclose(metrics["loss/t"], wanted["loss/t"], rtol=1e-6)


def test_a_distillation_head_has_its_power_of_t():
  term = Term("head", losses.kl, temperature=3.0, taps=("hidden", "hidden"))
  want = 9 * kl(OURS, THEIRS, 3.0).mean()
  np.testing.assert_allclose(on_taps([term])[0], want, rtol=1e-5)
  mixed = dataclasses.replace(
    term, taps=("hidden", "logits"), scale_by_temperature=False
  )
  wide = np.concatenate([OURS, OURS[:, :1]], 1)
  want = kl(wide, T, 3.0).mean()
  got = on_taps([mixed], student=wide)[0]
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_several_taps_come_as_a_tuple_in_their_order():
  def gap(student, teacher):
    (a, b), (x, y) = student, teacher
    return jnp.sum((a[:, :4] - x) ** 2, -1) + 2 * jnp.sum((b - y) ** 2, -1)

  term = Term("gap", gap, taps=(("logits", "hidden"), ("hidden", "hidden")))
  assert Objective((term,)).taps(0) == Objective((term,)).taps(1) == ("hidden",)
  want = ((S[:, :4] - THEIRS) ** 2).sum(-1) + 2 * ((OURS - THEIRS) ** 2).sum(-1)
  np.testing.assert_allclose(on_taps([term])[0], want.mean(), rtol=1e-5)


def test_taps_are_asked_for_once_each_and_logits_never():
  terms = (
    Term("a", losses.hint, taps=("one", "logits")),
    Term("b", losses.hint, taps=(("two", "logits", "one"), ("x", "y", "x"))),
    Term("c", losses.kl),
  )
  assert Objective(terms).taps(0) == ("one", "two")
  assert Objective(terms).taps(1) == ("x", "y")


def square(params, state, student, teacher, batch, key):
  return jnp.sum(student**2, -1) / jnp.sum(student**2 + teacher**2, -1), state


@pytest.mark.parametrize("owns", [False, True])
def test_a_masked_row_of_taps_weighs_nothing_even_when_it_is_nan(owns):
  term = Term("h", losses.hint, taps=("hidden", "hidden"))
  if owns:
    term = dataclasses.replace(term, loss=square, init=lambda *_: ({}, {}))
  mask = np.array([1, 1, 0, 1, 0, 1.0])
  keep = mask > 0
  student = OURS.copy()
  student[~keep] = np.nan

  def total(student):
    return on_taps([term], mask, student)[0]

  value, gradient = jax.jit(jax.value_and_grad(total))(jnp.float32(student))
  if owns:
    want = (OURS**2).sum(-1) / (OURS**2 + THEIRS**2).sum(-1)
  else:
    want = ((OURS - THEIRS) ** 2).mean(-1)
  np.testing.assert_allclose(value, want[keep].mean(), rtol=1e-5)
  np.testing.assert_array_equal(gradient[~keep], 0)
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
  "loss",
  [
    lambda s, t: jnp.mean((s - t) ** 2),
    lambda s, t: (s - t) ** 2,
    lambda s, t: jnp.mean((s - t) ** 2, -1, keepdims=True),
  ],
)
def test_a_loss_that_is_not_one_number_an_example_is_named(loss):
  with pytest.raises(UserError, match=r"term 'mine' has shape .* one number"):
    on_taps([Term("mine", loss, taps=("hidden", "hidden"))])
