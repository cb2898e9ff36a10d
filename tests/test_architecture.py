"""The house rules of docs/design.md that a machine can check, read off the source."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fedrecsk

PACKAGE = Path(fedrecsk.__file__).parent
MODULES = {
    ".".join(("fedrecsk", *path.relative_to(PACKAGE).with_suffix("").parts)): ast.parse(
        path.read_text(encoding="utf-8")
    )
    for path in sorted(PACKAGE.rglob("*.py"))
}
FLOORS = {
    "exceptions": 0,
    "data": 1,
    "metrics": 1,
    "model_selection": 1,
    "engine": 2,
    "models": 2,
    "methods": 3,
    "estimators": 4,
    # The shop window: public names of the floors below, and what uses the package as a caller.
    "datasets": 1,
    "plotting": 1,
    "__init__": 5,
    "__main__": 6,
}
# Files in methods/ that belong to the paper of another: a part of it that is read on its own.
PART_OF = {
    "bce_rounds": "fedfnn",
    "delegate_sums": "fedfnn",
    "dynamic_balance": "fellrec",
    "factor_state": "fedfnn",
    "meta_network": "fedfnn",
    "nested_state": "hetefedrec",
    "nested_whole_data": "hetefedrec",
    "noised_sums": "fedfnn",
    "padded_aggregation": "hetefedrec",
    "self_distillation": "hetefedrec",
    "standalone": "hetefedrec",
    "whole_data_rounds": "fedfnn",
}


def floor_name(module):
    """Name the folder, or the top-level file, that a module of the package is in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(module):
    """List the full names of all that a module imports, also inside functions."""
    found = []
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                outside = module.split(".")[: -node.level]
                base = ".".join([*outside, *([node.module] if node.module else [])])
            # "from package import module" names a module as well; keep both readings.
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return found


def own_imports(module):
    """List the modules of the package that a module imports."""
    known = {name.removesuffix(".__init__"): name for name in MODULES}
    return sorted({known[name] for name in imports(module) if name in known} - {module})


def calls(tree, name):
    """List the calls of a plain name, such as print; methods of that name are not meant."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]


def test_every_module_is_on_a_floor():
    assert {floor_name(module) for module in MODULES} == set(FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module):
    own = floor_name(module)
    for imported in own_imports(module):
        other = floor_name(imported)
        assert FLOORS[other] <= FLOORS[own], f"{module} imports {imported} from a floor above"
        if own == "engine":
            assert other in ("engine", "exceptions"), f"the engine knows no {other}: {imported}"
        if own == "data":
            assert other in ("data", "exceptions"), f"data come first: {imported}"


@pytest.mark.parametrize("module", [name for name in MODULES if floor_name(name) == "methods"])
def test_methods_do_not_import_each_other(module):
    paper = PART_OF.get(module.split(".")[-1], module.split(".")[-1])
    for imported in own_imports(module):
        if floor_name(imported) == "methods":
            other = imported.split(".")[-1]
            assert PART_OF.get(other, other) == paper, f"{module} imports {imported}"


def test_parts_of_papers_exist():
    """A part is read by its paper's file or another part of it, or builds on such a part."""
    for part, paper in PART_OF.items():
        module = f"fedrecsk.methods.{part}"
        family = {f"fedrecsk.methods.{other}" for other in PART_OF if PART_OF[other] == paper}
        readers = {f"fedrecsk.methods.{paper}", *family} - {module}
        used = any(module in own_imports(reader) for reader in readers)
        assert used or family & set(own_imports(module))


def test_no_import_circles():
    left = {module: set(own_imports(module)) for module in MODULES}
    while free := [module for module, needs in left.items() if not needs & set(left)]:
        for module in free:
            del left[module]
    assert not left, f"modules that import each other: {sorted(left)}"


@pytest.mark.parametrize("module", [name for name in MODULES if FLOORS[floor_name(name)] <= 1])
def test_the_first_floor_knows_no_torch(module):
    assert not [name for name in imports(module) if name.split(".")[0] == "torch"]


