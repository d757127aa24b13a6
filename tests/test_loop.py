"""`distill`: resuming is exact, trouble is told, mistakes come first."""

import itertools
import json
import shutil

import grain
import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest

import kdjax
from kdjax import checkpoint, memory_plan, parallel
from kdjax.errors import UserError
from kdjax.loop import DivergedError
from kdjax.objective import hinton
from kdjax.types import Output

TEACHER, FROZEN = networks.teacher()
MESH = parallel.make_mesh(1)


class Killed(BaseException):
  pass


def batches(kill_at=None, spoil_at=None):
  """An endless grain data set; one position can kill or spoil the run."""

  def make(n):
    if n == kill_at:
      raise Killed
    batch = networks.batch(16, seed=n)
    if n == spoil_at:
      batch["image"] = np.full_like(batch["image"], np.nan)
    return batch

  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return grain.MapDataset.range(1000).map(make).to_iter_dataset(options)


def run(train, **changes):
  arguments = dict(
    student=networks.bare(),
    teacher=TEACHER,
    teacher_variables=FROZEN,
    train=train,
    steps=7,
    save_every=2,
    mesh=MESH,
    quiet=True,
    terms=hinton(
      alpha=optax.linear_schedule(1.0, 0.0, 7),
      temperature=optax.linear_schedule(4.0, 1.0, 7),
    ),
    optimizer=optax.adam(optax.linear_schedule(1e-2, 0.0, 7)),
    evaluate_on=[networks.batch(16, seed=77)],
  )
  return kdjax.distill(**(arguments | changes))


def values(state):
  state = state.replace(key=jax.random.key_data(state.key))
  return jax.device_get(state)


def assert_identical(a, b):
  jax.tree.map(np.testing.assert_array_equal, values(a), values(b))


@pytest.mark.parametrize("kill_at", [1, 4, 5])
def test_killed_and_started_again_is_bit_identical(tmp_path, whole, kill_at):
  want, folder = whole
  with pytest.raises(Killed):
    run(batches(kill_at), folder=tmp_path)
  again = run(batches(), folder=tmp_path)
  assert_identical(again.state, want.state)
  assert again.metrics == want.metrics

  def logged(folder):
    path = folder / "metrics.jsonl"
    lines = [json.loads(x) for x in path.read_text().splitlines()]
    return [
      {k: v for k, v in line.items() if not k.startswith("perf/")}
      for line in lines
    ]

  assert logged(tmp_path) == logged(folder)


def test_a_finished_run_trains_no_more(tmp_path, whole):
  first, folder = whole
  shutil.copytree(folder, tmp_path / "run")
  again = run(batches(kill_at=1), folder=tmp_path / "run")
  assert_identical(again.state, first.state)
  assert again.metrics["eval/nll"] == first.metrics["eval/nll"]


def test_any_iterable_of_batches_will_do(tmp_path, whole):
  def plain():
    return (networks.batch(16, seed=n) for n in itertools.count())

  assert_identical(run(plain()).state, whole[0].state)
  run(plain(), steps=4, folder=tmp_path)
  # Without a position to go to, a resumed run reads and skips.
  assert_identical(run(plain(), folder=tmp_path).state, whole[0].state)


def test_eight_devices_train_the_same_student(whole):
  one = whole[0].state
  eight = run(batches(), mesh=parallel.make_mesh(8), microbatches=2).state
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
    jax.device_get(one.params),
    jax.device_get(eight.params),
  )


def test_a_loss_that_turns_nan_stops_and_keeps_the_last_good_checkpoint(
  tmp_path,
):
  with pytest.raises(DivergedError, match=r"loss/.* not finite at step 6"):
    run(batches(spoil_at=5), folder=tmp_path)
  steps = checkpoint.steps(tmp_path / "checkpoints")
  assert max(steps) == 4
  good = run(batches(), steps=4)
  like = good.state
  kept = checkpoint.restore(tmp_path / "checkpoints", like)
  assert kept is not None
  assert_identical(kept.state, good.state)


def test_nan_at_a_step_that_saves_is_not_saved(tmp_path):
  with pytest.raises(DivergedError, match="at step 4"):
    run(batches(spoil_at=3), folder=tmp_path)
  assert checkpoint.steps(tmp_path / "checkpoints") == [2]


def test_the_teacher_is_not_in_the_checkpoint(tmp_path):
  frozen = ({k: v + 12345 for k, v in FROZEN[0].items()}, {})
  state = run(batches(), folder=tmp_path, teacher_variables=frozen).state
  kept = checkpoint.restore(tmp_path / "checkpoints", state)
  assert kept is not None
  assert all(
    np.abs(x).max() < 12000
    for x in jax.tree.leaves(values(kept.state))
    if x.dtype == np.float32
  )


