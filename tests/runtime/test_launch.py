"""The launchers: checked by their own tools, dry, with a simulated scheduler, and with real processes."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from running import HANGS, ROOT, TOY, environment, free_port, wait_for_step, wait_until

from vpae_jax.train.metrics import read_metrics
from vpae_jax.train.newest import latest

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
CONFIG, WORKDIR = "configs/phase1.py:tiny", "runs/a b"
SCHEMA = json.loads(Path(__file__).with_name("jobset.schema.json").read_text())


def launch(name: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    command = [str(LAUNCH / name), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment(**settings), capture_output=True, text=True, timeout=HANGS, check=False
    )


def dry(name: str, *arguments: str, **settings: str) -> str:
    result = launch(name, *arguments, "--dry-run", **settings)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return result.stdout


def program(folder: Path, text: str, name: str = "program") -> Path:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_and_shellcheck_find_nothing(script):
    subprocess.run(["bash", "-n", script], check=True)
    # Beside the interpreter when its environment is not active.
    tool = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert tool, "pip install -r requirements-dev.txt"
    found = subprocess.run([tool, "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_every_launcher_ends_in_the_same_line():
    line = dry("run.sh", CONFIG, WORKDIR, "--config.steps=3")
    assert shlex.split(line) == [
        *("python", "-m", "vpae_jax.main", f"--config={CONFIG}", f"--workdir={WORKDIR}", "--config.steps=3")
    ]
    assert dry("local.sh", CONFIG, WORKDIR, "--config.steps=3") == line
    end = ["launch/run.sh", CONFIG, WORKDIR, "--config.steps=3"]
    assert shlex.split(dry("slurm.sh", CONFIG, WORKDIR, "--config.steps=3"))[-4:] == end
    pod = shlex.split(dry("tpu_pod.sh", CONFIG, WORKDIR, "--config.steps=3", TPU="t", ZONE="z"))
    assert pod[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "t"]
    assert "--worker=all" in pod and "--zone=z" in pod
    remote = shlex.split(pod[-1].removeprefix("--command="))
    assert remote[-5:] == [*end, "--detect_cluster"]


def test_local_processes_share_the_gpus_out():
    lines = [shlex.split(line) for line in dry("local.sh", CONFIG, WORKDIR, PROCESSES="2", GPUS="8").splitlines()]
    assert [line[-3:] for line in lines] == [["launch/run.sh", CONFIG, WORKDIR]] * 2
    assert [next(word for word in line if "DEVICE_IDS" in word) for line in lines] == [
        "JAX_LOCAL_DEVICE_IDS=0,1,2,3",
        "JAX_LOCAL_DEVICE_IDS=4,5,6,7",
    ]
    refused = launch("local.sh", CONFIG, WORKDIR, "--dry-run", PROCESSES="3", GPUS="8")
    assert refused.returncode == 2 and refused.stderr.startswith("error: GPUS is 8, expected a multiple of PROCESSES")


def test_processes_of_several_hosts_are_counted_through():
    settings = {"PROCESSES": "2", "GPUS": "2", "HOSTS": "3", "HOST": "2", "COORDINATOR": "first", "PORT": "7"}
    lines = [shlex.split(line) for line in dry("local.sh", CONFIG, WORKDIR, **settings).splitlines()]
    assert [line[1:5] for line in lines] == [
        [
            "JAX_COORDINATOR_ADDRESS=first:7",
            "JAX_NUM_PROCESSES=6",
            f"JAX_PROCESS_ID={i}",
            f"JAX_LOCAL_DEVICE_IDS={i - 4}",
        ]
        for i in (4, 5)
    ]
    alone = shlex.split(dry("local.sh", CONFIG, WORKDIR, **{**settings, "PROCESSES": "1", "GPUS": "0"}))
    assert alone[1:4] == ["JAX_COORDINATOR_ADDRESS=first:7", "JAX_NUM_PROCESSES=3", "JAX_PROCESS_ID=2"]


def test_bad_input_of_one_local_process_is_the_status_of_all(tmp_path):
    fake = program(tmp_path, "[[ $JAX_PROCESS_ID == 0 ]] && exit 2; exit 75")
    settings = {"PYTHON": str(fake), "PROCESSES": "2", "GPUS": "0", "RETRIES": "0"}
    assert launch("local.sh", CONFIG, str(tmp_path / "run"), **settings).returncode == 2


def test_slurm_starts_a_process_for_each_gpu_and_leaves_time_for_an_update():
    text = (LAUNCH / "slurm.sh").read_text()
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if "#SBATCH" in line
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
    assert options["signal"] == "B:TERM@1800"
    assert "--cpu-bind=none" in shlex.split(dry("slurm.sh", CONFIG, WORKDIR))


def test_local_processes_share_a_secret_that_no_command_line_shows(tmp_path):
    tell = f'echo "$VPAE_SECRET" > {tmp_path}/$JAX_PROCESS_ID; [[ $(ps -o args= -p $$) != *$VPAE_SECRET* ]]'
    for _ in range(2):
        settings = {"PYTHON": str(program(tmp_path, tell)), "PROCESSES": "2", "GPUS": "0", "RETRIES": "0"}
        result = launch("local.sh", CONFIG, str(tmp_path / "run"), **settings)
        assert result.returncode == 0, result.stdout
        secrets = {(tmp_path / index).read_text() for index in "01"}
        assert len(secrets) == 1 and len(secrets.pop().strip()) == 32


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_the_jobset_is_one(kind):
    text = dry(
        "gke.sh",
        kind,
        CONFIG,
        "/data/it's",
        "--config.steps=3",
        IMAGE="registry/vpae_jax:1",
        HOSTS="4",
        NAME="a",
        GRACE="900",
    )
    document = yaml.safe_load(text)
    jsonschema.validate(document, SCHEMA)
    (job,) = document["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == 4
    assert job["template"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 900
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert (
        container["command"] == [{"tpu": "launch/run.sh", "gpu": "launch/local.sh"}[kind]]
        and container["image"] == "registry/vpae_jax:1"
    )
    end = ["--detect_cluster"] if kind == "tpu" else []
    assert container["args"] == [CONFIG, "/data/it's", "--config.steps=3", *end]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    if kind == "gpu":  # Kubernetes names a pod JOBSET-JOB-0-INDEX.JOBSET
        assert variables["COORDINATOR"] == f"a-{job['name']}-0-0.a" and len(variables["VPAE_SECRET"]) == 32
        assert (variables["HOSTS"], variables["PROCESSES"], variables["GPUS"]) == ("4", "8", "8")
    volumes = {v["name"] for v in job["template"]["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert "<" not in text


@pytest.mark.parametrize("name", ["run.sh", "local.sh", "slurm.sh", "tpu_pod.sh", "gke.sh"])
def test_missing_arguments_are_one_line(name):
    result = launch(name)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")


def test_a_failure_is_tried_again_until_it_works(tmp_path):
    """Twice ended by another's loss, then finished."""
    fake = program(
        tmp_path,
        f'echo x >> {tmp_path}/tries; mkdir -p {tmp_path}/run/model; [ "$(wc -l < {tmp_path}/tries)" = 3 ] || '
        f"exit 75; touch {tmp_path}/run/model/model_index.json",
    )
    result = launch("run.sh", CONFIG, str(tmp_path / "run"), PYTHON=str(fake), BACKOFF="1", JAX_PROCESS_ID="7")
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines() == [
        f"[7] status 75; starting again in {pause} s ({attempt} of 5)" for attempt, pause in ((1, 1), (2, 2))
    ]
    assert (tmp_path / "run" / "logs" / "process-7.log").read_text().count("starting again") == 2


