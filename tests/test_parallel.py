"""A model on several ranks: sharded or not, it is the same run and the same file."""

import dataclasses
import hashlib
import json
import os
import resource
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import (
    RUN,
    SMALL,
    Ended,
    error_lines,
    flags,
    losses,
    read_metrics,
    run_command_line,
    run_ranks,
    run_train,
    spread,
)

import train_gpt2
from common import checkpoint, hardware, parallel, ranks
from common.checkpoint import read_checkpoint
from common.generate import sample_text
from hellaswag import Question, Questions, ending_losses
from train_gpt2 import GPT, PRESETS, GPTConfig, Machine, TrainConfig, validation_loss

# accumulation, a ramp, clipping, a validation that does not divide: 21 windows over ranks and rows
HARD = dict(
    max_steps=20, total_batch_size=384, micro_batch_size=2, batch_ramp_tokens=1500,
    batch_ramp_start=192, grad_clip=0.3, val_tokens=336, checkpoint_every=10, keep_checkpoints=0,
)  # fmt: skip


def be_command(rank: int, settings: dict, node: int = 0) -> None:
    """Be `python train_gpt2.py`, on a node of so many ranks."""
    if node:
        os.environ["LOCAL_WORLD_SIZE"] = str(node)
    ranks.PATIENCE = 0.4
    if settings.get("optimizer") == "muon":
        # Muon orthogonalises in bfloat16, which makes much of the other order of the ranks' sums
        torch.Tensor.bfloat16 = lambda tensor: tensor * 1
    sys.argv = ["train_gpt2.py", *flags(**{**RUN, **settings})]
    if node:  # print a checksum of this rank's part at the end
        prepare, runs = train_gpt2.prepare, []

        def noted(*args):
            runs.append(prepare(*args))
            for group in next(runs[0].model.parameters()).device_mesh.get_all_groups():
                limit = group._get_backend(torch.device("cpu")).options._timeout
                assert limit.total_seconds() == 600, "--timeout_minutes, not gloo's own limit"
            return runs[0]

        train_gpt2.prepare = noted
    train_gpt2.main()
    if node:
        own = torch.cat([p.to_local().flatten() for p in runs[0].model.parameters()])
        print(hashlib.sha256(own.detach().numpy().tobytes()).hexdigest())


def train_ranks(folder: Path, world_size: int, settings: dict, node: int = 0) -> list[Ended]:
    ended = run_ranks(folder, be_command, world_size, settings, node)
    assert [rank.code for rank in ended] == [0] * world_size, ended
    return ended


# -----------------------------------------------------------------------------
# the same run

CASES = {  # ranks, ranks of a node, settings
    "three ranks, which divide no width": (3, 0, {}),
    "two nodes of two ranks": (4, 2, {"micro_batch_size": 1}),
    "slow: two nodes, Muon": (4, 2, {"micro_batch_size": 1, "optimizer": "muon"}),
    "Muon, recomputed": (2, 0, {"optimizer": "muon", "recompute": "on"}),
    "slow: compiled": (2, 0, {"compile": "on"}),
    "slow: compiled and recomputed": (2, 0, {"recompute": "on", "compile": "on"}),
}


@pytest.fixture(scope="module")
def one_process(data_dir, tmp_path_factory) -> dict[str, list[dict]]:
    """What one process logs, for each optimizer."""
    found = {}
    for optimizer in ("adamw", "muon"):
        folder = tmp_path_factory.mktemp(optimizer)
        settings = dict(data_dir=data_dir, out_dir=folder / "log", optimizer=optimizer)
        train_ranks(folder, 1, {**HARD, **settings})
        found[optimizer] = read_metrics(folder / "log")
    return found


SLOW = [pytest.param(case, marks=[pytest.mark.slow] * case.startswith("slow")) for case in CASES]


