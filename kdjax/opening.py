"""How a phase begins: what lies where, and what is said of it."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from kdjax import errors, flops, losses, memory_plan, parallel
from kdjax.evaluate import num_parameters
from kdjax.memory_plan import Plan
from kdjax.objective import Objective, Term, as_objective, hinton
from kdjax.preflight import check_outputs
from kdjax.train_state import StudentOf, TeacherOf, create_state
from kdjax.train_step import TrainStep, jit_step, make_train_step
from kdjax.types import Batch, Model, TrainState


class Phase(NamedTuple):
  """The networks of a phase and its step, on the mesh.

  Attributes:
    student, teacher: as they are applied there.
    goal: what is minimised.
    mesh: of the devices.
    frozen: what no step changes.
    state: the shapes of it; the arrays are the caller's, to be donated.
    theirs: the shapes of the teacher's variables.
    params: the shapes of what the student is applied with.
    step: of `jit_step`.
    head: `batch -> bytes`: what the head takes, by another compilation.
  """

  student: Model
  teacher: Model | None
  goal: Objective
  mesh: Mesh
  frozen: PyTree
  state: TrainState
  theirs: Any
  params: PyTree
  step: TrainStep
  head: Callable[[Batch], int]

  def flops(self, rows: Batch) -> float | None:
    """Of a step; None where nobody knows what the device could do."""
    if not flops.peak(self.mesh.devices.flat[0].device_kind):
      return None
    variables = self.params, self.state.stats
    return flops.of_step(
      self.student, self.teacher, variables, self.theirs, rows
    )


def goal(
  terms: Objective | Sequence[Term] | None, teacher: Model | None
) -> Objective:
  """The terms, or what is minimised where none are given."""
  if terms is not None:
    return as_objective(terms)
  if teacher is not None:
    return hinton(alpha=0.1, temperature=4.0)
  return Objective((Term("hard", losses.cross_entropy, group="hard"),))


def given(variables: PyTree, teacher: Model, batch: Batch) -> PyTree:
  """A teacher's variables; one that has none needs none.

  Raises:
    UserError: it has some, and they are not given.
  """
  if not isinstance(variables, tuple) or variables:
    return variables
  needed = jax.eval_shape(teacher.init, jax.random.key(0), batch)
  if jax.tree.leaves(needed):
    raise errors.UserError(
      f"got no teacher_variables, and the teacher has "
      f"{num_parameters(needed[0]):,} parameters: give its (params, stats)"
    )
  return needed


def begin(
  student: Model,
  teacher: Model | None,
  goal: Objective,
  optimizer: optax.GradientTransformation,
  batch: Batch,
  teacher_variables: PyTree,
  *,
  seed: int,
  mesh: Mesh,
  partition: Sequence[parallel.Rule],
  teacher_partition: Sequence[parallel.Rule],
  variables: tuple[PyTree, PyTree] | None,
  teacher_of: TeacherOf,
  student_of: StudentOf,
  **of_step: Any,
) -> tuple[Phase, TrainState]:
  """Puts a phase's variables where they belong; arguments as of `distill`.

  Args:
    of_step: microbatches, layout and what else `make_train_step` takes.

  Returns:
    What stays, and the state before the first update.

  Raises:
    UserError: rules that are none; networks that do not fit.
  """
  parallel.check_rules(partition, mesh, "partition")
  parallel.check_rules(teacher_partition, mesh, "teacher_partition")
  student = parallel.gathered(student, mesh, partition)
  if teacher is not None:
    teacher = parallel.gathered(teacher, mesh, teacher_partition)
  frozen = parallel.place(
    teacher_variables,
    parallel.shardings(teacher_variables, mesh, teacher_partition),
  )
  problem = student, teacher, goal, optimizer
  views: dict[str, Any] = dict(teacher_of=teacher_of, student_of=student_of)
  state, split = create_state(
    *problem,
    seed,
    batch,
    mesh=mesh,
    rules=partition,
    frozen=frozen,
    variables=variables,
    **views,
  )
  # A teacher that is in the state is looked at as it begins.
  theirs = () if teacher is None else teacher_of(state, frozen)
  params = jax.eval_shape(student_of, state.params, frozen)
  check_outputs(
    student,
    teacher,
    (params, state.stats),
    theirs,
    batch,
    mesh=mesh,
    comparable=goal.comparable,
  )
  like, theirs = jax.eval_shape(lambda: (state, theirs))
  step = jit_step(make_train_step(*problem, **of_step, **views), mesh, split)
  head = functools.partial(
    memory_plan.head_bytes,
    student,
    teacher,
    goal,
    like.replace(params=params),
    theirs,
    microbatches=of_step["microbatches"],
    layout=of_step["layout"],
  )
  phase = Phase(
    student, teacher, goal, mesh, frozen, like, theirs, params, step, head
  )
  return phase, state


def lies(state: TrainState, frozen: PyTree, *, table: bool) -> str:
  """What lies where; or, without a table, what lies whole and need not."""
  if table:
    return "\n" + parallel.table({"student": state, "teacher": frozen})
  return parallel.unsplit((state, frozen))


def describe(phase: Phase, start: int, steps: int) -> str:
  """What is about to run, and where."""
  size = f"{num_parameters(phase.state.params):,} parameters"
  if jax.tree.leaves(phase.theirs):
    size += f", teacher of {num_parameters(phase.theirs[0]):,}"
  device = phase.mesh.devices.flat[0]
  where = f"{phase.mesh.size} {device.platform} device(s), {device.device_kind}"
  if start >= steps:
    return f"step {start} of {steps} is saved, nothing to train"
  at = f"from step {start} " if start else ""
  return (
    f"{at}to step {steps} on {where}; jax {jax.__version__} compiles "
    f"one train step: network of {size}"
  )


def memory(
  phase: Phase, state: TrainState, rows: Batch, settings: Mapping[str, Any]
) -> tuple[Plan, str]:
  """What a step takes of each device, and that in words: a line, or a table
  where it is much.

  Raises:
    UserError: the device has less.
  """
  plan = memory_plan.plan(phase.step, state, phase.frozen, rows)
  if plan.limit is None or plan.total < plan.limit / 10:
    return plan, memory_plan.line(plan)
  # To tell the head apart takes another compilation.
  plan = plan._replace(head=phase.head(rows))
  name = settings.get("phase", "distilled")
  memory_plan.check_fits(plan, settings, phase=name)
  return plan, memory_plan.table(plan, settings, phase=name)
