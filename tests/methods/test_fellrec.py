import numpy as np
import pytest
import torch

from fedrecsk.data.prompts import Catalogue
from fedrecsk.data.vocabulary import Vocabulary
from fedrecsk.engine.streams import Streams
from fedrecsk.estimators._fellrec_serving import Reader
from fedrecsk.estimators._fellrec_simulation import local_training
from fedrecsk.estimators._language import Ranking
from fedrecsk.estimators._platforms import Platforms, Sampler
from fedrecsk.exceptions import NoUsableUploadError
from fedrecsk.methods.dynamic_balance import Uploads
from fedrecsk.methods.fellrec import FELLRecState, fellrec_step, keep_best
from fedrecsk.models.stacked_lora import flat, select
from fedrecsk.models.text_model import open_text_model
from tests.reference import fellrec_reference as reference
from tests.reference.dynamic_balance_reference import run_with_clock

# PEFT still calls transformers' attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

WORDS = ["red", "green", "blue", "robot", "wizard", "dragon", "castle", "racing", "puzzle", "night"]
N_ITEMS = 9
TITLES = tuple(
    " ".join(WORDS[(7 * item + 3 * place) % len(WORDS)] for place in range(1 + item % 3))
    for item in range(N_ITEMS)
)
# Items of each user, the oldest first, by platform; one user has nothing to learn from.
HISTORIES = [
    [[0, 1, 2, 5], [3, 4], [5], [6, 7, 8, 0, 1], [2, 0], [4, 1, 3], [8, 2]],
    [[7, 3, 4], [1, 6]],
    [[2, 4, 6, 8], [1, 3, 5], [0, 8, 7], [5, 6]],
]
TEMPERATURE, WEIGHT, RATE, DECAY = 0.3, 0.5, 3e-3, 0.1
BALANCE = {
    "client_weights": "examples",
    "proximal": 0.0,
    "similarity_on": "params",
    "use_similarity": True,
    "similarity_power": 1.0,
    "use_heating": True,
    "alpha": 0.7,
    "beta": 5.0,
    "heating_temperature": 0.05,
    "heating_exponent": "t+1/beta",
    "staleness_exponent": 0.5,
}


def platforms_of(histories):
    """Users of the platforms in turn, so that a platform's are not side by side."""
    users = [(c, items) for c, own in enumerate(histories) for items in own]
    users = [users[place] for place in np.random.default_rng(0).permutation(len(users))]
    of_user = np.array([c for c, _ in users])
    ids = np.arange(len(histories))
    indptr = np.cumsum([0, *(len(items) for _, items in users)])
    items = np.concatenate([items for _, items in users])
    return Platforms(ids, ids, of_user, indptr, items, N_ITEMS)


