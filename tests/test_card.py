"""The model card of a result, and its way to the hub: here to a server that stands in for it."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import metadata_load

from gblm.llm.__main__ import main


class Hub(BaseHTTPRequestHandler):
    """Answers what an upload asks of the hub; keeps repositories and files by their names."""

    files: dict[str, bytes]
    known = True

    @property
    def place(self) -> str:
        return f"http://{self.headers['Host']}"

    def answer(self, value: object, code: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if not self.known:
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path.startswith("/api/whoami"):
            self.answer(
                {"name": "me", "type": "user", "orgs": [], "auth": {"type": "access_token"}}
            )
        else:
            self.answer({"id": "me/small", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            self.answer({"url": f"{self.place}/me/small", "name": "me/small"})
        elif "/preupload/" in self.path:
            asked = json.loads(data)["files"]
            own = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked
            ]
            self.answer({"files": own})
        elif "/commit/" in self.path:
            for line in data.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.files[entry["value"]["path"]] = content
            url = f"{self.place}/me/small/commit/{'0' * 40}"
            self.answer({"success": True, "commitUrl": url, "commitOid": "0" * 40})
        else:
            self.answer({})

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    own = type("Own", (Hub,), {"files": {}})
    server = HTTPServer(("127.0.0.1", 0), own)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", place)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    yield own
    server.shutdown()


def run(llm: list[str], output: Path, *more: str) -> int:
    flags = llm[1:]
    flags[flags.index("--windows")] = "--evaluate-windows"
    return main([*flags, "--method", "wanda", "--output", str(output), *more])


def test_a_card_says_where_a_result_comes_from_and_what_was_done(llm, tmp_path, capsys):
    source = Path(llm[llm.index("--model") + 1])
    readme = source / "README.md"
    readme.write_text("---\nlicense: apache-2.0\nlanguage: en\nbase_model: me/large\n---\nDense.\n")
    try:
        assert run(llm, tmp_path / "out") == 0
    finally:
        readme.unlink()
    found = metadata_load(tmp_path / "out" / "README.md")
    assert found["license"] == "apache-2.0"
    assert found["language"] == "en"
    assert found["base_model"] == "me/large"
    assert found["metrics"] == ["perplexity"]
    assert {"pruned", "gblm", "wanda"} <= set(found["tags"])
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# tiny, pruned" in text
    assert "method `wanda`, pattern `0.5`" in text
    assert "| notes.txt | perplexity |" in text
    assert "AutoModelForCausalLM.from_pretrained('FOLDER')" in text
    assert str(tmp_path) not in text
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    held = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report["file_bytes"] == held
    assert 0.2 < report["file_zeros"] < 0.3
    said = capsys.readouterr().out
    assert f"{report['file_zeros']:.1%} of them 0" in said
    assert "of all weights are 0" in said


def test_a_result_goes_to_the_hub_with_its_card(llm, tmp_path, hub):
    assert run(llm, tmp_path / "out", "--push-to-hub", "me/small") == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.files == written
    assert b"from_pretrained('me/small')" in hub.files["README.md"]


WRONG = {
    "no name": (["--push-to-hub", "small"], "is no repository; give OWNER/NAME"),
    "two runs": (["--push-to-hub", "me/small", "--sparsity", "0.5,2:4"], "the result of one run"),
    "not known": (["--push-to-hub", "me/small"], "the hub does not know you"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_go_to_the_hub_is_refused_before_work(case, llm, tmp_path, hub, capsys):
    flags, message = WRONG[case]
    hub.known = False
    assert run(llm, tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_broken_model_is_said_to_be_so(capsys):
    from gblm.command.show import broken

    assert broken({"metric": "perplexity", "dense": 10.0, "pruned": 21.0})
    assert not broken({"metric": "perplexity", "dense": 10.0, "pruned": 19.0})
    assert broken({"metric": "perplexity", "dense": 10.0, "pruned": float("nan")})
    assert broken({"metric": "top1", "dense": 90.0, "pruned": 44.0})
    assert not broken({"metric": "top1", "dense": 90.0, "pruned": 46.0})
