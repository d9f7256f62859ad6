"""The loop that trains the demo models: its steps, its limit in time, its minimum."""

import torch
from torch import nn
from training import train


def test_a_loss_falls_to_its_minimum():
    torch.manual_seed(0)
    line = nn.Linear(1, 1)
    inputs = torch.linspace(-1, 1, 8)[:, None]
    losses = []

    def loss() -> torch.Tensor:
        losses.append((line(inputs) - 0.5 * inputs).square().mean())
        return losses[-1]

    train(line, loss, steps=200, peak_rate=0.1)
    assert len(losses) == 200
    assert losses[-1] < 1e-3 < losses[0]


def test_no_step_begins_after_the_minutes():
    line = nn.Linear(1, 1)
    before = line.weight.clone()
    train(line, lambda: line(torch.ones(1)).sum(), steps=5, peak_rate=0.1, minutes=1e-12)
    assert torch.equal(line.weight, before)
