"""Terms that own variables: equations, gradients, masks, state, training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kdjax
from kdjax import projectors, term_inputs, terms, totals
from kdjax.errors import UserError
from kdjax.losses import features
from kdjax.objective import each
from kdjax.terms.review import _nearest, fuse
from kdjax.types import Model, Output

B = 4
STAGES = ("stage_1", "stage_2", "pooled")
ONE = ("stage_1", "stage_1")
_random = np.random.default_rng(3)


def array(*shape):
  return np.float32(_random.standard_normal(shape))


def outputs(channels, odd=(5, 3), deep=(3, 2)):
  """The taps of a network, as `[B, ...]` arrays."""
  a, b, c = channels
  return Output(
    None,
    {
      "stage_1": array(B, *odd, a),
      "stage_2": array(B, *deep, b),
      "pooled": array(B, c),
    },
  )


# Odd, unequal channels where the term bridges them itself.
UNEQUAL = outputs((3, 7, 5)), outputs((6, 4, 9), (4, 4), (1, 3))
BRIDGED = outputs((3, 7, 5)), outputs((6, 4, 9))
EQUAL = outputs((5, 3, 4)), outputs((5, 3, 4))

CASES = {
  "factor": (terms.factor("t", ONE, weight=1.0, factor_ratio=0.4), UNEQUAL),
  "masked_generative": (
    terms.masked_generative("t", ONE, weight=1.0), BRIDGED
  ),
  "overhaul": (terms.overhaul("t", ONE, weight=1.0), EQUAL),
  "review": (terms.review("t", (STAGES, STAGES), weight=1.0), UNEQUAL),
  "simple": (terms.simple("t", ONE, weight=1.0), BRIDGED),
  "simple of vectors": (
    terms.simple("t", ("pooled", "pooled"), weight=1.0), BRIDGED
  ),
  "variational_information": (
    terms.variational_information("t", ONE, weight=1.0), EQUAL
  ),
}  # fmt: skip
# The mask of masked_generative is drawn for the whole batch, padding included.
DETERMINISTIC = sorted(set(CASES) - {"masked_generative"})
KEY = jax.random.key(0)


def spec(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def initial(term, pair, key=KEY):
  def init(key):
    return term_inputs.init_term(term, key, *spec(pair), {"mask": np.ones(B)})

  return jax.device_get(jax.jit(init)(key))


@functools.cache
def begun(name):
  return initial(*CASES[name])


@functools.cache
def compiled(name):
  """(params, state, pair, mask, key) -> value, gradients, new state."""
  term = CASES[name][0]

  def total(params, student, teacher, state, mask, key):
    batch = {"mask": mask}
    grouped, _, state = totals.other_terms(
      [term], student, teacher, batch, totals.denominators([term], batch),
      jnp.int32(0), {"t": params}, {"t": state}, key,
    )  # fmt: skip
    return grouped["extra"], state["t"]

  run = jax.jit(
    jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True, allow_int=True)
  )

  def call(params, state, pair, mask=None, key=KEY):
    mask = np.ones(len(pair[0].taps["pooled"])) if mask is None else mask
    found = run(params, *pair, state, mask, key)
    (value, state), gradients = jax.device_get(found)
    return value, gradients, state

  return call


def evaluated(name, pair=None, **kwargs):
  return compiled(name)(*begun(name), pair or CASES[name][1], **kwargs)


def read(term, pair, side):
  return [pair[side].taps[n] for n in each(term.taps[side])]


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_params_and_student_but_not_the_teacher(name):
  value, (params, student, teacher), _ = evaluated(name)
  assert np.isfinite(value)
  for path, x in jax.tree_util.tree_flatten_with_path(params)[0]:
    assert np.isfinite(x).all()
    assert np.any(x), path
  for x in read(CASES[name][0], (student,), 0):
    assert np.isfinite(x).all()
    assert np.any(x)
  for x in jax.tree.leaves(teacher):
    np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize("name", CASES)
def test_rows_that_do_not_exist_change_nothing(name):
  mask = np.array([1.0, 0.0, 1.0, 0.0])
  kept = mask > 0
  pair = CASES[name][1]

  def spoilt(x, garbage):
    x = x.copy()
    x[~kept] = garbage
    return x

  zeros = jax.tree.map(lambda x: spoilt(x, 0), pair)
  want = evaluated(name, zeros, mask=mask)
  for garbage in (np.nan, 1e4):
    padded = jax.tree.map(functools.partial(spoilt, garbage=garbage), pair)
    jax.tree.map(
      np.testing.assert_array_equal, evaluated(name, padded, mask=mask), want
    )
  if name in DETERMINISTIC:
    alone = evaluated(name, jax.tree.map(lambda x: x[kept], pair))
    close = functools.partial(
      # The sums of a batch norm are taken in another order.
      np.testing.assert_allclose, rtol=2e-4, atol=2e-5,
    )  # fmt: skip
    close(want[0], alone[0])
    jax.tree.map(close, want[1][0], alone[1][0])
    jax.tree.map(lambda a, b: close(a[kept], b), want[1][1], alone[1][1])
    jax.tree.map(close, want[2], alone[2])


@pytest.mark.parametrize("name", CASES)
def test_only_the_mask_depends_on_the_key(name):
  first, again = evaluated(name)[0], evaluated(name)[0]
  other = evaluated(name, key=jax.random.key(1))[0]
  assert first == again
  assert (first == other) == (name in DETERMINISTIC)


@pytest.mark.parametrize("name", CASES)
def test_initialisation_is_a_function_of_the_key(name):
  term, pair = CASES[name]
  first, again = initial(term, pair), initial(term, pair)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  other = initial(term, pair, jax.random.key(1))
  random = name not in ("overhaul", "variational_information")
  changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), first, other)
  assert any(jax.tree.leaves(changed)) == random


def test_coupled_terms_say_so():
  coupled = {name for name, (term, _) in CASES.items() if term.coupled}
  assert coupled == set(CASES) - {
    "masked_generative",
    "variational_information",
  }


def numpy_norm(x, epsilon=1e-5):
  axes = tuple(range(x.ndim - 1))
  return (x - x.mean(axes)) / np.sqrt(x.var(axes) + epsilon)


def numpy_conv(x, kernel):
  """3x3, padded by one zero on each side."""
  b, h, w, _ = x.shape
  x = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
  out = np.zeros((b, h, w, kernel.shape[-1]))
  for i in range(3):
    for j in range(3):
      out += x[:, i : i + h, j : j + w] @ np.float64(kernel[i, j])
  return out


def test_variational_information_is_its_equation():
  term, pair = CASES["variational_information"]
  (student,), (teacher,) = (read(term, pair, side) for side in (0, 1))
  value, (gradient, *_), _ = evaluated("variational_information")
  apart = np.float64(student - teacher) ** 2
  want = 0.5 * np.mean(apart / 5.0 + np.log(5.0))
  np.testing.assert_allclose(value, want, rtol=1e-5)
  # By the chain: d softplus(a)/da = sigmoid(a) = 1 − exp(−(5 − 1e-5)).
  slope = 0.5 * (1 / 5.0 - apart.mean((0, 1, 2)) / 25.0) / 5
  np.testing.assert_allclose(
    gradient["raw_variance"], slope * -np.expm1(-(5 - 1e-5)), rtol=1e-5
  )


@pytest.mark.parametrize("variance", [1e-3, 1.0, 1e4])
def test_variances_begin_where_they_are_told_to(variance):
  term = terms.variational_information(
    "t", ONE, weight=1.0, initial_variance=variance
  )
  params, _ = initial(term, EQUAL)
  got = jax.nn.softplus(params["raw_variance"]) + 1e-5
  np.testing.assert_allclose(got, variance, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_masked_generative_is_its_equation(ratio):
  taps = ("stage_2", "stage_2")
  term = terms.masked_generative("t", taps, weight=1.0, mask_ratio=ratio)
  (student,), (teacher,) = (read(term, BRIDGED, side) for side in (0, 1))
  params, state = initial(term, BRIDGED)
  loss = jax.jit(functools.partial(term.loss, mask_ratio=ratio))
  values, _ = loss(params, state, student, teacher, {}, KEY)
  hidden = numpy_conv((1 - ratio) * student, params["first"])
  made = numpy_conv(np.maximum(hidden, 0), params["last"])
  want = np.mean((made - teacher) ** 2, axis=(1, 2, 3))
  np.testing.assert_allclose(values, want, rtol=1e-5)


def test_mask_ratio_may_be_a_schedule():
  ratio = optax.linear_schedule(0.0, 1.0, 10)
  term = terms.masked_generative("t", ONE, weight=1.0, mask_ratio=ratio)
  batch = {"mask": np.ones(B)}
  params, state = initial(term, BRIDGED)

  @jax.jit
  def value(step):
    _, sums, _ = totals.other_terms(
      [term], *BRIDGED, batch, totals.denominators([term], batch), step,
      {"t": params}, {"t": state}, KEY,
    )  # fmt: skip
    return sums["t"][0] / B

  teacher = read(term, BRIDGED, 1)[0]
  np.testing.assert_allclose(value(10), np.mean(teacher**2), rtol=1e-5)
  assert value(0) != value(5) != value(10)


def test_margin_is_the_mean_of_all_negative_responses_so_far():
  term = CASES["overhaul"][0]
  params, state = initial(term, EQUAL)
  mask = np.array([1.0, 1.0, 0.0, 1.0])
  seen = []
  for step in range(3):
    pair = EQUAL[0], outputs((5, 3, 4))
    x = pair[1].taps["stage_1"]
    x[..., 0] = np.abs(x[..., 0])  # never negative
    if step == 0:
      x[..., 1] = np.abs(x[..., 1])  # not yet
    seen.append(x[mask > 0])
    value, _, state = compiled("overhaul")(params, state, pair, mask=mask)
    so_far = np.concatenate(seen).reshape(-1, 5).astype(np.float64)
    margin = np.array(
      [c[c < 0].mean() if (c < 0).any() else 0.0 for c in so_far.T]
    )
    np.testing.assert_allclose(state["margin"], margin, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(state["count"], np.sum(so_far < 0, axis=0))
    # The margin of this batch is in this batch's loss.
    student, teacher = pair[0].taps["stage_1"], np.maximum(x, margin)
    free = (student <= teacher) & (teacher <= 0)
    squares = np.where(free, 0, (student - teacher) ** 2).sum((1, 2, 3))
    np.testing.assert_allclose(value, squares[mask > 0].mean(), rtol=1e-5)


@pytest.mark.parametrize("name", ["simple", "simple of vectors"])
def test_simple_is_its_equation(name):
  term, pair = CASES[name]
  (student,), (teacher,) = (
    [np.float64(x) for x in read(term, pair, side)] for side in (0, 1)
  )
  params, _ = begun(name)
  projected = numpy_norm(student @ np.float64(params["kernel"]), 1e-4)
  apart = projected - numpy_norm(teacher, 1e-4)
  want = 2 * np.log(np.sum(np.abs(apart) ** 4))
  np.testing.assert_allclose(evaluated(name)[0], want, rtol=1e-5)


def numpy_layers(layers, x):
  for layer in layers:
    x = numpy_conv(x, np.asarray(layer["kernel"]))
    x = numpy_norm(x) if "scale" in layer else x
    x = np.maximum(x, 0.1 * x)  # scales are 1, biases 0
  return x


def test_factor_is_its_equation():
  taps = ("stage_2", "stage_2")
  term = terms.factor(
    "t", taps, weight=1.0, factor_ratio=0.5, reconstruction_weight=0.3
  )
  (student,), (teacher,) = (read(term, BRIDGED, side) for side in (0, 1))
  params, state = initial(term, BRIDGED)
  loss = jax.jit(functools.partial(term.loss, **term.hparams))
  values, _ = loss(params, state, student, teacher, {"mask": np.ones(B)}, KEY)
  theirs = numpy_layers(params["paraphraser"], teacher)
  ours = numpy_layers(params["translator"], student)
  assert theirs.shape == ours.shape == (B, 3, 2, 2)
  again = numpy_layers(params["inverse"], theirs)
  attention = [
    np.mean(x**2, -1).reshape(B, -1) / np.linalg.norm(
      np.mean(x**2, -1).reshape(B, -1), axis=1, keepdims=True
    )
    for x in (ours, theirs)
  ]  # fmt: skip
  want = np.abs(attention[0] - attention[1]).mean(1)
  want += 0.3 * np.mean((again - teacher) ** 2, axis=(1, 2, 3))
  np.testing.assert_allclose(values, want, rtol=1e-4)  # six convolutions deep


def test_the_two_halves_of_factor_keep_their_gradients_apart():
  term = CASES["factor"][0]
  params, state = begun("factor")
  student, teacher = (read(term, UNEQUAL, side)[0] for side in (0, 1))

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def gradient(params, student, share):
    values, _ = term.loss(
      params, state, student, teacher, {"mask": np.ones(B)}, KEY,
      power_in=2, power_out=1, reconstruction_weight=share,
    )  # fmt: skip
    return values.sum()

  without, to_student = gradient(params, student, 0.0)
  with_it, to_student_again = gradient(params, student, 1.0)
  for half in ("paraphraser", "inverse"):
    assert all(np.any(x) for x in jax.tree.leaves(with_it[half]))
    assert not any(np.any(x) for x in jax.tree.leaves(without[half]))
  jax.tree.map(
    np.testing.assert_array_equal,
    (without["translator"], to_student),
    (with_it["translator"], to_student_again),
  )


def test_review_goes_from_the_deepest_stage_up():
  term, pair = CASES["review"]
  params, _ = begun("review")
  student, teacher = (read(term, pair, side) for side in (0, 1))
  where = jnp.ones(B, bool)

  @jax.jit
  def total(params, student, teacher):
    want, below = 0.0, None
    for n in (2, 1, 0):
      size = (1, 1) if n == 2 else teacher[n].shape[1:3]
      x = student[n]
      x = x if n < 2 else x[:, None, None]
      assert ("attention" in params[f"stage_{n}"]) == (n < 2)
      fused, below = fuse(params[f"stage_{n}"], x, below, size, where)
      want += features.review(fused, teacher[n].reshape(fused.shape)).mean()
    return want

  want = total(params, student, teacher)
  np.testing.assert_allclose(evaluated("review")[0], want, rtol=1e-5)


def test_nearest_takes_pytorchs_rows():
  x = array(2, 3, 5, 2)
  got = _nearest(jnp.asarray(x), (7, 2))
  for i in range(7):
    for j in range(2):
      np.testing.assert_array_equal(got[:, i, j], x[:, i * 3 // 7, j * 5 // 2])


def test_fusion_is_as_wide_as_the_deepest_tap_at_most():
  for asked, got in ((512, 5), (2, 2)):
    term = terms.review("t", (STAGES, STAGES), weight=1.0, mid_channels=asked)
    params, _ = initial(term, UNEQUAL)
    assert params["stage_0"]["conv1"].shape == (3, got)
    assert params["stage_0"]["conv2"].shape == (3, 3, got, 6)


def small_network(widths):
  """A convolutional network on images [B, 6, 6, 3], as a pair of functions."""
  first, last = widths

  def init(key, batch):
    a, b = jax.random.split(key)
    return {
      "first": 0.3 * jax.random.normal(a, (3, 3, 3, first)),
      "last": 0.3 * jax.random.normal(b, (3, 3, first, last)),
    }, {}

  def apply(params, stats, batch, *, train, key=None, taps=()):
    x = projectors.convolve(batch["image"], params["first"])
    deep = projectors.convolve(jax.nn.relu(x), params["last"])[:, ::2, ::2]
    known = {"stage_1": x, "stage_2": deep, "pooled": deep.mean((1, 2))}
    logits = known["pooled"][:, :2]
    return Output(logits, {t: known[t] for t in taps}), stats

  return Model(init, apply)


def built(name):
  taps = (STAGES, STAGES) if name == "review" else ONE
  rate = {"factor": 1e-2}.get(name, 3e-2)
  return terms.TERMS[name](name, taps, weight=1.0), rate


@pytest.mark.parametrize("name", sorted({n.split()[0] for n in CASES}))
def test_training_lowers_the_loss(name):
  term, rate = built(name)
  equal = name in ("overhaul", "variational_information")
  if name == "variational_information":
    term = projectors.project(term, projectors.linear())
  student, teacher = (
    small_network((4, 5)),
    small_network((4 if equal else 6, 7)),
  )
  batch = {
    "image": array(8, 6, 6, 3),
    "label": np.zeros(8, np.int32),
    "mask": np.array([1.0] * 7 + [0.0]),
  }
  frozen = jax.jit(teacher.init)(jax.random.key(7), batch)
  optimizer = optax.adam(rate)
  init = functools.partial(
    kdjax.init_state, student, teacher, [term], optimizer
  )
  state = jax.jit(init)(KEY, batch, frozen=frozen)
  step = jax.jit(kdjax.make_train_step(student, teacher, [term], optimizer))
  losses = []
  for _ in range(12):
    state, metrics = step(state, frozen, batch)
    losses.append(float(metrics[f"loss/{name}"]))
  assert np.isfinite(losses).all()
  assert np.mean(losses[-3:]) < np.mean(losses[:3])
  if name == "overhaul":
    assert (state.term_state[name]["count"] > 0).all()


@pytest.mark.parametrize(
  ("build", "message"),
  [
    (
      lambda: terms.variational_information(
        "v", ONE, weight=1.0, initial_variance=0.0
      ),
      "'v' got initial_variance=0.0",
    ),
    (
      lambda: terms.factor("f", ONE, weight=1.0, factor_ratio=0.0),
      "'f' got factor_ratio=0.0",
    ),
    (
      lambda: terms.review("r", (STAGES, STAGES[:2]), weight=1.0),
      "'r' got 3 student and 2 teacher taps",
    ),
    (
      lambda: initial(
        terms.masked_generative("m", ("pooled", "pooled"), weight=1.0), EQUAL
      ),
      r"needs a map \[B, H, W, C\]",
    ),
    (
      lambda: initial(
        terms.factor("f", ("stage_1", "pooled"), weight=1.0), EQUAL
      ),
      r"needs a map \[B, H, W, C\]",
    ),
  ],
)
def test_mistakes_are_refused_in_one_line(build, message):
  with pytest.raises(UserError, match=message) as error:
    build()
  assert "\n" not in str(error.value)


def test_every_term_is_listed_under_its_own_name():
  for name, build in terms.TERMS.items():
    assert getattr(terms, name) is build
    assert name in terms.__all__
