"""The estimators under test, with fast settings, and data with an obvious answer."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from sklearn.base import clone
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedrecsk import (
    CentralizedRecommender,
    FedAvgRecommender,
    FedFastRecommender,
    FedFNNRecommender,
    FELLRecRecommender,
    HeteFedRecRecommender,
    PopularityRecommender,
)

N_USERS, N_ITEMS = 40, 20

# A language model of one layer that can count: a text in it is an id, up to 149.
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = (*SPECIAL, *'",.-', "item", *map(str, range(150)))
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


def tiny_encoder(n_layers=1):
    """A random BERT that has a faint idea of parity, as a pre-trained one would."""
    sizes = SIZES | {"num_hidden_layers": n_layers}
    config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = BertModel(config, add_pooling_layer=False)
    return hint_at_parity(model, 0.14), tiny_tokenizer("[CLS] $A [SEP]")


def tiny_causal():
    """A random Llama of the same kind."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, bos_token_id=2, eos_token_id=3, pad_token_id=0))
    return hint_at_parity(model, 0.25), tiny_tokenizer("[CLS] $A")


def hint_at_parity(model, strength):
    """Draw even numbers a little nearer to each other; without training it does not suffice."""
    table = model.get_input_embeddings().weight.data
    direction = strength * torch.randn(table.shape[1])
    for number in range(150):
        table[WORDS.index(str(number))] += direction if number % 2 else -direction
    return model