class Federation:
    """The fast round and the literal one on the same clients."""

    def __init__(
        self,
        backend="encoder",
        *,
        objective="probability",
        negatives="in-batch",
        inference="direct",
        prompt_loss=False,
        accumulation=1,
        client_layers=None,
        histories=HISTORIES,
        decoder=None,
        dropout=0.0,
        epochs=1,
    ):
        self.settings = {
            "objective": objective,
            "negatives": negatives,
            "inference": inference,
            "prompt_loss": prompt_loss,
        }
        self.histories = histories
        self.backbone = reference.tiny_backbone(backend, TITLES, decoder=decoder)
        catalogue = Catalogue(Vocabulary(np.arange(N_ITEMS)), TITLES, TITLES)
        self.model = open_text_model(
            self.backbone,
            catalogue,
            inference=inference,
            pooling="auto",
            target_modules="auto",
            rank=reference.RANK,
            alpha=reference.ALPHA,
            dropout=dropout,
            max_item_tokens=8,
            max_tokens=128,
            n_client_layers=client_layers,
        )
        self.platforms = platforms_of(histories)
        self.streams = Streams(3)
        self.sampler = Sampler(
            self.platforms,
            self.platforms.lengths,
            self.model.histories,
            self.streams,
            local_epochs=epochs,
            batch_size=4,
            gradient_accumulation=accumulation,
            examples_per_user=1,
            n_negatives=2 if negatives == "in-batch" else 0,
            max_history=3,
        )
        # B is not zero, so that the first gradients of A are not either.
        drawn = self.model.lora.init(1, torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(1)
        self.start = {
            name: value[0] + 0.3 * torch.randn(value[0].shape, generator=generator)
            for name, value in drawn.items()
        }
        # A copy, whose own hooks of the stacked adapters then do nothing.
        self.wrapped = reference.wrapped_by_peft(self.backbone.model, self.start)
        self.n_examples = torch.from_numpy(self.sampler.n_examples())

    def local_training(self):
        """The estimator's own."""
        settings = dict(self.settings)
        writes = settings.pop("inference") == "generate"
        reader = Reader(self.model, writes, max_history=3, num_beams=1)
        ranking = Ranking(TEMPERATURE, WEIGHT, generated=False, shared_popularity=False)
        counts = torch.from_numpy(self.platforms.counts(self.platforms.lengths)).float()
        return local_training(
            reader,
            self.sampler,
            counts,
            ranking,
            self.streams,
            first_round=0,
            n_rounds=1,
            learning_rate=RATE,
            learning_rate_schedule="constant",
            weight_decay=DECAY,
            **settings,
        )

    def fast(self, n_rounds, aggregation="fellrec", periods=None, **changed):
        n = len(self.histories)
        start = {name: value.expand(n, *value.shape).clone() for name, value in self.start.items()}
        state = FELLRecState.start(start, aggregation=aggregation)
        records = []
        for t in range(n_rounds):
            state, logs = fellrec_step(
                state,
                t,
                train=self.local_training(),
                n_examples=self.n_examples,
                periods=torch.tensor(periods or [1] * n),
                aggregation=aggregation,
                **{**BALANCE, **changed},
            )
            records.append(logs)
        return state, records

    def slow_training(self, t, client, holds, anchor=None, proximal=0.0):
        """One client's local training in round t, by what it alone has."""
        reader = reference.Reader(self.backbone, TITLES, TITLES)
        own = self.histories[client]
        counts = [sum(items.count(item) for items in own) for item in range(N_ITEMS)]
        popularity = reference.Popularity(counts, WEIGHT, self.settings["objective"] == "lift")

        def losses_from(model):
            if self.settings["inference"] == "generate":
                return reference.writing_losses(reader, prompt_loss=self.settings["prompt_loss"])
            if self.settings["negatives"] == "in-batch":
                return reference.in_batch_losses(reader, popularity, TEMPERATURE)
            vectors = [reader.vector(model, reader.item(item)) for item in range(N_ITEMS)]
            return reference.catalogue_losses(reader, popularity, TEMPERATURE, vectors)

        return reference.train_locally(
            self.wrapped,
            holds,
            self.plan(t, client),
            losses_from,
            learning_rate=RATE,
            weight_decay=DECAY,
            anchor=anchor,
            proximal=proximal,
        )

    def plan(self, t, client):
        """What the sampler draws for one client when no other is there."""
        steps = []
        for step in self.sampler.steps(t, [client]):
            batches = []
            for examples, weights in step:
                assert examples.present.all()
                assert weights.tolist() == [examples.targets.size]
                histories = [row[row >= 0][::-1].tolist() for row in examples.histories]
                pairs = list(zip(histories, examples.targets[0].tolist(), strict=True))
                batches.append((pairs, examples.negatives[0].tolist()))
            steps.append(batches)
        return steps

    def slow(self, n_rounds, aggregation="fellrec", periods=None, proximal=0.0, on="params"):
        periods = periods or [1] * len(self.histories)
        rounds = [0] * len(periods)

        def train(client, holds):
            t = (rounds[client] + 1) * periods[client] - 1
            rounds[client] += 1
            return self.slow_training(t, client, holds, holds if proximal else None, proximal)

        return run_with_clock(
            self.start,
            train,
            periods,
            n_rounds,
            aggregation=aggregation,
            n_examples=self.n_examples.tolist(),
            on=on,
            staleness_exponent=BALANCE["staleness_exponent"],
        )

    def assert_equal(self, stacked, clients, atol=1e-5):
        moved = 0.0
        for c, client in enumerate(clients):
            for name, value in client.items():
                torch.testing.assert_close(stacked[name][c], value, rtol=0, atol=atol)
                moved = max(moved, float((value - self.start[name]).abs().max()))
        assert moved > 2 * RATE  # there was something to compare


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulation": 1, "epochs": 2},
        {"accumulation": 2},
        {"objective": "lift"},
        {"objective": "lift", "accumulation": 2, "client_layers": 1},
        {"negatives": "all", "accumulation": 2},
        {"decoder": True},
        {"backend": "causal", "accumulation": 2},
        {"backend": "causal", "negatives": "all"},
        {"backend": "causal", "inference": "generate", "accumulation": 2},
        {"backend": "causal", "inference": "generate", "prompt_loss": True},
        {"client_layers": 1, "accumulation": 2},
        {"client_layers": 0, "negatives": "all"},
        {"backend": "causal", "client_layers": 1},
        {"backend": "causal", "client_layers": 1, "inference": "generate"},
    ],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items()),
)
def test_rounds_are_those_of_one_client_after_another(settings):
    federation = Federation(**settings)
    state, _ = federation.fast(2)
    federation.assert_equal(state.adapters, federation.slow(2))


