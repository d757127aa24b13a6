"""The pages of docs/: their Python runs, what they name and quote exists."""

import functools
import pkgutil
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from test_readme import ROOT, blocks, read

import kdjax
from kdjax import loop, parallel

DOCS = ROOT / "docs"
TUTORIAL = "docs/tutorials/vision.md"
# Run by other tests, or here on pieces of their own.
ELSEWHERE = {"docs/export.md": "test_export.py"}
PAGES = sorted(
  str(path.relative_to(ROOT))
  for path in DOCS.rglob("*.md")
  if blocks(path.read_text(), "python")
)
# Minutes, or data that must be made first.
SLOW = {"docs/tutorials/language.md"}


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
  """Eight devices compile longer, and other tests split the same steps."""
  mesh = parallel.make_mesh(1)
  monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh)


def run(name, names):
  """All Python of a page, in order; what the page says it prints comes too."""
  text = read(name)
  for line, code in blocks(text, "python"):
    # Errors then point into the text.
    exec(compile("\n" * line + code, name, "exec"), names)


def briefly(monkeypatch, steps):
  """Every `distill` makes so many steps at most."""

  @functools.wraps(loop.distill)
  def distill(**options):
    options["steps"] = min(steps, options["steps"])
    return loop.distill(**options)

  monkeypatch.setattr(kdjax, "distill", distill)


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory):
  """The names that the how-to pages go on from."""
  with pytest.MonkeyPatch.context() as patch:
    folder = tmp_path_factory.mktemp("tutorial")
    patch.chdir(folder)
    patch.setenv("TFDS_DATA_DIR", str(folder / "data"))
    mesh = parallel.make_mesh(1)
    patch.setattr(parallel, "make_mesh", lambda **_: mesh)
    briefly(patch, 2)
    names = {"__name__": "docs"}
    run(TUTORIAL, names)
  return names
