"""The networks that ship. Each is a function of its sizes and `rngs`.

`adapters.from_nnx` makes a `Model` of one:

    student = from_nnx(lambda rngs: models.resnet_cifar(
      8, num_classes=10, rngs=rngs))
"""

from kdjax.models.resnet import ResNet, resnet, resnet_cifar

# By the name that a config gives.
MODELS = {"resnet_cifar": resnet_cifar, "resnet": resnet}

__all__ = ["MODELS", "ResNet", "resnet", "resnet_cifar"]
