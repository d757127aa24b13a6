"""Every method against plain distillation and the student alone, on real data.

    python benchmarks/methods.py --data=digits  # or photos; to docs/results/
    python benchmarks/methods.py --data=digits --methods=hint,review --dry

Each row gets the same tuning: five runs on the validation split, with a seed
that is not reported. A method tries three learning rates, and at the best of
them two more weights (1, 1/10 and 1/100 of a first one, its authors' where
their scale is this library's) or, of the logit losses, two more T (half, once
and twice theirs); the student without a teacher tries five learning rates. Then
five seeds on the test split, in which all methods share teacher, data order and
initialisation. A method that reads activations stands beside the hard loss
alone, as in the papers' tables; `kl + ...` rows add plain distillation. All are
written down, whatever they gain.

Labels are few, images are not, and the student without a teacher stands there
twice. Alone: each of its batches is all labelled images. Hard loss: its batches
are the methods' own, drawn from all images, of which it learns from the few
with labels. What a method adds to its hard loss is its difference from the
second; what a user gains by it is that from the first.
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from kdjax import (
  adapters,
  config,
  data,
  evaluate,
  losses,
  models,
  objective,
  parallel,
  simkd,
)
from kdjax.train_step import init_state, make_train_step
from kdjax.types import once_options

OUT = Path(__file__).parents[1] / "docs" / "results"
SEEDS, TUNING_SEED = (0, 1, 2, 3, 4), 100
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
ALONE, HARD_LOSS = "student alone", "hard loss, same batches"


class Task(NamedTuple):
  """A data set, its networks, and how long they train."""

  name: str
  teacher: dict[str, Any]
  student: dict[str, Any]
  labelled: int
  padding: int
  teacher_steps: int
  steps: int


TASKS = {
  "digits": Task(
    "digits", dict(depth=14, width=16), dict(depth=8, width=4), 100, 1, 400, 300
  ),
  "photos": Task(
    "photos", dict(depth=14, width=16), dict(depth=8, width=8), 240, 1, 800, 400
  ),
}

MAPS = dict(student="stage_?", teacher="stage_?")
LAST = dict(student="stage_3", teacher="stage_3")
PREACTS = dict(student="preact_?", teacher="preact_?")
POOLED = dict(student="pooled", teacher="pooled")
LINEAR = dict(name="linear", norm=True)
KD = dict(alpha=0.1, soft=dict(name="kl"))
HARD = dict(hard_weight=1.0, soft_weight=0.0)


class Method(NamedTuple):
  """What it changes in a config, and what is tuned."""

  settings: dict[str, Any]
  centre: float  # weight of its term, or T of the soft loss
  label: str = ""

  @property
  def tunes_temperature(self) -> bool:
    return "soft" in self.settings and not self.settings.get("terms")


def term(name: str, weight: float, base: dict[str, Any] = HARD, **arguments):
  entry = dict(name=name, weight=1.0, **arguments)
  return Method({**base, "terms": {"method": entry}}, weight)


def soft(
  name: str,
  temperature: float,
  weights: tuple[float, float] | None = None,
  **arguments: float,
) -> Method:
  """A soft loss, its weights those of the labels and of the teacher."""
  parts = dict(zip(("hard_weight", "soft_weight"), weights or ()))
  entry = {"name": name, **arguments}
  return Method({**(parts or {"alpha": 0.1}), "soft": entry}, temperature)


# The centre is the authors' weight where their scale is this library's.
METHODS: dict[str, Method] = {
  "kl": Method(KD, 4.0),
  "reverse_kl": soft("reverse_kl", 4.0),
  "jsd": soft("jsd", 4.0, mix=0.5),
  "kl, zscore": soft("kl", 2.0, (0.1, 9.0), zscore=True),
  "dkd": soft("dkd", 4.0, (1.0, 1.0), target_weight=1.0, nontarget_weight=8.0),
  "nkd": soft("nkd", 1.0, (1.0, 1.0)),
  "dist": soft("dist", 1.0, (1.0, 2.0)),
  "logit_mse": soft("logit_mse", 1.0),
  "jeffreys": soft("jeffreys", 4.0),
  "skew_kl": soft("skew_kl", 4.0),
  "skew_reverse_kl": soft("skew_reverse_kl", 4.0),
  "total_variation": soft("total_variation", 4.0),
  "alpha_beta": soft("alpha_beta", 4.0),
  "multi_level": soft("multi_level", 4.0, (1.0, 1.0)),
  "ttm": soft("ttm", 1.0, (1.0, 45.0), exponent=0.1),
  "wttm": soft("wttm", 1.0, (1.0, 4.0), exponent=0.2),
  "hint": term("hint", 10.0, **LAST, projector=LINEAR),
  "attention_transfer": term("attention_transfer", 1000.0, **MAPS),
  "nst": term("nst", 50.0, **MAPS),
  "variational_information": term(
    "variational_information",
    1.0,
    **LAST,
    projector=dict(name="mlp", num_hidden=2),
  ),
  "review": term("review", 1.0, **MAPS, mid_channels=32),
  "overhaul": term("overhaul", 1e-3, **PREACTS, projector=LINEAR),
  "masked_generative": term("masked_generative", 1.0, **LAST, projector=LINEAR),
  "simple": term("simple", 0.1, **POOLED),
  "factor": term("factor", 200.0, **LAST),
  "activation_boundary": term(
    "activation_boundary", 1e-3, **PREACTS, projector=LINEAR
  ),
  "flow": term("flow", 50.0, **MAPS, projector=LINEAR),
  "similarity_preserving": term("similarity_preserving", 3000.0, **LAST),
  "probabilistic": term("probabilistic", 30000.0, **POOLED),
  "relational_distance": term("relational_distance", 25.0, **POOLED),
  "relational_angle": term("relational_angle", 50.0, **POOLED),
  "correlation_congruence": term(
    "correlation_congruence", 0.02, **POOLED, projector=LINEAR
  ),
  "inter_channel": term("inter_channel", 5.0, **LAST, projector=LINEAR),
  "correlation": term("correlation", 0.1, **POOLED, projector=LINEAR),
  "mutual": term("mutual", 1.0, **POOLED),
  "crd": term("crd", 0.8, **POOLED, num_negatives=256),
  "info_nce": term("info_nce", 0.8, **POOLED),
  "simkd": Method(
    dict(
      hard_weight=0.0,
      soft_weight=0.0,
      classifier="teacher",
      terms={
        "method": dict(
          name="hint", weight=1.0, student="projected", teacher="stage_3"
        )
      },
    ),
    1.0,
  ),
  "kl + hint": term("hint", 10.0, KD, **LAST, projector=LINEAR),
  "kl + review": term("review", 1.0, KD, **MAPS, mid_channels=32),
  "kl + crd": term("crd", 0.8, KD, **POOLED, num_negatives=256),
  "teacher_free": soft("teacher_free", 20.0, correct=0.9),
}


class Bench:
  """A task's data, networks and programs, one program a method."""

  def __init__(self, task: Task):
    self.task = task
    mean, std = data.NORMALIZATION[task.name]
    self.scale = dict(mean=mean, std=std)
    self.source = data.load(task.name, "train")
    self.held_out = {
      split: list(
        data.eval_batches(
          data.load(task.name, split), batch_size=448, **self.scale
        )
      )
      for split in ("validation", "test")
    }
    self.example = next(iter(self.batches(0)))
    self.teacher, self.student = (
      self._network(sizes) for sizes in (task.teacher, task.student)
    )
    self.mesh = parallel.make_mesh()
    self.programs: dict[str, Any] = {}
    self.made: dict[Any, list[Any]] = {}
    self.evaluators: dict[Any, Any] = {}

  def _network(self, sizes: dict[str, Any]):
    return adapters.from_nnx(
      lambda rngs: models.resnet_cifar(
        num_classes=self.source.num_classes,
        channels=self.source.image_shape[-1],
        rngs=rngs,
        **sizes,
      )
    )

  def batches(self, seed: int, *, labelled: Any = None, source: Any = None):
    augment = functools.partial(
      data.crop_and_flip,
      padding=self.task.padding,
      flip=self.task.name == "photos",
    )
    return data.train_batches(
      source or self.source,
      batch_size=64,
      seed=seed,
      augment=augment if self.task.padding else None,
      labelled=labelled,
      num_threads=1,
      **self.scale,
    )

  def labelled(self, seed: int):
    count = self.task.labelled
    return data.labelled_mask(self.source, count, seed=seed) if count else None

  def teach(self, seed: int):
    """A teacher, from all labels."""
    return self._train("teacher", self.teacher, None, (), seed, 3e-3, 0.0)

  def alone(self, seed: int, rate: float):
    return self._train("alone", self.student, None, (), seed, rate, 0.0)

  def hard(self, seed: int, rate: float):
    """The same on the batches that the methods see."""
    return self._train("hard", self.student, None, (), seed, rate, 0.0)

  def distil(self, name: str, seed: int, frozen, rate: float, value: float):
    return self._train(name, None, METHODS[name], frozen, seed, rate, value)

  def _train(self, name, network, method, frozen, seed, rate, value):
    """(network, variables) after training; `rate` and `value` are traced."""
    task = self.task
    steps = task.teacher_steps if name == "teacher" else task.steps
    labelled, source = None, None
    if name != "teacher":
      labelled = self.labelled(seed)
      if name == "alone" and labelled is not None:
        source, labelled = data.select(self.source, labelled), None
    if method is not None:
      network = self.student
      if method.settings.get("classifier") == "teacher":
        network = simkd.simkd(self.student, self.teacher, frozen, self.example)

    def parts(rate, value):
      schedule = optax.warmup_cosine_decay_schedule(
        0.0, 1.0, steps // 20, steps
      )
      # Adam, whose steps do not grow with a loss: the methods' scales differ
      # by a factor of a million, and all shall have one learning rate.
      optimizer = optax.adamw(lambda n: rate * schedule(n), weight_decay=1e-2)
      goal = self._goal(method, network, frozen, value)
      teacher = None if method is None else self.teacher
      return network, teacher, goal, optimizer

    if name not in self.programs or name == "simkd":

      @functools.partial(jax.jit, donate_argnums=0)
      def step(state, frozen, batch, rate, value):
        return make_train_step(*parts(rate, value))(state, frozen, batch)

      @functools.partial(jax.jit, compiler_options=once_options())
      def start(key, frozen, batch, value):
        args = *parts(0.1, value), key, batch
        return init_state(*args, frozen=frozen)

      self.programs[name] = start, step
    start, step = self.programs[name]
    # All methods see the same batches: making them once saves half the time.
    kind = name if name in ("teacher", "alone") else "distilled"
    if (kind, seed) not in self.made:
      feed = self.batches(seed, labelled=labelled, source=source)
      self.made[kind, seed] = [
        jax.device_put(batch) for batch in itertools.islice(feed, steps)
      ]
    batches = self.made[kind, seed]
    state = start(jax.random.key(seed), frozen, batches[0], value)
    metrics = {}
    for batch in batches:
      state, metrics = step(state, frozen, batch, rate, value)
    if not np.isfinite(float(metrics["loss/total"])):
      return network, None  # a setting that diverges scores nothing
    return network, (state.params, state.stats)

  def _goal(self, method, network, frozen, value):
    if method is None:
      return objective.Objective(
        (objective.Term("hard", losses.cross_entropy, group="hard"),)
      )
    base = dict(alpha=None, hard_weight=None, soft_weight=None, temperature=4.0)
    base |= dict(hard=dict(name="cross_entropy"), soft=dict(name="kl"))
    base |= dict(terms={}) | method.settings
    variables = jax.eval_shape(network.init, jax.random.key(0), self.example)
    taps = [
      list(adapters.tap_specs(net, v, self.example))
      for net, v in ((network, variables), (self.teacher, frozen))
    ]
    goal = config.goal(ConfigDict(base), *taps, len(self.source))
    traced = lambda step: jnp.asarray(value, jnp.float32)  # noqa: E731
    terms = [
      dataclasses.replace(t, weight=traced)
      if t.name.startswith("method")
      else dataclasses.replace(t, temperature=traced)
      if t.temperatures and method.tunes_temperature
      else t
      for t in goal.terms
    ]
    return objective.Objective(tuple(terms))

  def accuracy(self, trained: tuple[Any, Any], frozen: Any) -> float:
    """What is tuned for."""
    return self.score(*trained, frozen, "validation")["accuracy"]

  def score(self, network, variables, frozen, split: str) -> dict[str, float]:
    if variables is None:
      return {"accuracy": 0.0, "agreement": 0.0, "nll": float("inf")}
    if network not in self.evaluators:
      self.evaluators[network] = evaluate.make_evaluate(
        network, self.teacher, self.mesh
      )
    return self.evaluators[network](variables, frozen, self.held_out[split])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--data", choices=TASKS, required=True)
  parser.add_argument("--methods", default="")
  parser.add_argument("--dry", action="store_true", help="write nothing")
  parser.add_argument("--page", default="", help="instead of the data's name")
  parser.add_argument("--seeds", type=int, default=len(SEEDS))
  parser.add_argument("--steps", type=int, default=0)
  options = parser.parse_args()
  task = TASKS[options.data]
  if options.steps:
    task = task._replace(teacher_steps=options.steps, steps=options.steps)
  chosen = [m for m in options.methods.split(",") if m] or list(METHODS)
  if unknown := set(chosen) - set(METHODS):
    sys.exit(f"unknown {sorted(unknown)}: known: {', '.join(METHODS)}")
  bench, seeds = Bench(task), SEEDS[: options.seeds]
  began = time.time()

  teachers = {}
  for seed in (TUNING_SEED, *seeds):
    teachers[seed] = bench.teach(seed)[1]
  frozen = teachers[TUNING_SEED]
  rows: dict[str, Any] = {}
  rows["teacher"] = row(
    [
      bench.score(bench.teacher, teachers[s], teachers[s], "test")
      for s in seeds
    ]
  )
  for name, train in ((ALONE, bench.alone), (HARD_LOSS, bench.hard)):
    tried = {
      rate: bench.accuracy(train(TUNING_SEED, rate), frozen) for rate in RATES
    }
    rate = best(tried)
    rows[name] = row(
      [bench.score(*train(s, rate), teachers[s], "test") for s in seeds]
    ) | {"rate": rate, "validation": named(tried)}
  for name in rows:
    show(name, rows[name], rows[HARD_LOSS])
  for name in chosen:
    method, distil = METHODS[name], functools.partial(bench.distil, name)
    tried = {}
    for rate, value in settings(method, tried):
      trained = distil(TUNING_SEED, frozen, rate, value)
      tried[rate, value] = bench.accuracy(trained, frozen)
    rate, value = best(tried)
    scores = [
      bench.score(*distil(s, teachers[s], rate, value), teachers[s], "test")
      for s in seeds
    ]
    rows[name] = row(scores) | {
      "tuned": "T" if method.tunes_temperature else "weight",
      "value": value,
      "rate": rate,
      "validation": named(tried),
    }
    show(name, rows[name], rows[HARD_LOSS])
    bench.programs.pop(name)
    jax.clear_caches()
    bench.evaluators = {}
  if not options.dry:
    write(task, rows, list(seeds), time.time() - began, options.page)


