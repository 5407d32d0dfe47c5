"""pytest tests/test_huggingface.py

Published checkpoints of every form in, ours out, and the Hub.
"""

import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from checkpoints import (Import, checkpoint_steps, folder_tokenizer, identify, import_,
                         known_bad, load_model, load_training, merged, open_any, saved_steps,
                         sha256_of)
from conftest import ROOT
from model import ModelConfig, Pythia, parameter_shapes, read_config, warn_once

CONFIG = ModelConfig(n_layers=2, d_model=64, n_heads=4, vocab_size=256, seq_length=32, gelu="erf")


def weights(dtype=torch.float16, config=CONFIG):
    """Random weights of every published name, LayerNorms included."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(dtype)
            for name, shape in parameter_shapes(config).items()}


def legacy_buffers(config=CONFIG, dtype=torch.float16):
    """What files of 2023 carry besides the weights."""
    return {f"gpt_neox.layers.{i}.attention.{name}": tensor
            for i in range(config.n_layers) for name, tensor in {
        "bias": torch.ones(32, 32, dtype=torch.uint8).tril()[None, None],
        "masked_bias": torch.tensor(-1e9).to(dtype),
        "rotary_emb.inv_freq": torch.ones(config.rotary_dims // 2).to(dtype)}.items()}


# As transformers 4.24 wrote it for the 160m; the sizes are ours.
CONFIG_2022 = {
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0,
    "hidden_act": "gelu", "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 256,
    "layer_norm_eps": 1e-05, "max_position_embeddings": 32, "model_type": "gpt_neox",
    "num_attention_heads": 4, "num_hidden_layers": 2, "rotary_emb_base": 10000, "rotary_pct": 0.25,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.24.0",
    "use_cache": True, "use_parallel_residual": True, "vocab_size": 256}

def published(folder, tensors, form="model.safetensors", config=CONFIG_2022):
    """Write a checkpoint as it lies on disk after a download."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write = save_file if "safetensors" in form else torch.save
    if not form.endswith("shards"):
        write(tensors, folder / form)
        return folder
    stem, end = form.removesuffix(" shards").split(".")
    names, where = list(tensors), {}
    for i in range(3):
        file = f"{stem}-0000{i + 1}-of-00003.{end}"
        write({name: tensors[name] for name in names[i::3]}, folder / file)
        where |= {name: file for name in names[i::3]}
    (folder / f"{stem}.{end}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def bits(model):
    return {("" if name.startswith("embed_out") else "gpt_neox.") + name: p.detach()
            for name, p in model.named_parameters()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name].to(found[name].dtype)), name


FORMS = ["model.safetensors", "model.safetensors shards", "pytorch_model.bin",
         "pytorch_model.bin shards"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype, legacy", [(torch.float32, False), (torch.float16, True),
                                           (torch.bfloat16, True)])
def test_every_published_form_is_imported_bit_for_bit(tmp_path, form, dtype, legacy):
    expected = weights(dtype)
    source = published(tmp_path / "source", expected | (legacy_buffers() if legacy else {}), form)
    import_(Import(str(source), str(tmp_path / "step512"), tokenizer=None))
    stored = load_file(tmp_path / "step512/model.safetensors")
    assert_equal(stored, expected)
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    model = load_model(tmp_path / "step512")
    assert_equal(bits(model), expected)
    assert model.config == CONFIG
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "step512")
    assert theirs.dtype == dtype
    tokens = torch.arange(32)[None]
    torch.testing.assert_close(model(tokens), theirs.float()(tokens).logits,
                               rtol=1e-5, atol=1e-3)  # of ~60


def aged(**changes):
    return {name: value for name, value in (CONFIG_2022 | changes).items() if value != "absent"}


NEW_ROPE = {"rope_theta": 10000, "partial_rotary_factor": 0.25, "rope_type": "default"}


@pytest.mark.parametrize("changes", [
    {}, {"classifier_dropout": 0.1, "attention_dropout": 0.1, "hidden_dropout": 0.0},
    {"rope_scaling": None, "attention_bias": True, "rope_theta": 10000, "head_dim": 16,
     "partial_rotary_factor": 0.25},
    {"rotary_pct": "absent", "rotary_emb_base": "absent", "torch_dtype": "absent",
     "dtype": "float32", "rope_parameters": NEW_ROPE},
    {"rope_parameters": {"rope_theta": 10000.0, "type": "default"}, "is_decoder": False},
    {"hidden_act": "gelu_new"}, {"hidden_act": "gelu_fast"}])
