"""The model, the loader, the schedule and one step of train_gpt2.py."""

import contextlib
import dataclasses
import io
import itertools
import math
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import RUN, SMALL, all_files, flags, losses, run_command_line, run_train, write_shards

import train_gpt2
from common.hardware import flops_per_token, ugly_dimensions
from common.tokenizer import get_tokenizer
from train_gpt2 import (
    GPT,
    PRESETS,
    GPTConfig,
    Machine,
    TrainConfig,
    Windows,
    bits_per_byte,
    compile_model,
    learning_rate,
    load_model,
    make_optimizers,
    micro_batches,
    set_up_machine,
    step_batch_tokens,
    train_step,
    validation_loss,
    window_order,
)

CPU = Machine(torch.device("cpu"), torch.float32)
CPU16 = dataclasses.replace(CPU, dtype=torch.bfloat16)
RUN_SEED = TrainConfig().seed
UNSCALED = torch.amp.GradScaler("cpu", enabled=False)


# -----------------------------------------------------------------------------
# model


@pytest.mark.parametrize(
    "sizes",
    [
        dict(n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=128),
        dict(n_layer=3, n_head=4, n_embd=64, block_size=32, vocab_size=384),
        dict(n_layer=2, n_head=6, n_embd=48, block_size=64, vocab_size=1024),
    ],
)
def test_logits_and_gradients_equal_transformers(sizes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    ours = GPT(GPTConfig(**sizes))
    with torch.no_grad():
        for p in ours.parameters():  # larger weights than at initialisation show more errors
            p.add_(torch.randn_like(p) * 0.1)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=sizes["n_layer"], n_head=sizes["n_head"], n_embd=sizes["n_embd"],
            n_positions=sizes["block_size"], vocab_size=sizes["vocab_size"],
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        )
    )  # fmt: skip
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # theirs are transposed
    weights = {n: p.t() if n.endswith(linear) else p for n, p in ours.named_parameters()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    idx = torch.randint(0, sizes["vocab_size"], (2, sizes["block_size"]))
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=0)

    targets = torch.randint(0, sizes["vocab_size"], idx.shape)
    ours(idx, targets).backward()
    logits = theirs(idx).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    grads = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        expected = grads[name].grad.t() if name.endswith(linear) else grads[name].grad
        torch.testing.assert_close(p.grad, expected, atol=1e-3, rtol=0, msg=name)


def test_gpt2_has_the_published_size_and_decays_matrices_only():
    model = GPT(GPTConfig())
    sizes = [p.numel() for p in model.parameters()]
    assert sum(sizes) == model.n_params == 124_475_904
    padding = (50304 - 50257) * 768
    assert sum(sizes) - padding == 124_439_808
    decayed, undecayed = make_optimizers(model, TrainConfig(), CPU)["optimizer"].param_groups
    assert decayed["weight_decay"] == 0.1 and undecayed["weight_decay"] == 0
    assert (len(decayed["params"]), sum(p.numel() for p in decayed["params"])) == (50, 124_354_560)
    assert (len(undecayed["params"]), sum(p.numel() for p in undecayed["params"])) == (98, 121_344)
    # 860 MFLOP a token is what speeds are reported with
    assert round(flops_per_token(model.n_params, 12, 768, 1024) / 1e6) == 860

    idx = torch.randint(0, 50257, (2, 65))
    with torch.no_grad():
        assert abs(model(idx[:, :-1], idx[:, 1:]).item() - math.log(50257)) < 0.2


def test_adamw_gets_the_settings_of_the_configuration(small_model):
    given = dict(beta1=0.8, beta2=0.7, eps=1e-6, weight_decay=0.3, max_lr=2e-3)
    adamw = make_optimizers(small_model, TrainConfig(**given), CPU)["optimizer"]
    for group in adamw.param_groups:
        assert group["betas"] == (0.8, 0.7) and group["eps"] == 1e-6 and group["fused"]
        assert group["peak_lr"] == 2e-3 and group["logged_as"] == "lr"
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.3, 0.0]


def test_initialisation_scales_residual_projections():
    model = GPT(GPTConfig(n_layer=8, n_embd=256, n_head=4, vocab_size=500))
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / 4, rel=0.02), name
        elif p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.02), name
        else:
            assert (p == ("ln" in name and "weight" in name)).all(), name
    assert model.lm_head.weight is model.transformer.wte.weight


def test_no_position_sees_a_later_one(small_model):
    embedded = small_model.transformer.wte(torch.arange(16)).detach()[None].requires_grad_()
    small_model.transformer.wte.forward = lambda idx: embedded
    small_model.hidden(torch.arange(16)[None])[0, 7, 0].backward()
    seen = embedded.grad[0].abs().sum(dim=1) > 0
    assert seen.tolist() == [True] * 8 + [False] * 8


def test_targets_of_minus_one_do_not_count(small_model):
    idx = torch.randint(0, 300, (3, 16))
    targets = torch.randint(0, 300, (3, 16))
    expected = small_model(idx[:2], targets[:2])
    targets[2] = -1
    torch.testing.assert_close(small_model(idx, targets), expected)


