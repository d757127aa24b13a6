"""A teacher's logits from a file train as the teacher itself would."""

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest

import kdjax
from kdjax import data, losses, parallel
from kdjax.adapters import from_batch
from kdjax.errors import UserError
from kdjax.objective import Term, hinton

TEACHER, FROZEN = networks.teacher()
OBJECTIVE = hinton(alpha=0.2, temperature=3.0)
# The last of the three is padded, unevenly over devices and parts.
BATCHES = [
  networks.batch(16, seed=0),
  networks.batch(16, seed=1),
  networks.batch(16, seed=2, mask=(np.arange(16) < 11).astype(np.float32)),
]


@jax.jit
def logits_of(image):
  return TEACHER.apply(*FROZEN, {"image": image}, train=False)[0].logits


def cached(batch):
  """The batch as it comes from a file: padding holds anything finite."""
  logits = np.where(batch["mask"][:, None] > 0, logits_of(batch["image"]), 77.0)
  return batch | {"teacher_logits": logits.astype(np.float32)}


def trained(teacher, frozen, *runs, devices=1, **options):
  """Of runs by one step: the student after the batches, the last metrics."""
  mesh = parallel.make_mesh(devices)
  student, optimizer = networks.nnx_net(dropout=0.3), optax.adam(0.05)
  state = kdjax.init_state(
    student,
    teacher,
    OBJECTIVE,
    optimizer,
    jax.random.key(0),
    runs[0][0],
    frozen=frozen,
  )
  step = kdjax.jit_step(
    kdjax.make_train_step(student, teacher, OBJECTIVE, optimizer, **options),
    mesh,
  )
  begin, found = jax.device_get(state.replace(key=())), []
  frozen = parallel.put(frozen, mesh)
  for batches in runs:
    state = parallel.put(begin.replace(key=jax.random.key(0)), mesh)
    for batch in batches:
      state, metrics = step(state, frozen, parallel.put_batch(batch, mesh))
    found.append(jax.device_get((state.params, metrics)))
  return found


@pytest.mark.parametrize("options", [{}, {"microbatches": 2}, {"devices": 8}])
def test_it_trains_as_the_live_teacher_does(options):
  (live,) = trained(TEACHER, FROZEN, BATCHES, **options)
  # The teacher says something: without it the student becomes another.
  other = [
    cached(b) | {"teacher_logits": np.zeros((16, 5), "f")} for b in BATCHES
  ]
  stored, (params, _) = trained(
    from_batch(), ({}, {}), [*map(cached, BATCHES)], other, **options
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b),
    live,
    stored,
  )
  gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, live[0])
  assert max(jax.tree.leaves(gaps)) > 1e-2


def source(count=40):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (count, 2, 2, 1)).astype(np.uint8)
  images[:, 0, 0, 0] = np.arange(count)  # says which example it is
  return data.from_arrays(images, np.arange(count) % 5, num_classes=5)


LOGITS = np.arange(40)[:, None] + np.linspace(0, 0.5, 5)
RAW = dict(mean=0.0, std=1 / 255)  # so that images hold their numbers


def first_pixel(batch):
  return np.rint(batch["image"][:, 0, 0, 0])


@pytest.mark.parametrize("kind", [np.float16, np.float32, jnp.bfloat16])
def test_logits_follow_their_examples(kind):
  with_logits = data.with_logits(source(), LOGITS.astype(kind))
  odd = data.select(with_logits, np.arange(40) % 2 == 1)
  for made in (with_logits, odd, data.in_memory(odd)):
    shuffled = data.train_batches(made, batch_size=16, seed=3, **RAW)
    ordered = data.eval_batches(made, batch_size=16, **RAW)
    for batch in [*ordered, *(b for b, _ in zip(shuffled, range(4)))]:
      want = LOGITS[first_pixel(batch).astype(int)].astype(kind)
      assert batch["teacher_logits"].dtype == np.float32
      np.testing.assert_array_equal(batch["teacher_logits"], want.astype("f"))


@pytest.mark.parametrize(
  ("logits", "told"),
  [
    (LOGITS[:39], r"shape \(39, 5\), needs floats of shape \(40, 5\)"),
    (LOGITS[:, :4], r"shape \(40, 4\), needs floats of shape \(40, 5\)"),
    (LOGITS.astype(int), "int64 logits"),
    (np.where(LOGITS == 17, np.nan, LOGITS), "example 17 .* hold NaN"),
    (np.where(LOGITS == 3, np.inf, LOGITS), "example 3 "),
  ],
)
def test_what_is_no_table_of_logits_is_refused(logits, told):
  with pytest.raises(UserError, match=told):
    data.with_logits(source(), logits)


def test_a_class_that_the_teacher_has_not_may_be_at_minus_infinity():
  logits = np.where(np.arange(5) == 4, -np.inf, LOGITS)
  assert data.with_logits(source(), logits).logits is logits


def test_images_that_are_changed_after_the_teacher_saw_them_are_refused():
  made = data.with_logits(source(), LOGITS)
  with pytest.raises(UserError, match="augment= changes these"):
    data.train_batches(
      made, batch_size=8, seed=0, augment=lambda image, _: image, **RAW
    )
  batch = next(iter(data.train_batches(made, batch_size=8, seed=0, **RAW)))
  with pytest.raises(UserError, match="before they are mixed"):
    data.mixup(batch, jax.random.key(0), alpha=1.0, num_classes=5)


def distil(**changes):
  arguments = dict(
    student=networks.bare(),
    teacher=from_batch(),
    train=[*map(cached, BATCHES)],
    steps=3,
    mesh=parallel.make_mesh(1),
    quiet=True,
  )
  return kdjax.distill(**arguments | changes)


def test_distill_needs_no_variables_for_it():
  done = distil(evaluate_on=[cached(BATCHES[2])])
  same = distil(
    teacher=TEACHER,
    teacher_variables=FROZEN,
    train=BATCHES,
    evaluate_on=[BATCHES[2]],
  )
  assert done.metrics["eval/kl"] == pytest.approx(same.metrics["eval/kl"])
  assert done.metrics["loss/soft"] == pytest.approx(same.metrics["loss/soft"])


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    (dict(train=BATCHES), "'teacher_logits' of the batch, which has image"),
    (dict(evaluate_on=BATCHES[:1]), "evaluated on too"),
    (
      dict(train=[networks.batch(16, teacher_logits=np.zeros((16, 7), "f"))]),
      "teacher has 7 classes, student 5",
    ),
    (
      dict(train=[networks.batch(16, teacher_logits=np.zeros(16, "f"))]),
      r"shape \(16,\), needs \(16, classes\)",
    ),
    (
      dict(train=[networks.batch(16, teacher_logits=np.full((16, 5), np.nan))]),
      "hold NaN",
    ),
    (
      dict(terms=[Term("hint", losses.hint, taps=("hidden", "hidden"))]),
      "unknown tap 'hidden'",
    ),
    (dict(teacher=TEACHER), "got no teacher_variables"),
  ],
)
def test_mistakes_are_told_in_a_line(changes, told):
  with pytest.raises(UserError, match=told) as error:
    distil(**changes)
  assert "\n" not in str(error.value)
