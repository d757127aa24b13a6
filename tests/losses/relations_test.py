"""Each relation loss against its own equation, and what all of them promise.

An equation is the batch-wide loss: a function of two float64 arrays to one
number, which the mean over the rows must be.
"""

import functools
import itertools
import json
import math
import pathlib

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import parallel
from kdjax.losses import (
  contrastive,
  information,
  maps,
  pairwise,
  relations,
  traits,
)
from kdjax.types import UserError

from . import oracle

_random = np.random.default_rng(7)
# Rounded to float32, so that both sides see the same numbers.
STUDENT, TEACHER, WIDE, OTHERS = (
  np.float64(np.float32(_random.standard_normal(shape)))
  for shape in ((8, 5), (8, 5), (8, 9), (8, 5))
)
PATH = pathlib.Path(__file__).parents[1] / "data" / "relation_losses.json"


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def smooth_l1(x):
  return np.where(np.abs(x) < 1, x**2 / 2, np.abs(x) - 0.5)


def similarity_preserving(s, t):
  return np.sum((unit(s @ s.T) - unit(t @ t.T)) ** 2) / len(s) ** 2


def probabilistic(s, t):
  def affinity(x):
    k = (unit(x) @ unit(x).T + 1) / 2
    return k / k.sum(1, keepdims=True)

  q, p = affinity(s), affinity(t)
  return np.mean(p * np.log((p + 1e-7) / (q + 1e-7)))


def relational_distance(s, t):
  def distances(x):
    d = np.linalg.norm(x[:, None] - x[None], axis=-1)
    return d / d[d > 0].mean()

  return np.mean(smooth_l1(distances(s) - distances(t)))


def relational_angle(s, t):
  def cosines(x):
    found = np.zeros((len(x),) * 3)
    for i, j, k in itertools.product(range(len(x)), repeat=3):
      if i not in (j, k):
        found[i, j, k] = unit(x[j] - x[i]) @ unit(x[k] - x[i])
    return found

  return np.mean(smooth_l1(cosines(s) - cosines(t)))


def neighbours(s, t):
  error = np.abs(s - t)
  return np.mean(np.sum(error[:-1] * error[1:], 1))


def gaussian(s, t, gamma=0.4, order=2):
  def kernel(x):
    cosine = unit(x) @ unit(x).T
    return math.exp(-2 * gamma) * sum(
      (2 * gamma) ** p / math.factorial(p) * cosine**p for p in range(order + 1)
    )

  return np.sum((kernel(s) - kernel(t)) ** 2) / len(s) ** 2


def correlation(s, t, alpha=1.5):
  def standard(x):
    return (x - x.mean(0)) / x.std(0, ddof=1)

  c = np.sum(standard(s) * standard(t), 0) / len(s)
  return np.log2(np.sum(np.abs(c - 1) ** (2 * alpha)))


def mutual(s, t):
  g_s = unit(s) @ unit(s).T
  g_st = g_s * (unit(t) @ unit(t).T)
  g_s, g_st = g_s / np.trace(g_s), g_st / np.trace(g_st)
  return np.sum(g_s**2 - g_st**2)


def info_nce(s, t, temperature=0.07):
  scores = unit(s) @ unit(t).T
  of_s = oracle.log_softmax(scores, temperature)
  of_t = oracle.log_softmax(scores.T, temperature)
  return -np.mean(np.diag(of_s) + np.diag(of_t)) / 2


congruence = functools.partial(
  relations.correlation_congruence, kernel="gaussian"
)
# name: (loss, equation, whether both sides must have one size)
LOSSES = {
  "similarity_preserving": (
    relations.similarity_preserving, similarity_preserving, False
  ),
  "probabilistic": (relations.probabilistic, probabilistic, False),
  "relational_distance": (
    relations.relational_distance, relational_distance, False
  ),
  "relational_angle": (relations.relational_angle, relational_angle, False),
  "correlation_congruence": (
    relations.correlation_congruence, neighbours, True
  ),
  "gaussian": (congruence, gaussian, False),
  "correlation": (information.correlation, correlation, True),
  "mutual": (information.mutual, mutual, False),
  "info_nce": (contrastive.info_nce, info_nce, True),
}  # fmt: skip
every_loss = pytest.mark.parametrize("name", LOSSES)
ABSOLUTE = 1e-6


@functools.cache
def compiled(loss, **static):
  """Jitted -> (rows, student's and teacher's gradient of the mean)."""

  def mean(student, teacher, where, hparams):
    rows = loss(student, teacher, where=where, **hparams, **static)
    assert rows.dtype == jnp.float32
    n = len(rows) if where is None else jnp.sum(where)
    return jnp.sum(rows) / n, rows

  run = jax.jit(jax.grad(mean, argnums=(0, 1), has_aux=True))

  def call(student, teacher, where=None, **hparams):
    both = [
      np.float32(x) if x.dtype == np.float64 else x for x in (student, teacher)
    ]
    gradients, rows = run(*both, where, hparams)
    return np.asarray(rows), *(np.asarray(g) for g in gradients)

  return call


