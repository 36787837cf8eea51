"""The order of samples: a pure function of (seed, epoch, position), whatever the number of hosts.

Position p of a run is sample p % n of epoch p // n, so the state of the data is one integer, and a
batch may straddle two epochs without dropping or repeating a sample.
"""

import hashlib

from grain.experimental import index_shuffle


def epoch_seed(seed: int, epoch: int) -> int:
    """A 32-bit seed for one epoch. Hashed: seed + epoch would make epoch 1 of seed 7 epoch 0 of seed 8."""
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def sample_index(position: int, *, num_examples: int, seed: int) -> int:
    """The sample at `position` of an endless training stream; each epoch is a permutation of all."""
    epoch, i = divmod(position, num_examples)
    if num_examples == 1:
        return 0
    return index_shuffle(i, max_index=num_examples - 1, seed=epoch_seed(seed, epoch), rounds=4)
