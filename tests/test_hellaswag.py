"""HellaSwag: losses, the two styles, the data, the command."""

import gzip
import http.client
import io
import json
import os
import random
import sys
import time
import urllib.error
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from conftest import all_files, error_lines, run_ranks, save

import hellaswag
import train_gpt2
from common.cli import plain
from common.huggingface import write_huggingface
from common.tokenizer import EOT, RANKS_PATH, get_tokenizer
from hellaswag import HellaSwagConfig, Question, Questions
from train_gpt2 import GPT, GPTConfig, Machine

CPU = Machine(torch.device("cpu"), torch.float32)

EXAMPLES = [  # invented: the first two are like those from ActivityNet, the others like WikiHow
    {
        "activity_label": "Flying kites",
        "ctx_a": "Two girls run along a beach.",
        "ctx_b": "the taller one",
        "ctx": "Two girls run along a beach. the taller one",
        "endings": [
            "lets out the string of a red kite.",
            "sells the beach to a man who is made of butter, and then paints it with a spoon.",
            "sings to the oven.",
            "is rising over the sea with its tail behind it and the girl, asleep, on the moon.",
        ],
        "label": 0,
    },
    {
        "activity_label": "Making soup",
        "ctx_a": "A cook cuts onions and puts them into a pot of hot water.",
        "ctx_b": "",
        "ctx": "A cook cuts onions and puts them into a pot of hot water.",
        "endings": [
            "The pot leaves the house.",
            "He stirs it and adds salt.",
            "Onions!",
            "He — naïve as ever — climbs in.",
        ],
        "label": "1",
    },
    {
        "activity_label": "Home and Garden",
        "ctx_a": "[header] How to oil a hinge [title] Find out which hinge it is. [step] Open and "
        "close the door slowly, with an ear to each hinge in turn.",
        "ctx_b": "[substeps] a dry hinge squeaks",
        "ctx": "[header] How to oil a hinge [title] Find out which hinge it is. [step] Open and "
        "close the door slowly, with an ear to each hinge in turn. [substeps] a dry hinge squeaks",
        "endings": [
            "in the key of the door. [title] Buy a piano. [step] Pianos have no hinges.",
            "most at the same angle. [title] Put a drop of oil on its pin. [step] Wipe it.",
            "[substeps] Ask it again tomorrow.",
            "because hinges are birds. Feed them  twice. [discard] Twice, I said.",
        ],
        "label": 1,
    },
    {
        "activity_label": "Pets",
        "ctx_a": "[header] How to wash a dog [title] Fill a tub with lukewarm water.",
        "ctx_b": "",
        "ctx": "[header] How to wash a dog [title] Fill a tub with lukewarm water.",
        "endings": ["[step] Go.", "[step] Call the dog, and hold it by the collar.", "[step]", ""],
        "label": 1,
    },
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    return path


@pytest.fixture(scope="module")
def model():
    return random_model(1024)


def random_model(block_size, vocab_size=50257):
    torch.manual_seed(0)
    config = GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # large weights: a token seen by mistake changes the losses
            p.mul_(8) if p.dim() == 2 else p.add_(torch.randn_like(p) / 4)
    return model


@torch.no_grad()
def plain_losses(model, questions):
    """Score the plain way: one example at a time, a padded row for each ending, all logits."""
    V, block_size, result = model.config.vocab_size, model.config.block_size, []
    for context, endings, _, _ in questions.items:
        rows = [(context + ending)[-block_size - 1 :] for ending in endings]
        tokens = torch.zeros(4, max(map(len, rows)), dtype=torch.long)
        counts = torch.zeros(tokens.shape)
        for i, (row, ending) in enumerate(zip(rows, endings, strict=True)):
            tokens[i, : len(row)] = torch.tensor(row)
            counts[i, max(1, len(row) - len(ending)) : len(row)] = 1
        logits = model(tokens[:, :-1])[..., :V]
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        result.append((losses.view(4, -1) * counts[:, 1:]).double().sum(1))
    return torch.stack(result)


# -----------------------------------------------------------------------------
# scoring


@pytest.mark.parametrize("style", ["completion", "harness"])
@pytest.mark.parametrize("block_size", [1024, 48, 20, 5])  # one row; four rows; cut; endings cut
def test_losses_and_choices_equal_the_plain_way(data, style, block_size):
    model = random_model(block_size)
    questions = hellaswag.load_questions(data, style)
    losses, plain = hellaswag.ending_losses(model, questions, CPU), plain_losses(model, questions)
    assert (losses - plain).abs().max() < 1e-4, (losses, plain)
    assert hellaswag.choices(questions, losses) == hellaswag.choices(questions, plain)


def test_batches_do_not_mix_their_rows(data, model, monkeypatch):
    questions = hellaswag.load_questions(data, "completion")
    together = hellaswag.ending_losses(model, questions, CPU)
    monkeypatch.setattr(hellaswag, "HEAD_ROWS", 7)
    for i, item in enumerate(questions.items):
        alone = hellaswag.ending_losses(model, Questions("completion", [item]), CPU)
        assert (alone[0] - together[i]).abs().max() < 1e-5


def test_padded_ids_do_not_change_the_losses(data, model):
    questions = hellaswag.load_questions(data, "completion")
    before = hellaswag.ending_losses(model, questions, CPU)
    other = random_model(1024)
    with torch.no_grad():
        other.lm_head.weight[50257:] = 100 * torch.randn(47, 32)
    assert torch.equal(before, hellaswag.ending_losses(other, questions, CPU))


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_the_softmax_is_over_the_ids_of_an_export_as_in_transformers(data, tmp_path, vocab_size):
    transformers = pytest.importorskip("transformers")
    model = random_model(1024, vocab_size)
    write_huggingface(plain(model.config), dict(model.named_parameters()), tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    questions = hellaswag.load_questions(data, "completion", limit=2)
    found = hellaswag.ending_losses(model, questions, CPU)
    for (context, endings, _, _), losses in zip(questions.items, found, strict=True):
        for ending, loss in zip(endings, losses, strict=True):
            labels = torch.tensor([[-100] * len(context) + ending])
            with torch.no_grad():
                mean = theirs(torch.tensor([context + ending]), labels=labels).loss
            assert loss.item() == pytest.approx(mean.item() * len(ending), rel=1e-5)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_result_does_not_depend_on_the_world_size(data, model, monkeypatch, world_size):
    monkeypatch.setattr(hellaswag, "CPU_BATCH_TOKENS", 150)  # several batches
    summed = []
    monkeypatch.setattr(hellaswag.dist, "all_reduce", summed.append)
    questions = hellaswag.load_questions(data, "harness")
    parts = [
        hellaswag.ending_losses(model, questions, Machine(CPU.device, CPU.dtype, r, world_size))
        for r in range(world_size)
    ]
    assert sum(part.any() for part in parts) > 1  # the work is shared
    assert [len(losses) for losses in summed] == [4 * len(questions.items)] * world_size
    assert torch.equal(sum(parts), hellaswag.ending_losses(model, questions, CPU))


def test_compiled_model_is_not_compiled_for_every_shape(data, monkeypatch):
    monkeypatch.setattr(hellaswag, "CPU_BATCH_TOKENS", 150)
    graphs, model = [], random_model(1024)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    for block in model.transformer.h:
        block.compile(backend=backend, dynamic=False)
    model(torch.zeros(1, 8, dtype=torch.long))
    before = len(graphs)
    assert before > 0
    hellaswag.score(model, hellaswag.load_questions(data, "completion"), CPU)
    assert len(graphs) == before


def test_scoring_leaves_the_model_as_it_was(data, model):
    questions = hellaswag.load_questions(data, "completion")
    dropping = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, dropout=0.5)).train()
    first = hellaswag.ending_losses(dropping, questions, CPU)
    assert dropping.training
    assert torch.equal(hellaswag.ending_losses(dropping, questions, CPU), first)
    hellaswag.score(model, questions, CPU)
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_accuracy_counts_sums_and_length_normalised_sums():
    lengths = [10, 1, 5, 5]
    questions = Questions("harness", [Question([1], [[1]] * 4, lengths, label) for label in (0, 1)])
    losses = torch.tensor([[9.0, 3, 8, 8]] * 2)  # summed: ending 1; for its length: ending 0
    result = {"style": "harness", "acc": 0.5, "acc_norm": 0.5, "n": 2}
    errors = {"acc_stderr": 0.5, "acc_norm_stderr": 0.5}
    assert hellaswag.summarize(questions, losses) == result | errors
    one = hellaswag.summarize(Questions("harness", questions.items[:1]), losses[:1])
    assert one["acc_norm_stderr"] is None, "one example has no spread"
    assert hellaswag.choices(questions, losses) == ([1, 1], [0, 0])


