"""The names of the layouts that are read and written, one table each.

torchvision   its `state_dict()`
timm          its `state_dict()`; a ResNet's is torchvision's
hub           the file of the model hub's `...ForImageClassification`

Checked against torchvision 0.28, timm 1.0 and transformers 5. What it calls
the layers in memory is another layout, `hub_memory`, where it differs.
"""

import re
from collections.abc import Collection, Mapping
from itertools import accumulate
from typing import Any

from kdjax.pretrained.names import Table, table

_RESNET_TORCHVISION = table("""
  conv    conv1                         stem/conv
  norm    bn1                           stem/norm
  conv    layer{s+1}.{b}.conv{c+1}      stages/{s}/{b}/layers/{c}/conv
  norm    layer{s+1}.{b}.bn{c+1}        stages/{s}/{b}/layers/{c}/norm
  conv    layer{s+1}.{b}.downsample.0   stages/{s}/{b}/shortcut/conv
  norm    layer{s+1}.{b}.downsample.1   stages/{s}/{b}/shortcut/norm
  linear  fc                            classifier
""")

_RESNET_HUB = table("""
  conv    resnet.embedder.embedder.convolution    stem/conv
  norm    resnet.embedder.embedder.normalization  stem/norm
  conv    resnet.encoder.stages.{s}.layers.{b}.layer.{c}.convolution    stages/{s}/{b}/layers/{c}/conv
  norm    resnet.encoder.stages.{s}.layers.{b}.layer.{c}.normalization  stages/{s}/{b}/layers/{c}/norm
  conv    resnet.encoder.stages.{s}.layers.{b}.shortcut.convolution     stages/{s}/{b}/shortcut/conv
  norm    resnet.encoder.stages.{s}.layers.{b}.shortcut.normalization   stages/{s}/{b}/shortcut/norm
  linear  classifier.1                            classifier
""")  # noqa: E501

_SHUFFLENET_V2_TORCHVISION = table("""
  conv    conv1.0                     stem/conv
  norm    conv1.1                     stem/norm
  conv    stage{s+2}.{b}.branch1.0    stages/{s}/{b}/shortcut/0/conv
  norm    stage{s+2}.{b}.branch1.1    stages/{s}/{b}/shortcut/0/norm
  conv    stage{s+2}.{b}.branch1.2    stages/{s}/{b}/shortcut/1/conv
  norm    stage{s+2}.{b}.branch1.3    stages/{s}/{b}/shortcut/1/norm
  conv    stage{s+2}.{b}.branch2.0    stages/{s}/{b}/reduce/conv
  norm    stage{s+2}.{b}.branch2.1    stages/{s}/{b}/reduce/norm
  conv    stage{s+2}.{b}.branch2.3    stages/{s}/{b}/depthwise/conv
  norm    stage{s+2}.{b}.branch2.4    stages/{s}/{b}/depthwise/norm
  conv    stage{s+2}.{b}.branch2.5    stages/{s}/{b}/expand/conv
  norm    stage{s+2}.{b}.branch2.6    stages/{s}/{b}/expand/norm
  conv    conv5.0                     head/conv
  norm    conv5.1                     head/norm
  linear  fc                          classifier
""")

# Blocks that share their number of channels in the paper: timm counts within
# these rows, kdjax within the blocks of one resolution. By number of blocks.
_ROWS = {
  17: (1, 2, 3, 4, 3, 3, 1),  # MobileNetV2
  15: (1, 2, 3, 4, 2, 3),  # MobileNetV3-large
  11: (1, 2, 3, 2, 3),  # MobileNetV3-small
}


def _bottleneck(
  found: Mapping[str, str], paths: Collection[str]
) -> dict[str, Any]:
  """Where a bottleneck is in the whole network, and which layers it has.

  n: number of the block; g, k: its row in timm, and its number in the row;
  d: number of the depthwise layer in the block; p: that of the last;
  blocks, rows: how many there are.
  """
  stages = (re.match(r"stages/(\d+)/(\d+)/", path) for path in paths)
  blocks = sorted({(int(m[1]), int(m[2])) for m in stages if m})
  rows = _ROWS.get(len(blocks), (len(blocks),))
  numbers: dict[str, Any] = {"blocks": len(blocks), "rows": len(rows)}
  if "s" in found:
    inside = f"stages/{found['s']}/{found['b']}"
    n = blocks.index((int(found["s"]), int(found["b"])))
    starts = [0, *accumulate(rows)]
    g = max(i for i, start in enumerate(starts) if start <= n)
    d = int(f"{inside}/expand/conv/kernel" in paths)
    squeezed = f"{inside}/excite/squeeze/kernel" in paths
    numbers |= {"n": n, "g": g, "k": n - starts[g], "d": d}
    numbers |= {"p": d + 1 + squeezed}
  return numbers