@pytest.fixture(scope="module")
def federation():
    return Federation(accumulation=2)


@pytest.mark.parametrize("on", ["update", "product"])
def test_similarities(federation, on):
    state, records = federation.fast(2, similarity_on=on)
    federation.assert_equal(state.adapters, federation.slow(2, on=on))
    assert 0.0 < records[-1]["similarity"] < 1.0


@pytest.mark.parametrize("aggregation", ["fedavg", "local"])
def test_special_cases(federation, aggregation):
    state, records = federation.fast(2, aggregation)
    federation.assert_equal(state.adapters, federation.slow(2, aggregation))
    alike = [torch.equal(each[0], each[1]) for each in state.adapters.values()]
    assert all(alike) if aggregation == "fedavg" else not any(alike)
    n_bytes = 0 if aggregation == "local" else 3 * 4 * flat(state.adapters).shape[1]
    assert {record["bytes_up"] for record in records} == {n_bytes}
    assert {record["bytes_down"] for record in records} == {n_bytes}


def test_fedprox(federation):
    state, _ = federation.fast(2, "fedavg", proximal=2.0)
    federation.assert_equal(state.adapters, federation.slow(2, "fedavg", proximal=2.0))
    free, _ = federation.fast(2, "fedavg")
    assert (flat(free.adapters) - flat(state.adapters)).abs().max() > 1e-4


def test_ditto(federation):
    state, _ = federation.fast(2, "ditto", proximal=2.0)

    def train(t, client, holds, anchor):
        return federation.slow_training(t, client, holds, anchor, 2.0 if anchor else 0.0)[0]

    personal, shared = reference.ditto(
        federation.start, train, federation.n_examples.tolist(), n_rounds=2
    )
    federation.assert_equal(state.adapters, personal)
    federation.assert_equal(state.shared, [shared] * 3)
    fedavg, _ = federation.fast(2, "fedavg")
    torch.testing.assert_close(flat(state.shared), flat(fedavg.adapters))


@pytest.mark.parametrize("aggregation", ["fellrec", "fedavg"])
def test_clients_take_their_time(federation, aggregation):
    periods = [2, 1, 3]
    state, records = federation.fast(4, aggregation, periods=periods)
    federation.assert_equal(state.adapters, federation.slow(4, aggregation, periods=periods))
    assert [record["clients"] for record in records] == [1, 2, 2, 2]
    assert np.isnan(records[0]["client_losses"]).tolist() == [True, False, True]
    assert state.uploads.moments.tolist() == [3, 3, 2]


def test_equal_periods_are_the_synchronous_method(federation):
    one, _ = federation.fast(2)
    other, _ = federation.fast(2, periods=[1, 1, 1], staleness_exponent=3.0)
    assert torch.equal(flat(one.adapters), flat(other.adapters))


def test_losses_are_means_over_examples(federation):
    _, (record,) = federation.fast(1)
    losses = [federation.slow_training(0, c, federation.start)[1] for c in range(3)]
    np.testing.assert_allclose(record["client_losses"], losses, rtol=1e-5)
    weights = federation.n_examples.numpy()
    assert weights.tolist() == [6, 2, 4]
    assert record["loss"] == pytest.approx(np.average(losses, weights=weights), rel=1e-5)


@pytest.mark.parametrize("aggregation", ["fellrec", "fedavg", "ditto"])
def test_a_client_without_examples(aggregation):
    histories = [*HISTORIES[:2], [[4], [7]]]
    federation = Federation(histories=histories, epochs=2)
    state, (record,) = federation.fast(1, aggregation, proximal=0.5)
    assert np.isnan(record["client_losses"]).tolist() == [False, False, True]
    assert np.isfinite(record["loss"])
    assert flat(state.adapters).isfinite().all()
    if aggregation == "ditto":
        for name, value in federation.start.items():
            assert torch.equal(state.adapters[name][2], value)
    else:
        federation.assert_equal(state.adapters, federation.slow(1, aggregation, proximal=0.5))


