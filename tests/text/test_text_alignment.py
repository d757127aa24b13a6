import dataclasses
import re

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from kdjax import losses
from kdjax.data import text
from kdjax.data.text import alignment, corpus
from kdjax.data.text import pairs as pairing
from kdjax.data.text.offsets import Encoded
from kdjax.data.text.tokenizer import byte_level, wrap
from kdjax.types import UserError

TEXTS = [
  "unbelievable story",
  "naïve 🎉🎉 日本 café",
  "a",
  "x = [1, 2, 3]\nfor i in x:\n  print(i, i * i)\n" * 4,
  "  leading and trailing  ",
]


def bpe(vocab_size, *, samples=TEXTS, begin=True, end=True, name="bpe"):
  """A byte-level BPE; another size merges other pairs."""
  made = wrap(name, corpus.train_bpe(iter(samples * 2), vocab_size))
  return dataclasses.replace(
    made,
    prefix=made.prefix if begin else (),
    eos=made.eos if end else None,
  )


def words():
  """Whole words, spaces with them, by characters: offsets overlap nowhere."""
  vocabulary = {"<unk>": 0}
  for sample in TEXTS:
    for word in re.findall(r" ?[^ ]+| +", sample):
      vocabulary.setdefault(word.replace(" ", "▁"), len(vocabulary))
  made = tokenizers.Tokenizer(
    models.WordLevel(vocab=vocabulary, unk_token="<unk>")
  )
  made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
  made.decoder = decoders.Metaspace()
  return wrap("words", made)


def ranges(*pairs):
  starts, ends = np.array(pairs).T
  return Encoded(np.arange(len(pairs), dtype=np.int32), starts, ends)


def brute_force(ours, theirs):
  """Cuts that go through no token, nor between two that overlap; O(n m)."""

  def cuts(side):
    found = set()
    for byte in range(1, int(side.ends.max()) + 1):
      through = (side.starts < byte) & (side.ends > byte)
      if not through.any() and byte in side.ends:
        found.add(byte)
    return found

  common = sorted(cuts(ours) & cuts(theirs))

  def spans(side):
    inside = [sum(cut < end for cut in common) for end in side.ends.tolist()]
    return [n if n < len(common) else -1 for n in inside]

  return spans(ours), spans(theirs)


@pytest.mark.parametrize(
  ("ours", "theirs", "want"),
  [
    # |un|believ|able| story| and |unbel|iev|able| st|ory|
    (
      [(0, 2), (2, 8), (8, 12), (12, 18)],
      [(0, 5), (5, 8), (8, 12), (12, 15), (15, 18)],
      ([0, 0, 1, 2], [0, 0, 1, 2, 2]),
    ),
    # Two tokens write one character of two bytes: no boundary between them.
    (
      [(0, 2), (0, 2), (2, 3)],
      [(0, 1), (1, 2), (2, 3)],
      ([0, 0, 1], [0, 0, 1]),
    ),
    # A token of no bytes belongs to the span before.
    (
      [(0, 1), (1, 1), (1, 2)],
      [(0, 1), (1, 2)],
      ([0, 0, 1], [0, 1]),
    ),
    # One side was cut off within the other's last token.
    (
      [(0, 1), (1, 3), (3, 4)],
      [(0, 1), (1, 2), (2, 5)],
      ([0, -1, -1], [0, -1, -1]),
    ),
    # A space that one tokenizer leaves out is the next token's.
    ([(0, 3), (4, 7)], [(0, 3), (3, 7)], ([0, 1], [0, 1])),
  ],
)
def test_spans_by_hand(ours, theirs, want):
  got = alignment.align(ranges(*ours), ranges(*theirs))
  assert tuple(map(list, got)) == want
  assert got[0].dtype == got[1].dtype == np.int32
  back = alignment.align(ranges(*theirs), ranges(*ours))
  assert tuple(map(list, back)) == want[::-1]


@pytest.mark.parametrize("sample", TEXTS)
def test_spans_of_real_tokenizers_are_minimal_and_hold_the_same_bytes(sample):
  made = [byte_level(), bpe(290), bpe(330), words()]
  for ours in made:
    for theirs in made:
      (a,), (b,) = ours.encode([sample]), theirs.encode([sample])
      got = alignment.align(a, b)
      assert tuple(map(list, got)) == brute_force(a, b)
      assert got[0].max() == got[1].max()
      for n in range(got[0].max() + 1):
        one, other = (x.ends[s == n].max() for x, s in zip((a, b), got))
        assert one == other
  one, other = alignment.align(*(byte_level().encode([sample]) * 2))
  assert one.tolist() == other.tolist() == list(range(len(sample.encode())))


def pairs_of(tmp_path, student, teacher, documents=TEXTS):
  return text.tokenize_pair(
    text.from_list(documents), student, teacher, folder=tmp_path
  )


def batches(pairs, count, **changes):
  arguments = dict(
    batch_size=2, sequence_length=40, teacher_length=60, seed=0, num_threads=0
  )
  steps = iter(text.pair_batches(pairs, **(arguments | changes)))
  return [next(steps) for _ in range(count)]


