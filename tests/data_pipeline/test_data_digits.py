import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from sklearn import datasets

from kdjax import data
from kdjax.data import digits
from kdjax.types import UserError

RANGES = {"train": (0, 1200), "validation": (1200, 1500), "test": (1500, 1797)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return tmp_path_factory.mktemp("digits")


@pytest.mark.parametrize("split", RANGES)
def test_splits_are_ranges_of_the_files_own_order(root, split):
  source = data.load("digits", split, data_dir=root)
  first, last = RANGES[split]
  want = datasets.load_digits()
  assert len(source) == last - first
  assert source.image_shape == (8, 8, 1)
  assert source.num_classes == 10
  got = np.stack([source.examples[i]["image"] for i in range(len(source))])
  assert got.dtype == np.uint8
  np.testing.assert_array_equal(
    got[..., 0], np.floor(want.images[first:last] * 255 / 16)
  )
  np.testing.assert_array_equal(source.labels, want.target[first:last])


def test_the_slice_syntax_of_tfds_keeps_the_order(root):
  whole = data.load("digits", "train", data_dir=root)
  part = data.load("digits", "train[90%:]", data_dir=root)
  np.testing.assert_array_equal(part.labels, whole.labels[1080:])


def test_the_normalization_is_that_of_the_train_split(root):
  source = data.load("digits", "train", data_dir=root)
  pixels = np.stack([source.examples[i]["image"] for i in range(1200)]) / 255.0
  mean, std = data.NORMALIZATION["digits"]
  np.testing.assert_allclose(mean, pixels.mean(), atol=1e-4)
  np.testing.assert_allclose(std, pixels.std(), atol=1e-4)


def test_preparing_and_reading_write_nothing_to_the_terminal(tmp_path, capfd):
  data.load("digits", "train", data_dir=tmp_path)
  assert capfd.readouterr() == ("", "")


def test_the_default_folder_follows_the_environment(monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", "/a")
  monkeypatch.setenv("XDG_CACHE_HOME", "/b")
  assert digits.default_folder() == pathlib.Path("/a")
  monkeypatch.delenv("TFDS_DATA_DIR")
  assert digits.default_folder() == pathlib.Path("/b/kdjax")
  monkeypatch.delenv("XDG_CACHE_HOME")
  assert digits.default_folder() == pathlib.Path("~/.cache/kdjax")


KILLED = """
import os, signal, sys
from kdjax.data import digits
os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
digits.builder(sys.argv[1])
"""


@pytest.mark.slow
def test_a_run_killed_while_preparing_does_not_stop_the_next(tmp_path):
  killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
  assert killed.returncode == -signal.SIGKILL
  assert list(tmp_path.glob(".digits-*")), "it left nothing: killed too early"
  assert not (tmp_path / "digits" / "1.0.0").exists()
  assert len(data.load("digits", "test", data_dir=tmp_path)) == 297


def test_a_process_that_comes_second_uses_the_firsts_folder(
  tmp_path, monkeypatch
):
  folder, rename = tmp_path / "digits" / "1.0.0", os.rename
  inner = []

  def late(source, target):
    if pathlib.Path(target) == folder and not inner:
      inner.append(True)
      digits.builder(tmp_path)  # another process finishes just before
    rename(source, target)

  monkeypatch.setattr(os, "rename", late)
  assert len(data.load("digits", "test", data_dir=tmp_path)) == 297
  assert inner
  assert not list(tmp_path.glob(".digits-*"))


def test_an_incomplete_folder_is_never_taken_for_the_dataset(tmp_path):
  folder = tmp_path / "digits" / "1.0.0"
  folder.mkdir(parents=True)
  assert len(data.load("digits", "test", data_dir=tmp_path)) == 297
  (folder / "dataset_info.json").unlink()
  with pytest.raises(UserError, match="delete it"):
    data.load("digits", "test", data_dir=tmp_path)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="give a data_dir"):
    data.load("digits", "train", data_dir=tmp_path / "file")
