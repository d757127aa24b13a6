"""How `configs/digits.py` was tuned: nine settings a side, on validation.

    python benchmarks/tune_digits.py

Student alone: 3 learning rates x 3 weight decays. Distilled: 3 learning rates x
3 temperatures, at the weight decay of the config. Both on seeds that the config
does not report, ranked by accuracy on the validation split. Prints each setting
as it ends and the best of each side.
"""

import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "configs"))

import digits  # noqa: E402

from kdjax import train  # noqa: E402

SEEDS = (100, 101)
RATES = (0.03, 0.1, 0.3)
DECAYS = (5e-4, 5e-3, 2e-2)
TEMPERATURES = (1.0, 2.0, 4.0)


def config_for(phase: str, rate: float, **changes: float):
  c = digits.get_config()
  c.data.eval_split = "validation"
  optimizer = c.phases[phase].optimizer
  optimizer.learning_rate.peak_value = rate
  if "decay" in changes:
    optimizer.weight_decay = changes["decay"]
  if "temperature" in changes:
    c.temperature.init_value = changes["temperature"]
    c.temperature.end_value = changes["temperature"]
  return c


def accuracy(phase: str, config, teachers: dict[int, str], folder: Path):
  """Mean validation accuracy of one setting; the other side is not trained."""
  other = {"alone": "distilled", "distilled": "alone"}[phase]
  config.phases[other].steps = 1
  got = []
  for seed, teacher in teachers.items():
    config.seed, config.teacher.checkpoint = seed, teacher
    results = train.train(config, folder / f"{seed}")
    got.append(results[f"student_{phase}"]["accuracy"])
  return statistics.fmean(got)


def main() -> None:
  with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)
    teachers = {}
    for seed in SEEDS:
      c = digits.get_config()
      c.seed, c.phases.alone.steps, c.phases.distilled.steps = seed, 1, 1
      train.train(c, folder / f"teacher_{seed}")
      teachers[seed] = str(folder / f"teacher_{seed}/seed_{seed}/teacher")
    grids = {
      "alone": [
        dict(rate=r, decay=d) for r, d in itertools.product(RATES, DECAYS)
      ],
      "distilled": [
        dict(rate=r, temperature=t)
        for r, t in itertools.product(RATES, TEMPERATURES)
      ],
    }
    for phase, grid in grids.items():
      scores = []
      for n, setting in enumerate(grid):
        config = config_for(phase, **setting)
        score = accuracy(phase, config, teachers, folder / f"{phase}_{n}")
        scores.append((score, setting))
        print(phase, json.dumps(setting), f"{100 * score:.2f} %", flush=True)
      print(phase, "best:", max(scores, key=lambda s: s[0]), flush=True)


if __name__ == "__main__":
  main()