def teacher_of(name):
  return TEACHER if LOSSES[name][2] else WIDE


def agree(name, student, teacher, **hparams):
  loss, equation, _ = LOSSES[name]
  rows, gradient, _ = compiled(loss)(student, teacher, **hparams)
  oracle.close(rows.mean(), equation(student, teacher, **hparams), what=name)
  want = oracle.slope(lambda x: equation(x, teacher, **hparams), student)
  oracle.close(gradient, want, what=f"gradient of {name}")


@every_loss
def test_mean_over_rows_and_its_gradient_are_the_equations(name):
  agree(name, STUDENT, teacher_of(name))
  agree(name, 3 * OTHERS + 1, teacher_of(name) - 2)


@pytest.mark.parametrize(
  ("name", "hparams"),
  [
    ("correlation", {"alpha": 1.01}),
    ("info_nce", {"temperature": 0.5}),
    ("gaussian", {"gamma": 1.5}),
  ],
)
def test_hyperparameters_may_be_traced(name, hparams):
  agree(name, STUDENT, teacher_of(name), **hparams)


@pytest.mark.parametrize("order", [0, 1, 5])
def test_order_of_the_expansion(order):
  rows, _, _ = compiled(congruence, order=order)(STUDENT, WIDE)
  oracle.close(rows.mean(), gaussian(STUDENT, WIDE, order=order))


def test_reference_values():
  data = json.loads(PATH.read_text())
  sources = {
    "mdistiller.sp": relations.similarity_preserving,
    "mdistiller.pkt": relations.probabilistic,
    "mdistiller.rkd_distance_only": relations.relational_distance,
    "mdistiller.rkd_angle_only": relations.relational_angle,
    "repdistiller.cc": relations.correlation_congruence,
    "torchdistill.ickd_chsim": None,  # per example, below
    "itrd_correlation_a1.5": information.correlation,
    "itrd_mutual": information.mutual,
    "crd.repdistiller_call1": None,  # in contrastive_test
  }
  assert {case["name"] for case in data["cases"]} == set(sources)
  for case in data["cases"]:
    loss = sources[case["name"]]
    if loss is None:
      continue
    given = data["inputs"][case["inputs"]]
    s, t, want = (
      channels_last(x)
      for x in (given["f_s"], given["f_t"], case["expected_grad"]["f_s"])
    )
    rows, gradient, _ = compiled(loss)(s, t)
    oracle.close(rows.mean(), case["expected"], what=case["name"])
    oracle.close(gradient, want, what=case["name"])


def channels_last(x):
  x = np.array(x)
  return np.moveaxis(x, 1, -1) if x.ndim == 4 else x


@pytest.mark.parametrize(
  "name",
  [n for n in LOSSES if n != "correlation_congruence"],  # of neighbours
)
def test_order_of_the_batch_only_orders_the_rows(name):
  loss, teacher = LOSSES[name][0], teacher_of(name)
  order = np.array([3, 1, 4, 0, 6, 5, 2, 7])
  rows, gradient, _ = compiled(loss)(STUDENT, teacher)
  again, moved, _ = compiled(loss)(STUDENT[order], teacher[order])
  oracle.close(again, rows[order])
  oracle.close(moved, gradient[order])


@every_loss
def test_rows_that_do_not_exist_move_nothing(name):
  loss, teacher = LOSSES[name][0], teacher_of(name)
  exists = np.array([0, 1, 0, 1, 1, 0, 1, 0], np.float32)
  kept = exists > 0
  alone, slope, _ = compiled(loss)(STUDENT[kept], teacher[kept])
  for garbage in (np.nan, np.inf, 1e4):
    padded = STUDENT.copy(), teacher.copy()
    for side in padded:
      side[~kept] = garbage
    rows, gradient, of_teacher = compiled(loss)(*padded, exists)
    oracle.close(rows[kept], alone)
    oracle.close(gradient[kept], slope)
    np.testing.assert_array_equal(rows[~kept], 0)
    np.testing.assert_array_equal(gradient[~kept], 0)
    np.testing.assert_array_equal(of_teacher, 0)


@every_loss
def test_groups_are_batches_of_their_own(name):
  loss, teacher = LOSSES[name][0], teacher_of(name)
  parts = [
    compiled(loss)(STUDENT[i : i + 4], teacher[i : i + 4]) for i in (0, 4)
  ]
  rows, gradient, _ = compiled(loss, group_size=4)(STUDENT, teacher)
  oracle.close(rows, np.concatenate([p[0] for p in parts]))
  oracle.close(gradient, np.concatenate([p[1] for p in parts]) / 2)


