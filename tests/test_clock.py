"""Times are told apart, adding up to the wall; a stuck run says where it is."""

import json
import math
import subprocess
import sys
from pathlib import Path

import networks
import pytest
from test_loop import Killed, batches, run

from kdjax import goodput, watchdog
from kdjax.clock import Clock
from kdjax.perf import Meter
from kdjax.watchdog import Watchdog

ROOT = Path(__file__).parents[1]


class Time:
  """A clock's hands, moved by hand."""

  def __init__(self, at=100.0):
    self.at = at

  def __call__(self):
    return self.at

  def passes(self, seconds):
    self.at += seconds


def a_run(time):
  """2 s of setup; two steps of 1 s each after 0.5 s of input; 3 s saving."""
  clock = Clock(time)
  time.passes(2)
  with clock.at("steps"):
    for _ in range(2):
      with clock.at("input"):
        time.passes(0.5)
      time.passes(1)
      clock.tick()
    with clock.at("saving"):
      time.passes(3)
  return clock


def test_times_are_told_apart_and_add_up():
  time = Time()
  clock = a_run(time)
  time.passes(4)
  assert clock.read() == {
    "setup": 6.0,
    "steps": 2.0,
    "input": 1.0,
    "saving": 3.0,
  }
  assert sum(clock.read().values()) == time.at - 100


def test_overdue_is_what_should_move():
  time = Time()
  clock = Clock(time)
  time.passes(1000)
  assert clock.overdue() is None
  with clock.at("steps"):
    assert clock.overdue() == (0.0, 0.0)
    time.passes(5)
    clock.tick()
    with clock.at("evaluation"):
      time.passes(500)
      assert clock.overdue() == (500.0, 5.0)
      for _ in clock.signs("ab"):
        assert clock.overdue() == (0.0, 5.0)
        time.passes(50)
    # What the evaluation took is not held against the step after it.
    assert clock.overdue() == (0.0, 5.0)
    with clock.at("input"):
      time.passes(7)
      assert clock.overdue() == (7.0, 5.0)
    assert clock.overdue() == (7.0, 5.0)
    clock.tick()  # of 7 s
    assert clock.overdue() == (0.0, 6.0)


def test_one_note_for_one_stall(monkeypatch):
  monkeypatch.setattr(watchdog, "FLOOR", 10.0)
  monkeypatch.setattr(watchdog, "TIMES", 4.0)
  time, notes, left = Time(), [], []
  clock = Clock(time)
  dog = Watchdog(clock, notes.append, hang_minutes=1.0, leave=left.append)
  with clock.at("steps"):
    time.passes(3)
    clock.tick()
    for seconds, expected in ((11, 0), (1.5, 1), (1, 1)):
      time.passes(seconds)  # 4 times the median of 3 s, more than the floor
      dog.look()
      assert len(notes) == expected
    clock.tick()
    time.passes(40)
    dog.look()
    assert len(notes) == 2
    assert not left
    time.passes(21)
    dog.look()
    assert left == [watchdog.EXIT_CODE]
  assert "no step has ended for 12 s (median step 3 s), at steps" in notes[0]
  assert "test_one_note_for_one_stall" in notes[0]


@pytest.mark.parametrize("what", ["evaluation", "saving"])
def test_what_takes_longer_than_a_step_must_move_too(what):
  time, notes, left = Time(), [], []
  clock = Clock(time)
  dog = Watchdog(clock, notes.append, hang_minutes=10, leave=left.append)
  with clock.at("steps"):
    time.passes(590)
    with clock.at(what):  # what went before is not held against it
      time.passes(590)
      dog.look()
      for _ in clock.signs(range(3)):
        time.passes(590)
        dog.look()
      assert not left
      time.passes(11)
      dog.look()
  assert not notes
  assert left == [watchdog.EXIT_CODE]


STUCK = """
import sys, threading
sys.path[:0] = ["tests", "."]
import networks
import kdjax
from kdjax import parallel, watchdog

watchdog.FLOOR = 0.3

where, folder, minutes = sys.argv[1], sys.argv[2], float(sys.argv[3])

def train():
  for n in range(9):
    if n == 4 and where == "input":
      stuck_for_ever()
    yield networks.batch(16, seed=n)

class HeldOut:
  times = 0
  def __iter__(self):
    self.times += 1
    if self.times == 3:
      stuck_for_ever()
    for _ in range(8):  # in all longer than hang_minutes
      threading.Event().wait(1)
      yield networks.batch(16, seed=77)

def save(self, step, *given, save=kdjax.checkpoint.Checkpointer.save, **more):
  if step == 6:
    stuck_for_ever()
  return save(self, step, *given, **more)

if where == "saving":
  kdjax.checkpoint.Checkpointer.save = save

def stuck_for_ever():
  threading.Event().wait()

kdjax.distill(
  student=networks.bare(),
  train=train(),
  evaluate_on=HeldOut() if where == "evaluation" else None,
  steps=9,
  mesh=parallel.make_mesh(1),
  hang_minutes=minutes,
  folder=folder,
  save_every=2,
)
"""


