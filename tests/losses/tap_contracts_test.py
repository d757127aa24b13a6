"""What every loss on activations promises."""

import functools

import beartype
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from kdjax import losses
from kdjax.losses import features, maps, preactivations, transfer
from kdjax.types import UserError

from . import oracle

B = 4
_random = np.random.default_rng(2)


def array(*shape):
  return np.float32(_random.standard_normal(shape))


MARGIN, VARIANCE, KERNEL = -np.abs(array(3)), np.exp(array(3)), array(3, 3)


def generate(x):
  return jnp.tanh(x @ KERNEL)


def masked_generative(student, teacher):
  mask = np.float32(np.arange(student[0, ..., 0].size) % 3 > 0)
  mask = mask.reshape(1, *student.shape[1:-1], 1)
  return features.masked_generative(student, teacher, mask, generate)


def bound(loss, **fixed):
  return functools.partial(loss, **fixed)


# Those that compare shapes element by element.
SAME = {
  **{
    f"hint {distance}": bound(features.hint, distance=distance)
    for distance in ("mse", "l1", "smooth_l1", "cosine")
  },
  "review": features.review,
  "simple": features.simple,
  "masked_generative": masked_generative,
  "variational_information": bound(
    features.variational_information, variance=VARIANCE
  ),
  "overhaul": bound(preactivations.overhaul, margin=MARGIN),
  "activation_boundary": preactivations.activation_boundary,
}
SUMMED = {
  "attention_transfer": transfer.attention_transfer,
  "attention_transfer paper": bound(transfer.attention_transfer, form="paper"),
  "factor": transfer.factor,
  "nst": transfer.nst,
}
SPECIAL = {
  "flow": transfer.flow,
  "attention_maps": transfer.attention_maps,
  "attention_maps mse": bound(transfer.attention_maps, distance="mse"),
}
LOSSES = {**SAME, **SUMMED, **SPECIAL}
PER_EXAMPLE = sorted(set(LOSSES) - {"simple"})
ON_TOKENS = sorted(set(LOSSES) - {*SPECIAL, "review"} | {"flow"})
# 0 where student and teacher agree.
VANISH = sorted(
  set(LOSSES) - {"simple", "masked_generative", "variational_information",
                 "activation_boundary"}
)  # fmt: skip


def probabilities(x):
  return np.asarray(jax.nn.softmax(jnp.float32(x)))


def given(name, make=array):
  """(student, teacher), from `make(*shape)`; `flow` takes two of each."""
  if name.startswith("attention_maps"):
    return tuple(probabilities(make(B, 2, 3, 3)) for _ in range(2))
  if name == "flow":
    return tuple((make(B, 5, 3, 2), make(B, 3, 2, 3)) for _ in range(2))
  return make(B, 5, 3, 3), make(B, 5, 3, 3)


INPUTS = {name: given(name) for name in LOSSES}


@functools.cache
def compiled(name):
  def total(student, teacher):
    values = LOSSES[name](student, teacher)
    return values.sum(), values

  gradients = jax.grad(total, argnums=(0, 1), has_aux=True)
  run = jax.jit(gradients)

  def call(student, teacher):
    (of_student, of_teacher), values = run(student, teacher)
    return values, of_student, of_teacher

  return call


def finite(tree):
  return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


def each(change, tree):
  return jax.tree.map(change, tree)


def without_channel(x):
  return x * np.float32(np.arange(x.shape[-1]) > 0)


def dead_example(x):
  return x * np.float32(np.arange(B) != 1).reshape(B, *(1,) * (x.ndim - 1))


