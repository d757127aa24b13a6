"""Before a run begins, its processes meet at the coordinator's address.

Each says who it is in one line of JSON; process 0 waits for all, compares, and
answers everyone alike. Only then does jax start its own service at this port.
jax could say nothing of this kind: it waits for all processes before it lets
any speak, aborts with a stack trace where one is missing or too many, and a
second process of one number aborts a run that is under way (jax 0.10).
"""

import contextlib
import json
import os
import socket
import time
from typing import Any

from kdjax.errors import UserError
from kdjax.processes.agreement import Facts, differences, numbers
from kdjax.processes.place import Place

_MOST = 1 << 22  # bytes of a line; a config has some kilobytes
_PAUSE = 0.2  # seconds between two tries


class AbsentError(UserError):
  """A process did not come in time. It may only be late: try again."""


# Process number -> the connection to it. Whatever ends a process closes it, so
# that the other end knows at once. Nothing is sent.
Links = dict[int, socket.socket]


def meet(place: Place, facts: Facts, seconds: float) -> Links:
  """Returns once all processes have come and agree.

  Args:
    place: this process's.
    facts: what all must have in common, as JSON.
    seconds: how long to wait for the others.

  Returns:
    On process 0 links to all others, on those one to process 0.

  Raises:
    AbsentError: on every process that came: one did not.
    UserError: likewise: a number is taken twice or is too large, or the facts
      differ.
  """
  hello = {
    "run": "kdjax",
    "index": place.index,
    "count": place.count,
    "who": f"{socket.gethostname()} pid {os.getpid()}",
    "facts": facts,
  }
  deadline = time.monotonic() + seconds
  links: Links = {}
  if place.index == 0:
    wrong = _receive(place, hello, deadline, seconds, links)
  else:
    wrong = _visit(place, hello, deadline, seconds, links)
  if wrong is None:
    return links
  for link in links.values():
    link.close()
  raise wrong


def is_local(address: str) -> bool:
  return address.rpartition(":")[0] in ("localhost", "127.0.0.1")


def _receive(
  place: Place,
  hello: dict[str, Any],
  deadline: float,
  seconds: float,
  guests: Links,
) -> UserError | None:
  """Process 0: what is wrong, told to all who came."""
  came: dict[int, dict[str, Any]] = {0: hello}
  with _listen(place.address) as server:
    server.settimeout(_PAUSE)
    wrong = None
    while wrong is None:
      if len(came) == place.count:
        differing = differences({k: v["facts"] for k, v in came.items()})
        wrong = UserError(differing) if differing else None
        break
      if time.monotonic() > deadline:
        missing = numbers(set(range(place.count)) - set(came))
        wrong = AbsentError(
          f"{missing} of {place.count} did not come to {place.address} within "
          f"{seconds:g} s: start all of them, with the same --coordinator and "
          "--processes"
        )
        break
      try:
        guest, _ = server.accept()
      except TimeoutError:
        continue
      _keep_alive(guest)
      said = _read(guest, 5.0)
      if not said or said.get("run") != "kdjax":
        guest.close()  # not one of ours
        continue
      _forget_gone(guests, came)
      wrong = _misfit(place, came, said)
      # Of two with one number both are to hear of it.
      index = said["index"] if wrong is None else -1
      guests[index], came[index] = guest, said
    answer = {
      "wrong": wrong and str(wrong),
      "absent": isinstance(wrong, AbsentError),
    }
    for guest in guests.values():
      with contextlib.suppress(OSError):
        guest.settimeout(5.0)
        guest.sendall(json.dumps(answer).encode() + b"\n")
  return wrong


def _forget_gone(
  guests: dict[int, socket.socket], came: dict[int, Any]
) -> None:
  """One that died meanwhile may be started again."""
  for index in [n for n, guest in guests.items() if is_gone(guest)]:
    guests.pop(index).close()
    del came[index]


def _misfit(
  place: Place, came: dict[int, dict[str, Any]], said: dict[str, Any]
) -> UserError | None:
  index, count, who = said["index"], said["count"], said["who"]
  if count != place.count:
    return UserError(
      f"process {index} ({who}) was started as one of {count} processes, "
      f"process 0 ({came[0]['who']}) as one of {place.count}: give all of them "
      "the same number"
    )
  if index in came:
    return UserError(
      f"number {index} of {count} was given to two processes, "
      f"{came[index]['who']} and {who}: number them from 0 to {count - 1}"
    )
  return None


def _visit(
  place: Place,
  hello: dict[str, Any],
  deadline: float,
  seconds: float,
  links: Links,
) -> UserError | None:
  """Another process: what process 0 finds wrong."""
  host, _, port = place.address.rpartition(":")
  while True:
    left = deadline - time.monotonic()
    if left <= 0:
      return AbsentError(
        f"process {place.index} of {place.count} got no answer from process 0 "
        f"at {place.address} within {seconds:g} s: start process 0 too, and "
        "see that the address is its own and the port open"
      )
    with contextlib.suppress(OSError):
      link = socket.create_connection((host, int(port)), timeout=left)
      links[0] = link
      _keep_alive(link)
      link.sendall(json.dumps(hello).encode() + b"\n")
      # Process 0 may still be waiting for the others.
      said = _read(link, left + 5.0)
      if said is not None:
        if "wrong" in said:
          kind = AbsentError if said["absent"] else UserError
          return kind(said["wrong"]) if said["wrong"] else None
        return UserError(
          f"process {place.index} of {place.count} came to a run at "
          f"{place.address} that has begun without it, or to another program: "
          "its number is taken or too large, or the port is in use"
        )
    if link := links.pop(0, None):
      link.close()
    time.sleep(_PAUSE)  # not there yet, or gone before it answered


def _listen(address: str) -> socket.socket:
  host, _, port = address.rpartition(":")
  try:
    if is_local(address):
      return socket.create_server((host, int(port)))
    if socket.has_dualstack_ipv6():
      return socket.create_server(
        ("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True
      )
    return socket.create_server(("", int(port)))
  except OSError as error:
    raise UserError(
      f"process 0 cannot listen at {address} ({error.strerror}): another "
      "process 0 or program has the port; choose another"
    ) from error


def _read(link: socket.socket, seconds: float) -> dict[str, Any] | None:
  """A line of JSON; None if the other went, {} if it says something else."""
  line, deadline = b"", time.monotonic() + seconds
  while not line.endswith(b"\n"):
    left = deadline - time.monotonic()
    if left <= 0 or len(line) > _MOST:
      return None
    link.settimeout(left)
    try:
      part = link.recv(1 << 16)
    except OSError:
      return None
    if not part:
      return None if not line else {}
    line += part
    if not line.startswith(b"{"):
      return {}
  try:
    return json.loads(line)
  except ValueError:
    return {}


def _keep_alive(link: socket.socket) -> None:
  """Firewalls forget connections on which nothing is ever sent."""
  link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  if hasattr(socket, "TCP_KEEPIDLE"):  # not on every system
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)


def is_gone(link: socket.socket) -> bool:
  """Whether the other end has closed."""
  link.settimeout(0.0)
  try:
    return not link.recv(1, socket.MSG_PEEK)
  except BlockingIOError:
    return False
  except OSError:
    return True
