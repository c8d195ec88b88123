"""Named random streams from one root seed.

Every random draw belongs to a stream named by what it decides (and, where it applies, by round
and client). No stream shares state with another: one method's draws never shift another's, and a
resumed run needs no generator state because every stream can be opened again by name.
"""

import hashlib

import numpy as np


def stream(seed: int, name: str, *keys: int) -> np.random.Generator:
    """Open a stream.

    Args:
        seed: root seed.
        name: what the draws decide, e.g. "init", "cohort", "batches".
        keys: non-negative integers that select a sub-stream, e.g. round and client.
    """
    label = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.default_rng(np.random.SeedSequence([seed, label, *keys]))