def settings(method: Method, tried: dict[tuple[float, float], float]):
  """Three learning rates, then two more values at the best of `tried`."""
  yield from ((rate, method.centre) for rate in RATES[1:4])
  rate, _ = best(tried)
  factors = (0.5, 2.0) if method.tunes_temperature else (0.1, 0.01)
  yield from ((rate, factor * method.centre) for factor in factors)


def best(tried: dict[Any, float]) -> Any:
  return max(tried, key=tried.__getitem__)


def named(tried: dict[Any, float]) -> dict[str, float]:
  return {str(setting): accuracy for setting, accuracy in tried.items()}


def row(scores: list[dict[str, float]]) -> dict[str, Any]:
  return {
    name: [s[name] for s in scores] for name in ("accuracy", "agreement", "nll")
  }


def mean(values: list[float]) -> tuple[float, float]:
  x = np.asarray(values)
  error = x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else float("nan")
  return float(x.mean()), float(error)


def show(name: str, row: dict[str, Any], hard: dict[str, Any]) -> None:
  m, e = mean(row["accuracy"])
  gain, _ = mean(np.subtract(row["accuracy"], hard["accuracy"]).tolist())
  print(
    f"{name:26s} {100 * m:6.2f} ± {100 * e:4.2f} {100 * gain:+6.2f}  "
    f"{row.get('tuned', '')} {row.get('value', '')} rate {row.get('rate')}",
    flush=True,
  )


