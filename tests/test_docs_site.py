"""The hooks of the site: docs/site. Those of mkdocs need the extra `docs`."""

import importlib.util
import sys

import pytest
from test_readme import ROOT

SITE = ROOT / "docs/site"


def load(name):
  spec = importlib.util.spec_from_file_location(
    f"site_{name}", SITE / f"{name}.py"
  )
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  return module


outside = load("outside")


@pytest.mark.parametrize(
  "html",
  [
    '<script src="https://unpkg.com/x.js"></script>',
    '<script src="//unpkg.com/x.js"></script>',
    '<link rel="stylesheet" href="https://fonts.googleapis.com/css">',
    '<link rel="preconnect" href="https://fonts.gstatic.com">',
    '<img src="http://example.com/a.png">',
    '<img srcset="https://example.com/a.png 2x">',
    "<style>@import 'https://example.com/a.css';</style>",
    '<p style="background: url(https://example.com/a.png)">',
    '<svg><image href="https://example.com/a.png"/></svg>',
    '<iframe src="https://example.com"></iframe>',
  ],
)
def test_what_a_page_would_fetch_is_found(html):
  assert len(outside.of_page(html)) == 1


@pytest.mark.parametrize(
  "html",
  [
    '<a href="https://arxiv.org/abs/1503.02531">paper</a>',
    '<link rel="canonical" href="https://example.com/">',
    '<link rel="stylesheet" href="assets/main.css">',
    '<script src="../site/worker.js"></script>',
    "<code>url(https://example.com)</code>",
  ],
)
def test_what_stays_within_passes(html):
  assert outside.of_page(html) == []


def test_styles_are_looked_at_too(tmp_path, capsys):
  (tmp_path / "index.html").write_text("<p>")
  assert outside.main(["outside", str(tmp_path)]) == 0
  (tmp_path / "a.css").write_text(
    "/* https://a.b */ a { background: url('https://example.com/a.png') }"
  )
  assert outside.main(["outside", str(tmp_path)]) == 1
  assert "a.css loads https://example.com/a.png" in capsys.readouterr().out


def test_a_folder_without_a_site_is_refused(tmp_path):
  assert outside.main(["outside", str(tmp_path)]) == 2
  assert outside.main(["outside"]) == 2


@pytest.fixture(scope="module")
def hooks():
  pytest.importorskip("mkdocs")
  pytest.importorskip("latex2mathml")
  return load("hooks")


@pytest.fixture
def repository(tmp_path):
  for name, text in {
    "README.md": "[docs](docs/a.md) [licence](LICENSE)",
    "LICENSE": "free",
    "launch/README.md": "[up](../docs/b/c.md)",
    "configs/x.py": "# [no](link.md)",
    "configs/y.py": "",
    "kdjax/__init__.py": "from kdjax.loop import distill as distill\n",
    "kdjax/losses.py": "",
    "docs/a.md": "[c](b/c.md) [x](../configs/x.py#L1) [l](../launch/)\n"
    "```\n[kept](../nowhere.md)\n```\n[r](../README.md) `configs/y.py`\n",
    "docs/b/c.md": "[a](../a.md#top) [w](https://example.com) [here](#there)",
  }.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return tmp_path


def test_links_of_the_repository_become_links_of_the_site(hooks, repository):
  docs = repository / "docs"
  page = docs / "a.md"
  assert hooks.relink(page.read_text(), page, docs) == (
    "[c](b/c.md) [x](repository/configs/x.py.md#L1)"
    " [l](repository/launch/README.md)\n"
    "```\n[kept](../nowhere.md)\n```\n"
    "[r](repository/README.md) `configs/y.py`\n"
  )
  page = docs / "b/c.md"
  assert hooks.relink(page.read_text(), page, docs) == page.read_text()
  page = repository / "launch/README.md"
  assert hooks.relink(page.read_text(), page, docs) == "[up](../../b/c.md)"


def test_a_link_to_nothing_is_refused(hooks, repository):
  docs = repository / "docs"
  with pytest.raises(hooks.PluginError, match=r"gone\.md is no file"):
    hooks.relink("[x](gone.md)", docs / "a.md", docs)


def test_pages_are_made_of_what_pages_lead_to(hooks, repository):
  docs = repository / "docs"
  found = hooks.outside([docs / "a.md", docs / "b/c.md"], docs)
  names = [str(p.relative_to(repository)) for p in found]
  assert names == [
    *("LICENSE", "README.md", "configs/x.py", "configs/y.py"),
    "launch/README.md",
  ]
  for path in [*found, docs / "b/c.md"]:
    assert hooks.source(hooks.uri_of(path, docs), docs) == path


