"""How long one round of full participation takes, next to other ways to compute it.

Matrix factorisation with 32 factors; in a round every client makes one epoch of SGD over its
interactions and 4 negatives for each. One process, one thread, contenders timed in turn.

- engine: `fedrecsk.methods.bce_rounds.bce_step` with mini-batches of 64 examples or of all that a
  client has. It draws its negatives within the time; of the others only the tutorial loop does.
- tutorial loop: clients one after another, written as tutorials have it: a deep copy of the
  model, negatives drawn with NumPy, a `DataLoader`, autograd, `torch.optim.SGD`, and an average
  of state dicts.
- lean loop: clients one after another, with autograd and `torch.optim.SGD`, but with the engine's
  own mini-batches laid out in memory beforehand. It computes the same numbers as the engine.
- pfl: `pfl` (pip install pfl), its simulated backend and federated averaging, with the same
  module and mini-batches, without its metrics. It has no parameters private to a client, so the
  user vector is averaged along with the items here.
- centralised: no clients at all. One module with all users and items, mini-batches of 1,024
  examples in random order; with sparse or dense gradients, whichever is faster on this data.
- whole-data: `whole_data_step`, exact client solves and the quasi-Newton server step. It uses no
  negatives and is another objective: what a round of the default FedFNN costs.

Loops and pfl run on a random sample of clients where there are many, and their seconds are
scaled up by the number of examples.
"""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from _common import (
    Data,
    Goal,
    format_table,
    load,
    one_thread,
    paired_ratio,
    paired_seconds,
    parse_arguments,
    say,
    write_json,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedrecsk.data.interactions import encode, read_columns
from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.shards import ClientShards
from fedrecsk.engine.streams import Streams
from fedrecsk.methods.bce_rounds import bce_step
from fedrecsk.methods.factor_state import FactorState
from fedrecsk.methods.whole_data_rounds import whole_data_step
from fedrecsk.models import sampled_bce, whole_data
from fedrecsk.models.factors import random_factors

SCRIPT = "cohort_speed"
N_FACTORS = 32
N_NEGATIVES = 4
BATCH_SIZE = 64
CENTRAL_BATCH_SIZE = 1_024
LEARNING_RATE = 0.1
STREAMS = Streams(0)
# Of so many clients at most, chosen at random; the rest is scaled up by examples.
LOOP_CLIENTS = 200
PFL_CLIENTS = 1_000

Batch = tuple[Tensor, Tensor]  # items (b,) and labels (b,)


@dataclass(frozen=True, eq=False)
class Federation:
    """Coded data, the start of training, and the round's examples client by client."""

    shards: ClientShards
    state: FactorState

    @classmethod
    def of(cls, data: Data) -> Federation:
        """Code a data set and draw random factors."""
        coded = encode(read_columns(data.X), data.clients)
        if coded.n_users != coded.n_clients:
            raise ValueError("Every user has to be a client of its own here.")
        shards = ClientShards.from_codes(
            coded.user, coded.item, coded.user_client, coded.n_clients, coded.n_items
        )
        users, items = random_factors(
            coded.n_users,
            coded.n_items,
            N_FACTORS,
            item_bias=False,
            init_scale=0.1,
            streams=STREAMS,
            device=shards.device,
        )
        server = Optimizer("sgd", 1.0)
        return cls(shards, FactorState.start(users, items, server, n_clients=coded.n_clients))

    def batches(self, client: int, batch_size: int | None) -> list[Batch]:
        """Draw what `bce_step` draws for a client in round 0, as mini-batches."""
        cohort = self.shards.cohort(np.array([client]))
        examples = sampled_bce.draw_examples(
            cohort,
            self.shards.n_items,
            n_negatives=N_NEGATIVES,
            batch_size=batch_size,
            key=STREAMS.key("examples", 0),
        )
        label = torch.zeros_like(examples.valid, dtype=torch.float32)
        label[:, 0] = 1.0
        out = []
        for number in range(examples.n_batches):
            rows = examples.batch == number
            keep = examples.valid[rows]
            out.append((examples.items[rows][keep], label[rows][keep]))
        return out


def engine_round(federation: Federation, batch_size: int | None) -> FactorState:
    """One round of federated averaging by the engine."""
    state, _ = bce_step(
        federation.state,
        federation.shards,
        np.arange(federation.shards.n_clients),
        0,
        streams=STREAMS,
        item_weighting="fedavg",
        item_bias=False,
        n_negatives=N_NEGATIVES,
        batch_size=batch_size,
        local_epochs=1,
        optimizer=Optimizer("sgd", LEARNING_RATE),
        l2=0.0,
        server_optimizer=Optimizer("sgd", 1.0),
    )
    return state


def whole_data_round(federation: Federation) -> FactorState:
    """One round of the default FedFNN: client solves and server step."""
    shards = federation.shards
    state, _ = whole_data_step(
        federation.state,
        shards,
        np.arange(shards.n_clients),
        0,
        unobserved_weight=whole_data.default_unobserved_weight(
            len(shards.items), shards.n_users, shards.n_items
        ),
        penalty=whole_data.Penalty(0.1, 0.75),
        server_learning_rate=None,
        decay=0.9,
        item_curvature=True,
    )
    return state


class ClientModel(nn.Module):
    """A client's copy of the item vectors, and its user's vector."""

    def __init__(self, items: Tensor, user: Tensor) -> None:
        super().__init__()
        self.items = nn.Embedding.from_pretrained(items.clone(), freeze=False)
        self.user = nn.Parameter(user.clone())

    def loss(self, items: Tensor, labels: Tensor) -> Tensor:
        """Return the summed binary cross-entropy."""
        scores = self.items(items) @ self.user
        return nn.functional.binary_cross_entropy_with_logits(scores, labels, reduction="sum")

    def metrics(self, items: Tensor, labels: Tensor) -> dict[str, Any]:
        """Return nothing; pfl asks for the method."""
        return {}


def loop_round(
    state: FactorState, batches: dict[int, list[Batch]], n_interactions: int
) -> tuple[Tensor, Tensor]:
    """One round of federated averaging, client after client.

    Parameters
    ----------
    state : FactorState
    batches : dict of client to list of mini-batches
        The clients that take part.
    n_interactions : int
        Of these clients together; a client's weight is its share.

    Returns
    -------
    items : Tensor of shape (n_items, d)
    users : Tensor of shape (n_users, d)
    """
    items, users = state.item_table.clone(), state.user_factors.clone()
    for client, own in batches.items():
        model = ClientModel(state.item_table, state.user_factors[client])
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        for item, label in own:
            optimizer.zero_grad()
            model.loss(item, label).backward()
            optimizer.step()
        weight = sum(float(label.sum()) for _, label in own) / n_interactions
        with torch.no_grad():
            items += weight * (model.items.weight - state.item_table)
            users[client] = model.user
    return items, users


def tutorial_round(
    state: FactorState, positives: dict[int, Tensor], rng: np.random.Generator
) -> dict[str, Tensor]:
    """One round of federated averaging as tutorials write it.

    Parameters
    ----------
    state : FactorState
    positives : dict of client to Tensor of items
    rng : Generator
        For the negatives.

    Returns
    -------
    state_dict : dict of Tensor
    """
    n_items, n_interactions = len(state.item_table), sum(map(len, positives.values()))
    server = ClientModel(state.item_table, state.user_factors[0])
    average = {name: torch.zeros_like(value) for name, value in server.state_dict().items()}
    for client, own in positives.items():
        model = copy.deepcopy(server)
        with torch.no_grad():
            model.user.copy_(state.user_factors[client])
        unseen = np.setdiff1d(np.arange(n_items), own.numpy())
        n_drawn = min(N_NEGATIVES * len(own), len(unseen))
        drawn = torch.from_numpy(rng.choice(unseen, n_drawn, replace=False))
        labels = torch.cat([torch.ones(len(own)), torch.zeros(n_drawn)])
        examples = TensorDataset(torch.cat([own, drawn]), labels)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        for item, label in DataLoader(examples, batch_size=BATCH_SIZE, shuffle=True):
            optimizer.zero_grad()
            model.loss(item, label).backward()
            optimizer.step()
        for name, value in model.state_dict().items():
            average[name] += len(own) / n_interactions * value
    return average


def pfl_rounds(state: FactorState, batches: dict[int, list[Batch]]) -> Callable[[], Tensor]:
    """Set pfl up; each call of what is returned runs one more round and gives the item table.

    The batches of a client, but the last, must be of equal size: pfl cuts them itself.
    """
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import MinimizeReuseUserSampler
    from pfl.hyperparam.base import NNTrainHyperParams
    from pfl.model.pytorch import PyTorchModel

    held = {
        str(client): Dataset(tuple(map(torch.cat, zip(*own, strict=True))), user_id=str(client))
        for client, own in batches.items()
    }
    size = max(len(label) for own in batches.values() for _, label in own)
    dataset = FederatedDataset(held.__getitem__, MinimizeReuseUserSampler(list(held)))
    module = ClientModel(state.item_table, state.user_factors[next(iter(batches))])
    model = PyTorchModel(
        module, torch.optim.SGD, central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0)
    )
    backend = SimulatedBackend(dataset, dataset, postprocessors=[WeightByDatapoints()])
    algorithm = FederatedAveraging()
    train = NNTrainHyperParams(
        local_batch_size=size, local_num_epochs=1, local_learning_rate=LEARNING_RATE
    )
    done = 0

    def one_more() -> Tensor:
        nonlocal done
        done += 1
        # A run goes on where the last one stopped. Round 0 alone is evaluated; it is the one
        # that warms up.
        params = NNAlgorithmParams(
            central_num_iterations=done,
            evaluation_frequency=10**9,
            train_cohort_size=len(held),
            val_cohort_size=0,
        )
        # pfl takes the current event loop, which not every version of Python makes by itself.
        events = asyncio.new_event_loop()
        asyncio.set_event_loop(events)
        try:
            algorithm.run(params, backend, model, train, train, send_metrics_to_platform=False)
        finally:
            asyncio.set_event_loop(None)
            events.close()
        return module.items.weight.detach()

    return one_more


