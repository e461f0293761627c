"""How one update treats each layer: train_gpt2.py --stats_every."""

from typing import Any

import torch
import torch.nn as nn


class LayerStats:
    """Watch one update, for the length of a `with` block, and see how it treats each layer.

    Layer 0 is the embeddings, layer i the block `transformer.h[i - 1]`. The hooks are on what is
    never compiled, and only there while an update is watched. Every rank holds the same gradients
    and weights, so one rank can watch alone. The copy of the weights is taken between backward
    and update, when no activations fill the memory.
    """

    def __init__(self, model: nn.Module, optimizers: dict[str, torch.optim.Optimizer]):
        self.model, self.optimizers = model, list(optimizers.values())
        parts = model.transformer
        embeddings = [parts.wte.weight, parts.wpe.weight]
        self.layers = [embeddings, *(list(block.parameters()) for block in parts.h)]
        self.before: list[list[torch.Tensor]] = []
        self.residual: list[torch.Tensor] = []  # mean squares
        self.gradient: list[torch.Tensor] = []  # squared norms, clipped; the last: of all weights
        self.update: list[torch.Tensor] = []  # ratios

    def __enter__(self) -> "LayerStats":
        self.hooks = [
            self.model.transformer.drop.register_forward_hook(self._see_stream),
            self.optimizers[0].register_step_pre_hook(self._see_gradients),
            self.optimizers[-1].register_step_post_hook(self._see_update),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        self.before = []

    def values(self, grad_norm: float) -> dict[str, list[float]]:
        """Return the numbers by layer: `update_ratio`, `residual_rms` and `grad_norm`.

        `update_ratio` is the norm of the update over that of the weight, of all matrices of a layer
        together; `residual_rms` is taken behind the layer, over the first row of the step, without
        dropout; `grad_norm` is before clipping, for which the whole `grad_norm` must be given.
        """
        gradient = torch.stack(self.gradient).double().sqrt()
        before_clipping = grad_norm / max(gradient[-1].item(), 1e-30)
        return {
            "update_ratio": torch.stack(self.update).tolist(),
            "residual_rms": torch.stack(self.residual).sqrt().tolist(),
            "grad_norm": (gradient[:-1] * before_clipping).tolist(),
        }

    def _see_stream(self, module: nn.Module, args: tuple, x: torch.Tensor) -> None:
        """Send the first row through the blocks once more: their compiled code has no hooks."""
        if self.residual or torch.is_grad_enabled() is False:
            return
        with torch.no_grad():
            self.model.eval()  # dropout would draw random numbers that belong to the run
            x = x[:1]
            self.residual.append(x.float().square().mean())
            for block in self.model.transformer.h:
                x = block.forward(x)  # not block(x), which is compiled
                self.residual.append(x.float().square().mean())
            self.model.train()

    def _see_gradients(self, *_: Any) -> None:
        def squared(params: list) -> torch.Tensor:
            norms = [p.grad.norm() for p in params if p.grad is not None]
            return torch.stack(norms).square().sum()

        self.gradient = [squared(params) for params in self.layers]
        self.gradient.append(squared(list(self.model.parameters())))
        self.before = [
            [p.detach().clone() for p in params if p.dim() >= 2] for params in self.layers
        ]

    def _see_update(self, *_: Any) -> None:
        for params, before in zip(self.layers, self.before, strict=True):
            matrices = [p.detach() for p in params if p.dim() >= 2]
            moved = torch.stack([(p - b).norm() for p, b in zip(matrices, before, strict=True)])
            size = torch.stack([b.norm() for b in before])
            self.update.append(moved.norm() / size.norm())
        self.before = []
