"""The scripts of docs/examples run, are short, and are those of the page."""

import ast
import functools
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn import neural_network

import kdjax
from kdjax import parallel

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "docs/examples").glob("*.py"))
LINE = re.compile(r"(\w+) +accuracy (\d\.\d{3})")


def accuracies(text):
  found = {name: float(value) for name, value in LINE.findall(text)}
  assert {"alone", "distilled"} <= set(found), text
  return found


def code_lines(path):
  """How many lines are code: no blanks, no comments, no docstring."""
  lines = path.read_text().split('"""', 2)[2].splitlines()
  return sum(bool(x.split("#")[0].strip()) for x in lines)


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_it_runs_with_a_short_budget(path, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  mesh = parallel.make_mesh(1)  # eight devices compile longer
  monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh)
  whole = kdjax.distill
  short = lambda **given: whole(**given | {"steps": 2})  # noqa: E731
  monkeypatch.setattr(kdjax, "distill", functools.wraps(whole)(short))
  hasty = functools.partial(neural_network.MLPClassifier, max_iter=2)
  monkeypatch.setattr(neural_network, "MLPClassifier", hasty)
  runpy.run_path(str(path), run_name="__main__")
  accuracies(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_its_distilled_student_is_better_than_the_one_alone(path, tmp_path):
  env = os.environ | {
    "TFDS_DATA_DIR": str(tmp_path),
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": "",
  }
  done = subprocess.run(
    [sys.executable, str(path)],
    capture_output=True,
    text=True,
    env=env,
    cwd=tmp_path,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = accuracies(done.stdout)
  assert found["distilled"] > found["alone"] + 0.02


def test_there_are_four_and_each_is_short():
  assert {p.stem for p in SCRIPTS} == {
    "linen",
    "losses_only",
    "nnx",
    "torch_logits",
  }
  assert max(map(code_lines, SCRIPTS)) <= 30


def test_the_page_shows_them_as_they_are():
  page = (ROOT / "docs/examples.md").read_text(encoding="utf-8")
  shown = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
  assert len(shown) == len(SCRIPTS)
  for path in SCRIPTS:
    assert path.read_text(encoding="utf-8") in shown, path.name


@pytest.mark.parity
def test_the_lines_of_pytorch_write_what_it_reads(tmp_path, monkeypatch):
  torch = pytest.importorskip("torch")
  path = ROOT / "docs/examples/torch_logits.py"
  told = ast.get_docstring(ast.parse(path.read_text()))
  code = "\n".join(x[4:] for x in told.splitlines() if x.startswith("    "))
  monkeypatch.chdir(tmp_path)
  images = torch.rand(1200, 64)
  names = {
    "torch": torch,
    "np": np,
    "images": images,
    "teacher": torch.nn.Linear(64, 10),
  }
  exec(code, names)
  source = kdjax.data.load("digits", "train")
  kept = kdjax.data.with_logits(source, np.load("teacher.npy"))
  want = names["teacher"](images[7:8]).detach().numpy()[0]
  np.testing.assert_allclose(kept.logits[7], want, rtol=1e-5, atol=1e-6)
