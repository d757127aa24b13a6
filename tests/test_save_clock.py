"""Saving by the clock: when, and how often the processes are asked."""

import pytest

from kdjax import processes
from kdjax.save_clock import SaveClock


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def saves(minutes, seconds_a_step):
  """The times at which a run with steps of these lengths saves."""
  clock = Clock()
  when, found = SaveClock(minutes, clock), []
  for seconds in seconds_a_step:
    clock.now += seconds
    if when.due():
      found.append(clock.now - 100)
      when.saved()
  return found


def test_at_every_interval_and_never_before():
  found = saves(2, [0.5] * 2000)
  assert len(found) == 8
  for a, b in zip([0, *found], found):
    assert 120 <= b - a <= 121


def test_zero_is_never():
  assert saves(0, [1e6] * 10) == []


def test_steps_longer_than_the_interval():
  assert saves(1, [90] * 4) == [90, 180, 270, 360]


def test_a_slow_first_step_and_a_change_of_pace():
  # As many steps as would take half of the time, at the pace before.
  found = saves(10, [60, *[0.1] * 20_000])
  assert 600 <= found[0] <= 601
  found = saves(10, [0.1] * 3000 + [0.2] * 3000)
  assert 600 <= found[0] <= 610


def test_few_messages_and_the_word_of_process_0(monkeypatch):
  asked = []

  def of_first(value):
    asked.append(value)
    return value

  monkeypatch.setattr(processes, "of_first", of_first)
  assert len(saves(5, [0.01] * 31_000)) == 1
  assert len(asked) < 40

  # This process's clock stands still; process 0 says that it is time.
  monkeypatch.setattr(processes, "of_first", lambda value: 0)
  when = SaveClock(5, Clock())
  assert when.due()


@pytest.mark.parametrize("steps", [1, 5])
def test_a_save_for_another_reason_counts(steps):
  clock = Clock()
  when = SaveClock(1, clock)
  for _ in range(steps):
    clock.now += 59
    assert not when.due()
    when.saved()
