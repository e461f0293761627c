"""Text generation: the cache, the restart of a full context, the choice of tokens, the text."""

import math
import random
from collections import Counter

import pytest
import torch
from conftest import spread

from common.cli import plain
from common.generate import choose, generate, sample_text, stream, stream_text
from common.huggingface import write_huggingface
from common.tokenizer import EOT, get_tokenizer
from sample import by_columns, quantize
from train_gpt2 import GPT, GPTConfig

PROMPT = [5, 7, 11]


@pytest.fixture
def model(small_model: GPT) -> GPT:
    """300 tokens, a context of 16."""
    return spread(small_model)


@pytest.fixture(scope="module")
def full_model() -> GPT:
    """GPT-2's vocabulary: its tokens can be decoded to text."""
    torch.manual_seed(3)
    return spread(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32)))


@pytest.fixture
def script(monkeypatch):
    """Let the model choose given tokens: rows of ids, one for each sample."""

    def set_script(*rows: list[int]) -> None:
        columns = iter(torch.tensor(rows).T)
        monkeypatch.setattr("common.generate.choose", lambda *_: next(columns))

    return set_script


# -----------------------------------------------------------------------------
# tokens


@pytest.mark.parametrize("layout", [lambda model: model, by_columns])
def test_greedy_text_equals_that_of_transformers(model, tmp_path, layout):
    transformers = pytest.importorskip("transformers")
    write_huggingface(plain(model.config), dict(model.named_parameters()), tmp_path / "hf")
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


def test_a_full_context_restarts_from_its_newest_half(model):
    idx, window = list(PROMPT), list(PROMPT)
    for _ in range(60):  # the simple way: compute everything again for every token
        if len(window) > 16:
            window = idx[-8:]
        with torch.no_grad():
            new = model(torch.tensor([window]))[0, -1, :300].argmax().item()
        idx.append(new)
        window = [*window, new]
    found = generate(model, PROMPT, num_samples=2, max_new_tokens=60, temperature=0)
    assert found == [idx[3:]] * 2


@pytest.mark.parametrize("context", [1, 2, 3])
def test_the_smallest_contexts_can_restart(context):
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=context, vocab_size=50)).eval()
    assert len(generate(model, [1, 2], max_new_tokens=9)[0]) == 9


def test_padded_ids_are_never_chosen(model):
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[300:] = 9.0  # by far the largest logits
    for settings in dict(temperature=0), dict(temperature=5.0, top_k=0):
        rows = generate(model, PROMPT, num_samples=8, max_new_tokens=40, **settings)
        assert max(map(max, rows)) < 300


@pytest.mark.parametrize("vocab_size", [50258, 50304, 50400])
@pytest.mark.parametrize("layout", [lambda model: model, by_columns, quantize])
def test_ids_that_gpt2_does_not_have_are_never_chosen(vocab_size, layout):
    torch.manual_seed(3)
    model = spread(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=vocab_size)))
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[50257:] = 9.0  # by far the largest logits
    layout(model)
    for settings in dict(temperature=0), dict(temperature=5.0, top_k=0), dict(top_p=0.5):
        rows = generate(model, PROMPT, num_samples=2, max_new_tokens=3, **settings)
        assert max(map(max, rows)) <= EOT
    assert "".join(pieces[0] for pieces in stream_text(model, "Hello", max_new_tokens=3))
    assert len(sample_text(model, seed=1)) == 2  # they can be decoded


def test_each_sample_ends_at_its_own_endoftext(full_model, script):
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


def test_only_the_seed_decides(model):
    def run(seed: int, **settings: float) -> list[list[int]]:
        torch.seed()  # the state of the global generator must not matter
        return generate(model, PROMPT, num_samples=3, max_new_tokens=30, seed=seed, **settings)

    assert run(1) == run(1) != run(2)
    assert len({tuple(row) for row in run(1)}) == 3  # the samples differ
    assert run(1) != run(1, top_p=0.3)


# -----------------------------------------------------------------------------
# the choice


def frequencies(logits: list[float], **settings: float) -> dict[int, float]:
    rows = torch.tensor([logits]).expand(40_000, -1)
    settings = dict(temperature=1.0, top_k=0, top_p=1.0) | settings
    chosen = choose(rows, generator=torch.Generator().manual_seed(0), **settings).tolist()
    return {id: n / len(chosen) for id, n in Counter(chosen).items()}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_chosen_with_the_probability_of_the_softmax(temperature):
    logits = [1.0, -1.0, 2.0, 0.0]
    expected = (torch.tensor(logits) / temperature).softmax(0).tolist()
    found = frequencies(logits, temperature=temperature)
    assert [found[i] for i in range(4)] == pytest.approx(expected, abs=0.01)


def test_top_k_keeps_the_likeliest_and_0_keeps_all():
    logits = [float(-i) / 100 for i in range(100)]
    assert set(frequencies(logits, top_k=5)) == set(range(5))
    assert set(frequencies(logits, top_k=0)) == set(range(100))
    assert set(frequencies(logits, top_k=1000)) == set(range(100))


