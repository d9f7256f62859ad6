"""Results of a model that an older transformers saved are loaded there, as the model is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gblm.llm.__main__ import main

OLDER = "transformers==4.57.*"
SAVE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
torch.manual_seed(0)
sizes = dict(vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
more = dict(num_attention_heads=4, max_position_embeddings=64, rope_theta=500000.0)
LlamaForCausalLM(LlamaConfig(**sizes, **more)).save_pretrained(sys.argv[2])
PreTrainedTokenizerFast(tokenizer_file=f"{sys.argv[1]}/tokenizer.json").save_pretrained(sys.argv[2])
"""
LOAD = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {"version": transformers.__version__}
for folder in sys.argv[1:]:
    ids = AutoTokenizer.from_pretrained(folder)("line 7", return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        found[folder] = [ids.tolist(), model(ids).logits.tolist(), model.config.rope_theta]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with an older transformers, and all else of this one."""
    place = tmp_path_factory.mktemp("older") / "venv"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    (site,) = place.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    python = place / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", OLDER]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"pip cannot install {OLDER}: {done.stderr[-600:]}")
    return python


@pytest.mark.slow
def test_an_older_transformers_loads_results_as_the_source(
    llm: list[str], older: Path, tmp_path: Path
):
    model, folders = llm[llm.index("--model") + 1], [str(tmp_path / "source")]
    subprocess.run([older, "-c", SAVE, model, *folders], check=True)
    for offload in ("none", "disk"):
        text = llm[llm.index("--calibration") + 1]
        given = ["--model", folders[0], "--calibration", text, "--device", "cpu"]
        more = ["--samples", "4", "--length", "16", "--method", "best", "--offload", offload]
        folders.append(str(tmp_path / offload))
        assert main([*given, *more, "--output", folders[-1]]) == 0
    done = subprocess.run([older, "-c", LOAD, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"].startswith("4.57.")
    for folder in folders:
        ids, logits, theta = found[folder]
        assert (ids, theta) == (found[folders[0]][0], 500000.0)
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(ids)).logits
        assert torch.allclose(torch.tensor(logits), expected, atol=1e-5)
