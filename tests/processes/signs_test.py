"""Who has not been heard of, by the clock that the test holds."""

import time

import pytest

from kdjax.processes import crew, signs


def test_the_silent_are_told_of_once_and_again_after_they_spoke():
  ear, began = signs.Ear(3, 60.0), time.monotonic()
  assert ear.hear({0: "1", 1: "1"}, began + 1) == []
  assert ear.hear({0: "2", 1: "1"}, began + 29) == []
  (line,) = ear.hear({0: "3", 1: "2"}, began + 31)
  assert "process 2 of 3 has not been heard of for 31 s" in line
  assert "after 60 s" in line
  assert ear.hear({0: "4", 1: "2"}, began + 60) == []
  (line,) = ear.hear({0: "5", 1: "2"}, began + 62)
  assert "process 1 of 3" in line
  # Process 2 comes back, and is silent again.
  assert ear.hear({0: "6", 1: "2", 2: "1"}, began + 63) == []
  (line,) = ear.hear({0: "7", 1: "2", 2: "1"}, began + 94)
  assert "process 2 of 3 has not been heard of for 31 s" in line


def test_errors_of_a_lost_process_and_others():
  lost = [
    "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/"
    "pair.cc:538] Read error [127.0.0.1]:198: Connection reset by peer",
    "INTERNAL: NCCL operation ncclAllReduce failed: remote process exited",
    "UNAVAILABLE: The following tasks are unhealthy (stopped sending "
    "heartbeats):\n1\nThe tasks have crashed.",
  ]
  own = [
    "RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.",
    "INVALID_ARGUMENT: nan at the connection",
    "cannot reshape array of size 3 into gloo",
    "INTERNAL: Mosaic failed to compile",
    "config.name is 'INTERNAL: connection', which is no name",
  ]
  assert all(crew._was_lost(ValueError(text)) for text in lost)
  assert not any(crew._was_lost(ValueError(text)) for text in own)


def test_alone_everything_is_as_without(capsys):
  assert crew.alone()
  assert crew.lead()
  crew.wait_for_all("anything")
  crew.initialize(None, {})
  assert crew.run(lambda: 5, {}) == 5

  def refuse():
    raise crew.UserError("not so")

  assert crew.run(refuse, {crew.UserError: 2}) == 2
  assert capsys.readouterr().err == "kdjax: not so\n"
  with pytest.raises(crew.UserError, match="not so"):
    crew.run(refuse, {KeyError: 3})

  def interrupt():
    raise KeyboardInterrupt

  assert crew.run(interrupt, {}) == 130
