import json

import numpy as np
import pytest
import tokenizers
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from kdjax.data import text
from kdjax.types import UserError

# One to four bytes a character, a decomposed accent, a byte order mark.
HARD = "naïve café 🎉 日本 e\u0301 \t\n\n  x\ufeff"
SAMPLES = ["", "a", " a  b", HARD, "def f(x):\n  return x + 1\n" * 3]


def trained(**post):
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.post_processor = processors.ByteLevel(**post)
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    initial_alphabet=sorted(alphabet),
    special_tokens=["<s>", "</s>"],
    show_progress=False,
  )
  made.train_from_iterator([*SAMPLES, "caféé 🎉🎉 hello world"] * 3, trainer)
  return made


def write(folder, made, **config):
  (folder / "tokenizer.json").write_text(made.to_str())
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return text.from_folder(folder)


def covers(encoded, sample):
  """The tokens' bytes, end to end, are the text's."""
  ends = encoded.ends.tolist()
  assert encoded.starts.tolist() == [0, *ends[:-1]][: len(ends)]
  assert (ends or [0])[-1] == len(sample.encode())


def test_bytes_are_the_bytes_of_the_text():
  tokenizer = text.byte_level()
  for sample, encoded in zip(SAMPLES, tokenizer.encode(SAMPLES)):
    assert encoded.ids.tolist() == list(sample.encode())
    covers(encoded, sample)
    assert tokenizer.decode(encoded.ids.tolist()) == sample
  assert tokenizer.size == 260


def test_bytes_are_the_same_tokenizer_when_saved_and_read_again(tmp_path):
  tokenizer = text.byte_level()
  text.save(tokenizer, tmp_path)
  again = text.from_folder(tmp_path)
  samples = [*SAMPLES, "a<|im_start|>é<|im_end|>\n", "<|endoftext|>"]
  for a, b in zip(tokenizer.encode(samples), again.encode(samples)):
    for ours, theirs in zip(a, b):
      np.testing.assert_array_equal(ours, theirs)
      assert ours.dtype == theirs.dtype
  for name in ("vocabulary", "prefix", "eos", "pad", "chat_template"):
    assert getattr(again, name) == getattr(tokenizer, name)
  assert again.fingerprint == tokenizer.fingerprint


def test_special_tokens_written_in_a_text_are_read_as_such():
  (encoded,) = text.byte_level().encode(["a<|im_end|>b"])
  assert encoded.ids.tolist() == [97, 259, 98]
  assert encoded.starts.tolist() == [0, 1, 11]
  assert encoded.ends.tolist() == [1, 11, 12]


@pytest.mark.parametrize("trim", [True, False])
def test_offsets_of_a_byte_level_bpe_are_exact_to_the_byte(tmp_path, trim):
  made = trained(trim_offsets=trim)
  tokenizer = write(tmp_path, made, eos_token="</s>", bos_token="<s>")
  for sample, encoded in zip(SAMPLES, tokenizer.encode(SAMPLES)):
    assert encoded.ids.tolist() == made.encode(sample).ids
    covers(encoded, sample)
    raw = sample.encode()
    for number, start, stop in zip(*map(np.ndarray.tolist, encoded)):
      token = tokenizer.decode([number])
      if "\ufffd" not in token:  # else it is part of a character
        assert token.encode() == raw[start:stop]
  assert tokenizer.eos == made.token_to_id("</s>")
  assert tokenizer.prefix == ()


def by_characters(folder, characters):
  """Tokens are characters; others are written by their bytes."""
  vocabulary = {c: n for n, c in enumerate(["<unk>", "▁", *characters])}
  for byte in "🎉".encode():
    vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
  model = models.BPE(
    vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"
  )
  made = tokenizers.Tokenizer(model)
  made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
  return write(folder, made)


def test_offsets_are_of_whole_characters_where_a_token_is_not_bytes(tmp_path):
  (encoded,) = by_characters(tmp_path, "éa").encode(["é a🎉é"])
  assert encoded.ids.tolist() == [2, 1, 3, 4, 5, 6, 7, 2]
  assert encoded.starts.tolist() == [0, 2, 3, 4, 4, 4, 4, 8]
  assert encoded.ends.tolist() == [2, 3, 4, 8, 8, 8, 8, 10]


def test_characters_have_one_to_four_bytes(tmp_path):
  edges = "\x7f\x80\u07ff\u0800\uffff\U00010000"
  (encoded,) = by_characters(tmp_path, edges).encode([edges])
  want = np.cumsum([len(character.encode()) for character in edges])
  assert encoded.ends.tolist() == want.tolist()
  assert encoded.starts.tolist() == [0, *want[:-1]]


def test_offsets_are_those_of_the_text_before_its_normalization(tmp_path):
  made = trained(trim_offsets=False)
  made.normalizer = normalizers.NFC()
  tokenizer = write(tmp_path, made)
  (encoded,) = tokenizer.encode(["e\u0301x"])  # three bytes, two once composed
  assert encoded.ends.max() == 4
  assert (encoded.starts[encoded.ends == 4] == 3).all()


def test_prefix_is_what_the_tokenizer_itself_begins_with(tmp_path):
  made = trained(trim_offsets=False)
  number = made.token_to_id("<s>")
  end = made.token_to_id("</s>")
  made.post_processor = processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", number), ("</s>", end)]
  )
  tokenizer = write(tmp_path, made, eos_token={"content": "</s>"})
  assert tokenizer.prefix == (number,)
  assert tokenizer.eos == end
  assert tokenizer.encode(["ab"])[0].ids.tolist() == (
    made.encode("ab", add_special_tokens=False).ids
  )


def test_truncation_left_in_a_file_is_not_obeyed(tmp_path):
  made = trained(trim_offsets=False)
  made.enable_truncation(2)
  made.enable_padding(length=50)
  (encoded,) = write(tmp_path, made).encode(["hello world, hello world"])
  assert 2 < len(encoded.ids) < 50


def test_template_beside_the_tokenizer_comes_first(tmp_path):
  made = trained()
  assert write(tmp_path, made, chat_template="a").chat_template == "a"
  several = [{"name": "tool_use", "template": "t"}]
  several += [{"name": "default", "template": "d"}]
  assert write(tmp_path, made, chat_template=several).chat_template == "d"
  (tmp_path / "chat_template.jinja").write_text("b")
  assert text.from_folder(tmp_path).chat_template == "b"


def test_folders_without_a_readable_tokenizer_are_refused(tmp_path):
  with pytest.raises(UserError, match=r"holds no tokenizer\.json, needs one"):
    text.from_folder(tmp_path)
  file = tmp_path / "tokenizer.json"
  file.write_text("{")
  with pytest.raises(UserError, match=r"tokenizer\.json, line 1 is not JSON"):
    text.from_folder(tmp_path)
  file.write_text("{}")
  with pytest.raises(UserError, match="is no tokenizer that `tokenizers`"):
    text.from_folder(tmp_path)
  file.write_bytes(b"\xff")
  with pytest.raises(UserError, match="is not UTF-8"):
    text.from_folder(tmp_path)
