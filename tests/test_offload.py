"""Laws of offloading: the same bits from wherever the weights come, and one block at a time."""

import gc
import weakref

import pytest
import torch

import gblm
from gblm import methods
from gblm.llm.adapters import adapter
from gblm.machine import offload
from gblm.machine.files import write_tensors
from gblm.machine.offload import UNITS, Offload, Store, offload_of, onload
from gblm.maths import patterns
from gblm.walk.prune import Pruning
from gblm.walk.survey import find_adapter
from gblm.walk.walk import Walk

METHODS = ["magnitude", "wanda", "gblm", "sparsegpt", "best"]


def offloaded(model, kind, tmp_path):
    """Offload a model in place; return its Offload."""
    tensors = {name: value.detach().clone() for name, value in model.named_parameters()}
    if kind == "cpu":
        store = Store(tensors)
    else:
        write_tensors(tmp_path / "dense.safetensors", tensors)
        (tmp_path / "changed").mkdir()
        store = Store(dict.fromkeys(tensors, tmp_path / "dense.safetensors"), tmp_path / "changed")
    return Offload(model, adapter(model).blocks(model), store, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "disk") for name in METHODS),
        ("gblm", "cpu"),
        *(pytest.param(name, "cpu", marks=pytest.mark.slow) for name in METHODS if name != "gblm"),
    ],
)
def test_offloaded_models_get_the_same_bits(make_llama, batch, name, kind, tmp_path):
    plain, other = make_llama(), make_llama()
    parts = offloaded(other, kind, tmp_path)
    made = methods.make(name)
    gblm.prune(plain, batch, made, "0.5", backward="blocks")
    gblm.prune(other, batch, made, "0.5")
    for unit in parts.units:
        with onload(unit.module):
            for key, value in unit.parameters.items():
                assert torch.equal(value, plain.get_parameter(key)), key
    with torch.no_grad():
        assert torch.equal(other(**batch).logits, plain(**batch).logits)
    parts.revert()
    with torch.no_grad():
        assert torch.equal(other(**batch).logits, make_llama()(**batch).logits)
    parts.close()


def test_weights_that_are_away_are_nan_and_hold_no_memory(llama, batch, tmp_path):
    llama.model.kinds = torch.nn.Embedding(2, 4)  # whose rows a model's code may read by itself
    parts = offloaded(llama, "disk", tmp_path)
    block = llama.model.layers[1]
    weight = block.mlp.up_proj.weight
    assert weight.isnan().all()
    assert weight.untyped_storage().nbytes() == weight.element_size()
    with onload(block):
        assert not weight.isnan().any()
        assert llama.model.layers[0].mlp.up_proj.weight.isnan().all()
    assert weight.isnan().all()
    for small in (llama.model.norm, llama.model.kinds):
        assert not small.weight.isnan().any(), "what is small stays"
    parts.close()


def test_a_block_that_fails_goes_away_as_it_was(llama, batch, tmp_path):
    parts = offloaded(llama, "disk", tmp_path)
    calls = []

    def score(weight, statistics):
        calls.append(1)
        return weight.abs() if len(calls) < 10 else weight * torch.nan

    broken = gblm.masked("broken", {"input_sq"}, score)
    with pytest.raises(gblm.GblmError, match=r"layers\.1.*NaN"):
        gblm.prune(llama, batch, broken, "0.5")
    assert all(unit.depth == 0 for unit in parts.units)
    assert {file.stem for file in parts.store.changed.values()} == {"model.layers.0"}
    parts.close()


def test_a_damaged_file_is_named(llama, batch, tmp_path):
    offloaded(llama, "disk", tmp_path)
    file = tmp_path / "dense.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(gblm.GblmError, match=r"dense\.safetensors cannot be read.*; fetch"):
        gblm.prune(llama, batch, methods.wanda(), "0.5", adapter=find_adapter(llama))


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("closed", [True, False])
def test_a_model_that_nobody_holds_is_freed(make_llama, batch, kind, closed, tmp_path):
    gc.collect()
    before = dict(UNITS)
    model = make_llama()
    parts = offloaded(model, kind, tmp_path)
    with torch.no_grad():
        model(**batch)
    gblm.prune(model, batch, methods.wanda(), "0.5")
    if closed:
        parts.close()
    held = weakref.ref(model), weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    del model, parts
    gc.collect()
    assert [one() for one in held] == [None, None]
    assert dict(UNITS) == before


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_a_model_is_left_to_itself_after_the_end(llama, kind, tmp_path):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in llama.modules()]
    parts = offloaded(llama, kind, tmp_path)
    assert offload_of(llama) is parts
    parts.close()
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in llama.modules()]
    assert offload_of(llama) is None
    with onload(llama.model.layers[0]):
        assert llama.model.layers[0].mlp.up_proj.weight.isnan().all()
    again = Offload(llama, adapter(llama).blocks(llama), parts.store, torch.device("cpu"))
    with onload(llama.model.layers[0]):
        assert not llama.model.layers[0].mlp.up_proj.weight.isnan().any()
    again.close()


def test_auto_keeps_weights_as_near_as_they_fit(monkeypatch):
    free = {"cpu": 1000, "cuda": 100}
    monkeypatch.setattr(offload, "free_memory", lambda device: free[device.type])
    found = {
        (size, device): offload.find_offload("auto", size, torch.device(device))
        for size in (40, 400, 4000)
        for device in free
    }
    assert found == {
        (40, "cpu"): "none",
        (400, "cpu"): "none",
        (4000, "cpu"): "disk",
        (40, "cuda"): "none",
        (400, "cuda"): "cpu",
        (4000, "cuda"): "disk",
    }


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize(
    "pattern",
    ["neurons:0.25+2:4", "neurons:0.25/uneven+heads:0.5/uneven", "blocks:0.34+neurons:0.25"],
)
def test_offloaded_models_become_as_small(make_llama, batch, kind, pattern, tmp_path):
    plain, other = make_llama(), make_llama()
    parts = offloaded(other, kind, tmp_path)
    reports = [
        gblm.prune(model, batch, methods.make("best"), pattern, backward="blocks")
        for model in (plain, other)
    ]
    assert reports[0].left == reports[1].left < reports[0].parameters
    wanted = plain.state_dict()
    held = [name for unit in parts.units for name in unit.parameters if name in wanted]
    assert {name for name in wanted if ".layers." in name} <= {*held}
    with parts.home():
        assert all(torch.equal(other.get_parameter(name), wanted[name]) for name in held)
    with torch.no_grad():
        assert torch.equal(other(**batch).logits, plain(**batch).logits)
    if "blocks" not in pattern:  # those that stay share their weights with the shorter model
        masks = reports[0].masks()
        assert all(torch.equal(own, masks[name]) for name, own in reports[1].masks().items())
    parts.close()


@pytest.mark.parametrize("pattern", ["neurons:0.25", "blocks:0.34", "mlps:0.34"])
def test_an_offloaded_model_gets_back_what_it_had(llama, batch, pattern, tmp_path):
    with torch.no_grad():
        dense = llama(**batch).logits
    parts = offloaded(llama, "disk", tmp_path)
    pruning = Pruning(Walk.of(llama, batch), methods.make("wanda"), patterns.parse(pattern))
    pruning.run()
    with torch.no_grad():
        assert not torch.equal(llama(**batch).logits, dense)
    pruning.rebuilt.undo()
    parts.revert()
    with torch.no_grad():
        assert torch.equal(llama(**batch).logits, dense)
    parts.close()