def test_names_of_parts(hooks, repository):
  want = {
    "losses.kl": "kdjax.losses.kl",
    "kdjax.losses.kl": "kdjax.losses.kl",
    "distill": "kdjax.distill",
    "kdjax/losses.py": "kdjax.losses",
    "config.json": None,
    "losses": None,
    "temperature": None,
  }
  assert {n: hooks.part_of(n, repository) for n in want} == want


def test_tex_becomes_mathml(hooks):
  page = (
    r'<p><span class="arithmatex">\(a &lt; \log q_i\)</span></p>'
    r'<div class="arithmatex">\[T^2\]</div>'
  )
  made = hooks.mathml(page)
  assert made.count("<math ") == 2
  assert 'display="inline"' in made
  assert 'display="block"' in made
  assert "<msub><mi>q</mi><mi>i</mi></msub>" in made
  assert "arithmatex" not in made


@pytest.mark.parametrize(
  "tex", [r"\nosuchthing", r"\begin{aligned} a &amp; b \end{aligned}"]
)
def test_tex_that_is_not_understood_is_refused(hooks, tex):
  with pytest.raises(hooks.PluginError, match="no MathML for"):
    hooks.mathml(rf'<span class="arithmatex">\({tex}\)</span>')


def test_functions_stand_apart(hooks):
  made = hooks.mathml(r'<span class="arithmatex">\(p_i \log q_i\)</span>')
  gap = '<mspace width="0.17em" />'
  assert f"</msub>{gap}<mi>log</mi>{gap}<msub>" in made


@pytest.fixture(scope="module")
def docstrings():
  pytest.importorskip("griffe")
  return load("docstrings")


def test_sections_of_a_docstring(docstrings):
  made = docstrings.markdown(
    "Trains `x`, if a < b.\n"
    "\n"
    "    y = f(x)\n"
    "\n"
    "    z = g(y)\n"
    "\n"
    "Args:\n"
    "  student, teacher: networks: both\n"
    "    of them.\n"
    "  steps: in all.\n"
    "\n"
    "Returns:\n"
    "  A number: one.\n"
    "\n"
    "Raises:\n"
    "  UserError: always.\n"
    "\n"
    "Source: Hinton et al. 2015, arXiv 1503.02531, section 2, or\n"
    "  doi 10.1098/rspa.1946.0056.\n"
  )
  assert made == (
    "Trains `x`, if a &lt; b.\n\n"
    "```python\ny = f(x)\n\nz = g(y)\n```\n\n"
    "**Arguments:**\n\n"
    "`student`, `teacher`\n:   networks: both\n    of them.\n\n"
    "`steps`\n:   in all.\n\n"
    "**Returns:** A number: one.\n\n"
    "**Raises:**\n\n`UserError`\n:   always.\n\n"
    "**Source:** Hinton et al. 2015, "
    "[arXiv 1503.02531](https://arxiv.org/abs/1503.02531), section 2, or\n"
    "[doi 10.1098/rspa.1946.0056](https://doi.org/10.1098/rspa.1946.0056)."
  )


@pytest.mark.parametrize(
  ("code", "language"),
  [
    ("python -m kdjax.train --help", "bash"),
    ("x = f(1)", "python"),
    ("total = alpha · hard", "text"),
  ],
)
def test_the_language_of_an_indented_block(docstrings, code, language):
  made = docstrings.markdown(f"Says:\n\n    {code}\n\nand more.")
  assert made == f"Says:\n\n```{language}\n{code}\n```\n\nand more."


def test_papers_are_links(docstrings):
  link = "[arXiv 1710.09412](https://arxiv.org/abs/1710.09412)"
  for said in ("arXiv 1710.09412", "arxiv.org/abs/1710.09412"):
    assert docstrings.markdown(f"See {said}, and x.") == f"See {link}, and x."
    assert docstrings.markdown(f"See `{said}`.") == f"See `{said}`."


def test_a_list_in_a_paragraph_gets_its_gap(docstrings):
  made = docstrings.markdown(
    "Touch two:\n  1. this,\n     and more;\n  2. that."
  )
  assert made == "Touch two:\n\n1. this,\n   and more;\n2. that."


def test_two_columns_are_definitions(docstrings):
  made = docstrings.markdown(
    "Metrics.\n\naccuracy  share of those\n          that are right\n"
    "nll       nats"
  )
  assert made == (
    "Metrics.\n\n`accuracy`\n:   share of those\n    that are right\n\n"
    "`nll`\n:   nats"
  )
