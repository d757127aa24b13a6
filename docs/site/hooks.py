"""What mkdocs does not do by itself: links into the repository, mathematics.

The Markdown reads well in the repository, where a link leads to a file. Here
such a link leads to that file's page: the text of a file that lies outside of
`docs/`, made when the site is built. TeX becomes MathML, which browsers draw
themselves, so that no page needs a script or a font for it.
"""

import html as entities
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
_NAMED = re.compile(
  r"(?:configs|benchmarks|launch)/[\w./-]+\.(?:py|md|sh|sbatch|yaml)"
)
_LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash"}
_MATH = re.compile(
  r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>',
  re.S,
)
_CODE = re.compile(r"<code>([\w./-]+)</code>")
# Links, headings and blocks of code keep the code in them.
_KEPT = re.compile(r"(<(?:a|h\d|pre)\b.*?</(?:a|h\d|pre)>)", re.S)
# What the plugin `offline` would have each page fetch.
_WORKER = '<script src="https://unpkg.com/iframe-worker/shim"></script>'


def on_files(files: Files, *, config: Any) -> Files:
  """Adds a page for each file of the repository that a page leads to."""
  docs = Path(config.docs_dir)
  pages = [docs / f.src_uri for f in files.documentation_pages()]
  for path in outside(pages, docs):
    files.append(
      File.generated(config, uri_of(path, docs), content=_shown(path, docs))
    )
  return files


def on_page_markdown(
  markdown: str, *, page: Any, config: Any, files: Files
) -> str:
  """Turns links of the repository into links of the site."""
  docs = Path(config.docs_dir)
  path = source(page.file.src_uri, docs)
  return relink(markdown, path, docs) if path.suffix == ".md" else markdown


def on_page_content(html: str, *, page: Any, config: Any, files: Files) -> str:
  """TeX -> MathML; names of files and of kdjax's parts become links."""
  root = Path(config.docs_dir).parent

  def link(found: re.Match[str]) -> str:
    name, code = found[1], found[0]
    if (file := files.get_file_from_path(f"{FOLDER}/{name}.md")) is not None:
      return f'<a href="{file.url_relative_to(page.file)}">{code}</a>'
    if (part := part_of(name, root)) is not None:
      # Left as it is where the reference has no such thing.
      return f'<autoref optional identifier="{part}">{code}</autoref>'
    return code

  pieces = _KEPT.split(mathml(html))
  pieces[::2] = [_CODE.sub(link, piece) for piece in pieces[::2]]
  # A value and its error stay on one line.
  pieces[::2] = [piece.replace(" ± ", "\u00a0±\u00a0") for piece in pieces[::2]]
  return "".join(pieces)


def on_post_page(output: str, *, page: Any, config: Any) -> str:
  """The search's worker for file:// comes with the site, not from afar."""
  address = get_relative_url("site/worker.js", page.file.url)
  return output.replace(_WORKER, f'<script src="{address}"></script>')


def on_post_template(
  output_content: str, *, template_name: str, config: Any
) -> str:
  """Of pages that may be shown at any address, such as 404."""
  return output_content.replace(_WORKER, "")


def mathml(html: str) -> str:
  """What arithmatex marked, as MathML."""

  def convert(found: re.Match[str]) -> str:
    tex = entities.unescape(found[2]).strip()
    return _mathml(tex, "block" if found[1] == "[" else "inline")

  return _MATH.sub(convert, html)


@cache
def _mathml(tex: str, display: Any) -> str:
  made = converter.convert(tex, display=display)
  # A command, or the columns of one, that the converter does not know.
  if "\\" in made or ">&<" in made:
    raise PluginError(f"no MathML for {tex!r}: {made}")
  # A function stands a little apart from what is beside it.
  gap = '<mspace width="0.17em" />'
  made = re.sub(r"(<mi>[a-z]{2,}</mi>)", rf"\1{gap}", made)
  return re.sub(
    r"(</m(?:i|n|sub|sup)>)(<mi>[a-z]{2,}</mi>)", rf"\1{gap}\2", made
  )