@pytest.mark.parametrize("module", MODULES)
def test_private_names_of_scikit_learn_come_from_one_file(module):
    if module == "fedrecsk.estimators._sklearn":
        return
    for name in imports(module):
        parts = name.split(".")
        private = parts[0] == "sklearn" and any(part.startswith("_") for part in parts)
        assert not private, f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_unsafe(module):
    roots = {name.split(".")[0] for name in imports(module)}
    assert not roots & {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle"}
    for name in ("eval", "exec", "compile", "__import__"):
        assert not calls(MODULES[module], name), f"{module} calls {name}"


@pytest.mark.parametrize("module", MODULES)
def test_no_global_seeds(module):
    """Randomness is an argument: the caller's generators are not touched."""
    assert "random" not in imports(module)
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            assert text not in ("np.random.seed", "torch.manual_seed", "torch.seed"), module
            assert text not in ("torch.cuda.manual_seed", "torch.cuda.manual_seed_all"), module


@pytest.mark.parametrize("module", MODULES)
def test_only_the_command_line_and_verbose_print(module):
    found = calls(MODULES[module], "print")
    if module == "fedrecsk.__main__":
        return
    if module == "fedrecsk.estimators._base":
        allowed = [
            node
            for node in ast.walk(MODULES[module])
            if isinstance(node, ast.FunctionDef) and node.name == "_print"
        ]
        assert len(allowed) == 1
        assert len(found) == len(calls(allowed[0], "print")) == 1
    else:
        assert not found


def run(script):
    """Run a script in a fresh process, next to the package, and give what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


# Makes packages look as if they were not installed.
WITHOUT = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Without())
"""


def test_import_is_light():
    """Heavy packages are imported where they are needed, not by ``import fedrecsk``."""
    seconds, modules = json.loads(
        run(
            "import json, sys, time; began = time.process_time(); import fedrecsk; "
            "print(json.dumps([time.process_time() - began, sorted(sys.modules)]))"
        )
    )
    assert not {"transformers", "peft", "accelerate", "matplotlib"} & set(modules)
    # Time on the processor, most of it torch's: a busy machine must not fail the test.
    assert seconds < 5


def test_import_adds_little_to_its_dependencies():
    """Of the two seconds that the import may take, torch and scikit-learn need nearly all."""
    seconds = run(
        "import time, torch, sklearn.base, sklearn.callback, sklearn.pipeline, narwhals.stable.v2;"
        "began = time.process_time(); import fedrecsk; print(time.process_time() - began)"
    )
    assert float(seconds) < 0.5  # .2 on an idle machine


def test_optional_packages_are_optional():
    """No DataFrame library is needed; scikit-learn alone imports pandas where it finds it."""
    optional = ["pandas", "polars", "pyarrow", "matplotlib", "rich"]
    script = WITHOUT.format(names=optional) + (
        "import fedrecsk, fedrecsk.plotting\n"
        "from fedrecsk.datasets import make_interactions\n"
        "X = make_interactions(20, 30, 2, mean_interactions=9, random_state=0)\n"
        "model = fedrecsk.FedFNNRecommender(n_rounds=2, random_state=0).fit(X.data, X.target)\n"
        "print(model.recommend(k=2)[0].shape)\n"
    )
    assert run(script).strip() == "(20, 2)"


def test_the_first_floor_runs_without_torch():
    """Data, metrics and splits in a process in which torch cannot be imported."""
    script = WITHOUT.format(names=["torch"]) + (
        # An empty shop window in place of the one with the estimators in it.
        "import types; package = types.ModuleType('fedrecsk'); package.__path__ = ['fedrecsk']\n"
        "sys.modules['fedrecsk'] = package\n"
        "import fedrecsk.datasets, fedrecsk.metrics, fedrecsk.model_selection, fedrecsk.plotting\n"
        "X = fedrecsk.datasets.make_interactions(20, 30, 2, mean_interactions=9).data\n"
        "train, test = next(fedrecsk.model_selection.PerUserHoldout().split(X))\n"
        "print(fedrecsk.metrics.ndcg_at_k([[0, 1]], [[0.1, 0.9]], k=1))\n"
    )
    assert run(script).strip() == "1.0"
