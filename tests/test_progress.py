"""How far a run is, on a terminal, in a log, and in a narrow window."""

import io
import os

import pytest

from kdjax import progress
from kdjax.clock import Clock
from kdjax.progress import Progress


class Terminal(io.StringIO):
  encoding = "utf-8"

  def isatty(self):
    return True

  def screen(self):
    """The lines that are seen: what follows a \\r is drawn over the line."""
    seen = []
    for line in self.getvalue().split("\n"):
      shown = ""
      for part in line.split("\r"):
        shown = part + shown[len(part) :]
      seen.append(shown.rstrip())
    return seen


@pytest.fixture
def columns(monkeypatch):
  def set_to(n):
    monkeypatch.setenv("COLUMNS", str(n))

  set_to(80)
  return set_to


def test_plain_lines_where_there_is_no_terminal():
  file = io.StringIO()
  bar = Progress("distilling", 10, file=file, every_seconds=0.0)
  bar.update(5, 0.25)
  bar.note("a note")
  bar.update(10, 0.125)
  bar.evaluated(10, {"eval/nll": 0.5, "eval/accuracy": 0.75})
  bar.close()
  first, note, last, evaluated = file.getvalue().splitlines()
  assert first == "distilling: step 5/10, loss 0.2500"
  assert note == "a note"
  assert last.startswith("distilling: step 10/10, loss 0.1250, 0:00 left, ")
  assert last.endswith(" steps/s")
  assert evaluated == "distilling: step 10: nll 0.5, accuracy 0.75"
  assert "\r" not in file.getvalue()


def test_a_line_on_a_terminal_shows_how_far_the_run_is(columns):
  file = Terminal()
  clock = Clock()
  with clock.at("steps"), Progress("distilling", 4, clock, file=file) as bar:
    for step in range(1, 5):
      bar.update(step, 0.5)
    bar.note("a note")
  note, line, end = file.screen()
  assert note == "a note"
  assert line.startswith("distilling 100% ━")
  assert "  4/4  loss 0.5000  0:00 left  " in line
  assert "─" not in line
  assert end == ""


def test_a_resumed_run_begins_where_it_was(columns):
  file = Terminal()
  clock = Clock()
  with clock.at("steps"), Progress("a", 8, clock, start=4, file=file):
    assert file.screen()[-1].startswith("a  50% " + "━" * 15 + "─" * 15)


def test_what_takes_long_between_steps_is_named(columns):
  seconds = [0.0]
  clock = Clock(lambda: seconds[0])
  file = Terminal()
  bar = Progress("a", 8, clock, file=file)
  with clock.at("compilation"):
    seconds[0] = 75.0
    bar.note("a note")  # draws the line anew
    assert file.screen() == ["a note", "a  compilation 1:15"]
  bar.close()
  assert file.screen() == ["a note", ""]  # nothing stays of no steps


def test_nothing_of_a_longer_line_stays(columns):
  file, clock = Terminal(), Clock()
  bar = Progress("a", 8, clock, file=file)
  with clock.at("steps"):
    bar.update(8, 0.5)
  with clock.at("evaluation"):
    bar._draw()
    assert file.screen() == ["a  evaluation 0:00"]
  bar.close()


def test_the_line_is_drawn_again_where_nothing_happens(columns, monkeypatch):
  file = Terminal()
  drawn = []
  monkeypatch.setattr(progress, "_IDLE", 0.001)
  bar = Progress("a", 8, Clock(), file=file)
  monkeypatch.setattr(bar, "_draw", lambda: drawn.append(1))
  while len(drawn) < 3:
    pass
  bar.close()


@pytest.mark.parametrize("width", [12, 20, 40, 60, 79, 200])
def test_a_narrow_window_is_never_overrun(width, columns):
  columns(width)
  file = Terminal()
  clock = Clock()
  with clock.at("steps"), Progress("alone (seed 0)", 600, clock, file=file):
    pass
  with clock.at("steps"):
    bar = Progress("alone (seed 0)", 600, clock, file=file)
    for step in (1, 2, 600):
      bar.update(step, 0.25)
    bar.note("a note of several words that does not fit")
    with clock.at("evaluation"):
      bar.note("another")
    bar.close()
  assert max(map(len, file.screen())) < width
  assert " ".join(" ".join(file.screen()).split()).startswith("a note of")
  if width >= 40:
    assert "600/600" in file.screen()[-2]


def test_signs_that_a_terminal_lacks_are_not_used(columns):
  class Plain(Terminal):
    encoding = "ascii"

  file = Plain()
  clock = Clock()
  with clock.at("steps"), Progress("a", 2, clock, start=1, file=file):
    pass
  file.getvalue().encode("ascii")
  assert "###...".replace("...", "") in file.getvalue()


def test_quiet_says_nothing():
  for file in (io.StringIO(), Terminal()):
    bar = Progress("distilling", 4, file=file, quiet=True, every_seconds=0.0)
    bar.update(4, 0.5)
    bar.note("a note")
    bar.evaluated(4, {"eval/nll": 1.0})
    bar.close()
    assert file.getvalue() == ""


def test_a_table_keeps_its_lines(columns):
  columns(20)
  file = Terminal()
  table = "\na row that is wider than it\n" + "-" * 30
  with Progress("a", 2, file=file) as bar:
    bar.note(table)
  assert table in file.getvalue()


def test_waiting_leaves_nothing_behind(columns, monkeypatch):
  file = Terminal()
  monkeypatch.setattr("sys.stderr", file)
  with progress.at("kdjax", "reading"):
    assert file.screen() == ["kdjax  reading 0:00"]
  assert file.screen() == [""]
  assert os.environ["COLUMNS"] == "80"
