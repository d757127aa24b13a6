"""CRD's banks and embeddings through the step, and InfoNCE's embeddings."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest

from kdjax import objective, parallel, schedules
from kdjax.checkpoint import Checkpointer
from kdjax.errors import UserError
from kdjax.terms import contrastive
from kdjax.train_step import (
  init_state,
  jit_step,
  make_train_step,
  pmap_step,
  state_shardings,
)

N, K, E, T = 20, 6, 4, 0.07  # examples, negatives, embedding, temperature
B = 16
TAPS = ("hidden", "hidden")
PATH = pathlib.Path(__file__).parent / "data" / "relation_losses.json"
TEACHER, FROZEN = networks.teacher()
KEY = jax.random.key(3)
_random = np.random.default_rng(5)
S, H = (np.float64(np.float32(_random.standard_normal((5, d)))) for d in (6, 7))
MASK = np.array([1, 1, 0, 1, 1.0])
INDEX = np.array([4, 19, 7, 0, 11])


@functools.cache
def crd(**kwargs):
  given = dict(weight=1.0, num_examples=N, embedding=E, num_negatives=K)
  return contrastive.crd("crd", TAPS, **(given | kwargs))


def close(got, want, atol=1e-6, rtol=1e-5):
  np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


def slope(f, x, step=1e-6):
  found = np.zeros_like(x)
  for i in np.ndindex(x.shape):
    up, down = x.copy(), x.copy()
    up[i] += step
    down[i] -= step
    found[i] = (f(up) - f(down)) / (2 * step)
  return found


def float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@functools.cache
def compiled(loss):
  def run(params, state, student, teacher, batch, hparams):
    rows, state = loss(params, state, student, teacher, batch, KEY, **hparams)
    mask = batch["mask"]
    total = jnp.sum(jnp.where(mask > 0, rows, 0))
    return total / jnp.sum(mask), rows, state

  return jax.jit(run)


def evaluated(term, params, state, student=S, teacher=H, mask=MASK, **batch):
  """(mean over rows that exist, rows, new state) of one call."""
  batch = {"index": INDEX, "mask": mask} | batch
  hparams = {k: schedules.schedule(v)(0) for k, v in term.hparams.items()}
  return compiled(term.loss)(params, state, student, teacher, batch, hparams)


def begun(term, students=S, teachers=H):
  specs = [
    jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (students, teachers)
  ]
  return jax.jit(lambda key: term.init(key, *specs))(jax.random.key(1))


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def embedded(params, side, x):
  return x @ params[side]["kernel"] + params[side]["bias"]


def crd_equation(params, state, chosen, student, teacher, mask, log_z=None):
  """The loss, log Z of both sides and the two banks, in float64."""
  s, t = (
    unit(embedded(params, side, x))
    for side, x in (("student", student), ("teacher", teacher))
  )
  exists, m, loss, found = mask > 0, K / N, 0.0, []
  for n, (anchor, bank) in enumerate(
    ((s, "teacher_bank"), (t, "student_bank"))
  ):
    p = np.exp(np.einsum("bd,bkd->bk", anchor, state[bank][chosen]) / T)
    z = p[exists].mean() * N if log_z is None else np.exp(log_z[n])
    found.append(np.log(z))
    p = p[exists] / z
    positive = np.log(p[:, 0] / (p[:, 0] + m + 1e-7))
    loss -= positive.mean()
    loss -= np.log(m / (p[:, 1:] + m + 1e-7)).sum(1).mean()
  banks = {}
  for bank, rows in (("student_bank", s), ("teacher_bank", t)):
    banks[bank] = state[bank].copy()
    at = chosen[exists, 0]
    banks[bank][at] = unit(0.5 * state[bank][at] + 0.5 * rows[exists])
  return loss, np.array(found), banks


def gradients(term, params, state, student):
  """Value, new state, gradients of what is trained and of the student."""

  def mean(params, student):
    value, _, new = evaluated(term, params, state, student)
    return value, new

  return jax.jit(jax.value_and_grad(mean, argnums=(0, 1), has_aux=True))(
    params, jnp.float32(student)
  )


def check_gradients(equation, params, student, of_params, of_student):
  """`equation(params, student)` in float64 has these gradients."""
  params = float64(params)
  want = slope(lambda x: equation(params, x), student)
  close(of_student, want, atol=1e-5)
  for side in ("student", "teacher"):

    def of_kernel(kernel, side=side):
      return equation(
        {**params, side: {**params[side], "kernel": kernel}}, student
      )

    want = slope(of_kernel, params[side]["kernel"])
    assert np.abs(want).max() > 1e-2
    # float32 sums of cosines over a temperature of 0.07.
    close(of_params[side]["kernel"], want, atol=1e-5)


def test_crd_is_its_equation_at_the_first_step_and_the_next():
  term = crd()
  params, state = begun(term)
  chosen = np.asarray(contrastive._candidates(KEY, jnp.asarray(INDEX), K, N))
  log_z = None
  for student in (S, S + 1):
    (value, new), slopes = gradients(term, params, state, student)
    old = float64(state)
    want, z, banks = crd_equation(
      float64(params), old, chosen, student, H, MASK, log_z
    )
    log_z = z if log_z is None else log_z
    close(value, want)
    close(new["log_z"], log_z)
    for bank, rows in banks.items():
      close(new[bank], rows)

    def equation(p, x, old=old, constant=log_z):
      return crd_equation(p, old, chosen, x, H, MASK, constant)[0]

    check_gradients(equation, params, student, *slopes)
    state = new


def test_crd_reference_value(monkeypatch):
  data = json.loads(PATH.read_text())
  case = next(c for c in data["cases"] if c["name"].startswith("crd"))
  given = {k: np.array(v) for k, v in data["inputs"][case["inputs"]].items()}
  monkeypatch.setattr(
    contrastive, "_candidates", lambda *_: jnp.asarray(given["contrast_idx"])
  )
  term = crd(num_examples=12, embedding=5, num_negatives=4)
  _, state = begun(term, given["f_s"], given["f_t"])
  params = {
    side: {
      "kernel": jnp.float32(given[f"w_{side[0]}"].T),
      "bias": jnp.float32(given[f"b_{side[0]}"]),
    }
    for side in ("student", "teacher")
  }
  for n, side in enumerate(("student", "teacher"), 1):
    bank = state[f"{side}_bank"]
    state[f"{side}_bank"] = bank.at[:12].set(jnp.float32(given[f"memory_v{n}"]))

  def total(student):
    mean, _, new = evaluated(
      term, params, state, student, jnp.float32(given["f_t"]), np.ones(3),
      index=given["idx"],
    )  # fmt: skip
    return mean, new

  (value, new), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(
    jnp.float32(given["f_s"])
  )
  close(value, case["expected"])
  close(gradient, case["expected_grad"]["f_s"], atol=1e-5)
  extra = case["expected_extra"]
  close(np.exp(new["log_z"]), [extra["Z_v1"], extra["Z_v2"]])
  for n, side in enumerate(("student", "teacher"), 1):
    close(new[f"{side}_bank"][:12], extra[f"memory_v{n}_after"])


def test_candidates_are_the_example_and_all_others_evenly():
  index = jnp.array([0, 9, 4])
  draws = np.asarray(contrastive._candidates(KEY, index, 9000, 10))
  np.testing.assert_array_equal(draws[:, 0], index)
  for own, others in zip((0, 9, 4), draws[:, 1:]):
    counts = np.bincount(others, minlength=10)
    assert len(counts) == 10
    assert counts[own] == 0
    assert np.abs(np.delete(counts, own) - 1000).max() < 150


def test_banks_are_rounded_up_and_use_the_examples_rows_alone():
  term = crd(num_examples=130)
  params, state = begun(term)
  assert term.sharded == ("student_bank", "teacher_bank")
  for name in term.sharded:
    assert state[name].shape == (256, E)
    # As long as 1 on average, as the authors draw them.
    close(jnp.mean(state[name] ** 2) * E, 1.0, rtol=0.1)
    assert jnp.abs(state[name]).max() <= (3 / E) ** 0.5
  assert not np.array_equal(state["student_bank"], state["teacher_bank"])
  spoiled = {
    k: v.at[130:].set(jnp.nan) if k in term.sharded else v
    for k, v in state.items()
  }
  want, got = (evaluated(term, params, x) for x in (state, spoiled))
  np.testing.assert_array_equal(got[0], want[0])
  for name in term.sharded:
    np.testing.assert_array_equal(got[2][name][:130], want[2][name][:130])


@pytest.mark.parametrize("make", [crd, None])
def test_padding_moves_neither_loss_nor_gradient_nor_banks(make):
  term = crd() if make else contrastive.info_nce("n", TAPS, weight=1.0)
  params, state = begun(term)

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def total(params, student, teacher, numbers):
    mean, _, new = evaluated(
      term, params, state, student, teacher, index=numbers
    )
    return mean, new

  seen = []
  for garbage, index in ((0.0, 7), (np.nan, 4), (np.inf, -1), (1e30, 10**6)):
    student, teacher = S.copy(), H.copy()
    student[2], teacher[2] = garbage, garbage
    numbers = INDEX.copy()
    numbers[2] = index
    given = jnp.float32(student), jnp.float32(teacher)
    seen.append(total(params, *given, numbers))
  if make:
    # Its own candidates were drawn around its index; nobody else's were.
    assert np.isfinite(seen[0][0][0])
  for other in seen[1:]:
    jax.tree.map(np.testing.assert_array_equal, other, seen[0])


def test_a_batch_of_padding_alone_leaves_z_unset():
  term = crd()
  params, state = begun(term)
  _, rows, new = evaluated(term, params, state, mask=np.zeros(5))
  assert not new["has_log_z"]
  assert np.isfinite(rows).all()
  for name in term.sharded:
    np.testing.assert_array_equal(new[name], state[name])
  _, _, new = evaluated(term, params, new)
  assert new["has_log_z"]
  want = evaluated(term, params, state)[2]["log_z"]
  np.testing.assert_array_equal(new["log_z"], want)


def test_an_index_beyond_the_bank_is_nan_and_remembers_nothing():
  term = crd()
  params, state = begun(term)
  for wrong in (N, -1):
    index = INDEX.copy()
    index[3] = wrong
    _, rows, new = evaluated(term, params, state, index=index)
    np.testing.assert_array_equal(np.isnan(rows), np.arange(5) == 3)
    changed = np.any(new["student_bank"] != state["student_bank"], axis=1)
    assert set(np.flatnonzero(changed)) == {4, 19, 11}


def test_no_gradient_reaches_the_state_or_the_teacher():
  term = crd()
  params, state = begun(term)
  state = evaluated(term, params, state)[2]

  def total(banks, teacher):
    mean, _, new = evaluated(term, params, {**state, **banks}, S, teacher)
    return mean + sum(jnp.sum(new[k] ** 3) for k in term.sharded)

  banks = {k: state[k] for k in (*term.sharded, "log_z")}
  slopes = jax.jit(jax.grad(total, argnums=(0, 1)))(banks, jnp.float32(H))
  assert not np.any(slopes[0]["student_bank"])
  assert not np.any(slopes[0]["teacher_bank"])
  assert not np.any(slopes[1])


# Through the step.

BATCH = networks.batch(
  B,
  mask=(np.arange(B) % 7 != 3).astype(np.float32),
  index=np.arange(B, dtype=np.int32) * 7 % N,
)


def goal(**kwargs):
  return objective.hinton(alpha=0.1) + [crd(**kwargs)]


def begin(terms, mesh, optimizer):
  state = init_state(
    networks.bare(), TEACHER, terms, optimizer, jax.random.key(0), BATCH,
    frozen=FROZEN,
  )  # fmt: skip
  shardings = state_shardings(terms, state, mesh)
  return jax.device_put(state, shardings), shardings


def trained(num_devices, *, steps=3, terms=None, state=None, **kwargs):
  terms = terms or goal()
  mesh = parallel.make_mesh(num_devices)
  optimizer = optax.sgd(0.1, momentum=0.9)
  first, shardings = begin(terms, mesh, optimizer)
  state = first if state is None else state
  step = jit_step(
    make_train_step(networks.bare(), TEACHER, terms, optimizer, **kwargs),
    mesh, shardings,
  )  # fmt: skip
  frozen, seen = parallel.put(FROZEN, mesh), []
  for _ in range(steps):
    state, metrics = step(state, frozen, parallel.put_batch(BATCH, mesh))
    seen.append(jax.device_get((state.term_state, metrics)))
  # Over several devices jit keeps two entries of the one program.
  assert num_devices > 1 or step._cache_size() == 1
  return state, seen


def test_step_trains_embeddings_moves_banks_and_freezes_z():
  first, _ = begin(goal(), parallel.make_mesh(1), optax.sgd(0.1))
  before = jax.device_get((first.term_params, first.term_state))
  state, seen = trained(1)
  for side in ("student", "teacher"):
    moved = state.term_params["crd"][side]["kernel"]
    assert np.any(moved != before[0]["crd"][side]["kernel"])
  here = BATCH["index"][BATCH["mask"] > 0]
  others = np.setdiff1d(np.arange(128), here)
  old = before[1]["crd"]
  for new in (s["crd"] for s, _ in seen):
    for bank in ("student_bank", "teacher_bank"):
      close(np.linalg.norm(new[bank][here], axis=1), 1)
      np.testing.assert_array_equal(new[bank][others], old[bank][others])
    np.testing.assert_array_equal(new["log_z"], seen[0][0]["crd"]["log_z"])
  assert not old["has_log_z"]
  assert seen[0][0]["crd"]["has_log_z"]
  assert seen[-1][1]["loss/crd"] < seen[0][1]["loss/crd"]


def test_any_number_of_devices_makes_the_same_run():
  one, eight = trained(1), trained(8)
  bank = eight[0].term_state["crd"]["student_bank"]
  assert bank.addressable_shards[0].data.shape == (16, E)
  for a, b in zip(one[1], eight[1]):
    jax.tree.map(functools.partial(close, atol=1e-5), a, b)


def test_no_device_gathers_the_bank():
  terms = goal(num_examples=4096, embedding=8)
  mesh, optimizer = parallel.make_mesh(8), optax.sgd(0.1)
  state, shardings = begin(terms, mesh, optimizer)
  step = jit_step(
    make_train_step(networks.bare(), TEACHER, terms, optimizer),
    mesh, shardings,
  )  # fmt: skip
  program = step.lower(
    state, parallel.put(FROZEN, mesh), parallel.put_batch(BATCH, mesh)
  ).compile()
  text = program.as_text()
  assert re.search(r"f32\[512,8\]", text)  # one device's share
  assert not re.search(r"\[(\d+,)*4096(,\d+)*\]", text)


def test_a_step_changes_the_banks_where_they_lie():
  terms = goal(num_examples=4096, embedding=8)
  mesh, optimizer = parallel.make_mesh(1), optax.sgd(0.1)
  state, shardings = begin(terms, mesh, optimizer)
  step = jit_step(
    make_train_step(networks.bare(), TEACHER, terms, optimizer),
    mesh, shardings,
  )  # fmt: skip
  program = step.lower(
    state, parallel.put(FROZEN, mesh), parallel.put_batch(BATCH, mesh)
  ).compile()
  whole = re.findall(r"= \w+\[4096,8\]\S* ([\w-]+)\(", program.as_text())
  # A compiler may write the rows one after the other.
  assert {"scatter", "dynamic-update-slice"} & set(whole)
  assert not {"copy", "broadcast", "select"} & set(whole)


def test_microbatches_remember_every_example():
  state, seen = trained(1, microbatches=2, steps=1)
  here = BATCH["index"][BATCH["mask"] > 0]
  bank = state.term_state["crd"]["student_bank"]
  close(np.linalg.norm(bank[here], axis=1), 1)
  assert np.isfinite(seen[0][1]["loss/total"])
  # Z is that of the first half.
  assert seen[0][0]["crd"]["has_log_z"]


def test_a_run_resumed_from_a_checkpoint_is_the_same_run(tmp_path):
  whole, _ = trained(8, steps=4)
  half, _ = trained(8, steps=2)
  with Checkpointer(tmp_path) as saver:
    saver.save(2, half)
    like, shardings = begin(
      goal(), parallel.make_mesh(8), optax.sgd(0.1, momentum=0.9)
    )
    restored = saver.restore(like)
  bank = restored.state.term_state["crd"]["teacher_bank"]
  assert bank.sharding == shardings.term_state["crd"]["teacher_bank"]
  again, _ = trained(8, steps=2, state=restored.state)
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get((again.params, again.term_params, again.term_state)),
    jax.device_get((whole.params, whole.term_params, whole.term_state)),
  )


def test_mistakes_are_named():
  terms, optimizer = goal(), optax.sgd(0.1)
  state, _ = begin(terms, parallel.make_mesh(1), optimizer)
  step = make_train_step(networks.bare(), TEACHER, terms, optimizer)
  batch = {k: v for k, v in BATCH.items() if k != "index"}
  with pytest.raises(UserError, match=r"'crd' keeps a row .*batch\['index'\]"):
    jax.eval_shape(step, state, FROZEN, batch)
  for wrong in (
    {"num_examples": 1}, {"embedding": 0}, {"num_negatives": 0},
    {"momentum": 1.0}, {"momentum": -0.1},
  ):  # fmt: skip
    with pytest.raises(UserError, match=f"'crd' got {next(iter(wrong))}="):
      crd(**wrong)
  with pytest.raises(UserError, match="embedding=0"):
    contrastive.info_nce("n", TAPS, weight=1.0, embedding=0)
  with pytest.raises(UserError, match=r"100 rows .* 101 .* num_examples=101"):
    contrastive.check_bank(100, 101)
  contrastive.check_bank(100, 100)
  for term in (crd(), contrastive.info_nce("nce", TAPS, weight=1.0)):
    with pytest.raises(UserError, match=f"{term.name} couple the examples"):
      pmap_step(
        make_train_step(
          networks.bare(), TEACHER, [term], optax.sgd(0.1), axis_name="data"
        )
      )


# InfoNCE.


def test_info_nce_is_its_equation_and_trains_both_embeddings():
  term = contrastive.info_nce(
    "n", TAPS, weight=1.0, embedding=E, temperature=0.2
  )
  params, state = begun(term)
  assert state == {}

  def equation(p, student):
    exists = MASK > 0
    s, t = (
      unit(embedded(p, side, x))[exists]
      for side, x in (("student", student), ("teacher", H))
    )
    scores = s @ t.T / 0.2
    parts = (np.diag(x) - np.log(np.exp(x).sum(1)) for x in (scores, scores.T))
    return -0.5 * sum(parts).mean()

  (value, new), slopes = gradients(term, params, state, S)
  assert new == {}
  close(value, equation(float64(params), S))
  check_gradients(equation, params, S, *slopes)


def test_embeddings_flatten_maps_and_begin_within_their_bound():
  term = contrastive.info_nce("n", TAPS, weight=1.0, embedding=E)
  params, _ = begun(term, np.zeros((5, 2, 2, 3)), np.zeros((5, 7)))
  for side, inputs in (("student", 12), ("teacher", 7)):
    kernel = params[side]["kernel"]
    assert kernel.shape == (inputs, E)
    for x in (kernel, params[side]["bias"]):
      assert 0.5 * inputs**-0.5 < jnp.abs(x).max() <= inputs**-0.5
  _, rows, _ = evaluated(
    term, params, {}, jnp.ones((5, 2, 2, 3), jnp.bfloat16), jnp.float32(H)
  )
  assert rows.dtype == jnp.float32


def test_temperature_may_be_scheduled():
  half = optax.linear_schedule(0.2, 0.1, 2)
  terms = [
    contrastive.info_nce("n", TAPS, weight=1.0, temperature=half),
    crd(temperature=half),
  ]
  _, seen = trained(1, terms=objective.Objective(tuple(terms)))
  assert all(np.isfinite(m["loss/total"]) for _, m in seen)
