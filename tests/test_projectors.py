"""Projectors: their equations, what they refuse, and how they are trained."""

import functools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest

from kdjax import losses, parallel, projectors, terms
from kdjax.errors import UserError
from kdjax.objective import Objective, Term, hinton
from kdjax.projectors import conv, linear, mlp, project
from kdjax.train_step import init_state, jit_step, make_train_step

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
CLOSE = dict(rtol=1e-5, atol=1e-6)
ALL = np.ones(4, bool)


def drawn(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def made(projector, x, like):
  """Parameters of no special values, so that biases and scales count."""
  shapes = jax.eval_shape(projector.init, KEY, x, like)
  return jax.tree.map(lambda p: drawn(*p.shape), shapes)


def applied(projector, params, x, like, where=ALL):
  return jax.jit(projector.apply)(params, x, like, where)


def exact(tree):
  return jax.tree.map(np.float64, jax.device_get(tree))


def normed(x, where, epsilon=1e-5):
  """Batch normalisation in float64, over the rows that exist."""
  rows = x[where].reshape(-1, x.shape[-1])
  scaled = (x - rows.mean(0)) / np.sqrt(rows.var(0) + epsilon)
  return np.where(where.reshape(-1, *[1] * (x.ndim - 1)), scaled, 0)


def convolved(x, kernel):
  """Correlation with zeros all around, position by position."""
  half = len(kernel) // 2
  padded = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
  out = np.zeros((*x.shape[:3], kernel.shape[-1]))
  for i in range(x.shape[1]):
    for j in range(x.shape[2]):
      window = padded[:, i : i + len(kernel), j : j + len(kernel)]
      out[:, i, j] = np.einsum("bhwc,hwcd->bd", window, kernel)
  return out


def pooled(x, height, width):
  """The mean over bins [floor(i h / h2), ceil((i + 1) h / h2))."""

  def bins(length, count):
    return [
      slice(i * length // count, -(-(i + 1) * length // count))
      for i in range(count)
    ]

  rows, columns = bins(x.shape[1], height), bins(x.shape[2], width)
  return np.stack(
    [np.stack([x[:, r, c].mean((1, 2)) for c in columns], 1) for r in rows], 1
  )


SHAPES = {
  "vectors": ((4, 3), (4, 6)),
  "tokens": ((4, 5, 3), (4, 5, 6)),
  "maps": ((4, 3, 2, 3), (4, 3, 2, 6)),
}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_linear_is_its_equation(kind, norm):
  x, like = (drawn(*shape) for shape in SHAPES[kind])
  projector = linear(norm=norm)
  params = made(projector, x, like)
  p = exact(params)["layer_0"]
  want = x.astype(np.float64) @ p["kernel"]
  if norm:
    want = normed(want, ALL) * p["scale"]
  got = applied(projector, params, x, like)
  assert got.shape == like.shape
  np.testing.assert_allclose(got, want + p["bias"], **CLOSE)
  assert projector.couples == norm


def test_linear_without_bias_is_a_product():
  x, like = drawn(4, 3), drawn(4, 6)
  params = made(linear(bias=False), x, like)
  assert set(params["layer_0"]) == {"kernel"}
  got = applied(linear(bias=False), params, x, like)
  want = x.astype(np.float64) @ np.float64(params["layer_0"]["kernel"])
  np.testing.assert_allclose(got, want, **CLOSE)


@pytest.mark.parametrize("norm", [False, True])
def test_mlp_is_its_equation(norm):
  x, like = drawn(4, 5, 3), drawn(4, 5, 6)
  projector = mlp(num_hidden=2, hidden=7, norm=norm)
  params = made(projector, x, like)
  p, want = exact(params), x.astype(np.float64)
  assert [p[f"layer_{n}"]["kernel"].shape for n in range(3)] == [
    (3, 7),
    (7, 7),
    (7, 6),
  ]
  for n in range(3):
    want = want if n == 0 else np.maximum(want, 0)
    want = want @ p[f"layer_{n}"]["kernel"]
    if norm:
      want = normed(want, ALL) * p[f"layer_{n}"]["scale"]
    want = want + p[f"layer_{n}"]["bias"]
  got = applied(projector, params, x, like)
  np.testing.assert_allclose(got, want, **CLOSE)


def test_gradients_through_a_normalised_map_are_those_of_its_equation():
  x, like = drawn(4, 3), drawn(4, 5)
  where = np.array([True, False, True, True])
  params, weight = made(linear(norm=True), x, like), drawn(4, 5)

  def total(params, x):
    y = linear(norm=True).apply(params, x, like, where)
    return jnp.sum(weight * jnp.where(where[:, None], y, 0))

  def equation(params, x):
    y = normed(x @ params["kernel"], where)
    y = y * params["scale"] + params["bias"]
    return np.sum((weight * y)[where])

  def slope(f, x, step=1e-6):
    found = np.zeros_like(x)
    for i in np.ndindex(x.shape):
      nudge = np.zeros_like(x)
      nudge[i] = step
      found[i] = (f(x + nudge) - f(x - nudge)) / (2 * step)
    return found

  of_params, of_x = jax.jit(jax.grad(total, argnums=(0, 1)))(params, x)
  exactly = exact(params)["layer_0"]
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  close(of_x, slope(lambda a: equation(exactly, a), np.float64(x)))
  for name, value in exactly.items():
    want = slope(lambda a, n=name: equation({**exactly, n: a}, x), value)
    close(of_params["layer_0"][name], want)


def test_a_variance_that_rounding_leaves_below_zero_gives_numbers():
  # Columns that sum to 0 see nothing of channels that are all alike.
  common = 1e4 * RNG.normal(size=(64, 1))
  x = jnp.asarray(np.repeat(common, 3, axis=1), jnp.float32)
  kernel = RNG.normal(size=(3, 40))
  kernel = jnp.asarray(100 * (kernel - kernel.mean(0)), jnp.float32)
  where = jnp.ones(64, bool)

  def total(kernel):
    return jnp.sum(jnp.matmul(*projectors.normalizing(x, kernel, where)))

  value, slope = jax.jit(jax.value_and_grad(total))(kernel)
  assert np.isfinite(value)
  assert np.all(np.isfinite(slope))


def test_the_hidden_width_is_the_targets_unless_given():
  shapes = jax.eval_shape(mlp(num_hidden=2).init, KEY, drawn(4, 3), drawn(4, 6))
  widths = [shapes[f"layer_{n}"]["kernel"].shape for n in range(3)]
  assert widths == [(3, 6), (6, 6), (6, 6)]


@pytest.mark.parametrize("size", [1, 3, 5])
def test_conv_is_its_equation_with_zeros_around(size):
  x, like = drawn(4, 4, 3, 2), drawn(4, 4, 3, 5)
  projector = conv(size=size, norm=False, relu=False)
  params = made(projector, x, like)
  p = exact(params)
  got = applied(projector, params, x, like)
  want = convolved(x.astype(np.float64), p["kernel"]) + p["bias"]
  np.testing.assert_allclose(got, want, **CLOSE)


def test_conv_then_averages_normalises_and_cuts():
  x, like = drawn(4, 5, 4, 2), drawn(4, 2, 2, 5)
  params = made(conv(), x, like)
  p = exact(params)
  got = applied(conv(), params, x, like)
  y = pooled(convolved(x.astype(np.float64), p["kernel"]), 2, 2)
  want = np.maximum(normed(y, ALL) * p["scale"] + p["bias"], 0)
  np.testing.assert_allclose(got, want, **CLOSE)
  assert conv().couples
  assert not conv(norm=False).couples


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 2), (5, 7)])
def test_a_larger_map_is_averaged_down_by_bins_that_may_overlap(size):
  x, like = drawn(4, 5, 7, 2), drawn(4, *size, 3)
  params = made(linear(), x, like)
  p = exact(params)["layer_0"]
  got = applied(linear(), params, x, like)
  want = pooled(x.astype(np.float64), *size) @ p["kernel"] + p["bias"]
  np.testing.assert_allclose(got, want, **CLOSE)


