"""Tokenizers: text -> ids with byte offsets, and back.

Two kinds with one interface: the `tokenizer.json` of a checkpoint's folder, and
bytes, which are built in. Neither adds a begin- or end-of-text by itself: what
makes documents of texts does (`kdjax.data.text.tokens`).
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from kdjax.data.text.offsets import (
  Encoded,
  by_bytes,
  by_characters,
  byte_sizes,
  letters,
)
from kdjax.types import UserError

# What `from_folder` reads.
FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "chat_template.jinja",
)

END, PAD, *_ = SPECIALS = (
  "<|endoftext|>",
  "<|pad|>",
  "<|im_start|>",
  "<|im_end|>",
)

# The template of the tokenizers made here: ChatML.
CHATML = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
  "{% if message['role'] == 'assistant' %}{% generation %}"
  "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
  "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """What this library needs of a tokenizer.

  Attributes:
    name: what messages call it.
    encode: texts -> their tokens. Special tokens written out in a text are read
      as such; none is added.
    decode: ids -> text, special tokens included.
    vocabulary: token -> id, added tokens included.
    prefix: the ids that begin a text, such as Llama's begin-of-text; () where
      the tokenizer adds none.
    eos: the id that ends a text, if it has one.
    pad: an id for positions that count nowhere.
    specials: {"bos_token": "<s>", ...}: what a chat template may name.
    chat_template: Jinja source, if there is one.
    files: name -> contents: the folder that `transformers` reads.
  """

  name: str
  encode: Callable[[Sequence[str]], list[Encoded]]
  decode: Callable[[Sequence[int]], str]
  vocabulary: Mapping[str, int]
  prefix: tuple[int, ...]
  eos: int | None
  pad: int
  specials: Mapping[str, str]
  chat_template: str | None
  files: Mapping[str, str]

  @functools.cached_property
  def size(self) -> int:
    """One more than the largest id: how many rows of an embedding it needs."""
    return max(self.vocabulary.values()) + 1

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of its files."""
    made = hashlib.sha256()
    for name in sorted(self.files):
      made.update(f"{name}\0{self.files[name]}\0".encode())
    return made.hexdigest()


def save(tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> None:
  """Writes the files that `transformers` reads into an existing folder."""
  for name, contents in tokenizer.files.items():
    (pathlib.Path(folder) / name).write_text(contents, encoding="utf-8")


def from_folder(folder: str | os.PathLike[str]) -> Tokenizer:
  """The tokenizer of a checkpoint's folder.

  Reads `tokenizer.json`, and where they are there `tokenizer_config.json`,
  `special_tokens_map.json` and `chat_template.jinja`, which comes before the
  template of `tokenizer_config.json`.

  Raises:
    UserError: no `tokenizer.json`, or a file that cannot be read as its kind.
  """
  folder = pathlib.Path(folder).expanduser()
  files = {
    name: _text(folder / name) for name in FILES if (folder / name).is_file()
  }
  if "tokenizer.json" not in files:
    raise UserError(
      f"{folder} holds no tokenizer.json, needs one: write it with "
      f"`transformers.AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(...)`"
    )
  _json(folder / "tokenizer.json", files["tokenizer.json"])
  config: dict[str, Any] = {}
  for name in ("special_tokens_map.json", "tokenizer_config.json"):
    if name in files:
      config |= _json(folder / name, files[name])
  try:
    made = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
  except Exception as error:  # the library raises nothing narrower
    raise UserError(
      f"{folder / 'tokenizer.json'} is no tokenizer that `tokenizers` "
      f"{tokenizers.__version__} reads ({error}): copy the file anew, or "
      "upgrade tokenizers"
    ) from error
  return _wrap(str(folder), made, config, files)


def byte_level() -> Tokenizer:
  """One token a byte, 0 .. 255, and `SPECIALS` from 256 on; offsets exact."""
  vocabulary = {letter: byte for byte, letter in enumerate(letters())}
  vocabulary |= {token: 256 + n for n, token in enumerate(SPECIALS)}
  made = build(models.BPE(vocab=vocabulary, merges=[]))
  ids = {token: np.int32(vocabulary[token]) for token in SPECIALS}
  special = re.compile("(" + "|".join(map(re.escape, SPECIALS)) + ")")

  def encode(texts: Sequence[str]) -> list[Encoded]:
    encoded = []
    for text in texts:
      parts = [
        np.array([ids[part]])
        if part in ids
        else np.frombuffer(part.encode(), np.uint8).astype(np.int32)
        for part in special.split(text)
      ]
      tokens = np.concatenate(parts)
      sizes = np.ones(len(tokens), np.int64)
      for token, number in ids.items():
        sizes[tokens == number] = len(token)
      ends = np.cumsum(sizes)
      encoded.append(Encoded(tokens, ends - sizes, ends))
    return encoded

  return dataclasses.replace(wrap("bytes", made), encode=encode)


def build(model: Any) -> tokenizers.Tokenizer:
  """A byte-level tokenizer of `tokenizers` around a model, with `SPECIALS`.

  It begins a text with the token that ends the one before, as GPT-2 was
  trained, so that a text's first token is predicted too.
  """
  made = tokenizers.Tokenizer(model)
  made.pre_tokenizer = pre_tokenizers.ByteLevel(  # pyright: ignore
    add_prefix_space=False
  )
  made.decoder = decoders.ByteLevel()  # pyright: ignore
  made.add_special_tokens(list(SPECIALS))
  number = made.token_to_id(END)
  made.post_processor = processors.TemplateProcessing(  # pyright: ignore
    single=f"{END} $A", special_tokens=[(END, number)]
  )
  return made


def wrap(name: str, made: tokenizers.Tokenizer) -> Tokenizer:
  """A tokenizer made by `build`, with its end, padding and chat template."""
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END,
    "eos_token": END,
    "pad_token": PAD,
    "chat_template": CHATML,
    "clean_up_tokenization_spaces": False,
  }
  files = {
    "tokenizer.json": made.to_str(),
    "tokenizer_config.json": json.dumps(config, indent=2),
  }
  return _wrap(name, made, config, files)


