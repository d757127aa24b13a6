"""A bad update changes nothing, is told of, and too many end the run."""

import json
import math

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
from test_loop import batches, run, values

import kdjax
from kdjax import health, parallel
from kdjax.adapters import from_nnx
from kdjax.errors import UserError
from kdjax.health import DivergedError
from kdjax.losses import cross_entropy, kl
from kdjax.objective import Objective, Term, hinton
from kdjax.train_step import (
  init_state,
  jit_step,
  make_train_step,
  pmap_step,
)

TEACHER, FROZEN = networks.teacher()
MESH = parallel.make_mesh(1)
OPTIMIZER = health.guarded(
  optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optax.linear_schedule(1e-2, 1e-3, 9)),
  )
)


def spoiled(size=16, seed=0, value=np.nan):
  batch = networks.batch(size, seed)
  batch["image"][3, 1] = value
  return batch


def normed():
  """With batch statistics and dropout, whose key lies in the statistics."""
  return from_nnx(lambda rngs: networks.NnxNet(rngs, norm=True, dropout=0.3))


def raw(state):
  """Every bit, the sign of a zero too."""
  return [
    (jax.tree_util.keystr(path), np.asarray(x).tobytes())
    for path, x in jax.tree_util.tree_leaves_with_path(values(state))
  ]


def without_counts(state):
  return raw(state.replace(opt_state=state.opt_state.inner_state))


def begin(student, optimizer=OPTIMIZER, terms=None, **more):
  terms = terms or hinton(alpha=0.3, temperature=2.0)
  arguments = student, TEACHER, terms, optimizer
  batch = networks.batch(16)
  state = init_state(*arguments, jax.random.key(0), batch, frozen=FROZEN)
  return state, make_train_step(*arguments, **more)


@pytest.mark.parametrize(
  ("value", "more"),
  [
    (np.inf, {}),
    (np.nan, {"microbatches": 4, "gradients_by_group": True}),
  ],
)
def test_a_bad_update_changes_not_one_bit(value, more):
  state, step = begin(normed(), **more)
  # -0 + 0 is +0: an update of zeros would show.
  state = state.replace(params=jax.tree.map(lambda x: -0.0 * x, state.params))
  step = jax.jit(step)
  good, told = step(state, FROZEN, networks.batch(16))
  assert (told["skipped"], told["skipped_in_a_row"]) == (0, 0)
  assert without_counts(good) != without_counts(state)
  for before in (state, good):
    after, told = step(before, FROZEN, spoiled(value=value))
    assert told["skipped"] == 1
    assert not math.isfinite(told["loss/total"])
    assert without_counts(after) == without_counts(before)
    again, told = step(after, FROZEN, spoiled(value=value))
    assert told["skipped_in_a_row"] == 2
    assert int(again.opt_state.total_notfinite) == 2
    assert without_counts(again) == without_counts(before)
    # And the next sound one is as if nothing had been.
    assert without_counts(
      step(again, FROZEN, networks.batch(16))[0]
    ) == without_counts(step(before, FROZEN, networks.batch(16))[0])


def test_what_terms_own_is_left_alone():
  """CRD's banks and projectors, of which every update writes a row."""
  from kdjax.terms import TERMS

  taps = "hidden", "hidden"
  sizes = dict(num_examples=64, num_negatives=4, embedding=4)
  term = TERMS["crd"]("crd", taps, weight=1.0, **sizes)
  goal = Objective((Term("hard", cross_entropy, group="hard"), term))
  batch = networks.batch(16, index=np.arange(16))
  bad = spoiled() | {"index": np.arange(16)}
  arguments = networks.bare(), TEACHER, goal, OPTIMIZER
  state = init_state(*arguments, jax.random.key(0), batch, frozen=FROZEN)
  assert state.term_params["crd"]
  assert state.term_state["crd"]
  step = jax.jit(make_train_step(*arguments))
  good, _ = step(state, FROZEN, batch)
  after, told = step(good, FROZEN, bad)
  assert told["skipped"] == 1
  assert without_counts(after) == without_counts(good)
  assert without_counts(good) != without_counts(state)


