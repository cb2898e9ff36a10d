"""Sums of which the server learns the result and none of the terms.

The protocol of Bonawitz et al. ("Practical Secure Aggregation for Privacy-Preserving Machine
Learning", CCS 2017) for a server that is curious but follows it. All arithmetic is on integers
modulo a power of two. For clients 1 ... n with vectors x_i:

    keys      every client draws a secret and a seed, and sends the public key of the secret
    shares    it cuts both into Shamir shares, one for each client, which the server hands on;
              any `threshold` of them give the secret back, fewer say nothing
    input     it sends  x_i + PRG(seed_i) + Σ_{j>i} PRG(s_ij) - Σ_{j<i} PRG(s_ij)
              where s_ij follows from its secret and j's public key, as from j's and its own
    unmasking of every client that has sent this the others give the shares of its seed, and of
              every one that has vanished those of its secret, never both; the server takes
              what is left of the masks off the sum

`masked_sum` does all of this, with Diffie-Hellman keys, shares and masks, in one process. It works
for tests and small cohorts: its work grows with the square of the clients. `ring_sum` is the sum
that it amounts to, bit for bit. What is simulated is the arithmetic and its cost and not the
security: keys are drawn from a seeded generator and live in the integers modulo 2^255 - 19, where
a real client would use a curve of the same size and encrypt the shares it hands to the server.
Signatures, which a server that lies makes necessary, are left out.

Numbers are written with a fixed point, see `quantised`: a bound that everybody knows is cut into
as many steps as leave room for the sum of all clients. The bound comes from a secure sum too, that
of how many clients have their largest number below each power of two. So nobody's numbers are cut
off, and what the server learns besides the sum is that histogram.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.engine.mixing import scatter_sum
from fedrecsk.engine.streams import Streams
from fedrecsk.engine.uploads import Uploads, UploadSums
from fedrecsk.exceptions import NoUsableUploadError, TooFewClientsError

PRIME, GENERATOR = 2**255 - 19, 2
# On the wire: a public key, a share, and what encryption adds to a message.
KEY_BYTES, SHARE_BYTES, TAG_BYTES, ID_BYTES = 32, 32, 16, 4
# Share of the clients that has to stay to the end.
THRESHOLD = 2 / 3
# Powers of two that a bound may be. Smaller numbers count as the smallest; a client whose numbers
# are larger leaves, as one does whose numbers are not finite.
LOWEST, HIGHEST = -32, 31
N_BOUNDS = HIGHEST - LOWEST + 1


@dataclass(frozen=True)
class SecureSum:
    """How clients add up without showing the server what.

    Parameters
    ----------
    bits : int
        The sum is taken modulo ``2**bits``, at most 32.
    simulate : bool
        Run the protocol; else the arithmetic that it amounts to. Sums and bytes are the same.
    streams : Streams
    """

    bits: int
    simulate: bool
    streams: Streams

    def add(self, uploads: Uploads, n_items: int, width: int, t: int) -> UploadSums:
        """Add uploads up.

        Parameters
        ----------
        uploads : Uploads
            Of at least two clients. Those with numbers that are not finite, or beyond the largest
            bound, find that out themselves and vanish after the exchange of keys.
        n_items : int
            Rows of the table.
        width : int
            Columns of the table; columns of the uploads beyond them mean other things, and each
            has a bound of its own.
        t : int
            Number of the round.

        Returns
        -------
        UploadSums
            With the bytes of the protocol. Sums differ from plain ones by half a step for each
            client at most, a step being 1 / `steps` of the bound.

        Raises
        ------
        ValueError
            If there is a single client, whose upload would be the sum, or too many for the ring.
        NoUsableUploadError
            If nobody's numbers can be used.
        TooFewClientsError
            If more than a third of the clients vanish.
        """
        n_clients = len(uploads.clients)
        if n_clients < 2:
            raise ValueError(
                f"Round {t + 1} has a single client, and its upload would be the sum that "
                "secure_aggregation hides it in. Raise clients_per_round."
            )
        usable = _usable(uploads)
        present = np.flatnonzero(usable.cpu().numpy())
        if not len(present):
            raise NoUsableUploadError(n_clients, t)
        needed = threshold(n_clients)
        if len(present) < needed:
            raise TooFewClientsError(len(present), needed, n_clients, t)
        parts = _parts(uploads.of(usable), n_items, width)
        n_steps = steps(self.bits, n_clients)
        exponents = torch.stack([part.exponents(len(present)) for part in parts])  # (parts, C)
        histogram = torch.nn.functional.one_hot(exponents - LOWEST, N_BOUNDS).transpose(0, 1)
        counts = self._sum([_Part.dense(histogram.flatten(1))], n_clients, present, t, run=0)[0]
        bounds = _largest(counts.reshape(len(parts), N_BOUNDS))
        integers = [
            part.with_values(quantised(part.values, bound, n_steps))
            for part, bound in zip(parts, bounds, strict=True)
        ]
        sums = [
            total.double() * (bound / n_steps)
            for total, bound in zip(
                self._sum(integers, n_clients, present, t, run=1), bounds, strict=True
            )
        ]
        *columns, row_weights, numbers, weight = (total.to(uploads.rows.dtype) for total in sums)
        up, down = (
            sum(of_run)
            for of_run in zip(
                *(
                    protocol_bytes(n_clients, len(present), n_values, self.bits)
                    for n_values in (len(parts) * N_BOUNDS, sum(map(_Part.size, parts)))
                ),
                strict=True,
            )
        )
        return UploadSums(
            rows=torch.cat(columns, 1),
            row_weights=row_weights[:, 0],
            numbers=numbers[0],
            weight=weight[0, 0],
            clients=uploads.clients[present],
            bytes_up=up,
            bytes_down=down,
        )

    def _sum(
        self,
        parts: Sequence[_Part],
        n_clients: int,
        present: NDArray[np.int64],
        t: int,
        *,
        run: int,
    ) -> list[Tensor]:
        """Sum the integers of the clients that are present, part by part."""
        if not self.simulate:
            return [ring_sum(part.added(), self.bits) for part in parts]
        dense = torch.cat([part.laid_out(len(present)) for part in parts], 1)
        values = np.zeros((n_clients, dense.shape[1]), dtype=np.int64)
        values[present] = dense.cpu().numpy()
        total = masked_sum(
            values,
            bits=self.bits,
            threshold=threshold(n_clients),
            streams=Streams(self.streams.key("secure_sum", t, run)),
            vanished=np.setdiff1d(np.arange(n_clients), present).tolist(),
            t=t,
        )
        found = torch.from_numpy(total).to(dense.device)
        pieces = torch.split(found, [part.size() for part in parts])
        return [
            piece.reshape(part.n_places, part.values.shape[1])
            for piece, part in zip(pieces, parts, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class _Part:
    """Numbers that share a bound.

    Attributes
    ----------
    values : Tensor of shape (n, c)
    owner, place : Tensor of shape (n,), int64
        Client, and row of the sum, that each row belongs to.
    n_places : int
    """

    values: Tensor
    owner: Tensor
    place: Tensor
    n_places: int

    @classmethod
    def dense(cls, values: Tensor) -> _Part:
        """Take one vector from each client (C, m)."""
        owner = torch.arange(len(values), device=values.device)
        return cls(values, owner, torch.zeros_like(owner), 1)

    def with_values(self, values: Tensor) -> _Part:
        """Return the same with other values."""
        return _Part(values, self.owner, self.place, self.n_places)

    def size(self) -> int:
        """Count the numbers that a client's vector has for this part."""
        return self.n_places * self.values.shape[1]

    def exponents(self, n_clients: int) -> Tensor:
        """Smallest power of two (C,) that no number of a client exceeds, as exponent."""
        largest = self.values.new_zeros(n_clients)
        if self.values.numel():
            sizes = self.values.abs().amax(1)
            largest = largest.scatter_reduce(0, self.owner, sizes, "amax")
        fraction, exponent = torch.frexp(largest)
        exact = exponent.to(torch.int64) - (fraction == 0.5).to(torch.int64)
        return torch.where(largest > 0, exact, LOWEST).clamp(LOWEST, HIGHEST)

    def added(self) -> Tensor:
        """Sum (n_places, c) over the clients."""
        # In double precision, which holds whole numbers below 2**53, and faster than in integers.
        return scatter_sum(self.values.double(), self.place, self.n_places).to(torch.int64)

    def laid_out(self, n_clients: int) -> Tensor:
        """Vectors (C, n_places * c) with zeros where a client has nothing."""
        zero = self.values.new_zeros(n_clients, self.n_places, self.values.shape[1])
        zero[self.owner, self.place] = self.values
        return zero.flatten(1)


