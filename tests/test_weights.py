"""A model's weights are found by name, or without one."""

import pytest
import torch
from conftest import save

from common import weights
from common.cli import plain
from common.huggingface import write_huggingface
from common.weights import read_weights


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


def test_a_missing_checkpoint_is_named_with_what_to_do(here):
    with pytest.raises(OSError, match=r"nothing\.pt: no such checkpoint(?s:.*)give another model"):
        read_weights("nothing.pt")
