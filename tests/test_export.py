"""The export: what is read back computes what the checkpoint does."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from abstract import OneKey
from jax import export as jax_export
from safetensors.numpy import load_file

from kdjax import (
  adapters,
  checkpoint,
  export,
  models,
  parallel,
  pretrained,
  simkd,
  train,
)
from kdjax.export import serving
from kdjax.types import TrainState

ROOT = Path(__file__).parents[1]
DIGITS = {"mean": 0.3, "std": 0.35}
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The folder of a finished run, which a test may not change."""
  workdir = tmp_path_factory.mktemp("run")
  mesh = parallel.make_mesh(1)  # eight compile many times longer
  config = ROOT / "configs" / "digits.py"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(parallel, "make_mesh", lambda **_: mesh)
    args = [f"--config={config}:smoke", f"--workdir={workdir}"]
    args.append("--config.phases.alone.steps=0")  # no test reads it
    assert train.main(["train", *args]) == 0
  return workdir


@pytest.fixture
def unmeasured(monkeypatch):
  """Compiles no program where a test looks at files alone."""
  told = serving.Latency(0.001, 7)
  monkeypatch.setattr(serving, "latency", lambda exported: told)


def exported(workdir, output, *more):
  return export.main(
    ["export", f"--workdir={workdir}", f"--output={output}", *more]
  )


def network(name="resnet_cifar", **arguments):
  arguments |= {"num_classes": 10, "channels": 1}
  return adapters.from_nnx(
    lambda rngs: models.MODELS[name](**arguments, rngs=rngs)
  )


STUDENT = network(depth=8, width=4)
TEACHER = network(depth=8, width=8)


def shapes(model):
  example = {"image": np.zeros((1, 8, 8, 1), np.float32)}
  return jax.eval_shape(model.init, jax.random.key(0), example)


def values(model, seed):
  """Variables of its shapes; none is negative, as a variance may not be."""
  draw = np.random.default_rng(seed).random
  return jax.tree.map(
    lambda x: jax.device_put(draw(x.shape).astype(x.dtype)), shapes(model)
  )


def stored(workdir, name, model):
  """(params, stats) that the run left, by the checkpoint's own reader."""
  folder = workdir / "seed_0" / name / "checkpoints"
  return checkpoint.load_params(folder, shapes(model))


def save(workdir, name, variables, seed=0):
  folder = workdir / f"seed_{seed}" / name / "checkpoints"
  shutil.rmtree(folder, ignore_errors=True)
  state = TrainState(jnp.asarray(3), *variables, (), jax.random.key(0))
  with checkpoint.Checkpointer(folder) as checkpoints:
    checkpoints.save(3, state)


def copied(run, tmp_path, change=lambda config: None):
  """A run like `run` with its config changed."""
  workdir = tmp_path / "copy"
  shutil.copytree(
    run, workdir, ignore=shutil.ignore_patterns("compiled", "tensorboard")
  )
  config = json.loads((workdir / "config.json").read_text())
  change(config)
  (workdir / "config.json").write_text(json.dumps(config))
  return workdir


def logits_of(model, variables, images=IMAGES):
  """By the network itself, of images normalised by NumPy."""
  x = (images.astype(np.float32) / 255 - DIGITS["mean"]) / DIGITS["std"]
  apply = jax.jit(lambda v, x: model.apply(*v, {"image": x}, train=False)[0])
  return apply(variables, np.float32(x)).logits


def called(folder, images=IMAGES):
  told = json.loads((folder / "serving.json").read_text())
  blob = (folder / told["program"]).read_bytes()
  return jax.jit(jax.export.deserialize(blob).call)(images)


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def test_weights_are_those_of_the_checkpoint(run, tmp_path, capsys):
  output = tmp_path / "new" / "student"
  assert exported(run, output) == 0
  assert {p.name for p in output.iterdir()} == {
    "config.json",
    "model.safetensors",
  }
  assert [p.name for p in output.parent.iterdir()] == ["student"]
  want = stored(run, "student_distilled", STUDENT)
  got = pretrained.read(output, shapes(STUDENT), family="resnet_cifar")
  assert_same(got, want)
  told = json.loads((output / "config.json").read_text())["kdjax"]
  assert told["network"] == "student_distilled"
  assert told["model"] == {"name": "resnet_cifar", "depth": 8, "width": 4}
  assert told["classifier"] == "own"
  assert told["normalization"]["mean"] == [0.3]

  shown = capsys.readouterr().out
  size = (output / "model.safetensors").stat().st_size
  number = r"([\d,.]+)"
  rows = {
    name: [
      float(x.replace(",", ""))
      for x in re.search(
        rf"{name} +{number} +{number} +{number}", shown
      ).groups()
    ]
    for name in ("teacher", "student distilled", "teacher / student")
  }
  assert rows["student distilled"][:2] == [5142, size]
  assert rows["teacher"][0] == 19810
  ratio = np.divide(rows["teacher"], rows["student distilled"])[:2]
  # It is printed with two decimals.
  np.testing.assert_allclose(rows["teacher / student"][:2], ratio, atol=0.0051)
  assert "median of" in shown
  assert "CPU" in shown


