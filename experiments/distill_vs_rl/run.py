"""The R1 pipeline on a small V3-style model, then a dense student by distillation and by RL (R1, sections 2 and 4.1).

    python experiments/distill_vs_rl/run.py --size gpu --out results      # minutes on one H100
    python experiments/distill_vs_rl/run.py --size micro                  # a test of the script, no more

results.json is written anew after each model, so that a run that is cut off leaves what it has. The same command goes on
in the folder that it is given (--folder). With --together the student's base, its RL and the reward model run in a second
process beside the teacher (the default of the size gpu, where both share the GPU).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BEGAN = float(os.environ.get("DISTILL_VS_RL_BEGAN", time.time()))


def say(text: str) -> None:
    """A line with the seconds since the beginning and the process's own processor time."""
    print(f"[{time.time() - BEGAN:6.1f} s] {text}", flush=True)


def pretrain(model: Any, how: Any, size: Any, places: Any, folder: Path, seed: int) -> dict[str, Any]:
    """A base model, up to the gate or the end of its budget; figures."""
    import deepseek_jax as dsj
    from deepseek_jax.models.counts import count_params

    note = folder / "base.json"
    if note.exists():
        return json.loads(note.read_text())
    from sizes import base_run

    config = base_run(size, model, how, places.data, seed)
    began = time.time()
    looked: list[float] = []
    figures: dict[str, Any] = {"params": count_params(model).total, "active": count_params(model).active}

    def until(state: Any, step: int) -> bool:
        figures.update(step=step, **gate(model, state, folder, places, size, seed, step))
        looked.append(time.time())
        say(f"{folder.name}: {figures}")
        return figures["right_with_steps"] >= how.gate or looked[-1] - looked[0] > how.seconds

    run = dsj.train(config, folder, until=until, progress=False)
    lines = [line for line in run.metrics if "tokens_per_second" in line]
    figures |= {
        "gated": figures["right_with_steps"] >= how.gate, "loss": lines[-1]["loss"],
        "tokens_per_second": lines[-1]["tokens_per_second"], "seconds": round(time.time() - began, 1),
    }  # fmt: skip
    note.write_text(json.dumps(figures))
    return figures


def gate(model: Any, state: Any, folder: Path, places: Any, size: Any, seed: int, step: int) -> dict[str, float]:
    """Of answers at temperature 1 to problems of the train split: which share writes steps, and how many of those are
    right."""
    from corpus import writes_steps
    from stages import problems

    from deepseek_jax.data.tokenizer import load_tokenizer
    from deepseek_jax.posttrain.policy import variables_of
    from deepseek_jax.posttrain.prompts import Problems, Prompter
    from deepseek_jax.posttrain.rewards import accuracy

    sampler = sampler_of(model, Prompter.of(load_tokenizer(folder), None), size.slots)
    sampler.load(variables_of(state.params, state.router))
    asked, _ = sampler.draw(Problems(problems(places), "train", seed), size.slots)
    completions = sampler.complete(asked, 1, f"gate/{step}", temperature=1.0)
    right = [accuracy(c.problem, c.text) for c in completions if writes_steps(c.text)]
    return {
        "writes_steps": round(len(right) / len(completions), 3),
        "right_with_steps": round(sum(right) / len(right), 3) if len(right) >= 10 else 0.0,
    }


def sampler_of(model: Any, prompter: Any, slots: int) -> Any:
    """The sampler that GRPO's are like, so that its programs are theirs."""
    from sizes import ANSWER, PROMPT

    import deepseek_jax as dsj
    from deepseek_jax.posttrain.sampler import Sampler

    return Sampler(dsj.DeepSeek(model), prompter, max_prompt_tokens=PROMPT, max_new_tokens=ANSWER, slots=slots)


@cache
def test_problems(data: str, seed: int, count: int) -> list[Any]:
    """Held-out problems: `count` of each part, then as many questions without a reference."""
    from stages import MATHS

    from deepseek_jax.posttrain.prompts import Part, ProblemFile, Problems, replace

    paths = {**{name: f"{data}/problems/{name}.jsonl" for name in MATHS}, "remarks": f"{data}/remarks.jsonl"}
    return [
        replace(p, source=part.name)
        for part in (Part(name=name, problems=ProblemFile(path=path)) for name, path in paths.items())
        for p in Problems(part.problems, "test", seed).take(min(count, 150) if part.name == "remarks" else count)
    ]


