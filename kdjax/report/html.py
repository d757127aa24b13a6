"""A page of HTML, in one file: nothing is fetched from elsewhere."""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from kdjax.report.style import DARK, LIGHT, Picture

_EMPTY = {"br"}


class Html(str):
  """Text that is HTML already; any other is escaped by `el`."""


def el(tag: str, *inside: object, **attributes: object) -> Html:
  """`<tag name="value">inside</tag>`; `class_` and `for_` lose their line."""
  told = "".join(
    f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
    for name, value in attributes.items()
    if value is not None
  )
  end = "" if tag in _EMPTY else f"</{tag}>"
  return Html(f"<{tag}{told}>{join(inside)}{end}")


def join(parts: Sequence[object], between: str = "") -> Html:
  return Html(between.join(_safe(part) for part in parts if part is not None))


def _safe(part: object) -> str:
  return part if isinstance(part, Html) else html.escape(str(part))


def table(
  head: Sequence[object],
  rows: Sequence[Sequence[object]],
  *,
  caption: object = None,
) -> Html:
  """Names to the left, numbers to the right; it scrolls where it is wide."""
  made = el(
    "table",
    None if caption is None else el("caption", el("span", caption)),
    el("thead", el("tr", *(el("th", cell, scope="col") for cell in head))),
    el(
      "tbody",
      *(
        el(
          "tr",
          el("th", row[0], scope="row"),
          *(el("td", cell) for cell in row[1:]),
        )
        for row in rows
      ),
    ),
  )
  return el("div", made, class_="wide")


def image(made: Picture) -> Html:
  """Both versions; the browser shows the one of its colours."""
  says = html.escape(made.says)
  return Html(
    '<picture><source media="(prefers-color-scheme: dark)" '
    f'srcset="{data(made.dark)}"><img src="{data(made.light)}" alt="{says}" '
    f'width="{made.width}" loading="lazy"></picture>'
  )


def pictures(made: Sequence[Picture]) -> Html:
  return el("div", *map(image, made), class_="pictures")


def data(png: bytes) -> str:
  return "data:image/png;base64," + base64.b64encode(png).decode()


def photo(pixels: np.ndarray, says: str) -> Html:
  """An image of the data, uint8 [h, w, c], enlarged without smoothing."""
  gray = pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]
  drawn = io.BytesIO()
  Image.fromarray(gray).save(drawn, format="png", optimize=True)
  return Html(
    f'<img src="{data(drawn.getvalue())}" alt="{html.escape(says)}" '
    'class="photo">'
  )


def page(title: str, body: Sequence[Html], files: Sequence[str]) -> str:
  """The whole; `files` are what lies beside it, to know them again."""
  return (
    "<!doctype html>\n"
    '<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="generator" content="kdjax.report">'
    f'<meta name="kdjax-files" content="{html.escape(" ".join(files))}">'
    f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
    f"<body>{join(body, chr(10))}</body></html>\n"
  )


def _colours(theme) -> str:
  names = ("ground", "ink", "faint", "grid", "heat")
  found = [f"--{name}: {getattr(theme, name)};" for name in names]
  return " ".join(found)


_STYLE = (
  f":root {{ color-scheme: light dark; {_colours(LIGHT)} }}\n"
  "@media (prefers-color-scheme: dark) "
  f"{{ :root {{ {_colours(DARK)} }} }}\n"
  """
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 66rem;
  background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
    "DejaVu Sans", sans-serif;
}
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 {
  font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--grid);
}
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
.faint, caption, figcaption { color: var(--faint); font-size: .875rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .9rem 0 0;
  font-size: .9rem; }
a { color: inherit; text-underline-offset: .2em; }
.note { border-left: 3px solid var(--heat); padding: .1rem .8rem;
  margin: .8rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: .6rem 0 1.1rem; }
table { border-collapse: collapse; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
caption { padding-bottom: .3rem; text-align: left; }
caption span { position: sticky; left: 0; display: inline-block;
  max-width: calc(100vw - 2rem); }
th, td { padding: .28rem .75rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--grid); vertical-align: top; }
tr > :first-child { padding-left: 0 !important; }
th[scope=row], thead th:first-child { text-align: left; }
th[scope=row] { font-weight: 500; }
thead th { font-weight: 600; border-bottom-color: var(--faint); }
.left td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.pictures { display: grid; gap: 1.2rem 1.4rem; margin: .8rem 0 1.2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
.pictures th, .pictures td { padding: .28rem .55rem; }
.pictures img { display: block; max-width: 100%; height: auto; }
.cards { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(8.2rem, 1fr)); }
figure { margin: 0; }
.photo { width: 100%; max-width: 8.2rem; aspect-ratio: 1; object-fit: contain;
  image-rendering: pixelated; background: #808080; border-radius: 4px;
  display: block; border-bottom: 5px solid; }
figcaption { line-height: 1.4; margin-top: .3rem; }
figcaption b { color: var(--ink); font-weight: 600; }
pre, code, .tokens { font: .85rem/1.7 ui-monospace, SFMono-Regular, Menlo,
  Consolas, "DejaVu Sans Mono", monospace; }
pre, .tokens { border: 1px solid var(--grid); border-radius: 6px;
  padding: .6rem .8rem; margin: .3rem 0 1rem; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 26rem; }
.tokens span { border-radius: 3px; padding: .1em 0; }
.tokens .other { text-decoration: underline dotted;
  text-underline-offset: .25em; }
.key { display: inline-block; border: 1px solid var(--grid);
  width: 1.6em; height: 1em; border-radius: 3px;
  vertical-align: -.1em; }
details { margin: .5rem 0; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 30rem) {
  body { padding: 1rem .8rem 3rem; font-size: 15px; } }
"""
)