@pytest.mark.parametrize(
  ("projector", "source"),
  [
    (linear(norm=True), (5, 3)),
    (mlp(norm=True), (5, 2, 3)),
    (conv(), (5, 2, 2, 3)),
  ],
)
def test_a_padded_row_moves_nothing_and_gets_no_gradient(projector, source):
  x, like = drawn(*source), drawn(*source[:-1], 6)
  where = np.array([True, True, False, True, True])
  params = made(projector, x, like)
  spoiled = x.copy()
  spoiled[2] = np.nan

  def total(params, x, where):
    # As the step does it: what is there of a padded row is replaced by 0.
    x = jnp.where(where.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
    y = projector.apply(params, x, like[: len(x)], where)
    return jnp.sum(jnp.where(where.reshape(-1, *[1] * (y.ndim - 1)), y, 0) ** 3)

  grad = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
  value, (moved, back) = grad(params, spoiled, where)
  kept = grad(params, x[where], ALL)
  np.testing.assert_allclose(value, kept[0], **CLOSE)
  np.testing.assert_array_equal(back[2], 0)
  # The two sums run in another order.
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
    (moved, back[where]),
    kept[1],
  )


def test_batch_norm_leaves_out_a_row_of_nan_by_itself():
  x, where = drawn(5, 3), np.array([True, False, True, True, True])
  x[1] = np.nan
  got, pull_back = jax.vjp(
    lambda x: projectors.batch_norm(x, where), jnp.asarray(x)
  )
  np.testing.assert_allclose(
    got[where], normed(x.astype(np.float64), where)[where], **CLOSE
  )
  np.testing.assert_array_equal(got[1], 0)
  np.testing.assert_array_equal(pull_back(jnp.ones((5, 3)))[0][1], 0)


