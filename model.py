"""GPT-NeoX as the Pythia suite trains it, in plain PyTorch.

Sources: Pythia (Biderman et al. 2023, arXiv 2304.01373); gpt-neox v1.0, megatron/model/
{gpt2_model,transformer,positional_embeddings,init_functions}.py; transformers' GPTNeoXForCausalLM,
to which tests/test_model.py compares logits and gradients. Parameter names are those of the
published checkpoints without their `gpt_neox.` prefix.

Dimension key: B batch, T sequence, N = B*T, D d_model, H heads, K d_head, R rotary dims,
V vocabulary.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from config import check, expecting, read_json


@dataclass(frozen=True)
class ModelConfig:
    n_layers: int
    d_model: int
    n_heads: int
    # 50277 tokens, padded to a multiple of 128 per tensor-parallel rank. The ids above 50276 never
    # occur as targets, but their logits are in the softmax. 6.9B has 50432 rows and 12B 50688.
    vocab_size: int = 50304
    seq_length: int = 2048  # tokens of context
    # Pythia was trained with "tanh" (gpt-neox's bias-gelu fusion is the tanh form), but published
    # with hidden_act "gelu", the exact "erf" form, which is what everybody evaluates.
    gelu: str = "tanh"
    # "small" is gpt-neox's small_init and wang_init. The YAMLs of 6.9B and 12B lack these keys, so
    # both got "normal": std 0.02, over sqrt(2 * n_layers) in layers that write to the residual.
    init: str = "small"

    def __post_init__(self):
        check(self, "an integer of at least 1", lambda value: type(value) is int and value >= 1,
              "n_layers", "d_model", "n_heads", "vocab_size", "seq_length")
        check(self, "'tanh' (as trained) or 'erf' (as published)", ("tanh", "erf").__contains__,
              "gelu")
        check(self, "'small' or 'normal'", ("small", "normal").__contains__, "init")
        if self.d_model % self.n_heads or self.rotary_dims < 2 or self.rotary_dims % 2:
            raise ValueError(f"d_model = {self.d_model} and n_heads = {self.n_heads}, expected a "
                             "ratio that is a multiple of 8 (a quarter of it is rotated, in pairs)")

    @property
    def d_head(self):
        return self.d_model // self.n_heads

    @property
    def rotary_dims(self):
        return self.d_head // 4  # rotary_pct 0.25: the other dimensions are not rotated


def rotary_tables(positions, R):
    """Return cos and sin of the rotary angles of positions (...) int64, each (..., R/2) float32.

    The exponent's denominator is R, not d_head. Pythia was trained with angles in half precision
    (errors up to 0.37 rad at d_head 64), but all published evaluations compute them in float32.
    """
    frequencies = 10000.0 ** (
        -torch.arange(0, R, 2, device=positions.device, dtype=torch.float32) / R)
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotate the first R dims of x (..., K) by position, as pairs (i, i + R/2), NeoX style."""
    R = 2 * cos.shape[-1]
    x1, x2, rest = x.split([R // 2, R // 2, x.shape[-1] - R], dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), dim=-1)


class Cache:
    """A layer's keys and values of the tokens so far, in a buffer of fixed length."""

    def __init__(self, config, B, length, like):
        self.kv = like.new_empty(2, B, config.n_heads, length, config.d_head)
        self.used = 0

    def extend(self, k, v):
        """Append k and v (B, H, T, K); return all keys and all values."""
        start, self.used = self.used, self.used + k.shape[2]
        self.kv[0, :, :, start:self.used], self.kv[1, :, :, start:self.used] = k, v
        return self.kv[:, :, :, :self.used].unbind(0)


class Prefix:
    """A layer's keys and values of one text with which every row of a batch begins."""

    def __init__(self, cache):
        self.kv = cache.kv

    def extend(self, k, v):
        """Return the prefix's keys and values followed by k and v (B, H, T, K), not kept."""
        return (torch.cat((known.expand(len(new), -1, -1, -1), new), 2)
                for known, new in zip(self.kv, (k, v)))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.query_key_value = nn.Linear(config.d_model, 3 * config.d_model)
        self.dense = nn.Linear(config.d_model, config.d_model)

    def forward(self, x, cos, sin, mask=None, cache=None, wanted=None):
        B, T, D = x.shape
        # The output of query_key_value is q, k, v of head 0, then q, k, v of head 1, ...
        qkv = self.query_key_value(x).view(B, T, self.n_heads, 3, -1)  # (B, T, H, 3, K)
        cos, sin = (t.to(qkv.dtype)[..., None, None, :] for t in (cos, sin))  # ([B,] T, 1, 1, R/2)
        q, k = rotate(qkv[:, :, :, :2], cos, sin).unbind(3)  # (B, T, H, K)
        v = qkv[:, :, :, 2]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, K)
        if cache is not None:
            k, v = cache.extend(k, v)
        # Purely causal, as in the original: documents packed into one row see each other.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        y = y.transpose(1, 2).reshape(B, T, D)
        return self.dense(y if wanted is None else y[wanted])


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.approximate = "tanh" if config.gelu == "tanh" else "none"
        self.dense_h_to_4h = nn.Linear(config.d_model, 4 * config.d_model)
        self.dense_4h_to_h = nn.Linear(4 * config.d_model, config.d_model)

    def forward(self, x):
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.d_model)
        self.post_attention_layernorm = nn.LayerNorm(config.d_model)
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask=None, cache=None, wanted=None):
        # Parallel residual: two distinct norms, both of the same input.
        residual = x if wanted is None else x[wanted]
        return (residual + self.attention(self.input_layernorm(x), cos, sin, mask, cache, wanted)
                + self.mlp(self.post_attention_layernorm(residual)))


