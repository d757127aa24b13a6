"""The command line: every config runs, mistakes are one line and code 2."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tfds_folder

from kdjax import (
  adapters,
  checkpoint,
  data,
  errors,
  examples,
  loop,
  models,
  parallel,
  train,
)
from kdjax.report import measures, runs

pytestmark = pytest.mark.usefixtures("each_network_once")
CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(autouse=True, scope="module")
def _one_device():
  """Eight compile many times longer, and other tests split the same step."""
  mesh = parallel.make_mesh(1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(parallel, "make_mesh", lambda **_: mesh)
    yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """Tiny data sets in the format that TFDS keeps the real ones in."""
  root = tmp_path_factory.mktemp("tfds")
  for name, classes in (("Cifar10", 10), ("Cifar100", 100)):
    tfds_folder.write_images(
      root,
      name,
      "3.0.2",
      classes,
      "PNG",
      {"train": [(32, 32)] * 40, "test": [(32, 32)] * 20},
    )
  tfds_folder.write_images(
    root,
    "Imagenet2012",
    "5.1.0",
    1000,
    "JPEG",
    {
      "train": [(40 + n, 60 - n) for n in range(24)],
      "validation": [(50, 40)] * 9,
    },
  )
  return root


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


@pytest.fixture(scope="module")
def finished_and_shown(tmp_path_factory, data_dir):
  workdir = tmp_path_factory.mktemp("finished")
  with contextlib.redirect_stdout(io.StringIO()) as shown:
    assert run("digits.py:smoke", workdir, data_dir) == 0
  return workdir, shown.getvalue()


@pytest.fixture(scope="module")
def finished(finished_and_shown):
  """The folder of a finished run, which a test may not change."""
  return finished_and_shown[0]


def test_a_run_ends_with_every_network_and_number(finished_and_shown):
  check_finished(*finished_and_shown)


@pytest.mark.slow
@pytest.mark.parametrize(
  "config",
  [
    "cifar100/pair.py:resnet32x4-resnet8x4,multi_level,smoke",
    "cifar100/pair.py:resnet56-resnet20,patient,smoke,dot",
    "imagenet/resnet152_to_mobilenet.py:smoke",
  ],
)
def test_every_config_runs(config, tmp_path, data_dir, capsys):
  assert run(config, tmp_path, data_dir) == 0
  check_finished(tmp_path, capsys.readouterr().out)


def check_finished(workdir, shown):
  results = json.loads((workdir / "results.json").read_text())
  for network in ("teacher", "student_alone", "student_distilled"):
    got = results[network]
    assert set(got) == {
      "parameters",
      "flops",
      "accuracy",
      "nll",
      "ece",
      "agreement",
      "kl",
    }
    assert all(np.isfinite(v) for v in got.values())
    assert f"\n{network.removeprefix('student_')} " in shown
    folder = workdir / "seed_0" / network
    assert checkpoint.steps(folder / "checkpoints") == [3]
    assert (folder / "metrics.jsonl").exists()
    assert list((folder / "tensorboard").iterdir())
  assert results["teacher"]["agreement"] == 1
  assert results["teacher"]["kl"] == 0


def test_the_facts_of_the_examples_come_to_the_results(finished, data_dir):
  results = json.loads((finished / "results.json").read_text())
  for network in ("teacher", "student_alone", "student_distilled"):
    facts = examples.read(finished / "seed_0" / network / examples.NAME)
    assert facts["row"].tolist() == list(range(297))
    found = {
      "accuracy": (facts["guess"] == facts["label"]).mean(),
      "agreement": (facts["guess"] == facts["teacher_guess"]).mean(),
      "nll": facts["nll"].mean(),
      "kl": facts["kl"].mean(),
      "ece": measures.calibration([facts]).ece,
    }
    for name, value in found.items():
      np.testing.assert_allclose(
        value, results[network][name], rtol=1e-4, atol=1e-6, err_msg=name
      )
    worst = int(np.argmax(facts["kl" if "student" in network else "nll"]))
    source = data.load("digits", "test", data_dir=data_dir)
    assert (facts[f"image_{worst}"] == source.examples[worst]["image"]).all()


def test_a_report_reads_what_a_run_writes(finished):
  (found,) = runs.read([finished])
  results = json.loads((finished / "results.json").read_text())
  for network, values in runs.outcomes(found).items():
    assert {m: x for m, (x,) in values.items()} == results[network]
    (net,) = found.of(network)
    assert runs.done(found, net, network)
    assert net.step == 3
    assert net.seconds["wall_seconds"] > 0
    assert net.facts is not None
    np.testing.assert_allclose(
      net.last("eval/nll"), results[network]["nll"], rtol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cifar100", "imagenet"])
def test_a_teacher_is_trained_alone(config, tmp_path, data_dir, capsys):
  assert run(f"{config}/teacher.py:smoke", tmp_path, data_dir) == 0
  assert "student" not in capsys.readouterr().out
  results = json.loads((tmp_path / "results.json").read_text())
  assert "teacher" in results
  assert not {"student_alone", "student_distilled", "gain"} & set(results)
  assert [f.name for f in (tmp_path / "seed_0").iterdir()] == ["teacher"]


@pytest.mark.slow
def test_a_second_start_trains_nothing_and_tells_the_same(
  tmp_path, finished, data_dir, monkeypatch, capsys
):
  make, made = loop.make_evaluate, []
  monkeypatch.setattr(
    loop, "make_evaluate", lambda *given: made.append(1) or make(*given)
  )
  workdir = tmp_path / "again"
  shutil.copytree(finished, workdir)
  before = json.loads((workdir / "results.json").read_text())
  # More seeds may be added to what is there, or one looks closer at it.
  more = ("--config.seeds=2", "--config.profile=1", "--config.hang_minutes=9.0")
  assert run("digits.py:smoke", workdir, data_dir, *more) == 0
  traced = (workdir / "seed_1").glob("*/profile/plugins/profile/*/*.xplane.pb")
  assert len(list(traced)) == 3
  told = capsys.readouterr()
  assert told.err.count("nothing to train") == 3
  assert len(made) == 3  # those that train are evaluated, the others measured
  assert "2 seeds" in told.out
  results = json.loads((workdir / "results.json").read_text())
  assert results["seeds"][0] == before["seeds"][0]


def test_a_named_teacher_is_loaded_and_unchanged(tmp_path, finished, data_dir):
  teacher = finished / "seed_0" / "teacher"
  named = f"--config.teacher.checkpoint={teacher}"
  short = "--config.phases.alone.steps=0"
  assert run("digits.py:smoke", tmp_path, data_dir, named, short) == 0
  assert not (tmp_path / "seed_0" / "teacher" / "checkpoints").exists()
  a, b = (
    json.loads((folder / "results.json").read_text())
    for folder in (finished, tmp_path)
  )
  assert a["teacher"] == b["teacher"]
  assert a["student_distilled"] == b["student_distilled"]


@pytest.mark.parametrize(
  ("more", "says"),
  [
    ("--config.temprature=3", 'Did you mean "temperature"'),
    ("--config.alpha=most", "--config.alpha is 'most', must be a number"),
    ("--config.temperature.init_value=0.0", "of 'soft' is 0 at update 0"),
    ("--config.temperature.end_value=-1.0", "temperature of 'soft' is"),
    ("--config.alpha=1.5", "alpha is 1.5 at update 0"),
    ("--confg=3", "Unknown command line flag 'confg'"),
    ("--config.soft.name=klx", "unknown loss of soft 'klx': did you mean 'kl'"),
    (
      "--config.student.model.name=resnet_cifr",
      "unknown model 'resnet_cifr': did you mean 'resnet_cifar'",
    ),
    (
      "--config.phases.alone.optimizer.name=sgdd",
      "unknown optimizer of phases.alone.optimizer 'sgdd': did you mean 'sgd'",
    ),
    (
      "--config.phases.alone.optimizer.learning_rate.schedule=warmup_cosine",
      "did you mean 'warmup_cosine_decay_schedule'",
    ),
    ("--config.data.name=digitz", "did you mean 'digits'"),
    ("--config.data.train_split=trian", "digits has no split 'trian'"),
    ("--config.data.train_split=train[:0]", "holds no example"),
    ("--config.data.batch_size=0", "batch_size is 0, must be at least 1"),
    ("--config.data.labelled=5000", "5000"),
    ("--config.phases.alone.mixup=-1.0", "mixup is -1.0, must be at least 0"),
    ("--config.seeds=0", "seeds is 0, must be at least 1"),
    ("--config.save_every=0", "save_every is 0, must be at least 1"),
    ("--config.on_nan=maybe", "unknown on_nan 'maybe': known: skip, stop"),
    ("--config.profile=-1", "profile is -1, must be at least 0"),
    ("--config.hang_minutes=-1.0", "hang_minutes is -1.0, must be at least 0"),
    (
      "--config.phases.teacher.steps=0",
      "phases.teacher.steps is 0 and teacher.checkpoint is empty",
    ),
    ("--config.phases.alone.steps=-1", "steps is -1, must be at least 0"),
    ("--config.phases.alone.microbatches=3", "divisible by"),
    ("--config.teacher.checkpoint=/nowhere", "no checkpoint in /nowhere"),
    ("--config.student.dtype=float8", "unknown dtype 'float8'"),
    ("--logger=json:loads", "the logger json.loads could not be opened"),
    ("stray", "got stray"),
  ],
)
def test_mistakes_are_one_line_and_leave_no_folder(
  more, says, tmp_path, data_dir, capsys
):
  workdir = tmp_path / "run"
  assert run("digits.py:smoke", workdir, data_dir, more) == 2
  error = capsys.readouterr().err
  assert says in error
  assert error.startswith("kdjax: ")
  assert error.count("\n") == 1
  assert not workdir.exists()


def test_a_folder_of_another_config_is_refused(finished, data_dir, capsys):
  changed = "--config.alpha=0.5"
  assert run("digits.py:smoke", finished, data_dir, changed) == 2
  assert "made by another config (differs in alpha)" in capsys.readouterr().err


def test_a_start_killed_before_its_config_was_whole_goes_on(
  tmp_path, data_dir, monkeypatch, capsys
):
  def stop(*_):
    raise KeyboardInterrupt

  (tmp_path / "config.json.part").write_text("{")
  (tmp_path / "compiled").mkdir()
  monkeypatch.setattr(train, "run", stop)
  assert run("digits.py:smoke", tmp_path, data_dir) == 130
  assert "the same command goes on" in capsys.readouterr().err
  assert json.loads((tmp_path / "config.json").read_text())["seeds"] == 1


def test_a_refused_start_leaves_what_was_there_and_nothing_else(
  tmp_path, data_dir, monkeypatch
):
  def refuse(config, workdir, opens):
    (Path(workdir) / "compiled").mkdir(parents=True, exist_ok=True)
    (Path(workdir) / "compiled" / "program").touch()
    raise errors.UserError("no")

  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
  monkeypatch.setattr(train, "train", refuse)
  assert run("digits.py:smoke", tmp_path / "new", data_dir) == 2
  assert not (tmp_path / "new").exists()
  kept = tmp_path / "old" / "compiled" / "mine"
  kept.parent.mkdir(parents=True)
  kept.touch()
  assert run("digits.py:smoke", tmp_path / "old", data_dir) == 2
  assert kept.exists()


def test_a_teacher_of_other_shapes_lists_every_mismatch(
  tmp_path, finished, data_dir, capsys
):
  student = finished / "seed_0" / "student_alone"
  named = f"--config.teacher.checkpoint={student}"
  assert run("digits.py:smoke", tmp_path / "b", data_dir, named) == 2
  error = capsys.readouterr().err
  assert "params/stages/0/0/" in error
  assert "params/classifier/kernel is float32[16,10], needs" in error
  assert error.count("\n") == 1
  assert not (tmp_path / "b").exists()


def test_a_loss_that_diverges_is_told_with_its_step(tmp_path, data_dir, capsys):
  far = "--config.phases.teacher.optimizer.learning_rate.peak_value=1e30"
  assert run("digits.py:smoke", tmp_path, data_dir, far) == 2
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith("kdjax: ")
  assert "not finite at step 3" in error
  assert not (tmp_path / "results.json").exists()


def written(tmp_path, text):
  path = tmp_path / "mine.py"
  path.write_text(text)
  return path


@pytest.mark.parametrize(
  ("line", "says"),
  [
    ("c.temprature = 3", "unknown key 'config.temprature': did you mean"),
    ("c.data.batchsize = 3", "'config.data.batch_size'"),
    ("del c.alpha", "config.alpha is missing"),
    ("c.seeds = 'many'", "field 'seeds'"),
    ("c.seeds = True", "config.seeds is True, must be a int"),
    ("c.data.mean = 0.5", "field 'mean'"),
    ("c.soft = dict(name='jsd', mux=0.5)", "did you mean 'mix'"),
    ("c.student.model.wdth = 3", "did you mean 'width'"),
    ("c.terms.tv = dict(name='total_variation')", "terms.tv lacks 'weight'"),
    ("c.alpha = None", "give alpha alone, or both weights"),
    ("oops", "name 'oops' is not defined"),
  ],
)
def test_mistakes_in_a_config_file_are_named(
  line, says, tmp_path, data_dir, capsys
):
  text = (CONFIGS / "digits.py").read_text()
  path = written(
    tmp_path, text.replace("  return c\n", f"  {line}\n  return c\n")
  )
  assert run(path, tmp_path / "run", data_dir) == 2
  error = capsys.readouterr().err
  assert says in error
  assert error.count("\n") == 1


def changed(tmp_path, *lines):
  """The digits' config with further lines."""
  text = (CONFIGS / "digits.py").read_text()
  more = "".join(f"  {line}\n" for line in lines)
  path = written(tmp_path, text.replace("  return c\n", f"{more}  return c\n"))
  return f"{path}:smoke"


