"""Parity with the published GBLM-Pruner code, as it ran in fp32 on the stories260K model.

The folder golden/stories260K holds its calibration windows, its gradients (stored in half
precision), its masks, and the sparsity and perplexity it measured.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import gblm
from gblm import methods
from gblm.base import Pattern, Statistics
from gblm.llm.loss import window_loss
from gblm.walk.gradients import Gradients
from gblm.walk.prune import Pruning, method_pattern
from gblm.walk.walk import Walk

# Every mask the published code left, by method and pattern; those of QUICK are compared by default.
GRADIENT = [
    "gblm-l1_0.5",
    "gblm-l1_0.6",
    "gblm-l1_2-4",
    "gblm-l1_4-8",
    "gblm-l2_0.5",
    "gblm-l2_2-4",
    "gradient-l1_0.5",
    "gradient-l2_0.5",
]
EXACT = ["wanda_0.5", "wanda_2-4", "wanda_4-8", "magnitude_2-4", "sparsegpt_2-4", "sparsegpt_4-8"]
ONE_MORE = ["magnitude_0.5", "sparsegpt_0.5"]
QUICK = {"gblm-l1_0.5", "gblm-l2_2-4", "gradient-l1_0.5"}  # each norm
QUICK |= {"wanda_4-8", "magnitude_2-4", "sparsegpt_2-4", "magnitude_0.5"}


def quickly(names: Sequence[str]) -> pytest.MarkDecorator:
    """Return the mark that gives a test names, those beyond QUICK in the slow run."""
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name in QUICK else slow) for name in names]
    )


@dataclass
class Golden:
    """What the published code was given and gave."""

    folder: Path
    model: nn.Module
    calibration: dict[str, Tensor]
    evaluation: Tensor
    expected: dict[str, dict[str, float]]
    dense: dict[str, Tensor]
    own: Gradients = field(default_factory=dict)

    def prune(self, name: str, gradients: Gradients, pattern: Pattern | None = None) -> gblm.Report:
        """Prune the dense model as the published code did for the result of that name."""
        self.model.load_state_dict(self.dense)
        method, _, allowed = name.partition("_")
        method, _, norm = method.partition("-")
        allowed = pattern or (ragged(4, 8) if allowed == "4-8" else allowed.replace("-", ":"))
        made = methods.make(method, norm=norm or "l1")
        walk = Walk.of(self.model, self.calibration)
        return Pruning(walk, made, method_pattern(made, allowed), gradients).run()

    def differing(self, name: str, report: gblm.Report) -> tuple[int, int]:
        """Return in how many cells the masks differ from the published ones, and of how many."""
        differing, cells = 0, 0
        with np.load(self.folder / f"keep_{name}.npz") as masks:
            assert {f"{linear.name}.weight" for linear in report.linears} == set(masks.files)
            for key in masks.files:
                kept = self.model.get_parameter(key).detach().flatten().numpy() != 0
                published = np.unpackbits(masks[key])[: kept.size].astype(bool)
                differing += int((kept != published).sum())
                cells += kept.size
        return differing, cells

    def perplexity(self) -> float:
        with torch.no_grad():
            losses = [
                window_loss(self.model(ids, use_cache=False).logits, ids)
                for ids in self.evaluation.split(15)
            ]
        return torch.cat(losses).mean().exp().item()


@pytest.fixture(scope="module")
def golden(assets: Path) -> Golden:
    folder = assets.parent / "golden" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(assets / "llama" / "stories260K").eval()

    def windows(name: str) -> Tensor:
        return torch.from_numpy(np.load(folder / name)["input_ids"].astype(np.int64))

    made = Golden(
        folder,
        model,
        {"input_ids": windows("calibration.npz")},
        windows("evaluation.npz"),
        json.loads((folder / "expected.json").read_text()),
        {name: value.clone() for name, value in model.state_dict().items()},
    )
    made.own = gblm.gradient_sums(model, made.calibration, {"grad_abs", "grad_sq"})
    return made


# Patterns of the published code that gblm does not have: a pattern plugs in.


def ragged(n: int, m: int) -> Pattern:
    """Return n:m as the published code has it: the last group of a row may be shorter.

    It loses m − n weights like any other. gblm refuses inputs that m does not divide; the
    172-wide down_proj of this model is no multiple of 8.
    """

    def keep(score: Tensor) -> Tensor:
        mask = torch.ones_like(score, dtype=torch.bool)
        for chosen in torch.arange(score.shape[1]).split(m):
            lowest = score[:, chosen].argsort(dim=1, stable=True)[:, : m - n]
            mask.scatter_(1, chosen[lowest], False)
        return mask

    return Pattern(f"{n}:{m} ragged", keep, lambda shape: None, window=m)


def one_more(sparsity: float) -> Pattern:
    """Return the published threshold of magnitude and sparsegpt, which is dropped itself (`<=`).

    So one weight more goes of each comparison group, a weight or a block of 128 columns, than the
    count that the sparsity asks for. gblm drops the exact count.
    """

    def keep(score: Tensor) -> Tensor:
        return score > score.flatten().sort().values[int(score.numel() * sparsity)]

    return Pattern(f"{sparsity:g} and one more", keep, lambda shape: None)


# Gradients as the published code stores them: 100 · ‖g‖ in half precision.


def half(own: Gradients) -> Gradients:
    """Return our own gradients, rounded as the published code stores them."""

    def stored(norm: Tensor) -> Tensor:
        return (100 * norm).half().float() / 100

    return {
        name: Statistics(
            {"grad_abs": stored(g["grad_abs"]), "grad_sq": stored(g["grad_sq"].sqrt()).square()},
            g.samples,
            g.positions,
        )
        for name, g in own.items()
    }


def published(folder: Path) -> Gradients:
    """Return the gradients the published code stored."""
    l1, l2 = (np.load(folder / f"gradient_{norm}.npz") for norm in ("l1", "l2"))
    return {
        name: Statistics(
            {
                "grad_abs": torch.from_numpy(l1[name]).float() / 100,
                "grad_sq": (torch.from_numpy(l2[name]).float() / 100).square(),
            }
        )
        for name in l1.files
    }


def test_nothing_is_left_out(golden):
    assert {"dense", *GRADIENT, *EXACT, *ONE_MORE} == set(golden.expected)


def test_dense_perplexity(golden):
    golden.model.load_state_dict(golden.dense)
    assert golden.perplexity() == pytest.approx(golden.expected["dense"]["perplexity"], rel=1e-4)


def test_gradients(golden):
    theirs = published(golden.folder)
    assert theirs.keys() == golden.own.keys()
    for name, sums in theirs.items():
        for norm in ("grad_abs", "grad_sq"):
            ours, stored = golden.own[name][norm], sums[norm]
            if norm == "grad_sq":
                ours, stored = ours.sqrt(), stored.sqrt()
            assert (ours - stored).norm() <= 2e-3 * stored.norm(), (name, norm)


def check(golden: Golden, name: str, report: gblm.Report, agreement: float) -> None:
    """Fail unless masks, sparsity and perplexity are those of the published code."""
    differing, cells = golden.differing(name, report)
    expected = golden.expected[name]
    assert differing <= (1 - agreement) * cells, f"{differing} of {cells} cells differ"
    assert report.sparsity == pytest.approx(expected["sparsity"], abs=5.1e-5)
    assert golden.perplexity() == pytest.approx(expected["perplexity"], rel=0.01)


@quickly(EXACT)
def test_methods_without_gradients_agree_to_the_last_cell(golden, name):
    check(golden, name, golden.prune(name, {}), agreement=1)


@quickly(GRADIENT)
def test_methods_with_the_published_gradients_agree_to_the_last_cell(golden, name):
    check(golden, name, golden.prune(name, published(golden.folder)), agreement=1)


@pytest.mark.parametrize(
    "name", [*GRADIENT[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in GRADIENT[1:])]
)
def test_methods_with_our_gradients_stored_as_published_agree(golden, name):
    differing, cells = golden.differing(name, golden.prune(name, half(golden.own)))
    assert differing <= 0.001 * cells


def test_gblm_with_our_gradients_agrees(golden):
    check(golden, "gblm-l1_0.5", golden.prune("gblm-l1_0.5", golden.own), agreement=0.999)


def test_half_precision_costs_the_published_code_most_in_gblm_l2_at_2_4(golden):
    """Our gradients in fp32 move 0.18 % of the cells there, and the perplexity is 3 % lower.

    Rounded as published, or read from its files, they do not: the two tests above.
    """
    name = "gblm-l2_2-4"
    differing, cells = golden.differing(name, golden.prune(name, golden.own))
    assert differing <= 0.002 * cells
    assert golden.perplexity() <= 1.01 * golden.expected[name]["perplexity"]


@pytest.mark.parametrize(
    ("name", "agreement"),
    [("magnitude_0.5", 1), pytest.param("sparsegpt_0.5", 0.999, marks=pytest.mark.slow)],
)
def test_the_published_threshold_agrees(golden, name, agreement):
    """Magnitude to the last cell, sparsegpt but for one swap and what follows from it.

    In the first k_proj two scores at the threshold differ by 2e-6 of their value. In float64 the
    order is gblm's; the fp32 running mean of the published code turns it. The blocks after it see
    slightly other inputs: 212 of 226560 cells differ in all.
    """
    check(golden, name, golden.prune(name, {}, one_more(0.5)), agreement)


@quickly(ONE_MORE)
def test_the_exact_count_differs_by_the_one_more(golden, name):
    """gblm drops the exact count: sparsity is 0.5000 where the published code has 0.5002.

    The weights more that stay move the perplexity, of sparsegpt by 1.03 %.
    """
    report = golden.prune(name, {})
    differing, cells = golden.differing(name, report)
    assert 0 < differing <= 0.005 * cells
    assert report.sparsity == 0.5
    assert golden.perplexity() == pytest.approx(golden.expected[name]["perplexity"], rel=0.011)


def test_the_check_sees_another_method(golden):
    few = replace(golden, calibration={"input_ids": golden.calibration["input_ids"][:1]})
    report = few.prune("wanda_0.5", {})
    with pytest.raises(AssertionError, match="cells differ"):
        check(golden, "gblm-l1_0.5", report, agreement=0.999)


def test_the_ragged_group_is_refused_by_gblm_itself(golden):
    golden.model.load_state_dict(golden.dense)
    with pytest.raises(gblm.GblmError, match=r"down_proj.*in=172 is not divisible by 8"):
        gblm.prune(golden.model, golden.calibration, methods.wanda(), "4:8")
