"""The memory of a step, told before it runs; the oracle is counted by hand."""

import functools
import logging

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest

from kdjax import losses, memory_plan, parallel
from kdjax.errors import UserError
from kdjax.memory_plan import (
  Plan,
  advice,
  check_fits,
  head_bytes,
  measured,
  readable,
)
from kdjax.objective import Term, hinton
from kdjax.train_step import init_state, jit_step, make_train_step
from kdjax.types import LinearLogits, Model, Output

TEACHER, FROZEN = networks.teacher()
BATCH = networks.batch(32)
GOAL = hinton(alpha=0.1, temperature=2.0)
# float32: 3 x 8 + 8 x 5 numbers, the teacher's 3 x 16 + 16 x 5; a batch of 32
# rows of 3 pixels, a label and a mask.
STUDENT, OF_TEACHER, ROWS = 4 * (24 + 40), 4 * (48 + 80), 32 * 4 * (3 + 1 + 1)


def placed(devices):
  """A step that has not been called, and its arguments."""
  mesh = parallel.make_mesh(devices)
  student, tx = networks.bare(), optax.adam(1e-2)
  init = functools.partial(init_state, student, TEACHER, GOAL, tx)
  state = jax.jit(init)(jax.random.key(0), BATCH, frozen=FROZEN)
  step = jit_step(make_train_step(student, TEACHER, GOAL, tx), mesh)
  state, frozen = parallel.put((state, FROZEN), mesh)
  return step, state, frozen, parallel.put_batch(BATCH, mesh)


@pytest.mark.parametrize("devices", [1, 8])
def test_each_part_is_what_was_counted_by_hand(devices):
  step, *arguments = placed(devices)
  plan = memory_plan.plan(step, *arguments)
  assert plan.student == STUDENT
  assert plan.optimizer == 2 * STUDENT + 4  # two moments and a count
  assert plan.other == 4 + 8  # the step's number and the key
  assert plan.teacher == OF_TEACHER
  assert plan.batch == ROWS // devices
  assert plan.donated == plan.state == 3 * STUDENT + 16
  assert plan.num_devices == devices
  # Gradients at least, and the metrics: float32 numbers and their addresses.
  assert plan.temporary > STUDENT
  count = len(jax.eval_shape(step, *arguments)[1])
  assert 4 * count <= plan.output <= 4 * count + 8 * (count + 20)
  want = plan.state + plan.teacher + plan.batch + plan.temporary
  assert plan.total == want + plan.output + plan.program
  assert not arguments[0].params["first"].is_deleted()  # nothing was run


def test_more_rows_take_more():
  step, state, frozen, batch = placed(1)
  plan = memory_plan.plan(step, state, frozen, batch)
  many = {k: jnp.tile(x, (8,) + (1,) * (x.ndim - 1)) for k, x in batch.items()}
  more = memory_plan.plan(step, state, frozen, many)
  assert more.batch == 8 * plan.batch
  assert more.temporary > 2 * plan.temporary


def test_the_step_runs_the_program_that_was_planned(caplog):
  step, *arguments = placed(1)

  def compiled():
    told = [r.getMessage() for r in caplog.records]
    return sum("compilation of jit(train_step)" in text for text in told)

  with jax.log_compiles(), caplog.at_level(logging.DEBUG, "jax"):
    memory_plan.plan(step, *arguments)
    assert compiled() == 1
    jax.block_until_ready(step(*arguments))
    assert compiled() == 1


def with_head(linear, classes=64, width=4):
  """A network whose head is the one matrix that it has."""

  def init(key, batch):
    return {"head": jax.random.normal(key, (classes, width))}, {}

  def apply(params, stats, batch, *, train, key=None, taps=()):
    hidden = jnp.pad(batch["image"], [(0, 0), (0, width - 3)])
    logits = LinearLogits(hidden, params["head"])
    return Output(logits if linear else hidden @ params["head"].T), stats

  return Model(init, apply)


@losses.logit_loss(power=0, teacher=False)
def plain_sum(student):
  """Its gradient is 1: nothing is to be kept for it."""
  return jnp.sum(student, -1)


def of_head(linear, devices=1, classes=64, **given):
  net = with_head(linear, classes)
  mesh = parallel.make_mesh(devices)
  init = functools.partial(
    init_state, net, None, GOAL.terms[:1], optax.sgd(0.1)
  )
  state = jax.jit(init)(jax.random.key(0), BATCH)
  rows = parallel.put_batch(BATCH, mesh)
  frozen = state.params, state.stats
  return head_bytes(net, net, GOAL, state, frozen, rows, **given)


def test_a_dense_head_holds_two_sets_of_logits_and_their_gradient():
  logits = 32 * 64 * 4
  whole = of_head(False)
  assert whole >= 3 * logits
  assert of_head(False, microbatches=2) == pytest.approx(whole / 2, rel=0.1)
  assert of_head(False, devices=8) == pytest.approx(whole / 8, rel=0.25)


def test_the_head_of_a_plain_sum_holds_the_logits_and_their_gradient():
  net, logits = with_head(False), 32 * 64 * 4
  goal = [Term("sum", plain_sum)]
  state = init_state(net, None, goal, optax.sgd(0.1), jax.random.key(0), BATCH)
  rows = parallel.put_batch(BATCH, parallel.make_mesh(1))
  got = head_bytes(net, None, goal, state, (), rows)
  assert got == pytest.approx(2 * logits, rel=0.2)


