"""Language models from the command line: train, export, and their mistakes."""

import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from kdjax import checkpoint, examples, export, parallel, train
from kdjax.data import text
from kdjax.data.text import corpus
from kdjax.models.decoder import architecture
from kdjax.models.decoder.parameters import init
from kdjax.pretrained import decoders

CONFIGS = Path(__file__).parents[1] / "configs"
NETWORKS = ("teacher", "student_alone", "student_distilled")


@pytest.fixture(autouse=True, scope="module")
def _one_device():
  """Eight compile many times longer."""
  mesh = parallel.make_mesh(1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(parallel, "make_mesh", lambda **_: mesh)
    yield


@pytest.fixture(autouse=True, scope="module")
def _few_documents():
  """To read all, and to evaluate on them, takes most of a run's time."""
  found, few = corpus.sources(), {}
  for split, count in (("train", 30), ("validation", 3), ("test", 3)):
    paths = sorted(path for path in found if corpus.split_of(path) == split)
    few |= {path: found[path] for path in paths[:count]}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(corpus, "sources", lambda root=None: few)
    yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return tmp_path_factory.mktemp("data")


def run(config, workdir, data_dir, *more):
  return train.main(
    [
      "train",
      f"--config={CONFIGS / config}",
      f"--workdir={workdir}",
      f"--config.data.data_dir={data_dir}",
      *more,
    ]
  )


def llama(width, depth, rows):
  return architecture(
    dict(
      model_type="llama",
      vocab_size=rows,
      hidden_size=width,
      intermediate_size=2 * width,
      num_hidden_layers=depth,
      num_attention_heads=2,
      num_key_value_heads=1,
      max_position_embeddings=64,
      rms_norm_eps=1e-6,
      rope_theta=10000.0,
      tie_word_embeddings=True,
    )
  )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
  """Two folders as of the hub: one tokenizer, embeddings padded differently."""
  root = tmp_path_factory.mktemp("hub")
  tokenizer = text.byte_level()
  for side, net in (
    ("teacher", llama(16, 2, 264)),
    ("student", llama(8, 1, 272)),
  ):
    scratch = root / f"{side}_tokenizer"
    scratch.mkdir()
    text.save(tokenizer, scratch)
    params = init(net, jax.random.key(len(side)))
    (scratch / "generation_config.json").write_text('{"eos_token_id": 256}')
    decoders.write(root / side, params, net, beside=list(scratch.iterdir()))
  return root


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
  path = tmp_path_factory.mktemp("texts") / "data.jsonl"
  lines = [{"text": f"line {n}: {'abc ' * (n % 5)}end"} for n in range(60)]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


def of_checkpoints(checkpoints, jsonl):
  return [
    f"--config.teacher.path={checkpoints / 'teacher'}",
    f"--config.student.path={checkpoints / 'student'}",
    f"--config.data.path={jsonl}",
    "--config.data.eval_share=0.2",
  ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
  """The folder of a finished run, which a test may not change."""
  workdir = tmp_path_factory.mktemp("finished")
  assert run("code_lm.py:smoke", workdir, data_dir) == 0
  return workdir


def test_three_networks_are_trained_and_compared(finished):
  results = json.loads((finished / "results.json").read_text())
  for network in NETWORKS:
    got = results[network]
    assert set(got) == {
      "parameters",
      "flops_per_token",
      "bits_per_byte",
      "perplexity",
      "accuracy",
      "nll",
      "ece",
      "agreement",
      "kl",
    }
    assert all(np.isfinite(v) for v in got.values())
    np.testing.assert_allclose(got["perplexity"], math.exp(got["nll"]))
    # Three updates teach nothing: a little below log 1024 a token.
    assert 6.5 < got["nll"] < 7.0
    folder = finished / "seed_0" / network
    assert checkpoint.steps(folder / "checkpoints") == [3]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert "eval/bits_per_byte" in json.loads(lines[-1])
  assert results["teacher"]["agreement"] == 1
  assert results["teacher"]["kl"] == pytest.approx(0, abs=1e-9)
  ((prompt, written),) = results["seeds"][0]["student_distilled"]["samples"]
  assert prompt == "def read(self, size"
  assert written


def test_the_facts_of_the_tokens_come_to_the_results(finished, data_dir):
  results = json.loads((finished / "results.json").read_text())
  documents = corpus.documents("test", data_dir=data_dir)
  for network in NETWORKS:
    facts = examples.read(finished / "seed_0" / network / examples.NAME)
    assert len(facts["nll"]) < examples.MOST  # so they are all
    for name in ("nll", "kl"):
      np.testing.assert_allclose(
        facts[name].mean(), results[network][name], rtol=1e-4, atol=1e-6
      )
    right = (facts["guess"] == facts["label"]).mean()
    np.testing.assert_allclose(right, results[network]["accuracy"], rtol=1e-4)
    # The labels of the first rows are the beginning of the first document.
    text_of = dict(zip(facts["ids"].tolist(), facts["texts"].tolist()))
    labels = facts["label"][facts["row"] < 2].tolist()
    begins = "".join(text_of[label] for label in labels)
    assert len(begins) > 64
    assert documents.examples[0].startswith(begins)


def test_bits_per_byte_are_those_of_the_held_out_bytes(finished):
  """From the perplexity, and the corpus' own number of tokens and bytes."""
  results = json.loads((finished / "results.json").read_text())["teacher"]
  data_dir = json.loads((finished / "config.json").read_text())["data"][
    "data_dir"
  ]
  tokenizer = corpus.bpe(vocab_size=1024, data_dir=data_dir)
  documents = corpus.documents("test", data_dir=data_dir)
  texts = [documents.examples[n] for n in range(len(documents))]
  # Every token of a text and its end is predicted: nothing is before the first
  # but the begin-of-text.
  count = sum(len(e.ids) + 1 for e in tokenizer.encode(texts))
  size = sum(len(t.encode()) for t in texts)
  bits = results["nll"] * count / size / math.log(2)
  np.testing.assert_allclose(results["bits_per_byte"], bits, rtol=1e-5)


def test_an_export_is_the_checkpoint_in_the_hubs_form(
  finished, tmp_path, capsys
):
  args = [f"--workdir={finished}", f"--output={tmp_path / 'out'}"]
  assert export.main(["export", *args]) == 0
  shown = capsys.readouterr().out
  assert "bytes of weights" in shown
  assert "student distilled" in shown
  net, params = decoders.read(tmp_path / "out")
  like = jax.eval_shape(lambda: params)
  folder = finished / "seed_0" / "student_distilled" / "checkpoints"
  saved, _ = checkpoint.load_params(folder, (like, {}))
  jax.tree.map(np.testing.assert_array_equal, params, saved)
  assert net.vocab_size == 1024
  made = text.from_folder(tmp_path / "out")
  assert made.size == 1024


@pytest.mark.slow
def test_two_checkpoints_with_differently_padded_embeddings(
  checkpoints, jsonl, tmp_path, data_dir
):
  given = of_checkpoints(checkpoints, jsonl)
  assert run("llm.py:smoke", tmp_path / "run", data_dir, *given) == 0
  results = json.loads((tmp_path / "run" / "results.json").read_text())
  assert set(results["seeds"][0]) == {"teacher", "student_distilled"}
  assert np.isfinite(results["student_distilled"]["kl"])
  args = [f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"]
  assert export.main(["export", *args]) == 0
  net, params = decoders.read(tmp_path / "out")
  assert net.vocab_size == 272
  told = (tmp_path / "out" / "generation_config.json").read_text()
  assert json.loads(told) == {"eos_token_id": 256}
  assert str(params["embed"]["kernel"].dtype) == "bfloat16"


def change_tokenizer(checkpoints, folder):
  """A copy of the student's checkpoint whose tokenizer has other ids."""
  shutil.copytree(checkpoints / "student", folder)
  path = folder / "tokenizer.json"
  told = json.loads(path.read_text())
  vocabulary = told["model"]["vocab"]
  a, b = "a", "b"
  vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
  path.write_text(json.dumps(told))


def test_different_tokenizers_are_refused_with_the_alternatives(
  checkpoints, jsonl, tmp_path, data_dir, capsys
):
  change_tokenizer(checkpoints, tmp_path / "other")
  given = of_checkpoints(checkpoints, jsonl)
  given.append(f"--config.student.path={tmp_path / 'other'}")
  assert run("llm.py:smoke", tmp_path / "run", data_dir, *given) == 2
  told = capsys.readouterr().err.strip()
  assert "different tokenizers" in told
  assert "universal_logits or likelihood_matching" in told
  assert len(told.splitlines()) == 1
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("soft", "temperature"),
  [("universal_logits", 1.0), ("likelihood_matching", 100.0)],
)
def test_different_tokenizers_by_the_named_losses(
  soft, temperature, checkpoints, jsonl, tmp_path, data_dir
):
  change_tokenizer(checkpoints, tmp_path / "other")
  given = [
    *of_checkpoints(checkpoints, jsonl),
    f"--config.student.path={tmp_path / 'other'}",
    f"--config.soft.name={soft}",
    f"--config.temperature={temperature}",
    "--config.head=dense",
  ]
  assert run("llm.py:smoke", tmp_path / "run", data_dir, *given) == 0
  results = json.loads((tmp_path / "run" / "results.json").read_text())
  # Class by class there is nothing to compare, byte by byte there is.
  distilled = results["student_distilled"]
  assert not {"kl", "agreement"} & set(distilled)
  assert np.isfinite(distilled["bits_per_byte"])
  lines = (
    tmp_path / "run" / "seed_0" / "student_distilled" / "metrics.jsonl"
  ).read_text()
  first = json.loads(lines.splitlines()[0])
  assert first["loss/soft"] > 0
  assert "kl_at_1" not in first
  args = [f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"]
  assert export.main(["export", *args]) == 0
  # The student's own tokenizer, not the teacher's.
  exported = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
  own = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
  assert exported["model"]["vocab"] == own["model"]["vocab"]


@pytest.mark.slow
def test_hidden_states_and_relations_are_terms_of_a_config(
  checkpoints, jsonl, tmp_path, data_dir
):
  given = of_checkpoints(checkpoints, jsonl)
  config = tmp_path / "config.py"
  config.write_text(
    f"""
import sys
sys.path.insert(0, {str(CONFIGS)!r})
import llm

def get_config():
  c = llm.get_config("smoke")
  c.terms = dict(
    hint=dict(name="hint", student="block_*", teacher="block_*", map="evenly",
              projector=dict(name="linear"), weight=1.0),
    minilm=dict(name="self_relations", student="block_1", teacher="block_2",
                num_relation_heads=2, weight=1.0))
  return c
"""
  )
  args = [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
  args.append(f"--config.data.data_dir={data_dir}")
  assert train.main(["train", *args, *given]) == 0
  folder = tmp_path / "run" / "seed_0" / "student_distilled"
  first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
  assert first["loss/hint"] > 0
  assert first["loss/minilm"] > 0


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("--config.data.path=", "name one of the two"),
    ("--config.data.path=nowhere.jsonl", "nowhere.jsonl"),
    ("--config.data.sequence_length=65", "the model's context is 64"),
    ("--config.data.field=body", "needs 'body'"),
    ("--config.teacher.path=", "teacher has neither a path"),
    ("--config.teacher.path=nobody/nothing-here", "neither on the model hub"),
    ("--config.student.remat=blocks", "unknown remat 'blocks'"),
    ("--config.head=sparse", "unknown head 'sparse'"),
    ("--config.data.eval_share=0.0001", "change the share"),
    ("--config.phases.distilled.microbatches=3", "must be divisible by 3"),
    ("--config.task=sound", "unknown task 'sound'"),
  ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
  change, message, checkpoints, jsonl, tmp_path, data_dir, capsys
):
  given = [*of_checkpoints(checkpoints, jsonl), change]
  assert run("llm.py:smoke", tmp_path / "run", data_dir, *given) == 2
  told = capsys.readouterr().err.strip()
  assert message in told
  assert len(told.splitlines()) == 1
  assert not (tmp_path / "run").exists()


def bad_documents(tmp_path, lines):
  path = tmp_path / "bad.jsonl"
  path.write_text("".join(line + "\n" for line in lines))
  return f"--config.data.path={path}"


@pytest.mark.parametrize(
  ("lines", "message"),
  [
    (['{"text": "one"}', '{"text": ', '{"text": "x"}'] * 9, "line 2"),
    (['{"text": "one"}', '{"body": "x"}'] * 9, "line 2"),
    (['{"text": [{"role": "user", "content": "hi"}]}'] * 9, "is a target"),
    (['{"text": ""}'] * 9, "is a target"),
  ],
)
def test_bad_documents_are_named(
  lines, message, checkpoints, jsonl, tmp_path, data_dir, capsys
):
  given = [*of_checkpoints(checkpoints, jsonl), bad_documents(tmp_path, lines)]
  assert run("llm.py:smoke", tmp_path / "run", data_dir, *given) == 2
  told = capsys.readouterr().err.strip()
  assert message in told
  assert len(told.splitlines()) == 1


def test_an_empty_document_is_refused_by_line(
  checkpoints, jsonl, tmp_path, data_dir, capsys
):
  lines = ['{"text": "one"}'] * 4 + ['{"text": ""}'] + ['{"text": "two"}'] * 4
  given = [*of_checkpoints(checkpoints, jsonl), bad_documents(tmp_path, lines)]
  given.append("--config.data.skip_empty=False")
  assert run("llm.py:smoke", tmp_path / "run", data_dir, *given) == 2
  assert "line 5: the document is empty" in capsys.readouterr().err


@pytest.mark.slow
def test_adapters_are_trained_and_merged_at_export(
  checkpoints, jsonl, tmp_path, data_dir
):
  """The teacher is the student's own base, so that the first KL is 0."""
  student = f"--config.teacher.path={checkpoints / 'student'}"
  given = [*of_checkpoints(checkpoints, jsonl), student]
  given += ["--config.student.lora.rank=2", "--config.student.dtype=float32"]
  given += ["--config.teacher.dtype=float32", "--config.alpha=0.5"]
  # So large that three updates show.
  rate = "--config.phases.distilled.optimizer.learning_rate.peak_value=0.1"
  assert run("llm.py:smoke", tmp_path / "run", data_dir, *given, rate) == 0
  folder = tmp_path / "run" / "seed_0" / "student_distilled"
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  assert json.loads(lines[0])["kl_at_1"] == pytest.approx(0.0, abs=1e-6)
  last = [json.loads(line) for line in lines if "kl_at_1" in line][-1]
  assert last["kl_at_1"] > 1e-5
  results = json.loads((tmp_path / "run" / "results.json").read_text())
  args = [f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"]
  assert export.main(["export", *args]) == 0
  _, base = decoders.read(checkpoints / "student")
  _, merged = decoders.read(tmp_path / "out")
  np.testing.assert_array_equal(
    base["embed"]["kernel"], merged["embed"]["kernel"]
  )
  assert (
    np.abs(
      base["layers"]["up"]["kernel"] - merged["layers"]["up"]["kernel"]
    ).max()
    > 0
  )
  size = sum(x.size for x in jax.tree.leaves(base))
  assert results["student_distilled"]["parameters"] == size


@pytest.mark.slow
@pytest.mark.parametrize("importance", ["weights", "activations"])
def test_a_student_begins_as_a_part_of_its_teacher(
  importance, checkpoints, jsonl, tmp_path, data_dir
):
  given = [
    *of_checkpoints(checkpoints, jsonl),
    "--config.student.path=",
    "--config.student.inherit.layers=1",
    "--config.student.inherit.mlp_width=20",
    f"--config.student.inherit.importance={importance}",
    "--config.phases.distilled.optimizer.learning_rate.peak_value=0.0",
  ]
  assert run("llm.py:smoke", tmp_path / "run", data_dir, *given) == 0
  args = [f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"]
  assert export.main(["export", *args]) == 0
  net, params = decoders.read(tmp_path / "out")
  _, teacher = decoders.read(checkpoints / "teacher")
  assert (net.depth, net.width, net.mlp_width) == (1, 16, 20)
  # Nothing was learned at a rate of 0: it is the teacher's first layer still.
  ours, theirs = (
    np.asarray(p["layers"]["query"]["kernel"], np.float32)[0]
    for p in (params, teacher)
  )
  np.testing.assert_allclose(ours, theirs, rtol=1e-2)


@pytest.mark.slow
def test_a_student_takes_its_teachers_embeddings(
  checkpoints, jsonl, tmp_path, data_dir
):
  given = [
    *of_checkpoints(checkpoints, jsonl),
    "--config.student.path=",
    "--config.student.inherit.embeddings=True",
  ]
  config = tmp_path / "config.py"
  config.write_text(
    f"""
import sys
sys.path.insert(0, {str(CONFIGS)!r})
import llm

def get_config():
  c = llm.get_config("smoke")
  c.student.model = {dict(llama(16, 1, 264).config)!r}
  c.phases.distilled.optimizer.learning_rate.peak_value = 0.0
  return c
"""
  )
  args = [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
  args.append(f"--config.data.data_dir={data_dir}")
  assert train.main(["train", *args, *given]) == 0
  args = [f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"]
  assert export.main(["export", *args]) == 0
  _, params = decoders.read(tmp_path / "out")
  _, teacher = decoders.read(checkpoints / "teacher")
  ours, theirs = (
    np.asarray(p["embed"]["kernel"], np.float32) for p in (params, teacher)
  )
  np.testing.assert_allclose(ours, theirs, rtol=1e-2)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (["lora.rank=2", "path="], "adapters need weights"),
    (["inherit.layers=1"], "student.inherit says"),
    (["path=", "inherit.layers=3"], "needs 1 to 2"),
    (["lora.rank=99"], "needs 1 to 4"),
    (["inherit.embeddings=True"], "leave one of the two out"),
    (["path=", "inherit.width=8", "inherit.embeddings=True"], "leave one"),
  ],
)
def test_a_wrong_student_is_one_line(
  changes, message, checkpoints, jsonl, tmp_path, data_dir, capsys
):
  given = of_checkpoints(checkpoints, jsonl)
  given += [f"--config.student.{change}" for change in changes]
  assert run("llm.py:smoke", tmp_path / "run", data_dir, *given) == 2
  told = capsys.readouterr().err.strip()
  assert message in told
  assert len(told.splitlines()) == 1
  assert not (tmp_path / "run").exists()


def truncate(folder):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-1000])


def lose_a_shard(folder):
  net, params = decoders.read(folder)
  (folder / "model.safetensors").unlink()
  decoders.write(folder / "sharded", params, net, shard_bytes=4000)
  for file in (folder / "sharded").iterdir():
    file.replace(folder / file.name)
  (folder / "sharded").rmdir()
  sorted(folder.glob("model-*.safetensors"))[-1].unlink()


def other_family(folder):
  path = folder / "config.json"
  path.write_text(
    json.dumps(json.loads(path.read_text()) | {"model_type": "bert"})
  )


def new_field(folder):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"moe_layers": 4}))


