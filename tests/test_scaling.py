"""Steps on devices that are not here; what is counted is counted by hand."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kdjax import chips, parallel, scaling
from kdjax.chips import Chip
from kdjax.experiment import experiment
from kdjax.flops import of_program
from kdjax.hlo import Collective, Program

CONFIGS = Path(__file__).parents[1] / "configs"
LIBTPU = bool(importlib.util.find_spec("libtpu"))

# As a TPU's compiler writes it, cut to what is read. The loop runs 5 times: its
# counter goes from 0 to 10 by 2. The inner one's length is data.
TEXT = """\
HloModule jit_step

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (input: f32[8,64]) -> f32[1,64] {
  %input = f32[8,64]{1,0} parameter(0)
  %all = f32[8,64]{1,0} all-reduce(%input), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %cut = f32[2,64]{1,0} dynamic-slice(%all, %zero, %zero)
}

%async_collective_fusion.1 (p: bf16[2,64]) -> bf16[8,64] {
  %p = bf16[2,64]{1,0} parameter(0)
  ROOT %ag = bf16[8,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%async_collective_fusion.2 (p: bf16[2,64]) -> bf16[8,64] {
  %p.1 = bf16[2,64]{1,0} parameter(0)
  ROOT %ag.1 = bf16[8,64]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%inner_body (i: (s32[], s32[])) -> (s32[], s32[]) {
  %i = (s32[], s32[]) parameter(0)
  %permute = (f32[4]{0}, f32[4]{0:S(1)}, u32[], u32[]) collective-permute-start(%w), channel_id=9, source_target_pairs={{0,1},{1,0}}
  ROOT %same = (s32[], s32[]) tuple(%i)
}

%inner_condition (i: (s32[], s32[])) -> pred[] {
  %j = (s32[], s32[]) parameter(0)
  %at = s32[] get-tuple-element(%j), index=0
  %end = s32[] get-tuple-element(%j), index=1
  ROOT %less = pred[] compare(%at, %end), direction=LT
}

%body (c: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %c = (s32[], f32[8,64]) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%n, %two)
  %w = f32[8,64]{1,0} get-tuple-element(%c), index=1
  %pair = (s32[], s32[]) tuple(%n, %n)
  %inner = (s32[], s32[]) while(%pair), condition=%inner_condition, body=%inner_body
  %f = f32[2,64]{1,0} fusion(%w), kind=kCustom, calls=%all-reduce-scatter.1
  %g = bf16[8,64]{1,0} fusion(%f), kind=kCustom, calls=%async_collective_fusion.1
  %h = bf16[8,64]{1,0} fusion(%f), kind=kCustom, calls=%async_collective_fusion.2
  ROOT %out = (s32[], f32[8,64]) tuple(%next, %w)
}

%condition (c: (s32[], f32[8,64])) -> pred[] {
  %d = (s32[], f32[8,64]) parameter(0)
  %ten = s32[] constant(10)
  %m = s32[] get-tuple-element(%d), index=0
  ROOT %lt = pred[] compare(%m, %ten), direction=LT
}

ENTRY %main (a: f32[8,64]) -> f32[] {
  %a = f32[8,64]{1,0} parameter(0)
  %start = s32[] constant(0)
  %begin = (s32[], f32[8,64]) tuple(%start, %a)
  %loop = (s32[], f32[8,64]) while(%begin), condition=%condition, body=%body
  %two-of = (f32[3]{0}, f32[5]{0}) all-reduce(%a, %a), channel_id=1, replica_groups=mesh['x'=2,'y'=4] {'x'}, to_apply=%add
  %send = (f32[1,128]{1,0}, u32[], token[]) send(%a, %t), channel_id=8, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %rs = f32[3]{0} reduce-scatter(%a), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}, to_apply=%add
  ROOT %started = ((f32[2]{0}), (f32[8]{0})) all-gather-start(%a), channel_id=1, replica_groups={{0,2,4,6}}, dimensions={0}
}
"""  # noqa: E501


def counted(text, **trips):
  found = Program(text, **trips).collectives([0] * 4 + [1] * 4)
  return sorted((c.kind, c.group, c.times, c.bytes) for c in found)


def test_each_collective_counts_as_often_as_its_loop_runs():
  assert counted(TEXT) == [
    ("all-gather", (0, 1, 2, 3), 5, 8 * 64 * 2),  # in two pieces, once
    ("all-gather", (0, 2, 4, 6), 1, 32),
    ("all-reduce", (0, 4), 1, 32),  # both of its arrays
    ("all-reduce", (0, 4), 1, 512),  # over the slices, by the hosts
    ("collective-permute", (0, 1), 5, 16),
    ("reduce-scatter", (0, 1), 1, 24),  # twice what is left of it
    ("reduce-scatter", (0, 1, 2, 3), 5, 8 * 64 * 4),
  ]


def test_a_loop_whose_length_the_data_decide_runs_as_often_as_is_said():
  assert ("collective-permute", (0, 1), 15, 16) in counted(TEXT, open_trips=3)


@pytest.mark.parametrize(
  ("groups", "want"),
  [
    ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
    ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
    ("replica_groups=mesh['x'=2,'y'=4] {'y'}", (0, 1, 2, 3)),
    ("replica_groups=mesh['x'=2,'y'=4] {'x','y'}", tuple(range(8))),
    ("replica_groups=mesh['x'=8] {'x':(1)2}", (0, 4)),
    ("replica_groups={}", tuple(range(8))),
  ],
)
def test_groups_of_every_form(groups, want):
  line = f"  ROOT %r = f32[4]{{0}} all-reduce(%a), {groups}, to_apply=%add"
  text = "ENTRY %main (a: f32[4]) -> f32[4] {\n" + line + "\n}\n"
  (found,) = Program(text).collectives([0] * 8)
  assert found.group == want


@pytest.mark.parametrize(
  ("kind", "want"),
  [
    ("all-gather", 75),
    ("reduce-scatter", 75),
    ("all-reduce", 150),
    ("all-to-all", 75),
    ("collective-permute", 100),
  ],
)
def test_what_each_device_sends_in_a_ring(kind, want):
  assert Collective(kind, 100, (0, 1, 2, 3), 1, "", "").sent == want


def test_traffic_of_slices_and_of_arrays_outside_hbm():
  text = """\
%cut (p0: f32[6,1024], p1: s32[]) -> f32[1,1024] {
  %p0 = f32[6,1024]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %one = f32[1,1024]{1,0} dynamic-slice(%p0, %p1, %p1)
}
%put (q0: f32[6,1024], q1: f32[1,1024], q2: s32[]) -> f32[6,1024] {
  %q0 = f32[6,1024]{1,0} parameter(0)
  %q1 = f32[1,1024]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  ROOT %all = f32[6,1024]{1,0} dynamic-update-slice(%q0, %q1, %q2, %q2)
}
ENTRY %main (a: f32[6,1024], n: s32[]) -> f32[6,1024] {
  %a = f32[6,1024]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %row = f32[1,1024]{1,0} fusion(%a, %n), kind=kLoop, calls=%cut
  %near = f32[1,1024]{1,0:T(8)S(1)} negate(%row)
  ROOT %b = f32[6,1024]{1,0} fusion(%a, %near, %n), kind=kLoop, calls=%put
}
"""
  row, scalar = 4 * 1024, 4
  # Read a row and its number, write it; read it; read a number, write a row.
  expected = 2 * row + scalar + row + scalar + row
  assert Program(text).traffic() == expected
  # The same where the slice is a fusion inside the fusion.
  wrapped = """\
%around (r0: s32[], r1: f32[6,1024]) -> f32[1,1024] {
  %r0 = s32[] parameter(0)
  %r1 = f32[6,1024]{1,0} parameter(1)
  ROOT %in = f32[1,1024]{1,0} fusion(%r1, %r0), kind=kLoop, calls=%cut
}
"""
  outside = "fusion(%n, %a), kind=kOutput, calls=%around"
  inside = "fusion(%a, %n), kind=kLoop, calls=%cut"
  nested = wrapped + text.replace(inside, outside)
  assert Program(nested).traffic() == expected


def sharded_sum(mesh, layers):
  """A scan over stacked weights, each gathered where it is used."""
  where = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
  weights = jax.ShapeDtypeStruct((layers, 64, 32), "float32", sharding=where)

  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=PartitionSpec(None, "fsdp"),
    out_specs=PartitionSpec(),
    check_vma=False,
  )
  def run(w):
    def body(x, w):
      whole = jax.lax.all_gather(w, "fsdp", tiled=True)
      return jnp.tanh(x @ whole), None

    x, _ = jax.lax.scan(body, jnp.ones((3, 64))[:, :64] @ jnp.eye(64), w)
    return jax.lax.psum(x, "fsdp")

  def square(w):
    return run(jnp.concatenate([w, w], -1)).sum()

  return jax.jit(square).trace(weights)


def test_a_compiled_program_by_hand():
  mesh, layers = parallel.make_mesh(8, data=1, fsdp=8), 5
  traced = sharded_sum(mesh, layers)
  program = Program(traced.lower().compile().as_text() or "")
  found = {c.kind: c for c in program.collectives([0] * 8)}
  gathered, added = found["all-gather"], found["all-reduce"]
  assert (gathered.times, gathered.bytes) == (layers, 64 * 64 * 4)
  assert (added.times, added.bytes) == (1, 3 * 64 * 4)
  assert gathered.group == added.group == tuple(range(8))
  each = 2 * 3 * 64 * 64
  assert of_program(traced.jaxpr.jaxpr) == 8 * each * (layers + 1)


def test_flops_of_a_loop_whose_length_the_data_decide():
  def run(n, x):
    return jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)

  program = jax.make_jaxpr(run)(3, jnp.ones((4, 4))).jaxpr
  assert of_program(program) == 2 * 4**3
  assert of_program(program, 7) == 7 * 2 * 4**3


def test_the_roofline_by_hand(monkeypatch):
  chip = Chip(16, 100.0, 10.0, 1.0, 256)
  monkeypatch.setitem(chips.CHIPS, "TPU v5 lite", chip)
  slices = [0, 0, 1, 1]
  found = [
    Collective("all-gather", 40, (0, 1), 3, "", ""),  # 3 · 20 within
    Collective("all-reduce", 8, (0, 1, 2, 3), 1, "", ""),  # 8 within, 4 across
    Collective("collective-permute", 6, (0, 2), 1, "", ""),  # 6 across
  ]
  seconds = chips.roofline("TPU v5 lite", 394e12, 500.0, found, slices)
  assert seconds == {"compute": 2.0, "hbm": 5.0, "ici": 6.8, "dcn": 10.0}
  assert chips.roofline("cpu", 1.0, 1.0, [], [0]) is None


def run(*arguments):
  jax.devices()  # the 8 of the tests: a new process would start its own
  return scaling.main(["scaling", *arguments])


DIGITS = f"--config={CONFIGS / 'digits.py'}:smoke"


def test_a_config_on_eight_devices(tmp_path, capsys, monkeypatch):
  out = tmp_path / "figures.json"
  wide = ("--config.mesh.fsdp=4", "--config.data.batch_size=16")
  assert run(DIGITS, "--devices=8", f"--json={out}", *wide) == 0
  told = capsys.readouterr().out
  assert "8 x cpu: data 2 x fsdp 4" in told
  got = json.loads(out.read_text())
  assert got["mesh"] == {"data": 2, "fsdp": 4, "model": 1}
  # Two rows of 8 x 8 pixels; label, mask, number, whether the label counts.
  assert got["memory"]["batch"] == 2 * 4 * (64 + 4)
  assert got["flops"] >= got["model_flops"] > 0
  kinds = {row["kind"] for row in got["collectives"]}
  assert {"all-gather", "all-reduce"} <= kinds
  assert got["seconds"] is None


@pytest.mark.slow
def test_a_program_that_the_compiler_cannot_print(capsys, monkeypatch):
  def refuses(_):
    raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nwith more")

  monkeypatch.setattr(jax.stages.Compiled, "as_text", refuses)
  assert run(DIGITS, "--devices=1") == 2
  told = capsys.readouterr().err
  assert "cannot print it" in told
  assert "RET_CHECK" in told
  assert told.count("\n") == 1


def module(name) -> Any:
  spec: Any = importlib.util.spec_from_file_location("config", CONFIGS / name)
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  return loaded


def test_networks_and_batches_from_sizes_alone():
  c = module("llm_8b_1b.py").get_config("8")
  c.mesh.fsdp, c.data.sequence_length = 8, 128
  parts = experiment(c, blank=True).parts
  shapes = jax.eval_shape(parts.student.init, jax.random.key(0), parts.batch)
  count = sum(x.size for x in jax.tree.leaves(shapes))
  teacher = sum(x.size for x in jax.tree.leaves(parts.frozen))
  # What the hub says of the two.
  assert (count, teacher) == (1_235_814_400, 8_030_261_248)
  assert {x.shape for x in parts.batch.values()} == {(8, 128)}
  assert {str(x.dtype) for x in jax.tree.leaves(parts.frozen)} == {"bfloat16"}


def test_images_from_sizes_alone():
  c = module("imagenet/resnet152_to_mobilenet.py").get_config("smoke")
  made: Any = experiment(c, blank=True)
  assert made.source.num_classes == 1000
  assert made.parts.batch["image"].shape == (16, 32, 32, 3)


@pytest.mark.parametrize(
  ("arguments", "told"),
  [
    ((DIGITS,), "give one of the two"),
    ((DIGITS, "--devices=8", "--topology=v5e:2x2"), "give one of the two"),
    ((DIGITS, "--devices=9"), "has 8 CPU devices, needs 9"),
    ((DIGITS, "--devices=8", "--config.mesh.fsdp=3"), "multiply to 8"),
    (
      (DIGITS, "--devices=8", "--config.data.batch_size=12"),
      "must be divisible by 8",
    ),
    (("--devices=8",), "--config is missing"),
    ((DIGITS, "--devices=0"), "cannot use the arguments"),
  ],
)
def test_mistakes_are_one_line(arguments, told, capsys):
  assert run(*arguments) == 2
  error = capsys.readouterr().err
  assert told in error
  assert error.count("\n") == 1


def test_without_the_compiler_for_tpus(capsys, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda n: n != "libtpu" and find(n)
  )
  assert run(DIGITS, "--topology=v5e:2x2") == 2
  assert "pip install 'jax[tpu]'" in capsys.readouterr().err


@pytest.mark.skipif(not LIBTPU, reason="needs libtpu")
@pytest.mark.parametrize(
  ("topology", "told"),
  [
    ("v5x:2x2", "such as v5e:4x4"),
    ("v5e:3x3", "such as"),
    ("v5e:32x32", "256"),
  ],
)
def test_slices_that_there_are_not(topology, told, capsys):
  assert run(DIGITS, f"--topology={topology}") == 2
  error = capsys.readouterr().err
  assert told in error
  assert error.count("\n") == 1


@pytest.mark.skipif(not LIBTPU, reason="needs libtpu")
def test_a_config_on_two_slices():
  wide = ("--config.mesh.fsdp=4", "--config.data.batch_size=16")
  where = ("--topology=v5e:2x2", "--slices=2")
  # libtpu ends a process whose XLA_FLAGS are for the CPU.
  clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  done = subprocess.run(
    [sys.executable, "-m", "kdjax.scaling", DIGITS, *where, *wide],
    env=clean,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  assert "8 x TPU v5 lite, 2 slices: data 2 x fsdp 4" in done.stdout
  assert "fits: a chip has 16.0 GiB" in done.stdout
  assert "dcn" in done.stdout
