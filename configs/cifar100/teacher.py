"""CIFAR-100: a teacher alone, so that no weights from elsewhere are needed.

    python -m kdjax.train --config=configs/cifar100/teacher.py:resnet32x4 \\
      --workdir=runs/resnet32x4
    python -m kdjax.train --workdir=runs/dkd \\
      --config=configs/cifar100/pair.py:resnet32x4-resnet8x4,dkd \\
      --config.teacher.checkpoint=runs/resnet32x4/seed_0/teacher

Any network of `kdjax.recipes.CIFAR_NETWORKS`, by its standard recipe (240
epochs). The papers' teachers, accuracy in % by CRD's repository: resnet32x4
79.42, wrn-40-2 75.61, resnet56 72.34, vgg13 74.64. Not run here.
"""

from ml_collections import ConfigDict

from kdjax import recipes


def get_config(arg: str = "resnet32x4") -> ConfigDict:
  words = [w for w in arg.split(",") if w]
  smoke = "smoke" in words
  network = next((w for w in words if w != "smoke"), "resnet32x4")
  c = recipes.cifar100(network, network, smoke=smoke)
  c.seeds = 1
  c.phases.alone.steps = c.phases.distilled.steps = 0
  return c
