"""What a step costs by its mathematics, and what a device could do.

      MFU = FLOPs of a step / (seconds · devices · peak of one device)

FLOPs of a step are those of the model, not of the hardware (PaLM,
arXiv:2204.02311, appendix B): the teacher's forward pass and three times the
student's. A second pass for `remat`, or for the groups' gradients apart, is
not counted, so that MFU falls by it; losses, projectors and the optimizer are
not either. Of the first layer, whose input needs no gradient, a third is too
much.

Of a forward pass the products of matrices and the convolutions are counted,
in the program as it is traced, a multiplication and an addition being two. The
body of a loop counts as often as it runs, which XLA's own count leaves out.
Products with a causal mask's zeros, or with padding, count.
"""

import math
from typing import Any

import jax
from jax.extend import core
from jaxtyping import PyTree

from kdjax.types import Batch, Model, dense

# Dense bfloat16 FLOP/s of one JAX device: a core of v2, v3 and 7x, else a chip.
# TPUs: JAX's own table (jax/_src/pallas/mosaic/tpu_info.py, 0.10.2); v3 and v6e
# by cloud.google.com/tpu/docs. GPUs: NVIDIA's data sheets, without sparsity.
PEAKS = {
  "TPU v2": 23e12,
  "TPU v3": 61.5e12,
  "TPU v4": 275e12,
  "TPU v4 lite": 137e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v5e": 197e12,
  "TPU v5 lite": 197e12,
  "TPU v6e": 918e12,
  "TPU v6 lite": 918e12,
  "TPU7x": 1155e12,
  "NVIDIA A100": 312e12,
  "NVIDIA A10G": 70e12,
  "NVIDIA L4": 121e12,
  "NVIDIA L40S": 362e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA GH200": 989e12,
  "NVIDIA B200": 2250e12,
  "NVIDIA GeForce RTX 3090": 71e12,
  "NVIDIA GeForce RTX 4090": 165e12,
}


def peak(device_kind: str) -> float | None:
  """bfloat16 FLOP/s of a device of this kind, None where it is not known.

  NVIDIA's names go on after the model ("NVIDIA A100-SXM4-40GB").
  """
  if device_kind in PEAKS:
    return PEAKS[device_kind]
  for name in sorted(PEAKS, key=len, reverse=True):
    rest = device_kind.removeprefix(name)
    if name.startswith("NVIDIA") and rest != device_kind and rest[0] in " -":
      return PEAKS[name]
  return None


def mfu(
  of_step: float, seconds: float, device_kind: str, num_devices: int
) -> float | None:
  """The equation above; None for a device whose peak is not known."""
  most = peak(device_kind)
  return most and of_step / (seconds * num_devices * most)


def of_step(
  student: Model,
  teacher: Model | None,
  variables: PyTree,
  teacher_variables: PyTree,
  batch: Batch,
) -> float:
  """Model FLOPs of one step on the whole batch.

  Args:
    student, teacher: networks; without a teacher the student's alone.
    variables, teacher_variables: `(params, stats)`; shapes are enough.
    batch: the whole one; shapes are enough.
  """
  found = 3 * _of_forward(student, variables, batch, train=True)
  if teacher is not None:
    found += _of_forward(teacher, teacher_variables, batch, train=False)
  return found


def _of_forward(
  model: Model, variables: PyTree, batch: Batch, *, train: bool
) -> float:
  def forward(variables: Any, batch: Batch, key: Any) -> Any:
    params, stats = variables
    output, _ = model.apply(params, stats, batch, train=train, key=key)
    return dense(output.logits)

  traced = jax.make_jaxpr(forward)
  return of_program(traced(variables, dict(batch), jax.random.key(0)).jaxpr)


def of_program(program: core.Jaxpr, open_trips: int = 1) -> float:
  """FLOPs of the products and convolutions of a traced program.

  Of branches the dearest counts.

  Args:
    program: as `jax.make_jaxpr` traces it.
    open_trips: how often a loop runs whose length the data decide.
  """
  return float(sum(_of_equation(x, open_trips) for x in program.eqns))


def _of_equation(equation: core.JaxprEqn, open_trips: int) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    ((contracted, _), _) = params["dimension_numbers"]
    each = math.prod(_shape(equation.invars[0])[n] for n in contracted)
    return 2.0 * each * math.prod(_shape(equation.outvars[0]))
  if name == "conv_general_dilated":
    kernel = _shape(equation.invars[1])
    outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
    each = math.prod(kernel) / outputs
    return 2.0 * each * math.prod(_shape(equation.outvars[0]))
  inner = [of_program(program, open_trips) for program in _programs(params)]
  if name == "cond":
    return max(inner)
  times = open_trips if name == "while" else _times(name, params)
  return times * sum(inner)


def _shape(variable: Any) -> tuple[int, ...]:
  return variable.aval.shape


def _times(name: str, params: Any) -> float:
  """How often an equation runs what is in it, on all devices together."""
  if name == "scan":
    return params["length"]
  if name == "shard_map":
    sizes = dict(params["mesh"].shape)
    return math.prod(sizes[axis] for axis in params["newly_manual_axes"])
  if name == "pallas_call":
    grid = params["grid_mapping"].grid
    return math.prod(n for n in grid if isinstance(n, int))
  return 1


def _programs(params: Any) -> list[core.Jaxpr]:
  """The programs among an equation's parameters."""
  leaves = jax.tree.leaves(
    list(params.values()),
    is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr),
  )
  return [
    x.jaxpr if isinstance(x, core.ClosedJaxpr) else x
    for x in leaves
    if isinstance(x, core.Jaxpr | core.ClosedJaxpr)
  ]
