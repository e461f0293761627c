"""plot.py: the numbers that it reads, the picture that it draws, and what it leaves out."""

import errno
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

import plot


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
    """All text in a picture."""
    import matplotlib

    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


# -----------------------------------------------------------------------------
# reading


def test_the_axis_is_steps_tokens_or_hours_and_a_pause_does_not_count(tmp_path):
    folder = write_run(tmp_path / "a")
    with open(folder / "metrics.jsonl", "a") as file:  # stopped for a day, then resumed
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


def test_values_that_are_not_numbers_are_left_out(tmp_path):
    folder = write_run(tmp_path / "a")
    with open(folder / "metrics.jsonl", "a") as file:
        print('{"event": "val", "step": 11, "time": 400, "loss": NaN}', file=file)
        print('{"event": "val", "step": 12, "time": 400, "loss": "low"}', file=file)
    run = plot.Run(folder)
    assert len(run.series("val", "loss", "steps")[0]) == 2
    assert run.left_out["val lines without a usable loss"] == 2


# -----------------------------------------------------------------------------
# drawing


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
        ((), "no run given: name a folder"),
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


def test_a_full_disk_is_one_line_and_keeps_the_earlier_picture(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "run")
    plot.plot(plot.PlotConfig(runs=(folder,)))
    before = (folder / "curves.png").read_bytes()
    capsys.readouterr()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(sys, "argv", ["plot.py", str(folder)])
    with pytest.raises(SystemExit) as stop:
        plot.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "curves.png cannot be written (No space left on device): make room, or give" in error
    assert (folder / "curves.png").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_the_loss_of_gpt2_is_drawn_only_if_every_run_is_on_fineweb_edu(tmp_path):
    edu = plot.Run(write_run(tmp_path / "a", "hub HuggingFaceFW/fineweb-edu sample-10BT train"))
    other = plot.Run(write_run(tmp_path / "b"))
    assert "GPT-2 124M: 3.2924" in texts(plot.draw([edu], "steps")[0])
    assert "3.2924" not in texts(plot.draw([other], "steps")[0])
    assert "3.2924" not in texts(plot.draw([edu, other], "steps")[0])


def test_the_legend_names_the_settings_that_differ(tmp_path):
    a = plot.Run(write_run(tmp_path / "a", max_lr=1e-3, out_dir="a"))
    b = plot.Run(write_run(tmp_path / "b", max_lr=2e-3, out_dir="b"))
    assert plot.labels([a, b]) == ["a: max_lr 0.001", "b: max_lr 0.002"]
    assert plot.labels([a]) == ["a"]


def test_the_legend_leaves_out_a_setting_that_an_older_run_did_not_have(tmp_path):
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


def test_layers_are_lines_for_one_run_and_a_range_for_several(tmp_path):
    runs = [plot.Run(write_run(tmp_path / name)) for name in "ab"]
    for run in runs:
        run.events["stats"] = [
            {"step": step, "hours": 0, "update_ratio": [1e-3, 2e-3, 3e-3, 4e-3]} for step in (0, 4)
        ]
    figure, missing = plot.draw(runs[:1], "steps")
    assert "update / weight size" not in missing and "residual stream, RMS" in missing
    legend = [text.get_text() for text in figure.legends[1].get_texts()]
    assert legend == ["embeddings", "block 1", "block 3"]
    assert len(figure.axes[-1].lines) == 5, "four layers and the usual aim"
    axes = plot.draw(runs, "steps")[0].axes[-1]
    assert len(axes.lines) == 3 and len(axes.collections) == 2, "two medians, two ranges"


@pytest.mark.parametrize(
    ("n_upper", "n_lower", "rows"),  # a row's six columns, each with the number of its panel
    [
        (4, 0, ["000111", "222333"]),
        (3, 0, ["000000", "111222"]),
        (1, 1, ["000000", "111111"]),
        (2, 3, ["000111", "223344"]),
        (0, 2, ["000111"]),
        (0, 0, []),
    ],
)
def test_panels_fill_every_row(n_upper, n_lower, rows):
    grid = [[""] * 6 for _ in rows]
    for i, (row, columns) in enumerate(plot.grid_cells(n_upper, n_lower)):
        for column in range(6)[columns]:
            grid[row][column] += str(i)
    assert ["".join(row) for row in grid] == rows


def test_numbers_beside_an_axis_have_three_digits_and_a_unit():
    numbers = (0.5, 999, 524288, 1.5e6, 9.85e9)
    assert [plot.short(number) for number in numbers] == ["0.5", "999", "524k", "1.5M", "9.85B"]


def test_smoothing_keeps_a_straight_line_and_halves_noise():
    line = np.linspace(0, 1, 200)
    assert plot.smoothed(line)[20:-20] == pytest.approx(line[20:-20])
    noise = np.random.default_rng(0).normal(size=2000)
    assert plot.smoothed(noise).std() < 0.2
