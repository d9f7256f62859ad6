"""The walk: micro-batches change nothing, faults leave nothing, errors name their place."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gblm
from gblm import methods
from gblm.base import Method, Solver
from gblm.machine.placement import Placement
from gblm.maths import patterns, stats
from gblm.walk import visit
from gblm.walk.gradients import sweep
from gblm.walk.prune import Pruning, method_pattern
from gblm.walk.visit import Visit, forward
from gblm.walk.walk import Walk

STATE = ("training", "forward", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
STATE += ("_backward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


def prune(model: nn.Module, batch: dict[str, Tensor], method: str = "gblm", **options):
    return gblm.prune(model, batch, methods.make(method), options.pop("pattern", "0.5"), **options)


def solved_by(method: Method, solve: Solver) -> tuple[Solver, Method]:
    """Return the solver of a method, and the method with another in its place."""
    steps = tuple(
        replace(step, solve=solve) if hasattr(step, "solve") else step for step in method.steps
    )
    return method.solve, replace(method, steps=steps)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def state(model: nn.Module) -> dict:
    """Return everything of a model that a run changes for a time."""
    modules = {
        (name, key): list(value) if isinstance(value, dict) else value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key in STATE
    }
    return modules | {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0) -> None:
    """Fail where tensors differ by more than the tolerance; a NaN equals a NaN."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, equal_nan=True
        )


# Micro-batches