def test_a_bad_loss_beside_finite_gradients_is_skipped_too():
  """As "stop" stops at it: optax, which sees gradients alone, would not."""

  def constant(student, teacher):
    return jnp.zeros(student.shape[:-1]) + jax.lax.stop_gradient(
      jnp.where(teacher[..., 0] < 1e9, jnp.inf, 0.0)
    )

  constant.traits = kl.traits
  goal = Objective(
    (
      Term("hard", cross_entropy, group="hard"),
      Term("odd", constant, group="soft"),
    )
  )
  state, step = begin(networks.bare(), terms=goal)
  after, told = jax.jit(step)(state, FROZEN, networks.batch(16))
  assert np.isfinite(told["grad_norm"])
  assert told["skipped"] == 1
  assert without_counts(after) == without_counts(state)


def test_all_devices_agree_under_pmap():
  """One device's rows are bad, and none updates."""
  state, step = begin(networks.bare(), axis_name="data")
  whole = parallel.pmap_replicate(state, 4)
  frozen = parallel.pmap_replicate(FROZEN, 4)
  step = pmap_step(step)
  before = raw(whole.replace(opt_state=whole.opt_state.inner_state))
  after, told = step(whole, frozen, parallel.pmap_split(spoiled(), 4))
  assert told["skipped"].tolist() == [1] * 4
  assert without_counts(after) == before
  good, told = step(after, frozen, parallel.pmap_split(networks.batch(16), 4))
  assert told["skipped"].tolist() == [0] * 4
  assert good.step.tolist() == [1] * 4


def test_over_a_mesh_as_on_one_device():
  mesh = parallel.make_mesh(8)
  state, step = begin(normed())
  one = jax.jit(step)(state, FROZEN, networks.batch(16))[0]
  put = parallel.put((state, FROZEN), mesh)
  run_step = jit_step(step, mesh)
  good, _ = run_step(*put, parallel.put_batch(networks.batch(16), mesh))
  kept = without_counts(good)
  bad, told = run_step(good, put[1], parallel.put_batch(spoiled(), mesh))
  assert told["skipped"] == 1
  assert without_counts(bad) == kept
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
    jax.device_get(one.params),
    jax.device_get(bad.params),
  )


def test_an_optimizer_that_is_not_guarded_compiles_no_guard():
  def text(optimizer):
    state, step = begin(networks.bare(), optimizer)
    return jax.jit(step).lower(state, FROZEN, networks.batch(16)).as_text()

  assert "is_finite" not in text(optax.sgd(0.1))
  assert "is_finite" in text(health.guarded(optax.sgd(0.1)))


