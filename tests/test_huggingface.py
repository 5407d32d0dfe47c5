"""pytest tests/test_huggingface.py: import of every published form, export, and downloads."""

import functools
import hashlib
import http.server
import json
import os
import shlex
import shutil
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from checkpoints import (Import, checkpoint_steps, folder_tokenizer, identify, import_, known_bad,
                         load_model, load_training, merged, open_any, saved_steps, sha256_of)
from model import ModelConfig, Pythia, hf_name, parameter_shapes

CONFIG = ModelConfig(n_layers=2, d_model=64, n_heads=4, vocab_size=256, seq_length=32, gelu="erf")


def weights(dtype=torch.float16, config=CONFIG):
    """Random weights of every published name, LayerNorms included."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(dtype)
            for name, shape in parameter_shapes(config).items()}


def legacy_buffers():
    """Return the buffers that uploads of 2023 contain besides the weights."""
    return {f"gpt_neox.layers.{i}.attention.{name}": tensor for i in range(2) for name, tensor in {
        "bias": torch.ones(32, 32, dtype=torch.uint8).tril()[None, None],
        "masked_bias": torch.tensor(-1e9).half(),
        "rotary_emb.inv_freq": torch.ones(2).half()}.items()}


# As transformers 4.24 wrote it for the 160m; the sizes are ours.
CONFIG_2022 = {
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0,
    "hidden_act": "gelu", "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 256,
    "layer_norm_eps": 1e-05, "max_position_embeddings": 32, "model_type": "gpt_neox",
    "num_attention_heads": 4, "num_hidden_layers": 2, "rotary_emb_base": 10000, "rotary_pct": 0.25,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.24.0",
    "use_cache": True, "use_parallel_residual": True, "vocab_size": 256}


def published(folder, tensors, form="model.safetensors", config=CONFIG_2022):
    """Write a checkpoint folder as a download of this form leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write = save_file if "safetensors" in form else torch.save
    if not form.endswith("shards"):
        write(tensors, folder / form)
        return folder
    stem, end = form.removesuffix(" shards").split(".")
    for i in range(3):
        write({name: tensors[name] for name in list(tensors)[i::3]},
              folder / f"{stem}-0000{i + 1}-of-00003.{end}")
    return folder


def bits(model):
    return {hf_name(name): p.detach() for name, p in model.named_parameters()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name].to(found[name].dtype)), name


FORMS = ["model.safetensors", "model.safetensors shards", "pytorch_model.bin",
         "pytorch_model.bin shards"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_published_form_is_imported_bit_for_bit(tmp_path, form, dtype):
    expected = weights(dtype)
    tensors = expected | legacy_buffers()
    if dtype == torch.float32:  # the head by its newer name
        tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    source = published(tmp_path / "step7", tensors, form)
    import_(Import(str(source), str(tmp_path / "step512")))
    stored = load_file(tmp_path / "step512/model.safetensors")
    assert_equal(stored, expected)
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    model, begun = load_model(tmp_path / "step512"), Pythia(CONFIG)
    assert load_training(tmp_path, 7, begun, None) == {}  # weights alone begin a branch
    assert_equal(bits(model), expected)
    assert_equal(bits(begun), expected)
    assert model.config == CONFIG
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "step512")
    assert theirs.dtype == dtype
    tokens = torch.arange(32)[None]
    torch.testing.assert_close(model(tokens), theirs.float()(tokens).logits,
                               rtol=1e-5, atol=1e-3)  # of ~60
    with pytest.raises(ValueError, match="n_heads is 4, the run's 8"):
        load_training(tmp_path, 7, Pythia(replace(CONFIG, n_heads=8)), None)


def aged(**changes):
    return {name: value for name, value in (CONFIG_2022 | changes).items() if value != "absent"}


NEW_ROPE = {"rope_theta": 10000, "partial_rotary_factor": 0.25, "rope_type": "default"}


