"""Folders as `kdjax.train` leaves them, made without training anything."""

import json

import numpy as np

from kdjax import examples
from kdjax.results import NETWORKS, summary

STEPS = 20


def config(**more):
  phases = {n: {"steps": STEPS} for n in ("teacher", "alone", "distilled")}
  return {
    "task": "image",
    "seed": 0,
    "seeds": 1,
    "alpha": 0.1,
    "soft": {"name": "kl"},
    "data": {"name": "digits"},
    "teacher": {"model": {"name": "large"}},
    "student": {"model": {"name": "small"}},
    "phases": phases,
    **more,
  }


def facts(seed=0, size=60, classes=4, teacher=True, **more):
  """Of images, a fifth of them wrong."""
  rng = np.random.default_rng(seed)
  label = rng.integers(0, classes, size).astype(np.int32)
  guess = np.where(rng.random(size) < 0.8, label, (label + 1) % classes)
  found = {
    "row": np.arange(size, dtype=np.int32),
    "label": label,
    "guess": guess.astype(np.int32),
    "confidence": rng.uniform(0.3, 1, size).astype(np.float32),
    "nll": rng.exponential(size=size).astype(np.float32),
  }
  if teacher:
    theirs = np.where(rng.random(size) < 0.9, guess, label)
    found["teacher_guess"] = theirs.astype(np.int32)
    found["kl"] = rng.exponential(size=size).astype(np.float32)
  return found | more


TEXTS = np.array(["def", " x", "=", "1", "\n", "<b>&", '"><i>'])


def text_facts(seed=0, size=60, **more):
  """Of rows of 20 tokens each."""
  return facts(
    seed,
    size,
    len(TEXTS),
    ids=np.arange(len(TEXTS)),
    texts=TEXTS,
    **{"row": np.arange(size, dtype=np.int32) // 20, **more},
  )


def metrics(steps=STEPS, seed=0):
  rng = np.random.default_rng(seed)
  lines = [
    {"step": n, "loss/total": float(rng.uniform(1, 2)), "temperature": 2.0}
    for n in range(1, steps + 1)
  ]
  return [*lines, {"step": steps, "eval/accuracy": 0.5, "eval/nll": 1.0}]


def measured(accuracy):
  return dict(parameters=10, flops=1e6, accuracy=accuracy, nll=0.5, kl=0.1)


def write(
  folder,
  *,
  seeds=1,
  networks=NETWORKS,
  with_facts=facts,
  results=True,
  steps=STEPS,
  settings=None,
):
  """Writes a run; returns its folder."""
  folder.mkdir(parents=True, exist_ok=True)
  settings = settings or config(seeds=seeds)
  (folder / "config.json").write_text(json.dumps(settings))
  runs = []
  for seed in range(seeds):
    for n, network in enumerate(networks):
      place = folder / f"seed_{seed}" / network
      place.mkdir(parents=True)
      lines = [json.dumps(x) + "\n" for x in metrics(steps, seed)]
      (place / "metrics.jsonl").write_text("".join(lines))
      spent = {"steps": 3.0, "compilation": 1.0}
      told = {"wall_seconds": 4.0, "goodput": 0.75, "seconds": spent}
      (place / "goodput.json").write_text(json.dumps(told))
      (place / "memory.json").write_text(json.dumps({"total": 3 * 2**20}))
      if with_facts is not None:
        found = with_facts(seed + 10 * n)
        if "image" not in network and "texts" not in found:
          images = [
            {"image": np.full((4, 4, 1), k, "u1")} for k in range(200)
          ] * 20
          found = examples.with_images(found, images)
        examples.write(place / examples.NAME, found)
    quality = dict(zip(networks, (0.9, 0.7, 0.8)))
    runs.append({n: measured(x + 0.02 * seed) for n, x in quality.items()})
  if results:
    (folder / "results.json").write_text(json.dumps(summary(runs)))
  return folder