def test_config_json_of_every_age_means_the_same_numbers(tmp_path, capsys, changes):
    folder = published(tmp_path, weights(), config=aged(**changes))
    theirs, tokens = AutoModelForCausalLM.from_pretrained(folder).float(), torch.arange(32)[None]
    torch.testing.assert_close(load_model(folder)(tokens), theirs(tokens).logits,
                               rtol=1e-5, atol=1e-3)  # of ~60
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "llama"}, "model_type is 'llama'"), ({"rotary_pct": 1.0}, "rotary_pct is 1.0"),
    ({"use_parallel_residual": False}, "use_parallel_residual is False"),
    ({"hidden_act": "relu"}, "hidden_act is 'relu'"), ({"is_causal": False}, "is_causal is False"),
    ({"hidden_size": "32"}, "hidden_size is '32', expected a positive integer"),
    ({"layer_norm_eps": None}, "layer_norm_eps is None"), ({"head_dim": 32}, "head_dim is 32"),
    ({"rotary_pct": "absent", "partial_rotary_factor": 1.0}, "partial_rotary_factor is 1.0"),
    ({"rope_theta": 500000}, "rope_theta is 500000"), ({"intermediate_size": 64}, "Pythia's 256"),
    ({"rope_parameters": {"type": "linear", "factor": 4.0, "rope_theta": 10000}},
     "rope_parameters: type is 'linear', expected Pythia's 'default'"),
    ({"rope_scaling": {"type": "default", "factor": 4.0}}, "rope_scaling: factor is 4.0"),
    ({"rope_parameters": {"full_attention": NEW_ROPE}}, "full_attention is .*expected no such"),
    ({"rope_parameters": [1]}, "rope_parameters is .1., expected Pythia's None"),
    ({"num_key_value_heads": 2}, "num_key_value_heads is 2, expected Pythia's 4"),
    ({"num_hidden_layers": 3}, "missing gpt_neox.layers.2"),
    ({"num_hidden_layers": 1}, "unexpected gpt_neox.layers.1"),
    ({"vocab_size": 512}, r"embed_in.weight is \(256, 64\), expected \(512, 64\)")])
def test_another_architecture_is_refused_not_loaded(tmp_path, changes, words):
    folder = published(tmp_path, weights(), config=aged(**changes))
    with pytest.raises(ValueError, match=words):
        load_model(folder)


def test_a_key_that_could_matter_is_named(tmp_path, capsys):
    warn_once.cache_clear()
    for step in range(2):
        read_config(published(tmp_path, weights(), config=aged(sliding_window=4, _name="x")))
    assert capsys.readouterr().err.count("'sliding_window'") == 1


def test_the_head_by_its_newer_name_and_weights_alone_of_any_form_begin_a_branch(tmp_path):
    expected = weights(torch.float32)
    renamed = {name.replace("embed_out", "lm_head"): tensor for name, tensor in expected.items()}
    for step, form in enumerate(FORMS):
        published(tmp_path / f"step{step}", renamed, form)
        model = Pythia(CONFIG)
        assert load_training(tmp_path, step, model, None) is None
        assert_equal(bits(model), expected)
    with pytest.raises(ValueError, match="n_heads is 4, the run's 8"):
        load_training(tmp_path, 0, Pythia(replace(CONFIG, n_heads=8)), None)


@pytest.mark.parametrize("form", FORMS)
def test_every_missing_extra_or_misshapen_tensor_is_named(tmp_path, form):
    tensors = weights()
    del tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.bias"], \
        tensors["gpt_neox.final_layer_norm.weight"]
    tensors |= {"gpt_neox.layers.2.attention.dense.bias": torch.ones(64),
                "embed_out.weight": torch.ones(250, 64)}
    with pytest.raises(ValueError) as error:
        import_(Import(str(published(tmp_path / "source", tensors, form)), str(tmp_path / "out")))
    for words in ("missing gpt_neox.layers.1.mlp.dense_h_to_4h.bias",
                  "missing gpt_neox.final_layer_norm.weight",
                  "unexpected gpt_neox.layers.2.attention.dense.bias",
                  "embed_out.weight is (250, 64), expected (256, 64)"):
        assert words in str(error.value)
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("dtype, form", [(torch.uint8, FORMS[0]), (torch.bool, FORMS[2]),
                                         (torch.float64, FORMS[0])])
