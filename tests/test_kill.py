"""kill -9 at random moments of every phase, then the same final parameters.

`KDJAX_KILLS` sets how often (`.ci/full`: 50). Every other kill waits until a
checkpoint is being written. Another test sends SIGTERM.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorstore as ts

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.alone
KILLS = int(os.environ.get("KDJAX_KILLS", "5"))
STEPS, SEEDS = 40, 2
PHASES = [
  f"seed_{seed}/{network}"
  for seed in range(SEEDS)
  for network in ("teacher", "student_alone", "student_distilled")
]


def command(workdir, data_dir):
  changes = {
    "seeds": SEEDS,
    "save_every": 7,
    "data.data_dir": data_dir,
    **{
      f"phases.{phase}.{key}": STEPS
      for phase in ("teacher", "alone", "distilled")
      for key in ("steps", "optimizer.learning_rate.decay_steps")
    },
  }
  return [
    sys.executable,
    "-m",
    "kdjax.train",
    f"--config={ROOT / 'configs' / 'digits.py'}:smoke",
    f"--workdir={workdir}",
    *(f"--config.{key}={value}" for key, value in changes.items()),
  ]


def start(workdir, data_dir):
  return subprocess.Popen(
    command(workdir, data_dir),
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(workdir, data_dir):
  process = start(workdir, data_dir)
  _, error = process.communicate(timeout=600)
  assert process.returncode == 0, error[-3000:]


def reached(workdir, phase):
  """The updates that a phase has logged so far."""
  path = workdir / phase / "metrics.jsonl"
  return path.read_text().count("loss/total") if path.exists() else 0


def half_written(workdir, phase):
  """Whether a checkpoint of the phase is being written at this moment."""
  return any((workdir / phase / "checkpoints").glob("*checkpoint-tmp*"))


def stop_at(workdir, data_dir, moment, how=signal.SIGKILL):
  """Runs until a moment, then sends the signal.

  Returns:
    Whether it was running, whether in the midst of a save, its exit code, and
    what it said.
  """
  process = start(workdir, data_dir)
  deadline = time.monotonic() + 300
  phase = PHASES[moment["phase"]]
  while reached(workdir, phase) < moment["step"] and process.poll() is None:
    assert time.monotonic() < deadline
    time.sleep(0.005)
  # A save may be over before it is seen, and none may come: not for long.
  until = time.monotonic() + 2
  while (
    moment["in_save"]
    and not half_written(workdir, phase)
    and process.poll() is None
    and time.monotonic() < until
  ):
    time.sleep(0.0005)
  time.sleep(moment["pause"])
  running, saving = process.poll() is None, half_written(workdir, phase)
  process.send_signal(how)
  _, error = process.communicate(timeout=120)
  return running, running and saving, process.returncode, error


def final_parameters(workdir):
  """{phase: {name: bytes}} of the last checkpoint, read without kdjax."""
  found = {}
  for phase in PHASES:
    folder = workdir / phase / "checkpoints" / str(STEPS) / "state"
    kvstore = {"driver": "ocdbt", "base": f"file://{folder}"}
    store = ts.KvStore.open(kvstore).result()
    keys = [k.decode() for k in store.list().result()]
    names = sorted(
      k.removesuffix("/.zarray") for k in keys if k.endswith(".zarray")
    )
    found[phase] = {
      name: ts.open(
        {"driver": "zarr", "kvstore": {**kvstore, "path": name}}, open=True
      )
      .result()
      .read()
      .result()
      .tobytes()
      for name in names
    }
    assert any("params" in name for name in names)
  return found


@pytest.mark.slow
def test_killed_anywhere_ends_with_the_same_parameters(tmp_path):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  data_dir = tmp_path / "data"
  finish(whole, data_dir)
  want = final_parameters(whole)
  draw = random.Random(0)
  moments = [
    {
      "phase": n * len(PHASES) // KILLS,
      "step": draw.randint(1, STEPS),
      "in_save": n % 2 == 0,
      # A save takes some tenths of a second here.
      "pause": draw.uniform(0, 0.05 if n % 2 == 0 else 0.3),
    }
    for n in range(KILLS)
  ]
  moments.sort(key=lambda moment: (moment["phase"], moment["step"]))
  stops = [stop_at(killed, data_dir, moment) for moment in moments]
  hit = sum(running for running, *_ in stops)
  in_save = sum(saving for _, saving, *_ in stops)
  print(f"{hit} of {KILLS} kills hit a run, {in_save} of them in mid-save")
  assert hit >= KILLS - 1  # the last pause may outlast the run
  assert in_save >= KILLS // 5
  finish(killed, data_dir)
  assert final_parameters(killed) == want
  assert (killed / "results.json").read_text() == (
    whole / "results.json"
  ).read_text()


@pytest.mark.slow
def test_sigterm_saves_says_so_and_the_same_command_goes_on(tmp_path):
  data_dir = tmp_path / "data"
  moment = {"phase": 1, "step": 10, "in_save": False, "pause": 0}
  running, _, code, error = stop_at(
    tmp_path / "run", data_dir, moment, signal.SIGTERM
  )
  assert running
  assert code == 143
  (line,) = [text for text in error.splitlines() if "SIGTERM" in text]
  folder = tmp_path / "run" / PHASES[1] / "checkpoints"
  newest = max(int(path.name) for path in folder.iterdir())
  assert line == (
    f"kdjax: alone (seed 0): stopped by SIGTERM at step {newest}, which is "
    "saved; the same command goes on from here"
  )
  finish(tmp_path / "run", data_dir)
  assert (tmp_path / "run" / "results.json").exists()