def test_bad_input_is_not_tried_again_and_others_not_for_ever(tmp_path):
    for status, tries in ((2, 1), (1, 3)):
        log = tmp_path / f"tries{status}"
        fake = program(tmp_path, f"echo x >> {log}; exit {status}", f"fails{status}")
        result = launch("run.sh", CONFIG, str(tmp_path / "run"), PYTHON=str(fake), BACKOFF="0", RETRIES="2")
        assert result.returncode == status and len(log.read_text().splitlines()) == tries


@pytest.mark.parametrize(("unfinished", "status"), [("", 0), ("75", 75)])
def test_sigterm_is_handed_on_and_an_unfinished_run_says_so(tmp_path, unfinished, status):
    fake = program(tmp_path, f"trap 'echo saved; exit 0' TERM; touch {tmp_path}/up; while :; do sleep 0.1; done")
    settings = environment(PYTHON=str(fake), UNFINISHED=unfinished)
    command = [str(LAUNCH / "run.sh"), CONFIG, str(tmp_path / "run")]
    running = subprocess.Popen(command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, text=True)
    wait_until((tmp_path / "up").exists, [running])
    running.send_signal(signal.SIGTERM)
    out, _ = running.communicate(timeout=HANGS)
    assert running.returncode == status
    assert out.strip().endswith("saved")


