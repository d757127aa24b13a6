"""Brings a PyTorch teacher's logits from disk; no teacher runs in the step.

Write them once, in the order of the data, of the images as they are:

    loader = torch.utils.data.DataLoader(images, batch_size=256)  # no shuffle
    with torch.no_grad():
      logits = torch.cat([teacher.eval()(x) for x in loader])
    np.save("teacher.npy", logits.float().cpu().numpy())  # [1200, 10]

Then, in the folder of teacher.npy: python .../docs/examples/torch_logits.py
"""

from pathlib import Path

import numpy as np
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

import kdjax
from kdjax import data

if not Path("teacher.npy").exists():  # a stand-in for yours
  x, y = (rows[:1200] for rows in load_digits(return_X_y=True))
  teacher = MLPClassifier(256, random_state=0).fit(x, y)
  np.save("teacher.npy", teacher.predict_log_proba(x))

student = kdjax.from_nnx(
  lambda rngs: nnx.Linear(64, 10, rngs=rngs),
  inputs=lambda batch: batch["image"].reshape(-1, 64),
)
# Shape and NaN are checked.
source = data.with_logits(data.load("digits", "train"), np.load("teacher.npy"))
few = data.labelled_mask(source, 100, seed=0)  # labels that the student sees
shared = dict(batch_size=64, mean=0.3, std=0.35)
train = data.train_batches(source, seed=0, labelled=few, **shared)
test = data.eval_batches(data.load("digits", "test"), **shared)
evaluate = kdjax.make_evaluate(student)
run = dict(train=train, steps=600, quiet=True)
# from_batch reads batch["teacher_logits"].
pair = dict(student=student, teacher=kdjax.from_batch())
for name, alpha in dict(alone=1.0, distilled=0.1).items():
  terms = kdjax.hinton(alpha=alpha, temperature=4.0)
  done = kdjax.distill(terms=terms, **pair, **run)
  metrics = evaluate(done.variables, (), test)
  print(f"{name:<9}  accuracy {metrics['accuracy']:.3f}")
