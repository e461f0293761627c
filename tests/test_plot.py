"""plot.py: the picture that it draws, what it prints, and what it leaves out."""

import errno
import os
import sys

import numpy as np
import pytest
from conftest import write_run

import plot
from common.compare import grouped


def texts(figure) -> str:
    """All text in a picture."""
    import matplotlib

    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


# -----------------------------------------------------------------------------
# damaged files


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
    assert len(plot.Curves(folder).series("val", "loss", "steps")[0]) == 2


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
        (("run", "--target_loss", "-1"), "target_loss -1.0: give a number above 0"),
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
    edu = plot.Curves(write_run(tmp_path / "a", "hub HuggingFaceFW/fineweb-edu sample-10BT train"))
    other = plot.Curves(write_run(tmp_path / "b"))
    assert "GPT-2 124M: 3.2924" in texts(plot.draw([edu], "steps")[0])
    assert "3.2924" not in texts(plot.draw([other], "steps")[0])
    assert "3.2924" not in texts(plot.draw([edu, other], "steps")[0])


def test_the_legend_names_the_settings_that_differ(tmp_path):
    a = plot.Curves(write_run(tmp_path / "a", max_lr=1e-3, out_dir="a"))
    b = plot.Curves(write_run(tmp_path / "b", max_lr=2e-3, out_dir="b"))
    assert plot.labels(grouped([a, b])) == ["a: max_lr 0.001", "b: max_lr 0.002"]
    assert plot.labels(grouped([a])) == ["a"]


def test_names_that_are_no_text_or_look_like_mathematics_are_shown(tmp_path):
    names = ["lr$2^x$", "a$b_{$", "c\x01d", "e\udcfff"]
    runs = [plot.Curves(write_run(tmp_path / name)) for name in names]
    labels = plot.labels(grouped(runs))
    assert labels == [r"lr\$2^x\$", r"a\$b_{\$", "c?d", "e?f"]
    plot.draw(runs, "steps")[0].savefig(tmp_path / "a.png")


def test_the_legend_leaves_out_a_setting_that_an_older_run_did_not_have(tmp_path):
    new = plot.Curves(write_run(tmp_path / "new", optimizer="muon"))
    old = plot.Curves(write_run(tmp_path / "old"))
    assert plot.labels(grouped([old, new])) == ["old", "new"]


