"""What the shapes of the weights do not tell, and the hub's `config.json`.

Two networks of the same shapes may compute different things: other heads,
another epsilon, padding on one side. `differences` finds what a file tells of
that and the network does not have; `config` writes it.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from kdjax import models
from kdjax.errors import UserError
from kdjax.models.vit import SIZES

Shapes = Mapping[str, tuple[int, ...]]

# family -> layout -> what its networks have, by our arguments' names
_USUAL: dict[str, dict[str, dict[str, Any]]] = {
  "vit": {"torchvision": {"epsilon": 1e-6}, "timm": {"epsilon": 1e-6}},
  "mobilenet_v2": {
    "torchvision": {"epsilon": 1e-5, "padding": "both"},
    "timm": {"epsilon": 1e-5, "padding": "both"},
  },
  "mobilenet_v3": {
    "torchvision": {"epsilon": 1e-3, "padding": "both"},
    "timm": {"epsilon": 1e-5, "padding": "both"},
  },
}
# timm's weights that TensorFlow trained ("tf_...").
_FROM_TENSORFLOW = {"epsilon": 1e-3, "padding": "same"}

# What transformers takes for a key that its config.json does not have.
_DEFAULTS: dict[str, dict[str, Any]] = {
  "vit": {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "num_attention_heads": 12,
    "qkv_bias": True,
    "image_size": 224,
    "patch_size": 16,
  },
  "resnet": {
    "hidden_act": "relu",
    "layer_type": "bottleneck",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
  },
  "mobilenet_v2": {
    "hidden_act": "relu6",
    "layer_norm_eps": 1e-3,
    "tf_padding": True,
    "output_stride": 32,
  },
}
# A key of config.json -> the argument of ours that sets it.
_ARGUMENTS = {
  "layer_norm_eps": "epsilon",
  "num_attention_heads": "heads",
  "image_size": "image_size",
  "patch_size": "patch",
  "tf_padding": 'padding="same"',
  "depth_multiplier": "width",
}


def differences(
  family: str,
  layout: str,
  shapes: Shapes,
  arguments: Mapping[str, Any],
  told: Mapping[str, Any],
) -> list[str]:
  """How the network of a file computes otherwise than ours, in words.

  Args:
    shapes: our arrays' shapes by path.
    arguments: what our network was built with.
    told: the `config.json` of the file; {} if there is none.
  """
  if layout.startswith("hub"):
    if "model_type" not in told:
      return []  # no file of transformers: nothing is known
    ours = _ARCHITECTURES[family](shapes, _with_defaults(family, arguments))
    theirs = {**_DEFAULTS[family], **told}
    return [
      f"{key} is {theirs[key]} in config.json, {value} in the network"
      + (f" (its argument {_ARGUMENTS[key]})" if key in _ARGUMENTS else "")
      for key, value in ours.items()
      # Which class it is, the tensors' names tell.
      if key in theirs and key != "architectures"
      if not _same(value, theirs[key])
    ]
  usual = _USUAL.get(family, {}).get(layout, {})
  if usual and str(told.get("architecture", "")).startswith("tf_"):
    usual = {name: _FROM_TENSORFLOW[name] for name in usual}
  else:  # The file does not tell: whoever names a value knows it.
    usual = {k: v for k, v in usual.items() if k not in arguments}
  ours = _with_defaults(family, arguments) if usual else {}
  return [
    f"{name} is {value} in weights of {layout}, {ours[name]} in the network "
    f"(its argument {name})"
    for name, value in usual.items()
    if not _same(ours[name], value)
  ]


def config(
  family: str,
  shapes: Shapes,
  arguments: Mapping[str, Any],
  extra: Mapping[str, Any],
) -> dict[str, Any]:
  """The `config.json` with which transformers computes what we compute."""
  labels = [f"LABEL_{n}" for n in range(shapes["classifier/kernel"][-1])]
  ours = _ARCHITECTURES[family](shapes, _with_defaults(family, arguments))
  if changed := [k for k in ours if k in extra and extra[k] != ours[k]]:
    raise UserError(
      f"extra_config has {', '.join(changed)}, which the network decides: "
      "leave them out"
    )
  named = {
    "id2label": dict(enumerate(labels)),
    "label2id": {label: n for n, label in enumerate(labels)},
  }
  return {**named, **extra, **ours}


def _same(a: Any, b: Any) -> bool:
  if isinstance(a, float) and isinstance(b, int | float):
    return math.isclose(a, b)
  if isinstance(a, list) != isinstance(b, list):  # one side of a square
    a, b = (x if isinstance(x, list) else [x, x] for x in (a, b))
  return a == b


def _with_defaults(family: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
  """The arguments, and the constructor's own values for the rest."""
  parameters = inspect.signature(models.MODELS[family]).parameters.values()
  return {p.name: p.default for p in parameters} | dict(arguments)