def _usable(uploads: Uploads) -> Tensor:
    """Clients (C,) whose numbers are finite and within the largest bound."""
    largest = 2.0**HIGHEST
    numbers = torch.cat([uploads.numbers, uploads.weights[:, None]], 1)
    numbers = torch.cat([numbers, uploads.weights[:, None] * uploads.numbers], 1)
    usable = (numbers.abs() <= largest).all(1)  # not a number is not within anything
    rows = torch.cat([uploads.rows, uploads.row_weights[:, None]], 1)
    rows = torch.cat([rows, uploads.row_weights[:, None] * uploads.rows], 1)
    bad = ~(rows.abs() <= largest).all(1)
    n_bad = torch.zeros(len(usable), dtype=torch.int64, device=bad.device)
    n_bad.index_add_(0, uploads.row_clients, bad.to(torch.int64))
    return usable & (n_bad == 0)


def _parts(uploads: Uploads, n_items: int, width: int) -> list[_Part]:
    """Cut what clients add up, weighted, into parts with a bound each.

    The rows' columns of the table; every further column; the rows' weights; numbers; weights.
    """
    rows = uploads.rows.double() * uploads.row_weights.double()[:, None]
    weights = uploads.weights.double()[:, None]
    of_rows = [
        rows[:, :width],
        *(rows[:, column : column + 1] for column in range(width, rows.shape[1])),
        uploads.row_weights.double()[:, None],
    ]
    return [
        *(_Part(part, uploads.row_clients, uploads.row_items, n_items) for part in of_rows),
        _Part.dense(weights * uploads.numbers.double()),
        _Part.dense(weights),
    ]


