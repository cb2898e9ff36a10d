"""A round by Flower's simulation engine, recommending by `implicit`, and two threads against one.

- Flower: `flwr[simulation]`, `ServerApp` and `ClientApp` on the Ray backend with one processor.
  Clients train as the lean loop of `cohort_speed.py` does, on mini-batches that each reads from a
  small file of its own, so that no other client's data travel with the program. Some
  clients only; what another client adds is the difference of two sizes, so that the start of the
  engine does not count, and is scaled up to all clients. A second run has clients that hand the
  parameters back, which is the cost of the engine alone. The first round warms up, and of the
  following ones the fastest counts.
- implicit: the 20 best unseen items of every user, from the same factors, in turn.
- Threads: a fit of two rounds and a ranking with two threads and with one, in turn.

Without `flwr` or `implicit` their parts are left out.
"""

from __future__ import annotations

import importlib.util
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from _common import (
    Data,
    Goal,
    load,
    one_thread,
    paired_ratio,
    paired_seconds,
    parse_arguments,
    say,
    write_json,
)
from cohort_speed import (
    BATCH_SIZE,
    LEARNING_RATE,
    N_FACTORS,
    Federation,
    engine_round,
    sample,
)
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits

from fedrecsk import FedAvgRecommender, FedFNNRecommender

SCRIPT = "other_engines"
TOP = 20
FLOWER_CLIENTS = (50, 200)


def flower_seconds(
    federation: Federation, folder: Path, n_clients: int, rounds: int, *, idle: bool
) -> float:
    """Time the fastest round of Flower with some clients, after one that does not count.

    Parameters
    ----------
    federation : Federation
    folder : Path
        For the clients' data.
    n_clients : int
    rounds : int
    idle : bool
        Whether clients hand back what they are given.
    """
    from flwr.client import ClientApp, NumPyClient
    from flwr.common import ndarrays_to_parameters
    from flwr.server import ServerApp, ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.simulation import run_simulation

    state = federation.state
    for number, client in enumerate(sample(federation, n_clients)):
        arrays = {"user": state.user_factors[client].numpy()}
        for place, (item, label) in enumerate(federation.batches(client, BATCH_SIZE)):
            arrays |= {f"item_{place}": item.numpy(), f"label_{place}": label.numpy()}
        np.savez(folder / f"{number}.npz", **arrays)

    class Client(NumPyClient):
        def __init__(self, number: int) -> None:
            self.file = folder / f"{number}.npz"

        def fit(self, parameters: Any, config: Any) -> Any:
            if idle:
                return parameters, 1, {}
            with np.load(self.file) as held:
                own = {name: torch.from_numpy(held[name]) for name in held.files}
            items = torch.tensor(parameters[0], requires_grad=True)
            user = own.pop("user").requires_grad_()
            optimizer = torch.optim.SGD([items, user], lr=LEARNING_RATE)
            n_batches = len(own) // 2
            for place in range(n_batches):
                optimizer.zero_grad()
                scores = torch.nn.functional.embedding(own[f"item_{place}"], items) @ user
                torch.nn.functional.binary_cross_entropy_with_logits(
                    scores, own[f"label_{place}"], reduction="sum"
                ).backward()
                optimizer.step()
            return [items.detach().numpy()], n_batches, {}

    seconds = []

    class Timed(FedAvg):
        def configure_fit(self, *args: Any, **named: Any) -> Any:
            self.start = time.perf_counter()
            return super().configure_fit(*args, **named)

        def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
            if failures or len(results) != n_clients:
                raise RuntimeError(f"Only {len(results)} of {n_clients} clients took part.")
            out = super().aggregate_fit(server_round, results, failures)
            seconds.append(time.perf_counter() - self.start)
            return out

    def serve(context: Any) -> Any:
        strategy = Timed(
            fraction_fit=1.0,
            fraction_evaluate=0.0,
            min_fit_clients=n_clients,
            min_available_clients=n_clients,
            initial_parameters=ndarrays_to_parameters([state.item_table.numpy()]),
        )
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=1 + rounds))

    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_simulation(
        ServerApp(server_fn=serve),
        ClientApp(
            client_fn=lambda context: Client(context.node_config["partition-id"]).to_client()
        ),
        n_clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": 1},
        },
    )
    return min(seconds[1:])


