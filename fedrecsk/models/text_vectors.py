"""From token numbers to vectors of items and of histories, and the loss that ranks by them.

    item        head + its tokens + tail                             -> vector z_i
    history     head + the tokens of the user's last items + tail    -> vector q_u
    score       cos(q_u, z_i) / temperature + weight · log(times that the client has seen i)
    loss        softmax of the score of the next item among candidates

Texts are tokenised once; batches are put together from token numbers, without strings. The
popularity term stands beside the text: how often an item is chosen is not in its title, and the
adapters need not learn it.

Candidates are the targets of the batch, and items drawn uniformly if wanted. There are two losses:

    lift           no more than that. A popular item is often the target and as often a wrong
                   candidate, so vectors tell how much likelier than usual an item is, and an item
                   that nobody has chosen yet is not pushed down for it.
    probability    the score of a candidate is lowered by the logarithm of how often it is to be
                   expected (sampled softmax with the correction of Bengio and Senecal 2008), and
                   the popularity term is in the loss too; so scores tell how likely an item is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional

from fedrecsk.engine.shards import concatenate_ranges

Pooling = Literal["mean", "cls", "last"]
IntArray = NDArray[np.int64]

# Tokens in a batch where nothing is trained: bounds the hidden states held at a time.
TOKENS_PER_BATCH = 16_384
_MASKED = -1e9
_FEWEST = 1e-9


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Token numbers of many texts, one after another.

    Attributes
    ----------
    indptr : ndarray of shape (n + 1,), int64
        The tokens of text j are ``tokens[indptr[j] : indptr[j + 1]]``.
    tokens : ndarray of shape (nnz,), int64

    Examples
    --------
    >>> from fedrecsk.models.text_vectors import TokenRows
    >>> rows = TokenRows.of([[5, 6], [], [7]])
    >>> rows[0].tolist(), rows.lengths.tolist(), rows.owners().tolist()
    ([5, 6], [2, 0, 1], [0, 0, 2])
    """

    indptr: IntArray
    tokens: IntArray

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], max_length: int | None = None) -> TokenRows:
        """Put lists of token numbers one after another, each cut at `max_length`."""
        cut = [np.asarray(row[:max_length], dtype=np.int64) for row in rows]
        indptr = np.concatenate([[0], np.cumsum([len(row) for row in cut])]).astype(np.int64)
        empty = np.zeros(0, dtype=np.int64)
        return cls(indptr, np.concatenate([empty, *cut]))

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitem__(self, row: int) -> IntArray:
        return self.tokens[self.indptr[row] : self.indptr[row + 1]]

    @property
    def lengths(self) -> IntArray:
        """Tokens of each text, (n,)."""
        return np.diff(self.indptr)

    def owners(self) -> IntArray:
        """Text of each token, (nnz,)."""
        return np.repeat(np.arange(len(self)), self.lengths)


