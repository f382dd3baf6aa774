"""Several stages of post-training in one script, as R1 was made (arXiv 2501.12948, section 2).

A stage is a configuration of a verb. Where one of its texts begins with "@name", the folder of the earlier stage of that
name stands there: `init_from="@cold-start"`, `path="@sampling/samples.jsonl"`. What a stage leaves is a folder with its
checkpoint or data, its metrics and a report; a script that is started again goes on in the stage that was cut off.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deepseek_jax import storage
from deepseek_jax.config import require
from deepseek_jax.posttrain.distill import distill
from deepseek_jax.posttrain.distill_config import Distill
from deepseek_jax.posttrain.grpo import grpo
from deepseek_jax.posttrain.grpo_config import GRPO
from deepseek_jax.posttrain.prefer import Prefer, prefer
from deepseek_jax.posttrain.reject import Rejection, reject
from deepseek_jax.posttrain.session import FREE
from deepseek_jax.posttrain.sft import SFT, sft
from deepseek_jax.serialize import check_types, to_dict

_DONE = "stage.json"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the pipeline."""

    name: str
    """Its folder, and what later stages call it: letters, digits, "_" and "-"."""
    run: SFT | GRPO | Prefer | Rejection | Distill

    def __post_init__(self) -> None:
        sound = re.fullmatch(r"[\w-]+", self.name) is not None
        require(sound, "Stage", "name", self.name, "must be made of letters, digits, '_' and '-'")


@dataclass(frozen=True, kw_only=True)
class R1:
    """Stages, in their order. R1-Zero is one of GRPO on the base model; R1 is cold-start SFT, GRPO for reasoning, rejection
    sampling, SFT from the base model, and GRPO over all scenarios; a student is one more SFT."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        require(len(names) > 0 and len(set(names)) == len(names), "R1", "stages", names, "must have names that differ")
        for i, stage in enumerate(self.stages):
            for reference in sorted(_references(stage.run)):
                require(
                    reference in names[:i], f"R1.stages[{i}]", "run", f"@{reference}",
                    f"names no stage before {stage.name!r}: {names[:i]}",
                )  # fmt: skip


@dataclass(frozen=True)
class Pipeline:
    """A finished call of `r1`."""

    run_dir: Any
    reports: dict[str, dict[str, Any]]
    """Of each stage: kind, seconds, figures before and after."""

    def summary(self) -> str:
        """A line a stage, for a person to read."""
        lines = []
        for name, report in self.reports.items():
            figures = ", ".join(f"{k} {_shown(v)}" for k, v in report["figures"].items())
            lines.append(f"{name:16} {report['kind']:10} {report['seconds']:8.1f} s  {figures}")
        return "\n".join([*lines, "", f"report  {self.run_dir / 'report.json'}"])


def r1(config: R1, run_dir: storage.AnyPath, *, progress: bool = True) -> Pipeline:
    """Runs the stages in their order, each in run_dir/<its name>, and writes run_dir/report.json.

    A stage that is done is not run again; one that was cut off goes on, as its own verb does.

    Raises:
        ValueError: a stage that cannot be run, or that was done with another configuration.
        Whatever the stages' verbs raise: Stopped above all.
    """
    check_types(config)
    folder = storage.path(run_dir)
    reports: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(config.stages, 1):
        here = folder / stage.name
        run = _resolved(stage.run, lambda name: str(folder / name))
        wanted = to_dict(stage.run)
        done = here / _DONE
        if done.exists():
            report = json.loads(done.read_text(encoding="utf-8"))
            names = {*wanted, *report["config"]} - {*FREE, "slots", "reward_workers"}
            if changed := sorted(k for k in names if wanted.get(k) != report["config"].get(k)):
                raise ValueError(
                    f"R1.stages[{number - 1}] = {stage.name!r} is done in {here}, with another {', '.join(changed)}: undo "
                    f"that, name the stage otherwise, or start a new run folder"
                )
        else:
            if progress:
                print(f"stage {number} of {len(config.stages)}: {stage.name} ({type(run).__name__})", flush=True)
            began = time.perf_counter()
            figures = _VERBS[type(run)](run, here, progress)
            seconds = time.perf_counter() - began
            report = {"kind": type(run).__name__, "seconds": round(seconds, 1), "figures": figures, "config": wanted}
            storage.write_atomic(done, json.dumps(report, indent=2) + "\n")
        reports[stage.name] = report
    brief = {name: {k: v for k, v in report.items() if k != "config"} for name, report in reports.items()}
    storage.write_atomic(folder / "report.json", json.dumps(brief, indent=2) + "\n")
    return Pipeline(folder, reports)


def _evaluated(run: Any) -> dict[str, Any]:
    """Figures of the first and the last evaluation of a run of post-training."""
    lines = [line["evaluation"] for line in run.metrics if line.get("evaluation")]
    if not lines:
        return {}
    before, after = lines[0], lines[-1]
    return {name: [before.get(name), after[name]] for name in after if isinstance(after[name], int | float)}


def _of_sft(run: Any) -> dict[str, Any]:
    lines = [line["held_out_loss"] for line in run.metrics if "held_out_loss" in line]
    losses = [line["loss"] for line in run.metrics if "loss" in line]
    return {"loss": losses[-1]} | ({"held_out_loss": [lines[0], lines[-1]]} if lines else {})


def _of_rejection(run: Any) -> dict[str, Any]:
    return {name: run.report[name] for name in ("kept", "yield", "problems_kept", "left_out")}


_VERBS: dict[type, Callable[[Any, Any, bool], dict[str, Any]]] = {
    SFT: lambda config, here, progress: _of_sft(sft(config, here, progress=progress)),
    GRPO: lambda config, here, progress: _evaluated(grpo(config, here, progress=progress)),
    Prefer: lambda config, here, progress: _evaluated(prefer(config, here, progress=progress)),
    Distill: lambda config, here, progress: _evaluated(distill(config, here, progress=progress)),
    Rejection: lambda config, here, progress: _of_rejection(reject(config, here, progress=progress)),
}


def _resolved(value: Any, folder_of: Callable[[str], str]) -> Any:
    """The configuration with folders in place of the names of stages."""
    if isinstance(value, str) and value.startswith("@"):
        name, slash, rest = value[1:].partition("/")
        return folder_of(name) + slash + rest
    if isinstance(value, tuple):
        return tuple(_resolved(item, folder_of) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {
            f.name: new
            for f in dataclasses.fields(value)
            if (new := _resolved(old := getattr(value, f.name), folder_of)) != old
        }
        return dataclasses.replace(value, **changed) if changed else value
    return value


def _references(value: Any) -> set[str]:
    """The stages that a configuration names."""
    found: set[str] = set()

    def note(name: str) -> str:
        found.add(name)
        return f"@{name}"

    _resolved(value, note)
    return found


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " → ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
