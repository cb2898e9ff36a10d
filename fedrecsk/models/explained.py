"""Which uploads of the whole-data objective some data would explain.

A client's rows and its Gram matrix are made of the same user vectors: of users u who have an item
with vector v, with scores s = uᵀv, it sends the pull Σ (1 - s) u, the curvature Σ s², their number,
and over all of its users Σ u uᵀ. So the server can tell whether there are user vectors and
histories that would lead to an upload, without knowing them:

- A client with one user has told its vector up to the sign, and with it every number of every row.
- Of several users who have an item let r hold 1 - s. The pull is Uᵀr for the vectors U, and so
  lies in the range of G = UᵀU with pullᵀ G⁺ pull ≤ rᵀr = n - 2 vᵀpull - Σ s².

Honest uploads pass, but for rounding. A row that was turned, lengthened or made up does not, as an
honest pull fades while the score grows. What passes is what somebody with a made-up history, or
with a made-up vector, could have sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.engine.device import to_device
from fedrecsk.engine.uploads import Uploads

# Share of a length by which rounding may be off.
TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Explanation:
    """What whole-data uploads are made of.

    Attributes
    ----------
    item_factors : Tensor of shape (n_items, d)
        That clients were sent.
    blocks : sequence of slice
        Of columns, whose curvatures rows have.
    clients, n_users : ndarray of shape (C,), int64
        Codes of the clients, ascending, and how many users each has.

    Examples
    --------
    One user with the vector (0.5, 0) and one item with (1, 1), so the score is 0.5; and another
    client that says the same, but pulls harder:

    >>> import numpy as np, torch
    >>> from fedrecsk.engine.uploads import Uploads
    >>> from fedrecsk.models.explained import Explanation
    >>> table = torch.ones(1, 2)
    >>> explanation = Explanation(table, [slice(None)], np.array([0, 1]), np.array([1, 1]))
    >>> row, numbers = explanation.upload_of(torch.tensor([0.5, 0.0]), 0)
    >>> row.tolist(), numbers.tolist()
    ([0.25, 0.0, 0.25, 1.0], [0.25, 0.0, 0.0, 0.0])
    >>> uploads = Uploads(
    ...     clients=np.array([0, 1]),
    ...     row_clients=torch.tensor([0, 1]),
    ...     row_items=torch.tensor([0, 0]),
    ...     rows=torch.stack([row, row + torch.tensor([0.25, 0.0, 0.0, 0.0])]),
    ...     row_weights=torch.ones(2),
    ...     n_directions=2,
    ...     numbers=numbers.expand(2, 4),
    ...     weights=torch.ones(2),
    ...     products=True,
    ... )
    >>> explanation.holds(uploads).tolist()
    [True, False]
    """

    item_factors: Tensor
    blocks: Sequence[slice]
    clients: NDArray[np.int64]
    n_users: NDArray[np.int64]

    def holds(self, uploads: Uploads) -> Tensor:
        """Tell which clients send what some users with some histories would have led to.

        Parameters
        ----------
        uploads : Uploads
            By client, as from `fedrecsk.models.whole_data.uploads_of`.

        Returns
        -------
        Tensor of shape (C,), bool
        """
        place = np.searchsorted(self.clients, uploads.clients)
        n_users = to_device(self.n_users[place], self.item_factors.device)
        good = (uploads.weights == 1) & _all_of(uploads.row_weights == 1, uploads)
        single = n_users == 1
        if bool(single.any()):
            good &= ~single | _of_one_user(uploads, self.item_factors, self.blocks)
        if bool((~single).any()):
            good &= single | _of_several_users(uploads, self.item_factors, n_users)
        return good

    def upload_of(self, vector: Tensor, item: int) -> tuple[Tensor, Tensor]:
        """Give the row and the numbers of a client whose one user has one item.

        Parameters
        ----------
        vector : Tensor of shape (d,)
        item : int

        Returns
        -------
        row : Tensor of shape (d + b + 1,)
        numbers : Tensor of shape (d * d,)
        """
        row = self.item_factors[item]
        pull = (1.0 - vector @ row) * vector
        curvatures = [(vector[block] @ row[block]).square() for block in self.blocks]
        sizes = torch.stack([*curvatures, torch.ones_like(curvatures[0])])
        return torch.cat([pull, sizes]), torch.outer(vector, vector).flatten()


def _of_one_user(uploads: Uploads, item_factors: Tensor, blocks: Sequence[slice]) -> Tensor:
    """Tell which clients (C,) send what one user vector explains."""
    d = item_factors.shape[1]
    grams = uploads.numbers.reshape(-1, d, d)
    diagonal, column = grams.diagonal(dim1=1, dim2=2).max(1)
    vectors = grams[torch.arange(len(grams), device=grams.device), :, column]
    # Its sign is open: it is that of the vector's largest number.
    vectors = vectors / diagonal.clamp_min(torch.finfo(grams.dtype).tiny).sqrt()[:, None]
    length = vectors.norm(dim=1)
    of_rank_1 = vectors[:, :, None] * vectors[:, None, :]
    good = (grams - of_rank_1).flatten(1).norm(dim=1) <= TOLERANCE * length.square()
    own, items = vectors[uploads.row_clients], item_factors[uploads.row_items]
    score = (own * items).sum(1)
    # With the other sign of u, score and vector change theirs: pull + score * u is ± u in all rows.
    rest = uploads.rows[:, :d] + score[:, None] * own
    side = torch.zeros_like(length).index_add_(0, uploads.row_clients, (rest * own).sum(1))
    sign = torch.where(side < 0, -1.0, 1.0)[uploads.row_clients]
    reach = (1.0 + score.abs()) * length[uploads.row_clients]
    fits = (rest - sign[:, None] * own).norm(dim=1) <= TOLERANCE * reach
    for place, block in enumerate(blocks):
        curvature = (own[:, block] * items[:, block]).sum(1).square()
        slack = TOLERANCE * (own[:, block].norm(dim=1) * items[:, block].norm(dim=1)).square()
        fits &= (uploads.rows[:, d + place] - curvature).abs() <= slack
    fits &= uploads.rows[:, -1] == 1
    return torch.logical_and(good, _all_of(fits, uploads))


def _of_several_users(uploads: Uploads, item_factors: Tensor, n_users: Tensor) -> Tensor:
    """Tell which clients (C,) send what as many user vectors as they have might explain."""
    d = item_factors.shape[1]
    grams = uploads.numbers.reshape(-1, d, d).double()
    values, basis = torch.linalg.eigh(0.5 * (grams + grams.mT))
    largest = values[:, -1].clamp_min(0.0)
    good = (values[:, 0] >= -TOLERANCE * largest) & (
        (grams - grams.mT).flatten(1).abs().amax(1) <= TOLERANCE * largest
    )
    owner = uploads.row_clients
    pull, count = uploads.rows[:, :d].double(), uploads.rows[:, -1].double()
    along = torch.einsum("kd,kde->ke", pull, basis[owner])  # in the axes of the Gram matrix
    # Directions that rounding alone may have made lengthen nothing.
    floor = (TOLERANCE**2 * largest)[owner][:, None]
    needed = along.square() / values[owner].clamp_min(0.0).add(floor).clamp_min(1e-30)
    score = (pull * item_factors[uploads.row_items].double()).sum(1)
    curvature = uploads.rows[:, d:-1].double()
    left = count - 2.0 * score
    if curvature.shape[1] == 1:  # else the scores' squares are not known
        left = left - curvature[:, 0]
    slack = TOLERANCE * (count + score.abs())
    fits = (needed.sum(1) <= left + slack) & (curvature >= 0).all(1)
    fits &= (count >= 1) & (count <= n_users[owner]) & (count == count.round())
    return torch.logical_and(good, _all_of(fits, uploads))


def _all_of(fits: Tensor, uploads: Uploads) -> Tensor:
    """Tell of which clients (C,) every row (K,) fits."""
    strange = torch.zeros(len(uploads.clients), dtype=torch.int64, device=fits.device)
    strange.index_add_(0, uploads.row_clients, (~fits).to(torch.int64))
    return strange == 0
