"""The networks of a run, from its config.json and its checkpoints."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

import kdjax.config as configuration
from kdjax import adapters, checkpoint, data, errors, files, simkd
from kdjax.types import Batch, Model, Variables

# network: the phase of the config that trained it
PHASES = {
  "teacher": "teacher",
  "student_alone": "alone",
  "student_distilled": "distilled",
}


class Located(NamedTuple):
  """A run: the folder of one seed, and the config that it was made with."""

  folder: Path
  seed: int
  config: Any


class Run(NamedTuple):
  """A run of the task "image".

  Attributes:
    image_shape: (H, W, C) of what the networks see.
    num_classes: the data's; a network's config may say otherwise.
  """

  folder: Path
  seed: int
  config: Any
  image_shape: tuple[int, int, int]
  num_classes: int

  @property
  def example(self) -> Batch:
    return {"image": np.zeros((1, *self.image_shape), np.float32)}


class Trained(NamedTuple):
  """A network with its values.

  Attributes:
    family: its name in `models.MODELS`; "" for a student with its teacher's
      classifier, which is no network of that table.
    arguments: what it was built with.
  """

  name: str
  model: Model
  variables: Variables
  family: str
  arguments: Mapping[str, Any]


def locate(workdir: str | Path, seed: int | None = None) -> Located:
  """The run in `workdir`; the config's first seed unless another is named.

  Raises:
    UserError: no folder of a run, a config.json that is damaged or of another
      version, a seed that was not run.
  """
  workdir = files.path(workdir)
  with files.reaching(workdir):
    config = _config(workdir)
    seed = int(config.seed) if seed is None else seed
    folder = workdir / f"seed_{seed}"
    if not folder.is_dir():
      seeds = (p.name.removeprefix("seed_") for p in workdir.glob("seed_*"))
      raise errors.UserError(
        f"{workdir} has no seed {seed}, only "
        f"{', '.join(sorted(seeds)) or 'a config'}: name one of them, or train "
        "with that seed first"
      )
  return Located(folder, seed, config)


def open_run(run: Located) -> Run:
  """The run and what its images are.

  Raises:
    UserError: data that is not there, or images of several sizes.
  """
  c = run.config.data
  source = data.load(c.name, c.eval_split, data_dir=c.data_dir or None)
  height, width, channels = source.image_shape
  if c.image_size:
    height = width = c.image_size
  if not (height and width and channels):
    raise errors.UserError(
      f"{c.name} has images of several sizes and config.data.image_size is 0: "
      "no one shape can be served"
    )
  shape = height, width, channels
  return Run(*run, shape, source.num_classes)


def trained(run: Run, network: str) -> Trained:
  """A network and the values of its newest sound checkpoint.

  A teacher is in the dtype that the students learned from. Where training is
  not done, or a damaged checkpoint was passed over, stderr gets a line.

  Raises:
    UserError: an unknown network, or no checkpoint of it.
  """
  phase = errors.choose("network", network, PHASES)
  config = run.config.teacher if phase == "teacher" else run.config.student
  arguments = config.model.to_dict()
  family = arguments.pop("name")
  model = _model(run, config)
  if phase == "distilled" and config.classifier == "teacher":
    model, family = _with_classifier(run, model), ""
  like = jax.eval_shape(model.init, jax.random.key(0), run.example)
  if phase != "teacher":
    variables = newest(run, network, like)
    return Trained(network, model, variables, family, arguments)
  variables = configuration.loaded(config, model, run.example)
  params, stats = variables or newest(run, network, like)
  params = adapters.cast(params, configuration.dtype(config.dtype))
  return Trained(network, model, (params, stats), family, arguments)


def _config(workdir: Path) -> Any:
  path = workdir / "config.json"
  if not path.exists():
    what = "has no config.json" if workdir.is_dir() else "is no folder"
    raise errors.UserError(
      f"{workdir} {what}: give the --workdir of a run of kdjax.train"
    )
  try:
    content = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise errors.UserError(
      f"cannot read {path}: {error}: put back a copy, or train again"
    ) from error
  if not isinstance(content, dict):
    raise errors.UserError(
      f"{path} holds no config: put back a copy, or train again"
    )
  configuration.check_keys(content)
  return ConfigDict(content)


def _model(run: Run, config: Any) -> Model:
  return configuration.model(config, run.num_classes, run.image_shape[-1])


def _with_classifier(run: Run, student: Model) -> Model:
  """The student that inherits its teacher's classifier, still of zeros."""
  config = run.config.teacher
  teacher = _model(run, config)
  params, stats = jax.eval_shape(teacher.init, jax.random.key(0), run.example)
  zeros = jax.tree.map(
    lambda s: np.zeros(s.shape, configuration.dtype(config.dtype)),
    params["classifier"],
  )
  variables = {**params, "classifier": zeros}, stats
  return simkd.simkd(student, teacher, variables, run.example)


def newest(run: Located | Run, network: str, like: Variables) -> Variables:
  """The values of a network's newest sound checkpoint.

  Where training is not done, or a damaged checkpoint was passed over, stderr
  gets a line.

  Args:
    like: the variables' shapes.
  """
  folder = run.folder / network / "checkpoints"
  steps = run.config.phases[PHASES[network]].steps
  done = checkpoint.steps(folder)
  if not done:
    raise errors.UserError(
      f"no checkpoint in {folder}: {network} of seed {run.seed} is not trained "
      "yet; start the training command again, or name another --network"
    )
  told: list[str] = []
  if done[-1] < steps:
    told.append(f"{network} stands at update {done[-1]} of {steps}")
  variables = checkpoint.load_params(folder, like, told.append)
  for line in told:
    print(f"kdjax: {line}", file=sys.stderr)
  return variables
