"""The scripts that start runs: linted, and their commands really parsed."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from kdjax import launch, train

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "launch"
SCRIPTS = [FOLDER / "tpu_vm.sh", FOLDER / "slurm.sbatch"]
JOBSET = yaml.safe_load((FOLDER / "gke_jobset.yaml").read_text())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
  subprocess.run(["bash", "-n", script], check=True)
  if shutil.which("shellcheck"):
    subprocess.run(["shellcheck", script], check=True)


def commands(path):
  """The arguments of each `kdjax.train` in a file, shell variables put in."""
  text = path.read_text().replace("\\\n", " ")
  text = re.sub(r"\n\s+(\"?--)", r" \1", text)  # an array of bash goes on
  values = dict(re.findall(r"^(\w+)=([^\s(]+)", text, re.MULTILINE))
  found = []
  for line in text.splitlines():
    match = re.search(r"-m kdjax\.train\s+(--.*)", line)
    if match is None or line.startswith("#"):
      continue
    rest = match.group(1).split("#")[0].rstrip().rstrip(")")
    rest = rest.removesuffix('"') if rest.count('"') % 2 else rest
    for name, value in values.items():
      rest = rest.replace(f"${name}", value)
    found.append(shlex.split(rest))
  return found


def parse(arguments):
  """What `kdjax.train` makes of them; the README's FILE is any config."""
  configs = {"--config=FILE": "--config=configs/digits.py"}
  named = [
    configs.get(a, a).replace("--config=", f"--config={ROOT}/")
    for a in arguments
  ]
  return train._arguments(["kdjax.train", *named])


@pytest.mark.parametrize(
  ("path", "count"),
  [(SCRIPTS[0], 1), (SCRIPTS[1], 1), (FOLDER / "README.md", 3)],
  ids=lambda value: getattr(value, "name", None),
)
def test_the_commands_are_those_of_train(path, count):
  found = commands(path)
  assert len(found) == count
  for arguments in found:
    given = parse(arguments)
    assert "$" not in given.workdir
    assert given.config.phases.distilled.steps > 0


def test_the_readme_tells_a_process_its_place():
  given = parse(commands(FOLDER / "README.md")[1])
  assert given.coordinator == "10.0.0.1:8476"
  assert (given.processes, given.process) == (4, 0)


def test_the_jobset():
  assert JOBSET["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert JOBSET["kind"] == "JobSet"
  spec = JOBSET["spec"]
  assert spec["network"]["enableDNSHostnames"] is True
  assert spec["failurePolicy"]["maxRestarts"] > 0
  (job,) = spec["replicatedJobs"]
  job = job["template"]["spec"]
  assert job["completionMode"] == "Indexed"
  assert job["backoffLimit"] == 0
  pod = job["template"]["spec"]
  # A Job with a policy on failures must not restart its pods' containers.
  assert pod["restartPolicy"] == "Never"
  assert pod["terminationGracePeriodSeconds"] >= 60
  (container,) = pod["containers"]
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["containerName"] == container["name"]
  (policy,) = spec["failurePolicy"]["rules"]
  assert policy["action"] == "FailJobSet"
  assert policy["name"]  # required by its schema
  mounts = {mount["name"] for mount in container["volumeMounts"]}
  assert mounts == {volume["name"] for volume in pod["volumes"]}
  given = parse(container["args"])
  assert container["command"] == ["python", "-m", "kdjax.train"]
  assert given.workdir.startswith(container["volumeMounts"][0]["mountPath"])


def test_the_jobset_asks_for_every_chip_of_the_slice():
  (job,) = JOBSET["spec"]["replicatedJobs"]
  job = job["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  chips = container["resources"]["limits"]["google.com/tpu"]
  assert container["resources"]["requests"]["google.com/tpu"] == chips
  topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
  sides = [int(side) for side in topology.split("x")]
  total = sides[0] * sides[1]
  assert job["parallelism"] == job["completions"] == total // chips
  assert "cloud.google.com/gke-tpu-accelerator" in pod["nodeSelector"]


# Those of sbatch's manual that the script may use.
DIRECTIVES = {
  "job-name": r"\w+",
  "nodes": r"\d+",
  "ntasks-per-node": r"\d+",
  "gpus-per-node": r"\d+",
  "cpus-per-task": r"\d+",
  "time": r"\d+:\d\d:\d\d",
  "output": r"%x-%j\.log",
  "open-mode": "append",
  "requeue": "",
  "signal": r"TERM@\d+",
}


def test_the_directives_of_slurm():
  lines = SCRIPTS[1].read_text().splitlines()
  found = {}
  for n, line in enumerate(lines):
    if line.startswith("#SBATCH"):
      name, _, value = line.removeprefix("#SBATCH --").partition("=")
      found[name] = value
      # sbatch reads none after the first command.
      assert all(before.startswith("#") for before in lines[:n])
  assert set(found) == set(DIRECTIVES)
  for name, value in found.items():
    assert re.fullmatch(DIRECTIVES[name], value), name
  # A task for each GPU, or one for all of them.
  assert found["ntasks-per-node"] in ("1", found["gpus-per-node"])


def test_what_the_launcher_gives_its_processes():
  flag = "--xla_force_host_platform_device_count=8"
  made = launch._environment({"XLA_FLAGS": f"{flag} --other", "A": "b"}, 2)
  assert made == {
    "A": "b",
    "XLA_FLAGS": "--other",
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "2",
  }


def test_the_launcher_leaves_out_what_is_known():
  known = launch._KNOWN.search
  assert known("[Gloo] Rank 1 is connected to 1 peer ranks.")
  assert known("W1129 1 preemption_notifier.cc:90] SIGTERM caught at")
  told = "kdjax: process 1 of 3 ends too, as process {} did: see the log there"
  assert known(told.format(0))
  assert not known(told.format(2))
  assert not known("kdjax: process 1 of 2: cannot save step 6")


def test_the_launcher_refuses_none(capsys):
  assert launch.main(["launch", "--processes=0", "--", "--workdir=x"]) == 2
  assert "not a positive integer" in capsys.readouterr().err