def _largest(counts: Tensor) -> list[float]:
    """Bound of each part: the largest power of two (parts, N_BOUNDS) that anybody needs."""
    order = torch.arange(N_BOUNDS, device=counts.device)
    last = torch.where(counts > 0, order, 0).amax(1)
    return [2.0 ** (LOWEST + place) for place in last.tolist()]


def threshold(n_clients: int) -> int:
    """Clients that have to stay to the end, two thirds of them.

    Examples
    --------
    >>> from fedrecsk.engine.secure_sum import threshold
    >>> threshold(9), threshold(10)
    (6, 7)
    """
    return math.ceil(THRESHOLD * n_clients - 1e-9)


def steps(bits: int, n_clients: int) -> int:
    """Return into how many steps a bound is cut, so that no sum leaves the ring.

    A client's integers are at most so large, and `n_clients` times as much is still less than
    half of ``2**bits``, which positive and negative sums share.

    Parameters
    ----------
    bits : int
    n_clients : int

    Raises
    ------
    ValueError
        If there is not one step.

    Examples
    --------
    >>> from fedrecsk.engine.secure_sum import steps
    >>> steps(32, 189), steps(16, 189), steps(8, 127)
    (11362347, 173, 1)
    """
    found: int = (2 ** (bits - 1) - 1) // n_clients
    if not found:
        raise ValueError(
            f"secure_bits={bits} holds sums of at most {2 ** (bits - 1) - 1} clients, and a round "
            f"has {n_clients}. Raise secure_bits, or lower clients_per_round."
        )
    return found


def quantised(values: Tensor, bound: float, n_steps: int) -> Tensor:
    """Write numbers as integers, rounded to the nearest step.

    Parameters
    ----------
    values : Tensor
        Finite.
    bound : float
        Numbers beyond it are cut off there.
    n_steps : int
        Steps between 0 and the bound.

    Returns
    -------
    Tensor of int64

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.engine.secure_sum import quantised
    >>> quantised(torch.tensor([0.1, -0.5, 7.0]), bound=1.0, n_steps=10).tolist()
    [1, -5, 10]
    """
    scaled = values.double() * (n_steps / bound)
    return scaled.round_().clamp_(-n_steps, n_steps).to(torch.int64)


