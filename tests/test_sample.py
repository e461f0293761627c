"""Text generation: the cache, the choice of tokens, sliding, streaming, 8-bit weights."""

import copy
import io
import sys
from collections import Counter

import pytest
import torch
from conftest import run_command_line
from test_export import save, spread

import sample as sample_module
from export import write_huggingface
from fineweb import EOT, get_tokenizer
from sample import (
    SampleConfig,
    by_columns,
    choose,
    generate,
    model_bytes,
    quantize,
    sample,
    stream,
    stream_text,
)
from train_gpt2 import GPT, GPTConfig

PROMPT = [5, 7, 11]


@pytest.fixture
def model(small_model: GPT) -> GPT:
    """300 tokens, a context of 16."""
    return spread(small_model)


@pytest.fixture(scope="module")
def full_model() -> GPT:
    """GPT-2's vocabulary, so that there is text."""
    torch.manual_seed(3)
    return spread(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32)))


@pytest.fixture
def script(monkeypatch):
    """Let the model say given tokens: rows of ids, one for each sample."""

    def set_script(*rows: list[int]) -> None:
        columns = iter(torch.tensor(rows).T)
        monkeypatch.setattr(sample_module, "choose", lambda *_: next(columns))

    return set_script


# -----------------------------------------------------------------------------
# tokens


@pytest.mark.parametrize("layout", [lambda model: model, by_columns])
def test_greedy_text_is_that_of_transformers_token_for_token(model, tmp_path, layout):
    transformers = pytest.importorskip("transformers")
    write_huggingface(model, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    layout(model)
    for prompt in [[1], PROMPT, list(range(15))]:
        new = 16 - len(prompt)
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None
        )[0, len(prompt) :].tolist()
        assert (
            generate(model, prompt, num_samples=3, max_new_tokens=new, temperature=0)
            == [expected] * 3
        )


def test_past_the_context_it_goes_on_from_the_newest_half(model):
    idx, window = list(PROMPT), list(PROMPT)
    for _ in range(60):  # the plain way: everything anew for every token
        if len(window) > 16:
            window = idx[-8:]
        with torch.no_grad():
            new = model(torch.tensor([window]))[0, -1, :300].argmax().item()
        idx.append(new)
        window = [*window, new]
    found = generate(model, PROMPT, num_samples=2, max_new_tokens=60, temperature=0)
    assert found == [idx[3:]] * 2


@pytest.mark.parametrize("context", [1, 2, 3])
def test_slides_in_the_smallest_contexts(context):
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=context, vocab_size=50)).eval()
    assert len(generate(model, [1, 2], max_new_tokens=9)[0]) == 9


def test_padded_ids_are_never_chosen(model):
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[300:] = 9.0  # by far the largest logits
    for settings in dict(temperature=0), dict(temperature=5.0, top_k=0):
        rows = generate(model, PROMPT, num_samples=8, max_new_tokens=40, **settings)
        assert max(map(max, rows)) < 300


def test_samples_end_at_endoftext_each_by_itself(full_model, script):
    script([1, 2, EOT, 4, 9], [EOT, 6, 7, 8, 9], [1, 1, 1, EOT, 9])
    steps = list(stream(full_model, PROMPT, num_samples=3, max_new_tokens=5))
    assert steps == [[1, None, 1], [2, None, 1], [None, None, 1], [None, None, None]]
    script([1, EOT], [EOT, 6])
    assert generate(full_model, PROMPT, num_samples=2, max_new_tokens=2) == [[1], []]


def test_an_empty_prompt_starts_from_endoftext(full_model):
    settings = dict(num_samples=2, max_new_tokens=20)
    assert generate(full_model, [], **settings) == generate(full_model, [EOT], **settings)
    assert generate(full_model, [], **settings) != generate(full_model, [0], **settings)


def test_only_the_end_of_a_long_prompt_is_read(model):
    long = list(range(100))
    settings = dict(num_samples=2, max_new_tokens=20)
    assert generate(model, long, **settings) == generate(model, long[-16:], **settings)
    assert generate(model, long, **settings) != generate(model, long[:16], **settings)