@pytest.mark.parametrize("changes", [
    {}, {"attention_bias": True, "rope_theta": 10000, "head_dim": 16,
         "partial_rotary_factor": 0.25},
    {"rotary_pct": "absent", "rotary_emb_base": "absent", "torch_dtype": "absent",
     "dtype": "float32", "rope_parameters": NEW_ROPE},
    {"hidden_act": "gelu_new"}, {"hidden_act": "gelu_fast"}, {"sliding_window": 4}])
def test_config_json_of_every_age_means_the_same_numbers(tmp_path, changes):
    folder = published(tmp_path, weights(), config=aged(**changes))
    theirs, tokens = AutoModelForCausalLM.from_pretrained(folder).float(), torch.arange(32)[None]
    torch.testing.assert_close(load_model(folder)(tokens), theirs(tokens).logits,
                               rtol=1e-5, atol=1e-3)  # of ~60


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "llama"}, "model_type is 'llama'"), ({"rotary_pct": 1.0}, "rotary_pct is 1.0"),
    ({"use_parallel_residual": False}, "use_parallel_residual is False"),
    ({"hidden_act": "relu"}, "hidden_act is 'relu'"), ({"hidden_size": "32"}, "hidden_size is"),
    ({"rope_parameters": {"type": "linear", "factor": 4.0, "rope_theta": 10000}}, "'linear'"),
    ({"num_key_value_heads": 2}, "heads is 2"), ({"vocab_size": 512}, r"\(512, 64\)"),
    ({"num_hidden_layers": 3}, "missing gpt_neox.layers.2"), ({"vocab_size": True}, "size = True"),
    ({"num_hidden_layers": 1}, "unexpected gpt_neox.layers.1")])
def test_another_architecture_is_refused_not_loaded(tmp_path, changes, words):
    folder = published(tmp_path, weights(), config=aged(**changes))
    with pytest.raises(ValueError, match=words):
        load_model(folder)


@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_that_does_not_fit_is_named(tmp_path, form):
    tensors = weights()
    del tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.bias"]
    tensors |= {"gpt_neox.layers.2.attention.dense.bias": torch.ones(64),
                "gpt_neox.embed_in.weight": torch.ones(256, 64, dtype=torch.float64),
                "embed_out.weight": torch.ones(250, 64)}
    with pytest.raises(ValueError) as error:
        import_(Import(str(published(tmp_path / "source", tensors, form)), str(tmp_path / "out")))
    for words in ("missing gpt_neox.layers.1.mlp.dense_h_to_4h.bias",
                  "unexpected gpt_neox.layers.2.attention.dense.bias",
                  "embed_in.weight is (256, 64) torch.float64, expected (256, 64) in float32",
                  "embed_out.weight is (250, 64) torch.float32, expected (256, 64) in"):
        assert words in str(error.value)
    assert os.listdir(tmp_path) == ["source"]


def test_a_folders_own_tokenizer_is_the_20b_or_refused(tmp_path, tokenizer_path):
    folder = published(tmp_path / "one", weights(config=replace(CONFIG, vocab_size=50304)),
                       config=CONFIG_2022 | {"vocab_size": 50304})
    assert folder_tokenizer(folder) == "20B_tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_path))
    tokenizer.save_pretrained(folder)  # in transformers' present form
    assert folder_tokenizer(folder) == folder / "tokenizer.json"
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["merges"].reverse()
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="tokenizer.json: not the GPT-NeoX-20B tokenizer"):
        folder_tokenizer(other)
    assert folder_tokenizer(other, "named.json") == "named.json"
    with pytest.raises(ValueError, match="vocab_size is 256"):
        folder_tokenizer(published(tmp_path / "small", weights()), "named.json")


# ---------------------------------------------------------------------------- gpt-neox


ENDS = {"gpt_neox.embed_in.weight": (0, "word_embeddings.weight"),
        "gpt_neox.final_layer_norm.weight": (5, "norm.weight"),
        "gpt_neox.final_layer_norm.bias": (5, "norm.bias"),
        "embed_out.weight": (6, "final_linear.weight")}


