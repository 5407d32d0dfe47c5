"""pytest tests/test_checkpoints.py: files are read bit for bit or refused; no code in them runs."""

import itertools
import json
import os
import shutil

import pytest
import torch
from huggingface_hub import load_torch_model
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

import checkpoints
from checkpoints import (List, checkpoint_steps, list_, load_training, open_file, saved_steps,
                         write_file)
from launch import Saver
from model import ModelConfig, hf_config, hf_name


@pytest.fixture
def save(tmp_path):
    return Saver(tmp_path)


def test_pythias_schedule_has_154_steps_and_others_are_scaled():
    steps = checkpoint_steps(143000)
    assert len(steps) == 154 and steps[:12] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]
    assert steps[12:] == list(range(2000, 143001, 1000))
    assert checkpoint_steps(20, every=6) == [0, 1, 2, 4, 6, 8, 12, 16, 18, 20]


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_transformers_reads_a_checkpoint_as_it_lies(tmp_path, tokenizer_path, gelu):
    save = Saver(tmp_path, ModelConfig(2, 32, 2, vocab_size=50304, seq_length=32, gelu=gelu))
    with torch.no_grad():
        for parameter in save.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)  # where the two GELUs differ
    save(0, tokenizer=tokenizer_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="step0")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "step0")
    tokens = torch.tensor([tokenizer("Hello world\n\n  foo   bar")["input_ids"]])
    assert tokens.tolist() == [[12092, 1533, 535, 50276, 12110, 50275, 2009]]
    assert tokenizer.decode(tokenizer("Hello , world").input_ids) == "Hello , world"
    assert (tokenizer.pad_token_id, theirs.generation_config.pad_token_id) == (1, 1)
    torch.testing.assert_close(save.model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 50_000])
def test_huggingface_hub_loads_a_checkpoint_as_it_lies(tmp_path, save, monkeypatch, shard_bytes):
    """By the index, or as the only *.safetensors of the folder, since moments have their own."""
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", shard_bytes)
    save(2)
    theirs = GPTNeoXForCausalLM(GPTNeoXConfig(**hf_config(save.model.config)))
    theirs.embed_out = theirs.lm_head  # its name in files and up to transformers 4
    del theirs.lm_head
    load_torch_model(theirs, tmp_path / "step2", strict=True)
    for name, parameter in save.model.named_parameters():
        assert torch.equal(theirs.get_parameter(hf_name(name)), parameter), name


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer/moments.safetensors",
                                  "training.json"])
def test_a_flipped_bit_is_found_before_anything_is_resumed_from(tmp_path, save, file):
    save(2)
    (tmp_path / "step2/notes.txt").write_text("mine")
    assert load_training(tmp_path, 2, save.model, save.optimizer)["updates"] == 1
    data = bytearray((tmp_path / "step2" / file).read_bytes())
    data[-5] ^= 1  # of training.json: a space
    (tmp_path / "step2" / file).write_bytes(data)
    assert saved_steps(tmp_path, state=True) == [2]  # by its size it is whole
    with pytest.raises(ValueError, match=f"{file}: (its SHA-256 is not the mani|not JSON)"):
        load_training(tmp_path, 2, save.model, save.optimizer)


def test_training_json_that_is_a_pipe_is_named_and_not_read(tmp_path, save, capsys):
    save(2)
    (tmp_path / "step2/training.json").unlink()
    os.mkfifo(tmp_path / "step2/training.json")
    with pytest.raises(ValueError, match="training.json: not a regular file"):
        load_training(tmp_path, 2, save.model, save.optimizer)
    list_(List(str(tmp_path)))
    assert "NOT WHOLE" in capsys.readouterr().out.splitlines()[1]