@pytest.mark.parametrize("case", SLOW)
def test_sharded_ranks_equal_one_process(data_dir, tmp_path, one_process, case):
    world_size, node, changes = CASES[case]
    settings = {**HARD, **changes, "data_dir": data_dir}
    settings |= dict(out_dir=tmp_path / "sharded", shard="on")
    first, *others = train_ranks(tmp_path, world_size, settings, node)
    assert f"sharded over {node or world_size} ranks" in first.out
    if node:  # the copies of the nodes
        copies = [rank.out.split()[-1] for rank in (first, *others)]
        assert copies[:2] == copies[2:] and copies[0] != copies[1]
    else:
        assert not any(rank.out or rank.err for rank in others)
    one = one_process[changes.get("optimizer", "adamw")]
    sharded = read_metrics(tmp_path / "sharded")
    assert len(losses(one)) > 20
    for (step, loss, norm, rate), b in zip(losses(one), losses(sharded), strict=True):
        assert b == (step, pytest.approx(loss, abs=1e-5), pytest.approx(norm, rel=1e-4), rate)
    validation = [[m["loss"] for m in run if m["event"] == "val"] for run in (one, sharded)]
    assert validation[0] == pytest.approx(validation[1], abs=1e-5)


def test_the_norm_of_a_large_gradient_is_exact_on_a_cpu():
    large, small = (torch.nn.Parameter(torch.empty(size)) for size in ((50304, 64), (64,)))
    torch.manual_seed(0)
    for p in (large, small):
        p.grad = torch.randn(p.shape)
    exact = torch.cat([p.grad.flatten() for p in (large, small)]).double().norm().item()
    untouched = torch.nn.Parameter(torch.empty(3))  # without a gradient
    norm = parallel.clip_gradients([large, untouched, small], 1.0)
    assert norm.item() == pytest.approx(exact, rel=1e-6), "torch's own is 1e-4 too small"
    clipped = torch.cat([p.grad.flatten() for p in (large, small)]).double().norm().item()
    assert clipped == pytest.approx(1, rel=1e-5)


@pytest.mark.gpus
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_gpus_that_share_a_model_equal_one(data_dir, tmp_path, optimizer):
    settings = {**RUN, "device": "cuda", "compile": "auto", "optimizer": optimizer}
    run_train(data_dir, tmp_path / "one", **settings)
    settings |= dict(data_dir=data_dir, out_dir=tmp_path / "two", shard="on")
    result = run_command_line("train_gpt2.py", *flags(**settings), ranks=2)
    assert result.returncode == 0, result.stderr
    one, two = (losses(read_metrics(tmp_path / name)) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, abs=1e-3)


def be_poisoned(rank: int, settings: dict) -> None:
    """On rank 1, the second forward pass of the third step gives infinity."""
    loss, calls = GPT.loss, [0]

    def poisoned(self, x, targets):
        calls[0] += self.training
        bad = self.training and rank == 1 and calls[0] == 6
        return loss(self, x, targets) * (float("inf") if bad else 1)

    GPT.loss = poisoned
    scales, step = [], train_gpt2.train_step

    def noted(model, optimizers, scaler, *args, **kwargs):
        result = step(model, optimizers, scaler, *args, **kwargs)
        scales.append(scaler.get_scale())
        return result

    train_gpt2.train_step = noted
    be_command(rank, settings)
    print("scales", scales[:6])


def test_what_is_not_finite_on_one_rank_is_skipped_by_all_and_lowers_the_same_scale(
    data_dir, tmp_path
):
    settings = dict(data_dir=data_dir, out_dir=tmp_path / "log", shard="on", dtype="float16")
    ended = run_ranks(tmp_path, be_poisoned, 2, settings)
    assert [rank.code for rank in ended] == [0, 0], ended
    (skip,) = read_metrics(tmp_path / "log", "skip")
    assert skip["step"] == 2
    scales = [rank.out.partition("scales ")[2] for rank in ended]
    assert [json.loads(s) for s in scales] == [[65536.0] * 2 + [32768.0] * 4] * 2
    state = read_checkpoint(tmp_path / "log" / "ckpt_000010.pt")
    assert all(w.isfinite().all() for w in state["model"].values())