class CentralModel(nn.Module):
    """Matrix factorisation with all data in one place."""

    def __init__(self, users: Tensor, items: Tensor, *, sparse: bool) -> None:
        super().__init__()
        self.users = nn.Embedding.from_pretrained(users.clone(), freeze=False, sparse=sparse)
        self.items = nn.Embedding.from_pretrained(items.clone(), freeze=False, sparse=sparse)

    def loss(self, user: Tensor, item: Tensor, label: Tensor) -> Tensor:
        """Return the mean binary cross-entropy."""
        scores = (self.users(user) * self.items(item)).sum(1)
        return nn.functional.binary_cross_entropy_with_logits(scores, label)


def central_epoch(
    model: CentralModel, user: Tensor, item: Tensor, label: Tensor, *, n_steps: int | None = None
) -> None:
    """One epoch of mini-batch SGD over all examples, or its first steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    order = torch.randperm(len(label))
    for chosen in order.split(CENTRAL_BATCH_SIZE)[:n_steps]:
        optimizer.zero_grad()
        model.loss(user[chosen], item[chosen], label[chosen]).backward()
        optimizer.step()


def central_contender(federation: Federation) -> tuple[Callable[[], None], bool]:
    """Return a centralised epoch over the round's examples, and whether it is the sparse one."""
    clients = range(federation.shards.n_clients)
    own = [federation.batches(client, None)[0] for client in clients]
    sizes = torch.tensor([len(label) for _, label in own])
    user = torch.arange(len(own)).repeat_interleave(sizes)
    item, label = map(torch.cat, zip(*own, strict=True))
    state = federation.state
    epochs = {
        sparse: partial(
            central_epoch,
            CentralModel(state.user_factors, state.item_table, sparse=sparse),
            user,
            item,
            label,
        )
        for sparse in (False, True)
    }
    tried = paired_seconds(
        {str(sparse): partial(epoch, n_steps=50) for sparse, epoch in epochs.items()}, 5
    )
    sparse = min(epochs, key=lambda kind: statistics.median(tried[str(kind)]))
    return epochs[sparse], sparse


