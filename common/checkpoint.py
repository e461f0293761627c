"""A run's state on disk: its format, written whole or not at all, and checked before it is used."""

import dataclasses
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, serialization

from common import parallel, ranks
from common.cli import advice, plain
from common.files import atomic_write
from common.metrics import METRICS, how_it_went

RUN_KEYS = (
    "optimizer",
    "scaler",
    "step",
    "windows_seen",
    "train_config",
    "rng",
    "data",
)  # to resume


def run_state(
    *,
    weights: dict[str, Tensor],
    optimizers: dict[str, dict],
    scaler: dict,
    step: int,
    windows_seen: int,
    model_config: dict[str, Any],
    train_config: dict[str, Any],
    data: str,
) -> dict[str, Any]:
    """Return what a checkpoint holds: a dict of tensors and plain types.

    `weights` are the float32 parameters by Hugging Face's names, the tied matrix once. Each
    optimizer has its own key ("optimizer" for AdamW, "muon"). `step` counts updates, `windows_seen`
    the rows trained on. `data` is the fingerprint of the shards, `rng` torch's generator (CPU).
    """
    return dict(
        model={name: weight.detach() for name, weight in weights.items()},
        **optimizers,
        scaler=scaler,
        step=step,
        windows_seen=windows_seen,
        model_config=model_config,
        train_config=train_config,
        rng=torch.get_rng_state(),
        data=data,
    )


def save_run(run: Any, log: Any) -> str:
    """Write a run's checkpoint; return what failed, or an empty string. All ranks must call it.

    The number of ranks, and whether the model was sharded, leave no trace in the file.
    """
    start = time.perf_counter()  # what was done before may be an evaluation that a signal cut off
    weights = parallel.on_rank_0_whole(dict(run.model.named_parameters()))
    states = {name: optimizer.state_dict() for name, optimizer in run.optimizers.items()}
    states = parallel.on_rank_0_whole(states)
    path = run.config.out_dir / f"ckpt_{run.step:06d}.pt"

    def write() -> str:
        state = run_state(
            weights=weights, optimizers=states, scaler=run.scaler.state_dict(), step=run.step,
            windows_seen=run.tokens_seen // run.train_windows.block_size,
            model_config=plain(run.model.config), train_config=plain(run.config), data=run.data,
        )  # fmt: skip
        try:
            again = f"continue from the previous checkpoint in {path.parent} with --resume"
            with advice(again if run.saved else "start again with other settings"):
                write_checkpoint(path, state, run.config.keep_checkpoints)
        except OSError as error:  # the disk is full: next time there may be room
            return f"{path} could not be written ({error}): make room"
        log.write("checkpoint", run.step, path=str(path), seconds=time.perf_counter() - start)
        return ""

    return ranks.on_rank_0(write)


def restore_run(run: Any, state: dict[str, Any]) -> None:
    """Put a run where a checkpoint's state was. The model has its weights already.

    All ranks must call it. Only rank 0's state needs numbers. Raises ValueError if a new branch is
    at its end already.
    """
    for name, optimizer in run.optimizers.items():  # the groups stay as they are configured here
        params = [p for group in optimizer.param_groups for p in group["params"]]
        moments = {
            i: {key: parallel.from_rank_0(value, params[i]) for key, value in entry.items()}
            for i, entry in state[name]["state"].items()
        }
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    if run.scaler.is_enabled() and state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(parallel.from_rank_0(state["rng"], next(run.model.parameters())).cpu())
    run.step, run.tokens_seen = state["step"], state["windows_seen"] * run.train_windows.block_size
    # an origin that the command leaves out stays what it was: a branch is still one
    before, now = state["train_config"], run.config
    origin = {"init_from": now.init_from or before.get("init_from")}
    if not run.trunk and before.get("branch_from"):
        origin["branch_from"] = now.branch_from or Path(before["branch_from"])
    run.config = dataclasses.replace(now, **origin)
    log, target = (run.trunk or run.config.out_dir) / METRICS, run.config.target_loss
    best, ended = ranks.on_rank_0(how_it_went, log, run.step)
    run.on_target = target is not None and best <= target
    run.closed = ended and bool(run.finished)  # it may have got a larger budget
    if run.trunk and run.finished:
        more = "a larger --max_steps" if run.finished == "budget" else "a lower --target_loss"
        what = f"{run.trunk} has reached its {run.finished} at step {run.step}"
        raise ValueError(f"{what}: give {more}")
    branch = f", as a branch of {run.trunk}" if run.trunk else ""
    run.notes.append(f"continuing after step {run.step}{branch}")
    # a resumed run may have another length, a branch another schedule too
    names = ("max_steps", "val_tokens", *(SAME_IN_ONE_RUN if run.trunk else ()))
    if changed := differences(state["train_config"], plain(run.config), names):
        run.notes.append(f"changed: {'; '.join(changed)}")