def ring_sum(total: Tensor, bits: int) -> Tensor:
    """Take integers modulo ``2**bits``, the upper half of them as negative.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.engine.secure_sum import ring_sum
    >>> ring_sum(torch.tensor([5, -5, 130]), bits=8).tolist()
    [5, -5, -126]
    """
    half = 1 << (bits - 1)
    return ((total + half) & ((1 << bits) - 1)) - half


def protocol_bytes(n_clients: int, n_present: int, n_values: int, bits: int) -> tuple[int, int]:
    """Bytes that all clients together send and get in one run of the protocol.

    Parameters
    ----------
    n_clients : int
        That exchange keys.
    n_present : int
        That stay after that.
    n_values : int
        Of a client's vector.
    bits : int

    Returns
    -------
    up, down : int

    Examples
    --------
    Two public keys, an encrypted pair of shares for the other client, five masked numbers and a
    share for each client; the other's keys and shares, and the list of those who stayed:

    >>> from fedrecsk.engine.secure_sum import protocol_bytes
    >>> protocol_bytes(n_clients=2, n_present=2, n_values=5, bits=32)
    (456, 304)
    >>> 2 * (2 * 32 + (2 * 32 + 16) + 5 * 4 + 2 * 32), 2 * (2 * 32 + (2 * 32 + 16) + 2 * 4)
    (456, 304)
    """
    keys = 2 * KEY_BYTES
    shares = (n_clients - 1) * (2 * SHARE_BYTES + TAG_BYTES)
    masked = math.ceil(n_values * bits / 8)
    up = n_clients * (keys + shares) + n_present * (masked + n_clients * SHARE_BYTES)
    down = n_clients * ((n_clients - 1) * keys + shares) + n_present * n_present * ID_BYTES
    return up, down


# The protocol ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Keys:
    """What a client draws: the secret of its key pair, and the seed of its own mask."""

    secret: int
    seed: int

    @property
    def public(self) -> int:
        return pow(GENERATOR, self.secret, PRIME)

    def agreed(self, public: int) -> int:
        """Seed shared with the owner of a public key."""
        return pow(public, self.secret, PRIME)


def masked_sum(
    values: NDArray[np.int64],
    *,
    bits: int,
    threshold: int,
    streams: Streams,
    vanished: Collection[int] = (),
    silent: Collection[int] = (),
    t: int = 0,
) -> NDArray[np.int64]:
    """Run the protocol and give the sum that the server learns.

    Parameters
    ----------
    values : ndarray of shape (n, m), int64
        A vector of each client that takes part in the exchange of keys.
    bits : int
        At most 64.
    threshold : int
        Shares that give a secret back, and so clients that have to stay.
    streams : Streams
        Of the clients' secrets.
    vanished : collection of int
        Clients that leave after the exchange of keys and shares.
    silent : collection of int
        Clients that leave after they have sent their input, which is part of the sum.
    t : int, default=0
        Number of the round, for the error.

    Returns
    -------
    ndarray of shape (m,), int64
        Sum over those that have not vanished, modulo ``2**bits``, see `ring_sum`.

    Raises
    ------
    TooFewClientsError
        If fewer than `threshold` are left.

    Examples
    --------
    >>> import numpy as np
    >>> from fedrecsk.engine.secure_sum import masked_sum
    >>> from fedrecsk.engine.streams import Streams
    >>> values = np.array([[1, 2], [10, 20], [100, 200]])
    >>> masked_sum(values, bits=16, threshold=2, streams=Streams(0), vanished=[1])
    array([101, 202])
    """
    n_clients, n_values = values.shape
    everybody = range(n_clients)
    keys = [_drawn_keys(streams, number) for number in everybody]
    public = [one.public for one in keys]
    secret_shares = [
        cut(one.secret, n_clients, threshold, streams.numpy("secret_shares", number))
        for number, one in enumerate(keys)
    ]
    seed_shares = [
        cut(one.seed, n_clients, threshold, streams.numpy("seed_shares", number))
        for number, one in enumerate(keys)
    ]
    senders = [number for number in everybody if number not in vanished]
    total = np.zeros(n_values, dtype=np.uint64)
    for number in senders:
        total += masked(values[number], number, keys[number], public)
    # From here on the server has public keys and what those who are left tell it.
    left = [number for number in senders if number not in silent]
    if len(left) < threshold:
        raise TooFewClientsError(len(left), threshold, n_clients, t)
    asked = left[:threshold]
    weights = _weights_at_zero(asked)
    for number in everybody:
        shares = (seed_shares if number in senders else secret_shares)[number]
        found = put_together({place: shares[place] for place in asked}, weights)
        if number in senders:
            total -= _mask(found, n_values)
            continue
        gone = _Keys(secret=found, seed=0)
        for other in senders:
            total -= _pair_mask(other, number, gone.agreed(public[other]), n_values)
    # uint64 wraps at 2**64, of which the ring's size is a divisor.
    half = np.uint64(1 << (bits - 1))
    low = (total + half) & np.uint64((1 << bits) - 1)
    return (low - half).view(np.int64)


