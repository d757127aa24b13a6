"""Event loops that see every task to its end before they close."""

import asyncio
import sys
from collections.abc import Iterable
from typing import Any


def see_to_the_end() -> None:
  """From now on Orbax's event loops close when all of their tasks have ended.

  Orbax reads or writes all arrays at once and closes its loop when one fails;
  each of the others would then print a traceback. It asks asyncio for its
  loops, in threads of its own, too. Nobody else's loop is changed.
  """
  policy = asyncio.get_event_loop_policy()
  others = policy.new_event_loop
  if others.__module__ == __name__:
    return

  def new_event_loop() -> asyncio.AbstractEventLoop:
    # Two frames up: who called asyncio.new_event_loop.
    asks = sys._getframe(2).f_globals.get("__name__", "")
    return _PatientLoop() if asks.startswith("orbax.") else others()

  policy.new_event_loop = new_event_loop


class _PatientLoop(asyncio.SelectorEventLoop):
  def close(self) -> None:
    if not self.is_closed():
      self.run_until_complete(_settle(asyncio.all_tasks(self)))
    super().close()


async def _settle(tasks: Iterable[asyncio.Task[Any]]) -> None:
  await asyncio.gather(*tasks, return_exceptions=True)
  # Those that had failed before are heard of in the loop's next round.
  await asyncio.sleep(0)
