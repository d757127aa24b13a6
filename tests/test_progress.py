"""How far a run is, on a terminal, in a log, and in a narrow window."""

import io
import re
import sys
import threading

import pytest

from kdjax import progress
from kdjax.clock import Clock
from kdjax.progress import Progress

_CODE = re.compile(r"\x1b\[\??([0-9;]*)([A-Za-z])|.", re.DOTALL)


class Terminal(io.StringIO):
  encoding = "utf-8"

  def isatty(self):
    return True

  def screen(self):
    """The lines that are seen, of what moves, erases and colours them."""
    seen, row, column = [""], 0, 0
    for match in _CODE.finditer(self.getvalue()):
      number, code = int((match[1] or "0").split(";")[0]), match[2]
      if code == "A":
        row -= number
      elif code == "K":
        seen[row] = ""
      elif code is not None:
        assert code in "hlm", match[0]
      elif match[0] == "\r":
        column = 0
      elif match[0] == "\n":
        row, column = row + 1, 0
        seen += [""] * (row == len(seen))
      else:
        line = seen[row].ljust(column)
        seen[row] = line[:column] + match[0] + line[column + 1 :]
        column += 1
    assert not any(seen[row + 1 :])
    return [line.rstrip() for line in seen[: row + 1]]

  def cursor_is_seen(self):
    shown = re.findall(r"\x1b\[\?25([hl])", self.getvalue())
    return not shown or shown[-1] == "h"


@pytest.fixture
def columns(monkeypatch):
  def set_to(n):
    monkeypatch.setenv("COLUMNS", str(n))

  monkeypatch.setenv("TERM", "xterm-256color")
  monkeypatch.delenv("NO_COLOR", raising=False)
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


def test_a_log_has_the_text_alone(monkeypatch):
  monkeypatch.setenv("FORCE_COLOR", "1")
  file = io.StringIO()
  notes = ["of [0, 1] and [/b] :smile: 'x' 1.5 " * 9 + "end", "\na  b\n--"]
  with Progress("distilling", 10, file=file) as bar:
    for note in notes:
      bar.note(note)
  assert file.getvalue() == "\n".join(notes) + "\n"


def test_a_dumb_terminal_gets_plain_lines(columns, monkeypatch):
  monkeypatch.setenv("TERM", "dumb")
  file = Terminal()
  with Progress("distilling", 10, file=file, every_seconds=0.0) as bar:
    bar.update(5, 0.25)
    bar.note("a note")
  assert file.getvalue() == "distilling: step 5/10, loss 0.2500\na note\n"


def test_a_terminal_without_colour_has_the_same_line(columns, monkeypatch):
  monkeypatch.setenv("NO_COLOR", "1")
  file = Terminal()
  clock = Clock()
  with clock.at("steps"), Progress("a", 8, clock, start=4, file=file):
    assert file.screen()[-1].split() == ["a", "50%", "━" * 15, "4/8"]
  assert "\x1b[3" not in file.getvalue()


def test_what_others_print_is_above_the_line(columns, monkeypatch, capsys):
  file = Terminal()
  monkeypatch.setattr("sys.stderr", file)
  clock = Clock()
  with clock.at("compilation"), Progress("a", 8, clock):
    print("[0, 1] [/b]", file=sys.stderr)
    print("a result")  # to a pipe
    assert file.screen() == ["[0, 1] [/b]", "a  compilation 0:00"]
  assert sys.stderr is file
  assert capsys.readouterr().out == "a result\n"


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
  assert not set("╸╺") & set(line)
  assert end == ""


def test_a_resumed_run_begins_where_it_was(columns):
  file = Terminal()
  clock = Clock()
  with clock.at("steps"), Progress("a", 8, clock, start=4, file=file):
    assert file.screen()[-1].startswith("a  50% " + "━" * 15 + "╺")


def test_what_takes_long_between_steps_is_named(columns):
  seconds = [0.0]
  clock = Clock(lambda: seconds[0])
  file = Terminal()
  with clock.at("compilation"), Progress("a", 8, clock, file=file) as bar:
    seconds[0] = 75.0
    bar.note("a note")
    bar._live.refresh()
    assert file.screen() == ["a note", "a  compilation 1:15"]
  assert file.screen() == ["a note", ""]  # nothing stays of no steps


def test_nothing_of_a_longer_line_stays(columns):
  file, clock = Terminal(), Clock()
  with Progress("a", 8, clock, file=file) as bar:
    with clock.at("steps"):
      bar.update(8, 0.5)
      bar._live.refresh()
      assert file.screen()[0].startswith("a 100% ━")
    with clock.at("evaluation"):
      bar._live.refresh()
      assert file.screen() == ["a  evaluation 0:00"]
      bar.close()
      assert file.screen()[0].startswith("a 100% ━")


def test_a_thread_draws_until_the_end(columns):
  before = set(threading.enumerate())
  seconds = [0.0]
  clock = Clock(lambda: seconds[0])
  drawn = threading.Event()

  class Drawn(Terminal):
    def write(self, text):
      if "0:07" in text:
        drawn.set()
      return super().write(text)

  file = Drawn()

  def interrupted():
    with clock.at("compilation"), Progress("a", 8, clock, file=file):
      seconds[0] = 7.0
      assert drawn.wait(60)
      assert file.cursor_is_seen()
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    interrupted()
  for thread in set(threading.enumerate()) - before:
    thread.join(60)
    assert not thread.is_alive()
  assert file.screen() == [""]
  assert file.cursor_is_seen()


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
  assert max(map(len, file.screen())) <= width
  assert " ".join(" ".join(file.screen()).split()).startswith("a note of")
  if width >= 40:
    assert "600/600" in file.screen()[-2]


def test_what_a_terminal_echoes_of_ctrl_c_stays_in_the_line(columns):
  file = Terminal()
  clock = Clock()
  with clock.at("steps"), Progress("a" * 100, 2, clock, file=file):
    assert len(file.screen()[-1] + "^C") == 80


def test_signs_that_a_terminal_lacks_are_not_used(columns):
  class Plain(Terminal):
    encoding = "ascii"

  file = Plain()
  clock = Clock()
  with clock.at("steps"), Progress("a", 2, clock, start=1, file=file):
    assert file.screen()[0].startswith("a  50% " + "-" * 15 + " ")
  file.getvalue().encode("ascii")


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