def _vit(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
  patch, _, channels, width = shapes["patches/kernel"]
  token = "distillation_token" in shapes
  two = "distillation_classifier/kernel" in shapes
  heads = dict(SIZES.values()).get(width)
  if given["size"] in SIZES:
    heads = SIZES[given["size"]][1]
  heads = given["heads"] or heads
  if heads is None:
    raise UserError(
      f"a vit of width {width} may have any number of heads: give `arguments` "
      "heads"
    )
  kind = "DeiT" if token else "ViT"
  return {
    "architectures": [
      f"{kind}ForImageClassification" + ("WithTeacher" if two else "")
    ],
    "model_type": kind.lower(),
    "hidden_size": width,
    "num_hidden_layers": _count(shapes, "blocks"),
    "num_attention_heads": heads,
    "intermediate_size": shapes["blocks/0/mlp/expand/kernel"][1],
    "hidden_act": "gelu",
    "layer_norm_eps": given["epsilon"],
    "image_size": _image_size(
      given["image_size"], patch, shapes["positions"][1] - 1 - token
    ),
    "patch_size": patch,
    "num_channels": channels,
    "qkv_bias": "blocks/0/attention/query/bias" in shapes,
  }


def _image_size(given: Any, patch: int, patches: int) -> int | list[int]:
  height, width = given if isinstance(given, list | tuple) else (given, given)
  if (height // patch) * (width // patch) != patches:
    side = math.isqrt(patches)
    if side**2 != patches:
      raise UserError(
        f"a vit of {patches} patches of {patch} px has no square image: give "
        "`arguments` image_size"
      )
    height = width = side * patch
  return height if height == width else [height, width]


def _resnet(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
  depths = [
    _count(shapes, f"stages/{s}") for s in range(_count(shapes, "stages"))
  ]
  layers = _count(shapes, "stages/0/0/layers")
  _, _, channels, stem = shapes["stem/conv/kernel"]
  return {
    "architectures": ["ResNetForImageClassification"],
    "model_type": "resnet",
    "num_channels": channels,
    "embedding_size": stem,
    "hidden_sizes": [
      shapes[f"stages/{s}/0/layers/{layers - 1}/conv/kernel"][-1]
      for s in range(len(depths))
    ],
    "depths": depths,
    "layer_type": "bottleneck" if layers == 3 else "basic",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
  }


def _mobilenet_v2(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
  return {
    "architectures": ["MobileNetV2ForImageClassification"],
    "model_type": "mobilenet_v2",
    "num_channels": shapes["stem/conv/kernel"][2],
    "depth_multiplier": given["width"],
    "depth_divisible_by": 8,
    "min_depth": 8,
    "expand_ratio": 6.0,
    "output_stride": 32,
    "first_layer_is_expansion": True,
    "finegrained_output": True,
    "hidden_act": "relu6",
    "tf_padding": given["padding"] == "same",
    "layer_norm_eps": given["epsilon"],
  }


# family -> (our shapes, our arguments) -> what decides the hub's computation
_ARCHITECTURES = {"vit": _vit, "resnet": _resnet, "mobilenet_v2": _mobilenet_v2}


def _count(shapes: Shapes, inside: str) -> int:
  start = inside + "/"
  return len(
    {p[len(start) :].split("/")[0] for p in shapes if p.startswith(start)}
  )
