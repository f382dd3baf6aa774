"""The files of configs/launch and the commands of docs/pods.md: what can be checked of them without their clouds."""

import os
import re
import shlex
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml  # flax and Orbax need it too

import deepseek_jax as dsj
from deepseek_jax.cli.main import VERBS
from deepseek_jax.cli.plan import parser as plan_parser
from deepseek_jax.cli.train import load_config, override, split_hosts
from deepseek_jax.parallel.pipeline import Pipeline

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "configs" / "launch"
DEVICES = {"tpu_vm.sh": 64, "slurm.sbatch": 32, "gke_jobset.yaml": 128, "skypilot.yaml": 16, "pods.md": 64}


def commands(text: str) -> list[list[str]]:
    """The words of every `deepseek-jax VERB …` of a shell text, variables as they stand."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        for start in re.finditer(r"(?:\.venv/bin/)?deepseek-jax (?=[a-z]+ configs/)", line):
            rest = re.split(r"""\s(?:>|\|\||&)|["`]$""", line[start.start() :])[0]
            found.append(shlex.split(rest)[1:])
    return found


def jobset() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def commands_of(name: str) -> list[list[str]]:
    if name == "gke_jobset.yaml":
        [job] = jobset()["spec"]["replicatedJobs"]
        [container] = job["template"]["spec"]["template"]["spec"]["containers"]
        assert container["command"][0] == "deepseek-jax"
        return [container["command"][1:]]
    return commands((ROOT / "docs" / name if name == "pods.md" else LAUNCH / name).read_text())


@pytest.mark.parametrize("name", DEVICES)
def test_commands_are_ours_and_their_meshes_fit(name):
    found = commands_of(name)
    assert found
    for verb, path, *flags in found:
        assert verb in VERBS
        if verb == "plan":
            plan_parser().parse_args([str(ROOT / path), *flags])
            continue
        hosts, rest = split_hosts(verb, flags)
        assert hosts.hosts == "auto"
        assert {"--data.cache-dir", "--data.sources.0.path", "--data.tokenizer"} <= {*rest}
        config, run_dir = override(load_config(ROOT / path), rest, "unset", verb)
        assert run_dir != "unset", "hosts share no default folder"
        degrees = config.mesh.resolved(DEVICES[name])
        shards = degrees["slice"] * degrees["data"] * degrees["fsdp"] * degrees["expert"]
        assert config.piece_size % shards == 0
        assert 1 <= config.piece_size // shards <= 4, "sequences of a device at once"


def test_the_start_on_tpu_vms_does_not_wait_for_the_run(tmp_path):
    """The script with an ssh that waits for whoever holds its streams, as a real one does, and a run that lasts."""
    home, run = tmp_path / "home", tmp_path / "home" / "deepseek_jax" / ".venv" / "bin" / "deepseek-jax"
    run.parent.mkdir(parents=True)
    run.write_text(f"#!/bin/bash\necho $$ > {tmp_path}/pid\nexec sleep 120\n")
    gcloud = tmp_path / "gcloud"
    gcloud.write_text('#!/bin/bash\ncd "$HOME"\ncase "${!#}" in *nohup*) bash -c "${!#}" | cat ;; esac\n')
    for file in (run, gcloud):
        file.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(home), "SOURCE": "x", "BUCKET": "gs://x"}
    subprocess.run(["bash", LAUNCH / "tpu_vm.sh"], env=env, check=True, capture_output=True, timeout=60)
    deadline = time.monotonic() + 30
    while not ((pid := tmp_path / "pid").exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(int(pid.read_text()), signal.SIGTERM)  # it runs still
    assert "{ nohup" in (ROOT / "docs" / "pods.md").read_text()


def test_every_file_is_checked_and_named_in_the_docs():
    assert {file.name for file in LAUNCH.iterdir()} == DEVICES.keys() - {"pods.md"}
    docs = (ROOT / "docs" / "pods.md").read_text()
    assert all(f"configs/launch/{file.name}" in docs for file in LAUNCH.iterdir())


@pytest.mark.parametrize("name", ["tpu_vm.sh", "slurm.sbatch"])
def test_scripts_are_bash(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)


def test_skypilot_has_what_its_schema_knows():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task.keys() <= {"name", "workdir", "num_nodes", "resources", "envs", "file_mounts", "setup", "run"}
    assert task["resources"].keys() <= {"accelerators", "use_spot", "job_recovery", "infra", "image_id", "disk_size"}
    kind, count = task["resources"]["accelerators"].split(":")
    assert kind == "H100" and int(count) * task["num_nodes"] == DEVICES["skypilot.yaml"]
    assert 75 in task["resources"]["job_recovery"]["recover_on_exit_codes"]
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
    for variable in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        assert f"export {variable}=" in task["run"]


def test_jobset_starts_a_pod_a_host_and_a_job_a_slice():
    manifest = jobset()
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] and manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
    [job] = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    x, y, z = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert spec["parallelism"] == spec["completions"] == x * y * z // chips
    assert spec["backoffLimit"] == 0, "the set starts again, not one pod of it"
    assert job["replicas"] * x * y * z == DEVICES["gke_jobset.yaml"]
    assert container["command"][container["command"].index("--mesh.slice") + 1] == str(job["replicas"])
    assert pod["restartPolicy"] == "Never"


