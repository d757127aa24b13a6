"""What the processes of one run tell one another, so that all do the same.

In a run of one process nothing is sent.
"""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def gather(value: Any) -> list[Any]:
  """The `value` (JSON) of every process, by its number.

  All processes must call it together, from the thread that runs the steps.
  """
  if jax.process_count() == 1:
    return [value]
  text = json.dumps(value).encode()
  sizes = multihost_utils.process_allgather(np.asarray(len(text), np.int32))
  # Rounded up, so that few sizes are ever compiled.
  room = max(256, 1 << (int(sizes.max()) - 1).bit_length())
  texts = multihost_utils.process_allgather(
    np.frombuffer(text.ljust(room), np.uint8)
  )
  return [json.loads(row.tobytes()) for row in texts]


def of_first(value: Any) -> Any:
  """The `value` (JSON) of process 0."""
  return gather(value)[0]