class HeadLoss(torch.autograd.Function):
    """Mean cross entropy (nats, float32 or wider) of hidden @ weight.T against targets.

    hidden (N, D), weight (V, D), targets (N,) int64. The whole logits (N, V) never exist: one block
    of rows at a time becomes logits, softmax and their gradient in one reused buffer. The gradients
    of hidden and weight are computed in forward; backward only scales them by a number, since the
    loss is a scalar.

    A negative target (padding) adds nothing to the sum, but the mean is still over all N: a token
    has the same weight whatever padding is in its micro-batch, on any number of processes.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, needs_grad, fused=None):
        # Under autocast the matmuls run in its dtype, the softmax and all sums in float32.
        device = hidden.device.type
        dtype = (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device)
                 else hidden.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        if needs_grad:
            grad_hidden = torch.empty_like(hidden, dtype=wide)
            grad_weight = torch.zeros_like(weight, dtype=wide)
        for rows, logits in head_blocks(hidden, weight, widen=fused is None):
            target, kept = targets[rows, None].clamp(min=0), targets[rows, None] >= 0  # (n, 1)
            if fused is not None:
                losses, grad = fused(logits, target)
            else:
                target_logit = logits.gather(1, target)
                largest = logits.amax(1, keepdim=True)
                probabilities = torch.softmax(logits, 1, out=logits)
                # log sum exp = largest logit - log(largest probability), which never underflows
                losses = largest - probabilities.amax(1, keepdim=True).log() - target_logit
                # d loss / d logits = softmax - one_hot(target), in place
                grad = probabilities.scatter_add_(1, target, torch.full_like(target_logit, -1))
            total += losses.masked_fill_(~kept, 0).sum()
            if needs_grad:  # the factor 1/N follows in backward
                grad = grad.to(dtype)
                # The gradient of padding is 0. Setting rows of the factors (n, D) to 0 is cheaper
                # than setting rows of the gradient (n, V) to 0.
                grad_hidden[rows] = (grad @ weight) * kept
                if dtype is wide:
                    grad_weight.addmm_(grad.T, hidden[rows] * kept)
                else:
                    grad_weight += grad.T @ (hidden[rows] * kept)
        if needs_grad:
            # Attributes, since gradients from save_for_backward would have to be copied once more.
            ctx.grads = grad_hidden, grad_weight
        return total / len(targets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.grads
        ctx.grads = None
        scale = grad_loss / len(grad_hidden)  # autograd casts to the dtypes of hidden and weight
        return grad_hidden.mul_(scale), grad_weight.mul_(scale), None, None, None


def losses_and_gradient(logits, target):
    """Return the losses (n, 1) float32 of logits (n, V) and their gradient in the logits' dtype.

    parallel.py compiles this into one kernel that reads and writes 16-bit logits only. On an H100
    the head takes 29 instead of 64 ms at d_model 512 (65,536 tokens).
    """
    wide = logits.float()
    largest = wide.amax(1, keepdim=True)
    powers = (wide - largest).exp()
    total = powers.sum(1, keepdim=True)
    one_hot = torch.arange(wide.shape[1], device=wide.device) == target
    losses = largest + total.log() - wide.gather(1, target)
    return losses, (powers / total - one_hot.float()).to(logits.dtype)


def head_blocks(hidden, weight, widen=True):
    """Yield (rows, logits) over hidden (N, D): a slice of n rows and their logits (n, V).

    Logits are float32 or wider, or with widen=False in hidden's dtype. All blocks share one buffer,
    so each block overwrites the one before. 512 rows were the fastest of 128 to 1024 on a CPU (by
    11 % at d_model 128); a GPU is faster with larger matmuls.
    """
    n = 512 if hidden.device.type == "cpu" else 2048
    dtype = torch.promote_types(hidden.dtype, torch.float32) if widen else hidden.dtype
    buffer = torch.empty(min(n, len(hidden)), len(weight), dtype=dtype, device=hidden.device)
    for start in range(0, len(hidden), n):
        rows = slice(start, min(start + n, len(hidden)))
        logits = buffer[: rows.stop - rows.start]
        if hidden.dtype is dtype:
            torch.mm(hidden[rows], weight.T, out=logits)
        else:
            logits.copy_(hidden[rows] @ weight.T)
        yield rows, logits


class Pythia(nn.Module):
    fused_loss = None  # a compiled losses_and_gradient, for training in 16 bits

    def __init__(self, config, seed=1234):
        super().__init__()
        self.config = config
        # With an empty weight, since nn.Embedding's own initialisation on the meta device imports
        # torch._dynamo, which takes 2 s.
        self.embed_in = nn.Embedding(config.vocab_size, config.d_model,
                                     _weight=torch.empty(config.vocab_size, config.d_model))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.embed_out = nn.Linear(config.d_model, config.vocab_size, bias=False)  # not tied
        if not self.embed_in.weight.is_meta:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed, fill=torch.Tensor.copy_):
        """Draw all weights from gpt-neox's distributions (megatron/model/init_functions.py).

        Each tensor has a CPU generator of its own, seeded by (seed, name): the draw does not depend
        on device, order or sharding. The original's bits need its CUDA generator, so they differ.
        fill(parameter, draw) copies a draw; sharded parameters need a function of their own.
        """
        D, L = self.config.d_model, self.config.n_layers
        if self.config.init == "small":
            std, residual_std = math.sqrt(2 / (5 * D)), 2 / (L * math.sqrt(D))
        else:
            std, residual_std = 0.02, 0.02 / math.sqrt(2 * L)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:  # LayerNorm weight
                parameter.fill_(1)
            else:
                digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
                writes_residual = name.endswith(
                    ("attention.dense.weight", "mlp.dense_4h_to_h.weight"))
                draw = torch.empty(parameter.shape).normal_(
                    0, residual_std if writes_residual else std, generator=generator)
                fill(parameter, draw)

    def hidden(self, tokens, positions=None, mask=None, cache=None, wanted=None):
        """Return the final hidden states (B, T, D) of tokens (B, T) int64.

        For evaluation: positions (B, T) of the tokens; mask, broadcast to (B, H, T, keys), either
        bool and True where a key is seen, or added to the scores (default: causal); cache, a Cache
        or Prefix for each layer, whose keys come before those of the tokens; wanted, an index of
        (B, T), such as (slice(None), -1): only these states are returned, and the last block
        computes no others, which saves most of its time.
        """
        x = self.embed_in(tokens)
        if positions is None:
            if tokens.shape[1] > self.config.seq_length:
                raise ValueError(f"{tokens.shape[1]} tokens, but the model's context (seq_length) "
                                 f"has {self.config.seq_length}")
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        cos, sin = rotary_tables(positions, self.config.rotary_dims)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask, cache[i] if cache else None,
                      wanted if layer is self.layers[-1] else None)
        return self.final_layer_norm(x)

    def forward(self, tokens, targets=None):
        """Return the logits (B, T, V) of tokens (B, T) int64; given targets (B, T), the mean loss.

        The loss is in nats. Negative targets add nothing to it (see HeadLoss).
        """
        x = self.hidden(tokens)
        if targets is None:
            return self.embed_out(x)
        needs_grad = torch.is_grad_enabled()
        return HeadLoss.apply(x.flatten(0, 1), self.embed_out.weight, targets.flatten(),
                              needs_grad, self.fused_loss if needs_grad else None)

    @torch.no_grad()
    def generate(self, tokens, n_tokens, temperature=1.0, generator=None, padding=None,
                 finished=None):
        """Return tokens (B, T) followed by n_tokens sampled ones; temperature 0 is greedy decoding.

        padding (B,) counts the padding tokens on each row's left. finished(new tokens (n, t)), if
        given, is called after each token and tells which of n rows have ended (n,) bool; what
        follows in such a row is undefined. Raises ValueError if the context is too short.
        """
        (B, T), device, L = tokens.shape, tokens.device, self.config.seq_length
        if T + n_tokens > L:
            raise ValueError(f"{T} tokens and {n_tokens} new ones, but seq_length is {L}")
        positions = torch.arange(T + n_tokens, device=device).repeat(B, 1)  # (B, T + n_tokens)
        if padding is not None:
            positions -= padding[:, None]
        # A token sees itself and the tokens before it, without padding. Padding sees itself, since
        # a softmax over no keys would be NaN.
        query, key = positions[:, None, :, None], positions[:, None, None]
        seen = (key <= query) & (key >= 0) | (key == query)  # (B, 1, queries, keys)
        # Added to the scores: a bool mask would be converted to this in every layer.
        mask = torch.where(seen, 0.0, -torch.inf).to(self.embed_in.weight.dtype)
        cache = [Cache(self.config, B, T + n_tokens, self.embed_in.weight) for _ in self.layers]
        out, start = F.pad(tokens, (0, n_tokens)), 0
        rows = torch.arange(B, device=device)  # those that are still generated
        ended = torch.zeros(B, dtype=torch.bool, device=device)
        for end in range(T, T + n_tokens):
            x = self.hidden(out[rows, start:end], positions[rows, start:end].clamp(min=0),
                            mask[rows, :, start:end, :end], cache,
                            wanted=(slice(None), -1))  # (n, D)
            # (V, D) @ (D, n) is twice as fast on a CPU as the head's own product for so few rows.
            logits = (self.embed_out.weight @ x.T).T.float()  # (n, V)
            if temperature == 0:
                out[rows, end] = logits.argmax(-1)
            else:
                probabilities = (logits / temperature).softmax(-1)
                out[rows, end] = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            if finished is not None:
                ended[rows] |= finished(out[rows, T:end + 1]).to(device)
                going = ~ended[rows]
                if not going.any():
                    break
                if going.sum() <= 0.75 * len(rows):  # 15 rows take a CPU longer than 16 do
                    rows = rows[going]
                    for layer in cache:
                        layer.kv = layer.kv[:, going]
            start = end
        return out


# ---------------------------------------------------------------------------- as published


def hf_name(name):
    """Return the published name of one of our parameters: the head has no prefix."""
    return name if name.startswith("embed_out") else f"gpt_neox.{name}"


# Keys of config.json that decide numbers, with the values that every Pythia has: those of every
# version of transformers ...
PYTHIAS = {"layer_norm_eps": 1e-5, "rotary_pct": 0.25, "rotary_emb_base": 10000,
           "use_parallel_residual": True, "tie_word_embeddings": False}
# ... and those of some versions from 4.24 to 5, alone or in rope_parameters or rope_scaling.
OTHERS = {"rope_theta": 10000, "partial_rotary_factor": 0.25, "rope_type": "default",
          "type": "default", "attention_bias": True, "is_causal": True, "quantization_config": None}
GELUS = {"gelu": "erf", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu_fast": "tanh"}
# In ModelConfig's order, with an upper limit: a hostile file could have 2^60 layers.
SIZES = {"num_hidden_layers": range(1, 1 << 10), **dict.fromkeys(
    ("hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"),
    range(1, 1 << 20))}


def hf_config(config):
    """Return the config.json that makes GPTNeoXForCausalLM compute what our model does."""
    return {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox",
        "hidden_size": config.d_model, "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads, "intermediate_size": 4 * config.d_model,
        "vocab_size": config.vocab_size, "max_position_embeddings": config.seq_length,
        "hidden_act": {"tanh": "gelu_pytorch_tanh", "erf": "gelu"}[config.gelu], **PYTHIAS,
        "initializer_range": 0.02, "bos_token_id": 0, "eos_token_id": 0, "use_cache": True,
        "torch_dtype": "float32",
    }


def read_config(folder):
    """Return the ModelConfig of folder/config.json: ours, or one of transformers 4.24 to 5.

    Raises ValueError naming the first value that makes it another architecture than Pythia's.
    """
    path = Path(folder) / "config.json"
    spec = read_json(path)

    def expect(found, allowed):
        for name, values in allowed.items():
            if found.get(name) not in values:
                raise ValueError(f"{name} is {found.get(name)!r}, expected one of {values}")

    with expecting(path, "the config.json of a Pythia"):
        expect(spec, {"model_type": ["gpt_neox"], "hidden_act": list(GELUS), **SIZES})
        config = ModelConfig(*map(spec.get, SIZES), gelu=GELUS[spec["hidden_act"]])
        fixed = PYTHIAS | OTHERS | {"intermediate_size": 4 * config.d_model,
                                    "head_dim": config.d_head,
                                    "num_key_value_heads": config.n_heads}
        expect(fixed | spec, {name: [value] for name, value in fixed.items()})
        for rope in (spec.get("rope_parameters") or {}, spec.get("rope_scaling") or {}):
            expect(rope, {name: [fixed.get(name)] for name in rope})
    return config


def parameter_shapes(config):
    """Return {published name: shape} of every parameter of a Pythia."""
    with torch.device("meta"):
        return {hf_name(name): tuple(p.shape) for name, p in Pythia(config).named_parameters()}
