"""The command that converts checkpoints to Hugging Face folders and back."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, all_files, full_disk, read_metrics, run_train, save, spread

from common.cli import explain, plain
from common.huggingface import write_huggingface
from export import ExportConfig, export, main
from train_gpt2 import GPT, load_model

IDX = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(small_model: GPT) -> GPT:
    return spread(small_model)


@pytest.fixture
def folder(model: GPT, tmp_path: Path) -> Path:
    """A small export."""
    write_huggingface(plain(model.config), dict(model.named_parameters()), tmp_path / "hf")
    return tmp_path / "hf"


def test_an_exported_model_converts_back_to_a_checkpoint_that_can_be_trained(
    model, data_dir, tmp_path
):
    source = save(model, tmp_path / "ckpt_000007.pt")
    export(ExportConfig(source=str(source), target=tmp_path / "hf"))
    target = tmp_path / "run" / "ckpt_000000.pt"
    export(ExportConfig(source=str(tmp_path / "hf"), target=target))
    assert load_model(target)(IDX)[..., :300].equal(load_model(source)(IDX)[..., :300])

    sizes = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "vocab_size"))
    start = dict(**sizes, init_from=str(target), max_steps=1, warmup_steps=0)
    metrics = run_train(data_dir, tmp_path / "tuned", **start)
    assert [m["step"] for m in metrics if m["event"] == "train"] == [0]
    with pytest.raises(ValueError, match="another run"):
        run_train(data_dir, target.parent, **start, resume=True)


def test_a_checkpoint_is_never_written_over(folder, tmp_path):
    (tmp_path / "ckpt_000001.pt").write_text("precious")
    with pytest.raises(ValueError, match="exists"):
        export(ExportConfig(source=str(folder), target=tmp_path / "ckpt_000001.pt"))
    assert (tmp_path / "ckpt_000001.pt").read_text() == "precious"


def test_a_folder_with_other_files_is_refused_with_what_to_do(model, tmp_path):
    source = save(model, tmp_path / "ckpt_000001.pt")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("precious")
    before = all_files(tmp_path)
    for name, what in ("work", r"holds thesis\.tex"), ("work/thesis.tex", "is a file"):
        with pytest.raises(ValueError, match=what) as error:
            export(ExportConfig(source=str(source), target=tmp_path / name))
        assert explain(error.value).endswith(": give a new folder, or one with an earlier export")
    assert all_files(tmp_path) == before


def test_the_current_folder_is_not_replaced(model, tmp_path, monkeypatch):
    source = save(model, tmp_path / "ckpt_000001.pt")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OSError, match="is the current folder"):
        export(ExportConfig(source=str(source), target=Path(".")))
    assert not any((tmp_path / "here").iterdir())


def test_all_files_of_an_export_are_as_readable(folder):
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_weights_that_are_not_finite_give_no_checkpoint(model, tmp_path):
    with torch.no_grad():
        model.transformer.ln_f.bias[3] = float("nan")
    write_huggingface(plain(model.config), dict(model.named_parameters()), tmp_path / "hf")
    before = all_files(tmp_path)
    with pytest.raises(ValueError, match=r"ln_f\.bias is not finite") as error:
        export(ExportConfig(source=str(tmp_path / "hf"), target=tmp_path / "new.pt"))
    assert explain(error.value).endswith(": give a model with finite weights")
    assert all_files(tmp_path) == before


@pytest.mark.parametrize("direction", ["to a folder", "to a checkpoint"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    model: GPT, folder: Path, tmp_path: Path, direction: str
):
    source, target = save(model, tmp_path / "ckpt_000001.pt"), tmp_path / "new"
    if direction == "to a checkpoint":
        source, target = folder, tmp_path / "new.pt"
    before = all_files(tmp_path)
    message = rf"{target.name} could not be written .*File too large"
    with full_disk(), pytest.raises(OSError, match=message) as e:
        export(ExportConfig(source=str(source), target=target))
    assert str(e.value).endswith(": give another target, or make room")
    assert all_files(tmp_path) == before


def test_a_run_exports_with_a_card_of_what_its_checkpoint_knows(data_dir, tmp_path, model):
    run_train(data_dir, tmp_path / "run", checkpoint_every=5)
    early, last = (tmp_path / "run" / f"ckpt_{step:06d}.pt" for step in (5, 10))
    values = {m["step"]: m["loss"] for m in read_metrics(tmp_path / "run", "val")}
    for source, step in ((early, 5), (last, 10), (tmp_path / "run", 10)):
        export(ExportConfig(source=str(source), target=tmp_path / "hf"))
        lines = (tmp_path / "hf" / "README.md").read_text().splitlines()
        assert f"| updates | {step} |" in lines
        assert f"| validation loss | {values[step]:.4f} |" in lines
    alone = save(model, tmp_path / "ckpt_000007.pt")
    export(ExportConfig(source=str(alone), target=tmp_path / "hf"))
    text = (tmp_path / "hf" / "README.md").read_text()
    assert "| updates | 7 |" in text and "loss" not in text


def test_an_export_replaces_an_earlier_one_and_keeps_the_files_of_the_user(folder, model, tmp_path):
    source = save(model, tmp_path / "ckpt_000001.pt")
    (folder / "model.gguf").write_text("precious")
    export(ExportConfig(source=str(source), target=folder))
    assert (folder / "model.gguf").read_text() == "precious"
    (folder / "config.json").write_text('{"model_type": "llama"}')  # another model's folder
    before = all_files(folder)
    with pytest.raises(ValueError, match=r"holds README\.md and no earlier export"):
        export(ExportConfig(source=str(source), target=folder))
    assert all_files(folder) == before


def test_a_checkpoint_of_nanogpt_becomes_one_of_ours(model, tmp_path):
    args = {name: getattr(model.config, name) for name in SMALL}
    weights = {name: p[:300] if "wte" in name else p for name, p in model.named_parameters()}
    torch.save({"model": weights, "model_args": args}, tmp_path / "theirs.pt")
    export(ExportConfig(source=str(tmp_path / "theirs.pt"), target=tmp_path / "ours.pt"))
    assert load_model(tmp_path / "ours.pt")(IDX)[..., :300].equal(model(IDX)[..., :300])


@pytest.mark.parametrize("name", ["model.bin", "x.gguf", "model.safetensors", "ckpt.pth"])
def test_a_target_that_is_neither_folder_nor_checkpoint_is_refused(folder, tmp_path, name):
    with pytest.raises(ValueError, match=r"give a folder, or a checkpoint that ends in \.pt"):
        export(ExportConfig(source=str(folder), target=tmp_path / name))


def test_the_command_says_what_is_wrong_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export.py", "a.pt", "b.pt"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = "export.py: error: a.pt: no such checkpoint: give another model\n"
    assert capsys.readouterr() == ("", error)