def test_a_model_with_another_vocabulary_is_refused(data):
    with pytest.raises(ValueError, match="vocab_size 512"):
        questions = hellaswag.load_questions(data, "completion")
        hellaswag.score(random_model(64, vocab_size=512), questions, CPU)


# -----------------------------------------------------------------------------
# the two styles


def texts(question):
    decode = get_tokenizer().decode
    return decode(question.context), [decode(ending) for ending in question.endings]


def test_completion_is_context_blank_ending_and_counts_tokens(data):
    kites, *_, dog = hellaswag.load_questions(data, "completion").items
    context, endings = texts(kites)
    assert context == EXAMPLES[0]["ctx"]
    assert endings == [" " + ending for ending in EXAMPLES[0]["endings"]]
    assert kites.lengths == [len(ending) for ending in kites.endings] and kites.label == 0
    assert dog.endings[3] == get_tokenizer().encode(" ")  # an empty ending is the blank alone


def test_harness_cleans_texts_and_counts_characters(data):
    kites, soup, hinge, dog = hellaswag.load_questions(data, "harness").items
    assert texts(kites)[0] == "Flying kites: Two girls run along a beach. The taller one"
    assert texts(soup)[0].endswith("hot water.") and soup.label == 1
    context, endings = texts(hinge)
    assert context == (
        "Home and Garden: How to oil a hinge. Find out which hinge it is. Open and close the door "
        "slowly, with an ear to each hinge in turn. [substeps] a dry hinge squeaks"
    ).replace("[substeps] a", "a")
    assert endings[0] == " in the key of the door.. Buy a piano. Pianos have no hinges."
    assert endings[2] == "  Ask it again tomorrow."
    assert hinge.lengths[2] == len(" Ask it again tomorrow.")
    assert texts(dog)[1] == ["  Go.", "  Call the dog, and hold it by the collar.", " ", " "]
    assert dog.lengths[2:] == [1, 1]  # never divided by 0


