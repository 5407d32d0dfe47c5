"""GPT-NeoX as the Pythia suite trains it, in plain PyTorch.

Sources: Pythia (Biderman et al. 2023, arXiv 2304.01373); gpt-neox v1.0, megatron/model/
{gpt2_model,transformer,positional_embeddings,init_functions}.py; transformers' GPTNeoXForCausalLM,
which tests/test_model.py holds this file equal to. Parameter names are those of the published
checkpoints without their `gpt_neox.` prefix.

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

from config import check, read_json


@dataclass(frozen=True)
class ModelConfig:
    n_layers: int
    d_model: int
    n_heads: int
    # 50277 tokens padded to a multiple of 128 per tensor-parallel rank: the rows above 50276 never
    # occur as targets, but their logits are in the softmax. 6.9B has 50432 rows and 12B 50688.
    vocab_size: int = 50304
    seq_length: int = 2048  # tokens of context
    # Pythia was trained with "tanh" (gpt-neox's bias-gelu fusion is the tanh form), but published
    # with hidden_act "gelu", the exact "erf" form, which is what everybody evaluates.
    gelu: str = "tanh"
    # "small" is gpt-neox's small_init and wang_init; 6.9B and 12B lack those keys in their YAML and
    # so got "normal": 0.02, over sqrt(2 * n_layers) in the layers that write to the residual.
    init: str = "small"

    def __post_init__(self):
        check(self, "at least 1", lambda value: value >= 1,
              "n_layers", "d_model", "n_heads", "vocab_size", "seq_length")
        check(self, "'tanh' (as trained) or 'erf' (as published)", ("tanh", "erf").__contains__,
              "gelu")
        check(self, "'small' or 'normal'", ("small", "normal").__contains__, "init")
        if self.d_model % self.n_heads or self.rotary_dims < 2 or self.rotary_dims % 2:
            raise ValueError(f"d_model = {self.d_model} is not a multiple of n_heads = "
                             f"{self.n_heads}, or a quarter of their ratio (rotary dimensions) is "
                             "not even: make the ratio a multiple of 8")

    @property
    def d_head(self):
        return self.d_model // self.n_heads

    @property
    def rotary_dims(self):
        return self.d_head // 4  # rotary_pct 0.25: the other three quarters carry no position


def rotary_tables(positions, R):
    """Return cos and sin of the rotary angles of positions (...) int64, each (..., R/2) float32.

    The exponent's denominator is R, not d_head. Pythia was trained with these angles in half
    precision (up to 0.37 rad off at d_head 64), but every published evaluation has float32 ones.
    """
    frequencies = 10000.0 ** (
        -torch.arange(0, R, 2, device=positions.device, dtype=torch.float32) / R)
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn the first R dims of x (..., K) by position: halves (x1, x2) are pairs, NeoX style."""
    R = 2 * cos.shape[-1]
    x1, x2, rest = x.split([R // 2, R // 2, x.shape[-1] - R], dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), dim=-1)


class Cache:
    """A layer's keys and values of the tokens so far, in buffers of a fixed length."""

    def __init__(self, config, B, length, like):
        self.kv = like.new_empty(2, B, config.n_heads, length, config.d_head)
        self.used = 0

    def extend(self, k, v):
        """Append k and v (B, H, T, K); return all of both."""
        start, self.used = self.used, self.used + k.shape[2]
        self.kv[0, :, :, start:self.used], self.kv[1, :, :, start:self.used] = k, v
        return self.kv[:, :, :, :self.used].unbind(0)


class Prefix:
    """The keys and values of one row of text with which every row of a batch begins."""

    def __init__(self, cache):
        self.kv = cache.kv

    def extend(self, k, v):
        """Return the prefix's keys and values with k, v (B, H, T, K) behind, and forget those."""
        return (torch.cat((known.expand(len(new), -1, -1, -1), new), 2)
                for known, new in zip(self.kv, (k, v)))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.query_key_value = nn.Linear(config.d_model, 3 * config.d_model)
        self.dense = nn.Linear(config.d_model, config.d_model)

    def forward(self, x, cos, sin, mask=None, cache=None):
        B, T, D = x.shape
        # The rows of query_key_value are interleaved: q, k, v of head 0, then of head 1, ...
        qkv = self.query_key_value(x).view(B, T, self.n_heads, 3, -1)  # (B, T, H, 3, K)
        cos, sin = (t.to(qkv.dtype)[..., None, None, :] for t in (cos, sin))  # ([B,] T, 1, 1, R/2)
        q, k = rotate(qkv[:, :, :, :2], cos, sin).unbind(3)  # (B, T, H, K)
        v = qkv[:, :, :, 2]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, K)
        if cache is not None:
            k, v = cache.extend(k, v)
        # Purely causal, as in the original: documents packed into one row see each other.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.dense(y.transpose(1, 2).reshape(B, T, D))


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

    def forward(self, x, cos, sin, mask=None, cache=None):
        # Parallel residual: two distinct norms, both of the same input.
        return (x + self.attention(self.input_layernorm(x), cos, sin, mask, cache)
                + self.mlp(self.post_attention_layernorm(x)))


class HeadLoss(torch.autograd.Function):
    """Mean cross entropy (nats, float32 or wider) of hidden @ weight.T against targets.

    hidden (N, D), weight (V, D), targets (N,) int64. The (N, V) logits never exist: a block of rows
    at a time becomes logits, softmax and their gradient in one reused buffer, and both gradients
    are made on the way forward (the loss is the last node, so its incoming gradient is a number).

    A negative target (padding) adds nothing to the sum, but the mean is still over all N: a token
    weighs the same whatever padding shares its micro-batch, on any number of processes.
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
                grad = probabilities = torch.softmax(logits, 1, out=logits)
                # log sum exp = largest logit - log(largest probability), which never underflows
                losses = largest - probabilities.amax(1, keepdim=True).log() - target_logit
                if needs_grad:  # d loss / d logits = softmax - one_hot(target)
                    grad.scatter_add_(1, target, torch.full_like(target_logit, -1))
                    grad = grad.to(dtype)
            total += losses.masked_fill_(~kept, 0).sum()
            if needs_grad:  # times 1/N in backward
                # Padding has no gradient. It is taken out of the narrow factors (n, D), which is
                # cheaper than setting rows of the wide (n, V) gradient to zero.
                grad_hidden[rows] = (grad @ weight) * kept
                if dtype is wide:
                    grad_weight.addmm_(grad.T, hidden[rows] * kept)
                else:
                    grad_weight += grad.T @ (hidden[rows] * kept)
        if needs_grad:
            # Kept as attributes: a gradient saved with save_for_backward would be copied once more.
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
    """Yield (rows, logits) over hidden (N, D): a slice and its (n, V) logits.

    They are float32 or wider; with widen=False they stay in the matmul's dtype.

    Every block reuses one buffer, so take what you need before asking for the next. 512 rows were
    the fastest of 128 to 1024 on a CPU (by 11 % at d_model 128); a GPU wants larger matmuls.
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
    fused_loss = None  # a compiled losses_and_gradient, for training at 16 bits

    def __init__(self, config, seed=1234):
        super().__init__()
        self.config = config
        # With an empty weight, since drawing one on the meta device imports torch._dynamo, 2 s.
        self.embed_in = nn.Embedding(config.vocab_size, config.d_model,
                                     _weight=torch.empty(config.vocab_size, config.d_model))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.embed_out = nn.Linear(config.d_model, config.vocab_size, bias=False)  # not tied
        if not self.embed_in.weight.is_meta:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed, fill=torch.Tensor.copy_):
        """Draw every weight as gpt-neox does (megatron/model/init_functions.py).

        Each tensor has a CPU generator of its own, seeded by (seed, name): the draw does not depend
        on device, order or sharding. The original's bits need its CUDA generator, so they differ.
        fill(parameter, draw) copies the draw; parameters in shards need one of their own.
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

    def hidden(self, tokens, positions=None, mask=None, cache=None):
        """Return the final hidden states (B, T, D) of tokens (B, T) int64.

        Evaluation may say more: the positions of the tokens (B, T), which keys each one sees (mask,
        True where seen, or added to the scores; broadcast to (B, H, T, keys); causal without), and
        a Cache or Prefix for each layer, whose keys come first.
        """
        x = self.embed_in(tokens)
        if positions is None:
            if tokens.shape[1] > self.config.seq_length:
                raise ValueError(f"{tokens.shape[1]} tokens, but seq_length is "
                                 f"{self.config.seq_length}")
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        cos, sin = rotary_tables(positions, self.config.rotary_dims)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask, cache[i] if cache else None)
        return self.final_layer_norm(x)

    def forward(self, tokens, targets=None):
        """Return logits (B, T, V) of tokens (B, T) int64; with targets (B, T) mean loss in nats.

        Negative targets add nothing to the loss.
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
        """Return tokens (B, T) with n_tokens sampled ones behind them; temperature 0 is greedy.

        padding (B,) counts the tokens on each row's left that are not there. finished, if given, is
        asked after each token which rows may end, with the new tokens (n, t): (n,) bool; a row that
        has ended is filled up with anything. Raises ValueError if the context is too short.
        """
        (B, T), device, L = tokens.shape, tokens.device, self.config.seq_length
        if T + n_tokens > L:
            raise ValueError(f"{T} tokens and {n_tokens} new ones, but seq_length is {L}")
        positions = torch.arange(T + n_tokens, device=device).repeat(B, 1)  # (B, T + n_tokens)
        if padding is not None:
            positions -= padding[:, None]
        # A token sees itself and those before it that are no padding. Padding sees itself, too, for
        # a softmax of nothing would be NaN.
        query, key = positions[:, None, :, None], positions[:, None, None]
        seen = (key <= query) & (key >= 0) | (key == query)  # (B, 1, queries, keys)
        mask = torch.zeros_like(seen, dtype=self.embed_in.weight.dtype)
        mask.masked_fill_(~seen, -torch.inf)  # once, not in every layer
        cache = [Cache(self.config, B, T + n_tokens, self.embed_in.weight) for _ in self.layers]
        out, start = F.pad(tokens, (0, n_tokens)), 0
        rows = torch.arange(B, device=device)  # those that are still generated
        ended = torch.zeros(B, dtype=torch.bool, device=device)
        for end in range(T, T + n_tokens):
            x = self.hidden(out[rows, start:end], positions[rows, start:end].clamp(min=0),
                            mask[rows, :, start:end, :end], cache)[:, -1]  # (n, D)
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
                if going.sum() <= 0.75 * len(rows):  # 15 rows take a CPU longer than 16
                    rows = rows[going]
                    for layer in cache:
                        layer.kv = layer.kv[:, going]
            start = end
        return out


