"""LayerStats against a calculation by hand, and its effect on a run: none."""

import pytest
import torch
from conftest import losses, run_train

import plot
from common.layer_stats import LayerStats
from train_gpt2 import Machine, TrainConfig, make_optimizers, train_step

CPU = Machine(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_layer_statistics_equal_a_calculation_by_hand(small_model, optimizer):
    optimizers = make_optimizers(small_model, TrainConfig(optimizer=optimizer), CPU)
    x, y = torch.randint(0, 300, (2, 4, 16))
    before = {name: p.detach().clone() for name, p in small_model.named_parameters()}
    with torch.no_grad():
        stream = small_model.transformer.wte(x[:1]) + small_model.transformer.wpe(torch.arange(16))
        rms = [stream.square().mean().sqrt().item()]
        for block in small_model.transformer.h:
            stream = block(stream)
            rms.append(stream.square().mean().sqrt().item())
    small_model(x, y).backward()
    grads = {name: p.grad.clone() for name, p in small_model.named_parameters()}
    small_model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with LayerStats(small_model, optimizers) as stats:
        batches = iter([(x, y)])
        result = train_step(small_model, optimizers, scaler, batches, 1, 0.1, CPU)  # clipped
    found = stats.values(result.grad_norm)
    assert found["residual_rms"] == pytest.approx(rms, rel=1e-5)
    layers = [["transformer.wte.", "transformer.wpe."]]
    layers += [[f"transformer.h.{i}."] for i in range(small_model.config.n_layer)]
    for i, prefixes in enumerate(layers):
        names = [name for name in before if name.startswith(tuple(prefixes))]
        norm = torch.cat([grads[name].flatten() for name in names]).norm().item()
        assert found["grad_norm"][i] == pytest.approx(norm, rel=1e-4)
        after = dict(small_model.named_parameters())
        matrices = [name for name in names if before[name].dim() == 2]
        moved = torch.cat([(after[n].detach() - before[n]).flatten() for n in matrices]).norm()
        size = torch.cat([before[n].flatten() for n in matrices]).norm()
        assert found["update_ratio"][i] == pytest.approx((moved / size).item(), rel=1e-4)


def test_measuring_layers_changes_no_number_of_a_run(data_dir, tmp_path):
    settings = dict(optimizer="muon", dropout=0.1)
    plain = run_train(data_dir, tmp_path / "plain", **settings)
    measured = run_train(data_dir, tmp_path / "measured", stats_every=4, **settings)
    assert losses(plain) == losses(measured)
    stats = [m for m in measured if m["event"] == "stats"]
    assert [m["step"] for m in stats] == [0, 4, 8]
    assert not [m for m in plain if m["event"] == "stats"]
    _, missing = plot.draw([plot.Curves(tmp_path / "measured")], "steps")
    assert "update / weight size" not in missing
