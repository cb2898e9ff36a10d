import io
import json
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

import fedrecsk.__main__ as program
from fedrecsk import FedFNNRecommender, PopularityRecommender
from fedrecsk.__main__ import HeldOutCurve, main, progress_on
from fedrecsk.datasets import make_interactions
from fedrecsk.metrics import evaluate
from fedrecsk.model_selection import PerUserHoldout

X, _ = make_interactions(40, 30, 2, random_state=0, return_X_y=True)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "shop.csv"
    header = "user_id,item_id,rating,timestamp"
    np.savetxt(path, X, fmt="%d", delimiter=",", header=header, comments="")
    return path


@pytest.fixture
def small(monkeypatch):
    """Shrink the built-in data."""
    monkeypatch.setattr(program, "N_USERS", 60)
    monkeypatch.setattr(program, "N_ITEMS", 40)
    monkeypatch.setattr(program, "N_CLUSTERS", 2)


def rows_of(text):
    """Read the printed table: dict of method to dict of column to number."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("method"))
    names = ["NDCG@20", "recall@20", "seconds", "rounds", "MB up", "MB down"]
    assert lines[start].replace("MB ", "MB_").split()[1:] == [n.replace(" ", "_") for n in names]
    table = {}
    for line in lines[start + 1 :]:
        method, *values = line.split()
        table[method] = dict(zip(names, map(float, values), strict=True))
    return table


def test_built_in_data_all_methods(small, capsys):
    assert main(["--rounds", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Made-up data: ")
    assert "60 users" in out.splitlines()[0]
    assert "60 clients" in out.splitlines()[0]
    table = rows_of(out)
    assert list(table) == list(program.METHODS)
    assert table["fedfnn"]["rounds"] == 3
    assert table["popularity"]["rounds"] == 1
    assert table["fedavg"]["MB down"] > 0
    lines = err.splitlines()  # not a terminal: whole lines, one a round here
    trained = ("Centralized", "FedAvg", "FedFast", "FedFNN", "HeteFedRec", "FELLRec")
    expected = [("Popularity", 1, 1), *((name, t, 3) for name in trained for t in (1, 2, 3))]
    assert len(lines) == len(expected)
    for line, (name, done, n_rounds) in zip(lines, expected, strict=True):
        assert line.startswith(f"[{name}Recommender] round {done}/{n_rounds}  loss ")


def test_numbers_are_those_of_the_library(csv, capsys, tmp_path):
    report = tmp_path / "report.json"
    arguments = ["--methods", "fedfnn", "popularity", "--rounds", "4", "--clients-per-round", "10"]
    arguments += ["--factors", "3", "--seed", "5", "--test-size", "0.3", "--min-rating", "3"]
    assert main(["--data", str(csv), *arguments, "--json", str(report)]) == 0
    table = rows_of(capsys.readouterr().out)
    assert list(table) == ["popularity", "fedfnn"]  # in the order of METHODS

    train, test = next(PerUserHoldout(0.3, random_state=5).split(X))
    models = {
        "popularity": PopularityRecommender(min_rating=3),
        "fedfnn": FedFNNRecommender(
            3, n_rounds=4, clients_per_round=10, min_rating=3, random_state=5
        ),
    }
    written = json.loads(report.read_text())
    assert written["data"] == {
        "path": str(csv),
        "interactions": len(X),
        "users": len(np.unique(X[:, 0])),
        "items": len(np.unique(X[:, 1])),
        "held_out": len(test),
        "clients": len(np.unique(X[:, 0])),
    }
    assert written["seed"] == 5
    assert written["test_size"] == 0.3
    for result in written["results"]:
        model = models[result["method"]].fit(X[train])
        expected = evaluate(model, X[test], metrics=("ndcg", "recall"), k=20).overall
        assert result["ndcg@20"] == pytest.approx(expected["ndcg@20"], abs=1e-6)
        assert result["recall@20"] == pytest.approx(expected["recall@20"], abs=1e-6)
        shown = table[result["method"]]
        assert shown["NDCG@20"] == pytest.approx(expected["ndcg@20"], abs=6e-5)
        up = sum(record["bytes_up"] for record in model.history_) / 1e6
        assert result["megabytes_up"] == up
        assert result["rounds"] == model.n_rounds_ == len(result["history"])
        assert result["params"] == model.get_params()
        assert result["estimator"] == type(model).__name__


def test_methods_that_read_need_texts(csv, capsys):
    assert main(["--data", str(csv), "--methods", "fellrec", "popularity"]) == 0
    out = capsys.readouterr().out
    assert "Left out, since the data have no item texts: fellrec\n" in out
    assert list(rows_of(out)) == ["popularity"]
    assert "fellrec reads the texts of items" in fails(
        capsys, "--data", str(csv), "--methods", "fellrec"
    )


def test_methods_that_read_get_the_texts_and_few_rounds(small, capsys, tmp_path):
    report = tmp_path / "report.json"
    assert main(["--methods", "fellrec", "--json", str(report)]) == 0
    table = rows_of(capsys.readouterr().out)
    assert table["fellrec"]["rounds"] == program.READERS["fellrec"]
    (result,) = json.loads(report.read_text())["results"]
    made = make_interactions(60, 40, 2, random_state=0)
    assert result["params"]["item_text"] == {str(k): v for k, v in made.item_text.items()}


def test_client_ids_of_the_file_are_used(tmp_path, capsys):
    path = tmp_path / "clients.csv"
    lines = [f"{user},{item},{user % 4}" for user, item in X[:, :2]]
    path.write_text("user_id,item_id,client_id\n" + "\n".join(lines))
    report = tmp_path / "report.json"
    arguments = ["--methods", "fedavg", "--rounds", "1", "--clients-per-round", "1.0"]
    assert main(["--data", str(path), *arguments, "--json", str(report)]) == 0
    assert ", 4 clients;" in capsys.readouterr().out
    history = json.loads(report.read_text())["results"][0]["history"]
    assert history[0]["clients"] == 4  # 1.0 is all of them, not one


def test_plot_is_written_and_changes_no_result(csv, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plain, drawn, plot = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "plot.png"
    arguments = ["--data", str(csv), "--rounds", "3", "--json"]
    assert main([*arguments, str(plain)]) == 0
    assert main([*arguments, str(drawn), "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.stat().st_size > 10_000
    one, other = (json.loads(file.read_text())["results"] for file in (plain, drawn))
    assert [r["ndcg@20"] for r in one] == [r["ndcg@20"] for r in other]


def test_curve_scores_held_out_rows_and_keeps_its_time_apart():
    train, test = next(PerUserHoldout(random_state=0).split(X))
    curve = HeldOutCurve(X[test])
    model = FedFNNRecommender(4, n_rounds=5, random_state=0).set_callbacks(curve)
    start = time.perf_counter()
    model.fit(X[train])
    whole = time.perf_counter() - start
    assert [place for place, _ in curve.points] == [1, 2, 3, 4, 5]
    assert curve.points[-1][1] == pytest.approx(model.score(X[test]))
    three = FedFNNRecommender(4, n_rounds=3, random_state=0).fit(X[train])
    assert curve.points[2][1] == pytest.approx(three.score(X[test]))
    trained = sum(record["seconds"] for record in model.history_)
    assert 0 < curve.seconds < whole - trained


def test_curve_of_many_rounds_is_thinned():
    curve = HeldOutCurve(X)
    model = FedFNNRecommender(2, n_rounds=50, random_state=0, verbose=0).set_callbacks(curve)
    train, test = next(PerUserHoldout(random_state=0).split(X))
    curve.held_out = X[test]
    model.fit(X[train])
    assert [place for place, _ in curve.points] == [1, *range(3, 50, 3), 50]


def test_progress_on_a_terminal_rewrites_one_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    terminal = Terminal()
    with progress_on(terminal) as verbose:
        assert verbose == 2
        print("a first line that is too long for this terminal")
        print("short")
    first = "a first line that is too long"
    assert terminal.getvalue() == f"\r{first}\r{'short':<{len(first)}}\n"


def test_progress_line_ends_before_an_error():
    def fit():
        print("round 1")
        raise FloatingPointError("diverged")

    terminal = Terminal()
    with pytest.raises(FloatingPointError), progress_on(terminal):
        fit()
    assert terminal.getvalue() == "\rround 1\n"


def test_progress_without_a_word_leaves_no_empty_line():
    terminal = Terminal()
    with progress_on(terminal):
        pass
    assert terminal.getvalue() == ""


def test_progress_elsewhere_is_plain_lines(capsys):
    stream = io.StringIO()
    with progress_on(stream) as verbose:
        assert verbose == 1
        print("round 1")
    assert stream.getvalue() == "round 1\n"
    assert capsys.readouterr().out == ""


def fails(capsys, *arguments):
    """Run with these arguments and return the one line of the error."""
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("fedrecsk: error: ")
    return lines[0]


def test_missing_file_is_an_error(capsys, tmp_path):
    assert "nowhere.csv" in fails(capsys, "--data", str(tmp_path / "nowhere.csv"))


def test_foreign_archive_is_an_error(capsys, tmp_path):
    path = tmp_path / "holiday.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photo.txt", "sea")
    assert "holiday.zip" in fails(capsys, "--data", str(path))


def test_archive_that_is_none_is_an_error(capsys, tmp_path):
    path = tmp_path / "broken.zip"
    path.write_bytes(b"no archive")
    assert "broken.zip" in fails(capsys, "--data", str(path))


def test_parquet_without_pyarrow_is_an_error(capsys, tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pyarrow" in fails(capsys, "--data", str(path))


def test_foreign_columns_are_an_error(capsys, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("who,what\n1,2\n")
    assert "user_id" in fails(capsys, "--data", str(path))


def test_plot_without_matplotlib_is_an_error_before_the_work(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    message = fails(capsys, "--plot", str(tmp_path / "plot.png"))
    assert 'pip install "fedrecsk[plot]"' in message


def test_plot_of_unknown_kind_is_an_error_before_the_work(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert ".png" in fails(capsys, "--plot", str(tmp_path / "plot.doc"))


@pytest.mark.parametrize("option", ["--plot", "--json"])
def test_output_without_folder_is_an_error_before_the_work(option, capsys, tmp_path):
    assert "nowhere" in fails(capsys, option, str(tmp_path / "nowhere" / "out.png"))


def test_bad_parameter_is_an_error(small, capsys):
    assert "n_rounds" in fails(capsys, "--methods", "fedavg", "--rounds", "0")


def test_bad_device_is_an_error(small, capsys):
    assert "toaster" in fails(capsys, "--methods", "fedavg", "--device", "toaster")


def test_unusable_test_size_is_an_error(small, capsys):
    assert "test_size" in fails(capsys, "--test-size", "1.5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--methods", "magic"], "magic"), (["--clients-per-round", "few"], "'few' is not a number")],
)
def test_usage_errors_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_runs_as_a_module(tmp_path):
    missing = tmp_path / "nowhere"
    done = subprocess.run(
        [sys.executable, "-m", "fedrecsk", "--data", str(missing)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("fedrecsk: error: There is no file or folder")
    assert "Traceback" not in done.stderr
