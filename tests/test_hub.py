"""pytest tests/test_hub.py

To the Hub and from it: export, uploads known to be bad, fetch.
"""

import http.server
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from hashlib import sha256

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints import checkpoint_steps, load_model, saved_steps
from conftest import ROOT
from test_huggingface import assert_equal, bits, legacy_buffers, published, weights
from checkpoints import Export, export, identify, Import, import_, known_bad
from checkpoints import sha256_of

# ---------------------------------------------------------------------------- export


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_export_goes_round_without_losing_a_bit(tmp_path, dtype, shard_size, tokenizer_path):
    expected = {name: tensor.to(getattr(torch, dtype))
                for name, tensor in weights(torch.float32).items()}
    source = published(tmp_path / "run/step8", weights(torch.float32))
    export(Export(str(source), str(tmp_path / "hf"), dtype, shard_size,
                  tokenizer=str(tokenizer_path)))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == getattr(torch, dtype)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, expected[name.replace("lm_head", "embed_out")]), name
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("Hello, I am")["input_ids"] == [
        12092, 13, 309, 717]
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) == (shard_size == "100KB")
    import_(Import(str(tmp_path / "hf"), str(tmp_path / "back")))
    assert_equal(load_file(tmp_path / "back/model.safetensors"), expected)
    assert (tmp_path / "back/tokenizer.json").read_bytes() == tokenizer_path.read_bytes()
    theirs.save_pretrained(tmp_path / "theirs")  # and round through theirs
    import_(Import(str(tmp_path / "theirs"), str(tmp_path / "again"), tokenizer=None))
    assert_equal(load_file(tmp_path / "again/model.safetensors"), expected)


def test_an_overflow_of_float16_is_named_and_leaves_nothing(tmp_path):
    tensors = weights(torch.float32)
    tensors["gpt_neox.layers.0.mlp.dense_h_to_4h.bias"][3] = 1e6
    source = published(tmp_path / "step8", tensors)
    with pytest.raises(ValueError,
                       match="layers.0.mlp.dense_h_to_4h.bias: 1e.06 overflows torch.float16"):
        export(Export(str(source), str(tmp_path / "out"), "float16", tokenizer=None))
    assert os.listdir(tmp_path) == ["step8"]


def test_room_is_asked_for_in_the_dtype_that_is_written(tmp_path, monkeypatch):
    source = published(tmp_path / "step8", weights(torch.float32))
    needed = sum(2 * tensor.numel() for tensor in weights().values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(needed))
    export(Export(str(source), str(tmp_path / "half"), "float16", tokenizer=None))
    with pytest.raises(ValueError, match=f"{2 * needed:,} bytes to write, {needed:,} free"):
        export(Export(str(source), str(tmp_path / "whole"), tokenizer=None))


