"""Laws of stored gradients: they are taken for the very model they are of, and for no other."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from gblm.llm.__main__ import main as prune_llm
from gblm.vit.__main__ import main as prune_vit

MAIN = {"llm": prune_llm, "vit": prune_vit}

# Tensors outside of the blocks, all of which the gradients of the blocks depend on.
OUTSIDE = {
    "llm": ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"],
    "vit": ["head.weight", "head.bias", "patch_embed.proj.weight", "pos_embed", "norm.weight"],
}
CASES = [(side, name) for side, names in OUTSIDE.items() for name in names]


def other_model(folder: Path, name: str, place: Path) -> Path:
    """Return the folder of a model that differs in one tensor."""
    shutil.copytree(folder, place)
    file = place / "model.safetensors"
    tensors = load_file(file)
    tensors[name] += 0.01
    save_file(tensors, file, metadata={"format": "pt"})
    return place


@pytest.fixture(params=MAIN)
def side(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def flags(llm: list[str], vit: list[str]) -> dict[str, list[str]]:
    """The arguments of the commands, which evaluate nothing."""
    found = {}
    for given in (llm, vit):
        first = given[1 : given.index("--evaluate")]
        rest = given[given.index("--evaluate") + 2 :]
        if "--windows" in rest:
            del rest[rest.index("--windows") : rest.index("--windows") + 2]
        found[given[0]] = [*first, *rest, "--method", "gblm", "--sparsity", "0.5"]
    return found


@pytest.fixture(scope="module")
def gradients(flags, tmp_path_factory) -> dict[str, Path]:
    """The folders of the gradients of both models."""
    found = {}
    for side, given in flags.items():
        work = tmp_path_factory.mktemp(side) / "work"
        assert MAIN[side]([*given, "--work-dir", str(work)]) == 0
        found[side] = work / "gradients"
    return found


def test_gradients_of_the_same_model_are_taken_from_anywhere(side, flags, gradients, tmp_path):
    given = list(flags[side])
    at = given.index("--model") + 1
    shutil.copytree(given[at], tmp_path / "moved")
    given[at] = str(tmp_path / "moved")
    assert MAIN[side]([*given, "--gradients", str(gradients[side])]) == 0


@pytest.mark.parametrize(("side", "name"), CASES)
def test_gradients_of_another_model_are_refused(side, name, flags, gradients, tmp_path, capsys):
    given = list(flags[side])
    at = given.index("--model") + 1
    given[at] = str(other_model(Path(given[at]), name, tmp_path / "other"))
    assert MAIN[side]([*given, "--gradients", str(gradients[side])]) == 2
    assert "another model" in capsys.readouterr().err


@pytest.mark.parametrize("name", OUTSIDE["llm"])
def test_a_run_with_another_model_is_not_resumed(name, flags, tmp_path, capsys):
    given = [*flags["llm"], "--work-dir", str(tmp_path / "work")]
    assert prune_llm(given) == 0
    at = given.index("--model") + 1
    given[at] = str(other_model(Path(given[at]), name, tmp_path / "other"))
    assert prune_llm([*given, "--resume"]) == 2
    assert "another model" in capsys.readouterr().err
