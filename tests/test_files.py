"""Files of a run in a bucket, which lies in memory here.

`test_bucket.py` has whole runs, against a store that is spoken to over HTTP.
"""

import json
import os

import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from kdjax import examples, files, goodput, loggers
from kdjax.clock import Clock
from kdjax.errors import UserError
from kdjax.metrics import Writer, last_step
from kdjax.report import runs


class Bucket(MemoryFileSystem):
  """No folders to make, and nothing is renamed or appended to."""

  protocol = ("gs", "gcs")
  store, pseudo_dirs = {}, [""]  # not those of other memory file systems

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol("/" + str(path).removeprefix("gs://"))

  def open(self, path, mode="rb", **given):
    assert "a" not in mode
    return super().open(path, mode, **given)

  def mkdir(self, *given, **more):
    raise AssertionError("a folder is made in a bucket")

  makedirs = mv = mkdir


@pytest.fixture
def bucket(monkeypatch):
  """A folder in it."""
  Bucket.store.clear()
  Bucket.pseudo_dirs[:] = [""]
  find = files.importlib.util.find_spec
  monkeypatch.setattr(
    files.importlib.util,
    "find_spec",
    lambda name, *package: name == "gcsfs" or find(name, *package),
  )
  files_of = lambda name: Bucket(skip_instance_cache=True)  # noqa: E731
  monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", files_of)
  return files.path("gs://bucket/runs/one")


def test_names_of_buckets_and_of_folders(bucket, tmp_path):
  assert str(bucket / "a") == "gs://bucket/runs/one/a"
  assert files.in_bucket(bucket / "a")
  assert files.absolute(bucket) == bucket
  assert files.path(tmp_path) == tmp_path
  assert not files.in_bucket(tmp_path)


@pytest.mark.parametrize("store", ["s3://b/run", "memory://run", "http://x/y"])
def test_other_stores_are_refused(store):
  with pytest.raises(UserError, match=r"only gs://\.\.\. can be written into"):
    files.path(store)


def test_a_bucket_needs_a_name():
  with pytest.raises(UserError, match="gs:// names no bucket"):
    files.path("gs://")


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"gcsfs.*pip install 'kdjax\[gcs\]'"):
    files.path("gs://b/run")


@pytest.mark.parametrize("where", ["bucket", "tmp_path"])
def test_files_are_the_same_here_and_there(where, request):
  folder = request.getfixturevalue(where)
  files.write_json(folder / "a" / "b.json", {"x": 1})
  assert json.loads((folder / "a" / "b.json").read_text()) == {"x": 1}
  assert [p.name for p in (folder / "a").iterdir()] == ["b.json"]
  examples.write(folder / "e.npz", {"row": np.arange(3)})
  np.testing.assert_array_equal(
    examples.read(folder / "e.npz")["row"], [0, 1, 2]
  )
  assert examples.read(folder / "none.npz") is None
  goodput.Goodput(Clock(), folder).write()
  assert goodput.Goodput(Clock(), folder)._earlier["starts"] == 1


def test_metrics_come_with_each_save_and_at_the_end(bucket):
  path = bucket / "metrics.jsonl"
  with Writer(bucket) as write:
    assert path.read_bytes() == b""
    write(1, {"loss": 1.0})
    assert last_step(path) == 0
    write.send()
    write(2, {"loss": 0.5})
    assert last_step(path) == 1
    here = write._staged.here
  assert last_step(path) == 2
  assert not here.exists()
  (events,) = (bucket / "tensorboard").glob("events*")
  assert b"loss" in events.read_bytes()
  # A run that goes on from step 1 has every step once.
  with Writer(bucket, resume_step=1) as write:
    write(2, {"loss": 9.0})
  assert runs.metrics(path)["loss"].tolist() == [[1, 1.0], [2, 9.0]]


def test_only_what_changed_is_sent_again(bucket, monkeypatch):
  sent = []
  write = files.write
  monkeypatch.setattr(
    files, "write", lambda place, x: sent.append(place.name) or write(place, x)
  )
  staged = files.Staged(bucket)
  for name in "ab":
    (staged.here / name).write_text(name)
  staged.send()
  (staged.here / "b").write_text("more")
  staged.close()
  assert sorted(sent) == ["a", "b", "b"]
  assert (bucket / "b").read_text() == "more"


def test_what_a_bucket_refuses_is_one_line(bucket, monkeypatch):
  def refuse(*given, **more):
    raise OSError("Forbidden: b/bucket\nno access")

  monkeypatch.setattr(Bucket, "open", refuse)
  told = r"cannot reach gs://bucket/runs/one/a \(Forbidden: b/bucket; no access"
  with pytest.raises(UserError, match=told):
    files.write(bucket / "a", b"")
  with pytest.raises(TypeError), files.reaching(bucket):
    raise TypeError("a mistake in the program is told as one")


def test_a_folder_that_cannot_be_written_into(tmp_path, monkeypatch):
  files.check(tmp_path / "new" / "run")
  (tmp_path / "file").write_text("")
  for place in ("file", "file/run"):
    with pytest.raises(UserError, match=r"file.* \(Not a directory\): use an"):
      files.check(tmp_path / place)
  monkeypatch.setattr(os, "access", lambda place, how: place != tmp_path)
  with pytest.raises(UserError, match=r"new \(Permission denied\): use an"):
    files.check(tmp_path / "new")
  assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_name_of_a_run_in_a_bucket(bucket):
  assert runs._names([bucket]) == ["one"]
  assert loggers.files.absolute(bucket).parts[-3:] == ("bucket", "runs", "one")
