"""common/metrics.py: a run's metrics.jsonl, read: facts, curves, where it reached a loss."""

import json
import math
from pathlib import Path

import pytest
from conftest import write_run

from common.metrics import Curves, run_facts


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rewrite(folder: Path, lines: list[dict]) -> Curves:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return Curves(folder)


# -----------------------------------------------------------------------------
# curves


def test_the_axis_is_steps_tokens_or_hours_and_a_pause_does_not_count(tmp_path):
    folder = write_run(tmp_path / "a")
    with open(folder / "metrics.jsonl", "a") as file:  # stopped for a day, then resumed
        print(json.dumps({"event": "run", "step": 10, "time": 90_000, "config": {}}), file=file)
        print(json.dumps({"event": "val", "step": 12, "time": 90_036, "loss": 2.0}), file=file)
    run = Curves(folder)
    assert run.series("val", "loss", "steps")[0].tolist() == [0, 10, 12]
    assert run.series("val", "loss", "tokens")[0].tolist() == [0, 1000, 1000]
    assert run.series("val", "loss", "hours")[0] == pytest.approx([0, 0.1, 0.11])
    assert run.series("train", "loss", "steps")[1].tolist() == [9.0 - i for i in range(10)]


def test_values_that_are_not_numbers_are_left_out(tmp_path):
    folder = write_run(tmp_path / "a")
    with open(folder / "metrics.jsonl", "a") as file:
        print('{"event": "val", "step": 11, "time": 400, "loss": NaN}', file=file)
        print('{"event": "val", "step": 12, "time": 400, "loss": "low"}', file=file)
    run = Curves(folder)
    assert len(run.series("val", "loss", "steps")[0]) == 2
    assert run.left_out["val lines without a usable loss"] == 2


def test_what_was_left_out_is_counted_once_however_often_it_is_read(tmp_path):
    folder = write_run(tmp_path / "a")
    run = rewrite(folder, [*lines_of(folder), {"event": "val", "step": 11, "time": 400}])
    for _ in range(3):
        run.series("val", "loss", "steps")
    assert run.left_out == {"val lines without a usable loss": 1}


def test_a_damaged_number_of_any_kind_is_left_out(tmp_path):
    lines = lines_of(write_run(tmp_path / "a"))
    lines[3]["tokens_seen"] = 10**27
    stats = [[1, 2, 3], [[1], [2, 3], 3], [4, 5, 6]]
    lines += [{"event": "stats", "step": i, "time": 400, "rms": v} for i, v in enumerate(stats)]
    run = rewrite(tmp_path / "a", lines)
    assert run.series("stats", "rms", "tokens")[1].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert run.left_out["stats lines without a usable rms"] == 1


def test_housekeeping_does_not_count_as_a_setting_but_a_branch_does(tmp_path):
    run = Curves(
        write_run(tmp_path / "a", target_loss=3.0, profile_step=5, branch_from="b", seed=1)
    )
    assert {"seed": 1, "branch_from": "b"}.items() <= run.settings().items()
    assert not {"target_loss", "profile_step"} & set(run.settings())


def test_accuracies_have_their_standard_error_also_in_old_files(tmp_path):
    scores = [(0, 0.25, 401), (10, 0.5, 1), (20, 0.5, "x"), (30, "x", 5)]
    positions, errors = Curves(write_run(tmp_path / "a", hellaswag=scores)).accuracy_errors("steps")
    assert positions.tolist() == [0, 10]
    assert errors[0] == pytest.approx(math.sqrt(0.25 * 0.75 / 400)) and math.isnan(errors[1])


# -----------------------------------------------------------------------------
# the way to a loss


def test_the_crossing_is_interpolated_between_the_two_validations_around_it(tmp_path):
    folder = write_run(tmp_path / "a", val=(10.0, 2.0))
    middle = {"event": "val", "step": 4, "time": 150, "loss": 6.0}
    run = rewrite(folder, [*lines_of(folder), middle])
    found = run.crossing(5.0)  # a quarter of the way from step 4 to step 10
    assert (found.steps, found.tokens, found.seconds) == pytest.approx((5.5, 550, 165))
    assert run.crossing(6.0).steps == 4 and run.crossing(2.0).steps == 10
    assert run.crossing(1.9) is None


def test_the_first_crossing_counts_if_the_loss_rises_again(tmp_path):
    folder = write_run(tmp_path / "a", val=(10.0, 2.0))
    points = [(2, 4.0), (4, 8.0)]
    more = [{"event": "val", "step": step, "time": 0, "loss": loss} for step, loss in points]
    assert rewrite(folder, [*lines_of(folder), *more]).crossing(4.0).steps == 2


