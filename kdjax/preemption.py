"""SIGTERM, as a machine that is taken away sends it: save, then leave."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

# JAX's service agrees on the question at which all processes stop, so each must
# ask equally often, over all phases of a run.
_QUESTIONS = itertools.count(1)


class Preempted(Exception):
  """The run was told to stop, and can go on. The command exits with 143."""


@contextlib.contextmanager
def watched() -> Iterator[Callable[[], bool]]:
  """A question to ask before every step: is the run to stop here?

  In one process SIGTERM is caught as long as the context lasts, if this is the
  main thread: elsewhere Python has no say in signals. With several, JAX's own
  service catches it, from `jax.distributed.initialize` on: a signal to any one
  makes all of them stop before the same step.
  """
  if jax.process_count() > 1:
    yield lambda: multihost_utils.reached_preemption_sync_point(
      next(_QUESTIONS)
    )
    return
  told = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield told.is_set
    return
  before = signal.signal(signal.SIGTERM, lambda *_: told.set())
  try:
    yield told.is_set
  finally:
    # None: a handler that was not set from Python, which it cannot put back.
    signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
