"""Files that survive kills, and lines that tell how far a run is."""

import io
import json

import pytest

from kdjax.metrics import Progress, Writer, write_json


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_file_holds_every_step_once(tmp_path):
  with Writer(tmp_path) as write:
    for step in (1, 2, 3, 4):
      write(step, {"loss": step / 2})
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text() + '{"step": 5, "lo')  # killed while writing
  with Writer(tmp_path, resume_step=2) as write:
    write(3, {"loss": 9.0})
  assert lines(path) == [
    {"step": 1, "loss": 0.5},
    {"step": 2, "loss": 1.0},
    {"step": 3, "loss": 9.0},
  ]


def test_tensorboard_events_are_written(tmp_path):
  with Writer(tmp_path) as write:
    write(1, {"loss/total": 1.5})
  events = list((tmp_path / "tensorboard").glob("events*"))
  assert len(events) == 1
  assert b"loss/total" in events[0].read_bytes()


def test_numbers_that_json_lacks_become_null(tmp_path):
  with Writer(tmp_path) as write:
    write(1, {"loss": float("nan")})
  assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None}]


def test_json_is_written_whole_or_not_at_all(tmp_path):
  path = tmp_path / "results.json"
  write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    write_json(path, {"a": object()})
  assert json.loads(path.read_text()) == {"a": 1}


def test_plain_lines_where_there_is_no_terminal():
  file = io.StringIO()
  bar = Progress("distilling", 10, file=file, every_seconds=0.0)
  bar.update(5, 0.25)
  bar.note("a note")
  bar.update(10, 0.125)
  bar.close()
  first, note, last = file.getvalue().splitlines()
  assert first.startswith("distilling: step 5/10, loss 0.2500, ")
  assert first.endswith(" left")
  assert note == "a note"
  assert last.startswith("distilling: step 10/10, loss 0.1250")


def test_a_bar_on_a_terminal_shows_rate_loss_and_time_left():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  file = Terminal()
  bar = Progress("distilling", 4, file=file)
  for step in range(1, 5):
    bar.update(step, 0.5)
  bar.note("a note")
  bar.close()
  shown = file.getvalue()
  assert "\r" in shown
  assert "4/4" in shown
  assert "loss=0.5000" in shown
  assert "a note" in shown


def test_quiet_says_nothing():
  file = io.StringIO()
  bar = Progress("distilling", 4, file=file, quiet=True, every_seconds=0.0)
  bar.update(4, 0.5)
  bar.note("a note")
  bar.close()
  assert file.getvalue() == ""
