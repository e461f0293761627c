"""common/metrics.py: what is read from a run's metrics.jsonl."""

import json

from common.metrics import run_facts

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


def test_damaged_lines_and_unknown_facts_are_left_out(tmp_path):
    text = '{"event": "run", "step": 0, "data_source": null, "git_hash": null}\n'
    text += '3\n[]\n{}\n\n{"event": "val", "step": 1}\n{"event": "val", "step": "x", "loss": 1}\n'
    text += '{"event": "val", "step": 2, "loss": 3.5}\n\0\0\n{"event": "val", "step": 3, "lo\xff'
    (tmp_path / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    assert run_facts(tmp_path) == {"step": 2, "val_loss": 3.5}
