"""pytest tests/test_verify.py: defects of published uploads are planted in a real run and found."""

import copy
import json
import os
import resource
import shutil
import zipfile
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import (Import, import_, load_model, saved_steps, split, step_folders, write_file,
                         write_manifest)
from model import ModelConfig, Pythia, hf_config, hf_name
from test_data import write
from test_train import SHAPE, run_here
from verify import check_path, Scan

CONFIG = ModelConfig(**SHAPE | {"vocab_size": 384})
SETTINGS = dict(vocab_size=384, steps=128, checkpoint_every=16, batch_size=4, warmup=0.01)


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A run of tokens with something to learn."""
    folder = tmp_path_factory.mktemp("honest")
    write(folder / "tokens", [np.minimum(np.random.RandomState(0).geometric(0.02, 20_000), 383)])
    run_here(folder / "tokens", folder / "run", **SETTINGS)
    return folder / "run"


@pytest.fixture(scope="module")
def other_seed(honest):
    run_here(honest.parent / "tokens", honest.parent / "other", **SETTINGS, seed=5)
    return honest.parent / "other"


@pytest.fixture
def run(honest, tmp_path):
    shutil.copytree(honest, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def verify(command):
    """Return a function of a command line: {step: problems}, others under None, and all it said."""
    def verify(*arguments):
        done, found = command("verify.py", "verify", *arguments, expect=None), {}
        for line in done.stdout.splitlines():
            if line.startswith("step "):
                step, _, words = line.removeprefix("step ").partition(": ")
                found.setdefault(int(step), []).append(words)
            elif line.startswith("missing"):
                found[None] = [line]
        assert done.returncode == (1 if found else 0), done
        return found, done.stdout
    return verify


def test_an_honest_run_has_no_problems(honest, other_seed, verify):
    assert verify(other_seed)[0] == {}
    found, text = verify(honest)
    assert found == {} and "13 checkpoints up to step 128, 0 problems" in text
    # The table against the tensors themselves: means over matrices of sampled distances, cosines.
    line = next(line for line in text.splitlines() if line.split()[0] == "80").split()
    a, b, c = (load_file(honest / f"step{step}/model.safetensors") for step in (0, 64, 80))
    matrices = [name for name, tensor in c.items() if tensor.dim() == 2]
    distances = [float((c[name] - a[name]).norm() / a[name].norm()) for name in matrices]
    cosines = [float(torch.cosine_similarity(c[name].flatten(), b[name].flatten(), dim=0))
               for name in matrices]
    norm = float(sum(tensor.double().square().sum() for tensor in c.values()).sqrt())
    assert float(line[5]) == pytest.approx(norm, abs=6e-4)
    assert float(line[6]) == pytest.approx(np.mean(distances), rel=0.05)
    assert float(line[7]) == pytest.approx(np.mean(cosines), rel=0.01)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_honest_run_cast_to_half_has_no_problems(honest, tmp_path, verify, dtype):
    for step in saved_steps(honest):
        import_(Import(str(honest / f"step{step}"), str(tmp_path / f"run/step{step}"), dtype))
    found, text = verify(tmp_path / "run", "--steps=0,1,2,4,8,16,32,48,64,80,96,112,128")
    assert found == {}, text


# ---------------------------------------------------------------------------- planted defects


def put(sources, gone=(), seed="honest"):
    """Upload weights under other steps' names, {step: whose}, as it happened: the manifests fit."""
    def plant(run, other):
        folder = other if seed == "other" else run
        files = {step: (folder / f"step{source}/model.safetensors").read_bytes()
                 for step, source in sources.items()}
        for step, data in files.items():
            (run / f"step{step}/model.safetensors").write_bytes(data)
            write_manifest(run / f"step{step}")
        for step in gone:
            shutil.rmtree(run / f"step{step}")
    return plant