@pytest.mark.parametrize(
  ("source", "target"),
  [
    ((4, 2, 4, 3), (4, 3, 3, 6)),  # not as high
    ((4, 4, 2, 3), (4, 3, 3, 6)),  # not as wide
    ((4, 3), (4, 2, 2, 6)),  # a vector for a map
    ((4, 2, 2, 3), (4, 6)),  # a map for a vector
    ((4, 5, 3), (4, 6, 6)),  # tokens of two numbers
  ],
)
def test_what_no_projector_brings_together_is_refused(source, target):
  for projector in (linear(), mlp(), conv()):
    with pytest.raises(UserError, match="no projector brings") as told:
      jax.eval_shape(projector.init, KEY, jnp.ones(source), jnp.ones(target))
    for shape in (source, target):
      text = ", ".join(["B", *map(str, shape[1:])])
      assert f"[{text}]" in str(told.value)
    assert "\n" not in str(told.value)


def test_what_cannot_be_a_projector_is_refused():
  with pytest.raises(UserError, match="needs a map"):
    conv().init(KEY, jnp.ones((4, 5, 3)), jnp.ones((4, 5, 6)))
  for size in (0, 2, -1):
    with pytest.raises(UserError, match=f"size={size}, needs an odd number"):
      conv(size=size)
  with pytest.raises(UserError, match="num_hidden=-1"):
    mlp(num_hidden=-1)
  with pytest.raises(UserError, match="hidden=-2"):
    mlp(hidden=-2)


TAPS = ("hidden", "hidden")


@pytest.mark.parametrize(
  ("term", "says"),
  [
    (Term("h", losses.hint), "'h' has a projector and no taps"),
    (Term("h", losses.kl, taps=TAPS, temperature=2.0), "and a temperature"),
    (Term("h", losses.dkd, taps=TAPS), "'h' .*labels"),
  ],
)
def test_terms_that_cannot_be_projected_are_refused(term, says):
  with pytest.raises(UserError, match=says):
    project(term, linear())


def batch_of(mask):
  return {"mask": jnp.asarray(mask, jnp.float32)}


def test_a_projected_loss_is_the_loss_of_the_projection():
  x, like = drawn(4, 3), drawn(4, 6)
  term = Term("h", losses.hint, 2.0, taps=TAPS, hparams=dict(distance="l1"))
  term = project(term, linear())
  assert (term.name, term.weight, term.taps) == ("h", 2.0, TAPS)
  assert not term.coupled
  params, state = jax.jit(term.init)(KEY, x, like)
  assert state == {}
  p = exact(params["projector"]["0"])["layer_0"]
  loss = jax.jit(functools.partial(term.loss, distance="l1"))
  got, _ = loss(params, state, x, like, batch_of(ALL), KEY)
  want = np.abs(x.astype(np.float64) @ p["kernel"] + p["bias"] - like).mean(-1)
  np.testing.assert_allclose(got, want, **CLOSE)


@pytest.mark.parametrize("several", [False, True])
def test_a_larger_map_of_the_teacher_is_averaged_down(several):
  x, like = drawn(4, 2, 6, 3), drawn(4, 4, 3, 5)
  taps = (("a",), ("b",)) if several else TAPS
  loss = losses.hint
  if several:
    loss = lambda ours, theirs: losses.hint(ours[0], theirs[0])  # noqa: E731
  term = project(Term("h", loss, taps=taps), linear())
  given = ((x,), (like,)) if several else (x, like)
  params, state = jax.jit(term.init)(KEY, *given)
  layer = exact(params["projector"]["0"])["layer_0"]
  got, _ = jax.jit(term.loss)(params, state, *given, batch_of(ALL), KEY)
  ours = x.astype(np.float64).reshape(4, 2, 3, 2, 3).mean(3)
  theirs = like.astype(np.float64).reshape(4, 2, 2, 3, 5).mean(2)
  ours = ours @ layer["kernel"] + layer["bias"]
  want = np.mean((ours - theirs) ** 2, axis=(1, 2, 3))
  np.testing.assert_allclose(got, want, **CLOSE)


