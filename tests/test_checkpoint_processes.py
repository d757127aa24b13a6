"""Checkpoints of runs of several processes, which are real ones here."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kdjax import checkpoint

HERE = Path(__file__).parent
WORKER = HERE / "checkpoint_worker.py"
pytestmark = pytest.mark.alone


def start(job, folders, devices, shape):
  """A process for each folder, on a mesh of `shape` over all their devices."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
  }
  environment.pop("XLA_FLAGS", None)
  return [
    subprocess.Popen(
      [sys.executable, str(WORKER), str(n), str(len(folders)), str(port)]
      + [str(devices), job, str(folder), *map(str, shape)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=environment,
    )
    for n, folder in enumerate(folders)
  ]


def finish(workers, code=0):
  """What each has printed last."""
  try:
    told = [worker.communicate(timeout=120) for worker in workers]
  finally:
    for worker in workers:
      worker.kill()
  for worker, (_, error) in zip(workers, told):
    assert worker.returncode == code, error[-3000:]
  return [json.loads(out.splitlines()[-1]) for out, _ in told]


def run(job, folders, devices, shape):
  return finish(start(job, folders, devices, shape))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Steps 1 and 2 of two processes with two devices each, and their print."""
  folder = tmp_path_factory.mktemp("processes") / "run"
  first, second = run("save", [folder] * 2, 2, (2, 2))
  assert first == second
  assert first["steps"] == [1, 2]
  return folder, first["fingerprint"]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("processes", "devices", "shape"),
  [(1, 1, (1, 1)), (1, 8, (2, 4)), (2, 2, (4, 1)), (4, 1, (1, 4))],
)
def test_another_number_of_processes(saved, processes, devices, shape):
  folder, fingerprint = saved
  for found in run("restore", [folder] * processes, devices, shape):
    assert found["step"] == 2
    assert found["position"] == {"at": 2}
    assert found["fingerprint"] == fingerprint
    assert found["notes"] == []


@pytest.mark.slow
def test_inputs_that_stand_apart_go_on_each_from_its_own(tmp_path):
  found = run("apart", [tmp_path] * 2, 1, (2, 1))
  assert [one["position"] for one in found] == [{"at": 0}, {"at": 1}]
  (alone,) = run("alone", [tmp_path], 2, (2, 1))
  assert "the inputs of 2 processes stood at positions" in alone["told"]


@pytest.mark.slow
def test_what_one_cannot_read_none_uses(saved, tmp_path):
  """Process 1 reads of a copy in which a file is cut short."""
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  for folder in (whole, cut):
    shutil.copytree(saved[0], folder)
  data = [p for p in (cut / "2" / "state").rglob("*") if p.is_file()]
  for path in sorted(data, key=lambda p: p.stat().st_size)[-4:]:
    path.write_bytes(path.read_bytes()[:-500])
  found = run("cut", [whole] * 2, 2, (2, 2))
  for one in found:
    assert one["step"] == 1
    assert len(one["notes"]) == 1
    assert "step 2 is damaged (process 1: " in one["notes"][0]
    assert "using step 1" in one["notes"][0]
  assert found[0]["fingerprint"] == found[1]["fingerprint"]
  assert found[0]["steps"] == [1, 2]
  (again,) = run("restore", [whole], 4, (4, 1))
  assert again["step"] == 2
  assert again["fingerprint"] == saved[1]


@pytest.mark.slow
def test_what_one_does_not_see_none_uses(saved, tmp_path):
  shutil.copytree(saved[0] / "1", tmp_path / "one" / "1")
  for one in run("restore", [saved[0], tmp_path / "one"], 2, (2, 2)):
    assert one["step"] == 1
    assert "step 2 is damaged (process 1: " in one["notes"][0]


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_stops_all(tmp_path):
  first, second = run("full", [tmp_path] * 2, 2, (2, 2))
  assert "process 1 could not write its part" in first["told"]
  assert "File too large" in second["told"]
  for found in (first, second):
    assert "step 1 is the last good checkpoint" in found["told"]
    assert found["steps"] == [1]
    assert found["seconds"] < 30
  assert checkpoint.steps(tmp_path) == [1]


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_one_of_two_saves_the_same_step_in_both(tmp_path, told):
  workers = start("sigterm", [tmp_path] * 2, 2, (2, 2))
  try:
    for worker in workers:
      assert worker.stdout is not None
      assert "running\n" in worker.stdout  # reads up to it
    workers[told].send_signal(signal.SIGTERM)
  except BaseException:
    for worker in workers:
      worker.kill()
    raise
  first, second = finish(workers, code=143)
  assert [first] == [second] == checkpoint.steps(tmp_path)