def masked(
    values: NDArray[np.int64], number: int, keys: _Keys, public: Sequence[int]
) -> NDArray[np.uint64]:
    """Return what a client sends: its vector (m,) under its own mask and those of all pairs."""
    out = values.astype(np.uint64) + _mask(keys.seed, len(values))
    for other, key in enumerate(public):
        if other != number:
            out += _pair_mask(number, other, keys.agreed(key), len(values))
    return out


def _pair_mask(number: int, other: int, seed: int, n_values: int) -> NDArray[np.uint64]:
    """Mask of client `number` for its pair with another, which has the opposite."""
    mask = _mask(seed, n_values)
    return mask if number < other else -mask


def _mask(seed: int, n_values: int) -> NDArray[np.uint64]:
    """Expand a seed; of uniform numbers modulo 2**64 any lower bits are uniform too."""
    return np.random.default_rng(seed).integers(0, 2**64, n_values, dtype=np.uint64)


def _drawn_keys(streams: Streams, number: int) -> _Keys:
    rng = streams.numpy("keys", number)
    return _Keys(secret=_below_prime(rng), seed=_below_prime(rng))


def _below_prime(rng: np.random.Generator) -> int:
    return int.from_bytes(rng.bytes(40), "little") % PRIME


def cut(secret: int, n_shares: int, threshold: int, rng: np.random.Generator) -> list[int]:
    """Cut a secret into Shamir shares.

    They are the values at 1 ... n of a random polynomial of degree ``threshold - 1`` modulo
    `PRIME` whose value at 0 is the secret.

    Parameters
    ----------
    secret : int
        At least 0 and below `PRIME`.
    n_shares, threshold : int
    rng : Generator

    Returns
    -------
    list of int

    Examples
    --------
    >>> import numpy as np
    >>> from fedrecsk.engine.secure_sum import cut, put_together
    >>> shares = cut(42, n_shares=5, threshold=3, rng=np.random.default_rng(0))
    >>> put_together({0: shares[0], 2: shares[2], 4: shares[4]})
    42
    """
    coefficients = [secret, *(_below_prime(rng) for _ in range(threshold - 1))]
    shares = []
    for place in range(1, n_shares + 1):
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * place + coefficient) % PRIME
        shares.append(value)
    return shares


def put_together(shares: Mapping[int, int], weights: Mapping[int, int] | None = None) -> int:
    """Put a secret together again from shares by their places from 0, at least `threshold`.

    `weights` are those of the places, if they are known already.
    """
    weights = weights or _weights_at_zero(list(shares))
    return sum(weights[place] * share for place, share in shares.items()) % PRIME


def _weights_at_zero(places: Sequence[int]) -> dict[int, int]:
    """Lagrange's weights of values at places + 1 for the value at 0."""
    weights = {}
    for place in places:
        above = below = 1
        for other in places:
            if other != place:
                above = above * (other + 1) % PRIME
                below = below * (other - place) % PRIME
        weights[place] = above * pow(below, -1, PRIME) % PRIME
    return weights
