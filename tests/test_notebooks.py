"""The notebooks of colab/: what git holds of them, and that they run."""

import builtins
import glob
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ["language_model", "losses_tour", "quickstart"]
INSTALL = "# @title Install kdjax where it is missing"
EVERY = pytest.mark.parametrize("name", NAMES)


def read(name):
  return json.loads((ROOT / f"colab/{name}.ipynb").read_text(encoding="utf-8"))


def sources(name, kind=None):
  """The texts of its cells, or of those of a kind."""
  return [
    "".join(cell["source"])
    for cell in read(name)["cells"]
    if kind in (None, cell["cell_type"])
  ]


def test_there_are_these():
  found = {p.stem for p in (ROOT / "colab").glob("*.ipynb")}
  assert found == set(NAMES)


@EVERY
def test_git_holds_no_outputs(name):
  made = read(name)
  assert made["nbformat"] == 4
  for cell in made["cells"]:
    assert cell["cell_type"] in ("markdown", "code")
    if cell["cell_type"] == "code":
      assert cell["outputs"] == []
      assert cell["execution_count"] is None
  ids = [cell["id"] for cell in made["cells"]]
  assert len(set(ids)) == len(ids)
  assert set(made["metadata"]) == {
    "accelerator",
    "colab",
    "kernelspec",
    "language_info",
  }


@EVERY
def test_its_code_is_code(name):
  for n, code in enumerate(sources(name, "code")):
    compile(code, f"{name}, cell {n}", "exec")


@EVERY
def test_it_begins_with_the_one_install_cell(name):
  first = sources(name, "code")[0]
  assert first.startswith(INSTALL)
  assert first == sources(NAMES[0], "code")[0]
  assert sources(name)[0].startswith("# ")  # after its title
  # Colab and Jupyter show it by its title.
  cell = next(c for c in read(name)["cells"] if c["cell_type"] == "code")
  assert cell["metadata"]["cellView"] == "form"
  assert cell["metadata"]["jupyter"]["source_hidden"]
  page = (ROOT / f"docs/notebooks/{name}.md").read_text(encoding="utf-8")
  assert f"<summary>{INSTALL.removeprefix('# @title ')}</summary>" in page


@EVERY
def test_the_rendered_page_is_of_this_notebook(name):
  """python colab/render.py makes it."""
  page = (ROOT / f"docs/notebooks/{name}.md").read_text(encoding="utf-8")
  shown = re.findall(r"^```python\n(.*?)\n```$", page, re.M | re.S)
  assert shown == sources(name, "code")
  at = 0
  for text in sources(name, "markdown"):
    assert text in page[at:], text[:60]
    at = page.index(text, at)
  pictures = re.findall(r"!\[.*?\]\((.*?)\)", page)
  there = list((ROOT / "docs/notebooks" / name).glob("*"))
  assert {ROOT / "docs/notebooks" / x for x in pictures} == set(there)
  assert sum(x.stat().st_size for x in there) < 100_000
  assert "Error" not in page