def evaluate_together(rank: int, model: GPT, questions: Questions, data_dir: Path) -> None:
    """Do on two ranks what does not divide by two; print the results."""
    with ranks.join_ranks(1), ranks.process_group("cpu"):
        machine = Machine(torch.device("cpu"), torch.float32, rank, 2)
        sharded = parallel.spread(model if rank == 0 else model.to("meta"), machine.device, True)
        windows = train_gpt2.Windows(data_dir, "val", 16, 50304)
        assert not torch.is_autocast_cache_enabled(), "it keeps a copy of every whole block"
        x = torch.zeros(1, 16, dtype=torch.long)
        loss = sharded(x, x)
        # gathered once for a forward and backward pass, as FSDP2 does it for what is not a block
        assert not parallel.is_sharded(sharded.transformer.wte.weight)
        assert parallel.is_sharded(sharded.transformer.h[1].mlp.c_fc.weight)
        loss.backward()
        assert parallel.is_sharded(sharded.transformer.wte.weight)
        validation = validation_loss(sharded, windows, 5, 2, machine)
        scored = ending_losses(sharded, questions, machine)
        texts = sample_text(sharded, seed=1)
        # A signal on one rank ends an evaluation on both, in the same pass.
        for evaluate in (
            lambda signals: validation_loss(sharded, windows, 5, 2, machine, signals),
            lambda signals: ending_losses(sharded, questions, machine, signals),
        ):
            with pytest.raises(parallel.StopAsked):
                evaluate([15] * rank)
        left = [name for name, p in sharded.named_parameters() if not parallel.is_sharded(p)]
        assert not left and not sharded.training, "the parts and the mode are as before"
        print(json.dumps([validation, scored.tolist(), texts]))


def test_evaluation_that_does_not_divide_by_the_ranks_gives_what_one_process_gives(
    data_dir, tmp_path, monkeypatch
):
    config = GPTConfig(**{**SMALL, "vocab_size": 50257, "block_size": 48})
    torch.manual_seed(0)
    model = spread(GPT(config))
    items = [Question([1] * n, [[2, 3], [4], [5, 6, 7], [8]], [2, 1, 3, 1], 0) for n in (3, 9, 30)]
    questions = Questions("completion", items)
    monkeypatch.setattr("hellaswag.CPU_BATCH_TOKENS", 1)  # a batch for each question
    machine = Machine(torch.device("cpu"), torch.float32)
    windows = train_gpt2.Windows(data_dir, "val", 16, 50304)
    expected = [
        validation_loss(model, windows, 5, 2, machine),
        ending_losses(model, questions, machine).tolist(),
        sample_text(model, seed=1),
    ]
    first, second = run_ranks(tmp_path, evaluate_together, 2, model, questions, data_dir)
    assert (first.code, second.code) == (0, 0), (first, second)
    for output in (first.out, second.out):
        validation, scored, texts = json.loads(output)
        assert validation == pytest.approx(expected[0], abs=1e-6)
        assert scored == [pytest.approx(row, abs=1e-4) for row in expected[1]]
        assert texts == expected[2]


# -----------------------------------------------------------------------------
# the same file


