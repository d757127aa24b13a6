"""ImageNet: ResNet-152 (or `:50`, another depth) alone, as a teacher.

    python -m kdjax.train --config=configs/imagenet/teacher.py \\
      --workdir=runs/resnet152
    python -m kdjax.train --workdir=runs/r152_mnv2 \\
      --config=configs/imagenet/resnet152_to_mobilenet.py \\
      --config.teacher.checkpoint=runs/resnet152/seed_0/teacher

The standard recipe, 100 epochs; torchvision's weights, made by a like one, have
top-1 78.31 %. NOT RUN HERE. Data: see resnet34_to_resnet18.py.
"""

from ml_collections import ConfigDict

from kdjax import recipes


def get_config(arg: str = "") -> ConfigDict:
  words = [w for w in arg.split(",") if w]
  depth = next((int(w) for w in words if w.isdigit()), 152)
  recipes.words(arg, "smoke", str(depth))
  network = dict(name="resnet", depth=depth)
  c = recipes.imagenet(network, network, smoke="smoke" in words)
  c.seeds = 1
  c.phases.alone.steps = c.phases.distilled.steps = 0
  return c