def test_weights_that_are_no_floats_are_refused(tmp_path, dtype, form):
    tensors = weights()
    tensors["gpt_neox.embed_in.weight"] = tensors["gpt_neox.embed_in.weight"].to(dtype)
    with pytest.raises(ValueError, match=f"embed_in.weight is {dtype}, expected float32"):
        open_any(published(tmp_path / "source", tensors, form))


@pytest.mark.parametrize("edit", [
    lambda spec: spec.update(normalizer=None), lambda spec: spec.update(pre_tokenizer=[]),
    lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True),
    lambda spec: spec["model"]["merges"].reverse(), lambda spec: spec["added_tokens"].pop()])
def test_a_folders_own_tokenizer_is_the_20b_or_refused(tmp_path, tokenizer_path, edit):
    wide = replace(CONFIG, vocab_size=50304)
    folder = published(tmp_path / "x", weights(config=wide), config=CONFIG_2022 | {
        "vocab_size": 50304})
    assert folder_tokenizer(folder) == "20B_tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_path))
    tokenizer.save_pretrained(folder)  # in transformers' present form
    assert folder_tokenizer(folder) == folder / "tokenizer.json"
    spec = json.loads((folder / "tokenizer.json").read_text())
    edit(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="x/tokenizer.json: not the GPT-NeoX-20B tokenizer"):
        folder_tokenizer(folder)
    assert folder_tokenizer(folder, "named.json") == "named.json"
    small = published(tmp_path / "small", weights())
    with pytest.raises(ValueError, match="vocab_size is 256, but .* has 50,277 ids"):
        folder_tokenizer(small, "named.json")


def test_a_sharded_download_is_whole_once_every_shard_is_there(tmp_path):
    folder = published(tmp_path / "step1", weights(), "model.safetensors shards")
    assert saved_steps(tmp_path) == [1]
    shard = folder / "model-00002-of-00003.safetensors"
    os.rename(shard, tmp_path / "aside")
    assert saved_steps(tmp_path) == []
    with pytest.raises(ValueError, match="step1: 2 of 3 files model-"):
        open_any(folder)


# ---------------------------------------------------------------------------- gpt-neox


