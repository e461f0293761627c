"""A run that is stopped and resumed, or branched, is the run that was never stopped."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RUN, losses, read_metrics, run_train

import train_gpt2
from common.checkpoint import build_model, read_checkpoint
from common.cli import explain
from train_gpt2 import GPT, GPTConfig, TrainConfig, Windows, learning_rate, load_model


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
    longer = run_train(data_dir, tmp_path, resume=True, max_steps=6, val_tokens=32)
    changed = f"max_steps was 4, is now 6; val_tokens was {RUN['val_tokens']}, is now 32"
    assert changed in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"branch_from was None, is now elsewhere"):
        run_train(data_dir, tmp_path, resume=True, max_steps=6, branch_from=Path("elsewhere"))
    with pytest.raises(ValueError, match=r"init_from was None, is now gpt2"):
        run_train(data_dir, tmp_path, resume=True, max_steps=6, init_from="gpt2")
    assert [m["step"] for m in longer if m["event"] == "train"] == list(range(6))


# -----------------------------------------------------------------------------
# the end, and other ends


def end_of(metrics: list[dict]) -> list[tuple]:
    return [(m["step"], m["why"]) for m in metrics if m["event"] == "end"]


def test_a_run_ends_at_the_first_validation_loss_at_the_target_and_stays_finished(
    data_dir, tmp_path, capsys
):
    whole = run_train(data_dir, tmp_path / "whole", eval_every=2, max_steps=12)
    loss = {m["step"]: m["loss"] for m in whole if m["event"] == "val"}
    assert loss[4] < loss[2] and end_of(whole) == [(12, "budget")]
    settings = dict(eval_every=2, max_steps=12, sample_every=100, vocab_size=300)
    short = run_train(data_dir, tmp_path / "short", target_loss=loss[4], **settings)
    assert losses(short) == losses(whole)[:4] and end_of(short) == [(4, "target")]
    assert (tmp_path / "short" / "ckpt_000004.pt").exists() and (tmp_path / "short" / "hf").exists()
    before = (tmp_path / "short" / "metrics.jsonl").read_text()
    run_train(data_dir, tmp_path / "short", target_loss=loss[4], resume=True, **settings)
    assert "the run is finished after 4 steps" in capsys.readouterr().out
    assert (tmp_path / "short" / "metrics.jsonl").read_text() == before
    longer = run_train(data_dir, tmp_path / "short", resume=True, **settings)
    assert losses(longer) == losses(whole), "without the target it goes on"
    assert end_of(longer) == [(4, "target"), (12, "budget")]


@pytest.mark.parametrize("at", [4, 10], ids=["in the middle", "at the end"])
def test_a_signal_ends_an_evaluation_at_once_and_the_resumed_run_repeats_it(
    data_dir, tmp_path, monkeypatch, at
):
    whole = run_train(data_dir, tmp_path / "whole", eval_every=2)
    signals, passes, validation = [], [], train_gpt2.validation_loss

    def arrive() -> None:
        time.sleep(0.5)
        signals.append(15)

    def evaluate(model, windows, *args):
        if len(losses(read_metrics(tmp_path / "cut"))) == at:  # in its first pass
            read = windows.read
            windows.read = lambda rows: passes.append(rows) or arrive() or read(rows)
        return validation(model, windows, *args)

    monkeypatch.setattr("train_gpt2.cli.collect_stop_signals", lambda: signals)
    monkeypatch.setattr(train_gpt2, "validation_loss", evaluate)
    with pytest.raises(SystemExit) as stopped:
        run_train(data_dir, tmp_path / "cut", eval_every=2, val_tokens=2000)
    assert stopped.value.code == 128 + 15 and len(passes) == 1
    cut = read_metrics(tmp_path / "cut")
    assert (tmp_path / "cut" / f"ckpt_{at:06d}.pt").exists() and end_of(cut) == [(at, "signal")]
    assert not (tmp_path / "cut" / "hf").exists(), "an export would look like the end"
    assert cut[-2]["event"] == "checkpoint" and cut[-2]["seconds"] < 0.5, "saving alone"
    monkeypatch.undo()
    resumed = run_train(data_dir, tmp_path / "cut", eval_every=2, val_tokens=2000, resume=True)
    steps = [[m["step"] for m in run if m["event"] == "val"] for run in (whole, resumed)]
    assert steps[0] == steps[1] and losses(resumed) == losses(whole)
    assert end_of(resumed)[-1] == (10, "budget") and (tmp_path / "cut" / "hf").exists()


def test_a_target_that_was_passed_before_the_checkpoint_ends_the_resumed_run(data_dir, tmp_path):
    run_train(data_dir, tmp_path, eval_every=2, checkpoint_every=5, keep_checkpoints=0)
    (tmp_path / "ckpt_000010.pt").unlink()
    with open(tmp_path / "metrics.jsonl", "a") as file:  # lower than what is validated at the end
        print('{"event": "val", "step": 4, "time": 0, "loss": 1.0}', file=file)
    run = run_train(data_dir, tmp_path, eval_every=2, resume=True, target_loss=1.5)
    assert end_of(run) == [(5, "target")] and run[-3]["event"] == "val" and run[-3]["loss"] > 1.5


def test_at_the_target_a_run_samples_and_scores_as_at_its_end(data_dir, tmp_path):
    settings = dict(sample_every=100, eval_every=2, vocab_size=50257, target_loss=10.6)
    run = run_train(data_dir, tmp_path, **settings)
    (end,) = (m for m in run if m["event"] == "end")
    assert end["why"] == "target" and 0 < end["step"] < 10
    assert {m["step"] for m in run if m["event"] == "sample"} == {0, end["step"]}


def test_the_totals_of_a_killed_and_resumed_run_count_every_step_once(data_dir, tmp_path):
    run_train(data_dir, tmp_path, checkpoint_every=4, keep_checkpoints=0, max_steps=8)
    (tmp_path / "ckpt_000008.pt").unlink()  # as if it had been killed before that
    run = run_train(data_dir, tmp_path, resume=True, max_steps=8)
    (end,) = (m for m in run if m["event"] == "end")
    assert end["train_seconds"] == pytest.approx(sum(m.get("dt", 0) for m in run))
    assert end["tokens_seen"] == 8 * 256 and end["step"] == 8
    assert end["tokens_per_sec"] == pytest.approx(8 * 256 / end["train_seconds"])
    assert end["val_loss"] == [m["loss"] for m in run if m["event"] == "val"][-1]
    seconds = [m["seconds"] for m in run if m["event"] == "val"]
    assert end["eval_seconds"] == pytest.approx(sum(seconds)) and len(seconds) == 3


def test_a_run_killed_before_its_last_line_is_brought_to_its_end(data_dir, tmp_path):
    run_train(data_dir, tmp_path, max_steps=4)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert '"event": "end"' in lines[-1]
    path.write_text("".join(lines[:-1]))
    shutil.rmtree(tmp_path / "hf")
    again = run_train(data_dir, tmp_path, resume=True, max_steps=4)
    assert end_of(again) == [(4, "budget")] and (tmp_path / "hf").exists()
    assert [m["step"] for m in again if m["event"] == "val"] == [0, 4]


WSD = dict(schedule="wsd", eval_every=3, max_steps=12)


@pytest.fixture(scope="module")
def trunk(data_dir, tmp_path_factory):
    """The folder of a run with a constant rate until step 10, and checkpoints on the way."""
    folder = tmp_path_factory.mktemp("trunk")
    run_train(data_dir, folder, checkpoint_every=3, keep_checkpoints=0, dropout=0.1, **WSD)
    return folder


def test_a_branch_with_the_same_settings_is_the_run_itself_to_the_last_bit(
    data_dir, trunk, tmp_path
):
    before = {path: path.read_bytes() for path in trunk.rglob("*") if path.is_file()}
    branch = dict(branch_from=trunk / "ckpt_000006.pt", dropout=0.1, **WSD)
    metrics = run_train(data_dir, tmp_path / "branch", **branch)
    whole = read_metrics(trunk)
    assert losses(metrics) == losses(whole) and len(losses(whole)) == 12
    for event, name in ("val", "loss"), ("val", "bpb"):
        a, b = ([(m["step"], m[name]) for m in x if m["event"] == event] for x in (metrics, whole))
        assert a == b
    a, b = (read_checkpoint(path / "ckpt_000012.pt") for path in (tmp_path / "branch", trunk))
    assert_same_weights(a["model"], b["model"])
    for i, entry in b["optimizer"]["state"].items():
        assert_same_weights(a["optimizer"]["state"][i], entry)
    assert (a["windows_seen"], a["step"]) == (b["windows_seen"], b["step"])
    assert before == {path: path.read_bytes() for path in before}, "the trunk is only read"
    (end,) = (m for m in metrics if m["event"] == "end")
    assert end["train_seconds"] == pytest.approx(sum(m.get("dt", 0) for m in metrics))


def test_a_branch_may_have_another_end_and_can_be_resumed_itself(data_dir, trunk, tmp_path, capsys):
    settings = {**WSD, "branch_from": trunk, "dropout": 0.1, "checkpoint_every": 1}
    settings |= dict(max_steps=16, decay_fraction=0.25, schedule="linear", keep_checkpoints=0)
    first = run_train(data_dir, tmp_path / "branch", **settings)
    assert f"continuing after step 12, as a branch of {trunk}" in capsys.readouterr().out
    assert losses(first)[:12] == losses(read_metrics(trunk)), "it begins as its trunk"
    rates = [m["lr"] for m in first if m["event"] == "train"]
    config = TrainConfig(**{**RUN, "schedule": "linear", "max_steps": 16})
    expected = [learning_rate(config, 256 * s, 256, config.max_lr) for s in range(12, 16)]
    assert rates[12:] == expected and end_of(first) == [(16, "budget")]
    for step in (15, 16):
        (tmp_path / "branch" / f"ckpt_{step:06d}.pt").unlink()
    again = run_train(data_dir, tmp_path / "branch", resume=True, **settings)
    assert losses(again) == losses(first)
    for path in (tmp_path / "branch").glob("ckpt_*.pt"):
        path.unlink()  # as if it had been killed before its first checkpoint
    again = run_train(data_dir, tmp_path / "branch", resume=True, **settings)
    assert losses(again) == losses(first) and end_of(again) == [(16, "budget")]


def test_a_branch_says_what_it_changes_and_takes_the_command_of_its_trunk(
    data_dir, tmp_path, capsys
):
    run_train(data_dir, tmp_path / "first", max_steps=1)
    sizes = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "max_lr"))
    tuned = dict(init_from=str(tmp_path / "first"), max_steps=4, warmup_steps=0, **sizes)
    run_train(data_dir, tmp_path / "tuned", **tuned)
    capsys.readouterr()
    longer = {**tuned, "max_steps": 6, "branch_from": tmp_path / "tuned", "grad_clip": 0.5}
    run = run_train(data_dir, tmp_path / "branch", **longer)
    shown = capsys.readouterr().out
    assert "changed: max_steps was 4, is now 6; grad_clip was 1.0, is now 0.5\n" in shown
    peaks = [
        max(m["lr"] for m in run if m["event"] == "train" and m["step"] in s)
        for s in ((0,), (4, 5))
    ]
    assert peaks[1] < peaks[0] == pytest.approx(6e-5), "a tenth, as with --init_from alone"


def test_a_branch_that_is_resumed_without_its_origin_is_still_that_branch(data_dir, tmp_path):
    run_train(data_dir, tmp_path / "trunk", max_steps=2)
    first = dict(branch_from=tmp_path / "trunk" / "ckpt_000002.pt")
    run_train(data_dir, tmp_path / "b", max_steps=4, **first)
    run_train(data_dir, tmp_path / "b", max_steps=6, resume=True)
    run = run_train(data_dir, tmp_path / "b", max_steps=8, resume=True, **first)
    origins = {m["config"]["branch_from"] for m in run if m["event"] == "run" and m["step"] > 2}
    assert origins == {str(first["branch_from"])}
    moved = dict(branch_from=Path("elsewhere", "trunk", "ckpt_000002.pt"))
    run_train(data_dir, tmp_path / "b", max_steps=9, resume=True, **moved)
    with pytest.raises(ValueError, match=r"branch_from was .*trunk.*, is now .*other"):
        other = dict(branch_from=tmp_path / "other" / "ckpt_000002.pt")
        run_train(data_dir, tmp_path / "b", max_steps=10, resume=True, **other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(seed=7), r"a branch cannot change \(seed was 1337, is now 7\)"),
        (dict(init_from="gpt2"), r"a branch cannot change \(init_from was None, is now gpt2\)"),
        (dict(max_steps=12), r"has reached its budget at step 12: give a larger --max_steps"),
        (dict(target_loss=9.0), r"has reached its target at step 12: give a lower --target_loss"),
        (dict(branch_from=Path("nowhere.pt")), "nowhere.pt: no such checkpoint"),
        (dict(branch_from="no metrics"), None),
        (dict(branch_from="a model"), "not the checkpoint of a run"),
        (dict(branch_from="a folder"), "holds no checkpoint"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_branch_that_cannot_be_is_refused_and_leaves_nothing(
    data_dir, trunk, tmp_path, changes, message
):
    shutil.copy(trunk / "ckpt_000012.pt", tmp_path)
    (tmp_path / "empty").mkdir()
    state = read_checkpoint(trunk / "ckpt_000012.pt")
    torch.save({name: state[name] for name in ("model", "model_config")}, tmp_path / "model.pt")
    places = {"no metrics": "ckpt_000012.pt", "a model": "model.pt", "a folder": "empty"}
    settings = {**WSD, "branch_from": trunk, "dropout": 0.1, "max_steps": 16, **changes}
    if settings["branch_from"] in places:
        settings["branch_from"] = tmp_path / places[settings["branch_from"]]
    if message is None:  # a checkpoint that came alone: its steps are not known, but it goes on
        metrics = run_train(data_dir, tmp_path / "log", **settings)
        assert [m["step"] for m in metrics if m["event"] == "train"] == [12, 13, 14, 15]
        return
    with pytest.raises((ValueError, OSError), match=message):
        run_train(data_dir, tmp_path / "log", **settings)
    assert not (tmp_path / "log").exists()


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
