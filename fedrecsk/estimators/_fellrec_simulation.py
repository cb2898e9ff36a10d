"""The rounds of a fit of `FELLRecRecommender`, from an opened model to adapters that serve.

`simulate_fellrec` settles how scores are made, binds local training and the round, and runs the
rounds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fedrecsk.engine.parallel import add_up
from fedrecsk.engine.participation import Availability, Participation, read_participation
from fedrecsk.engine.rounds import EarlyStopping, Record, run_rounds
from fedrecsk.engine.streams import Streams
from fedrecsk.estimators._base import Attributes, RoundWatch, check_somebody_delivered
from fedrecsk.estimators._fellrec_serving import Reader, validate
from fedrecsk.estimators._language import (
    Ranking,
    adapters_before,
    bytes_crossed,
    check_periods,
    items_under,
    mean_of_best,
)
from fedrecsk.estimators._platforms import HeldOut, Platforms, Sampler, hold_out_last
from fedrecsk.methods.dynamic_balance import ClientWeights, Exponent, SimilarityOn, due_clients
from fedrecsk.methods.fellrec import (
    AggregationName,
    FELLRecState,
    Train,
    fellrec_step,
    keep_best,
)
from fedrecsk.models.lora_training import train_adapters
from fedrecsk.models.stacked_lora import Adapters, select
from fedrecsk.models.text_model import Examples, TextModel

IntArray = NDArray[np.int64]
PopularityCounts = Literal["auto", "all", "platform"]
Schedule = Literal["linear", "constant"]
Objective = Literal["lift", "probability"]
Negatives = Literal["in-batch", "all"]
Step = Callable[[FELLRecState, int], tuple[FELLRecState, Record]]

# Weights of the popularity term that "auto" compares, and what it takes without validation.
POPULARITY_GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
AUTO_POPULARITY = 0.5
# Temperatures that "auto" compares, a fifth apart, the steps of each platform that it looks at,
# and what it takes where there are none.
TEMPERATURE_GRID = tuple(round(0.02 * 1.2**step, 4) for step in range(20))
TEMPERATURE_STEPS = 4
AUTO_TEMPERATURE = 0.05


def simulate_fellrec(
    platforms: Platforms,
    reader: Reader,
    streams: Streams,
    watch: RoundWatch,
    fitted: Callable[[Adapters, Ranking], Attributes],
    *,
    previous: Attributes | None,
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
    client_periods: ArrayLike | None,
    staleness_exponent: float,
    availability: Availability,
    dropout_rate: float,
    n_rounds: int,
    local_epochs: int,
    examples_per_user: int,
    learning_rate: float,
    learning_rate_schedule: Schedule,
    weight_decay: float,
    batch_size: int,
    gradient_accumulation: int,
    objective: Objective,
    negatives: Negatives,
    n_negatives: int,
    prompt_loss: bool,
    temperature: float | Literal["auto"],
    popularity_counts: PopularityCounts,
    popularity_weight: float | Literal["auto"],
    early_stopping: bool,
    validation_fraction: float,
    n_iter_no_change: int,
    tol: float,
) -> tuple[Adapters, list[Record], Ranking]:
    """Train the adapters round by round.

    Parameters
    ----------
    platforms : Platforms
    reader : Reader
    streams : Streams
    watch : RoundWatch
        See `BaseRecommender._simulate`.
    fitted : callable
        ``fitted(adapters, ranking) -> dict`` of what a fit that ends here leaves behind.
    previous : dict or None
        Fitted attributes to go on from.
    aggregation, ..., tol
        As in `FELLRecRecommender`.

    Returns
    -------
    adapters : dict of Tensor of shape (n_platforms, ...)
        Those that users are served with.
    history : list of dict
    ranking : Ranking
        How scores are made.
    """
    model, n_clients = reader.model, len(platforms)
    held_out, ends = None, platforms.lengths
    if early_stopping:
        # Without users of three items there is nobody to ask, and all rounds are run.
        drawn = hold_out_last(platforms, validation_fraction, streams)
        held_out, ends = (drawn if len(drawn.users) else None), drawn.ends
    start = model.lora.init(n_clients, streams.torch("adapters"))
    first_round = 0
    if previous is not None:
        start = adapters_before(start, platforms, previous)
        first_round = int(previous["n_rounds_"])
    counts = torch.from_numpy(platforms.counts(ends)).to(model.device, torch.float32)
    sampler = Sampler(
        platforms, ends, model.histories, streams, local_epochs=local_epochs,
        batch_size=batch_size, gradient_accumulation=gradient_accumulation,
        examples_per_user=examples_per_user,
        n_negatives=n_negatives if negatives == "in-batch" else 0, max_history=reader.max_history,
    )  # fmt: skip
    n_examples = torch.from_numpy(sampler.n_examples()).to(model.device)
    if not n_examples.any():
        warnings.warn(
            "No user has two interactions to learn from, so the adapters stay as they are: "
            "the next item is predicted from the ones before it. Give users with longer "
            "histories.",
            UserWarning,
            stacklevel=2,
        )
    ranking = Ranking(
        temperature=_temperature(reader, sampler, start, previous, temperature),
        popularity_weight=AUTO_POPULARITY
        if popularity_weight == "auto"
        else float(popularity_weight),
        generated=reader.writes,
        shared_popularity=popularity_counts == "all",
    )
    if "auto" in (popularity_weight, popularity_counts):
        ranking = _best_popularity(
            ranking, reader, platforms, held_out, start, counts, popularity_counts,
            popularity_weight,
        )  # fmt: skip
    train = local_training(
        reader, sampler, counts, ranking, streams, first_round=first_round, n_rounds=n_rounds,
        learning_rate=learning_rate, learning_rate_schedule=learning_rate_schedule,
        weight_decay=weight_decay, objective=objective, negatives=negatives,
        prompt_loss=prompt_loss,
    )  # fmt: skip
    periods = check_periods(client_periods, n_clients, model.device)
    participation = read_participation(
        platforms.ids, sampler.n_examples(), availability=availability, dropout_rate=dropout_rate,
        streams=streams,
    )  # fmt: skip
    mix = partial(
        fellrec_step, train=train, n_examples=n_examples, periods=periods, aggregation=aggregation,
        client_weights=client_weights, proximal=proximal, similarity_on=similarity_on,
        use_similarity=use_similarity, similarity_power=similarity_power, use_heating=use_heating,
        alpha=alpha, beta=beta, heating_temperature=heating_temperature,
        heating_exponent=heating_exponent, staleness_exponent=staleness_exponent,
    )  # fmt: skip
    state = FELLRecState.start(start, aggregation=aggregation)
    ndcg, stopping = None, None
    if held_out is not None:
        users = np.bincount(platforms.of_user[held_out.users], minlength=n_clients)
        ndcg = partial(_ndcg, ranking, reader, platforms, held_out, counts)
        state = keep_best(state, ndcg(state))
        stopping = EarlyStopping[FELLRecState](
            evaluate=lambda state: mean_of_best(state, users),
            n_iter_no_change=n_iter_no_change,
            tol=tol,
        )
    result = run_rounds(
        _step(mix, model, ndcg, periods, participation),
        state,
        n_rounds=n_rounds,
        first_round=first_round,
        past=watch.load(state),
        early_stopping=stopping,
        save=watch.save,
        save_every=watch.save_every,
        on_round_begin=watch.begin,
        on_round_end=lambda state, record: watch.end(
            record, lambda: fitted(_serving(state), ranking)
        ),
    )
    check_somebody_delivered(result.history, goes_on=previous is not None)
    return _serving(result.state), result.history, ranking


# How scores are made ---------------------------------------------------------------------------


def _temperature(
    reader: Reader,
    sampler: Sampler,
    adapters: Adapters,
    previous: Attributes | None,
    temperature: float | Literal["auto"],
) -> float:
    """Find the temperature at which the start tells next items best from others."""
    if temperature != "auto":
        return float(temperature)
    if previous is not None:
        # What the adapters have been trained for.
        return float(previous["temperature_"])
    if reader.writes:
        return 1.0  # nothing is divided by it
    losses = torch.zeros(len(TEMPERATURE_GRID), dtype=torch.float64)
    clients = list(range(len(sampler.platforms)))
    for step in islice(sampler.steps(0, clients), TEMPERATURE_STEPS):
        for examples, _ in step:
            losses += reader.model.temperature_losses(adapters, examples, TEMPERATURE_GRID).cpu()
    if not losses.any():
        return AUTO_TEMPERATURE  # nobody has two items to tell it from
    return TEMPERATURE_GRID[int(losses.argmin())]


def _best_popularity(
    ranking: Ranking,
    reader: Reader,
    platforms: Platforms,
    held_out: HeldOut | None,
    adapters: Adapters,
    counts: Tensor,
    popularity_counts: PopularityCounts,
    popularity_weight: float | Literal["auto"],
) -> Ranking:
    """Count popularity, and give it the weight, that ranks validation users best."""
    if ranking.generated:
        # What an untrained model writes says nothing of a trained one.
        is_open = popularity_weight == "auto"
        return replace(ranking, popularity_weight=0.0) if is_open else ranking
    if held_out is None:
        return ranking
    weights = POPULARITY_GRID if popularity_weight == "auto" else [popularity_weight]
    shared = [False, True] if popularity_counts == "auto" else [ranking.shared_popularity]
    candidates = [
        replace(ranking, popularity_weight=float(weight), shared_popularity=among_all)
        for among_all in shared
        for weight in weights
    ]
    users = np.bincount(platforms.of_user[held_out.users], minlength=len(platforms))
    values = validate(candidates, reader, platforms, held_out, adapters, counts)
    found = np.nansum(users * values.cpu().numpy(), axis=1)
    return candidates[int(np.argmax(found))]


# A round ---------------------------------------------------------------------------------------


def _step(
    mix: Callable[..., tuple[FELLRecState, Record]],
    model: TextModel,
    ndcg: Callable[[FELLRecState], Tensor] | None,
    periods: Tensor,
    participation: Participation | None,
) -> Step:
    """Bind a round: who delivers, training and mixing, and what validates better.

    `mix` is `fellrec_step` with all but the state, the number of the round, and who delivers.
    """

    def train_some(
        state: FELLRecState, t: int, delivers: Tensor | None = None
    ) -> tuple[FELLRecState, Record]:
        before = bytes_crossed(model)
        state, logs = mix(state, t, delivers=delivers)
        if model.split is not None:
            crossed = torch.tensor(bytes_crossed(model) - before)
            logs["bytes_boundary"] = int(add_up(crossed)[0])
        if ndcg is not None:
            values = ndcg(state)
            state = keep_best(state, values)
            logs["client_ndcg"] = values.tolist()
        return state, logs

    def step(state: FELLRecState, t: int) -> tuple[FELLRecState, Record]:
        if participation is None:
            return train_some(state, t)
        due = np.flatnonzero(due_clients(t, periods).cpu().numpy())
        turnout = participation.of_round(t, len(periods), lambda there, n: there, due)

        def train_delivered(clients: IntArray) -> tuple[FELLRecState, Record]:
            delivers = torch.zeros_like(periods, dtype=torch.bool)
            delivers[torch.from_numpy(clients).to(delivers.device)] = True
            return train_some(state, t, delivers)

        return turnout.train(state, train_delivered)

    return step


def _ndcg(
    ranking: Ranking,
    reader: Reader,
    platforms: Platforms,
    held_out: HeldOut,
    counts: Tensor,
    state: FELLRecState,
) -> Tensor:
    """NDCG@20 (C,) of each platform's held-out users under its present adapter."""
    return validate([ranking], reader, platforms, held_out, state.adapters, counts)[0]