def test_harness_gives_blanks_at_the_context_end_to_the_endings():
    example = dict(EXAMPLES[0], ctx_a="Come in [title]", ctx_b="[x]")
    question = hellaswag.as_harness(example)  # "Come in.  [x]" loses its marker, not all blanks
    context, endings = texts(question)
    assert context == "Flying kites: Come in." and endings[2] == "  sings to the oven."


def test_empty_context_starts_from_endoftext():
    blank = dict(EXAMPLES[0], ctx="", ctx_a="", ctx_b="]", activity_label="[")
    assert hellaswag.as_completion(blank).context == [EOT]
    assert hellaswag.as_harness(blank).context == [EOT]


# -----------------------------------------------------------------------------
# the data, good and bad


def damaged(**changes):
    example = {k: v for k, v in (EXAMPLES[1] | changes).items() if v is not None}
    return json.dumps(example).encode()


BAD_LINES = {
    "cut short": (damaged()[:80], "Unterminated string"),
    "no JSON": (b"hello", "Expecting value"),
    "a list": (b"[1, 2]", "not a JSON object"),
    "deep": (b"[" * 15000, "recursion"),
    "long": (damaged(ctx="a" * 30000), "longer than 20,000 bytes"),
    "no UTF-8": (damaged().replace(b"Onions!", b"\xff\xfe"), "can't decode"),
    "no ctx": (damaged(ctx=None), "no ctx"),
    "number for text": (damaged(ctx_b=5), "ctx_b is not a string"),
    "three endings": (damaged(endings=["a", "b", "c"]), "four strings"),
    "five endings": (damaged(endings=["a", "b", "c", "d", "e"]), "four strings"),
    "ending of another kind": (damaged(endings=["a", "b", "c", None]), "four strings"),
    "endings in one text": (damaged(endings="abcd"), "four strings"),
    "label 4": (damaged(label=4), "label"),
    "label -1": (damaged(label=-1), "label"),
    "label true": (damaged(label=True), "label"),
    "no label": (damaged(label=None), "label"),
}