@pytest.mark.parametrize("settings", [{}, {"backend": "causal", "inference": "generate"}])
def test_local_training_does_not_depend_on_the_other_clients(settings):
    """With dropout, as the reference is not."""
    federation = Federation(accumulation=2, dropout=0.3, **settings)
    train = federation.local_training()
    start = {name: torch.stack([value] * 3) for name, value in federation.start.items()}
    together, losses = train(start, torch.arange(3), None, 0.0, 1)
    plain, _ = Federation(accumulation=2, **settings).local_training()(
        start, torch.arange(3), None, 0.0, 1
    )
    assert (flat(together) - flat(plain)).abs().max() > 1e-4  # dropout does something
    for clients in ([0], [1], [2, 0]):
        alone, own = train(select(start, clients), torch.tensor(clients), None, 0.0, 1)
        torch.testing.assert_close(flat(alone), flat(together)[clients], rtol=0, atol=1e-5)
        torch.testing.assert_close(own, losses[clients], rtol=1e-5, atol=1e-5)


# What each client keeps ----------------------------------------------------------------


def held(*values):
    return {"q.lora_A": torch.tensor(values).reshape(-1, 1, 1)}


def state_of(adapters):
    state = FELLRecState.start(held(*[0.0] * 3), aggregation="fellrec")
    return FELLRecState(held(*adapters), {}, state.uploads, state.best, state.best_value)


def values_of(*values):
    return torch.tensor(values, dtype=torch.float64)


def kept(state):
    return state.best["q.lora_A"].flatten().tolist()


def follow(rounds):
    """Keep the best over rounds of (adapters, values); the states after each."""
    state, states = state_of([0.0] * 3), []
    for adapters, values in rounds:
        state = FELLRecState(held(*adapters), {}, state.uploads, state.best, state.best_value)
        state = keep_best(state, values_of(*values))
        states.append(state)
    return states


def test_each_client_keeps_the_adapter_that_validated_best():
    rounds = [
        ([1.0, 2.0, 3.0], [0.1, 0.2, 0.3]),
        ([4.0, 5.0, 6.0], [0.2, 0.2, 0.1]),  # better, equal, worse
        ([7.0, 8.0, 9.0], [0.1, 0.3, 0.4]),
    ]
    states = follow(rounds)
    assert [kept(state) for state in states] == [
        [1.0, 2.0, 3.0],
        [4.0, 2.0, 3.0],
        [4.0, 8.0, 9.0],
    ]
    assert states[-1].best_value.tolist() == [0.2, 0.3, 0.4]
    assert states[-1].adapters["q.lora_A"].flatten().tolist() == [7.0, 8.0, 9.0]


def test_a_client_without_validation_goes_by_the_others():
    nan = float("nan")
    states = follow(
        [
            ([1.0, 2.0, 3.0], [0.1, nan, 0.3]),
            ([4.0, 5.0, 6.0], [0.1, nan, 0.4]),
            ([7.0, 8.0, 9.0], [0.1, nan, 0.4]),  # nobody improves
        ]
    )
    assert [kept(state) for state in states] == [
        [1.0, 2.0, 3.0],
        [1.0, 5.0, 6.0],
        [1.0, 5.0, 6.0],
    ]
    assert states[-1].best_value.tolist() == [0.1, -np.inf, 0.4]


def test_without_any_validation_the_last_adapters_are_kept():
    nan = [float("nan")] * 3
    assert [kept(state) for state in follow([([1.0] * 3, nan), ([2.0] * 3, nan)])] == [
        [1.0] * 3,
        [2.0] * 3,
    ]


def test_a_start():
    start = held(1.0, 2.0)
    state = FELLRecState.start(start, aggregation="ditto")
    assert state.shared.keys() == start.keys()
    assert FELLRecState.start(start, aggregation="fellrec").shared == {}
    assert state.best_value.tolist() == [-np.inf] * 2
    assert isinstance(state.uploads, Uploads)
    assert state.uploads.moments.tolist() == [-1, -1]


# ---------------------------------------------------------------- clients that do not deliver


def drift(adapters, clients, anchor, proximal, t):
    """Local training that needs no model: every client goes its own way."""
    moved = {
        name: value + 0.1 * (t + 1) * torch.sin(clients + 1.0)[:, None, None]
        for name, value in adapters.items()
    }
    return moved, 0.5 + 0.02 * clients.float()