@every_loss
def test_a_sharded_batch_is_the_global_one(name):
  loss, teacher = LOSSES[name][0], teacher_of(name)
  want = compiled(loss)(STUDENT, teacher)
  split = parallel.batch_sharding(parallel.make_mesh())
  given = [jax.device_put(jnp.float32(x), split) for x in (STUDENT, teacher)]
  assert len(given[0].sharding.device_set) == 8
  got = compiled(loss)(*given)
  oracle.close(got[0], want[0])
  oracle.close(got[1], want[1])


@every_loss
def test_half_precision_is_widened_and_maps_are_flattened(name):
  loss, teacher = LOSSES[name][0], teacher_of(name)
  narrow = [jnp.bfloat16(x) for x in (STUDENT, teacher)]
  rows, gradient, of_teacher = compiled(loss)(*narrow)
  want = compiled(loss)(*(jnp.float32(x) for x in narrow))
  np.testing.assert_array_equal(rows, want[0])
  assert gradient.dtype == jnp.bfloat16
  np.testing.assert_array_equal(of_teacher.astype(np.float32), 0)
  maps = [x.reshape(8, 1, 1, -1) for x in (STUDENT, teacher)]
  rows, _, _ = compiled(loss)(*maps)
  oracle.close(rows, compiled(loss)(STUDENT, teacher)[0])


def degenerate():
  """{what: (student, teacher)}, of one size."""
  zeros, ones = np.zeros_like(STUDENT), np.ones_like(STUDENT)
  dead, twins, opposite = STUDENT.copy(), STUDENT.copy(), STUDENT.copy()
  dead[:, 1:] = 0
  dead[3] = 0
  twins[1] = twins[0]
  twins[2] = twins[0] * (1 + 1e-6)
  opposite[4:] = -opposite[:4]
  return {
    "zero": (zeros, TEACHER),
    "zero teacher": (STUDENT, zeros),
    "both zero": (zeros, zeros),
    "constant": (ones, TEACHER),
    "constant teacher": (STUDENT, 0.1 * ones),
    "dead": (dead, TEACHER),
    "dead teacher": (STUDENT, dead),
    "twins": (twins, TEACHER),
    "opposite": (opposite, TEACHER),
    "equal": (STUDENT, STUDENT),
    "tiny": (1e-15 * STUDENT, TEACHER),
    "large": (1e4 * STUDENT, 1e4 * TEACHER),
  }


@pytest.mark.parametrize("what", degenerate())
@every_loss
def test_degenerate_rows_send_a_finite_gradient(name, what):
  rows, gradient, _ = compiled(LOSSES[name][0])(*degenerate()[what])
  assert np.isfinite(rows).all()
  assert np.isfinite(gradient).all()
  if what == "zero":
    # At worst that of a cosine, whose slope grows as 1 / length.
    assert np.abs(gradient).max() < 10


@every_loss
def test_one_example_alone_is_finite(name):
  loss = LOSSES[name][0]
  one = np.arange(8) == 5
  for rows, gradient, _ in (
    compiled(loss)(STUDENT[:1], TEACHER[:1]),
    compiled(loss)(STUDENT, TEACHER, one),
    compiled(loss, group_size=1)(STUDENT, TEACHER),
    compiled(loss)(STUDENT, TEACHER, np.zeros(8)),
  ):  # fmt: skip
    assert np.isfinite(rows).all()
    # The mean over no rows is 0 / 0, and not the loss's affair.
    assert np.isfinite(gradient).all() or not rows.any()


def test_a_dimension_that_is_constant_correlates_with_nothing():
  student = STUDENT.copy()
  student[:, 2] = 0.1
  rows, gradient, _ = compiled(information.correlation)(student, TEACHER)
  rest = [0, 1, 3, 4]
  of_rest = 2 ** correlation(STUDENT[:, rest], TEACHER[:, rest])
  oracle.close(rows, np.log2(of_rest + 1))
  np.testing.assert_array_equal(gradient[:, 2], 0)


def test_distances_of_close_rows_keep_their_digits():
  # ‖x‖² + ‖y‖² − 2 x·y would leave none of them.
  student = np.float64(np.float32(100 + 1e-2 * STUDENT))
  agree("relational_distance", student, WIDE)


def test_affinities_that_nearly_agree_keep_their_digits():
  # The sum of p log(p / q) itself is off by 1e-2 here; cosines are rounded at
  # 1e-7 of 1, where they differ by 1e-3.
  student = np.float64(np.float32(TEACHER + 1e-3 * STUDENT))
  rows, _, _ = compiled(relations.probabilistic)(student, TEACHER)
  oracle.close(rows.mean(), probabilistic(student, TEACHER), rtol=1e-3, atol=0)


