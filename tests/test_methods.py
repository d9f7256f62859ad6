"""The contract of every method with every pattern, generated from the table of methods."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gblm import methods
from gblm.base import DENSE_OUTPUTS, GblmError, Method, Statistics
from gblm.maths import patterns, stats

REPAIR = {"sparsegpt", "admm", "best"}  # these change the weights that stay
PATTERNS = ["0.5", "0.29", "0.5/layer", "2:4", "1:4", "4:8"]
OUT, IN = 7, 16
few = settings(max_examples=5)


def solver_needs(method: Method) -> frozenset[str]:
    """Return the statistics that the solver of a method reads, those of its own block too."""
    regional = (getattr(step, "regional", frozenset()) for step in method.steps)
    return method.needs.union(*regional) - {DENSE_OUTPUTS}


def draw(
    method: Method, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Statistics]:
    """Return a weight and just the statistics that the method asks for."""
    made = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=made, dtype=torch.float64).to(dtype)
    x = torch.randn(9, 4, IN, generator=made, dtype=torch.float64).to(dtype)
    x = x + x.roll(1, dims=-1)  # correlated
    dy = torch.randn(9, 4, OUT, generator=made, dtype=torch.float64).to(dtype)
    inputs = stats.zeros(solver_needs(method) & set(stats.INPUT), weight)
    gradients = stats.zeros(solver_needs(method) & set(stats.GRADIENT), weight, positions=4)
    stats.add_inputs(inputs, x.flatten(0, 1), len(x))
    stats.add_gradients(gradients, x, dy)
    return weight, Statistics({**inputs.sums, **gradients.sums}, len(x), 4 * len(x), len(x))


def check_solved(name: str, pattern: str, weight: Tensor, new: Tensor, keep: Tensor) -> None:
    """Fail unless the result of a method is what every method promises."""
    assert new.shape == keep.shape == weight.shape
    assert new.dtype == weight.dtype
    assert keep.dtype == torch.bool
    assert torch.isfinite(new).all()
    assert (new[~keep] == 0).all(), "dropped weights are exactly 0"
    if name not in REPAIR:
        assert torch.equal(new[keep], weight[keep]), "kept weights are unchanged"
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        assert (keep.view(-1, m).sum(dim=1) == n).all(), "n of every m stay"
    elif "/" in pattern:
        assert (~keep).sum() == OUT * IN // 2
    else:
        assert ((~keep).sum(dim=1) == math.floor(float(pattern) * IN)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", methods.METHODS)
@few
@given(seed=st.integers(0, 2**31))
def test_contract(name, pattern, dtype, seed):
    method = methods.make(name)
    weight, statistics = draw(method, dtype, seed)
    before = [weight.clone(), *(value.clone() for value in statistics.sums.values())]
    check_solved(name, pattern, weight, *method.solve(weight, statistics, patterns.parse(pattern)))
    after = [weight, *statistics.sums.values()]
    assert all(map(torch.equal, before, after)), "what a method is given stays as it was"


def drop_one_more(weight, new, keep):
    row, column = keep.nonzero()[0]
    keep[row, column], new[row, column] = False, 0


def leave_a_rest(weight, new, keep):
    row, column = (~keep).nonzero()[0]
    new[row, column] = 1e-30


def touch_a_kept_weight(weight, new, keep):
    row, column = keep.nonzero()[0]
    new[row, column] += 1e-6


@pytest.mark.parametrize("fault", [drop_one_more, leave_a_rest, touch_a_kept_weight])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_checker_sees_a_planted_fault(fault, pattern):
    method = methods.wanda()
    weight, statistics = draw(method)
    new, keep = method.solve(weight, statistics, patterns.parse(pattern))
    fault(weight, new, keep)
    with pytest.raises(AssertionError):
        check_solved("wanda", pattern, weight, new, keep)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("solver", methods.SOLVERS)
@pytest.mark.parametrize("name", ["magnitude", "gblm", "wanda++"])
def test_a_solver_keeps_the_mask_of_the_score(name, solver, pattern):
    method, score = methods.make(f"{name}+{solver}"), methods.make(name)
    weight, statistics = draw(method)
    new, keep = method.solve(weight, statistics, patterns.parse(pattern))
    assert torch.equal(keep, score.solve(weight, statistics, patterns.parse(pattern))[1])
    check_solved("sparsegpt", pattern, weight, new, keep)
    assert not torch.allclose(new[keep], weight[keep])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", methods.METHODS)
@few
@given(seed=st.integers(0, 2**31), data=st.data())
def test_permuting_rows_permutes_the_result(name, pattern, seed, data):
    order = data.draw(st.permutations(range(OUT)))
    method, allowed = methods.make(name), patterns.parse(pattern)
    weight, statistics = draw(method, seed=seed)
    permuted = Statistics(
        {k: v[order] if v.shape == weight.shape else v for k, v in statistics.sums.items()},
        statistics.samples,
        statistics.positions,
        statistics.differentiated,
    )
    new, keep = method.solve(weight, statistics, allowed)
    new_permuted, keep_permuted = method.solve(weight[order], permuted, allowed)
    assert torch.equal(keep_permuted, keep[order])
    torch.testing.assert_close(new_permuted, new[order])


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_says_what_it_is_and_needs(name):
    method = methods.make(name)
    assert method.name.startswith(name)
    assert solver_needs(method) <= {*stats.INPUT, *stats.GRADIENT}
    assert method.group in patterns.GROUPS


def test_make_hands_on_the_options_a_method_takes():
    assert methods.make("gblm", alpha=3, norm="l2").name == "gblm(alpha=3, norm=l2)"
    assert methods.make("wanda", alpha=3, norm="l2").name == "wanda"


def test_a_score_of_ones_own_is_a_method():
    method = methods.masked("smallest", {"input_sq"}, lambda weight, found: -weight.abs())
    weight, statistics = draw(method)
    new, keep = method.solve(weight, statistics, patterns.parse("0.5"))
    check_solved("smallest", "0.5", weight, new, keep)
    assert weight[keep].abs().mean() < weight[~keep].abs().mean()


# One of every method, and of every option of one.
MADE = {
    **{name: (name, {}) for name in methods.METHODS},
    "gblm alpha": ("gblm", {"alpha": 50}),
    "gblm auto": ("gblm", {"alpha": "auto"}),
    "gblm norm": ("gblm", {"norm": "l2"}),
    "gradient norm": ("gradient", {"norm": "l2"}),
    "pruner-zero norm": ("pruner-zero", {"norm": "l1"}),
    "ria power": ("ria", {"power": 0.25}),
    "wanda++ factor": ("wanda++", {"factor": 50}),
    "wanda++ rounds": ("wanda++", {"rounds": 5}),
    "wanda++ rate": ("wanda++", {"rounds": 5, "rate": 1e-6}),
    "sparsegpt damping": ("sparsegpt", {"damping": 0.02}),
    "sparsegpt columns": ("sparsegpt", {"columns": 64}),
    "best mix": ("best", {"mix": 0.25}),
    "best focus": ("best", {"focus": 0.25}),
    "best refine": ("best", {"refine": 1}),
    "best allocation": ("best", {"allocation": "owl"}),
    "best no allocation": ("best", {"allocation": None}),
    **{f"gblm+{solver}": (f"gblm+{solver}", {}) for solver in methods.SOLVERS},
    "wanda+repair": ("wanda+repair", {}),
    "gblm+repair alpha": ("gblm+repair", {"alpha": 50}),
}


def key_of(name: str) -> str:
    """Return what a journal keeps of a method."""
    method, options = MADE[name]
    return json.dumps(methods.make(method, **options).key())


def test_methods_of_other_options_have_other_keys():
    keys = {name: key_of(name) for name in MADE}
    assert len(set(keys.values())) == len(keys)
    refined = json.dumps(methods.refined(methods.make("wanda"), 1).key())
    assert refined not in keys.values()


def test_a_method_has_one_key_in_every_process():
    """Nothing of it comes from an address, or from the order of a set."""
    code = f"""
