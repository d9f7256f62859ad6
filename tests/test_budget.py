"""The budget of a model: what a search tries is what a mask would do, and nothing of it stays."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import kl_div

import gblm
from gblm import methods
from gblm.llm.adapters import adapter
from gblm.maths.allocation import Allocation

NAME = "model.layers.0.self_attn.q_proj"
SEARCHED = replace(methods.make("wanda"), allocation="search")


@pytest.mark.parametrize("pattern", ["0.5", "0.5/layer", "3:8"])
def test_a_trial_is_the_loss_of_the_model_pruned_by_wanda(pattern, make_llama, batch, monkeypatch):
    """Of its first linear, which sees inputs of the dense model in both."""
    seen: list[float] = []
    share = (8 - 3) / 8 if ":" in pattern else 0.5

    def watched() -> Allocation:
        def shares(linears, budget):
            first = [share if linear.name == NAME else 0.0 for linear in linears]
            seen.append(budget.loss([share] * len(linears), False))  # the next one puts it back
            seen.append(budget.loss(first, False))
            return [budget.sparsity] * len(linears)

        return Allocation("watched", frozenset({"input_sq"}), shares, trials=(0, 2))

    monkeypatch.setitem(gblm.maths.allocation.ALLOCATIONS, "watched", watched)
    dense, own = make_llama(torch.float64), make_llama(torch.float64)
    gblm.prune(own, batch, replace(SEARCHED, allocation="watched"), pattern)
    pruned = make_llama(torch.float64)
    gblm.prune(pruned, batch, methods.make("wanda"), pattern)
    weight = pruned.get_submodule(NAME).weight.detach().clone()
    pruned.load_state_dict(dense.state_dict())
    pruned.get_submodule(NAME).weight.detach().copy_(weight)
    with torch.no_grad():
        logits = [model(**batch).logits.log_softmax(-1) for model in (pruned, dense)]
    wanted = kl_div(*logits, reduction="none", log_target=True).sum(-1).mean().item()
    assert seen[1] == pytest.approx(wanted, rel=1e-6)
    assert seen[0] > seen[1]


def test_a_search_keeps_the_count_and_spends_it_otherwise(make_llama, batch):
    before, searched = make_llama(), make_llama()
    reports = [
        gblm.prune(model, batch, replace(SEARCHED, allocation=name), "0.5")
        for model, name in ((before, "gradient"), (searched, "search"))
    ]
    assert reports[0].sparsity == pytest.approx(reports[1].sparsity, abs=0.002)
    assert [x.sparsity for x in reports[0].linears] != [x.sparsity for x in reports[1].linears]
    assert reports[1].allocation == "search"


def test_a_search_is_refused_before_work_where_nothing_can_be_tried(llama, batch):
    without = replace(adapter(llama), logits=None)
    with pytest.raises(gblm.GblmError, match="allocation search needs an adapter with logits"):
        gblm.prune(llama, batch, SEARCHED, "0.5", adapter=without)
