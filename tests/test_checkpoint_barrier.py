"""The barrier between processes' writes, with threads in place of processes."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from kdjax.checkpoint import disk

LONG = 20_000  # milliseconds


class Client:
  """JAX's key-value store, as much of it as a barrier uses."""

  def __init__(self):
    self.values, self._lock = {}, threading.Lock()

  def key_value_set(self, key, value, allow_overwrite=False):
    with self._lock:
      if key in self.values and not allow_overwrite:
        raise RuntimeError(f"ALREADY_EXISTS: {key}")
      self.values[key] = value

  def key_value_dir_get(self, folder):
    with self._lock:
      return [i for i in self.values.items() if i[0].startswith(folder + "/")]

  def key_value_delete(self, key):
    with self._lock:
      del self.values[key]


@pytest.fixture
def processes(monkeypatch):
  """Runs `jobs`, each given its process's barrier; returns what they raise."""
  client, me = Client(), threading.local()
  monkeypatch.setattr(
    disk,
    "distributed",
    SimpleNamespace(global_state=SimpleNamespace(client=client)),
  )
  monkeypatch.setattr(disk, "_POLL", 0.001)

  def run(*jobs):
    monkeypatch.setattr(
      disk,
      "jax",
      SimpleNamespace(
        process_index=lambda: me.number, process_count=lambda: len(jobs)
      ),
    )

    def one(number, job):
      me.number = number
      try:
        job(barriers[number])
      except Exception as error:
        return error

    barriers = []
    for _ in jobs:  # each process counts its own
      monkeypatch.setattr(disk, "_BARRIERS", itertools.count())
      barriers.append(disk.Barrier())
    with ThreadPoolExecutor(len(jobs)) as pool:
      return list(pool.map(one, range(len(jobs)), jobs))

  run.client = client
  return run


def at(*keys):
  def job(barrier):
    for key in keys:
      barrier(key=key, timeout_ms=LONG)

  return job


def test_all_pass_and_leave_little_behind(processes):
  keys = [f"key{n}" for n in range(20)]
  assert processes(at(*keys), at(*keys), at(*keys)) == [None] * 3
  assert len(processes.client.values) <= 3  # of the last barrier


def test_one_that_waits_elsewhere_counts_as_failed(processes):
  """The failed one is at the end of the save, the others are in its middle."""

  def failed(barrier):
    barrier(key="start", timeout_ms=LONG)
    for key in ("end", "after the end"):  # Orbax's `finally`s
      with pytest.raises(disk.SaveFailed):
        barrier(key=key, timeout_ms=LONG)

  whole = at("start", "written", "end")
  told, other, none = processes(whole, whole, failed)
  assert none is None
  for error in (told, other):
    assert isinstance(error, disk.SaveFailed)
  assert "could not write its part" in str(told)


def test_fail_frees_the_others_and_names_the_process(processes):
  first, second = processes(at("a"), lambda barrier: barrier.fail())
  assert str(first) == "process 1 could not write its part"
  assert second is None


def test_one_that_does_not_come_is_waited_for_so_long(processes):
  def impatient(barrier):
    barrier(key="a", timeout_ms=50)

  first, _ = processes(impatient, lambda barrier: None)
  assert isinstance(first, TimeoutError)
  assert "waited 0.05 s at a" in str(first)


def test_what_went_wrong_here_is_told_not_what_the_others_made_of_it(tmp_path):
  try:
    try:
      raise OSError(28, "No space left on device")
    finally:
      raise disk.SaveFailed("process 0 could not write its part")
  except disk.SaveFailed as error:
    told = disk.trouble(error, tmp_path, step=2, size=10, steps=[1])
  assert "No space left on device" in str(told)
  assert "step 1 is the last good checkpoint" in str(told)