def test_a_linear_head_holds_its_gradients_and_a_chunk():
  gradients = 4 * 4 * (32 + 4096)
  linear = of_head(True, classes=4096)
  assert gradients < linear < of_head(False, classes=4096)


GIB = 2**30
EVEN = Plan(
  student=GIB,
  optimizer=2 * GIB,
  other=12,
  teacher=2 * GIB,
  batch=1000,
  temporary=5 * GIB,
  head=2 * GIB,
  output=400,
  program=0,
  donated=3 * GIB + 12,
  num_devices=2,
  device="some accelerator",
  limit=4 * GIB,
  reported=True,
)


@pytest.mark.parametrize(
  ("change", "want"),
  [
    (dict(teacher=9 * GIB), ["teacher", 'teacher.dtype="bfloat16"']),
    (
      dict(optimizer=9 * GIB),
      ["optimizer", 'optimizer.name="adafactor"', "optimizer.mu_dtype"],
    ),
    (dict(temporary=20 * GIB, head=15 * GIB), ["head", 'head="linear"']),
    (
      dict(temporary=20 * GIB),
      [
        "activations",
        'student.remat="block"',
        "phases.distilled.microbatches=2",
        "data.batch_size",
        "data.sequence_length",
        "devices",
      ],
    ),
    (
      dict(temporary=20 * GIB, head=None),
      ["activations", 'head="linear"', 'student.remat="block"'],
    ),
  ],
)
def test_the_largest_part_is_advised_on_first(change, want):
  lines = advice(EVEN._replace(**change))
  assert len(lines) == 2
  assert lines[0].startswith(want[0])
  at = [lines[0].index(key) for key in want]
  assert at == sorted(at)


def test_what_is_done_already_is_not_advised():
  done = {
    "teacher.dtype": "bfloat16",
    "student.remat": "block",
    "head": "linear",
    "data.batch_size": 12,
    "phases.distilled.microbatches": 3,
    "phases.distilled.optimizer.name": "adafactor",
  }
  told = " ".join(advice(EVEN, done))
  for key in ("teacher.dtype", "remat", "head=", "adafactor", "mu_dtype"):
    assert key not in told
  assert "phases.distilled.microbatches=6" in told
  # Two rows for each of two devices are not 12 parts.
  done["phases.distilled.microbatches"] = 6
  assert "microbatches" not in " ".join(advice(EVEN, done))
  of_teacher = " ".join(advice(EVEN, phase="teacher"))
  assert 'teacher.remat="block"' in of_teacher
  assert "phases.teacher.microbatches=2" in of_teacher


def test_a_limit_that_is_too_small_is_refused_in_one_line():
  with pytest.raises(UserError) as refused:
    check_fits(EVEN)
  told = str(refused.value)
  assert "\n" not in told
  assert "takes 10.0 GiB" in told
  assert "has 4.0 GiB" in told
  assert 'student.remat="block"' in told
  check_fits(EVEN._replace(limit=EVEN.total))
  with pytest.raises(UserError):
    check_fits(EVEN._replace(limit=EVEN.total - 1))
  # A host's memory is a guess, and an unknown one no reason.
  check_fits(EVEN._replace(reported=False))
  check_fits(EVEN._replace(limit=None, reported=False))


def test_the_table_has_every_part_and_what_to_change():
  lines = memory_plan.table(EVEN).splitlines()
  assert lines[0] == "memory of each of 2 x some accelerator"
  cells = {line[:18].strip(): line[18:].split() for line in lines[1:10]}
  assert cells["teacher"] == ["2.0", "GiB", "20%"]
  assert cells["activations"] == ["3.0", "GiB", "30%"]
  assert cells["head"] == ["2.0", "GiB", "20%"]
  assert cells["total"] == ["10.0", "GiB", "100%"]
  assert lines[-4:-2] == ["the device has 4.0 GiB", "it does not fit:"]
  assert lines[-2:] == advice(EVEN)
  fits = memory_plan.table(EVEN._replace(limit=11 * GIB)).splitlines()
  assert fits[-1] == "the device has 11.0 GiB"
  unknown = memory_plan.table(EVEN._replace(limit=None, head=None))
  assert "does not tell" in unknown
  assert "activations, head" in unknown


def test_sizes_are_readable():
  sizes = 0, 1023, 1024, 1536, 10**9, 80 * GIB
  want = ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "953.7 MiB", "80.0 GiB"]
  assert list(map(readable, sizes)) == want


def test_the_backend_is_asked_for_its_limit():
  class Device:
    platform, process_index, device_kind = "gpu", 0, "some"

    def __init__(self, stats):
      self.memory_stats = functools.partial(lambda s: s, stats)

  limit = measured._limit
  assert limit([Device({"bytes_limit": 7})]) == (7, True)
  assert limit([Device(None)]) == (None, False)
  host, reported = limit(jax.devices())
  assert not reported
  assert np.isclose(8 * host, memory_of_host(), atol=8)


def memory_of_host():
  with open("/proc/meminfo") as file:
    return 1024 * int(file.readline().split()[1])
