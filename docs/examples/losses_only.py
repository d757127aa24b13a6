"""Borrows the losses alone: your functions, your optax loop.

python docs/examples/losses_only.py
"""

import jax
import optax
from sklearn.datasets import load_digits

from kdjax import losses

x, y = load_digits(return_X_y=True)
few, train, test = slice(100), slice(1200), slice(1500, None)


def init(key, width):
  a, b = jax.random.split(key)
  last = jax.random.normal(b, (width, 10)) / width**0.5
  return {"hidden": jax.random.normal(a, (64, width)) / 8, "last": last}


def net(params, rows):  # logits [rows, 10]
  return jax.nn.relu(x[rows] / 16 @ params["hidden"]) @ params["last"]


def fit(params, loss, steps=300):
  def step(_, carry):
    updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
    return optax.apply_updates(carry[0], updates), state

  optimizer = optax.adam(3e-3)
  return jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))[0]


def hard(params, rows):
  return losses.cross_entropy(net(params, rows), y[rows]).mean()


def soft(params, T=4.0):  # no loss multiplies by T²: you do
  kl = losses.kl(net(params, train), net(teacher, train), temperature=T)
  return T**2 * kl.mean()


student = init(jax.random.key(1), 16)
teacher = fit(init(jax.random.key(0), 256), lambda p: hard(p, train))
alone = fit(student, lambda p: hard(p, few))
done = fit(student, lambda p: 0.1 * hard(p, few) + 0.9 * soft(p))
for name, params in dict(teacher=teacher, alone=alone, distilled=done).items():
  right = net(params, test).argmax(-1) == y[test]
  print(f"{name:<9}  accuracy {right.mean():.3f}")