def save_again(rank: int, settings: dict) -> None:
    """Resume a run, and save it at once under the name of the next step."""
    config = TrainConfig(**{**RUN, **settings})
    with train_gpt2.set_up_machine(config) as machine:
        run = train_gpt2.prepare(config, machine)
        run.step += 1
        checkpoint.save_run(run, SimpleNamespace(write=lambda *args, **kwargs: None))


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(("writes", "reads"), [(1, 2), (3, 1)])
def test_a_checkpoint_is_the_same_bits_for_any_number_of_ranks(data_dir, tmp_path, writes, reads):
    def settings(world_size: int) -> dict:  # with Muon there is AdamW's state too
        return dict(
            data_dir=data_dir, out_dir=tmp_path / "log", max_steps=4, optimizer="muon",
            total_batch_size=192, micro_batch_size=2, shard="on" if world_size > 1 else "off",
        )  # fmt: skip

    train_ranks(tmp_path, writes, settings(writes))
    ended = run_ranks(tmp_path, save_again, reads, settings(reads) | {"resume": True})
    assert [rank.code for rank in ended] == [0] * reads, ended
    before, after = (read_checkpoint(tmp_path / "log" / f"ckpt_00000{n}.pt") for n in (4, 5))
    assert equal(before["model"], after["model"])
    for name in ("optimizer", "muon"):
        assert before[name]["state"] and equal(before[name]["state"], after[name]["state"])
    assert list(before["model"]) == list(GPT(GPTConfig(**SMALL)).state_dict())[:-1]
    assert after["windows_seen"] == before["windows_seen"]
    assert train_gpt2.load_model(tmp_path / "log" / "ckpt_000005.pt").config == GPTConfig(**SMALL)
    assert (tmp_path / "log" / "hf" / "model.safetensors").exists()


def be_careless(rank: int, settings: dict, kill: bool) -> None:
    """Train; rank 1 may read no checkpoint, and is killed in the fourth step if asked."""
    if rank == 1:
        checkpoint.read_pickle = None
    calls, step = [0], train_gpt2.train_step

    def killed(*args, **kwargs):
        calls[0] += 1
        if kill and rank == 1 and calls[0] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args, **kwargs)

    train_gpt2.train_step = killed
    be_command(rank, settings)


def test_after_a_rank_is_killed_a_sharded_run_goes_on_as_if_nothing_had_been(data_dir, tmp_path):
    same = dict(data_dir=data_dir, shard="on", checkpoint_every=2, max_steps=6)
    train_ranks(tmp_path, 2, same | dict(out_dir=tmp_path / "whole"))
    settings = same | dict(out_dir=tmp_path / "log", resume=True)
    ended = run_ranks(tmp_path, be_careless, 2, settings, True)
    assert [rank.code for rank in ended] == [2, -signal.SIGKILL]
    (line,) = error_lines(ended)
    assert line.endswith("another rank has ended: use --resume")
    ended = run_ranks(tmp_path, be_careless, 2, settings, False)
    assert [rank.code for rank in ended] == [0, 0], ended
    assert losses(read_metrics(tmp_path / "log")) == losses(read_metrics(tmp_path / "whole"))


# -----------------------------------------------------------------------------
# memory


def hold_a_part(rank: int, settings: dict) -> None:
    """Train; print the parts of weights, gradients and moments that this rank holds."""

    def held(tensors) -> int:
        return sum(t.to_local().numel() for t in tensors if parallel.is_sharded(t))

    step = train_gpt2.train_step

    def noted(model, optimizers, scaler, *args, **kwargs):
        adamw, parameters = optimizers["optimizer"], list(model.parameters())
        gradients = []
        adamw.register_step_pre_hook(lambda *_: gradients.append(held(p.grad for p in parameters)))
        result = step(model, optimizers, scaler, *args, **kwargs)
        moments = held(t for state in adamw.state.values() for t in state.values())
        print("held", held(parameters) / model.n_params, gradients[0] / model.n_params,
              moments / model.n_params, end=" ")  # fmt: skip
        return result

    train_gpt2.train_step = noted
    be_command(rank, settings)


def test_a_rank_of_two_holds_half_of_weights_gradients_and_moments(data_dir, tmp_path):
    settings = dict(data_dir=data_dir, out_dir=tmp_path / "log", shard="on", max_steps=1)
    for rank in run_ranks(tmp_path, hold_a_part, 2, settings):
        assert rank.code == 0, rank
        weights, gradients, moments = map(float, rank.out.partition("held ")[2].split()[:3])
        assert weights == gradients == moments / 2 == pytest.approx(0.5, abs=0.02)