def evaluate(name: str, folder: Path, template: str, size: Any, places: Any, **more: Any) -> dict[str, Any]:
    """A row of the table: greedy answers to held-out problems. Kept in rows/<name>.json."""
    path = places.rows / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    import numpy as np
    from corpus import judged, writes_steps
    from stages import MATHS

    from deepseek_jax.parallel.mesh import MeshConfig, make_mesh, use_mesh
    from deepseek_jax.posttrain.begin import open_start
    from deepseek_jax.posttrain.common import From
    from deepseek_jax.posttrain.prompts import Prompter
    from deepseek_jax.posttrain.rewards import accuracy, language_share

    began = time.time()
    mesh = make_mesh(MeshConfig())
    with use_mesh(mesh):
        start = open_start(From(init_from=str(folder), template=template, verify_checkpoints="off"), mesh)
        sampler = sampler_of(start.model.config, Prompter.of(start.tokenizer, start.template), size.slots)
        sampler.load(start.load())
        asked = test_problems(str(places.data), 0, size.test)
        answers = sampler.complete(asked, 1, "test", temperature=0.0)
    row: dict[str, Any] = {"model": name, "template": template, "accuracy": {}}
    maths = [c for c in answers if c.problem.source in MATHS]
    for part in (*MATHS, "all"):
        right = [accuracy(c.problem, c.text) for c in maths if part in ("all", c.problem.source)]
        row["accuracy"][part] = [int(sum(right)), len(right), *wilson(sum(right), len(right))]
    spoken = [c.text.replace("\\boxed", "") for c in maths if writes_steps(c.text)]
    row |= {
        "tokens": float(np.mean([len(c.generation.tokens) for c in maths])),
        "cut_off": float(np.mean([c.truncated for c in maths])),
        "writes_steps": len(spoken) / len(maths),
        "english": float(np.mean([language_share(text, "en") for text in spoken])) if spoken else None,
    }
    said = [judged(c.problem.prompt, c.text) for c in answers if c.problem.source == "remarks"]
    row |= {"remarks": len(said), "true": sum(t for t, _ in said), "full": sum(f for _, f in said)}
    row |= {"shown": [[c.problem.prompt, c.text] for c in answers[:: max(len(answers) // 6, 1)]], **more}
    row["evaluation_seconds"] = round(time.time() - began, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row, ensure_ascii=False))
    right, count, low, high = row["accuracy"]["all"]
    say(f"{name}: {right} of {count} right ({low:.3f} to {high:.3f}), {row['tokens']:.1f} tokens, {row['accuracy']}")
    return row


def wilson(right: float, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson)."""
    z = 1.96
    p, n = right / count, count
    middle, half = p + z * z / (2 * n), z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5
    return round((middle - half) / (1 + z * z / n), 4), round((middle + half) / (1 + z * z / n), 4)


def run_stages(stages: Any, folder: Path, out: "Results", size: Any, places: Any) -> None:
    """Stage after stage by `dsj.r1`, with a row of the table after each that leaves a policy."""
    import deepseek_jax as dsj
    from deepseek_jax.posttrain.reject import Rejection

    for number, stage in enumerate(stages, 1):
        if (out.notes / f"stage.{stage.name}.json").exists():
            continue
        say(f"stage {stage.name}")
        report = dsj.r1(dsj.R1(stages=stages[:number]), folder, progress=False).reports[stage.name]
        say(f"stage {stage.name}: {report['seconds']} s, {report['figures']}")
        if stage.name == "zero-samples":
            out.note("cold", cold_start(places, size, folder / stage.name))
        elif not isinstance(stage.run, Rejection) and stage.name != "reward-model":
            template = "none" if stage.name in ("r1-zero", "student-rl") else "r1"
            evaluate(stage.name, folder / stage.name, template, size, places, seconds=report["seconds"])
        brief = {k: v for k, v in report.items() if k != "config"} | {"curve": curve(folder / stage.name)}
        out.note(f"stage.{stage.name}", brief)
        out.write()


def curve(folder: Path) -> list[dict[str, float]]:
    """Reward and length by step of a run of reinforcement learning."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    names = ("step", "reward", "accuracy", "language", "model", "length_mean", "entropy", "kl", "rollout_seconds",
             "update_seconds")  # fmt: skip
    return [{k: round(line[k], 4) for k in names if k in line} for line in lines if "reward" in line]


def cold_start(places: Any, size: Any, folder: Path) -> dict[str, int]:
    """R1-Zero's right answers with steps in English, as thoughts and answer, filled up with written ones."""
    from corpus import write_jsonl, writes_steps

    rows = []
    for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        user, answer = (row := json.loads(line))["messages"]
        before, box, content = answer["content"].partition("\\boxed{")
        if writes_steps(before) and box + content.strip() == f"\\boxed{{{row['answer']}}}":
            said = {"role": "assistant", "content": box + content.strip(), "reasoning_content": before.strip()}
            rows.append({"messages": [user, said]})
    sampled = len(rows)
    written = (places.data / "cold.jsonl").read_text(encoding="utf-8").splitlines()[: max(size.cold - sampled, 0)]
    rows += [json.loads(line) for line in written]
    write_jsonl(folder / "cold.jsonl", rows)
    return {"sampled": sampled, "written": len(written)}


class Results:
    """What is known so far; each process has its own notes, and results.json joins them."""

    def __init__(self, folder: Path, out: Path, facts: dict[str, Any]):
        self.notes, self.out, self.facts = folder / "notes", out, facts
        self.rows = folder / "rows"
        for path in (self.notes, out):
            path.mkdir(parents=True, exist_ok=True)

    def note(self, name: str, value: Any) -> None:
        (self.notes / f"{name}.json").write_text(json.dumps(value, ensure_ascii=False))

    def write(self) -> None:
        from table import markdown

        notes = {path.stem: json.loads(path.read_text()) for path in sorted(self.notes.glob("*.json"))}
        stages = {name.removeprefix("stage."): notes.pop(name) for name in list(notes) if name.startswith("stage.")}
        rows = [json.loads(path.read_text()) for path in self.rows.glob("*.json")]
        results = {
            **self.facts, **notes, "seconds": round(time.time() - BEGAN, 1), "stages": stages,
            "rows": {row["model"]: row for row in rows},
        }  # fmt: skip
        temporary = self.out / f"results.json.{os.getpid()}"
        temporary.write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n")
        temporary.replace(self.out / "results.json")
        (self.out / "table.md").write_text(markdown(results))


def student_alone(size: Any, places: Any, seed: int, out: Results) -> None:
    """The dense model's base, the judge of remarks, and RL on the student."""
    from sizes import student_model
    from stages import alone_stages

    figures = pretrain(student_model(size), size.student, size, places, places.student_base, seed)
    out.note("student_base", figures)
    evaluate("student-base", places.student_base, "none", size, places, seconds=figures["seconds"])
    run_stages(alone_stages(places, size, seed), places.student, out, size, places)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("gpu", "cpu", "micro"), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for data and checkpoints; by default runs/distill_vs_rl/SIZE-SEED")
    parser.add_argument("--out", type=Path, help="for results.json and table.md; by default the folder")
    parser.add_argument("--together", action=argparse.BooleanOptionalAction, help="use a second process")
    parser.add_argument("--only", choices=("all", "bases", "student"), default="all", help="bases: pre-training alone")
    options = parser.parse_args()
    folder = (options.folder or Path("runs/distill_vs_rl") / f"{options.size}-{options.seed}").absolute()
    out_folder = (options.out or folder).absolute()
    together = options.size == "gpu" if options.together is None else options.together
    if options.size != "gpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    elif together:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.4")
    folder.mkdir(parents=True, exist_ok=True)

    import jax
    from corpus import prepare
    from sizes import SIZES, base_run, student_model, teacher_model
    from stages import Places, taught_stages, teacher_stages

    # A program that is compiled for a second run in this process is found again.
    jax.config.update("jax_compilation_cache_dir", str(folder / f"xla-{options.only}"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(1)
    )  # outside of a stage, which takes it by itself: see to `finally`
    size, places, seed = SIZES[options.size], Places(folder), options.seed
    note = places.data / "data.json"
    if not note.exists():
        facts = prepare(places.data, size.documents, size.problems, seed)
        note.write_text(json.dumps(facts))
    facts = {"size": options.size, "seed": seed, "data": json.loads(note.read_text()), "jax": jax.__version__,
             "device": jax.devices()[0].device_kind, "together": together}  # fmt: skip
    say(str(facts))
    out = Results(folder, out_folder, facts)
    if options.only == "student":
        student_alone(size, places, seed, out)
        return
    beside = None
    if together:
        from deepseek_jax.training.begin import load_data

        # Tokenizer and tokens, before two processes want them.
        load_data(base_run(size, teacher_model(size), size.teacher, places.data, seed), places.data, progress=False)
        say("data is encoded")
        again = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder), "--out", str(out_folder)]
        environment = {**os.environ, "DISTILL_VS_RL_BEGAN": str(BEGAN)}
        beside = subprocess.Popen([*again, "--only", "student"], env=environment)
    try:
        figures = pretrain(teacher_model(size), size.teacher, size, places, places.teacher_base, seed)
        out.note("teacher_base", figures)
        if options.only == "bases":
            pretrain(student_model(size), size.student, size, places, places.student_base, seed)
            return
        evaluate("base", places.teacher_base, "none", size, places, seconds=figures["seconds"])
        out.write()
        stages = teacher_stages(places, size, seed)
        run_stages(stages[:-1], places.teacher, out, size, places)
        if beside is None:
            student_alone(size, places, seed, out)
        elif beside.wait() != 0:
            raise SystemExit("the student's process failed")
        taught = taught_stages(places, size, seed)
        run_stages(taught[:1], places.student, out, size, places)
        run_stages(stages, places.teacher, out, size, places)
        run_stages(taught, places.student, out, size, places)
    finally:
        if beside is not None and beside.poll() is None:
            beside.terminate()
            beside.wait()
        out.write()
    print((out_folder / "table.md").read_text())


if __name__ == "__main__":
    main()