@pytest.mark.parametrize("style", ["completion", "harness"])
@pytest.mark.parametrize("name", BAD_LINES)
def test_damaged_line_is_named(data, style, name):
    line, reason = BAD_LINES[name]
    with open(data, "ab") as file:
        file.write(b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=rf"examples.jsonl: line 6 .*{reason}"):
        hellaswag.load_questions(data, style)
    assert len(hellaswag.load_questions(data, style, limit=3).items) == 3  # the line is not read


def as_parquet(path: Path, examples: list[dict]) -> None:
    """Write what the hub has: labels are strings, and there are more columns."""
    rows = [e | {"ind": i, "label": str(e["label"])} for i, e in enumerate(examples)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)


def test_the_files_of_the_hub_and_of_windows_give_the_same_questions(data, tmp_path):
    text, expected = data.read_bytes(), hellaswag.load_questions(data, "harness")
    as_parquet(tmp_path / "0000.parquet", EXAMPLES)
    (tmp_path / "hellaswag_val.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "windows.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    for name in "0000.parquet", "hellaswag_val.jsonl.gz", "windows.jsonl":
        assert hellaswag.load_questions(tmp_path / name, "harness") == expected, name
        assert len(hellaswag.load_questions(tmp_path / name, "harness", limit=2).items) == 2
    reader, writer = os.pipe()  # --data <(zcat hellaswag_val.jsonl.gz)
    os.write(writer, text)
    os.close(writer)
    assert hellaswag.load_questions(Path(f"/dev/fd/{reader}"), "harness") == expected
    os.close(reader)


def test_a_damaged_file_of_the_hub_is_one_clear_line(data, tmp_path):
    path, text = tmp_path / "examples", gzip.compress(data.read_bytes())
    for damage in text[:-30], text[:99] + b"\0\0\0" + text[102:], text[:-6] + b"\0" * 6:
        path.write_bytes(damage)
        with pytest.raises(OSError, match=r"examples cannot be read \(.+\): check --data"):
            hellaswag.load_questions(path, "harness")
    as_parquet(path, EXAMPLES)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(OSError, match=r"(?s)examples cannot be read \(.+\): check --data"):
        hellaswag.load_questions(path, "harness")
    as_parquet(path, [*EXAMPLES, EXAMPLES[0] | {"label": ""}])  # as in the test split
    with pytest.raises(ValueError, match=r"examples: row 5 is not a HellaSwag example \(label is"):
        hellaswag.load_questions(path, "harness")


def test_mutated_lines_are_read_or_refused(data, model):
    rng, line, good = random.Random(0), data.read_bytes().splitlines()[2], []
    for _ in range(250):
        mutant = bytearray(line)
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(mutant))
            junk = rng.choice(
                [b"", b"\x00", b"\\ud800", b"[" * 99, b"]", b'"', b"\xf0", b"9" * 5000]
            )
            mutant[start : start + rng.choice([0, 1, 1, 50])] = junk
        data.write_bytes(mutant)
        style = rng.choice(["completion", "harness"])
        try:
            good += hellaswag.load_questions(data, style).items
        except ValueError as error:
            assert "line 1 " in str(error) or "no examples" in str(error)
    assert len(good) > 20
    assert hellaswag.ending_losses(model, Questions("harness", good[:12]), CPU).isfinite().all()


