"""How much of a text a curious server could read out of the hidden states it computes with.

A server that holds layers k ... n - 2 of a split model (:mod:`fedrecsk.models.split_lm`) sees the
hidden states h_k, ..., h_(n-1), where h_j is what leaves the first j layers and h_0 the embedded
tokens. Two attacks try to tell each token from its hidden state:

    nearest token      the token whose embedding is most like h by cosine: needs nothing but the
                       embedding table, which a public backbone has
    linear inverter    ridge regression from h to the token's embedding, learnt on texts that the
                       attacker knows (those of an auxiliary client); then the nearest token

The risk at a layer is the share of tokens told right, and the risk of a split that of the worst
layer the server sees, under the worse attack. It is a lower bound: somebody who trains a deeper
network, guesses from context or looks at gradients may read more.

Zhao, Wang, Xu, Ng, Chua. "LLM-based Federated Recommendation" (FELLRec), Findings of NAACL 2025,
arXiv:2402.09959, keep the first layers and the last one on the client for this reason. Only a
summary of the paper could be read, so the attacks are ours. In both of them vectors are centred
before the cosine: embeddings and hidden states share a large common part, and without it the
attacks are stronger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fedrecsk.models.split_middle import find_layers, hidden_in, hidden_of

ATTACKS = ("nearest_token", "linear_inverter")
CHUNK = 2**24  # similarities that are in memory at once


def nearest_token_attack(hidden: Tensor, embedding_table: Tensor) -> Tensor:
    """Guess each token as the one whose embedding is most like its hidden state.

    Parameters
    ----------
    hidden : Tensor of shape (N, d)
        Hidden states of N tokens, as many as the attacker has: their mean is taken out.
    embedding_table : Tensor of shape (V, d)
        Embeddings of the vocabulary.

    Returns
    -------
    Tensor of shape (N,)
        Token ids.

    Raises
    ------
    ValueError
        If hidden states and embeddings are not of the same width.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.models.reconstruction import nearest_token_attack
    >>> table = torch.eye(4)
    >>> nearest_token_attack(table[[2, 0, 3, 1]] + 5, table).tolist()
    [2, 0, 3, 1]
    """
    if hidden.shape[1] != embedding_table.shape[1]:
        raise ValueError(
            f"Hidden states have {hidden.shape[1]} numbers and token embeddings "
            f"{embedding_table.shape[1]}, so the two cannot be compared."
        )
    table = embedding_table.float()
    hidden = hidden.float()
    return _most_alike(hidden - hidden.mean(0), table - table.mean(0))


def linear_inverter_attack(
    hidden: Tensor,
    embedding_table: Tensor,
    *,
    known_hidden: Tensor,
    known_tokens: Tensor,
    ridge: float = 1e-3,
) -> Tensor:
    """Guess each token by a linear map from hidden states to token embeddings.

    Parameters
    ----------
    hidden : Tensor of shape (N, d)
        Hidden states of the tokens to guess.
    embedding_table : Tensor of shape (V, e)
        Embeddings of the vocabulary.
    known_hidden : Tensor of shape (M, d)
        Hidden states of tokens that the attacker knows.
    known_tokens : Tensor of shape (M,)
        These tokens' ids.
    ridge : float, default=1e-3
        Penalty, beside standardised hidden states and the mean of the squared errors.

    Returns
    -------
    Tensor of shape (N,)
        Token ids, also such as are not among the known tokens.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.models.reconstruction import linear_inverter_attack
    >>> table = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    >>> turned = table[:, [1, 2, 0]] * 3  # what a server sees
    >>> linear_inverter_attack(turned, table, known_hidden=turned[:5],
    ...     known_tokens=torch.arange(5)).tolist()
    [0, 1, 2, 3, 4, 5]
    """
    table = embedding_table.double()
    targets = table[known_tokens]
    centre = targets.mean(0)
    mean = known_hidden.double().mean(0)
    scale = known_hidden.double().std(0, correction=0)
    scale = scale.clamp_min(max(1e-6 * float(scale.max()), 1e-30))  # a constant tells nothing
    known = (known_hidden.double() - mean) / scale
    gram = known.T @ known / len(known)
    gram.diagonal().add_(ridge)
    weights = torch.linalg.solve(gram, known.T @ (targets - centre) / len(known))
    guessed = (hidden.double() - mean) / scale @ weights
    return _most_alike(guessed.float(), (table - centre).float())


def reconstruction_risk(
    model: nn.Module,
    layers: str | nn.ModuleList,
    auxiliary: tuple[Tensor, Tensor],
    target: tuple[Tensor, Tensor],
    *,
    special_ids: Sequence[int] = (),
    titles: Tensor | None = None,
    ridge: float = 1e-3,
    batch_size: int = 32,
) -> list[dict[str, float]]:
    """Attack the hidden states of every layer.

    The hidden states of all tokens are in memory at once, those of n + 1 layers.

    Parameters
    ----------
    model : Module
        A Hugging Face model, not split. Adapters that are in effect count.
    layers : str or ModuleList
        The list of its n layers, or the module path of it.
    auxiliary : tuple of (input_ids, attention_mask), each of shape (B_a, L_a)
        Texts that the attacker knows.
    target : tuple of (input_ids, attention_mask), each of shape (B, L)
        Texts to guess, of other clients.
    special_ids : sequence of int, default=()
        Tokens that do not count, such as the tokenizer's ``all_special_ids``. Padding, where the
        attention mask is 0, never does.
    titles : Tensor of shape (B, L), default=None
        For each token of the target texts the number of its title within the text, -1 outside of
        any. Only tokens of titles count then, so that an instruction that everybody knows is not
        taken for a success; and titles that are told right as a whole are counted too.
    ridge : float, default=1e-3
        Of :func:`linear_inverter_attack`.
    batch_size : int, default=32
        Texts that the model reads at once.

    Returns
    -------
    list of dict
        One for each j = 0, ..., n: ``layer``, the number j of layers that the hidden state has
        passed, and ``nearest_token`` and ``linear_inverter``, the shares of tokens told right;
        with `titles` also ``nearest_token_titles`` and ``linear_inverter_titles``, the shares of
        titles.

    Raises
    ------
    ValueError
        If there is no such list of layers, or no token of the auxiliary or the target texts
        counts.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from fedrecsk.models.reconstruction import reconstruction_risk
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2,
    ...     num_attention_heads=2, intermediate_size=16)).eval()
    >>> known, secret = torch.randint(30, (2, 8, 10), generator=torch.Generator().manual_seed(0))
    >>> ones = torch.ones_like(known)
    >>> risk = reconstruction_risk(model, "model.layers", (known, ones), (secret, ones))
    >>> [row["layer"] for row in risk], risk[0]["nearest_token"]  # embedded tokens tell all
    ([0, 1, 2], 1.0)
    """
    counted = [_counted(*texts, special_ids) for texts in (auxiliary, target)]
    if titles is not None:
        counted[1] &= titles >= 0
    for name, each in zip(("auxiliary", "target"), counted, strict=True):
        if not bool(each.any()):
            raise ValueError(
                f"No token of the {name} texts counts: all of them are padding or special"
                + (" or in no title." if titles is not None and name == "target" else ".")
            )
    embed = model.get_input_embeddings()  # type: ignore[operator]
    table = embed.weight.detach()
    known_tokens, tokens = auxiliary[0][counted[0]], target[0][counted[1]]
    known = _states(model, layers, *auxiliary, counted[0], batch_size)
    unknown = _states(model, layers, *target, counted[1], batch_size)
    groups = None if titles is None else _groups(titles, counted[1])
    risk = []
    for layer, (known_hidden, hidden) in enumerate(zip(known, unknown, strict=True)):
        row: dict[str, float] = {"layer": layer}
        guesses = {
            "nearest_token": nearest_token_attack(hidden, table),
            "linear_inverter": linear_inverter_attack(
                hidden, table, known_hidden=known_hidden, known_tokens=known_tokens, ridge=ridge
            ),
        }
        for name, guess in guesses.items():
            right = guess == tokens
            row[name] = float(right.double().mean())
            if groups is not None:
                row[f"{name}_titles"] = _whole(right, groups)
        risk.append(row)
    return risk


def suggest_client_layers(risk: Sequence[Mapping[str, float]], max_risk: float) -> int:
    """Choose how many layers a client keeps, so that what the server sees tells little.

    Parameters
    ----------
    risk : sequence of mapping
        As from :func:`reconstruction_risk`, for the layers 0, ..., n.
    max_risk : float
        Largest share of tokens, in [0, 1], that either attack may tell right from any hidden
        state that the server sees.

    Returns
    -------
    int
        The smallest k from 0 to n - 2 for which this holds, for the parameter
        ``n_client_layers``. The server then sees the hidden states k, ..., n - 1.

    Raises
    ------
    ValueError
        If no k is safe enough, with the smallest risk that can be had; or if `risk` is not of
        the layers 0, ..., n in order.

    Examples
    --------
    >>> from fedrecsk.models.reconstruction import suggest_client_layers
    >>> rates = [1.0, 0.8, 0.4, 0.3, 0.6]  # after 0, ..., 4 layers
    >>> risk = [{"layer": j, "nearest_token": 0.0, "linear_inverter": rate}
    ...     for j, rate in enumerate(rates)]
    >>> suggest_client_layers(risk, 0.5)
    2
    """
    if [row["layer"] for row in risk] != list(range(len(risk))) or len(risk) < 3:
        raise ValueError(
            "risk must have one entry for each of the layers 0, ..., n of a model of n >= 2 "
            f"layers, in this order; got layers {[row['layer'] for row in risk]}."
        )
    if not 0.0 <= max_risk <= 1.0:
        raise ValueError(f"max_risk is a share of the tokens, from 0 to 1; got {max_risk}.")
    n_layers = len(risk) - 1
    worst = [max(row[attack] for attack in ATTACKS) for row in risk]
    # What leaves the last layer never leaves the client.
    exposed = [max(worst[k:n_layers]) for k in range(n_layers - 1)]
    for k, rate in enumerate(exposed):
        if rate <= max_risk:
            return k
    raise ValueError(
        f"No split keeps the risk within {max_risk}: the smallest that can be had is "
        f"{exposed[-1]:.3f}, with n_client_layers={n_layers - 2}. Allow more, or leave nothing to "
        f"the server with n_client_layers={n_layers - 1}."
    )


def _counted(input_ids: Tensor, attention_mask: Tensor, special_ids: Sequence[int]) -> Tensor:
    """Tell which tokens count, (B, L)."""
    special = torch.tensor(list(special_ids), dtype=input_ids.dtype, device=input_ids.device)
    return attention_mask.bool() & ~torch.isin(input_ids, special)


def _states(
    model: nn.Module,
    layers: str | nn.ModuleList,
    input_ids: Tensor,
    attention_mask: Tensor,
    counted: Tensor,
    batch_size: int,
) -> list[Tensor]:
    """Collect the hidden states of the tokens that count: n + 1 tensors (N, d)."""
    _, modules = find_layers(model, layers)
    states: list[list[Tensor]] = [[] for _ in range(len(modules) + 1)]
    wanted = counted[:0]

    def note_input(module: nn.Module, args: Any, kwargs: Any) -> None:
        states[places[module]].append(hidden_in(args, kwargs)[wanted])

    def note_output(module: nn.Module, args: Any, output: Any) -> None:
        states[-1].append(hidden_of(output)[wanted])

    places = {module: place for place, module in enumerate(modules)}
    hooks = [each.register_forward_pre_hook(note_input, with_kwargs=True) for each in modules]
    hooks.append(modules[-1].register_forward_hook(note_output))
    try:
        with torch.no_grad():
            for start in range(0, len(input_ids), batch_size):
                rows = slice(start, start + batch_size)
                wanted = counted[rows]
                model(input_ids=input_ids[rows], attention_mask=attention_mask[rows])
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(each) for each in states]


def _most_alike(vectors: Tensor, table: Tensor) -> Tensor:
    """Find for each vector (N, d) the row of the table (V, d) of the largest cosine."""
    directions = normalize(table, dim=1).T
    rows = max(1, CHUNK // len(table))
    # The length of a vector changes none of its comparisons.
    return torch.cat([(chunk @ directions).argmax(1) for chunk in torch.split(vectors, rows)])


def _groups(titles: Tensor, counted: Tensor) -> Tensor:
    """Give each token that counts the number of its title among those of all texts, (N,)."""
    texts = torch.arange(len(titles), device=titles.device)[:, None].expand_as(titles)
    pairs = torch.stack([texts[counted], titles[counted]], dim=1)
    groups: Tensor = torch.unique(pairs, dim=0, return_inverse=True)[1]
    return groups


def _whole(right: Tensor, groups: Tensor) -> float:
    """Share of groups all of whose tokens are right."""
    n_groups = int(groups.max()) + 1
    missed = torch.zeros(n_groups, dtype=torch.bool, device=right.device)
    missed[groups[~right]] = True
    return float((~missed).double().mean())
