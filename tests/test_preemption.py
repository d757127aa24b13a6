"""SIGTERM stops a run after a checkpoint; the same call then goes on."""

import itertools
import json
import os
import signal

import networks
import pytest
from test_loop import assert_identical, batches, run

from kdjax import checkpoint, loop, memory_plan, preemption, train
from kdjax.loop import DivergedError
from kdjax.preemption import Preempted
from kdjax.save_clock import SaveClock


def stop():
  os.kill(os.getpid(), signal.SIGTERM)


def stopping(at, **changes):
  """Batches, the one with this number comes with a SIGTERM."""
  for n, batch in enumerate(batches(**changes)):
    if n == at:
      stop()
    yield batch


def steps(folder):
  return checkpoint.steps(folder / "checkpoints")


def written(folder):
  """The metrics, but for how fast the steps were."""
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if not k.startswith("perf/")}
    for line in lines
  ]


def test_it_saves_and_the_same_call_goes_on(tmp_path, whole):
  folder = tmp_path / "stopped"
  before = signal.getsignal(signal.SIGTERM)
  # The batch of step 5 is read when the question of that step was answered.
  with pytest.raises(Preempted, match="SIGTERM at step 5, which is saved"):
    run(stopping(at=4), folder=folder)
  assert signal.getsignal(signal.SIGTERM) is before
  assert steps(folder)[-1] == 5
  again = run(batches(), folder=folder)
  assert_identical(again.state, whole[0].state)
  assert again.metrics == whole[0].metrics
  assert written(folder) == written(whole[1])


def test_during_an_evaluation(tmp_path, whole):
  """Which ends, and the checkpoint has its metric."""
  evaluations = itertools.count()

  class Evaluated:
    def __iter__(self):
      if next(evaluations) == 1:
        stop()
      yield networks.batch(16, seed=77)

  folder = tmp_path / "stopped"
  with pytest.raises(Preempted, match="at step 4, which is saved"):
    run(batches(), folder=folder, evaluate_on=Evaluated())
  assert steps(folder) == [2, 4]
  again = run(batches(), folder=folder)
  assert_identical(again.state, whole[0].state)


def test_before_the_first_step(tmp_path, monkeypatch):
  planned = memory_plan.plan

  def plan(*arguments):
    stop()
    return planned(*arguments)

  monkeypatch.setattr(memory_plan, "plan", plan)
  with pytest.raises(Preempted, match="at step 0, where there is nothing"):
    run(batches(), folder=tmp_path)
  assert steps(tmp_path) == []
  monkeypatch.undo()
  run(batches(), folder=tmp_path, steps=2)
  monkeypatch.setattr(memory_plan, "plan", plan)
  with pytest.raises(Preempted, match="at step 2, which is saved"):
    run(batches(), folder=tmp_path)
  assert steps(tmp_path) == [2]


def test_what_is_not_finite_is_not_saved(tmp_path):
  with pytest.raises(DivergedError, match="at step 5"):
    run(stopping(at=4, spoil_at=4), folder=tmp_path)
  assert steps(tmp_path) == [2, 4]


def test_without_a_folder():
  with pytest.raises(Preempted, match="no folder"):
    run(stopping(at=1))


def test_the_command_exits_with_143(monkeypatch, capsys):
  def preempted(*_):
    raise Preempted("stopped by SIGTERM at step 7, which is saved")

  monkeypatch.setattr(train, "_run", preempted)
  assert train.main(["kdjax.train", "--config=x"]) == 143
  assert capsys.readouterr().err == (
    "kdjax: stopped by SIGTERM at step 7, which is saved\n"
  )


def test_each_question_is_asked_of_jax_once_in_a_process(monkeypatch):
  """Over all phases: JAX's service takes no number twice."""
  asked = []
  monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
  monkeypatch.setattr(
    preemption.multihost_utils,
    "reached_preemption_sync_point",
    lambda number: asked.append(number) or len(asked) == 5,
  )
  answers = []
  for _ in range(2):
    with preemption.watched() as told:
      answers += [told(), told(), told()]
  assert answers == [False] * 4 + [True, False]
  assert asked == list(range(asked[0], asked[0] + 6))


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
  """Every 3 s, a step taking 1 s: after 3, and not after 6, since 5 was."""
  saved = []
  save = checkpoint.Checkpointer.save

  def spy(self, step, *arguments, **keywords):
    saved.append((step, keywords["metrics"] is not None))
    save(self, step, *arguments, **keywords)

  class Slow(SaveClock):
    def __init__(self, minutes):
      super().__init__(minutes, clock=lambda: self.now)

    now = 0

    def due(self):
      self.now += 1
      return super().due()

  monkeypatch.setattr(loop, "SaveClock", Slow)
  monkeypatch.setattr(checkpoint.Checkpointer, "save", spy)
  whole = run(batches(), save_every=5)
  result = run(batches(), save_every=5, save_minutes=0.05, folder=tmp_path)
  assert saved == [(3, False), (5, True), (7, True)]
  assert_identical(result.state, whole.state)
