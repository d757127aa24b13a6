"""PyTorch's own networks, of the sizes in `tiny_networks`, with drawn weights.

A case is (our network, its layout, a function that builds theirs, and the names
of their modules that our taps equal).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import transformers as hub
from tiny_networks import CLASSES, draw


def _torchvision():
  try:
    import torchvision
  except RuntimeError:
    # A build for CUDA cannot load its operators here; its networks need none.
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
      signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
      operators.define(name + signature)
    import torchvision
  except ImportError:
    return None
  return torchvision


torchvision = _torchvision()
try:
  import timm
  import timm.models.deit
  import timm.models.vision_transformer
except (ImportError, RuntimeError):
  timm = None


class Case(NamedTuple):
  network: str
  layout: str
  build: Callable[[], Any]
  taps: Mapping[str, str] = {}
  available: Any = True


def _resnet(layer_type, **sizes):
  return lambda: hub.ResNetForImageClassification(
    hub.ResNetConfig(layer_type=layer_type, num_labels=CLASSES, **sizes)
  )


def _vit(kind, **more):
  """One of the hub's transformers."""
  size = dict(num_hidden_layers=2, hidden_size=12, num_attention_heads=3)
  size |= dict(intermediate_size=20, image_size=[8, 12], patch_size=4)
  config = hub.ViTConfig if kind.startswith("ViT") else hub.DeiTConfig
  network = getattr(hub, kind)
  return lambda: network._from_config(
    config(num_labels=CLASSES, **size, **more), attn_implementation="eager"
  )


def _timm_vit(module, network, **more):
  size = dict(img_size=(8, 12), patch_size=4, embed_dim=12, depth=2)
  size |= dict(num_heads=3, mlp_ratio=20 / 12, num_classes=CLASSES)
  return lambda: getattr(getattr(timm.models, module), network)(**size, **more)


def _mobilenet_v2(**more):
  return lambda: hub.MobileNetV2ForImageClassification(
    hub.MobileNetV2Config(num_labels=CLASSES, depth_multiplier=0.35, **more)
  )


def _tv(name, **more):
  more = {"num_classes": CLASSES, "weights": None, **more}
  return lambda: getattr(torchvision.models, name)(**more)


def _timm(name, **more):
  return lambda: timm.create_model(name, num_classes=CLASSES, **more)


def _stages(template, count, first=0):
  return {f"stage_{n + 1}": template.format(n + first) for n in range(count)}


def _features(*ends):
  return {f"stage_{n}": f"features.{end}" for n, end in enumerate(ends, 1)}


def _hub_blocks(prefix):
  """A module's second output, marked so, is its attention."""
  taps = {"embed": f"{prefix}.embeddings"}
  for i in range(2):
    taps[f"block_{i + 1}"] = f"{prefix}.layers.{i}"
    taps[f"attention_{i + 1}"] = f"{prefix}.layers.{i}.attention:1"
  return taps


_TIMM_BLOCKS = {"block_1": "blocks.0", "block_2": "blocks.1"}

