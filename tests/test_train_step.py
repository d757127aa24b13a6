"""The step: frozen teacher, one compilation, the same numbers however split."""

import functools
import itertools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest

import kdjax
from kdjax import checkpoint, losses, parallel, terms
from kdjax.errors import UserError
from kdjax.objective import Objective, Term, hinton
from kdjax.train_step import (
  init_state,
  jit_step,
  make_train_step,
  pmap_step,
  state_shardings,
)

TEACHER, FROZEN = networks.teacher()
MESH = parallel.make_mesh(1)
MOVING = dict(
  alpha=optax.linear_schedule(0.9, 0.1, 100),
  temperature=optax.cosine_decay_schedule(8.0, 100, alpha=0.25),
)
# Padding and unlabelled examples are unevenly spread over devices and parts.
BATCH = networks.batch(
  32,
  mask=(np.arange(32) % 7 != 3).astype(np.float32),
  labelled=(np.arange(32) < 11).astype(np.float32),
)


def start(student, terms, optimizer):
  return init_state(
    student, TEACHER, terms, optimizer, jax.random.key(0), BATCH, frozen=FROZEN
  )


def trained(student, terms, *, steps=3, mesh=MESH, **kwargs):
  optimizer = optax.sgd(0.1, momentum=0.9)
  state = parallel.put(start(student, terms, optimizer), mesh)
  step = make_train_step(student, TEACHER, terms, optimizer, **kwargs)
  step = jit_step(step, mesh)
  frozen = parallel.put(FROZEN, mesh)
  for n in range(steps):
    batch = BATCH | {"image": BATCH["image"] + np.float32(n)}
    state, metrics = step(state, frozen, parallel.put_batch(batch, mesh))
  return state.replace(key=jax.random.key_data(state.key)), metrics


def assert_close(a, b, atol=1e-6):
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=0, atol=atol),
    jax.device_get(a),
    jax.device_get(b),
  )


def assert_same_run(a, b, atol=1e-6):
  """States to `atol`; metrics to float32's usual 1e-5 as well.

  T² = 64 multiplies the rounding of a small KL in `loss/soft`, where its
  gradient, which is what moves the parameters, is multiplied by T alone.
  """
  assert_close(a[0], b[0], atol)
  for name, value in jax.device_get(b[1]).items():
    np.testing.assert_allclose(
      a[1][name], value, rtol=1e-5, atol=atol, err_msg=name
    )


@pytest.mark.parametrize("kind", networks.STUDENTS)
def test_one_compilation_teacher_untouched_loss_falls(kind):
  student = networks.STUDENTS[kind]()
  terms = hinton(**MOVING)
  optimizer = optax.adam(1e-2)
  state = parallel.put(start(student, terms, optimizer), MESH)
  frozen = parallel.put(FROZEN, MESH)
  before = jax.device_get(frozen)
  pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(frozen)]
  step = jit_step(make_train_step(student, TEACHER, terms, optimizer), MESH)
  batch = parallel.put_batch(BATCH, MESH)
  seen = []
  for n in range(100):
    old = state
    state, metrics = step(state, frozen, batch)
    seen.append(float(metrics["kl_at_1"]))
    if n in (0, 50, 99):
      np.testing.assert_allclose(
        metrics["alpha"], MOVING["alpha"](n), rtol=1e-5
      )
      np.testing.assert_allclose(
        metrics["temperature"], MOVING["temperature"](n), rtol=1e-5
      )
  assert step._cache_size() == 1
  assert seen[-1] < 0.5 * seen[0]
  assert int(state.step) == 100
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), before)
  assert pointers == [
    x.unsafe_buffer_pointer() for x in jax.tree.leaves(frozen)
  ]
  assert all(x.is_deleted() for x in jax.tree.leaves(old.params))


