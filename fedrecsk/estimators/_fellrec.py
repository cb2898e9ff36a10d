"""The estimator around `fedrecsk.methods.fellrec`; its rounds are in `_fellrec_simulation`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from sklearn.utils.validation import check_is_fitted

from fedrecsk.data.interactions import Interactions
from fedrecsk.data.prompts import Catalogue, catalogue
from fedrecsk.data.vocabulary import Vocabulary
from fedrecsk.engine.device import resolve_device, torch_threads
from fedrecsk.engine.participation import Availability
from fedrecsk.engine.rounds import Record
from fedrecsk.engine.shards import CPU_CHUNK_ROWS
from fedrecsk.engine.streams import Streams
from fedrecsk.estimators._base import (
    SCORES_PER_BATCH,
    SHARED_CONSTRAINTS,
    Attributes,
    BaseRecommender,
    RoundWatch,
)
from fedrecsk.estimators._fellrec_serving import Reader, serve
from fedrecsk.estimators._fellrec_simulation import simulate_fellrec
from fedrecsk.estimators._language import (
    Ranking,
    about,
    as_tensor,
    check_same_layers,
    safe_layers,
    score_users,
)
from fedrecsk.estimators._platforms import Platforms, make_platforms
from fedrecsk.estimators._sklearn import Constraints, Interval, StrOptions
from fedrecsk.methods.dynamic_balance import ClientWeights, Exponent, SimilarityOn
from fedrecsk.methods.fellrec import AggregationName
from fedrecsk.models import adapter_files
from fedrecsk.models.backbone import COMPACT_NAME, load_backbone, make_compact
from fedrecsk.models.compact import CompactState, open_compact
from fedrecsk.models.stacked_lora import Adapters, select
from fedrecsk.models.text_model import Inference, TextModel, open_text_model
from fedrecsk.models.text_vectors import Pooling

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]

# What "auto" stands for, by what the adapters are on; chosen in pilots.
AUTO_LEARNING_RATE = {"compact": 8e-3, "encoder": 5e-4, "causal": 2e-4}


class FELLRecRecommender(BaseRecommender):
    """FELLRec: platforms tune one language model together, each with an adapter of its own.

    Clients are platforms, groups of users. A language model reads the texts of items; it is
    frozen, and every platform trains low-rank adapters (LoRA) on the histories of its users. After
    each round a platform mixes its adapter with those of the others: more with similar ones, and
    more the better it has learned. No adapter is global; users of no platform get the mean one.

    Parameters
    ----------
    backbone : str, Path, callable or None, default=None
        Name on the Hugging Face Hub, local folder, or function that returns
        ``(model, tokenizer)``. None: a compact model, made from the item texts without any
        download. Never a model object, since scikit-learn copies parameters.
    backend : {"encoder", "causal"}, default="encoder"
        ``"encoder"`` compares vectors of histories and of items, as RecFormer does. ``"causal"``
        asks for the next title with a prompt, as BIGRec does.
    item_text : mapping, DataFrame or None, default=None
        Titles, or further attributes, by item id, see `fedrecsk.data.prompts.read_item_text`.
        Items that nobody has chosen yet can be recommended if they have a text. None: ids are
        all that the model reads, with a warning.
    n_platforms : int, "auto" or None, default="auto"
        None: every client id is a platform. An int: clients are grouped into so many by
        `fedrecsk.data.cluster_clients`, a step of the server that sees all interactions.
        ``"auto"``: None for up to 32 clients, else 5.
    inference : {"direct", "generate"}, default="direct"
        Of the causal backend. ``"direct"`` compares the prompt's last hidden state with those of
        the titles, and trains for that: one pass a user. ``"generate"``: beam search writes a
        title, and items are ranked by the distance of their titles to it (grounding).
    pooling : {"auto", "mean", "cls", "last"}, default="auto"
        How hidden states become a vector; the last token where a model only looks back, else the
        mean.
    lora_rank : int, default=8
    lora_alpha : float, default=16
    lora_dropout : float in [0, 1), default=0.05
    target_modules : str or sequence of str, default="auto"
        Layers with adapters: names, ``"all-linear"``, or ``"auto"`` for queries and values.
    aggregation : {"fellrec", "fedavg", "ditto", "local"}, default="fellrec"
        ``"fedavg"`` with ``proximal > 0`` is FedProx. Centralised training is ``n_platforms=1``.
    client_weights : {"examples", "clients"}, default="examples"
        Of the average in ``"fedavg"`` and ``"ditto"``.
    proximal : float, default=0.0
        Pull of local training to where it started; with ``"ditto"`` of the personal adapter to
        the shared one.
    similarity_on : {"params", "update", "product"}, default="params"
        What the cosine compares: the adapters, their changes in this round, or what they add to
        the weights.
    use_similarity : bool, default=True
        False takes all adapters for equally similar.
    similarity_power : float, default=1.0
        Similarities are raised to it; the higher, the more a platform keeps of its own adapter.
    use_heating : bool, default=True
        False lets all platforms mix fully from the first round.
    alpha : float, default=0.7
    beta : float, default=5.0
        Of the heating ``tanh(alpha / p ** (t + 1 / beta))``.
    heating_temperature : float, default=0.05
        Of the softmax of losses behind ``p``.
    heating_exponent : {"t+1/beta", "(t+1)/beta"}, default="t+1/beta"
        The second rises more slowly, and may be what the paper means.
    client_periods : array-like of shape (n_platforms,) or None, default=None
        Rounds that each platform needs for a local training, in the order of ``platform_ids_``;
        the fastest has 1. None: all 1, the synchronous method.
    staleness_exponent : float, default=0.5
        An upload that is `a` rounds old weighs ``(1 + a) ** -staleness_exponent``.
    availability : float, mapping, array-like, callable or None, default=None
        Chance that a platform is there in a round in which it is due: everybody's, by platform
        id, or in the order of ``platform_ids_``; or a function ``availability(round,
        platform_ids)`` that returns a truth value or a chance for each. None: all are there,
        always. A platform that misses a round keeps its adapter and is mixed into no other.
    dropout_rate : float in [0, 1), default=0.0
        Chance that a platform that is there does not deliver.
    client_layers : int, "auto" or None, default=None
        Layers that a client keeps before those of the server; it keeps the last one too. Results
        are the same, and ``history_`` counts what crosses the boundary. ``"auto"``: the fewest
        that keep the reconstruction of texts below ``max_risk``, an error where there are none, as
        with compact models at the default. None: the client holds all.
    max_risk : float in (0, 1], default=0.5
        Share of tokens that a server may reconstruct, for ``client_layers="auto"``.
    max_history : int, default=10
        Items of a user that are read, the latest.
    max_item_tokens : int, default=32
        Tokens of an item.
    max_tokens : int, default=256
        Tokens of a history.
    n_rounds : int, default=6
    local_epochs : int, default=2
    examples_per_user : int, default=1
        Next items drawn from a user's history in an epoch, anew each time.
    learning_rate : float or "auto", default="auto"
        Of AdamW: 0.008 for compact models, 0.0005 for other encoders, 0.0002 for causal models.
    learning_rate_schedule : {"linear", "constant"}, default="linear"
        ``"linear"``: the rate falls with the rounds of a fit, to ``1 / n_rounds`` of it in the
        last one.
    weight_decay : float, default=0.0
    batch_size : int, default=32
        Examples of a platform in a step.
    gradient_accumulation : int, default=1
        Parts that a batch is cut into, to save memory. Candidates of the loss are those of a
        part.
    objective : {"lift", "probability"}, default="lift"
        What the vectors learn from: how much likelier than usual an item is after a history, which
        popularity is added to when items are ranked; or how likely, with popularity in the loss.
        Items that nobody has chosen yet are pushed down in the second.
    negatives : {"in-batch", "all"}, default="in-batch"
        Candidates of the ranking loss: targets of the batch and ``n_negatives`` drawn items, which
        are trained as well; or all items, with the vectors they had when the round began, which
        needs ``objective="probability"``.
    n_negatives : int, default=0
        More than 0 is for ``objective="probability"``.
    prompt_loss : bool, default=False
        With ``inference="generate"``, whether the prompt's tokens count in the loss as well.
    temperature : float or "auto", default="auto"
        By which cosines are divided. ``"auto"``: what makes the loss of the start smallest; a
        lower one would first have to be unlearned, and the order of the texts with it.
    popularity_counts : {"auto", "all", "platform"}, default="auto"
        Popularity is how often all platforms have chosen an item, of which they send the server
        the numbers to be summed; or how often the own one has, which is better where platforms
        differ in taste, and worse where they are small. ``"auto"``: what ranks the validation
        users best before the first round (the own ones without early stopping).
    popularity_weight : float or "auto", default="auto"
        Of the logarithm of how often an item was chosen, in the score; with
        ``"generate"`` the exponent of BIGRec's injection. ``"auto"``: what ranks the validation
        users best before the first round (0.5 without early stopping).
    num_beams : int, default=4
    min_rating : float or None, default=None
        Drop weaker rows first.
    early_stopping : bool, default=True
        Hold out the last item of some users; each platform keeps the adapter that ranked them
        best, and training ends when none has improved.
    validation_fraction : float in (0, 1), default=0.1
        Share of users held out; at least 100 users where there are as many.
    n_iter_no_change : int, default=5
    tol : float, default=1e-4
    warm_start : bool, default=False
        Let `fit` start from the adapters of the last one.
    checkpoint : str, Path or None, default=None
        Folder to write checkpoints into. A fit that was interrupted goes on from the last one if
        it is called again with the same data and parameters, and ends with the same result;
        `n_rounds` may differ where `learning_rate_schedule` is ``"constant"``. Needs an int as
        `random_state`, and a folder for each fit.
    checkpoint_every : int, default=1
        Rounds between two checkpoints; the last round is always written.
    dtype : {"auto", "float32", "bfloat16", "float16"}, default="auto"
        Of the backbone; adapters are float32.
    quantization : {"8bit", "4bit"} or None, default=None
        Of the backbone, by bitsandbytes.
    device : str, default="auto"
        ``"auto"`` takes a GPU where there is one.
    random_state : int, RandomState or None, default=None
        An int makes fits repeatable.
    verbose : int, default=0
        1 prints about ten lines a fit, 2 one a round.

    Attributes
    ----------
    adapters_ : dict of str to ndarray of shape (n_platforms, ...)
        LoRA matrices by the path of their layer.
    platform_ids_ : ndarray of shape (n_platforms,)
        Client ids, or numbers where clients were grouped.
    platforms_are_clients_ : bool
    client_platforms_ : ndarray of shape (n_clients,)
        Platform of each client.
    user_platforms_ : ndarray of shape (n_users,)
    user_factors_ : ndarray of shape (n_users, width)
        Vectors of the histories under the platform's adapter, or of the titles written.
    crowd_factors_ : ndarray of shape (width,)
        For unknown users: the mean of known ones under the mean adapter.
    item_vectors_ : ndarray of shape (n_platforms + 1, n_items, width)
        Under each platform's adapter and the mean one; with ``"generate"`` only one table.
    item_factors_ : ndarray of shape (n_items, width)
        The last of them.
    item_counts_ : ndarray of shape (n_platforms + 1, n_items)
        How often each platform, and all together, have chosen an item.
    popularity_weight_, temperature_, client_layers_, backbone_name_, compact_, lora_targets_
        What was used; ``compact_`` is the compact model, None where there is none, and
        ``lora_targets_`` are the paths of the layers with adapters.
    lora_fan_in_fan_out_ : bool
        Whether those layers hold their weights transposed, as those of GPT-2 do.
    generates_, shared_popularity_ : bool
        Whether `predict` ranks by what was written, and by popularity among all platforms.
    intercept_ : float
        Added to a score before it becomes a probability, so that their mean is the share of
        pairs in the data.
    generated_titles_ : tuple of str
        With ``"generate"``, what was written for each user.
    user_ids_, item_ids_, client_ids_, seen_indptr_, seen_indices_, n_features_in_ :
        As in `FedFNNRecommender`; ``item_ids_`` also has the items known by text alone.
    history_ : list of dict
        One a round: ``round, loss, client_losses, seconds, clients, rejected`` (of them, whose
        adapters nobody could use), ``bytes_up, bytes_down, similarity, heat, own_weight``, with
        early stopping ``client_ndcg`` of the present adapters and ``validation_ndcg`` of the best
        so far, with ``client_layers`` ``bytes_boundary``. Where platforms may miss a round, also
        how many were ``asked``, ``dropped`` out, and were ``unavailable``; a round that all of them
        miss changes nothing, and its ``loss`` is None.
    n_rounds_ : int

    Raises
    ------
    OSError, ImportError, TypeError, ValueError
        If the backbone cannot be had, see `fedrecsk.models.backbone.load_backbone`.

    References
    ----------
    .. [1] J. Zhao, W. Wang, C. Xu, S.-K. Ng, T.-S. Chua, "A Federated Framework for LLM-based
       Recommendation", Findings of NAACL 2025, arXiv:2402.09959.
    .. [2] K. Bao et al., "A Bi-Step Grounding Paradigm for Large Language Models in Recommendation
       Systems", 2023, arXiv:2308.08434 (BIGRec).
    .. [3] J. Li et al., "Text Is All You Need: Learning Language Representations for Sequential
       Recommendation", KDD 2023, arXiv:2305.13731 (RecFormer).

    Examples
    --------
    >>> from fedrecsk import FELLRecRecommender
    >>> from fedrecsk.datasets import make_interactions
    >>> data = make_interactions(80, 40, 4, n_clients=3, random_state=0)
    >>> model = FELLRecRecommender(item_text=data.item_text, n_rounds=1, random_state=0)
    >>> ids, scores = model.fit(data.data, data.target).recommend(users=[0], k=3)
    >>> ids.shape, len(model.platform_ids_)
    ((1, 3), 3)
    """

    _parameter_constraints: ClassVar[Constraints] = {
        **{
            name: SHARED_CONSTRAINTS[name]
            for name in SHARED_CONSTRAINTS
            if name
            not in {
                "n_factors",
                "clients_per_round",
                "client_seconds",
                "deadline",
                "over_selection",
                "batch_size",
                "l2",
                "n_negatives",
            }
        },
        "backbone": [str, Path, callable, None],
        "backend": [StrOptions({"causal", "encoder"})],
        "item_text": "no_validation",
        "n_platforms": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"}), None],
        "inference": [StrOptions({"direct", "generate"})],
        "pooling": [StrOptions({"auto", "mean", "cls", "last"})],
        "lora_rank": [Interval(Integral, 1, None, closed="left")],
        "lora_alpha": [Interval(Real, 0, None, closed="neither")],
        "lora_dropout": [Interval(Real, 0, 1, closed="left")],
        "target_modules": [str, "array-like"],
        "aggregation": [StrOptions({"fellrec", "fedavg", "ditto", "local"})],
        "client_weights": [StrOptions({"examples", "clients"})],
        "proximal": [Interval(Real, 0, None, closed="left")],
        "similarity_on": [StrOptions({"params", "update", "product"})],
        "use_similarity": ["boolean"],
        "similarity_power": [Interval(Real, 0, None, closed="left")],
        "use_heating": ["boolean"],
        "alpha": [Interval(Real, 0, None, closed="neither")],
        "beta": [Interval(Real, 0, None, closed="neither")],
        "heating_temperature": [Interval(Real, 0, None, closed="neither")],
        "heating_exponent": [StrOptions({"t+1/beta", "(t+1)/beta"})],
        "client_periods": ["array-like", None],
        "staleness_exponent": [Interval(Real, 0, None, closed="left")],
        "client_layers": [Interval(Integral, 0, None, closed="left"), StrOptions({"auto"}), None],
        "max_risk": [Interval(Real, 0, 1, closed="right")],
        "max_history": [Interval(Integral, 1, None, closed="left")],
        "max_item_tokens": [Interval(Integral, 1, None, closed="left")],
        "max_tokens": [Interval(Integral, 1, None, closed="left")],
        "examples_per_user": [Interval(Integral, 1, None, closed="left")],
        "learning_rate": [Interval(Real, 0, None, closed="neither"), StrOptions({"auto"})],
        "learning_rate_schedule": [StrOptions({"linear", "constant"})],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "gradient_accumulation": [Interval(Integral, 1, None, closed="left")],
        "objective": [StrOptions({"lift", "probability"})],
        "negatives": [StrOptions({"in-batch", "all"})],
        "n_negatives": [Interval(Integral, 0, None, closed="left")],
        "prompt_loss": ["boolean"],
        "temperature": [Interval(Real, 0, None, closed="neither"), StrOptions({"auto"})],
        "popularity_counts": [StrOptions({"auto", "all", "platform"})],
        "popularity_weight": [Interval(Real, 0, None, closed="left"), StrOptions({"auto"})],
        "num_beams": [Interval(Integral, 1, None, closed="left")],
        "dtype": [StrOptions({"auto", "float32", "bfloat16", "float16"})],
        "quantization": [StrOptions({"8bit", "4bit"}), None],
    }

    def __init__(
        self,
        backbone: str | Path | Callable[[], Any] | None = None,
        *,
        backend: Literal["causal", "encoder"] = "encoder",
        item_text: Any = None,
        n_platforms: int | Literal["auto"] | None = "auto",
        inference: Inference = "direct",
        pooling: Pooling | Literal["auto"] = "auto",
        lora_rank: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.05,
        target_modules: str | Sequence[str] = "auto",
        aggregation: AggregationName = "fellrec",
        client_weights: ClientWeights = "examples",
        proximal: float = 0.0,
        similarity_on: SimilarityOn = "params",
        use_similarity: bool = True,
        similarity_power: float = 1.0,
        use_heating: bool = True,
        alpha: float = 0.7,
        beta: float = 5.0,
        heating_temperature: float = 0.05,
        heating_exponent: Exponent = "t+1/beta",
        client_periods: ArrayLike | None = None,
        staleness_exponent: float = 0.5,
        availability: Availability = None,
        dropout_rate: float = 0.0,
        client_layers: int | Literal["auto"] | None = None,
        max_risk: float = 0.5,
        max_history: int = 10,
        max_item_tokens: int = 32,
        max_tokens: int = 256,
        n_rounds: int = 6,
        local_epochs: int = 2,
        examples_per_user: int = 1,
        learning_rate: float | Literal["auto"] = "auto",
        learning_rate_schedule: Literal["linear", "constant"] = "linear",
        weight_decay: float = 0.0,
        batch_size: int = 32,
        gradient_accumulation: int = 1,
        objective: Literal["lift", "probability"] = "lift",
        negatives: Literal["in-batch", "all"] = "in-batch",
        n_negatives: int = 0,
        prompt_loss: bool = False,
        temperature: float | Literal["auto"] = "auto",
        popularity_counts: Literal["auto", "all", "platform"] = "auto",
        popularity_weight: float | Literal["auto"] = "auto",
        num_beams: int = 4,
        min_rating: float | None = None,
        early_stopping: bool = True,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 5,
        tol: float = 1e-4,
        warm_start: bool = False,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 1,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        quantization: Literal["8bit", "4bit"] | None = None,
        device: str = "auto",
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.backbone = backbone
        self.backend = backend
        self.item_text = item_text
        self.n_platforms = n_platforms
        self.inference = inference
        self.pooling = pooling
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.target_modules = target_modules
        self.aggregation = aggregation
        self.client_weights = client_weights
        self.proximal = proximal
        self.similarity_on = similarity_on
        self.use_similarity = use_similarity
        self.similarity_power = similarity_power
        self.use_heating = use_heating
        self.alpha = alpha
        self.beta = beta
        self.heating_temperature = heating_temperature
        self.heating_exponent = heating_exponent
        self.client_periods = client_periods
        self.staleness_exponent = staleness_exponent
        self.availability = availability
        self.dropout_rate = dropout_rate
        self.client_layers = client_layers
        self.max_risk = max_risk
        self.max_history = max_history
        self.max_item_tokens = max_item_tokens
        self.max_tokens = max_tokens
        self.n_rounds = n_rounds
        self.local_epochs = local_epochs
        self.examples_per_user = examples_per_user
        self.learning_rate = learning_rate
        self.learning_rate_schedule = learning_rate_schedule
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.gradient_accumulation = gradient_accumulation
        self.objective = objective
        self.negatives = negatives
        self.n_negatives = n_negatives
        self.prompt_loss = prompt_loss
        self.temperature = temperature
        self.popularity_counts = popularity_counts
        self.popularity_weight = popularity_weight
        self.num_beams = num_beams
        self.min_rating = min_rating
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.warm_start = warm_start
        self.checkpoint = checkpoint
        self.checkpoint_every = checkpoint_every
        self.dtype = dtype
        self.quantization = quantization
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def _simulate(self, data: Interactions, watch: RoundWatch, *, go_on: bool) -> Attributes:
        """Open the model, train the adapters round by round, and encode what is served."""
        if self.inference == "generate" and self.backend != "causal":
            raise ValueError(
                'inference="generate" needs backend="causal": an encoder cannot write.'
            )
        if self.negatives == "all" and self.objective == "lift" and self.inference == "direct":
            raise ValueError(
                'negatives="all" needs objective="probability": among all items, popular ones are '
                "not wrong candidates more often than others."
            )
        previous = dict(vars(self)) if go_on else None
        streams = Streams.from_random_state(self.random_state)
        items, codes = catalogue(data, self.item_text)
        platforms = make_platforms(
            data,
            codes,
            len(items),
            n_platforms=self.n_platforms,
            streams=streams,
            previous=previous,
        )
        watch.identify("item texts", [items.items.ids, items.texts, items.titles])
        compact = self._compact(items, streams, previous)
        with torch_threads(CPU_CHUNK_ROWS * self.batch_size):
            model, layers = self._open(items, compact, streams)
            try:
                reader = self._reader(model, writes=self.inference == "generate")

                def fitted(adapters: Adapters, ranking: Ranking) -> Attributes:
                    served = serve(reader, platforms, adapters, ranking)
                    return {**served, **about(data, codes, items, platforms)}

                trained, history, ranking = self._train(
                    platforms, reader, streams, watch, fitted, previous
                )
                attributes = fitted(trained, ranking)
            finally:
                model.lora.restore()
        return {
            **attributes,
            "compact_": compact,
            "backbone_name_": model.backbone.name,
            "lora_targets_": model.lora.targets,
            "lora_fan_in_fan_out_": model.lora.fan_in_fan_out,
            "client_layers_": layers,
            "history_": history,
        }

    def _reader(self, model: TextModel, *, writes: bool) -> Reader:
        """Say how the model reads histories."""
        return Reader(model, writes, self.max_history, self.num_beams)

    def _train(
        self,
        platforms: Platforms,
        reader: Reader,
        streams: Streams,
        watch: RoundWatch,
        fitted: Callable[[Adapters, Ranking], Attributes],
        previous: Attributes | None,
    ) -> tuple[Adapters, list[Record], Ranking]:
        """Run the rounds."""
        rate = self.learning_rate
        if rate == "auto":
            rate = AUTO_LEARNING_RATE["compact" if self.backbone is None else self.backend]
        return simulate_fellrec(
            platforms,
            reader,
            streams,
            watch,
            fitted,
            previous=previous,
            aggregation=self.aggregation,
            client_weights=self.client_weights,
            proximal=self.proximal,
            similarity_on=self.similarity_on,
            use_similarity=self.use_similarity,
            similarity_power=self.similarity_power,
            use_heating=self.use_heating,
            alpha=self.alpha,
            beta=self.beta,
            heating_temperature=self.heating_temperature,
            heating_exponent=self.heating_exponent,
            client_periods=self.client_periods,
            staleness_exponent=self.staleness_exponent,
            availability=self.availability,
            dropout_rate=self.dropout_rate,
            n_rounds=self.n_rounds,
            local_epochs=self.local_epochs,
            examples_per_user=self.examples_per_user,
            learning_rate=float(rate),
            learning_rate_schedule=self.learning_rate_schedule,
            weight_decay=self.weight_decay,
            batch_size=self.batch_size,
            gradient_accumulation=self.gradient_accumulation,
            objective=self.objective,
            negatives=self.negatives,
            n_negatives=self.n_negatives,
            prompt_loss=self.prompt_loss,
            temperature=self.temperature,
            popularity_counts=self.popularity_counts,
            popularity_weight=self.popularity_weight,
            early_stopping=self.early_stopping,
            validation_fraction=self.validation_fraction,
            n_iter_no_change=self.n_iter_no_change,
            tol=self.tol,
        )

    def _settings(self) -> Attributes:
        # Texts are told apart by what was read of them.
        settings = {n: value for n, value in super()._settings().items() if n != "item_text"}
        if self.learning_rate_schedule == "linear":  # which goes by the number of rounds
            settings["n_rounds"] = self.n_rounds
        return settings

    # ------------------------------------------------------------------ the model

    def _compact(
        self, items: Catalogue, streams: Streams, previous: Attributes | None
    ) -> CompactState | None:
        """Make the compact model, or take the one that adapters are on already."""
        if self.backbone is not None:
            return None
        if previous is not None and previous["compact_"] is not None:
            before: CompactState = previous["compact_"]
            if before.backend == self.backend:
                return before
        return make_compact(items.texts, backend=self.backend, streams=streams)

    def _open(
        self, items: Catalogue, compact: CompactState | None, streams: Streams
    ) -> tuple[TextModel, int | None]:
        """Load the backbone; also return how many layers a client keeps."""
        source = self.backbone if compact is None else lambda: open_compact(compact)
        backbone = load_backbone(
            source,
            backend=self.backend,
            dtype=self.dtype,
            device=resolve_device(self.device),
            quantization=self.quantization,
            seed=streams.seed,
        )
        if compact is not None:
            backbone = replace(backbone, name=COMPACT_NAME)
        layers = self.client_layers
        if layers == "auto":
            layers = safe_layers(backbone, items, self.max_risk, streams)
        model = open_text_model(
            backbone,
            items,
            inference=self.inference,
            pooling=self.pooling,
            target_modules=self.target_modules,
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            max_item_tokens=self.max_item_tokens,
            max_tokens=self.max_tokens,
            n_client_layers=layers,
        )
        return model, layers

    # -------------------------------------------------------------------- serving

    def _score_items(self, users: NDArray[np.int64]) -> FloatArray:
        return score_users(vars(self), users)

    def _score_pairs(
        self, users: NDArray[np.int64], items: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        if self.generates_:
            return super()._score_pairs(users, items)  # a distance is scaled by all others
        ranking = Ranking.of(vars(self))
        # Pair by pair, so that a score is the same to the last bit whatever it is asked with.
        platforms = np.where(users >= 0, self.user_platforms_[users], len(self.platform_ids_))
        scores = np.empty(len(users))
        size = max(1, SCORES_PER_BATCH // self.item_vectors_.shape[2])
        for start in range(0, len(users), size):
            part = slice(start, start + size)
            known = (users[part] >= 0)[:, None]
            rows = np.where(known, self.user_factors_[users[part]], self.crowd_factors_)
            vectors = self.item_vectors_[platforms[part], items[part]]
            products = np.multiply(rows, vectors, dtype=np.float64).sum(axis=1)
            counts = self.item_counts_[ranking.places(platforms[part]), items[part]]
            prior = self.popularity_weight_ * np.log1p(counts)
            scores[part] = products / self.temperature_ + prior
        return scores

    def _probability(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        # One shift for all: the order of rows stays, and the mean is that of the data.
        probability: NDArray[np.float64] = expit(scores + self.intercept_)
        return probability

    # ------------------------------------------------------------------- adapters

    def save_adapters(self, folder: str | Path) -> list[Path]:
        """Write every platform's adapter in the format of PEFT, a folder each.

        ``peft.PeftModel.from_pretrained(base_model, folder / "client-<id>")`` opens one.

        Parameters
        ----------
        folder : str or Path
            Made if missing.

        Returns
        -------
        list of Path
            The folders, in the order of ``platform_ids_``.
        """
        check_is_fitted(self)
        return adapter_files.save_adapters(
            folder,
            {name: as_tensor(value) for name, value in self.adapters_.items()},
            self.platform_ids_,
            base_model=self.backbone_name_,
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            targets=self.lora_targets_,
            task_type="CAUSAL_LM" if self.backend == "causal" else "FEATURE_EXTRACTION",
            fan_in_fan_out=self.lora_fan_in_fan_out_,
        )

    def load_adapters(self, folder: str | Path) -> Self:
        """Serve with adapters that `save_adapters`, or another program, has written.

        Users and items are encoded anew; nothing is trained.

        Parameters
        ----------
        folder : str or Path
            With an adapter for every platform, on the same backbone.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If an adapter is missing, or of another rank, scaling or layers.
        """
        check_is_fitted(self)
        adapters, ids, settings = adapter_files.load_adapters(folder)
        places, known = Vocabulary(np.sort(ids)).encode(self.platform_ids_)
        if not known.all():
            missing = self.platform_ids_[~known].tolist()
            raise ValueError(f"{folder} has no adapter for the platforms {missing}.")
        ours = self.lora_rank, self.lora_alpha
        if (settings["rank"], settings["alpha"]) != ours:
            raise ValueError(
                f"The adapters in {folder} have rank {settings['rank']} and alpha "
                f"{settings['alpha']}; this estimator has {ours[0]} and {ours[1]}."
            )
        chosen = select(adapters, np.argsort(ids, kind="stable")[places].tolist())
        items, codes = catalogue(self._interactions, self.item_text)
        streams = Streams.from_random_state(self.random_state)
        with torch_threads(CPU_CHUNK_ROWS * self.batch_size):
            model, _ = self._open(items, self.compact_, streams)
            try:
                check_same_layers(chosen, model, folder)
                platforms = make_platforms(
                    self._interactions,
                    codes,
                    len(items),
                    n_platforms=self.n_platforms,
                    streams=streams,
                    previous=dict(vars(self)),
                )
                chosen = {name: value.to(model.device) for name, value in chosen.items()}
                reader = self._reader(model, writes=self.generates_)
                served = serve(reader, platforms, chosen, Ranking.of(vars(self)))
            finally:
                model.lora.restore()
        for name, value in served.items():
            setattr(self, name, value)
        return self
