import numpy as np
import pytest
import torch
from torch import nn

from fedrecsk.models.lora_training import length_buckets, train_adapters
from fedrecsk.models.stacked_lora import StackedLoRA, select
from tests.reference.lora_reference import (
    MODELS,
    VOCABULARY,
    adapter_of,
    peft_model,
    tiny_model,
    train_alone,
)

# PEFT still calls transformers' attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

RANK, ALPHA = 4, 8.0
N_TEXTS = (7, 3, 5)  # of each client
BATCH, EPOCHS = 4, 3


def client_texts(n_texts=N_TEXTS):
    """Each client's texts, 3 to 9 tokens long."""
    rng = np.random.default_rng(0)
    return [
        [torch.from_numpy(rng.integers(3, VOCABULARY, rng.integers(3, 10))) for _ in range(n)]
        for n in n_texts
    ]


def plan_epochs(texts, epochs=EPOCHS):
    lengths = [[len(text) for text in own] for own in texts]
    steps = []
    for epoch in range(epochs):
        own = [np.random.default_rng((epoch, client)) for client in range(len(texts))]
        steps += length_buckets(lengths, BATCH, own, np.random.default_rng(epoch))
    return steps


def padded(texts, examples):
    """Stack the texts (C * B, L) that a part (C, B) of a step names, and how long they are."""
    rows = [
        texts[client][example] if example >= 0 else torch.zeros(1, dtype=torch.int64)
        for client, own in enumerate(examples)
        for example in own
    ]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, torch.tensor([len(row) for row in rows]), torch.from_numpy(examples >= 0)


def micro_batches(texts, step, accumulate):
    """Cut a step's plan (C, B) into micro-batches."""
    parts = np.array_split(step, accumulate, axis=1)
    return [(padded(texts, part), torch.from_numpy((part >= 0).sum(1))) for part in parts]


def stacked_loss(lora, adapters, batch):
    """Sum of the losses of each client's texts, (C,), over padded texts."""
    ids, lengths, real = batch
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    with lora.using(adapters) as model:
        output = model(input_ids=ids, attention_mask=mask.long())
    if hasattr(output, "logits"):
        logits = output.logits[:, :-1].transpose(1, 2)
        losses = nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none")
        losses = (losses * mask[:, 1:]).sum(1) / (lengths - 1).clamp_min(1)
    else:
        middle = (output.last_hidden_state * mask[..., None]).sum(1) / lengths[:, None]
        losses = (middle - ids[:, :1] / VOCABULARY).square().mean(1)
    return torch.where(real, losses.view(real.shape), 0.0).sum(1)


def alone(lora, kind, adapters, client, texts, steps, accumulate, **parameters):
    """Train one client by the reference, on its part of the plan."""
    wrapped = peft_model(
        tiny_model(kind),
        {name: value[client] for name, value in adapters.items()},
        lora.targets,
        rank=RANK,
        alpha=ALPHA,
        fan_in_fan_out=lora.fan_in_fan_out,
    )
    own = []
    for step in steps:
        parts = np.array_split(step[client], accumulate)
        parts = [[int(example) for example in part if example >= 0] for part in parts]
        if any(parts):
            own.append([part for part in parts if part])
    loss = train_alone(wrapped, texts[client], own, **parameters)
    return adapter_of(wrapped, adapters), loss


def different_adapters(lora):
    """Each client's own start, so that a mistake of the client shows."""
    drawn = lora.init(len(N_TEXTS), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in drawn.items()
    }


# Training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_stacked_training_is_training_each_client_alone_with_peft(kind, accumulate):
    lora = StackedLoRA(tiny_model(kind), rank=RANK, alpha=ALPHA)
    start, texts = different_adapters(lora), client_texts()
    steps = plan_epochs(texts)
    parameters = {"learning_rate": 3e-3, "weight_decay": 0.1}
    trained, losses = train_adapters(
        start,
        lambda adapters, batch: stacked_loss(lora, adapters, batch),
        (micro_batches(texts, step, accumulate) for step in steps),
        **parameters,
    )
    assert list(trained) == list(start)
    for client in range(len(texts)):
        expected, loss = alone(lora, kind, start, client, texts, steps, accumulate, **parameters)
        assert losses[client].item() == pytest.approx(loss, rel=1e-5)
        for name, value in expected.items():
            torch.testing.assert_close(trained[name][client], value, rtol=0, atol=1e-5)
            assert (value - start[name][client]).abs().max() > 3e-3


