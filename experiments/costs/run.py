"""The papers' bookkeeping as the code computes it, beside what they print.

    python experiments/costs/run.py

Writes the tables of docs/costs.md between their markers, results.csv, and costs.png, caches.png, laws.png beside this
file. Seconds, no device.
"""

import csv
from pathlib import Path

import deepseek_jax as dsj
from deepseek_jax.planner import papers

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "costs.md"
Row = tuple[str, ...]


def table(head: Row, rows: list[Row]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def v3_table() -> str:
    money = papers.dollars(papers.V3_HOURS)
    rows = [(name, f"{hours / 1e3:,.0f}K", f"{money[name] / 1e6:.3f}M") for name, hours in papers.V3_HOURS.items()]
    total = sum(papers.V3_HOURS.values())
    rows.append(("all", f"{total / 1e3:,.0f}K", f"{sum(money.values()) / 1e6:.3f}M"))
    return table(("V3", "H800 hours", "US dollars at 2 an hour"), rows)


def speed_table() -> str:
    runs = [
        ("deepseek-v3", papers.V3_HOURS_PER_TRILLION, False),
        ("deepseek-v3", papers.V3_HOURS_PER_TRILLION, True),
        ("deepseek-v2", papers.V2_HOURS_PER_TRILLION, False),
        ("deepseek-llm-67b", papers.LLM_67B_HOURS_PER_TRILLION, False),
    ]
    rows = []
    for name, hours, mtp in runs:
        model = dsj.get_config(name)
        got = papers.implied(model, hours, mtp=mtp)
        active = dsj.count_params(model).active / 1e9
        rows.append((
            name + (", with its multi-token module" if mtp else ""), f"{active:.1f}B", f"{hours / 1e3:.1f}K",
            f"{got.tokens_per_second:,.0f}", f"{got.flops_per_second / 1e12:.0f}", f"{got.mfu:.1%}",
        ))  # fmt: skip
    return table(("run", "active", "hours a trillion tokens", "tokens/s a GPU", "TFLOP/s a GPU", "of 989.5"), rows)


def r1_table() -> str:
    money = papers.dollars(papers.R1_HOURS)
    rows = [(name, f"{hours / 1e3:.0f}K", f"{money[name] / 1e3:.0f}K") for name, hours in papers.R1_HOURS.items()]
    rows.append(("all", f"{sum(papers.R1_HOURS.values()) / 1e3:.0f}K", f"{sum(money.values()) / 1e3:.0f}K"))
    return table(("R1", "H800 hours", "US dollars"), rows)


CACHED = ("deepseek-llm-7b", "deepseek-llm-67b", "deepseek-moe-16b", "deepseek-v2-lite", "deepseek-v2", "deepseek-v3")


def cache_table() -> str:
    llm = dsj.get_config("deepseek-llm-67b")
    rows = []
    for name in CACHED:
        model = dsj.get_config(name)
        count = papers.cache_numbers_per_token(model)
        heads = model.attention
        kind = type(heads).__name__
        if kind == "GQA" and heads.num_attention_heads == heads.num_key_value_heads:  # type: ignore[union-attr]
            kind = "MHA"
        rows.append(
            (name, kind, f"{count:,}", f"{2 * count / 1024:.1f}", f"{0.0 - papers.cache_reduction(model, llm):+.1%}")
        )
    v2 = dsj.get_config("deepseek-v2")
    bits = papers.V2_CACHE_BITS, papers.LLM_67B_CACHE_BITS
    count = papers.cache_numbers_per_token(v2)
    six = f"{-papers.cache_reduction(v2, llm, *bits):+.1%}"
    rows.append(("deepseek-v2 at 6 bits", "MLA", f"{count:,}", f"{count * 6 / 8 / 1024:.1f}", six))
    return table(("model", "attention", "numbers a token", "KiB a token", "against 67B"), rows)


def laws_table() -> str:
    rows = []
    for name, used in (("deepseek-llm-7b", (4.2e-4, 2304)), ("deepseek-llm-67b", (3.2e-4, 4608))):
        model = dsj.get_config(name)
        scale = papers.model_scale(model.num_hidden_layers, model.hidden_size, 4096)
        compute = scale * 2e12
        rows.append((
            name, f"{compute:.3g}", f"{papers.best_learning_rate(compute):.3e}", f"{used[0]:.1e}",
            f"{papers.best_batch(compute) / 4096:,.0f}", f"{used[1]:,}",
            f"{papers.best_model(compute):.3g}", f"{scale:.3g}", f"{papers.best_data(compute) / 1e12:.2f}T", "2T",
        ))  # fmt: skip
    head = ("run", "C", "rate", "used", "batch", "used", "M", "used", "D", "used")
    return table(head, rows)


TABLES = {"v3": v3_table, "speed": speed_table, "r1": r1_table, "caches": cache_table, "laws": laws_table}


def filled_in(page: str) -> str:
    """The page with every table between `<!-- NAME -->` and `<!-- end -->` made anew."""
    for name, make in TABLES.items():
        before, begin, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        assert begin and end, f"docs/costs.md has no place for {name}"
        page = f"{before}{begin}{make()}\n{end}{after}"
    return page


def pictures() -> None:
    import numpy as np
    from matplotlib.figure import Figure

    def panel(width: float = 6.5):
        figure = Figure(figsize=(width, 3.2), layout="constrained")
        return figure, figure.subplots()

    figure, axes = panel()
    bars = {f"V3: {name}": hours for name, hours in papers.V3_HOURS.items()}
    bars |= {f"R1: {name}": hours for name, hours in papers.R1_HOURS.items()}
    axes.barh(list(bars), [hours / 1e3 for hours in bars.values()], color="#1f5fa8")
    axes.set_xscale("log")
    axes.set_xlabel("thousand H800 hours (2,000 US dollars each)")
    axes.invert_yaxis()
    figure.savefig(HERE / "costs.png", dpi=90)

    figure, axes = panel()
    sizes = [2 * papers.cache_numbers_per_token(dsj.get_config(name)) / 1024 for name in CACHED]
    axes.barh(list(CACHED), sizes, color="#1f5fa8")
    axes.set_xlabel("KiB of cache a token, 16 bits a number")
    axes.invert_yaxis()
    figure.savefig(HERE / "caches.png", dpi=90)

    figure = Figure(figsize=(9, 3), layout="constrained")
    C = np.logspace(17, 24.3, 60)
    laws = {
        "learning rate": papers.best_learning_rate, "batch, tokens": papers.best_batch,
        "model, FLOPs a token": papers.best_model, "data, tokens": papers.best_data,
    }  # fmt: skip
    for axes, (name, law) in zip(figure.subplots(1, 4), laws.items(), strict=True):
        axes.loglog(C, [law(c) for c in C], color="#1f5fa8")
        axes.axvspan(1e17, 2e19, color="0.9")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("C, FLOPs", fontsize=8)
    figure.savefig(HERE / "laws.png", dpi=90)


def results() -> list[tuple[str, float, float]]:
    """(quantity, the paper's, the code's)."""
    v2, llm, v3 = (dsj.get_config(f"deepseek-{name}") for name in ("v2", "llm-67b", "v3"))
    bits = papers.V2_CACHE_BITS, papers.LLM_67B_CACHE_BITS
    return [
        ("V3: GPU hours", 2.788e6, sum(papers.V3_HOURS.values())),
        ("V3: US dollars", 5.576e6, sum(papers.dollars(papers.V3_HOURS).values())),
        (
            "V3: pre-training hours from hours a trillion",
            2.664e6,
            papers.V3_HOURS_PER_TRILLION * papers.V3_TOKENS / 1e12,
        ),
        ("V3: days a trillion tokens", 3.7, papers.V3_HOURS_PER_TRILLION / papers.V3_GPUS / 24),
        ("V3: active parameters", 37e9, dsj.count_params(v3).active),
        ("V2: hours saved against 67B", 0.425, 1 - papers.V2_HOURS_PER_TRILLION / papers.LLM_67B_HOURS_PER_TRILLION),
        ("R1: GPU hours", 147e3, sum(papers.R1_HOURS.values())),
        ("R1: US dollars", 294e3, sum(papers.dollars(papers.R1_HOURS).values())),
        ("V2: cache saved against 67B, quantised", 0.933, papers.cache_reduction(v2, llm, *bits)),
    ]


def main() -> None:
    rows = results()
    for name, paper, code in rows:
        assert abs(code - paper) <= 0.02 * paper, (name, paper, code)
    with (HERE / "results.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("quantity", "paper", "code"), *rows])
    PAGE.write_text(filled_in(PAGE.read_text()))
    pictures()
    print(f"{len(rows)} figures of the papers, all within 2 %")


if __name__ == "__main__":
    main()
