"""The benchmarks of the step: each runs, tiny, and what it counts is right.

No test looks at a time.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
TINY = ("resnet_cifar", {"depth": 8, "width": 4})


@pytest.fixture
def script(monkeypatch):
  """`name -> module`, with a pair named "tiny"."""
  monkeypatch.syspath_prepend(str(FOLDER))
  pairs = importlib.import_module("step_flops").PAIRS
  monkeypatch.setitem(pairs, "tiny", (TINY, TINY, 8))
  return importlib.import_module


def lowered(f, *shapes):
  specs = [jax.ShapeDtypeStruct(s, np.float32) for s in shapes]
  return jax.jit(f).lower(*specs)


def conv(x, k, stride=1, groups=1):
  return jax.lax.conv_general_dilated(
    x,
    k,
    (stride, stride),
    [(1, 1), (1, 1)],
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )


def meetings(size, stride):
  """Pairs of a 3-wide window's elements and a row's, the padding left out."""
  starts = range(-1, size - 1, stride)
  return sum(0 <= start + k < size for start in starts for k in range(3))


@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("stride", [1, 2])
def test_products_of_a_convolution_and_its_gradients(script, stride, groups):
  shapes = (2, 8, 8, 6), (3, 3, 6 // groups, 12)
  want = 2.0 * 2 * meetings(8, stride) ** 2 * (6 // groups) * 12
  f = lambda x, k: conv(x, k, stride, groups)  # noqa: E731
  count = script("step_flops").products

  def gradients(x, k):
    y, pull_back = jax.vjp(f, x, k)
    return pull_back(y)

  assert count(lowered(f, *shapes).as_text(dialect="hlo")) == [want]
  text = lowered(gradients, *shapes).as_text(dialect="hlo")
  # Each product of the forward pass gives one to either gradient.
  assert count(text) == [want] * 3


def test_products_of_matrices(script):
  f = lambda a, b: jax.numpy.einsum("bij,bjk->bik", a, b)  # noqa: E731
  text = lowered(f, (5, 2, 3), (5, 3, 7)).compile().as_text()
  assert script("step_flops").products(text) == [2.0 * 5 * 2 * 3 * 7]


def test_products_in_loops_count_as_often_as_they_run(script):
  def products(xs, w):
    def one(total, x):
      return jax.lax.fori_loop(0, 3, lambda _, t: t @ w + x, total), None

    return jax.lax.scan(one, xs[0], xs)[0]

  program = lowered(products, (7, 4, 5), (5, 5))
  for text in (program.as_text("hlo"), program.compile().as_text()):
    counted = sum(script("step_flops").products(text))
    assert counted == 2.0 * 4 * 5 * 5 * 7 * 3


def test_a_loop_that_the_data_decide_runs_as_often_as_is_told(script):
  def product(count, w):
    turn = lambda _, t: t @ w  # noqa: E731
    return jax.lax.fori_loop(0, count.astype(int)[0], turn, w)

  text = lowered(product, (1,), (5, 5)).as_text("hlo")
  count = script("step_flops").products
  assert sum(count(text, 7)) == 2.0 * 5**3 * 7
  with pytest.raises(KeyError):
    count(text)


def test_transposes_to_channels_first_are_found(script):
  count = script("step_flops").to_channels_first
  found = lowered(lambda x: x.transpose(0, 3, 1, 2), (4, 8, 8, 3))
  other = lowered(lambda x: x.transpose(1, 2, 0, 3), (4, 8, 8, 3))
  assert count(found.as_text(dialect="hlo"), 4) == 1
  assert count(other.as_text(dialect="hlo"), 4) == 0


@pytest.mark.slow
def test_step_flops_finds_nothing_needless(script, tmp_path, capsys):
  out = tmp_path / "results.json"
  script("step_flops").main(
    ["--pairs", "tiny", "--batch", "4", "--out", str(out)]
  )
  assert "tiny" in capsys.readouterr().out
  told = json.loads(out.read_text())
  (row,) = told["rows"]
  assert told["jax"] == jax.__version__
  assert row["asked"] == pytest.approx(1, abs=1e-6)
  assert row["compilations"] == 1
  assert row["donated"] == pytest.approx(1, abs=1e-3)
  assert row["channels_first"] == 0


@pytest.mark.slow
def test_method_cost_counts_what_a_method_adds(script, tmp_path, capsys):
  out = tmp_path / "results.json"
  words = "--pair tiny --batch 4 --repeats 2 --methods dkd hint --out"
  script("method_cost").main([*words.split(), str(out)])
  told = json.loads(out.read_text())
  assert set(told["rows"]) == {"kl", "dkd", "hint"}
  printed = capsys.readouterr().out
  assert all(name in printed for name in told["rows"])
  assert told["rows"]["kl"]["own"] == 0
  assert told["rows"]["hint"]["own"] > 0
  assert all(row["wall"] > 0 for row in told["rows"].values())


@pytest.mark.slow
def test_checkpoint_stall_tells_what_a_checkpoint_costs(
  script, tmp_path, capsys
):
  out = tmp_path / "results.json"
  words = "--pair tiny --batch 4 --repeats 2 --steps 4 --out"
  script("checkpoint_stall").main([*words.split(), str(out)])
  told = json.loads(out.read_text())
  assert "ratio" in capsys.readouterr().out
  assert told["state_bytes"] > 0
  assert told["save_seconds"] > 0
  assert all(a > 0 for a in told["ratios"])
  assert told["sure"] > 0


def test_method_cost_has_every_loss_and_term(script):
  from kdjax import losses, terms

  known = {*losses.TAP_LOSSES, *terms.TERMS}
  # Needs a transformer; the pairs here are convolutional.
  assert known - {*script("method_cost").TERMS} == {
    "attention_maps",
    "self_relations",
  }


@pytest.mark.slow
def test_the_kdjax_side_of_the_torch_step_runs(script):
  step = script("torch_step").make_step("kdjax_split", "tiny", 8, "float32")
  step()


def test_torch_step_says_what_it_needs(script, monkeypatch, capsys):
  module = script("torch_step")
  monkeypatch.setitem(sys.modules, "torch", None)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(SystemExit) as stopped:
    module.main([])
  assert stopped.value.code == 2
  assert "pip install torch" in capsys.readouterr().out


@pytest.mark.slow
def test_torch_step_compares_processes(script, tmp_path):
  out = tmp_path / "results.json"
  words = "--pair resnet14_to_resnet8 --batch 4 --repeats 2 --contestants kdjax"
  script("torch_step").main([*words.split(), "--out", str(out)])
  assert json.loads(out.read_text())["rows"]["kdjax"]["wall"] == [1] * 3


def test_tpu_head_says_what_it_needs(script, monkeypatch, capsys):
  module = script("tpu_head")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(SystemExit) as stopped:
    module.main([])
  assert stopped.value.code == 2
  assert "pip install libtpu" in capsys.readouterr().out


def test_tpu_head_adds_up_the_cycles_of_loops(script):
  told = 'backend_config={"estimated_cycles":"%d"}'
  text = f"""