@pytest.mark.parametrize("common", [False, True], ids=["ditto", "fedprox"])
def test_clipping_and_the_proximal_term(common):
    lora = StackedLoRA(tiny_model("bert"), rank=RANK, alpha=ALPHA)
    start, texts = different_adapters(lora), client_texts()
    steps = plan_epochs(texts, epochs=2)
    anchor = {name: value.flip(0) + 0.02 for name, value in start.items()}
    if common:
        anchor = select(anchor, [1])
    parameters = {
        "learning_rate": 3e-3,
        "betas": (0.8, 0.95),
        "eps": 1e-4,
        "max_grad_norm": 0.5,
        "proximal": 0.3,
    }
    # The order of the anchor's names must not matter.
    trained, _ = train_adapters(
        start,
        lambda adapters, batch: stacked_loss(lora, adapters, batch),
        [micro_batches(texts, step, 1) for step in steps],
        anchor=dict(reversed(anchor.items())),
        **parameters,
    )
    for client in range(len(texts)):
        own = {name: value[0 if common else client] for name, value in anchor.items()}
        expected, _ = alone(lora, "bert", start, client, texts, steps, 1, anchor=own, **parameters)
        for name, value in expected.items():
            torch.testing.assert_close(trained[name][client], value, rtol=0, atol=1e-5)


def regression(params, batch):
    """Sum of squared errors of each client's own linear model on rows (C, n, 3)."""
    x, y, real = batch
    return ((x @ params["w"][:, :, None])[:, :, 0] - y).square().mul(real).sum(1)


@pytest.fixture
def problem():
    """Start, and two steps of six rows for four clients, of which the last has none."""
    generator = torch.Generator().manual_seed(0)
    start = {"w": torch.randn(4, 3, generator=generator)}
    counts = torch.tensor([[6, 4, 1, 0], [6, 0, 3, 0]])
    batches = []
    for count in counts:
        x = torch.randn(4, 6, 3, generator=generator)
        y = torch.randn(4, 6, generator=generator)
        batches.append((x, y, (torch.arange(6) < count[:, None]).float()))
    return start, batches


def cut(batch, sizes):
    """Micro-batches of the given numbers of rows."""
    parts = zip(*[torch.split(value, sizes, dim=1) for value in batch], strict=True)
    return [(part, part[2].sum(1)) for part in parts]


@pytest.mark.parametrize("sizes", [[3, 3], [1, 5], [2, 2, 1, 1]])
def test_accumulation_changes_nothing(problem, sizes):
    start, batches = problem
    whole, losses = train_adapters(
        start, regression, [cut(batch, [6]) for batch in batches], learning_rate=0.1
    )
    parts, again = train_adapters(
        start, regression, [cut(batch, sizes) for batch in batches], learning_rate=0.1
    )
    torch.testing.assert_close(parts["w"], whole["w"])
    torch.testing.assert_close(again, losses)


def test_clients_move_by_their_own_examples_and_steps(problem):
    """A client's training is the same alone and beside others, also after it has run out."""
    start, batches = problem
    before = {name: value.clone() for name, value in start.items()}
    together, losses = train_adapters(
        start,
        regression,
        [cut(batch, [6]) for batch in [*batches, *batches]],
        learning_rate=0.1,
        weight_decay=0.5,
    )
    assert torch.equal(start["w"], before["w"])
    assert not start["w"].requires_grad
    assert not together["w"].requires_grad
    for client in range(3):
        own = [
            [value[client : client + 1] for value in batch]
            for batch in [*batches, *batches]
            if batch[2][client].any()
        ]
        expected, loss = train_adapters(
            select(start, [client]),
            regression,
            [cut(batch, [6]) for batch in own],
            learning_rate=0.1,
            weight_decay=0.5,
        )
        torch.testing.assert_close(together["w"][client], expected["w"][0], rtol=1e-6, atol=1e-7)
        assert losses[client].item() == pytest.approx(loss.item(), rel=1e-6)
    assert torch.equal(together["w"][3], start["w"][3])
    assert losses[3] == 0