def neox_layers(tensors, ranks):
    """Return {(layer, rank): state dict} of weights split over ranks as Megatron does.

    Biases of row-parallel layers are split into addends, norms are copied.
    """
    layers = {}
    for name, tensor in tensors.items():
        if name in ENDS:
            layer, short = ENDS[name]
        else:
            number, short = name.removeprefix("gpt_neox.layers.").split(".", 1)
            layer = int(number) + 2
        if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
            parts = tensor.chunk(ranks, 1)
        elif name.endswith(("attention.dense.bias", "dense_4h_to_h.bias")):
            parts = [tensor / ranks] * ranks  # exact: ranks is a power of two, none is subnormal
        else:
            parts = [tensor] * ranks if "norm" in name else tensor.chunk(ranks, 0)
        for rank, part in enumerate(parts):
            state = layers.setdefault((layer, rank), {})
            state[short] = part.clone()
            if name not in ENDS:
                state["attention.rotary_emb.inv_freq"] = torch.ones(2).half()
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
    torch.save({"args": object}, source / "mp_rank_00_model_states.pt")  # is not opened
    import_(Import(str(source), str(tmp_path / "step8")))
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


@pytest.mark.parametrize("layer, rank, name, tensor, words", [
    (2, 1, "attention.dense.bias", None, "KeyError: .attention.dense.bias"),
    (2, 1, "mlp.dense_h_to_4h.weight", torch.ones(128, 3), "RuntimeError: Sizes of tensors must"),
    (3, 1, None, None, "layer_03-model_01-model_states.pt: no such file")])
def test_neox_files_that_do_not_fit_are_named(tmp_path, layer, rank, name, tensor, words):
    layers = neox_layers(weights(), 2)
    layers[layer, rank][name] = tensor
    if name is None:
        del layers[layer, rank]
    elif tensor is None:
        del layers[layer, rank][name]
    with pytest.raises(ValueError, match=words):
        open_any(neox(tmp_path / "global_step8", layers))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shard_size", [5_000_000_000, 100_000])
def test_export_goes_round_without_losing_a_bit(tmp_path, dtype, shard_size, tokenizer_path):
    expected = {name: tensor.to(getattr(torch, dtype))
                for name, tensor in weights(torch.float32).items()}
    source = published(tmp_path / "run/step8", weights(torch.float32))
    shutil.copy(tokenizer_path, source / "tokenizer.json")
    import_(Import(str(source), str(tmp_path / "hf"), dtype, shard_size))
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
    import_(Import(str(tmp_path / "theirs"), str(tmp_path / "again")))
    assert_equal(load_file(tmp_path / "again/model.safetensors"), expected)


def test_an_overflow_of_float16_is_named_and_leaves_nothing(tmp_path):
    tensors = weights(torch.float32)
    tensors["gpt_neox.layers.0.mlp.dense_h_to_4h.bias"][3] = 1e6
    source = published(tmp_path / "step8", tensors)
    with pytest.raises(ValueError, match="layers.0.mlp.dense_h_to_4h.bias: 1e.06 overflows"):
        import_(Import(str(source), str(tmp_path / "out"), "float16"))
    assert os.listdir(tmp_path) == ["step8"]


def test_a_tokenizer_that_is_none_is_not_published(tmp_path):
    """A published folder may contain a link to a private file."""
    source = published(tmp_path / "step8", weights())
    (tmp_path / "secret").write_text('{"token": "secret"}')
    for target in ("secret", "/dev/zero"):
        (source / "tokenizer.json").symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match="step8/tokenizer.json: .*not "):
            import_(Import(str(source), str(tmp_path / "out")))
        (source / "tokenizer.json").unlink()
    assert not (tmp_path / "out").exists()


def test_the_command_line(tmp_path, monkeypatch, command, refused):
    monkeypatch.chdir(tmp_path)
    published(tmp_path / "pythia-12b/step50000", weights())
    published(tmp_path / "a; touch x/step8", weights())
    done = command("checkpoints.py", "import", "pythia-12b/step50000", "runs/x/step7")
    assert "first shard is the final checkpoint's (#206)" in done.stderr
    done = command("checkpoints.py", "export", "a; touch x/step8", "o p", "--push",
                   "--dtype=bfloat16")
    assert shlex.split(done.stdout.splitlines()[-1]) == [
        "hf", "upload", "a; touch x", "o p", ".", "--revision=step8"]
    for words, line in (("runs: already exists", "import runs/x/step7 runs"),
                        ("-1, expected at least 1", "export runs/x/step7 new --shard_size=-1"),
                        ("steps = 'last', expected all, or", "fetch pythia-70m --steps=last")):
        assert words in refused("checkpoints.py", *line.split())


