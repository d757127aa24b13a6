"""Distils your own Linen module, here with batch norm and dropout.

python docs/examples/linen.py
"""

from flax import linen as nn

import kdjax
from kdjax import data


class Cnn(nn.Module):
  width: int

  @nn.compact
  def __call__(self, image, train):
    x = nn.Conv(self.width, (3, 3), strides=2)(image)
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    x = nn.relu(nn.Conv(2 * self.width, (3, 3), strides=2)(x))
    x = nn.Dropout(0.1, deterministic=not train)(x.reshape(len(x), -1))
    return nn.Dense(10)(x)


teacher, student = kdjax.from_linen(Cnn(32)), kdjax.from_linen(Cnn(4))
source = data.load("digits", "train")
few = data.labelled_mask(source, 100, seed=0)  # labels that the student sees
shared = dict(batch_size=64, mean=0.3, std=0.35)
train = data.train_batches(source, seed=0, **shared)
train_few = data.train_batches(source, seed=0, labelled=few, **shared)
alone_on = data.train_batches(data.select(source, few), seed=0, **shared)
test = data.eval_batches(data.load("digits", "test"), **shared)
run = dict(steps=600, evaluate_on=test, quiet=True)

taught = kdjax.distill(student=teacher, train=train, **run)
alone = kdjax.distill(student=student, train=alone_on, **run)
# Its variables, (params, {"batch_stats": ...}), stay as they are.
kd = dict(teacher=teacher, teacher_variables=taught.variables)
kd["terms"] = kdjax.hinton(alpha=0.1, temperature=4.0)
done = kdjax.distill(student=student, train=train_few, **kd, **run)
for name, result in dict(teacher=taught, alone=alone, distilled=done).items():
  print(f"{name:<9}  accuracy {result.metrics['eval/accuracy']:.3f}")
