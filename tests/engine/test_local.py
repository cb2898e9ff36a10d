import pytest
import torch

from fedrecsk.engine.local import Optimizer, apply_gradients, init_moments, local_train
from tests.reference.sampled_bce_reference import torch_optimizer

OPTIMIZERS = [
    Optimizer("sgd", 0.05),
    Optimizer("momentum", 0.02),
    Optimizer("momentum", 0.02, momentum=0.5),
    Optimizer("adam", 0.1),
    Optimizer("adam", 0.1, betas=(0.7, 0.9), eps=1e-3),
]
N_BATCHES = (3, 1, 0, 2, 3)  # of each client


def regression(params, batch):
    """Sum of squared errors of each client's own linear model, with a little bend."""
    x, y = batch
    score = torch.tanh(x @ params["w"][:, :, None])[:, :, 0] + params["b"][:, None]
    return (score - y).square().sum(1)


@pytest.fixture
def problem():
    """Start, and batches (x (C, 4, 3), y (C, 4)) of which some clients have fewer."""
    generator = torch.Generator().manual_seed(0)
    n_clients = len(N_BATCHES)
    start = {
        "w": torch.randn(n_clients, 3, generator=generator),
        "b": torch.randn(n_clients, generator=generator),
    }
    batches = []
    for step in range(max(N_BATCHES)):
        x = torch.randn(n_clients, 4, 3, generator=generator)
        y = torch.randn(n_clients, 4, generator=generator)
        batches.append(((x, y), torch.tensor([step < n for n in N_BATCHES])))
    return start, batches


def train_alone(start, batches, client, optimizer, local_epochs):
    """One client with torch's own optimiser, on the batches that it has."""
    own = {name: value[client : client + 1].clone() for name, value in start.items()}
    for value in own.values():
        value.requires_grad_(True)
    optim = torch_optimizer(list(own.values()), optimizer)
    seen = 0.0
    for epoch in range(local_epochs):
        for (x, y), active in batches:
            if not active[client]:
                continue
            loss = regression(own, (x[client : client + 1], y[client : client + 1])).sum()
            seen += loss.item() if epoch == 0 else 0.0
            optim.zero_grad()
            loss.backward()
            optim.step()
    return {name: value.detach()[0] for name, value in own.items()}, seen


@pytest.mark.parametrize("local_epochs", [1, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_stacked_training_is_training_each_client_alone(problem, optimizer, local_epochs):
    start, batches = problem
    trained, losses = local_train(
        start, regression, batches, optimizer=optimizer, local_epochs=local_epochs
    )
    for client in range(len(N_BATCHES)):
        alone, seen = train_alone(start, batches, client, optimizer, local_epochs)
        for name, value in alone.items():
            torch.testing.assert_close(trained[name][client], value, rtol=1e-5, atol=1e-5)
        assert losses[client].item() == pytest.approx(seen, rel=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_a_client_without_batches_does_not_move(problem, optimizer):
    start, batches = problem
    trained, losses = local_train(start, regression, batches, optimizer=optimizer, local_epochs=3)
    idle = N_BATCHES.index(0)
    for name, value in start.items():
        assert torch.equal(trained[name][idle], value[idle])
        assert not torch.equal(trained[name][0], value[0])
    assert losses[idle] == 0.0


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_what_lies_in_the_slots_of_inactive_clients_is_never_used(problem, optimizer):
    start, batches = problem
    clean, clean_losses = local_train(
        start, regression, batches, optimizer=optimizer, local_epochs=2
    )
    for (x, y), active in batches:
        x[~active], y[~active] = float("nan"), float("inf")
    dirty, dirty_losses = local_train(
        start, regression, batches, optimizer=optimizer, local_epochs=2
    )
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)
    assert torch.equal(clean_losses, dirty_losses)


def test_local_train_leaves_its_arguments_alone(problem):
    start, batches = problem
    copies = {name: value.clone() for name, value in start.items()}
    trained, losses = local_train(
        start, regression, batches, optimizer=Optimizer("adam", 0.1), local_epochs=2
    )
    for name, value in start.items():
        assert torch.equal(value, copies[name])
        assert not value.requires_grad
        assert not trained[name].requires_grad
    assert not losses.requires_grad


def test_local_train_works_where_gradients_are_switched_off(problem):
    start, batches = problem
    arguments = {"optimizer": Optimizer("sgd", 0.1), "local_epochs": 1}
    expected, _ = local_train(start, regression, batches, **arguments)
    with torch.no_grad():
        found, _ = local_train(start, regression, batches, **arguments)
    assert torch.equal(found["w"], expected["w"])


def test_no_epochs_change_nothing(problem):
    start, batches = problem
    trained, losses = local_train(
        start, regression, batches, optimizer=Optimizer("sgd", 0.1), local_epochs=0
    )
    assert torch.equal(trained["w"], start["w"])
    assert losses.tolist() == [0.0] * len(N_BATCHES)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_moments_count_the_steps_of_each_client(optimizer):
    params = {"w": torch.ones(3, 2)}
    moments = init_moments(params, optimizer)
    for active in ([True, False, True], [False, False, True]):
        params, moments = apply_gradients(
            params, {"w": torch.ones(3, 2)}, moments, torch.tensor(active), optimizer
        )
    assert moments.steps.tolist() == [1.0, 0.0, 2.0]
    assert torch.equal(params["w"][1], torch.ones(2))
    assert set(moments.first) == (set() if optimizer.name == "sgd" else {"w"})
    assert set(moments.second) == ({"w"} if optimizer.name == "adam" else set())
    for kept in [*moments.first.values(), *moments.second.values()]:
        assert torch.equal(kept[1], torch.zeros(2))
