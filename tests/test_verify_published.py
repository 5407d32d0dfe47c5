"""pytest tests/test_verify_published.py

Broken weights as they are published, without manifests.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from test_verify import checkpoints, honest, one_thread, problems, verify


@pytest.fixture(scope="module", params=[torch.float32, torch.float16], ids=str)
def upload(request, honest, tmp_path_factory):  # noqa: F811
    """A run's weights and nothing else, at steps like Pythia's first."""
    run = tmp_path_factory.mktemp("upload")
    for step in (0, 1, 2, 4, 8, 16, 32, 64, 128):
        (run / f"step{step}").mkdir()
        shutil.copy(honest / f"step{step}/config.json", run / f"step{step}")
        tensors = load_file(honest / f"step{step}/model.safetensors")
        save_file({name: tensor.to(request.param) for name, tensor in tensors.items()},
                  run / f"step{step}/model.safetensors")
    return run


@pytest.fixture
def edited(upload, tmp_path, verify):  # noqa: F811
    """Change a step's tensors by edit(tensors, step 64's); return what verify says of the run."""
    def change(step, edit):
        run = shutil.copytree(upload, tmp_path / "run")
        path = run / f"step{step}/model.safetensors"
        tensors = load_file(path)
        edit(tensors, load_file(run / "step64/model.safetensors"))
        save_file(tensors, path)
        return verify(run, "--steps=any")
    return change


def test_an_honest_upload_has_no_problems(edited):
    code, text = edited(16, lambda tensors, late: None)
    assert code == 0 and "\n9 have no manifest: their files cannot be compared" in text, text


def test_honest_checkpoints_of_odd_steps_have_no_problems(upload, verify):  # noqa: F811
    for steps in ((0, 1, 4), (1, 16, 32, 64), (4, 16, 32, 64, 128)):
        code, text = verify(*(upload / f"step{step}" for step in steps))
        assert code == 0, text


def flip(name):
    """Flip the highest bit of an exponent: its value is then 10^5 or 10^38 times as large."""
    def edit(tensors, _):
        tensor = tensors[name]
        half = tensor.dtype == torch.float16
        tensor.view(torch.int16 if half else torch.int32)[5] ^= 1 << (14 if half else 30)
    return edit


def put(name, place, value):
    return lambda tensors, _: tensors[name].__setitem__(place, value)


@pytest.mark.parametrize("step", [2, 16, 128])
@pytest.mark.parametrize("edit, words", [
    (flip("gpt_neox.layers.1.mlp.dense_h_to_4h.bias"), "(gpt_neox.layers.1.mlp.dense_h_to_4h.bias"),
    (put("gpt_neox.final_layer_norm.weight", 3, 1e4), "(gpt_neox.final_layer_norm.weight"),
    (put("gpt_neox.embed_in.weight", (7, 3), 6e4), "(gpt_neox.embed_in.weight"),
    (put("embed_out.weight", slice(40, 60), 0), "embed_out.weight: 640 values side by side are 0")])
def test_one_wrong_value_and_missing_rows(edited, step, edit, words):
    code, text = edited(step, edit)
    assert code == 1 and problems(text).keys() == {step} and words in problems(text)[step][0], text


@pytest.mark.parametrize("part", ["bias", "norm"])
def test_vectors_of_a_later_step(edited, part):
    """Of step 64 in step 16; of both, and of step 32 between them, none is where it belongs."""
    code, text = edited(16, lambda tensors, late: tensors.update(
        {name: tensor for name, tensor in late.items() if part in name}))
    assert code == 1 and problems(text).keys() <= {16, 32, 64}
    assert any("equal to step 16's" in words for words in problems(text)[64]), text