def test_a_tokenizer_that_is_none_is_not_published(tmp_path):
    """A stranger's folder may have a link to any file."""
    source = published(tmp_path / "step8", weights())
    (tmp_path / "secret").write_text("private key")
    (tmp_path / "token").write_text('{"token": "secret"}')
    for target, words in (("secret", "not JSON"), ("token", "no added_tokens"),
                          ("/dev/zero", "not a regular file")):
        (source / "tokenizer.json").unlink(missing_ok=True)
        (source / "tokenizer.json").symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match=f"step8/tokenizer.json: .*{words}"):
            export(Export(str(source), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_the_upload_command_is_one_command(tmp_path, capsys):
    source = published(tmp_path / "a; touch x/step8", weights())
    export(Export(str(source), str(tmp_path / "o p"), tokenizer=None, push=True))
    assert shlex.split(capsys.readouterr().out.splitlines()[-1]) == [
        "hf", "upload", "a; touch x", str(tmp_path / "o p"), ".", "--revision=step8"]


def run_checkpoints(monkeypatch, *arguments):
    """Run checkpoints.py's command line here; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["checkpoints.py", *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / "checkpoints.py"), run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    published(tmp_path / "pythia-12b/step50000", weights())
    assert run_checkpoints(monkeypatch, "import", "pythia-12b/step50000", "runs/x/step7",
                           "--tokenizer=None") == 0
    assert "first shard is the final checkpoint's (#206)" in capsys.readouterr().err
    assert run_checkpoints(monkeypatch, "export", "runs/x/step7", "out", "--dtype=bfloat16",
                           "--push", "--tokenizer=None") == 0
    assert "hf upload x out . --revision=step7" in capsys.readouterr().out.splitlines()
    for wrong, words in ((("import", "nowhere", "b"), "nowhere: no such folder"),
                         (("import", ".", "b"), "no checkpoint; expected model.safetensors"),
                         (("import", "a"), "missing: --output"),
                         (("import", "a", "b", "c"), "expected source output"),
                         (("import", "runs/x/step7", "out"), "out: is there already"),
                         (("export", "runs/x/step7", "b", "--dtype=int8"),
                          "expected float32, float16 or"),
                         (("export", "runs/x/step7", "b", "--shard_size=5XB"), "expected bytes"),
                         (("export", "runs/x/step7", "b", "--tokenizer=none.json"),
                          "none.json: no such tokenizer; `make tokenizer` gets it, --tokenizer="),
                         (("export", "runs/x/step7", "b"), "20B_tokenizer.json: no such tokenizer"),
                         (("exprot",), "expected one of")):
        assert run_checkpoints(monkeypatch, *wrong) == 2, wrong
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and words in lines[0], wrong
    assert not (tmp_path / "b").exists()
    assert run_checkpoints(monkeypatch, "export", "--help") == 0
    said = capsys.readouterr().out
    assert "class Export(Import):" in said


# ---------------------------------------------------------------------------- known bad uploads


@pytest.mark.parametrize("name, step, issue", [
    ("pythia-2.8b", 0, "#205"), ("pythia-2.8b", 53000, "#205"), ("pythia-2.8b", 64000, "#205"),
    ("pythia-12b", 58000, "#206"), ("pythia-12b-deduped", 32000, "#108"),
    ("pythia-160m-weight-seed2", 512, "#203"),
    ("pythia-70m", 2, "#198"), ("neox-ckpt-pythia-6.9b-deduped-v1", 1000, "#195")])
def test_known_bad_uploads_warn(name, step, issue):
    assert any(issue in line for line in known_bad(name, step))


def test_good_uploads_do_not_warn():
    assert not any(known_bad(name, step) for name, step in (
        ("pythia-2.8b", 66000), ("pythia-2.8b", 143000), ("pythia-12b", 51000),
        ("pythia-160m", 512), ("pythia-12b-deduped", 33000), ("", None)))


def test_86_of_154_steps_of_the_2_8b_are_wrong():
    bad = [step for step in checkpoint_steps(143000)
           if any("#205" in line for line in known_bad("pythia-2.8b", step))]
    assert len(bad) == 85  # the 86th, step143000, is where these weights belong


def test_names_and_steps_are_found_in_paths():
    assert identify("/data/pythia-2.8b/step1000") == ("pythia-2.8b", 1000)
    assert identify("neox-ckpt-pythia-70m-deduped-v1/global_step143000")[1] == 143000
    assert identify("/somewhere/else") == ("", None)


# ---------------------------------------------------------------------------- the Hub


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks for one repository, from {revision: folder}, on this
    machine.
    """

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.split("?")[0]
        self.server.asked.append(path)
        if match := re.fullmatch(r"/api/models/EleutherAI/(pythia-\w+)/revision/(\w+)", path):
            folder = self.server.folders.get(match[2])
            if folder is None:
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            siblings = [{
                "rfilename": file.name, "size": file.stat().st_size, "blobId": "0" * 40, "lfs": {
                    "sha256": self.server.claimed.get(file.name) or sha256_of(file),
                    "size": file.stat().st_size, "pointerSize": 1}}
                for file in sorted(folder.iterdir())]
            commit = (folder.name.encode().hex() + "0" * 40)[:40]
            self.server.folders[commit] = folder
            return self.send(200, json.dumps({
                "_id": "1", "id": f"EleutherAI/{match[1]}", "sha": commit, "siblings": siblings,
                "private": False, "downloads": 0, "likes": 0, "tags": []}).encode(),
                {"Content-Type": "application/json"}, body)
        if match := re.fullmatch(r"/EleutherAI/pythia-\w+/resolve/(\w+)/([\w.-]+)", path):
            data = (self.server.folders[match[1]] / match[2]).read_bytes()
            return self.send(200, data, {"X-Repo-Commit": match[1],
                                         "ETag": sha256(data).hexdigest()}, body)
        self.send(404, b"{}", {}, body)

    def send(self, code, data, headers, body):
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


FETCH = """
import json, sys, config
import checkpoints
for arguments in json.loads(sys.argv[1]):
    try:
        config.command(["fetch", *arguments],
                       {"fetch": (checkpoints.Fetch, checkpoints.fetch, "name")})
    except SystemExit as end:
        print("exit", end.code, file=sys.stderr)
"""


def test_fetch_downloads_checks_and_goes_on(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folders, server.claimed, server.asked = {}, {}, []
    for step in (0, 512):
        folder = published(tmp_path / f"hub/step{step}", weights() | legacy_buffers())
        shutil.copy(folder / "model.safetensors", folder / "pytorch_model.bin")  # not wanted twice
        server.folders[f"step{step}"] = folder
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(*commands):
        environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                                    "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"),
                                    "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", FETCH, json.dumps(commands)], cwd=tmp_path,
                              env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    said = run(["pythia-70m", "--steps=0,512"], ["pythia-70m", "--steps=0,512"],
               ["pythia-70m", "--steps=7"])
    assert "warning: pythia-70m step 0: steps 0 and 1 are equal" in said
    assert saved_steps(tmp_path / "pythia-70m") == [0, 512]
    assert not (tmp_path / "pythia-70m/step0/pytorch_model.bin").exists()
    assert_equal(bits(load_model(tmp_path / "pythia-70m/step512")), weights())
    assert sum(path.endswith("/revision/step512") for path in server.asked) == 1  # not again
    assert re.search(r"EleutherAI/pythia-70m step7: .*\nexit 2\n$", said)
    server.claimed["model.safetensors"] = "0" * 64
    assert "its SHA-256 is not the Hub's" in run(["pythia-70m", "--steps=512", "--out_dir=other"])
    assert not (tmp_path / "other/step512/manifest.json").exists()
    server.shutdown()
