"""pytest tests/test_verify.py

What went wrong in published uploads is planted in a run that was really trained, and found.
"""

import copy
import json
import os
import resource
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import (Import, checkpoint_steps, import_, load_model, load_training, save,
                         saved_steps, split, step_folders, write_file, write_manifest)
from model import ModelConfig, Pythia, hf_config, hf_name
from train import TrainConfig, learning_rate_at, make_optimizer
from verify import Scan, check_files, check_path, scan

CONFIG = ModelConfig(n_layers=2, d_model=32, n_heads=2, vocab_size=384, seq_length=32)
TRAIN = TrainConfig(data="", out_dir="", learning_rate=1e-2, steps=128, checkpoint_every=16)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(run, seed=1234):
    """Really train: 128 steps of tokens with something to learn, saved on Pythia's schedule."""
    model = Pythia(CONFIG, seed)
    optimizer = make_optimizer(model, TRAIN)
    rng = np.random.RandomState(0)
    for step in range(TRAIN.steps + 1):
        if step in checkpoint_steps(TRAIN.steps, TRAIN.checkpoint_every):
            save(run, step, model, optimizer, {"updates": step, "tokens": 128 * step, "scaler": {}})
        if step == TRAIN.steps:
            break
        tokens = torch.from_numpy(np.minimum(rng.geometric(0.02, (4, 33)), 383))
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, TRAIN)
        optimizer.step()
        optimizer.zero_grad()
    (run / "config.json").write_text('{"steps": 128, "checkpoint_every": 16}')


@pytest.fixture(scope="module")
def honest(tmp_path_factory, one_thread):
    run = tmp_path_factory.mktemp("honest")
    train(run)
    return run


@pytest.fixture(scope="module")
def other_seed(tmp_path_factory):
    run = tmp_path_factory.mktemp("seed")
    train(run, seed=5)
    return run