def test_the_teacher_is_an_argument_and_no_constant():
  student, terms, tx = networks.bare(), hinton(alpha=0.1), optax.sgd(0.1)
  step = make_train_step(student, TEACHER, terms, tx)
  state = start(student, terms, tx)
  jaxpr = jax.make_jaxpr(step)(state, FROZEN, BATCH)
  assert all(np.size(c) <= 32 for c in jaxpr.consts)
  out = jax.eval_shape(step, state, FROZEN, BATCH)[0]
  assert jax.tree.structure(out) == jax.tree.structure(state)


def test_no_gradient_reaches_the_teacher_by_any_term():
  def gap(student, teacher):  # stops no gradient by itself
    return jnp.mean(teacher**2, -1) - jnp.mean(student**2, -1)

  hint = Term("hint", gap, taps=("hidden", "hidden"))
  student, tx = networks.bare(), optax.sgd(0.1)
  terms = hinton(alpha=0.1) + [hint]
  step = make_train_step(student, TEACHER, terms, tx)
  state = start(student, terms, tx)

  def loss(frozen):
    return step(state, frozen, BATCH)[1]["loss/total"]

  for gradient in jax.tree.leaves(jax.jit(jax.grad(loss))(FROZEN)):
    np.testing.assert_array_equal(gradient, 0)


@functools.cache
def whole_batch():
  return jax.device_get(trained(networks.bare(), hinton(**MOVING)))


@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_microbatches_add_up_to_the_batch(microbatches):
  got = trained(networks.bare(), hinton(**MOVING), microbatches=microbatches)
  assert_same_run(got, whole_batch())


def test_eight_devices_are_one():
  mesh = parallel.make_mesh(8)
  got = trained(networks.bare(), hinton(**MOVING), mesh=mesh)
  assert_same_run(got, whole_batch())
  got = trained(networks.bare(), hinton(**MOVING), mesh=mesh, microbatches=4)
  assert_same_run(got, whole_batch())


def test_batch_statistics_see_the_global_batch_under_jit():
  student = networks.nnx_net(norm=True)
  one = trained(student, hinton(**MOVING))
  eight = trained(student, hinton(**MOVING), mesh=parallel.make_mesh(8))
  assert_same_run(eight, one, atol=1e-5)  # a mean of means in another order


def test_dropout_is_the_same_on_any_mesh_and_new_at_each_step():
  student = networks.nnx_net(dropout=0.5)
  one = trained(student, hinton(**MOVING))
  assert_same_run(
    trained(student, hinton(**MOVING), mesh=parallel.make_mesh(8)), one
  )
  tx = optax.sgd(0.0)
  state = start(student, hinton(alpha=0.1), tx)
  step = jax.jit(make_train_step(student, TEACHER, hinton(alpha=0.1), tx))
  state, first = step(state, FROZEN, BATCH)
  _, second = step(state, FROZEN, BATCH)
  assert first["loss/soft"] != second["loss/soft"]


def test_pmap_gives_the_numbers_of_jit():
  student, terms = networks.bare(), hinton(**MOVING)
  optimizer = optax.sgd(0.1, momentum=0.9)
  state = parallel.pmap_replicate(start(student, terms, optimizer))
  frozen = parallel.pmap_replicate(FROZEN)
  step = pmap_step(
    make_train_step(student, TEACHER, terms, optimizer, axis_name="data")
  )
  for n in range(3):
    batch = BATCH | {"image": BATCH["image"] + np.float32(n)}
    state, metrics = step(state, frozen, parallel.pmap_split(batch))
  key = jax.random.key_data(state.key)
  got = parallel.pmap_first((state.replace(key=key), metrics))
  assert_same_run(got, whole_batch())
  for leaf in jax.tree.leaves(state.params):
    for copy in leaf[1:]:
      np.testing.assert_array_equal(copy, leaf[0])