def test_long_legends_stay_inside_the_picture_and_axes_have_plain_numbers(tmp_path):
    names = [f"a_setting_of_this_name_{i}" for i in range(12)]
    runs = [
        plot.Curves(write_run(tmp_path / str(value), **dict.fromkeys(names, value)))
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
    shown = texts(plot.draw([plot.Curves(folder)], "steps")[0])
    assert "1 skipped step" in shown and "clipped to 0.7" in shown


def test_layers_are_lines_for_one_run_and_a_range_for_several(tmp_path):
    runs = [plot.Curves(write_run(tmp_path / name)) for name in "ab"]
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


def test_seeds_become_their_mean_and_a_band_and_other_settings_a_curve_of_their_own(tmp_path):
    losses = ((9.0, 3.0), (9.2, 3.4), (9.4, 3.8))
    runs = [
        plot.Curves(write_run(tmp_path / f"a{i}", val=loss, seed=i))
        for i, loss in enumerate(losses)
    ]
    runs.append(plot.Curves(write_run(tmp_path / "b", val=(8.0, 2.0), seed=7, max_lr=1.0)))
    figure, _ = plot.draw(runs, "steps")
    for title in ("training loss", "validation loss"):
        (ax,) = [ax for ax in figure.axes if ax.get_title(loc="left").startswith(title)]
        assert len(ax.collections) == 1, "the band"
    mean, alone = ax.lines
    assert mean.get_ydata() == pytest.approx([9.2, 3.4]) and list(alone.get_ydata()) == [8, 2]
    band = ax.collections[0].get_paths()[0].vertices
    assert {(0, 9.0), (0, 9.4), (10, 3.0), (10, 3.8)} <= {tuple(point) for point in band}
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[0].startswith("a0 and 2 more seeds: max_lr 0.001\n")
    # deviation 0.4, t_0.975(2) = 4.302653
    spread = "n = 3, validation loss at step 10: mean 3.4000, standard deviation 0.4000"
    assert f"{spread}, 95% interval 2.4063 to 4.3937" in legend[0]
    assert legend[1] == "b: max_lr 1.0"
    assert "a band from the lowest to the highest" in texts(figure)


def test_the_band_of_a_noisy_panel_is_that_of_the_smoothed_curves(tmp_path):
    runs = [plot.Curves(write_run(tmp_path / str(i), steps=400, seed=i)) for i in range(2)]
    for run in runs:
        noise = np.random.default_rng(run.config("seed"))
        for entry in run.events["train"]:
            entry["loss"] = 5 + noise.normal()
    ax = plot.draw(runs, "steps")[0].axes[0]
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert np.ptp(band) < 3, "the noise itself spans about 6"


def test_hellaswag_has_one_standard_error_above_and_below_each_point(tmp_path):
    def bars(runs):
        figure, _ = plot.draw(runs, "steps")
        (ax,) = [ax for ax in figure.axes if "HellaSwag" in ax.get_title(loc="left")]
        (lines,) = [c for c in ax.collections if hasattr(c, "get_segments")]
        return [list(segment[:, 1]) for segment in lines.get_segments()]

    scores = [(0, 0.25, 10042), (10, 0.30, 10042)]
    run = plot.Curves(write_run(tmp_path / "a", hellaswag=scores, seed=1))
    error = 0.0045730  # sqrt(0.3 * 0.7 / 10041)
    assert bars([run])[1] == pytest.approx([0.30 - error, 0.30 + error], abs=1e-6)
    other = plot.Curves(write_run(tmp_path / "b", hellaswag=scores, seed=2))
    assert bars([run, other])[1] == pytest.approx([0.30 - error, 0.30 + error], abs=1e-6), (
        "the same questions: a second seed does not halve the error"
    )
    few = plot.Curves(write_run(tmp_path / "c", hellaswag=[(0, 1.0, 1), (10, 7, None)]))
    figure, _ = plot.draw([few], "steps")
    figure.draw_without_rendering()


def test_the_target_is_drawn_and_its_crossing_is_printed(tmp_path, capsys):
    own = write_run(tmp_path / "own", val=(10.0, 3.0), target_loss=6.5)
    none = write_run(tmp_path / "none", val=(10.0, 3.0))
    out = plot.plot(plot.PlotConfig(runs=(own, none), out=tmp_path / "a.svg"))
    lines, picture = capsys.readouterr().out.splitlines(), out.read_bytes()
    assert lines[0] == "own: reached loss 6.5 after 500 tokens, 5.0 steps, 150.0 training seconds"
    assert not any(line.startswith("none: ") for line in lines)
    # a target that is given counts for every run
    plot.plot(plot.PlotConfig(runs=(own, none), out=out, target_loss=2.0))
    lines = capsys.readouterr().out.splitlines()
    for line, name in zip(lines, ("own", "none"), strict=False):
        assert line == f"{name}: did not reach loss 2; its best is 3.0000, at step 10"
    assert out.read_bytes() != picture
    run = plot.Curves(own)
    assert "target: 6.5" in texts(plot.draw([run], "steps")[0])
    shown = texts(plot.draw([run], "steps", 2.0)[0])
    assert "target: 2" in shown and "6.5" not in shown


def test_the_test_of_two_groups_is_printed_and_a_damaged_seed_is_named(tmp_path, capsys):
    folders = [
        write_run(tmp_path / f"{rate}-{seed}", val=(9, rate + seed / 10), seed=seed, max_lr=rate)
        for rate in (1, 2)
        for seed in range(3)
    ]
    text = (folders[0] / "metrics.jsonl").read_text()
    (folders[0] / "metrics.jsonl").write_text(text[:-20])  # the last validation is cut off
    plot.plot(plot.PlotConfig(runs=tuple(folders), out=tmp_path / "a.svg"))
    out = capsys.readouterr().out
    assert "1-0 and 2 more seeds: 1-1 went on after step 0, the last that all have" in out
    assert "1-0 and 2 more seeds against 2-0 and 2 more seeds: " in out
    assert "(at different steps, 0 and 10)" in out and "two-sided p = " in out


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
