"""Files that survive kills."""

import json
import resource

import pytest
from tensorboardX.proto.event_pb2 import Event

from kdjax.errors import UserError
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
  with Writer(tmp_path, resume_step=6) as write:
    write(7, {"loss/total": 1.5, "bad": float("nan")})
  (path,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
  version, starts, of_step = records(path.read_bytes())
  assert version.file_version == "brain.Event:2"
  # TensorBoard hides what an earlier start wrote from this step on.
  assert (starts.step, starts.session_log.status) == (7, 1)
  (value,) = of_step.summary.value
  assert of_step.step == 7
  assert (value.tag, value.simple_value) == ("loss/total", 1.5)


def records(content):
  """The events of a file: length, its checksum, event, its checksum."""
  found = []
  while content:
    size = int.from_bytes(content[:8], "little")
    found.append(Event.FromString(content[12 : 12 + size]))
    content = content[16 + size :]
  return found


@pytest.mark.filterwarnings("error")
def test_a_full_disk_is_one_line(tmp_path):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  told = pytest.raises(UserError, match=r"metrics.jsonl \(File too large\)")
  try:
    with told, Writer(tmp_path) as write:  # closed while the disk is full
      resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
      for step in range(100):
        write(step, {"loss": 1.0})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert 10 < last_step(tmp_path / "metrics.jsonl") < 99


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