CASES = {
  "hub resnet, basic": Case(
    "resnet_basic",
    "hub",
    _resnet(
      "basic", embedding_size=6, hidden_sizes=[5, 9, 11], depths=[1, 2, 1]
    ),
    {"stem": "resnet.embedder", **_stages("resnet.encoder.stages.{}", 3)},
  ),
  "hub resnet, bottleneck": Case(
    "resnet_bottleneck",
    "hub",
    _resnet(
      "bottleneck", embedding_size=6, hidden_sizes=[12, 20], depths=[2, 1]
    ),
    {"stem": "resnet.embedder", **_stages("resnet.encoder.stages.{}", 2)},
  ),
  "torchvision resnet": Case(
    "resnet_18",
    "torchvision",
    _tv("resnet18"),
    {"stem": "maxpool", **_stages("layer{}", 4, 1)},
    torchvision,
  ),
  "timm resnet": Case(
    "resnet_18",
    "timm",
    _timm("resnet18"),
    {"stem": "maxpool", **_stages("layer{}", 4, 1)},
    timm,
  ),
  "timm resnet, small": Case(
    "resnet_timm",
    "timm",
    lambda: timm.models.resnet.ResNet(
      timm.models.resnet.BasicBlock,
      [1, 2, 1, 1],
      channels=(5, 9, 11, 4),
      num_classes=CLASSES,
    ),
    {"stem": "maxpool", **_stages("layer{}", 4, 1)},
    timm,
  ),
  "torchvision shufflenet": Case(
    "shufflenet_v2",
    "torchvision",
    _tv("shufflenet_v2_x0_5"),
    {"stem": "maxpool", **_stages("stage{}", 3, 2)},
    torchvision,
  ),
  "torchvision mobilenet_v2": Case(
    "mobilenet_v2",
    "torchvision",
    _tv("mobilenet_v2", width_mult=0.35),
    {"stem": "features.0", **_features(1, 3, 6, 13, 17)},
    torchvision,
  ),
  "timm mobilenet_v2": Case(
    "mobilenet_v2",
    "timm",
    _timm("mobilenetv2_035"),
    {"stem": "bn1", "stage_1": "blocks.0", "stage_2": "blocks.1"},
    timm,
  ),
  "hub mobilenet_v2": Case(
    "mobilenet_v2",
    "hub",
    _mobilenet_v2(tf_padding=False, layer_norm_eps=1e-5),
    {"stage_1": "mobilenet_v2.conv_stem", "stage_2": "mobilenet_v2.layer.1"},
  ),
  "hub mobilenet_v2, of TensorFlow": Case(
    "mobilenet_v2_tensorflow",
    "hub",
    _mobilenet_v2(),
    {"stage_1": "mobilenet_v2.conv_stem", "stage_2": "mobilenet_v2.layer.1"},
  ),
  "torchvision mobilenet_v3": Case(
    "mobilenet_v3",
    "torchvision",
    _tv("mobilenet_v3_small"),
    {"stem": "features.0", **_features(1, 3, 8, 11)},
    torchvision,
  ),
  "timm mobilenet_v3, small": Case(
    "mobilenet_v3",
    "timm",
    _timm("mobilenetv3_small_100", bn_eps=1e-3),
    {"stage_1": "blocks.0", "stage_2": "blocks.1"},
    timm,
  ),
  "timm mobilenet_v3, large": Case(
    "mobilenet_v3_large_timm",
    "timm",
    _timm("mobilenetv3_large_100"),
    {"stage_1": "blocks.0", "stage_2": "blocks.1"},
    timm,
  ),
  "hub vit": Case(
    "vit",
    "hub",
    _vit("ViTForImageClassification", layer_norm_eps=1e-3),
    _hub_blocks("vit"),
  ),
  "hub deit": Case(
    "deit",
    "hub",
    _vit("DeiTForImageClassificationWithTeacher"),
    _hub_blocks("deit")
    | {
      "class_logits": "cls_classifier",
      "distillation_logits": "distillation_classifier",
    },
  ),
  "hub deit, one head": Case(
    "deit_one_head",
    "hub",
    _vit("DeiTForImageClassification"),
    _hub_blocks("deit"),
  ),
  "timm vit": Case(
    "vit_timm",
    "timm",
    _timm_vit("vision_transformer", "VisionTransformer"),
    _TIMM_BLOCKS,
    timm,
  ),
  "timm deit": Case(
    "deit_timm",
    "timm",
    _timm_vit("deit", "VisionTransformerDistilled"),
    _TIMM_BLOCKS | {"class_logits": "head", "distillation_logits": "head_dist"},
    timm,
  ),
  "torchvision vit": Case(
    "vit_square",
    "torchvision",
    lambda: torchvision.models.VisionTransformer(
      8, 4, 2, 3, 12, 20, num_classes=CLASSES
    ),
    {f"block_{i + 1}": f"encoder.layers.encoder_layer_{i}" for i in range(2)},
    torchvision,
  ),
}


class Run(NamedTuple):
  """What a network has and gives: NHWC, tensors by their names."""

  module: Any
  tensors: dict[str, Any]
  logits: Any
  taps: dict[str, Any]


def run(case: Case, image) -> Run:
  """The network of a case with drawn weights, on an image `[B, H, W, C]`."""
  module = case.build().eval()
  shapes = {k: tuple(v.shape) for k, v in module.state_dict().items()}
  tensors = draw(shapes)
  module.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()})
  seen = {}

  def keep(tap, part):
    def hook(module, inputs, output):
      value = output if torch.is_tensor(output) else output[part]
      value = value.numpy()
      maps = value.ndim == 4 and "attention" not in tap
      seen[tap] = value.transpose(0, 2, 3, 1) if maps else value

    return hook

  for tap, name in case.taps.items():
    name, _, part = name.partition(":")
    module.get_submodule(name).register_forward_hook(keep(tap, int(part or 0)))
  with torch.no_grad():
    output = module(torch.tensor(image.transpose(0, 3, 1, 2)))
  logits = output if torch.is_tensor(output) else output.logits
  return Run(module, tensors, logits.numpy(), seen)
