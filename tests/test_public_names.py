"""What a user can import, and that each of these names is documented as it is."""

import ast
import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import fedrecsk

PUBLIC = {
    "fedrecsk": {
        "CentralizedRecommender",
        "FedAvgRecommender",
        "FedFNNRecommender",
        "FELLRecRecommender",
        "FedFastRecommender",
        "HeteFedRecRecommender",
        "NoItemTextWarning",
        "NoUsableUploadError",
        "NothingHeldOutError",
        "NothingHeldOutWarning",
        "PopularityRecommender",
        "TooFewClientsError",
        "UnknownIdWarning",
        "__version__",
        "interactions_from_sparse",
    },
    "fedrecsk.datasets": {
        "fetch_movielens",
        "load_interactions",
        "load_movielens",
        "make_interactions",
    },
    "fedrecsk.metrics": {
        "client_balance",
        "coverage_at_k",
        "evaluate",
        "exposure_ratio",
        "hit_rate_at_k",
        "map_at_k",
        "mrr_at_k",
        "ndcg_at_k",
        "precision_at_k",
        "ranking_scorer",
        "recall_at_k",
        "top_k",
    },
    "fedrecsk.model_selection": {
        "ColdUserSplit",
        "LeaveLastOut",
        "PerUserHoldout",
        "PerUserKFold",
    },
    "fedrecsk.plotting": {
        "ClientBalanceDisplay",
        "ConvergenceDisplay",
        "GroupGainsDisplay",
        "SpectrumDisplay",
        "SplitDisplay",
    },
}
OBJECTS = {
    f"{module}.{name}": getattr(importlib.import_module(module), name)
    for module, names in PUBLIC.items()
    for name in sorted(names - {"__version__"})
}
CLASSES = {name: each for name, each in OBJECTS.items() if inspect.isclass(each)}
METHODS = {
    f"{owner}.{name}": each
    for owner, cls in CLASSES.items()
    if not issubclass(cls, Exception)
    for name, each in inspect.getmembers(cls, inspect.isroutine)
    if not name.startswith("_") and each.__module__.startswith("fedrecsk")
}
# Warnings and errors are raised, not called: a sentence says when.
DOCUMENTED = {
    name: each
    for name, each in {**OBJECTS, **METHODS}.items()
    if not (inspect.isclass(each) and issubclass(each, Exception))
}


def public_names(module):
    """List what a module offers: ``__all__``, or the classes and functions that are its own."""
    if hasattr(module, "__all__"):
        assert len(set(module.__all__)) == len(module.__all__)
        return set(module.__all__)
    return {
        name
        for name, each in vars(module).items()
        if not name.startswith("_") and getattr(each, "__module__", None) == module.__name__
    }


def sections(documented):
    """Cut a docstring in the style of numpydoc into its sections."""
    doc = inspect.getdoc(documented)
    assert doc, "no docstring"
    parts = re.split(r"(?m)^([A-Z][A-Za-z ]+)\n-{3,}$\n?", doc)
    assert len(parts[1::2]) == len(set(parts[1::2])), "a section comes twice"
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def documented_parameters(section):
    """Give the names of a Parameters section in order, each with what follows its colon."""
    found = {}
    for line in re.sub(r"\\\n\s*", "", section).splitlines():
        match = re.match(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: : (.*))?$", line)
        if match:
            found.update(dict.fromkeys(match[1].split(", "), match[2] or ""))
    return found


def parameters(documented):
    """Give the parameters of a signature, in order."""
    found = list(inspect.signature(documented).parameters.values())
    return [each for each in found if each.name not in ("self", "cls")]


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module):
    imported = importlib.import_module(module)
    assert public_names(imported) == PUBLIC[module]
    assert all(hasattr(imported, name) for name in PUBLIC[module])


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert fedrecsk.__version__ == project["version"]


@pytest.mark.parametrize("name", OBJECTS)
def test_a_summary_in_one_line(name):
    summary = inspect.getdoc(OBJECTS[name]).split("\n\n")[0]
    assert summary.endswith(".")
    assert "\n" not in summary


@pytest.mark.parametrize("name", DOCUMENTED)
def test_parameters_are_documented_in_order(name):
    documented = documented_parameters(sections(DOCUMENTED[name]).get("Parameters", ""))
    actual = [
        {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(each.kind.name, "") + each.name
        for each in parameters(DOCUMENTED[name])
    ]
    assert list(documented) == actual


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_defaults_are_the_defaults(name):
    documented = documented_parameters(sections(DOCUMENTED[name]).get("Parameters", ""))
    for each in parameters(DOCUMENTED[name]):
        match = re.search(r"default=([^ ].*)$", documented[each.name])
        if match and " and " not in match[1]:
            assert ast.literal_eval(match[1]) == each.default, each.name


@pytest.mark.parametrize("name", [name for name in DOCUMENTED if name not in CLASSES])
def test_returns_are_documented(name):
    found = sections(DOCUMENTED[name])
    assert inspect.signature(DOCUMENTED[name]).return_annotation not in (
        None,
        inspect.Signature.empty,
    )
    assert {"Returns", "Yields"} & set(found)


@pytest.mark.parametrize("name", [name for name in CLASSES if name.endswith("Recommender")])
def test_fitted_attributes_are_documented(name):
    attributes = sections(CLASSES[name])["Attributes"]
    documented = {
        each
        for line in attributes.splitlines()
        if not line.startswith(" ")
        for each in re.findall(r"\w+_(?=[ ,:]|$)", line)
    }
    model = CLASSES[name]()
    if "n_rounds" in model.get_params():
        model.set_params(n_rounds=1)
    if "item_text" in model.get_params():
        model.set_params(item_text={1: "one", 2: "two"})
    model.fit([[0, 1], [0, 2], [1, 2]])
    fitted = {each for each in vars(model) if each.endswith("_") and not each.startswith("_")}
    assert fitted <= documented
    assert documented <= fitted | {"feature_names_in_"}


@pytest.mark.parametrize("name", [name for name in OBJECTS if name in DOCUMENTED])
def test_every_public_name_has_an_example(name):
    assert ">>> " in sections(OBJECTS[name])["Examples"]
