"""Laws of the work folder: a run that was cut off ends with the same bits, another is refused."""

import json

import pytest
import torch

import gblm
from gblm import methods
from gblm.walk import journal
from gblm.walk.gradients import first, gradient_sums, sweep
from gblm.walk.journal import GradientFolder, Journal
from gblm.walk.prune import Pruning, method_pattern
from gblm.walk.survey import find_adapter, survey
from gblm.walk.walk import Walk

SLOW = pytest.mark.slow
METHODS = ["wanda", "gblm", "sparsegpt", "best", "wanda++"]


class Cut(Exception):
    """Planted in the middle of a run."""


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def cut_after(monkeypatch, count):
    """Let the writing of the file of that number fail, tensors and journals counted."""
    left = [count]

    def planted(write):
        def cut(path, value):
            left[0] -= 1
            if left[0] == 0:
                raise Cut
            write(path, value)

        return cut

    for name in ("write_tensors", "write_json"):
        monkeypatch.setattr(journal, name, planted(getattr(journal, name)))


def prune(model, batch, method, gradients=None, journal=None):
    """Prune half of a model, with gradients from elsewhere where there are any, and a journal."""
    walk = Walk.of(model, batch)
    pruning = Pruning(walk, method, method_pattern(method, "0.5"), gradients or {}, journal)
    if pruning.needs and gradients is None:
        share = first(model, batch, walk.adapter, method.share)
        pruning.gradients = sweep(Walk.of(model, share, blocks=walk.blocks), pruning.needs)[0]
    return pruning.run()


@pytest.mark.parametrize(
    ("name", "count"),
    [  # one method is cut off everywhere, the others once in the middle
        pytest.param(name, count, marks=() if name == "gblm" or count == 3 else SLOW)
        for name in METHODS
        for count in range(1, 7)
    ],
)
def test_a_run_that_was_cut_off_ends_with_the_same_bits(
    make_llama, batch, name, count, tmp_path, monkeypatch
):
    method, settings = methods.make(name), {"method": name}
    whole = make_llama()
    expected = gblm.prune(whole, batch, method, "0.5")
    with monkeypatch.context() as patch:
        cut_after(patch, count)
        journal = Journal(tmp_path / "run", settings, resume=False)
        with pytest.raises(Cut):
            prune(make_llama(), batch, method, journal=journal)
    model = make_llama()
    resumed = Journal(tmp_path / "run", settings, resume=True)
    assert len(resumed.finished) == (count - 1) // 2
    report = prune(model, batch, method, journal=resumed)
    assert same(bits(whole), bits(model))
    told = [(x.name, x.sparsity, x.relative_error) for x in report.linears]
    assert told == [(x.name, x.sparsity, x.relative_error) for x in expected.linears]
    # Once more: nothing is left to do.
    model = make_llama()
    finished = Journal(tmp_path / "run", settings, resume=True)
    report = prune(model, batch, method, journal=finished)
    assert [x.name for x in report.linears] == [x.name for x in expected.linears]
    assert same(bits(whole), bits(model))


def test_a_journal_of_other_settings_is_refused_by_name(llama, batch, tmp_path):
    journal = Journal(tmp_path, {"method": "wanda", "seed": 0}, resume=False)
    prune(llama, batch, methods.wanda(), journal=journal)
    with pytest.raises(gblm.GblmError, match="another seed"):
        Journal(tmp_path, {"method": "wanda", "seed": 1}, resume=True)
    with pytest.raises(gblm.GblmError, match="--resume"):
        Journal(tmp_path, {"method": "wanda", "seed": 0}, resume=False)
    (tmp_path / "journal.json").write_text('{"settings"')
    with pytest.raises(gblm.GblmError, match="cannot be read"):
        Journal(tmp_path, {"method": "wanda", "seed": 0}, resume=True)


def test_fingerprints_tell_models_and_batches_apart(make_llama, make_batch):
    model, batch = make_llama(), make_batch(7)
    blocks = survey(model, batch, find_adapter(model))
    first = journal.fingerprint(model, batch, blocks)
    assert journal.fingerprint(model, make_batch(7), blocks) == first
    assert journal.fingerprint(model, make_batch(6), blocks) != first
    moved = {"input_ids": batch["input_ids"].flip(0)}
    other = journal.fingerprint(model, moved, blocks)
    assert other["model"] == first["model"]
    assert other["calibration batch"] != first["calibration batch"]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert journal.fingerprint(model, batch, blocks)["model"] != first["model"]


@pytest.mark.parametrize("backward", ["model", "blocks"])
def test_gradients_in_a_folder_are_those_in_memory(make_llama, batch, backward, tmp_path):
    needs = {"grad_abs", "grad_sq"}
    model = make_llama()
    expected = gradient_sums(model, batch, needs, backward=backward)
    settings = {"needs": sorted(needs), "model": "tiny"}
    folder = GradientFolder(tmp_path / "gradients", settings)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    rest, taken = sweep(Walk.of(model, batch, folder=scratch), needs, backward, folder)
    assert not rest
    assert taken == backward
    assert not list(scratch.iterdir())
    folder.finish()
    found = GradientFolder(tmp_path / "gradients", {**settings, "needs": ["grad_abs"]}).stored()
    assert set(found) == set(expected)
    for name, statistics in expected.items():
        assert found[name].samples == statistics.samples
        for key, value in statistics.sums.items():
            assert torch.equal(found[name][key], value)
    plain, other = make_llama(), make_llama()
    prune(plain, batch, methods.gblm(), expected)
    prune(other, batch, methods.gblm(), found)
    assert same(bits(plain), bits(other))
    with pytest.raises(gblm.GblmError, match="another model"):
        GradientFolder(tmp_path / "gradients", {**settings, "model": "large"}).stored()
    with pytest.raises(gblm.GblmError, match="another needs"):
        GradientFolder(tmp_path / "gradients", {**settings, "needs": ["grad_position"]}).stored()
    assert GradientFolder(tmp_path / "none", settings).stored() is None
    with pytest.raises(gblm.GblmError, match=r"holds no gradients\.json"):
        GradientFolder(tmp_path / "none", settings).stored(must=True)


