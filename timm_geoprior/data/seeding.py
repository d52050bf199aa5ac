"""Randomness as a function of what it is for: a resumed run draws what an uninterrupted one would have drawn."""
import hashlib
import random

import numpy as np
import torch

__all__ = ['generator', 'seed_everything']


def _seed_of(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], 'little') >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator whose seed is a hash of the parts, such as (seed, 'order', epoch)."""
    return torch.Generator().manual_seed(_seed_of(*parts))


def seed_everything(*parts: object) -> None:
    """Seed torch, numpy and random by a hash of the parts; timm's mixup, erasing and drop path draw from these."""
    seed = _seed_of(*parts)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
