"""Distils your own NNX module, here with batch norm and dropout.

python docs/examples/nnx.py
"""

from flax import nnx

import kdjax
from kdjax import data


class Mlp(nnx.Module):
  def __init__(self, width, rngs):
    self.hidden = nnx.Linear(64, width, rngs=rngs)
    self.norm = nnx.BatchNorm(width, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)
    self.last = nnx.Linear(width, 10, rngs=rngs)

  def __call__(self, image):
    x = self.hidden(image.reshape(len(image), 64))
    return self.last(self.dropout(nnx.relu(self.norm(x))))


teacher = kdjax.from_nnx(lambda rngs: Mlp(512, rngs))
student = kdjax.from_nnx(lambda rngs: Mlp(16, rngs))
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
kd = dict(teacher=teacher, teacher_variables=taught.variables)
kd["terms"] = kdjax.hinton(alpha=0.1, temperature=4.0)
done = kdjax.distill(student=student, train=train_few, **kd, **run)
for name, result in dict(teacher=taught, alone=alone, distilled=done).items():
  print(f"{name:<9}  accuracy {result.metrics['eval/accuracy']:.3f}")
