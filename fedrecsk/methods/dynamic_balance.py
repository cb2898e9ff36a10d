"""Dynamic balance: every client mixes the adapters of the others into its own.

Zhao, Wang, Xu, Ng, Chua. "A Federated Framework for LLM-based Recommendation" (FELLRec), Findings
of NAACL 2025, arXiv:2402.09959. There is no global model; client c holds an adapter theta_c:

    after the local training of round t = 0, 1, ..., with mean training losses L
    s_cj    <- (cos(theta_c, theta_j) + 1) / 2
    p       <- softmax(L / temperature) over the clients
    w_c     <- tanh(alpha / p_c^(t + 1/beta))                        curriculum heating
    a_cc    <- 1;  a_cj <- s_cj w_c for the others
    theta_c <- sum_j a_cj theta_j / sum_j a_cj                       A and B of LoRA separately

The paper's body could not be read: the facts are from a summary, and from a public copy of the
authors' scripts, where t is the number of rounds before this one.

What the formula does: a large loss is a large p_c and a small w_c, so a weak client takes *less*
from the others. As p <= 1, w_c is never below tanh(alpha), .60 at the scripts' alpha of .7, and
it rises to 1 with t. At the temperature .05 a lead of .25 in loss is a ratio of 150 in p: often
the weakest client has nearly all of p and stays at .60, while all others are at 1 from the start.
With p shared equally by five, w is .75 in round 0 and .9999 in round 1. The exponent (t + 1)/beta
may have been meant; it is the same in round 0 and takes several rounds to saturate. A beta of 1,
which turns heating off in one of the scripts, is a number like any other here.

Where we deviate:

- All clients mix at once, from what all of them trained. The scripts overwrite one client after
  another, so that later ones mix what earlier ones have become, and the order of the clients
  changes the result.
- Adapters that start alike differ little as a whole: their cosines are about .998, and the
  weights nearly those of FedAvg. Cosines of what a round changed (``"update"``), or of the
  products B A that adapters add to the weights (``"product"``), tell clients apart.
- Clients may finish at different times, see `Uploads`: whoever finishes mixes in what the others
  uploaded last, less of it the older it is, by (1 + age)^-1/2, as Xie, Koyejo, Gupta do
  ("Asynchronous Federated Optimization", 2019, arXiv:1903.03934). Of a client that has uploaded
  nothing yet, nothing is mixed in: the common start would only undo what others have learned.

FedAvg and clients on their own are other rows of weights: all equal, and the identity. Numbers
per client and pair are float64, and so are the sums over clients, whose results are rounded to
the adapters' type: clients that agree stay as they are, to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedrecsk.engine.local import Params

# "<module>.lora_A": (C, r, in) and "<module>.lora_B": (C, out, r) for each adapted module.
Adapters = Params
SimilarityOn = Literal["params", "update", "product"]
Exponent = Literal["t+1/beta", "(t+1)/beta"]
Aggregation = Literal["fellrec", "fedavg", "local"]
ClientWeights = Literal["examples", "clients"]

# exp() of this is still a finite double, and tanh of any sensible multiple of it is 1.
MAX_LOG = 700.0


def similarity(
    adapters: Mapping[str, Tensor], start: Mapping[str, Tensor], on: SimilarityOn
) -> Tensor:
    """Compare the adapters of all clients.

    Parameters
    ----------
    adapters : mapping of name to Tensor of shape (C, ...)
        After local training.
    start : mapping of name to Tensor of shape (C, ...)
        Before it; read by ``"update"`` alone.
    on : {"params", "update", "product"}
        What is flattened to one vector per client: A and B of all modules, what training changed
        in them, or the products B A of all modules. The products are not formed.

    Returns
    -------
    Tensor of shape (C, C), float64
        (cosine + 1) / 2, symmetric, 1 on the diagonal. A vector that is zero (no change, or B
        still zero) has no direction: its cosine with others is 0, its similarity .5.

    Raises
    ------
    ValueError
        If ``"product"`` finds an A without a B, or a B without an A.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.methods.dynamic_balance import similarity
    >>> start = {"q.lora_A": torch.ones(3, 1, 2), "q.lora_B": torch.zeros(3, 1, 1)}
    >>> change = torch.tensor([1.0, -2.0, 0.0])[:, None, None]
    >>> trained = {"q.lora_A": start["q.lora_A"], "q.lora_B": start["q.lora_B"] + change}
    >>> similarity(trained, start, "update")
    tensor([[1.0000, 0.0000, 0.5000],
            [0.0000, 1.0000, 0.5000],
            [0.5000, 0.5000, 1.0000]], dtype=torch.float64)
    """
    if on == "product":
        grams = [_product_gram(a, b) for a, b in _pairs(adapters)]
    elif on == "update":
        grams = [_gram(value.double() - start[name].double()) for name, value in adapters.items()]
    else:
        grams = [_gram(value.double()) for value in adapters.values()]
    gram = torch.stack(grams).sum(0)
    lengths = gram.diagonal().clamp_min(0.0).sqrt()
    inverses = torch.where(lengths == 0, 0.0, 1.0 / lengths)
    cosines = inverses[:, None] * gram * inverses
    # Products of a matrix with itself need not be symmetric to the last bit.
    cosines = ((cosines + cosines.T) / 2).clamp(-1.0, 1.0)
    return ((cosines + 1.0) / 2).fill_diagonal_(1.0)


def loss_shares(losses: Tensor, temperature: float = 0.05) -> Tensor:
    """Share the federation's trouble out: softmax of the losses over the clients.

    Parameters
    ----------
    losses : Tensor of shape (C,)
        Mean training losses; -inf of a client that has told none, whose share is 0.
    temperature : float, default=0.05
        Above 0.

    Returns
    -------
    Tensor of shape (C,), float64

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.methods.dynamic_balance import loss_shares
    >>> loss_shares(torch.tensor([1.0, 1.05, 1.1])).round(decimals=3).tolist()
    [0.09, 0.245, 0.665]
    """
    shares = torch.softmax(losses.double() / temperature, 0)
    # Where no client has told a loss, the softmax of nothing is not a number.
    return torch.where(losses.isneginf(), 0.0, shares)


def heating(
    losses: Tensor,
    t: int,
    *,
    alpha: float = 0.7,
    beta: float = 5.0,
    temperature: float = 0.05,
    exponent: Exponent = "t+1/beta",
) -> Tensor:
    """Weigh what each client takes from the others: less at first, less where the loss is large.

    Parameters
    ----------
    losses : Tensor of shape (C,)
        Mean training losses; -inf of a client that has told none, whose weight is 1.
    t : int
        Rounds before this one, from 0.
    alpha : float, default=0.7
        Weights are at least tanh(alpha); at 0 they are 0, but for losses that are not known.
    beta : float, default=5.0
        Above 0. The larger, the more alike the clients' weights in round 0.
    temperature : float, default=0.05
        Of `loss_shares`.
    exponent : {"t+1/beta", "(t+1)/beta"}, default="t+1/beta"
        Of the shares: as the scripts have it, or as it may have been meant.

    Returns
    -------
    Tensor of shape (C,), float64
        tanh(alpha / p^exponent), 1 where the quotient is too large for a number.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.methods.dynamic_balance import heating
    >>> losses = torch.tensor([1.0, 1.05, 1.1])
    >>> for exponent in ("t+1/beta", "(t+1)/beta"):
    ...     for t in range(3):
    ...         weights = heating(losses, t, exponent=exponent)
    ...         print(exponent, t, weights.round(decimals=3).tolist())
    t+1/beta 0 [0.812, 0.729, 0.641]
    t+1/beta 1 [1.0, 0.999, 0.815]
    t+1/beta 2 [1.0, 1.0, 0.937]
    (t+1)/beta 0 [0.812, 0.729, 0.641]
    (t+1)/beta 1 [0.95, 0.842, 0.677]
    (t+1)/beta 2 [0.995, 0.926, 0.713]
    """
    power = t + 1 / beta if exponent == "t+1/beta" else (t + 1) / beta
    # Logarithms stay finite where the shares themselves would vanish.
    logs = torch.log_softmax(losses.double() / temperature, 0)
    heat = torch.tanh(alpha * torch.exp((-power * logs).clamp_max(MAX_LOG)))
    return torch.where(losses.isneginf(), 1.0, heat)


def mixing_weights(
    similarity: Tensor,
    heat: Tensor,
    *,
    staleness: Tensor | None = None,
    staleness_exponent: float = 0.5,
) -> Tensor:
    """Return how much of each adapter every client mixes into its own.

    Parameters
    ----------
    similarity : Tensor of shape (C, C)
        See `similarity`.
    heat : Tensor of shape (C,)
        See `heating`.
    staleness : Tensor of shape (C,), optional
        Age of each upload in rounds, see `ages`; default: all are of this round.
    staleness_exponent : float, default=0.5
        An upload counts (1 + age)^-exponent; at 0, as if it were new.

    Returns
    -------
    Tensor of shape (C, C), float64
        Row c is what client c does; rows sum to one. Before that, its own adapter counts 1, and
        another similarity * heat of c * the age's factor, 0 at an infinite age.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.methods.dynamic_balance import mixing_weights
    >>> alike = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> mixing_weights(alike, torch.tensor([1.0, 0.5])).tolist()
    [[0.6666666666666666, 0.3333333333333333], [0.2, 0.8]]
    """
    weights = similarity.double() * heat.double()[:, None]
    if staleness is not None:
        weights = weights * _age_factors(staleness, staleness_exponent)
    weights.fill_diagonal_(1.0)
    return weights / weights.sum(1, keepdim=True)


def fedavg_weights(
    n_examples: Tensor,
    by: ClientWeights = "examples",
    *,
    staleness: Tensor | None = None,
    staleness_exponent: float = 0.5,
) -> Tensor:
    """Return the weights with which all clients get the same mean of all adapters.

    Parameters
    ----------
    n_examples : Tensor of shape (C,)
        Of each client's training data.
    by : {"examples", "clients"}, default="examples"
        Whether clients count by their examples or alike.
    staleness, staleness_exponent
        See `mixing_weights`.

    Returns
    -------
    Tensor of shape (C, C), float64
        Equal rows that sum to one; the identity where nobody counts.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.methods.dynamic_balance import fedavg_weights
    >>> fedavg_weights(torch.tensor([30, 10])).tolist()
    [[0.75, 0.25], [0.75, 0.25]]
    """
    counts = n_examples.double() if by == "examples" else torch.ones_like(n_examples).double()
    if staleness is not None:
        counts = counts * _age_factors(staleness, staleness_exponent)
    total = counts.sum()
    alone = local_weights(len(counts), device=counts.device)
    return torch.where(total > 0, (counts / total).expand_as(alone), alone)


def local_weights(n: int, *, device: torch.device | None = None) -> Tensor:
    """Return the weights (n, n) of clients that share nothing.

    Examples
    --------
    >>> from fedrecsk.methods.dynamic_balance import local_weights
    >>> local_weights(2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    return torch.eye(n, dtype=torch.float64, device=device)


def mix(adapters: Mapping[str, Tensor], weights: Tensor) -> Adapters:
    """Mix adapters, A and B by themselves, for all receivers at once.

    Parameters
    ----------
    adapters : mapping of name to Tensor of shape (C, ...)
    weights : Tensor of shape (M, C)
        One row per receiver.

    Returns
    -------
    dict of Tensor of shape (M, ...)
        Of the adapters' type.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.methods.dynamic_balance import mix
    >>> adapters = {"q.lora_A": torch.tensor([[[1.0, 2.0]], [[3.0, 6.0]]])}
    >>> mix(adapters, torch.tensor([[0.5, 0.5]]))
    {'q.lora_A': tensor([[[2., 4.]]])}
    """
    mixed: Adapters = {}
    for name, value in adapters.items():
        flat = weights.double() @ value.flatten(1).double()
        mixed[name] = flat.to(value.dtype).reshape(len(weights), *value.shape[1:])
    return mixed


def due_clients(t: int, periods: Tensor) -> Tensor:
    """Say which clients finish their local training in a round.

    Parameters
    ----------
    t : int
        Rounds before this one: a round is a tick of the clock.
    periods : Tensor of shape (C,), integer
        Rounds that each client takes for its local training.

    Returns
    -------
    Tensor of shape (C,), bool
        Whether t + 1 is a multiple of the period.

    Raises
    ------
    ValueError
        If a period is below 1.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.methods.dynamic_balance import due_clients
    >>> [due_clients(t, torch.tensor([1, 2, 3])).tolist() for t in range(3)]
    [[True, False, False], [True, True, False], [True, False, True]]
    """
    if (periods < 1).any():
        raise ValueError(
            f"A client finishes every 1, 2, ... rounds, but the periods are {periods.tolist()}: "
            "give each client a period of at least 1."
        )
    return (t + 1) % periods == 0


def ages(t: int, last_upload: Tensor) -> Tensor:
    """Return the ages of uploads in rounds.

    Parameters
    ----------
    t : int
        This round.
    last_upload : Tensor of shape (C,), int64
        Round of each client's last upload; -1 if it has made none.

    Returns
    -------
    Tensor of shape (C,), float64
        0 for an upload of this round, infinite for none.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.methods.dynamic_balance import ages
    >>> ages(5, torch.tensor([5, 2, -1])).tolist()
    [0.0, 3.0, inf]
    """
    return torch.where(last_upload < 0, torch.inf, (t - last_upload).double())


@dataclass(frozen=True, eq=False)
class Uploads:
    """What the clients of a federation have uploaded last.

    Clients take their own time: client c trains for ``periods[c]`` rounds, uploads, mixes, and
    starts again from what it has mixed. Between its uploads nobody changes its adapter, so the
    simulation trains it in the round in which it is due, and what the others see of it is its
    last upload. With all periods 1 every upload is of this round.

    Attributes
    ----------
    adapters : dict of Tensor of shape (C, ...)
        As trained, not as mixed afterwards; before the first upload, the common start.
    starts : dict of Tensor of shape (C, ...)
        From where they were trained, for ``similarity(on="update")``.
    losses : Tensor of shape (C,), float64
        Mean losses of that training; -inf before the first upload.
    moments : Tensor of shape (C,), int64
        Round of the upload; -1 before the first.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.methods.dynamic_balance import Uploads, ages
    >>> start = {"q.lora_A": torch.zeros(2, 1, 1)}
    >>> trained = {"q.lora_A": torch.ones(2, 1, 1)}
    >>> uploads = Uploads.none(start)
    >>> due = torch.tensor([True, False])
    >>> uploads = uploads.updated(trained, start, torch.tensor([0.3, 0.0]), due, t=0)
    >>> uploads.adapters["q.lora_A"].flatten().tolist(), ages(4, uploads.moments).tolist()
    ([1.0, 0.0], [4.0, inf])
    """

    adapters: Adapters
    starts: Adapters
    losses: Tensor
    moments: Tensor

    @classmethod
    def none(cls, start: Mapping[str, Tensor]) -> Uploads:
        """Return what there is before the first upload, of clients that start from `start`."""
        some = next(iter(start.values()))
        return cls(
            adapters=dict(start),
            starts=dict(start),
            losses=some.new_full((len(some),), -torch.inf, dtype=torch.float64),
            moments=some.new_full((len(some),), -1, dtype=torch.int64),
        )

    def updated(
        self,
        trained: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        losses: Tensor,
        due: Tensor,
        t: int,
    ) -> Uploads:
        """Return the uploads after those of round t; a second time with the same changes nothing.

        Parameters
        ----------
        trained, start : mapping of name to Tensor of shape (C, ...)
            After local training and before it; of the clients that are not due, not read.
        losses : Tensor of shape (C,)
            Mean losses of the training; of the clients that are not due, not read.
        due : Tensor of shape (C,), bool
            See `due_clients`.
        t : int
            This round.
        """
        return Uploads(
            adapters=_choose(due, trained, self.adapters),
            starts=_choose(due, start, self.starts),
            losses=torch.where(due, losses.double(), self.losses),
            moments=torch.where(due, t, self.moments),
        )

    def without(self, clients: Tensor) -> Uploads:
        """Return the uploads as if those of a mask (C,) had made none: nobody mixes them in."""
        return replace(
            self,
            losses=self.losses.masked_fill(clients, -torch.inf),
            moments=self.moments.masked_fill(clients, -1),
        )


def balance(
    adapters: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    losses: Tensor,
    n_examples: Tensor,
    t: int,
    *,
    aggregation: Aggregation = "fellrec",
    client_weights: ClientWeights = "examples",
    similarity_on: SimilarityOn = "params",
    use_similarity: bool = True,
    similarity_power: float = 1.0,
    use_heating: bool = True,
    alpha: float = 0.7,
    beta: float = 5.0,
    temperature: float = 0.05,
    exponent: Exponent = "t+1/beta",
    due: Tensor | None = None,
    uploads: Uploads | None = None,
    staleness_exponent: float = 0.5,
) -> tuple[Adapters, Tensor, dict[str, Any]]:
    """Mix the adapters after the local training of a round.

    Parameters
    ----------
    adapters, start : mapping of name to Tensor of shape (C, ...)
        After local training and before it.
    losses : Tensor of shape (C,)
        Mean training losses of the round.
    n_examples : Tensor of shape (C,)
        Of each client's training data.
    t : int
        Rounds before this one. Heating goes by it, not by how often a client has trained.
    aggregation : {"fellrec", "fedavg", "local"}, default="fellrec"
        See `mixing_weights`, `fedavg_weights` and `local_weights`.
    client_weights : {"examples", "clients"}, default="examples"
        Of ``"fedavg"``.
    similarity_on : {"params", "update", "product"}, default="params"
    use_similarity : bool, default=True
        Of ``"fellrec"``; if not, s = 1.
    similarity_power : float, default=1.0
        The s of ``"fellrec"`` are raised to it. (cos + 1) / 2 of adapters that have a start in
        common is close to 1 for all; with a higher power clients keep more of their own and take
        the rest from those most like them.
    use_heating : bool, default=True
        Of ``"fellrec"``; if not, w = 1.
    alpha, beta, temperature, exponent
        See `heating`.
    due : Tensor of shape (C,), bool, optional
        Clients that have finished their training, see `due_clients`; default: all. Of the others
        `adapters` and `losses` are not read.
    uploads : Uploads, optional
        The last uploads, those of this round included or not; default: none before this round.
    staleness_exponent : float, default=0.5
        See `mixing_weights`.

    Returns
    -------
    adapters : dict of Tensor of shape (C, ...)
        Mixed, of the clients that are due; the others' `start`.
    weights : Tensor of shape (C, C), float64
        Row c is what client c did; of clients that are not due, the row of the identity.
    diagnostics : dict
        ``similarity`` : mean over pairs of clients that have uploaded, nan without a pair;
        ``heat`` : list of C floats, 1 where there is no heating; ``own_weight`` : list of C
        floats, the share of its own adapter in what each client holds now.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.methods.dynamic_balance import balance
    >>> start = {"q.lora_A": torch.ones(2, 1, 1), "q.lora_B": torch.zeros(2, 1, 1)}
    >>> trained = {**start, "q.lora_B": torch.tensor([[[1.0]], [[3.0]]])}
    >>> losses, n_examples = torch.tensor([1.0, 1.0]), torch.tensor([10, 30])
    >>> for aggregation in ("fellrec", "fedavg", "local"):
    ...     mixed, weights, _ = balance(
    ...         trained, start, losses, n_examples, 0, aggregation=aggregation
    ...     )
    ...     print(aggregation, mixed["q.lora_B"].flatten().tolist())
    fellrec [1.77..., 2.22...]
    fedavg [2.5, 2.5]
    local [1.0, 3.0]
    """
    if due is None:
        due = torch.ones_like(losses, dtype=torch.bool)
    if uploads is None:
        uploads = Uploads.none(start)
    uploads = uploads.updated(adapters, start, losses, due, t)
    staleness = ages(t, uploads.moments)
    alike = similarity(uploads.adapters, uploads.starts, similarity_on)
    heat = torch.ones_like(uploads.losses)
    alone = local_weights(len(losses), device=losses.device)
    if aggregation == "fellrec":
        if use_heating:
            heat = heating(
                uploads.losses,
                t,
                alpha=alpha,
                beta=beta,
                temperature=temperature,
                exponent=exponent,
            )
        counted = alike**similarity_power if use_similarity else torch.ones_like(alike)
        weights = mixing_weights(
            counted, heat, staleness=staleness, staleness_exponent=staleness_exponent
        )
    elif aggregation == "fedavg":
        weights = fedavg_weights(
            n_examples, client_weights, staleness=staleness, staleness_exponent=staleness_exponent
        )
    else:
        weights = alone
    weights = torch.where(due[:, None], weights, alone)
    mixed = _choose(due, mix(uploads.adapters, weights), start)
    diagnostics = {
        "similarity": _mean_of_pairs(alike, uploads.moments >= 0),
        "heat": heat.tolist(),
        "own_weight": weights.diagonal().tolist(),
    }
    return mixed, weights, diagnostics


def _pairs(adapters: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """List A (C, r, in) and B (C, out, r) of every module."""
    modules = {name.removesuffix(".lora_A").removesuffix(".lora_B"): None for name in adapters}
    pairs = []
    for module in modules:
        names = f"{module}.lora_A", f"{module}.lora_B"
        missing = [name for name in names if name not in adapters]
        if missing:
            raise ValueError(
                f"The products of adapters need an A and a B for every module, but {module!r} has "
                f"no {' and no '.join(map(repr, missing))}: compare on 'params' or 'update'."
            )
        pairs.append((adapters[names[0]], adapters[names[1]]))
    return pairs


def _gram(vectors: Tensor) -> Tensor:
    """Inner products (C, C) of what the clients hold in one tensor (C, ...)."""
    flat = vectors.flatten(1)
    return flat @ flat.T


def _product_gram(a: Tensor, b: Tensor) -> Tensor:
    """Inner products (C, C) of the matrices B A (out, in), as <B A, B' A'> = <B^T B', A A'^T>."""
    n, rank = a.shape[:2]
    between_a = _gram(a.double().flatten(0, 1))
    between_b = _gram(b.double().transpose(1, 2).flatten(0, 1))
    return (between_a * between_b).reshape(n, rank, n, rank).sum((1, 3))


def _age_factors(staleness: Tensor, exponent: float) -> Tensor:
    """Weights (C,) of uploads by age; one never made has none, even at an exponent of 0."""
    return torch.where(staleness.isinf(), 0.0, (1.0 + staleness.double()) ** -exponent)


def _choose(mask: Tensor, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> Adapters:
    """Take the new adapters of the clients of a mask (C,), and the old ones of the others."""
    return {
        name: torch.where(mask.reshape(-1, *([1] * (value.dim() - 1))), new[name], value)
        for name, value in old.items()
    }


def _mean_of_pairs(matrix: Tensor, known: Tensor) -> float:
    """Mean of a matrix (C, C) over the pairs of two different clients that are known (C,)."""
    pairs = known[:, None] & known
    pairs.fill_diagonal_(False)
    return float(torch.where(pairs, matrix, 0.0).sum() / pairs.sum())