def test_pmap_refuses_what_it_cannot_do_by_name():
  tx = optax.sgd(0.1)
  terms = hinton(alpha=0.1, soft=losses.dist)
  with pytest.raises(UserError, match="terms soft couple the examples"):
    make_train_step(networks.bare(), TEACHER, terms, tx, axis_name="data")
  student = networks.nnx_net(norm=True)
  plain = hinton(alpha=0.1)
  step = make_train_step(student, TEACHER, plain, tx, axis_name="data")
  state = parallel.pmap_replicate(start(student, plain, tx))
  with pytest.raises(UserError, match=r"batch statistics.*norm.*mean"):
    pmap_step(step)(
      state, parallel.pmap_replicate(FROZEN), parallel.pmap_split(BATCH)
    )


def test_pmap_with_synced_statistics_equals_jit():
  terms = hinton(**MOVING)
  tx = optax.sgd(0.1, momentum=0.9)
  student = networks.nnx_net(norm=True, axis_name="data")
  state = start(networks.nnx_net(norm=True), terms, tx)
  step = pmap_step(
    make_train_step(
      student, TEACHER, terms, tx, axis_name="data", synced_stats=True
    )
  )
  got, _ = step(
    parallel.pmap_replicate(state),
    parallel.pmap_replicate(FROZEN),
    parallel.pmap_split(BATCH),
  )
  want, _ = trained(networks.nnx_net(norm=True), terms, steps=1)
  got = parallel.pmap_first(got)
  assert_close(got.params, want.params, atol=1e-5)
  assert_close(got.stats, want.stats, atol=1e-5)


def test_bfloat16_teacher_changes_the_loss_by_its_rounding_only():
  from kdjax.adapters import cast

  student, terms, tx = networks.bare(), hinton(alpha=0.1), optax.sgd(0.1)
  step = jax.jit(make_train_step(student, TEACHER, terms, tx))
  state = start(student, terms, tx)
  exact = step(state, FROZEN, BATCH)[1]
  rounded_state, rounded = step(state, cast(FROZEN, jnp.bfloat16), BATCH)
  assert rounded["loss/total"].dtype == jnp.float32
  assert {x.dtype for x in jax.tree.leaves(rounded_state.params)} == {
    np.dtype("float32")
  }
  np.testing.assert_allclose(
    rounded["loss/total"], exact["loss/total"], rtol=2e-2
  )
  assert rounded["loss/total"] != exact["loss/total"]


def test_transform_is_applied_once_for_both_networks_and_drawn_anew():
  def shift(batch, key):
    image = batch["image"] + jax.random.normal(key, (1, 1))
    return {**batch, "image": image}

  # A student equal to its teacher on the same images has no loss whatever
  # the shift, microbatch or not.
  terms, tx = hinton(alpha=0.0), optax.sgd(0.0)
  for microbatches in (1, 4):
    state = init_state(
      TEACHER,
      TEACHER,
      terms,
      tx,
      jax.random.key(0),
      BATCH,
      variables=FROZEN,
      frozen=FROZEN,
    )
    step = jax.jit(
      make_train_step(
        TEACHER, TEACHER, terms, tx, transform=shift, microbatches=microbatches
      )
    )
    state, metrics = step(state, FROZEN, BATCH)
    assert abs(float(metrics["loss/soft"])) < 1e-6
  other = init_state(
    networks.bare(), TEACHER, terms, tx, jax.random.key(0), BATCH, frozen=FROZEN
  )
  step = jax.jit(
    make_train_step(networks.bare(), TEACHER, terms, tx, transform=shift)
  )
  other, first = step(other, FROZEN, BATCH)
  other, second = step(other, FROZEN, BATCH)
  assert first["loss/soft"] != second["loss/soft"]


