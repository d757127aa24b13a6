"""Which of how many processes this one is: told, or found in the environment.

Only jax's own detection is used, and only where the environment says that there
are several processes. One case needs more than the environment: a Cloud TPU VM
that is no GKE pod learns from the machine's metadata server whether it has
siblings. Colab, Kaggle and GKE name the hosts, and ask nobody.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from jax._src import clusters
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster

from kdjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a process stands in its run.

  Attributes:
    address: host:port at which process 0 waits for the others.
    count: number of processes.
    index: 0 .. count - 1.
    devices: those of the machine that are this process's; None = all.
  """

  address: str
  count: int
  index: int
  devices: tuple[int, ...] | None = None


def find(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  *,
  seconds: float = 300,
) -> Place | None:
  """The place that is told or, without arguments, what the environment says.

  Slurm and Open MPI tell each process its place, and so do GKE and the metadata
  of a TPU VM; `JAX_COORDINATOR_ADDRESS` overrides their address.

  Args:
    coordinator: host:port of process 0; with it, `processes` and `process`.
    processes: how many there are.
    process: which of them this is, from 0.
    seconds: how long to wait for the coordinator's name to be known.

  Returns:
    None for a process that is alone.

  Raises:
    UserError: some of the three arguments without the others, or out of range;
      a TPU VM whose metadata cannot be read.
  """
  given = coordinator, processes, process
  if any(x is not None for x in given):
    return _checked(*given)
  method = several(os.environ, running_in_cloud_tpu_vm)
  if method is None:
    return None
  try:
    if method == "gcetpu" and GceTpuCluster.get_process_count() == 1:
      return None
    address, count, index, devices = _detected(method, seconds)
  # Whatever the metadata server, a name server or the environment makes of it.
  except Exception as error:
    raise UserError(
      f"cannot tell which process of a run this is ({method}: "
      f"{str(error).splitlines()[0]}): give --coordinator, --processes and "
      "--process, or set TPU_SKIP_MDS_QUERY=1 on a TPU machine that is alone"
    ) from error
  devices = _devices(method, devices, os.environ)
  if not count or index is None:
    raise UserError(f"{method} named no process: give --coordinator and so on")
  place = _checked(address, count, index)
  return dataclasses.replace(place, devices=devices)


def several(environ: Mapping[str, str], on_tpu: bool) -> str | None:
  """How jax is to find the other processes; None where there are none.

  Args:
    environ: `os.environ`.
    on_tpu: whether jax found TPU chips in the machine.

  Returns:
    The name of one of jax's cluster types.
  """
  if "SLURM_PROCID" in environ and "SLURM_STEP_NODELIST" in environ:
    # A shell of `salloc` is a step of one task in a job of many.
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS"))
    return "slurm" if int(tasks or 1) > 1 else None
  if "OMPI_MCA_orte_hnp_uri" in environ:
    return "ompi" if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1 else None
  if not on_tpu:
    return None
  hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get(
    "TPU_WORKER_HOSTNAMES"
  )
  if hosts:
    slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    return "gketpu" if len(hosts.split(",")) * slices > 1 else None
  return None if "TPU_SKIP_MDS_QUERY" in environ else "gcetpu"


def _detected(method: str, seconds: float) -> tuple[Any, ...]:
  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  return clusters.ClusterEnv.auto_detect_unset_distributed_params(
    address, None, None, None, method, int(seconds)
  )


def _devices(
  method: str, found: Any, environ: Mapping[str, str]
) -> tuple[int, ...] | None:
  """jax gives a Slurm task the GPU of its number on the node.

  Not so where it is the node's only task, which has them all, or where Slurm
  shows each task its own GPU alone (`--gpus-per-task`), as number 0.
  """
  if "JAX_LOCAL_DEVICE_IDS" in environ or found is None:
    return None  # jax reads the variable itself
  visible = environ.get("CUDA_VISIBLE_DEVICES", "")
  tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
  one_each = re.fullmatch(r"1(\(x\d+\))?(,1(\(x\d+\))?)*", tasks)
  own = bool(visible) and "," not in visible
  if method == "slurm" and (one_each or own):
    return None
  return tuple(found)


def _checked(
  coordinator: str | None, processes: int | None, process: int | None
) -> Place:
  if coordinator is None or processes is None or process is None:
    raise UserError(
      f"got coordinator={coordinator}, processes={processes}, "
      f"process={process}: give all three or none"
    )
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise UserError(
      f"got coordinator={coordinator}, needs host:port of process 0, such as "
      "10.0.0.1:8476"
    )
  if processes < 1 or not 0 <= process < processes:
    raise UserError(
      f"got process={process} of processes={processes}: processes are numbered "
      f"from 0 to {max(processes, 1) - 1}"
    )
  return Place(coordinator, processes, process)