@pytest.fixture
def run(honest, tmp_path):
    shutil.copytree(honest, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def checkpoints(command):
    """Run the command line here; return (exit code, stdout, or stderr of a mistake)."""
    def run(*arguments):
        script = "verify.py" if arguments[0] in ("verify", "diff") else "checkpoints.py"
        code, out, error = command(script, *arguments)
        return code, error if code == 2 else out
    return run


@pytest.fixture
def verify(checkpoints):
    """Verify a run: (exit code, stdout)."""
    return lambda *arguments: checkpoints("verify", *arguments)


def put(source, target):
    """Upload one checkpoint's weights under another's name, as it happened: the manifest fits."""
    shutil.copyfile(source / "model.safetensors", target / "model.safetensors")
    write_manifest(target)


def problems(text):
    """Return {step: its problem lines}, and under None the others."""
    found = {}
    for line in text.splitlines():
        if line.startswith("step "):
            step, _, words = line.removeprefix("step ").partition(": ")
            found.setdefault(int(step), []).append(words)
        elif line.startswith("missing"):
            found.setdefault(None, []).append(line)
    return found


def test_an_honest_run_has_no_problems(run, checkpoints):
    code, text = checkpoints("verify", run)
    assert code == 0 and problems(text) == {}
    assert "13 checkpoints up to step 128, 0 problems" in text
    # The table against the tensors themselves: means over matrices of sampled distances, cosines.
    line = next(line for line in text.splitlines() if line.split()[0] == "80").split()
    first, second, third = (load_file(run / f"step{step}/model.safetensors")
                            for step in (0, 64, 80))
    distances, cosines = [], []
    for name, c in third.items():
        if c.dim() == 2:
            distances.append((c - first[name]).norm() / first[name].norm())
            cosines.append(torch.cosine_similarity(c.flatten(), second[name].flatten(), dim=0))
    assert float(line[6]) == pytest.approx(float(sum(distances) / len(distances)), rel=0.05)
    assert float(line[7]) == pytest.approx(float(sum(cosines) / len(cosines)), rel=0.01)
    whole = sum(tensor.double().square().sum() for tensor in third.values()).sqrt()
    assert float(line[5]) == pytest.approx(float(whole), abs=6e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_honest_run_cast_to_half_has_no_problems(honest, tmp_path, verify, dtype):
    for step in saved_steps(honest):
        import_(Import(str(honest / f"step{step}"), str(tmp_path / f"run/step{step}"), dtype,
                      tokenizer=None))
    code, text = verify(tmp_path / "run", "--steps=0,1,2,4,8,16,32,48,64,80,96,112,128")
    assert code == 0, text


@pytest.mark.parametrize("step", [0, 2, 16, 48, 112])
def test_final_weights_under_an_early_step(run, verify, step):
    put(run / "step128", run / f"step{step}")
    code, text = verify(run)
    assert code == 1
    assert any(f"equal to step {step}'s" in words for words in problems(text)[128])
    if step < 112:  # the last but one does lie beside the last
        assert problems(text)[step], text
    assert problems(text).keys() <= {128, step}
    if 0 < step < 48:  # they are found where the final step is not there, too
        for late in (112, 128):
            shutil.rmtree(run / f"step{late}")
        code, text = verify(run)
        assert code == 1 and problems(text).keys() == {step}, text


@pytest.mark.parametrize("seed, steps, expected", [
    ("honest", {80: 64}, {80: ["all 28 tensors are equal to step 64's"]}),
    ("honest", {80: 64, 64: 80}, {64: ["all 28 tensors are in the place of step 80's: the path is "
                                       "shorter with both exchanged"]}),
    ("other_seed", {64: 64}, {64: None}), ("other_seed", {128: 128}, {128: None})])
def test_weights_of_another_step_or_seed(request, run, verify, seed, steps, expected):
    for step, source in steps.items():
        put(request.getfixturevalue(seed) / f"step{source}", run / f"step{step}")
    code, text = verify(run)
    assert code == 1 and problems(text).keys() == expected.keys()
    assert all(words in (None, problems(text)[step]) for step, words in expected.items()), text


@pytest.fixture(scope="module")
def scans(honest):
    return [scan(step, folder) for step, folder in step_folders(honest)]


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


def test_a_copied_or_renamed_folder_is_of_another_step(run, verify):
    shutil.rmtree(run / "step80")
    shutil.copytree(run / "step64", run / "step80")
    os.rename(run / "step16", run / "aside")
    os.rename(run / "step32", run / "step16")
    os.rename(run / "aside", run / "step32")
    code, text = verify(run)
    for step, of in ((80, 64), (16, 32), (32, 16)):
        assert (f"training.json: is not what a run saves at step {step}; was step{step} copied"
                in " ".join(problems(text)[step]))
    model = Pythia(CONFIG)
    with pytest.raises(ValueError, match="step80/training.json: is not what a run saves"):
        load_training(run, 80, model, make_optimizer(model, TRAIN))


@pytest.mark.parametrize("config, words", [
    (ModelConfig(3, 32, 2, vocab_size=384, seq_length=32),
     "another model: n_layers is 3, the run's 2"),
    (ModelConfig(2, 64, 2, vocab_size=384, seq_length=32),
     "another model: d_model is 64, the run's 32"),
    (ModelConfig(2, 32, 2, vocab_size=384, seq_length=32, gelu="erf"),
     "another model: gelu is erf, the run's tanh")])
@pytest.mark.parametrize("step", [0, 64])
def test_a_checkpoint_of_another_model(run, verify, config, words, step):
    folder, model = run / f"step{step}", Pythia(config, seed=7)
    if config.gelu == CONFIG.gelu:
        save_file({hf_name(name): p.detach() for name, p in model.named_parameters()},
                  folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config(config)))
    write_manifest(folder)
    code, text = verify(run)
    assert code == 1 and problems(text) == {step: [words]}


def test_a_damaged_first_checkpoint_does_not_end_the_check(run, verify):
    os.truncate(run / "step0/model.safetensors", 1000)
    put(run / "step128", run / "step48")
    shutil.rmtree(run / "step128")
    code, text = verify(run)
    assert code == 1 and problems(text).keys() == {0, 48}


def reshard(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files, notes = split("model", tensors, 90_000)
    for name, some in files.items():
        write_file(folder / name, some)
    for name, note in notes.items():
        (folder / name).write_text(json.dumps(note))
    write_manifest(folder)


def test_one_shard_of_another_step(run, verify):
    for step in saved_steps(run):
        reshard(run / f"step{step}")
    files = sorted(path.name for path in (run / "step48").glob("model-*"))
    assert len(files) == 3
    shutil.copyfile(run / "step128" / files[0], run / "step48" / files[0])
    write_manifest(run / "step48")
    load_model(run / "step48")  # nothing else would notice
    code, text = verify(run)
    assert code == 1 and problems(text).keys() == {48, 128}
    assert f"of {files[0]}" in problems(text)[48][0] and "nearer to step 1" in problems(text)[48][0]
    assert "equal to step 48's" in problems(text)[128][0]


def test_a_seed_run_that_does_not_descend_from_its_step_0(run, other_seed, verify):
    assert verify(other_seed)[0] == 0
    put(other_seed / "step0", run / "step0")
    code, text = verify(run)
    assert code == 1 and any(
        "step 1 does not descend from it" in words for words in problems(text)[0])
    for step in (1, 2, 4, 8):
        shutil.rmtree(run / f"step{step}")
    code, text = verify(run, "--steps=any")
    assert code == 1 and any(
        "step 16 does not descend from it" in words for words in problems(text)[0])


@pytest.mark.parametrize("damage, words", [
    (lambda path: os.truncate(path, path.stat().st_size - 1000), "SHA-256 is not the manifest's"),
    (lambda path: path.unlink(), "model.safetensors: no such file")])
def test_a_half_written_file(run, checkpoints, verify, damage, words):
    damage(run / "step64/model.safetensors")
    code, text = verify(run)
    assert (code == 1 and problems(text).keys() == {64}
            and any(words in line for line in problems(text)[64]))
    assert 64 not in saved_steps(run) and "NOT WHOLE" in checkpoints("list", run)[1]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer/moments.safetensors",
                                  "training.json"])