# ---------------------------------------------------------------------------- as published


def hf_name(name):
    """Return the published name of one of our parameters: the head has no prefix."""
    return name if name.startswith("embed_out") else f"gpt_neox.{name}"


# Keys of config.json that decide numbers, as every Pythia has them: those of every version, ...
PYTHIAS = {"layer_norm_eps": 1e-5, "rotary_pct": 0.25, "rotary_emb_base": 10000,
           "use_parallel_residual": True, "tie_word_embeddings": False}
# ... and those of some versions from 4.24 to 5, alone or in rope_parameters or rope_scaling.
ROPE = {"rope_theta": 10000, "partial_rotary_factor": 0.25, "rope_type": "default",
        "type": "default"}
GELUS = {"gelu": "erf", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu_fast": "tanh"}
# In ModelConfig's order, with their largest values: a hostile file could have 2^60 layers.
SIZES = {"num_hidden_layers": 1 << 10, "hidden_size": 1 << 20, "num_attention_heads": 1 << 20,
         "vocab_size": 1 << 20, "max_position_embeddings": 1 << 20}


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

    Raises ValueError naming a value that makes it another architecture than Pythia's.
    """
    path = Path(folder) / "config.json"
    spec = read_json(path)

    def expect(name, holds, expected):
        if not holds:
            raise ValueError(f"{path}: {name} is {repr(spec.get(name))[:100]}, expected {expected}")

    expect("model_type", spec.get("model_type") == "gpt_neox", "'gpt_neox'")
    for name, most in SIZES.items():
        expect(name, type(spec.get(name)) is int and 1 <= spec[name] <= most,
               f"a positive integer up to {most:,}")
    expect("hidden_act", spec.get("hidden_act") in list(GELUS), f"one of {list(GELUS)}")
    config = ModelConfig(*map(spec.get, SIZES), gelu=GELUS[spec["hidden_act"]])
    pythias = PYTHIAS | ROPE | {
        "intermediate_size": 4 * config.d_model, "head_dim": config.d_head,
        "num_key_value_heads": config.n_heads, "attention_bias": True, "is_causal": True,
        "quantization_config": None}
    for name, value in pythias.items():
        expect(name, spec.get(name, value) == value, f"Pythia's {value!r}")
    for name in ("rope_parameters", "rope_scaling"):
        rope = spec.get(name)
        expect(name, rope is None or type(rope) is dict and rope.items() <= ROPE.items(),
               f"at most Pythia's {ROPE}")
    return config


def parameter_shapes(config):
    """Return {published name: shape} of every parameter of a Pythia."""
    with torch.device("meta"):
        return {hf_name(name): tuple(p.shape) for name, p in Pythia(config).named_parameters()}
