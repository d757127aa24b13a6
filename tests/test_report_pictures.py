"""Pictures of the report: nothing is cut off, steps are whole, tokens show."""

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kdjax.report import against, charts, curves, style
from kdjax.report.measures import Bins
from kdjax.report.runs import Network

PARTS = (
  "steps",
  "compilation",
  "evaluation",
  "restoring",
  "setup",
  "input",
  "saving",
)


@pytest.fixture
def drawn(monkeypatch):
  """The axes of what is drawn, not stored."""

  def picture(name, says, draw, *, width=5.0, height=3.1):
    with matplotlib.rc_context(style._settings(style.LIGHT)):
      figure = Figure(figsize=(width, height), layout="constrained")
      canvas = FigureCanvasAgg(figure)
      draw(figure, style.LIGHT)
      canvas.draw()
    return figure.axes

  monkeypatch.setattr(charts, "picture", picture)
  monkeypatch.setattr(curves, "picture", picture)


def words(axes):
  return [text.get_text() for text in axes.get_legend().get_texts()]


def assert_within(axes):
  """The legend is in the picture, and above what is drawn."""
  box, whole = axes.get_legend().get_window_extent(), axes.figure.bbox
  assert whole.x0 <= box.x0 < box.x1 <= whole.x1
  assert axes.bbox.y1 <= box.y0 < box.y1 <= whole.y1
  assert box.y1 <= axes._left_title.get_window_extent().y0


def test_the_legend_of_times_has_all_that_can_be_seen(drawn):
  seconds = dict.fromkeys(PARTS, 5.0) | {"saving": 0.001}
  (axes,) = charts.times([("student distilled", seconds)])
  assert set(words(axes)) == set(PARTS) - {"saving"}
  assert_within(axes)


def test_the_legend_of_the_calibration_hides_no_mark(drawn):
  bins = Bins(np.arange(1, 16) * 10, np.ones(15), np.linspace(0, 1, 15))
  names = "teacher", "student alone", "student distilled"
  top, _ = charts.reliability([(n, k, bins) for k, n in enumerate(names)])
  assert len(words(top)) == 3
  assert_within(top)
  long = "runs_of_last_week/resnet32x4_to_resnet8x4"
  top, _ = charts.reliability([(long, 0, bins), (long, 1, bins)])
  assert_within(top)


@pytest.mark.parametrize("steps", [1, 3, 600])
def test_steps_are_whole(steps, drawn):
  rows = np.stack([np.arange(1.0, steps + 1)] * 2, -1)
  line = curves.Series("student", 0, [Network({"x": rows}, {}, {}, None)])
  (axes,) = curves._of_one("x", [line])
  assert all(tick == round(tick) for tick in axes.get_xticks())


@pytest.mark.parametrize(
  ("text", "shown"),
  [
    (" a\n", "␣a↵"),
    ("\t", "→"),
    ("\x0c", "␌"),
    ("\x1b[0m", "␛[0m"),
    ("\x7f", "\\x7f"),
    ("é", "é"),
    ("", "∅"),
  ],
)
def test_a_token_without_a_shape_gets_one(text, shown):
  assert against.visible(text) == shown
