"""Whole runs of several processes: the same numbers, and refused as one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kdjax import launch

ROOT = Path(__file__).parents[2]
WORKER = str(ROOT / "tests" / "processes" / "worker.py")
STEPS = 12  # the worker's
pytestmark = pytest.mark.alone


def launched(command, processes, devices=2):
  """The launcher in a process of its own, as from a terminal."""
  call = (
    "import json, sys; from kdjax import launch; "
    "sys.exit(launch.launch(*json.loads(sys.argv[1])))"
  )
  return subprocess.Popen(
    [sys.executable, "-c", call, json.dumps([command, processes, devices])],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def worker(task, out):
  return [sys.executable, WORKER, task, f"--out={out}"]


def reach(out, count, launcher):
  until = time.monotonic() + 120
  while not all((out / f"step_{n}").exists() for n in range(count)):
    assert launcher.poll() is None
    assert time.monotonic() < until
    time.sleep(0.05)


@pytest.mark.slow
def test_one_two_and_four_processes_learn_the_same(tmp_path):
  """However many there are, and however the parameters lie over them."""
  curves, orders = {}, {}
  for count, task in ((1, "curve"), (2, "curve"), (4, "curve"), (4, "split")):
    out = tmp_path / f"{task}_{count}"
    out.mkdir()
    launcher = launched(worker(task, out), count)
    _, said = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, said
    # Process 0 alone prints, and writes each step once.
    assert said.count("to step 12 on") == 1
    lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    curves[task, count] = [timeless(json.loads(line)) for line in lines]
    assert len(lines) == STEPS + 2
    # Two who write one file may leave it as if there were one.
    assert len(list((out / "run" / "tensorboard").iterdir())) == 1
    parts = [json.loads((out / f"order_{n}").read_text()) for n in range(count)]
    if task == "split":
      # Two processes hold the same rows, and other parts of the parameters.
      assert parts[0] == parts[1]
      assert parts[2] == parts[3]
      parts = parts[::2]
    orders[task, count] = [
      [[x for part in parts for x in part[step][k]] for k in (0, 1)]
      for step in range(STEPS)
    ]
  alone = "curve", 1
  for other in set(curves) - {alone}:
    # Numbers of the examples and digests of their augmented pixels.
    assert orders[other] == orders[alone]
    for ours, theirs in zip(curves[other], curves[alone], strict=True):
      assert ours.keys() == theirs.keys()
      # Sums over 2, 4 and 8 devices are rounded in another order. Seen: 2e-7.
      np.testing.assert_allclose(
        list(ours.values()), list(theirs.values()), rtol=5e-6
      )


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh_with_other_processes(tmp_path):
  """Half by four that split the parameters, half by two that do not."""
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  for out, task, steps, count in (
    (whole, "curve", STEPS, 1),
    (parts, "split", STEPS // 2, 4),
    (parts, "curve", STEPS, 2),
  ):
    out.mkdir(exist_ok=True)
    command = [*worker(task, out), f"--steps={steps}"]
    launcher = launched(command, count)
    _, said = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, said
  assert f"from step {STEPS // 2} to step {STEPS} on 4 cpu" in said
  ours, theirs = (
    (out / "run" / "metrics.jsonl").read_text().splitlines()
    for out in (parts, whole)
  )
  for one, other in zip(ours, theirs, strict=True):
    one, other = timeless(json.loads(one)), timeless(json.loads(other))
    assert one.keys() == other.keys()
    np.testing.assert_allclose(
      list(one.values()), list(other.values()), rtol=5e-6
    )


def timeless(metrics):
  """Without how fast the steps were."""
  return {k: v for k, v in metrics.items() if not k.startswith("perf/")}


@pytest.mark.slow
def test_the_launcher_says_who_was_killed_and_ends_the_others(tmp_path):
  launcher = launched(worker("loop", tmp_path), 3, 1)
  reach(tmp_path, 3, launcher)
  pids = [int((tmp_path / f"pid_{n}").read_text()) for n in range(3)]
  began = time.monotonic()
  os.kill(pids[2], signal.SIGKILL)
  _, said = launcher.communicate(timeout=60)
  assert time.monotonic() - began < 30
  assert launcher.returncode == 128 + signal.SIGKILL
  assert "process 2 was killed by SIGKILL; the others" in said
  assert "the same command goes on from the last checkpoint" in said
  for pid in pids:
    with pytest.raises(ProcessLookupError):
      os.kill(pid, 0)


@pytest.mark.slow
def test_the_launcher_passes_ctrl_c_on(tmp_path):
  launcher = launched(worker("loop", tmp_path), 2, 1)
  reach(tmp_path, 2, launcher)
  launcher.send_signal(signal.SIGINT)
  _, said = launcher.communicate(timeout=60)
  assert launcher.returncode == 130
  assert said.count("stopped; the same command goes on from here") == 1


@pytest.mark.slow
def test_the_launcher_shows_what_another_process_said(tmp_path):
  launcher = launched(worker("own", tmp_path), 2, 1)
  _, said = launcher.communicate(timeout=60)
  assert launcher.returncode == 2
  assert "process 1 alone does not like this" in said


def train(workdir, *more):
  return [
    sys.executable,
    "-m",
    "kdjax.train",
    f"--config={ROOT / 'configs' / 'digits.py'}:smoke",
    f"--workdir={workdir}",
    *more,
  ]


@pytest.mark.slow
def test_two_processes_with_different_configs(tmp_path):
  workdir = tmp_path / "run"
  place = [f"--coordinator=localhost:{launch._free_port()}", "--processes=2"]
  processes = [
    subprocess.Popen(
      [*train(workdir, f"--config.alpha={alpha}"), *place, f"--process={n}"],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for n, alpha in enumerate((0.1, 0.5))
  ]
  for process in processes:
    out, said = process.communicate(timeout=120)
    assert process.returncode == 2
    (line,) = said.splitlines()
    assert "config alpha is 0.5 in process 1, 0.1 in process 0" in line
    assert out == ""
  assert not workdir.exists()


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  launcher = launched(train(tmp_path / "file" / "run"), 2)
  _, said = launcher.communicate(timeout=180)
  assert launcher.returncode == 2
  (line,) = said.splitlines()
  assert "file/run (Not a directory): use another folder" in line


@pytest.mark.slow
def test_a_folder_in_the_way_is_told_once_and_left_alone(tmp_path):
  (tmp_path / "thesis.tex").write_text("mine")
  data = f"--config.data.data_dir={tmp_path.parent / 'data'}"
  launcher = launched(train(tmp_path, data), 2)
  _, said = launcher.communicate(timeout=180)
  assert launcher.returncode == 2
  (line,) = said.splitlines()
  assert "is not empty and has no config.json" in line
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