_MOBILENET_V2_TORCHVISION = table(
  """
  conv    features.0.0              stem/conv
  norm    features.0.1              stem/norm
  conv    features.1.conv.0.0       stages/0/0/depthwise/conv
  norm    features.1.conv.0.1       stages/0/0/depthwise/norm
  conv    features.1.conv.1         stages/0/0/project/conv
  norm    features.1.conv.2         stages/0/0/project/norm
  conv    features.{n+1}.conv.0.0   stages/{s}/{b}/expand/conv
  norm    features.{n+1}.conv.0.1   stages/{s}/{b}/expand/norm
  conv    features.{n+1}.conv.1.0   stages/{s}/{b}/depthwise/conv
  norm    features.{n+1}.conv.1.1   stages/{s}/{b}/depthwise/norm
  conv    features.{n+1}.conv.2     stages/{s}/{b}/project/conv
  norm    features.{n+1}.conv.3     stages/{s}/{b}/project/norm
  conv    features.{blocks+1}.0     head/conv
  norm    features.{blocks+1}.1     head/norm
  linear  classifier.1              classifier
  """,
  _bottleneck,
)

_MOBILENET_V2_TIMM = table(
  """
  conv    conv_stem                   stem/conv
  norm    bn1                         stem/norm
  conv    blocks.0.0.conv_dw          stages/0/0/depthwise/conv
  norm    blocks.0.0.bn1              stages/0/0/depthwise/norm
  conv    blocks.0.0.conv_pw          stages/0/0/project/conv
  norm    blocks.0.0.bn2              stages/0/0/project/norm
  conv    blocks.{g}.{k}.conv_pw      stages/{s}/{b}/expand/conv
  norm    blocks.{g}.{k}.bn1          stages/{s}/{b}/expand/norm
  conv    blocks.{g}.{k}.conv_dw      stages/{s}/{b}/depthwise/conv
  norm    blocks.{g}.{k}.bn2          stages/{s}/{b}/depthwise/norm
  conv    blocks.{g}.{k}.conv_pwl     stages/{s}/{b}/project/conv
  norm    blocks.{g}.{k}.bn3          stages/{s}/{b}/project/norm
  conv    conv_head                   head/conv
  norm    bn2                         head/norm
  linear  classifier                  classifier
  """,
  _bottleneck,
)

_MOBILENET_V2_HUB = table(
  """
  conv    mobilenet_v2.conv_stem.first_conv.convolution        stem/conv
  norm    mobilenet_v2.conv_stem.first_conv.normalization      stem/norm
  conv    mobilenet_v2.conv_stem.conv_3x3.convolution          stages/0/0/depthwise/conv
  norm    mobilenet_v2.conv_stem.conv_3x3.normalization        stages/0/0/depthwise/norm
  conv    mobilenet_v2.conv_stem.reduce_1x1.convolution        stages/0/0/project/conv
  norm    mobilenet_v2.conv_stem.reduce_1x1.normalization      stages/0/0/project/norm
  conv    mobilenet_v2.layer.{n-1}.expand_1x1.convolution      stages/{s}/{b}/expand/conv
  norm    mobilenet_v2.layer.{n-1}.expand_1x1.normalization    stages/{s}/{b}/expand/norm
  conv    mobilenet_v2.layer.{n-1}.conv_3x3.convolution        stages/{s}/{b}/depthwise/conv
  norm    mobilenet_v2.layer.{n-1}.conv_3x3.normalization      stages/{s}/{b}/depthwise/norm
  conv    mobilenet_v2.layer.{n-1}.reduce_1x1.convolution      stages/{s}/{b}/project/conv
  norm    mobilenet_v2.layer.{n-1}.reduce_1x1.normalization    stages/{s}/{b}/project/norm
  conv    mobilenet_v2.conv_1x1.convolution                    head/conv
  norm    mobilenet_v2.conv_1x1.normalization                  head/norm
  linear  classifier                                           classifier
  """,  # noqa: E501
  _bottleneck,
)

