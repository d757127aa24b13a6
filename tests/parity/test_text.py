"""Chat templates and tokenizers beside those of transformers, made here."""

import json

import numpy as np
import pytest

from kdjax.data import text
from kdjax.data.text import corpus, tokenizer

pytestmark = pytest.mark.parity
pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SAMPLES = [
  "",
  "naïve café 🎉 日本 e\u0301\n\n  x",
  "def f(x):\n    return x + 1\n",
  "<|im_start|>user\nhi<|im_end|>",
]
USER = {"role": "user", "content": "a"}
CHATS = [
  [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": 'naïve 🎉 <&> "?"'},
    {"role": "assistant", "content": "Yes.\n"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "café"},
  ],
  [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
  ],
  [{"role": "user", "content": "tell", "date": {"day": 3}}],
  [USER, {"role": "assistant", "content": "b", "reasoning": "r"}],
  [USER, {"role": "assistant", "content": "b", "thinking": "t"}],
  [USER, {"role": "assistant", "content": "b", "reasoning_content": "c"}],
]
# What checkpoints' templates use: whitespace control, filters, namespaces,
# loops with a break, macros, tests, slices, generation marks.
TEMPLATES = {
  "reasoning": (
    "{%- for m in messages %}{{ m.content }}|{{ m.reasoning_content }}|"
    "{{ m.thinking }}|{{ m.reasoning }}\n{% endfor %}"
  ),
  "chatml": tokenizer.CHATML,
  "llama": (
    "{{- bos_token }}{% set ns = namespace(system='') %}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set ns.system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% endif %}\n"
    "{{ '<<SYS>>' + ns.system + '<</SYS>>' }}\n"
    "{% for message in messages %}\n"
    "    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n"
    "        {{- raise_exception('roles must alternate') }}\n"
    "    {%- endif %}\n"
    "    {%- if message.role == 'user' %}\n"
    "        {{- '[INST] ' + message.content | trim + ' [/INST]' }}\n"
    "    {%- else %}\n"
    "        {{- ' ' + message.content | trim + ' ' + eos_token }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}"
  ),
  "macro": (
    "{%- macro line(role, body) %}<{{ role }}>{{ body }}\n{% endmacro %}\n"
    "{%- for m in messages %}\n"
    "  {%- if loop.index > 3 %}{% break %}{% endif %}\n"
    "  {%- if m.role == 'assistant' %}\n"
    "    {%- generation %}{{- line('a', m.content) }}{% endgeneration %}\n"
    "  {%- elif m.content is string and 'date' not in m %}\n"
    "{{ line(m.role, m.content.split('</think>')[-1].lstrip('\\n')) }}\n"
    "  {%- else %}{{ m | tojson }} {{ m.date | tojson(indent=2) }}{% endif %}\n"
    "{%- endfor %}{{ strftime_now('%Y') }}"
    "{%- if add_generation_prompt %}<a>{% endif %}"
    "{%- if tools is not none %}tools{% endif %}"
  ),
}


def both(tmp_path, template=tokenizer.CHATML):
  made = tokenizer.wrap(
    "bpe", corpus.train_bpe(iter(SAMPLES * 3 + ["hello café"] * 5), 320)
  )
  files = dict(made.files)
  config = json.loads(files["tokenizer_config.json"])
  config["chat_template"] = template
  files["tokenizer_config.json"] = json.dumps(config)
  for name, contents in files.items():
    (tmp_path / name).write_text(contents)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  return text.from_folder(tmp_path), theirs


def test_ids_and_special_tokens_are_those_of_transformers(tmp_path):
  ours, theirs = both(tmp_path)
  for sample, encoded in zip(SAMPLES, ours.encode(SAMPLES)):
    want = theirs(sample, add_special_tokens=False)["input_ids"]
    assert encoded.ids.tolist() == want
    whole = theirs(sample)["input_ids"]
    assert [*ours.prefix, *want] == whole
    assert ours.decode(want) == theirs.decode(
      want, clean_up_tokenization_spaces=False
    )
  assert ours.eos == theirs.eos_token_id
  assert ours.pad == theirs.pad_token_id
  assert ours.vocabulary == theirs.get_vocab()
  assert ours.size == len(theirs)


def test_bytes_are_read_by_transformers(tmp_path):
  text.save(text.byte_level(), tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for sample, encoded in zip(SAMPLES, text.byte_level().encode(SAMPLES)):
    ids = theirs(sample, add_special_tokens=False)["input_ids"]
    assert encoded.ids.tolist() == ids


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("chat", range(len(CHATS)))
@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_written_as_transformers_writes_them(
  tmp_path, name, chat, prompt
):
  ours, theirs = both(tmp_path, TEMPLATES[name])
  want = theirs.apply_chat_template(
    CHATS[chat], tokenize=False, add_generation_prompt=prompt
  )
  got = text.template_text(ours, CHATS[chat], add_generation_prompt=prompt)
  assert got == want


@pytest.mark.parametrize("chat", range(2))
@pytest.mark.parametrize("name", ["chatml", "macro"])
def test_the_assistants_tokens_are_those_that_transformers_masks(
  tmp_path, name, chat
):
  ours, theirs = both(tmp_path, TEMPLATES[name])
  want = theirs.apply_chat_template(
    CHATS[chat],
    tokenize=True,
    return_dict=True,
    return_assistant_tokens_mask=True,
  )
  tokens = text.tokenize(
    text.from_list([CHATS[chat]]), ours, folder=tmp_path / "tokens"
  )
  np.testing.assert_array_equal(tokens.ids, want["input_ids"])
  np.testing.assert_array_equal(tokens.target, want["assistant_masks"])


def test_a_saved_tokenizer_of_transformers_is_read_back(tmp_path):
  _, theirs = both(tmp_path)
  theirs.save_pretrained(tmp_path / "saved")
  ours = text.from_folder(tmp_path / "saved")
  assert ours.chat_template == tokenizer.CHATML
  assert ours.eos == theirs.eos_token_id
  for sample, encoded in zip(SAMPLES, ours.encode(SAMPLES)):
    want = theirs(sample, add_special_tokens=False)["input_ids"]
    assert encoded.ids.tolist() == want