def checkpoint_paths(out_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first."""
    found = [path for path in out_dir.glob("ckpt_*.pt") if path.stem[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.stem[5:]), reverse=True)


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Return a checkpoint's dict, on the CPU. Raises ValueError if a single byte is wrong.

    `mmap`: a tensor is read from the disk when it is used.
    """
    state = read_pickle(path, mmap=mmap)
    if not is_checkpoint(state):
        raise ValueError(f"{path}: not a whole checkpoint (it holds no model)")
    return state


def is_checkpoint(state: Any) -> bool:
    """Tell whether this is what a checkpoint of ours holds."""
    return isinstance(state, dict) and {"model", "model_config"} <= state.keys()


def read_pickle(path: Path, stand_ins: Sequence[tuple[type, str]] = (), mmap: bool = False) -> Any:
    """Return what torch.save has written, on the CPU, without running any code in it.

    `stand_ins`: classes that take the place of the classes with these names. Raises ValueError if a
    single byte is wrong or if the file holds objects of any other class.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        # torch.load does not compare the checksums, and a flipped bit is a wrong weight
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("a checksum differs")
        # A pickle can run any code. weights_only refuses all but tensors and plain types.
        with serialization.safe_globals([*stand_ins]):
            unsafe = serialization.get_unsafe_globals_in_checkpoint(path)
            if unsafe:  # torch.load refuses them too, but does not name them in its first line
                raise ValueError(f"it holds {unsafe[0]}, which may run code")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except PermissionError:  # it may be whole
        raise
    except Exception as error:  # zipfile, pickle and torch raise many kinds on damage
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a whole checkpoint ({reason})") from None


def find_state(
    config: Any, say: Callable[[str], None], mmap: bool = False
) -> tuple[dict[str, Any] | None, Path | None]:
    """Return the state that a run starts from, and the folder of the run that it branches off.

    Both are None for a new run; `config` is its settings. Raises ValueError or FileNotFoundError if
    the checkpoint that it asks for is not there, or if `out_dir` holds a run that it does not ask
    to resume. For `mmap` see `read_checkpoint`.
    """
    out_dir, branch_from = config.out_dir, config.branch_from
    if config.resume:
        with advice("restore one, or start again with another --out_dir", ValueError):
            state = newest_checkpoint(out_dir, say, mmap)
        if state:
            return state, None
    elif (out_dir / METRICS).exists() or checkpoint_paths(out_dir):
        raise ValueError(f"{out_dir} holds a run: use --resume, or give another --out_dir")
    if branch_from is None:
        return None, None
    with advice("give the checkpoint of a run, or its folder, with --branch_from"):
        if not branch_from.is_dir():
            return read_state(branch_from, mmap), branch_from.parent
        state = newest_checkpoint(branch_from, say, mmap)
        if state is None:
            raise FileNotFoundError(f"{branch_from} holds no checkpoint")
        return state, branch_from


def read_state(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Return the checkpoint of a run; ValueError if it is damaged, or holds a model alone."""
    state = read_checkpoint(path, mmap)
    if missing := sorted({*RUN_KEYS} - state.keys()):
        raise ValueError(f"{path}: not the checkpoint of a run (no {missing[0]})")
    return state


def newest_checkpoint(
    out_dir: Path, say: Callable[[str], None], mmap: bool = False
) -> dict[str, Any] | None:
    """Return the newest checkpoint from which a run can continue; None if there is none at all.

    For `mmap` see `read_checkpoint`.
    """
    paths = checkpoint_paths(out_dir)
    for path in paths:
        try:
            return read_state(path, mmap)
        except ValueError as error:
            say(f"warning: {error}: trying the one before")
    if paths:
        raise ValueError(f"{out_dir}: every checkpoint is damaged")
    return None


def write_checkpoint(path: Path, state: dict[str, Any], keep: int) -> None:
    """Write a checkpoint, whole or not at all; then keep only the `keep` newest (0: keep all).

    Raises ValueError, and writes nothing, if a weight is not finite; OSError if the disk is full.
    """
    # A checkpoint with a NaN would replace a good one, and no run can continue from it. A sum is
    # cheap, and it is finite only if all its terms are. (Sums of weights do not overflow.)
    wrong = [name for name, weight in state["model"].items() if not weight.sum().isfinite()]
    if wrong:
        raise ValueError(f"{wrong[0]} is not finite, so {path} was not written")
    try:
        with atomic_write(path) as file:
            torch.save(state, file)
    except RuntimeError as error:  # torch hides the error of the disk behind one of its own
        raise OSError(str(error.__context__ or error)) from None
    for old in checkpoint_paths(path.parent)[keep:] if keep else []:
        old.unlink()


def build_model(
    model_class: type, config_class: type, model_config: dict, weights: dict[str, Tensor]
) -> Any:
    """Return a model with these weights as float32. float32 weights are not copied.

    An embedding without padding gets it. Raises ValueError that names what is missing or differs.
    """
    try:
        try:
            config = config_class(**model_config)
        except ValueError as error:  # without its advice, which is for flags
            raise ValueError(str(error).split(": give")[0]) from None
        weights = {name: weight.float() for name, weight in weights.items()}
        wte = weights.get("transformer.wte.weight", torch.empty(0, 0))
        head = weights.pop("lm_head.weight", wte)
        if head is not wte and not torch.equal(head, wte):
            raise ValueError(
                "lm_head.weight differs from the token embedding: in GPT-2 they are one"
            )
        if len(wte) == config.vocab_size < config.padded_vocab_size:
            # Not zeros: GPT-2's logits lie around -30 to -100, where a logit of 0 would take all
            # the probability. The logit of the mean row is the mean logit, and exp(mean) is at most
            # the mean of exp (Jensen): 47 such rows take at most 47/50257 of it.
            padding = wte.mean(dim=0).expand(config.padded_vocab_size - len(wte), -1)
            weights["transformer.wte.weight"] = wte = torch.cat([wte, padding])
        # A damaged file may ask for a model of any size: look at the sizes before building it.
        if config.n_layer > len(weights):
            raise ValueError(f"n_layer is {config.n_layer}, but there are {len(weights)} tensors")
        sizes = {
            "transformer.wte.weight": (config.padded_vocab_size, config.n_embd),
            "transformer.wpe.weight": (config.block_size, config.n_embd),
            f"transformer.h.{config.n_layer - 1}.ln_1.weight": (config.n_embd,),
        }
        check_shapes(weights, sizes)
        with torch.device("meta"):  # shapes without memory: the weights bring their own
            model = model_class(config)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        check_shapes(weights, shapes)
        if extra := sorted(weights.keys() - shapes.keys()):
            raise ValueError(f"GPT-2 has no tensor {extra[0]}")
        model.load_state_dict({**weights, "lm_head.weight": wte}, assign=True)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"weights of another architecture: {error}") from None
    model.lm_head.weight = model.transformer.wte.weight  # one matrix again, as in GPT-2
    return model