%body.1 (x: f32[8]) -> f32[8] {{
  %y = f32[8]{{0:T(8,128)}} add(%x, %x), {told % 5}
}}
%inner.1 (x: f32[8]) -> f32[8] {{
  %z = f32[8]{{0:T(8,128)}} add(%x, %x), {told % 100}
}}
%known.1 (x: f32[8]) -> pred[] {{
  %limit = s32[]{{:T(128)}} constant(3)
}}
%traced.1 (x: f32[8]) -> pred[] {{
  %n = s32[] parameter(0)
}}
%outer.1 (x: f32[8]) -> f32[8] {{
  %w = f32[8]{{0}} while(%x), condition=%known.1, body=%inner.1
  %v = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%body.1, {told % 10}
}}
ENTRY %main.1 (x: f32[8]) -> f32[8] {{
  %u = f32[8]{{0}} while(%x), condition=%traced.1, body=%outer.1
  %t = f32[8]{{0}} negate(%u), {told % 1}
}}
"""
  # 7 chunks, each of 3 · 100, and 10 with the 5 that it calls.
  assert script("tpu_head").cycles(text, 7) == 7 * (300 + 15) + 1


@pytest.mark.slow
def test_fused_head_compares_memory_and_gradients(script):
  module = script("fused_head")
  sizes = module.Sizes(512, 96, 8, 8)
  assert module.memory(sizes)["memory float32, whole / chunks"] > 1
  errors = module.error(sizes)
  assert errors["error float32, chunks"] < 3e-6
  for name in module.DTYPES:
    whole, chunks = (errors[f"error {name}, {x}"] for x in ("whole", "chunks"))
    assert chunks <= 1.2 * whole
  times = module.time(sizes, repeats=2).keys()
  assert {x.removesuffix(", products") for x in times} <= {
    *module.GOALS,
    "time float32, 2048 tokens",
  }


def test_the_language_model_step_asks_for_nothing_needless(script):
  module = script("lm_step")
  size = module.SIZES["tiny"]
  step = module.lowered(module.models(size), size).as_text(dialect="hlo")
  counted = sum(script("step_flops").products(step, 1))  # one chunk of tokens
  assert counted == module.needed(size)
  # Counted by hand: both networks' layers and heads, and the scores.
  student = 4 * 8 * 8 + 3 * 8 * 24 + 32 * 8 + 2 * 8 * 16
  teacher = 2 * (4 * 16 * 16 + 3 * 16 * 48 + 2 * 16 * 16) + 32 * 16
  assert counted == 64 * (6 * student + 2 * teacher)


@pytest.mark.slow
def test_lm_step_tells_every_ratio(script, tmp_path, capsys):
  out = tmp_path / "results.json"
  words = "--size tiny --repeats 2 --out"
  script("lm_step").main([*words.split(), str(out)])
  rows = json.loads(out.read_text())["rows"]
  printed = capsys.readouterr().out
  assert all(name in printed for name in rows)
  assert rows["flops compiled"] == pytest.approx(1, abs=0.01)
  assert rows["donated"] == 1
  deep, flat = (rows[f"text {n} layers, MB traced"] for n in (24, 2))
  assert deep < 1.01 * flat
  assert rows["time"] > 0


def test_host_overhead_runs_both_ways(script, tmp_path):
  out = tmp_path / "results.json"
  script("host_overhead").main(f"--steps 12 --blocks 1 --out {out}".split())
  rows = json.loads(out.read_text())["rows"]
  assert [row["arrays"] for row in rows] == [10, 300]
  assert all(row["loop_ms"] > 0 for row in rows)


def test_kl_accuracy_finds_the_plain_sum_worse(script, tmp_path):
  out = tmp_path / "results.json"
  script("kl_accuracy").main(["--out", str(out)])
  rows = json.loads(out.read_text())["rows"]
  assert [row["T"] for row in rows] == [1, 4, 8, 20, 100]
  assert all(row["ours"] < 1e-5 for row in rows)
  assert rows[-1]["plain"] > 10 * rows[-1]["ours"]


@pytest.mark.slow
def test_compile_time_of_scanned_layers_is_that_of_one(tmp_path):
  # A process of its own: what comes out of the tests' cache has another text.
  changed = {"JAX_COMPILATION_CACHE_DIR": "", "PYTHONPATH": str(FOLDER.parent)}
  subprocess.run(
    [sys.executable, str(FOLDER / "compile_time.py"), "--repeats", "1"]
    + ["--kinds", "decoder", "unrolled", "--depths", "2", "4"]
    + ["--out", str(tmp_path / "results.json")],
    env=os.environ | changed,
    check=True,
    timeout=500,
  )
  rows = json.loads((tmp_path / "results.json").read_text())["rows"]
  flat, deep, flat_unrolled, deep_unrolled = (row["text"] for row in rows)
  assert deep < 1.01 * flat
  assert deep_unrolled > 1.1 * flat_unrolled  # the head lies in both
  assert [row["ratio"] for row in rows][::2] == [1, 1]


@pytest.mark.slow
def test_input_pipeline_reads_what_it_wrote(script, tmp_path):
  out = tmp_path / "results.json"
  script("input_pipeline").main(f"--images 8 --rounds 1 --out {out}".split())
  found = json.loads(out.read_text())
  assert 95_000 < found["bytes"] < 120_000
  assert all(0 <= row["input_wait"] < 1 for row in found["wait"])
  needed = found["cores_needed"]
  assert needed["1024"] == pytest.approx(32 * needed["32"])


@pytest.mark.parity
def test_both_sides_of_the_torch_step_take_the_same_steps(script):
  make = script("torch_lm_step").make_step
  ours, theirs = (make(n, "tiny", "float32") for n in ("kdjax", "torch"))
  for _ in range(3):
    assert theirs() == pytest.approx(ours(), rel=1e-5)


@pytest.mark.parity
def test_both_sides_of_the_torch_head_have_one_loss(script):
  module = script("torch_lm_step")
  for dtype, rel in (("float32", 1e-6), ("bfloat16", 1e-3)):
    ours, theirs = (module.make_step(n, "tiny", dtype) for n in module.HEAD)
    assert theirs() == pytest.approx(ours(), rel=rel)