def logged(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_a_run_skips_and_goes_on_with_the_next_batch(tmp_path, capfd):
  """As a run from which the bad batch was taken out."""
  result = run(batches(spoil_at=3), on_nan="skip", folder=tmp_path, quiet=False)
  assert int(result.state.step) == 6
  without = (networks.batch(16, seed=n) for n in range(7) if n != 3)
  clean = run(without, steps=6, on_nan="skip")
  assert without_counts(result.state) == without_counts(clean.state)
  lines = {x["step"]: x for x in logged(tmp_path) if "loss/total" in x}
  assert [lines[n]["skipped"] for n in range(1, 8)] == [0, 0, 0, 1, 0, 0, 0]
  assert lines[4]["loss/total"] is None
  shown = capfd.readouterr().err
  assert "not finite at step 4: skipped (1 in a row)" in shown


@pytest.mark.parametrize("killed_after", [3, 4])
def test_resuming_around_a_skipped_step_is_exact(tmp_path, killed_after):
  """The step after a restart is the checkpoint's, not the count of updates."""
  whole = run(batches(spoil_at=3), on_nan="skip")
  given = dict(on_nan="skip", folder=tmp_path, save_every=1)
  run(batches(spoil_at=3), steps=killed_after, **given)
  again = run(batches(spoil_at=3), **given)
  assert raw(again.state) == raw(whole.state)
  steps = [x["step"] for x in logged(tmp_path) if "loss/total" in x]
  assert steps == list(range(1, 8))


def test_too_many_in_a_row_stop_also_over_a_restart(monkeypatch, tmp_path):
  monkeypatch.setattr(health, "MAX_IN_A_ROW", 3)

  def train():
    for n in range(9):
      yield spoiled() if n >= 2 else networks.batch(16, seed=n)

  given = dict(on_nan="skip", folder=tmp_path)
  run(train(), steps=4, **given)
  with pytest.raises(DivergedError, match=r"step 5, the last of 3 .* skipped"):
    run(train(), **given)


def test_an_evaluation_that_is_not_finite_is_not_skipped():
  with pytest.raises(DivergedError, match="eval/nll, eval/kl not finite"):
    health.judge(2, {"eval/nll": math.nan, "eval/kl": math.nan}, "skip")


def test_who_wraps_an_optimizer_himself_is_stopped_as_asked():
  values = {"grad_norm": math.nan, "skipped": 1.0, "skipped_in_a_row": 1.0}
  assert "skipped (1 in a row)" in str(health.judge(3, values, "skip"))
  with pytest.raises(DivergedError, match="grad_norm not finite at step 3"):
    health.judge(3, values, "stop")


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    (dict(on_nan="maybe"), "unknown on_nan 'maybe': known: skip, stop"),
    (dict(profile=-1), "profile is -1, must be at least 0"),
    (dict(hang_minutes=-0.5), "hang_minutes is -0.5, must be at least 0"),
    (dict(profile=2), "profile is 2 and there is no folder"),
  ],
)
def test_mistakes_are_one_line(changes, says):
  with pytest.raises(UserError, match=says) as caught:
    run(batches(), **changes)
  assert "\n" not in str(caught.value)


def test_a_leap_is_told_once_a_window():
  draw = np.random.default_rng(0)
  spikes = health.Spikes(window=20, deviations=6.0)
  calm = [1.0 + 0.1 * x for x in draw.uniform(-1, 1, 200)]
  told = {}
  for step, loss in enumerate(calm):
    loss = {10: 3.0, 50: 3.0, 52: 99.0, 120: 3.0}.get(step, loss)
    told[step] = spikes(step, loss)
  # At 10 the window was not full; 52 is within a window of 50.
  assert [n for n, line in told.items() if line] == [50, 120]
  assert str(told[50]).startswith("step 50: loss/total 3 leaps from 1")


@pytest.mark.parametrize(("loss", "leaps"), [(5.9, False), (6.1, True)])
def test_the_limit_is_mean_plus_deviations(loss, leaps):
  """Of 0 and 2 in turn: mean 1, sd 1."""
  spikes = health.Spikes(window=10, deviations=5.0)
  for step in range(10):
    spikes(step, 2.0 * (step % 2))
  assert spikes(10, math.nan) is None
  assert (spikes(11, loss) is not None) == leaps


def test_of_losses_that_are_not_finite_none_is_remembered():
  spikes = health.Spikes(window=4, deviations=3.0)
  for step in range(8):
    assert spikes(step, math.inf if step % 2 else 1.0 + step / 100) is None
  assert spikes(9, 2.0)


def test_a_leap_in_a_run_is_noted(capfd):
  def train():
    for n in range(130):
      batch = networks.batch(16, seed=0)
      if n == 120:
        batch["image"] = batch["image"] * 300
      yield batch

  kdjax.distill(
    student=networks.bare(),
    train=train(),
    steps=130,
    mesh=MESH,
    optimizer=optax.sgd(1e-4),
  )
  shown = capfd.readouterr().err
  assert shown.count("leaps from") == 1
  assert "step 121: loss/total" in shown