def test_no_temperature_overflows():
    logits = [-90.0, -80.0, 30.0]
    assert frequencies(logits, temperature=0) == {2: 1.0}
    assert frequencies(logits, temperature=1e-44) == {2: 1.0} == frequencies(logits, top_p=1e-50)
    assert frequencies(logits, temperature=1e-50) == {2: 1.0}
    assert len(frequencies(logits, temperature=1e30)) == 3


def plain_nucleus(logits: list[float], temperature: float, top_k: int, top_p: float) -> list:
    """The probability of each token, from the definition: sort, keep, stop when p is reached."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or None]
    weights = [math.exp((logits[i] - max(logits)) / temperature) for i in order]
    kept, mass = {}, 0.0
    for i, weight in zip(order, weights, strict=True):
        if mass >= top_p:
            break
        kept[i] = weight / sum(weights)
        mass += kept[i]
    return [kept.get(i, 0.0) / sum(kept.values()) for i in range(len(logits))]


def test_top_p_keeps_the_likeliest_tokens_that_reach_p_of_those_that_top_k_left(monkeypatch):
    """The probabilities that multinomial gets equal those of the definition."""
    given, rng = [], torch.Generator().manual_seed(0)

    def multinomial(probs, n, generator):
        given.append(probs / probs.sum(-1, keepdim=True))
        return torch.arange(len(probs))[:, None] % probs.size(-1)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    pick = random.Random(0)
    for _ in range(100):
        logits = torch.randn(3, 40, generator=rng) * pick.choice([0.1, 1, 5])
        temperature, top_k = pick.choice([0.3, 1.0, 2.0]), pick.choice([0, 1, 7, 40, 99])
        top_p = pick.choice([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0])
        choose(logits, temperature, top_k, top_p, rng)
        for row, found in zip(logits, given.pop(), strict=True):
            expected = plain_nucleus(row.tolist(), temperature, top_k, top_p)
            expected = torch.tensor(expected)[row.argsort(descending=True)][: len(found)]
            assert torch.allclose(found, expected, atol=1e-5), (temperature, top_k, top_p)


def test_top_p_of_1_draws_the_same_tokens_as_without_it():
    logits = torch.randn(5000, 60, generator=torch.Generator().manual_seed(1)) * 9
    values, ids = logits.topk(50)
    probs = ((values - values[:, :1]) / 0.8).softmax(-1)  # many sums of 50 are not quite 1
    drawn = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(0))
    same = choose(logits, 0.8, 50, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(same, ids.gather(1, drawn)[:, 0])


def test_the_token_that_crosses_top_p_is_kept():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().tolist()
    for top_p, kept in (0.01, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.9, 4), (1.0, 4):
        assert len(frequencies(logits, top_p=top_p)) == kept, top_p  # of equal ones, any
    half = frequencies(logits, top_p=0.75)  # the nucleus keeps its proportions
    assert half[0] / half[1] == pytest.approx(2, abs=0.1)
    assert set(frequencies(logits, top_p=0.6, top_k=2)) == {0}, "top_k comes first: 2/3, 1/3"
    assert set(frequencies(logits, top_p=0.6, temperature=0.1)) == {0}, "temperature comes first"


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
    script(ids[:-1])  # ends inside a character: the end shows it as one �
    steps = list(stream_text(full_model, "x", max_new_tokens=len(ids) - 1))
    assert "".join(pieces[0] for pieces in steps).count("�") == 1


def test_a_written_endoftext_in_a_prompt_is_the_token(full_model):
    settings = dict(max_new_tokens=8)

    def written(prompt: str) -> str:
        return "".join(pieces[0] for pieces in stream_text(full_model, prompt, **settings))

    hello, world = (get_tokenizer().encode(word) for word in ("Hello", "World"))
    for prompt, ids in (
        ("<|endoftext|>Hello", [EOT, *hello]),
        ("Hello<|endoftext|><|endoftext|>World", [*hello, EOT, EOT, *world]),
    ):
        (expected,) = generate(full_model, ids, **settings)
        assert written(prompt) == get_tokenizer().decode(expected)
    assert written("<|endoftext|>") == written("") != written("Hello")


def test_a_model_of_another_tokenizer_writes_no_text(model):
    with pytest.raises(ValueError, match="vocab_size 300: text needs GPT-2's 50257 tokens"):
        next(stream_text(model, "!"))  # id 0 is in its vocabulary, but is another character


def test_samples_of_a_run_repeat_with_the_seed_and_keep_the_mode(full_model):
    for training in True, False:
        full_model.train(training)
        texts = sample_text(full_model, seed=1)
        assert full_model.training == training
        assert texts == sample_text(full_model, seed=1) != sample_text(full_model, seed=2)
        assert len(texts) == 2 and all(t.startswith("Hello, I'm a language") for t in texts)


def test_sampling_leaves_cudnn_out_of_attention(full_model, monkeypatch):
    seen, hidden = [], type(full_model).hidden

    def watched(self, *args, **kwargs):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return hidden(self, *args, **kwargs)

    monkeypatch.setattr(type(full_model), "hidden", watched)
    generate(full_model, [1, 2], max_new_tokens=3)
    assert seen == [False] * 3, "it would make a plan for each length"
    assert torch.backends.cuda.cudnn_sdp_enabled()
