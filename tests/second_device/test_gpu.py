"""The script for a GPU goes through all its parts on the second device, with toy sizes."""

import runpy
import sys
from pathlib import Path

import pytest

EVAL = Path(__file__).parents[2] / "eval"
ROWS = {  # of the table of each part
    "kernels": [
        "input_gram [16, 16], 32 positions",
        *(f"gradient_sums [{rows}, 16], 2×16" for rows in (16, 32)),
        *(
            f"{name} [{rows}, 16]"
            for name in ("score_mask 2:4", "nm_keep 2:4", "row_keep 50 %")
            for rows in (16, 32)
        ),
    ],
    "7b": ["gblm", "wanda", "sparsegpt"],
    "offload": [],
    "zeros": [],
}


@pytest.mark.parametrize(
    "part", [x if x != "kernels" else pytest.param(x, marks=pytest.mark.slow) for x in ROWS]
)
def test_a_part_runs_to_its_end(part, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    flags = ["--part", part, "--device", "second", "--tiny", "--write", str(page)]
    monkeypatch.setattr(sys, "argv", ["eval/gpu.py", *flags])
    monkeypatch.syspath_prepend(str(EVAL))
    runpy.run_path(str(EVAL / "gpu.py"), run_name="__main__")
    text = page.read_text()
    assert "second, toy sizes; torch" in text
    assert "nan" not in text
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()]
    assert set(ROWS[part]) <= set(rows)
