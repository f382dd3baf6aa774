"""The papers' equations, written out slowly: float64, numpy, one token, head and expert at a time.

This is the truth that the tests hold the library against where no outside implementation exists, so it imports
nothing of the library and no jax. Arrays are indexed, never broadcast over tokens; a product `x @ W` is one vector
times one matrix. Weights come as the library's parameter tree (nested dicts, stacked layers first); configurations
are read by attribute. `tests/test_parity.py` checks it against transformers' golden files.

    attention.py   norms, rope and its scalings, attention with segments, MHA/GQA, MLA expanded and absorbed
    experts.py     SwiGLU, gates, selection, token dropping, the layer of experts
    balance.py     balance losses and the bias update
    model.py       a whole model: blocks, multi-token modules, head
    training.py    cross-entropy, AdamW, clipping, learning-rate schedules
"""
