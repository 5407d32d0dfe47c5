"""pytest tests/test_checkpoints.py"""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from huggingface_hub import load_torch_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

import checkpoints
from checkpoints import (Import, List, checkpoint_steps, import_, list_, load_training, save,
                         saved_steps)
from model import ModelConfig, Pythia, hf_config, hf_name
from train import TrainConfig, make_optimizer

CONFIG = ModelConfig(n_layers=2, d_model=32, n_heads=2, vocab_size=50304, seq_length=32)
TRAIN = TrainConfig(data="", out_dir="", learning_rate=1e-3)


@pytest.fixture
def trained():
    """A model and optimizer after two real updates."""
    model = Pythia(CONFIG)
    optimizer = make_optimizer(model, TRAIN)
    for seed in range(2):
        tokens = torch.randint(50277, (2, 33), generator=torch.Generator().manual_seed(seed))
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-3
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


STATE = {"updates": 2, "tokens": 128, "scaler": {}}


def test_pythias_schedule_has_154_steps_and_others_are_scaled():
    steps = checkpoint_steps(143000)
    assert len(steps) == 154 and steps[:12] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]
    assert steps[12:] == list(range(2000, 143001, 1000))
    assert checkpoint_steps(20, every=6) == [0, 1, 2, 4, 6, 8, 12, 16, 18, 20]


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_transformers_reads_a_checkpoint_as_it_lies(tmp_path, tokenizer_path, gelu):
    model = Pythia(replace(CONFIG, gelu=gelu))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)  # where the two GELUs differ
    save(tmp_path, 0, model, make_optimizer(model, TRAIN), STATE, tokenizer_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="step0")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "step0")
    tokens = torch.tensor([tokenizer("Hello world\n\n  foo   bar")["input_ids"]])
    assert tokens.tolist() == [[12092, 1533, 535, 50276, 12110, 50275, 2009]]
    assert tokenizer.decode(tokenizer("Hello , world").input_ids) == "Hello , world"
    assert (tokenizer.pad_token_id, theirs.generation_config.pad_token_id) == (1, 1)
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 5_000_000])
def test_huggingface_hub_loads_a_checkpoint_as_it_lies(tmp_path, trained, monkeypatch, shard_bytes):
    """From the index, or from the folder's only *.safetensors: the moments lie elsewhere."""
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", shard_bytes)
    model, optimizer = trained
    save(tmp_path, 2, model, optimizer, STATE)
    theirs = GPTNeoXForCausalLM(GPTNeoXConfig(**hf_config(CONFIG)))
    theirs.embed_out = theirs.lm_head  # its name in files and up to transformers 4
    del theirs.lm_head
    load_torch_model(theirs, tmp_path / "step2", strict=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(theirs.get_parameter(hf_name(name)), parameter), name


def test_an_export_says_how_it_was_trained(tmp_path, trained):
    (tmp_path / "mini").mkdir()
    save(tmp_path / "mini", 2, *trained, STATE)
    (tmp_path / "mini/config.json").write_text('{"learning_rate": 0.001, "out_dir": "secret"}')
    import_(Import(str(tmp_path / "mini/step2"), str(tmp_path / "out"), tokenizer=None))
    card = (tmp_path / "out/README.md").read_text()
    for row in ("# mini step2", "| hidden_size | 32 |", "| hidden_act | gelu_pytorch_tanh |",
                "| step | 2 |", "| tokens | 128 |", "| learning_rate | 0.001 |"):
        assert row in card.splitlines(), card
    assert "secret" not in card and saved_steps(tmp_path / "mini") == [2]


def test_litgpt_converts_a_checkpoint_as_it_lies(tmp_path):
    litgpt = pytest.importorskip("litgpt", reason="litgpt's conversion needs it installed")
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
    model = Pythia(ModelConfig(6, 128, 4, seq_length=512, gelu="erf"))  # litgpt computes erf
    optimizer = make_optimizer(model, TRAIN)
    tokens = torch.arange(64)[None]
    model(tokens, tokens).backward()
    optimizer.step()
    save(tmp_path, 1, model, optimizer, STATE | {"updates": 1})
    convert_hf_checkpoint(tmp_path / "step1", model_name="pythia-14m")
    theirs = litgpt.GPT(litgpt.Config.from_name("pythia-14m"))
    theirs.load_state_dict(torch.load(tmp_path / "step1/lit_model.pth"))
    torch.testing.assert_close(theirs(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_training_state_comes_back_bit_for_bit(tmp_path, trained):
    model, optimizer = trained
    save(tmp_path, 2, model, optimizer, STATE)
    again = Pythia(CONFIG, seed=5)
    optimizer_again = make_optimizer(again, TRAIN)
    assert load_training(tmp_path, 2, again, optimizer_again)["tokens"] == 128
    for parameter, other in zip(model.parameters(), again.parameters()):
        assert torch.equal(parameter, other)
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, optimizer_again.state[other][key]), key


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer/moments.safetensors",
                                  "training.json"])
