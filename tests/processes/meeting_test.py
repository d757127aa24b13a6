"""The meeting before a run: threads stand for processes, sockets are real."""

import json
import socket
import threading
import time

import pytest

from kdjax.errors import UserError
from kdjax.processes import agreement, meeting
from kdjax.processes.place import Place


@pytest.fixture
def address():
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return f"localhost:{probe.getsockname()[1]}"


def meet_all(address, guests, seconds=20.0):
  """[(index, count, facts)] -> what each of them was refused with, or None."""
  said = [None] * len(guests)

  def one(n):
    index, count, facts = guests[n]
    try:
      meeting.meet(Place(address, count, index), facts, seconds)
    except UserError as error:
      absent = isinstance(error, meeting.AbsentError)
      said[n] = f"absent: {error}" if absent else str(error)

  threads = [
    threading.Thread(target=one, args=(n,)) for n in range(len(guests))
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(seconds + 15)
    assert not thread.is_alive()
  return said


FACTS = {"config": {"alpha": 0.1, "T": 4}, "version": {"jax": "0.10.2"}}


def test_those_who_agree_go_on(address):
  assert meet_all(address, [(n, 4, FACTS) for n in range(4)]) == [None] * 4
  # The port is free again for jax's own service.
  with meeting._listen(address):
    pass


def test_all_hear_what_differs_and_where(address):
  other = {"config": {"alpha": 0.5, "T": 4}, "version": {"jax": "0.10.2"}}
  said = meet_all(
    address, [(0, 4, FACTS), (1, 4, FACTS), (2, 4, other), (3, 4, other)]
  )
  assert len(set(said)) == 1
  assert "config alpha is 0.5 in processes 2, 3, 0.1 in process 0" in said[0]
  assert "T is" not in said[0]
  assert "jax" not in said[0]


def test_a_number_given_twice(address):
  said = meet_all(address, [(0, 3, FACTS), (1, 3, FACTS), (1, 3, FACTS)])
  assert len(set(said)) == 1
  assert "number 1 of 3 was given to two processes" in said[0]


def test_more_processes_than_process_0_expects(address):
  said = meet_all(address, [(0, 2, FACTS), (2, 3, FACTS)])
  assert len(set(said)) == 1
  assert said[0].startswith("process 2 ")
  assert "one of 3 processes" in said[0]
  assert "as one of 2" in said[0]


def test_those_who_do_not_come_are_named_in_bounded_time(address):
  began = time.monotonic()
  said = meet_all(address, [(0, 4, FACTS), (2, 4, FACTS)], seconds=1.0)
  assert time.monotonic() - began < 10
  assert said[0].startswith("absent: processes 1, 3 of 4 did not come")
  # The guest's own time may run out a little before process 0's.
  late = said[1].startswith("absent: process 2 of 4 got no answer")
  assert said[1] == said[0] or late


def test_without_process_0(address):
  began = time.monotonic()
  (said,) = meet_all(address, [(1, 2, FACTS)], seconds=1.0)
  assert time.monotonic() - began < 10
  assert said.startswith("absent: process 1 of 2 got no answer from process 0")


def test_one_that_died_may_come_again(address):
  host, _, port = address.rpartition(":")
  hello = {"run": "kdjax", "index": 1, "count": 2, "who": "x", "facts": FACTS}
  said: list = []
  first = threading.Thread(
    target=lambda: said.extend(meet_all(address, [(0, 3, FACTS)]))
  )
  first.start()
  with _connected(host, int(port)) as link:
    link.sendall(json.dumps({**hello, "count": 3}).encode() + b"\n")
    time.sleep(0.5)  # it is heard, and then it dies
  said += meet_all(address, [(1, 3, FACTS), (2, 3, FACTS)])
  first.join()
  assert said == [None] * 3


def test_a_stranger_at_the_port_is_no_process(address):
  host, _, port = address.rpartition(":")
  said: list = []
  first = threading.Thread(
    target=lambda: said.extend(meet_all(address, [(0, 2, FACTS)]))
  )
  first.start()
  with _connected(host, int(port)) as link:
    link.sendall(b"GET / HTTP/1.1\r\n\r\n")
    said += meet_all(address, [(1, 2, FACTS)])
  first.join()
  assert said == [None] * 2


def test_another_program_at_the_port(address):
  host, _, port = address.rpartition(":")
  with socket.create_server((host, int(port))) as server:

    def serve():
      link, _ = server.accept()
      link.sendall(b"\x00\x00\x12\x04HTTP/2 settings, such as jax's service")
      time.sleep(0.5)
      link.close()

    thread = threading.Thread(target=serve)
    thread.start()
    began = time.monotonic()
    (guest,) = meet_all(address, [(1, 2, FACTS)])
    assert "has begun without it, or to another program" in guest
    (host_said,) = meet_all(address, [(0, 2, FACTS)])
    assert "cannot listen" in host_said
    assert time.monotonic() - began < 10
    thread.join()


def test_differences_tell_files_versions_and_how_many():
  ours = {"code": {"kdjax/loop.py": "a"}, "config": {}}
  theirs = {
    "code": {"kdjax/loop.py": "b"},
    "config": {f"k{n}": n for n in range(9)},
  }
  said = agreement.differences({0: ours, 7: theirs})
  assert said is not None
  assert "kdjax/loop.py is another file in process 7 than in process 0" in said
  assert "config k0 is 0 in process 7, None in process 0" in said
  assert "and 5 more" in said
  assert agreement.differences({0: ours, 1: dict(ours)}) is None


def test_the_facts_of_a_process_are_the_code_and_versions():
  assert "kdjax/processes/agreement.py" in agreement.code()
  assert all(len(digest) == 16 for digest in agreement.code().values())
  assert {"jax", "jaxlib", "python", "XLA_FLAGS"} <= set(agreement.versions())


def _connected(host, port):
  until = time.monotonic() + 10
  while True:
    try:
      return socket.create_connection((host, port))
    except OSError:
      assert time.monotonic() < until
      time.sleep(0.05)
