"""A run that is stopped and resumed is the run that was never stopped."""

import json

import numpy as np
import pytest
import torch
from conftest import losses, read_metrics, run_train

from common.checkpoint import build_model
from common.cli import explain
from train_gpt2 import GPT, GPTConfig, Windows, load_model


def final_weights(out_dir, step):
    state = torch.load(out_dir / f"ckpt_{step:06d}.pt", weights_only=True)
    return state["model"], state["optimizer"]["state"]


def assert_same_weights(a, b):
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_ramp_tokens": 1500, "batch_ramp_start": 64},
        {"dropout": 0.2},
        {"dtype": "float16"},
        {"dtype": "bfloat16", "shuffle": False},
        {"optimizer": "muon", "schedule": "linear"},
        {"optimizer": "muon", "dtype": "float16"},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_stop_and_resume_changes_no_bit(data_dir, tmp_path, changes):
    # 10 steps of 16 windows: 160 of 110 there are, so that the border of an epoch is crossed
    keep_all = {"checkpoint_every": 3, "keep_checkpoints": 0}
    whole = run_train(data_dir, tmp_path / "whole", **keep_all, **changes)
    folder = tmp_path / "resumed"
    folder.mkdir()
    name = "ckpt_000006.pt"
    (folder / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    (folder / "metrics.jsonl").write_text((tmp_path / "whole" / "metrics.jsonl").read_text())
    resumed = run_train(data_dir, folder, resume=True, checkpoint_every=3, **changes)
    assert losses(resumed) == losses(whole)
    steps = [m["step"] for m in whole if m["event"] == "train"]
    assert steps == list(range(len(steps))) and len(steps) >= 10
    last = len(steps)
    for a, b in zip(
        final_weights(tmp_path / "whole", last), final_weights(folder, last), strict=True
    ):
        assert a.keys() == b.keys()
    assert_same_weights(final_weights(folder, last)[0], final_weights(tmp_path / "whole", last)[0])


def test_a_float16_run_continues_with_the_scale_that_it_had(data_dir, tmp_path):
    run_train(data_dir, tmp_path, dtype="float16", checkpoint_every=5, keep_checkpoints=0)
    (tmp_path / "ckpt_000010.pt").unlink()
    state = torch.load(tmp_path / "ckpt_000005.pt", weights_only=True)
    state["scaler"]["scale"] = 512.0  # a new scaler begins at 65536
    torch.save(state, tmp_path / "ckpt_000005.pt")
    run_train(data_dir, tmp_path, dtype="float16", resume=True)
    after = torch.load(tmp_path / "ckpt_000010.pt", weights_only=True)
    assert after["scaler"]["scale"] == 512.0


def test_a_resumed_run_logs_and_saves_nothing_a_second_time(data_dir, tmp_path):
    every = dict(eval_every=5, sample_every=5, checkpoint_every=5, vocab_size=50257)
    whole = run_train(data_dir, tmp_path, keep_checkpoints=0, **every)
    (tmp_path / "ckpt_000010.pt").unlink()
    before = (tmp_path / "ckpt_000005.pt").stat().st_mtime_ns
    resumed = run_train(data_dir, tmp_path, resume=True, keep_checkpoints=0, **every)
    assert (tmp_path / "ckpt_000005.pt").stat().st_mtime_ns == before
    for event, count in (("val", 1), ("sample", 2), ("checkpoint", 1)):
        found = [[m["step"] for m in run if m["event"] == event] for run in (whole, resumed)]
        steps = [5, 10] if event == "checkpoint" else [0, 5, 10]
        assert found == [[step for step in steps for _ in range(count)]] * 2, event


def test_resuming_with_another_micro_batch_trains_on_the_same_batches(data_dir, tmp_path):
    whole = run_train(data_dir, tmp_path, checkpoint_every=5)
    for path in tmp_path.glob("ckpt_000010.pt"):
        path.unlink()
    resumed = run_train(data_dir, tmp_path, resume=True, micro_batch_size=2)
    for a, b in zip(losses(whole), losses(resumed), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_checkpoints_hold_what_the_format_says_and_no_more_than_asked(data_dir, tmp_path):
    run_train(data_dir, tmp_path, checkpoint_every=2, keep_checkpoints=2)
    assert sorted(p.name for p in tmp_path.glob("ckpt_*")) == ["ckpt_000008.pt", "ckpt_000010.pt"]
    state = torch.load(tmp_path / "ckpt_000010.pt", weights_only=True)
    assert set(state) == {
        "model", "optimizer", "scaler", "step", "windows_seen", "model_config", "train_config",
        "rng", "data",
    }  # fmt: skip
    assert state["step"] == 10 and state["windows_seen"] == 160
    assert "lm_head.weight" not in state["model"]
    assert all(w.dtype == torch.float32 for w in state["model"].values())
    json.dumps([state["model_config"], state["train_config"]])
    model = load_model(tmp_path / "ckpt_000010.pt")
    assert not model.training
    assert_same_weights(dict(model.named_parameters()), state["model"])


def test_a_finished_run_says_so_and_a_missing_one_begins(data_dir, tmp_path, capsys):
    run_train(data_dir, tmp_path, resume=True, max_steps=2)
    assert "nothing to resume" in capsys.readouterr().out
    before = (tmp_path / "metrics.jsonl").read_text()
    run_train(data_dir, tmp_path, resume=True, max_steps=2)
    assert "finished" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_another_run_is_not_resumed_but_another_length_is(data_dir, tmp_path, capsys):
    run_train(data_dir, tmp_path, max_steps=4)
    with pytest.raises(
        ValueError, match=r"seed was 1337, is now 7; .*n_layer was 2, is now 3"
    ) as e:
        run_train(data_dir, tmp_path, resume=True, max_steps=4, seed=7, n_layer=3)
    assert "--init_from takes over the weights alone" in explain(e.value)
    longer = run_train(data_dir, tmp_path, resume=True, max_steps=6)
    assert "max_steps was 4, is now 6" in capsys.readouterr().out
    assert [m["step"] for m in longer if m["event"] == "train"] == list(range(6))


def test_init_from_starts_with_the_weights_of_a_checkpoint(data_dir, tmp_path):
    run_train(data_dir, tmp_path / "first", max_steps=4)
    checkpoint = tmp_path / "first" / "ckpt_000004.pt"
    sizes = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "vocab_size"))
    second = run_train(
        data_dir, tmp_path / "second", init_from=str(checkpoint), max_steps=1, dropout=0.2, **sizes
    )
    config = torch.load(tmp_path / "second" / "ckpt_000001.pt", weights_only=True)["model_config"]
    assert config["dropout"] == 0.2 and config["n_embd"] == 32
    end = read_metrics(tmp_path / "first", "val")[-1]["loss"]
    assert next(m["loss"] for m in second if m["event"] == "val") == end
    with pytest.raises(ValueError, match=r"n_layer 3: .* has 2"):
        run_train(
            data_dir, tmp_path / "third", init_from=str(checkpoint), **{**sizes, "n_layer": 3}
        )