def test_a_flipped_bit_is_found_before_anything_is_resumed_from(tmp_path, trained, file):
    model, optimizer = trained
    save(tmp_path, 2, model, optimizer, STATE)
    path = tmp_path / "step2" / file
    data = bytearray(path.read_bytes())
    data[-5] ^= 1  # of training.json: a space
    path.write_bytes(data)
    assert saved_steps(tmp_path, state=True) == [2]  # by its size it is whole
    with pytest.raises(ValueError, match=f"{file}: (damaged, its SHA|not JSON)"):
        load_training(tmp_path, 2, model, optimizer)


@pytest.mark.parametrize("notes, words", [
    (STATE | {"updates": "7"}, "is not what a run saves at step 2"),
    (STATE | {"scaler": 3}, "is not what a run saves"), (STATE | {"step": 1}, "was step2 copied"),
    ('{"step": ' + "9" * 5000, "not JSON .Exceeds the limit"),
    (" " * 17_000_000, "at most 16,777,216"), (os.mkfifo, "not a regular file"),
    (lambda path: path.symlink_to("/dev/zero"), "not a regular file")])
def test_training_json_that_no_run_has_saved(tmp_path, trained, capsys, notes, words):
    model, optimizer = trained
    save(tmp_path, 2, model, optimizer, STATE)
    path = tmp_path / "step2/training.json"
    path.unlink()
    if callable(notes):
        notes(path)
    else:
        path.write_text(notes if isinstance(notes, str) else json.dumps({"step": 2} | notes))
    with pytest.raises(ValueError, match=f"training.json: .*{words}"):
        load_training(tmp_path, 2, model, optimizer)
    list_(List(str(tmp_path)))  # one line says it
    line = capsys.readouterr().out.splitlines()[1]
    assert "NOT WHOLE" in line and words.replace(".", "(") in line and len(line) < 400


def test_an_unscheduled_checkpoint_gives_way_to_the_next(tmp_path, trained):
    model, optimizer = trained
    save(tmp_path, 2, model, optimizer, STATE)
    save(tmp_path, 3, model, optimizer, STATE, scheduled=False)
    assert saved_steps(tmp_path) == [2, 3]
    save(tmp_path, 4, model, optimizer, STATE)
    assert saved_steps(tmp_path) == [2, 4]


@pytest.mark.parametrize("manifest", [None, {}])
def test_what_the_new_checkpoint_does_not_have_stays(tmp_path, manifest):
    (tmp_path / "step1").mkdir()
    for name in ("model.safetensors", "training.json", "notes.txt"):
        (tmp_path / "step1" / name).write_text("{}")
    if manifest is not None:
        (tmp_path / "step1/manifest.json").write_text(json.dumps(
            {name: {"bytes": 2, "sha256": ""} for name in ("model.safetensors", "training.json")}))
    with checkpoints.writing(tmp_path / "step1") as new:
        shutil.copytree(tmp_path / "step1", new, dirs_exist_ok=True)
        (new / "notes.txt").unlink()
    assert (tmp_path / "step1.broken/notes.txt").exists()