_MOBILENET_V3_TORCHVISION = table(
  """
  conv    features.0.0                   stem/conv
  norm    features.0.1                   stem/norm
  conv    features.{n+1}.block.0.0       stages/{s}/{b}/expand/conv
  norm    features.{n+1}.block.0.1       stages/{s}/{b}/expand/norm
  conv    features.{n+1}.block.{d}.0     stages/{s}/{b}/depthwise/conv
  norm    features.{n+1}.block.{d}.1     stages/{s}/{b}/depthwise/norm
  conv    features.{n+1}.block.{d+1}.fc1 stages/{s}/{b}/excite/squeeze
  conv    features.{n+1}.block.{d+1}.fc2 stages/{s}/{b}/excite/excite
  conv    features.{n+1}.block.{p}.0     stages/{s}/{b}/project/conv
  norm    features.{n+1}.block.{p}.1     stages/{s}/{b}/project/norm
  conv    features.{blocks+1}.0          head/conv
  norm    features.{blocks+1}.1          head/norm
  linear  classifier.0                   hidden
  linear  classifier.3                   classifier
  """,
  _bottleneck,
)

_MOBILENET_V3_TIMM = table(
  """
  conv      conv_stem                      stem/conv
  norm      bn1                            stem/norm
  conv      blocks.0.0.conv_pw             stages/0/0/project/conv
  conv      blocks.{g}.{k}.conv_pw         stages/{s}/{b}/expand/conv
  norm      blocks.{g}.{k}.bn1             stages/{s}/{b}/expand/norm
  conv      blocks.{g}.{k}.conv_dw         stages/{s}/{b}/depthwise/conv
  norm      blocks.{g}.{k}.bn{d+1}         stages/{s}/{b}/depthwise/norm
  conv      blocks.{g}.{k}.se.conv_reduce  stages/{s}/{b}/excite/squeeze
  conv      blocks.{g}.{k}.se.conv_expand  stages/{s}/{b}/excite/excite
  conv      blocks.{g}.{k}.conv_pwl        stages/{s}/{b}/project/conv
  norm      blocks.{g}.{k}.bn{d+2}         stages/{s}/{b}/project/norm
  conv      blocks.{rows}.0.conv           head/conv
  norm      blocks.{rows}.0.bn1            head/norm
  pointwise conv_head                      hidden
  linear    classifier                     classifier
  """,
  _bottleneck,
)


def _tokens(found: Mapping[str, str], paths: Collection[str]) -> dict[str, Any]:
  """The hub's name of a network with these tokens, and of its classifier."""
  two = "distillation_classifier/kernel" in paths
  return {
    "vit": "deit" if "distillation_token" in paths else "vit",
    "classifier": "cls_classifier" if two else "classifier",
  }


_VIT_HUB = table(
  """
  array   {vit}.embeddings.cls_token                                class_token
  array   {vit}.embeddings.distillation_token                       distillation_token
  array   {vit}.embeddings.position_embeddings                      positions
  conv    {vit}.embeddings.patch_embeddings.projection              patches
  norm    {vit}.encoder.layer.{i}.layernorm_before                  blocks/{i}/attention_norm
  linear  {vit}.encoder.layer.{i}.attention.attention.query         blocks/{i}/attention/query
  linear  {vit}.encoder.layer.{i}.attention.attention.key           blocks/{i}/attention/key
  linear  {vit}.encoder.layer.{i}.attention.attention.value         blocks/{i}/attention/value
  linear  {vit}.encoder.layer.{i}.attention.output.dense            blocks/{i}/attention/output
  norm    {vit}.encoder.layer.{i}.layernorm_after                   blocks/{i}/mlp_norm
  linear  {vit}.encoder.layer.{i}.intermediate.dense                blocks/{i}/mlp/expand
  linear  {vit}.encoder.layer.{i}.output.dense                      blocks/{i}/mlp/contract
  norm    {vit}.layernorm                                           norm
  linear  {classifier}                                              classifier
  linear  distillation_classifier                                   distillation_classifier
  """,  # noqa: E501
  _tokens,
)

