import dataclasses
import re

import pytest

from kdjax.data import text
from kdjax.types import UserError

TOKENS = ("<s>", "</s>", "a", "b", "c")


def tokenizer(tokens=TOKENS, name="folder", **changes):
  vocabulary = {token: n for n, token in enumerate(tokens)}
  changed = dict(
    name=name,
    vocabulary=vocabulary,
    specials={"bos_token": "<s>", "eos_token": "</s>"},
    prefix=(0,),
    eos=1,
    chat_template="t",
  )
  return dataclasses.replace(text.byte_level(), **(changed | changes))


def test_one_vocabulary_is_told_by_content_and_padding_is_no_class():
  # Qwen's: 151,936 and 152,064 rows over one tokenizer.
  shared = text.shared_vocabulary(
    tokenizer(name="a"), tokenizer(name="b"), student_rows=8, teacher_rows=16
  )
  assert shared == text.Shared(5, ())


def test_ids_that_mean_other_tokens_are_refused_with_the_alternative():
  other = ("<s>", "</s>", "b", "a", "c")
  with pytest.raises(UserError) as caught:
    text.shared_vocabulary(tokenizer(), tokenizer(other))
  line = str(caught.value)
  assert "2 tokens have not the same id, such as 'a' with 2 and 3" in line
  assert "likelihood_matching" in line
  assert "universal_logits" in line
  assert "\n" not in line
  # As many tokens, of which one is another.
  with pytest.raises(UserError, match=r"2 tokens .* 'c' with 4 and none"):
    text.shared_vocabulary(tokenizer(), tokenizer((*TOKENS[:4], "d")))
  # Shorter, and not the other's beginning.
  with pytest.raises(UserError, match="different tokenizers"):
    text.shared_vocabulary(tokenizer(), tokenizer(("<s>", "a")))


def test_tokens_after_the_others_last_are_allowed_with_a_warning():
  longer = tokenizer((*TOKENS, "<x>", "<y>"))
  for student, teacher, whose in (
    (tokenizer(), longer, "teacher"),
    (longer, tokenizer(), "student"),
  ):
    size, warnings = text.shared_vocabulary(student, teacher)
    assert size == 5
    assert warnings == (
      f"the {whose}'s tokenizer has 2 more tokens (<x>, <y>): the 5 that both "
      "have are compared",
    )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"specials": {"bos_token": "<s>", "eos_token": "a"}}, "eos_token differs"),
    ({"specials": {"eos_token": "</s>"}}, "bos_token differs"),
    ({"prefix": ()}, r"begins with the ids \[0\] for the student, \[\] for"),
    ({"chat_template": "u"}, "the chat templates differ"),
  ],
)
def test_differences_that_do_not_forbid_distilling_warn(changes, message):
  shared = text.shared_vocabulary(tokenizer(), tokenizer(**changes))
  assert shared.size == 5
  (warning,) = shared.warnings
  assert re.search(message, warning)


def test_a_tokenizer_of_another_checkpoint_is_told_by_its_ids():
  text.check_rows(tokenizer(), 5)
  with pytest.raises(UserError, match="up to 4, the student's embedding 4"):
    text.shared_vocabulary(
      tokenizer(), tokenizer(), student_rows=4, teacher_rows=5
    )
  with pytest.raises(UserError, match="up to 4, the teacher's embedding 3"):
    text.shared_vocabulary(
      tokenizer(), tokenizer(), student_rows=5, teacher_rows=3
    )
