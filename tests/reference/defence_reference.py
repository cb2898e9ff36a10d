"""Defences written out, one row of the table and one column at a time."""

from __future__ import annotations

import math

import numpy as np


def laid_out(uploads, n_items):
    """Return a dict of item to {client position: row}, in double precision."""
    table = {item: {} for item in range(n_items)}
    for client, item, row in zip(
        uploads.row_clients.tolist(), uploads.row_items.tolist(), uploads.rows.double().numpy(),
        strict=True,
    ):  # fmt: skip
        table[item][client] = row
    return table


def shortened(vectors, quantile, believed=None):
    """Shorten vectors (n, w) to a quantile of their lengths.

    With `believed`, lengthen all so that they are as long together as they would be, were they
    shortened to that quantile.
    """
    vectors = np.asarray(vectors, dtype=float)
    if not vectors.size or quantile >= 1:
        return vectors
    lengths = [math.sqrt(sum(x * x for x in vector)) for vector in vectors]

    def short(share):
        bound = sorted(lengths)[max(1, math.ceil(share * len(lengths))) - 1]
        return [min(length, bound) for length in lengths]

    after = short(quantile)
    factor = sum(short(max(quantile, believed or 0))) / sum(after)
    return np.array([v * (factor * a / n) for v, n, a in zip(vectors, lengths, after, strict=True)])


def trimmed(values, cut):
    """Mean of a list of numbers without `cut` at either end, at least the median."""
    left_out = min(cut, (len(values) - 1) // 2)
    kept = sorted(values)[left_out : len(values) - left_out]
    return sum(kept) / len(kept)


def central_mean(vectors, cut):
    """Mean of the vectors that are nearest to the lower median of each column."""
    vectors = np.asarray(vectors, dtype=float)
    middle = [sorted(column)[(len(column) - 1) // 2] for column in vectors.T]
    apart = [math.dist(vector, middle) for vector in vectors]
    n_kept = max(len(vectors) - cut, len(vectors) // 2 + 1)
    return vectors[np.argsort(apart, kind="stable")[:n_kept]].mean(axis=0)


def krum_scores(uploads, n_items, n_malicious):
    """Sum over a client's nearest of the mean squared distance of rows that both sent."""
    n_clients = len(uploads.clients)
    sent = [{} for _ in range(n_clients)]
    for item, rows in laid_out(uploads, n_items).items():
        for client, row in rows.items():
            sent[client][item] = row
    numbers = uploads.numbers.double().numpy()
    apart = np.full((n_clients, n_clients), np.nan)
    for a in range(n_clients):
        for b in range(n_clients):
            common = sent[a].keys() & sent[b].keys()
            if common and a != b:
                apart[a, b] = np.mean([((sent[a][i] - sent[b][i]) ** 2).sum() for i in common])
    known = np.sort(apart[~np.isnan(apart)])
    # The lower median, as torch has it.
    apart[np.isnan(apart)] = known[(len(known) - 1) // 2] if len(known) else 0.0
    if numbers.shape[1]:
        apart += ((numbers[:, None] - numbers[None]) ** 2).mean(axis=2)
    scores = []
    for a in range(n_clients):
        others = np.sort(np.delete(apart[a], a))
        scores.append(others[: max(1, n_clients - n_malicious - 2)].sum())
    return np.array(scores)