def logged(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


MULTI_LEVEL = (
  "moving = lambda a, b: dict(schedule='linear_schedule', init_value=a,"
  " end_value=b, transition_steps=2)",
  "c.terms.hints = dict(name='hint', student='stage_[23]',"
  " teacher='stage_[23]', weight=moving(1.0, 0.0),"
  " projector=dict(name='linear', norm=True))",
  "c.terms.attention = dict(name='attention_transfer', student='stage_1',"
  " teacher='stage_1', weight=moving(0.0, 8.0))",
  "c.terms.crd = dict(name='crd', student='pooled', teacher='pooled',"
  " weight=0.8, embedding=4, num_negatives=8)",
  "c.phases.distilled.optimizer = dict(name='dot', learning_rate=0.01,"
  " weight_decay=5e-4, decay_on='kernels', clip=0.0)",
)


@pytest.mark.slow
def test_several_levels_in_one_config(tmp_path, finished, data_dir):
  config = changed(tmp_path, *MULTI_LEVEL)
  teacher = f"--config.teacher.checkpoint={finished / 'seed_0' / 'teacher'}"
  workdir = tmp_path / "run"
  assert run(config, workdir, data_dir, teacher) == 0
  rows = [
    row
    for row in logged(workdir / "seed_0" / "student_distilled")
    if "loss/total" in row
  ]
  names = ["hints/stage_2", "hints/stage_3", "attention", "crd"]
  assert len(rows) == 3
  for row in rows:
    for name in ("hard", "soft", *names):
      assert np.isfinite(row[f"loss/{name}"])
    total = sum(
      row[f"weight/{name}"] * row[f"loss/{name}"]
      for name in ("hard", "soft", *names)
    )
    np.testing.assert_allclose(row["loss/total"], total, rtol=1e-5)
  for name, want in {
    "hints/stage_2": [1, 0.5, 0],
    "hints/stage_3": [1, 0.5, 0],
    "attention": [0, 4, 8],
  }.items():
    assert [row[f"weight/{name}"] for row in rows] == pytest.approx(want)
  results = json.loads((workdir / "results.json").read_text())
  plain = json.loads((finished / "results.json").read_text())
  # What the terms own is no part of the student.
  for number in ("parameters", "flops"):
    assert (
      results["student_distilled"][number]
      == results["student_alone"][number]
      == plain["student_distilled"][number]
    )
  # Alone, the student has no terms, and no other optimizer.
  assert results["student_alone"] == plain["student_alone"]
  # What is saved as the student's fits the plain network.
  network = adapters.from_nnx(
    lambda rngs: models.resnet_cifar(
      8, width=4, num_classes=10, channels=1, rngs=rngs
    )
  )
  batch = {"image": np.zeros((1, 8, 8, 1), np.float32)}
  like = jax.eval_shape(network.init, jax.random.key(0), batch)
  folder = workdir / "seed_0" / "student_distilled" / "checkpoints"
  params, _ = checkpoint.load_params(folder, like)
  assert set(params) == {"stem", "stages", "classifier"}


SIMKD = (
  "c.student.classifier = 'teacher'",
  "c.alpha = None",
  "c.hard_weight = 0.0",
  "c.soft_weight = 0.0",
  "c.terms.features = dict(name='hint', weight=1.0, student='projected',"
  " teacher='stage_3')",
)


@pytest.mark.slow
def test_simkd_from_a_config(tmp_path, finished, data_dir):
  workdir = tmp_path / "run"
  teacher = finished / "seed_0" / "teacher"
  named = f"--config.teacher.checkpoint={teacher}"
  assert run(changed(tmp_path, *SIMKD), workdir, data_dir, named) == 0
  rows = logged(workdir / "seed_0" / "student_distilled")
  for row in rows:
    if "loss/total" in row:
      assert row["loss/total"] == pytest.approx(row["loss/features"], rel=1e-6)
      assert row["weight/hard"] == row["weight/soft"] == 0
  results = json.loads((workdir / "results.json").read_text())
  plain = json.loads((finished / "results.json").read_text())
  assert results["student_alone"] == plain["student_alone"]
  # The trunk's 16 channels -> 16 -> 16 -> 32, as wide as the teacher's, each
  # with scale and bias; then the teacher's classifier of 32 in place of 16.
  projector = 16 * 16 + 9 * 16 * 16 + 16 * 32 + 2 * (16 + 16 + 32)
  assert results["student_distilled"]["parameters"] == (
    results["student_alone"]["parameters"]
    + projector
    + (32 * 10 + 10)
    - (16 * 10 + 10)
  )
  # Started again, it trains nothing and measures the same.
  before = (workdir / "results.json").read_text()
  assert run(changed(tmp_path, *SIMKD), workdir, data_dir, named) == 0
  assert (workdir / "results.json").read_text() == before


def term(name, student="stage_3", teacher="stage_3", **more):
  arguments = dict(name=name, weight=1.0, student=student, teacher=teacher)
  return f"c.terms.t = {arguments | more!r}"


LINEAR = dict(projector=dict(name="linear"))


@pytest.mark.parametrize(
  ("lines", "says"),
  [
    (
      [term("hint", student="stag_3")],
      "terms.t: unknown student tap 'stag_3': did you mean 'stage_3'? known: ",
    ),
    ([term("hint", teacher="block_*")], "unknown teacher tap 'block_*'"),
    # The taps are those of the network that is distilled.
    ([term("hint", student="projected")], "unknown student tap 'projected'"),
    (
      [term("hint")],
      "student activation has shape (64, 2, 2, 16), the teacher's "
      "(64, 2, 2, 32): give the term a projector",
    ),
    (
      [term("hint", teacher="pooled", **LINEAR)],
      "no projector brings an activation [B, 2, 2, 16] to [B, 32]",
    ),
    (
      [term("hint", "stage_[12]", "stage_[123]", **LINEAR)],
      "matches 2 student taps (stage_1, stage_2)",
    ),
    (
      [term("crd", "pooled", "pooled", num_examples=100)],
      "memory bank of 100 rows is smaller than the dataset's 1200 examples",
    ),
    (
      [MULTI_LEVEL[-1].replace("clip=0.0", "clip=1.0")],
      "phases.distilled.optimizer",
    ),
    (["c.student.drop_head = True"], "drop_head is set and there is no check"),
    (
      ["c.student.classifier = 'teachers'"],
      "unknown student.classifier 'teachers': did you mean 'teacher'",
    ),
    (
      [*SIMKD[:4], term("hint", "projected", "stage_2")],
      "student activation has shape (64, 2, 2, 32), the teacher's (64, 2, 2, 1",
    ),
  ],
)
def test_mistakes_in_terms_are_one_line_and_leave_no_folder(
  lines, says, tmp_path, data_dir, capsys
):
  workdir = tmp_path / "run"
  assert run(changed(tmp_path, *lines), workdir, data_dir) == 2
  error = capsys.readouterr().err
  assert says in error
  assert error.startswith("kdjax: ")
  assert error.count("\n") == 1
  assert not workdir.exists()


def test_no_arguments_show_the_help(capsys):
  assert train.main(["train"]) == 2
  assert train.main(["train", "--help"]) == 0
  assert capsys.readouterr().out.count("--workdir=FOLDER") == 2
  assert train.main(["train", "--workdir=x"]) == 2
  assert "--config is missing" in capsys.readouterr().err


def test_where_the_others_do_not_come_it_may_be_started_again(
  tmp_path, data_dir, capsys
):
  place = ["--coordinator=localhost:1", "--processes=2", "--process=1"]
  more = [*place, "--start_seconds=1"]
  assert run("digits.py:smoke", tmp_path / "run", data_dir, *more) == 75
  said = capsys.readouterr().err
  assert "process 1 of 2 got no answer from process 0" in said
  assert said.count("\n") == 1
  assert not (tmp_path / "run").exists()


def test_another_store_is_refused_before_anything_is_made(
  tmp_path, monkeypatch, data_dir, capsys
):
  monkeypatch.chdir(tmp_path)
  assert run("digits.py:smoke", "s3://bucket/run", data_dir) == 2
  said = capsys.readouterr().err
  assert said.count("\n") == 1
  assert "s3://bucket/run is no folder, and of buckets only gs://" in said
  assert not (tmp_path / "s3:").exists()
