"""Where a process stands: what jax's detection makes of each environment."""

import os
import socket

import pytest
from jax._src.clusters import cloud_tpu_cluster

from kdjax.errors import UserError
from kdjax.processes import place
from kdjax.processes.place import Place, find, several

SLURM = {
  "SLURM_JOB_ID": "4096",
  "SLURM_STEP_NODELIST": "node[007-010],other",
  "SLURM_NTASKS": "4",
  "SLURM_STEP_NUM_TASKS": "4",
  "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
  "SLURM_PROCID": "3",
  "SLURM_LOCALID": "1",
}


@pytest.fixture
def environ(monkeypatch):
  """An environment that says nothing, in which no socket may be opened."""
  prefixes = "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_COORD", "CUDA_"
  for name in list(os.environ):
    if name.startswith(prefixes):
      monkeypatch.delenv(name)

  def never(*_, **__):
    raise AssertionError("a process that is alone asks nobody")

  monkeypatch.setattr(socket, "socket", never)
  monkeypatch.setattr(socket, "create_connection", never)
  monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", never)

  def set_all(**values):
    for name, value in values.items():
      monkeypatch.setenv(name, value)

  return set_all


def test_alone_asks_nobody(environ):
  assert find() is None
  environ(SLURM_JOB_ID="1", SLURM_NTASKS="4", SLURM_PROCID="0")
  assert find() is None  # a batch script's own shell: there is no step


def test_a_shell_within_an_allocation_is_alone(environ):
  environ(**{**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
  assert find() is None


def test_slurm(environ):
  environ(**SLURM)
  assert find() == Place("node007:61440", 4, 3, (1,))
  environ(JAX_COORDINATOR_ADDRESS="head:99")
  assert find() == Place("head:99", 4, 3, (1,))


@pytest.mark.parametrize(
  "more",
  [
    {"SLURM_STEP_TASKS_PER_NODE": "1(x4)"},
    {"SLURM_STEP_TASKS_PER_NODE": "1"},
    {"CUDA_VISIBLE_DEVICES": "0"},
    {"JAX_LOCAL_DEVICE_IDS": "0,1"},
  ],
)
def test_a_slurm_task_with_all_gpus_or_its_own_alone(environ, more):
  environ(**{**SLURM, **more})
  assert find() == Place("node007:61440", 4, 3, None)


def test_open_mpi(environ):
  environ(
    OMPI_MCA_orte_hnp_uri="4096.0;tcp://10.0.0.1:3",
    OMPI_COMM_WORLD_SIZE="2",
    OMPI_COMM_WORLD_RANK="1",
    OMPI_COMM_WORLD_LOCAL_RANK="0",
  )
  assert find() == Place("10.0.0.1:61441", 2, 1, (0,))
  environ(OMPI_COMM_WORLD_SIZE="1")
  assert find() is None


@pytest.fixture
def on_tpu(monkeypatch):
  monkeypatch.setattr(place, "running_in_cloud_tpu_vm", True)
  monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
  monkeypatch.setattr("jax._src.clusters.cluster.running_in_cloud_tpu_vm", True)
  monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.7")


def test_one_tpu_host_in_a_container_such_as_colab(environ, on_tpu):
  environ(TPU_SKIP_MDS_QUERY="1")
  assert find() is None
  environ(TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0")
  assert find() is None


def test_gke(environ, on_tpu, monkeypatch):
  metadata(monkeypatch)  # asked for other slices, has none
  environ(TPU_WORKER_HOSTNAMES="s-0.run,s-1.run", TPU_WORKER_ID="1")
  assert find() == Place("s-0.run:8482", 2, 1)


def test_gke_with_several_slices(environ, on_tpu):
  environ(
    TPU_WORKER_HOSTNAMES="s-0.run,s-1.run",
    TPU_WORKER_ID="1",
    MEGASCALE_NUM_SLICES="3",
    MEGASCALE_SLICE_ID="2",
    MEGASCALE_COORDINATOR_ADDRESS="first.run:8081",
  )
  assert find() == Place("first.run:8482", 6, 5)


def metadata(monkeypatch, **values):
  def get(key):
    return (values[key], 200) if key in values else ("", 404)

  monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", get)


def test_a_tpu_pod_asks_the_metadata(environ, on_tpu, monkeypatch):
  found = {
    "agent-worker-number": "1",
    "worker-network-endpoints": "10.0.0.5,10.0.0.6",
    "tpu-env": "ZONE: 'x'",
  }
  metadata(monkeypatch, **found)
  assert find() == Place("10.0.0.5:8482", 2, 1)
  metadata(monkeypatch, **{**found, "worker-network-endpoints": "10.0.0.5"})
  assert find() is None


def test_metadata_that_cannot_be_read(environ, on_tpu, monkeypatch):
  def get(key):
    raise OSError("no route to host")

  monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", get)
  with pytest.raises(UserError, match=r"no route to host.*TPU_SKIP_MDS_QUERY"):
    find()


def test_told(environ):
  environ(**SLURM)  # what is told comes first
  assert find("a:1", 2, 1) == Place("a:1", 2, 1)
  assert find("[::1]:80", 1, 0) == Place("[::1]:80", 1, 0)


@pytest.mark.parametrize(
  ("given", "said"),
  [
    (("a:1", None, 0), "all three or none"),
    ((None, 2, None), "all three or none"),
    (("a", 2, 0), "needs host:port"),
    (("a:0", 2, 0), "needs host:port"),
    (("a:b", 2, 0), "needs host:port"),
    (("a:1", 2, 2), "from 0 to 1"),
    (("a:1", 2, -1), "from 0 to 1"),
    (("a:1", 0, 0), "from 0 to 0"),
  ],
)
def test_told_wrongly(given, said):
  with pytest.raises(UserError, match=said):
    find(*given)


def test_a_tpu_machine_under_slurm_is_slurms():
  assert several(SLURM, True) == "slurm"