def test_cosines_that_round_below_minus_one_have_a_logarithm():
  run, below = compiled(relations.probabilistic), 0
  for seed in range(10):
    row = np.random.default_rng(seed).standard_normal((1, 1000))
    pair = np.float32(np.concatenate([row, -row]))
    scaled = maps.l2_normalize(jnp.asarray(pair))
    below += float(relations.gram(scaled)[0, 1]) < -1 - 2e-7
    rows, gradient, _ = run(pair, pair[::-1] * [[1], [0.5]])
    assert np.isfinite(rows).all()
    assert np.isfinite(gradient).all()
  assert below


@every_loss
def test_products_are_in_full_precision(name):
  # On a CPU the default is full precision too, and no value would tell.
  loss = LOSSES[name][0]
  program = jax.make_jaxpr(jax.grad(lambda s, t: loss(s, t).sum()))(
    jnp.float32(STUDENT), jnp.float32(TEACHER)
  )
  products = list(dot_products(program.jaxpr))
  assert bool(products) == (
    name not in ("correlation_congruence", "correlation")
  )
  for product in products:
    assert set(product.params["precision"]) == {jax.lax.Precision.HIGHEST}


def dot_products(program):
  for equation in program.eqns:
    if equation.primitive.name == "dot_general":
      yield equation
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from dot_products(inner)


@pytest.mark.parametrize("name", ["relational_distance", "relational_angle"])
def test_triplets_and_differences_are_not_held(name, monkeypatch):
  monkeypatch.setattr(pairwise, "_CHUNK", 2**14)
  b, d = 64, 64

  def mean(student, teacher):
    return LOSSES[name][0](student, teacher).mean()

  spec = jax.ShapeDtypeStruct((b, d), jnp.float32)
  program = jax.jit(jax.grad(mean)).lower(spec, spec).compile()
  memory = program.memory_analysis()
  assert memory.temp_size_in_bytes < 4 * b * b * d / 2


@every_loss
def test_what_is_declared(name):
  declared = traits(LOSSES[name][0])
  assert declared.couples
  assert declared.teacher
  assert declared.power == 0
  assert not declared.labels


@every_loss
def test_mistakes_are_named(name):
  loss, _, same = LOSSES[name]
  student, teacher = jnp.float32(STUDENT), jnp.float32(TEACHER)
  for size in (0, 3, 16):
    with pytest.raises(UserError, match=f"group_size={size} for 8 examples"):
      loss(student, teacher, group_size=size)
  with pytest.raises(UserError, match=r"shape|8 examples, the teacher's 4"):
    loss(student, teacher[:4])
  if same:
    with pytest.raises(UserError, match=r"\(8, 9\): give the term a projector"):
      loss(student, jnp.float32(WIDE))
  if name == "correlation_congruence":
    with pytest.raises(UserError, match="did you mean 'gaussian'"):
      loss(student, teacher, kernel="gausian")


# Inter-channel correlation: examples do not meet.


def inter_channel(s, t):
  """[B, positions, C] each."""

  def one(f_s, f_t):
    return np.sum((unit(f_s.T @ f_s) - unit(f_t.T @ f_t)) ** 2) / f_s.shape[1]

  return np.array([one(*pair) for pair in zip(s, t)])


MAPS = _random.standard_normal((2, 3, 2, 2, 4)).astype(np.float32)
SMALLER = np.float64(MAPS[1][:, :1])


def flat(x):
  return np.float64(x).reshape(x.shape[0], -1, x.shape[-1])


def test_inter_channel_is_its_equation_and_per_example():
  oracle.agree(
    relations.inter_channel,
    lambda s, t: inter_channel(flat(s), flat(t)),
    np.float64(MAPS[0]),
    SMALLER,  # other positions
  )
  assert not traits(relations.inter_channel).couples


def test_inter_channel_reference_value():
  data = json.loads(PATH.read_text())
  case = next(c for c in data["cases"] if c["name"].endswith("ickd_chsim"))
  given = data["inputs"][case["inputs"]]
  run = oracle.compiled(relations.inter_channel)
  s, t = channels_last(given["f_s"]), channels_last(given["f_t"])
  rows, gradient, _ = run(s, t)
  # The source divides by the batch twice.
  oracle.close(rows.mean() / 4, case["expected"])
  oracle.close(gradient / 16, channels_last(case["expected_grad"]["f_s"]))


def test_inter_channel_of_dead_channels_is_finite():
  run = oracle.compiled(relations.inter_channel)
  dead = np.float64(MAPS[0])
  dead[..., 1] = 0
  dead[2] = 0
  for pair in ((dead, SMALLER), (np.float64(MAPS[0]), dead), (dead, dead)):
    rows, gradient, _ = run(*pair)
    assert np.isfinite(rows).all()
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() < 100
  with pytest.raises(UserError, match="4 channels, the teacher's 3"):
    relations.inter_channel(MAPS[0], MAPS[1][..., :3])
