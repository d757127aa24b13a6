"""ImageNet at 224 px: ResNet-50 teaches ResNet-18, in bfloat16.

100 epochs, batch 256, SGD, rate 0.1 divided by 10 every 30 epochs, weight decay
1e-4, T falling from 4 to 1 along a cosine. Not yet run here; no accuracy is
claimed. Without a teacher checkpoint it trains the ResNet-50 first.

Prepare the data once, the only step that needs TensorFlow: put the two archives
ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into
~/tensorflow_datasets/downloads/manual, then

    pip install tensorflow-cpu
    python -c "import tensorflow_datasets as t; t.data_source('imagenet2012')"

    python -m kdjax.train --config=configs/imagenet.py --workdir=runs/imagenet
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
  smoke = arg == "smoke"  # seconds on a CPU; the tests run every config so
  c = ConfigDict()
  c.seed = 0
  c.seeds = 1

  c.data = ConfigDict()
  c.data.name = "imagenet2012"
  c.data.data_dir = ""  # "" = where TFDS keeps data sets
  c.data.train_split = "train"
  c.data.eval_split = "validation"
  c.data.labelled = 0  # labels that the student may see; 0 = all
  c.data.image_size = 32 if smoke else 224
  c.data.padding = 0
  c.data.flip = True
  c.data.mixup = 0.2
  c.data.mean = (0.485, 0.456, 0.406)
  c.data.std = (0.229, 0.224, 0.225)
  c.data.batch_size = 16 if smoke else 256
  c.data.eval_batch_size = 16 if smoke else 256

  epoch = 1 if smoke else 1_281_167 // 256
  sgd = dict(
    name="sgd",
    learning_rate=dict(
      schedule="piecewise_constant_schedule",
      init_value=0.1,
      boundaries_and_scales={
        f"{epoch * n}": 0.1 for n in ((1, 2) if smoke else (30, 60, 90))
      },
    ),
    momentum=0.9,
    nesterov=False,
    weight_decay=1e-4,
    decay_on="kernels",
    clip=0.0,
  )
  steps = epoch * (3 if smoke else 100)
  phase = dict(steps=steps, microbatches=2 if smoke else 1, optimizer=sgd)
  c.phases = dict(teacher=phase, alone=phase, distilled=phase)

  width = 4 if smoke else 64
  c.teacher = ConfigDict()
  c.teacher.model = dict(name="resnet", depth=18 if smoke else 50, width=width)
  c.teacher.checkpoint = ""  # "" = train one first
  c.teacher.dtype = "bfloat16"
  c.student = ConfigDict()
  c.student.model = dict(name="resnet", depth=18, width=width)
  c.student.dtype = "bfloat16"

  # total = alpha * hard + (1 - alpha) * T**2 * soft; numbers or schedules.
  c.alpha = 0.1
  c.hard_weight = None
  c.soft_weight = None
  c.temperature = dict(
    schedule="cosine_decay_schedule",
    init_value=4.0,
    decay_steps=steps,
    alpha=0.25,
  )
  c.hard = dict(name="cross_entropy", label_smoothing=0.0)
  c.soft = dict(name="kl")
  c.terms = ConfigDict()

  c.save_every = 3 if smoke else 5 * epoch
  c.keep_last = 2
  c.keep_best = 1
  return c
