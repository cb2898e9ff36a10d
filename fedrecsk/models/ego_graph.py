"""LightGCN on ego graphs: what a client can propagate, over its user and that user's positives.

The graph of a user with the positives P, n of them, is a star with edges of weight 1/√n under
symmetric normalisation. Its layers repeat, with s = Σ_P v_j / √n:

    layer                  0     1      2      3      ...
    the user               u     s      u      s
    a positive             v_j   u/√n   s/√n   u/√n
    any other item         v_j   0      0      0

A network reads the mean over the layers 0 ... K,

    u'   = (a u + b s) / (K + 1),                           a = 1 + K // 2,     b = (K + 1) // 2,
    v'_j = (v_j + [j in P] (c u + e s) / √n) / (K + 1),     c = (K + 1) // 2,   e = K // 2,

so no layer is ever computed. The second term of v'_j is the same for all positives: their *gain*.
A user without positives is a graph of one node, u' = u / (K + 1). An item bias is not propagated.

The gain tells the positives from all other items, which in training is the label itself: a network
learns to look for it, its loss goes to zero, and its ranking of items without a gain collapses.
Propagation can therefore leave the gain out, c = e = 0, so that only users aggregate.

Xiangnan He, Kuan Deng, Xiang Wang, Yan Li, Yongdong Zhang and Meng Wang (2020), "LightGCN:
Simplifying and Powering Graph Convolution Network for Recommendation", SIGIR.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedrecsk.engine.mixing import scatter_sum


@dataclass(frozen=True)
class Propagation:
    """The mean over the layers 0 ... K of an ego graph, as what each part brings in.

    Attributes
    ----------
    item : float
        Of an item in itself, 1 / (K + 1).
    user_user, user_sum : float
        Of u and of s in u'.
    gain_user, gain_sum : float
        Of u / √n and of s / √n in the gain of a positive.

    Examples
    --------
    >>> from fedrecsk.models.ego_graph import Propagation
    >>> Propagation.of(1, items=True)
    Propagation(item=0.5, user_user=0.5, user_sum=0.5, gain_user=0.5, gain_sum=0.0)
    >>> Propagation.of(1, items=False)
    Propagation(item=0.5, user_user=0.5, user_sum=0.5, gain_user=0.0, gain_sum=0.0)
    """

    item: float
    user_user: float
    user_sum: float
    gain_user: float
    gain_sum: float

    @classmethod
    def of(cls, n_layers: int, *, items: bool) -> Propagation:
        """Return the coefficients of K = `n_layers` layers; K = 0 propagates nothing.

        Without `items` the positives gain nothing.
        """
        if n_layers < 0:
            raise ValueError(f"n_graph_layers must not be negative, found {n_layers}.")
        odd, even, share = (n_layers + 1) // 2, n_layers // 2, 1 / (n_layers + 1)
        gains = (odd * share, even * share) if items else (0.0, 0.0)
        return cls(share, (1 + even) * share, odd * share, *gains)

    @property
    def items(self) -> bool:
        """Whether positives gain anything."""
        return self.gain_user > 0 or self.gain_sum > 0

    def forward(self, user: Tensor, total: Tensor, root: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return u' and the gain of a positive (..., d), None where there is none.

        Parameters
        ----------
        user, total : Tensor of shape (..., d)
            u and s.
        root : Tensor of shape (..., 1)
            1/√n; anything for a user without positives.
        """
        moved = self.user_user * user + self.user_sum * total
        if not self.items:
            return moved, None
        return moved, (self.gain_user * user + self.gain_sum * total) * root

    def backward(
        self, by_user: Tensor, by_gain: Tensor | None, root: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Turn gradients by u' and by the gain, summed over positives, into such by u and s."""
        own, total = self.user_user * by_user, self.user_sum * by_user
        if by_gain is None:
            return own, total
        by_gain = by_gain * root
        return own + self.gain_user * by_gain, total + self.gain_sum * by_gain


def neighbourhoods(item_rows: Tensor, indptr: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return s (n, d) and 1/√n (n, 1) of users, given their positives.

    Parameters
    ----------
    item_rows : Tensor of shape (n_items, d)
    indptr : Tensor of shape (n + 1,), int64
        Where each user's positives start in `indices`.
    indices : Tensor of shape (nnz,), int64
        Items, without repetition within a user.

    Returns
    -------
    total : Tensor of shape (n, d)
    root : Tensor of shape (n, 1)
        Zero for a user without positives.
    """
    counts = indptr.diff()
    root = counts.clamp_min(1).to(item_rows.dtype).rsqrt()
    # Each user's sum on its own, so that it rounds the same whoever else is there.
    total = torch.segment_reduce(
        item_rows[indices], "sum", lengths=counts, initial=0.0, unsafe=True
    )
    root = torch.where(counts > 0, root, 0.0)[:, None]
    return total * root, root


@dataclass(frozen=True, eq=False)
class EgoGraphs:
    """Users after propagation over their ego graphs, and what their positives have of it.

    Attributes
    ----------
    users : Tensor of shape (n, d)
        u' of each user.
    gains : Tensor of shape (n, d) or None
        What the vector of each of a user's positives gains, see the module's head; None where
        that is left out.
    item : float
        What is left of an item's own vector, 1 / (K + 1).

    Examples
    --------
    One user and two items, of which the first is its only positive:

    >>> import torch
    >>> from fedrecsk.models.ego_graph import EgoGraphs
    >>> user, items = torch.tensor([[1.0]]), torch.tensor([[3.0], [5.0]])
    >>> graphs = EgoGraphs.of(
    ...     user, items, torch.tensor([0, 1]), torch.tensor([0]),
    ...     n_layers=1, items=True)
    >>> graphs.users
    tensor([[2.]])
    >>> who, is_positive = torch.tensor([0, 0]), torch.tensor([True, False])
    >>> vectors, rows = graphs.pairs(who, items, is_positive)
    >>> rows
    tensor([[2.0000],
            [2.5000]])
    """

    users: Tensor
    gains: Tensor | None
    item: float

    @classmethod
    def of(
        cls,
        user_vectors: Tensor,
        item_table: Tensor,
        indptr: Tensor,
        indices: Tensor,
        *,
        n_layers: int,
        items: bool,
    ) -> EgoGraphs:
        """Propagate users over K layers.

        Parameters
        ----------
        user_vectors : Tensor of shape (n, d)
        item_table : Tensor of shape (n_items, d) or (n_items, d + 1)
            A last column beyond d, the item bias, is not read.
        indptr, indices
            The users' positives, see `neighbourhoods`.
        n_layers : int
            K.
        items : bool
            Whether positives gain anything.
        """
        layers = Propagation.of(n_layers, items=items)
        rows = item_table[:, : user_vectors.shape[1]].to(user_vectors.dtype)
        total, root = neighbourhoods(rows, indptr, indices)
        users, gains = layers.forward(user_vectors, total, root)
        return cls(torch.where(root > 0, users, layers.item * user_vectors), gains, layers.item)

    def pairs(self, user: Tensor, rows: Tensor, is_positive: Tensor) -> tuple[Tensor, Tensor]:
        """Return u' and v' of pairs, which a network scores as any vectors.

        Parameters
        ----------
        user : Tensor of shape (k,), int64
            Position of each pair's user.
        rows : Tensor of shape (k, d) or (k, d + 1)
            The rows of the item table.
        is_positive : Tensor of shape (k,), bool
            Whether the item is a positive of the user.

        Returns
        -------
        users : Tensor of shape (k, d)
        rows : Tensor of the shape of `rows`
        """
        width = self.users.shape[1]
        gains = None if self.gains is None else self.gains[user] * is_positive[:, None]
        return self.users[user], _moved(self.item, rows, gains, width)


def _moved(item: float, rows: Tensor, gains: Tensor | None, width: int) -> Tensor:
    """Return v' of rows (k, d or d + 1); an item bias stays as it is."""
    own = item * rows[:, :width]
    return torch.cat([own if gains is None else own + gains, rows[:, width:]], dim=1)


@dataclass(frozen=True, eq=False)
class StarsInRows:
    """Ego graphs of clients with one user each, whose examples lie in one row of a block.

    Attributes
    ----------
    layers : Propagation
    fan : int
        Every `fan`-th example of a row is a positive, the first one too.
    edges : Tensor of shape (c, 1, p)
        1/√n for a positive, 0 for padding.
    """

    layers: Propagation
    fan: int
    edges: Tensor

    @classmethod
    def of(cls, mask: Tensor, fan: int, layers: Propagation) -> StarsInRows:
        """Read the graphs from the mask (c, n) of examples; every client has some."""
        positive = mask[:, None, ::fan]
        return cls(layers, fan, positive * positive.sum(2, keepdim=True).rsqrt())

    @property
    def root(self) -> Tensor:
        """1/√n of each client, shape (c, 1, 1)."""
        return self.edges[:, :, :1]

    def positives(self, values: Tensor) -> Tensor:
        """View the values (c, p, ...) of positives among those of examples (c, n, ...)."""
        return values[:, :: self.fan]

    def forward(self, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return u' and any gain, both (c, 1, d), from u (c, 1, d) and rows (c, n, d or d + 1)."""
        total = torch.bmm(self.edges, self.positives(item)[:, :, : user.shape[2]])
        return self.layers.forward(user, total, self.root)

    def backward(self, by_user: Tensor, by_gain: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the gradients by u (c, 1, d), and by positives (c, p, d) through s."""
        by_user, by_total = self.layers.backward(by_user, by_gain, self.root)
        return by_user, self.edges.mT * by_total


@dataclass(frozen=True, eq=False)
class StarsInList:
    """Ego graphs of any users, from a list of all their examples.

    Attributes
    ----------
    layers : Propagation
    user : Tensor of shape (L,), int64
        Position of each example's user.
    positive : Tensor of shape (L, 1)
        1 for a positive, 0 for a negative.
    root : Tensor of shape (U, 1)
        1/√n of each user; 1 for a user without positives.
    """

    layers: Propagation
    user: Tensor
    positive: Tensor
    root: Tensor

    @classmethod
    def of(cls, user: Tensor, positive: Tensor, n_users: int, layers: Propagation) -> StarsInList:
        """Read the graphs from the user and the label, 0 or 1, of each example (L,)."""
        counts = scatter_sum(positive[:, None], user, n_users)
        return cls(layers, user, positive[:, None], counts.clamp_min(1).rsqrt())

    def forward(self, users: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        """Return u' (L, d) and v' of the examples, from users (U, d) and rows (L, d or d + 1)."""
        width = users.shape[1]
        total = self._sum(self.positive * item[:, :width]) * self.root
        moved, gains = self.layers.forward(users, total, self.root)
        if gains is not None:
            gains = self.positive * gains[self.user]
        return moved[self.user], _moved(self.layers.item, item, gains, width)

    def backward(self, by_user: Tensor, by_item: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the examples' gradients by u' and v' into such by u and v, to be summed up."""
        width, root = by_user.shape[1], self.root[self.user]
        by_gain, by_gains = None, None
        if self.layers.items:
            by_gain = self.positive * by_item[:, :width]
            by_gains = self._sum(by_gain)
        _, by_total = self.layers.backward(self._sum(by_user), by_gains, self.root)
        own, _ = self.layers.backward(by_user, by_gain, root)
        through = self.positive * root * by_total[self.user]
        return own, _moved(self.layers.item, by_item, through, width)

    def _sum(self, values: Tensor) -> Tensor:
        """Sum values (L, d) of the examples by user, (U, d)."""
        return scatter_sum(values, self.user, len(self.root))