def test_known_bad_uploads_warn_and_good_ones_do_not():
    bad = [step for step in checkpoint_steps(143000)
           if any("#205" in line for line in known_bad("pythia-2.8b", step))]
    assert len(bad) == 85  # of 86 equal ones; in step143000 these weights are where they belong
    for name, step, issue in (
            ("pythia-70m", 2, "#198"), ("pythia-2.8b", 64000, "#205"),
            ("pythia-12b", 58000, "#206"), ("neox-ckpt-pythia-6.9b-deduped-v1", 1000, "#195")):
        assert any(issue in line for line in known_bad(name, step))
    for name, step in (("pythia-2.8b", 66000), ("pythia-160m", 512), ("", None)):
        assert not known_bad(name, step)
    assert identify("/data/pythia-2.8b/step1000") == ("pythia-2.8b", 1000)
    assert identify("neox-ckpt-pythia-70m-deduped-v1/global_step143000")[1] == 143000
    assert identify("/somewhere/else") == ("", None)


class Hub(http.server.SimpleHTTPRequestHandler):
    """A local Hub for huggingface_hub: the files of a folder, with the headers that it expects."""

    def end_headers(self):
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", hashlib.sha256(self.path.encode()).hexdigest())
        super().end_headers()

    def log_message(self, *_):
        pass


def upload(hub, step, claimed=None, named="*"):
    """Write a revision of pythia-70m: weights, and the Hub's description of the files `named`."""
    commit = f"{step:040}"
    folder = published(hub / f"EleutherAI/pythia-70m/resolve/{commit}",
                       weights() | legacy_buffers())
    shutil.copy(folder / "model.safetensors", folder / "pytorch_model.bin")  # not wanted twice
    files = [{"rfilename": path.name, "size": path.stat().st_size, "blobId": "0" * 40, "lfs": {
        "sha256": claimed or sha256_of(path), "size": path.stat().st_size, "pointerSize": 1}}
        for path in sorted(folder.glob(named))]
    interface = hub / "api/models/EleutherAI/pythia-70m/revision"
    interface.mkdir(parents=True, exist_ok=True)
    (interface / f"step{step}").write_text(json.dumps(
        {"id": "EleutherAI/pythia-70m", "sha": commit, "siblings": files}))


def test_fetch_downloads_checks_and_goes_on(tmp_path, monkeypatch, command, refused):
    hub, run = tmp_path / "hub", tmp_path / "pythia-70m"
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Hub, directory=hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"  # as HF_ENDPOINT would set it
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
                        url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.chdir(tmp_path)
    fetch = "checkpoints.py", "fetch", "pythia-70m"
    upload(hub, 0), upload(hub, 512), upload(hub, 8, named="[cp]*"), upload(hub, 9, named="c*")
    assert "pythia-70m step 0: steps 0 and 1 are equal" in (
        command(*fetch, "--steps=0,512").stderr)
    assert saved_steps(run) == [0, 512] and not (run / "step0/pytorch_model.bin").exists()
    assert_equal(bits(load_model(run / "step512")), weights())
    assert "step9: no checkpoint; expected model.saf" in refused(*fetch, "--steps=8,9")
    assert saved_steps(run) == [0, 8, 512] and (run / "step8/pytorch_model.bin").exists()
    shutil.rmtree(hub / "api")  # complete checkpoints need no Hub
    assert "EleutherAI/pythia-70m step7: " in refused(*fetch, "--steps=512,7")
    upload(hub, 512, claimed="0" * 64)
    said = refused(*fetch, "--steps=512", "--out_dir=other")
    assert "its SHA-256 is not the Hub's" in said
    assert not (tmp_path / "other/step512/manifest.json").exists()
    server.shutdown()