def test_a_checkpoint_without_moments_gives_way_and_nothing_of_it_is_lost(tmp_path, save):
    save(2)
    for notes, there in ((None, {"step2"}), ("mine", {"step2", "step2.broken"})):
        shutil.rmtree(tmp_path / "step2/optimizer")
        if notes:
            (tmp_path / "step2/notes.txt").write_text(notes)
        save(2)
        assert saved_steps(tmp_path, state=True) == [2]
        assert load_training(tmp_path, 2, save.model, save.optimizer) == {
            "step": 2, "scheduled": True, "updates": 1, "tokens": 128, "scaler": {}}
        assert set(os.listdir(tmp_path)) == there
    assert (tmp_path / "step2.broken/notes.txt").exists()


def test_a_flipped_bit_does_not_outlive_the_weights_that_are_computed_anew(tmp_path, save):
    save(2)
    path = tmp_path / "step2/model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    shutil.rmtree(tmp_path / "step2/optimizer")
    save(2)
    assert path.read_bytes() == whole


# ---------------------------------------------------------------------------- tensor files


TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.full((5,), 0.1, dtype=torch.float16),
           "scalar": torch.tensor(3, dtype=torch.int64), "empty": torch.zeros(0, 7),
           "c": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).bfloat16()}


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def refused(path):
    """Return the one line with which a file is refused; it names the file."""
    with pytest.raises(ValueError) as error:
        open_file(path)
    line = str(error.value)
    assert str(path) in line and "\n" not in line and len(line) < 500
    return line


def test_safetensors_of_every_dtype_are_read_and_written(tmp_path):
    tensors = TENSORS | {str(dtype): torch.ones(3).to(dtype) for dtype in (
        torch.float64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)}
    write_file(tmp_path / "x", tensors)
    assert same(load_file(tmp_path / "x"), tensors)
    assert same(open_file(tmp_path / "x"), tensors)


def entry(dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [0, 8]}


@pytest.mark.parametrize("header, data", [
    (b"[1]", b""), ({"a": entry("F31")}, bytes(8)), ({"a": entry(shape=(1 << 60,))}, bytes(8)),
    ({"a": entry(), "b": entry()}, bytes(8)), ({"a": entry()}, bytes(9)),
    ({"a\n\x1b[31mb": entry()}, bytes(8)), (b'{"a":' * 5000 + b"1" + b"}" * 5000, b"")])
def test_a_file_that_lies_is_named(tmp_path, header, data):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert "not a complete file of plain tensors" in refused(tmp_path / "x")


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(tmp_path / "pipe")
    assert "no such file" in refused(tmp_path / "none")


class Run(str):
    """A path; unpickling it runs a command."""

    def __reduce__(self):
        return os.system, (f"touch {self}",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    run, path = Run(tmp_path / "ran"), tmp_path / "x.bin"
    for value, zipped in itertools.product((run, {"a": torch.ones(2), "b": [run]}), (True, False)):
        torch.save(value, path, _use_new_zipfile_serialization=zipped)
        assert "not a complete file of plain tensors" in refused(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value, words", [
    ([torch.ones(2)], "'list' object"), ({"a": 3}, "'int' object"),
    ({"a": torch.ones(1).expand(1 << 40)}, "'a' is not a plain tensor")])
def test_what_is_no_state_dict_is_named(tmp_path, value, words):
    torch.save(value, tmp_path / "x.bin")
    assert words in refused(tmp_path / "x.bin")


@settings(max_examples=200, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
       cut=st.integers(0, 10**6) | st.none(), pickled=st.booleans())
def test_random_corruption_is_an_error_or_other_numbers(tmp_path_factory, edits, cut, pickled):
    """A damaged file is refused with a ValueError, or read as the tensors that it now describes."""
    path = tmp_path_factory.getbasetemp() / ("x.bin" if pickled else "x.safetensors")
    (torch.save if pickled else save_file)(TENSORS, path)
    data = bytearray(path.read_bytes())
    for position, value in edits:
        data[position % len(data)] = value
    path.write_bytes(data[:None if cut is None else cut % len(data)])
    try:
        tensors = open_file(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 500
        return
    for tensor in tensors.values():
        assert tensor.clone().shape == tensor.shape