def test_gradients_below_the_largest_norm_stay_as_they_are(problem):
    start, batches = problem
    steps = [cut(batch, [6]) for batch in [*batches, *batches]]
    free, _ = train_adapters(start, regression, steps, learning_rate=0.1)
    loose, _ = train_adapters(start, regression, steps, learning_rate=0.1, max_grad_norm=1e6)
    tight, _ = train_adapters(start, regression, steps, learning_rate=0.1, max_grad_norm=1.0)
    assert torch.equal(loose["w"], free["w"])
    assert not torch.allclose(tight["w"][:3], free["w"][:3], atol=1e-3)


def test_losses_are_means_over_the_examples_seen(problem):
    start, batches = problem
    batch = batches[0]
    _, losses = train_adapters(start, regression, [cut(batch, [3, 3])], learning_rate=0.1)
    expected = regression(start, batch)[:3] / torch.tensor([6.0, 4.0, 1.0])
    torch.testing.assert_close(losses[:3], expected)
    _, twice = train_adapters(start, regression, [cut(batch, [6])] * 2, learning_rate=0.1)
    assert (twice[:3] < losses[:3]).all()
    _, none = train_adapters(start, regression, [], learning_rate=0.1)
    assert none.tolist() == [0, 0, 0, 0]


def test_a_client_without_examples_may_have_any_loss(problem):
    """Such as 0 / 0, a mean over nothing."""
    start, batches = problem

    def spoiled(params, batch):
        losses = regression(params, batch)
        return losses * (batch[2].sum(1) / batch[2].sum(1))

    steps = [cut(batch, [4, 2]) for batch in batches]
    good, losses = train_adapters(start, regression, steps, learning_rate=0.1)
    same, again = train_adapters(start, spoiled, steps, learning_rate=0.1)
    assert same["w"].isfinite().all()
    torch.testing.assert_close(same["w"], good["w"])
    torch.testing.assert_close(again, losses)


def test_adapters_that_the_loss_does_not_use_stay():
    start = {"unused": torch.ones(2, 3), "w": torch.ones(2, 1), "unused_too": torch.ones(2, 1)}
    step = [(None, torch.tensor([1, 1]))]
    trained, _ = train_adapters(
        start, lambda params, batch: params["w"].square().sum(1), [step], learning_rate=0.1
    )
    assert torch.equal(trained["unused"], start["unused"])
    assert torch.equal(trained["unused_too"], start["unused_too"])
    assert (trained["w"] < 1).all()


def test_losses_may_come_from_the_present_clients_only(problem):
    start, batches = problem

    def of_present(params, batch):
        present = batch[2].any(1).nonzero()[:, 0]
        losses = regression(select(params, present), [value[present] for value in batch])
        return torch.zeros(4).index_put((present,), losses)

    steps = [cut(batch, [6]) for batch in batches]
    trained, losses = train_adapters(start, of_present, steps, learning_rate=0.1)
    expected, seen = train_adapters(start, regression, steps, learning_rate=0.1)
    torch.testing.assert_close(trained["w"], expected["w"])
    torch.testing.assert_close(losses, seen)


def test_anchors_that_do_not_fit(problem):
    start, _ = problem
    with pytest.raises(ValueError, match="pulls the adapters to an anchor: give one"):
        train_adapters(start, regression, [], learning_rate=0.1, proximal=1.0)
    for anchor, found in [
        ({}, "none"),
        ({"w": torch.zeros(2, 3)}, r"\(2, 3\)"),
        ({"w": torch.zeros(4, 1)}, r"\(4, 1\)"),
    ]:
        with pytest.raises(ValueError, match=rf"w of the shape \(4, 3\), .* got {found}"):
            train_adapters(start, regression, [], learning_rate=0.1, proximal=1.0, anchor=anchor)


# Plans -------------------------------------------------------------------------------------

LENGTHS = [
    np.random.default_rng(client).integers(3, 60, n) for client, n in enumerate([250, 90, 7, 0, 64])
]
SIZE = 8


def plan(clients=range(5), order=9, lengths=LENGTHS, **parameters):
    return length_buckets(
        [lengths[client] for client in clients],
        SIZE,
        [np.random.default_rng((1, client)) for client in clients],
        np.random.default_rng(order),
        **parameters,
    )


def batches_of(steps, row):
    return [step[row][step[row] >= 0].tolist() for step in steps if (step[row] >= 0).any()]


