"""The pages of docs/: their Python runs, what they name and quote exists."""

import ast
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


def messages():
  """Every text that the code may say, its fields as \0."""
  found = []
  for path in sorted((ROOT / "kdjax").rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.JoinedStr):
        parts = [getattr(v, "value", None) for v in node.values]
        found.append("".join(p if isinstance(p, str) else "\0" for p in parts))
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        found.append(node.value)
  return found


def quoted():
  return re.findall(r"^### `(.+)` \{ #", read("docs/faq.md"), re.M)


def test_the_faq_quotes_what_the_code_says():
  said = messages()
  assert len(quoted()) >= 40
  for quote in quoted():
    # "…" stands for a field, or for what follows.
    parts = [re.escape(part) for part in quote.split("…")]
    pattern = re.compile(".*?".join(parts), re.S)
    assert any(pattern.search(text) for text in said), quote
