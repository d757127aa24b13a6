"""How `configs/code_lm.py` was tuned: three learning rates a side, validation.

    python benchmarks/tune_code_lm.py

Student alone and distilled are trained for a third of their updates, with each
rate, on a seed that the config does not report, and ranked by bits per byte of
the validation split. `--teacher=FOLDER` takes a teacher that a run has trained
(`runs/lm/seed_0/teacher`) instead of training one first.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "configs"))

import code_lm  # noqa: E402

from kdjax import train  # noqa: E402

SEED, STEPS = 100, 500
RATES = (1.5e-3, 3e-3, 6e-3)


def config_for(phase: str, rate: float, teacher: str):
  c = code_lm.get_config()
  c.seed, c.data.eval_split, c.teacher.path = SEED, "validation", teacher
  other = {"alone": "distilled", "distilled": "alone"}[phase]
  c.phases[other].steps = 0
  c.phases[phase].steps = STEPS
  schedule = c.phases[phase].optimizer.learning_rate
  schedule.update(peak_value=rate, decay_steps=STEPS, warmup_steps=STEPS // 20)
  return c


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--teacher", default="")
  teacher = parser.parse_args().teacher
  with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)
    if not teacher:
      c = code_lm.get_config()
      c.seed, c.phases.alone.steps, c.phases.distilled.steps = SEED, 0, 0
      train.train(c, folder / "teacher")
      teacher = str(folder / f"teacher/seed_{SEED}/teacher")
    for phase in ("alone", "distilled"):
      scores = []
      for n, rate in enumerate(RATES):
        config = config_for(phase, rate, teacher)
        results = train.train(config, folder / f"{phase}_{n}")
        score = results[f"student_{phase}"]["bits_per_byte"]
        scores.append((score, rate))
        print(phase, f"rate {rate:g}", f"{score:.4f} bits/byte", flush=True)
      print(phase, "best:", min(scores)[1], flush=True)


if __name__ == "__main__":
  main()