def stuck(where, folder, minutes):
  done = subprocess.run(
    [sys.executable, "-c", STUCK, where, folder, str(minutes)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == watchdog.EXIT_CODE == 76, done.stderr
  assert "in stuck_for_ever" in done.stderr
  assert f"(hang_minutes is {minutes}): this process ends" in done.stderr
  assert (folder / "checkpoints" / "4").is_dir()
  return done.stderr


@pytest.mark.slow
def test_a_stuck_process_says_where_and_ends(tmp_path):
  said = stuck("input", tmp_path / "run", 0.03)
  assert said.count("the host is here") == 1
  assert "no step has ended for" in said


@pytest.mark.slow
@pytest.mark.parametrize(
  ("where", "told"),
  [
    ("evaluation", "no batch of the evaluation has come for"),
    ("saving", "no save has ended for"),
  ],
)
def test_a_stuck_evaluation_or_save_ends_the_process(tmp_path, where, told):
  assert told in stuck(where, tmp_path / "run", 0.1)


def test_a_run_that_moves_is_left_alone(monkeypatch, capfd):
  """The first compilation takes longer than the note's limit."""
  monkeypatch.setattr(watchdog, "FLOOR", 0.2)
  monkeypatch.setattr(watchdog, "TIMES", 1e9)
  held_out = [networks.batch(16, seed=77)]
  run(batches(), evaluate_on=held_out, quiet=False, hang_minutes=1, steps=2)
  assert "no step" not in capfd.readouterr().err


def test_figures_of_the_steps_since_the_last():
  time = Time()

  class Device:
    process_index, device_kind = 0, "TPU v4"

    def memory_stats(self):
      return {"peak_bytes_in_use": 3 * 2**29}

  clock = Clock(time)
  meter = Meter(clock, 32, [Device(), Device()], of_step=55e12)
  assert meter.read() == {}
  with clock.at("steps"):
    for _ in range(2):
      with clock.at("input"):
        time.passes(0.25)
      time.passes(0.75)
      clock.tick()
    with clock.at("saving"):
      time.passes(9)
    # 55 TFLOP a second of 2 · 275.
    assert meter.read() == {
      "perf/steps_per_second": 1.0,
      "perf/examples_per_second": 32.0,
      "perf/input_wait": 0.25,
      "perf/memory_gib": 1.5,
      "perf/mfu": pytest.approx(0.1),
    }
    time.passes(2)
    clock.tick()
    assert meter.read()["perf/steps_per_second"] == 0.5


def test_goodput_over_two_starts():
  time = Time()
  clock = a_run(time)
  first = goodput.account(clock, {}, now=1008.0)
  assert first["goodput"] == 2 / 8
  assert first["first_start"] == 1000
  second = goodput.account(a_run(Time()), first, now=1040.0)
  assert second["goodput"] == 4 / 16
  assert second["goodput_elapsed"] == 4 / 40
  assert (second["starts"], second["steps"]) == (2, 4)
  assert second["seconds"]["saving"] == 6
  assert goodput.line(second) == (
    "goodput 25.0% of 16.0 s over 2 starts (saving 6.0, setup 4.0, steps 4.0, "
    "input 2.0 s)"
  )


def test_a_run_writes_its_goodput_and_adds_to_it(tmp_path, capfd):
  with pytest.raises(Killed):
    run(batches(kill_at=5), folder=tmp_path)
  path = tmp_path / "goodput.json"
  assert json.loads(path.read_text())["steps"] == 4  # until the last save
  run(batches(), folder=tmp_path, quiet=False)
  found = json.loads(path.read_text())
  assert (found["starts"], found["steps"]) == (2, 7)
  parts = {"setup", "restoring", "compilation", "steps", "input"}
  assert set(found["seconds"]) == parts | {"evaluation", "saving"}
  assert math.isclose(sum(found["seconds"].values()), found["wall_seconds"])
  assert "distilling: goodput " in capfd.readouterr().err
  run(batches(), folder=tmp_path)  # finished: adds nothing
  assert json.loads(path.read_text()) == found


def test_a_damaged_account_starts_anew(tmp_path):
  (tmp_path / "goodput.json").write_text('{"goodput": 0.')
  goodput.Goodput(Clock(), tmp_path).write()
  assert json.loads((tmp_path / "goodput.json").read_text())["starts"] == 1


def test_figures_are_written_every_few_steps(tmp_path):
  run(batches(), steps=21, save_every=21, folder=tmp_path)
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  with_figures = [
    x["step"] for x in map(json.loads, lines) if "perf/input_wait" in x
  ]
  assert with_figures == [10, 20, 21]
  assert "perf/mfu" not in lines[-2]  # no peak is known for a CPU


def test_a_trace_is_written_where_tensorboard_looks(tmp_path, capfd):
  run(
    batches(),
    profile=2,
    folder=tmp_path,
    quiet=False,
    evaluate_on=None,
    save_every=9,
  )
  (trace,) = (tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb")
  assert trace.stat().st_size > 1000
  assert "steps 4 to 5 are traced" in capfd.readouterr().err
  # Three steps in all, three asked for: there is no time to warm up.
  run(batches(), profile=3, steps=3, folder=tmp_path / "b", quiet=False)
  assert "steps 1 to 3 are traced" in capfd.readouterr().err
