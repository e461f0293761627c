"""Two processes under torchrun do what one process does."""

import pytest
from conftest import RUN, flags, losses, read_metrics, run_command_line, run_train


def run_two_ranks(data_dir, out_dir, **changes):
    settings = flags(**{**RUN, "data_dir": data_dir, "out_dir": out_dir, **changes})
    result = run_command_line("train_gpt2.py", *settings, ranks=2)
    assert result.returncode == 0, result.stderr
    return result


# Muon's bfloat16 makes more of the ranks' other order of summing
@pytest.mark.parametrize(("optimizer", "within"), [("adamw", 1e-5), ("muon", 1e-4)])
def test_two_ranks_equal_one_process(data_dir, tmp_path, optimizer, within):
    run_train(data_dir, tmp_path / "one", optimizer=optimizer)
    result = run_two_ranks(data_dir, tmp_path / "two", optimizer=optimizer)
    assert result.stdout.count("step 5: validation loss") == 1, "rank 0 alone prints"
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert len(losses(one)) == 10
    for a, b in zip(losses(one), losses(two), strict=True):
        assert a == pytest.approx(b, abs=within)
    validation = [[m["loss"] for m in run if m["event"] == "val"] for run in (one, two)]
    assert validation[0] == pytest.approx(validation[1], abs=within)


def test_a_mistake_is_printed_once(data_dir, tmp_path):
    settings = flags(**{**RUN, "data_dir": data_dir, "out_dir": tmp_path, "micro_batch_size": 3})
    result = run_command_line("train_gpt2.py", *settings, ranks=2)
    assert result.returncode != 0
    assert result.stderr.count("train_gpt2.py: error: micro_batch_size 3") == 1
    assert 'train_gpt2.py", line' not in result.stderr, "torchrun has a traceback of its own"