def test_a_run_that_starts_below_the_target_crosses_it_at_its_first_validation(tmp_path):
    found = Curves(write_run(tmp_path / "a", val=(3.0, 2.0))).crossing(3.5)
    assert (found.steps, found.tokens, found.seconds) == (0, 0, 0)


def test_a_run_without_validations_crosses_nothing(tmp_path):
    folder = write_run(tmp_path / "a")
    lines = [line for line in lines_of(folder) if line["event"] != "val"]
    assert rewrite(folder, lines).crossing(3.5) is None


def index_of_step_3(lines: list[dict]) -> int:
    return next(i for i, x in enumerate(lines) if (x["event"], x["step"]) == ("train", 3))


def test_the_time_of_skipped_steps_counts(tmp_path):
    folder = write_run(tmp_path / "a")
    lines = lines_of(folder)
    lines[index_of_step_3(lines)] = {
        "event": "skip",
        "step": 3,
        "time": 150,
        "why": "nan",
        "dt": 7.0,
    }
    run = rewrite(folder, lines)
    assert (run.seconds_at(3), run.seconds_at(4), run.seconds_at(10)) == (90, 97, 277)


@pytest.mark.parametrize("damage", ["a skip without dt", "a train without dt", "a lost line"])
def test_training_seconds_are_unknown_and_not_guessed_if_a_step_has_no_time(tmp_path, damage):
    folder = write_run(tmp_path / "a")
    lines = lines_of(folder)
    index = index_of_step_3(lines)
    line = lines.pop(index)
    if damage != "a lost line":
        del line["dt"]
        lines.insert(index, {**line, "event": damage.split()[1]})
    run = rewrite(folder, lines)
    assert run.seconds_at(3) == 90 and run.seconds_at(4) is None and run.seconds_at(10) is None
    found = run.crossing(5.0)
    assert found.seconds is None and found.tokens == pytest.approx(1000 * 5 / 7)


# -----------------------------------------------------------------------------
# what is known of a run

FACTS = {
    "step": 6, "data_source": "hub org/corpus", "git": "f00", "val_loss": 3.5,
    "hellaswag_acc": 0.28, "hellaswag_acc_norm": 0.29, "hellaswag_n": 42,
    "hellaswag_style": "harness",
}  # fmt: skip
LINES = [
    {"event": "run", "step": 0, "data_source": "hub org/corpus", "git_hash": "f00"},
    {"event": "val", "step": 0, "loss": 10.9},
    {"event": "hellaswag", "step": 0, "style": "harness", "acc": 0.25, "acc_norm": 0.26, "n": 9},
    {"event": "train", "step": 4, "loss": 5.0},
    {"event": "val", "step": 5, "loss": 3.5},
    {"event": "hellaswag", "step": 5, "style": "harness", "acc": 0.28, "acc_norm": 0.29, "n": 42},
    {"event": "train", "step": 5, "loss": 4.0},
]  # fmt: skip


def test_the_facts_of_a_run_are_the_newest_up_to_a_step(tmp_path):
    assert run_facts(tmp_path) == {} == run_facts(tmp_path / "none")
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert run_facts(tmp_path) == FACTS == run_facts(tmp_path, 6)
    assert run_facts(tmp_path, 5) == {**FACTS, "step": 5}, "step 5 of train is the sixth update"
    first = {"val_loss": 10.9, "hellaswag_acc": 0.25, "hellaswag_acc_norm": 0.26, "hellaswag_n": 9}
    assert run_facts(tmp_path, 4) == {**FACTS, **first, "step": 0}


def test_a_loss_that_is_no_number_is_not_replaced_by_an_older_one(tmp_path):
    text = '{"event": "val", "step": 0, "loss": 5.9}\n{"event": "val", "step": 4, "loss": null}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert run_facts(tmp_path) == {"step": 4}
    assert run_facts(tmp_path, 3) == {"step": 0, "val_loss": 5.9}


def test_damaged_lines_and_unknown_facts_are_left_out(tmp_path):
    text = '{"event": "run", "step": 0, "data_source": null, "git_hash": null}\n'
    text += '3\n[]\n{}\n\n{"event": "val", "step": 1}\n{"event": "val", "step": "x", "loss": 1}\n'
    text += '{"event": "val", "step": 2, "loss": 3.5}\n\0\0\n{"event": "val", "step": 3, "lo\xff\n'
    text += '{"event": "val", "step": 2, "loss": [4.5]}\n{"event": "val", "step": 2, "loss": "4"}\n'
    text += '{"event": "hellaswag", "step": 2, "acc": null, "n": "100", "style": 3}\n'
    (tmp_path / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    assert run_facts(tmp_path) == {"step": 2, "val_loss": 3.5}