def change(folder, edit):
    """Change a checkpoint's tensors by edit(tensors); a manifest that is there fits again."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    if (folder / "manifest.json").exists():
        write_manifest(folder)


def copy_and_rename(run, other):
    shutil.rmtree(run / "step80")
    shutil.copytree(run / "step64", run / "step80")
    for before, after in (("step16", "aside"), ("step32", "step16"), ("aside", "step32")):
        os.rename(run / before, run / after)


def damage_the_first(run, other):
    os.truncate(run / "step0/model.safetensors", 1000)
    put({48: 128}, gone=[128])(run, other)


def use_another_model(config, run, other):
    if config.gelu == CONFIG.gelu:
        theirs = {hf_name(name): p.detach() for name, p in Pythia(config, 7).named_parameters()}
        change(run / "step64", lambda tensors: tensors.update(theirs))
    (run / "step64/config.json").write_text(json.dumps(hf_config(config)))
    write_manifest(run / "step64")


def use_a_shard_of_another_step(run, other):
    for _, folder in step_folders(run):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        files, notes = split("model", tensors, 90_000)
        for name, some in files.items():
            write_file(folder / name, some)
        [(name, index)] = notes.items()
        (folder / name).write_text(json.dumps(index))
        write_manifest(folder)
    first = min(files)
    shutil.copyfile(run / "step128" / first, run / "step48" / first)
    write_manifest(run / "step48")
    load_model(run / "step48")  # nothing else would notice


def flip_a_bit(file, run, other):
    data = bytearray((run / "step64" / file).read_bytes())
    data[-4] ^= 1
    (run / "step64" / file).write_bytes(data)


def set_value(value, run, other=None):
    name = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
    change(run / "step48", lambda tensors: tensors[name].view(-1).__setitem__(5, value))


@pytest.mark.parametrize("plant, expected", [
    (put({80: 64}), {80: "are equal to step 64's"}),
    (put({48: 64, 64: 48}), {48: "28 of 28 tensors (", 64: "off the path"}),
    *((put({step: step}, seed="other"), {step: ""}) for step in (64, 128)),
    (put({0: 0}, seed="other"), {0: "unrelated to the"}),
    (put({0: 0}, [1, 2, 4, 8], "other"), {0: "unrelated to the", None: "missing 4"}),
    *((put({step: 128}), {step: "", 128: f"equal to step {step}'s"}) for step in (0, 2, 16, 48)),
    (put({112: 128}), {128: "equal to step 112's"}),  # it does lie beside the last
    *((put({step: 128}, gone=[112, 128]), {step: ""}) for step in (2, 16)),
    (put({}, gone=[4, 96]), {None: "missing 2 scheduled checkpoints: 4, 96"}),
    (copy_and_rename, {step: f"was step{step} copied" for step in (16, 32, 80)}),
    (partial(use_another_model, replace(CONFIG, n_layers=3)), {64: "the others: {'n_layers': 3}"}),
    (partial(use_another_model, replace(CONFIG, d_model=64)), {64: "{'d_model': 64}"}),
    (partial(use_another_model, replace(CONFIG, gelu="erf")), {64: "{'gelu': 'erf'}"}),
    (damage_the_first, {0: "model.safetensors", 48: ""}),
    (use_a_shard_of_another_step, {48: "of model-00001-of-0000", 128: "equal to step 48's"}),
    (lambda run, _: os.truncate(run / "step64/model.safetensors", 1000),
     {64: "model.safetensors: its SHA-256 is not the manifest's"}),
    (lambda run, _: os.remove(run / "step64/model.safetensors"), {64: "no such file"}),
    *((partial(flip_a_bit, file), {64: f"{file}: its SHA-256 is not the manifest's"})
      for file in ("model.safetensors", "optimizer/moments.safetensors", "training.json")),
    *((partial(set_value, value), {48: "dense_h_to_4h.weight: 1 values are NaN or infinite"})
      for value in (float("nan"), float("inf")))])
def test_what_was_planted_is_found(run, other_seed, verify, plant, expected):
    plant(run, other_seed)
    found, text = verify(run)
    assert found.keys() == expected.keys(), text
    for step, words in expected.items():
        assert any(words in line for line in found[step]), text


@pytest.fixture(scope="module")
def scans(honest):
    return [Scan(step, folder) for step, folder in step_folders(honest)]


@pytest.mark.parametrize("cast", [torch.float32, torch.float16])
def test_neighbours_in_each_others_place(scans, cast):
    """Every two neighbours of the run, without its files; steps 0 and 1 are equal."""
    for i in range(1, len(scans) - 1):
        mixed = [copy.copy(here) for here in scans]
        for here in mixed:
            here.problems = []
            here.samples = {name: sample.to(cast).float() for name, sample in here.samples.items()}
        mixed[i].samples, mixed[i + 1].samples = mixed[i + 1].samples, mixed[i].samples
        check_path(mixed)
        found = {here.step: here.problems for here in mixed if here.problems}
        assert found and found.keys() <= {mixed[i].step, mixed[i + 1].step}, found


def test_the_steps_that_are_expected(run, verify):
    found, text = verify(*(run / f"step{step}" for step in (128, 0, 16)))  # by name
    assert found == {} and [int(line.split()[0]) for line in text.splitlines()[1:4]] == [0, 16, 128]
    shutil.rmtree(run / "step4")
    assert verify(run, "--steps=any")[0] == {} != verify(run)[0]
    for step in (0, 1, 2, 8, 16, 32, 112, 128):
        shutil.rmtree(run / f"step{step}")
    settings = {"steps": 128, "checkpoint_every": 16, "branch_from": "runs/parent/step32/"}
    (run / "config.json").write_text(json.dumps(settings))
    found, text = verify(run)  # a branch under way
    assert found == {} and "4 checkpoints up to step 96, 0 problems" in text
    shutil.rmtree(run / "step48")
    assert "missing 1 scheduled checkpoints: 48 (" in verify(run)[1]
    (run / "config.json").unlink()  # a download: Pythia's 154
    assert "missing 153 scheduled" in verify(run)[1]


def test_archives_that_are_damaged_or_none_are_named_and_do_not_swell(run, tmp_path, verify):
    folder = tmp_path / "pythia/step64"
    folder.mkdir(parents=True)
    shutil.copy(run / "step64/config.json", folder)
    torch.save(load_file(run / "step64/model.safetensors"), folder / "pytorch_model.bin")
    assert verify(folder)[0] == {}
    data = bytearray((folder / "pytorch_model.bin").read_bytes())
    data[len(data) // 2] ^= 129
    (folder / "damaged.bin").write_bytes(data)
    with (zipfile.ZipFile(folder / "bomb.bin", "w", zipfile.ZIP_BZIP2) as archive,
          archive.open("x/data.pkl", "w") as file):
        for _ in range(30):  # in pieces, or this process would have been as large before
            file.write(bytes(10 << 20))
    os.mkfifo(folder / "pipe.bin")
    (folder / "text.pt").write_text("no archive")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, text = verify(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB
    assert sorted(line.split(":")[0] for line in found[64]) == [
        "bomb.bin", "damaged.bin", "pipe.bin", "text.pt"]


def test_diff_measures(run, command):
    def diff(a, b, code):
        return command("verify.py", "diff", run / f"step{a}", run / f"step{b}", expect=code).stdout

    text = diff(64, 80, 1)
    a, b = (load_file(run / f"step{step}/model.safetensors")["embed_out.weight"].double()
            for step in (64, 80))
    [line] = [line for line in text.splitlines() if line.startswith("embed_out")]
    _, shape, *numbers = line.split()
    assert shape == "384x32" and "28 of 28 tensors differ" in text
    expected = ((a - b).abs().max(), (a - b).abs().mean(), (a - b).norm() / b.norm())
    assert list(map(float, numbers)) == pytest.approx(list(map(float, expected)), rel=1e-2)
    assert "\n0 of 28 tensors differ" in diff(0, 1, 0)  # the first update has learning rate 0
    (run / "step1/config.json").write_text(json.dumps(hf_config(replace(CONFIG, n_heads=4))))
    assert diff(0, 1, 1).splitlines()[0] == "config: n_heads is 2 and 4"


def test_list_tells_what_is_there(run, command):
    (run / "step16/optimizer/moments.safetensors").unlink()
    text = command("checkpoints.py", "list", run).stdout
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert len(lines) == 14 and "NOT WHOLE" in lines["16"]
    assert "optimizer, " in lines["64"] and lines["64"].split()[1] == "8,192"
    assert float(lines["64"].split()[2]) < float(lines["1"].split()[2])


def test_what_is_damaged_is_named_and_the_rest_is_checked(run, command, verify):
    (run / "step8/training.json").write_text('{"step": 8, "updates": {"a": 1}}')
    (run / "step16/training.json").write_text("[[[[")
    for step, text in ((32, '{"../../x": {"bytes": 1}, "a": 3}'), (48, "5 {"), (64, "{}")):
        (run / f"step{step}/manifest.json").write_text(text)
    (run / "step80/notes").symlink_to("/proc/self/mem")  # an error without a file name
    put({112: 128})(run, None)
    found, text = verify(run)
    assert found.keys() == {8, 16, 32, 48, 64, 80, 128}, text
    assert "notes: not readable (OSError: [Errno 5]" in found[80][0]
    assert "is not what a run saves at step 8" in text and "training.json: not JSON" in text
    assert "manifest.json: not JSON" in text
    assert "model.safetensors: not in the manifest" in found[64]
    text = command("checkpoints.py", "list", run).stdout
    assert text.count("NOT WHOLE") == 5 and "training.json: not JSON" in text


# ---------------------------------------------------------------------------- without a manifest


@pytest.fixture(scope="module", params=[torch.float32, torch.float16], ids=str)
def upload(request, honest, tmp_path_factory):
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
def edited(upload, tmp_path, verify):
    """Change a step's tensors by edit(tensors); return what verify says of the run."""
    def edited(step, edit):
        run = shutil.copytree(upload, tmp_path / "run")
        change(run / f"step{step}", edit)
        return verify(run, "--steps=any")
    return edited