@pytest.fixture
def web(data, tmp_path, monkeypatch):
    """A fake web with one file, `web.data`. It counts requests and raises `web.error` if set."""

    class Web:
        error, requests = None, 0
        file = tmp_path / "cache/hellaswag/hellaswag_val.jsonl"

        def open(self, url, timeout):
            self.requests += 1
            if self.error:
                raise self.error
            return io.BytesIO(self.data)

    web = Web()
    web.data = data.read_bytes()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hellaswag, "SHA256", hellaswag.hashlib.sha256(web.data).hexdigest())
    monkeypatch.setattr(hellaswag, "SIZE", len(web.data))
    monkeypatch.setattr(hellaswag.urllib.request, "urlopen", web.open)
    return web


def test_data_is_downloaded_once(web):
    assert hellaswag.ensure_data() == hellaswag.ensure_data() == web.file
    assert web.requests == 1 and web.file.read_bytes() == web.data


def test_damaged_cache_is_downloaded_again(web):
    hellaswag.ensure_data().write_bytes(web.data[:-9])
    assert hellaswag.ensure_data().read_bytes() == web.data


@pytest.mark.parametrize("cut", [-1, 0])
def test_damaged_download_leaves_nothing(web, cut):
    web.data = web.data[:cut] + b"?"
    with pytest.raises(OSError, match=r"(?s)damaged.*--data"):
        hellaswag.evaluate(HellaSwagConfig(), CPU, None)
    assert not web.file.parent.exists()


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError(OSError(101, "Network is unreachable")),
        http.client.IncompleteRead(b"abc"),
        TimeoutError("timed out"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_network_says_what_to_do(web, error):
    web.error = error
    with pytest.raises(OSError, match=r"(?s)cannot be downloaded .*--data"):
        hellaswag.evaluate(HellaSwagConfig(), CPU, None)


def test_a_cache_that_cannot_be_written_is_not_called_a_failed_download(web, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"(?s)cache/hellaswag cannot be made .*--data") as error:
        hellaswag.evaluate(HellaSwagConfig(), CPU, None)
    assert "download" not in str(error.value) and web.requests == 1
    assert hellaswag.questions_for_training(CPU) is None
    assert "note: no HellaSwag in this run: " in capsys.readouterr().out


def test_training_continues_without_the_data_and_says_so_once(web, data, capsys):
    web.error = TimeoutError("timed out")
    assert hellaswag.questions_for_training(CPU) is None
    printed = capsys.readouterr().out
    assert printed.startswith("note: no HellaSwag in this run: ") and printed.count("\n") == 1
    assert str(web.file) in printed and "--data" not in printed, "train_gpt2.py has no such flag"
    web.error = None
    expected = hellaswag.load_questions(data, "completion")
    assert hellaswag.questions_for_training(CPU) == expected and web.requests == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("taken", ["model", "data"])
def test_the_model_or_the_data_is_never_written_over(tmp_path, data, taken):
    files = {"model": tmp_path / "model.pt", "data": data}
    files["model"].write_bytes(b"weights")
    before = all_files(tmp_path)
    given = HellaSwagConfig(model=str(files["model"]), data=data, out=files[taken])
    with pytest.raises(ValueError, match="is the model or the data itself: give another file"):
        hellaswag.evaluate(given, CPU, None)
    assert all_files(tmp_path) == before


def be_command(rank: int, first: Path, out: Path) -> None:
    """Be `python hellaswag.py`. Only rank 0 is on the node that has the files."""
    os.chdir(first if rank == 0 else out)
    words = ["--model", "model.pt", "--data", "examples.jsonl", "--out", str(out / "results")]
    sys.argv = ["hellaswag.py", *words, "--device", "cpu", "--dtype", "float32"]
    hellaswag.main()


def test_scoring_leaves_cudnn_out_of_attention(data, monkeypatch):
    seen, hidden = [], GPT.hidden

    def watched(self, *args, **kwargs):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return hidden(self, *args, **kwargs)

    monkeypatch.setattr(GPT, "hidden", watched)
    questions = hellaswag.load_questions(data, "completion")
    hellaswag.ending_losses(random_model(64), questions, CPU)
    assert seen and not any(seen), "it would make a plan for each shape"
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_only_the_first_node_needs_the_files(tmp_path, data):
    save(random_model(64), tmp_path / "model.pt")
    results = []
    for world_size in (1, 2):
        out = tmp_path / str(world_size)
        out.mkdir()
        ended = run_ranks(out, be_command, world_size, tmp_path, out)
        assert [rank.code for rank in ended] == [0] * world_size, ended
        assert sum("HellaSwag, style" in rank.out for rank in ended) == 1
        lines = [json.loads(line) for line in (out / "results").read_text().splitlines()]
        results.append([line["losses"] for line in lines[:-1]])
    assert np.allclose(*results)


def ask_for_training(rank: int, data: Path) -> None:
    """Get the questions as training does. Only rank 0 is on the node that has the file."""
    hellaswag.ensure_data = {0: lambda: data}.get(rank)  # None: it must not be called
    settings = train_gpt2.TrainConfig(device="cpu")
    with train_gpt2.set_up_machine(settings) as machine:
        print(len(hellaswag.questions_for_training(machine).items))


def test_training_reads_the_file_on_the_first_node_only(tmp_path, data):
    ended = run_ranks(tmp_path, ask_for_training, 2, data)
    assert [(rank.code, rank.out) for rank in ended] == [(0, f"{len(EXAMPLES)}\n")] * 2, ended


def test_a_file_that_is_missing_is_one_error_of_all_ranks(tmp_path):
    (tmp_path / "model.pt").touch()
    ended = run_ranks(tmp_path, be_command, 2, tmp_path, tmp_path)
    (line,) = error_lines(ended)
    assert line == "hellaswag.py: error: examples.jsonl: no such file: check --data"
    assert [rank.code for rank in ended] == [2, 2]


# -----------------------------------------------------------------------------
# the command


@pytest.fixture
def command(model, monkeypatch, capsys):
    """Run hellaswag.py with arguments; return its exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["hellaswag.py", *map(str, arguments)])
        monkeypatch.setattr(train_gpt2, "load_model", lambda name, device: model)
        code = 0
        try:
            hellaswag.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("style", ["completion", "harness"])
def test_command_prints_the_style_and_writes_every_example(data, tmp_path, command, model, style):
    out = tmp_path / "results.jsonl"
    arguments = ["--data", data, "--style", style, "--dtype", "float32", "--out", out]
    code, printed, _ = command(*arguments, "--device", "cpu", "--model", "tiny")
    *lines, summary = map(json.loads, out.read_text().splitlines())
    questions = hellaswag.load_questions(data, style)
    losses = hellaswag.ending_losses(model, questions, CPU)
    assert code == 0 and f"style {style}: acc {summary['acc']:.4f}" in printed
    assert summary.pop("seconds") > 0
    assert summary == {**hellaswag.summarize(questions, losses), "model": "tiny"}
    assert [line["losses"] for line in lines] == losses.tolist()
    assert [line["label"] for line in lines] == [0, 1, 1, 1]
    assert sum(line["pred"] == line["label"] for line in lines) / 4 == summary["acc"]
    assert sum(line["pred_norm"] == line["label"] for line in lines) / 4 == summary["acc_norm"]
    assert [line["index"] for line in lines] == [0, 1, 2, 3]


def test_the_results_name_the_checkpoint_that_answered(data, tmp_path, command, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, out = Path("log", "mine"), Path("results.jsonl")
    run.mkdir(parents=True)
    path = save(model, run / "ckpt_000007.pt")
    for arguments in [], ["--model", run]:  # the newest below log/; a run's folder
        assert command("--data", data, "--device", "cpu", "--out", out, *arguments)[0] == 0
        assert json.loads(out.read_text().splitlines()[-1])["model"] == str(path)


def test_a_console_without_the_characters_gets_escapes(tmp_path, command, monkeypatch):
    for name in "stdout", "stderr":  # as under PYTHONIOENCODING=ascii
        stream = io.TextIOWrapper(io.BytesIO(), "ascii", "strict", write_through=True)
        monkeypatch.setattr(sys, name, stream)
    missing = tmp_path / "naïve 中.jsonl"
    assert command("--data", missing, "--device", "cpu")[0] == 2
    assert b"na\\xefve \\u4e2d.jsonl: no such file: check --data" in stream.buffer.getvalue()


def test_limit_counts_examples(data, command):
    code, printed, _ = command("--data", data, "--limit", 2, "--device", "cpu")
    assert code == 0 and "(2 examples" in printed


def test_mistakes_are_one_line_and_exit_2(data, tmp_path, command, monkeypatch):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text("{}\n")
    for arguments, what in (
        (["--data", tmp_path / "none.jsonl"], "no such file"),
        (["--data", tmp_path], "cannot be read (Is a directory)"),
        (["--data", tmp_path / "empty.jsonl"], "holds no examples"),
        (["--data", tmp_path / "bad.jsonl"], "line 1 is not a HellaSwag example"),
        (["--data", data, "--limit", 0], "--limit"),
        (["--data", data, "--style", "other"], "style"),
        (["--data", data, "--out", tmp_path / "none/out.jsonl"], "--out"),
        (["--data", data, "--out", tmp_path], "--out"),
    ):
        code, printed, complaint = command(*arguments, "--device", "cpu")
        assert (code, printed, complaint.count("\n")) == (2, "", 1), (arguments, complaint)
        assert complaint.startswith("hellaswag.py: error: ") and what in complaint


def test_losses_that_are_not_finite_are_an_error(data, command, model, monkeypatch):
    nan = torch.full((4, 4), torch.nan)
    monkeypatch.setattr(hellaswag, "ending_losses", lambda *arguments: nan)
    code, _, complaint = command("--data", data, "--device", "cpu")
    assert code == 2 and "not finite" in complaint


# -----------------------------------------------------------------------------
# the real data: see benchmarks/hellaswag.md


def real_lines(count):
    """Return lines of the validation set, drawn at random with a fixed seed."""
    given = os.environ.get("HELLASWAG_DATA")
    try:
        path = hellaswag.ensure_data(given and Path(given))
    except OSError as error:
        pytest.skip(str(error))
    return random.Random(0).sample(path.read_text().splitlines(), count)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_twice_as_fast_as_the_plain_way(data, dtype):
    """200 examples, GPT-2 124M with random weights; `-s` shows the times.

    Half of the plain way runs before ours and half after it, so that other work on the machine
    slows both.
    """
    data.write_text("\n".join(real_lines(200)))
    style, items = questions = hellaswag.load_questions(data, "completion")
    torch.manual_seed(0)
    model, machine = GPT(GPTConfig()).eval(), Machine(CPU.device, getattr(torch, dtype))

    def timed(way, *arguments):
        start = np.array([time.perf_counter(), time.process_time()])
        with machine.autocast:
            losses = way(model, *arguments)
        return losses, np.array([time.perf_counter(), time.process_time()]) - start

    timed(plain_losses, Questions(style, items[:2]))  # warm up
    first, first_half = timed(plain_losses, Questions(style, items[:100]))
    ours, our_time = timed(hellaswag.ending_losses, questions, machine)
    last, last_half = timed(plain_losses, Questions(style, items[100:]))
    plain, plain_time = torch.cat([first, last]), first_half + last_half
    worst, ratios = (ours - plain).abs().max().item(), plain_time / our_time
    print(f"\n{dtype}: (wall, CPU) seconds plain {plain_time.round(1)}, ours {our_time.round(1)}")
    print(f"ratio {ratios.round(2)}, largest difference of a loss {worst:.1e}")
    if dtype == "float32":
        assert worst < 1e-4
        assert hellaswag.choices(questions, ours) == hellaswag.choices(questions, plain)
    assert ratios[1] >= 2


@pytest.mark.slow
def test_harness_tokens_are_those_of_lm_eval(data):
    """All 10,042 examples have the same context, the same four endings and the same lengths."""
    utils = pytest.importorskip("lm_eval.tasks.hellaswag.utils")
    from lm_eval.api.model import TemplateLM

    class Encoder:
        backend = "causal"

        def tok_encode(self, text):
            return get_tokenizer().encode_ordinary(text)

    lines = real_lines(10042)
    data.write_text("\n".join(lines))
    items = hellaswag.load_questions(data, "harness").items
    for line, (context, endings, lengths, _) in zip(lines, items, strict=True):
        doc = json.loads(line)
        query = f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}"
        query, texts = utils.preprocess(query), [utils.preprocess(e) for e in doc["endings"]]
        theirs = [TemplateLM._encode_pair(Encoder(), query, " " + text) for text in texts]
        assert theirs == [(context, ending) for ending in endings], doc
        assert [len(text) for text in texts] == lengths


@pytest.mark.slow
def test_harness_agrees_with_lm_eval(data, monkeypatch):
    """Predictions are the same and log-likelihoods within 1e-3, on 400 examples drawn at random.

    Needs the data, and lm-eval in a separate environment, because it has many requirements: see
    benchmarks/hellaswag.md.
    """
    lm_eval = pytest.importorskip("lm_eval")
    import datasets
    from lm_eval.models.huggingface import HFLM
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    lines = real_lines(400)
    data.write_text("\n".join(lines))

    model = random_model(1024)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, bos_token_id=EOT, eos_token_id=EOT)
    theirs = GPT2LMHeadModel(config).eval()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for name, p in weights.items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            weights[name] = p.t()  # their linear layers keep the transpose
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:50257]
    assert theirs.load_state_dict(weights, strict=False).missing_keys == ["lm_head.weight"]
    converter = TikTokenConverter(str(RANKS_PATH), get_tokenizer()._pat_str)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), eos_token="<|endoftext|>"
    )

    lm = HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=16, device="cpu")
    examples = datasets.Dataset.from_list([json.loads(line) for line in lines])
    on_hub = datasets.DatasetDict({"train": examples, "validation": examples})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: on_hub)
    found = lm_eval.simple_evaluate(lm, tasks=["hellaswag"], log_samples=True, bootstrap_iters=0)
    samples = sorted(found["samples"]["hellaswag"], key=lambda sample: sample["doc_id"])

    questions = hellaswag.load_questions(data, "harness")
    losses = hellaswag.ending_losses(model, questions, CPU)
    their_losses = torch.tensor([[-r[0] for r in s["filtered_resps"]] for s in samples])
    assert (losses - their_losses).abs().max() < 1e-3
    assert hellaswag.choices(questions, losses) == hellaswag.choices(questions, their_losses)
    scores = hellaswag.summarize(questions, losses)
    assert [s["acc"] for s in samples].count(1.0) / len(samples) == scores["acc"]
    assert [s["acc_norm"] for s in samples].count(1.0) / len(samples) == scores["acc_norm"]


@pytest.mark.gpu
def test_the_whole_set_takes_ten_seconds_on_a_gpu(data):
    """GPT-2 124M with random weights. The limit is for an H100 or H200; an H200 took 3.5 s."""
    data.write_text("\n".join(real_lines(10_042)))
    questions = hellaswag.load_questions(data, "completion")
    machine = Machine(torch.device("cuda"), torch.bfloat16)
    torch.manual_seed(0)
    model = GPT(GPTConfig()).to(machine.device).eval()
    hellaswag.ending_losses(model, Questions("completion", questions.items[:100]), machine)
    start = time.perf_counter()
    losses = hellaswag.ending_losses(model, questions, machine)
    assert time.perf_counter() - start < 10
    assert losses.shape == (10_042, 4) and losses.isfinite().all()
