import dataclasses
import re

import pytest

from kdjax.data import text
from kdjax.data.text.tokenizer import byte_level
from kdjax.types import UserError

TURNS = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "naïve 🎉?"},
  {"role": "assistant", "content": "Yes."},
  {"role": "user", "content": "Yes."},
  {"role": "assistant", "content": "café"},
]
# ChatML without marks; what follows is what some checkpoints have.
PLAIN = (
  "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content"
  " + '<|im_end|>' + '\\n' }}{%- endfor %}"
  "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Reasoning before the last turn alone, as Qwen3 writes it.
THINKING = (
  "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
  "{%- if m.role == 'assistant' and loop.last %}"
  "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
  "{{- m.content + '<|im_end|>\\n' }}{%- endfor %}"
  "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def using(template):
  return dataclasses.replace(byte_level(), chat_template=template)


def said(template, turns=TURNS):
  rendered, spans = text.render(using(template), turns)
  return rendered, [rendered[start:stop] for start, stop in spans]


def test_marked_template_decides_what_the_assistant_says():
  rendered, spans = said(byte_level().chat_template)
  assert spans == ["Yes.<|im_end|>", "café<|im_end|>"]
  assert rendered == "".join(
    f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TURNS
  )
  odd = "{%- for m in messages -%}{%- if m.role == 'assistant' %}{%+ generation"
  odd += " -%} {{ m.content }}{%- endgeneration %}{%- else %}{{ m.content }}"
  odd += "{%- endif %}{%- endfor %}"
  rendered, spans = said(odd)
  assert rendered == "".join(m["content"] for m in TURNS)
  assert spans == ["Yes.", "café"]


def test_without_marks_it_is_the_words_and_the_end_of_the_turn():
  rendered, spans = said(PLAIN)
  assert spans == ["Yes.<|im_end|>\n", "café<|im_end|>\n"]
  marked, _ = said(byte_level().chat_template)
  assert rendered == marked


def test_reasoning_that_later_turns_drop_does_not_hide_the_words():
  rendered, spans = said(THINKING)
  last = "<think>\n\n</think>\n\ncafé<|im_end|>\n"
  assert spans == ["Yes.<|im_end|>\n", last]
  assert rendered.count("<think>") == 1


def test_a_template_in_which_the_words_are_not_found_is_refused():
  reversed_ = (
    "{% for m in messages | reverse %}{{ m.role + m.content }}{% endfor %}"
  )
  with pytest.raises(UserError, match=r"mark them in it by {% generation %}"):
    said(reversed_)


def test_only_the_assistants_tokens_are_targets(tmp_path):
  tokens = text.tokenize(text.from_list([TURNS]), byte_level(), folder=tmp_path)
  batches = list(
    text.eval_batches(
      tokens, batch_size=1, sequence_length=200, cut=False, num_threads=0
    )
  )
  (batch,) = batches
  wanted = batch["label"][batch["mask"] == 1].tolist()
  assert byte_level().decode(wanted) == "Yes.<|im_end|>café<|im_end|>"
  # Position t reads t: the first target is predicted from what is before it.
  read = batch["tokens"][batch["mask"] == 1].tolist()
  assert byte_level().decode(read) == "\nYes.\ncafé"
  assert batch["num_bytes"].sum() == (
    len(text.render(byte_level(), TURNS)[0].encode()) - len("<|im_start|>")
  )


def test_reasoning_is_found_under_any_of_its_names():
  template = "{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}"
  for name in ("reasoning_content", "thinking", "reasoning"):
    turn = {"role": "assistant", "content": "b", name: "why"}
    assert text.template_text(using(template), [turn]) == "why|why"
  plain = {"role": "assistant", "content": "b"}
  assert text.template_text(using(template), [plain]) == "|"


def test_special_tokens_and_filters_reach_the_template():
  template = (
    "{{ bos_token }}|{{ eos_token }}|{{ messages[1] | tojson }}"
    "|{{ namespace(x=2).x }}{% for m in messages %}{% if loop.index0 == 1 %}"
    "{% break %}{% endif %}{{ loop.index }}{% endfor %}"
  )
  rendered = text.template_text(using(template), TURNS)
  end = "<|endoftext|>"
  want = '{"role": "user", "content": "naïve 🎉?"}'
  assert rendered == f"{end}|{end}|{want}|21"
  # A tag takes its line's indentation and end with it.
  lines = "a\n  {% if true %}\nb\n  {% endif %}\nc"
  assert text.template_text(using(lines), TURNS) == "a\nb\nc"


@pytest.mark.parametrize(
  ("template", "message"),
  [
    (None, "has no chat template, needs one"),
    ("{{ raise_exception('no system') }}", r"refuses .*\(no system\)"),
    ("{{ messages[0].content + none }}", "refuses the conversation"),
    ("{% if %}", "refuses the conversation"),
    ("{{ messages.append(1) }}", "refuses the conversation"),
    ("{{ ''.__class__.__mro__ }}", "refuses the conversation"),
  ],
)
def test_templates_that_fail_are_told_in_a_line(template, message):
  with pytest.raises(UserError, match=message) as caught:
    said(template)
  assert "\n" not in str(caught.value)


def test_a_bad_conversation_names_its_file_and_line(tmp_path):
  path = tmp_path / "chat.jsonl"
  path.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
  tokenizer = using("{{ raise_exception('needs an assistant') }}")
  with pytest.raises(UserError, match=r"chat\.jsonl, line 1: .*needs an ass"):
    text.tokenize(
      text.read(path, field="messages"), tokenizer, folder=tmp_path / "made"
    )
  assert not list((tmp_path / "made").iterdir())
  # Nobody answers: no label is left.
  with pytest.raises(UserError, match=re.escape("none of 9 tokens in 1 docu")):
    text.tokenize(
      text.read(path, field="messages"), byte_level(), folder=tmp_path / "made"
    )
  assert not list((tmp_path / "made").iterdir())


def test_characters_that_mark_are_refused_in_messages():
  turns = [{"role": "assistant", "content": "a\ufdd0b"}]
  with pytest.raises(UserError, match=r"U\+FDD0"):
    text.render(byte_level(), turns)
