"""The command that converts checkpoints to Hugging Face folders and back."""

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import all_files, run_command_line, run_train, save, spread

from common.cli import explain, plain
from common.huggingface import write_huggingface
from export import ExportConfig, export
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


def test_weights_that_are_not_finite_give_no_checkpoint(model, tmp_path):
    with torch.no_grad():
        model.transformer.ln_f.bias[3] = float("nan")
    write_huggingface(plain(model.config), dict(model.named_parameters()), tmp_path / "hf")
    before = all_files(tmp_path)
    with pytest.raises(ValueError, match=r"ln_f\.bias is not finite") as error:
        export(ExportConfig(source=str(tmp_path / "hf"), target=tmp_path / "new.pt"))
    assert explain(error.value).endswith(": give a model with finite weights")
    assert all_files(tmp_path) == before


@pytest.fixture
def fill_disk():
    """Let every file that is written from now on end at 10 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("direction", ["to a folder", "to a checkpoint"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    model: GPT, folder: Path, tmp_path: Path, fill_disk: Callable[[], None], direction: str
):
    source, target = save(model, tmp_path / "ckpt_000001.pt"), tmp_path / "new"
    if direction == "to a checkpoint":
        source, target = folder, tmp_path / "new.pt"
    before = all_files(tmp_path)
    fill_disk()
    with pytest.raises(OSError, match=rf"{target.name} could not be written .*File too large") as e:
        export(ExportConfig(source=str(source), target=target))
    assert str(e.value).endswith(": give another target, or make room")
    assert all_files(tmp_path) == before


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    result = run_command_line("export.py", "a.pt", "b.pt")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("export.py: error: a.pt to b.pt: one must be a checkpoint")
    assert result.stderr.count("\n") == 1
