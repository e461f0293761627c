"""A model's weights are found by name, or without one."""

import os
from pathlib import Path

import pytest
import torch
from conftest import save

from common import weights
from common.cli import plain
from common.huggingface import write_huggingface
from common.paths import walk
from common.weights import default_model, find_model, read_weights
from train_gpt2 import GPT


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log").mkdir()
    return tmp_path


def test_without_a_name_the_newest_checkpoint_in_log_is_read(here, small_model):
    for step in (9, 10, 8):
        save(small_model, here / "log" / f"ckpt_{step:06d}.pt")
    name, sizes, tensors = read_weights(None)
    assert name == "log/ckpt_000010.pt" and sizes == plain(small_model.config)
    assert torch.equal(tensors["transformer.wpe.weight"], small_model.transformer.wpe.weight)


def test_without_a_name_and_a_checkpoint_gpt2_is_read(here, monkeypatch):
    monkeypatch.setattr(weights, "read_huggingface", lambda name: ({"from": name}, {}))
    assert read_weights(None) == ("gpt2", {"from": "gpt2"}, {})


def test_a_folder_and_a_checkpoint_are_told_apart_by_their_names(here, small_model):
    parameters = dict(small_model.named_parameters())
    write_huggingface(plain(small_model.config), parameters, here / "hf")
    path = save(small_model, here / "model.pt")
    for name in (here / "hf", path):
        found, sizes, tensors = read_weights(name)
        assert found == str(name) and sizes["n_embd"] == small_model.config.n_embd
        assert torch.equal(tensors["transformer.ln_f.weight"], small_model.transformer.ln_f.weight)


def run(model: GPT, folder: Path, *steps: int, seconds: int) -> None:
    """Write a run's checkpoints; all of it is `seconds` old."""
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        path = save(model, folder / f"ckpt_{step:06d}.pt")
        os.utime(path, (1e9 - seconds, 1e9 - seconds))


def test_without_a_name_the_run_that_wrote_last_is_read_wherever_it_lies(here, small_model):
    run(small_model, here / "log", 500, seconds=30)
    run(small_model, here / "log" / "old", 9000, seconds=20)
    run(small_model, here / "log" / "deep" / "mine", 7, 30, seconds=10)
    assert default_model() == read_weights(None)[0] == "log/deep/mine/ckpt_000030.pt"
    os.utime("log/deep/mine/ckpt_000007.pt", (2e9, 2e9))  # copied later: the last step counts
    assert default_model() == "log/deep/mine/ckpt_000030.pt"
    run(small_model, here / "elsewhere", 3, seconds=0)
    (here / "log" / "linked").symlink_to(here / "elsewhere")  # a run on another disk
    assert default_model() == "log/linked/ckpt_000003.pt"
    (here / "log" / "broken").mkdir()
    (here / "log" / "broken" / "ckpt_000001.pt").symlink_to("nowhere")
    assert default_model() == "log/linked/ckpt_000003.pt"


def test_links_in_a_circle_do_not_hold_up_the_search(here, small_model):
    run(small_model, here / "log" / "mine", 7, seconds=0)
    for name in ("a", "b", "c"):  # 3 ** 40 paths, if the search went round
        (here / "log" / name).symlink_to(".")
    assert list(walk("log")) == [("log", []), ("log/mine", ["ckpt_000007.pt"])]
    assert default_model() == "log/mine/ckpt_000007.pt"


def test_without_a_checkpoint_the_export_of_the_run_is_read_before_gpt2(here, small_model):
    assert default_model() == "gpt2"
    parameters = dict(small_model.named_parameters())
    write_huggingface(plain(small_model.config), parameters, here / "log" / "mine" / "hf")
    assert default_model() == find_model("log") == find_model("log/mine") == "log/mine/hf"
    save(small_model, here / "log" / "ckpt_000001.pt")
    assert default_model() == "log/ckpt_000001.pt"


def test_a_folder_means_its_own_run_else_the_newest_below(here, small_model, monkeypatch):
    run(small_model, here / "log" / "mine", 9, 10, seconds=5)
    run(small_model, here / "log" / "other", 3, seconds=0)
    for name in ("log/mine", "log/mine/", Path("log/mine"), here / "log" / "mine"):
        assert read_weights(name)[0].endswith("log/mine/ckpt_000010.pt")
    assert read_weights("log")[0] == "log/other/ckpt_000003.pt"
    run(small_model, here / "log", 1, seconds=99)
    assert read_weights("log")[0] == "log/ckpt_000001.pt"
    monkeypatch.setenv("HOME", str(here))
    assert read_weights("~/log/mine")[0] == str(here / "log/mine/ckpt_000010.pt")


@pytest.mark.parametrize("name", ["ckpt.pt", "model_19072.pt"])
def test_a_folder_of_nanogpt_or_build_nanogpt_means_its_checkpoint(here, name):
    (here / "log" / name).write_text("x")
    assert find_model("log") == f"log/{name}"


def test_the_model_that_answers_is_named_once_on_stderr(here, small_model, capsys):
    run(small_model, here / "log" / "mine", 10, seconds=0)
    parameters = dict(small_model.named_parameters())
    write_huggingface(plain(small_model.config), parameters, here / "hf")
    mine = "log/mine/ckpt_000010.pt"
    for given, name in ((None, mine), ("log/mine", mine), (mine, mine), ("hf", "hf")):
        read_weights(given)
        out, err = capsys.readouterr()
        assert (out, err) == ("", f"model: {name}\n")
    (here / mine).write_bytes(b"x")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        read_weights(None)
    assert capsys.readouterr().err == ""  # it was not read


def test_a_folder_without_a_model_says_what_to_give(here):
    with pytest.raises(
        OSError, match=r"^log holds no checkpoint and no config\.json: give a run's"
    ):
        read_weights("log")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("", "the name of the model is empty"),
        ("nothing.pt", "no such checkpoint"),
        ("log/nothing.safetensors", "no such file or folder"),
        ("model.bin", "no such file or folder"),
        ("/nowhere/at/all", "no such file or folder"),
        ("~/nowhere", "no such file or folder"),
        ("~nobody-of-that-name/x", "give the whole path"),
    ],
)
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(here, monkeypatch, name, what):
    monkeypatch.setattr("common.huggingface.find_on_hub", None)
    with pytest.raises((FileNotFoundError, ValueError), match=what):
        read_weights(name)


def test_weights_without_sizes_are_refused(here, small_model):
    torch.save(small_model.state_dict(), "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: not a whole .*\(it holds weights without sizes"):
        read_weights("x.pt")


def test_a_missing_checkpoint_is_named_with_what_to_do(here):
    with pytest.raises(OSError, match=r"nothing\.pt: no such checkpoint(?s:.*)give another model"):
        read_weights("nothing.pt")
