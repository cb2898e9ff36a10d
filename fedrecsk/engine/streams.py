"""One seed, many independent streams of random numbers, each called by name.

A stream is a function of (seed, name, keys) and nothing else. So adding a random step to a
method does not shift the numbers of another, a round can be replayed from its number alone, and
nothing depends on the order in which chunks or processes ask.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.utils import check_random_state

from fedrecsk.engine.parallel import of_main


@dataclass(frozen=True)
class Streams:
    """Named, independent random generators behind one seed.

    Parameters
    ----------
    seed : int
        Any non-negative integer.

    Examples
    --------
    >>> from fedrecsk.engine.streams import Streams
    >>> a, b = Streams(0).numpy("sampling", 3), Streams(0).numpy("sampling", 3)
    >>> bool(a.random() == b.random())
    True
    """

    seed: int

    @classmethod
    def from_random_state(cls, random_state: int | np.random.RandomState | None) -> Streams:
        """Read an estimator's ``random_state``: an int is the seed, an instance gives one.

        Processes that share a fit take the one that the first of them draws.
        """
        if isinstance(random_state, (int, np.integer)):
            return cls(int(random_state))
        drawn = check_random_state(random_state).randint(np.iinfo(np.int32).max)
        return cls(int(of_main(drawn)))

    def _sequence(self, name: str, keys: tuple[int, ...]) -> np.random.SeedSequence:
        # crc32 and not hash(): Python salts string hashes anew in every process. The number of
        # keys, since trailing zeros would not count otherwise.
        return np.random.SeedSequence((zlib.crc32(name.encode()), len(keys), *keys, self.seed))

    def numpy(self, name: str, *keys: int) -> np.random.Generator:
        """Return the NumPy generator of the stream `name`, `keys`."""
        return np.random.default_rng(self._sequence(name, keys))

    def torch(self, name: str, *keys: int, device: torch.device | None = None) -> torch.Generator:
        """Return the torch generator of the stream `name`, `keys` on `device` (default CPU)."""
        generator = torch.Generator(device=device or torch.device("cpu"))
        generator.manual_seed(int(self._sequence(name, keys).generate_state(1, np.uint64)[0] >> 1))
        return generator

    def key(self, name: str, *keys: int) -> int:
        """Return the 63-bit key of the stream `name`, `keys` for `counter_uniform`."""
        return int(self._sequence(name, keys).generate_state(1, np.uint64)[0] >> 1)


def derived_key(key: int, name: str) -> int:
    """Return a key for another purpose, so that equal counters give unrelated numbers.

    Examples
    --------
    >>> from fedrecsk.engine.streams import derived_key
    >>> derived_key(7, "negatives") == derived_key(7, "shuffle")
    False
    """
    return Streams(key).key(name)


def counter_uniform(key: int, *counters: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in [0, 1) that are a function of a key and integer counters.

    A client's draws must not depend on which other clients share its chunk, its process or its
    device, so they cannot come from one running generator. Hashing (key, user, draw) gives every
    draw its own number anywhere.

    Parameters
    ----------
    key : int
        From `Streams.key`.
    *counters : Tensor of int64
        Broadcast against each other.

    Returns
    -------
    Tensor of float64
        With 53 random bits; the same on every device.

    Notes
    -----
    The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood 2014), once for
    each counter.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.engine.streams import counter_uniform
    >>> users = torch.arange(4)
    >>> whole = counter_uniform(7, users)
    >>> bool((whole[2:] == counter_uniform(7, users[2:])).all())
    True
    """
    # The key goes along as a number: a tensor of it would have to be sent to the device.
    state: int | torch.Tensor = key
    for counter in counters:
        state = _splitmix64(state + (counter + 1) * _GOLDEN_GAMMA)
    assert isinstance(state, torch.Tensor)  # there is a counter
    return (state >> 11).bitwise_and_(_LOW_53_BITS).to(torch.float64).mul_(2.0**-53)


# Odd constants of SplitMix64, as signed 64-bit integers (torch has no unsigned arithmetic).
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_LOW_53_BITS = (1 << 53) - 1


def _splitmix64(z: torch.Tensor) -> torch.Tensor:
    """Scramble int64 values; shifts are masked, since torch's are arithmetic."""
    # In place where nobody else holds the tensor: memory takes longer than the arithmetic.
    z = (z >> 30).bitwise_and_((1 << 34) - 1).bitwise_xor_(z).mul_(_MIX_1)
    z = (z >> 27).bitwise_and_((1 << 37) - 1).bitwise_xor_(z).mul_(_MIX_2)
    return (z >> 31).bitwise_and_((1 << 33) - 1).bitwise_xor_(z)
