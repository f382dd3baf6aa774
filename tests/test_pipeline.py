"""Windows and batches: every token once, shuffled anew each epoch, mixed in exact proportions, shared between
processes, resumed without replay."""

import json
import time

import numpy as np
import pytest

from deepseek_jax.data.pipeline import Mixture, TokenSource, batches, held_out_batches


def test_windows_make_every_token_a_target_once():
    source = TokenSource(np.arange(100, 150, dtype=np.uint16), 8)
    assert len(source) == 6 and source[0]["tokens"].dtype == np.int32
    targets = np.concatenate([source[i]["tokens"][1:] for i in range(len(source))])
    np.testing.assert_array_equal(targets, np.arange(101, 149))
    with pytest.raises(IndexError):
        source[6]


@pytest.mark.parametrize("n", [2, 8, 9, 10, 17, 50])
def test_held_out_windows_cover_every_token_once(n):
    source = TokenSource(np.arange(100, 100 + n, dtype=np.uint16), 8, pad_last=True)
    assert len(source) == -(-(n - 1) // 8), "a window without a target"
    found = list(held_out_batches(source, 4))
    assert all(batch["tokens"].shape == (4, 9) for batch in found)
    tokens_BT = np.concatenate([batch["tokens"] for batch in found])
    real_BT = np.concatenate([batch["segment_ids"] for batch in found]) > 0
    np.testing.assert_array_equal(tokens_BT[:, 1:][real_BT[:, 1:]], np.arange(101, 100 + n))


def test_held_out_batches_end_where_they_are_told():
    source = TokenSource(np.arange(100, dtype=np.uint16), 8, pad_last=True)
    assert len(list(held_out_batches(source, 4, max_batches=2))) == 2
    with pytest.raises(ValueError, match="build it with pad_last=True"):
        held_out_batches(TokenSource(np.arange(100), 8), 4)


def test_segment_ids_count_documents_and_leave_padding_zero():
    stored = np.array([0, 5, 1, 0, 6, 7, 1, 0, 8, 1], np.uint16)  # BOS is 0, EOS is 1
    source = TokenSource(stored, 6, eos_id=1, cross_document_attention=False, pad_last=True)
    assert source[0]["segment_ids"].tolist() == [1, 1, 1, 2, 2, 2, 2]
    assert source[1]["segment_ids"].tolist() == [1, 2, 2, 2, 0, 0, 0]
    assert "segment_ids" not in TokenSource(stored, 6, eos_id=1)[0]


def test_batches_shuffle_each_epoch_anew_and_miss_nothing():
    source = TokenSource(np.arange(1 + 10 * 4), 4)  # 10 windows, known by their first token
    iterator = batches(source, 4, seed=3)
    first = np.concatenate([next(iterator)["tokens"] for _ in range(10)])[:, 0] // 4  # 4 epochs
    epochs = first.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()} | {tuple(range(10))}) == 5
    again = batches(source, 4, seed=3, threads=1, prefetch=1)
    np.testing.assert_array_equal(np.concatenate([next(again)["tokens"] for _ in range(10)])[:, 0] // 4, first)
    other = batches(source, 10, seed=4)
    assert (next(other)["tokens"][:, 0] // 4).tolist() != epochs[0].tolist()


def test_processes_share_one_global_batch():
    source = TokenSource(np.arange(1 + 50 * 4), 4)
    whole = batches(source, 6, seed=0)
    # Batch k of B = 6 is windows 6 k … 6 k + 5; its rows need not lie side by side in a process.
    owned = ((0, 3), (1, 2), (4, 5))
    shares = [batches(source, 6, seed=0, share=lambda k, rows=rows: [6 * k + r for r in rows]) for rows in owned]
    for _ in range(12):
        batch = next(whole)["tokens"]
        for rows, share in zip(owned, shares, strict=True):
            np.testing.assert_array_equal(next(share)["tokens"], batch[list(rows)])
    assert whole.get_state() == shares[2].get_state()


def test_restored_iterator_goes_on_bit_for_bit():
    source = TokenSource(np.random.default_rng(0).integers(0, 300, 2000), 16)
    iterator = batches(source, 8, seed=1)
    for stop in (0, 1, 7, 23):
        while iterator.get_state()["next_index"] < stop:
            next(iterator)
        state = json.loads(json.dumps(iterator.get_state()))
        expected = [next(iterator)["tokens"] for _ in range(5)]
        fresh = batches(source, 8, seed=1)
        next(fresh)  # what was read ahead must not leak through
        fresh.set_state(state)
        for batch in expected:
            np.testing.assert_array_equal(next(fresh)["tokens"], batch)


def test_restoring_replays_nothing():
    reads = []

    class Counting(TokenSource):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    iterator = batches(Counting(np.arange(1000), 8), 4, seed=0, threads=1, prefetch=1)
    iterator.set_state({"next_index": 10_000_000})
    next(iterator)
    assert len(reads) <= 3 * 4


# Mixing


def numbered(*lengths, seq_len=4):
    """Sources whose windows can be told apart: source s begins at s * 100_000, and counts."""
    return [TokenSource(s * 100_000 + np.arange(1 + n * seq_len), seq_len) for s, n in enumerate(lengths)]


def origin(rows):
    """(source, window) of each row of `numbered` sources."""
    return [(int(row[0]) // 100_000, int(row[0]) % 100_000 // 4) for row in rows]


def test_mixture_holds_its_proportions_everywhere():
    hypothesis = pytest.importorskip("hypothesis")
    strategies = hypothesis.strategies
    weights = strategies.lists(strategies.floats(0.001, 1000).map(lambda w: round(w, 3) or 0.1), min_size=1, max_size=5)

    @hypothesis.settings(max_examples=50, deadline=None, database=None)
    @hypothesis.given(weights, strategies.integers(0, 10**12))
    def check(weights, start):
        mixture = Mixture(numbered(*[3] * len(weights)), weights)
        counts = [0] * len(weights)
        for index in range(60):
            number, i = mixture.place(index)
            assert i == counts[number], "a source's windows come in order, none twice, none left out"
            counts[number] += 1
            for share, count in zip(mixture.shares, counts, strict=True):
                assert abs(count - share * (index + 1)) <= len(weights)
        number, i = mixture.place(start)
        assert abs(i - mixture.shares[number] * start) <= len(weights)

    check()


def test_proportions_are_exact_where_grains_own_are_rounded():
    counts = [0, 0, 0]
    mixture = Mixture(numbered(1, 1, 1), [0.3, 0.6, 0.1])
    for index in range(10**7, 10**7 + 1000):
        counts[mixture.place(index)[0]] += 1
    assert counts == [300, 600, 100] and mixture.place(10**7) == (0, 3 * 10**6)


def test_mixed_batches_repeat_each_source_by_its_own_length():
    mixture = Mixture(numbered(5, 40), [1.0, 3.0])
    iterator = batches(mixture, 8, seed=0)
    seen = origin(np.concatenate([next(iterator)["tokens"] for _ in range(20)]))  # 160 rows
    small, large = ([window for source, window in seen if source == s] for s in (0, 1))
    assert (len(small), len(large)) == (40, 120)
    assert all(sorted(small[i : i + 5]) == list(range(5)) for i in range(0, 40, 5)), "8 epochs"
    assert all(sorted(large[i : i + 40]) == list(range(40)) for i in range(0, 120, 40)), "3 epochs"
    assert len({tuple(small[i : i + 5]) for i in range(0, 40, 5)}) > 4
    assert [source for source, _ in seen] == [mixture.place(i)[0] for i in range(160)]
    twins = batches(Mixture(numbered(30, 30), [1, 1]), 60, seed=0)
    orders = origin(next(twins)["tokens"])
    assert [w for s, w in orders if s == 0] != [w for s, w in orders if s == 1], "each source has a seed of its own"


def test_golden_order_of_a_mixture():
    """Resumed runs and fingerprints rely on it: the same with every version."""
    rows = origin(next(batches(Mixture(numbered(5, 40), [1.0, 3.0]), 12, seed=7))["tokens"])
    assert rows == [
        (0, 4),
        (1, 39),
        (1, 9),
        (1, 36),
        (0, 0),
        (1, 31),
        (1, 21),
        (1, 37),
        (0, 3),
        (1, 26),
        (1, 32),
        (1, 4),
    ]


def test_mixed_iterator_is_restored_bit_for_bit_and_at_once():
    mixture = Mixture(numbered(50, 7, 300), [2, 1, 0.5])
    shares = [
        batches(mixture, 6, seed=1, share=lambda k, i=i: range(6 * k + 3 * i, 6 * k + 3 * i + 3)) for i in range(2)
    ]
    whole = batches(mixture, 6, seed=1)
    for _ in range(9):
        joined = np.concatenate([next(share)["tokens"] for share in shares])
        np.testing.assert_array_equal(joined, next(whole)["tokens"])
    assert len(json.dumps(whole.get_state())) < 100
    start = time.monotonic()
    whole.set_state({"next_index": 10**7})
    expected = [mixture.place(6 * 10**7 + row)[0] for row in range(6)]
    assert [source for source, _ in origin(next(whole)["tokens"])] == expected
    assert time.monotonic() - start < 2


def test_every_state_of_a_mixed_iterator_can_be_restored():
    import grain

    class Limited:
        """Seven batches of the endless iterator, as Grain's own check wants them."""

        def __init__(self):
            self.iterator = batches(Mixture(numbered(5, 7), [2, 1]), 3, seed=1)
            self.get_state, self.set_state = self.iterator.get_state, self.iterator.set_state

        def __iter__(self):
            return self

        def __next__(self):
            if self.get_state()["next_index"] == 7:
                raise StopIteration
            return next(self.iterator)

    class Endless:
        def __iter__(self):
            return Limited()

    grain.experimental.assert_equal_output_after_checkpoint(Endless())


def test_mixture_errors():
    for weights in ([1.0], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="weights=.*give each of the 2 sources one greater than 0"):
            Mixture(numbered(1, 1), weights)


# Mistakes


@pytest.mark.parametrize(
    ("error", "make"),
    [
        ("the train split has 8 tokens, .*seq_len=8 needs 9", lambda: TokenSource(np.arange(8), 8, name="train split")),
        ("seq_len=0", lambda: TokenSource(np.arange(8), 0)),
        ("eos_id=None", lambda: TokenSource(np.arange(9), 8, cross_document_attention=False)),
        ("batch_size=0: must be at least 1", lambda: small_batches(0)),
        ("seed=-1", lambda: small_batches(4, seed=-1)),
    ],
)
def test_pipeline_errors(error, make):
    with pytest.raises(ValueError, match=error):
        make()


def small_batches(batch_size, seed=0, **options):
    return batches(TokenSource(np.arange(100), 8), batch_size, seed, **options)
