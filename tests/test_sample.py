"""The command that writes text: its prompt, its output, its settings, 8-bit weights."""

import copy
import io
import sys

import pytest
import torch
from conftest import run_command_line, save, spread

from sample import SampleConfig, model_bytes, quantize, sample
from train_gpt2 import GPT, GPTConfig

PROMPT = [5, 7, 11]


@pytest.fixture(scope="module")
def full_model() -> GPT:
    """GPT-2's vocabulary: its tokens can be decoded to text."""
    torch.manual_seed(3)
    return spread(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32)))


# -----------------------------------------------------------------------------
# the command


class Terminal(io.StringIO):
    def __init__(self):
        super().__init__()
        self.flushed: list[str] = []

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        self.flushed.append(self.getvalue())


def run_sample(monkeypatch, out: io.StringIO, stdin: bytes = b"", **settings) -> str:
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    sample(SampleConfig(device="cpu", **settings))
    return out.getvalue()


def test_a_terminal_shows_the_first_sample_while_it_is_written(full_model, tmp_path, monkeypatch):
    settings = dict(model=str(save(full_model, tmp_path / "ckpt_000001.pt")), num_samples=2)
    settings |= dict(max_new_tokens=10, prompt="One day")
    terminal = Terminal()
    shown = run_sample(monkeypatch, terminal, **settings)
    assert len(set(terminal.flushed)) >= 8 and terminal.flushed[0].startswith("One day")
    assert shown == run_sample(monkeypatch, io.StringIO(), **settings)  # a file gets the same
    assert shown.count("One day") == 2


def test_the_prompt_comes_from_standard_input_and_is_cut_with_a_note(
    full_model, tmp_path, monkeypatch, capsys
):
    path = str(save(full_model, tmp_path / "ckpt_000001.pt"))
    settings = dict(model=path, num_samples=1, max_new_tokens=2, temperature=0)
    given = run_sample(monkeypatch, io.StringIO(), prompt="Hello there", **settings)
    assert run_sample(monkeypatch, io.StringIO(), b"Hello there\n", **settings) == given
    assert capsys.readouterr().err == ""
    run_sample(monkeypatch, io.StringIO(), b"word " * 50, **settings)
    assert "the prompt has 51 tokens, the context 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings", [{"num_samples": 0}, {"temperature": -1.0}, {"temperature": float("nan")},
                 {"top_k": -1}, {"max_new_tokens": 0}, {"seed": 2**70}],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SampleConfig(**settings)


def test_a_model_with_another_vocabulary_is_refused_with_what_to_do(
    small_model, tmp_path, monkeypatch
):
    large = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=50258))
    for model, what in (small_model, "token 15496 of the prompt"), (large, "50258 tokens"):
        path = str(save(model, tmp_path / "ckpt_000001.pt"))
        with pytest.raises(ValueError, match=what) as error:
            run_sample(monkeypatch, io.StringIO(), model=path, prompt="Hello")
        assert error.value.__notes__ == ["give another prompt, or a model with GPT-2's vocabulary"]


def test_the_command_writes_text_and_says_what_is_wrong_in_one_line(full_model, tmp_path):
    path = save(full_model, tmp_path / "ckpt_000001.pt")
    words = ["--prompt", "Hello", "--num_samples", "2", "--max_new_tokens", "3", "--int8"]
    pod = {"RANK": "1"}  # a variable of the job in which somebody types the command
    result = run_command_line("sample.py", "--model", str(path), *words, env=pod)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Hello") == 2 and result.stderr == ""
    result = run_command_line("sample.py", "--model", str(tmp_path / "ckpt_000002.pt"), env=pod)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("sample.py: error: ")


# -----------------------------------------------------------------------------
# 8 bits


def log_probs(model: GPT, rows: int) -> torch.Tensor:
    """Of a row of tokens, `rows` at a time: few tokens use another kernel than many."""
    idx = torch.randint(0, 300, (32, 16), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        x = torch.cat([model.hidden(part[None]) for part in idx.flatten().split(rows)], dim=1)
        parts = [model.lm_head(part)[..., :300].log_softmax(-1) for part in x.split(rows, dim=1)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize("shift", [0.0, -0.6])
def test_int8_changes_probabilities_little_even_if_logits_are_around_minus_100(rows, shift):
    torch.manual_seed(5)
    model = spread(GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=300)))
    with torch.no_grad():
        model.transformer.wte.weight.add_(shift)
        model.transformer.ln_f.bias.fill_(-shift * 8)
    expected = log_probs(model, rows)
    assert not shift or model(torch.tensor([PROMPT])).mean() < -70
    difference = log_probs(quantize(copy.deepcopy(model)), rows) - expected
    assert expected.std() > 0.3
    assert difference.abs().mean() < 0.02 and difference.abs().max() < 0.2


def test_int8_takes_less_than_half_the_memory_embedding_included():
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=128, block_size=32, vocab_size=5000))
    before = model_bytes(model)
    assert before == 4 * sum(p.numel() for p in model.parameters())
    assert model_bytes(quantize(model)) < 0.28 * before
