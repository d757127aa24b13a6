"""What a document's tokens are for: which are targets, which bytes they are."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kdjax.data.text.chat import Spans
from kdjax.data.text.offsets import Encoded
from kdjax.data.text.tokenizer import Tokenizer


class Marked(NamedTuple):
  """One document's tokens, with what begins and ends it.

  Attributes:
    ids: int [n].
    target: bool [n], as in `Tokens`.
    num_bytes: int [n], as in `Tokens`.
    starts, ends: int [n], the bytes that each stands for, on a scale that two
      tokenizers share: of a text its bytes, what ends it being one more.
    shared: bool [n], whether it is a target on that scale, and no part of what
      one tokenizer's template alone writes.
  """

  ids: np.ndarray
  target: np.ndarray
  num_bytes: np.ndarray
  starts: np.ndarray
  ends: np.ndarray
  shared: np.ndarray


# Parts of a conversation's text: what the template writes around a turn, the
# words of the turn, and what the assistant says after them to end it.
_OUTSIDE, _WORDS, _CLOSING = range(3)


def mark_text(encoded: Encoded, tokenizer: Tokenizer, num_bytes: int) -> Marked:
  """A text between what begins and ends it; every token of it a target."""
  prefix = np.asarray(tokenizer.prefix, np.int32)
  last = [] if tokenizer.eos is None else [tokenizer.eos]
  before, after = np.zeros(len(prefix), int), np.full(len(last), num_bytes, int)
  target = np.repeat([False, True], [len(prefix), len(encoded.ids) + len(last)])
  return Marked(
    ids=np.concatenate([prefix, encoded.ids, np.asarray(last, np.int32)]),
    target=target,
    num_bytes=np.concatenate(
      [before, _new_bytes(encoded, num_bytes), np.zeros(len(last), int)]
    ),
    starts=np.concatenate([before, encoded.starts, after]),
    ends=np.concatenate([before, encoded.ends, after + 1]),
    shared=target,
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
  regions = np.array([*_regions(text, said, words)])
  kinds, firsts, stops, places = regions.T
  last = len(regions) - 1
  i = np.minimum(np.searchsorted(stops, encoded.starts, side="right"), last)
  j = np.minimum(np.searchsorted(stops, encoded.ends, side="left"), last)
  starts = np.where(kinds[i] == _WORDS, encoded.starts - firsts[i], 0)
  ends = np.where(kinds[j] == _WORDS, encoded.ends - firsts[j], 1)
  return Marked(
    encoded.ids,
    target,
    _new_bytes(encoded, len(text.encode())),
    places[i] + starts,
    places[j] + ends,
    shared=(kinds[i] != _OUTSIDE) & (kinds[j] != _OUTSIDE),
  )


def _regions(
  text: str, said: Spans, words: Sequence[str]
) -> Iterator[tuple[int, int, int, int]]:
  """Kind, first byte, end, and place on the scale, of each part of the text."""
  at = _byte_of(text)
  byte = place = 0
  for spoken, (start, stop) in zip(words, said):
    found = text.find(spoken, start, stop)
    # Words that the template changed still take their place on the scale.
    first, last = (found, found + len(spoken)) if found >= 0 else (stop, stop)
    for kind, end, length in (
      (_OUTSIDE, at(first), 1),
      (_WORDS, at(last), len(spoken.encode())),
      (_CLOSING, at(stop), 1),
    ):
      yield kind, byte, end, place
      byte, place = end, place + length
  yield _OUTSIDE, byte, len(text.encode()), place


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
