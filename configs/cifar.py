"""CIFAR-100 (or `cifar.py:cifar10`): ResNet-56 teaches ResNet-20.

Hinton et al. 2015 as the CIFAR-100 papers run it (CRD, Tian et al. 2020,
section 4): 240 epochs, batch 64, SGD, rate 0.05 divided by 10 after epochs 150,
180 and 210, T = 4, 0.1 hard + 0.9 soft. That protocol's published accuracies,
last epoch: teacher 72.34, alone 69.06, distilled 70.66. Not yet run here.

Prepare the data once, the only step that needs TensorFlow:

    pip install tensorflow-cpu
    python -c "import tensorflow_datasets as t; t.data_source('cifar100')"

    python -m kdjax.train --config=configs/cifar.py --workdir=runs/cifar100
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
  words = arg.split(",")
  smoke = "smoke" in words  # seconds on a CPU; the tests run every config so
  c = ConfigDict()
  c.seed = 0
  c.seeds = 1

  c.data = ConfigDict()
  c.data.name = "cifar10" if "cifar10" in words else "cifar100"
  c.data.data_dir = ""  # "" = where TFDS keeps data sets
  c.data.train_split = "train"
  c.data.eval_split = "test"
  c.data.labelled = 0  # labels that the student may see; 0 = all
  c.data.image_size = 0  # 0 = as they are stored
  c.data.padding = 4
  c.data.flip = True
  c.data.mixup = 0.0
  c.data.mean = (0.5071, 0.4866, 0.4409)
  c.data.std = (0.2675, 0.2565, 0.2761)
  c.data.batch_size = 16 if smoke else 64
  c.data.eval_batch_size = 16 if smoke else 500

  epoch = 1 if smoke else 50_000 // 64
  sgd = dict(
    name="sgd",
    learning_rate=dict(
      schedule="piecewise_constant_schedule",
      init_value=0.05,
      boundaries_and_scales={
        f"{epoch * n}": 0.1 for n in ((1, 2) if smoke else (150, 180, 210))
      },
    ),
    momentum=0.9,
    nesterov=False,
    weight_decay=5e-4,
    decay_on="all",
    clip=0.0,
  )
  steps = epoch * (3 if smoke else 240)
  phase = dict(steps=steps, microbatches=1, optimizer=sgd)
  c.phases = dict(teacher=phase, alone=phase, distilled=phase)

  depths = (8, 8) if smoke else (56, 20)
  width = 4 if smoke else 16
  c.teacher = ConfigDict()
  c.teacher.model = dict(name="resnet_cifar", depth=depths[0], width=width)
  c.teacher.checkpoint = ""  # "" = train one first
  c.teacher.dtype = "float32"
  c.student = ConfigDict()
  c.student.model = dict(name="resnet_cifar", depth=depths[1], width=width)
  c.student.dtype = "float32"

  # total = alpha * hard + (1 - alpha) * T**2 * soft; numbers or schedules.
  c.alpha = 0.1
  c.hard_weight = None
  c.soft_weight = None
  c.temperature = 4.0
  c.hard = dict(name="cross_entropy", label_smoothing=0.0)
  c.soft = dict(name="kl")
  c.terms = ConfigDict()

  c.save_every = 3 if smoke else 10 * epoch
  c.keep_last = 2
  c.keep_best = 1
  return c
