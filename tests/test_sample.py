"""The command that writes text: its prompt, its output, its settings, 8-bit weights."""

import codecs
import copy
import dataclasses
import io
import sys

import pytest
import torch
from conftest import run_command_line, save, spread

from sample import SampleConfig, cut_note, main, model_bytes, quantize, read_prompt, sample
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
    assert "note" not in capsys.readouterr().err
    run_sample(monkeypatch, io.StringIO(), b"word " * 50, **settings)
    assert "the prompt has 51 tokens, the context 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings", [{"num_samples": 0}, {"temperature": -1.0}, {"temperature": float("nan")},
                 {"top_k": -1}, {"max_new_tokens": 0}, {"seed": 2**70}, {"top_p": 0.0},
                 {"top_p": 1.01}, {"top_p": -0.5}, {"top_p": float("nan")}],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SampleConfig(**settings)


def test_a_model_of_another_tokenizer_is_refused_with_what_to_do(
    small_model, tmp_path, monkeypatch
):
    path = str(save(small_model, tmp_path / "ckpt_000001.pt"))
    with pytest.raises(ValueError, match="vocab_size 300") as error:
        run_sample(monkeypatch, io.StringIO(), model=path, prompt="Hello")
    assert error.value.__notes__ == ["give a model with GPT-2's vocabulary"]


@pytest.mark.parametrize("int8", [False, True])
def test_a_model_with_a_padded_vocabulary_writes_what_its_first_50257_rows_say(
    full_model, tmp_path, monkeypatch, int8
):
    padded = GPT(dataclasses.replace(full_model.config, vocab_size=50400))
    weights = full_model.state_dict()
    for name in "transformer.wte.weight", "lm_head.weight":
        own, mean = weights[name][:50257], weights[name][:50257].mean(0)
        weights[name] = torch.cat([own, mean.expand(len(padded.lm_head.weight) - 50257, -1)])
    padded.load_state_dict(weights)
    texts = []
    for model in full_model, padded:
        path = str(save(model, tmp_path / "ckpt_000001.pt"))
        settings = dict(model=path, prompt="Hello", num_samples=1, max_new_tokens=20, int8=int8)
        texts.append(run_sample(monkeypatch, io.StringIO(), temperature=0, **settings))
    assert texts[0] == texts[1] and len(texts[0]) > 40


def test_top_p_reaches_the_choice_of_tokens(full_model, tmp_path, monkeypatch):
    settings = dict(model=str(save(full_model, tmp_path / "ckpt_000001.pt")), prompt="Hello")
    settings |= dict(num_samples=1, max_new_tokens=20)
    likeliest = run_sample(monkeypatch, io.StringIO(), temperature=0, **settings)
    assert run_sample(monkeypatch, io.StringIO(), top_p=1e-9, **settings) == likeliest
    assert run_sample(monkeypatch, io.StringIO(), **settings) != likeliest


@pytest.mark.parametrize(
    "stdin, prompt",
    [
        (b"Hello there\n", "Hello there"),
        (b"one\ntwo\n\n", "one\ntwo\n"),
        (codecs.BOM_UTF8 + "naïve ½\r\n".encode(), "naïve ½"),  # PowerShell
        ("naïve ½\r\ntwo\r\n".encode("utf-16"), "naïve ½\ntwo"),  # its `>` and Notepad's Unicode
        (codecs.BOM_UTF16_BE + "naïve".encode("utf-16-be"), "naïve"),
        (b"", ""),
    ],
)
def test_standard_input_is_read_as_the_text_that_was_typed(stdin, prompt, monkeypatch, capsys):
    reader = io.TextIOWrapper(io.BytesIO(stdin), encoding="ascii")  # the locale does not matter
    monkeypatch.setattr(sys, "stdin", reader)
    assert read_prompt(SampleConfig()) == prompt
    assert capsys.readouterr().err == ""


def test_a_prompt_that_is_not_utf8_is_read_with_a_note(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("naïve".encode("latin-1"))))
    assert read_prompt(SampleConfig()) == "na\ufffdve"
    assert capsys.readouterr().err == "note: byte 2 of the prompt is not utf-8: read as \ufffd\n"


def test_a_written_endoftext_counts_as_one_token(full_model):
    assert cut_note(full_model, "<|endoftext|>" * 32) == ""
    assert "has 33 tokens" in cut_note(full_model, "<|endoftext|>" * 33)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1"])
@pytest.mark.parametrize("live", [False, True])
def test_a_console_without_the_characters_gets_escapes_and_no_traceback(
    full_model, tmp_path, monkeypatch, encoding, live
):
    path = save(full_model, tmp_path / "ckpt_000001.pt")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
    out.isatty = lambda: live
    words = ["--prompt", "中 é \udce9", "--num_samples", "2", "--max_new_tokens", "2"]
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model", str(path), *words])
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    main()
    written = out.buffer.getvalue().decode(encoding)
    assert written.count("\\u4e2d") == 2 == written.count("\\udce9")
    assert written.count("\\xe9" if encoding == "ascii" else "é") == 2


def test_the_command_writes_text_and_says_what_is_wrong_in_one_line(
    full_model, tmp_path, monkeypatch, capsys
):
    path = save(full_model, tmp_path / "ckpt_000001.pt")
    words = ["--prompt", "Hello", "--num_samples", "2", "--max_new_tokens", "3", "--int8"]
    pod = {"RANK": "1"}  # a variable of the job in which somebody types the command
    result = run_command_line("sample.py", "--model", str(path), *words, env=pod)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Hello") == 2 and result.stderr.count(str(path)) == 1
    missing = tmp_path / "ckpt_000002.pt"
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model", str(missing), "--prompt", "Hello"])
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        main()
    out, err = capsys.readouterr()
    assert err.startswith("sample.py: error: ") and err.count("\n") == 1 and out == ""


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