@dataclass(frozen=True, eq=False)
class TextForm:
    """How token numbers of items become what the model reads.

    Attributes
    ----------
    pieces : TokenRows
        Of each item.
    head, tail : tuple of int
        Tokens before and after.
    pad : int
        Token of padding.
    max_tokens : int
        Longest text; the oldest items are left out to keep to it.
    newest_first : bool, default=True
        Whether a history starts with the latest item.
    between : int, default=0
        The first so many tokens of a piece stand between items; the first item goes without.
    """

    pieces: TokenRows
    head: tuple[int, ...]
    tail: tuple[int, ...]
    pad: int
    max_tokens: int
    newest_first: bool = True
    between: int = 0

    def kept(self, items: IntArray) -> NDArray[np.bool_]:
        """Tell which items (n, H), the latest first and -1 for none, there is room for."""
        # What stands between items is not read of the first one.
        room = self.max_tokens - len(self.head) - len(self.tail) + self.between
        lengths = np.where(items >= 0, self.pieces.lengths[items], 0)
        # The latest item is always read; a single one that is too long is cut.
        fits = np.cumsum(lengths, axis=1) <= room
        fits[:, :1] = True
        return fits & (items >= 0)

    def lengths(self, items: IntArray) -> IntArray:
        """Count the tokens (n,) of histories (n, H), the latest first and -1 for none."""
        tokens = np.where(self.kept(items), self.pieces.lengths[items], 0).sum(axis=1)
        tokens -= np.minimum(tokens, self.between)
        total: IntArray = np.minimum(tokens + len(self.head) + len(self.tail), self.max_tokens)
        return total

    def read(self, items: IntArray) -> tuple[IntArray, NDArray[np.bool_]]:
        """Write histories out as padded token numbers.

        Parameters
        ----------
        items : ndarray of shape (n, H), int64
            Item codes, the latest first; -1 for none, behind the others.

        Returns
        -------
        tokens : ndarray of shape (n, L), int64
            L is the longest of these histories, and at least 1.
        mask : ndarray of shape (n, L), bool
        """
        kept = self.kept(items)
        if not self.newest_first:
            items, kept = items[:, ::-1], kept[:, ::-1]
        owners, _ = np.nonzero(kept)
        codes = items[kept]
        places = concatenate_ranges(self.pieces.indptr, codes)
        owner = np.repeat(owners, self.pieces.lengths[codes])
        counts = np.bincount(owner, minlength=len(items))
        starts = np.cumsum(counts) - counts
        at = np.arange(len(places)) - starts[owner] + len(self.head) - self.between
        room = self.max_tokens - len(self.tail)
        inside = (at >= len(self.head)) & (at < room)
        ends = np.minimum(np.maximum(counts - self.between, 0) + len(self.head), room)
        width = max(1, int((ends + len(self.tail)).max(initial=len(self.head))))
        tokens = np.full((len(items), width), self.pad, dtype=np.int64)
        tokens[:, : len(self.head)] = self.head
        tokens[owner[inside], at[inside]] = self.pieces.tokens[places[inside]]
        for shift, token in enumerate(self.tail):
            tokens[np.arange(len(items)), ends + shift] = token
        mask = np.arange(width) < np.maximum(ends + len(self.tail), 1)[:, None]
        return tokens, mask


def last_items(
    indptr: IntArray, items: IntArray, users: IntArray, ends: IntArray, n: int
) -> IntArray:
    """Take the last `n` items of users before some place in their histories.

    Parameters
    ----------
    indptr, items : ndarray
        Histories, the oldest item first.
    users : ndarray of shape (m,), int64
    ends : ndarray of shape (m,), int64
        How many of the user's items lie before.
    n : int

    Returns
    -------
    ndarray of shape (m, n), int64
        The latest first; -1 behind them.

    Examples
    --------
    >>> import numpy as np
    >>> from fedrecsk.models.text_vectors import last_items
    >>> one_user = np.array([0]), np.array([2])
    >>> last_items(np.array([0, 3]), np.array([7, 8, 9]), *one_user, 3).tolist()
    [[8, 7, -1]]
    """
    back = np.arange(1, n + 1)
    places = ends[:, None] - back
    known = places >= 0
    found = items[np.where(known, indptr[users][:, None] + places, 0)] if len(items) else places
    return np.where(known, found, -1)


def pad_rows(
    rows: Sequence[Sequence[int]],
    pad: int,
    device: torch.device | None = None,
    *,
    side: Literal["left", "right"] = "right",
) -> tuple[Tensor, Tensor]:
    """Put token numbers side by side: tokens (n, L) and mask (n, L), both int64.

    The padding is on the given side. An empty row is read as a single pad token.

    Examples
    --------
    >>> from fedrecsk.models.text_vectors import pad_rows
    >>> tokens, mask = pad_rows([[5, 6], [7]], pad=0)
    >>> tokens.tolist(), mask.tolist()
    ([[5, 6], [7, 0]], [[1, 1], [1, 0]])
    """
    filled = [list(row) or [pad] for row in rows]
    width = max([1, *map(len, filled)])
    tokens, mask = [], []
    for row in filled:
        padding, nothing, ones = (
            [pad] * (width - len(row)),
            [0] * (width - len(row)),
            [1] * len(row),
        )
        tokens.append([*padding, *row] if side == "left" else [*row, *padding])
        mask.append([*nothing, *ones] if side == "left" else [*ones, *nothing])
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def pooled(hidden: Tensor, mask: Tensor, how: Pooling) -> Tensor:
    """Turn hidden states of tokens into one vector a text, of length 1.

    Parameters
    ----------
    hidden : Tensor of shape (n, L, d)
    mask : Tensor of shape (n, L)
        1 for tokens, 0 for the padding behind them.
    how : {"mean", "cls", "last"}
        The mean of all tokens, the first token, or the last one.

    Returns
    -------
    Tensor of shape (n, d), float32
    """
    if how == "cls":
        found = hidden[:, 0]
    elif how == "last":
        found = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    else:
        weights = mask[:, :, None].to(torch.float32)
        found = (hidden.float() * weights).sum(1) / weights.sum(1)
    return functional.normalize(found.float(), dim=-1)


