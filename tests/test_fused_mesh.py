"""A head split over devices by tokens and classes; a step that has one."""

import dataclasses
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdjax import evaluate, losses, parallel, term_inputs, totals
from kdjax.errors import UserError
from kdjax.losses import fused
from kdjax.objective import Objective, Term, hinton
from kdjax.train_step import init_state, jit_step, make_train_step
from kdjax.types import LinearLogits, Model, Output, dense

RNG = np.random.default_rng(0)
TOKENS, WIDTH, CLASSES = (8, 6), 64, 96
GOAL = Objective(
  (
    *hinton(alpha=0.3, temperature=2.0).terms,
    Term("choice", losses.teacher_label, group="extra"),
  )
)

LABELS = Objective(GOAL.terms[:1])


def head(classes, width, num_classes):
  return LinearLogits(
    jnp.float32(RNG.normal(size=(*TOKENS, width))),
    jnp.float32(RNG.normal(size=(classes, width)) / width**0.5),
    jnp.float32(RNG.normal(size=classes)),
    5.0,
    num_classes=num_classes,
  )


STUDENT, TEACHER = head(CLASSES, WIDTH, 90), head(CLASSES + 8, 16, None)
BATCH = {
  # The first device has no token that counts, the others not equally many.
  "mask": np.float32(RNG.random(TOKENS) < np.arange(8)[:, None] / 7),
  "label": RNG.integers(0, 90, TOKENS),
}
BATCH["mask"][:2] = 0


@functools.cache
def mesh():
  return jax.make_mesh(
    (4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2
  )


def program(layout, goal=GOAL):
  def run(student, teacher, batch):
    def total(student):
      divide_by = totals.denominators(goal.terms, batch)
      parts, sums = totals.logit_terms(
        goal.terms, student, teacher, batch, divide_by, jnp.int32(0), layout
      )
      return sum(parts.values()), sums

    return jax.value_and_grad(total, has_aux=True)(student)

  return jax.jit(run)


def laid(tree, *spec):
  sharding = NamedSharding(mesh(), PartitionSpec(*spec))
  return jax.tree.map(lambda x: jax.device_put(x, sharding), tree)


def spread(logits):
  return LinearLogits(
    laid(logits.hidden, "data"),
    laid(logits.kernel, "model"),
    laid(logits.bias, "model"),
    logits.softcap,
    logits.scale,
    logits.num_classes,
  )


LAYOUT = fused.Layout(chunk=8)


def compiled(goal):
  layout = LAYOUT._replace(mesh=mesh(), classes="model")
  arguments = spread(STUDENT), spread(TEACHER), laid(BATCH, "data")
  return program(layout, goal).lower(*arguments).compile(), arguments


compiled_once = functools.cache(lambda: compiled(GOAL))


def agrees_with_one_device(goal, run, arguments):
  got, want = run(*arguments), program(LAYOUT, goal)(STUDENT, TEACHER, BATCH)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
  jax.tree.map(close, got, want)
  assert got[1].kernel.sharding.spec == PartitionSpec("model")


def test_split_over_devices_equals_one_device():
  agrees_with_one_device(GOAL, *compiled_once())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(losses.LOGIT_LOSSES))
def test_any_loss_split_over_devices_equals_one_device(name):
  loss = losses.LOGIT_LOSSES[name]
  if losses.traits(loss).couples:
    pytest.skip("refused")
  softens = "temperature" in inspect.signature(loss).parameters
  goal = Objective((Term("one", loss, temperature=2.0 if softens else None),))
  agrees_with_one_device(goal, *compiled(goal))


COLLECTIVE = re.compile(
  r" = (.*) (all-reduce|all-gather|all-to-all|collective-permute|"
  r"reduce-scatter)(?:-start)?\((.*)"
)


def largest(shapes):
  sizes = [
    np.prod([int(n) for n in dims.split(",") if n], dtype=int)
    for dims in re.findall(r"[a-z]\w*\[([\d,]*)\]", shapes)
  ]
  return max(sizes)


def test_only_few_numbers_travel_in_the_loop():
  """Nothing of head, hidden states or logits: a few numbers for each token."""
  run, _ = compiled_once()
  found = COLLECTIVE.findall(run.as_text())
  loops = [f for f in found if "/while/" in f[2]]
  assert len(loops) > 3
  chunk = 8
  for shapes, kind, _ in loops:
    # The teacher's choice is gathered from its devices: 2 for each token.
    assert largest(shapes) <= 2 * chunk, (kind, shapes)
  # Outside it the gradients are added up, and the teacher's kernel is cut to
  # the student's classes: each device its own part.
  for shapes, kind, _ in found:
    assert kind != "all-gather" or largest(shapes) <= 2 * chunk, shapes
    assert largest(shapes) <= CLASSES // 2 * WIDTH, (kind, shapes)