def those_of(state, clients):
    """The federation of some clients alone."""
    uploads = Uploads(
        select(state.uploads.adapters, clients),
        select(state.uploads.starts, clients),
        state.uploads.losses[clients],
        state.uploads.moments[clients],
    )
    adapters = select(state.adapters, clients)
    shared = select(state.shared, clients) if state.shared else {}
    return FELLRecState(adapters, shared, uploads, adapters, state.best_value[clients])


@pytest.mark.parametrize("aggregation", ["fellrec", "fedavg", "ditto", "local"])
def test_a_client_that_does_not_deliver_is_as_if_it_were_not_there(aggregation):
    counts = torch.tensor([30.0, 10.0, 20.0])
    generator = torch.Generator().manual_seed(0)
    start = {
        f"q.lora_{side}": torch.randn(1, *shape, generator=generator).repeat(3, 1, 1)
        for side, shape in {"A": (2, 5), "B": (4, 2)}.items()
    }

    def step(state, t, n_examples, train=drift, **more):
        arguments = {"train": train, "n_examples": n_examples, "aggregation": aggregation}
        periods = torch.ones(len(n_examples), dtype=torch.int64)
        return fellrec_step(state, t, periods=periods, **arguments, **BALANCE, **more)[0]

    everybody = torch.ones(3, dtype=torch.bool)
    state = step(FELLRecState.start(start, aggregation=aggregation), 0, counts, delivers=everybody)
    plain = step(FELLRecState.start(start, aggregation=aggregation), 0, counts)
    for name, value in flat_parts(state).items():
        assert torch.equal(value, flat_parts(plain)[name])

    others = torch.tensor([0, 2])
    two = step(
        those_of(state, others),
        1,
        counts[others],
        train=lambda adapters, clients, *more: drift(adapters, others[clients], *more),
    )
    three = step(state, 1, counts, delivers=torch.tensor([True, False, True]))
    for name, value in flat_parts(those_of(three, others)).items():
        torch.testing.assert_close(value, flat_parts(two)[name])
    for name, value in flat_parts(those_of(three, torch.tensor([1]))).items():
        assert torch.equal(value, flat_parts(those_of(state, torch.tensor([1])))[name]), name
    # It is back in the next round.
    again = step(three, 2, counts, delivers=everybody)
    assert again.uploads.moments.tolist() == [2, 2, 2]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e9])
@pytest.mark.parametrize("aggregation", ["fellrec", "fedavg", "ditto", "local"])
def test_a_client_whose_adapter_is_of_no_use_is_as_one_that_does_not_deliver(aggregation, value):
    counts = torch.tensor([30.0, 10.0, 20.0, 15.0])
    start = {"q.lora_A": torch.zeros(4, 2, 5), "q.lora_B": torch.ones(4, 4, 2)}

    def step(state, t, train=drift, **more):
        arguments = {"train": train, "n_examples": counts, "aggregation": aggregation}
        periods = torch.ones(4, dtype=torch.int64)
        return fellrec_step(state, t, periods=periods, **arguments, **BALANCE, **more)

    def breaks(broken):
        def train(adapters, clients, *more):
            moved, losses = drift(adapters, clients, *more)
            some = torch.isin(clients, torch.tensor(broken))[:, None, None]
            return {name: moved[name].masked_fill(some, value) for name in moved}, losses

        return train

    state, logs = step(FELLRecState.start(start, aggregation=aggregation), 0)
    assert logs["rejected"] == 0
    found, more = step(state, 1, breaks([1]))
    expected, plain = step(state, 1, delivers=torch.tensor([True, False, True, True]))
    for name, part in flat_parts(found).items():
        assert torch.equal(part, flat_parts(expected)[name]), name
    assert (more["clients"], more["rejected"]) == (4, 1)
    assert (plain["clients"], plain["rejected"]) == (3, 0)
    assert more["loss"] == plain["loss"]
    assert more["bytes_down"] == plain["bytes_down"]
    assert more["bytes_up"] == logs["bytes_up"]
    assert np.isnan(more["client_losses"][1])
    if not np.isfinite(value):
        with pytest.raises(NoUsableUploadError, match="round 2: the uploads of all 4 clients"):
            step(state, 1, breaks([0, 1, 2, 3]))


def flat_parts(state):
    """Name what a state holds of its clients."""
    parts = {"adapters": state.adapters, "shared": state.shared, "sent": state.uploads.adapters}
    return {f"{part} {name}": value for part, own in parts.items() for name, value in own.items()}
