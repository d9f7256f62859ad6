"""The figures: one cell for each linear, readable whatever the page's colours are."""

import base64
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from gblm import METHODS, prune
from gblm.report import LinearReport, Mask, figures
from gblm.report.masks import picture, pictured, pictures


def titles(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)
    return [title.text.replace("\u00a0", " ") for title in root.iter(f"{figures.SVG}title")]


def test_heat_maps_have_a_cell_for_every_linear_and_block(make_report):
    report = make_report()
    for _, _, svg in figures.heat_maps(report):
        found = titles(svg)
        assert len(found) == 12 + 6
        assert found[0].startswith("layers.0.self_attn.q_proj: ")
    error = titles(figures.heat_maps(report)[0][2])
    assert error[0].endswith(": 1.0 %")
    whole = (0.01 * 32 * 32 + 0.011 * 32 * 96) / (32 * 32 + 32 * 96)
    assert error[12] == f"layers.0, 2 layers: {100 * whole:.1f} %"


def test_experts_share_a_row_and_missing_linears_leave_a_gap(make_report):
    report = make_report(blocks=2)
    report.linears += [
        LinearReport(f"layers.1.experts.{i}.w", [32, 32], 0.5, 0.2 * i, 0.1) for i in range(3)
    ]
    svg = figures.heat_maps(report)[0][2]
    assert "layers.1, 3 layers: 20.0 %" in titles(svg)
    assert "experts.*.w" in svg
    assert len(titles(svg)) == 4 + 1 + 2


def test_figures_take_their_ink_from_the_page(make_report):
    svg = figures.heat_maps(make_report())[0][2]
    assert "currentColor" in svg
    assert figures.INK not in svg
    assert "#000000" not in svg
    assert 'role="img"' in svg


def test_ids_of_two_figures_do_not_meet(make_report):
    report = make_report()
    report.linears[0].sparsity = 0.3
    one, two = (picture for _, _, picture in figures.heat_maps(report))

    def ids(svg: str) -> set[str]:
        return {element.get("id") for element in ElementTree.fromstring(svg).iter()} - {None}

    assert not ids(one) & ids(two)


def test_a_deep_model_fits(make_report):
    for blocks in (1, 32, 80):
        assert len(titles(figures.heat_maps(make_report(blocks=blocks))[0][2])) == 3 * blocks


def test_pictures_of_masks_are_the_kept_share():
    weight = torch.ones(128, 64)
    weight[:64] = 0
    grid = picture(weight).grid()
    assert grid.shape == (64, 64)
    assert np.array_equal(grid, np.repeat([[0.0], [1.0]], 32, axis=0).repeat(64, axis=1))
    weight = torch.zeros(200, 300)
    weight[::2] = 1
    assert np.abs(picture(weight).grid() - 0.5).max() < 0.2
    corner = picture(weight, corner=True).grid()
    assert np.array_equal(corner, (weight[:16, :16] != 0).numpy())
    small = picture(weight[:5, :7]).grid()
    assert small.shape == (5, 7)


def test_a_damaged_mask_is_refused():
    with pytest.raises(ValueError, match="cannot reshape"):
        Mask(2, 2, base64.b64encode(b"abc").decode()).grid()


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_masks_are_those_of_the_model(llama, batch, pattern: str):
    report = prune(llama, batch, METHODS["wanda"](), pattern)
    found = pictures(report, lambda name: llama.get_parameter(f"{name}.weight"))
    assert list(found) == pictured(report)
    worst = max(report.linears, key=lambda linear: linear.relative_error).name
    assert next(iter(found)) == worst
    weight = llama.get_parameter(f"{worst}.weight")
    cells = slice(16 if pattern == "2:4" else None)
    assert np.array_equal(found[worst].grid(), (weight != 0)[cells, cells].numpy())
    assert 0.4 < found[worst].grid().mean() < 0.6
    assert figures.mask(worst, found[worst], weight.shape).startswith("<svg")
    assert report.parameters == sum(own.numel() for own in llama.parameters())
    assert report.place(worst)[0] in report.blocks
