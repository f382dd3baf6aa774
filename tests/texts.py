"""Small documents for the tests of the data room."""

import hashlib
import random
from collections.abc import Iterable

from deepseek_jax.data.corpus import Document


def make_documents(n: int, seed: int = 0) -> list[Document]:
    """n different documents of 200 to 500 bytes of code-like text."""
    rng = random.Random(seed)
    words = ["def", "return", "value", "self", "index", "for", "in", "range", "None", "import"]
    return [
        Document(f"{i}.py", f"# {seed} {i}\n" + " ".join(rng.choice(words) for _ in range(rng.randint(40, 90))))
        for i in range(n)
    ]


def content_hash(documents: Iterable[Document]) -> str:
    """As `Scan.content_hash`."""
    return hashlib.blake2b(b"".join(document.digest for document in documents), digest_size=16).hexdigest()