def test_slurm_starts_a_task_a_gpu():
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", (LAUNCH / "slurm.sbatch").read_text(), re.M))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert int(options["nodes"]) * int(options["gpus-per-node"]) == DEVICES["slurm.sbatch"]
    assert options["signal"].startswith("TERM@")


@pytest.mark.parametrize(
    ("code", "again"), [(0, 0), (1, 0), (2, 0), (75, 1), (124, 1), (134, 1), (137, 1), (139, 1), (143, 1)]
)
def test_slurm_queues_again_what_may_go_on(code, again, tmp_path):
    for name, does in (("srun", f"exit {code}"), ("scontrol", f"echo $1 >> {tmp_path}/said")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RUN": "r", "CORPUS": "c", "TOKENIZER": "t", "SLURM_JOB_ID": "1"}
    assert subprocess.run(["bash", LAUNCH / "slurm.sbatch"], env=env, check=False).returncode == code
    assert (tmp_path / "said").exists() == bool(again)


def test_what_the_files_say_of_memory():
    """One slice in place of the JobSet's two, and experts across slices."""
    words = commands_of("gke_jobset.yaml")[0]
    pieces = int(words[words.index("--accumulation") + 1])
    assert f"--accumulation {2 * pieces}" in (LAUNCH / "gke_jobset.yaml").read_text()
    run = load_config(ROOT / "configs" / "deepseek_v2_lite.py")
    one, two = (dsj.plan(run, "v5p:4x4x4", "fsdp=64", remat="v3", accumulation=n) for n in (2 * pieces, pieces))
    assert one.fits and not two.fits
    given = dict(mesh="slice=4,fsdp=64,expert=8", remat="full", moments="bfloat16")
    across = "expert_across_slices=True"
    for bounded, less in (((), False), (("expert_buffer_factor=1.5",), True)):
        apart, shared = (
            dsj.plan("deepseek-v3", "v5p-1024", fields=(*bounded, *more), **given).memory.peak
            for more in ((), (across,))
        )
        assert (shared < apart) == less


def test_a_part_that_is_none_is_set_in_the_config_file(capsys):
    """As the README says; where the file has one, its fields are flags."""
    run = load_config(ROOT / "configs" / "deepseek_v2_lite.py")
    words = ["--pipeline.microbatches", "8"]
    with pytest.raises(SystemExit):
        override(run, words, "unset")
    assert "nrecognized" in capsys.readouterr().err
    staged = replace(run, mesh=replace(run.mesh, stage=4), pipeline=Pipeline(microbatches=4))
    assert override(staged, words, "unset")[0].pipeline == Pipeline(microbatches=8)
    assert "a part that is None in the file" in " ".join((ROOT / "README.md").read_text().split())
