"""Every config, and every method of the parametrised ones, fits its networks.

`ImageExperiment` follows the shapes through the whole step, and trains
nothing. `test_train` runs some of these to the end.
"""

import importlib.util
from pathlib import Path

import jax
import pytest
import tfds_folder

from kdjax import adapters, config, recipes
from kdjax.errors import UserError
from kdjax.experiment import ImageExperiment

CONFIGS = Path(__file__).parents[1] / "configs"


def module(name):
  spec = importlib.util.spec_from_file_location("config", CONFIGS / name)
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  return loaded


pytestmark = pytest.mark.usefixtures("each_network_once")
PAIR = module("cifar100/pair.py")
METHODS = PAIR.methods("resnet8", "resnet8")
# The seven of the papers' tables, and the others that CRD's table 1 has.
PAIRS = (
  "resnet32x4-resnet8x4", "wrn-40-2-wrn-16-2", "resnet56-resnet20",
  "vgg13-vgg8", "resnet32x4-shufflenet_v1", "resnet32x4-shufflenet_v2",
  "wrn-40-2-shufflenet_v1", "wrn-40-2-wrn-40-1", "resnet110-resnet20",
  "resnet110-resnet32", "vgg13-mobilenet_v2",
)  # fmt: skip


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  root = tmp_path_factory.mktemp("tfds")
  splits = {"train": [(32, 32)] * 20, "test": [(32, 32)] * 16}
  tfds_folder.write_images(root, "Cifar100", "3.0.2", 100, "PNG", splits)
  splits = {"train": [(40, 60)] * 20, "validation": [(50, 40)] * 9}
  tfds_folder.write_images(root, "Imagenet2012", "5.1.0", 1000, "JPEG", splits)
  return root


def experiment(c, data_dir):
  c.data.data_dir = str(data_dir)
  config.check_keys(c)
  return ImageExperiment(c)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_fits_the_smallest_pair(method, data_dir):
  c = PAIR.get_config(f"resnet56-resnet20,{method},smoke")
  names = [t.name for t in experiment(c, data_dir).goal.terms]
  assert names[0] == "hard"
  assert len(names) > 1


@pytest.mark.parametrize(("method", "exponent"), [("ttm", 0.1), ("wttm", 0.2)])
def test_ttm_softens_the_teacher_alone(method, exponent):
  """The authors' exponent is 1 / T of their teacher; their student's T is 1."""
  soft = config.goal(PAIR.get_config(f"resnet56-resnet20,{method}")).terms[1]
  assert soft.name == "soft"
  assert [t(0) for t in soft.temperatures] == [1.0]
  assert soft.hparams["exponent"] == exponent


@pytest.mark.parametrize(
  "name",
  sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.glob("imagenet/*.py")),
)
def test_every_imagenet_config_fits(name, data_dir):
  assert experiment(module(name).get_config("smoke"), data_dir).goal.terms


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
  "method", ["hint", "multi_level", "overhaul", "review"]
)
def test_every_pair_has_the_taps_that_methods_read(pair, method):
  c = PAIR.get_config(f"{pair},{method}")
  batch = {"image": jax.ShapeDtypeStruct((2, 32, 32, 3), "float32")}
  taps = []
  for side in (c.student, c.teacher):
    network = config.model(side, 100, 3)
    variables = jax.eval_shape(network.init, jax.random.key(0), batch)
    taps.append(adapters.tap_specs(network, variables, batch))
  for term in config.goal(c, *taps, 50_000).terms:
    if term.init is not None:
      ours, theirs = (
        jax.tree.map(lambda n, t=t: t[n], names)
        for names, t in zip(term.taps, taps)
      )
      jax.eval_shape(term.init, jax.random.key(0), ours, theirs)


def test_the_recipe_is_the_papers():
  c = PAIR.get_config("resnet32x4-shufflenet_v1,kl")
  assert c.phases.distilled.steps == 240 * 781
  rate = c.phases.distilled.optimizer.learning_rate
  assert rate.init_value == 0.01
  assert list(rate.boundaries_and_scales) == [
    str(781 * n) for n in (150, 180, 210)
  ]
  assert c.phases.teacher.optimizer.learning_rate.init_value == 0.05
  assert c.alpha == 0.1
  assert c.temperature == 4.0
  assert c.seeds == 3


def test_patience_changes_the_distilled_phase_alone():
  c = PAIR.get_config("resnet56-resnet20,patient")
  assert c.phases.distilled.steps == 1200 * 781
  assert c.phases.alone.steps == 240 * 781
  alone = c.phases.alone.optimizer.learning_rate.schedule
  assert alone == "piecewise_constant_schedule"
  assert (c.alpha, c.temperature) == (0.0, 1.0)
  mixes = [c.phases[name].mixup for name in ("teacher", "alone", "distilled")]
  assert mixes == [0.0, 0.0, 1.0]


@pytest.mark.slow
def test_every_named_network_can_be_built():
  batch = {"image": jax.ShapeDtypeStruct((2, 32, 32, 3), "float32")}
  for name in recipes.CIFAR_NETWORKS:
    c = recipes.cifar100(name, name)
    network = config.model(c.student, 100, 3)
    params, _ = jax.eval_shape(network.init, jax.random.key(0), batch)
    assert params["classifier"]["kernel"].shape[-1] == 100


@pytest.mark.parametrize(
  ("arg", "message"),
  [
    ("resnet56,kl", "got the pair 'resnet56', needs TEACHER-STUDENT"),
    ("resnet56-resnet21", "got the pair 'resnet56-resnet21'"),
    ("resnet56-resnet20,dkdd", "unknown method 'dkdd': did you mean 'dkd'"),
    ("resnet56-resnet20,kl,kl", "takes TEACHER-STUDENT,METHOD"),
  ],
)
def test_a_wrong_argument_is_one_line(arg, message):
  with pytest.raises(UserError, match=message):
    PAIR.get_config(arg)
