"""Which bytes of a text its tokens stand for."""

import functools
import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tokenizers


class Encoded(NamedTuple):
  """The tokens of one text; token i stands for bytes starts[i] .. ends[i] - 1.

  Bytes are those of the text in UTF-8. A token that is part of a character has
  its own bytes where the tokenizer is byte-level, the whole character's
  elsewhere, so that neighbours may overlap.

  Attributes:
    ids: int32 [n].
    starts: int64 [n].
    ends: int64 [n].
  """

  ids: np.ndarray
  starts: np.ndarray
  ends: np.ndarray


def by_bytes(
  made: tokenizers.Tokenizer,
  text: str,
  encoding: tokenizers.Encoding,
  sizes: np.ndarray,
) -> Encoded:
  ids = np.asarray(encoding.ids, np.int32)
  ends = np.cumsum(sizes[ids])
  if (ends[-1] if len(ends) else 0) == len(text.encode()):
    return Encoded(ids, ends - sizes[ids], ends)
  # A normalizer has changed the text: these are not its bytes.
  return by_characters(text, made.encode(text, add_special_tokens=False))


def by_characters(text: str, encoding: tokenizers.Encoding) -> Encoded:
  ids = np.asarray(encoding.ids, np.int32)
  offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
  if text.isascii():
    return Encoded(ids, offsets[:, 0], offsets[:, 1])
  points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
  widths = 1 + sum((points >= p).astype(np.int64) for p in (0x80, 0x800, 2**16))
  at = np.concatenate([[0], np.cumsum(widths)])
  return Encoded(ids, at[offsets[:, 0]], at[offsets[:, 1]])


def byte_sizes(
  made: tokenizers.Tokenizer, vocabulary: Mapping[str, int]
) -> np.ndarray | None:
  """id -> number of bytes, where tokens are written in bytes; else None."""
  if '"ByteLevel"' not in json.dumps(json.loads(made.to_str())["decoder"]):
    return None
  written = set(letters())
  added = made.get_added_tokens_decoder()
  sizes = np.zeros(max(vocabulary.values()) + 1, np.int64)
  for token, number in vocabulary.items():
    if number not in added and not written.issuperset(token):
      return None
    sizes[number] = len(token.encode()) if number in added else len(token)
  return sizes


@functools.cache
def letters() -> list[str]:
  """How byte-level tokenizers write each byte: a printable character.

  Printable Latin-1 stands for itself; the other 68 bytes are U+0100 and on, in
  their order. Radford et al. 2019, section 2.2, and their code.
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  written = {byte: chr(byte) for byte in printable}
  written |= {byte: chr(256 + n) for n, byte in enumerate(others)}
  return [written[byte] for byte in range(256)]
