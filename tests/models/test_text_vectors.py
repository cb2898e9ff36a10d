import math

import numpy as np
import pytest
import torch

from fedrecsk.models import text_vectors
from fedrecsk.models.text_vectors import (
    TextForm,
    TokenRows,
    encode_texts,
    last_items,
    pad_rows,
    pooled,
    ranking_loss,
)

PAD = 0
COMMA = [7, 8]
# Tokens of each item's text: none, some, and more than there is room for.
ITEMS = [[11], [21, 22, 23], [], [41, 42], [51, 52, 53, 54, 55, 56, 57, 58, 59]]


def form_of(head=(1, 2), tail=(3,), max_tokens=10, newest_first=True, between=0, items=ITEMS):
    pieces = [[*COMMA[:between], *item] for item in items]
    return TextForm(TokenRows.of(pieces), head, tail, PAD, max_tokens, newest_first, between)


def plain_text(form, history, items=ITEMS):
    """One history, the latest first: as many of the latest items as there is room for."""
    room = form.max_tokens - len(form.head) - len(form.tail)

    def joined(latest):
        tokens = []
        for item in latest if form.newest_first else latest[::-1]:
            if form.between and tokens:
                tokens += COMMA[: form.between]
            # An empty item is followed by what stands between items as any other.
            tokens += items[item] or ([None] if form.between else [])
        return [token for token in tokens if token is not None]

    kept = max(
        (n for n in range(1, len(history) + 1) if n == 1 or len(joined(history[:n])) <= room),
        default=0,
    )
    return [*form.head, *joined(history[:kept])[:room], *form.tail]


def padded_histories(histories, width):
    return np.array([[*row, *[-1] * (width - len(row))] for row in histories]).reshape(-1, width)


def random_histories(n, width, n_items, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, n_items, rng.integers(0, width + 1)).tolist() for _ in range(n)]


FORMS = [
    {},
    {"newest_first": False},
    {"newest_first": False, "between": 1},
    {"newest_first": False, "between": 2, "max_tokens": 12},
    {"newest_first": True, "between": 2},
    {"head": (), "tail": ()},
    {"head": (), "tail": (3, 4), "newest_first": False, "between": 1},
    {"tail": (), "max_tokens": 3},
]


@pytest.mark.parametrize("setting", FORMS)
def test_histories_are_written_as_defined(setting):
    items = [item or [31] for item in ITEMS] if setting.get("between") else ITEMS
    form = form_of(**setting, items=items)
    histories = random_histories(300, 5, len(items))
    tokens, mask = form.read(padded_histories(histories, 5))
    assert tokens.dtype == np.int64
    assert mask.dtype == np.bool_
    assert tokens.shape == mask.shape
    texts = [plain_text(form, history, items) for history in histories]
    assert mask.shape[1] == max(map(len, texts))
    for row, there, text in zip(tokens, mask, texts, strict=True):
        n = max(len(text), 1)  # a model needs a token to read
        assert there.tolist() == [True] * n + [False] * (mask.shape[1] - n)
        assert row.tolist() == text + [PAD] * (mask.shape[1] - len(text))
    lengths = form.lengths(padded_histories(histories, 5))
    assert lengths.tolist() == [len(text) for text in texts]


def test_the_oldest_items_are_left_out():
    form = form_of(head=(1,), tail=(2,), max_tokens=7)
    tokens, _ = form.read(np.array([[3, 1, 0]]))  # 2 + 3 + 1 tokens for a room of 5
    assert tokens.tolist() == [[1, 41, 42, 21, 22, 23, 2]]
    # Also where an older one would still fit.
    assert form.read(np.array([[3, 1, 1, 0]]))[0].tolist() == tokens.tolist()


def test_what_stands_between_is_not_counted_of_the_first_item():
    form = form_of(head=(1,), tail=(2,), max_tokens=9, newest_first=False, between=2)
    tokens, _ = form.read(np.array([[3, 1]]))  # 3 + 2 + 2 tokens fill the room of 7
    assert tokens.tolist() == [[1, 21, 22, 23, *COMMA, 41, 42, 2]]