def test_a_flipped_bit(run, verify, file):
    data = bytearray((run / "step64" / file).read_bytes())
    data[-4] ^= 1
    (run / "step64" / file).write_bytes(data)
    code, text = verify(run)
    assert code == 1 and f"{file}: its SHA-256 is not the manifest's" in problems(text)[64], text


def test_nan_and_infinity(run, verify):
    for step, value in ((32, float("nan")), (48, float("inf"))):
        tensors = load_file(run / f"step{step}/model.safetensors")
        tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"][3, 5] = value
        save_file(tensors, run / f"step{step}/model.safetensors", metadata={"format": "pt"})
        write_manifest(run / f"step{step}")
    code, text = verify(run)
    assert code == 1 and problems(text).keys() >= {32, 48}
    for step in (32, 48):
        assert ("gpt_neox.layers.1.mlp.dense_h_to_4h.weight: 1 values are NaN or infinite"
                in problems(text)[step])


def test_missing_steps_are_named(run, verify):
    shutil.rmtree(run / "step4")
    shutil.rmtree(run / "step96")
    code, text = verify(run)
    assert (code == 1
            and problems(text)[None][0].startswith("missing 2 scheduled checkpoints: 4, 96"))
    assert verify(run, "--steps=any")[0] == 0
    (run / "config.json").unlink()  # a download: Pythia's 154
    assert "missing 146 scheduled" in verify(run)[1]
    code, text = verify(*(run / f"step{step}" for step in (128, 0, 16)))  # by name
    assert code == 0 and [int(line.split()[0]) for line in text.splitlines()[1:4]] == [0, 16, 128]


def test_a_branch_and_a_run_under_way_have_what_is_due(run, verify):
    for step in (0, 1, 2, 4, 8, 16, 32, 112, 128):
        shutil.rmtree(run / f"step{step}")
    settings = {"steps": 128, "checkpoint_every": 16, "branch_from": "runs/parent/step32/"}
    (run / "config.json").write_text(json.dumps(settings))
    code, text = verify(run)
    assert code == 0 and "4 checkpoints up to step 96, 0 problems" in text
    shutil.rmtree(run / "step48")
    assert "missing 1 scheduled checkpoints: 48 (" in verify(run)[1]


