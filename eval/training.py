"""The loop that trains the demo models made of transformers."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

WARMUP = 100  # steps in which the rate rises to its peak; then it falls, linearly, to 0


def train(
    model: nn.Module,
    draw_loss: Callable[[], Tensor],
    steps: int,
    peak_rate: float,
    minutes: float = float("inf"),
) -> None:
    """Lower a loss that is drawn anew each step: AdamW, a linear warmup, a linear fall to 0.

    Where the minutes would be over before the steps, the rate falls with the time instead, and the
    number of steps depends on the machine.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    start, losses = time.monotonic(), []
    for step in range(1, steps + 1):
        passed = (time.monotonic() - start) / 60
        left = min(steps - step + 1, steps * (1 - passed / minutes))
        if left <= 0:
            break
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * min(step / WARMUP, left / max(1, steps - WARMUP))
        loss = draw_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0:
            passed, mean = (time.monotonic() - start) / 60, sum(losses[-100:]) / 100
            print(f"{passed:5.1f} min  step {step}/{steps}  loss {mean:.3f}", flush=True)