def test_an_honest_upload_has_no_problems(edited, upload, verify):
    found, text = edited(16, lambda tensors: None)
    assert found == {} and "\n9 have no manifest: their files cannot be compared" in text, text
    for steps in ((0, 1, 4), (2, 16, 32, 64), (4, 16, 32, 64, 128)):
        found, text = verify(*(upload / f"step{step}" for step in steps))
        assert found == {}, text


def flip(name):
    """Flip the highest bit of an exponent: its value is then 10^5 or 10^38 times as large."""
    def edit(tensors):
        tensor = tensors[name]
        half = tensor.dtype == torch.float16
        tensor.view(torch.int16 if half else torch.int32)[5] ^= 1 << (14 if half else 30)
    return edit


def set_to(name, place, value):
    return lambda tensors: tensors[name].__setitem__(place, value)


@pytest.mark.parametrize("step", [2, 16, 128])
@pytest.mark.parametrize("edit, words", [
    (flip("gpt_neox.layers.1.mlp.dense_h_to_4h.bias"), "(gpt_neox.layers.1.mlp.dense_h_to_4h.bias"),
    (set_to("gpt_neox.final_layer_norm.weight", 3, 1e4), "(gpt_neox.final_layer_norm.weight"),
    (set_to("gpt_neox.embed_in.weight", (7, 3), 6e4), "(gpt_neox.embed_in.weight"),
    (set_to("embed_out.weight", slice(40, 60), 0), "embed_out.weight: 640 values side by side")])
def test_one_wrong_value_and_missing_rows(edited, step, edit, words):
    found, text = edited(step, edit)
    assert found.keys() == {step} and words in found[step][0], text


@pytest.mark.parametrize("part", ["bias", "norm"])
def test_vectors_of_a_later_step(edited, upload, part):
    """Of step 64 in step 16; of both, and of step 32 between them, none is where it belongs."""
    late = load_file(upload / "step64/model.safetensors")
    found, text = edited(16, lambda tensors: tensors.update(
        {name: tensor for name, tensor in late.items() if part in name}))
    assert found.keys() <= {16, 32, 64}
    assert any("equal to step 16's" in words for words in found[64]), text