SRUN = """
# Two tasks on a node, or on two of the same name, as SLURM would start them.
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=@ SLURM_STEP_NUM_TASKS=2
tasks=()
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$((i * (2 - @))) "$@" & tasks+=($!); done
trap 'kill -TERM "${tasks[@]}"' TERM
status=0
for task in "${tasks[@]}"; do
  while :; do wait "$task"; ended=$?; kill -0 "$task" 2>/dev/null || break; done
  [ $ended = 0 ] || status=$ended
done
exit $status
"""


def simulated_slurm(folder: Path, nodes: int, steps: int, pause: float) -> dict[str, str]:
    """A scheduler that has only srun and scontrol, and the toy in place of the main program."""
    tools = folder / "tools"
    tools.mkdir(parents=True)
    program(tools, SRUN.replace(" @)", f" {nodes})").replace("=@", f"={nodes}"), "srun")
    program(tools, f'echo "$@" >> {folder}/scontrol.log', "scontrol")
    toy = program(tools, f"exec {sys.executable} {TOY} {folder}/run {steps} fsdp {pause}", "toy")
    job = {"SLURM_JOB_ID": "4242", "SLURM_SUBMIT_DIR": str(ROOT), "VPAE_PORT": str(free_port()), "RETRIES": "0"}
    return {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(toy), **job}


@pytest.mark.long
def test_slurms_variables_make_one_run_of_two_tasks_on_a_node(tmp_path):
    result = launch("slurm.sh", CONFIG, str(tmp_path / "run"), **simulated_slurm(tmp_path, 1, 6, 0))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "[0] ended at step 6 of 6" in result.stdout
    assert "[1] ended" not in result.stdout, "the first process alone speaks"
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert {file.name for file in (tmp_path / "run" / "logs").iterdir()} == {"process-0.log", "process-1.log"}


@pytest.mark.long
def test_a_slurm_job_that_is_stopped_saves_and_queues_again(tmp_path):
    settings = environment(**simulated_slurm(tmp_path, 2, 100_000, 0.05))
    command = [str(LAUNCH / "slurm.sh"), CONFIG, str(tmp_path / "run")]
    running = subprocess.Popen(command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, text=True)
    wait_for_step(tmp_path / "run", 1, [running])
    running.send_signal(signal.SIGTERM)
    out, _ = running.communicate(timeout=HANGS)
    assert running.returncode == 0, out
    last = read_metrics(tmp_path / "run")[-1]["step"]
    assert f"[0] ended at step {last} of 100000" in out
    assert latest(tmp_path / "run").step == last
    assert (tmp_path / "scontrol.log").read_text() == "requeue 4242\n"


@pytest.mark.long
def test_phase_two_through_the_launcher_on_two_processes_has_the_losses_of_one(tmp_path):
    options = [
        *("--config.steps=3", "--config.checkpoint_every=3", "--config.log_every=1", "--config.sample_every=0"),
        *("--config.batch_size=4", "--config.data.clips=8", "--config.guard.enabled=False", "--config.mesh.data=2"),
        *("--config.method.init=pretrained", "--config.method.disc_warmup=1", "--config.method.disc_updates=1"),
        "--config.model.remat=none",
    ]
    common = {"PYTHON": sys.executable, "RETRIES": "0", "PORT": str(free_port()), "GPUS": "0"}
    for name, processes, devices in (("one", 1, 2), ("two", 2, 1)):
        folder = tmp_path / name / "phase2"
        settings = environment(devices, PROCESSES=str(processes), **common)
        command = [str(LAUNCH / "local.sh"), "configs/phase2.py", str(folder), *options]
        result = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        assert (folder / "model" / "model_index.json").is_file()
        assert "model directory: " in result.stdout
    one, two = (read_metrics(tmp_path / name / "phase2") for name in ("one", "two"))
    assert [record["step"] for record in one] == [1, 2, 3]
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"seconds_per_step", "data_wait"}:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), name