@torch.no_grad()
def encode_texts(
    run: Callable[[Tensor, Tensor], Tensor],
    form: TextForm,
    items: ArrayLike,
    width: int,
    device: torch.device,
) -> Tensor:
    """Turn many histories, or single items, into vectors.

    Parameters
    ----------
    run : callable
        ``run(tokens (n, L), mask (n, L)) -> vectors (n, d)``.
    form : TextForm
    items : array-like of shape (n, H)
        As in `TextForm.read`; with H = 1 an item's own text.
    width : int
        d.
    device : torch.device

    Returns
    -------
    Tensor of shape (n, d), float32
        Texts of about the same length go through the model together.
    """
    codes = np.asarray(items, dtype=np.int64)
    lengths = form.lengths(codes)
    order = np.argsort(-lengths, kind="stable")
    vectors = torch.empty(len(codes), width, device=device)
    start = 0
    while start < len(order):
        size = max(1, TOKENS_PER_BATCH // max(1, int(lengths[order[start]])))
        chosen = order[start : start + size]
        tokens, mask = form.read(codes[chosen])
        places = torch.from_numpy(chosen).to(device)
        vectors[places] = run(
            torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device).long()
        )
        start += size
    return vectors


def ranking_loss(
    queries: Tensor,
    candidates: Tensor,
    targets: Tensor,
    codes: Tensor,
    *,
    prior: Tensor,
    expected: Tensor,
    present: Tensor,
    temperature: float,
) -> Tensor:
    """Softmax loss of the next item among candidates, a sum for each client.

    Parameters
    ----------
    queries : Tensor of shape (C, B, d)
        Vectors of histories, of length 1.
    candidates : Tensor of shape (C, M, d)
        Vectors of items, of length 1.
    targets : Tensor of shape (C, B), int64
        Item code of each next item.
    codes : Tensor of shape (C, M), int64
        Item codes of the candidates; the first B are the targets.
    prior : Tensor of shape (C, M)
        Added to the score of a candidate, see `fedrecsk.models.text_vectors`.
    expected : Tensor of shape (C, M)
        How often a candidate is to be expected among the candidates.
    present : Tensor of shape (C, B), bool
        Examples that are there.
    temperature : float

    Returns
    -------
    Tensor of shape (C,)
        An example's own target counts once: other copies of it are left out, and so are the
        targets of examples that are not there.
    """
    n = targets.shape[1]
    scores = queries @ candidates.transpose(1, 2) / temperature  # (C, B, M)
    # The target of an absent example may be expected nowhere; infinite scores have no gradient.
    scores = scores + (prior - expected.clamp_min(_FEWEST).log())[:, None, :]
    own = torch.eye(n, codes.shape[1], dtype=torch.bool, device=scores.device)
    copies = (codes[:, None, :] == targets[:, :, None]) & ~own
    there = functional.pad(present, (0, codes.shape[1] - n), value=True)
    scores = scores.masked_fill(copies | ~(there[:, None, :] | own), _MASKED)
    losses = torch.logsumexp(scores, dim=2) - scores[:, :, :n].diagonal(dim1=1, dim2=2)
    return torch.where(present, losses, 0.0).sum(1)