def test_the_program_runs_without_kdjax(run, tmp_path):
  """The page's example, in a process of its own, at several batch sizes."""
  assert exported(run, tmp_path / "student", "--format=stablehlo") == 0
  page = (ROOT / "docs" / "export.md").read_text()
  (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
  np.save(tmp_path / "images.npy", IMAGES)
  then = """
import sys
images = np.load("images.npy")
for size in (1, 2, 5):
  np.save(f"{size}.npy", predict(images[:size]))
assert logits.shape == (3, 10), logits.shape
assert not [m for m in sys.modules if m.split(".")[0] in ("kdjax", "flax")]
"""
  done = subprocess.run(
    [sys.executable, "-c", example + then],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  want = logits_of(STUDENT, stored(run, "student_distilled", STUDENT))
  for size in (1, 2, 5):
    got = np.load(tmp_path / f"{size}.npy")
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want[:size], rtol=1e-5, atol=1e-6)


def test_serving_json_says_what_the_program_takes(run, tmp_path, unmeasured):
  output = tmp_path / "teacher"
  output.mkdir()  # an empty folder will do
  more = "--format=stablehlo", "--network=teacher"
  assert exported(run, output, *more) == 0
  told = json.loads((output / "serving.json").read_text())
  assert told["program"] == "teacher.stablehlo"
  path = output / told["program"]
  assert told["bytes"] == path.stat().st_size
  program = jax.export.deserialize(path.read_bytes())
  (image,), (logits,) = program.in_avals, program.out_avals
  assert told["input"]["shape"] == [str(image.shape[0]), 8, 8, 1]
  assert told["input"]["dtype"] == image.dtype == "uint8"
  assert told["output"]["shape"] == [str(logits.shape[0]), 10]
  assert told["num_classes"] == 10
  assert told["platforms"] == list(program.platforms) == ["cpu", "cuda", "tpu"]
  version = told["calling_convention_version"]
  assert version == program.calling_convention_version
  assert told["jax"] == jax.__version__
  assert (told["resize"], told["normalization"]["std"]) == ("none", [0.35])
  want = logits_of(TEACHER, stored(run, "teacher", TEACHER))
  np.testing.assert_allclose(called(output), want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_students_inherited_classifier_is_deployed(
  run, tmp_path, unmeasured, capsys
):
  """SimKD, from a teacher in bfloat16: its classifier is too."""

  def change(config):
    config["student"]["classifier"] = "teacher"
    config["teacher"]["dtype"] = "bfloat16"

  workdir = copied(run, tmp_path, change)
  params, stats = stored(run, "teacher", TEACHER)
  teacher = adapters.cast(params, jnp.bfloat16), stats
  example = {"image": np.zeros((1, 8, 8, 1), np.float32)}
  model = simkd.simkd(STUDENT, TEACHER, teacher, example)
  params, stats = values(model, seed=3)
  # Small, or the sums of so many positive numbers are far apart in rounding.
  params = jax.tree.map(lambda x: x - 0.5, params)
  variables = params, {**stats, "classifier": teacher[0]["classifier"]}
  save(workdir, "student_distilled", variables)

  weights, program = tmp_path / "weights", tmp_path / "program"
  assert exported(workdir, weights) == 0
  tensors = load_file(weights / "model.safetensors")
  np.testing.assert_array_equal(
    tensors["classifier.kernel"], teacher[0]["classifier"]["kernel"]
  )
  assert tensors["classifier.kernel"].dtype == ml_dtypes.bfloat16
  assert "projector.mix.conv.kernel" in tensors
  assert "student.classifier.kernel" not in tensors
  told = json.loads((weights / "config.json").read_text())["kdjax"]
  assert (told["model"]["name"], told["classifier"]) == (
    "resnet_cifar",
    "teacher",
  )
  got = pretrained.read(weights, shapes(model), family="")
  assert_same(got, variables)

  assert exported(workdir, program, "--format=stablehlo") == 0
  want = logits_of(model, variables)
  np.testing.assert_allclose(called(program), want, rtol=1e-5, atol=1e-6)

  assert exported(workdir, tmp_path / "teacher", "--network=teacher") == 0
  got = pretrained.read(tmp_path / "teacher", teacher, family="resnet_cifar")
  assert_same(got, teacher)
  tensors = load_file(tmp_path / "teacher" / "model.safetensors")
  assert tensors["stem.conv.kernel"].dtype == ml_dtypes.bfloat16

  capsys.readouterr()
  assert exported(workdir, tmp_path / "hub", "--layout=hub") == 2
  says = "layout of a student with its teacher's classifier 'hub': known: kdjax"
  assert says in capsys.readouterr().err


@pytest.mark.slow
def test_a_family_with_a_layout_is_written_in_it(run, tmp_path, unmeasured):
  arguments = {"depth": 18, "width": 4}

  def change(config):
    config["student"]["model"] = {"name": "resnet", **arguments}

  workdir = copied(run, tmp_path, change)
  model = network("resnet", **arguments)
  variables = values(model, seed=5)
  save(workdir, "student_distilled", variables)
  names = {}
  for more in ([], ["--layout=torchvision"]):
    output = tmp_path / "-".join(["to", *more])
    assert exported(workdir, output, *more) == 0
    got = pretrained.read(output, shapes(model), family="resnet")
    assert_same(got, variables)
    names[output.name] = set(load_file(output / "model.safetensors"))
  assert "resnet.embedder.embedder.convolution.weight" in names["to"]
  assert "layer1.0.conv1.weight" in names["to---layout=torchvision"]
  told = json.loads((tmp_path / "to" / "config.json").read_text())
  assert told["model_type"] == "resnet"
  assert told["kdjax"]["layout"] == "hub"


def test_the_seed_and_the_network_named_are_written(run, tmp_path, unmeasured):
  workdir = copied(run, tmp_path)
  variables = values(STUDENT, seed=7)
  save(workdir, "student_alone", variables, seed=1)
  more = "--seed=1", "--network=student_alone"
  assert exported(workdir, tmp_path / "student", *more) == 0
  got = pretrained.read(
    tmp_path / "student", shapes(STUDENT), family="resnet_cifar"
  )
  assert_same(got, variables)


def test_a_teacher_from_elsewhere_is_compared_where_it_is_found(
  run, tmp_path, unmeasured, capsys
):
  elsewhere = tmp_path / "elsewhere"
  change = lambda c: c["teacher"].update(checkpoint=str(elsewhere))  # noqa: E731
  workdir = copied(run, tmp_path, change)
  shutil.move(workdir / "seed_0" / "teacher", elsewhere)
  assert exported(workdir, tmp_path / "a", "--network=teacher") == 0
  got = pretrained.read(tmp_path / "a", shapes(TEACHER), family="resnet_cifar")
  assert_same(got, stored(run, "teacher", TEACHER))

  shutil.rmtree(elsewhere)
  capsys.readouterr()
  assert exported(workdir, tmp_path / "b") == 0
  shown = capsys.readouterr()
  assert "student distilled" in shown.out
  assert "teacher" not in shown.out
  assert "the teacher is not measured: " in shown.err
  assert shown.err.count("\n") == 1


def test_training_that_is_not_done_is_told(run, tmp_path, unmeasured, capsys):
  change = lambda c: c["phases"]["distilled"].update(steps=10)  # noqa: E731
  assert exported(copied(run, tmp_path, change), tmp_path / "a") == 0
  told = "kdjax: student_distilled stands at update 3 of 10\n"
  assert capsys.readouterr().err == told


@pytest.mark.parametrize(
  ("more", "says"),
  [
    ("--workdir=/nowhere", "/nowhere is no folder: give the --workdir of a"),
    ("--workdir={tmp_path}/", "has no config.json"),
    ("--network=student", "unknown network 'student': did you mean 'student_"),
    ("--format=stablehol", "unknown format 'stablehol': did you mean 'stable"),
    ("--layout=kdjx", "layout of resnet_cifar 'kdjx': did you mean 'kdjax'"),
    ("--layout=hub", "layout of resnet_cifar 'hub': known: kdjax"),
    ("--seed=4", "has no seed 4, only 0: name one of them"),
    ("--seed=x", "--seed is 'x', must be a whole number"),
    ("--ouput=x", "Did you mean: output"),
    ("--workdir=", "--workdir is missing"),
    ("--output=", "--output is missing"),
    ("stray", "got stray"),
    ("--output={run}", "exists and is not empty"),
    ("--output={run}/config.json", "exists and is not empty"),
    ("--output={run}/config.json/in", "cannot write"),
  ],
)
def test_mistakes_are_one_line_and_leave_no_folder(
  more, says, run, tmp_path, unmeasured, capsys
):
  more = more.format(tmp_path=tmp_path, run=run)
  before = sorted(run.iterdir())
  assert exported(run, tmp_path / "new", more) == 2
  error = capsys.readouterr().err
  assert says in error
  assert error.startswith("kdjax: ")
  assert error.count("\n") == 1
  assert not list(tmp_path.iterdir())
  assert sorted(run.iterdir()) == before


def test_a_layout_is_not_for_a_program(run, tmp_path, capsys):
  more = "--format=stablehlo", "--layout=kdjax"
  assert exported(run, tmp_path / "new", *more) == 2
  assert "--layout=kdjax is for safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("content", "says"),
  [
    ("{", "cannot read"),
    ("[]", "holds no config"),
    ('{"seed": 0}', "config.task is missing"),
  ],
)
def test_a_damaged_config_is_named(content, says, tmp_path, capsys):
  (tmp_path / "config.json").write_text(content)
  assert exported(tmp_path, tmp_path / "new") == 2
  error = capsys.readouterr().err
  assert says in error
  assert error.count("\n") == 1


def test_a_network_that_is_not_trained_yet_is_named(run, tmp_path, capsys):
  workdir = copied(run, tmp_path)
  shutil.rmtree(workdir / "seed_0" / "student_distilled")
  assert exported(workdir, tmp_path / "new") == 2
  error = capsys.readouterr().err
  assert "student_distilled of seed 0 is not trained yet" in error
  assert not (tmp_path / "new").exists()


def test_what_is_stopped_leaves_nothing(run, tmp_path, monkeypatch, capsys):
  calls = []

  def stop(exported):  # in the teacher's turn, then in the student's
    calls.append(exported)
    if len(calls) == 2:
      assert list(tmp_path.rglob("model.safetensors"))
      assert not (tmp_path / "new").exists()  # if it were killed here
      raise KeyboardInterrupt
    return serving.Latency(0.001, 7)

  monkeypatch.setattr(serving, "latency", stop)
  assert exported(run, tmp_path / "new") == 130
  assert len(calls) == 2
  assert not list(tmp_path.iterdir())
  assert "nothing is written" in capsys.readouterr().err


def test_no_arguments_show_the_help(capsys):
  assert export.main(["export"]) == 2
  assert export.main(["export", "--help"]) == 0
  assert capsys.readouterr().out.count("--output=FOLDER") == 2


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_every_family_takes_a_batch_of_any_size(name):
  sizes = {
    "mobilenet_v3": {"size": "small"},
    "resnet": {"depth": 18},
    "resnet_cifar": {"depth": 8},
    "vgg_cifar": {"depth": 8},
    "vit": {"size": "tiny", "image_size": 32},
    "wrn": {"depth": 10, "width": 1},
  }.get(name, {})
  model = adapters.from_nnx(
    lambda _: models.MODELS[name](num_classes=3, rngs=OneKey(0), **sizes)
  )
  (b,) = jax_export.symbolic_shape("b")
  batch = {"image": jax.ShapeDtypeStruct((b, 32, 32, 3), jnp.float32)}
  one = {"image": jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)}
  variables = jax.eval_shape(model.init, jax.random.key(0), one)

  def logits(variables, batch):
    return model.apply(*variables, batch, train=False)[0].logits

  # Tracing with a symbol is what fails where a network needs a number.
  traced = jax.eval_shape(logits, variables, batch)
  assert traced.shape == (b, 3)