def test_gradients_can_be_kept_in_half_precision(llama, batch, tmp_path):
    folder = GradientFolder(tmp_path, {"needs": ["grad_abs"]}, torch.bfloat16)
    expected = gradient_sums(llama, batch, {"grad_abs"})
    sweep(Walk.of(llama, batch), {"grad_abs"}, store=folder)
    for name, statistics in folder.finish().items():
        assert statistics["grad_abs"].dtype == torch.float32
        torch.testing.assert_close(
            statistics["grad_abs"], expected[name]["grad_abs"], rtol=1e-2, atol=0
        )


@pytest.mark.parametrize(
    ("backward", "count"),
    [
        *(("blocks", count) for count in (1, 9, 10, 28)),
        ("model", 10),
        *(pytest.param("blocks", count, marks=SLOW) for count in (8, 18, 27)),
        *(pytest.param("model", count, marks=SLOW) for count in (1, 8, 9, 18, 27, 28)),
    ],
)
def test_a_sweep_that_was_cut_off_ends_with_the_same_bits(
    llama, batch, backward, count, tmp_path, monkeypatch
):
    """Three blocks of seven linears: for each their sums, what is on the way, the journal."""
    needs, settings = {"grad_abs", "grad_position"}, {"needs": ["grad_abs", "grad_position"]}
    expected = gradient_sums(llama, batch, needs, micro_batch=3, backward=backward)

    def swept():
        folder = GradientFolder(tmp_path / "gradients", settings, journal=True)
        walk = Walk.of(llama, batch, micro_batch=3)
        shown = []
        walk.progress = lambda phase, done, total: shown.append(done)
        finished = len(folder.finished)
        sweep(walk, needs, backward, folder)
        assert shown == sorted(set(shown))
        return finished, folder.finish()

    with monkeypatch.context() as patch:
        cut_after(patch, count)
        with pytest.raises(Cut):
            swept()
    finished, found = swept()
    assert finished == (count - 1) // 9
    assert set(found) == set(expected)
    for name, statistics in expected.items():
        for key, value in statistics.sums.items():
            assert torch.equal(found[name][key], value), (name, key)
        assert (found[name].samples, found[name].positions) == (
            statistics.samples,
            statistics.positions,
        )
    assert not list((tmp_path / "gradients").glob("sweep*"))


@pytest.mark.parametrize(
    ("count", "micro_batch"),
    [
        (10, 2),
        (19, 7),
        *(pytest.param(*case, marks=SLOW) for case in [(1, 2), (1, 7), (10, 7), (19, 2)]),
    ],
)
def test_a_sweep_goes_on_with_other_micro_batches(
    llama64, batch, count, micro_batch, tmp_path, monkeypatch
):
    settings = {"needs": ["grad_abs"]}
    expected = gradient_sums(llama64, batch, {"grad_abs"}, backward="model")
    with monkeypatch.context() as patch:
        cut_after(patch, count)
        folder = GradientFolder(tmp_path, settings, journal=True)
        with pytest.raises(Cut):
            sweep(Walk.of(llama64, batch, micro_batch=3), {"grad_abs"}, "blocks", folder)
    folder = GradientFolder(tmp_path, settings, journal=True)
    sweep(Walk.of(llama64, batch, micro_batch=micro_batch), {"grad_abs"}, "blocks", folder)
    found = folder.finish()
    assert set(found) == set(expected)
    for name, statistics in expected.items():
        torch.testing.assert_close(found[name]["grad_abs"], statistics["grad_abs"])


@pytest.mark.parametrize("count", [3, 4])  # the tensors of the second block, and its journal
def test_a_full_disk_leaves_what_was_whole(llama, batch, count, tmp_path, monkeypatch):
    from gblm.machine import files

    calls = []
    sync = files._sync

    def full(path):
        if path.is_file():
            calls.append(path)
            if len(calls) >= count:
                path.write_bytes(path.read_bytes()[:100])
                raise OSError(28, "No space left on device")
        sync(path)

    monkeypatch.setattr(files, "_sync", full)
    journal = Journal(tmp_path, {}, resume=False)
    with pytest.raises(gblm.GblmError, match=r"cannot be written .*No space left"):
        prune(llama, batch, methods.wanda(), journal=journal)
    whole = {"journal.json", "model.layers.0.safetensors"}
    if count == 4:
        whole.add("model.layers.1.safetensors")  # but not of the journal yet
    assert {path.name for path in tmp_path.iterdir()} == whole
    assert json.loads((tmp_path / "journal.json").read_text())["finished"] == ["model.layers.0"]