def write(task, rows, seeds, seconds, page) -> None:
  OUT.mkdir(parents=True, exist_ok=True)
  every = set(rows) >= set(METHODS)
  facts = {
    "title": f"{'Every method' if every else 'Some methods'} on {task.name}",
    "command": " ".join(["python benchmarks/methods.py", *sys.argv[1:]]),
    "data": task._asdict(),
    "seeds": seeds,
    "tuning_seed": TUNING_SEED,
    "seconds": round(seconds),
    "date": datetime.date.today().isoformat(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "rows": rows,
  }
  path = OUT / f"{page or task.name}.json"
  path.write_text(json.dumps(facts, indent=1) + "\n")
  path.with_suffix(".md").write_text(table(task, facts))
  print("wrote", path)


def table(task, facts) -> str:
  """The page: a row a method, sorted by what it gains over plain KD."""
  rows = facts["rows"]
  against = [rows[ALONE], rows[HARD_LOSS], rows.get("kl")]
  lines = [
    f"# {facts['title']}",
    "",
    f"`{facts['command']}` on {facts['date']}, "
    f"jax {facts['jax']}, {facts['device']}, {facts['seconds'] // 60} minutes.",
    "",
    (__doc__ or "").split("\n\n", 2)[2].strip(),
    "",
    f"Teacher ResNet-{task.teacher['depth']} of width {task.teacher['width']}, "
    f"student ResNet-{task.student['depth']} of width {task.student['width']}, "
    f"{task.steps} updates of 64 examples by AdamW, {task.labelled or 'all'} "
    "labels. "
    "Accuracy in %, ± standard error over "
    f"{len(facts['seeds'])} seeds; differences are paired by seed.",
    "",
    "| method | accuracy | against alone | against hard loss | against `kl` "
    "| agreement | tuned | learning rate |",
    "|---|---|---|---|---|---|---|---|",
  ]
  order = sorted(rows, key=lambda n: -np.mean(rows[n]["accuracy"]))
  for name in order:
    r = rows[name]
    cells = [f"`{name}`" if name in METHODS else name, shown(r["accuracy"])]
    for other in against:
      same = other is None or other is r or name == "teacher"
      cells.append(
        ""
        if same
        else shown(np.subtract(r["accuracy"], other["accuracy"]), "+")
      )
    cells.append(shown(r["agreement"]))
    cells.append(f"{r['tuned']} {r['value']:g}" if "tuned" in r else "")
    cells.append(f"{r['rate']:g}" if "rate" in r else "")
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


def shown(values: Any, sign: str = "") -> str:
  m, e = mean(list(values))
  return f"{100 * m:{sign}.2f} ± {100 * e:.2f}"


if __name__ == "__main__":
  main()