def use_memory(rank: int, settings: dict) -> None:
    """Train; print the most memory that this process has used, in bytes."""
    be_command(rank, settings)
    print("used", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


@pytest.mark.slow  # the test before it is its short form
def test_with_gpt2_medium_a_rank_of_two_needs_two_thirds_of_the_memory(data_dir, tmp_path):
    settings = dict(data_dir=data_dir, preset="gpt2-medium", n_embd=1024, n_head=16, n_layer=24)
    settings |= dict(vocab_size=50257, block_size=64, total_batch_size=512, micro_batch_size=2)
    settings |= dict(max_steps=3, eval_every=0, sample_every=0)
    used = {}
    for shard in ("off", "on"):
        settings |= dict(out_dir=tmp_path / shard, shard=shard)
        ended = run_ranks(tmp_path, use_memory, 2, settings, seconds=500)
        used[shard] = int(ended[1].out.partition("used ")[2])
    assert used["off"] > 20 * 355e6, "DDP: weights, gradients, moments, buckets"
    assert used["on"] < 0.7 * used["off"], used


def test_recomputing_keeps_less_and_changes_no_bit(small_model):
    torch.manual_seed(1)
    x = torch.randint(300, (4, 17))
    kept, gradients = [], []
    for recompute in (False, True):
        small_model.recompute, sizes = recompute, []
        small_model.zero_grad()

        def note(tensor: torch.Tensor, sizes=sizes) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = small_model(x[:, :-1], x[:, 1:])
        loss.backward()
        kept.append(sum(sizes))
        gradients.append([p.grad.clone() for p in small_model.parameters()])
    assert kept[1] < kept[0] / 2
    assert all(map(torch.equal, *gradients))


def count_bytes(rank: int) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    import sharding

    config = GPTConfig(n_layer=3, n_head=8, n_embd=1024, block_size=512)
    with torch.device("meta"):
        model = GPT(config)
    for world_size, dtype, rows, recompute in (
        (8, torch.float32, 8, False),
        (8, torch.float16, 8, True),
        (16, torch.bfloat16, 1, True),  # two nodes
    ):
        sharding.simulate(world_size, 8)
        counted = sharding.count(config, rows, recompute, dtype)
        if world_size == 8:
            assert counted.weights == counted.gradients == counted.moments / 2
        print(parallel.bytes_of_step(model, rows, 8, dtype, False, recompute) / counted.total)


def test_what_is_planned_for_a_step_is_enough_and_not_far_too_much(tmp_path):
    (ended,) = run_ranks(tmp_path, count_bytes, 1)
    assert ended.code == 0, ended
    ratios = [float(line) for line in ended.out.splitlines()]
    assert len(ratios) == 3 and all(1 <= ratio < 1.3 for ratio in ratios), ratios


# -----------------------------------------------------------------------------
# choices


def test_one_process_cannot_share_a_model(data_dir, tmp_path):
    with pytest.raises(ValueError, match=r"there is only one rank.*: start several with torchrun"):
        run_train(data_dir, tmp_path / "log", shard="on")
    assert not (tmp_path / "log" / "metrics.jsonl").exists()


def test_statistics_of_layers_are_refused_for_parts_of_layers(data_dir, tmp_path):
    settings = dict(data_dir=data_dir, out_dir=tmp_path / "log", shard="on", stats_every=1)
    (line,) = error_lines(run_ranks(tmp_path, be_command, 2, {**RUN, **settings}))
    assert line.endswith("stats_every works on whole models: give --stats_every 0 or --shard off")


@dataclasses.dataclass
class Cards:
    """Several equal GPUs, as torch shows them to a rank."""

    total_memory: float
    world_size: int = 8

    def __enter__(self) -> "Cards":
        self.patch = pytest.MonkeyPatch()
        set_to = self.patch.setattr
        set_to(torch.cuda, "get_device_properties", lambda device: self)
        set_to(torch.cuda, "mem_get_info", lambda device: (self.total_memory, self.total_memory))
        set_to(torch.cuda, "memory_reserved", lambda device: 0)
        set_to(dist, "is_initialized", lambda: True)
        set_to(dist, "get_world_size", lambda: self.world_size)
        set_to(ranks, "all_sum", lambda value, device: value * self.world_size)
        self.patch.setenv("LOCAL_WORLD_SIZE", "8")
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def outline(preset: str) -> GPT:
    names = ("n_layer", "n_embd", "n_head", "block_size")
    with torch.device("meta"):
        return GPT(GPTConfig(**{name: getattr(PRESETS[preset], name) for name in names}))


@pytest.mark.parametrize(
    ("preset", "gigabytes", "sharded"),
    [
        ("gpt2", 16, False),
        ("gpt2-medium", 24, False),
        ("gpt2-xl", 24, True),
        ("gpt2-xl", 80, False),
        ("gpt3-1.3b", 80, False),
        ("gpt3-6.7b", 80, True),
        ("gpt3-13b", 141, True),
    ],
)
def test_a_model_is_sharded_where_it_would_not_fit_and_only_there(preset, gigabytes, sharded):
    model, device = outline(preset), torch.device("cuda")
    with Cards(gigabytes * 1e9):
        for setting, expected in (("auto", sharded), ("on", True), ("off", False)):
            found, notes = parallel.choose_shard(setting, model.n_params, device)
            assert found == expected == bool(notes)
        alone = parallel.choose_shard("auto", model.n_params, torch.device("cpu"))
    assert alone == (False, []), "a CPU's memory is not this process's alone"


def test_the_note_gives_the_numbers():
    with Cards(85e9):
        _, (note,) = parallel.choose_shard("auto", 12_850_000_000, torch.device("cuda"))
    assert "over 8 ranks: 26 GB of weights, gradients and moments on each of 85 GB" in note
    assert "(DDP: up to 308 GB)" in note and "A checkpoint has 154 GB" in note


@pytest.mark.parametrize(
    ("preset", "gigabytes", "recompute", "rows"),
    [
        ("gpt3-13b", 85, False, 2),
        ("gpt3-13b", 48, True, 4),
        ("gpt3-6.7b", 85, False, 4),
        ("gpt3-6.7b", 24, True, 2),
    ],
)
def test_blocks_are_computed_again_if_only_small_micro_batches_would_fit(
    monkeypatch, preset, gigabytes, recompute, rows
):
    model = outline(preset)
    part = SimpleNamespace(
        device=torch.device("cuda"), device_mesh=torch.empty(8), full_tensor=None, numel=lambda: 0
    )
    monkeypatch.setattr(GPT, "reshard", None, raising=False)
    block = model.transformer.h[0]
    sizes = list(block.parameters())
    monkeypatch.setattr(block, "parameters", lambda: sizes)
    monkeypatch.setattr(model, "parameters", lambda: iter([part]))
    with Cards(gigabytes * 1e9):
        found = parallel.choose_recompute("auto", model, None, 64, torch.bfloat16, True)
        assert found == recompute
        assert parallel.choose_recompute("off", model, None, 64, torch.bfloat16, True) is False
        assert parallel.choose_recompute("on", model, None, 64, torch.bfloat16, True) is True
        # so many rows may be asked for that they cannot fit without it
        assert parallel.choose_recompute("auto", model, 64, 64, torch.bfloat16, True)
        fits = lambda n: parallel.fits_sharded(model, n, torch.bfloat16, True, found)  # noqa: E731
        assert hardware.largest_that_fits(64, fits) == rows