def neox_layers(tensors, ranks, config=CONFIG):
    """Return {(layer, rank): state dict} of weights split as Megatron splits them over
    tensor-parallel ranks.

    Biases of row-parallel layers are split into addends, norms are copied.
    """
    def part(name, tensor, rank):
        if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
            return tensor.chunk(ranks, 1)[rank].clone()
        if name.endswith(("attention.dense.bias", "dense_4h_to_h.bias")):
            return tensor / ranks  # exact: ranks is a power of two and no value is subnormal
        return tensor.clone() if "norm" in name else tensor.chunk(ranks, 0)[rank].clone()

    layers = {}
    for name, tensor in tensors.items():
        layer, short = {"gpt_neox.embed_in.weight": (0, "word_embeddings.weight"),
                        "gpt_neox.final_layer_norm.weight": (config.n_layers + 3, "norm.weight"),
                        "gpt_neox.final_layer_norm.bias": (config.n_layers + 3, "norm.bias"),
                        "embed_out.weight": (config.n_layers + 4, "final_linear.weight")
                        }.get(name, (None, None))
        if layer is None:
            number, short = name.removeprefix("gpt_neox.layers.").split(".", 1)
            layer = int(number) + 2
        for rank in range(ranks):
            layers.setdefault((layer, rank), {})[short] = part(name, tensor, rank)
    for layer in range(2, config.n_layers + 2):
        for rank in range(ranks):
            layers[layer, rank]["attention.rotary_emb.inv_freq"] = (
                torch.ones(config.rotary_dims // 2).half())
    return layers


def neox(folder, layers):
    folder.mkdir(parents=True)
    for (layer, rank), state in layers.items():
        torch.save(state, folder / f"layer_{layer:02}-model_{rank:02}-model_states.pt")
    return folder


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_neox_ranks_merge_to_the_same_bits(tmp_path, ranks, dtype):
    # Sums are exact.
    expected = {name: (tensor * 64).round() / 64 for name, tensor in weights(dtype).items()}
    source = neox(tmp_path / "global_step8", neox_layers(expected, ranks))
    # Optimizer and arguments: left alone.
    torch.save({"args": object}, source / "mp_rank_00_model_states.pt")
    import_(Import(str(source), str(tmp_path / "step8"), tokenizer=None))
    model = load_model(tmp_path / "step8")
    assert_equal(bits(model), expected)
    assert model.config == ModelConfig(2, 64, 4, vocab_size=256, gelu="tanh")


def test_neox_norms_are_averaged_and_row_biases_summed_in_their_dtype():
    parts = [torch.tensor([x]).half() for x in (0.1, 0.101, 0.102, 0.103)]
    total = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    for name, expected in (("layers.0.attention.dense.bias", total),
                           ("layers.0.mlp.dense_4h_to_h.bias", total),
                           ("layers.0.input_layernorm.weight", total / 4),
                           ("layers.0.post_attention_layernorm.bias", total / 4),
                           ("final_layer_norm.weight", total / 4)):
        assert torch.equal(merged(f"gpt_neox.{name}", parts), expected)


def drop(key, name=None):
    def edit(layers):
        layers.pop(key) if name is None else layers[key].pop(name)
    return edit


def put(key, name, tensor):
    return lambda layers: layers[key].update({name: tensor})


@pytest.mark.parametrize("edit, words", [
    (drop((3, 1)), "layer_03-model_01-model_states.pt: no such file"),
    (drop((6, 0)), "layer_06-model_00-model_states.pt: no such file"),
    (drop((2, 1), "attention.dense.bias"), "layer 2 have no attention.dense.bias that fits"),
    (put((2, 0), "attention.dense.extra", torch.ones(3)), "layer 2 have no attention.dense.extra"),
    (put((2, 1), "mlp.dense_h_to_4h.weight", torch.ones(3, 64).half()),
     r"dense_h_to_4h.weight is \(131, 64\), expected \(256, 64\)"),
    (put((2, 1), "mlp.dense_h_to_4h.weight", torch.ones(128, 3).half()),
     "layer 2 have no mlp.dense_h_to_4h.weight that fits"),
    (lambda layers: [drop((3, rank))(layers) for rank in (0, 1)],
     "missing gpt_neox.layers.1.input_layernorm.weight"),
    (lambda layers: [drop((6, rank))(layers) for rank in (0, 1)], "missing .*embed_out.weight"),
    (lambda layers: [drop((2, rank), "mlp.dense_4h_to_h.bias")(layers) for rank in (0, 1)],
     "missing gpt_neox.layers.0.mlp.dense_4h_to_h.bias"),
    (lambda layers: [put((5, rank), "norm.bias", torch.ones(63).half())(layers) for rank in (0, 1)],
     r"final_layer_norm.bias is \(63,\), expected \(64,\)"),
    (lambda layers: [drop((layer, rank), "attention.rotary_emb.inv_freq")(layers)
                     for layer in (2, 3) for rank in (0, 1)], "missing .*attention.rotary_emb")])
def test_neox_files_that_do_not_fit_are_named(tmp_path, edit, words):
    layers = neox_layers(weights(), 2)
    edit(layers)
    with pytest.raises(ValueError, match=words):
        open_any(neox(tmp_path / "global_step8", layers))


# ---------------------------------------------------------------------------- export


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shard_size", [5_000_000_000, 100_000])
def test_export_goes_round_without_losing_a_bit(tmp_path, dtype, shard_size, tokenizer_path):
    expected = {name: tensor.to(getattr(torch, dtype))
                for name, tensor in weights(torch.float32).items()}
    source = published(tmp_path / "run/step8", weights(torch.float32))
    import_(Import(str(source), str(tmp_path / "hf"), dtype, shard_size,
                  tokenizer=str(tokenizer_path)))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == getattr(torch, dtype)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, expected[name.replace("lm_head", "embed_out")]), name
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("Hello, I am")["input_ids"] == [
        12092, 13, 309, 717]
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) == (shard_size < 10**9)
    import_(Import(str(tmp_path / "hf"), str(tmp_path / "back")))
    assert_equal(load_file(tmp_path / "back/model.safetensors"), expected)
    assert (tmp_path / "back/tokenizer.json").read_bytes() == tokenizer_path.read_bytes()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard_size)  # round through theirs
    import_(Import(str(tmp_path / "theirs"), str(tmp_path / "again"), tokenizer=None))
    assert_equal(load_file(tmp_path / "again/model.safetensors"), expected)