def check_shapes(weights: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError that names the first tensor that is missing or has another shape."""
    for name, shape in shapes.items():
        if name not in weights:
            raise ValueError(f"{name} is missing")
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"{name} is {tuple(weights[name].shape)}, not {shape}")


def crop_positions(
    model_config: dict[str, Any], weights: dict[str, Tensor], block_size: int | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and weights of a model that reads only `block_size` tokens.

    The first positions compute what they did before. Nothing changes if the model has no more.
    """
    name = "transformer.wpe.weight"
    if block_size is None or block_size >= len(weights[name]):
        return model_config, weights
    wpe = weights[name][:block_size].clone()  # a view would be saved with all its rows
    return {**model_config, "block_size": block_size}, {**weights, name: wpe}


# These settings must be the same to resume a run: a change in one of them makes it another run. The
# machine, the precision and how often something is logged may change.
SAME_IN_A_BRANCH = (  # so that it goes on with the same data in the same order
    "seed", "shuffle", "total_batch_size", "batch_ramp_tokens", "batch_ramp_start", "optimizer",
)  # fmt: skip
SAME_IN_ONE_RUN = (
    *SAME_IN_A_BRANCH,
    "max_lr", "warmup_steps", "schedule", "decay_fraction", "min_lr_ratio", "weight_decay", "beta1",
    "beta2", "eps", "muon_lr", "muon_momentum", "grad_clip",
)  # fmt: skip


def differences(before: dict[str, Any], now: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Return in words which of the settings differ; what `before` does not know counts as equal."""
    return [
        f"{name} was {before[name]}, is now {now[name]}"
        for name in names
        if name in before and before[name] != now[name]
    ]


def same_end(one: str, other: str) -> bool:
    """Return whether two paths, written in different ways, may mean the same file of a folder."""
    a, b = Path(one).parts[-2:], Path(other).parts[-2:]
    n = min(len(a), len(b))
    return a[-n:] == b[-n:]


OTHER_RUN = (
    "give another --out_dir: there, --branch_from goes on from a checkpoint with another schedule "
    "or budget, and --init_from takes over the weights alone"
)


def check_same_run(
    state: dict[str, Any], train_config: dict[str, Any], data: str, branch: bool = False
) -> None:
    """Raise ValueError that lists the differences if a checkpoint belongs to another run.

    `train_config` holds this run's settings (None: not given), `data` the fingerprint of its data.
    A setting that the checkpoint does not know, because it is older, counts as equal.
    """
    names, sizes = SAME_IN_A_BRANCH if branch else SAME_IN_ONE_RUN, state["model_config"]
    given = [name for name in sizes if train_config.get(name) is not None]
    differ = differences(state["train_config"], train_config, names)
    # The origin of the weights may be left out, because files move. It may not be another one.
    for origin in ("init_from",) if branch else ("init_from", "branch_from"):
        before, now = state["train_config"].get(origin), train_config[origin]
        if now is not None and not same_end(str(before), now):
            differ += differences(state["train_config"], train_config, [origin])
    differ += differences(sizes, train_config, given)
    differ += differences({"data": state["data"]}, {"data": data}, ["data"])
    if differ:
        what = "a branch cannot change" if branch else "the checkpoint belongs to another run"
        raise ValueError(f"{what} ({'; '.join(differ)})")
