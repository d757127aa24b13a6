"""The pages of docs/: their Python runs, what they name and quote exists."""

import ast
import contextlib
import functools
import importlib
import io
import json
import pkgutil
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import report_runs
from test_readme import ROOT, blocks, read

import kdjax
from kdjax import adapters, config, loop, losses, parallel
from kdjax.data import text
from kdjax.models.decoder import architecture, decoder
from kdjax.pretrained import decoders

TUTORIAL = "docs/tutorials/vision.md"
# Minutes; or data that must be made first.
LONG = {"docs/tutorials/language.md", "docs/decoder.md"}
# test_export.py and test_examples.py run theirs, in processes of their own.
ELSEWHERE = {"docs/export.md", "docs/examples.md"}
RESUMED = {"docs/how-to/resume.md", "docs/explanations/recovery.md"}
PAGES = [
  str(path.relative_to(ROOT))
  for path in sorted((ROOT / "docs").rglob("*.md"))
  if path.parent.name != "notebooks"  # test_notebooks.py
  and blocks(path.read_text(encoding="utf-8"), "python")
]
# A block of Python, and what it prints if the page says so.
SHOWN = re.compile(
  r"^```python\n(?P<code>.*?)^```$(?:\s*^```text\n(?P<output>.*?)^```$)?",
  re.M | re.S,
)
DECIMAL = re.compile(r"-?\d+\.\d+")


def run(name, names, tolerance=None):
  """The Python of a page in order; it prints what the page shows.

  Decimals are compared if there is a tolerance for them.
  """
  page = read(name)
  for block in SHOWN.finditer(page):
    # Errors then point into the text.
    line = page[: block.start("code")].count("\n")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
      exec(compile("\n" * line + block["code"], name, "exec"), names)
    if block["output"] is None:
      continue
    got, shown = printed.getvalue(), block["output"]
    assert DECIMAL.sub("#", got) == DECIMAL.sub("#", shown), got
    if tolerance is not None:
      np.testing.assert_allclose(
        [float(x) for x in DECIMAL.findall(got)],
        [float(x) for x in DECIMAL.findall(shown)],
        atol=tolerance,
        err_msg=got,
      )


@pytest.fixture(scope="module", autouse=True)
def _one_device():
  """Eight devices compile longer, and other tests split the same steps."""
  with pytest.MonkeyPatch.context() as patch:
    mesh = parallel.make_mesh(1)
    patch.setattr(parallel, "make_mesh", lambda **_: mesh)
    yield


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))


@contextlib.contextmanager
def brief(steps=2):
  """Every `distill` makes so many steps at most."""

  @functools.wraps(loop.distill)
  def distill(**options):
    options["steps"] = min(steps, options["steps"])
    return loop.distill(**options)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(kdjax, "distill", distill)
    yield


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory, _one_device):
  """The names that the how-to pages go on from."""
  folder = tmp_path_factory.mktemp("tutorial")
  with brief(), pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    patch.setenv("TFDS_DATA_DIR", str(folder))
    names = {"__name__": "docs"}
    run(TUTORIAL, names)
  return names


def test_the_tutorial_runs(tutorial):
  assert {"teacher", "student", "train", "test", "taught"} <= set(tutorial)


def test_no_python_hides_from_the_tests():
  """A block without a language is commands, a tree or an output."""
  for path in sorted((ROOT / "docs").rglob("*.md")):
    for line, block in blocks(path.read_text(encoding="utf-8"), ""):
      found = re.search(
        r"^(?:(?:from|import) \w|[\w.]+ = \S|\w+\()", block, re.M
      )
      assert not found, (path.name, line, found)


@pytest.mark.parametrize(
  "name", sorted(set(PAGES) - LONG - ELSEWHERE - {TUTORIAL})
)
def test_python_of_the_page_runs(name, tutorial):
  trains = "distill(" in read(name)
  # Of a page that shows how many steps it made, all of them.
  with brief(40 if name in RESUMED else 2):
    names = dict(tutorial)
    if name == "docs/text.md":
      names |= of_texts()
    if name == "docs/report.md":
      report_runs.write(Path("runs/digits"))
    if name == "docs/explanations/recovery.md":
      run("docs/how-to/resume.md", names)  # it looks at that state
    run(name, names, tolerance=None if trains else 0.05)


def of_texts():
  """What docs/text.md takes for granted: files, and a tokenizer."""
  for folder in ("data", "path/to/checkpoint"):
    Path(folder).mkdir(parents=True)
  lines = [json.dumps({"text": f"text {n} " * 200}) for n in range(20)]
  Path("data/texts.jsonl").write_text("\n".join(lines))
  text.save(text.byte_level(), "path/to/checkpoint")
  return dict(adapters=adapters, hinton=kdjax.hinton, losses=losses)


