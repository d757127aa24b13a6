"""How pictures look: two themes, and colours that the colour-blind tell apart.

The colours are those of Okabe and Ito (2008), on dark ground the lighter ones
among them or lightened. Lines differ by their dashes and markers too.
"""

import dataclasses
import io
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "++", "oo", "**")
_DPI = 192  # two pixels for each of a page's: sharp on fine screens
_COLOURS = 160  # of a stored picture


@dataclasses.dataclass(frozen=True)
class Theme:
  """Colours of a picture; `lines` in the order that things are told apart."""

  name: str
  ground: str
  ink: str
  faint: str
  grid: str
  heat: str
  lines: tuple[str, ...]


LIGHT = Theme(
  name="light",
  ground="#ffffff",
  ink="#1f2328",
  faint="#59636e",
  grid="#e3e6ea",
  heat="#d55e00",
  lines=(
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "#5b5b5b",
    "#8f7a00",
  ),
)
DARK = Theme(
  name="dark",
  ground="#15191f",
  ink="#e6edf3",
  faint="#9aa4af",
  grid="#2d343d",
  heat="#f0803c",
  lines=(
    "#56b4e9",
    "#f0803c",
    "#2ec795",
    "#e8a0c8",
    "#3d8fd1",
    "#e6b800",
    "#b8c0c8",
    "#f0e442",
  ),
)

# Fills a figure: (figure, theme).
Draw = Callable[[Figure, Theme], None]


class Picture(NamedTuple):
  """A picture in both themes, as PNG files.

  Attributes:
    name: of the file, without its ending.
    says: what it shows, for those who cannot see it.
    width: in pixels of a page.
  """

  name: str
  says: str
  light: bytes
  dark: bytes
  width: int


def picture(
  name: str, says: str, draw: Draw, *, width: float = 5.0, height: float = 3.1
) -> Picture:
  """Draws it twice. Sizes are in inches, 96 pixels of a page each."""
  light, dark = (png(draw, t, width, height) for t in (LIGHT, DARK))
  return Picture(name, says, light, dark, round(width * 96))


def png(
  draw: Draw, theme: Theme, width: float, height: float, dpi: int = _DPI
) -> bytes:
  with matplotlib.rc_context(_settings(theme)), warnings.catch_warnings():
    # Names of classes may be in letters that the font has not.
    warnings.filterwarnings("ignore", message=".*Glyph.*")
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    draw(figure, theme)
    canvas.draw()
  # A table of colours makes a third of the size.
  image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
  image = image.quantize(_COLOURS, dither=Image.Dither.NONE)
  stored = io.BytesIO()
  image.save(stored, format="png")
  return stored.getvalue()


def logarithmic(axes: Any, which: str) -> None:
  """ "x" or "y"; numbers written out: powers would be mathematics, now off."""
  axes.set(**{f"{which}scale": "log"})
  axis = getattr(axes, f"{which}axis")
  write = lambda x, _: f"{x:,.0f}" if x >= 10 else f"{x:g}"  # noqa: E731
  low, high = axes.dataLim.intervalx if which == "x" else axes.dataLim.intervaly
  spread = high / low
  subs = (1.0, 2.0, 5.0) if spread < 100 else (1.0, 3.0)
  axis.set_major_locator(LogLocator(subs=subs if spread < 3000 else (1.0,)))
  axis.set_minor_locator(NullLocator())
  axis.set_major_formatter(FuncFormatter(write))


def _settings(theme: Theme) -> Any:
  return {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": theme.ground,
    "axes.edgecolor": theme.faint,
    "axes.labelcolor": theme.ink,
    "axes.titlecolor": theme.ink,
    "axes.formatter.useoffset": False,
    "figure.facecolor": theme.ground,
    "savefig.facecolor": theme.ground,
    "grid.color": theme.grid,
    "grid.linewidth": 0.8,
    "text.color": theme.ink,
    "text.parse_math": False,  # a name may hold a dollar
    "xtick.color": theme.faint,
    "ytick.color": theme.faint,
    "xtick.labelcolor": theme.ink,
    "ytick.labelcolor": theme.ink,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": True,
    "legend.framealpha": 0.8,
    "legend.facecolor": theme.ground,
    "legend.edgecolor": "none",
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "hatch.linewidth": 0.7,
    "hatch.color": theme.ground,
    "errorbar.capsize": 3,
  }


def headed(axes: Any, title: str, *, columns: int) -> None:
  """The title, and below it the legend, above what is drawn."""
  handles, labels = axes.get_legend_handles_labels()
  if not handles:
    axes.set_title(title)
    return
  # Long names, as of runs, take a line each.
  columns = max(1, min(columns, 62 // max(map(len, labels))))
  rows = -(-len(handles) // columns)
  axes.set_title(title, pad=10 + 15 * rows)
  axes.legend(
    handles,
    labels,
    loc="lower left",
    bbox_to_anchor=(0, 1),
    ncols=columns,
    borderpad=0.2,
    handlelength=1.6,
    columnspacing=1.0,
  )
