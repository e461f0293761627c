"""common/compare.py: which runs are seeds of one group, and what is said about groups."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import write_run

from common.compare import Group, aligned, differ_only_in_seed, grouped, seed_lines, target_lines
from common.metrics import Curves


def add_validation(run: Curves, step: int, loss: float) -> Curves:
    with open(run.path, "a") as file:
        print(json.dumps({"event": "val", "step": step, "time": 0, "loss": loss}), file=file)
    return Curves(run.path.parent)


def seeds(folder, losses, **config) -> list[Curves]:
    """Runs of seeds 0, 1, ... that end at these losses."""
    return [
        Curves(write_run(folder / f"{folder.name}{i}", val=(10.0, loss), seed=i, **config))
        for i, loss in enumerate(losses)
    ]


def names(runs: list[Curves]) -> list[list[str]]:
    return [group.names for group in grouped(runs)]


# -----------------------------------------------------------------------------
# groups


def test_runs_that_differ_only_in_seed_are_a_group(tmp_path):
    a = seeds(tmp_path / "a", [3, 3], out_dir="x", target_loss=3.0)
    other = seeds(tmp_path / "b", [3, 3], max_lr=1.0, target_loss=4.0)
    runs = [a[0], other[0], a[1], other[1]]
    assert names(runs) == [["a0", "a1"], ["b0", "b1"]]


def branched(folder: Path, seed: int, trunk: dict, step: int = 5, **config) -> Curves:
    """A run whose file begins with the lines of its trunk, as that of a branch does."""
    lines = (write_run(folder / "trunk", seed=seed, **trunk) / "metrics.jsonl").read_text()
    branch = {**trunk, "branch_from": str(folder / "trunk" / "c.pt"), **config}
    run = write_run(folder / "branch", seed=seed, **branch) / "metrics.jsonl"
    first, *others = run.read_text().splitlines(keepends=True)
    run.write_text(lines + json.dumps({**json.loads(first), "step": step}) + "\n" + "".join(others))
    return Curves(run)


def test_branches_of_equal_trunks_are_seeds_of_one_group(tmp_path):
    trunk, end = {"max_steps": 100}, {"max_steps": 20}
    a, b = (branched(tmp_path / str(seed), seed, trunk, **end) for seed in (1, 2))
    assert differ_only_in_seed(a, b)
    assert a.settings()["branch_from"] == "step 5" and a.settings()["trunk's max_steps"] == 100
    others = [
        branched(tmp_path / "later", 3, trunk, step=6, **end),
        branched(tmp_path / "other end", 3, trunk, max_steps=21),
        branched(tmp_path / "other trunk", 3, {"max_steps": 100, "max_lr": 1.0}, **end),
        Curves(write_run(tmp_path / "no trunk", seed=3, branch_from="c.pt", **end)),
        Curves(write_run(tmp_path / "no branch", seed=3, **end)),
    ]
    assert not any(differ_only_in_seed(a, other) for other in others)


def test_a_branch_whose_last_start_is_damaged_is_compared_by_its_path(tmp_path):
    run = branched(tmp_path, 1, {"max_steps": 100}, max_steps=20)
    with open(run.path, "a") as file:
        print('{"event": "run", "step": 6, "time": 9, "config": null}', file=file)
        print('{"event": "run", "step": 7, "time": 9, "device": "cpu"}', file=file)
    assert "branch_from" not in Curves(run.path).settings()
    lines = run.path.read_text().splitlines(keepends=True)
    run.path.write_text("".join(lines[:-2] + lines[-1:]))
    assert Curves(run.path).settings()["branch_from"] == str(tmp_path / "trunk" / "c.pt")


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"seed": 1}, {"seed": 1}),  # the same run again is no second sample
        ({}, {}),  # old or damaged files, which do not name the seed
        ({"seed": 1}, {}),
        ({"seed": 1}, {"seed": 2, "max_lr": 1.0}),
        ({"seed": 1}, {"seed": 2, "branch_from": "a"}),
    ],
)
def test_other_runs_are_not_a_group(tmp_path, one, two):
    runs = [
        Curves(write_run(tmp_path / "a", **one)),
        Curves(write_run(tmp_path / "b", **two)),
    ]
    assert names(runs) == [["a"], ["b"]]


def test_a_setting_that_is_not_given_is_as_one_that_an_older_version_did_not_have(tmp_path):
    new = Curves(write_run(tmp_path / "new", seed=1, branch_from=None))
    old = Curves(write_run(tmp_path / "old", seed=2))
    assert names([new, old]) == [["new", "old"]]


@pytest.mark.parametrize("fact", ["device", "data", "git_hash"])
def test_runs_of_different_devices_data_or_code_are_not_a_group(tmp_path, fact):
    one, two = seeds(tmp_path / "a", [3, 3])
    one.about[fact], two.about[fact] = "one", "two"
    assert len(grouped([one, two])) == 2
    two.about[fact] = "one"
    assert len(grouped([one, two])) == 1


def test_what_changed_in_a_trunk_counts_too(tmp_path):
    whole = branched(tmp_path / "1", 1, {"max_steps": 6}, max_steps=20)
    longer = branched(tmp_path / "2", 2, {"max_steps": 6}, max_steps=20)
    lines = longer.path.read_text().splitlines(keepends=True)
    first = json.loads(lines[0])
    shorter = {**first, "config": {**first["config"], "max_steps": 5}}
    lines[:1] = [json.dumps(shorter) + "\n", json.dumps({**first, "step": 2}) + "\n"]
    longer.path.write_text("".join(lines))
    longer = Curves(longer.path)
    assert longer.settings()["trunk's max_steps until step 2"] == 5
    assert not differ_only_in_seed(whole, longer)


def restarted(folder: Path, seed: int, *starts: tuple[int, int]) -> Curves:
    """A run that was started at these steps, with these budgets."""
    path = write_run(folder / str(seed), seed=seed) / "metrics.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    run = json.loads(first)
    lines = [
        json.dumps({**run, "step": step, "config": {**run["config"], "max_steps": budget}}) + "\n"
        for step, budget in starts
    ]
    path.write_text("".join([*lines, *others]))
    return Curves(path)


def test_a_run_that_got_a_longer_budget_on_the_way_is_no_seed_of_others(tmp_path):
    longer = restarted(tmp_path, 1, (0, 20), (15, 40))
    assert longer.settings()["max_steps until step 15"] == 20
    assert differ_only_in_seed(longer, restarted(tmp_path, 2, (0, 20), (15, 40)))
    whole = restarted(tmp_path, 3, (0, 40), (7, 40))
    assert not differ_only_in_seed(longer, whole)
    again = restarted(tmp_path, 4, (0, 20), (0, 40))  # the first start left no step
    assert differ_only_in_seed(whole, again)


def test_folders_of_the_same_name_are_told_apart_by_their_whole_path(tmp_path):
    runs = [Curves(write_run(tmp_path / name / "log")) for name in "ab"]
    assert names(runs) == [[str(tmp_path / "a" / "log")], [str(tmp_path / "b" / "log")]]


# -----------------------------------------------------------------------------
# curves on common positions


def test_curves_are_interpolated_only_where_all_of_them_are_known():
    long = np.array([0.0, 2, 4, 6, 8]), np.array([0.0, 20, 40, 60, 80])
    short = np.array([1.0, 5]), np.array([100.0, 500])
    x, y = aligned([long, short])
    assert x.tolist() == [1, 5]
    assert y.tolist() == [[10, 50], [100, 500]]
    x, y = aligned([(np.array([0.0, 10]), np.array([0.0, 100])), long])
    assert x.tolist() == [0, 8] and y.tolist() == [[0, 80], [0, 80]]


def test_curves_without_a_common_range_have_no_positions():
    curve = np.array([0.0, 1]), np.array([1.0, 2])
    assert len(aligned([curve, (np.array([5.0]), np.array([1.0]))])[0]) == 0
    assert len(aligned([])[0]) == 0


def test_layers_are_aligned_one_by_one_and_another_number_of_layers_is_left_out():
    two = np.array([[1.0, 10.0], [3.0, 30.0]])
    x, y = aligned([(np.array([0.0, 2]), two), (np.array([0.0, 1, 2]), np.ones((3, 2)))])
    assert x.tolist() == [0, 2] and y.shape == (2, 2, 2) and y[0].tolist() == two.tolist()
    _, y = aligned([(np.array([0.0, 2]), two), (np.array([0.0, 2]), np.ones((2, 3)))])
    assert y.shape == (1, 2, 2)


# -----------------------------------------------------------------------------
# the final loss


def test_a_run_that_went_further_is_compared_at_the_common_step_and_named(tmp_path):
    runs = seeds(tmp_path / "a", [3.0, 3.2])
    runs[1] = add_validation(runs[1], 20, 1.0)
    (group,) = grouped(runs)
    assert group.last_losses() == (10, [3.0, 3.2])
    line, gap = seed_lines([group])
    assert line.startswith("a0 and 1 more seed: n = 2, validation loss at step 10: mean 3.1000")
    assert gap == "a0 and 1 more seed: a1 went on after step 10, the last that all have"


def test_a_run_without_a_validation_is_named_and_does_not_count(tmp_path):
    runs = seeds(tmp_path / "a", [3.0, 3.2, 3.4])
    del runs[2].events["val"]
    line, gap = seed_lines(grouped(runs))
    assert "n = 2, validation loss at step 10: mean 3.1000" in line
    assert gap == "a0 and 2 more seeds: a2 has no val lines and is left out there"


def test_runs_without_a_common_validation_have_no_mean(tmp_path):
    runs = seeds(tmp_path / "a", [3.0, 3.2])
    runs[0].events["val"], runs[1].events["val"] = (
        run.events["val"][i:][:1] for i, run in enumerate(runs)
    )
    groups = [*grouped(runs), *grouped(seeds(tmp_path / "b", [3.0, 3.2], max_lr=1.0))]
    lines = seed_lines(groups)
    assert lines[0] == "a0 and 1 more seed: no validation loss at a common step"
    assert lines[-1].endswith("no test without a validation loss in each")


def test_two_groups_are_compared_by_welchs_test(tmp_path):
    a = seeds(tmp_path / "a", [3.0, 3.1, 3.2])
    b = seeds(tmp_path / "b", [2.0, 2.2, 2.4], max_lr=1.0)
    alone = Curves(write_run(tmp_path / "c", max_lr=2.0, seed=0))
    # by hand: v = 0.01 / 3 and 0.04 / 3, error 0.1291, 50 / 17 = 2.94 degrees of freedom; then
    # with mpmath: t_0.975 = 3.21876, p = 0.0064576
    assert seed_lines(grouped([*a, *b, alone]))[2:] == [
        "a0 and 2 more seeds against b0 and 2 more seeds: difference of the mean losses 0.9000, "
        "95% interval 0.4845 to 1.3155; Welch's t 6.97, 2.9 degrees of freedom, "
        "two-sided p = 0.0065"
    ]


def test_three_groups_are_compared_in_pairs(tmp_path):
    runs = [
        run
        for rate, name in enumerate("abc")
        for run in seeds(tmp_path / name, [rate + 1.0, rate + 1.1], max_lr=rate)
    ]
    lines = seed_lines(grouped(runs))
    assert sum("against" in line for line in lines) == 3
    assert lines[-1] == "each p is that of a single test; these are 3 tests"


def test_groups_without_any_spread_have_no_test(tmp_path):
    a = seeds(tmp_path / "a", [3.0, 3.0])
    b = seeds(tmp_path / "b", [2.0, 2.0], max_lr=1.0)
    assert seed_lines(grouped([*a, *b]))[-1].endswith(
        "difference of the mean losses 1.0000; "
        "no test: it needs two losses in each group, and some spread"
    )


def test_groups_that_ended_at_different_steps_are_compared_with_a_word_about_it(tmp_path):
    a = seeds(tmp_path / "a", [3.0, 3.1])
    b = [
        add_validation(run, 20, 2.0 + i)
        for i, run in enumerate(seeds(tmp_path / "b", [3, 3], max_lr=1.0))
    ]
    assert "(at different steps, 10 and 20)" in seed_lines(grouped([*a, *b]))[-1]


# -----------------------------------------------------------------------------
# the way to a target


def test_seeds_that_all_reached_the_target_have_a_mean_with_its_interval(tmp_path):
    (group,) = grouped(seeds(tmp_path / "a", [0.0, 2.0]))
    lines = target_lines(group, 5.0)
    assert lines[:2] == [
        "a0: reached loss 5 after 500 tokens, 5.0 steps, 150.0 training seconds",
        "a1: reached loss 5 after 625 tokens, 6.2 steps, 187.5 training seconds",
    ]
    # steps 5 and 6.25: mean 5.625, t_0.975(1) = 12.7062, times 1.25 / 2
    assert lines[2] == (
        "a0 and 1 more seed: all 2 seeds reached loss 5; mean and 95% interval: "
        "tokens 562 (-232 to 1,357), steps 5.6 (-2.3 to 13.6), seconds 168.8 (-69.5 to 407.0)"
    )


def test_a_mean_does_not_leave_out_the_seed_that_did_not_reach_the_target(tmp_path):
    (group,) = grouped(seeds(tmp_path / "a", [4.0, 6.0]))
    lines = target_lines(group, 5.0)
    assert lines[1] == "a1: did not reach loss 5; its best is 6.0000, at step 10"
    assert lines[2] == "a0 and 1 more seed: 1 of 2 seeds reached loss 5, so there is no mean"


def test_the_target_of_a_run_counts_unless_another_is_given(tmp_path):
    one, two = seeds(tmp_path / "a", [4.0, 4.0], target_loss=5.0)
    one.about["config"]["target_loss"] = 7.0
    (group,) = grouped([one, two])
    own = target_lines(group)
    assert len(own) == 2 and "reached loss 7 " in own[0] and "reached loss 5 " in own[1]
    assert all("loss 6" in line for line in target_lines(group, 6.0))
    one.about["config"]["target_loss"] = None
    assert len(target_lines(group)) == 1


def test_unknown_seconds_and_missing_validations_are_said(tmp_path):
    one, two = seeds(tmp_path / "a", [4.0, 4.0])
    del one.events["train"][0]["dt"]
    lines = target_lines(Group([one, two], ["a0", "a1"]), 5.0)
    assert "unknown training seconds" in lines[0] and lines[2].endswith(", seconds unknown")
    del one.events["val"]
    assert target_lines(Group([one], ["a0"]), 5.0) == [
        "a0: no validation loss, so it is unknown if it reached loss 5"
    ]
