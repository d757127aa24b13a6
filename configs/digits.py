"""Digits: a ResNet-14 teaches a ResNet-8 a sixteenth its size, on a CPU."""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
  smoke = arg == "smoke"  # seconds on a CPU; the tests run every config so
  c = ConfigDict()
  c.seed = 0
  c.seeds = 1

  c.data = ConfigDict()
  c.data.name = "digits"
  c.data.data_dir = ""  # "" = the usual place for data sets
  c.data.train_split = "train"
  c.data.eval_split = "test"
  c.data.labelled = 100  # labels that the student may see; 0 = all
  c.data.image_size = 0  # 0 = as it is stored
  c.data.padding = 1
  c.data.flip = False
  c.data.mixup = 0.0
  c.data.mean = (0.3,)
  c.data.std = (0.35,)
  c.data.batch_size = 64
  c.data.eval_batch_size = 300

  def sgd(rate: float, steps: int) -> dict:
    return dict(
      name="sgd",
      learning_rate=dict(
        schedule="warmup_cosine_decay_schedule",
        init_value=0.0,
        peak_value=rate,
        warmup_steps=max(steps // 20, 1),
        decay_steps=steps,
      ),
      momentum=0.9,
      nesterov=True,
      weight_decay=5e-4,
      decay_on="kernels",
      clip=0.0,
    )

  def phase(rate: float, steps: int) -> dict:
    steps = 3 if smoke else steps
    return dict(steps=steps, microbatches=1, optimizer=sgd(rate, steps))

  c.teacher = ConfigDict()
  c.teacher.model = dict(name="resnet_cifar", depth=14, width=16)
  c.teacher.checkpoint = ""  # "" = train one first
  c.teacher.dtype = "float32"
  c.student = ConfigDict()
  c.student.model = dict(name="resnet_cifar", depth=8, width=4)
  c.student.dtype = "float32"

  c.phases = ConfigDict()
  c.phases.teacher = phase(0.1, 600)
  c.phases.alone = phase(0.1, 600)
  c.phases.distilled = phase(0.1, 600)

  # total = alpha * hard + (1 - alpha) * T**2 * soft; numbers or schedules.
  c.alpha = 0.1
  c.hard_weight = None
  c.soft_weight = None
  c.temperature = 4.0
  c.hard = dict(name="cross_entropy", label_smoothing=0.0)
  c.soft = dict(name="kl")
  c.terms = ConfigDict()

  c.save_every = 3 if smoke else 200
  c.keep_last = 2
  c.keep_best = 1
  return c