def test_resuming_with_another_teacher_is_refused(tmp_path):
  run(batches(), folder=tmp_path, steps=2)
  _, other = networks.teacher(seed=1)
  with pytest.raises(UserError, match="trained with another teacher"):
    run(batches(), folder=tmp_path, teacher_variables=other)


def test_a_damaged_checkpoint_falls_back_and_says_so(tmp_path, whole, capsys):
  shutil.copytree(whole[1], tmp_path / "run")
  newest = tmp_path / "run" / "checkpoints" / "7"
  for file in newest.rglob("*"):
    if file.is_file() and file.stat().st_size > 200:
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  again = run(batches(), folder=tmp_path / "run")
  assert "step 7 is damaged" in capsys.readouterr().err
  assert_identical(again.state, whole[0].state)


def wide(classes):
  model = networks.bare()

  def init(key, batch):
    params, stats = model.init(key, batch)
    return params | {"last": jnp.zeros((8, classes))}, stats

  return model._replace(init=init)


def nan_teacher():
  def apply(params, stats, batch, *, train, key=None, taps=()):
    return Output(jnp.full((len(batch["image"]), 5), jnp.nan)), stats

  return networks.bare()._replace(apply=apply)


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    (dict(student=wide(4)), "teacher has 5 classes, student 4"),
    (dict(teacher=nan_teacher()), "teacher's logits hold NaN"),
    (dict(terms=hinton(alpha=2.0)), "alpha is 2 at update 0"),
    (
      dict(
        terms=hinton(alpha=0.1, temperature=optax.linear_schedule(1, -1, 4))
      ),
      "temperature of 'soft' is 0 at update 2",
    ),
    (dict(microbatches=3), "must be divisible by 3 .* use 15 or 18"),
    (dict(mesh=parallel.make_mesh(3)), r"\(3 devices x 1 microbatches\)"),
    (dict(train=[]), "has no batch"),
    (dict(train=[networks.batch(16)] * 3), "ended before the last step"),
    (dict(train=[{"image": np.zeros((2, 3))}]), "needs 'mask' too"),
    (
      dict(train=[networks.batch(16, label=np.full(16, 5))]),
      "labels run from 5 to 5, the student has 5 classes",
    ),
    (dict(keep_last=0), "keep_last=0"),
    (dict(steps=0), "got steps=0"),
    (dict(save_every=0), "save_every=0"),
  ],
)
def test_mistakes_are_told_and_leave_nothing_behind(tmp_path, changes, says):
  folder = tmp_path / "run"
  with pytest.raises(UserError, match=says):
    run(**({"train": batches(), "folder": folder} | changes))
  if "ended" not in says:
    assert not folder.exists()


def test_distilling_without_settings_learns():
  result = kdjax.distill(
    student=networks.bare(),
    teacher=TEACHER,
    teacher_variables=FROZEN,
    train=batches(),
    steps=60,
    quiet=True,
    mesh=MESH,
    evaluate_on=[networks.batch(64, seed=500)],
  )
  untrained = run(batches(), steps=1).metrics
  assert result.metrics["eval/kl"] < untrained["eval/kl"]
  params, stats = result.variables
  assert set(params) == {"first", "last"}
  assert stats == {}


def told(capfd):
  return [
    line for line in capfd.readouterr().err.splitlines() if "takes" in line
  ]


def test_memory_is_told_before_the_first_step(capfd):
  run(batches(), quiet=False)
  (line,) = told(capfd)
  assert "on each of 1 cpu device(s): " in line
  assert "teacher" in line


def test_a_step_that_does_not_fit_is_refused(monkeypatch, tmp_path):
  """As on a device that says that it has 1 KiB."""
  planned = memory_plan.plan

  def plan(*arguments):
    return planned(*arguments)._replace(limit=1024, reported=True)

  monkeypatch.setattr(memory_plan, "plan", plan)
  with pytest.raises(UserError, match=r"a step takes .* has 1.0 KiB: change"):
    run(batches(), folder=tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_the_memory_plan_lies_in_the_folder(tmp_path):
  run(batches(), folder=tmp_path / "run")
  told = json.loads((tmp_path / "run" / "memory.json").read_text())
  parts = ("student", "optimizer", "teacher", "batch", "temporary")
  assert all(told[part] > 0 for part in parts)
  assert told["total"] > sum(told[part] for part in parts)
  # The student's float32 parameters, of which adam's moments are two more.
  assert told["student"] < told["optimizer"] / 1.9


def test_memory_that_is_short_is_a_table(monkeypatch, capfd):
  planned = memory_plan.plan

  def plan(*arguments):
    return planned(*arguments)._replace(limit=1024)

  monkeypatch.setattr(memory_plan, "plan", plan)
  run(batches(), quiet=False)
  shown = capfd.readouterr().err
  assert "memory of each of 1 x cpu" in shown
  assert "it does not fit:" in shown
  assert "head" in shown