def flower(federation: Federation, sizes: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Time Flower with two numbers of clients, and scale the difference up to all."""
    total = federation.shards.n_clients
    small, large = (min(size, total) for size in sizes)
    out: dict[str, Any] = {"clients": [small, large], "all_clients": total}
    for name, idle in (("training", False), ("idle", True)):
        with TemporaryDirectory() as folder:
            seconds = [
                flower_seconds(federation, Path(folder), size, rounds, idle=idle)
                for size in (small, large)
            ]
        a_client = (seconds[1] - seconds[0]) / (large - small)
        out[name] = {"seconds": seconds, "a_client": a_client, "a_round": a_client * total}
    engine = paired_seconds({"engine": partial(engine_round, federation, BATCH_SIZE)}, 3)
    out["engine"] = engine["engine"]
    return out


def fitted(data: Data) -> FedFNNRecommender:
    """Fit a model whose factors both recommenders rank with."""
    return FedFNNRecommender(
        N_FACTORS, n_rounds=2, clients_per_round=1.0, predictor=None, random_state=0
    ).fit(data.X, data.clients)


def implicit_twin(model: FedFNNRecommender) -> tuple[Any, csr_matrix]:
    """Give `implicit` the factors, and what users have seen."""
    from implicit.cpu.als import AlternatingLeastSquares

    twin = AlternatingLeastSquares(factors=N_FACTORS, num_threads=1)
    twin.user_factors = np.ascontiguousarray(model.user_factors_, dtype=np.float32)
    twin.item_factors = np.ascontiguousarray(model.item_factors_, dtype=np.float32)
    shape = (len(model.user_ids_), len(model.item_ids_))
    ones = np.ones(len(model.seen_indices_), dtype=np.float32)
    return twin, csr_matrix((ones, model.seen_indices_, model.seen_indptr_), shape=shape)


def ranking(model: FedFNNRecommender, repeats: int) -> dict[str, Any]:
    """Rank for all users by both, in turn."""
    twin, seen = implicit_twin(model)
    users = np.arange(len(model.user_ids_))

    def theirs() -> Any:
        return twin.recommend(users, seen, N=TOP, filter_already_liked_items=True)

    ids, _ = model.recommend(k=TOP)
    same = float(np.mean(ids == model.item_ids_[theirs()[0]]))
    contenders = {"ours": partial(model.recommend, k=TOP), "implicit": theirs}
    return {"same": same, "seconds": paired_seconds(contenders, repeats)}


def threads(
    data: Data, model: FedFNNRecommender, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Time fits of two rounds and a ranking with one and two threads, in turn."""

    def with_threads(n: int, run: Callable[[], object]) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(n)
        try:
            with threadpool_limits(n):
                run()
        finally:
            torch.set_num_threads(before)

    def fit(objective: str) -> None:
        estimator = FedAvgRecommender(
            objective=objective,
            n_factors=N_FACTORS,
            n_rounds=2,
            clients_per_round=1.0,
            local_epochs=1,
            random_state=0,
        )
        estimator.fit(data.X, data.clients)

    runs: dict[str, Callable[[], object]] = {
        "two rounds, bce": partial(fit, "bce"),
        "two rounds, whole-data": partial(fit, "whole-data"),
        "recommend": partial(model.recommend, k=TOP),
    }
    return {
        name: paired_seconds({str(n): partial(with_threads, n, run) for n in (1, 2)}, repeats)
        for name, run in runs.items()
    }


def measure(data: Data, *, repeats: int, quick: bool) -> dict[str, Any]:
    """Compare on one data set."""
    federation, model = Federation.of(data), fitted(data)
    result: dict[str, Any] = dict(data.sizes)
    for name, package in (("implicit", "implicit"), ("Flower", "flwr")):
        if quick or importlib.util.find_spec(package) is None:
            say(f"{name} is left out")
    if not quick and importlib.util.find_spec("implicit") is not None:
        result["ranking"] = ranking(model, repeats)
        say(f"ranked {result['ranking']}")
    if not quick and importlib.util.find_spec("flwr") is not None:
        result["flower"] = flower(federation, FLOWER_CLIENTS, rounds=2)
        say(f"Flower: {result['flower']}")
    result["threads"] = threads(data, model, min(repeats, 3))
    return result


def goals_of(name: str, result: dict[str, Any]) -> list[Goal]:
    """Say what is to be reached."""
    goals = []
    if "flower" in result:
        ours = statistics.median(result["flower"]["engine"])
        for kind in ("training", "idle"):
            ratio = result["flower"][kind]["a_round"] / ours
            goals.append(Goal(f"{name}, a round, Flower, {kind} clients / engine", ratio, 500.0))
    if "ranking" in result:
        seconds = result["ranking"]["seconds"]
        ratio = paired_ratio(seconds["implicit"], seconds["ours"])
        goals.append(Goal(f"{name}, top {TOP} of all users, implicit / ours", ratio, 1.0))
    for what, seconds in result["threads"].items():
        ratio = paired_ratio(seconds["2"], seconds["1"])
        goals.append(Goal(f"{name}, {what}, two threads / one", ratio, 1.0, at_least=False))
    return goals


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(__doc__, SCRIPT, seeds=9, argv=argv)
    repeats = 2 if arguments.quick else arguments.seeds
    results: dict[str, Any] = {}
    goals: list[Goal] = []
    with one_thread():
        for data in load(arguments.data, quick=arguments.quick):
            say(data.name)
            results[data.name] = measure(data, repeats=repeats, quick=arguments.quick)
            goals += goals_of(data.name, results[data.name])
            write_json(arguments, SCRIPT, {"repeats": repeats, "data": results}, goals)
    print("\n".join(map(str, goals)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
