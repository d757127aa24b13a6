"""Which file may import which: only those in the rows above its own."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "kdjax"

# One row may import the rows above it, and files of its own package.
ROWS = [
  {"errors"},
  {"commands", "files"},
  {"types", "convolution", "pins", "processes", "launch"},
  {
    "losses",
    "models",
    "data",
    "schedules",
    "layer_map",
    "in_parts",
    "clock",
    "flops",
    "health",
    "examples",
    "hlo",
    "lora",
    "optimizers",
    "recipes",
  },
  {"objective", "chips"},
  {"term_inputs"},
  {"totals", "projectors"},
  {"adapters", "gradients", "parallel", "terms", "generate", "importance"},
  {"train_state", "evaluate", "pretrained", "simkd", "inherit"},
  {
    "train_step",
    "checkpoint",
    "feed",
    "metrics",
    "progress",
    "preflight",
    "memory_plan",
    "perf",
    "preemption",
    "profiling",
    "save_clock",
    "watchdog",
  },
  {"goodput", "loggers", "opening", "saving"},
  {"stepping"},
  {"loop"},
  {"config", "results"},
  {"experiment"},
  {"train", "scaling"},
  {"export", "report", "__main__"},
]


def row(module: str) -> int:
  return next(n for n, names in enumerate(ROWS) if module in names)


def imported(path: Path) -> set[str]:
  """The top-level parts of kdjax that a file imports."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      parts = node.module.split(".")
      if parts == ["kdjax"]:
        found |= {alias.name for alias in node.names}
      elif parts[0] == "kdjax":
        found.add(parts[1])
    elif isinstance(node, ast.Import):
      for alias in node.names:
        parts = alias.name.split(".")
        if parts[0] == "kdjax" and len(parts) > 1:
          found.add(parts[1])
  return found


def test_imports_point_upwards():
  wrong = []
  for path in ROOT.rglob("*.py"):
    inside = path.relative_to(ROOT)
    own = inside.parts[0].removesuffix(".py")
    if own == "__init__":
      continue
    wrong += [
      f"{inside} imports {other}"
      for other in imported(path) - {own}
      if row(other) >= row(own)
    ]
  assert not wrong


def imports(path: Path) -> list[str]:
  tree = ast.parse(path.read_text())
  return [
    ast.unparse(node)
    for node in ast.walk(tree)
    if isinstance(node, ast.Import | ast.ImportFrom)
  ]


def test_only_adapters_and_models_know_flax():
  know = {
    path.relative_to(ROOT).parts[0].removesuffix(".py")
    for path in ROOT.rglob("*.py")
    if any("flax" in line for line in imports(path))
  }
  assert know <= {"adapters", "models", "config", "simkd"}
