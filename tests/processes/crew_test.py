"""Real processes: refused, killed, stopped, and what the others then do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdjax import launch

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "processes" / "worker.py"
pytestmark = pytest.mark.alone


class Run:
  """Processes of the worker; outputs are read when they have ended."""

  def __init__(self, task, count, out, *, devices=1, **flags):
    self.task, self.count, self.out, self.flags = task, count, out, flags
    self.port, self.devices = launch._free_port(), devices
    self.processes = [self.start(index) for index in range(count)]

  def start(self, index, count=None, devices=None):
    return subprocess.Popen(
      [
        sys.executable,
        str(WORKER),
        self.task,
        f"--out={self.out}",
        f"--coordinator=localhost:{self.port}",
        f"--processes={count or self.count}",
        f"--process={index}",
        *(f"--{name}={value}" for name, value in self.flags.items()),
      ],
      env={
        **launch._environment(os.environ, devices or self.devices),
        "PYTHONPATH": str(ROOT),
      },
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
      # A shell's background jobs ignore Ctrl-C, and so would all below them.
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.communicate()

  def reach(self, step):
    """Returns when all processes have made so many steps."""
    until = time.monotonic() + 120
    paths = [self.out / f"step_{n}" for n in range(self.count)]
    step_of = lambda p: int(p.read_text() or 0) if p.exists() else 0  # noqa: E731
    while min(map(step_of, paths)) < step:
      assert all(p.poll() is None for p in self.processes)
      assert time.monotonic() < until
      time.sleep(0.05)

  def end(self, seconds=60):
    """[(exit code, standard error)], all within the time."""
    until = time.monotonic() + seconds
    found = []
    for process in self.processes:
      _, said = process.communicate(timeout=max(until - time.monotonic(), 0.1))
      found.append((process.returncode, said))
    return found


@pytest.mark.slow
def test_a_mistake_that_all_find_is_told_once(tmp_path):
  with Run("all", 2, tmp_path) as run:
    (code, said), (other_code, other_said) = run.end()
  assert (code, other_code) == (2, 2)
  assert said == "kdjax: all find the same mistake\n"
  assert other_said == ""


@pytest.mark.slow
def test_a_killed_process_ends_the_other_with_one_line(tmp_path):
  with Run("loop", 2, tmp_path) as run:
    run.reach(3)
    began = time.monotonic()
    run.processes[1].kill()
    (code, said), _ = run.end(seconds=15)
  assert time.monotonic() - began < 15
  assert code == 75
  lines = [line for line in said.splitlines() if line.startswith("kdjax: ")]
  assert len(lines) == 1
  assert "process 0 of 2 lost another process of the run" in lines[0]
  assert "goes on from the last checkpoint" in lines[0]


@pytest.mark.slow
def test_a_killed_process_ends_others_that_would_wait_for_ever(tmp_path):
  with Run("wait", 3, tmp_path) as run:
    run.reach(3)
    run.processes[2].kill()
    (code, said), (other_code, other_said), _ = run.end(seconds=25)
  assert (code, other_code) == (75, 75)
  (line,) = said.splitlines()
  assert "process 0 of 3 lost another process" in line
  assert "process 2 is gone without a word; the same command goes" in line
  (line,) = other_said.splitlines()
  assert "process 1 of 3 ends too, as process 0 did" in line


@pytest.mark.slow
def test_what_one_finds_ends_all_and_is_told_by_it(tmp_path):
  with Run("own", 2, tmp_path) as run:
    (code, said), (other_code, other_said) = run.end()
  assert (code, other_code) == (2, 2)
  assert "process 1 of 2: process 1 alone does not like this" in other_said
  assert "process 0 of 2 ends too, as process 1 did" in said


@pytest.mark.slow
def test_processes_with_differing_devices(tmp_path):
  with Run("meet", 2, tmp_path) as run:
    run.processes[1].kill()
    run.processes[1].communicate()
    run.processes[1] = run.start(1, devices=3)
    (code, said), (other_code, other_said) = run.end()
  assert (code, other_code) == (2, 2)
  assert "1 in process 0; 3 in process 1" in said
  assert other_said == ""


@pytest.mark.slow
def test_a_late_third_does_not_harm_the_run(tmp_path):
  with Run("loop", 2, tmp_path) as run:
    run.reach(3)
    for index, count in ((1, 2), (2, 3)):
      late = run.start(index, count)
      _, said = late.communicate(timeout=60)
      assert late.returncode == 2
      assert "has begun without it" in said
    run.reach(int((tmp_path / "step_0").read_text()) + 20)


@pytest.mark.slow
def test_a_killed_process_0_ends_the_others(tmp_path):
  with Run("loop", 3, tmp_path) as run:
    run.reach(3)
    run.processes[0].kill()
    _, *others = run.end(seconds=20)
  # Whichever comes first: the collective's failure, or jax's own end.
  assert {code for code, _ in others} <= {75, -signal.SIGABRT}
  assert all("kdjax" in said or "JAX" in said for _, said in others)


@pytest.mark.slow
def test_a_process_that_hangs_is_told_of_and_ends_all(tmp_path):
  with Run("loop", 2, tmp_path, lost_seconds=8) as run:
    run.reach(3)
    run.processes[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    code = run.processes[0].wait(timeout=40)
    took = time.monotonic() - began
    run.processes[1].send_signal(signal.SIGCONT)
    (_, said), _ = run.end()
  assert code in (75, -signal.SIGABRT)
  assert took < 3 * 8
  assert "process 1 of 2 has not been heard of for" in said


@pytest.mark.slow
def test_ctrl_c_to_one_ends_all(tmp_path):
  with Run("loop", 2, tmp_path) as run:
    run.reach(3)
    run.processes[0].send_signal(signal.SIGINT)
    (code, said), (other, _) = run.end(seconds=30)
  assert (code, other) == (130, 130)
  assert "stopped; the same command goes on from here" in said