def test_one_item_too_long_is_cut():
    for newest_first in (True, False):
        form = form_of(head=(1,), tail=(2, 3), max_tokens=7, newest_first=newest_first)
        tokens, mask = form.read(np.array([[4, 0]]))
        assert tokens.tolist() == [[1, 51, 52, 53, 54, 2, 3]]
        assert mask.all()


def test_empty_histories():
    nothing = np.full((2, 3), -1)
    assert form_of().read(nothing)[0].tolist() == [[1, 2, 3]] * 2
    tokens, mask = form_of(head=(), tail=()).read(nothing)
    assert (tokens.tolist(), mask.tolist()) == ([[PAD]] * 2, [[True]] * 2)
    tokens, mask = form_of().read(nothing[:0])
    assert len(tokens) == len(mask) == 0
    nobody_and_somebody = form_of(between=1, newest_first=False).read(np.array([[-1, -1], [0, 3]]))
    assert nobody_and_somebody[0].tolist() == [
        [1, 2, 3, PAD, PAD, PAD, PAD],
        [1, 2, 41, 42, 7, 11, 3],
    ]


def test_last_items():
    histories = [[5, 6, 7, 8], [], [9]]
    indptr = np.cumsum([0, *map(len, histories)])
    items = np.concatenate(histories).astype(np.int64)
    users = np.array([0, 0, 0, 1, 2, 2])
    ends = np.array([4, 2, 0, 0, 1, 0])
    found = last_items(indptr, items, users, ends, 3)
    expected = [histories[user][:end][::-1][:3] for user, end in zip(users, ends, strict=True)]
    assert found.tolist() == [row + [-1] * (3 - len(row)) for row in expected]
    nobody = last_items(np.zeros(2, dtype=np.int64), items[:0], users[3:4], ends[3:4], 2)
    assert nobody.tolist() == [[-1, -1]]


def test_token_rows_are_cut():
    rows = TokenRows.of([[1, 2, 3], [], [4]], max_length=2)
    assert [rows[place].tolist() for place in range(len(rows))] == [[1, 2], [], [4]]
    assert len(TokenRows.of([])) == 0
    assert TokenRows.of([]).tokens.dtype == np.int64


def test_pad_rows_give_an_empty_text_a_token():
    tokens, mask = pad_rows([[], [5, 6]], PAD)
    assert (tokens.tolist(), mask.tolist()) == ([[PAD, PAD], [5, 6]], [[1, 0], [1, 1]])


@pytest.mark.parametrize("how", ["mean", "cls", "last"])
def test_padding_is_not_pooled(how):
    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    lengths = [5, 1, 3]
    mask = torch.tensor([[1] * n + [0] * (5 - n) for n in lengths])
    found = pooled(hidden, mask, how)
    assert pooled(hidden.bfloat16(), mask, how).dtype == torch.float32
    for row, n, vector in zip(hidden, lengths, found, strict=True):
        own = {"mean": row[:n].mean(0), "cls": row[0], "last": row[n - 1]}[how]
        torch.testing.assert_close(vector, own / own.norm())


def test_vectors_do_not_depend_on_batches(monkeypatch):
    form = form_of(max_tokens=12)
    histories = padded_histories(random_histories(60, 4, len(ITEMS)), 4)
    table = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    rows_seen = []

    def run(tokens, mask):
        rows_seen.append(mask.numel())
        return pooled(table[tokens], mask, "mean")

    device = torch.device("cpu")
    together = encode_texts(run, form, histories, 6, device)
    assert len(rows_seen) == 1
    alone = torch.cat([encode_texts(run, form, row[None], 6, device) for row in histories])
    rows_seen.clear()
    monkeypatch.setattr(text_vectors, "TOKENS_PER_BATCH", 30)
    in_batches = encode_texts(run, form, histories, 6, device)
    assert len(rows_seen) > 5
    assert max(rows_seen) <= 30
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(in_batches, alone)
    assert encode_texts(run, form, histories[:0], 6, device).shape == (0, 6)
    monkeypatch.setattr(text_vectors, "TOKENS_PER_BATCH", 1)  # below the longest text
    torch.testing.assert_close(encode_texts(run, form, histories[:7], 6, device), alone[:7])