def spans_in(batch, tokenizer, prefix=""):
  """(row, span) -> what the row predicts in it, as text."""
  found = {}
  for b, row in enumerate(batch[prefix + "span"]):
    for n in range(row.max() + 1):
      found[b, n] = tokenizer.decode(batch[prefix + "label"][b, row == n])
  return found


@pytest.mark.parametrize("sizes", [(290, 330), (0, 300), (330, 0)])
def test_both_sides_of_a_row_predict_the_same_text_in_each_span(
  tmp_path, sizes
):
  student, teacher = (bpe(n) if n else byte_level() for n in sizes)
  pairs = pairs_of(tmp_path, student, teacher)
  seen = ""
  for batch in batches(pairs, 12):
    ours = spans_in(batch, student)
    assert ours == spans_in(batch, teacher, "teacher_")
    assert ours
    seen += "".join(ours.values())
    for b, mask in enumerate(batch["span_mask"]):
      count = batch["span"][b].max() + 1
      for prefix in ("", "teacher_"):
        numbers = np.unique(batch[prefix + "span"][b])
        assert numbers[numbers >= 0].tolist() == list(range(count))
      np.testing.assert_array_equal(mask, np.arange(40) < count)
    # What is predicted in a span counts, on both sides.
    for prefix in ("", "teacher_"):
      assert (batch[prefix + "mask"][batch[prefix + "span"] >= 0] == 1).all()
  assert {"🎉", "unbelievable"} & set(re.findall(r"\w+|🎉", seen))


def row_spans(pairs, lengths):
  rows = pairing._rows(pairs, lengths, 0)
  return pairing.fill(pairs, rows, lengths)


def test_every_byte_is_in_one_span_and_the_end_in_one_of_its_own(tmp_path):
  student, teacher = bpe(290), bpe(330)
  pairs = pairs_of(tmp_path, student, teacher)
  for lengths in ((30, 30), (90, 90), (20, 200)):
    batch = row_spans(pairs, lengths)
    found = spans_in(batch, student)
    got = sorted("".join(found.values()).replace("<|endoftext|>", ""))
    assert got == sorted("".join(TEXTS))
    assert list(found.values()).count("<|endoftext|>") == len(TEXTS)


def test_every_prediction_of_the_student_counts_once_however_it_is_cut(
  tmp_path,
):
  pairs = pairs_of(tmp_path, byte_level(), bpe(330))
  student = pairs.student.tokens
  want = sorted(
    label
    for n in range(len(TEXTS))
    for label in student.ids[
      student.offsets[n] + 1 : student.offsets[n + 1]
    ].tolist()
  )
  for lengths in ((25, 25), (100, 100)):
    batch = row_spans(pairs, lengths)
    assert sorted(batch["label"][batch["mask"] == 1].tolist()) == want


def test_a_later_piece_begins_with_the_span_that_ended_the_one_before(tmp_path):
  student, teacher = bpe(290), byte_level()
  long = TEXTS[3]
  pairs = pairs_of(tmp_path, student, teacher, [long])
  pieces = list(pairing._pieces(pairing._spans_of(pairs, 0), 0, (20, 40)))
  assert len(pieces) > 3
  for piece in pieces:
    read = []
    sides = (pairs.student.tokens, student), (pairs.teacher.tokens, teacher)
    for side, (tokens, tokenizer) in enumerate(sides):
      start, stop = piece.starts[side], piece.stops[side]
      assert stop - start <= (20, 40)[side]
      read.append(tokenizer.decode(tokens.ids[start : stop + 1].tolist()))
    assert read[0] == read[1]


def test_a_piece_is_as_long_as_the_row(tmp_path):
  pairs = pairs_of(tmp_path, byte_level(), byte_level(), ["a" * 99])
  spans = pairing._spans_of(pairs, 0)
  assert len(spans.counts) == 101  # what begins it, the bytes, the end
  for lengths in ((20, 20), (20, 30), (30, 20)):
    first, second, *_ = pairing._pieces(spans, 0, lengths)
    assert (first.starts, first.stops) == ((0, 0), (20, 20))
    assert second.starts == (20, 20)


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_the_first_span_counts_only_where_both_begin_with_something(
  tmp_path, which
):
  student = bpe(290, begin=which == "teacher")
  teacher = bpe(330, begin=which == "student")
  batch = row_spans(pairs_of(tmp_path, student, teacher, TEXTS[:1]), (40, 40))
  ours, theirs = spans_in(batch, student), spans_in(batch, teacher, "teacher_")
  assert ours == theirs
  got = "".join(ours.values())
  full = TEXTS[0] + "<|endoftext|>"
  assert full.endswith(got)
  assert 0 < len(got) < len(full)


def test_an_end_that_one_side_lacks_is_in_no_span(tmp_path):
  student, teacher = bpe(290), bpe(330, end=False)
  batch = row_spans(pairs_of(tmp_path, student, teacher, TEXTS[:1]), (40, 40))
  assert "".join(spans_in(batch, student).values()) == TEXTS[0]


