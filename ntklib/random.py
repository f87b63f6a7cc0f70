"""Random streams that are functions of a seed and of where they are used, so that nothing has to be remembered."""

import zlib

import numpy as np
import torch


def stream(seed: int, *where: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """Return the random generator of one use of a seed, for example ``stream(seed, "batches", epoch)``.

    Streams of different seeds or uses are independent (NumPy's ``SeedSequence``), and a stream can be made again at any time:
    an interrupted run needs no stored generator state to go on with the same numbers.

    Args:
        seed: The seed of the run, a non-negative integer.
        where: Names and counters of the use.
        device: Device of the generator.
    """
    if seed < 0:
        msg = f"A seed must be a non-negative integer. Got {seed}."
        raise ValueError(msg)
    words = [w if isinstance(w, int) else zlib.crc32(w.encode()) for w in where]
    state = np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))  # torch takes 63 bits