def test_a_prompt_outside_the_vocabulary_is_refused(model):
    with pytest.raises(ValueError, match="token 300 of the prompt"):
        generate(model, [300])


def test_the_seed_and_nothing_else_decides(model):
    def run(seed: int) -> list[list[int]]:
        torch.seed()  # what the global generator stands at must not matter
        return generate(model, PROMPT, num_samples=3, max_new_tokens=30, seed=seed)

    assert run(1) == run(1) != run(2)
    assert len({tuple(row) for row in run(1)}) == 3  # the samples differ


# -----------------------------------------------------------------------------
# the choice


def frequencies(logits: list[float], **settings: float) -> dict[int, float]:
    rows = torch.tensor([logits]).expand(40_000, -1)
    chosen = choose(rows, generator=torch.Generator().manual_seed(0), **settings).tolist()
    return {id: n / len(chosen) for id, n in Counter(chosen).items()}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_come_with_the_probability_of_the_softmax(temperature):
    logits = [1.0, -1.0, 2.0, 0.0]
    expected = (torch.tensor(logits) / temperature).softmax(0).tolist()
    found = frequencies(logits, temperature=temperature, top_k=0)
    assert [found[i] for i in range(4)] == pytest.approx(expected, abs=0.01)


def test_top_k_cuts_to_the_likeliest_and_0_cuts_nothing():
    logits = [float(-i) / 100 for i in range(100)]
    assert set(frequencies(logits, temperature=1.0, top_k=5)) == set(range(5))
    assert set(frequencies(logits, temperature=1.0, top_k=0)) == set(range(100))
    assert set(frequencies(logits, temperature=1.0, top_k=1000)) == set(range(100))


def test_no_temperature_overflows():
    logits = [-90.0, -80.0, 30.0]
    assert frequencies(logits, temperature=0, top_k=0) == {2: 1.0}
    assert frequencies(logits, temperature=1e-44, top_k=0) == {2: 1.0}
    assert len(frequencies(logits, temperature=1e30, top_k=0)) == 3


# -----------------------------------------------------------------------------
# text


def test_streamed_text_never_shows_half_a_character(full_model, script):
    text = "naïve ½ 中文 👩‍👩‍👧 😀"
    ids = get_tokenizer().encode_ordinary(text)
    assert any("�" in get_tokenizer().decode([id]) for id in ids)
    script(ids, ids)
    steps = list(stream_text(full_model, "x", num_samples=2, max_new_tokens=len(ids)))
    assert ["".join(pieces) for pieces in zip(*steps, strict=True)] == [text, text]
    assert len(steps) > 10 and not any("�" in piece for pieces in steps for piece in pieces)
    script(ids[:-1])  # ends within a character: that is shown at the end, once
    steps = list(stream_text(full_model, "x", max_new_tokens=len(ids) - 1))
    assert "".join(pieces[0] for pieces in steps).count("�") == 1


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


def test_a_terminal_shows_the_first_sample_as_it_is_made(full_model, tmp_path, monkeypatch):
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


def test_the_command_writes_text_and_says_what_is_wrong_in_one_line(full_model, tmp_path):
    path = save(full_model, tmp_path / "ckpt_000001.pt")
    words = ["--prompt", "Hello", "--num_samples", "2", "--max_new_tokens", "3", "--int8"]
    result = run_command_line("sample.py", "--model", str(path), *words)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Hello") == 2 and result.stderr == ""
    result = run_command_line("sample.py", "--model", str(tmp_path / "ckpt_000002.pt"))
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("sample.py: error: ")


# -----------------------------------------------------------------------------
# 8 bits


def log_probs(model: GPT, rows: int) -> torch.Tensor:
    """Of a row of tokens, read so many at a time: few and many are computed differently."""
    idx = torch.randint(0, 300, (32, 16), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        x = torch.cat([model.hidden(part[None]) for part in idx.flatten().split(rows)], dim=1)
        parts = [model.lm_head(part)[..., :300].log_softmax(-1) for part in x.split(rows, dim=1)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize("shift", [0.0, -0.6])
def test_int8_changes_probabilities_little_even_where_logits_are_around_minus_100(rows, shift):
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