def foreign_tokenizer(folder):
  """One with more ids than the embedding has rows."""
  path = folder / "tokenizer.json"
  told = json.loads(path.read_text())
  for n in range(20):
    told["model"]["vocab"][f"more{n}"] = 260 + n
  path.write_text(json.dumps(told))


def no_tokenizer(folder):
  (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
  ("spoil", "message"),
  [
    (truncate, "is truncated or no safetensors"),
    (lose_a_shard, "fetch all shards"),
    (other_family, "unknown model_type in config.json 'bert'"),
    (new_field, "moe_layers=4"),
    (foreign_tokenizer, "it belongs to another checkpoint"),
    (no_tokenizer, "holds no tokenizer.json"),
  ],
)
def test_a_damaged_checkpoint_is_one_line(
  spoil, message, checkpoints, jsonl, tmp_path, data_dir, capsys
):
  shutil.copytree(checkpoints / "student", tmp_path / "spoilt")
  spoil(tmp_path / "spoilt")
  given = of_checkpoints(checkpoints, jsonl)
  given.append(f"--config.student.path={tmp_path / 'spoilt'}")
  assert run("llm.py:smoke", tmp_path / "run", data_dir, *given) == 2
  told = capsys.readouterr().err.strip()
  assert message in told
  assert len(told.splitlines()) == 1
  assert not (tmp_path / "run").exists()