def _serving(state: FELLRecState) -> Adapters:
    """Adapters that users are served with."""
    validated = bool(state.best_value.isfinite().any())
    return state.best if validated else state.adapters


def local_training(
    reader: Reader,
    sampler: Sampler,
    counts: Tensor,
    ranking: Ranking,
    streams: Streams,
    *,
    first_round: int,
    n_rounds: int,
    learning_rate: float,
    learning_rate_schedule: Schedule,
    weight_decay: float,
    objective: Objective,
    negatives: Negatives,
    prompt_loss: bool,
) -> Train:
    """Bind what local training needs, see `fedrecsk.methods.fellrec.Train`."""
    model, lift = reader.model, objective == "lift"
    popularity = ranking.prior(ranking.popularity(counts))
    prior = torch.zeros_like(counts) if lift else popularity
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1.0)

    def train(
        adapters: Adapters, clients: Tensor, anchor: Adapters | None, proximal: float, t: int
    ) -> tuple[Adapters, Tensor]:
        numbers = clients.tolist()
        rate = learning_rate
        if learning_rate_schedule == "linear":
            rate *= 1.0 - (t - first_round) / n_rounds
        own_prior, own_shares = prior[clients], shares[clients]
        frozen = None
        if negatives == "all" and not reader.writes:
            tables: list[tuple[Adapters, Tensor]] = []
            each = [select(adapters, [k]) for k in range(len(numbers))]
            frozen = torch.stack([items_under(model, own, tables) for own in each])

        def loss(adapters: Adapters, examples: Examples) -> Tensor:
            generators = [
                streams.torch("dropout", *examples.key, numbers[client])
                for client in examples.clients
            ]
            if reader.writes:
                return model.writing_losses(
                    adapters,
                    examples,
                    n_clients=len(numbers),
                    prompt_loss=prompt_loss,
                    dropout=generators,
                )
            return model.ranking_losses(
                adapters,
                examples,
                prior=own_prior,
                shares=own_shares,
                temperature=ranking.temperature,
                corrected=not lift,
                frozen_items=frozen,
                dropout=generators,
            )

        return train_adapters(
            adapters,
            loss,
            sampler.steps(t, numbers),
            learning_rate=rate,
            weight_decay=weight_decay,
            anchor=anchor,
            proximal=proximal,
        )

    return train
