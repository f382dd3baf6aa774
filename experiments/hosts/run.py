"""One run over several processes, on other meshes and other numbers of processes, killed, hung: always the same run.

    python experiments/hosts/run.py [--kills 4] [--seed 0]

Processes are real, joined over loopback, with virtual CPU devices (tests/fleet.py). Writes results.jsonl beside this file.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import jax

from deepseek_jax.metrics.manifest import git_revision, package_versions

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "tests"))

from fleet import Fleet, corpus, lines, wait_for_step  # noqa: E402

STEPS, CUT = 6, 3
SAVERS = [(2, 2), (4, 1)]  # processes, devices of each; mesh data 2, fsdp 2
READERS = [
    (1, 1, ("--mesh.data", "1")),
    (2, 2, ("--mesh.data", "1", "--mesh.fsdp", "2", "--mesh.tensor", "2")),
    (4, 1, ("--mesh.data", "1", "--mesh.fsdp", "4")),
]
MESH = ("--mesh.data", "2", "--mesh.fsdp", "2")
TIMEOUT = 900


class Study:
    """Runs in one temporary folder, with one compilation cache."""

    def __init__(self, folder: Path):
        self.folder, self.config = folder, corpus(folder, kind="moe", layers=2)
        self.records: list[dict] = []

    def fleet(self, name: str, processes: int, devices: int, words=(), **env: str) -> Fleet:
        """A run in the folder `name`; its digests and rows go beside it."""
        env |= {
            "DIGESTS": str(self.folder / f"{name}.digests"), "ROWS": str(self.folder / f"{name}.rows"),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        words = ["train", self.config, "--run-dir", self.folder / name, *words]
        return Fleet(words, processes, devices, env=env, hosts=processes > 1)

    def run(self, name: str, processes: int, devices: int, words=()) -> None:
        with self.fleet(name, processes, devices, words) as fleet:
            ended = fleet.wait(TIMEOUT)
        assert [code for code, *_ in ended] == [0] * processes, ended

    def losses(self, name: str) -> list[float]:
        return [line["loss"] for line in lines(self.folder / name) if "loss" in line]

    def digests(self, name: str, what: str) -> dict[int, str]:
        found = map(json.loads, (self.folder / f"{name}.digests").read_text().splitlines())
        return {entry["step"]: entry["digest"] for entry in found if entry["what"] == what}

    def rows(self, name: str, processes: int) -> list[dict[str, list[int]]]:
        """The rows of each step, from all processes; a row that several read must be the same."""
        parts = [Path(self.folder / f"{name}.rows.{k}").read_text().splitlines() for k in range(processes)]
        steps = []
        for step in zip(*parts, strict=True):
            joined: dict[str, list[int]] = {}
            for number, row in (pair for part in step for pair in json.loads(part).items()):
                assert joined.setdefault(number, row) == row, (name, number)
            steps.append(joined)
        return steps

    def note(self, **record) -> None:
        self.records.append(record)
        with (HERE / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(record, flush=True)


def largest(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def resharding(study: Study) -> None:
    """Every saver's run, gone on with by every reader: bits, next loss, rows."""
    study.run("whole", 1, 4, MESH)
    whole, rows = study.losses("whole"), study.rows("whole", 1)
    for processes, devices in SAVERS:
        saver = f"saver_{processes}x{devices}"
        study.run(saver, processes, devices, (*MESH, "--steps", str(CUT)))
        assert study.rows(saver, processes) == rows[:CUT]
        study.note(
            what="save", processes=processes, devices=devices, loss_difference=largest(study.losses(saver), whole[:CUT])
        )
        for readers, their_devices, mesh in READERS:
            name = f"{saver}_to_{readers}x{their_devices}"
            shutil.copytree(study.folder / saver, study.folder / name)
            study.run(name, readers, their_devices, (*mesh, "--steps", str(STEPS)))
            ours = study.losses(name)
            study.note(
                what="restore", saved_by=[processes, devices], read_by=[readers, their_devices], mesh=" ".join(mesh),
                bits_equal=study.digests(name, "restored")[CUT] == study.digests(saver, "saved")[CUT],
                next_loss_difference=largest(ours[CUT : CUT + 1], whole[CUT : CUT + 1]),
                last_loss_difference=largest(ours[-1:], whole[-1:]),
                rows_equal=study.rows(name, readers) == rows[CUT:],
            )  # fmt: skip


def kills(study: Study, count: int, draw: random.Random) -> None:
    """kill -9 of one process of two, anywhere; SIGTERM to one; then to the end by the same command."""
    words = (*MESH, "--checkpoint-every", "1")
    study.run("unbroken", 2, 2, words)
    for kill in range(count):
        number, what = draw.randrange(2), "SIGTERM" if kill % 2 else "SIGKILL"
        before = max((line["step"] for line in lines(study.folder / "broken")), default=-1)
        with study.fleet("broken", 2, 2, words, MISHAP="slow") as fleet:
            if before < STEPS - 1:
                wait_for_step(study.folder / "broken", before + 1, TIMEOUT)
            time.sleep(draw.uniform(0, 2))
            fleet.send(number, signal.Signals[what])
            began = time.monotonic()
            codes = [code for code, *_ in fleet.wait(TIMEOUT)]
        study.note(
            what=what, process=number, codes=codes, seconds_to_end=round(time.monotonic() - began, 1), step=before + 1
        )
        if codes == [0, 0]:
            break
        assert what == "SIGKILL" or codes == [75, 75], codes
        assert 0 not in codes, codes
    study.run("broken", 2, 2, words)
    ours, theirs = study.losses("broken"), study.losses("unbroken")
    study.note(what="after kills", losses_equal=ours == theirs, steps=len(ours))


def hang(study: Study) -> None:
    """One process sleeps for ever: both end, with stacks."""
    with study.fleet("hung", 2, 2, (*MESH, "--hang-timeout-s", "60"), MISHAP="sleep:3", MISHAP_PROCESS="1") as fleet:
        ended = fleet.wait(TIMEOUT)
    stacks = ["thread 0x" in text.lower() for _, _, text in ended]
    study.note(what="hang", codes=[code for code, *_ in ended], stacks=stacks)
    assert all(stacks) and all(code not in (0, 75) for code, *_ in ended)
    study.run("hung", 2, 2, MESH)
    study.note(what="after the hang", loss_difference=largest(study.losses("hung"), study.losses("whole")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    (HERE / "results.jsonl").write_text("")
    with tempfile.TemporaryDirectory() as folder:
        study = Study(Path(folder))
        resharding(study)
        kills(study, options.kills, random.Random(options.seed))
        hang(study)
    study.note(
        what="versions", seed=options.seed, jax=jax.__version__, packages=package_versions(), git=git_revision(),
        date=time.strftime("%Y-%m-%d"),
    )  # fmt: skip
    wrong = [
        record for record in study.records
        if not all(record.get(name, True) for name in ("bits_equal", "rows_equal", "losses_equal"))
        or max(record.get("next_loss_difference", 0), record.get("loss_difference", 0)) > 1e-6
    ]  # fmt: skip
    print(f"{len(study.records) - 1} results, wrong: {wrong or 'none'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