HARD = {
  "zeros": lambda *shape: np.zeros(shape, np.float32),
  "constant": lambda *shape: np.full(shape, 0.7, np.float32),
  "huge": lambda *shape: 1e4 * np.sign(array(*shape)),
  "tiny": lambda *shape: 1e-12 * array(*shape),
  "a dead channel": lambda *shape: without_channel(array(*shape)),
  "a dead example": lambda *shape: dead_example(array(*shape)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_finite(name):
  student, teacher = INPUTS[name]
  for what, make in HARD.items():
    hard, other = given(name, make)
    for pair in (
      (hard, teacher), (student, hard), (hard, other), (hard, hard)
    ):  # fmt: skip
      assert finite(compiled(name)(*pair)), what


@pytest.mark.parametrize("name", LOSSES)
def test_student_equal_to_teacher_costs_nothing(name):
  for make in (array, HARD["zeros"], HARD["constant"]):
    student, _ = given(name, make)
    values, gradient, _ = compiled(name)(student, student)
    assert finite((values, gradient))
    if name == "hint cosine" and make is HARD["zeros"]:
      oracle.close(values, 1.0)  # a zero vector is like no other
    elif name in VANISH:
      np.testing.assert_allclose(values, 0, atol=1e-6)
      if name == "factor":
        continue  # its slope jumps there: rounding decides on the side
      for x in jax.tree.leaves(gradient):
        # Over attention alone the KL's gradient is −p / q: to a softmax's
        # input, a constant is nothing.
        if name == "attention_maps":
          x = x - x.mean(-1, keepdims=True)
        np.testing.assert_allclose(x, 0, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_teacher_receives_no_gradient(name):
  _, of_student, of_teacher = compiled(name)(*INPUTS[name])
  assert any(np.any(x) for x in jax.tree.leaves(of_student))
  for x in jax.tree.leaves(of_teacher):
    np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize("name", PER_EXAMPLE)
def test_editing_one_example_moves_no_other(name):
  values, gradient, _ = compiled(name)(*INPUTS[name])

  def edited(x):
    x = x.copy()
    x[2] *= _random.uniform(0.5, 1.5, x[2].shape)
    return x

  again, gradient_again, _ = compiled(name)(*each(edited, INPUTS[name]))
  edit = np.arange(B) == 2
  np.testing.assert_array_equal(values != again, edit)
  for x, y in zip(*map(jax.tree.leaves, (gradient, gradient_again))):
    moved = np.any(x != y, axis=tuple(range(1, x.ndim)))
    np.testing.assert_array_equal(moved, edit)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_float32_whatever_comes_in(name):
  loss, pair = LOSSES[name], INPUTS[name]
  with jax.enable_x64(True):
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float64):
      cast = functools.partial(jnp.asarray, dtype=dtype)
      out = jax.eval_shape(loss, *each(cast, pair))
      assert (out.shape, out.dtype) == ((B,), jnp.float32), dtype
  # A product or a sum in the narrower type would lose more than this.
  narrow = each(jnp.bfloat16, pair)
  want, _, _ = compiled(name)(*each(jnp.float32, narrow))
  oracle.close(jax.jit(loss)(*narrow), want)


@pytest.mark.parametrize("name", ON_TOKENS)
def test_tokens_are_maps_in_a_row(name):
  def tokens(x):
    return x.reshape(B, -1, x.shape[-1])

  pair = INPUTS[name]
  if name == "flow":  # tokens are not pooled
    pair = tuple((array(B, 5, 3, 2), array(B, 5, 3, 4)) for _ in range(2))
  values, gradient, _ = compiled(name)(*pair)
  again, gradient_again, _ = compiled(name)(*each(tokens, pair))
  oracle.close(again, values)
  for x, y in zip(*map(jax.tree.leaves, (gradient, gradient_again))):
    oracle.close(y, tokens(x))


@pytest.mark.parametrize("name", sorted(SAME))
def test_vectors_are_maps_of_one_position(name):
  pair = array(B, 3), array(B, 3)
  values, gradient, _ = compiled(name)(*pair)
  again, gradient_again, _ = compiled(name)(*[x[:, None, None] for x in pair])
  oracle.close(values, again)
  oracle.close(gradient, gradient_again.reshape(B, 3))


@pytest.mark.parametrize("name", sorted(SUMMED))
@pytest.mark.parametrize("sizes", [((7, 5), (3, 2)), ((3, 2), (7, 5))])
def test_the_larger_map_is_pooled_first(name, sizes):
  student, teacher = (
    array(B, *size, channels) for size, channels in zip(sizes, (3, 5))
  )
  small = [maps.adaptive_pool(x, (3, 2)) for x in (student, teacher)]
  values, _, _ = compiled(name)(student, teacher)
  oracle.close(values, compiled(name)(*small)[0])


def test_rows_that_do_not_exist_move_nothing_in_simple():
  exists = np.array([True, False, True, False])
  student, teacher = (x.copy() for x in INPUTS["simple"])
  run = oracle.compiled(features.simple)
  alone, gradient_alone, _ = run(student[exists], teacher[exists])
  for garbage in (0.0, np.nan, np.inf, 1e4):
    student[~exists] = teacher[~exists] = garbage
    values, gradient, _ = run(student, teacher, where=exists)
    oracle.close(values[exists], alone[0])
    # The test's total has two rows more, each of the whole value.
    oracle.close(gradient[exists], gradient_alone * B / 2, atol=1e-5)
    np.testing.assert_array_equal(gradient[~exists], 0)


def test_every_loss_of_these_files_is_here():
  listed = {
    name
    for name, loss in losses.TAP_LOSSES.items()
    if loss.__module__
    in (features.__name__, preactivations.__name__, transfer.__name__)
  }
  assert listed <= {name.split()[0] for name in LOSSES}


def test_only_simple_couples_examples():
  default = losses.Traits()
  coupled = {n for n in LOSSES if losses.traits(LOSSES[n], default).couples}
  assert coupled == {"simple"}


WRONG = [
  ("hint mse", (B, 5, 3, 3), (B, 5, 3, 2)),
  ("hint mse", (B, 5, 3, 3), (1, 5, 3, 3)),
  ("review", (B, 4, 3), (B, 4, 3)),
  ("review", (B, 5, 3, 3), (B, 5, 2, 3)),
  ("simple", (B, 3), (B, 1)),
  ("overhaul", (B, 5, 3, 2), (B, 5, 3, 2)),  # the margin is of 3 channels
  ("overhaul", (B, 5, 3, 3), (B, 5, 3, 1)),
  ("variational_information", (B, 3), (B, 1)),
  ("variational_information", (B, 1), (B, 1)),
  ("activation_boundary", (B, 5, 3, 3), (B, 3)),
  ("attention_transfer", (B, 3), (B, 3)),
  ("attention_transfer", (B, 4, 3), (B, 5, 3)),
  ("attention_transfer", (B, 5, 3, 3), (1, 5, 3, 3)),
  ("factor", (B, 15, 3), (B, 5, 3, 3)),
  ("nst", (B, 5, 3, 3), (2, 5, 3, 3)),
  ("attention_maps", (B, 2, 3, 3), (B, 2, 4, 4)),
  ("attention_maps", (B, 3, 3), (B, 3, 4)),
  ("attention_maps", (B, 3), (B, 3)),
]


@pytest.mark.parametrize(("name", "ours", "theirs"), WRONG)
def test_shapes_that_do_not_fit_are_refused_in_one_line(name, ours, theirs):
  with pytest.raises(UserError, match=r"shape.*(needs|give|choose)") as error:
    LOSSES[name](np.zeros(ours), np.zeros(theirs))
  assert "\n" not in str(error.value)


def test_flows_that_do_not_fit_are_refused():
  (low, high), theirs = INPUTS["flow"]
  with pytest.raises(UserError, match="needs two maps"):
    transfer.flow((low, high[:, 0, 0]), theirs)
  with pytest.raises(UserError, match="give the term a projector"):
    transfer.flow((low, high[..., :2]), theirs)
  with pytest.raises(UserError, match="give the term a projector"):
    transfer.flow((low[:1], high[:1]), theirs)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"masked_generative"}))
def test_signature_admits_what_the_loss_takes(name):
  loss, fixed = LOSSES[name], {}
  if isinstance(loss, functools.partial):
    loss, fixed = loss.func, loss.keywords
    fixed = {
      k: v if isinstance(v, str) else jnp.asarray(v) for k, v in fixed.items()
    }
  checked = jaxtyping.jaxtyped(loss, typechecker=beartype.beartype)
  for dtype in (jnp.float32, jnp.bfloat16):
    pair = each(functools.partial(jnp.asarray, dtype=dtype), INPUTS[name])
    assert jax.eval_shape(functools.partial(checked, **fixed), *pair).shape == (
      B,
    )
  with pytest.raises(jaxtyping.TypeCheckError):
    checked(*each(lambda x: jnp.asarray(x, int), INPUTS[name]), **fixed)