class Machine:
  """What the install cell sees, and what it does to it."""

  def __init__(self, monkeypatch, folder, missing=("kdjax",), files=(), gpu=0):
    self.calls, self.missing, self.code = [], set(missing), 0
    monkeypatch.chdir(folder)
    monkeypatch.delenv("KDJAX_SOURCE", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", self.run)
    monkeypatch.setattr(importlib.metadata, "distributions", list)  # none
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/x" if gpu else None)
    monkeypatch.setattr(
      glob, "glob", lambda pattern: [x for x in files if x in pattern]
    )
    found = importlib.util.find_spec
    monkeypatch.setattr(
      importlib.util,
      "find_spec",
      lambda name: None if name in self.missing else found(name),
    )

  def run(self, command):
    assert command[1:5] == ["-m", "pip", "install", "--quiet"]
    self.calls.append(command[5:])
    return SimpleNamespace(returncode=self.code)


def install():
  code = sources(NAMES[0], "code")[0]
  exec(compile(code, "install", "exec"), {"__builtins__": builtins})


@pytest.mark.parametrize(
  ("has", "told"),
  [
    ({}, ["kdjax", "matplotlib"]),
    ({"files": ["/dev/accel"]}, ["kdjax[tpu]", "matplotlib"]),
    ({"files": ["/dev/vfio/"]}, ["kdjax[tpu]", "matplotlib"]),
    ({"gpu": 1}, ["kdjax[cuda]", "matplotlib"]),
    ({"files": ["/dev/accel"], "gpu": 1}, ["kdjax[tpu]", "matplotlib"]),
    ({"missing": ["matplotlib"]}, ["matplotlib"]),
  ],
)
def test_it_installs_for_the_machine(has, told, monkeypatch, tmp_path):
  machine = Machine(monkeypatch, tmp_path, **has)
  install()
  assert machine.calls == [told]


def test_it_installs_nothing_where_kdjax_is(monkeypatch, tmp_path):
  machine = Machine(monkeypatch, tmp_path, missing=())
  install()
  assert machine.calls == []


@pytest.mark.parametrize("inside", ["colab", ".", ".."])
def test_it_installs_a_checkout_that_it_lies_in(inside, monkeypatch, tmp_path):
  checkout = tmp_path / "kdjax"
  (checkout / "kdjax").mkdir(parents=True)
  (checkout / "kdjax/__init__.py").touch()
  (checkout / "colab").mkdir()
  machine = Machine(monkeypatch, checkout / inside, gpu=1)
  install()
  assert machine.calls == [["-e", f"{checkout}[cuda]", "matplotlib"]]
  assert sys.path[0] == str(checkout)


def test_a_folder_that_is_only_called_so_is_no_kdjax(monkeypatch, tmp_path):
  machine = Machine(monkeypatch, tmp_path, missing=())
  bare = importlib.machinery.ModuleSpec("kdjax", None, is_package=True)
  known = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda n: bare if n == "kdjax" else known(n)
  )
  install()
  assert machine.calls == [["kdjax", "matplotlib"]]


def test_it_installs_from_where_it_is_told(monkeypatch, tmp_path):
  machine = Machine(monkeypatch, tmp_path)
  monkeypatch.setenv("KDJAX_SOURCE", "git+https://example.com/kdjax")
  install()
  told = "kdjax @ git+https://example.com/kdjax"
  assert machine.calls == [[told, "matplotlib"]]


def test_it_says_what_to_do_where_pip_finds_no_kdjax(monkeypatch, tmp_path):
  Machine(monkeypatch, tmp_path).code = 1
  with pytest.raises(SystemExit, match="set KDJAX_SOURCE: see colab/README"):
    install()


def test_it_asks_for_a_restart_where_pip_replaced_what_is_loaded(
  monkeypatch, tmp_path
):
  machine = Machine(monkeypatch, tmp_path)

  def there():
    version = "99" if machine.calls else "1"
    return [SimpleNamespace(name="numpy", version=version)]

  monkeypatch.setattr(importlib.metadata, "distributions", there)
  with pytest.raises(SystemExit, match="restart it"):
    install()


def run(name, folder, monkeypatch):
  """The outputs of its cells, run as a reader would, with a small budget."""
  nbformat = pytest.importorskip("nbformat", reason="the notebooks extra")
  monkeypatch.syspath_prepend(ROOT / "colab")
  import render

  monkeypatch.setenv("KDJAX_NOTEBOOK_BUDGET", "small")
  monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  monkeypatch.setenv("TMPDIR", str(folder))  # a notebook's runs go there
  notebook = nbformat.read(ROOT / f"colab/{name}.ipynb", as_version=4)
  nbformat.validate(notebook)
  render.execute(notebook, folder)
  return notebook, render.page(notebook, name, folder)


RESULTS = {
  "language_model": ["teacher", "alone", "distilled"],
  "losses_tour": ["kl", "jsd, 0.5", "reverse_kl"],
  "quickstart": ["teacher", "alone", "distilled"],
}


@pytest.mark.slow
@EVERY
def test_it_runs(name, tmp_path, monkeypatch):
  notebook, page = run(name, tmp_path, monkeypatch)
  assert page.count("![") >= 2
  result = "".join(o["text"] for o in notebook.cells[-1].outputs)
  for row in RESULTS[name]:
    (line,) = re.findall(rf"^{re.escape(row)} .*$", result, re.M)
    numbers = re.findall(r"-?[\d,]*\.?\d+", line.removeprefix(row))
    assert len(numbers) >= 3, line
    assert all(math.isfinite(float(x.replace(",", ""))) for x in numbers)
  assert "nan" not in result
