"""The standard recipes of the vision papers, as whole configs to start from.

    c = recipes.cifar100("resnet32x4", "resnet8x4")
    c.soft = dict(name="dkd")

`configs/cifar100/` and `configs/imagenet/` are made of them, a line for each
thing that differs. All keys of a config are in what they return.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from kdjax import errors

# What `ml_collections` declares of a key's value fits none of its uses.
Config = Any

# The networks for 32 px that the papers distil, by the names they use.
CIFAR_NETWORKS: dict[str, dict[str, Any]] = {
  **{
    f"resnet{depth}": dict(name="resnet_cifar", depth=depth)
    for depth in (8, 14, 20, 32, 44, 56, 110)
  },
  "resnet8x4": dict(name="resnet_cifar", depth=8, width=64, stem_width=32),
  "resnet32x4": dict(name="resnet_cifar", depth=32, width=64, stem_width=32),
  **{
    f"wrn-{depth}-{width}": dict(name="wrn", depth=depth, width=width)
    for depth, width in ((16, 1), (16, 2), (40, 1), (40, 2))
  },
  "vgg8": dict(name="vgg_cifar", depth=8),
  "vgg13": dict(name="vgg_cifar", depth=13),
  "mobilenet_v2": dict(name="mobilenet_v2_cifar"),
  "shufflenet_v1": dict(name="shufflenet_v1_cifar"),
  "shufflenet_v2": dict(name="shufflenet_v2_cifar"),
}
_MOBILE = ("mobilenet_v2", "shufflenet_v1", "shufflenet_v2")
_TINY = dict(name="resnet_cifar", depth=8, width=4)


def words(arg: str, *known: str) -> set[str]:
  """What stands after the colon of `--config=FILE:ARG`, parted by commas.

  Raises:
    UserError: a word that is not known.
  """
  found = {word for word in arg.split(",") if word}
  for word in sorted(found - set(known)):
    raise errors.unknown("word after the colon of --config", word, known)
  return found


def cifar100(
  teacher: str, student: str, *, epochs: int = 240, smoke: bool = False
) -> Config:
  """CIFAR-100 as Tian et al. 2020 (CRD) and their successors train on it.

  240 epochs of batch 64, SGD with momentum 0.9, learning rate 0.05 (0.01 for
  MobileNet and ShuffleNet), a tenth of it after 150, 180 and 210 epochs, weight
  decay 5e-4 on everything, T = 4, 0.1 · hard + 0.9 · T² · KL.

  Args:
    teacher, student: of `CIFAR_NETWORKS`.
    epochs: the whole; the three drops keep their share of it.
    smoke: three updates of tiny networks, to see that a config runs.

  Raises:
    UserError: for another network.
  """
  networks = {
    side: errors.choose(side, name, CIFAR_NETWORKS)
    for side, name in (("teacher", teacher), ("student", student))
  }
  epoch = 1 if smoke else 50_000 // 64
  drops = [round(epochs * share) for share in (150 / 240, 180 / 240, 210 / 240)]
  if smoke:
    epochs, drops = 3, [1, 2]

  def phase(network: str) -> dict[str, Any]:
    rate = 0.01 if network in _MOBILE else 0.05
    return _phase(rate, epoch, epochs, drops, decay=5e-4, decay_on="all")

  c = _base(smoke)
  c.data.update(
    name="cifar100",
    train_split="train",
    eval_split="test",
    padding=4,
    mean=(0.5071, 0.4866, 0.4409),
    std=(0.2675, 0.2565, 0.2761),
    batch_size=16 if smoke else 64,
    eval_batch_size=16 if smoke else 500,
  )
  c.phases = dict(
    teacher=phase(teacher), alone=phase(student), distilled=phase(student)
  )
  for side, network in networks.items():
    c[side].model = dict(_TINY if smoke else network)
  c.save_every = 3 if smoke else 10 * epoch
  c.save_minutes = 0.0  # more checkpoints by the clock; 0 = none
  return c


def imagenet(
  teacher: Mapping[str, Any],
  student: Mapping[str, Any],
  *,
  epochs: int = 100,
  smoke: bool = False,
) -> Config:
  """ImageNet at 224 px: 100 epochs of batch 256, in bfloat16.

  SGD with momentum 0.9, learning rate 0.1, a tenth of it after 30, 60 and 90
  epochs, weight decay 1e-4 on kernels, T = 1, 0.5 · hard + 0.5 · KL: the
  schedule of the ImageNet rows in the papers.

  Args:
    teacher, student: models, such as `dict(name="resnet", depth=50)`.
    epochs: the whole; the three drops keep their share of it.
    smoke: three updates of small networks at 32 px, to see that a config runs.
  """
  epoch = 1 if smoke else 1_281_167 // 256
  drops = [round(epochs * share) for share in (0.3, 0.6, 0.9)]
  if smoke:
    epochs, drops = 3, [1, 2]
  c = _base(smoke)
  c.data.update(
    name="imagenet2012",
    train_split="train",
    eval_split="validation",
    image_size=32 if smoke else 224,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    batch_size=16 if smoke else 256,
    eval_batch_size=16 if smoke else 256,
  )
  c.phases = {
    name: _phase(0.1, epoch, epochs, drops, decay=1e-4, decay_on="kernels")
    for name in ("teacher", "alone", "distilled")
  }
  for side, network in (("teacher", teacher), ("student", student)):
    c[side].model = dict(_TINY if smoke else network)
    c[side].dtype = "bfloat16"
  c.alpha, c.temperature = 0.5, 1.0
  c.save_every = 3 if smoke else 5 * epoch
  c.save_minutes = 0.0  # more checkpoints by the clock; 0 = none
  return c


def patient(c: Config, *, epochs: int, epoch: int) -> Config:
  """Patient and consistent: the KL alone, on mixup, for very long.

  Crop and mixup are drawn once for both networks, as everywhere in kdjax; the
  learning rate falls along a cosine, T = 1 (Beyer et al. 2022, arXiv
  2106.05237, sections 3 and 4).

  Args:
    c: changed in place.
    epochs: of the distilled phase.
    epoch: updates in one.
  """
  steps = epochs * epoch
  distilled = c.phases.distilled
  distilled.steps = steps
  rate = distilled.optimizer.learning_rate.init_value
  distilled.optimizer.learning_rate = ConfigDict(
    dict(schedule="cosine_decay_schedule", init_value=rate, decay_steps=steps)
  )
  distilled.mixup = 1.0
  c.alpha, c.temperature = 0.0, 1.0
  return c


def _phase(
  rate: float,
  epoch: int,
  epochs: int,
  drops: list[int],
  *,
  decay: float,
  decay_on: str,
) -> dict[str, Any]:
  return dict(
    steps=epoch * epochs,
    microbatches=1,
    mixup=0.0,
    optimizer=dict(
      name="sgd",
      learning_rate=dict(
        schedule="piecewise_constant_schedule",
        init_value=rate,
        boundaries_and_scales={f"{epoch * n}": 0.1 for n in drops},
      ),
      momentum=0.9,
      nesterov=False,
      weight_decay=decay,
      decay_on=decay_on,
      clip=0.0,
    ),
  )


def _base(smoke: bool) -> Config:
  """What both recipes share; `configs/digits.py` explains each key."""
  network = dict(
    num_classes=0, checkpoint="", drop_head=False, dtype="float32", partition=()
  )
  return ConfigDict(
    dict(
      task="image",
      seed=0,
      seeds=1 if smoke else 3,
      data=dict(
        data_dir="",
        labelled=0,
        image_size=0,
        padding=0,
        flip=True,
      ),
      teacher=dict(network),
      student=dict(network, classifier="own"),
      alpha=0.1,
      hard_weight=None,
      soft_weight=None,
      temperature=4.0,
      hard=dict(name="cross_entropy", label_smoothing=0.0),
      soft=dict(name="kl"),
      terms={},
      mesh=dict(data=-1, fsdp=1, model=1),
      show_sharding=False,
      keep_last=2,
      keep_best=1,
      on_nan="stop",
      profile=0,
      hang_minutes=0.0,
    )
  )
