"""A run's numbers: what is written, what is drawn, what is said of the rest."""

import json
import os
import pty
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, RUN, command, flags, losses, read_metrics, run_command_line, run_train

import plot
from train_gpt2 import Machine, TrainConfig, make_optimizers, train_step

CPU = Machine(torch.device("cpu"), torch.float32)


def write_run(folder: Path, source: str = "local", steps: int = 10, **config) -> Path:
    """Write the numbers of a short run by hand; one step takes 36 seconds and 100 tokens."""
    folder.mkdir(parents=True)
    config = {"data_dir": "x", "grad_clip": 1.0, "max_lr": 1e-3, **config}
    lines = [{"event": "run", "step": 0, "time": 0, "config": config, "data_source": source}]
    lines.append({"event": "val", "step": 0, "time": 0, "loss": 10.0})
    for i in range(steps):
        train = {"event": "train", "step": i, "time": 36 * (i + 1), "loss": 9.0 - i, "lr": 1e-3}
        train |= {"grad_norm": 1.5, "batch_tokens": 100, "tokens_seen": 100 * (i + 1), "mfu": None}
        lines.append({**train, "tokens_per_sec": 50.0})
    lines.append({"event": "val", "step": steps, "time": 36 * steps, "loss": 3.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def texts(figure) -> str:
    """All that is written in a picture."""
    import matplotlib

    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


# -----------------------------------------------------------------------------
# reading and drawing


def test_the_axis_is_steps_tokens_or_hours_and_a_pause_does_not_count(tmp_path):
    folder = write_run(tmp_path / "a")
    with open(folder / "metrics.jsonl", "a") as file:  # stopped for a day, then gone on with
        print(json.dumps({"event": "run", "step": 10, "time": 90_000, "config": {}}), file=file)
        print(json.dumps({"event": "val", "step": 12, "time": 90_036, "loss": 2.0}), file=file)
    run = plot.Run(folder)
    assert run.series("val", "loss", "steps")[0].tolist() == [0, 10, 12]
    assert run.series("val", "loss", "tokens")[0].tolist() == [0, 1000, 1000]
    assert run.series("val", "loss", "hours")[0] == pytest.approx([0, 0.1, 0.11])
    assert run.series("train", "loss", "steps")[1].tolist() == [9.0 - i for i in range(10)]


@pytest.mark.parametrize(
    "damage",
    [
        b'{"event": "val", "st',
        b"\xff\xfe\x00garbage\n",
        b"[]\n3\n",
        b'{"event": "train", "step": "x", "time": 0}\n',
        b'{"event": ["val"], "step": 1, "time": 1}\n',
    ],
)
def test_damaged_lines_are_left_out_and_counted(tmp_path, capsys, damage):
    folder = write_run(tmp_path / "a")
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(damage)
    out = plot.plot(plot.PlotConfig(runs=(folder,)))
    assert "left out: " in capsys.readouterr().out
    assert out == folder / "curves.png" and out.read_bytes().startswith(b"\x89PNG")
    assert len(plot.Run(folder).series("val", "loss", "steps")[0]) == 2


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    folder = write_run(tmp_path / "a")
    with open(folder / "metrics.jsonl", "a") as file:
        print('{"event": "val", "step": 11, "time": 400, "loss": NaN}', file=file)
        print('{"event": "val", "step": 12, "time": 400, "loss": "low"}', file=file)
    run = plot.Run(folder)
    assert len(run.series("val", "loss", "steps")[0]) == 2
    assert run.left_out["val lines without a usable loss"] == 2


def test_an_empty_run_gives_a_picture_that_says_so(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").touch()
    plot.plot(plot.PlotConfig(runs=(tmp_path,), out=tmp_path / "a.svg"))
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()[:1000]
    assert "no numbers for: training loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (("nowhere",), "nowhere: no such file"),
        (("run", "--out", "a.pdf"), "a.pdf: give a name that ends in .png or .svg"),
        (("run", "--out", "none/a.png"), "none: no such folder"),
        ((), "plot.py --help"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, args, what):
    write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plot.py", *args])
    with pytest.raises(SystemExit) as stop:
        plot.main()
    complaint = capsys.readouterr().err
    assert stop.value.code == 2 and complaint.count("\n") == 1 and what in complaint
    assert [path.name for path in tmp_path.rglob("*.*")] == ["metrics.jsonl"]


def test_gpt2s_loss_is_drawn_on_fineweb_edu_alone(tmp_path):
    edu = plot.Run(write_run(tmp_path / "a", "hub HuggingFaceFW/fineweb-edu sample-10BT train"))
    other = plot.Run(write_run(tmp_path / "b"))
    assert "GPT-2 124M: 3.2924" in texts(plot.draw([edu], "steps")[0])
    assert "3.2924" not in texts(plot.draw([other], "steps")[0])
    assert "3.2924" not in texts(plot.draw([edu, other], "steps")[0])


def test_the_legend_says_what_differs_between_runs(tmp_path):
    a = plot.Run(write_run(tmp_path / "a", max_lr=1e-3, out_dir="a"))
    b = plot.Run(write_run(tmp_path / "b", max_lr=2e-3, out_dir="b"))
    assert plot.labels([a, b]) == ["a: max_lr 0.001", "b: max_lr 0.002"]
    assert plot.labels([a]) == ["a"]


def test_the_legend_is_silent_on_settings_that_an_older_run_did_not_have(tmp_path):
    new = plot.Run(write_run(tmp_path / "new", optimizer="muon"))
    assert plot.labels([plot.Run(write_run(tmp_path / "old")), new]) == ["old", "new"]


def test_long_legends_stay_inside_the_picture_and_axes_have_plain_numbers(tmp_path):
    names = [f"a_setting_of_this_name_{i}" for i in range(12)]
    runs = [
        plot.Run(write_run(tmp_path / str(value), **dict.fromkeys(names, value)))
        for value in (1, 2)
    ]
    figure, _ = plot.draw(runs, "steps")
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.x1 <= figure.bbox.x1 and names[-1] in texts(figure)
    tops = [ax.get_window_extent().y1 for ax in figure.axes]
    assert legend.y0 >= max(tops), "above the panels"
    assert "10^" not in texts(figure), "losses from 0 to 10 need no powers"


def test_skipped_steps_and_the_clip_line_are_marked(tmp_path):
    folder = write_run(tmp_path / "a", grad_clip=0.7)
    with open(folder / "metrics.jsonl", "a") as file:
        print('{"event": "skip", "step": 10, "time": 400, "why": "nan"}', file=file)
    shown = texts(plot.draw([plot.Run(folder)], "steps")[0])
    assert "1 skipped step" in shown and "clipped to 0.7" in shown


def test_smoothing_keeps_a_straight_line_and_halves_noise():
    line = np.linspace(0, 1, 200)
    assert plot.smoothed(line)[20:-20] == pytest.approx(line[20:-20])
    noise = np.random.default_rng(0).normal(size=2000)
    assert plot.smoothed(noise).std() < 0.2


# -----------------------------------------------------------------------------
# statistics by layer


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_layer_statistics_are_what_a_hand_computes(small_model, optimizer):
    optimizers = make_optimizers(small_model, TrainConfig(optimizer=optimizer), CPU)
    x, y = torch.randint(0, 300, (2, 4, 16))
    before = {name: p.detach().clone() for name, p in small_model.named_parameters()}
    with torch.no_grad():
        stream = small_model.transformer.wte(x[:1]) + small_model.transformer.wpe(torch.arange(16))
        rms = [stream.square().mean().sqrt().item()]
        for block in small_model.transformer.h:
            stream = block(stream)
            rms.append(stream.square().mean().sqrt().item())
    small_model(x, y).backward()
    grads = {name: p.grad.clone() for name, p in small_model.named_parameters()}
    small_model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with plot.LayerStats(small_model, optimizers) as stats:
        batches = iter([(x, y)])
        result = train_step(small_model, optimizers, scaler, batches, 1, 0.1, CPU)  # clipped
    found = stats.values(result.grad_norm)
    assert found["residual_rms"] == pytest.approx(rms, rel=1e-5)
    layers = [["transformer.wte.", "transformer.wpe."]]
    layers += [[f"transformer.h.{i}."] for i in range(small_model.config.n_layer)]
    for i, prefixes in enumerate(layers):
        names = [name for name in before if name.startswith(tuple(prefixes))]
        norm = torch.cat([grads[name].flatten() for name in names]).norm().item()
        assert found["grad_norm"][i] == pytest.approx(norm, rel=1e-4)
        after = dict(small_model.named_parameters())
        matrices = [name for name in names if before[name].dim() == 2]
        moved = torch.cat([(after[n].detach() - before[n]).flatten() for n in matrices]).norm()
        size = torch.cat([before[n].flatten() for n in matrices]).norm()
        assert found["update_ratio"][i] == pytest.approx((moved / size).item(), rel=1e-4)


def test_watching_layers_changes_no_bit_of_a_run(data_dir, tmp_path):
    settings = dict(optimizer="muon", dropout=0.1)
    plain = run_train(data_dir, tmp_path / "plain", **settings)
    watched = run_train(data_dir, tmp_path / "watched", stats_every=4, **settings)
    assert losses(plain) == losses(watched)
    stats = [m for m in watched if m["event"] == "stats"]
    assert [m["step"] for m in stats] == [0, 4, 8]
    assert not [m for m in plain if m["event"] == "stats"]
    _, missing = plot.draw([plot.Run(tmp_path / "watched")], "steps")
    assert "update / weight size" not in missing


# -----------------------------------------------------------------------------
# writing


def test_a_resumed_log_cuts_what_is_written_again(tmp_path):
    events = ["train", "skip", "stats", "val", "sample", "checkpoint"]
    lines = [{"event": event, "step": step} for step in (4, 5, 6) for event in events]
    lines[3]["loss"] = lines[9]["loss"] = lines[15]["loss"] = 1.0
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"event": "tra'
    (tmp_path / "metrics.jsonl").write_text(text)
    plot.RunLog(tmp_path, 5, is_main=True).close()
    kept = {(m["event"], m["step"]) for m in read_metrics(tmp_path)}
    by_update = {(event, 4) for event in ("train", "skip", "stats")}
    assert kept == by_update | {(e, s) for e in ("val", "sample", "checkpoint") for s in (4, 5)}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_dashboard_that_is_not_installed_is_an_error_before_anything(
    data_dir, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=f"pip install {name}"):
        run_train(data_dir, tmp_path / "log", **{name: True})
    assert not (tmp_path / "log").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_a_terminal_gets_a_status_line_and_a_pipe_gets_plain_lines(data_dir, tmp_path):
    settings = {**RUN, "data_dir": data_dir, "checkpoint_every": 0}
    plain = run_command_line("train_gpt2.py", *flags(**settings, out_dir=tmp_path / "plain"))
    assert "step 9: loss " in plain.stdout and "\r" not in plain.stdout
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 100))
    env = {name: value for name, value in os.environ.items() if name != "CI"}
    process = subprocess.Popen(
        command("train_gpt2.py", *flags(**settings, out_dir=tmp_path / "terminal")),
        cwd=ROOT, env={**env, "OMP_NUM_THREADS": "1"}, stdout=theirs,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not data:
            break
        shown += data
    assert process.wait() == 0
    shown = shown.decode()
    assert "left, best validation loss" in shown, shown
    assert "tok/s" in shown and "\r" in shown
    assert "step 9: loss" not in shown and "step 10: validation loss" in shown


# -----------------------------------------------------------------------------
# dashboards (make test-dashboards installs them)


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
