"""The papers' own sums come out: tables of hours, MFU that they imply, caches, scaling laws."""

import importlib.util
from pathlib import Path

import pytest

import deepseek_jax as dsj
from deepseek_jax.planner import papers

ROOT = Path(__file__).parent.parent


def test_v3_costs():
    """Table 1 and section 1: 2,788K hours, 5.576 M$, 180K hours a trillion, 3.7 days on 2,048 GPUs."""
    assert sum(papers.V3_HOURS.values()) == 2_788_000
    money = papers.dollars(papers.V3_HOURS)
    assert money == {"pre-training": 5.328e6, "context extension": 0.238e6, "post-training": 0.01e6}
    assert sum(money.values()) == pytest.approx(5.576e6)
    assert papers.V3_HOURS["pre-training"] == papers.V3_HOURS_PER_TRILLION * papers.V3_TOKENS / 1e12
    assert papers.V3_HOURS_PER_TRILLION / papers.V3_GPUS / 24 == pytest.approx(3.7, abs=0.05)


def test_v3_utilisation():
    v3 = dsj.get_config("deepseek-v3")
    assert dsj.count_params(v3).active == pytest.approx(37e9, rel=0.02)
    plain = papers.implied(v3, papers.V3_HOURS_PER_TRILLION)
    assert plain.tokens_per_second == pytest.approx(1543, abs=1)
    assert plain.mfu == pytest.approx(0.390, abs=0.001)
    assert papers.implied(v3, papers.V3_HOURS_PER_TRILLION, mtp=True).mfu == pytest.approx(0.406, abs=0.001)


def test_v2_against_67b():
    saved = 1 - papers.V2_HOURS_PER_TRILLION / papers.LLM_67B_HOURS_PER_TRILLION
    assert saved == pytest.approx(0.425, abs=0.0005)
    v2, llm = dsj.get_config("deepseek-v2"), dsj.get_config("deepseek-llm-67b")
    of_v2 = papers.implied(v2, papers.V2_HOURS_PER_TRILLION)
    of_llm = papers.implied(llm, papers.LLM_67B_HOURS_PER_TRILLION)
    assert 0.2 < of_v2.mfu < of_llm.mfu < 0.5, "sparse layers keep a GPU less busy"


def test_r1_costs():
    assert sum(papers.R1_HOURS.values()) == 147_000
    assert sum(papers.dollars(papers.R1_HOURS).values()) == 294_000


def test_caches():
    """V2, table 1: MLA's is 9/2 d_h l; and −93.3 % of section 3.2.3, which counts 6 bits against 16."""
    v2, llm = dsj.get_config("deepseek-v2"), dsj.get_config("deepseek-llm-67b")
    assert papers.cache_numbers_per_token(v2) == 34_560 == 9 / 2 * 128 * 60
    assert papers.cache_numbers_per_token(llm) == 194_560 == 2 * 8 * 128 * 95
    assert papers.cache_numbers_per_token(dsj.get_config("deepseek-llm-7b")) == 2 * 32 * 128 * 30
    assert papers.cache_numbers_per_token(dsj.get_config("deepseek-v3")) == 576 * 61
    assert papers.cache_reduction(v2, llm) == pytest.approx(0.822, abs=0.0005)
    quantised = papers.cache_reduction(v2, llm, papers.V2_CACHE_BITS, papers.LLM_67B_CACHE_BITS)
    assert quantised == pytest.approx(0.933, abs=0.0005)


def within_a_digit(value: float, printed: str) -> bool:
    """Whether the value, rounded to the digits of `printed`, is that."""
    number, letter = float(printed[:-1]), printed[-1]
    digits = len(printed[:-1].partition(".")[2])
    return abs(value / {"M": 1e6, "B": 1e9}[letter] - number) <= 0.51 * 10**-digits


@pytest.mark.parametrize(
    ("layers", "width", "n1", "n2", "scale"),
    [
        (8, 512, "25.2M", "77.6M", "352M"),
        (12, 768, "84.9M", "164M", "963M"),
        (24, 1024, "302M", "407M", "3.02B"),
        (24, 2048, "1.21B", "1.42B", "9.66B"),
        (32, 4096, "6.44B", "6.86B", "45.1B"),
        (40, 5120, "12.6B", "13.1B", "85.6B"),
        (80, 8192, "64.4B", "65.3B", "419B"),
    ],
)
def test_model_scales(layers, width, n1, n2, scale):
    """LLM, table 3: vocabulary 102,400, sequences of 4,096."""
    assert within_a_digit(papers.kaplan_scale(layers, width), n1)
    assert within_a_digit(papers.kaplan_scale(layers, width, 102_400), n2)
    assert within_a_digit(papers.model_scale(layers, width, 4096), scale)


@pytest.mark.parametrize(
    ("name", "width", "scale", "rate", "batch", "used_rate", "used_batch"),
    [
        ("deepseek-llm-7b", 4096, 4.2279e10, 4.246e-4, 2252, 4.2e-4, 2304),
        ("deepseek-llm-67b", 8192, 4.9728e11, 3.120e-4, 5043, 3.2e-4, 4608),
    ],
)
def test_scaling_laws_of_hyperparameters(name, width, scale, rate, batch, used_rate, used_batch):
    """What the laws give for the runs that the paper did, 2T tokens; it used figures near them."""
    model = dsj.get_config(name)
    assert model.hidden_size == width
    M = papers.model_scale(model.num_hidden_layers, width, 4096)
    assert pytest.approx(scale, rel=1e-4) == M
    compute = M * 2e12
    assert papers.best_learning_rate(compute) == pytest.approx(rate, rel=1e-3)
    assert papers.best_batch(compute) / 4096 == pytest.approx(batch, rel=1e-3)
    assert used_rate == pytest.approx(rate, rel=0.03) and used_batch == pytest.approx(batch, rel=0.1)


@pytest.mark.parametrize("compute", [1e17, 3e20, 1e24])
def test_scaling_laws_of_sizes(compute):
    """Model and data share the budget: M · D = C."""
    assert papers.best_model(compute) * papers.best_data(compute) == pytest.approx(compute, rel=2e-4)


def test_the_page_of_costs_is_what_its_script_writes():
    path = ROOT / "experiments" / "costs" / "run.py"
    spec = importlib.util.spec_from_file_location("costs_study", path)
    assert spec is not None and spec.loader is not None
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    page = (ROOT / "docs" / "costs.md").read_text()
    assert study.filled_in(page) == page, "run experiments/costs/run.py"
