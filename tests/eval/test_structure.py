"""The comparison of structured pruning: SliceGPT's formula, and the table."""

import sys

import structure
import torch


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def test_slicing_projects_the_stream_and_gives_the_model_back(llama, batch):
    dense = logits(llama, batch)
    shares = (0.05, 0.3, 0.6)
    errors = []
    for share in shares:
        with structure.sliced(llama, batch, share) as removed:
            assert share <= removed < share + 0.1
            errors.append(float((logits(llama, batch) - dense).norm()))
        assert torch.equal(logits(llama, batch), dense)
    assert errors == sorted(errors)


def test_a_stream_of_few_components_is_sliced_without_loss(llama, batch):
    llama.double()
    basis = torch.linalg.qr(torch.randn(32, 8, dtype=torch.float64)).Q
    project = basis @ basis.T
    with torch.no_grad():
        llama.model.embed_tokens.weight.copy_(llama.model.embed_tokens.weight @ project)
        for layer in llama.model.layers:
            for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
                last.weight.copy_(project @ last.weight)
    dense = logits(llama, batch)
    with structure.sliced(llama, batch, 0.3):
        torch.testing.assert_close(logits(llama, batch), dense)


def test_the_table_has_a_row_for_each(llm, tmp_path, monkeypatch, capsys):
    given = dict(zip(llm[1::2], llm[2::2], strict=True))
    page = tmp_path / "page.md"
    argv = ["eval/structure.py", "llm", "--model", given["--model"], "--length", "16"]
    argv += ["--calibration", given["--calibration"], "--evaluate", given["--evaluate"]]
    argv += ["--samples", "8", "--windows", "4", "--share", "0.5", "--speed", "--write", str(page)]
    argv += ["--patterns", "neurons:0.25,neurons:0.25/uneven", "--methods", "wanda,best"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(structure, "SECONDS", 0.01)
    structure.main()
    rows = [line for line in page.read_text().split("\n") if line.startswith("| ")]
    assert len(rows) == 2 + 1 + 2 + 4 + 4
    assert "| gblm best, `neurons:0.25/uneven` |" in page.read_text()
    assert "time of 128 tokens" in rows[0]


def test_taylor_is_the_sum_of_weights_times_gradients(llama, batch):
    from gblm.walk.units import find_units
    from gblm.walk.walk import Walk

    units = find_units(Walk.of(llama, batch))["model.layers.0"][1:]
    (found,) = structure.taylor(llama, batch, units)
    llama.requires_grad_()
    llama(**batch, labels=batch["input_ids"]).loss.backward()
    mlp = llama.model.layers[0].mlp
    products = [own.weight * own.weight.grad for own in (mlp.down_proj, mlp.gate_proj, mlp.up_proj)]
    wanted = products[0].abs().sum(0) + products[1].abs().sum(1) + products[2].abs().sum(1)
    torch.testing.assert_close(found, wanted.detach())