def test_a_term_on_taps_and_one_that_owns_variables():
  def project(key, student, teacher):
    shape = (student.shape[-1], teacher.shape[-1])
    return jax.random.normal(key, shape) * 0.1, jnp.zeros((), jnp.int32)

  def hint(params, state, student, teacher, batch, key):
    error = student @ params - teacher
    return jnp.mean(error**2, -1), state + 1

  def squares(student, teacher):
    return jnp.mean(student**2, -1) + 0 * jnp.mean(teacher, -1)

  terms = hinton(alpha=0.1) + [
    Term("hint", hint, 2.0, taps=("hidden", "hidden"), init=project),
    Term("size", squares, 0.0, taps=("hidden", "hidden")),
  ]
  tx = optax.adam(1e-2)
  state = start(networks.bare(), terms, tx)
  assert state.term_params["hint"].shape == (8, 16)
  step = jax.jit(
    make_train_step(networks.bare(), TEACHER, terms, tx, microbatches=2)
  )
  state, first = step(state, FROZEN, BATCH)
  for _ in range(60):
    state, last = step(state, FROZEN, BATCH)
  assert last["loss/hint"] < 0.5 * first["loss/hint"]
  assert int(state.term_state["hint"]) == 61 * 2
  assert last["loss/size"] > 0


def test_labels_alone_need_no_teacher():
  goal = Objective((Term("hard", losses.cross_entropy, group="hard"),))
  student, tx = networks.bare(), optax.adam(1e-2)
  state = init_state(student, None, goal, tx, jax.random.key(0), BATCH)
  step = jax.jit(make_train_step(student, None, goal, tx))
  state, first = step(state, (), BATCH)
  for _ in range(30):
    state, last = step(state, (), BATCH)
  assert last["loss/hard"] < first["loss/hard"]
  assert "kl_at_1" not in last


def test_a_self_teacher_is_read_from_the_state():
  student, tx = networks.bare(), optax.sgd(0.1)
  terms = hinton(alpha=0.0)
  state = init_state(
    student, student, terms, tx, jax.random.key(0), BATCH, frozen=FROZEN
  )
  step = make_train_step(
    student,
    student,
    terms,
    tx,
    teacher_of=lambda state, frozen: (state.params, state.stats),
  )
  _, metrics = jax.jit(step)(state, (), BATCH)
  assert abs(float(metrics["loss/soft"])) < 1e-6
  assert float(metrics["grad_norm"]) < 1e-6


def contrasted(**kwargs):
  return hinton(alpha=0.1) + [
    terms.crd(
      "crd",
      ("hidden", "hidden"),
      weight=0.5,
      num_examples=100,
      embedding=4,
      num_negatives=8,
      **kwargs,
    )
  ]


INDEXED = BATCH | {"index": (7 * np.arange(32) % 100).astype(np.int32)}
BANKS = ("student_bank", "teacher_bank")


def split_over(mesh):
  """Three steps with the banks split; the state as it lies, and the metrics."""
  student, tx, goal = networks.bare(), optax.sgd(0.1), contrasted()
  args = student, TEACHER, goal, tx
  state = init_state(*args, jax.random.key(0), INDEXED, frozen=FROZEN)
  shardings = state_shardings(goal, state, mesh)
  state = jax.device_put(state, shardings)
  before = jax.device_get(state.term_state["crd"])
  step = jit_step(make_train_step(*args), mesh, shardings)
  frozen = parallel.put(FROZEN, mesh)
  for _ in range(3):
    state, metrics = step(state, frozen, parallel.put_batch(INDEXED, mesh))
  return before, state, metrics


def test_sharded_state_lies_split_and_its_steps_are_those_of_one_device():
  before, eight, metrics = split_over(parallel.make_mesh(8))
  for name in BANKS:
    bank = eight.term_state["crd"][name]
    assert bank.shape == (128, 4)
    rows = [s.index[0] for s in bank.addressable_shards]
    assert sorted(r.start for r in rows) == [16 * n for n in range(8)]
    assert {s.data.shape for s in bank.addressable_shards} == {(16, 4)}
  for rest in jax.tree.leaves(
    [eight.params, eight.term_params, eight.term_state["crd"]["log_z"]]
  ):
    assert rest.sharding.is_fully_replicated
  _, one, wanted = split_over(MESH)
  plain = [s.replace(key=()) for s in (eight, one)]
  # Scores are divided by T = 0.07, and their sums run in another order.
  assert_close(*plain, atol=1e-5)
  for name, value in jax.device_get(wanted).items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6)
  moved = np.any(
    before["student_bank"] != jax.device_get(one.term_state["crd"])[BANKS[0]],
    axis=1,
  )
  seen = INDEXED["index"][INDEXED["mask"] > 0]
  np.testing.assert_array_equal(np.flatnonzero(moved), np.sort(seen))


