"""ImageNet: ResNet-152 teaches MobileNetV2, patiently (or `:v3`, MobileNetV3).

    python -m kdjax.train --workdir=runs/r152_mnv2 \\
      --config=configs/imagenet/resnet152_to_mobilenet.py \\
      --config.teacher.checkpoint=timm/resnet152.tv_in1k

300 epochs of the KL alone, on mixup, with the crop and the mix that the teacher
sees too; the student alone has the 100 epochs of the standard recipe. No paper
reports this pair by this recipe; torchvision's own weights have, top-1 in %:
ResNet-152 78.31, MobileNetV2 71.88, MobileNetV3-large 74.04. Selection: the
last epoch. NOT RUN HERE. Data: see resnet34_to_resnet18.py; `teacher.py` trains
the teacher, where there are no weights.
"""

from ml_collections import ConfigDict

from kdjax import recipes

EPOCH = 1_281_167 // 256


def get_config(arg: str = "") -> ConfigDict:
  words = recipes.words(arg, "smoke", "v3")
  smoke = "smoke" in words
  v3 = dict(name="mobilenet_v3", size="large")
  c = recipes.imagenet(
    dict(name="resnet", depth=152),
    v3 if "v3" in words else dict(name="mobilenet_v2"),
    smoke=smoke,
  )
  return recipes.patient(
    c, epochs=3 if smoke else 300, epoch=1 if smoke else EPOCH
  )