def test_kernels_split_along_their_width_are_gathered_once():
  """By `fsdp`; the gradient is added up by scattering it there again."""
  over = parallel.make_mesh(data=2, fsdp=2, model=2)
  layout = fused.over(over)._replace(chunk=8)
  assert layout.tokens == ("data", "fsdp")
  assert (layout.classes, layout.width) == ("model", "fsdp")

  def put(x, *spec):
    return jax.device_put(x, NamedSharding(over, PartitionSpec(*spec)))

  tokens = ("data", "fsdp")
  sides = [
    dataclasses.replace(
      x,
      hidden=put(x.hidden, tokens),
      kernel=put(x.kernel, "model", "fsdp"),
      bias=put(x.bias, "model"),
    )
    for x in (STUDENT, TEACHER)
  ]
  batch = jax.tree.map(lambda x: put(x, tokens), BATCH)
  run = program(layout).lower(*sides, batch).compile()
  got, want = run(*sides, batch), program(LAYOUT)(STUDENT, TEACHER, BATCH)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
  jax.tree.map(close, got, want)
  assert got[1].kernel.sharding.spec == PartitionSpec("model", "fsdp")
  found = COLLECTIVE.findall(run.as_text())
  kinds = [kind for shapes, kind, _ in found if largest(shapes) >= CLASSES * 8]
  assert kinds.count("all-gather") == 2  # the student's and the teacher's
  assert kinds.count("reduce-scatter") == 1


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 4}, {"fsdp": 8}])
def test_hidden_states_travel_where_they_are_fewer_than_classes(axes):
  """No device has a whole kernel, nor a whole kernel's gradient."""
  over = parallel.make_mesh(**axes)
  layout = fused.over(over)._replace(chunk=2)
  sides = head(203, WIDTH, 201), head(211, 16, None)

  def put(x, *spec):
    return jax.device_put(x, NamedSharding(over, PartitionSpec(*spec)))

  tokens = ("data", "fsdp")
  laid = [
    dataclasses.replace(
      x, hidden=put(x.hidden, tokens), kernel=put(x.kernel, None, "fsdp")
    )
    for x in sides
  ]
  batch = jax.tree.map(lambda x: put(x, tokens), BATCH)
  run = program(layout).lower(*laid, batch).compile()
  got, want = run(*laid, batch), program(LAYOUT)(*sides, BATCH)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
  jax.tree.map(close, got, want)
  assert got[1].hidden.sharding.is_equivalent_to(laid[0].hidden.sharding, 3)
  row = 48 // over.shape["data"]
  for shapes, kind, _ in COLLECTIVE.findall(run.as_text()):
    share = 208 * WIDTH // over.shape["fsdp"]
    assert largest(shapes) <= max(row * WIDTH, share), (kind, shapes)


def test_teacher_logits_are_not_brought_together():
  teacher = jnp.float32(RNG.normal(size=(*TOKENS, 205)))
  student = head(203, WIDTH, None)
  layout = fused.over(parallel.make_mesh(fsdp=8))
  assert layout == fused.fewer(layout, student, teacher)
  assert layout != fused.fewer(layout, student, None)
  got = program(layout)(student, teacher, BATCH)
  want = program(LAYOUT)(student, teacher, BATCH)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
  jax.tree.map(close, got, want)


def test_classes_that_the_axis_does_not_divide_are_padded():
  odd = head(CLASSES + 1, WIDTH, None)
  layout = LAYOUT._replace(mesh=mesh(), classes="model")
  got = program(layout, LABELS)(odd, None, BATCH)
  want = program(LAYOUT, LABELS)(odd, None, BATCH)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
  jax.tree.map(close, got, want)


def language_model(linear, width=5, padding=2):
  """Embeddings that are the head as well."""

  def init(key, batch):
    shape = (11 + padding, width)
    return {"embedding": jax.random.normal(key, shape) / width**0.5}, {}

  def apply(params, stats, batch, *, train, key=None, taps=()):
    hidden = jnp.tanh(params["embedding"][batch["tokens"]])
    logits = LinearLogits(hidden, params["embedding"], num_classes=11)
    return Output(logits if linear else dense(logits)[..., :11]), stats

  return Model(init, apply)


TEXT = {
  "tokens": RNG.integers(0, 11, (8, 5)),
  "label": RNG.integers(0, 11, (8, 5)),
  "mask": np.float32(RNG.random((8, 5)) > 0.4),
}


def one_step(linear, **options):
  student = language_model(linear)
  teacher = language_model(linear, width=7, padding=3)
  goal, optimizer = hinton(alpha=0.5, temperature=2.0), optax.sgd(0.5)
  frozen = teacher.init(jax.random.key(1), TEXT)
  state = init_state(
    student, teacher, goal, optimizer, jax.random.key(0), TEXT, frozen=frozen
  )
  train_step = make_train_step(student, teacher, goal, optimizer, **options)
  on = options["layout"].mesh if options.get("layout") else None
  step = jit_step(train_step, on) if on else jax.jit(train_step)
  state, metrics = step(state, frozen, TEXT)
  return state.params, metrics


@pytest.mark.slow
def test_step_agrees_with_that_of_the_whole_logits():
  layout = fused.Layout(chunk=3, mesh=mesh())
  got = one_step(linear=True, microbatches=2, layout=layout)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, got, one_step(linear=False))


def test_term_that_reads_the_logits_as_a_tap_is_refused():
  output = Output(STUDENT)
  with pytest.raises(UserError, match=r"tap 'logits', and the head is not"):
    term_inputs.activation(output, "logits")


def test_what_is_said_of_each_token_has_its_place_on_a_mesh():
  label, mask = BATCH["label"], BATCH["mask"]
  layout = fused.over(mesh())._replace(chunk=2)
  of_each = functools.partial(evaluate.output_sums, each=True)

  @jax.jit
  def both(student, teacher):
    whole = [dense(x)[..., :90] for x in (student, teacher)]
    return (
      of_each(whole[0], label, mask, whole[1])[1],
      of_each(student, label, mask, teacher, layout)[1],
    )

  want, got = both(STUDENT, TEACHER)
  assert set(got) == {"guess", "confidence", "nll", "teacher_guess", "kl"}
  for name, value in want.items():
    assert got[name].shape == TOKENS
    np.testing.assert_allclose(got[name], value, 1e-4, 1e-6, err_msg=name)
