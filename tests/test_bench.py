"""bench.py: all rungs do the same training, and the table shows what was measured."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, flags, read_metrics

import bench
import train_gpt2

CPU = {"device_type": "cpu", "dtype": "bfloat16", "no_compile": ""}
CUDA = {"device_type": "cuda", "dtype": "bfloat16", "no_compile": ""}
TINY = bench.BenchConfig(preset="tiny", block_size=16, steps=1, rounds=1, device="cpu")


def rung(**changes) -> bench.Rung:
    return dataclasses.replace(bench.FIRST, **changes)


# -----------------------------------------------------------------------------
# the same training on every rung


def test_naive_attention_equals_flash_attention():
    torch.manual_seed(0)
    config = train_gpt2.GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=16)
    flash, naive = train_gpt2.CausalSelfAttention(config), bench.NaiveAttention(config)
    naive.load_state_dict(flash.state_dict())
    x = torch.randn(2, 16, 32)
    gradients = []
    for attention in (flash, naive):
        rows = x.clone().requires_grad_()
        y = attention(rows)
        y.square().sum().backward()
        gradients.append((y, rows.grad, attention.c_attn.weight.grad))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_rungs_start_from_the_same_weights():
    config = TINY.train_config()
    top = bench.make_rung_model(rung(padded=True, own_model=True, flash=True), config)
    first = bench.make_rung_model(rung(), config)
    assert len(first.transformer.wte.weight) == 50257 and len(top.transformer.wte.weight) == 50304
    assert first.lm_head.weight is first.transformer.wte.weight
    for name, p in first.named_parameters():
        assert torch.equal(p, top.get_parameter(name)[: len(p)]), name


@pytest.mark.parametrize(("stream", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_a_rung_has_the_residual_stream_that_its_name_says(stream, dtype):
    model, seen = bench.make_rung_model(rung(stream=stream), TINY.train_config()), []
    model.transformer.h[0].register_forward_pre_hook(lambda block, x: seen.append(x[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(1, 4, dtype=torch.long))
    assert seen == [dtype]


def test_rungs_reach_the_same_loss():
    rungs, _ = bench.ladder({**CPU, "no_compile": "not in this test"})
    losses = [bench.measure(r, TINY)["loss"] for r in rungs]
    assert 9.5 < losses[0] < 10.9, "the model has learned from one step"
    assert losses == pytest.approx([losses[0]] * len(losses), abs=0.02)


def test_tokens_do_not_depend_on_the_micro_batch():
    x2, y2 = next(bench.token_stream(TINY, 16, 2, torch.device("cpu")))
    ones = bench.token_stream(TINY, 16, 1, torch.device("cpu"))
    assert torch.equal(x2, torch.cat([next(ones)[0], next(ones)[0]]))
    assert torch.equal(x2[:, 1:], y2[:, :-1])


# -----------------------------------------------------------------------------
# a rung does what its name says


def test_each_rung_keeps_the_changes_below_it():
    rungs, left_out = bench.ladder(CUDA)
    assert list(left_out) == ["less kept for the backward pass"]
    assert [r.name for r in rungs[1:-1]] == [c for c in bench.CHANGES if c not in left_out]
    for below, above in itertools.pairwise(rungs[:-1]):
        changed = {k for k, v in vars(above).items() if v != vars(below)[k]} - {"name"}
        assert changed == set(bench.CHANGES[above.name])
    on_cpu = {r.name for r in bench.ladder(CPU)[0]}
    assert set(bench.CHANGES) - on_cpu == {"TF32", "largest micro-batch"}


def test_a_rung_without_effect_here_is_left_out_with_a_reason():
    rungs, left_out = bench.ladder({**CPU, "dtype": "float32", "no_compile": "no g++"})
    assert left_out["torch.compile"] == "no g++"
    assert {"TF32", "bfloat16 autocast", "largest micro-batch"} < set(left_out)
    assert not {r.name for r in rungs} & set(left_out)
    assert {r.compile for r in rungs} == {"no"}


@pytest.mark.parametrize(
    ("facts", "compiled", "fused"), [(CPU, "no", False), (CUDA, "whole", True)]
)
def test_the_recipe_compiles_and_fuses_on_cuda_only(facts, compiled, fused):
    recipe = bench.ladder(facts)[0][-1]
    assert (recipe.compile, recipe.fused, recipe.own_model) == (compiled, fused, False)
    assert recipe.autocast and recipe.flash and recipe.padded


def test_the_top_rung_trains_as_train_gpt2_does_by_default(monkeypatch):
    seen = {}

    def step(model, optimizers, scaler, batches, accum, grad_clip, machine):
        (optimizer,) = optimizers.values()
        seen.update(model=model, group=optimizer.param_groups[0], machine=machine, clip=grad_clip)
        return train_gpt2.StepResult(1.0, 1.0, True, False, 0.0)

    compiled = []
    monkeypatch.setattr(train_gpt2, "train_step", step)
    monkeypatch.setattr(train_gpt2, "compile_model", compiled.append)
    top = bench.ladder(CPU)[0][-2]
    bench.measure(top, TINY)
    assert type(seen["model"]) is train_gpt2.GPT and compiled == [seen["model"]]
    attention = seen["model"].transformer.h[0].attn
    assert type(attention) is train_gpt2.CausalSelfAttention
    with train_gpt2.set_up_machine(TINY.train_config()) as machine:
        assert seen["machine"] == machine
    assert seen["group"]["fused"] and seen["clip"] == train_gpt2.TrainConfig().grad_clip

    bench.measure(bench.FIRST, TINY)
    assert type(seen["model"].transformer.h[0].attn) is bench.NaiveAttention
    assert seen["machine"].dtype == torch.float32 and not seen["group"]["fused"]
    assert len(compiled) == 1
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_float16_gpu_trains_on_rungs_without_the_fused_optimizer(monkeypatch):
    """GradScaler asks the optimizer whether it scales by itself: only the fused one does."""
    monkeypatch.setattr(bench.hardware, "choose_dtype", lambda name, device: torch.float16)
    applied, step = [], train_gpt2.train_step

    def noted(*args):
        result = step(*args)
        applied.append(result.applied)
        return result

    monkeypatch.setattr(train_gpt2, "train_step", noted)
    small = dict(block_size=8, micro_batch_size=1, grad_accum_steps=1)  # a CPU is slow in float16
    config = dataclasses.replace(TINY, **small)
    losses = [bench.measure(rung(autocast=True, fused=fused), config) for fused in (False, True)]
    assert applied == [True] * 4, "the scaler has called the optimizer"
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], abs=1e-3)


def test_the_optimizer_that_torch_chooses_differs_in_nothing_else(monkeypatch):
    groups = []

    def step(model, optimizers, *args):
        (optimizer,) = optimizers.values()
        names = {p: name for name, p in model.named_parameters()}
        groups.append([
            {**group, "params": [names[p] for p in group["params"]]}
            for group in optimizer.param_groups
        ])  # fmt: skip
        return train_gpt2.StepResult(1.0, 1.0, True, False, 0.0)

    monkeypatch.setattr(train_gpt2, "train_step", step)
    for fused in (False, True):
        bench.measure(rung(fused=fused), TINY)
    plain, fused = groups[0], groups[-1]
    assert [g["fused"] for g in plain] == [None, None] and all(g["fused"] for g in fused)
    assert [{**g, "fused": True} for g in plain] == fused


# -----------------------------------------------------------------------------
# the table shows what was measured


def test_a_row_has_the_median_and_its_gains():
    def run(*seconds):
        return {
            "compiled": False, "first_step": 9.0, "seconds": list(seconds), "loss": 5.0,
            "cpu_seconds": [1.0], "peak_memory": 10, "micro_batch_size": 2, "batch_tokens": 100,
            "mfu_seconds": 0.5,
        }  # fmt: skip

    rows = [
        bench.summary("first", [run(4.0, 90.0), run(3.0, 4.0)], ""),
        bench.summary("missing", [], "no reason"),
        bench.summary("second", [run(2.0)], ""),
        bench.summary(bench.RECIPE, [run(3.0)], ""),
    ]
    bench.compare(rows)
    assert rows[0]["ms_per_step"] == 4000 and rows[0]["ms_range"] == [3000, 90000]
    assert rows[2]["tokens_per_sec"] == 50 and rows[2]["mfu"] == 0.25
    assert (rows[2]["gain"], rows[2]["gain_over_first"]) == (2.0, 2.0)
    assert rows[2]["gain_over_recipe"] == 1.5 and "gain" not in rows[3]
    lines = bench.table({"rows": rows}).splitlines()
    assert len(lines) == 6 and len({line.count("|") for line in lines}) == 1


RUN = {
    "compiled": False, "first_step": 1.0, "seconds": [1.0], "cpu_seconds": [1.0], "loss": 5.0,
    "peak_memory": 10, "micro_batch_size": 2, "batch_tokens": 100, "mfu_seconds": None,
}  # fmt: skip


def test_rounds_go_up_and_down_and_each_rung_has_a_fresh_process(monkeypatch, capsys):
    measured = []

    def apart(function, *args):
        if function is bench.look_around:
            return {**CPU, "no_compile": "no g++"}
        measured.append(args[0].name)
        return "out of memory" if args[0].name == "fused AdamW" else RUN

    monkeypatch.setattr(bench, "apart", apart)
    rows = bench.climb(dataclasses.replace(TINY, rounds=2))["rows"]
    up = [r.name for r in bench.ladder({**CPU, "no_compile": "no g++"})[0]]
    assert measured == up + [name for name in up[::-1] if name != "fused AdamW"]
    assert {r["name"]: r.get("left_out") for r in rows}["fused AdamW"] == "out of memory"
    said = capsys.readouterr().err.splitlines()  # what is known even if it is stopped half-way
    assert said[:2] == [f"round 1/2: {bench.FIRST.name}", "    100 tokens/s, loss 5.0000"]
    assert said[said.index("round 1/2: fused AdamW") + 1] == "    out of memory"
    monkeypatch.undo()
    assert bench.apart(os.getpid) != os.getpid()


class UnpicklableError(RuntimeError):
    """As InductorError: made from other arguments than its message."""

    def __init__(self, inner: Exception, frame: object):
        super().__init__(f"backend='inductor' raised:\n{inner}\n\nSet TORCHDYNAMO_VERBOSE=1")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of memory"),
        (torch.AcceleratorError("CUDA error: misaligned\nhints"), "device cpu: CUDA error: mis"),
        (AssertionError(), "AssertionError"),
        (UnpicklableError(KeyError("a|b"), None), "UnpicklableError: backend='inductor' raised: "),
    ],
)
def test_a_rung_that_fails_for_any_reason_says_it_in_one_line(monkeypatch, error, reason):
    def step(*args):
        raise error

    monkeypatch.setattr(train_gpt2, "train_step", step)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "restored afterwards")
    why = bench.attempt(bench.FIRST, TINY, "cache")
    assert why.startswith(reason) and "\n" not in why and len(why) <= 200
    rows = [bench.summary("first", [RUN], ""), bench.summary("second", [], why)]
    bench.compare(rows)
    assert len({line.count("|") for line in bench.table({"rows": rows}).splitlines()}) == 1


def die(*args) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rung_that_the_system_kills_is_left_out(monkeypatch):
    apart = bench.apart

    def killed_once(function, *args):
        if function is bench.look_around:
            return {**CPU, "no_compile": "no g++"}
        return apart(die) if args[0].name == "flash attention" else RUN

    monkeypatch.setattr(bench, "apart", killed_once)
    rows = {row["name"]: row for row in bench.climb(TINY)["rows"]}
    assert "killed" in rows["flash attention"]["left_out"]
    assert rows["vocabulary 50304"]["ms_per_step"] == 1000


def test_a_ladder_without_any_rung_is_one_line(monkeypatch, capsys):
    def apart(function, *args):
        return CUDA if function is bench.look_around else "out of GPU memory"

    monkeypatch.setattr(bench, "apart", apart)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--rounds", "1", "--plot", "no.png"])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and not (ROOT / "no.png").exists()
    assert err.splitlines()[-1] == (
        "bench.py: error: no rung could be measured: out of GPU memory: try --preset tiny"
    )


def test_a_device_is_chosen_once_for_all_rungs(monkeypatch):
    devices = []

    def apart(function, config, *args):
        if function is bench.look_around:
            return {**CPU, "no_compile": "no g++"}
        devices.append(args[0].device)
        return RUN

    monkeypatch.setattr(bench, "apart", apart)
    results = bench.climb(dataclasses.replace(TINY, device="auto"))
    assert set(devices) == {"cpu"} and results["settings"]["device"] == "auto"


def test_a_run_writes_table_json_and_chart(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "apart", lambda function, *args: function(*args))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    out, plot = tmp_path / "results.json", tmp_path / "chart.png"
    bench.bench(dataclasses.replace(TINY, compile="off", out=out, plot=plot))
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    results = json.loads(out.read_text())
    assert len(results["rows"]) == len(bench.CHANGES) + 2
    top, first = results["rows"][-1], results["rows"][0]
    assert first["ms_per_step"] > 0 and first["batch_tokens"] == 2 * 16 * 2
    assert first["mfu"] is None, "a CPU's peak is not known"
    assert top["gain_over_recipe"] == 1 and first["peak_memory"] > 50e6
    assert {"device", "cores", "threads", "versions", "git_hash"} < set(results["machine"])
    assert str(tmp_path) not in out.read_text()
    assert bench.table(results) in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 5000


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps 0"),
        ({"out": "no/such/folder.json"}, "no such folder"),
        ({"out": "."}, "a folder: give a file"),
        ({"plot": "chart.foo"}, r"give a name that ends in \.png or \.svg"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(wrong, said):
    with pytest.raises(ValueError, match=said):
        bench.BenchConfig(
            **{k: bench.Path(v) if isinstance(v, str) else v for k, v in wrong.items()}
        )


def test_a_rank_in_the_environment_does_not_matter(monkeypatch):
    monkeypatch.setenv("RANK", "1")  # of the job in which somebody types the command
    assert bench.look_around(bench.BenchConfig(device="cpu"))["device_type"] == "cpu"


# -----------------------------------------------------------------------------
# starting up


def cpu_seconds(*words: str) -> float:
    """Return the processor time of a command: other work on the machine does not count."""
    before = os.times()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words], cwd=ROOT, env=env, check=True, capture_output=True)
    after = os.times()
    children = ("children_user", "children_system")
    return sum(getattr(after, name) - getattr(before, name) for name in children)


def test_help_costs_no_more_than_importing_torch():
    ratios = []
    while len(ratios) < 3 and min(ratios, default=9) > 1.3:
        torch_alone = cpu_seconds("-c", "import torch")
        ratios.append(cpu_seconds("train_gpt2.py", "--help") / torch_alone)
    assert min(ratios) <= 1.3, ratios


def test_the_first_step_is_seconds_away(data_dir, tmp_path):
    words = flags(
        data_dir=data_dir, preset="tiny", block_size=16, total_batch_size=64, max_steps=1,
        compile="off", device="cpu", eval_every=0, sample_every=0,
    )  # fmt: skip
    # processor time of the whole command with the step and the end of the run
    whole = cpu_seconds("train_gpt2.py", *words, "--out_dir", str(tmp_path / "log"))
    assert len(read_metrics(tmp_path / "log", "train")) == 1
    assert whole - cpu_seconds("-c", "import torch") < 5


# -----------------------------------------------------------------------------
# on a GPU


def gpu_row(name: str, **changes) -> dict:
    """Measure one rung on this machine's GPU, as the command does."""
    config = bench.BenchConfig(device="cuda", rounds=1, **changes)
    facts = bench.apart(bench.look_around, config)
    if not any(kind in facts["device"] for kind in ("H100 80GB", "H200")):
        pytest.skip(f"the target is for an H100 or H200, not {facts['device']}")
    [wanted] = [r for r in bench.ladder(facts)[0] if r.name == name]
    return bench.summary(name, [bench.apart(bench.measure, wanted, config)], "")


@pytest.mark.gpu
def test_half_a_million_tokens_a_second():
    assert gpu_row("largest micro-batch", steps=5)["tokens_per_sec"] >= 500_000


@pytest.mark.gpu
def test_the_largest_model_is_as_efficient_as_the_smallest():
    large, small = (
        gpu_row(
            "largest micro-batch", steps=3, preset=preset, micro_batch_size=1, grad_accum_steps=n
        )
        for preset, n in (("gpt2-xl", 128), ("gpt2", 512))
    )
    assert large["mfu"] >= small["mfu"]


@pytest.mark.gpu
def test_gpu_rungs_reach_the_same_loss():
    config = dataclasses.replace(TINY, device="cuda", grad_accum_steps=2, steps=2)
    rungs = bench.ladder(bench.apart(bench.look_around, config))[0]
    with ThreadPoolExecutor(4) as pool:  # each rung has its own process, which mostly compiles
        runs = list(pool.map(lambda each: bench.apart(bench.measure, each, config), rungs))
    assert [run["loss"] for run in runs] == pytest.approx([runs[0]["loss"]] * len(runs), abs=0.05)
