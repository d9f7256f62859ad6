"""Laws of the work folder: a run that was cut off ends with the same bits, another is refused."""

import json

import pytest
import torch

import gblm
from gblm import methods
from gblm.walk import journal
from gblm.walk.gradients import gradient_sums
from gblm.walk.journal import GradientFolder, Journal
from gblm.walk.survey import find_adapter, survey

METHODS = ["wanda", "gblm", "sparsegpt", "best", "wanda++"]


class Cut(Exception):
    """Planted in the middle of a run."""


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def cut_after(monkeypatch, count):
    """Let the writing of the file of that number fail."""
    left = [count]
    write = journal.write_tensors

    def planted(path, tensors):
        left[0] -= 1
        if left[0] == 0:
            raise Cut
        write(path, tensors)

    monkeypatch.setattr(journal, "write_tensors", planted)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
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
            gblm.prune(make_llama(), batch, method, "0.5", journal=journal)
    model = make_llama()
    resumed = Journal(tmp_path / "run", settings, resume=True)
    assert len(resumed.finished) == (count - 1) // 2
    report = gblm.prune(model, batch, method, "0.5", journal=resumed)
    assert same(bits(whole), bits(model))
    told = [(x.name, x.sparsity, x.relative_error) for x in report.linears]
    assert told == [(x.name, x.sparsity, x.relative_error) for x in expected.linears]
    # Once more: nothing is left to do.
    model = make_llama()
    finished = Journal(tmp_path / "run", settings, resume=True)
    gblm.prune(model, batch, method, "0.5", journal=finished)
    assert same(bits(whole), bits(model))


def test_a_journal_of_other_settings_is_refused_by_name(llama, batch, tmp_path):
    journal = Journal(tmp_path, {"method": "wanda", "seed": 0}, resume=False)
    gblm.prune(llama, batch, methods.wanda(), "0.5", journal=journal)
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
    spill = tmp_path / "spill"
    spill.mkdir()
    rest = gradient_sums(model, batch, needs, backward=backward, keep=folder, spill=spill)
    assert not rest
    assert not list(spill.iterdir())
    folder.finish()
    found = GradientFolder(tmp_path / "gradients", {**settings, "needs": ["grad_abs"]}).stored()
    assert set(found) == set(expected)
    for name, statistics in expected.items():
        assert found[name].samples == statistics.samples
        for key, value in statistics.sums.items():
            assert torch.equal(found[name][key], value)
    plain, other = make_llama(), make_llama()
    gblm.prune(plain, batch, methods.gblm(), "0.5", gradients=expected)
    gblm.prune(other, batch, methods.gblm(), "0.5", gradients=found)
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
    gradient_sums(llama, batch, {"grad_abs"}, keep=folder)
    for name, statistics in folder.finish().items():
        assert statistics["grad_abs"].dtype == torch.float32
        torch.testing.assert_close(
            statistics["grad_abs"], expected[name]["grad_abs"], rtol=1e-2, atol=0
        )


def test_a_full_disk_leaves_what_was_whole(llama, batch, tmp_path, monkeypatch):
    from gblm.machine import files

    calls = []
    save = files.save_file

    def full(tensors, path, metadata):
        calls.append(1)
        if len(calls) > 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path, metadata=metadata)

    monkeypatch.setattr(files, "save_file", full)
    journal = Journal(tmp_path, {}, resume=False)
    with pytest.raises(gblm.GblmError, match=r"cannot be written .*No space left"):
        gblm.prune(llama, batch, methods.wanda(), "0.5", journal=journal)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {
        "journal.json",
        "model.layers.0.safetensors",
        "stream-1.safetensors",
        "model.layers.1.safetensors",  # whole, but not of the journal yet
    }
    assert json.loads((tmp_path / "journal.json").read_text())["finished"] == ["model.layers.0"]
