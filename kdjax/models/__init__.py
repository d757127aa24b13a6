"""The networks that ship. Each is a function of its sizes and `rngs`.

`adapters.from_nnx` makes a `Model` of one:

    student = from_nnx(lambda rngs: models.resnet_cifar(
      8, num_classes=10, rngs=rngs))
"""

from kdjax.models import vit as vit_module
from kdjax.models.mobilenet import MobileNet
from kdjax.models.mobilenet_v1 import MobileNetV1, mobilenet_v1
from kdjax.models.mobilenet_v2 import mobilenet_v2, mobilenet_v2_cifar
from kdjax.models.mobilenet_v3 import mobilenet_v3
from kdjax.models.resnet import ResNet, resnet, resnet_cifar
from kdjax.models.shufflenet import (
  ShuffleNet,
  shufflenet_v1_cifar,
  shufflenet_v2,
  shufflenet_v2_cifar,
)
from kdjax.models.vgg import VGG, vgg_cifar
from kdjax.models.vit import ViT, vit
from kdjax.models.wrn import WideResNet, wrn

# By the name that a config gives.
MODELS = {
  # 32 px
  "mobilenet_v2_cifar": mobilenet_v2_cifar,
  "resnet_cifar": resnet_cifar,
  "shufflenet_v1_cifar": shufflenet_v1_cifar,
  "shufflenet_v2_cifar": shufflenet_v2_cifar,
  "vgg_cifar": vgg_cifar,
  "wrn": wrn,
  # 224 px
  "mobilenet_v1": mobilenet_v1,
  "mobilenet_v2": mobilenet_v2,
  "mobilenet_v3": mobilenet_v3,
  "resnet": resnet,
  "shufflenet_v2": shufflenet_v2,
  "vit": vit,
}

# How they lie on a mesh, by the same name; the others as
# `parallel.shardings` finds by itself.
PARTITIONS = {"vit": vit_module.PARTITION}

__all__ = [
  "MODELS",
  "PARTITIONS",
  "VGG",
  "MobileNet",
  "MobileNetV1",
  "ResNet",
  "ShuffleNet",
  "ViT",
  "WideResNet",
  "mobilenet_v1",
  "mobilenet_v2",
  "mobilenet_v2_cifar",
  "mobilenet_v3",
  "resnet",
  "resnet_cifar",
  "shufflenet_v1_cifar",
  "shufflenet_v2",
  "shufflenet_v2_cifar",
  "vgg_cifar",
  "vit",
  "wrn",
]
