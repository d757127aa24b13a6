import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
import tokenizers
from tokenizers import models, pre_tokenizers

from kdjax.data import text
from kdjax.data.text.tokenizer import byte_level, wrap
from kdjax.data.text.tokens import write_folder
from kdjax.types import UserError

TEXTS = ["naïve 🎉\n", "b" * 100, "c", " d "]


def jsonl(path, records, end="\n"):
  lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
  path.write_bytes(end.join(lines).encode())
  return path


def test_jsonl_is_read_in_any_order(tmp_path):
  for end in ("\n", "\r\n"):
    path = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS], end)
    documents = text.read(path)
    assert len(documents) == 4
    assert [documents.examples[n] for n in (2, 0, 3, 1)] == [
      TEXTS[n] for n in (2, 0, 3, 1)
    ]
    assert list(documents.examples) == TEXTS
    with path.open("ab") as file:
      file.write(b"\n\n\r\n\r\n")  # blank lines are none
    assert list(text.read(path).examples) == TEXTS
  assert len(text.read(jsonl(tmp_path / "b.jsonl", []))) == 0


def test_lines_are_found_across_the_blocks_in_which_a_file_is_read(
  tmp_path, monkeypatch
):
  path = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS * 9])
  want = list(text.read(path).examples)
  from kdjax.data.text import files as module

  monkeypatch.setattr(module, "_BLOCK", 7)
  assert list(text.read(path).examples) == want == TEXTS * 9


def test_parquet_is_read_across_row_groups(tmp_path):
  turns = [[{"role": "user", "content": t}] for t in TEXTS]
  table = pa.table({"text": TEXTS, "messages": turns})
  pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
  documents = text.read(tmp_path / "a.parquet")
  assert [documents.examples[n] for n in (3, 0, 2, 1)] == [
    TEXTS[n] for n in (3, 0, 2, 1)
  ]
  assert text.read(tmp_path, field="messages").examples[3] == turns[3]
  with pytest.raises(UserError, match="has the columns text, messages, needs"):
    text.read(tmp_path, field="body")
  (tmp_path / "b.parquet").write_bytes(b"none")
  with pytest.raises(UserError, match=r"b\.parquet is no parquet file"):
    text.read(tmp_path / "b.parquet")


def test_plain_text_is_a_document_a_file_in_the_order_of_names(tmp_path):
  for n, body in enumerate(TEXTS):
    (tmp_path / f"{3 - n}.txt").write_text(body, newline="")
  documents = text.read(tmp_path)
  assert list(documents.examples) == TEXTS[::-1]
  assert documents.where(1) == str(tmp_path / "1.txt")
  chosen = text.read(str(tmp_path / "[02].txt"))
  assert list(chosen.examples) == [TEXTS[3], TEXTS[1]]


def test_several_files_are_one_after_another(tmp_path):
  jsonl(tmp_path / "b.jsonl", [{"text": "2"}, {"text": "3"}])
  jsonl(tmp_path / "a.jsonl", [{"text": "0"}, {"text": "1"}])
  documents = text.read(tmp_path)
  assert list(documents.examples) == list("0123")
  assert documents.where(3) == f"{tmp_path / 'b.jsonl'}, line 2"
  both = text.read([str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")])
  assert list(both.examples) == list("0123")


def test_tfds_texts_are_read(tmp_path):
  with tfds.core.registered.skip_registration():
    made = type(
      "Prose",
      (tfds.core.GeneratorBasedBuilder,),
      {
        "VERSION": tfds.core.Version("1.0.0"),
        "_info": lambda self: tfds.core.DatasetInfo(
          builder=self,
          features=tfds.features.FeaturesDict({"body": tfds.features.Text()}),
          disable_shuffling=True,
        ),
        "_split_generators": lambda self, _: {
          "train": enumerate({"body": t} for t in TEXTS)
        },
        "_generate_examples": lambda self: None,
        "__module__": __name__,
      },
    )
  builder = made(data_dir=tmp_path, file_format="array_record")
  builder.download_and_prepare()
  from kdjax.data.text.files import from_builder

  documents = from_builder(builder, "train[1:]", "body")
  assert list(documents.examples) == TEXTS[1:]
  assert documents.where(0) == "prose/1.0.0 train[1:], example 0"
  with pytest.raises(UserError, match="has the features body, needs 'text'"):
    from_builder(builder, "train")
  with pytest.raises(UserError, match="no split 'test': choose of train"):
    from_builder(builder, "test", "body")
  with pytest.raises(UserError, match="unknown dataset 'prosa'"):
    text.from_tfds("prosa", "train", data_dir=tmp_path)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ('{"text": "a"', "not JSON .* needs one object with 'text' a line"),
    ("7", "the line is 7, needs an object with 'text'"),
    ('{"body": "a", "id": 1}', "the record has body, id, needs 'text'"),
    ('{"text": null}', "the record has text, needs 'text'"),
    ('{"text": 7}', "the document is a int, needs a text or a list"),
    ('{"text": ["a"]}', "message 0 is 'a', needs a mapping with role and"),
    ('{"text": [{"content": "a"}]}', "message 0 is .* needs a mapping"),
    ('{"text": [{"role": "user"}]}', "has the fields role, needs content too"),
    ('{"text": ""}', "the document is empty, needs text or messages"),
    ('{"text": []}', "the document is empty, needs text or messages"),
  ],
)
def test_a_bad_line_names_file_line_and_what_was_expected(
  tmp_path, line, message
):
  path = jsonl(tmp_path / "a.jsonl", [{"text": "a"}, "", line, {"text": "b"}])
  with pytest.raises(UserError, match=message) as caught:
    text.tokenize(text.read(path), byte_level(), folder=tmp_path / "made")
  assert str(caught.value).startswith(f"{path}, line 3: ")
  assert "\n" not in str(caught.value)
  assert not list((tmp_path / "made").iterdir())  # nothing half-written