def random_step(seed, n_clients=3, size=5, n_negatives=4, n_items=6, width=4):
    """Vectors, items and flags of a step; few items, so that there are many copies."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)

    def vectors(n):
        drawn = torch.randn(n_clients, n, width, generator=generator)
        return (drawn / drawn.norm(dim=-1, keepdim=True)).requires_grad_(True)

    present = torch.from_numpy(rng.random((n_clients, size)) < 0.7)
    targets = torch.from_numpy(rng.integers(0, n_items, (n_clients, size)))
    targets = torch.where(present, targets, 0)
    negatives = torch.from_numpy(rng.integers(0, n_items, (n_clients, n_negatives)))
    codes = torch.cat([targets, negatives], dim=1)
    prior = torch.rand(n_clients, n_items, generator=generator).gather(1, codes)
    expected = (0.1 + torch.rand(n_clients, n_items, generator=generator)).gather(1, codes)
    return vectors(size), vectors(size + n_negatives), targets, codes, prior, expected, present


def plain_ranking_loss(
    queries, candidates, targets, codes, *, prior, expected, present, temperature
):
    """One example and one candidate at a time."""
    sums = []
    n = targets.shape[1]
    for c in range(len(queries)):
        total = torch.zeros(())
        for b in range(n):
            if not present[c, b]:
                continue
            scores, own = [], None
            for m in range(codes.shape[1]):
                score = queries[c, b].dot(candidates[c, m]) / temperature
                score = score + prior[c, m] - math.log(expected[c, m])
                if m == b:
                    own = score
                elif codes[c, m] == targets[c, b] or (m < n and not present[c, m]):
                    continue
                scores.append(score)
            total = total + torch.stack(scores).logsumexp(0) - own
        sums.append(total)
    return torch.stack(sums)


@pytest.mark.parametrize("n_negatives", [0, 4])
def test_ranking_loss_is_that_of_a_loop(n_negatives):
    for seed in range(5):
        step = random_step(seed, n_negatives=n_negatives)
        queries, candidates, targets, codes, prior, expected, present = step
        rest = {"prior": prior, "expected": expected, "present": present, "temperature": 0.3}
        losses = ranking_loss(queries, candidates, targets, codes, **rest)
        grads = torch.autograd.grad(losses.sum(), (queries, candidates))
        slow = plain_ranking_loss(queries, candidates, targets, codes, **rest)
        slow_grads = torch.autograd.grad(slow.sum(), (queries, candidates))
        torch.testing.assert_close(losses, slow, rtol=1e-5, atol=1e-5)
        for one, other in zip(grads, slow_grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_absent_examples_neither_count_nor_spoil_the_gradient():
    queries, candidates, targets, codes, prior, expected, present = random_step(1)
    # An absent example stands at item 0, which this client may never have chosen.
    absent = torch.cat([~present, torch.zeros(3, 4, dtype=torch.bool)], dim=1)
    expected = torch.where(absent, 0.0, expected)
    losses = ranking_loss(
        queries,
        candidates,
        targets,
        codes,
        prior=prior,
        expected=expected,
        present=present,
        temperature=0.3,
    )
    grads = torch.autograd.grad(losses.sum(), (queries, candidates))
    assert losses.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][~present].any()
    assert not grads[1][absent].any()
    assert grads[0][present].any(dim=-1).all()


def test_a_right_guess_costs_little():
    queries = torch.eye(2)[None]
    codes = torch.tensor([[4, 7]])

    def loss(candidates, both_present=True):
        return float(
            ranking_loss(
                queries,
                candidates,
                codes,
                codes,
                prior=torch.zeros(1, 2),
                expected=torch.ones(1, 2),
                present=torch.tensor([[True, both_present]]),
                temperature=0.05,
            )
        )

    assert loss(queries) < 1e-6
    assert loss(queries.flip(1)) == pytest.approx(2 / 0.05)
    assert (
        loss(queries.flip(1), both_present=False) == 0.0
    )  # the rival belongs to an absent example