def outside(pages: list[Path], docs: Path) -> list[Path]:
  """The files outside of `docs/` that pages lead to, and those lead to."""
  found, left = set(), list(pages)
  while left:
    for target in _targets(left.pop(), docs) - found:
      found.add(target)
      left.append(target)
  return sorted(found)


def _targets(path: Path, docs: Path) -> set[Path]:
  if path.suffix != ".md":
    return set()
  text = path.read_text(encoding="utf-8")
  prose = "".join(_FENCED.split(text)[::2])
  linked = [_target(path, m[2]) for m in _LINK.finditer(prose)]
  named = [docs.parent / m[0] for m in _NAMED.finditer(text)]
  return {
    p
    for p in [*linked, *named]
    if p and p.is_file() and not p.is_relative_to(docs)
  }


def relink(markdown: str, path: Path, docs: Path) -> str:
  """The text of the file at `path`, its links right for the file's page."""
  here = os.path.dirname(uri_of(path, docs)) or "."

  def replace(found: re.Match[str]) -> str:
    target = _target(path, found[2])
    if target is None:
      return found[0]
    if not target.is_file():
      raise PluginError(f"{path}: {found[2]} is no file, which a link needs")
    to = os.path.relpath(uri_of(target, docs), here)
    return f"{found[1]}{to}{found[3]}"

  # Every second part is a block of code.
  parts = _FENCED.split(markdown)
  parts[::2] = [_LINK.sub(replace, part) for part in parts[::2]]
  return "".join(parts)


def _target(path: Path, link: str) -> Path | None:
  """The file that a link within the repository means; a folder's README."""
  if re.match(r"\w+:", link):
    return None
  target = Path(os.path.normpath(path.parent / link))
  return target / "README.md" if target.is_dir() else target


def uri_of(path: Path, docs: Path) -> str:
  """A file's page: tutorials/vision.md, repository/configs/digits.py.md."""
  if path.is_relative_to(docs):
    return path.relative_to(docs).as_posix()
  name = f"{FOLDER}/{path.relative_to(docs.parent).as_posix()}"
  return name if path.suffix == ".md" else f"{name}.md"


def source(uri: str, docs: Path) -> Path:
  """The file that a page was made of: the inverse of `uri_of`."""
  if not uri.startswith(f"{FOLDER}/"):
    return docs / uri
  path = docs.parent / uri.removeprefix(f"{FOLDER}/")
  return path if path.exists() else path.with_suffix("")


def _shown(path: Path, docs: Path) -> str:
  text = path.read_text(encoding="utf-8")
  if path.suffix == ".md":
    return text
  name = path.relative_to(docs.parent).as_posix()
  language = _LANGUAGES.get(path.suffix, path.suffix[1:] or "text")
  return f"# `{name}`\n\n````{language}\n{text.rstrip()}\n````\n"


def part_of(name: str, root: Path) -> str | None:
  """`losses.kl`, `hinton` or `kdjax/losses/fused.py` as Python names it."""
  if name.startswith("kdjax/"):
    return name.removesuffix(".py").rstrip("/").replace("/", ".")
  first, *rest = name.removeprefix("kdjax.").split(".")
  there = first in (_parts(root) if rest else _exported(root))
  return f"kdjax.{'.'.join([first, *rest])}" if there else None


@cache
def _parts(root: Path) -> frozenset[str]:
  """The modules and packages right below kdjax."""
  return frozenset(path.stem for path in (root / "kdjax").iterdir())


@cache
def _exported(root: Path) -> frozenset[str]:
  """What the package itself has, and its modules."""
  text = (root / "kdjax/__init__.py").read_text(encoding="utf-8")
  names = frozenset(re.findall(r"import \w+ as (\w+)", text))
  return names - {"cast", "models", "losses"}
