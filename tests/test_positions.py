"""Where the input stands: one number that all processes share."""

import functools

import numpy as np
import pytest

from kdjax import data
from kdjax.checkpoint import newest
from kdjax.data import text
from kdjax.data.text.tokenizer import byte_level
from kdjax.errors import UserError
from kdjax.feed import Feed

TEXTS = [chr(97 + n) * (3 + 5 * n % 17) for n in range(12)]


def images(tmp_path):
  source = data.load("digits", "test")
  return functools.partial(
    data.train_batches, source, mean=0.0, std=1.0, augment=data.crop_and_flip
  )


def texts(tmp_path, *, cut):
  tokens = text.tokenize(text.from_list(TEXTS), byte_level(), folder=tmp_path)
  return functools.partial(
    text.train_batches, tokens, sequence_length=24, cut=cut
  )


def pairs(tmp_path):
  made = text.tokenize_pair(
    text.from_list(TEXTS), byte_level(), byte_level(), folder=tmp_path
  )
  return functools.partial(
    text.pair_batches, made, sequence_length=24, teacher_length=24
  )


KINDS = {
  "images": images,
  "texts": functools.partial(texts, cut=True),
  "conversations": functools.partial(texts, cut=False),
  "pairs": pairs,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_position_of_one_process_is_that_of_all(tmp_path, kind):
  """Another number of processes goes on from it with the same batches."""
  make = functools.partial(
    KINDS[kind](tmp_path), batch_size=4, seed=5, num_threads=2
  )
  feeds = [Feed(make(process_index=n, process_count=2)) for n in range(2)]
  for _ in range(3):
    for feed in feeds:
      next(feed)
  assert feeds[0].position == feeds[1].position == {"next_index": 3}
  want = [next(feed) for feed in feeds]
  whole, again = Feed(make()), Feed(make(process_index=1, process_count=2))
  for feed in (whole, again):
    feed.go_to({"next_index": 3}, 3)
  whole, again = next(whole), next(again)
  for name, x in whole.items():
    np.testing.assert_array_equal(x[2:], again[name])
    np.testing.assert_array_equal(x, np.concatenate([w[name] for w in want]))


@pytest.mark.parametrize(
  ("one", "other"), [({"at": 3}, {"at": 4}), (b"a", b"b")]
)
def test_positions_that_differ_are_kept_each(monkeypatch, one, other):
  sent = []
  monkeypatch.setattr(
    newest.processes, "gather", lambda value: sent.append(value) or [value] * 2
  )
  assert newest._unpacked(newest.packed(one)) == one  # the same for all
  newest.packed(other)
  monkeypatch.setattr(newest.processes, "gather", lambda value: sent[:])
  both = newest.packed(one)
  monkeypatch.setattr(newest.jax, "process_count", lambda: 2)
  for n, want in enumerate((one, other)):
    monkeypatch.setattr(newest.jax, "process_index", lambda n=n: n)
    assert newest._unpacked(both) == want
  monkeypatch.setattr(newest.jax, "process_count", lambda: 3)
  with pytest.raises(UserError, match="inputs of 2 processes stood at"):
    newest._unpacked(both)