def _wrap(
  name: str,
  made: tokenizers.Tokenizer,
  config: Mapping[str, Any],
  files: Mapping[str, str],
) -> Tokenizer:
  # A checkpoint's file may carry the truncation of somebody's last call.
  made.no_truncation()
  made.no_padding()
  vocabulary = made.get_vocab(with_added_tokens=True)
  specials = {
    key: value["content"] if isinstance(value, Mapping) else value
    for key, value in config.items()
    if key in ("bos_token", "eos_token", "pad_token", "unk_token")
    and value is not None
  }
  eos = vocabulary.get(specials.get("eos_token", ""))
  pad = vocabulary.get(specials.get("pad_token", ""), eos)
  sizes = byte_sizes(made, vocabulary)

  def encode(texts: Sequence[str]) -> list[Encoded]:
    if sizes is None:
      encoded = made.encode_batch(list(texts), add_special_tokens=False)
      return [by_characters(t, e) for t, e in zip(texts, encoded)]
    # The library need not follow characters where tokens say their bytes.
    encoded = made.encode_batch_fast(list(texts), add_special_tokens=False)
    return [by_bytes(made, t, e, sizes) for t, e in zip(texts, encoded)]

  return Tokenizer(
    name=name,
    encode=encode,
    decode=lambda ids: made.decode(list(ids), skip_special_tokens=False),
    vocabulary=vocabulary,
    prefix=_prefix(made),
    eos=eos,
    pad=0 if pad is None else pad,
    specials=specials,
    chat_template=_template(config, files),
    files=files,
  )


def _template(
  config: Mapping[str, Any], files: Mapping[str, str]
) -> str | None:
  if "chat_template.jinja" in files:
    return files["chat_template.jinja"]
  given = config.get("chat_template")
  if isinstance(given, list):  # several by name
    named = {entry["name"]: entry["template"] for entry in given}
    return named.get("default")
  return given


def _prefix(made: tokenizers.Tokenizer) -> tuple[int, ...]:
  """What the tokenizer's own template puts before a text."""
  bare = made.encode("a", add_special_tokens=False).ids
  whole = made.encode("a", add_special_tokens=True).ids
  for n in range(len(whole) - len(bare) + 1):
    if whole[n : n + len(bare)] == bare:
      return tuple(whole[:n])
  return ()


def _text(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise UserError(
      f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): copy "
      "the file anew"
    ) from error


def _json(path: pathlib.Path, text: str) -> dict[str, Any]:
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    raise UserError(
      f"{path}, line {error.lineno} is not JSON ({error.msg}): copy the file "
      "anew"
    ) from error
