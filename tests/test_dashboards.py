"""common/dashboards.py: what TensorBoard and Weights & Biases get; `make test-dashboards`."""

import importlib.machinery
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_train

from common import dashboards
from common.dashboards import as_scalars
from common.runlog import RunLog

STEP = dict(loss=4.81234, lr=1.5e-3, dt=2.0, tokens_seen=1000, tokens_per_sec=500.0, mfu=None)


def test_dashboards_get_every_number_under_event_name_and_layer():
    values = STEP | {"mfu": 0.4321}
    assert as_scalars("train", values) == {f"train/{n}": value for n, value in values.items()}
    assert "train/mfu" not in as_scalars("train", STEP), "None is not a number"
    expected = {"hellaswag/acc": 0.28591, "hellaswag/acc_norm": 0.29549}
    assert (
        as_scalars("hellaswag", dict(style="completion", acc=0.28591, acc_norm=0.29549)) == expected
    )
    stats = {"update_ratio": [0.1, 0.2], "grad_norm": [1.0, 2.0]}
    assert as_scalars("stats", stats) == {
        "stats/update_ratio/00": 0.1, "stats/update_ratio/01": 0.2,
        "stats/grad_norm/00": 1.0, "stats/grad_norm/01": 2.0,
    }  # fmt: skip
    assert as_scalars("skip", {"why": "nan", "windows": [0, 4]}) == {}
    assert as_scalars("run", {"n_params": 1234567}) == {}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_dashboard_package_is_an_error_before_anything_is_written(
    data_dir, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(dashboards.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=f"pip install {name}"):
        run_train(data_dir, tmp_path / "log", **{name: True})
    assert not (tmp_path / "log").exists()
    with pytest.raises(ValueError, match=f"pip install {name}"):  # the other ranks must stop too
        RunLog(tmp_path / "log", 0, is_main=False, **{name: True})


def test_a_folder_is_not_taken_for_a_package(tmp_path, monkeypatch):
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    dashboards.check_installed("json")
    with pytest.raises(ValueError, match="pip install only_a_folder"):
        dashboards.check_installed("only_a_folder")


def stand_in_for_wandb(monkeypatch: pytest.MonkeyPatch, init: Callable) -> None:
    """Let `import wandb` give a module with this function `init`."""
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="here")
    wandb.init, wandb.errors = init, types.SimpleNamespace(Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", wandb)


def test_the_project_and_name_of_wandb_are_those_of_the_environment_if_it_has_any(
    tmp_path, monkeypatch
):
    given = {}

    def init(**arguments):
        given.update(arguments)
        return types.SimpleNamespace(id="an id", define_metric=lambda *_, **__: None)

    stand_in_for_wandb(monkeypatch, init)
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    dashboards.WeightsAndBiases(Path(), None)
    assert (given["project"], given["name"]) == ("gpt2", tmp_path.name), "'.' has no name"
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_NAME", "first try")
    dashboards.WeightsAndBiases(tmp_path / "log", None)
    assert (given["project"], given["name"]) == ("mine", "first try")
    assert given["dir"] == tmp_path / "log"
    monkeypatch.setenv("WANDB_DIR", "scratch")  # an argument of ours would beat it
    dashboards.WeightsAndBiases(tmp_path / "log", None)
    assert given["dir"] == "scratch"
    assert "entity" not in given, "wandb takes WANDB_ENTITY itself"


def test_a_refusal_by_wandb_says_what_to_do(tmp_path, monkeypatch):
    def refuse(**_):
        raise RuntimeError("no API key\nmore lines")

    stand_in_for_wandb(monkeypatch, refuse)
    (tmp_path / "metrics.jsonl").write_text("as before")
    with pytest.raises(ValueError, match=r"^--wandb: no API key: run `wandb login`"):
        RunLog(tmp_path, 0, is_main=True, wandb=True)
    assert (tmp_path / "metrics.jsonl").read_text() == "as before"


def test_tensorboard_gets_the_same_numbers(data_dir, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metrics = run_train(data_dir, tmp_path, tensorboard=True, stats_every=5)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for event, name in (("train", "loss"), ("train", "lr"), ("val", "loss")):
        found = [(s.step, s.value) for s in events.Scalars(f"{event}/{name}")]
        expected = [(m["step"], m[name]) for m in metrics if m["event"] == event]
        assert [step for step, _ in found] == [step for step, _ in expected]
        values = [[value for _, value in pairs] for pairs in (found, expected)]
        assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert "stats/update_ratio/01" in events.Tags()["scalars"]


def wandb_records(path: Path) -> list[bytes]:
    """The records of wandb's offline file: blocks of 32 kB, as in LevelDB's logs."""
    data, at, records, parts = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            records.append(parts)
            parts = b""
        if (left := -at % 32768) < 7:
            at += left
    return records


def test_wandb_gets_the_same_numbers_offline(data_dir, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    metrics = run_train(data_dir, tmp_path, wandb=True)
    (path,) = tmp_path.rglob("run-*.wandb")
    deadline = time.monotonic() + 20
    records: list = []
    # wandb's own process writes the end of the file a moment after finish() has returned
    while not any(record.HasField("exit") for record in records) and time.monotonic() < deadline:
        time.sleep(0.05)
        records = [Record.FromString(record) for record in wandb_records(path)]
    found = []
    for record in records:
        items = {i.key or ".".join(i.nested_key): i.value_json for i in record.history.item}
        if "train/loss" in items:
            found.append((int(items["step"]), float(items["train/loss"])))
    assert found == [(m["step"], m["loss"]) for m in metrics if m["event"] == "train"]