def run_statistics(model: nn.Module, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """Return every statistic of inputs, with micro-batches of `step` samples."""
    found = {}

    def work(visit: Visit) -> None:
        for inputs in (
            inputs for groups in visit.inputs(frozenset(stats.INPUT)) for inputs in groups
        ):
            name, statistics = inputs.group[0].name, inputs.statistics
            found.update({f"{name} {key}": value for key, value in statistics.sums.items()})
            found[f"{name} counts"] = torch.tensor([statistics.samples, statistics.positions])

    forward(Walk.of(model, batch, micro_batch=step), work)
    return found


@pytest.mark.parametrize("step", [1, 2, 3, 6])
def test_micro_batch_never_changes_statistics(llama64, batch, step):
    check_same(run_statistics(llama64, batch, step), run_statistics(llama64, batch, 7), 1e-10)


def test_the_checker_sees_a_lost_sample(llama64, batch):
    fewer = {"input_ids": batch["input_ids"][:6]}
    with pytest.raises(AssertionError):
        check_same(run_statistics(llama64, fewer, 3), run_statistics(llama64, batch, 7), 1e-3)


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("backward", ["blocks", "model"])
def test_micro_batch_never_changes_gradients(llama64, batch, backward, step):
    def run(micro_batch: int, backward: str) -> dict[str, Tensor]:
        found = gblm.gradient_sums(
            llama64, batch, stats.GRADIENT, micro_batch=micro_batch, backward=backward
        )
        return {
            f"{name} {key}": sums[key] / sums[key].norm()
            for name, sums in found.items()
            for key in sums.sums
        }

    check_same(run(step, backward), run(7, "model"), 1e-10)


@pytest.mark.parametrize(
    ("pattern", "step"),
    [
        ("0.5", 1),
        ("2:4", 3),
        pytest.param("0.5", 3, marks=pytest.mark.slow),
        pytest.param("2:4", 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("method", methods.METHODS)
def test_micro_batch_never_changes_the_result(make_llama, batch, method, pattern, step):
    made = methods.refined(methods.make(method), 0)
    some, whole = make_llama(torch.float64), make_llama(torch.float64)
    gblm.prune(some, batch, made, pattern, micro_batch=step, backward="blocks")
    gblm.prune(whole, batch, made, pattern, micro_batch=7, backward="model")
    check_same(weights(some), weights(whole), 1e-9)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_micro_batch_hardly_changes_a_refinement(make_llama, batch, step):
    # Adam's steps know no size: where a gradient is next to nothing, rounding decides on its sign.
    some, whole = make_llama(torch.float64), make_llama(torch.float64)
    prune(some, batch, "best", micro_batch=step)
    prune(whole, batch, "best", micro_batch=7)
    check_same(weights(some), weights(whole), 1e-3)


@pytest.mark.parametrize("method", ["gblm", pytest.param("sparsegpt", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("samples", "length"), [(1, 12), (8, 8), (4, 12), (3, 3), (12, 6)])
def test_sizes_that_could_be_taken_for_one_another(make_llama, make_batch, method, samples, length):
    # One sample; as many samples as positions; as many as heads; as many as heads times blocks.
    some, whole = make_llama(torch.float64), make_llama(torch.float64)
    batch = make_batch(samples, length)
    prune(some, batch, method, micro_batch=1, backward="blocks", pattern="2:4")
    prune(whole, batch, method, micro_batch=samples, backward="model", pattern="2:4")
    check_same(weights(some), weights(whole), 1e-9)


# What a run leaves behind


class Planted(Exception):
    """A fault of the test."""


class Fault(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ctx.error


def plant(model: nn.Module, error: BaseException, when: str) -> None:
    """Let the second block's mlp fail on a micro-batch, at forward or backward time."""
    mlp = model.model.layers[1].mlp
    own = mlp.forward

    def forward(x: Tensor) -> Tensor:
        if when == "forward" and len(x) > 1:
            raise error
        return Fault.apply(own(x), error) if when == "backward" else own(x)

    mlp.forward = forward


@pytest.mark.parametrize("method", ["gblm", "sparsegpt", "magnitude"])
@pytest.mark.parametrize("backward", ["blocks", "model"])
def test_a_run_leaves_nothing_behind(llama, batch, method, backward):
    llama.train()
    llama.model.layers[0].eval()
    llama.lm_head.weight.requires_grad_(False)
    before = state(llama)
    prune(llama, batch, method, backward=backward, micro_batch=3)
    assert state(llama) == before


@pytest.mark.parametrize("error", [Planted(), KeyboardInterrupt()], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("backward", ["blocks", "model"])
def test_a_failed_run_leaves_nothing_behind(llama, batch, backward, when, error):
    llama.train()
    plant(llama, error, when)
    before, dense = state(llama), weights(llama)
    with pytest.raises(type(error)):
        prune(llama, batch, "gblm", backward=backward, micro_batch=3)
    assert state(llama) == before
    check_same(weights(llama), dense)


def test_a_run_interrupted_between_the_blocks_leaves_nothing_behind(llama, batch):
    before = state(llama)

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "blocks" and done == 2:
            raise KeyboardInterrupt

    walk = Walk.of(llama, batch)
    walk.progress = progress
    method = methods.wanda()
    with pytest.raises(KeyboardInterrupt):
        Pruning(walk, method, method_pattern(method, "0.5")).run()
    assert state(llama) == before


def test_the_check_sees_a_hook_left_behind(llama):
    before = state(llama)
    llama.model.layers[0].mlp.register_forward_hook(lambda module, args, output: None)
    assert state(llama) != before


# Out of memory


def short_of_memory(model: nn.Module, limit: int, spare: int = 0) -> list[int]:
    """Let the second block run out of memory on more than `limit` samples; returns the sizes.

    The first `spare` calls have memory enough.
    """
    mlp, seen = model.model.layers[1].mlp, []
    own = mlp.forward

    def forward(x: Tensor) -> Tensor:
        seen.append(len(x))
        if len(x) > limit and len(seen) > spare:
            raise torch.OutOfMemoryError("CUDA out of memory (planted)")
        return own(x)

    mlp.forward = forward
    return seen


@pytest.mark.parametrize("backward", ["blocks", "model"])
@pytest.mark.parametrize("method", ["wanda", "gblm", "sparsegpt"])
def test_out_of_memory_halves_the_micro_batch(make_llama, batch, method, backward):
    short, model = make_llama(torch.float64), make_llama(torch.float64)
    seen = short_of_memory(short, limit=2)
    prune(short, batch, method, backward=backward)
    prune(model, batch, method, backward=backward)
    assert 7 in seen
    assert 3 in seen
    check_same(weights(short), weights(model), 1e-9)


@pytest.mark.parametrize("backward", ["blocks", "model"])
@pytest.mark.parametrize("method", ["wanda", "gblm"])
def test_a_fixed_micro_batch_is_never_halved(llama, batch, method, backward):
    short_of_memory(llama, limit=2)
    before = state(llama)
    with pytest.raises(gblm.GblmError, match="out of memory with micro-batches of 3"):
        prune(llama, batch, method, micro_batch=3, backward=backward)
    assert state(llama) == before


@pytest.mark.parametrize("backward", ["blocks", "model"])
@pytest.mark.parametrize("method", ["wanda", "gblm"])
def test_memory_for_less_than_one_sample_is_an_error(llama, batch, method, backward):
    short_of_memory(llama, limit=0, spare=3)  # the survey's runs of one sample, two, and another
    before = state(llama)
    with pytest.raises(gblm.GblmError, match="out of memory with micro-batches of 1"):
        prune(llama, batch, method, backward=backward)
    assert state(llama) == before


def test_no_memory_for_the_survey_is_an_error(llama, batch):
    short_of_memory(llama, limit=0)
    with pytest.raises(gblm.GblmError, match="out of memory"):
        prune(llama, batch, "wanda")


# Statistics see the pruned blocks


def inputs_of(
    linears: list[nn.Linear], model: nn.Module, batch: dict[str, Tensor]
) -> dict[nn.Linear, Tensor]:
    """Return the inputs `[positions, in]` of linears, from one plain run of the model."""
    inputs: dict[nn.Linear, Tensor] = {}

    def see(module: nn.Linear, args: tuple[Tensor]) -> None:
        inputs[module] = args[0].flatten(0, -2)

    hooks = [module.register_forward_pre_hook(see) for module in linears]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return inputs


def test_statistics_see_the_blocks_before_as_they_have_become(make_llama, batch):
    """Against Wanda written plainly: a block's inputs come from the pruned blocks before it."""
    found, model = make_llama(torch.float64), make_llama(torch.float64)
    prune(found, batch, "wanda", pattern="0.5")
    for index, block in enumerate(model.model.layers):
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        inputs = inputs_of(linears, model, batch)  # the blocks before are pruned already
        for module in linears:
            norm = inputs[module].norm(dim=0)
            score = module.weight.detach().abs() * norm
            lowest = score.argsort(dim=1, stable=True)[:, : score.shape[1] // 2]
            module.weight.data.scatter_(1, lowest, 0)
        check_same(weights(found.model.layers[index]), weights(block), 1e-12)


# NaN and Inf


def poison_weight(model, batch):
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    return "model.layers.1.mlp.up_proj"


def poison_head(model, batch):
    model.lm_head.weight.data[3, 4] = float("nan")
    return "lm_head.weight"


def poison_norm_weight(model, batch):
    model.model.layers[2].input_layernorm.weight.data[0] = float("inf")
    return "model.layers.2.input_layernorm.weight"


def poison_embedding(model, batch):
    def infinite(module, args, output):
        return output.masked_fill((args[0] == 5)[..., None], float("inf"))

    model.model.embed_tokens.register_forward_hook(infinite)
    batch["input_ids"][4, 2] = 5
    batch["input_ids"][:4].clamp_(min=6)
    batch["input_ids"][5:].clamp_(min=6)
    return "model.layers.0.self_attn.q_proj"


def poison_norm(model, batch):
    norm = model.model.layers[1].post_attention_layernorm
    norm.register_forward_hook(lambda module, args, output: output * float("inf"))
    return "model.layers.1.mlp.gate_proj"


@pytest.mark.parametrize(
    "poison", [poison_weight, poison_head, poison_norm_weight, poison_embedding]
)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_what_is_not_finite_is_named(llama, batch, method, poison):
    name = poison(llama, batch)
    dense, before = weights(llama), state(llama)
    with pytest.raises(gblm.GblmError, match=name.replace(".", r"\.")):
        prune(llama, batch, method, micro_batch=2)
    check_same(weights(llama), dense)
    assert state(llama) == before


def test_a_block_that_fails_leaves_it_and_those_after_it_as_they_were(llama, batch):
    name = poison_norm(llama, batch)
    dense = weights(llama)
    with pytest.raises(gblm.GblmError, match=name):
        prune(llama, batch, "wanda", micro_batch=2)
    after = {key: value for key, value in weights(llama).items() if "layers.0." not in key}
    check_same(after, {key: dense[key] for key in after})


@pytest.mark.parametrize("backward", ["blocks", "model", "auto"])
@pytest.mark.parametrize("poison", [poison_embedding, poison_norm])
def test_a_loss_that_is_not_finite_names_its_sample(llama, batch, poison, backward):
    poison(llama, batch)
    dense, before = weights(llama), state(llama)
    sample = 4 if poison is poison_embedding else 0
    with pytest.raises(gblm.GblmError, match=f"loss of calibration sample {sample} is nan"):
        prune(llama, batch, "gblm", micro_batch=2, backward=backward)
    check_same(weights(llama), dense)
    assert state(llama) == before


# Where tensors rest


def placed_at(monkeypatch: pytest.MonkeyPatch, place: str) -> list[torch.Size]:
    """Let all that rests do so in one place; return the shapes that have, as they come."""
    rested: list[torch.Size] = []
    rest = Placement.rest

    def counted(own: Placement, x: Tensor) -> Tensor:
        rested.append(x.shape)
        return rest(own, x)

    monkeypatch.setattr(Placement, "plan", lambda own, *_: setattr(own, "place", place))
    monkeypatch.setattr(Placement, "rest", counted)
    return rested


def prune_in(
    folder: Path, model: nn.Module, batch: dict[str, Tensor], method: Method, half: torch.dtype
) -> gblm.Report:
    """Prune half of a model, with a folder for what rests, its gradients block by block."""
    walk = replace(Walk.of(model, batch, micro_batch=2, folder=folder), compute_dtype=half)
    pruning = Pruning(walk, method, method_pattern(method, "0.5"))
    if pruning.needs:
        pruning.gradients = sweep(walk, pruning.needs, "blocks")[0]
    return pruning.run()


@pytest.mark.parametrize("place", ["memory", "file"])
@pytest.mark.parametrize(
    ("method", "half"),
    [*((name, torch.float32) for name in methods.METHODS), ("best", torch.bfloat16)],
)
def test_resting_elsewhere_changes_no_bit(
    make_llama, batch, method, place, half, tmp_path, monkeypatch
):
    near, far = make_llama(), make_llama()
    expected = prune_in(tmp_path, near, batch, methods.make(method), half)
    rested = placed_at(monkeypatch, place)
    found = prune_in(tmp_path, far, batch, methods.make(method), half)
    assert len(rested) >= 3 * 4  # blocks, micro-batches
    check_same(weights(far), weights(near))
    errors = [[linear.relative_error for linear in x.linears] for x in (found, expected)]
    assert errors[0] == errors[1]
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["device", "memory", "file"])
def test_a_model_that_waits_holds_no_samples_but_on_the_device(
    llama, batch, place, tmp_path, monkeypatch
):
    rested = placed_at(monkeypatch, place)
    held: list[Tensor] = []
    values: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Tensor]) -> None:
        if len(args[0]) == 2:  # a micro-batch, as the survey has none
            held.append(args[0])
            values.append(args[0].clone())

    llama.model.layers[1].register_forward_pre_hook(see)
    empty = []

    def work(visit: Visit) -> None:
        if visit.block is visit.walk.blocks[1]:
            empty.extend(bool(x.isnan().all()) for x in held)
            assert all(x.untyped_storage().nbytes() == 4 for x in held) == (place != "device")
            for call, value in zip(visit.calls, values, strict=True):
                torch.testing.assert_close(call.arguments(slice(0, 2))[0], value, rtol=0, atol=0)

    six = {"input_ids": batch["input_ids"][:6]}
    held.clear(), values.clear()
    walk = Walk.of(llama, six, micro_batch=2, folder=tmp_path)
    held.clear(), values.clear()
    forward(walk, work)
    assert rested
    assert empty == [place != "device"] * 3
    for x, value in zip(held, values, strict=True):
        torch.testing.assert_close(x, value, rtol=0, atol=0)


def test_a_failure_gives_everything_back_from_where_it_rests(llama, batch, tmp_path, monkeypatch):
    placed_at(monkeypatch, "file")
    before, dense = state(llama), weights(llama)

    def work(visit: Visit) -> None:
        if visit.block is visit.walk.blocks[2]:
            raise Planted

    with pytest.raises(Planted):
        forward(Walk.of(llama, batch, micro_batch=2, folder=tmp_path), work, beside=True)
    assert state(llama) == before
    check_same(weights(llama), dense)
    with torch.no_grad():
        assert torch.isfinite(llama(**batch).logits).all()


# Patterns and micro-batches that do not fit


def test_a_pattern_that_does_not_fit_names_the_linear_before_work_starts(llama, batch):
    dense = weights(llama)
    with pytest.raises(
        gblm.GblmError, match=r"layers\.0\.self_attn\.q_proj \[32, 32\].*divisible by 5"
    ):
        prune(llama, batch, "wanda", pattern="2:5")
    check_same(weights(llama), dense)


# The report, and the weights' own dtype


@pytest.mark.parametrize(
    "method", [name for name in methods.METHODS if len(methods.make(name).steps) == 1]
)  # no step but its solver changes a weight
def test_relative_error_is_the_exact_ratio(make_llama, batch, method):
    model, dense = make_llama(torch.float64), make_llama(torch.float64)
    report = prune(model, batch, method, micro_batch=2)
    assert batch["input_ids"].numel() <= visit.ERROR_POSITIONS
    for index, block in enumerate(model.model.layers):
        pruned = weights(block)
        block.load_state_dict(dense.model.layers[index].state_dict())
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        inputs = inputs_of(linears, model, batch)  # of a dense block after pruned ones
        block.load_state_dict(pruned)
        for linear in report.linears:
            module = model.get_submodule(linear.name)
            if module in inputs:
                x, w = inputs[module], dense.get_submodule(linear.name).weight
                exact = (x @ (module.weight - w).T).norm() / (x @ w.T).norm()
                assert linear.relative_error == pytest.approx(exact.item(), rel=1e-9)


def test_relative_error_is_near_the_exact_ratio_where_it_is_drawn(
    make_llama, make_batch, monkeypatch
):
    batch = make_batch(30, 20)
    exact = prune(make_llama(), batch, "wanda", micro_batch=4)
    monkeypatch.setattr(visit, "ERROR_POSITIONS", 60)
    drawn = prune(make_llama(), batch, "wanda", micro_batch=4)
    for one, other in zip(drawn.linears, exact.linears, strict=True):
        assert one.relative_error != other.relative_error
        assert one.relative_error == pytest.approx(other.relative_error, rel=0.2)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [  # one narrow format is enough for most methods
        *((name, torch.bfloat16) for name in methods.METHODS),
        *(
            (name, dtype)
            for name in ("gblm", "sparsegpt")
            for dtype in (torch.float16, torch.float32)
        ),
        *(
            pytest.param(name, dtype, marks=pytest.mark.slow)
            for name in sorted(set(methods.METHODS) - {"gblm", "sparsegpt"})
            for dtype in (torch.float16, torch.float32)
        ),
    ],
)
def test_statistics_are_fp32_and_weights_keep_their_dtype(make_llama, batch, method, dtype):
    model = make_llama(dtype)
    seen: set[torch.dtype] = set()

    def solve(weight, statistics, pattern, **options):
        seen.update([weight.dtype, *(value.dtype for value in statistics.sums.values())])
        return solver(weight, statistics, pattern, **options)

    solver, made = solved_by(methods.make(method), solve)
    report = gblm.prune(model, batch, made, patterns.parse("0.5", "row"), micro_batch=3)
    assert seen == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert report.sparsity == pytest.approx(0.5, abs=1e-6)
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()


def test_micro_batches_of_none_are_refused(llama, batch):
    with pytest.raises(gblm.GblmError, match="use 1 or more"):
        prune(llama, batch, "wanda", micro_batch=0)
