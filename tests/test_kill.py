"""kill -9 at random moments of every phase, then the same final parameters.

`KDJAX_KILLS` sets how often (`.ci/full`: 20).
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
KILLS = int(os.environ.get("KDJAX_KILLS", "4"))
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


def kill_at(workdir, data_dir, phase, step, pause):
  """Runs until `phase` is at `step` and a little longer, then kills."""
  process = start(workdir, data_dir)
  deadline = time.monotonic() + 300
  while reached(workdir, phase) < step and process.poll() is None:
    assert time.monotonic() < deadline
    time.sleep(0.005)
  time.sleep(pause)
  was_running = process.poll() is None
  process.send_signal(signal.SIGKILL)
  process.communicate()
  return was_running


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
  moments = sorted(
    (PHASES.index(phase), draw.randint(1, STEPS), draw.uniform(0, 0.3))
    for phase in (
      PHASES[n * len(PHASES) // KILLS]
      if len(PHASES) > KILLS
      else PHASES[n % len(PHASES)]
      for n in range(KILLS)
    )
  )
  hit = sum(
    kill_at(killed, data_dir, PHASES[phase], step, pause)
    for phase, step, pause in moments
  )
  assert hit >= KILLS - 1  # the last pause may outlast the run
  finish(killed, data_dir)
  assert final_parameters(killed) == want
  assert (killed / "results.json").read_text() == (
    whole / "results.json"
  ).read_text()
