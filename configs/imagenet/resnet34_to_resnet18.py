"""ImageNet: ResNet-34 teaches ResNet-18, the papers' first row.

    python -m kdjax.train --workdir=runs/r34_r18 \\
      --config=configs/imagenet/resnet34_to_resnet18.py \\
      --config.teacher.checkpoint=resnet34.safetensors

Published, top-1 in %: teacher 73.31, student alone 69.76, KD between 70.66 and
71.37 (torchdistill's re-run of this setting: T = 1, 0.5 and 0.5). Selection:
the last epoch here; torchdistill's is the best. NOT RUN HERE. The teacher is
torchvision's, as a safetensors file or a name on the model hub (timm/
resnet34.tv_in1k); without one, it is trained first.

The data is prepared once, the only step that needs TensorFlow: put
ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into
~/tensorflow_datasets/downloads/manual, then

    pip install tensorflow-cpu
    python -c "import tensorflow_datasets as t; t.data_source('imagenet2012')"
"""

from ml_collections import ConfigDict

from kdjax import recipes


def get_config(arg: str = "") -> ConfigDict:
  return recipes.imagenet(
    dict(name="resnet", depth=34),
    dict(name="resnet", depth=18),
    smoke="smoke" in recipes.words(arg, "smoke"),
  )
