"""ImageNet: ResNet-50 teaches MobileNetV1, the papers' second row.

    python -m kdjax.train --workdir=runs/r50_mnv1 \\
      --config=configs/imagenet/resnet50_to_mobilenetv1.py \\
      --config.teacher.checkpoint=timm/resnet50.tv_in1k

Published, top-1 in %: teacher 76.16, student alone 68.87, KD 70.50, DKD 72.05,
DIST 73.24 (best epoch). Selection here: the last epoch. NOT RUN HERE. Data and
teacher: see resnet34_to_resnet18.py.
"""

from ml_collections import ConfigDict

from kdjax import recipes


def get_config(arg: str = "") -> ConfigDict:
  return recipes.imagenet(
    dict(name="resnet", depth=50),
    dict(name="mobilenet_v1"),
    smoke="smoke" in recipes.words(arg, "smoke"),
  )