def test_a_shorter_context_keeps_the_first_positions_and_a_longer_one_is_an_error(
    data_dir, tmp_path
):
    run_train(data_dir, tmp_path / "first", max_steps=4)
    sizes = dict.fromkeys(("n_layer", "n_head", "n_embd", "vocab_size"))
    start = dict(init_from=str(tmp_path / "first"), max_steps=1, val_tokens=512, **sizes)
    short = run_train(data_dir, tmp_path / "short", block_size=8, **start)
    model = load_model(tmp_path / "first")
    x, y = Windows(data_dir, "val", 8, 300).read(np.arange(64))
    with torch.no_grad():
        expected = model(x, y).item()
    assert next(m["loss"] for m in short if m["event"] == "val") == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"block_size 32: .*first has 16: leave it out"):
        run_train(data_dir, tmp_path / "long", block_size=32, **start)


def test_weights_of_another_shape_are_refused_by_name():
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=100)
    weights = dict(GPT(config).named_parameters())
    weights["transformer.ln_f.bias"] = torch.zeros(9)
    with pytest.raises(ValueError, match=r"transformer.ln_f.bias"):
        build_model(GPT, GPTConfig, vars(config), weights)
    with pytest.raises(ValueError, match="another architecture"):
        build_model(GPT, GPTConfig, {**vars(config), "n_layer": 2}, weights)
