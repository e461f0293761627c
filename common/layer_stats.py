"""How one update treats each layer: train_gpt2.py --stats_every."""

from typing import Any

import torch
import torch.nn as nn


class LayerStats:
    """Measure, for each layer, the update that happens inside a `with` block.

    Layer 0 is the embeddings, layer i is the block `transformer.h[i - 1]`. The hooks exist only
    inside the `with` block, and only on code that is never compiled. All ranks hold the same
    gradients and weights, so one rank alone can measure. The weights are copied between the
    backward pass and the update, when no activations take up memory.
    """

    def __init__(self, model: nn.Module, optimizers: dict[str, torch.optim.Optimizer]):
        self.model, self.optimizers = model, list(optimizers.values())
        parts = model.transformer
        embeddings = [parts.wte.weight, parts.wpe.weight]
        self.layers = [embeddings, *(list(block.parameters()) for block in parts.h)]
        self.before: list[list[torch.Tensor]] = []  # each layer's matrices before the update
        self.residual: list[torch.Tensor] = []  # mean squares
        # squared norms after clipping: each layer's, then that of all weights together
        self.gradient: list[torch.Tensor] = []
        self.update: list[torch.Tensor] = []  # ratios

    def __enter__(self) -> "LayerStats":
        self.hooks = [
            self.model.transformer.drop.register_forward_hook(self._measure_stream),
            self.optimizers[0].register_step_pre_hook(self._measure_gradients),
            self.optimizers[-1].register_step_post_hook(self._measure_update),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        self.before = []

    def values(self, grad_norm: float) -> dict[str, list[float]]:
        """Return `update_ratio`, `residual_rms` and `grad_norm`, each as one number per layer.

        `update_ratio` is the norm of the update divided by the norm of the weights, over all
        matrices of the layer. `residual_rms` is the root mean square of the residual stream after
        the layer, for the first row of the step and without dropout in the blocks. `grad_norm` is
        the norm before clipping. To undo the clipping, the method needs the norm of the whole
        gradient before clipping, `grad_norm`.
        """
        gradient = torch.stack(self.gradient).double().sqrt()
        before_clipping = grad_norm / max(gradient[-1].item(), 1e-30)  # a factor
        return {
            "update_ratio": torch.stack(self.update).tolist(),
            "residual_rms": torch.stack(self.residual).sqrt().tolist(),
            "grad_norm": (gradient[:-1] * before_clipping).tolist(),
        }

    def _measure_stream(self, module: nn.Module, args: tuple, x: torch.Tensor) -> None:
        """Run the first row through the blocks again: their compiled code has no hooks."""
        if self.residual or not torch.is_grad_enabled():  # only the first pass of the step
            return
        with torch.no_grad():
            self.model.eval()  # dropout would take random numbers that the run needs
            x = x[:1]
            self.residual.append(x.float().square().mean())
            for block in self.model.transformer.h:
                x = block.forward(x)  # not block(x), which is compiled
                self.residual.append(x.float().square().mean())
            self.model.train()

    def _measure_gradients(self, *_: Any) -> None:
        """Measure the gradients, and copy the matrices before they change."""

        def squared(params: list) -> torch.Tensor:
            norms = [p.grad.norm() for p in params if p.grad is not None]
            return torch.stack(norms).square().sum()

        self.gradient = [squared(params) for params in self.layers]
        self.gradient.append(squared(list(self.model.parameters())))
        self.before = [
            [p.detach().clone() for p in params if p.dim() >= 2] for params in self.layers
        ]

    def _measure_update(self, *_: Any) -> None:
        """Compare the matrices with their copies."""
        for params, before in zip(self.layers, self.before, strict=True):
            matrices = [p.detach() for p in params if p.dim() >= 2]
            moved = torch.stack([(p - b).norm() for p, b in zip(matrices, before, strict=True)])
            size = torch.stack([b.norm() for b in before])
            self.update.append(moved.norm() / size.norm())
        self.before = []