def test_an_array_that_the_devices_do_not_divide_stays_whole():
  goal = Objective(
    (Term("t", losses.hint, init=lambda *_: ({}, {}), sharded=("even", "odd")),)
  )
  held = {"even": jnp.zeros((16, 2)), "odd": jnp.zeros((15, 2))}
  student, tx = networks.bare(), optax.sgd(0.1)
  state = start(student, hinton(alpha=0.1), tx)
  state = state.replace(term_state={"t": held | {"rest": jnp.zeros(8)}})
  got = state_shardings(goal, state, parallel.make_mesh(8))
  assert not got.term_state["t"]["even"].is_fully_replicated
  assert got.term_state["t"]["odd"].is_fully_replicated
  assert got.term_state["t"]["rest"].is_fully_replicated
  assert all(s.is_fully_replicated for s in jax.tree.leaves(got.params))


@pytest.mark.slow
def test_a_bank_is_saved_and_goes_on_where_it_was(tmp_path):
  class Killed(BaseException):
    pass

  def batches(kill_at=None):
    for n in itertools.count():
      if n == kill_at:
        raise Killed
      index = (np.arange(16) * 5 + n).astype(np.int32)
      yield networks.batch(16, seed=n, index=index)

  def run(folder, **kwargs):
    return kdjax.distill(
      student=networks.bare(),
      teacher=TEACHER,
      teacher_variables=FROZEN,
      train=batches(**kwargs),
      steps=4,
      save_every=2,
      mesh=parallel.make_mesh(8),
      quiet=True,
      terms=contrasted(),
      optimizer=optax.sgd(0.1),
      folder=tmp_path / folder,
    ).state

  whole = run("whole")
  with pytest.raises(Killed):
    run("killed", kill_at=3)
  again = run("killed")
  a, b = (jax.device_get(s.replace(key=())) for s in (again, whole))
  jax.tree.map(np.testing.assert_array_equal, a, b)
  for state in (whole, again):
    shards = state.term_state["crd"]["teacher_bank"].addressable_shards
    assert {s.data.shape for s in shards} == {(16, 4)}
  assert set(whole.params) == {"first", "last"}
  kept = checkpoint.restore(tmp_path / "killed" / "checkpoints", whole)
  assert kept is not None
  assert_close(kept.state.term_state, whole.term_state, atol=0)
  assert_close(kept.state.term_params, whole.term_params, atol=0)


def test_a_term_names_what_its_taps_lack():
  goal = Objective((Term("h", losses.hint, taps=("hidden", "hidden")),))
  student, tx = networks.bare(), optax.sgd(0.1)
  step = make_train_step(student, TEACHER, goal, tx)
  state = start(student, goal, tx)
  with pytest.raises(UserError, match=r"\(32, 8\), the teacher's \(32, 16\)"):
    jax.eval_shape(step, state, FROZEN, BATCH)


def test_variables_to_start_from_outlive_the_run():
  student, tx, terms = networks.bare(), optax.sgd(0.1), hinton(alpha=0.1)
  given = student.init(jax.random.key(3), BATCH)
  args = student, TEACHER, terms, tx
  state = init_state(
    *args, jax.random.key(0), BATCH, frozen=FROZEN, variables=given
  )
  jax.tree.map(np.testing.assert_array_equal, state.params, given[0])
  jit_step(make_train_step(*args), MESH)(
    parallel.put(state, MESH),
    parallel.put(FROZEN, MESH),
    parallel.put_batch(BATCH, MESH),
  )
  assert not any(x.is_deleted() for x in jax.tree.leaves(given))
