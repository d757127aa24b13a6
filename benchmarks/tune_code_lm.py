"""How `configs/code_lm.py` was tuned: the learning rates, on validation.

    python benchmarks/tune_code_lm.py

Teacher, student alone and student distilled are trained for half of their
updates, with each rate, on a seed that the config does not report, and ranked
by bits per byte of the validation split. `--teacher=FOLDER` takes a teacher
that a run has trained (`runs/lm/seed_0/teacher`) instead of training any.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "configs"))

import code_lm  # noqa: E402

from kdjax import train  # noqa: E402

SEED = 100
RATES = {
  "teacher": (1e-3, 2e-3, 4e-3),
  "alone": (1.5e-3, 3e-3, 6e-3, 12e-3),
  "distilled": (1.5e-3, 3e-3, 6e-3, 12e-3),
}


def config_for(phase: str, teacher: str, rate: float | None = None):
  """One phase: half of it at a rate, or all of it as the config has it."""
  c = code_lm.get_config()
  c.seed, c.data.eval_split, c.teacher.path = SEED, "validation", teacher
  for other in set(RATES) - {phase}:
    c.phases[other].steps = 0
  if rate is not None:
    steps = c.phases[phase].steps = c.phases[phase].steps // 2
    schedule = c.phases[phase].optimizer.learning_rate
    schedule.update(
      peak_value=rate, decay_steps=steps, warmup_steps=steps // 20
    )
  return c


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--teacher", default="")
  teacher = parser.parse_args().teacher
  with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)
    for phase, rates in RATES.items():
      if phase == "teacher" and teacher:
        continue
      scores = []
      for n, rate in enumerate(rates):
        config = config_for(phase, teacher, rate)
        results = train.train(config, folder / f"{phase}_{n}")
        name = phase if phase == "teacher" else f"student_{phase}"
        scores.append((results[name]["bits_per_byte"], rate))
        print(f"{phase}, rate {rate:g}: {scores[-1][0]:.4f}", flush=True)
      print(f"{phase}, best: {min(scores)[1]:g}", flush=True)
      if phase == "teacher":
        train.train(config_for("teacher", ""), folder / "whole")
        teacher = str(folder / f"whole/seed_{SEED}/teacher")


if __name__ == "__main__":
  main()
