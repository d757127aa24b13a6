"""Runs whose workdir is in a bucket, against a store that answers as Google's.

The package of the extra `gcs` is needed: `.ci/run` installs it.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fake_gcs
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from etils.epath import backend

import kdjax
from kdjax import checkpoint, train
from kdjax.errors import UserError
from kdjax.report.command import report as write_report
from kdjax.types import TrainState

ROOT = Path(__file__).parents[1]
CONFIG = f"--config={ROOT / 'configs' / 'digits.py'}:smoke"
STEPS = 12
CHANGES = {
  "save_every": 3,
  "phases.teacher.steps": STEPS,
  "phases.alone.steps": 0,
  "phases.distilled.steps": 4,
}
pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.fixture(scope="module")
def store():
  pytest.importorskip("gcsfs")
  with fake_gcs.served() as store:
    yield store
  backend.fsspec_backend._get_filesystem.cache_clear()


def start(workdir, data_dir, processes=1):
  command = ["kdjax.train"]
  if processes > 1:
    command = ["kdjax.launch", f"--processes={processes}", "--"]
  changes = {**CHANGES, "data.data_dir": data_dir}
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      *command,
      CONFIG,
      f"--workdir={workdir}",
      *(f"--config.{key}={value}" for key, value in changes.items()),
    ],
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    # One device, not the eight of the tests.
    env={**os.environ, "XLA_FLAGS": ""},
  )


def finish(process, code=0):
  _, error = process.communicate(timeout=600)
  assert process.returncode == code, error[-3000:]
  return error


def kill_before(store, process, key):
  """Kills a run while it writes an object, of which nothing is then there."""
  reached, killed = threading.Event(), threading.Event()

  def refuses(method, name):
    if method == "GET" or name != key:
      return False
    reached.set()
    killed.wait(60)
    return True

  store.refuses = refuses
  try:
    assert reached.wait(300), process.stderr.read()[-3000:]
    process.kill()
    process.wait(60)
  finally:
    killed.set()
    store.refuses = lambda method, name: False


def read_arrays(folder):
  """name -> bytes of the arrays in a checkpoint that lies on a disk."""
  import tensorstore as ts

  kvstore = {"driver": "ocdbt", "base": f"file://{folder}/state"}
  keys = ts.KvStore.open(kvstore).result().list().result()
  found = {}
  for key in keys:
    name = key.decode().removesuffix("/.zarray")
    if key.endswith(b"/.zarray"):
      at = {"driver": "zarr", "kvstore": {**kvstore, "path": name}}
      found[name] = ts.open(at, open=True).result().read().result().tobytes()
  assert any("params" in name for name in found)
  return found


def copy(store, prefix, folder):
  """A folder of the bucket, on a disk."""
  for key in store.names(prefix + "/"):
    path = folder / key.removeprefix(prefix + "/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(store.objects[key])


def test_killed_while_it_saves_and_damaged_it_ends_as_on_a_disk(
  store, tmp_path
):
  data_dir = tmp_path / "data"
  finish(start(tmp_path / "disk", data_dir))
  inside = "bucket/run/seed_0/teacher/checkpoints"
  run = start("gs://bucket/run", data_dir)
  kill_before(store, run, f"{inside}/6/commit_success.txt")
  assert store.names(f"{inside}/6/state/")
  assert checkpoint.steps(f"gs://{inside}") == [3]
  lines = store.objects["bucket/run/seed_0/teacher/metrics.jsonl"]
  assert lines.count(b"loss/total") >= 6  # sent before the checkpoint

  run = start("gs://bucket/run", data_dir)
  kill_before(store, run, f"{inside}/9/commit_success.txt")
  assert checkpoint.steps(f"gs://{inside}") == [3, 6]
  biggest = max(
    store.names(f"{inside}/6/state/"), key=lambda k: len(store.objects[k])
  )
  content = bytearray(store.objects[biggest])
  content[len(content) // 2] ^= 1
  store.put(biggest, bytes(content))

  said = finish(start("gs://bucket/run", data_dir))
  assert "step 6 is damaged" in said
  assert "using step 3" in said
  copy(store, "bucket/run", tmp_path / "copy")
  for phase, step in (("teacher", STEPS), ("student_distilled", 4)):
    last = Path("seed_0") / phase / "checkpoints" / str(step)
    ours, theirs = (
      read_arrays(tmp_path / where / last) for where in ("copy", "disk")
    )
    assert ours == theirs
    ours, theirs = (
      (tmp_path / where / "seed_0" / phase / "metrics.jsonl").read_text()
      for where in ("copy", "disk")
    )
    steps = [json.loads(line)["step"] for line in ours.splitlines()]
    assert steps == [json.loads(line)["step"] for line in theirs.splitlines()]
  ours, theirs = (
    json.loads((tmp_path / where / "results.json").read_text())
    for where in ("copy", "disk")
  )
  assert ours == theirs
  assert list((tmp_path / "copy/seed_0/teacher/tensorboard").glob("events*"))
  page = write_report(["gs://bucket/run"])
  assert str(page) == "gs://bucket/run/report/index.html"
  assert store.objects["bucket/run/report/index.html"].startswith(b"<!doctype")


def test_two_processes_save_on_sigterm_and_one_goes_on(store, tmp_path):
  run = start("gs://bucket/two", tmp_path, processes=2)
  inside = "bucket/two/seed_0/teacher"
  deadline = time.monotonic() + 300
  while f"{inside}/checkpoints/3/commit_success.txt" not in store.objects:
    assert run.poll() is None, run.stderr.read()[-3000:]
    assert time.monotonic() < deadline
    time.sleep(0.005)
  run.send_signal(signal.SIGTERM)
  said = finish(run, 143)
  assert "which is saved" in said
  (newest,) = checkpoint.steps(f"gs://{inside}/checkpoints")[-1:]
  said = finish(start("gs://bucket/two", tmp_path))
  assert f"from step {newest} " in said or newest == STEPS
  lines = store.objects[f"{inside}/metrics.jsonl"].decode().splitlines()
  trained = [json.loads(x) for x in lines if "loss/total" in x]
  assert [line["step"] for line in trained] == [*range(1, STEPS + 1)]


@pytest.mark.parametrize(
  ("workdir", "refuses", "told"),
  [
    (
      "gs://nowhere/run",
      lambda method, name: False,
      "The specified bucket does not exist",
    ),
    (
      "gs://bucket/forbidden",
      lambda method, name: method != "GET",
      "does not have access",
    ),
    ("gs://bucket/forbidden", lambda method, name: True, "not have access"),
  ],
)
def test_a_bucket_that_refuses_is_one_line_before_the_first_step(
  store, capsys, tmp_path, workdir, refuses, told
):
  store.refuses = refuses
  try:
    code = train.main(
      [
        "kdjax.train",
        CONFIG,
        f"--workdir={workdir}",
        f"--config.data.data_dir={tmp_path}",
      ]
    )
  finally:
    store.refuses = lambda method, name: False
  out, error = capsys.readouterr()
  (line,) = error.splitlines()
  assert (code, out) == (2, "")
  assert line.startswith(f"kdjax: cannot reach {workdir}")
  assert told in line
  assert not store.names("bucket/forbidden")


def test_distill_refuses_such_a_bucket_too(store):
  """Before the first step, and makes none."""
  given = dict(student=networks.bare(), train=[networks.batch()] * 3, steps=3)
  with pytest.raises(UserError, match="specified bucket does not exist"):
    kdjax.distill(folder="gs://nowhere/run", **given)
  store.refuses = lambda method, name: method != "GET"
  try:
    with pytest.raises(UserError, match="does not have access"):
      kdjax.distill(folder="gs://bucket/other", **given)
  finally:
    store.refuses = lambda method, name: False
  assert not store.names("bucket/other")
  kdjax.distill(folder="gs://bucket/other", **given)
  assert checkpoint.steps("gs://bucket/other/checkpoints") == [3]


def a_state(step):
  return TrainState(
    step=jnp.int32(step),
    params={"w": jnp.arange(6.0) + step},
    stats={},
    opt_state=(),
    key=jax.random.key(step),
    term_params={},
    term_state={},
  )


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
  "part", ["/2/state/ocdbt.process_0/", "/2/meta/", "/2/commit_success.txt"]
)
def test_a_save_that_the_bucket_refuses_names_the_last_good_one(store, part):
  folder = f"gs://bucket/refused{part.count('c')}"
  saver = checkpoint.Checkpointer(folder)
  saver.save(1, a_state(1))
  saver.wait()
  store.refuses = lambda method, name: method != "GET" and part in name
  try:
    saver.save(2, a_state(2))  # in the background
    with pytest.raises(
      UserError, match=r"access to bucket[^\[]*step 1 is the last"
    ):
      saver.wait()
  finally:
    store.refuses = lambda method, name: False
  saver.close()
  found = checkpoint.restore(folder, a_state(0))
  assert found is not None
  assert found.step == 1
  np.testing.assert_array_equal(found.state.params["w"], a_state(1).params["w"])
  # What was half written does not stand in the way.
  with checkpoint.Checkpointer(folder) as saver:
    assert saver.restore(a_state(0)).step == 1
    saver.save(2, a_state(2))
    saver.wait()
    assert saver.steps == [1, 2]