def test_the_loss_in_parts_is_the_loss_of_the_whole(small_model, monkeypatch):
    ids, targets = torch.randint(0, 300, (2, 6, 16), generator=torch.Generator().manual_seed(0))
    targets[3, 2:] = -1  # a mean of the parts' means would be another number
    results, calls, loss = [], [], GPT.loss
    monkeypatch.setattr(GPT, "loss", lambda *args: calls.append(len(args[1])) or loss(*args))
    for most in (train_gpt2.MOST_LOGITS, 5 * 16 * 384, 16 * 384 - 1):
        monkeypatch.setattr(train_gpt2, "MOST_LOGITS", most)
        small_model.zero_grad()
        whole = small_model(ids, targets)
        whole.backward()
        results.append([whole.detach(), *(p.grad for p in small_model.parameters())])
    assert calls == [6, 3, 3, *[1] * 6], "equal parts share one graph; a row is never cut"
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize(
    ("dtype", "stream"),
    [("float32", torch.float32), ("float16", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_in_training_the_residual_stream_is_bfloat16_if_the_products_are(
    small_model, dtype, stream
):
    seen = []
    for block in small_model.transformer.h:
        block.register_forward_hook(lambda block, inputs, x: seen.extend([inputs[0], x]))
    machine = dataclasses.replace(CPU, dtype=getattr(torch, dtype))
    with machine.autocast:
        small_model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    assert {x.dtype for x in seen} == {stream}
    assert {p.grad.dtype for p in small_model.parameters()} == {torch.float32}
    seen.clear()
    with machine.autocast:
        small_model.eval()(torch.zeros(1, 4, dtype=torch.long))
    assert {x.dtype for x in seen} == {torch.float32}, "a score needs no speed but exact sums"


def test_a_bfloat16_stream_changes_the_gradient_by_about_one_percent():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=12, n_head=2, n_embd=64, block_size=32, vocab_size=300))
    ids, targets = torch.randint(0, 300, (2, 8, 32))
    gradients = []
    for autocast in (CPU.autocast, CPU16.autocast):
        model.zero_grad()
        with autocast:
            model(ids, targets).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    exact, rounded = gradients
    assert 0 < (rounded - exact).norm() < 0.02 * exact.norm()


def test_one_batch_can_be_overfitted(small_model):
    x, y = torch.randint(0, 300, (2, 4, 16))
    optimizers = {"optimizer": torch.optim.AdamW(small_model.parameters(), lr=1e-2)}
    for _ in range(100):
        result = train_step(small_model, optimizers, UNSCALED, iter([(x, y)]), 1, 1.0, CPU)
    assert result.loss < 0.1


def test_every_preset_builds_and_has_sizes_that_suit_a_gpu():
    for name, preset in PRESETS.items():
        config = TrainConfig(preset=name)
        assert config.model_config().n_embd == preset.n_embd
        assert config.total_batch_size % (preset.micro_batch_size * preset.block_size) == 0
        sizes = preset.n_embd, preset.n_head, preset.block_size, preset.micro_batch_size
        assert not ugly_dimensions(*sizes), name


# -----------------------------------------------------------------------------
# data


def test_windows_are_the_shards_cut_into_rows_without_crossing(data_dir):
    windows = Windows(data_dir, "train", 16, 300)
    shards = [np.load(data_dir / f"edufineweb_train_00000{i}.npy") for i in (1, 2)]
    assert len(windows) == 62 + 48
    expected = [s[i * 16 : i * 16 + 17] for s in shards for i in range((len(s) - 1) // 16)]
    x, y = windows.read(np.arange(110))
    assert (x.numpy() == np.stack(expected)[:, :-1]).all()
    assert (y.numpy() == np.stack(expected)[:, 1:]).all()


def test_an_epoch_is_a_permutation_that_only_seed_and_epoch_decide():
    first = window_order(1000, 1, 0)
    assert sorted(first) == list(range(1000)) and (np.diff(first) != 1).any()
    assert (first == window_order(1000, 1, 0)).all()
    assert (first != window_order(1000, 1, 1)).any()
    assert (first != window_order(1000, 2, 0)).any()


@pytest.mark.parametrize(
    ("tokens", "windows"), [(16, 0), (17, 1), (32, 1), (33, 2), (48, 2), (49, 3), (1, 0)]
)
def test_every_window_has_a_target_for_its_last_input(tmp_path, tokens, windows):
    # a shard of exactly k * T tokens has k - 1 windows: its last input would have no target
    lengths = {"a_train_1.npy": tokens, "a_train_2.npy": 33}
    found = Windows(write_shards(tmp_path, lengths), "train", 16, 300)
    assert len(found) == windows + 2
    x, y = found.read(np.arange(len(found)))
    shards = [np.load(tmp_path / name) for name in lengths]
    rows = [shard[i * 16 : i * 16 + 17] for shard in shards for i in range((len(shard) - 1) // 16)]
    assert (torch.cat([x, y[:, -1:]], dim=1).numpy() == np.stack(rows)).all()


@pytest.mark.parametrize("seed", [None, 5])
def test_the_stream_takes_every_window_once_an_epoch(data_dir, seed):
    windows = Windows(data_dir, "train", 16, 300)
    whole = windows.stream(0, 330, seed)
    pieces = [windows.stream(start, min(7, 330 - start), seed) for start in range(0, 330, 7)]
    assert (np.concatenate(pieces) == whole).all()
    for epoch in range(3):
        assert sorted(whole[epoch * 110 : (epoch + 1) * 110]) == list(range(110))


def rows_of_a_step(data_dir, world_size: int, B: int, step: int) -> Counter:
    """The rows that all ranks together train on in a step, read as training reads them."""
    config = TrainConfig(
        **{**RUN, "micro_batch_size": B, "max_steps": 20, "data_dir": data_dir},
        batch_ramp_tokens=2000, batch_ramp_start=128,
    )  # fmt: skip
    windows = Windows(data_dir, "train", 16, 300)
    seen = 0
    for _ in range(step):
        seen += step_batch_tokens(config, seen)
    micro_steps = step_batch_tokens(config, seen) // (B * 16 * world_size)
    rows = Counter()
    for rank in range(world_size):
        machine = Machine(torch.device("cpu"), torch.float32, rank, world_size)
        batches = micro_batches(windows, config, B, machine, step, seen)
        for _ in range(micro_steps):
            rows.update(tuple(row.tolist()) for row in next(batches)[0])
        batches.close()
    return rows


@pytest.mark.parametrize("step", [0, 1, 9, 12])
def test_what_a_step_trains_on_does_not_depend_on_ranks_or_micro_batch(data_dir, step):
    expected = rows_of_a_step(data_dir, 1, 8, step)
    assert expected == rows_of_a_step(data_dir, 2, 4, step) == rows_of_a_step(data_dir, 4, 1, step)
    assert expected != rows_of_a_step(data_dir, 1, 8, step + 1)


def test_an_id_outside_the_vocabulary_is_refused_wherever_it_lies(tmp_path):
    ids = np.random.default_rng(0).integers(0, 60, 200_000, np.uint16)
    ids[8300] = 100  # inside the padding of the embedding, and not where open_shards looks
    for split in ("train", "val"):
        np.save(tmp_path / f"a_{split}_1.npy", ids)
    windows = Windows(tmp_path, "train", 16, 65)
    windows.read(np.array([0, 1, 8300 // 16 + 1]))
    with pytest.raises(ValueError, match=r"token id 100 in the data, but vocab_size is 65: give"):
        windows.read(np.array([0, 8300 // 16]))
    large = dict(total_batch_size=1 << 14, micro_batch_size=512, max_steps=13)  # all the data
    with pytest.raises(ValueError, match="token id 100"):  # from the thread that reads ahead
        run_train(tmp_path, tmp_path / "log", vocab_size=65, **large)


def test_windows_come_in_order_unless_they_are_shuffled(data_dir):
    windows, firsts = Windows(data_dir, "train", 16, 300), {}
    for shuffle in (False, True):
        config = TrainConfig(**{**RUN, "data_dir": data_dir, "shuffle": shuffle})
        batches = micro_batches(windows, config, 8, CPU, 0, 0)
        firsts[shuffle] = torch.cat([x for x, _ in itertools.islice(batches, 4)])
        batches.close()
    assert torch.equal(firsts[False], windows.read(np.arange(32))[0])
    order = window_order(len(windows), RUN_SEED, 0)[:32]
    assert torch.equal(firsts[True], windows.read(order)[0])
    assert not torch.equal(firsts[True], firsts[False])


def dropout_masks(data_dir, first_step: int, steps: int, rank: int = 0, seed: int = 1) -> list:
    """The random numbers that dropout would draw in each micro-step, two of them a step."""
    config = TrainConfig(
        **{**RUN, "total_batch_size": 256, "max_steps": 20, "data_dir": data_dir, "seed": seed},
        dropout=0.5,
    )  # fmt: skip
    windows, machine = Windows(data_dir, "train", 16, 300), dataclasses.replace(CPU, rank=rank)
    B = 8  # two micro-batches a step
    batches = micro_batches(windows, config, B, machine, first_step, 256 * first_step)
    masks = [torch.rand(4).tolist() for _ in itertools.islice(batches, 2 * steps)]
    batches.close()
    return masks


def test_dropout_masks_differ_by_step_micro_step_rank_and_seed_and_nothing_else(data_dir):
    masks = dropout_masks(data_dir, 0, 4)
    assert len({tuple(mask) for mask in masks}) == 8, "every micro-step of every step has its own"
    torch.manual_seed(99)  # what the generator stands at must not matter
    assert dropout_masks(data_dir, 2, 2) == masks[4:], "a resumed run draws the same masks"
    others = dropout_masks(data_dir, 0, 4, rank=1) + dropout_masks(data_dir, 0, 4, seed=2)
    assert not {tuple(mask) for mask in others} & {tuple(mask) for mask in masks}


def test_without_dropout_the_loader_leaves_the_generator_alone(data_dir):
    config = TrainConfig(**{**RUN, "data_dir": data_dir})
    torch.manual_seed(5)
    before = torch.get_rng_state()
    batches = micro_batches(Windows(data_dir, "train", 16, 300), config, 8, CPU, 0, 0)
    next(batches)
    assert torch.equal(torch.get_rng_state(), before)
    batches.close()


def test_with_a_ramp_the_micro_batch_grows_with_the_batch(data_dir):
    # it must divide the first batch, 2 rows on each of two ranks, but need not stay that small
    settings = dict(batch_ramp_tokens=1024, batch_ramp_start=64, total_batch_size=256)
    config = TrainConfig(**{**RUN, "data_dir": data_dir, **settings})
    windows = Windows(data_dir, "train", 16, 300)
    ranks = [dataclasses.replace(CPU, rank=rank, world_size=2) for rank in (0, 1)]
    taken = [[x for x, _ in micro_batches(windows, config, 8, rank, 0, 0)] for rank in ranks]
    sizes = [[len(x) for x in rows] for rows in taken]
    assert sizes[0] == sizes[1], "the ranks take turns with as many rows each"
    assert sizes[0][0] == 2 and set(sizes[0]) == {2, 4, 8} and sizes[0].count(8) == 5
    seen = windows.read(windows.stream(0, 2 * sum(sizes[0]), RUN_SEED))[0]
    rows = torch.cat(taken[0] + taken[1]).tolist()
    assert Counter(map(tuple, rows)) == Counter(map(tuple, seen.tolist()))


class Copies:
    """Record how rows go to a device, instead of copying them."""

    def __init__(self, monkeypatch):
        self.calls, self.pinned = [], []
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda rows: self.pin(rows))
        monkeypatch.setattr(torch.Tensor, "to", lambda rows, *_, **how: self.copy(rows, **how))

    def pin(self, rows):
        self.pinned.append(rows)
        return rows

    def copy(self, rows, non_blocking=False):
        pinned = any(rows is other for other in self.pinned)
        self.calls.append((rows.is_contiguous(), pinned, non_blocking))
        return rows


def test_a_run_with_a_ramp_takes_every_row_once_whatever_its_micro_batch(data_dir, tmp_path):
    ramp = dict(batch_ramp_tokens=1024, batch_ramp_start=64, max_steps=6, eval_every=0)
    chosen = run_train(data_dir, tmp_path / "chosen", micro_batch_size=None, **ramp)  # up to 8 rows
    given = run_train(data_dir, tmp_path / "given", micro_batch_size=1, **ramp)
    sizes = [m["batch_tokens"] for m in chosen if m["event"] == "train"]
    assert sizes[0] == 64 and max(sizes) == 256
    for a, b in zip(losses(chosen), losses(given), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize("alone", [False, True])
def test_ranks_join_with_the_time_limit_of_the_run_unless_a_command_runs_alone(monkeypatch, alone):
    limits = []

    def join(timeout_minutes):
        limits.append(timeout_minutes)
        return contextlib.nullcontext((0, 1))

    monkeypatch.setattr(train_gpt2.ranks, "join_ranks", join)
    monkeypatch.setattr(train_gpt2.hardware, "count_cores", lambda: 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with set_up_machine(TrainConfig(device="cpu", timeout_minutes=3.5), alone=alone) as machine:
        assert (machine.rank, machine.world_size) == (0, 1)
        assert torch.get_num_threads() == 1, "a container has fewer cores than its machine"
    torch.set_num_threads(before)
    assert limits == ([] if alone else [3.5])


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_only_pinned_memory_is_copied_while_the_cpu_goes_on(data_dir, monkeypatch, kind):
    # from other memory MPS reads rows that are freed already (pytorch#189690), and CUDA waits; rows
    # with gaps would be copied on this thread first
    config = TrainConfig(**{**RUN, "data_dir": data_dir})
    machine, cuda = Machine(torch.device(kind), torch.float32), kind == "cuda"
    copies = Copies(monkeypatch)
    batches = micro_batches(Windows(data_dir, "train", 16, 300), config, 8, machine, 0, 0)
    next(batches)
    batches.close()
    assert copies.calls == [(True, cuda, cuda)] * 2, "inputs and targets"


def test_llm_c_shards_give_the_same_windows(data_dir, tmp_path):
    for path in data_dir.glob("*.npy"):
        tokens = np.load(path)
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, len(tokens)
        (tmp_path / f"{path.stem}.bin").write_bytes(header.tobytes() + tokens.tobytes())
    ours, theirs = (Windows(folder, "train", 16, 300) for folder in (data_dir, tmp_path))
    assert (ours.read(np.arange(110))[0] == theirs.read(np.arange(110))[0]).all()


def anonymous_memory() -> int:
    """This process's own memory, without mapped files, in bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("Anonymous:"))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells its memory")
def test_ten_billion_tokens_open_at_once_in_little_memory(tmp_path):
    header = io.BytesIO()
    layout = {"descr": "<u2", "fortran_order": False, "shape": (100_000_000,)}
    np.lib.format.write_array_header_1_0(header, layout)
    for i in range(100):  # sparse files: 20 GB that take no room
        path = tmp_path / f"edufineweb_{'train' if i else 'val'}_{i:06d}.npy"
        path.write_bytes(header.getvalue())
        os.truncate(path, len(header.getvalue()) + 200_000_000)
    memory, start = anonymous_memory(), time.process_time()
    windows = Windows(tmp_path, "train", 1024, 50257)
    x, _ = windows.read(windows.stream(0, 32, seed=1))
    seconds, memory = time.process_time() - start, anonymous_memory() - memory
    assert len(windows) == 99 * 97656 and x.shape == (32, 1024)
    assert seconds < 2, "processor seconds to the first batch; under 1 on a quiet machine"
    assert memory < 100e6

    for _ in range(2):  # the second time from the page cache
        start = time.process_time()
        for i in range(20):
            windows.read(windows.stream(320 * i, 320, seed=1))
        speed = 20 * 320 * 1024 / (time.process_time() - start)
    assert speed > 12e6, "tokens a processor second: 20 times what an H200 takes"


# -----------------------------------------------------------------------------
# schedule and ramp


def test_learning_rates_of_the_default_run():
    config, batch = TrainConfig(), 524288
    rates = [learning_rate(config, step * batch, batch, config.max_lr) for step in range(19073)]
    assert rates[0] == pytest.approx(6e-4 / 715)
    assert rates[714] == rates[715] == 6e-4
    assert rates[19072] == pytest.approx(6e-5, rel=1e-3) and min(rates[715:]) > 6e-5
    middle = 715 + (19073 - 715) // 2
    assert rates[middle] == pytest.approx((6e-4 + 6e-5) / 2)
    assert rates[:715] == sorted(rates[:715]) and rates[715:] == sorted(rates[715:], reverse=True)


def test_short_runs_warm_up_for_a_tenth():
    assert TrainConfig(max_steps=100).warmup_tokens == 10 * 524288
    assert TrainConfig().warmup_tokens == 715 * 524288
    assert TrainConfig(max_steps=100, warmup_steps=30).warmup_tokens == 30 * 524288


def test_the_ramp_grows_in_steps_of_its_start_and_spends_exactly_the_budget():
    config = TrainConfig(max_steps=10, batch_ramp_tokens=2_000_000)
    batches, seen = [], 0
    while seen < config.budget:
        batches.append(step_batch_tokens(config, seen))
        seen += batches[-1]
    assert seen == config.budget == 10 * 524288
    assert batches[0] == 32768 and batches[-2] == 524288
    assert all(batch % 32768 == 0 for batch in batches)
    assert batches[:-1] == sorted(batches[:-1])
    # linear: half way up the ramp the batch is about half of the way from start to end
    assert step_batch_tokens(config, 1_000_000) == (32768 + (524288 - 32768) // 2) // 32768 * 32768
    # the schedule follows tokens: with the ramp it reaches its peak at the same number of them
    assert learning_rate(config, config.warmup_tokens, 32768, config.max_lr) == config.max_lr


def test_the_linear_schedule_ends_at_zero():
    config, batch = TrainConfig(schedule="linear"), 524288
    rates = [learning_rate(config, step * batch, batch, 6e-4) for step in range(19073)]
    assert rates[0] == pytest.approx(6e-4 / 715) and rates[714] == rates[715] == 6e-4
    assert learning_rate(config, config.budget, batch, 6e-4) == 0
    falls = [a - b for a, b in itertools.pairwise(rates[715:])]
    assert min(falls) == pytest.approx(max(falls)) == pytest.approx(6e-4 / (19073 - 715))


def test_wsd_is_constant_after_warm_up_and_falls_linearly_to_the_ratio():
    config, batch = TrainConfig(schedule="wsd", max_steps=1000, warmup_steps=100), 524288
    rates = [learning_rate(config, step * batch, batch, 6e-4) for step in range(1000)]
    assert rates[:100] == sorted(rates[:100]) and rates[0] == pytest.approx(6e-6)
    assert rates[99:801] == [6e-4] * 702
    falls = [a - b for a, b in itertools.pairwise(rates[800:])]
    assert min(falls) == pytest.approx(max(falls)) == pytest.approx(0.9 * 6e-4 / 200)
    assert learning_rate(config, config.budget, batch, 6e-4) == pytest.approx(6e-5)
    # a longer run has the same rates until the shorter one goes down: it can be branched there
    longer = dataclasses.replace(config, max_steps=2000)
    assert [learning_rate(longer, s * batch, batch, 6e-4) for s in range(800)] == rates[:800]
    never = dataclasses.replace(config, decay_fraction=0.0)
    assert learning_rate(never, 999 * batch, batch, 6e-4) == 6e-4
    at_once = dataclasses.replace(config, decay_fraction=1.0)  # warm-up comes first
    assert learning_rate(at_once, 550 * batch, batch, 6e-4) == pytest.approx(0.55 * 6e-4)


# -----------------------------------------------------------------------------
# one step


def flat_weights_after_a_step(model, batches, grad_accum_steps):
    optimizers = {"optimizer": torch.optim.SGD(model.parameters(), lr=1.0)}
    result = train_step(model, optimizers, UNSCALED, iter(batches), grad_accum_steps, 1.0, CPU)
    return result, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_accumulation_equals_one_large_batch(small_model):
    x, y = torch.randint(0, 300, (2, 12, 16))
    twin = GPT(small_model.config)
    twin.load_state_dict(small_model.state_dict())
    parts = list(zip(x.split(3), y.split(3), strict=True))
    one, weights_one = flat_weights_after_a_step(small_model, [(x, y)], 1)
    four, weights_four = flat_weights_after_a_step(twin, parts, 4)
    assert four.loss == pytest.approx(one.loss, abs=1e-5)
    assert four.grad_norm == pytest.approx(one.grad_norm, abs=1e-5)
    torch.testing.assert_close(weights_four, weights_one, atol=1e-5, rtol=0)


def test_the_gradient_is_clipped_and_the_norm_before_it_reported(small_model):
    x, y = torch.randint(0, 300, (2, 4, 16))
    before = torch.cat([p.detach().flatten() for p in small_model.parameters()])
    result, after = flat_weights_after_a_step(small_model, [(x, y)], 1)
    assert result.grad_norm > 1
    assert (before - after).norm().item() == pytest.approx(1.0, rel=1e-3)


def test_a_clip_of_0_leaves_the_gradient_as_it_is(small_model):
    x, y = torch.randint(0, 300, (2, 4, 16))
    before = torch.cat([p.detach().flatten() for p in small_model.parameters()])
    optimizers = {"optimizer": torch.optim.SGD(small_model.parameters(), lr=1.0)}
    result = train_step(small_model, optimizers, UNSCALED, iter([(x, y)]), 1, 0.0, CPU)
    after = torch.cat([p.detach().flatten() for p in small_model.parameters()])
    assert (before - after).norm().item() == pytest.approx(result.grad_norm, rel=1e-3)
    assert result.grad_norm > 1


def test_a_float16_step_that_overflows_is_not_applied_and_lowers_the_scale(small_model):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    machine = Machine(torch.device("cpu"), torch.float16)
    optimizers = {"optimizer": torch.optim.AdamW(small_model.parameters(), lr=1e-2)}
    x, y = torch.randint(0, 300, (2, 4, 16))
    gain = small_model.transformer.ln_f.weight
    before = gain.detach().clone()
    with torch.no_grad():
        small_model.transformer.ln_f.bias[0] = 1e5  # more than float16 holds
    result = train_step(small_model, optimizers, scaler, iter([(x, y)]), 1, 1.0, machine)
    assert not result.applied and scaler.get_scale() == 2.0**15
    assert torch.equal(gain, before)
    with torch.no_grad():
        small_model.transformer.ln_f.bias[0] = 0
    result = train_step(small_model, optimizers, scaler, iter([(x, y)]), 1, 1.0, machine)
    assert result.applied and result.grad_norm < 100, "the norm must be of unscaled gradients"
    assert not torch.equal(gain, before)


def test_validation_is_the_exact_mean_for_every_batch_size(small_model, data_dir):
    windows = Windows(data_dir, "val", 16, 300)
    x, y = windows.read(np.arange(37))
    with torch.no_grad():
        expected = np.mean([small_model(x[i : i + 1], y[i : i + 1]).item() for i in range(37)])
    for B in (1, 8, 64):
        assert validation_loss(small_model, windows, 37, B, CPU) == pytest.approx(
            expected, abs=1e-5
        )
    assert small_model.training


def test_validation_is_without_dropout_and_training_with_it(small_model, data_dir):
    windows = Windows(data_dir, "val", 16, 300)
    dropping = GPT(dataclasses.replace(small_model.config, dropout=0.5)).train()
    dropping.load_state_dict(small_model.state_dict())
    losses = [validation_loss(model, windows, 8, 8, CPU) for model in (small_model, dropping)]
    assert losses[0] == losses[1] and dropping.training
    x, y = windows.read(np.arange(8))
    assert len({dropping(x, y).item() for _ in range(3)}) == 3


# -----------------------------------------------------------------------------
# choices made for the user


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_step_of_a_run_has_the_rate_of_its_place_in_the_budget(data_dir, tmp_path, optimizer):
    changes = dict(optimizer=optimizer, muon_lr=1e-2, warmup_steps=4, batch_ramp_tokens=1000)
    metrics = run_train(data_dir, tmp_path, batch_ramp_start=128, **changes)
    config, seen = TrainConfig(**{**RUN, **changes}, batch_ramp_start=128), 0
    for m in (m for m in metrics if m["event"] == "train"):
        batch = step_batch_tokens(config, seen)
        assert m["lr"] == learning_rate(config, seen, batch, config.max_lr)
        if optimizer == "muon":
            assert m["muon_lr"] == learning_rate(config, seen, batch, 1e-2)
        seen += batch
        assert (m["batch_tokens"], m["tokens_seen"]) == (batch, seen)
    assert seen == config.budget


@pytest.mark.parametrize(("val_tokens", "windows"), [(512, 32), (1, 1), (10**6, 62)])
def test_a_run_validates_on_the_first_windows_of_the_validation_split(
    data_dir, tmp_path, val_tokens, windows
):
    metrics = run_train(data_dir, tmp_path, val_tokens=val_tokens, max_steps=1)
    torch.manual_seed(RUN_SEED)
    fresh = GPT(GPTConfig(**SMALL))
    x, y = Windows(data_dir, "val", 16, 300).read(np.arange(windows))
    with torch.no_grad():
        expected = fresh(x, y).item()
    assert metrics[1]["event"] == "val" and metrics[1]["step"] == 0
    assert metrics[1]["loss"] == pytest.approx(expected, abs=1e-5)


def test_bits_per_byte_count_the_text_of_the_targets_and_no_markers(tmp_path):
    tokenizer = get_tokenizer()
    ids = [
        50256,
        *tokenizer.encode("Grüße aus 東京. " * 90),
        50256,
        *tokenizer.encode("end " * 300),
    ]
    write_shards(tmp_path, {"a_train_000001.npy": 100})
    np.save(tmp_path / "a_val_000000.npy", np.array(ids, dtype=np.uint16))
    windows = Windows(tmp_path, "val", 16, 50257)
    n = len(windows) - 1
    targets = ids[1 : 16 * n + 1]
    assert 50256 in targets and n > 64, "a marker, and more than is read at a time"
    text = b"".join(tokenizer.decode_single_token_bytes(i) for i in targets if i != 50256)
    loss = 3.0
    assert loss * bits_per_byte(windows, n) == pytest.approx(
        loss * len(targets) / (math.log(2) * len(text))
    )


def test_a_run_on_text_logs_bits_per_byte_and_one_on_other_tokens_does_not(data_dir, tmp_path):
    other = run_train(data_dir, tmp_path / "other", max_steps=1)
    assert [m["bpb"] for m in other if m["event"] == "val"] == [None, None]
    text = run_train(data_dir, tmp_path / "text", max_steps=1, vocab_size=50257, val_tokens=512)
    ratio = bits_per_byte(Windows(data_dir, "val", 16, 50257), 32)
    for m in text:
        if m["event"] == "val":
            assert m["bpb"] == pytest.approx(m["loss"] * ratio) and m["bpb"] > 1


def test_the_end_of_a_run_leaves_its_last_weights_for_other_programs(data_dir, tmp_path):
    run_train(data_dir, tmp_path, max_steps=2)
    exported, last = (load_model(tmp_path / name) for name in ("hf", "ckpt_000002.pt"))
    for (name, a), b in zip(exported.named_parameters(), last.parameters(), strict=True):
        rows = 300 if "wte" in name else len(a)  # the padding is not exported
        assert torch.equal(a[:rows], b[:rows]), name


def test_the_end_of_a_run_keeps_the_users_files_and_tells_its_loss(data_dir, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF")
    metrics = run_train(data_dir, tmp_path, max_steps=2)
    assert (folder / "model.gguf").read_bytes() == b"GGUF"
    loss = [m["loss"] for m in metrics if m["event"] == "val"][-1]
    assert f"| validation loss | {loss:.4f} |" in (folder / "README.md").read_text()


def test_a_padded_vocabulary_is_sampled_and_writes_text(data_dir, tmp_path):
    run = run_train(data_dir, tmp_path, max_steps=1, sample_every=1, vocab_size=50304)
    texts = [m["text"] for m in run if m["event"] == "sample"]
    assert len(texts) == 4 and all(text.startswith("Hello, I'm") for text in texts)


def test_compiling_evaluating_and_sampling_work_together(data_dir, tmp_path):
    settings = dict(max_steps=4, eval_every=2, sample_every=2, vocab_size=50257, block_size=64)
    plain = run_train(data_dir, tmp_path / "plain", **settings)
    compiled = run_train(data_dir, tmp_path / "compiled", compile="on", **settings)
    for event in ("train", "val"):
        a, b = ([m["loss"] for m in run if m["event"] == event] for run in (plain, compiled))
        assert a == pytest.approx(b, abs=1e-4) and len(a) >= 3
    assert sum(m["event"] == "sample" for m in compiled) == 6


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    torch._dynamo.reset()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch._dynamo.reset()


def test_under_ddp_a_block_is_one_graph(one_rank, monkeypatch):
    # DDPOptimizer would cut it where 25 MB of gradients are full: a block of this width has 28 MB
    graphs, really_compile = [], torch.compile

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda part, **_: really_compile(part, backend=count))
    model = GPT(GPTConfig(n_layer=2, n_head=12, n_embd=768, block_size=16, vocab_size=300))
    compile_model(model)
    ddp_model = torch.nn.parallel.DistributedDataParallel(model)
    ids = torch.zeros(1, 16, dtype=torch.long)
    ddp_model(ids, ids).backward()
    assert len(graphs) == 2, "one that both blocks share, and the loss"


def test_a_compiled_block_keeps_little_for_the_backward_pass():
    torch._dynamo.reset()
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=64, block_size=32, vocab_size=300))
    compile_model(model)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t), CPU16.autocast:
        model.transformer.h[0](torch.randn(3, 32, 64))
    shapes = Counter(tuple(t.shape) for t in kept if t.dtype == torch.bfloat16)
    assert shapes[3 * 32, 4 * 64] == 1, "what goes into GELU, and not what comes out"
    assert not shapes[4 * 64, 64] and not shapes[64, 4 * 64], "no copies of weights"


# -----------------------------------------------------------------------------
# the command line


def bad_id(folder):
    write_shards(folder, {"a_val_0.npy": 900, "a_train_1.npy": 900})
    tokens = np.load(folder / "a_train_1.npy")
    tokens[500] = 300
    np.save(folder / "a_train_1.npy", tokens)


def wrong_dtype(folder):
    write_shards(folder, {"a_val_0.npy": 900, "a_train_1.npy": 900})
    np.save(folder / "a_train_1.npy", np.zeros(900, dtype=np.int32))


def good(folder):
    write_shards(folder, {"a_val_0.npy": 900, "a_train_1.npy": 900})


@pytest.mark.parametrize(
    ("make_data", "changes", "expected"),
    [
        (lambda folder: None, {}, "no such folder"),
        (wrong_dtype, {}, "a_train_1.npy"),
        (bad_id, {}, "token id 300"),
        (good, {"micro_batch_size": 5}, "--micro_batch_size 4"),
        (good, {"n_head": 3}, "n_head 3 does not divide n_embd 32"),
        (good, {"no_such_flag": 1}, "no_such_flag"),
        (good, {"n_layer": "two"}, "n_layer"),
        (good, {"total_batch_size": 16000}, "windows of 16 tokens"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, make_data, changes, expected):
    make_data(tmp_path / "data")
    settings = {**RUN, "data_dir": tmp_path / "data", "out_dir": tmp_path / "log", **changes}
    result = run_command_line("train_gpt2.py", *flags(**settings))
    assert result.returncode == 2
    assert result.stderr.startswith("train_gpt2.py: error: ") and result.stderr.count("\n") == 1
    assert expected in result.stderr
    assert not (tmp_path / "log").exists(), "a mistake must leave nothing behind"


def test_a_folder_that_holds_a_run_is_not_overwritten(data_dir, tmp_path):
    run_train(data_dir, tmp_path, max_steps=1)
    before = all_files(tmp_path)
    with pytest.raises(ValueError, match="--resume"):
        run_train(data_dir, tmp_path, max_steps=1)
    assert before == all_files(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_ramp_tokens": 1000, "batch_ramp_start": 0},
        {"val_tokens": 0},
        {"max_steps": 0},
        {"total_batch_size": 0},
        {"micro_batch_size": 0},
        {"block_size": 0},
        {"max_lr": -1.0},
        {"grad_clip": float("inf")},
        {"beta2": 1.0},
        {"warmup_steps": 20000},
        {"dropout": 1.0},
        {"decay_fraction": 1.1},
        {"target_loss": -1.0},
        {"profile_step": -1},
        {"target_loss": 0.0},
        {"target_loss": 3.0, "eval_every": 0},
    ],
    ids=lambda wrong: list(wrong)[-1],
)
def test_impossible_settings_are_refused_with_what_to_give(wrong):
    with pytest.raises(ValueError, match="give"):
        TrainConfig(**wrong)


def test_a_preset_may_have_another_rate_for_muon():
    adamw, muon = PRESETS["tiny"].max_lr, PRESETS["tiny"].muon_max_lr
    assert TrainConfig(preset="tiny").max_lr == adamw != muon
    assert TrainConfig(preset="tiny", optimizer="muon").max_lr == muon
    assert TrainConfig(preset="tiny", optimizer="muon", max_lr=adamw).max_lr == adamw
    assert TrainConfig(preset="tiny", optimizer="muon", init_from="gpt2").max_lr == muon / 10
    assert TrainConfig(optimizer="muon").max_lr == PRESETS["gpt2"].max_lr  # none was measured


def test_the_configuration_fills_in_the_preset_once():
    config = TrainConfig(preset="gpt2-medium", n_layer=3)
    assert (config.n_layer, config.n_embd, config.max_lr) == (3, 1024, 3e-4)
    assert TrainConfig(init_from="gpt2").max_lr == pytest.approx(6e-5)
    assert TrainConfig(init_from="gpt2").n_layer is None
    assert {f.name for f in dataclasses.fields(GPTConfig)} == {*SMALL, "dropout"}
