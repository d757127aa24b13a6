"""What a document's tokens are for: which are targets, which bytes they are."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kdjax.data.text.chat import Spans
from kdjax.data.text.tokenizer import Encoded, Tokenizer


class Marked(NamedTuple):
  """One document's tokens, with what begins and ends it.

  Attributes:
    ids: int [n].
    target: bool [n], as in `Tokens`.
    num_bytes: int [n], as in `Tokens`.
    starts, ends: int [n], the bytes that each stands for, on a scale that two
      tokenizers share: of a text its bytes, what ends it being one more.
  """

  ids: np.ndarray
  target: np.ndarray
  num_bytes: np.ndarray
  starts: np.ndarray
  ends: np.ndarray


def mark_text(encoded: Encoded, tokenizer: Tokenizer, num_bytes: int) -> Marked:
  """A text between what begins and ends it; every token of it a target."""
  prefix = np.asarray(tokenizer.prefix, np.int32)
  last = [] if tokenizer.eos is None else [tokenizer.eos]
  before, after = np.zeros(len(prefix), int), np.full(len(last), num_bytes, int)
  return Marked(
    ids=np.concatenate([prefix, encoded.ids, np.asarray(last, np.int32)]),
    target=np.repeat(
      [False, True], [len(prefix), len(encoded.ids) + len(last)]
    ),
    num_bytes=np.concatenate(
      [before, _new_bytes(encoded, num_bytes), np.zeros(len(last), int)]
    ),
    starts=np.concatenate([before, encoded.starts, after]),
    ends=np.concatenate([before, encoded.ends, after + 1]),
  )


def mark_turns(
  encoded: Encoded, text: str, said: Spans, words: Sequence[str]
) -> Marked:
  """A conversation; its targets share a byte with what the assistant says.

  Two templates write different things around the same words. On the scale of
  `starts` and `ends` the words of a turn are as long as they are, and what
  stands between two turns' words is two units: what the assistant says after
  the words, which ends its turn, and all the rest.

  Args:
    encoded: the tokens of the whole text.
    text: what the chat template wrote.
    said: [(start, stop), ...], characters of it that the assistant says.
    words: what it says in each, as the messages have it.
  """
  at = _byte_of(text)
  target = np.zeros(len(encoded.ids), bool)
  for start, stop in said:
    target |= (encoded.starts < at(stop)) & (encoded.ends > at(start))
  starts, ends = _on_common_scale(encoded, text, said, words)
  return Marked(
    encoded.ids, target, _new_bytes(encoded, len(text.encode())), starts, ends
  )


def _on_common_scale(
  encoded: Encoded, text: str, said: Spans, words: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
  at = _byte_of(text)
  stops, firsts, scale, lengths = [], [], [], []  # of regions of the text
  byte = place = 0

  def region(stop: int, length: int, unit: bool) -> None:
    nonlocal byte, place
    stops.append(stop)
    firsts.append(byte)
    scale.append(place)
    lengths.append(1 if unit else 0)
    byte, place = stop, place + length

  for spoken, (start, stop) in zip(words, said):
    found = text.find(spoken, start, stop)
    # Words that the template changed still take their place on the scale.
    first, last = (found, found + len(spoken)) if found >= 0 else (stop, stop)
    region(at(first), 1, True)
    region(at(last), len(spoken.encode()), False)
    region(at(stop), 1, True)
  region(len(text.encode()), 1, True)
  first, base, unit = (np.asarray(x) for x in (firsts, scale, lengths))
  last = len(stops) - 1
  i = np.minimum(np.searchsorted(stops, encoded.starts, side="right"), last)
  j = np.minimum(np.searchsorted(stops, encoded.ends, side="left"), last)
  starts = base[i] + np.where(unit[i], 0, encoded.starts - first[i])
  ends = base[j] + np.where(unit[j], 1, encoded.ends - first[j])
  return starts, ends


def _byte_of(text: str) -> Callable[[int], int]:
  """Character -> the byte at which it begins."""
  return lambda character: len(text[:character].encode())


def _new_bytes(encoded: Encoded, num_bytes: int) -> np.ndarray:
  """Bytes that each token adds to those before it; the last takes the rest."""
  if not len(encoded.ids):
    return np.zeros(0, np.int64)
  reached = np.maximum.accumulate(encoded.ends)
  reached[-1] = num_bytes
  return np.diff(reached, prepend=0)
