"""Digits: a ResNet-14 teaches a ResNet-8 of 3 % of its size, on a CPU.

    python -m kdjax.train --config=configs/digits.py --workdir=runs/digits

The task: few labels, many images. The teacher learned from all 1,200 labels of
the train split. The student may see 100 of them, ten a digit. Alone it trains
on those 100 images; distilled it also gets the teacher's outputs on all 1,200.
Splits are ranges of the file's own order, so that the 297 test digits come, as
far as can be told, from other writers than the train split's.

Tuned on the validation split with `benchmarks/tune_digits.py`, nine settings a
side, seeds 100 and 101: for the student alone the learning rate (0.03, 0.1,
0.3) and the weight decay (5e-4, 5e-3, 2e-2), for the distilled one the learning
rate (the same) and the temperature (1, 2, 4). Nothing else, nothing on the test
split. The teacher was not tuned.
"""

from ml_collections import ConfigDict

from kdjax import recipes


def get_config(arg: str = "") -> ConfigDict:
  # Seconds on a CPU; the tests run every config so.
  smoke = "smoke" in recipes.words(arg, "smoke")
  c = ConfigDict()
  c.task = "image"
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
  c.data.mean = (0.3,)
  c.data.std = (0.35,)
  c.data.batch_size = 64
  c.data.eval_batch_size = 300

  def sgd(rate: float, decay: float, steps: int) -> dict:
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
      weight_decay=decay,
      decay_on="kernels",
      clip=0.0,
    )

  def phase(rate: float, decay: float) -> dict:
    steps = 3 if smoke else 600
    return dict(
      steps=steps,
      microbatches=1,
      mixup=0.0,  # of the batch, the same for both networks
      optimizer=sgd(rate, decay, steps),
    )

  c.teacher = ConfigDict()
  c.teacher.model = dict(
    name="resnet_cifar", depth=8 if smoke else 14, width=8 if smoke else 16
  )
  c.teacher.num_classes = 0  # 0 = the data's
  c.teacher.checkpoint = ""  # "" = train one first; a run, or weights
  c.teacher.drop_head = False
  c.teacher.dtype = "float32"
  c.teacher.partition = ()  # () = as the network family does
  c.student = ConfigDict()
  c.student.model = dict(name="resnet_cifar", depth=8, width=4)
  c.student.num_classes = 0
  c.student.checkpoint = ""  # "" = from scratch
  c.student.drop_head = False
  c.student.classifier = "own"  # or the "teacher"'s: SimKD
  c.student.dtype = "float32"
  c.student.partition = ()

  c.phases = ConfigDict()  # one of 0 steps is left out
  c.phases.teacher = phase(0.1, 5e-4)
  c.phases.alone = phase(0.1, 2e-2)
  c.phases.distilled = phase(0.03, 5e-4)

  # total = alpha * hard + (1 - alpha) * T**2 * soft; numbers or schedules.
  c.alpha = 0.1
  c.hard_weight = None
  c.soft_weight = None
  # Tuned at a constant T; an end_value of its own makes it move.
  c.temperature = dict(
    schedule="linear_schedule",
    init_value=2.0,
    end_value=2.0,
    transition_steps=c.phases.distilled.steps,
  )
  c.hard = dict(name="cross_entropy", label_smoothing=0.0)
  c.soft = dict(name="kl")
  c.terms = ConfigDict()

  c.mesh = ConfigDict()  # devices along each axis; -1 = what the others leave
  c.mesh.data = -1  # examples are split
  c.mesh.fsdp = 1  # and parameters with them
  c.mesh.model = 1  # parameters and the work on them are split
  c.show_sharding = False  # True = a table of what lies where

  c.save_every = 3 if smoke else 200
  c.save_minutes = 0.0  # more checkpoints by the clock; 0 = none
  c.keep_last = 2
  c.keep_best = 1
  c.on_nan = "stop"  # or "skip": leave out an update that is not finite
  c.profile = 0  # steps of each phase to trace into <folder>/profile
  c.hang_minutes = 0.0  # without a step, then the process ends; 0 = never
  return c
