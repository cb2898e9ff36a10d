"""What may be passed as a backbone, what is refused and why, and what a loaded one promises."""

import json
import logging
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import errors
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from fedrecsk.engine.streams import Streams
from fedrecsk.models.backbone import (
    FILES,
    _transformer_layers,
    last_hidden,
    load_backbone,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>", "red", "blue", "robot", "wizard"]
SHAPE = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 9}
IDS = torch.tensor([[5, 7, 6, 8], [6, 8, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def make_tokenizer(**special):
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def make_model(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "bert":
            return BertForMaskedLM(BertConfig(num_hidden_layers=3, **SHAPE))
        if kind == "bert decoder":
            config = BertConfig(num_hidden_layers=3, is_decoder=True, **SHAPE)
            return transformers.BertLMHeadModel(config)
        if kind == "llama":
            # Its configuration ends texts with token 2, which this tokenizer does not.
            return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SHAPE))
        if kind == "gpt2":
            config = GPT2Config(n_layer=4, n_head=2, n_embd=16, vocab_size=9, n_positions=32)
            return GPT2LMHeadModel(config)
        return T5ForConditionalGeneration(
            T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Give a folder with a saved model of each kind, each beside a tokenizer."""
    root = tmp_path_factory.mktemp("saved")
    tokenizer = make_tokenizer(pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>")
    for kind in ("bert", "bert decoder", "llama", "gpt2", "t5"):
        make_model(kind).save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    return root


def load(backbone, backend="causal", **options):
    return load_backbone(backbone, backend=backend, device="cpu", **options)


@pytest.mark.parametrize(
    ("kind", "backend", "layers_path", "n_layers", "looks_back"),
    [
        ("bert", "encoder", "encoder.layer", 3, False),
        ("bert decoder", "causal", "bert.encoder.layer", 3, True),
        ("llama", "causal", "model.layers", 2, True),
        ("llama", "encoder", "layers", 2, True),
        ("gpt2", "causal", "transformer.h", 4, True),
        ("gpt2", "encoder", "h", 4, True),
    ],
)
@pytest.mark.parametrize("way", ["path", "text", "callable"])
def test_a_loaded_backbone(saved, kind, backend, layers_path, n_layers, looks_back, way):
    folder = saved / kind
    source = {
        "path": folder,
        "text": str(folder),
        "callable": lambda: (make_model(kind), make_tokenizer(pad_token="[PAD]")),
    }[way]
    found = load(source, backend)
    assert (found.layers_path, found.n_layers, found.width) == (layers_path, n_layers, 16)
    assert len(found.model.get_submodule(layers_path)) == n_layers
    assert found.backend == backend
    assert found.name == (type(make_model(kind)).__name__ if way == "callable" else str(folder))
    assert found.device == torch.device("cpu")
    assert not found.model.training
    assert not any(each.requires_grad for each in found.model.parameters())
    assert {each.dtype for each in found.model.parameters()} == {torch.float32}
    assert not found.model.config.use_cache
    assert (found.model.get_output_embeddings() is not None) == (backend == "causal")

    original = make_model(kind).eval()
    outputs = original(input_ids=IDS, attention_mask=MASK, output_hidden_states=True)
    hidden = last_hidden(found.model, IDS, MASK)
    torch.testing.assert_close(hidden, outputs.hidden_states[-1], rtol=1e-5, atol=1e-6)
    if backend == "causal":
        logits = found.model(input_ids=IDS, attention_mask=MASK).logits
        torch.testing.assert_close(logits, outputs.logits, rtol=1e-5, atol=1e-6)

    # What a token has seen, not what a configuration says.
    changed = IDS.clone()
    changed[0, 3] = 5
    moved = (last_hidden(found.model, changed, MASK) - hidden)[0, 0].abs().max() > 1e-6
    assert found.looks_back == looks_back == (not moved)


@pytest.mark.parametrize(
    ("kind", "backend", "words"),
    [
        ("bert", "causal", "is an encoder .bert., which cannot write titles"),
        ("t5", "causal", "an encoder with a decoder behind it .t5."),
        ("t5", "encoder", "an encoder with a decoder behind it .t5."),
    ],
)
@pytest.mark.parametrize("way", ["path", "callable"])
def test_models_of_another_kind_are_refused(saved, kind, backend, words, way):
    def build():
        return make_model(kind), make_tokenizer(pad_token="[PAD]")

    with pytest.raises(ValueError, match=words):
        load(saved / kind if way == "path" else build, backend)


def test_half_of_an_encoder_decoder_is_an_encoder():
    found = load(lambda: (make_model("t5").encoder, make_tokenizer()), "encoder")
    assert last_hidden(found.model, IDS, MASK).shape == (2, 4, 16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "auto"])
@pytest.mark.parametrize("way", ["path", "callable"])
def test_dtypes(tmp_path, dtype, way):
    make_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    make_tokenizer(pad_token="[PAD]").save_pretrained(tmp_path)

    def build():
        return make_model("llama").to(torch.bfloat16), make_tokenizer(pad_token="[PAD]")

    found = load(tmp_path if way == "path" else build, dtype=dtype)
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    assert found.model.dtype == last_hidden(found.model, IDS, MASK).dtype == wanted


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("special", "pad", "n_rows"),
    [
        ({"pad_token": "[PAD]", "eos_token": "</s>"}, "[PAD]", 9),
        ({"eos_token": "</s>", "unk_token": "[UNK]"}, "</s>", 9),
        ({"unk_token": "[UNK]"}, "[UNK]", 9),
        ({}, "[PAD]", 9),
    ],
)
def test_there_is_a_pad_token(kind, special, pad, n_rows):
    found = load(lambda: (make_model(kind), make_tokenizer(**special)))
    assert found.tokenizer.pad_token == pad
    assert found.model.get_input_embeddings().weight.shape == (n_rows, 16)
    assert found.model.generation_config.pad_token_id == WORDS.index(pad)
    assert found.tokenizer(["red", "red robot"], padding=True)["input_ids"][0][1] == WORDS.index(
        pad
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_pad_token_that_the_model_has_no_row_for(kind):
    words = [f"w{number}" for number in range(9)]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="w0"))
    found = load(lambda: (make_model(kind), PreTrainedTokenizerFast(tokenizer_object=core)))
    assert (found.tokenizer.pad_token, found.tokenizer.pad_token_id) == ("[PAD]", 9)
    original = make_model(kind)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(original, name)().weight, getattr(found.model, name)().weight
        assert after.shape == (10, 16)
        assert not after.requires_grad
        torch.testing.assert_close(after[:9], before.detach())
        torch.testing.assert_close(after[9], before.detach().mean(0))
    assert found.model(input_ids=torch.tensor([[9]])).logits.shape == (1, 1, 10)


def test_settings_of_a_checkpoint_do_not_change_how_titles_are_written():
    def build():
        model = make_model("llama")
        model.generation_config.update(
            do_sample=True, temperature=0.3, repetition_penalty=2.0, eos_token_id=[2, 3]
        )
        return model, make_tokenizer(eos_token="</s>", sep_token="[SEP]")

    settings = load(build).model.generation_config
    # Token 2 is a word to this tokenizer, token 3 a special one.
    assert settings.eos_token_id == [3, 4]
    assert not settings.do_sample
    assert settings.temperature in (None, 1.0)
    assert settings.repetition_penalty in (None, 1.0)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: make_model("bert"), TypeError, "clone copies.*Pass its name or path, or a func"),
        (lambda: (make_model("bert"), make_tokenizer()), TypeError, "backbone is a tuple"),
        (lambda: 7, TypeError, "backbone is a int"),
        (lambda: " ", ValueError, "empty text"),
        (lambda: lambda: make_model("bert"), TypeError, "pair .*but returned a BertForMaskedLM"),
        (lambda: lambda: None, TypeError, "but returned None"),
        (lambda: lambda: (1, 2, 3), TypeError, "but returned a tuple of 3"),
        (lambda: lambda: (nn.Linear(1, 1), make_tokenizer()), TypeError, "it is a Linear. Merge"),
        (lambda: lambda: (make_tokenizer(), make_model("bert")), TypeError, "first thing.*Tokeni"),
        (lambda: lambda: (make_model("bert"), None), TypeError, "tokenizer, of trans.* it is None"),
    ],
)
def test_errors_of_what_is_passed(make, error, words):
    with pytest.raises(error, match=words):
        load(make(), "encoder")


def test_a_model_without_a_head_cannot_write():
    with pytest.raises(ValueError, match="LlamaModel, which has no head"):
        load(lambda: (LlamaModel(LlamaConfig(**SHAPE)), make_tokenizer()))


def test_a_tokenizer_of_another_model():
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": 5}))
    with pytest.raises(ValueError, match="has 9 tokens, but the model knows 5"):
        load(lambda: (model, make_tokenizer()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "decoder"}, "backend must be 'causal' or 'encoder', got 'decoder'"),
        ({"dtype": "float64"}, "dtype must be 'auto' or one of float32"),
        ({"quantization": "2bit"}, "quantization must be None, '8bit' or '4bit', got '2bit'"),
        ({"quantization": "8bit", "backbone": None}, "quantization needs the name"),
        ({"revision": "main", "backbone": None}, "revision needs the name"),
        ({"revision": "main"}, "revision='main' is for names on the Hub"),
        ({"device": "nonsense"}, "device='nonsense' cannot be used"),
    ],
)
def test_errors_of_options(saved, options, words):
    options = {"backbone": saved / "llama", "backend": "causal", "device": "cpu"} | options
    with pytest.raises(ValueError, match=words):
        load_backbone(**options)


@pytest.mark.parametrize(
    "backbone", ["./nowhere", "~/nowhere", "/nowhere", "a/b/c", "nowhere/", Path("nowhere")]
)
def test_a_folder_that_is_not_there(backbone, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*Pass a local path, or"):
        load(backbone)


def test_a_file_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"There is no folder model\.gguf"):
        load("model.gguf")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"lacks config\.json \(it has"),
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "lacks model.safetenso"),
        (lambda f: [each.unlink() for each in f.iterdir()], FileNotFoundError, "it has nothing"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            ValueError,
            "pickled files only",
        ),
        (lambda f: (f / "adapter_config.json").write_text("{}"), ValueError, "PEFT adapter"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "cannot read the config"),
        (
            lambda f: (f / "config.json").write_text(json.dumps({"model_type": "of tomorrow"})),
            ValueError,
            "newer version of transformers",
        ),
        (
            lambda f: (f / "config.json").write_text(
                json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "evil.Config"}})
            ),
            ValueError,
            "code from their repository are not loaded",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"junk" * 9),
            OSError,
            "The weights of .* cannot be read",
        ),
        (
            lambda f: [each.unlink() for each in f.glob("tokenizer*")],
            FileNotFoundError,
            "no tokenizer, or an empty one",
        ),
        (
            lambda f: (f / "tokenizer.json").write_text("{}"),
            OSError,
            "The tokenizer of .* cannot be read",
        ),
        (
            lambda f: LlamaModel(LlamaConfig(num_hidden_layers=2, **SHAPE)).save_pretrained(f),
            ValueError,
            "no weights for 1 tensors of a LlamaForCausalLM, such as lm_head.weight",
        ),
    ],
)
def test_folders_that_are_no_complete_and_safe_model(saved, tmp_path, change, error, words):
    folder = shutil.copytree(saved / "llama", tmp_path / "llama")
    change(folder)
    with pytest.raises(error, match=words):
        load(folder)


def test_an_encoder_without_a_tokenizer(tmp_path):
    """For BERT, transformers makes up a tokenizer of special tokens."""
    make_model("bert").save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no tokenizer, or an empty one"):
        load(tmp_path, "encoder")


def test_code_of_a_repository_is_not_run(saved, tmp_path):
    """A known kind of model with code beside it is read by transformers' own class."""
    folder = shutil.copytree(saved / "llama", tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('code was run')")
    assert type(load(folder).model) is LlamaForCausalLM


def put_in_cache(folder, cache, name="owner/tiny", commit="c" * 40):
    """Lay a folder out as the Hub's cache does."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    shutil.copytree(folder, place / "snapshots" / commit)
    return place / "snapshots" / commit


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Give an empty cache, and a Hub that cannot be asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_name_in_the_cache_needs_no_network(saved, offline):
    put_in_cache(saved / "llama", offline)
    found = load("owner/tiny")
    assert found.name == "owner/tiny"
    assert load("owner/tiny", revision="c" * 40).n_layers == found.n_layers == 2
    with pytest.raises(OSError, match="'owner/tiny' at revision 'v2' is not in the local cache"):
        load("owner/tiny", revision="v2")


def test_a_name_that_is_nowhere(offline):
    with pytest.raises(OSError, match=r"'owner/other' is not in the local cache.*backbone=None"):
        load("owner/other")
    with pytest.raises(ValueError, match="neither a folder here nor a name on the Hub"):
        load("two words")


def raised(kind):
    """Make an error of the Hub's without the response that its constructor wants."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.RepositoryNotFoundError, "There is no model 'owner/tiny' on the Hugging Face Hub"),
        (errors.RevisionNotFoundError, "There is no model 'owner/tiny' on"),
        (errors.GatedRepoError, "asks for consent"),
        (errors.LocalEntryNotFoundError, r"could not be reached \(LocalEntryNotFoundError\)"),
        (TimeoutError, r"could not be reached \(TimeoutError\)"),
    ],
)
def test_errors_of_the_hub(monkeypatch, error, words):
    asked = []

    def snapshot_download(name, *, local_files_only=False, **options):
        asked.append(local_files_only)
        raise errors.LocalEntryNotFoundError("no") if local_files_only else raised(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(OSError, match=words) as found:
        load("owner/tiny")
    assert str(found.value).endswith("or backbone=None for the compact offline model.")
    assert asked == [True, False]


@pytest.mark.parametrize("lacking", ["config.json", "model.safetensors", "tokenizer*"])
def test_what_the_cache_lacks_is_fetched(saved, tmp_path, monkeypatch, lacking):
    cached = shutil.copytree(saved / "llama", tmp_path / "cached")
    for each in cached.glob(lacking):
        each.unlink()
    asked = []

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns, **options):
        assert (name, revision, allow_patterns) == ("owner/tiny", "v1", FILES)
        asked.append(options)
        return str(cached if options else saved / "llama")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load("owner/tiny", revision="v1").name == "owner/tiny"
    assert asked == [{"local_files_only": True}, {}]


def test_no_code_no_pickles_and_one_copy_of_the_weights_are_fetched():
    there = [
        *("config.json", "tokenizer.json", "merges.txt", "spiece.model", "model.safetensors"),
        *("model-00001-of-00002.safetensors", "model.safetensors.index.json"),
    ]
    left = [
        *("modeling.py", "pytorch_model.bin", "consolidated.safetensors", "model.onnx"),
        *("onnx/model.onnx", "original/model.safetensors", "1_Pooling/config.json", "a.gguf"),
    ]
    kept = huggingface_hub.utils.filter_repo_objects(
        there + left, allow_patterns=FILES, ignore_patterns="*/*"
    )
    assert list(kept) == there


def test_weights_in_several_files(saved, tmp_path):
    make_model("llama").save_pretrained(tmp_path, max_shard_size="5KB")
    make_tokenizer(pad_token="[PAD]").save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    expected = load(saved / "llama").model(input_ids=IDS, attention_mask=MASK).logits
    assert torch.equal(load(tmp_path).model(input_ids=IDS, attention_mask=MASK).logits, expected)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(OSError, match="The weights of"):
        load(tmp_path)


def test_the_settings_of_transformers_stay(saved, capfd):
    settings = transformers.utils.logging
    before = settings.get_verbosity(), settings.is_progress_bar_enabled()
    try:
        settings.set_verbosity_info()
        for bars in (True, False):
            (settings.enable_progress_bar if bars else settings.disable_progress_bar)()
            capfd.readouterr()
            load(saved / "bert", "encoder")
            with pytest.raises(ValueError, match="is an encoder"):
                load(saved / "bert", "causal")
            assert capfd.readouterr() == ("", "")
            assert settings.get_verbosity() == logging.INFO
            assert settings.is_progress_bar_enabled() == bars
            assert huggingface_hub.utils.are_progress_bars_disabled() != bars
    finally:
        settings.set_verbosity(before[0])
        (settings.enable_progress_bar if before[1] else settings.disable_progress_bar)()


def test_random_numbers_of_the_caller_stay(saved):
    """The pooler, which the checkpoint lacks, is drawn from a stream of our own."""
    state = torch.get_rng_state()
    poolers = [load(saved / "bert", "encoder", seed=seed).model.pooler for seed in (0, 0, 1)]
    built = [
        load(lambda: (BertModel(BertConfig(**SHAPE)), make_tokenizer()), "encoder", seed=seed).model
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    for first, same, other in (poolers, built):
        assert torch.equal(next(first.parameters()), next(same.parameters()))
        assert not torch.equal(next(first.parameters()), next(other.parameters()))


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantisation_without_bitsandbytes(saved, monkeypatch, quantization):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install fedrecsk\[quantized\]"):
        load(saved / "llama", quantization=quantization)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantisation_is_asked_for(saved, monkeypatch, quantization):
    """What bitsandbytes does needs its own installation; here, that it is told to."""
    asked = {}

    def from_pretrained(folder, **options):
        asked.update(options)
        model = make_model("llama")
        model.is_quantized = True
        return model, {"missing_keys": set()}

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("fedrecsk.models.backbone._quantization_config", lambda kind: kind)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    assert load(saved / "llama", quantization=quantization, dtype="float16").n_layers == 2
    assert asked["quantization_config"] == quantization
    assert asked["device_map"] == {"": torch.device("cpu")}
    assert asked["dtype"] == torch.float16
    assert asked["use_safetensors"] is True
    assert asked["trust_remote_code"] is False


def test_layers_are_the_longest_list_outside_other_lists():
    def layer():
        return nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(1, 1) for _ in range(9))})

    model = nn.ModuleDict(
        {
            "mixed": nn.ModuleList([nn.Linear(1, 1), *(nn.ReLU() for _ in range(9))]),
            "short": nn.ModuleList(nn.ReLU() for _ in range(2)),
            "body": nn.ModuleDict({"layers": nn.ModuleList(layer() for _ in range(3))}),
        }
    )
    path, layers = _transformer_layers(model, "a test")
    assert path == "body.layers"
    assert layers is model["body"]["layers"]
    with pytest.raises(ValueError, match="No list of layers was found in a test"):
        _transformer_layers(nn.Linear(1, 1), "a test")


@pytest.mark.parametrize("backend", ["causal", "encoder"])
def test_none_is_the_compact_model(monkeypatch, backend):
    asked = {}

    def build_compact(texts, **options):
        asked.update(options, texts=texts)
        return "state"

    def open_compact(state):
        assert state == "state"
        return make_model("llama"), make_tokenizer()

    compact = SimpleNamespace(build_compact=build_compact, open_compact=open_compact)
    monkeypatch.setitem(sys.modules, "fedrecsk.models.compact", compact)
    found = load(None, backend, texts=["red robot"], seed=3)
    assert found.name == "fedrecsk-compact"
    assert asked["texts"] == ["red robot"]
    assert asked["backend"] == backend
    assert asked["streams"] == Streams(3)
    # Only a model that writes reads the prompt.
    assert ["### Response:" in text for text in asked["other_texts"]] == [True] * (
        backend == "causal"
    )
