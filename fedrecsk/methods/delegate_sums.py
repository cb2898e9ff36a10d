"""What the delegates of a round of `fedrecsk.methods.bce_rounds.bce_step` send, added up.

There are two ways to the same sums. `DelegateSums.add` adds the private rows of a chunk of clients
as they lie, which is all that a federation of honest clients needs. `uploads_of` lays them out
client by client, for an uplink that looks at each, and `DelegateSums.take` takes what it has made
of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedrecsk.engine.mixing import RowSums
from fedrecsk.engine.parallel import add_up
from fedrecsk.engine.shards import Cohort
from fedrecsk.engine.uploads import Uploads, UploadSums
from fedrecsk.models import bce_newton
from fedrecsk.models.head import Head, flat_changes, stacked_heads
from fedrecsk.models.sampled_bce import LocalResult


@dataclass(eq=False)
class DelegateSums:
    """Sums over the delegates; the only thing of a round that changes in place.

    Attributes
    ----------
    table : Tensor of shape (n_items, w)
        The server's, before the round.
    shared_head : dict of Tensor
        Likewise.
    newton : bool
        Whether the server makes a quasi-Newton step, which needs two sums more.
    changes : Tensor of shape (n_items, w)
        Σ weight * (row after training - row before).
    weights : Tensor of shape (n_items, 1)
        Their weight, row by row.
    curvature : Tensor of shape (n_items,)
    gram : Tensor of shape (w, w)
        See `bce_newton.curvature_sums`.
    head : dict of Tensor
        Σ share * (weights after training - before).
    losses, n_examples, n_rows : Tensor of shape ()
    n_broken : int
        Delegates whose uploads nobody could use; they are in none of the sums.
    broken_share : float
        Their share of the weight of all delegates.
    """

    table: Tensor
    shared_head: Head
    newton: bool
    changes: Tensor = field(init=False)
    weights: Tensor = field(init=False)
    curvature: Tensor = field(init=False)
    gram: Tensor = field(init=False)
    head: Head = field(init=False)
    losses: Tensor = field(init=False)
    n_examples: Tensor = field(init=False)
    n_rows: Tensor = field(init=False)
    n_broken: int = 0
    broken_share: float = 0.0

    def __post_init__(self) -> None:
        n_items, width = self.table.shape
        zero = self.table.new_zeros
        self.changes, self.weights = zero(n_items, width), zero(n_items, 1)
        self.curvature, self.gram = zero(n_items), zero(width, width)
        self.head = {name: torch.zeros_like(value) for name, value in self.shared_head.items()}
        self.losses, self.n_examples = zero(()), zero(())
        self.n_rows = torch.zeros((), dtype=torch.int64, device=self.table.device)

    def count(self, result: LocalResult) -> None:
        """Count the examples and rows of a chunk of clients."""
        self.losses += result.losses.sum()
        self.n_examples += result.n_examples.sum()
        self.n_rows += result.row_valid.sum()

    def add(
        self, result: LocalResult, weight: Tensor, vectors: Tensor, heads: Head, share: Tensor
    ) -> None:
        """Add what a chunk of clients sends.

        Parameters
        ----------
        result : LocalResult
        weight : Tensor of shape (K,)
            Of each private row.
        vectors : Tensor of shape (U, w)
            The users', as long as the table is wide; read by quasi-Newton steps.
        heads : dict of Tensor of shape (C, ...)
            Of each client.
        share : Tensor of shape (C,)
            Each client's weight among all delegates.
        """
        sums = RowSums(result.row_items, len(self.table))
        self.weights += sums.add(weight[:, None])
        if self.newton:
            # Divided by the learning rate later, which would blow up the rounding of values.
            self.changes += sums.add(result.row_delta, weight)
            curvature, gram = bce_newton.curvature_sums(result, sums, vectors)
            self.curvature += curvature
            self.gram += gram
        else:
            # Values: `finish` takes the table off, one pass over the private rows less.
            self.changes += sums.add(result.row_values, weight)
        for name, change in self.head.items():
            change += torch.tensordot(share, heads[name] - self.shared_head[name], 1)

    def leave_out(self, broken: Tensor, share: Tensor) -> None:
        """Note which clients (C,) of a chunk have nothing usable to send."""
        self.n_broken += int(broken.sum())
        self.broken_share += float(share[broken].sum())

    def finish(self) -> None:
        """Turn sums of rows into sums of changes, once all clients of all processes are in."""
        broken = torch.tensor([self.n_broken, self.broken_share], dtype=torch.float64)
        (
            self.changes,
            self.weights,
            self.curvature,
            self.gram,
            self.losses,
            self.n_examples,
            self.n_rows,
            broken,
            *head,
        ) = add_up(
            self.changes,
            self.weights,
            self.curvature,
            self.gram,
            self.losses,
            self.n_examples,
            self.n_rows,
            broken,
            *self.head.values(),
        )
        self.head = dict(zip(self.head, head, strict=True))
        self.n_broken, self.broken_share = int(broken[0]), float(broken[1])
        if not self.newton:
            self.changes -= self.weights * self.table

    def take(self, received: UploadSums, n_delegates: int, n_rejected: int) -> None:
        """Take what an uplink has made of the delegates' uploads, some of which it rejected."""
        width = self.table.shape[1]
        self.n_broken += n_rejected
        self.broken_share = 1.0 - float(received.weight)
        self.changes, self.weights = received.rows[:, :width], received.row_weights[:, None]
        if self.newton:
            self.curvature = received.rows[:, width]
            self.gram = received.numbers.reshape(width, width) * n_delegates
            return
        self._take_head(received.numbers)

    def take_noised(self, received: UploadSums, n_rejected: int) -> None:
        """Take the noised sums of a release: means over the clients expected, of every row."""
        self.n_broken += n_rejected
        self.broken_share = 0.0
        self.changes, self.weights = received.rows / received.weight, received.row_weights[:, None]
        self._take_head(received.numbers / received.weight)

    def _take_head(self, numbers: Tensor) -> None:
        """Cut the clients' numbers (m,) into the weights of the head."""
        (head,) = stacked_heads(numbers[None], [self.shared_head])
        self.head = {name: value[0] for name, value in head.items()}


def uploads_of(
    cohort: Cohort,
    result: LocalResult,
    weight: Tensor,
    vectors: Tensor,
    heads: Head,
    share: Tensor,
    shared_head: Head,
    *,
    newton: bool,
) -> Uploads:
    """Lay out what a chunk of clients sends, client by client.

    Parameters
    ----------
    cohort : Cohort
    result, weight, vectors, heads, share
        As in `DelegateSums.add`.
    shared_head : dict of Tensor
        The server's.
    newton : bool
        Whether clients send curvatures and Gram matrices as well.

    Returns
    -------
    Uploads
    """
    if not newton:
        return result.uploads(
            cohort.clients, weight, flat_changes([heads], [shared_head], share[:, None]), share
        )
    grams = (vectors[:, :, None] * vectors[:, None, :]).flatten(1)  # a user a client
    uploads = result.uploads(cohort.clients, weight, grams, share)
    curvature = bce_newton.row_curvature(result, vectors)[result.row_valid]
    rows = torch.cat([uploads.rows, curvature[:, None]], 1)
    return replace(uploads, rows=rows, products=True)