def test_an_overflow_of_float16_is_named_and_leaves_nothing(tmp_path):
    tensors = weights(torch.float32)
    tensors["gpt_neox.layers.0.mlp.dense_h_to_4h.bias"][3] = 1e6
    source = published(tmp_path / "step8", tensors)
    with pytest.raises(ValueError,
                       match="layers.0.mlp.dense_h_to_4h.bias: 1e.06 overflows torch.float16"):
        import_(Import(str(source), str(tmp_path / "out"), "float16", tokenizer=None))
    assert os.listdir(tmp_path) == ["step8"]


def test_a_tokenizer_that_is_none_is_not_published(tmp_path):
    """A stranger's folder may have a link to any file."""
    source = published(tmp_path / "step8", weights())
    (tmp_path / "secret").write_text("private key")
    (tmp_path / "token").write_text('{"token": "secret"}')
    for target, words in (("secret", "not JSON"), ("token", "not the GPT"),
                          ("/dev/zero", "not a regular file")):
        (source / "tokenizer.json").unlink(missing_ok=True)
        (source / "tokenizer.json").symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match=f"step8/tokenizer.json: .*{words}"):
            import_(Import(str(source), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_the_command_line(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    published(tmp_path / "pythia-12b/step50000", weights())
    published(tmp_path / "a; touch x/step8", weights())
    code, _, error = command("checkpoints.py", "import", "pythia-12b/step50000", "runs/x/step7",
                             "--tokenizer=None")
    assert code == 0 and "first shard is the final checkpoint's (#206)" in error
    code, said, _ = command("checkpoints.py", "export", "a; touch x/step8", "o p", "--push",
                            "--tokenizer=None", "--dtype=bfloat16")
    assert code == 0 and shlex.split(said.splitlines()[-1]) == [
        "hf", "upload", "a; touch x", "o p", ".", "--revision=step8"]
    x = "runs/x/step7"
    for wrong, words in ((("import", "nowhere", "b"), "nowhere: no checkpoint"),
                         (("import", ".", "b"), "no checkpoint; expected model.safetensors"),
                         (("import", "a"), "missing: --output"),
                         (("import", "a", "b", "c"), "expected source output"),
                         (("import", x, "o p"), "o p: is there already"),
                         (("export", x, "b", "--dtype=int8"), "expected float32, float16 or"),
                         (("export", x, "b", "--tokenizer=none.json"),
                          "none.json: no such tokenizer; `make tokenizer` gets it"),
                         (("export", x, "b"), "20B_tokenizer.json: no such tokenizer"),
                         (("exprot",), "expected one of")):
        code, _, error = command("checkpoints.py", *wrong)
        assert code == 2 and error.count("\n") == 1 and words in error, (wrong, error)
    assert not (tmp_path / "b").exists()


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
    bad = [step for step in checkpoint_steps(143000)
           if any("#205" in line for line in known_bad("pythia-2.8b", step))]
    assert len(bad) == 85  # of 86 equal ones; in step143000 these weights are where they belong
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


def test_fetch_downloads_checks_and_goes_on(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folders, server.claimed, server.asked = {}, {}, []
    for step in (0, 512):
        folder = published(tmp_path / f"hub/step{step}", weights() | legacy_buffers())
        shutil.copy(folder / "model.safetensors", folder / "pytorch_model.bin")  # not wanted twice
        server.folders[f"step{step}"] = folder
    threading.Thread(target=server.serve_forever, daemon=True).start()

    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                                "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}

    def run(*arguments):
        done = subprocess.run([sys.executable, ROOT / "checkpoints.py", "fetch", *arguments],
                              cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stderr

    code, said = run("pythia-70m", "--steps=0,512")
    assert code == 0 and "warning: pythia-70m step 0: steps 0 and 1 are equal" in said
    assert saved_steps(tmp_path / "pythia-70m") == [0, 512]
    assert not (tmp_path / "pythia-70m/step0/pytorch_model.bin").exists()
    assert_equal(bits(load_model(tmp_path / "pythia-70m/step512")), weights())
    code, said = run("pythia-70m", "--steps=512,7")
    assert sum(path.endswith("/revision/step512") for path in server.asked) == 1  # not again
    assert code == 2 and "EleutherAI/pythia-70m step7: " in said.splitlines()[-1]
    server.claimed["model.safetensors"] = "0" * 64
    code, said = run("pythia-70m", "--steps=512", "--out_dir=other")
    assert code == 2 and "its SHA-256 is not the Hub's" in said
    assert not (tmp_path / "other/step512/manifest.json").exists()
    server.shutdown()