_VIT_HUB_MEMORY = table(
  """
  array   {vit}.embeddings.cls_token                       class_token
  array   {vit}.embeddings.distillation_token              distillation_token
  array   {vit}.embeddings.position_embeddings             positions
  conv    {vit}.embeddings.patch_embeddings.projection     patches
  norm    {vit}.layers.{i}.layernorm_before                blocks/{i}/attention_norm
  linear  {vit}.layers.{i}.attention.q_proj                blocks/{i}/attention/query
  linear  {vit}.layers.{i}.attention.k_proj                blocks/{i}/attention/key
  linear  {vit}.layers.{i}.attention.v_proj                blocks/{i}/attention/value
  linear  {vit}.layers.{i}.attention.o_proj                blocks/{i}/attention/output
  norm    {vit}.layers.{i}.layernorm_after                 blocks/{i}/mlp_norm
  linear  {vit}.layers.{i}.mlp.fc1                         blocks/{i}/mlp/expand
  linear  {vit}.layers.{i}.mlp.fc2                         blocks/{i}/mlp/contract
  norm    {vit}.layernorm                                  norm
  linear  {classifier}                                     classifier
  linear  distillation_classifier                          distillation_classifier
  """,  # noqa: E501
  _tokens,
)

_VIT_TIMM = table("""
  array   cls_token                 class_token
  array   dist_token                distillation_token
  array   pos_embed                 positions
  conv    patch_embed.proj          patches
  norm    blocks.{i}.norm1          blocks/{i}/attention_norm
  query   blocks.{i}.attn.qkv.      blocks/{i}/attention/query
  key     blocks.{i}.attn.qkv.      blocks/{i}/attention/key
  value   blocks.{i}.attn.qkv.      blocks/{i}/attention/value
  linear  blocks.{i}.attn.proj      blocks/{i}/attention/output
  norm    blocks.{i}.norm2          blocks/{i}/mlp_norm
  linear  blocks.{i}.mlp.fc1        blocks/{i}/mlp/expand
  linear  blocks.{i}.mlp.fc2        blocks/{i}/mlp/contract
  norm    norm                      norm
  linear  head                      classifier
  linear  head_dist                 distillation_classifier
""")

# torchvision has no distillation token.
_VIT_TORCHVISION = table("""
  array   class_token                                                  class_token
  array   encoder.pos_embedding                                        positions
  conv    conv_proj                                                    patches
  norm    encoder.layers.encoder_layer_{i}.ln_1                        blocks/{i}/attention_norm
  query   encoder.layers.encoder_layer_{i}.self_attention.in_proj_     blocks/{i}/attention/query
  key     encoder.layers.encoder_layer_{i}.self_attention.in_proj_     blocks/{i}/attention/key
  value   encoder.layers.encoder_layer_{i}.self_attention.in_proj_     blocks/{i}/attention/value
  linear  encoder.layers.encoder_layer_{i}.self_attention.out_proj     blocks/{i}/attention/output
  norm    encoder.layers.encoder_layer_{i}.ln_2                        blocks/{i}/mlp_norm
  linear  encoder.layers.encoder_layer_{i}.mlp.0                       blocks/{i}/mlp/expand
  linear  encoder.layers.encoder_layer_{i}.mlp.3                       blocks/{i}/mlp/contract
  norm    encoder.ln                                                   norm
  linear  heads.head                                                   classifier
""")  # noqa: E501

# family, the name in `models.MODELS` -> layout -> its table
TABLES: dict[str, dict[str, Table]] = {
  "resnet": {
    "torchvision": _RESNET_TORCHVISION,
    "timm": _RESNET_TORCHVISION,
    "hub": _RESNET_HUB,
  },
  "mobilenet_v2": {
    "torchvision": _MOBILENET_V2_TORCHVISION,
    "timm": _MOBILENET_V2_TIMM,
    "hub": _MOBILENET_V2_HUB,
  },
  "mobilenet_v3": {
    "torchvision": _MOBILENET_V3_TORCHVISION,
    "timm": _MOBILENET_V3_TIMM,
  },
  "shufflenet_v2": {"torchvision": _SHUFFLENET_V2_TORCHVISION},
  "vit": {
    "torchvision": _VIT_TORCHVISION,
    "timm": _VIT_TIMM,
    "hub": _VIT_HUB,
    "hub_memory": _VIT_HUB_MEMORY,
  },
}
