"""Files that survive kills."""

import json

import pytest

from kdjax.files import write_json
from kdjax.metrics import Writer, last_step


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_file_holds_every_step_once(tmp_path):
  with Writer(tmp_path) as write:
    for step in (1, 2, 3, 4):
      write(step, {"loss": step / 2})
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text() + '{"step": 5, "lo')  # killed while writing
  assert last_step(path) == 4
  with Writer(tmp_path, resume_step=2) as write:
    write(3, {"loss": 9.0})
  assert lines(path) == [
    {"step": 1, "loss": 0.5},
    {"step": 2, "loss": 1.0},
    {"step": 3, "loss": 9.0},
  ]


def test_a_file_that_is_not_there_has_no_last_step(tmp_path):
  assert last_step(tmp_path / "metrics.jsonl") == 0


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
