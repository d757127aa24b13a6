"""Refuses a built site whose pages load anything from elsewhere.

    python docs/site/outside.py SITE

Styles, scripts, fonts and images must lie in the site. Links that a reader
follows (`<a href>`) may lead anywhere.
"""

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

# Attributes that a browser loads by itself.
_LOADS = {"src", "srcset", "poster", "data", "xlink:href"}
# Of <link>: those that say something and load nothing.
_SAYS = {"canonical", "alternate", "prev", "next", "license", "author"}
_ADDRESS = re.compile(r"^\s*(?:https?:)?//", re.I)
_IN_STYLE = re.compile(
  r"""(?:url\(|@import)\s*["']?\s*((?:https?:)?//[^"')\s]+)""", re.I
)


class _Page(HTMLParser):
  def __init__(self) -> None:
    super().__init__()
    self.found: list[str] = []
    self._style = False

  def handle_starttag(
    self, tag: str, attrs: list[tuple[str, str | None]]
  ) -> None:
    given = {name: value or "" for name, value in attrs}
    self._style = tag == "style"
    loaded = [given[name] for name in _LOADS & given.keys()]
    if tag == "link" and not set(given.get("rel", "").split()) & _SAYS:
      loaded.append(given.get("href", ""))
    if tag == "image":  # of an SVG
      loaded.append(given.get("href", ""))
    self.found += [x for x in loaded if _ADDRESS.match(x)]
    self.found += _IN_STYLE.findall(given.get("style", ""))

  def handle_data(self, data: str) -> None:
    if self._style:
      self.found += _IN_STYLE.findall(data)


def of_page(html: str) -> list[str]:
  """The addresses elsewhere that a browser would load with the page."""
  page = _Page()
  page.feed(html)
  page.close()
  return page.found


def of_style(css: str) -> list[str]:
  """Those that a browser would load with a style sheet."""
  return _IN_STYLE.findall(re.sub(r"/\*.*?\*/", "", css, flags=re.S))


def outside(site: Path) -> Iterator[tuple[Path, str]]:
  """(file, address) of all that a site loads from elsewhere."""
  for path in sorted(site.rglob("*")):
    find = {".html": of_page, ".css": of_style, ".svg": of_page}.get(
      path.suffix
    )
    if find:
      for address in find(path.read_text(encoding="utf-8")):
        yield path.relative_to(site), address


def main(argv: list[str]) -> int:
  site = Path(argv[1]) if len(argv) == 2 else Path()
  if not (site / "index.html").exists() or len(argv) != 2:
    print(f"got {' '.join(argv[1:]) or 'nothing'}, needs the folder of a site")
    return 2
  found = list(outside(site))
  for path, address in found:
    print(f"{path} loads {address}")
  return 1 if found else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
