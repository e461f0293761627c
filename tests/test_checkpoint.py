"""Checkpoint files: written whole or not at all, checked when read, built into a model."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, all_files, full_disk, save, spread

from common.checkpoint import (
    RUN_KEYS,
    SAME_IN_ONE_RUN,
    build_model,
    check_same_run,
    checkpoint_paths,
    crop_positions,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from common.cli import explain, plain
from train_gpt2 import GPT, GPTConfig, TrainConfig, load_model

IDX = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(1))
STATE = {"model": {"weight": torch.ones(3)}, "model_config": {}, **dict.fromkeys(RUN_KEYS)}


@pytest.fixture
def model(small_model: GPT) -> GPT:
    """300 tokens, padded to 384."""
    return spread(small_model)


@pytest.fixture
def weights(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


# -----------------------------------------------------------------------------
# writing


@pytest.mark.parametrize(("keep", "left"), [(1, [11]), (2, [10, 11]), (0, [1, 2, 9, 10, 11])])
def test_the_newest_are_kept_and_no_other_file_is_deleted(tmp_path, keep, left):
    others = {tmp_path / "ckpt_best.pt", tmp_path / "ckpt_000000.pt.old", tmp_path / "model.pt"}
    for path in others:
        path.write_text("precious")
    for step in (1, 2, 9, 10, 11):
        write_checkpoint(tmp_path / f"ckpt_{step}.pt", STATE, keep)  # by number: 10 is after 9
    assert checkpoint_paths(tmp_path) == [tmp_path / f"ckpt_{step}.pt" for step in left[::-1]]
    assert set(tmp_path.iterdir()) == others | set(checkpoint_paths(tmp_path))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_never_written(model, tmp_path, bad):
    save(model, tmp_path / "ckpt_000001.pt")
    before = all_files(tmp_path)
    with torch.no_grad():
        model.transformer.h[1].ln_2.bias[5] = bad
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.ln_2\.bias is not finite"):
        save(model, tmp_path / "ckpt_000002.pt")
    with pytest.raises(ValueError, match=r"not finite, so .*ckpt_000001\.pt was not written"):
        save(model, tmp_path / "ckpt_000001.pt")
    assert all_files(tmp_path) == before


def test_a_full_disk_is_named_and_leaves_the_earlier_checkpoint(model, tmp_path):
    path = save(model, tmp_path / "ckpt_000001.pt")
    before = all_files(tmp_path)
    for target in path, tmp_path / "ckpt_000002.pt":
        with full_disk(), pytest.raises(OSError, match="File too large"):
            save(model, target)
    assert all_files(tmp_path) == before


# -----------------------------------------------------------------------------
# reading


def test_a_checkpoint_reads_back_as_the_same_model(model, tmp_path):
    again = load_model(save(model, tmp_path / "ckpt_000001.pt"))
    assert again.config == model.config and not again.training
    assert again(IDX).equal(model(IDX))


def test_one_flipped_bit_in_a_weight_is_found(model, weights, tmp_path):
    path = save(model, tmp_path / "ckpt_000001.pt")
    data = path.read_bytes()
    for weight in weights.values():
        place = data.index(weight.numpy().tobytes())
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        torch.load(path, weights_only=True)  # does not see it
        with pytest.raises(ValueError, match=r"ckpt_000001\.pt: not a whole checkpoint"):
            read_checkpoint(path)
    path.write_bytes(data)
    assert read_checkpoint(path)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 no", {"model": Trap()}, {"step": 1}, [1, 2]])
def test_a_file_that_is_not_a_checkpoint_is_refused_and_runs_no_code(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ckpt_000001.pt"
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        torch.save(data, path)
    with pytest.raises(ValueError, match=r"ckpt_000001\.pt: not a whole checkpoint") as error:
        load_model(path)
    assert explain(error.value).endswith(": give another model")
    assert not (tmp_path / "sprung").exists()


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ckpt_000001\.pt: no such checkpoint") as error:
        load_model(tmp_path / "ckpt_000001.pt")
    assert explain(error.value).endswith(": give another model")


def test_the_newest_whole_checkpoint_is_read_and_damaged_ones_are_named(tmp_path):
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) is None
    for step in (1, 2, 3):
        write_checkpoint(tmp_path / f"ckpt_{step}.pt", {**STATE, "step": step}, keep=0)
    assert newest_checkpoint(tmp_path, said.append)["step"] == 3 and said == []
    for name in RUN_KEYS:  # weights alone are a model, but no run can continue from them
        state = {key: value for key, value in STATE.items() if key != name}
        write_checkpoint(tmp_path / "ckpt_4.pt", state, keep=0)
        assert newest_checkpoint(tmp_path, said.append)["step"] == 3
        assert f"ckpt_4.pt: not the checkpoint of a run (no {name})" in said.pop()
    (tmp_path / "ckpt_4.pt").unlink()
    (tmp_path / "ckpt_3.pt").write_bytes(b"")
    assert newest_checkpoint(tmp_path, said.append)["step"] == 2
    assert len(said) == 1 and "ckpt_3.pt: not a whole checkpoint" in said[0]
    for step in (1, 2):
        (tmp_path / f"ckpt_{step}.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        newest_checkpoint(tmp_path, said.append)
    assert len(said) == 4


# -----------------------------------------------------------------------------
# a model from weights


def test_float32_weights_are_not_copied(model, weights):
    again = build_model(GPT, GPTConfig, vars(model.config), weights)
    for name, p in again.named_parameters():
        assert p.data_ptr() == weights[name].data_ptr(), name
        assert p.requires_grad and p.is_leaf and isinstance(p, torch.nn.Parameter), name
    assert again.eval()(IDX).equal(model(IDX))


def test_a_vocabulary_that_needs_no_padding_is_not_copied_either(model):
    config = dataclasses.replace(model.config, vocab_size=384)
    weights = dict(GPT(config).named_parameters())
    wte = build_model(GPT, GPTConfig, vars(config), weights).transformer.wte.weight
    assert wte.data_ptr() == weights["transformer.wte.weight"].data_ptr()


def test_padding_is_the_mean_row(model, weights):
    rows = weights["transformer.wte.weight"][:300]
    again = build_model(
        GPT, GPTConfig, vars(model.config), {**weights, "transformer.wte.weight": rows}
    )
    wte = again.transformer.wte.weight
    assert wte.shape == (384, 32) and wte[:300].equal(rows)
    assert wte[300:].equal(rows.mean(dim=0).expand(84, -1))
    assert again.eval()(IDX)[..., :300].equal(model(IDX)[..., :300])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_float32(model, weights, dtype):
    given = {name: weight.to(dtype) for name, weight in weights.items()}
    again = build_model(GPT, GPTConfig, vars(model.config), given)
    for name, p in again.named_parameters():
        assert p.dtype == torch.float32 and p.equal(weights[name].to(dtype).float()), name


def test_the_head_is_tied_to_the_embedding(model, weights):
    wte = weights["transformer.wte.weight"]
    for given in weights, {**weights, "lm_head.weight": wte.clone()}:
        again = build_model(GPT, GPTConfig, vars(model.config), given)
        assert again.lm_head.weight is again.transformer.wte.weight
        assert len(list(again.parameters())) == len(weights)
    with pytest.raises(ValueError, match=r"another architecture: lm_head\.weight"):
        build_model(GPT, GPTConfig, vars(model.config), {**weights, "lm_head.weight": wte + 1})


def test_fewer_positions_compute_the_same_and_are_saved_without_the_others(
    model, weights, tmp_path
):
    sizes, cropped = crop_positions(plain(model.config), weights, 5)
    again = build_model(GPT, GPTConfig, sizes, cropped).eval()
    assert again.config == dataclasses.replace(model.config, block_size=5)
    assert again(IDX[:, :5]).equal(model(IDX[:, :5]))
    name = "transformer.wpe.weight"
    assert cropped[name].untyped_storage().nbytes() == 5 * 32 * 4
    assert weights[name].shape == (16, 32) and model.config.block_size == 16
    for all_positions in (16, 17, None):
        assert crop_positions(plain(model.config), weights, all_positions)[1] is weights


NAMES = [name for name, _ in GPT(GPTConfig(**{**SMALL, "n_layer": 1})).named_parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_or_wrong_tensor_is_named(name):
    config = GPTConfig(**{**SMALL, "n_layer": 1})
    weights = dict(GPT(config).named_parameters())
    right = weights.pop(name)
    with pytest.raises(ValueError, match=rf"another architecture: {name} is missing"):
        build_model(GPT, GPTConfig, vars(config), weights)
    for wrong in right[:-1], right[None]:
        with pytest.raises(ValueError, match=rf"another architecture: {name} is \("):
            build_model(GPT, GPTConfig, vars(config), {**weights, name: wrong})
    for wrong in right.sum(), 5, [1.0]:
        with pytest.raises(ValueError, match="another architecture"):
            build_model(GPT, GPTConfig, vars(config), {**weights, name: wrong})


@pytest.mark.parametrize("name", ["transformer.h.2.ln_1.weight", "transformer.wte.bias", "bias"])
def test_an_extra_tensor_is_named(model, weights, name):
    with pytest.raises(ValueError, match=rf"another architecture: GPT-2 has no tensor {name}"):
        build_model(GPT, GPTConfig, vars(model.config), {**weights, name: torch.zeros(32)})


@pytest.mark.parametrize("weights", [{}, [], None, {5: torch.zeros(3)}])
def test_a_checkpoint_without_named_tensors_is_refused(model, weights):
    with pytest.raises(ValueError, match="another architecture"):
        build_model(GPT, GPTConfig, vars(model.config), weights)


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "ckpt_000002.pt")

    for step in (1, 2):
        (tmp_path / f"ckpt_{step:06d}.pt").write_bytes(b"weights")
    monkeypatch.setattr("common.checkpoint.zipfile.ZipFile", refuse)
    with pytest.raises(PermissionError):  # to go on from an older one would lose steps
        newest_checkpoint(tmp_path, pytest.fail)


@pytest.mark.parametrize("name", ["n_layer", "n_embd", "block_size", "vocab_size"])
@pytest.mark.parametrize("size", [10**9, 2**31 - 2])
def test_a_huge_model_with_small_weights_is_refused_before_it_is_built(
    model, weights, tmp_path, name, size
):
    def build(config: GPTConfig) -> None:
        raise AssertionError("this would take all memory")

    config = dataclasses.replace(model.config, **{name: size})
    last = {f"transformer.h.{size - 1}.ln_1.weight": torch.zeros(32)}
    for given in weights, {**weights, **last}:
        with pytest.raises(ValueError, match="another architecture"):
            build_model(build, GPTConfig, vars(config), given)
    path = tmp_path / "ckpt_000001.pt"
    write_checkpoint(path, {"model": weights, "model_config": plain(config)}, keep=0)
    with pytest.raises(ValueError, match=r"ckpt_000001\.pt: weights of another architecture"):
        load_model(path)


@pytest.mark.parametrize("config", [{"n_layer": "2"}, {"width": 3}, {"n_head": 0}, {"n_head": 7}])
def test_a_configuration_that_makes_no_sense_is_one_clear_error(model, tmp_path, config):
    path = save(model, tmp_path / "ckpt_000001.pt")
    state = read_checkpoint(path)
    write_checkpoint(path, {**state, "model_config": {**state["model_config"], **config}}, keep=0)
    with pytest.raises(ValueError, match=r"ckpt_000001\.pt: ") as error:
        load_model(path)
    assert explain(error.value).endswith(": give another model")


# -----------------------------------------------------------------------------
# the same run


@pytest.fixture
def run(model: GPT) -> dict[str, Any]:
    """What a checkpoint says about its run."""
    settings = plain(TrainConfig(**SMALL, max_steps=10))
    return {"train_config": settings, "model_config": plain(model.config), "data": "a"}


def test_the_same_run_may_change_where_and_how_long_it_runs(run):
    check_same_run(run, run["train_config"], "a")
    moved = TrainConfig(
        **SMALL, max_steps=20, warmup_steps=run["train_config"]["warmup_steps"], device="cpu",
        dtype="bfloat16", micro_batch_size=2, out_dir=Path("elsewhere"), eval_every=1, resume=True,
    )  # fmt: skip
    check_same_run(run, plain(moved), "a")


@pytest.mark.parametrize("name", [*SAME_IN_ONE_RUN, *SMALL, "dropout"])
def test_every_setting_that_makes_another_run_is_named(run, name):
    before = run["train_config"][name]
    with pytest.raises(ValueError, match=rf"another run \({name} was {before}, is now other\)"):
        check_same_run(run, {**run["train_config"], name: "other"}, "a")


def test_all_differences_are_listed_and_sizes_not_given_are_ignored(run):
    now = {**run["train_config"], "seed": 7, "n_layer": 3}
    expected = r"\(seed was 1337, is now 7; n_layer was 2, is now 3; data was a, is now b\)"
    with pytest.raises(ValueError, match=expected):
        check_same_run(run, now, "b")
    check_same_run(run, {**run["train_config"], **dict.fromkeys(SMALL)}, "a")


def test_a_run_of_an_older_version_which_lacks_a_setting_can_be_resumed(run):
    before = dict(run["train_config"])
    del before["decay_fraction"]
    check_same_run({**run, "train_config": before}, run["train_config"], "a")


def test_a_branch_may_change_the_schedule_and_the_rates_but_not_the_data_or_the_model(run):
    may = dict(schedule="wsd", max_lr=1.0, warmup_steps=1, max_steps=9, weight_decay=0.0)
    check_same_run(run, {**run["train_config"], **may}, "a", branch=True)
    for change in dict(seed=7), dict(total_batch_size=9), dict(optimizer="muon"), dict(n_layer=9):
        with pytest.raises(ValueError, match=r"a branch cannot change .*was"):
            check_same_run(run, {**run["train_config"], **change}, "a", branch=True)
    with pytest.raises(ValueError, match=r"a branch cannot change .data was a, is now b"):
        check_same_run(run, run["train_config"], "b", branch=True)
