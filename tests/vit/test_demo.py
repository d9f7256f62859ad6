"""The packaged demo: small, good at digits it has not seen, and pruned by no argument at all."""

import pytest

from gblm import METHODS
from gblm.vit import demo
from gblm.vit.__main__ import main
from gblm.vit.data import evaluation, open_images
from gblm.vit.evaluate import evaluate
from gblm.vit.models import load


def test_the_packaged_weights_are_small():
    assert sum(file.stat().st_size for file in demo.FOLDER.glob("*.safetensors")) <= 1e6


def test_a_third_of_the_digits_is_held_out():
    splits = [demo.digits(split)[0].flatten(1).tolist() for split in ("calibration", "evaluation")]
    assert [len(pictures) for pictures in splits] == [1195, 602]
    calibration, held_out = ({tuple(picture) for picture in pictures} for pictures in splits)
    assert not calibration & held_out


def test_the_dense_model_is_right_on_97_of_100():
    model = load(str(demo.FOLDER))
    assert evaluate(model, evaluation(open_images("demo", model, "evaluation")))["top1"] >= 97


@pytest.mark.slow
def test_demo_prunes_its_own_model_by_all_methods(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    table = capsys.readouterr().out
    for method in METHODS:
        assert sum(f"\u2502 {method}" in line for line in table.splitlines()) >= 3