@pytest.mark.parametrize("window", [1, 3, 8])
def test_every_example_comes_once(window):
    steps = plan(window=window)
    assert len(steps) == 32
    assert all(step.shape == (5, SIZE) and step.dtype == np.int64 for step in steps)
    for row, own in enumerate(LENGTHS):
        batches = batches_of(steps, row)
        assert sorted(example for batch in batches for example in batch) == list(range(len(own)))
        sizes = sorted(len(batch) for batch in batches)
        assert sizes[1:] == [SIZE] * (len(batches) - 1)
        # The first steps, all of them: the client is done as early as can be.
        present = [bool((step[row] >= 0).any()) for step in steps]
        assert present == [place < -(-len(own) // SIZE) for place in range(len(steps))]
        for step in steps:
            filled = (step[row] >= 0).sum()
            assert (step[row, filled:] == -1).all()
        for batch in batches:
            assert (np.diff(own[batch]) >= 0).all()


def test_a_clients_plan_depends_on_no_other_client():
    together = plan()
    for row in range(5):
        assert batches_of(plan([row]), 0) == batches_of(together, row)
    assert batches_of(plan([4, 0]), 1) == batches_of(together, 0)
    assert batches_of(plan(order=10), 0) != batches_of(together, 0)


def padding(steps, lengths, rows):
    """Share of a stacked batch that is padding, over the steps in which all rows are present."""
    real = everything = 0
    for step in steps:
        if (step[rows] < 0).any():
            continue
        found = np.array([lengths[row][step[row]] for row in rows])
        real += found.sum()
        everything += found.size * found.max()
    return 1 - real / everything


def test_stacked_batches_pad_little():
    rows = [0, 1, 4]
    shuffled = padding(plan(window=1), LENGTHS, rows)
    bucketed = padding(plan(window=8), LENGTHS, rows)
    # The same batches, but each client's in an order of its own.
    apart = [
        length_buckets([LENGTHS[row]], SIZE, [np.random.default_rng((1, row))], order)
        for row, order in zip(rows, map(np.random.default_rng, (20, 21, 22)), strict=True)
    ]
    unpaired = [np.concatenate(steps) for steps in zip(*apart, strict=False)]
    unpaired_padding = padding(unpaired, [LENGTHS[row] for row in rows], [0, 1, 2])
    assert bucketed < 0.3 < 0.35 < unpaired_padding
    assert bucketed < 0.3 < 0.35 < shuffled


def test_batches_come_in_random_order():
    """No part of an epoch has the long texts, and no two epochs are alike."""
    means = []
    for order in range(300):
        steps = plan([4], order=order)
        means.append([LENGTHS[4][step[0]].mean() for step in steps])
    means = np.array(means)  # (epochs, steps)
    share = np.argsort(np.argsort(means, axis=1), axis=1).mean(0) / (means.shape[1] - 1)
    assert abs(share - 0.5).max() < 0.1
    assert len({tuple(row) for row in means.round(6)}) > 290


@pytest.mark.parametrize("n", [16, 40, 64, 640])
def test_batches_hold_other_examples_in_every_epoch(n):
    def contents(seed):
        generator, order = np.random.default_rng(seed), np.random.default_rng(0)
        steps = length_buckets([np.arange(n)], SIZE, [generator], order)
        return {tuple(sorted(batch)) for batch in batches_of(steps, 0)}

    assert len(contents(0) & contents(1)) <= 1


def test_examples_are_sorted_inside_of_windows():
    """Batches of one window do not overlap in length; there are as many windows as there must."""
    rng = np.random.default_rng(0)
    steps = length_buckets([np.arange(32 * SIZE)], SIZE, [rng], rng)
    ranges = sorted((min(batch), max(batch)) for batch in batches_of(steps, 0))
    deepest = max(sum(low <= place <= high for low, high in ranges) for place in range(32 * SIZE))
    assert deepest == 4  # windows of 8 batches


def test_plans_that_cannot_be():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="1 generators for 2 clients"):
        length_buckets([[1], [2]], 2, [rng], rng)
    with pytest.raises(ValueError, match="batch_size=0, window=8"):
        length_buckets([[1]], 0, [rng], rng)
    assert length_buckets([], 2, [], rng) == []
    assert length_buckets([[], []], 2, [rng, rng], rng) == []
