"""The training batches of a run, and the position among them."""

import itertools
from collections.abc import Iterable
from typing import Any

from kdjax import errors
from kdjax.types import Batch


class Feed:
  """Batches and the position among them, which can be saved and gone to."""

  def __init__(self, train: Iterable[Batch]):
    self._batches = iter(train)
    self._tracked = hasattr(self._batches, "set_state")
    begin = self.position
    try:
      self.first = next(self._batches)
    except StopIteration:
      raise errors.UserError(
        "the training data has no batch: check the dataset and its split"
      ) from None
    if "mask" not in self.first:
      raise errors.UserError(
        f"a batch has {sorted(self.first)}, needs 'mask' too: [B], 1 where the "
        "example counts"
      )
    if self._tracked:
      self._batches.set_state(begin)  # type: ignore
    else:
      self._batches = itertools.chain([self.first], self._batches)

  @property
  def position(self) -> Any:
    return self._batches.get_state() if self._tracked else None  # type: ignore

  def go_to(self, position: Any, step: int) -> None:
    if self._tracked and position is not None:
      self._batches.set_state(position)  # type: ignore
    else:
      for _ in range(step):
        next(self)

  def __next__(self) -> Batch:
    try:
      return next(self._batches)
    except StopIteration:
      raise errors.UserError(
        "the training data ended before the last step: repeat it, or ask for "
        "fewer steps"
      ) from None