def sample(federation: Federation, n_clients: int) -> list[int]:
    """Draw clients at random, all of them where there are no more."""
    rng = np.random.default_rng(0)
    total = federation.shards.n_clients
    return sorted(rng.choice(total, min(n_clients, total), replace=False).tolist())


def measure(data: Data, *, repeats: int, loop_clients: int, pfl_clients: int) -> dict[str, Any]:
    """Time every contender on one data set."""
    federation = Federation.of(data)
    everybody = range(federation.shards.n_clients)
    rows = federation.shards.client_rows

    def examples_of(clients: Sequence[int]) -> int:
        return sum(len(label) for c in clients for _, label in federation.batches(c, None))

    n_examples = examples_of(everybody)
    central, sparse = central_contender(federation)
    some, some_pfl = sample(federation, loop_clients), sample(federation, pfl_clients)
    positives = {c: federation.shards.cohort(np.array([c])).items for c in some}
    contenders: dict[str, Callable[[], object]] = {
        "centralised": central,
        "tutorial loop, batches of 64": partial(
            tutorial_round, federation.state, positives, np.random.default_rng(0)
        ),
    }
    # Of all examples; whoever is not named here trains on all.
    share = {"tutorial loop, batches of 64": examples_of(some) / n_examples}
    has_pfl = importlib.util.find_spec("pfl") is not None
    if not has_pfl:
        say("pfl is not installed and left out; pip install pfl adds it")
    for kind, size in (("batches of 64", BATCH_SIZE), ("full batch", None)):
        contenders[f"engine, {kind}"] = partial(engine_round, federation, size)
        own = {client: federation.batches(client, size) for client in some}
        contenders[f"lean loop, {kind}"] = partial(
            loop_round, federation.state, own, int(rows[some].sum())
        )
        share[f"lean loop, {kind}"] = examples_of(some) / n_examples
        if has_pfl:
            own = {client: federation.batches(client, size) for client in some_pfl}
            contenders[f"pfl, {kind}"] = pfl_rounds(federation.state, own)
            share[f"pfl, {kind}"] = examples_of(some_pfl) / n_examples
    contenders["whole-data round"] = partial(whole_data_round, federation)
    say(f"{data.name}: {n_examples:,} examples, {len(contenders)} contenders")
    raw = paired_seconds(contenders, repeats)
    return {
        **data.sizes,
        "examples": n_examples,
        "centralised_gradients": "sparse" if sparse else "dense",
        "sampled_clients": {"loop": len(some), "pfl": len(some_pfl) if has_pfl else None},
        "share_of_examples": share,
        "seconds": {
            name: [value / share.get(name, 1.0) for value in values] for name, values in raw.items()
        },
    }


