"""A small run in a process of its own, with a mishap on order: what test_trouble.py starts, stops and kills.

python trouble.py RUN_DIR CORPUS MISHAP [FIELD=VALUE …]
"""

import dataclasses
import json
import os
import sys
import time


def small_run(corpus, cache, **fields):
    """A dense run whose programs compile in a second or two."""
    import deepseek_jax as dsj
    from deepseek_jax.data.config import DataConfig
    from deepseek_jax.data.sources import TextFiles
    from deepseek_jax.training import MultiStep, RunConfig

    model = dataclasses.replace(dsj.get_config("deepseek-llm-micro"), vocab_size=320, num_hidden_layers=1)
    data = DataConfig(
        sources=(TextFiles(path=str(corpus)),), vocab_size=300, held_out_fraction=0.2, cache_dir=str(cache)
    )
    defaults = dict(
        model=model, data=data, schedule=MultiStep(peak=1e-2, warmup_steps=2), steps=12, batch_size=8, seq_len=16,
        log_every=1, checkpoint_every=4, eval_sequences=4,
    )  # fmt: skip
    return RunConfig(**(defaults | fields))


def mishap(kind):
    """Makes the named thing go wrong: a call that never ends, in Python, stands for one that hangs in C."""
    from deepseek_jax.training import evaluate, loop, step

    def forever(*args, **options):
        print("stuck", flush=True)
        while True:
            time.sleep(0.05)

    if kind == "compile":

        class Stuck:
            lower = forever

        loop.compile_train_step = lambda config, mesh: Stuck()
    elif kind == "evaluate":
        loop.make_evaluation = lambda config, mesh, data: lambda state: forever() if state.step == 6 else {"e": 1.0}
    elif kind == "step":
        loop.place_batch = forever
    elif kind == "slow":  # a step takes long enough to be met by a signal
        place = loop.place_batch
        loop.place_batch = lambda *args: (time.sleep(0.05), place(*args))[1]
    else:
        assert kind == "none", kind
    assert evaluate and step


def main(run_dir, corpus, kind, *fields):
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # one device, quick to compile
    import deepseek_jax as dsj
    from deepseek_jax.cli import main as cli

    mishap(kind)
    values = {name: json.loads(value) for name, value in (field.split("=", 1) for field in fields)}
    config = small_run(corpus, os.path.join(corpus, "..", "cache"), **values)

    class Verb:
        @staticmethod
        def run(words):
            dsj.train(config, run_dir, progress=False)

    cli.VERBS["train"] = ("trouble_verb", "")
    sys.modules["trouble_verb"] = Verb
    return cli.main(["train"])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