def tiny_tokenizer(form):
    core = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = BertPreTokenizer()
    core.post_processor = TemplateProcessing(
        single=form, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = zip(("pad_token", "unk_token", "bos_token", "eos_token"), SPECIAL, strict=True)
    return PreTrainedTokenizerFast(tokenizer_object=core, **dict(names))


FAST = {"n_factors": 4, "n_rounds": 8, "random_state": 0}
FAST_SIZES = {"sizes": (2, 4, 8), "n_rounds": 8, "random_state": 0}
FAST_TEXT = {
    "n_rounds": 6,
    "local_epochs": 1,
    "learning_rate": 0.01,
    "target_modules": "all-linear",
    # Batches of eight hold too few candidates to learn from one another.
    "objective": "probability",
    "n_negatives": 20,
    "batch_size": 8,
    "temperature": 0.1,
    "learning_rate_schedule": "constant",
    # Popularity on platforms of one taste would give the answer without any learning.
    "popularity_weight": 0.0,
    "early_stopping": False,
    "random_state": 0,
}
TRAINABLE = {
    "fedfnn-whole-data": FedFNNRecommender(**FAST),
    # Without refit the predicted vectors count, and users are as old as their last round.
    "fedfnn-whole-data-no-refit": FedFNNRecommender(
        **FAST | {"n_rounds": 30}, predictor="linear", refit=False
    ),
    # The MLP trains two networks a round in cross-validation: most of the time of the suite.
    "fedfnn-bce-mlp": FedFNNRecommender(
        **FAST | {"n_rounds": 4},
        objective="bce",
        clients_per_round=0.4,
        cv=2,
        predictor="mlp",
        gate=False,
        anchor=False,
    ),
    **{
        f"fedfnn-bce-{predictor}": FedFNNRecommender(
            **FAST,
            objective="bce",
            predictor=predictor,
            gate=False,
            anchor=False,
            discount_decay=0.5,
        )
        for predictor in ("cluster", None)
    },
    "fedfnn-bce-linear": FedFNNRecommender(**FAST, objective="bce"),
    "fedfnn-bce-no-refit": FedFNNRecommender(
        **FAST | {"n_rounds": 20}, objective="bce", gate=False, refit=False
    ),
    # The two tastes cancel out in a mean, so the gate would never let it through.
    "fedfnn-bce-mean": FedFNNRecommender(
        **FAST, objective="bce", predictor="mean", gate=False, anchor=False
    ),
    "fedfast": FedFastRecommender(**FAST, n_clusters=2, item_bias=True),
    "fedavg-ncf": FedAvgRecommender(
        "ncf",
        **FAST | {"n_rounds": 12},
        clients_per_round=0.5,
        learning_rate=0.1,
        batch_size=None,
    ),
    "fedavg-lightgcn": FedAvgRecommender(
        "lightgcn", **FAST | {"n_rounds": 12}, clients_per_round=0.5, learning_rate=0.1
    ),
    "centralized-whole-data": CentralizedRecommender(**FAST),
    "centralized-bce": CentralizedRecommender(
        **FAST, objective="bce", batch_users=4, learning_rate=0.1
    ),
    "centralized-ncf": CentralizedRecommender(
        "ncf", **FAST | {"n_rounds": 12}, batch_users=2, learning_rate=0.05
    ),
    "centralized-lightgcn": CentralizedRecommender(
        "lightgcn", **FAST, batch_users=4, learning_rate=0.1
    ),
    "hetefedrec-mf": HeteFedRecRecommender(**FAST_SIZES),
    **{
        f"hetefedrec-{base}": HeteFedRecRecommender(
            base,
            **FAST_SIZES,
            clients_per_round=0.5,
            local_epochs=3,
            batch_size=batch_size,
            server_learning_rate=0.05,
        )
        for base, batch_size in (("ncf", 32), ("lightgcn", None))
    },
    "fedavg-bce": FedAvgRecommender(**FAST),
    "fedavg-whole-data": FedAvgRecommender(**FAST, objective="whole-data"),
    "fellrec-encoder": FELLRecRecommender(tiny_encoder, **FAST_TEXT),
    "fellrec-causal": FELLRecRecommender(tiny_causal, backend="causal", **FAST_TEXT),
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TRAINABLE_ON = {
    f"{name}-{device}": clone(estimator).set_params(device=device)
    for name, estimator in TRAINABLE.items()
    for device in DEVICES
}
ALL = {"popularity": PopularityRecommender(), **TRAINABLE_ON}
TYPICAL = (
    "popularity",
    "fedfnn-whole-data",
    "fedfnn-bce-linear",
    "fedavg-bce",
    "hetefedrec-mf",
    "fellrec-encoder",
)


def pytest_generate_tests(metafunc):
    """Run a test once for each estimator and device, for those that learn, or for a few."""
    if "case" in metafunc.fixturenames:
        cases = list(TRAINABLE_ON if "trainable" in metafunc.fixturenames else ALL)
        if "typical" in metafunc.fixturenames:
            cases = [case for case in cases if case.removesuffix("-cpu") in TYPICAL]
        metafunc.parametrize("case", [parameter(case) for case in cases])


def parameter(case):
    """A case; one that reads texts gets none here, and says so in each fit."""
    quiet = pytest.mark.filterwarnings(
        "ignore::fedrecsk.NoItemTextWarning", "ignore:No user has two interactions:UserWarning"
    )
    return pytest.param(case, marks=[quiet] if case.startswith("fellrec") else [])


@pytest.fixture
def trainable(case):
    """An unfitted estimator that learns, one of all."""
    return clone(TRAINABLE_ON[case])


@pytest.fixture
def estimator(case):
    """An unfitted estimator, one of all."""
    return clone(ALL[case])


@pytest.fixture
def typical(case):
    """An unfitted estimator, one of a few, for tests of what all of them share."""
    return clone(ALL[case])


@pytest.fixture(scope="session")
def tiny_backbones():
    """Functions that make the tiny language models, by name."""
    return {
        "tiny_encoder": tiny_encoder,
        "tiny_causal": tiny_causal,
        "deep_encoder": functools.partial(tiny_encoder, n_layers=4),
    }


@pytest.fixture(scope="session")
def n_columns():
    """Give a function that says how many columns an estimator's vectors have."""

    def count(estimator):
        if isinstance(estimator, FELLRecRecommender):
            return SIZES["hidden_size"]
        return max(getattr(estimator, "sizes", None) or (estimator.n_factors,))

    return count


@pytest.fixture
def fitted(case, obvious, _fitted_once):
    """An estimator fitted on `obvious`, shared by the tests that only look at it."""
    if case not in _fitted_once:
        _fitted_once[case] = clone(ALL[case]).fit(obvious)
    return _fitted_once[case]


@pytest.fixture(scope="session")
def _fitted_once():
    return {}


@pytest.fixture(scope="session")
def obvious():
    """Even users have all even items, odd users all odd ones, but each user lacks one.

    User u lacks item u % 20, which is of its own parity: that one must come first.
    """
    rows = [
        [user, item]
        for user in range(N_USERS)
        for item in range(N_ITEMS)
        if user % 2 == item % 2 and item != user % N_ITEMS
    ]
    X = np.array(rows)
    X.setflags(write=False)
    return X


class Interrupt:
    """A callback that keeps what it is given after each round, and raises after some."""

    def __init__(self, n_rounds=None):
        self.n_rounds = n_rounds
        self.seen = []
        self.tasks = []

    def setup(self, estimator, context):
        pass

    def teardown(self, estimator, context):
        pass

    def on_fit_task_begin(self, estimator, context):
        pass

    def on_fit_task_end(self, estimator, context, *, fitted_estimator):
        if context.task_name == "round":
            self.seen.append(fitted_estimator)
            self.tasks.append(context.task_id)
            if len(self.seen) == self.n_rounds:
                raise KeyboardInterrupt


@pytest.fixture(scope="session")
def interrupt():
    """Give the class of a callback: ``interrupt(2)`` raises after two rounds."""
    return Interrupt


@pytest.fixture(scope="session")
def arrays_of():
    """Give a function that lists what `fit` left: all but the seconds that rounds took."""
    return _arrays_of


@pytest.fixture(scope="session")
def assert_same_fit():
    """Give a function that demands two fits to be equal to the last bit."""
    return _assert_same_fit


def _arrays_of(estimator):
    fitted = {
        name: value
        for name, value in vars(estimator).items()
        if name.endswith("_") and not name.startswith("_")
    }
    fitted["history_"] = [
        {key: value for key, value in record.items() if key != "seconds"}
        for record in fitted["history_"]
    ]
    interactions = estimator._interactions
    for field in dataclasses.fields(interactions):
        value = getattr(interactions, field.name)
        fitted[f"interactions.{field.name}"] = getattr(value, "ids", value)
    return fitted


def _assert_same_fit(one, other):
    ours, theirs = _arrays_of(one), _arrays_of(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert_same(value, theirs[name], name)


def assert_same(ours, theirs, name):
    """Compare arrays, numbers and what holds them; nan is nan."""
    if dataclasses.is_dataclass(ours):
        ours, theirs = vars(ours), vars(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), name
        for key, value in ours.items():
            assert_same(value, theirs[key], f"{name}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), name
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{name}[{place}]")
    else:
        np.testing.assert_array_equal(ours, theirs, err_msg=name, strict=True)