def of_decoders(monkeypatch):
  """What docs/decoder.md takes for granted: a checkpoint, tokens, a config."""
  net = architecture(
    dict(
      model_type="llama",
      vocab_size=61,
      hidden_size=24,
      intermediate_size=32,
      num_hidden_layers=4,
      num_attention_heads=4,
      num_key_value_heads=4,
      max_position_embeddings=64,
      rms_norm_eps=1e-6,
      rope_theta=10000.0,
      hidden_act="silu",
      initializer_range=0.02,
      tie_word_embeddings=True,
    )
  )
  params, _ = decoder(net).init(jax.random.key(0), {})
  monkeypatch.setattr(decoders, "read", lambda *_, **__: (net, params))
  tokens = np.arange(16).reshape(2, 8)
  batch = {
    "tokens": tokens,
    "label": tokens + 1,
    "mask": np.ones(tokens.shape, np.float32),
  }
  return dict(
    tokens=tokens, batches=[batch] * 2, config=SimpleNamespace(), jax=jax
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LONG))
def test_python_of_the_long_page_runs(name, monkeypatch):
  names = {"__name__": "docs"}
  if name == "docs/decoder.md":
    names |= of_decoders(monkeypatch)
  with brief():
    run(name, names)


@pytest.mark.slow
def test_the_pages_print_the_numbers_that_they_show():
  """In full. Other versions of JAX round otherwise, hence the tolerance."""
  names = {"__name__": "docs"}
  run(TUTORIAL, names, tolerance=0.05)
  for name in PAGES:
    if re.match("docs/(how-to|explanations)/", name):
      theirs = dict(names)
      if name == "docs/explanations/recovery.md":
        run("docs/how-to/resume.md", theirs)
      run(name, theirs, tolerance=0.05)


def reference():
  """What the reference has, by the names that it is asked for."""
  pages = sorted((ROOT / "docs/reference").glob("*.md"))
  texts = [page.read_text(encoding="utf-8") for page in pages]
  return [name for t in texts for name in re.findall(r"^::: (\S+)", t, re.M)]


def test_every_module_has_its_place_in_the_reference():
  there = reference()
  assert len(there) == len(set(there))
  told = {
    name.removesuffix("kdjax.").split(".")[1] for name in there if "." in name
  }
  told |= set(re.findall(r"kdjax\.(\w+)", read("docs/reference/running.md")))
  found = {m.name for m in pkgutil.iter_modules(kdjax.__path__)}
  assert found - told == {"__main__"}


PACKAGES = [
  "kdjax",
  "kdjax.losses",
  "kdjax.terms",
  "kdjax.data",
  "kdjax.data.text",
  "kdjax.models",
  "kdjax.models.decoder",
  "kdjax.parallel",
  "kdjax.checkpoint",
  "kdjax.pretrained",
  "kdjax.export",
  "kdjax.report",
  "kdjax.memory_plan",
]
# Of one file each: their public functions and classes.
MODULES = [
  "kdjax.projectors",
  "kdjax.layer_map",
  "kdjax.schedules",
  "kdjax.optimizers",
  "kdjax.recipes",
  "kdjax.adapters",
  "kdjax.evaluate",
  "kdjax.results",
  "kdjax.loggers",
  "kdjax.lora",
  "kdjax.inherit",
  "kdjax.generate",
  "kdjax.in_parts",
  "kdjax.simkd",
]


def is_documented(value):
  """Constants and types of arguments are named in prose."""
  return (
    callable(value)
    and getattr(value, "__doc__", None)
    and (getattr(value, "__module__", "").startswith("kdjax"))
  )


@pytest.mark.parametrize("package", [*PACKAGES, *MODULES])
def test_every_public_name_is_in_the_reference(package):
  module = importlib.import_module(package)
  there = {object_of(name) for name in reference()}
  missing = [
    name
    for name, value in vars(module).items()
    if not name.startswith("_")
    and is_documented(value)
    and (package in PACKAGES or value.__module__ == package)
    and (not hasattr(module, "__all__") or name in module.__all__)
    and value not in there
    and name != "main"  # a command: docs/reference/running.md
  ]
  assert not missing


def object_of(name):
  """The object of a dotted name, some of which are modules."""
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError:
    module, _, last = name.rpartition(".")
    return getattr(object_of(module), last)


def test_every_key_of_a_config_is_explained():
  page = read("docs/reference/config.md")
  for keys in config.KEYS.values():
    for key in config.flat(keys):
      # The three phases have the same keys.
      key = re.sub(r"phases\.(teacher|alone)", "phases.distilled", key)
      assert f"`{key}`" in page, key


@pytest.mark.parametrize(
  "module",
  ["train", "launch", "scaling.command", "export.command", "report.command"],
)
def test_every_flag_is_explained(module):
  page = read("docs/reference/running.md")
  told = importlib.import_module(f"kdjax.{module}").__doc__
  assert told
  flags = set(re.findall(r"--[a-z_]+", told))
  assert flags
  assert {f for f in flags if f"`{f}" not in page} == set()


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


def says(text, quote):
  """Whether a quote is of the text: "…" stands for whatever is there."""
  at = 0
  for part in quote.split("…"):
    at = text.find(part, at)
    if at < 0:
      return False
    at += len(part)
  return True


def test_the_faq_quotes_what_the_code_says():
  said = messages()
  assert len(quoted()) >= 40
  assert [q for q in quoted() if not any(says(t, q) for t in said)] == []


def test_a_quote_must_be_of_one_text():
  assert says("got \0, needs \0: change it", "got …, needs …")
  assert not says("got \0, needs \0: change it", "needs …, got …")
  assert not says("got \0, needs \0: change it", "got … change them")
