"""What mkdocs does not do by itself: links into the repository, mathematics.

The Markdown reads well in the repository, where a link leads to a file. Here
such a link leads to that file's page: the text of a file that lies outside of
`docs/`, made when the site is built. TeX becomes MathML, which browsers draw
themselves, so that no page needs a script or a font for it.
"""

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from latex2mathml import converter
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url

# Where the pages of files outside of `docs/` are.
FOLDER = "repository"
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_FENCED = re.compile(r"^(```.*?^```\s*?$)", re.M | re.S)
# Files that prose names, in backticks or after --config=.
_NAMED = re.compile(r"(?:configs|benchmarks|launch)/[\w./-]+\.(?:py|md|sh|sbatch|yaml)")
_LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash"}
_MATH = re.compile(
  r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S
)
_CODE = re.compile(r"<code>([\w./-]+)</code>")
# What the plugin `offline` would have each page fetch.
_WORKER = '<script src="https://unpkg.com/iframe-worker/shim"></script>'
# Links, headings and blocks of code keep the code in them.
_KEPT = re.compile(r"(<(a|h\d|pre)\b.*?</\2>)", re.S)


def on_files(files: Files, *, config: Any) -> Files:
  """Adds a page for each file of the repository that a page leads to."""
  docs = Path(config.docs_dir)
  root = docs.parent
  texts = {
    docs / f.src_uri: (docs / f.src_uri).read_text(encoding="utf-8")
    for f in files.documentation_pages()
  }
  made: dict[Path, str] = {}
  while texts:
    path, text = texts.popitem()
    for target in _outside(path, text, docs):
      if target not in made:
        made[target] = content = target.read_text(encoding="utf-8")
        if target.suffix == ".md":
          texts[target] = content
  for path, text in sorted(made.items()):
    files.append(
      File.generated(config, _page(path, root), content=_shown(path, text, root))
    )
  return files


def on_page_markdown(
  markdown: str, *, page: Any, config: Any, files: Files
) -> str:
  """Turns links of the repository into links of the site."""
  uri, docs = page.file.src_uri, Path(config.docs_dir)
  path = source(uri, docs)
  return relink(markdown, path, uri, docs) if path.suffix == ".md" else markdown


def on_page_content(
  html: str, *, page: Any, config: Any, files: Files
) -> str:
  """TeX -> MathML; names of files and of kdjax's parts become links."""
  here = Path(page.file.src_uri).parent

  def link(found: re.Match[str]) -> str:
    name = found[1]
    if (file := files.get_file_from_path(f"{FOLDER}/{name}.md")) is not None:
      address = file.url_relative_to(page.file)
      return f'<a href="{address}">{found[0]}</a>'
    if (part := _part(name)) is not None:
      return f'<autoref optional identifier="{part}">{found[0]}</autoref>'
    return found[0]

  pieces = _KEPT.split(mathml(html))
  # Each piece that is kept is followed by the name of its tag.
  del pieces[2::3]
  pieces[::2] = [_CODE.sub(link, piece) for piece in pieces[::2]]
  return "".join(pieces)


def mathml(html: str) -> str:
  """What arithmatex marked, as MathML."""

  def convert(found: re.Match[str]) -> str:
    _, kind, tex = found.groups()
    return _mathml(tex.strip(), "block" if kind == "[" else "inline")

  return _MATH.sub(convert, html)


@cache
def _mathml(tex: str, display: Any) -> str:
  for entity, sign in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
    tex = tex.replace(entity, sign)
  made = converter.convert(tex, display=display)
  if "\\" in re.sub(r"<annotation.*?</annotation>", "", made):
    raise PluginError(f"no MathML for {tex!r}")
  return made


def relink(markdown: str, source: Path, uri: str, docs: Path) -> str:
  """Links that are right at `source`, made right for the page at `uri`."""

  def replace(found: re.Match[str]) -> str:
    target = _target(source, found[2])
    if target is None:
      return found[0]
    root = docs.parent
    if not target.is_relative_to(root) or not target.exists():
      raise PluginError(f"{source}: there is no {found[2]}")
    target = _readme(target)
    to = (
      target.relative_to(docs).as_posix()
      if target.is_relative_to(docs)
      else _page(target, root)
    )
    to = os.path.relpath(to, os.path.dirname(uri) or ".")
    return f"{found[1]}{to}{found[3]}"

  # What is split off between the fences is what they hold.
  parts = _FENCED.split(markdown)
  parts[::2] = [_LINK.sub(replace, part) for part in parts[::2]]
  return "".join(parts)


def source(uri: str, docs: Path) -> Path:
  """The file that a page was made of."""
  if not uri.startswith(f"{FOLDER}/"):
    return docs / uri
  path = docs.parent / uri.removeprefix(f"{FOLDER}/")
  return path if path.exists() else path.with_suffix("")


def _page(path: Path, root: Path) -> str:
  """The page of a file outside of `docs/`: README.md, configs/digits.py.md."""
  name = path.relative_to(root).as_posix()
  # mkdocs would take README.md for the index of its folder.
  name = name if path.suffix == ".md" else f"{name}.md"
  return f"{FOLDER}/{name}"


def _shown(path: Path, text: str, root: Path) -> str:
  if path.suffix == ".md":
    return text
  name = path.relative_to(root).as_posix()
  language = _LANGUAGES.get(path.suffix, path.suffix[1:] or "text")
  return f"# `{name}`\n\n````{language}\n{text.rstrip()}\n````\n"


def _outside(path: Path, text: str, docs: Path) -> set[Path]:
  """The files outside of `docs/` that a text leads to."""
  if path.suffix != ".md":
    return set()
  prose = "".join(_FENCED.split(text)[::2])
  linked = [_target(path, m[2]) for m in _LINK.finditer(prose)]
  named = [docs.parent / m[0] for m in _NAMED.finditer(text)]
  found = {_readme(p) for p in [*linked, *named] if p and p.exists()}
  return {p for p in found if p.is_file() and not p.is_relative_to(docs)}


def _readme(path: Path) -> Path:
  return path / "README.md" if (path / "README.md").exists() else path


def _target(source: Path, link: str) -> Path | None:
  """The file that a relative link means."""
  if re.match(r"\w+:", link):
    return None
  return Path(os.path.normpath(source.parent / link))


def _part(name: str) -> str | None:
  """`losses.kl` or `kdjax/losses/fused.py` as a name of Python."""
  parts = {"losses", "terms", "projectors", "data", "models", "parallel",
           "recipes", "checkpoint", "pretrained", "optimizers", "schedules"}
  if name.startswith("kdjax/"):
    return name.removesuffix(".py").rstrip("/").replace("/", ".")
  if name.startswith("kdjax."):
    return name
  return f"kdjax.{name}" if name.partition(".")[0] in parts and "." in name else None


def on_post_page(output: str, *, page: Any, config: Any) -> str:
  """The search's worker for file:// comes with the site, not from afar."""
  return local_worker(output, page.file.url)


def on_post_template(
  output_content: str, *, template_name: str, config: Any
) -> str:
  """Of pages that may be shown at any address, such as 404."""
  return output_content.replace(_WORKER, "")


def local_worker(html: str, url: str) -> str:
  ours = f'<script src="{get_relative_url("site/worker.js", url)}"></script>'
  return html.replace(_WORKER, ours)