import json
from gblm import methods
made = {MADE!r}
print(json.dumps([json.dumps(methods.make(n, **o).key()) for n, o in made.values()]))
"""
    expected = [key_of(name) for name in MADE]
    assert [key_of(name) for name in MADE] == expected
    run = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    found = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout.splitlines()[-1]) == expected
    assert not any("0x" in key for key in expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods.make("wandas"), "unknown method 'wandas'; did you mean 'wanda'"),
        (lambda: methods.gblm(norm="l3"), "unknown norm 'l3'"),
        (lambda: methods.gradient(norm="max"), "unknown norm 'max'"),
        (lambda: methods.gblm(alpha=-1), "alpha -1 is neither"),
        (lambda: methods.gblm(alpha=math.nan), "alpha nan is neither"),
        (lambda: methods.gblm(alpha=math.inf), "alpha inf is neither"),
        (lambda: methods.gblm(share=0), "share 0 is outside"),
        (lambda: methods.make("gblm+repairs"), "unknown solver 'repairs'; did you mean 'repair'"),
        (lambda: methods.make("gbml+repair"), "unknown method 'gbml'; did you mean 'gblm'"),
        (lambda: methods.best(focus=2), "focus 2 is outside"),
        (lambda: methods.best(mix=-1), "mix -1 is outside"),
    ],
)
def test_what_is_no_method_is_refused(make, message):
    with pytest.raises(GblmError, match=message):
        make()
