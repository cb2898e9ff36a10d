"""Language models that adapters sit on: loaded, frozen, and the same to use whatever they are.

A backbone is a Hugging Face name, a local folder, a function that makes a model and its tokenizer,
or None for the compact model that needs no download. Nothing that comes with a model is run or
unpickled: only safetensors are read, and code in a repository is left alone.

transformers is imported inside the functions, since ``import fedrecsk`` must not wait for it.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fedrecsk.data.prompts import prompt
from fedrecsk.engine.device import resolve_device
from fedrecsk.engine.streams import Streams

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from fedrecsk.models.compact import CompactState

__all__ = ["Backbone", "Backend", "last_hidden", "load_backbone", "make_compact"]

Backend = Literal["causal", "encoder"]

COMPACT_NAME = "fedrecsk-compact"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATIONS = ("8bit", "4bit")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What is fetched from the Hub, of the top folder only: no code, no pickles, no second copy of the
# weights in another format.
FILES = [
    "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", WEIGHTS, "model-*.safetensors",
]  # fmt: skip
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
_OR_OFFLINE = "Pass a local path, or backbone=None for the compact offline model"


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen language model with its tokenizer.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode, without gradients of its own. With a head that predicts tokens where
        ``backend`` is ``"causal"``, without a head where it is ``"encoder"``.
    tokenizer : PreTrainedTokenizerBase
        Has a pad token.
    backend : {"causal", "encoder"}
        What the model is used for.
    name : str
        Where the model comes from, as files of adapters name their base model.
    n_layers : int
        Number of transformer layers.
    width : int
        Size of a hidden state.
    layers_path : str
        Where in ``model`` the list of its layers is, such as ``"encoder.layer"``.
    looks_back : bool
        Whether a token sees only itself and those before it, so that only the last token of a
        text has seen all of it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    backend: Backend
    name: str
    n_layers: int
    width: int
    layers_path: str
    looks_back: bool

    @property
    def device(self) -> torch.device:
        """Where the model is, and where its inputs must be."""
        return next(self.model.parameters()).device

    @property
    def max_positions(self) -> int | None:
        """Number of tokens that the model can read, if it says so."""
        config: Any = self.model.config
        found = getattr(config.get_text_config(), "max_position_embeddings", None)
        return int(found) if found is not None and found > 0 else None


def load_backbone(
    backbone: str | Path | Callable[[], Any] | None = None,
    *,
    backend: Backend,
    texts: Sequence[str] = (),
    dtype: str = "auto",
    device: str | torch.device = "auto",
    quantization: str | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> Backbone:
    """Load a language model and freeze it.

    Parameters
    ----------
    backbone : str, Path, callable or None, default=None
        - str: a local folder if there is one, else a name on the Hugging Face Hub. A copy in the
          local cache is used as it is; only without one the network is asked.
        - Path: a folder that ``save_pretrained`` wrote, for the model and for the tokenizer.
        - callable: returns ``(model, tokenizer)``, of transformers and new in each call, since
          the model is frozen and gets adapters.
        - None: a compact model made from `texts`, without any download.
    backend : {"causal", "encoder"}
        ``"causal"`` writes the next title and needs a decoder, such as Llama or GPT-2.
        ``"encoder"`` turns texts into vectors and takes BERT and its kin, or a decoder, whose
        head is left out.
    texts : sequence of str, default=()
        Texts of the items; read where `backbone` is None.
    dtype : {"auto", "float32", "bfloat16", "float16"}, default="auto"
        Of the weights. ``"auto"``: float32 on a CPU, as saved on a GPU.
    device : str or torch.device, default="auto"
        Where the model goes. ``"auto"``: the first GPU where there is one, else the CPU.
    quantization : {"8bit", "4bit"}, default=None
        Weights of linear layers in fewer bits, by bitsandbytes; 4 bits are NF4.
    revision : str, default=None
        Branch, tag or commit of a name on the Hub.
    seed : int, default=0
        Of the compact model, and of what a callable draws from torch's generator. That generator
        itself is left as it was.

    Returns
    -------
    backbone : Backbone
        The model, frozen, and its tokenizer.

    Raises
    ------
    OSError
        If the model is not there, cannot be fetched, or lacks files; FileNotFoundError for a
        folder.
    TypeError
        If `backbone` is a model, or the callable returns something else than it should.
    ValueError
        If the model is of another kind than `backend` needs, brings weights or code that are not
        safe to load, does not fit its tokenizer, or an argument is none of its choices.
    ImportError
        If `quantization` is asked for and bitsandbytes is not installed.

    Examples
    --------
    >>> from fedrecsk.models.backbone import load_backbone
    >>> load_backbone("no/such/folder", backend="encoder")
    Traceback (most recent call last):
    FileNotFoundError: There is no folder no/such/folder. Pass a local path, or backbone=None for...
    """
    _check_choices(backbone, backend, dtype, quantization, revision)
    device = resolve_device(device)
    with _quiet(), _own_random_numbers(seed):
        if isinstance(backbone, str | Path):
            folder, name = _folder_of(backbone, revision)
            model = _load_model(folder, name, backend, dtype, device, quantization)
            tokenizer = _load_tokenizer(folder, name)
        elif backbone is None:
            from fedrecsk.models.compact import open_compact

            state = make_compact(texts, backend=backend, streams=Streams(seed))
            model, tokenizer = open_compact(state)
            name = COMPACT_NAME
        else:
            model, tokenizer, name = _call(backbone, backend)
        _fit_tokenizer(model, tokenizer, name)
        return _freeze(model, tokenizer, backend, name, dtype, device)


def make_compact(texts: Sequence[str], *, backend: Backend, streams: Streams) -> CompactState:
    """Make the compact model that ``backbone=None`` stands for.

    Parameters
    ----------
    texts : sequence of str
        Of the items.
    backend : {"causal", "encoder"}
        The causal model knows the words of its instruction as well.
    streams : Streams

    Returns
    -------
    CompactState
        For `fedrecsk.models.compact.open_compact`.
    """
    from fedrecsk.models.compact import build_compact

    others = [prompt(["", ""])] if backend == "causal" else []
    return build_compact(texts, backend=backend, streams=streams, other_texts=others)


def last_hidden(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Compute the hidden states after the last layer and its norm, without a head.

    Parameters
    ----------
    model : Module
        Of a :class:`Backbone`, of either kind.
    input_ids : Tensor of shape (rows, L), int64
        Token ids.
    attention_mask : Tensor of shape (rows, L)
        One where there is a token, zero at padding.

    Returns
    -------
    hidden : Tensor of shape (rows, L, width)
        In the dtype of the model.
    """
    base: Any = model.base_model
    hidden: Tensor = base(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    return hidden


def _check_choices(
    backbone: Any, backend: str, dtype: str, quantization: str | None, revision: str | None
) -> None:
    """Refuse what no model needs to be loaded for."""
    if backend not in ("causal", "encoder"):
        raise ValueError(f"backend must be 'causal' or 'encoder', got {backend!r}.")
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype must be 'auto' or one of {', '.join(DTYPES)}, got {dtype!r}.")
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be None, '8bit' or '4bit', got {quantization!r}.")
    # A module can be called too, so it is looked for first.
    if isinstance(backbone, nn.Module):
        raise TypeError(
            f"backbone is a {type(backbone).__name__}, but scikit-learn's clone copies the "
            "parameters of an estimator, so every clone would carry a copy of the model. Pass its "
            "name or path, or a function that returns (model, tokenizer)."
        )
    if not (backbone is None or isinstance(backbone, str | Path) or callable(backbone)):
        raise TypeError(
            f"backbone is a {type(backbone).__name__}. Pass a Hugging Face name, a local path, a "
            "function that returns (model, tokenizer), or None for the compact offline model."
        )
    if isinstance(backbone, str | Path):
        if not str(backbone).strip():
            raise ValueError(f"backbone is an empty text. {_OR_OFFLINE}.")
    elif quantization is not None or revision is not None:
        raise ValueError(
            f"{'quantization' if quantization is not None else 'revision'} needs the name or the "
            "path of a model. Leave it None with other backbones; a function can load the model as "
            "it likes."
        )
    if quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"quantization={quantization!r} needs bitsandbytes, which is not installed: "
            "pip install fedrecsk[quantized]."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' messages and bars back, and leave its settings as they were."""
    import huggingface_hub.utils
    import transformers.utils.logging

    hub: Any = huggingface_hub.utils
    logging: Any = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_bars = not hub.are_progress_bars_disabled()
    with warnings.catch_warnings():
        # An environment variable may have settled the bars of the Hub; then these calls warn.
        warnings.filterwarnings("ignore", "Cannot (en|dis)able progress bars")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        # A download takes long enough for a bar; the caller's setting of these stays.
        (hub.enable_progress_bars if hub_bars else hub.disable_progress_bars)()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
            (hub.enable_progress_bars if hub_bars else hub.disable_progress_bars)()


@contextmanager
def _own_random_numbers(seed: int) -> Iterator[None]:
    """Draw what transformers initialises from a stream of ours, not from the caller's."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(Streams(seed).torch("backbone").get_state())
        yield


def _folder_of(backbone: str | Path, revision: str | None) -> tuple[Path, str]:
    """Find the folder of a path or a name; of a name, fetch it if it is not in the cache."""
    path = Path(backbone).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is for names on the Hub, but {backbone} is a folder here. "
                "Leave revision=None."
            )
        folder, name = path, str(path.resolve())
    elif isinstance(backbone, Path) or _looks_like_path(backbone):
        raise FileNotFoundError(f"There is no folder {backbone}. {_OR_OFFLINE}.")
    else:
        folder, name = _fetch(backbone, revision), backbone
    _check_files(folder, name)
    return folder, name


def _looks_like_path(name: str) -> bool:
    """Say whether a text cannot be a name on the Hub, which is ``model`` or ``owner/model``."""
    return (
        name.startswith((".", "~"))
        or name.count("/") > 1
        or name.endswith("/")
        or (os.sep != "/" and os.sep in name)
        or Path(name).is_absolute()
        or Path(name).exists()
    )


def _fetch(name: str, revision: str | None) -> Path:
    """Give the folder of a model in the Hub's cache, and download what is not there."""
    from huggingface_hub import errors, snapshot_download

    try:
        cached = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=FILES,
                ignore_patterns="*/*",
                local_files_only=True,
            )
        )
        if not _missing_files(cached) and _any_file(cached, _TOKENIZER_FILES):
            return cached
    except errors.HFValidationError as error:
        raise ValueError(
            f"backbone={name!r} is neither a folder here nor a name on the Hub, which looks like "
            f"'model' or 'owner/model'. {_OR_OFFLINE}."
        ) from error
    except OSError:
        pass  # Not in the cache, so it is asked for below.
    at = f" at revision {revision!r}" if revision is not None else ""
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=FILES, ignore_patterns="*/*"
        )
    except errors.GatedRepoError as error:
        raise OSError(
            f"The owner of {name!r} asks for consent before a download. Give it on the model's "
            f"page and log in with `hf auth login`. {_OR_OFFLINE}."
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise OSError(
            f"There is no model {name!r}{at} on the Hugging Face Hub, or it is private, and there "
            f"is no such folder here. Check the spelling. {_OR_OFFLINE}."
        ) from error
    # Whatever library carries the requests, its errors mean that nothing was fetched.
    except Exception as error:
        raise OSError(
            f"{name!r}{at} is not in the local cache, and the Hugging Face Hub could not be "
            f"reached ({type(error).__name__}). {_OR_OFFLINE}."
        ) from error
    return Path(folder)


def _any_file(folder: Path, patterns: Sequence[str]) -> bool:
    return any(any(folder.glob(pattern)) for pattern in patterns)


def _missing_files(folder: Path) -> list[str]:
    """List the files without which no model can be read: its configuration and its weights."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        missing.append(WEIGHTS)
    return missing


def _check_files(folder: Path, name: str) -> None:
    """Refuse a folder that is no complete, safe model."""
    missing = _missing_files(folder)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{name} holds a PEFT adapter. Load it onto its base model, merge both with "
            "merge_and_unload(), save the result, and pass that folder."
        )
    if missing == [WEIGHTS] and _any_file(folder, ("*.bin", "*.pt", "*.pth", "*.ckpt")):
        raise ValueError(
            f"{name} has its weights in pickled files only, and unpickling can run any code, so "
            "they are not opened. Pick a model with safetensors, or convert one that you trust: "
            "load it with transformers and save it with save_pretrained."
        )
    if missing:
        found = ", ".join(islice(sorted(path.name for path in folder.iterdir()), 6)) or "nothing"
        raise FileNotFoundError(
            f"{name} is no complete model: it lacks {' and '.join(missing)} (it has {found}). Pass "
            "the folder that save_pretrained wrote for both the model and the tokenizer."
        )


def _load_model(
    folder: Path,
    name: str,
    backend: Backend,
    dtype: str,
    device: torch.device,
    quantization: str | None,
) -> PreTrainedModel:
    """Read a model from its folder, with nothing missing and nothing run."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"transformers cannot read the configuration of {name}: {_first_line(error)} Models "
            "that need code from their repository are not loaded; others may need a newer version "
            "of transformers."
        ) from error
    _refuse_wrong_kind(config, backend, name, bool(getattr(config, "is_encoder_decoder", False)))
    loader: Any = AutoModelForCausalLM if backend == "causal" else AutoModel
    options: dict[str, Any] = {"dtype": DTYPES.get(dtype, "auto")}
    if dtype == "auto" and device.type == "cpu":
        options["dtype"] = torch.float32
    if quantization is not None:
        options["quantization_config"] = _quantization_config(quantization)
    if quantization is not None or device.type == "cuda":
        # Straight to its place: a large model need not fit the main memory.
        options["device_map"] = {"": device}
    try:
        model, report = loader.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, SafetensorError) as error:
        raise OSError(f"The weights of {name} cannot be read: {_first_line(error)}") from error
    # Poolers are not used, and many checkpoints have none.
    lacking = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if lacking:
        raise ValueError(
            f"{name} has no weights for {len(lacking)} tensors of a {type(model).__name__}, such "
            f"as {lacking[0]}, which would be random numbers. Pick a model that was trained for "
            f"this (backend={backend!r})."
        )
    loaded: PreTrainedModel = model
    return loaded


