"""FELLRec: clients tune one language model together, and each keeps an adapter of its own.

    for round t = 0, 1, ...
        each client c that is due, from its own adapter theta_c:
            theta_c, L_c = local training on the client's histories (LoRA; the model is frozen)
        similarity   s_cj = (cos(theta_c, theta_j) + 1) / 2
        heating      w_c  = tanh(alpha / p_c^(t + 1/beta)),   p = softmax(L / .05)
        mixing       theta_c = sum_j a_cj theta_j / sum_j a_cj,   a_cc = 1,  a_cj = s_cj w_c
                     A and B separately, all clients at once
        each client ranks its validation items and keeps the adapter that was best so far

There is no global model: a client serves its users with its own adapter, and users of no client
get the mean adapter. The mixing is `dynamic_balance.py`, where its deviations are named.

Aggregations that are special cases: ``"local"`` (nobody mixes), ``"fedavg"`` (all hold the mean;
with a proximal term it is FedProx), and ``"ditto"``: besides the shared adapter, trained as in
FedAvg, each client trains a personal one that is pulled to it by the proximal term, and keeps it.
One client that holds everybody's data is centralised training.

Jujia Zhao, Wenjie Wang, Chen Xu, See-Kiong Ng, Tat-Seng Chua (2025), "A Federated Framework for
LLM-based Recommendation", Findings of NAACL, arXiv:2402.09959. Its body could not be read: the
facts are from a summary and from reading a public copy of the authors' scripts. Deviation: clients
keep their best adapter so far, which the scripts do once at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedrecsk.engine.parallel import fill_rows, own_part, shares
from fedrecsk.engine.traffic import dense_bytes
from fedrecsk.engine.uploads import EXPLODED
from fedrecsk.exceptions import NoUsableUploadError
from fedrecsk.methods.dynamic_balance import (
    ClientWeights,
    Exponent,
    SimilarityOn,
    Uploads,
    balance,
    due_clients,
)
from fedrecsk.models.stacked_lora import Adapters, n_parameters, select

AggregationName = Literal["fellrec", "fedavg", "ditto", "local"]
Logs = dict[str, Any]
# ``train(adapters, clients, anchor, proximal, t) -> (adapters, losses)``: the local training of the
# clients numbered so, whose adapters come first to last; see `lora_training.train_adapters`.
Train = Callable[[Adapters, Tensor, Adapters | None, float, int], tuple[Adapters, Tensor]]


@dataclass(frozen=True, eq=False)
class FELLRecState:
    """The federation between two rounds.

    Attributes
    ----------
    adapters : dict of Tensor of shape (C, ...)
        What each client goes on from.
    shared : dict of Tensor of shape (C, ...)
        Of ``"ditto"``: the shared adapter, once a client. Else empty.
    uploads : Uploads
        What each client has uploaded last.
    best : dict of Tensor of shape (C, ...)
        The adapter of each client that validated best, and serves its users.
    best_value : Tensor of shape (C,), float64
        How well; -inf where nothing was validated.
    """

    adapters: Adapters
    shared: Adapters
    uploads: Uploads
    best: Adapters
    best_value: Tensor

    @classmethod
    def start(cls, adapters: Mapping[str, Tensor], *, aggregation: AggregationName) -> FELLRecState:
        """Begin with the given adapters."""
        some = next(iter(adapters.values()))
        return cls(
            adapters=dict(adapters),
            shared=dict(adapters) if aggregation == "ditto" else {},
            uploads=Uploads.none(adapters),
            best=dict(adapters),
            best_value=some.new_full((len(some),), -torch.inf, dtype=torch.float64),
        )


def fellrec_step(
    state: FELLRecState,
    t: int,
    *,
    train: Train,
    n_examples: Tensor,
    periods: Tensor,
    aggregation: AggregationName,
    client_weights: ClientWeights,
    proximal: float,
    similarity_on: SimilarityOn,
    use_similarity: bool,
    similarity_power: float,
    use_heating: bool,
    alpha: float,
    beta: float,
    heating_temperature: float,
    heating_exponent: Exponent,
    staleness_exponent: float,
    delivers: Tensor | None = None,
) -> tuple[FELLRecState, Logs]:
    """Run one round: local training of the clients that are due, then the mixing.

    Parameters
    ----------
    state : FELLRecState
    t : int
        Number of the round, from 0.
    train : callable
        Local training, see `Train`.
    n_examples : Tensor of shape (C,)
        Training examples of each client.
    periods : Tensor of shape (C,), int64
        Rounds that each client takes for a local training; 1 for all is the synchronous method.
    aggregation : {"fellrec", "fedavg", "ditto", "local"}
    client_weights, similarity_on, use_similarity, similarity_power, use_heating, alpha, beta
    staleness_exponent
        See `dynamic_balance.balance`.
    heating_temperature, heating_exponent
        ``temperature`` and ``exponent`` of `dynamic_balance.heating`.
    proximal : float
        Pull of local training to where it started; with ``"ditto"``, of the personal adapter to
        the shared one.
    delivers : Tensor of shape (C,), bool, optional
        Clients that deliver if they are due, one at least; default: all. One that is due and does
        not keeps what it had, and the others mix in nothing of it in this round.

    Returns
    -------
    state : FELLRecState
    logs : dict
        ``loss`` over all examples of the clients that were due, ``client_losses``, ``clients``,
        ``rejected`` (of them, whose adapter nobody could use), ``bytes_up``, ``bytes_down``, and
        what the balance says.

    Raises
    ------
    NoUsableUploadError
        If nobody can use any of the adapters.
    """
    due, heard = due_clients(t, periods), state.uploads
    if delivers is not None:
        heard, due = heard.without(due & ~delivers), due & delivers
    clients = due.nonzero().flatten()
    averaged = aggregation in ("fedavg", "ditto")
    start = state.shared if aggregation == "ditto" else state.adapters
    pulled = proximal if aggregation != "ditto" else 0.0
    mine = select(start, clients)
    shared_out = partial(_trained_together, train, n_examples)
    trained, losses = shared_out(mine, clients, mine if pulled else None, pulled, t)
    n_asked = len(clients)
    usable = _usable(trained, mine, losses.masked_fill(n_examples[clients] == 0, 0.0))
    if n_asked and not len(usable):
        raise NoUsableUploadError(n_asked, t)
    if len(usable) < n_asked:  # a platform that breaks is as one that does not deliver
        left = torch.zeros_like(due).index_fill_(0, clients[usable], True)
        heard, due = heard.without(due & ~left), due & left
        clients, losses = clients[usable], losses[usable]
        trained, mine = select(trained, usable), select(mine, usable)
    reported = _in_place(losses.double(), clients, n_examples, clients_without=-torch.inf)
    mixed, _, diagnostics = balance(
        _among(start, trained, clients),
        start,
        reported,
        n_examples,
        t,
        aggregation="fedavg" if averaged else aggregation,  # type: ignore[arg-type]
        client_weights=client_weights,
        similarity_on=similarity_on,
        use_similarity=use_similarity,
        similarity_power=similarity_power,
        use_heating=use_heating,
        alpha=alpha,
        beta=beta,
        temperature=heating_temperature,
        exponent=heating_exponent,
        due=due,
        uploads=heard,
        staleness_exponent=staleness_exponent,
    )
    uploads = state.uploads.updated(_among(start, trained, clients), start, reported, due, t)
    state = replace(state, uploads=uploads)
    if aggregation == "ditto":
        # The pull is to the shared adapter that the client received, before this round's average.
        personal, losses = shared_out(select(state.adapters, clients), clients, mine, proximal, t)
        state = replace(state, shared=mixed, adapters=_among(state.adapters, personal, clients))
    else:
        state = replace(state, adapters=mixed)
    counts = n_examples[clients].double()
    of_one = 0 if aggregation == "local" else dense_bytes((n_parameters(state.adapters),))
    logs: Logs = {
        "loss": float((losses.double() * counts).sum() / counts.sum().clamp_min(1.0)),
        "client_losses": _in_place(losses.double(), clients, n_examples, torch.nan).tolist(),
        "clients": n_asked,
        "rejected": n_asked - len(clients),
        "bytes_up": n_asked * of_one,
        "bytes_down": len(clients) * of_one,
        **diagnostics,
    }
    return state, logs


def _trained_together(
    train: Train,
    n_examples: Tensor,
    adapters: Adapters,
    clients: Tensor,
    anchor: Adapters | None,
    proximal: float,
    t: int,
) -> tuple[Adapters, Tensor]:
    """Train as `train` does, each process that shares the fit its share of the clients."""
    parts = shares(np.arange(len(clients)), n_examples[clients].cpu().numpy())
    if len(parts) == 1:
        return train(adapters, clients, anchor, proximal, t)
    trained = {name: value.clone() for name, value in adapters.items()}
    losses = next(iter(trained.values())).new_zeros(len(clients))
    mine = torch.from_numpy(own_part(parts)).to(clients.device)
    if len(mine):
        near = None if anchor is None else select(anchor, mine)
        found, own_losses = train(select(adapters, mine), clients[mine], near, proximal, t)
        trained = _among(trained, found, mine)
        losses[mine] = own_losses.to(losses)
    filled = {name: fill_rows(value, parts) for name, value in trained.items()}
    return filled, fill_rows(losses, parts)


def keep_best(state: FELLRecState, values: Tensor) -> FELLRecState:
    """Let each client keep its present adapter if it validates better than what it had.

    Parameters
    ----------
    state : FELLRecState
    values : Tensor of shape (C,), float64
        Of the present adapters on each client's validation rows, larger is better; NaN for a
        client without such rows. It keeps the present one whenever another client does, and
        always where no client has such rows.

    Returns
    -------
    FELLRecState
    """
    unknown = values.isnan()
    better = values > state.best_value
    # So what is kept changes with the values only, and a fit that was interrupted keeps the same.
    better = better | (unknown & (better.any() | unknown.all()))
    best = {
        name: torch.where(better.reshape(-1, *[1] * (value.dim() - 1)), value, state.best[name])
        for name, value in state.adapters.items()
    }
    known = torch.where(unknown, state.best_value, values)
    return replace(state, best=best, best_value=torch.where(better, known, state.best_value))


def _usable(trained: Adapters, start: Adapters, losses: Tensor) -> Tensor:
    """Places of the clients (K,) whose training is finite, and no outlier where there are three."""
    squares = losses.new_zeros(len(losses), dtype=torch.float64)
    for name, value in trained.items():
        squares += (value.double() - start[name].double()).flatten(1).square().sum(1)
    lengths = squares.sqrt()
    good = lengths.isfinite() & losses.isfinite()
    if int(good.sum()) > 2:
        typical = lengths[good].median()
        good &= (lengths <= EXPLODED * typical) | (typical == 0)
    return good.nonzero().flatten()


def _among(all_of_them: Adapters, some: Adapters, clients: Tensor) -> Adapters:
    """Put the adapters of some clients in their places among all."""
    return {name: value.index_copy(0, clients, some[name]) for name, value in all_of_them.items()}


def _in_place(
    losses: Tensor, clients: Tensor, n_examples: Tensor, clients_without: float
) -> Tensor:
    """Put losses (K,) of some clients among all (C,); those without examples have none."""
    found = losses.new_full((len(n_examples),), clients_without)
    found[clients] = torch.where(n_examples[clients] > 0, losses, clients_without)
    return found