def test_bytes_that_are_no_text_are_refused(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
  with pytest.raises(UserError, match=r"line 2: byte 10 is not UTF-8"):
    list(text.read(path).examples)
  (tmp_path / "a.txt").write_bytes(b"\xff")
  with pytest.raises(UserError, match=r"a\.txt: byte 0 is not UTF-8"):
    list(text.read(tmp_path / "a.txt").examples)


def test_paths_without_text_are_refused(tmp_path):
  with pytest.raises(UserError, match="holds no file of text"):
    text.read(tmp_path / "none.jsonl")
  with pytest.raises(UserError, match="holds no file of text"):
    text.read(tmp_path)
  jsonl(tmp_path / "a.jsonl", [])
  (tmp_path / "a.txt").write_text("a")
  with pytest.raises(UserError, match="needs one format: choose files"):
    text.read(tmp_path)
  with pytest.raises(UserError, match="unknown format of text 'jsnl'"):
    text.read(tmp_path / "a.txt", format="jsnl")


def test_empty_documents_may_be_left_out_and_are_counted(tmp_path):
  documents = text.from_list(["ab", "", "c", ""])
  tokens = text.tokenize(
    documents, byte_level(), folder=tmp_path, skip_empty=True
  )
  assert len(tokens) == 2
  assert tokens.num_empty == 2
  assert tokens.ids.tolist() == [256, 97, 98, 256, 256, 99, 256]


def test_tokens_stand_between_begin_and_end_and_count_the_texts_bytes(tmp_path):
  tokens = text.tokenize(text.from_list(TEXTS), byte_level(), folder=tmp_path)
  assert tokens.ids.dtype == np.uint16
  for n, body in enumerate(TEXTS):
    inside = slice(*tokens.offsets[n : n + 2])
    assert tokens.ids[inside].tolist() == [256, *body.encode(), 256]
    assert tokens.num_bytes[inside].tolist() == [
      0,
      *[1] * len(body.encode()),
      0,
    ]
    assert not tokens.target[inside][0]
    assert tokens.target[inside][1:].all()


def test_bytes_that_no_token_holds_count_with_the_next_or_the_last(tmp_path):
  made = tokenizers.Tokenizer(
    models.WordLevel({"naïve": 0, "b": 1}, unk_token="b")
  )
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  tokens = text.tokenize(
    text.from_list([" naïve  b \n"]), wrap("words", made), folder=tmp_path
  )
  assert tokens.ids.tolist() == [0, 1]
  assert tokens.num_bytes.tolist() == [7, 5]


def test_the_loser_of_a_race_takes_the_winners_folder(tmp_path):
  def first(at):
    (at / "file").write_text("first")

  def second(at):
    (at / "file").write_text("second")
    write_folder(tmp_path / "made", first)  # another process, meanwhile

  write_folder(tmp_path / "made", second)
  assert [p.name for p in tmp_path.iterdir()] == ["made"]
  assert (tmp_path / "made" / "file").read_text() == "first"
  (tmp_path / "plain").mkdir()
  modes = [(tmp_path / name).stat().st_mode for name in ("made", "plain")]
  assert modes[0] == modes[1]  # readable for whom the umask lets read


def test_tokens_are_made_once_and_anew_when_anything_changes(tmp_path):
  path = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
  folder = tmp_path / "made"

  def made(documents, tokenizer=None):
    tokens = text.tokenize(documents, tokenizer or byte_level(), folder=folder)
    return tokens.fingerprint

  first = made(text.read(path))
  before = {f: f.stat().st_mtime_ns for f in folder.rglob("*")}
  assert made(text.read(path)) == first
  assert {f: f.stat().st_mtime_ns for f in folder.rglob("*")} == before
  from test_text_alignment import bpe

  assert made(text.read(path), bpe(270)) != first
  jsonl(path, [{"text": "other"}])
  assert made(text.read(path)) != first


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="give a folder that can be written"):
    text.tokenize(
      text.from_list(["a"]), byte_level(), folder=tmp_path / "file" / "in"
    )


def test_held_out_documents_are_apart_and_the_same_each_time():
  documents = text.from_list([str(n) for n in range(40)])
  rest, held = text.hold_out(documents, 0.25)
  assert (len(rest), len(held)) == (30, 10)
  assert {*rest.examples, *held.examples} == {str(n) for n in range(40)}
  again = text.hold_out(documents, 0.25)[1]
  assert list(again.examples) == list(held.examples)
  assert held.fingerprint not in (rest.fingerprint, documents.fingerprint)
  number = int(held.examples[3])
  assert held.where(3) == f"list, document {number}"
  for share in (0.0, 1.0, 0.001):
    with pytest.raises(UserError, match=re.escape(f"a share of {share} is")):
      text.hold_out(documents, share)