def test_a_coupled_loss_is_told_which_rows_exist():
  x, like = drawn(5, 3), drawn(5, 6)
  term = project(Term("sp", losses.similarity_preserving, taps=TAPS), linear())
  assert term.coupled
  assert project(Term("h", losses.hint, taps=TAPS), linear(norm=True)).coupled
  params, state = jax.jit(term.init)(KEY, x, like)
  mask = np.array([1, 1, 0, 1, 1.0])
  got, _ = jax.jit(term.loss)(params, state, x, like, batch_of(mask), KEY)
  keep = mask > 0
  fewer, _ = jax.jit(term.loss)(
    params, state, x[keep], like[keep], batch_of(np.ones(4)), KEY
  )
  np.testing.assert_allclose(got[keep], fewer, **CLOSE)


def test_a_term_keeps_its_own_variables_beside_the_projectors():
  x, like = drawn(4, 3), drawn(4, 6)
  inner = terms.variational_information("vid", TAPS, weight=1.0)
  term = project(inner, linear())
  params, state = jax.jit(term.init)(KEY, x, like)
  assert set(params) == {"projector", "term"}
  assert params["term"]["raw_variance"].shape == (6,)
  p = exact(params["projector"]["0"])["layer_0"]
  mean = (x.astype(np.float64) @ p["kernel"] + p["bias"]).astype(np.float32)
  got, _ = jax.jit(term.loss)(params, state, x, like, batch_of(ALL), KEY)
  want, _ = jax.jit(inner.loss)(
    params["term"], state, mean, like, batch_of(ALL), KEY
  )
  np.testing.assert_allclose(got, want, **CLOSE)


def test_several_taps_get_a_projector_each():
  def gap(student, teacher):
    return sum(jnp.mean((s - t) ** 2, -1) for s, t in zip(student, teacher))

  taps = (("a", "b"), ("c", "d"))
  student = drawn(4, 3), drawn(4, 2)
  teacher = drawn(4, 6), drawn(4, 5)
  term = project(Term("g", gap, taps=taps), linear())
  params, state = jax.jit(term.init)(KEY, student, teacher)
  p = exact(params["projector"])
  assert set(p) == {"0", "1"}
  got, _ = jax.jit(term.loss)(
    params, state, student, teacher, batch_of(ALL), KEY
  )
  want = 0
  for n in range(2):
    layer = p[str(n)]["layer_0"]
    y = student[n].astype(np.float64) @ layer["kernel"] + layer["bias"]
    want = want + ((y - teacher[n]) ** 2).mean(-1)
  np.testing.assert_allclose(got, want, **CLOSE)


TEACHER, FROZEN = networks.teacher()
STUDENT = networks.bare()
BATCH = networks.batch(32, mask=(np.arange(32) % 7 != 3).astype(np.float32))
GOAL = hinton(alpha=0.1) + [
  project(Term("hint", losses.hint, taps=TAPS), mlp(norm=True))
]
SGD = optax.sgd(0.05, momentum=0.9)


def start(goal=GOAL):
  return init_state(STUDENT, TEACHER, goal, SGD, KEY, BATCH, frozen=FROZEN)


@functools.cache
def trained(devices, steps=20):
  mesh = parallel.make_mesh(devices)
  state, frozen = parallel.put(start(), mesh), parallel.put(FROZEN, mesh)
  step = jit_step(make_train_step(STUDENT, TEACHER, GOAL, SGD), mesh)
  seen = []
  for _ in range(steps):
    state, metrics = step(state, frozen, parallel.put_batch(BATCH, mesh))
    seen.append(float(metrics["loss/hint"]))
  return jax.device_get(state.trained), seen


def test_a_projector_is_trained_with_the_student_and_is_no_part_of_it():
  before = start()
  assert set(before.params) == {"first", "last"}
  after, seen = trained(1)
  assert set(after["student"]) == {"first", "last"}
  layers = after["terms"]["hint"]["projector"]["0"]
  assert set(layers) == {"layer_0", "layer_1"}
  untrained = before.term_params["hint"]["projector"]["0"]
  for n in ("layer_0", "layer_1"):
    for name in ("kernel", "scale", "bias"):
      gap = np.abs(layers[n][name] - np.asarray(untrained[n][name]))
      assert gap.max() > 1e-4, (n, name)
  assert seen[-1] < 0.7 * seen[0]


def test_eight_devices_are_one():
  one, eight = trained(1), trained(8)
  # Twenty steps with momentum, the means summed in another order.
  np.testing.assert_allclose(one[1], eight[1], rtol=1e-5, atol=1e-5)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5),
    one[0],
    eight[0],
  )


def test_pmap_refuses_a_projector_in_which_examples_meet():
  with pytest.raises(UserError, match="terms hint couple the examples"):
    make_train_step(STUDENT, TEACHER, GOAL, SGD, axis_name="data")
  plain = Objective((project(Term("hint", losses.hint, taps=TAPS), mlp()),))
  make_train_step(STUDENT, TEACHER, plain, SGD, axis_name="data")