def _quantization_config(quantization: str) -> Any:
    from transformers import BitsAndBytesConfig

    config: Any = BitsAndBytesConfig
    if quantization == "8bit":
        return config(load_in_8bit=True)
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _load_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    none = f"{name} has no tokenizer, or an empty one. Save it there with save_pretrained."
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        if not _any_file(folder, _TOKENIZER_FILES):
            raise FileNotFoundError(none) from error
        raise OSError(f"The tokenizer of {name} cannot be read: {_first_line(error)}") from error
    # Of some kinds, transformers makes one that knows special tokens only where there are no files.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise FileNotFoundError(none)
    return tokenizer


def _call(
    backbone: Callable[[], Any], backend: Backend
) -> tuple[Any, PreTrainedTokenizerBase, str]:
    """Call the caller's function and check what it returns."""
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    found = backbone()
    if not (isinstance(found, tuple | list) and len(found) == 2):
        raise TypeError(
            "The backbone function must return the pair (model, tokenizer), but returned "
            f"{_describe(found)}."
        )
    # Any, since transformers leaves half of the methods that follow without types.
    model: Any = found[0]
    tokenizer = found[1]
    if not isinstance(found[0], PreTrainedModel):
        raise TypeError(
            "The first thing that the backbone function returns must be a model of transformers, "
            f"but it is {_describe(model)}. Merge adapters of PEFT first (merge_and_unload)."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            "The second thing that the backbone function returns must be the model's tokenizer, "
            f"of transformers, but it is {_describe(tokenizer)}."
        )
    name = model.name_or_path or type(model).__name__
    needs_decoder_input = "decoder_input_ids" in inspect.signature(model.forward).parameters
    _refuse_wrong_kind(model.config, backend, name, needs_decoder_input)
    if backend == "causal" and model.get_output_embeddings() is None:
        raise ValueError(
            f"The backbone function returns a {type(model).__name__}, which has no head that "
            "predicts tokens. Load it with AutoModelForCausalLM, or use backend='encoder'."
        )
    return model, tokenizer, name


