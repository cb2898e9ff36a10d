"""Dishonest clients, to try defences on.

A share of the clients is dishonest. They know what every client knows, the server's table and
their own data, act together, and follow the protocol but for what they send:

- ``"sign-flip"``: the opposite of what they have learned, times `strength`.
- ``"scale"``: what they have learned, times `strength`.
- ``"gaussian"``: noise, `strength` times as long as what they have learned.
- ``"nan"``: not a number, as a broken device might.

Others want everybody to be recommended one item, the target:

- ``"random"``: they train on made-up histories, the target and items drawn at random, and send
  that times `strength`.
- ``"bandwagon"``: the same with the most popular items for one half, so that they resemble many.
- ``"gradient"``: honest uploads, but for the row of the target: it points along the gradient of
  the target's score with users like themselves, `strength` times as long as their rows mostly
  are. In the manner of attacks that approximate users by what the attacker holds (Rong et al.,
  ICDE 2022, "FedRecAttack"; Rong, He, Chen, IJCAI 2022); ours is simpler and needs no other data.
- ``"lookalike"``: what a user would send that is the mean of theirs, and has the target alone. It
  knows that servers may look whether uploads mean something, so there is nothing to make louder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.engine.streams import Streams
from fedrecsk.engine.uploads import Meaning, Uploads

AttackName = Literal[
    "gradient", "lookalike", "random", "bandwagon", "sign-flip", "scale", "gaussian", "nan"
]
# Those that want an item to be recommended.
PROMOTIONS = ("gradient", "lookalike", "random", "bandwagon")


@dataclass(frozen=True, eq=False)
class Attack:
    """What dishonest clients send.

    Attributes
    ----------
    name : str
        See the module's head.
    malicious : ndarray of shape (n_clients,), bool
        Who is dishonest.
    strength : float
    target : int
        Item code; read by promotions alone.
    streams : Streams
    """

    name: AttackName
    malicious: NDArray[np.bool_]
    strength: float
    target: int
    streams: Streams

    def apply(
        self,
        uploads: Uploads,
        vectors: Tensor,
        table: Tensor,
        t: int,
        meaning: Meaning | None = None,
    ) -> Uploads:
        """Put dishonest uploads in the place of what was learned.

        Parameters
        ----------
        uploads : Uploads
            As if all clients were honest.
        vectors : Tensor of shape (C, d)
            User vectors of the clients, in the columns of the table.
        table : Tensor of shape (n_items, d)
            The server's, before the round.
        t : int
            Number of the round.
        meaning : Meaning, optional
            Of the uploads, which ``"lookalike"`` needs.

        Returns
        -------
        Uploads
        """
        bad = torch.from_numpy(self.malicious[uploads.clients]).to(uploads.rows.device)
        if not bool(bad.any()):
            return uploads
        if self.name == "gradient":
            return self._promoted(uploads, bad, vectors, table)
        if self.name == "lookalike":
            assert meaning is not None  # else the estimator refuses it
            row, numbers = meaning.upload_of(vectors[bad].mean(0), self.target)
            return self._with_row(uploads, bad, row, ~bad[uploads.row_clients], numbers)
        rows, numbers = uploads.rows, uploads.numbers
        if self.name == "gaussian":
            generator = self.streams.torch("attack", t)
            rows = _noise_like(rows, generator)
            numbers = _noise_like(numbers, generator)
        factor = -self.strength if self.name == "sign-flip" else self.strength
        if self.name == "nan":
            factor = float("nan")
        of_row = bad[uploads.row_clients][:, None]
        return replace(
            uploads,
            rows=torch.where(of_row, factor * rows, uploads.rows),
            numbers=torch.where(bad[:, None], factor * numbers, uploads.numbers),
        )

    def _promoted(self, uploads: Uploads, bad: Tensor, vectors: Tensor, table: Tensor) -> Uploads:
        """Put the target's row, pushed towards the attackers' users, among what they send."""
        users = vectors[bad]  # (B, d)
        scores = users @ table[self.target]
        push = torch.sigmoid(-scores) @ users
        push = push / push.norm().clamp_min(1e-12)
        by_them = bad[uploads.row_clients]
        theirs = uploads.rows[by_them]
        if not len(theirs):
            return uploads
        d = table.shape[1]
        typical = theirs[:, :d].norm(dim=1).median()
        row = theirs.mean(0)  # columns beyond the table's, such as counts, as they mostly are
        row[:d] = self.strength * typical * push
        kept = ~(by_them & (uploads.row_items == self.target))
        return self._with_row(uploads, bad, row, kept, uploads.numbers)

    def _with_row(
        self, uploads: Uploads, bad: Tensor, row: Tensor, kept: Tensor, numbers: Tensor
    ) -> Uploads:
        """Let all dishonest clients send a row of the target; of the other rows some are kept."""
        by_them = bad[uploads.row_clients]
        senders = torch.nonzero(bad)[:, 0]
        n = len(senders)
        weight = uploads.row_weights[by_them].mean()
        return replace(
            uploads,
            row_clients=torch.cat([uploads.row_clients[kept], senders]),
            row_items=torch.cat([uploads.row_items[kept], torch.full_like(senders, self.target)]),
            rows=torch.cat([uploads.rows[kept], row.expand(n, -1)]),
            row_weights=torch.cat([uploads.row_weights[kept], weight.expand(n)]),
            numbers=torch.where(bad[:, None], numbers, uploads.numbers),
        )


def _noise_like(vectors: Tensor, generator: torch.Generator) -> Tensor:
    """Draw vectors (n, w) in random directions, each as long as the given one."""
    noise = torch.randn(vectors.shape, generator=generator, dtype=vectors.dtype)
    noise = noise.to(vectors.device)
    scale = vectors.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return noise.mul(scale)


def draw_malicious(n_clients: int, fraction: float, streams: Streams) -> NDArray[np.bool_]:
    """Draw which clients are dishonest.

    Parameters
    ----------
    n_clients : int
    fraction : float in [0, 1)
        Of all clients, rounded.
    streams : Streams

    Returns
    -------
    ndarray of shape (n_clients,), bool

    Examples
    --------
    >>> from fedrecsk.engine.attacks import draw_malicious
    >>> from fedrecsk.engine.streams import Streams
    >>> int(draw_malicious(60, 0.05, Streams(0)).sum())
    3
    """
    malicious = np.zeros(n_clients, dtype=bool)
    n_malicious = round(fraction * n_clients)
    malicious[streams.numpy("malicious").permutation(n_clients)[:n_malicious]] = True
    return malicious


def made_up_items(
    user: NDArray[np.int64],
    item: NDArray[np.int64],
    liars: NDArray[np.bool_],
    n_items: int,
    *,
    target: int,
    name: Literal["random", "bandwagon"],
    streams: Streams,
) -> NDArray[np.int64]:
    """Return items with the histories of dishonest users made up.

    Parameters
    ----------
    user, item : ndarray of shape (n,)
        Codes of distinct pairs.
    liars : ndarray of shape (n_users,), bool
        Whose history is made up.
    n_items : int
    target : int
    name : {"random", "bandwagon"}
        Where the other items come from.
    streams : Streams

    Returns
    -------
    ndarray of shape (n,)
        As long a history for everybody as before; the pairs are distinct.
    """
    items = item.copy()
    popular = np.argsort(-np.bincount(item[~liars[user]], minlength=n_items), kind="stable")
    popular = popular[popular != target]
    others = np.delete(np.arange(n_items), target)
    rows = np.flatnonzero(liars[user])
    rows = rows[np.argsort(user[rows], kind="stable")]
    for number, own in enumerate(np.split(rows, np.flatnonzero(np.diff(user[rows])) + 1)):
        if not len(own):
            continue
        rng = streams.numpy("made_up", number)
        n = len(own) - 1
        n_popular = n // 2 if name == "bandwagon" else 0
        chosen = popular[:n_popular]
        rest = rng.permutation(np.setdiff1d(others, chosen))[: n - n_popular]
        items[own] = np.concatenate([[target], chosen, rest])
    return items
