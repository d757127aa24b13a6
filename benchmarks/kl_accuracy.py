"""The error of `losses.kl` in float32, beside that of Σ p (log p − log q).

    python benchmarks/kl_accuracy.py

Prints, for each T, the largest relative error of 64 examples of 100 classes,
logits of deviation 3, against float64.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from step_flops import RESULTS, save

from kdjax import losses


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--out", type=Path, default=RESULTS / "kl_accuracy.json")
  given = parser.parse_args(arguments)
  rows = []
  student, teacher = np.random.default_rng(0).normal(size=(2, 64, 100)) * 3
  student, teacher = np.float32(student), np.float32(teacher)
  print(f"jax {jax.__version__}\n   T   losses.kl   plain sum")
  for t in (1.0, 4.0, 8.0, 20.0, 100.0):
    log_p, log_q = (
      np.float64(z) / t - np.log(np.exp(np.float64(z) / t).sum(-1))[:, None]
      for z in (teacher, student)
    )
    want = np.sum(np.exp(log_p) * (log_p - log_q), -1)
    ours = losses.kl(student, teacher, temperature=t)
    log_p, log_q = (jax.nn.log_softmax(z / t) for z in (teacher, student))
    plain = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    errors = [np.abs(np.asarray(x) / want - 1).max() for x in (ours, plain)]
    rows.append({"T": t, "ours": float(errors[0]), "plain": float(errors[1])})
    print(f"{t:4g}    {errors[0]:.1e}     {errors[1]:.1e}", flush=True)
  save(given.out, rows=rows)


if __name__ == "__main__":
  main()