def test_losses_take_the_batches_as_they_are(tmp_path):
  pairs = pairs_of(tmp_path, bpe(290), byte_level())
  (batch,) = batches(pairs, 1)

  def certain(label, classes):  # every token as likely as any other
    return np.float32(5 * np.eye(classes)[label])

  chance = np.log(np.exp(5) / (np.exp(5) + 289))
  other_chance = np.log(np.exp(5) / (np.exp(5) + 259))
  values = jax.jit(losses.likelihood_matching)(
    certain(batch["label"], 290),
    certain(batch["teacher_label"], 260),
    batch["label"],
    batch["teacher_label"],
    batch["span"],
    batch["teacher_span"],
  )
  for b in range(2):
    for n in range(40):
      a = np.exp((batch["span"][b] == n).sum() * chance / 100)
      c = np.exp((batch["teacher_span"][b] == n).sum() * other_chance / 100)
      want = 0
      if batch["span_mask"][b, n]:
        want = c * np.log(c / a) + (1 - c) * np.log((1 - c) / (1 - a))
      np.testing.assert_allclose(values[b, n], want, rtol=1e-5, atol=1e-6)


def test_batch_is_a_function_of_seed_and_step_however_many_processes(tmp_path):
  pairs = pairs_of(tmp_path, bpe(290), bpe(330))
  whole = batches(pairs, 4)
  parts = [
    batches(pairs, 4, process_index=n, process_count=2) for n in range(2)
  ]
  for step, batch in enumerate(whole):
    for name, array in batch.items():
      halves = [part[step][name] for part in parts]
      np.testing.assert_array_equal(np.concatenate(halves), array)


TURNS = [
  {"role": "user", "content": "naïve?"},
  {"role": "assistant", "content": "Yes: café 🎉."},
  {"role": "user", "content": "print(i, i * i)"},
  {"role": "assistant", "content": "print(i, i * i)"},
]
OTHER = (
  "{{ bos_token }}{% for m in messages %}[{{ m.role | upper }}]\n"
  "{{ m.content | trim }}{% if m.role == 'assistant' %}{{ eos_token }}"
  "{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}[ASSISTANT]\n{% endif %}"
)


def test_conversations_align_within_the_words_under_different_templates(
  tmp_path,
):
  student = bpe(330)
  teacher = dataclasses.replace(bpe(290), chat_template=OTHER)
  pairs = pairs_of(tmp_path, student, teacher, [TURNS, TURNS[:2]])
  batch = row_spans(pairs, (300, 300))
  ours = list(spans_in(batch, student).values())
  theirs = list(spans_in(batch, teacher, "teacher_").values())
  ends = ("<|im_end|>", "<|endoftext|>")
  plain = [s for s in ours if s not in ends]
  assert plain == [s for s in theirs if s not in ends]
  assert [n for n, s in enumerate(ours) if s == ends[0]] == [
    n for n, s in enumerate(theirs) if s == ends[1]
  ]
  joined = "".join(ours)
  assert joined.count(ends[0]) == 3
  assert joined.count("Yes: café 🎉.") == 2
  assert joined.count("print(i, i * i)") == 1
  assert "naïve" not in joined


@pytest.mark.parametrize("glued", ["student", "teacher"])
@pytest.mark.parametrize(
  ("before", "after", "contents", "want"),
  [
    # One token takes the space before the words with the first of them.
    (" ", "", ("?!", "print(i)"), "!(i)"),
    # One token takes what follows the words with the last of them; where it
    # ends the other side has no boundary, so the next is lost as well.
    ("", "nt", ("?! pri", "(i)"), "!i)"),
  ],
)
def test_a_token_that_reaches_beyond_the_words_is_in_no_span(
  tmp_path, glued, before, after, contents, want
):
  def template(before, after):
    return (
      "{% for m in messages %}{% if not loop.first %}"
      + before
      + "{% endif %}{% generation %}{{ m.content }}{% endgeneration %}"
      + after
      + "{% endfor %}"
    )

  one = dataclasses.replace(bpe(330), chat_template=template(before, after))
  other = dataclasses.replace(byte_level(), chat_template=template("", ""))
  assert "Ġprint" in one.vocabulary
  turns = [{"role": "assistant", "content": words} for words in contents]
  sides = (one, other) if glued == "student" else (other, one)
  batch = row_spans(pairs_of(tmp_path, *sides, [turns]), (90, 90))
  found = "".join(spans_in(batch, sides[0]).values())
  assert found == "".join(spans_in(batch, sides[1], "teacher_").values())
  assert found == want


def test_rows_that_no_span_fits_into_are_refused(tmp_path):
  pairs = pairs_of(tmp_path, byte_level(), byte_level(), ["abc"])
  with pytest.raises(UserError, match="no span that both tokenizers share"):
    pairing._rows(
      pairs_of(tmp_path, byte_level(), words(), ["unbelievable story"]),
      (3, 3),
      0,
    )
  with pytest.raises(UserError, match="got seed=-1"):
    batches(pairs, 1, seed=-1)