def goals_of(name: str, result: dict[str, Any]) -> list[Goal]:
    """Compare the engine with each of the others, mini-batches alike."""
    seconds, goals = result["seconds"], []
    for kind in ("batches of 64", "full batch"):
        ours = seconds[f"engine, {kind}"]
        for other, target in (("tutorial loop", 50.0), ("lean loop", 50.0), ("pfl", 20.0)):
            if f"{other}, {kind}" in seconds:
                ratio = paired_ratio(seconds[f"{other}, {kind}"], ours)
                goals.append(Goal(f"{name}, {kind}, {other} / engine", ratio, target))
        ratio = paired_ratio(ours, seconds["centralised"])
        goals.append(Goal(f"{name}, {kind}, engine / centralised", ratio, 1.5, at_least=False))
    return goals


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(__doc__, SCRIPT, seeds=5, argv=argv)
    repeats = 2 if arguments.quick else arguments.seeds
    results: dict[str, Any] = {}
    goals: list[Goal] = []
    with one_thread():
        for data in load(arguments.data, quick=arguments.quick):
            results[data.name] = measure(
                data,
                repeats=repeats,
                loop_clients=20 if arguments.quick else LOOP_CLIENTS,
                pfl_clients=20 if arguments.quick else PFL_CLIENTS,
            )
            goals += goals_of(data.name, results[data.name])
            write_json(arguments, SCRIPT, report(results, repeats), goals)
    for name, result in results.items():
        print(f"\n{name}: one round, {result['examples']:,} examples, one thread")
        print(table(result))
    print()
    print("\n".join(map(str, goals)))
    return 0


def report(results: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Collect what the JSON says besides goals and machine."""
    return {
        "what": {
            "n_factors": N_FACTORS,
            "n_negatives": N_NEGATIVES,
            "batch_size": BATCH_SIZE,
            "centralised_batch_size": CENTRAL_BATCH_SIZE,
            "local_epochs": 1,
            "threads": 1,
            "repeats": repeats,
        },
        "data": results,
    }


def table(result: dict[str, Any]) -> str:
    """Lay out medians over the runs."""
    rows = []
    for name, seconds in result["seconds"].items():
        median = statistics.median(seconds)
        speed = "" if name.startswith("whole") else f"{result['examples'] / median / 1e6:.2f}"
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        rows.append([name, f"{median:.3f}", spread, speed])
    return format_table(["", "seconds", "of all runs", "million examples/s"], rows)


if __name__ == "__main__":
    raise SystemExit(main())