def test_a_damaged_archive_of_pytorch(run, tmp_path, verify):
    folder = tmp_path / "pythia/step64"
    folder.mkdir(parents=True)
    shutil.copy(run / "step64/config.json", folder)
    torch.save(load_file(run / "step64/model.safetensors"), folder / "pytorch_model.bin")
    assert verify(folder)[0] == 0
    data = bytearray((folder / "pytorch_model.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "pytorch_model.bin").write_bytes(data)
    code, text = verify(folder)
    assert code == 1 and "pytorch_model.bin: ValueError: wrong checksum" in problems(text)[64][0]


def test_archives_that_are_none_are_named_and_neither_wait_nor_swell(tmp_path):
    with (zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_BZIP2) as archive,
          archive.open("x/data.pkl", "w") as file):
        for _ in range(30):
            file.write(bytes(10 << 20))
    os.mkfifo(tmp_path / "pipe.bin")
    (tmp_path / "text.pt").write_text("no archive")
    torch.save({"a": torch.ones(3)}, tmp_path / "flags.bin")
    data = bytearray((tmp_path / "flags.bin").read_bytes())
    for path, place in (("encrypted.bin", 8), ("version.bin", 6), ("method.bin", 10)):
        changed = bytearray(data)
        changed[data.index(b"PK\1\2") + place] ^= 129
        (tmp_path / path).write_bytes(changed)
    found = Scan(64, tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check_files(found)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB
    assert sorted(line.split(":")[0] for line in found.problems) == [
        "bomb.bin", "encrypted.bin", "method.bin", "pipe.bin", "text.pt", "version.bin"]
    assert "pipe.bin: not a regular file" in found.problems
    assert all("\n" not in line and str(tmp_path) not in line for line in found.problems)


def test_diff_measures(run, checkpoints):
    assert checkpoints("diff", run / "step64", run / "step64")[0] == 0
    code, text = checkpoints("diff", run / "step64", run / "step80")
    a, b = (load_file(run / f"step{step}/model.safetensors")["embed_out.weight"].double()
            for step in (64, 80))
    name, shape, *numbers = next(
        line for line in text.splitlines() if line.startswith("embed_out")).split()
    assert code == 1 and shape == "384x32" and "28 of 28 tensors differ" in text
    expected = ((a - b).abs().max(), (a - b).abs().mean(), (a - b).norm() / b.norm())
    assert [float(number) for number in numbers] == pytest.approx(
        [float(x) for x in expected], rel=1e-2)
    # The first update has learning rate 0.
    code, text = checkpoints("diff", run / "step0", run / "step1")
    assert code == 0 and "0 of 28 tensors differ" in text
    config = json.dumps(hf_config(replace(CONFIG, n_heads=4)))
    (run / "step1/config.json").write_text(config)
    code, text = checkpoints("diff", run / "step0", run / "step1")
    assert code == 1 and text.splitlines()[0] == "config: n_heads is 2 and 4"
    assert text.splitlines()[-1] == "0 of 28 tensors differ; configs differ: n_heads"
    tensors = load_file(run / "step64/model.safetensors")
    tensors["embed_out.weight"][0, 0] = float("nan")
    save_file(tensors, run / "step64/model.safetensors")
    code, text = checkpoints("diff", run / "step64", run / "step80")
    line = next(line for line in text.splitlines() if line.startswith("embed_out"))
    assert code == 1 and line.split()[2:] == ["nan", "nan", "nan"]


def test_list_tells_what_is_there(run, checkpoints):
    (run / "metrics.csv").write_bytes(
        b"step,tokens,loss\n0,0,5.95\n1,8,-\n2\n\xff\n64,8192,5.1234\n")
    (run / "step16/optimizer/moments.safetensors").unlink()
    code, text = checkpoints("list", run)
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert (code == 0 and lines["64"].split()[1:3] == ["8,192", "5.1234"]
            and "optimizer, manifest.json" in lines["64"])
    assert (lines["128"].split()[2] == "-" and "NOT WHOLE" in lines["16"]
            and "13 checkpoints" in text)


def test_damaged_notes_are_named_and_nothing_stops(run, checkpoints, verify):
    (run / "step16/training.json").write_text('{"step": 16, "updates": {"a": 1}}')
    (run / "step32/training.json").write_text("[[[[")
    (run / "step48/manifest.json").write_text('{"../../x": {"bytes": 1}, "a": 3}')
    (run / "step64/manifest.json").write_text("5 {")
    (run / "step80/manifest.json").write_text("{}")
    code, text = verify(run)
    assert (code == 1 and problems(text).keys() == {16, 32, 48, 64, 80}
            and "manifest.json: not JSON" in text and len(problems(text)[64]) == 1)
    assert "model.safetensors: not in the manifest" in problems(text)[80]
    assert "is not what a run saves at step 16" in text and "training.json: not JSON" in text
    code, text = checkpoints("list", run)
    assert code == 0 and text.count("NOT WHOLE") == 5 and "training.json: not JSON" in text
    for settings in ('{"steps": "many"}', '{"steps": 9999999, "checkpoint_every": 1}', "5"):
        (run / "config.json").write_text(settings)
        code, text = verify(run)
        assert code == 2 and "config.json" in text and len(text.splitlines()) == 1


def test_what_cannot_be_read_is_named_and_the_rest_is_checked(run, verify, checkpoints):
    """The first byte of a process's memory is an I/O error, as a bad sector of a disk is."""
    for step, file in ((16, "training.json"), (32, "config.json"), (48, "extra")):
        (run / f"step{step}" / file).unlink(missing_ok=True)
        (run / f"step{step}" / file).symlink_to("/proc/self/mem")
    for step, name in ((48, "extra"), (64, "é" * 5000), (80, "../step0/config.json")):
        manifest = run / f"step{step}/manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {name: {"bytes": 0}}))
    put(run / "step128", run / "step112")
    assert "13 checkpoints" in checkpoints("list", run)[1]
    code, text = verify(run)
    assert code == 1 and problems(text).keys() == {16, 32, 48, 64, 80, 128}, text
    assert "training.json: Input/output error" in problems(text)[16]
    assert problems(text)[48] == ["extra: Input/output error"]
    assert problems(text)[64] == [f"{'é' * 50}: File name too long"]
    assert problems(text)[80] == ["../step0/config.json: its SHA-256 is not the manifest's"]


def test_a_users_mistakes_are_one_line(tmp_path, checkpoints):
    for wrong, words in ((("verify",), "missing: --folders"),
                         (("verify", "nowhere"), "nowhere: neither a run"),
                         (("verify", tmp_path), "told apart"),
                         (("diff", "a"), "missing: --b"),
                         (("diff", "a", "b"), "a: no checkpoint"),
                         (("list", "nowhere"), "nowhere: no step0, step1, ... in it"),
                         (("list", "a", "b"), "b: cannot read this config")):
        code, text = checkpoints(*wrong)
        assert code == 2 and words in text and len(text.splitlines()) == 1, wrong


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


def test_honest_checkpoints_of_odd_steps_have_no_problems(upload, verify):
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


def set_to(name, place, value):
    return lambda tensors, _: tensors[name].__setitem__(place, value)


@pytest.mark.parametrize("step", [2, 16, 128])
@pytest.mark.parametrize("edit, words", [
    (flip("gpt_neox.layers.1.mlp.dense_h_to_4h.bias"), "(gpt_neox.layers.1.mlp.dense_h_to_4h.bias"),
    (set_to("gpt_neox.final_layer_norm.weight", 3, 1e4), "(gpt_neox.final_layer_norm.weight"),
    (set_to("gpt_neox.embed_in.weight", (7, 3), 6e4), "(gpt_neox.embed_in.weight"),
    (set_to("embed_out.weight", slice(40, 60), 0), "embed_out.weight: 640 values side by side")])
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