def _describe(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    return line if line.endswith((".", "!", "?")) else f"{line}."


def _looks_back(config: PreTrainedConfig) -> bool:
    """Say whether a model of this configuration reads from left to right only.

    BERT and its kin are among the decoders of transformers as well, for the few that are trained
    as such and say so (``is_decoder``).
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
    )

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    reads_both_ways = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    return bool(getattr(config, "is_decoder", False)) or not reads_both_ways


def _refuse_wrong_kind(
    config: PreTrainedConfig, backend: Backend, name: str, has_decoder_input: bool
) -> None:
    """Refuse a model that cannot do what the backend needs, before its weights are read."""
    kind = config.model_type
    if has_decoder_input:
        raise ValueError(
            f"{name} is an encoder with a decoder behind it ({kind}). Pass a decoder, such as "
            "Llama, for backend='causal', or an encoder, such as BERT, for backend='encoder'."
        )
    if backend == "causal" and not _looks_back(config):
        raise ValueError(
            f"{name} is an encoder ({kind}), which cannot write titles. Use backend='encoder', or "
            "pass a decoder, such as Llama or GPT-2."
        )


def _fit_tokenizer(model: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give the tokenizer a pad token, and the model a row for it where there is none."""
    embeddings = model.get_input_embeddings()
    n_rows = int(embeddings.weight.shape[0])
    if len(tokenizer) > n_rows:
        raise ValueError(
            f"The tokenizer of {name} has {len(tokenizer)} tokens, but the model knows {n_rows}. "
            "They do not belong together; take both from one model."
        )
    if tokenizer.pad_token is not None:
        return
    # Padding is masked, so a token that means something else serves as well as one of its own.
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is not None:
        return
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    if len(tokenizer) <= n_rows:
        return
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for table in tables:
            if table is not None:
                table.weight[n_rows:] = table.weight[:n_rows].mean(0)


def _freeze(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    backend: Backend,
    name: str,
    dtype: str,
    device: torch.device,
) -> Backbone:
    """Bring a model to its device, dtype and evaluation mode, and describe it."""
    if backend == "encoder":
        # Also where a function returned a model with a head.
        model = model.base_model
    if not getattr(model, "is_quantized", False):
        wanted = DTYPES.get(dtype, torch.float32 if device.type == "cpu" else None)
        model = model.to(device=device, dtype=wanted)
    model.eval()
    model.requires_grad_(False)
    model.config.use_cache = False
    if device.type == "cpu":
        # Titles and histories are short: the plain product was measured 1.3 times as fast as the
        # fused one on a CPU, in bfloat16 three times.
        model.set_attn_implementation("eager")
    if backend == "causal":
        model.generation_config = _plain_generation(model, tokenizer)
    path, layers = _transformer_layers(model, name)
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        backend=backend,
        name=name,
        n_layers=len(layers),
        width=int(model.config.get_text_config().hidden_size),
        layers_path=path,
        looks_back=_looks_back(model.config),
    )


def _plain_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Make settings without the sampling and the penalties that a checkpoint may ask for."""
    from transformers import GenerationConfig

    config: Any = GenerationConfig
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    # A configuration's default may be an ordinary word of a small vocabulary.
    stops = {end for end in ends if end in tokenizer.all_special_ids}
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    return config(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(stops) or None,
        pad_token_id=tokenizer.pad_token_id,
    )


def _transformer_layers(model: nn.Module, name: str) -> tuple[str, nn.ModuleList]:
    """Find the list of a model's layers: the longest of equal modules that is in no other list."""
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(set(map(type, module))) == 1 and not inside:
            lists[path] = module
    if not lists:
        raise ValueError(
            f"No list of layers was found in {name} ({type(model).__name__}). Pass a transformer."
        )
    longest = max(lists, key=lambda path: len(lists[path]))
    return longest, lists[longest]
