"""The same bits every time: seeds and torch settings, put back when done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
from collections.abc import Iterator

import numpy as np
import torch


def mixed_seed(*parts: str | int) -> int:
    """A seed in [0, 2**63) that depends on `parts` only."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds Python, numpy and torch, and restores their states at the end.

    Our own code draws from generators of its own; this is for users' code, which draws from the global ones.
    """
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Lets torch use `count` threads inside an operator; None leaves its choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def deterministic_torch(device: torch.device) -> Iterator[None]:
    """Asks torch for deterministic algorithms; operations that have none warn."""
    if device.type == "cuda":
        # cuBLAS is deterministic with a fixed workspace only, and reads this before its first use
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
