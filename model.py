"""The decoder: GPT-2 and LLaMA in one Transformer (paper §4.1: GPT-2 1.5B, LLaMA 7B and 13B are the imitators).

    python model.py info llama7b
    python model.py generate --model runs/llama7b --prompts heldout.jsonl --out replies.jsonl

In this file:
    shapes                  Config, the published presets, config.json
    parallelism             one model shared by several processes, cut in the Megatron manner; parameters spread over replicas
    the attention kernel    forward and backward in Triton, in tiles, conversation boundaries skipped
    layers                  linear, norms, rotary positions, attention, MLP, the Transformer
    loss                    output projection and cross-entropy on the positions that carry loss, and nowhere else
    checkpoints             safetensors by hand; our parameters <-> the tensors of the published checkpoints
    generation              a shared prefix, slots for the rows, refill; token ids only
    devices, the program    info, chat, generate, export: text in, text out
References: Radford et al. 2019 (GPT-2), Touvron et al. 2023 (LLaMA), and transformers' GPT2LMHeadModel and LlamaForCausalLM,
whose logits these are.
"""
import contextlib
import functools
import hashlib
import json
import math
import mmap
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

triton = None
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET"):      # elsewhere it would only cost memory and start-up time
    with contextlib.suppress(ImportError):                               # optional: only the path `triton` of attention needs it
        import triton
        import triton.language as tl

from data import (Parser, SPECIAL, UserError, add_device_flags, adds_bos, atomic, continuation, cut, digest, load_tokenizer, natural, positive, print_table, read_json,
                  read_prompts, real, render, run, stop_rule, visible, write_json, write_jsonl)


# --- shapes -------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """A decoder's shape; the defaults are LLaMA 7B's. `llama` and `gpt2` below say which choices make up each family."""
    vocab_size: int = 32000
    context: int = 2048
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int = 32             # fewer than n_head: grouped-query attention
    n_embd: int = 4096
    head_dim: int = 128
    mlp_dim: int = 11008
    norm: str = "rms"               # rms | layer
    norm_eps: float = 1e-6
    position: str = "rotary"        # rotary | learned
    mlp: str = "swiglu"             # swiglu | gelu
    bias: bool = False              # on every linear layer but the output head
    tied: bool = False              # output head = input embedding
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()        # items of a config.json's rope_scaling of type llama3
    bos: int = 1
    eos: int = 2

    @property
    def family(self):
        return "gpt2" if self.position == "learned" else "llama"


def llama(n_layer, n_head, n_embd, mlp_dim, **kw):
    """A LLaMA's Config (Touvron et al. 2023): RMSNorm, rotary positions, SwiGLU, no biases."""
    return Config(n_layer=n_layer, n_head=n_head, n_kv_head=kw.pop("n_kv_head", n_head), n_embd=n_embd, head_dim=kw.pop("head_dim", n_embd // n_head), mlp_dim=mlp_dim, **kw)


def gpt2(n_layer, n_head, n_embd, **kw):
    """A GPT-2's Config (Radford et al. 2019): LayerNorm, learned positions, GELU, biases, tied embeddings."""
    return Config(**{**dict(vocab_size=50257, context=1024, n_layer=n_layer, n_head=n_head, n_kv_head=n_head, n_embd=n_embd, head_dim=n_embd // n_head, mlp_dim=4 * n_embd,
                            norm="layer", norm_eps=1e-5, position="learned", mlp="gelu", bias=True, tied=True, bos=50256, eos=50256), **kw})


PRESETS = {                         # §4.1: gpt2-xl (1.5B), llama7b, llama13b; the others as published
    "gpt2": gpt2(12, 12, 768), "gpt2-medium": gpt2(24, 16, 1024), "gpt2-large": gpt2(36, 20, 1280), "gpt2-xl": gpt2(48, 25, 1600),
    "llama7b": llama(32, 32, 4096, 11008), "llama13b": llama(40, 40, 5120, 13824),
    "llama30b": llama(60, 52, 6656, 17920), "llama65b": llama(80, 64, 8192, 22016, norm_eps=1e-5),
}


def config_from_hf(d, where="config.json"):
    """Config of a Hugging Face config.json (a dict); a field that this decoder does not implement is an error that names it."""
    if not isinstance(d, dict):
        raise UserError(f"{where}: not a JSON object")

    def want(field, default, *allowed):
        value = d.get(field, default)
        if value not in allowed:
            raise UserError(f"{where}: {field} = {value!r} is not supported (supported: {', '.join(map(repr, allowed))})")
        return value

    def need(*fields):
        missing = [f for f in fields if not isinstance(d.get(f), int) or d[f] < 1]
        if missing:
            raise UserError(f"{where}: no whole number above 0 in {', '.join(missing)}")
        return [d[f] for f in fields]

    def number(field, default, source=d, kinds=(int, float)):
        value = default if source.get(field) is None else source[field]
        if type(value) not in kinds or not 0 < value < math.inf:
            raise UserError(f"{where}: {field} = {value!r} is no {'whole ' if kinds == (int,) else ''}number above 0")
        return value

    def whole_number(field, default):
        return number(field, default, kinds=(int,))

    def token(field, default):
        value = d.get(field, default)
        value = value[0] if isinstance(value, list) and value else value                    # LLaMA 3 has several ends
        if value is not None and type(value) is not int:
            raise UserError(f"{where}: {field} = {value!r} is no token id")
        return value

    def tied(default):
        return bool(want("tie_word_embeddings", default, True, False, None))

    kind = want("model_type", None, "llama", "gpt2")
    if kind == "gpt2":
        want("activation_function", "gelu_new", "gelu_new")
        want("scale_attn_weights", True, True)
        want("scale_attn_by_inverse_layer_idx", False, False)
        n_layer, n_head, n_embd, context, vocab = need("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
        return gpt2(n_layer, n_head, n_embd, context=context, vocab_size=vocab, norm_eps=number("layer_norm_epsilon", 1e-5), mlp_dim=whole_number("n_inner", 4 * n_embd),
                    tied=tied(True), bos=token("bos_token_id", 50256), eos=token("eos_token_id", 50256))
    want("hidden_act", "silu", "silu")
    want("attention_bias", False, False)
    want("mlp_bias", False, False)
    n_layer, n_head, n_embd, mlp_dim, context, vocab = need("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "max_position_embeddings", "vocab_size")
    rope = d.get("rope_parameters") or {}                  # transformers 5 gathers both here
    scaling = d.get("rope_scaling") or rope
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
        raise UserError(f"{where}: rope_parameters or rope_scaling is not a JSON object")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{where}: rope_scaling of type {kind!r} is not supported (supported: llama3)")
    stretch = ("factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings") if kind == "llama3" else ()
    n_kv_head = whole_number("num_key_value_heads", n_head)
    if n_head % n_kv_head:
        raise UserError(f"{where}: num_attention_heads = {n_head} is not a multiple of num_key_value_heads = {n_kv_head}")
    return llama(n_layer, n_head, n_embd, mlp_dim, n_kv_head=n_kv_head, head_dim=whole_number("head_dim", n_embd // n_head), context=context, vocab_size=vocab,
                 norm_eps=number("rms_norm_eps", 1e-6), tied=tied(False), rope_theta=float(number("rope_theta", 10000.0, rope if d.get("rope_theta") is None else d)),
                 rope_scaling=tuple((field, number(field, None, scaling)) for field in stretch), bos=token("bos_token_id", 1), eos=token("eos_token_id", 2))


def config_to_hf(c):
    """The config.json from which transformers builds the same model."""
    if c.family == "gpt2":
        return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new", "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd,
                "n_inner": c.mlp_dim, "n_positions": c.context, "n_ctx": c.context, "vocab_size": c.vocab_size, "layer_norm_epsilon": c.norm_eps,
                "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": c.tied, "bos_token_id": c.bos, "eos_token_id": c.eos}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head,
            "num_key_value_heads": c.n_kv_head, "head_dim": c.head_dim, "hidden_size": c.n_embd, "intermediate_size": c.mlp_dim, "max_position_embeddings": c.context,
            "vocab_size": c.vocab_size, "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta, "rope_scaling": {"rope_type": "llama3", **dict(c.rope_scaling)} if c.rope_scaling else None,
            "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": c.tied, "bos_token_id": c.bos, "eos_token_id": c.eos}


# --- parallelism ------------------------------------------------------------------------------------------------------------
# §4.1: fully sharded data parallelism (`shard`, below) and tensor parallelism.
# Shoeybi et al. 2019 (Megatron-LM): q, k, v, gate and up are cut along their outputs (each rank owns some heads, some units),
# o and down along their inputs, the vocabulary by rows. `copy` stands where a whole activation enters a cut layer, `reduce`
# where partial sums leave one. Copy comes after the norm, not before, or the norm's gradient would be a rank's share of it.
# Cuts may be uneven (25 heads on 2 ranks: 12 and 13; 32,002 rows) and nothing is padded: a tensor's RMS counts in the optimizer.

class _Copy(torch.autograd.Function):
    """The activation as it is; its gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        g = g.contiguous().clone()
        dist.all_reduce(g, group=ctx.group)
        return g, None


class _Reduce(torch.autograd.Function):
    """The sum over the ranks; its gradient as it is."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, g):
        return g, None


@dataclass(frozen=True)
class TensorParallel:
    """This process's place among the `size` that share one model; the default is a model that is not shared."""
    rank: int = 0
    size: int = 1
    group: object = None

    def copy(self, x):
        return x if self.size == 1 else _Copy.apply(x, self.group)

    def reduce(self, x):
        return x if self.size == 1 else _Reduce.apply(x, self.group)

    def part(self, n):
        """This rank's range of n units (heads, rows, hidden units)."""
        return range(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def cut(self, c, name):
        """(dimension, range) in which this rank holds the parameter `name` of a model of Config c; None where it holds all of it."""
        layer, _, kind = name.rpartition(".")
        layer = layer.rpartition(".")[2]
        if self.size == 1:
            return None
        if layer in ("embedding", "head"):
            return 0, self.part(c.vocab_size)
        if layer in ("q", "k", "v", "o"):
            width = c.head_dim * (c.n_head // c.n_kv_head if layer in "qo" else 1)          # query heads go with their key head
            rows = range(self.part(c.n_kv_head).start * width, self.part(c.n_kv_head).stop * width)
        elif layer in ("gate", "up", "down"):
            rows = self.part(c.mlp_dim)
        else:
            return None
        if layer in ("o", "down"):
            return (1, rows) if kind == "weight" else None
        return 0, rows


def shard(model, mesh):
    """Spread every parameter over the data-parallel ranks of `mesh` (ZeRO stage 3, torch's fully_shard), gathered block by block in the precision of `compute`."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    policy = MixedPrecisionPolicy(param_dtype=model.compute if model.compute != torch.float32 else None, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.blocks, model):                                                   # the embedding, the head and the last norm go with the root
        fully_shard(module, mesh=mesh, mp_policy=policy)


def local(p):
    """The part of a parameter, or of a moment beside it, that lies in this process."""
    return p.to_local() if hasattr(p, "to_local") else p


def region(shape, cut, rank=0, size=1):
    """Slices of a whole tensor that a process holds: its `cut` under tensor parallelism, of that the rank-th of `size` pieces of rows (as fully_shard has them)."""
    slices = [slice(0, n) for n in shape]
    if cut:
        slices[cut[0]] = slice(cut[1].start, cut[1].stop)
    first, end = slices[0].start, slices[0].stop
    rows = -(-(end - first) // size)
    slices[0] = slice(min(first + rank * rows, end), min(first + (rank + 1) * rows, end))
    return tuple(slices)


def held(p, shape, cut):
    """The `region` of the whole tensor, of shape `shape`, whose values lie in this process's parameter `p`."""
    return region(shape, cut, p.device_mesh.get_local_rank(), p.device_mesh.size()) if hasattr(p, "device_mesh") else region(shape, cut)


def whole(p, shape, cut, tp):
    """The whole tensor of which every process holds a part; all of them call this together."""
    p = p.full_tensor() if hasattr(p, "full_tensor") else p
    if cut:
        full = p.new_zeros(shape)
        full[region(shape, cut)] = p
        dist.all_reduce(full, group=tp.group)
        return full
    return p


# --- the attention kernel -------------------------------------------------------------------------------------------------
# Dao et al. 2022 and 2023 (FlashAttention), Milakov & Gimelshein 2018 (the online softmax).
# Query t sees the keys start(t) … t, so a (BLOCK_M, BLOCK_N) tile of scores is invisible, seen whole, or cut by an edge of the
# mask. start(t) never decreases: along a row or a column of tiles come the ones cut by one edge, the whole ones, and the ones
# cut by the other edge. Every kernel walks these three phases; only the outer two pay for masks, invisible tiles are not read.

if triton:
    @triton.jit
    def _load(X, stride, b, h, t, T, D: tl.constexpr, CHECK: tl.constexpr):
        """X[b, h, t, :] -> (len(t), D); CHECK: zeros from T on."""
        at = X + b * stride[0] + h * stride[1] + t[:, None] * stride[2] + tl.arange(0, D)[None, :] * stride[3]
        return tl.load(at, mask=t[:, None] < T, other=0.0) if CHECK else tl.load(at)

    @triton.jit
    def _store(X, stride, b, h, t, T, D: tl.constexpr, x):
        at = X + b * stride[0] + h * stride[1] + t[:, None] * stride[2] + tl.arange(0, D)[None, :] * stride[3]
        tl.store(at, x.to(X.dtype.element_ty), mask=t[:, None] < T)

    @triton.jit
    def _key_phases(starts, m0, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        """Where the key tiles of the queries m0 … m0 + BLOCK_M - 1 begin, are seen whole, meet the diagonal, end."""
        end = tl.minimum(m0 + BLOCK_M, T)
        first, last = tl.load(starts + m0), tl.load(starts + end - 1)
        diagonal = m0 // BLOCK_N * BLOCK_N
        return first // BLOCK_N * BLOCK_N, tl.minimum(tl.cdiv(last, BLOCK_N) * BLOCK_N, diagonal), diagonal, end

    @triton.jit
    def _query_phases(ends, n0, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        """Where the query tiles of the keys n0 … n0 + BLOCK_N - 1 begin, are past the diagonal, no longer see all of them, end."""
        first, last = tl.load(ends + n0) + 1, tl.load(ends + tl.minimum(n0 + BLOCK_N, T) - 1) + 1
        whole = tl.minimum(tl.cdiv(n0 + BLOCK_N, BLOCK_M) * BLOCK_M, last)
        return n0 // BLOCK_M * BLOCK_M, whole, tl.maximum(first // BLOCK_M * BLOCK_M, whole), last

    @triton.jit
    def _forward_kernel(Q, K, V, O, LSE, STARTS, q_stride, k_stride, v_stride, o_stride, scale, T, H, GROUP,
                        D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M                      # the long rows first: a short tail
        b, h = tl.program_id(1).to(tl.int64) // H, tl.program_id(1).to(tl.int64) % H    # int64: b * stride may pass 2³¹
        m = m0 + tl.arange(0, BLOCK_M)
        start = tl.load(STARTS + b * T + m, mask=m < T, other=0)
        q = _load(Q, q_stride, b, h, m, T, D, True)
        row_max = tl.full([BLOCK_M], -1e30, tl.float32)          # finite: a row that has seen no key yet must not give inf - inf
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        o = tl.zeros([BLOCK_M, D], tl.float32)
        phases = _key_phases(STARTS + b * T, m0, T, BLOCK_M, BLOCK_N)
        for phase in tl.static_range(3):
            for n0 in range(phases[phase], phases[phase + 1], BLOCK_N):
                n = n0 + tl.arange(0, BLOCK_N)
                k = _load(K, k_stride, b, h // GROUP, n, T, D, phase != 1)
                s = tl.dot(q, tl.trans(k), input_precision="ieee")                      # (BLOCK_M, BLOCK_N)
                if phase != 1:
                    s = tl.where((start[:, None] <= n[None, :]) & (n[None, :] <= m[:, None]), s, -float("inf"))
                new_max = tl.maximum(row_max, tl.max(s, 1) * scale)
                p = tl.exp2(s * scale - new_max[:, None])
                shrink = tl.exp2(row_max - new_max)
                row_max, row_sum = new_max, row_sum * shrink + tl.sum(p, 1)
                v = _load(V, v_stride, b, h // GROUP, n, T, D, phase != 1)
                o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee")
        _store(O, o_stride, b, h, m, T, D, o / row_sum[:, None])
        tl.store(LSE + (b * H + h) * T + m, row_max + tl.log2(row_sum), mask=m < T)

    @triton.jit
    def _dq_kernel(Q, K, V, O, DO, DQ, LSE, DELTA, STARTS, q_stride, k_stride, v_stride, o_stride, do_stride, dq_stride, scale, T, H, GROUP,
                   D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
        b, h = tl.program_id(1).to(tl.int64) // H, tl.program_id(1).to(tl.int64) % H
        m = m0 + tl.arange(0, BLOCK_M)
        start = tl.load(STARTS + b * T + m, mask=m < T, other=0)
        q = _load(Q, q_stride, b, h, m, T, D, True)
        do = _load(DO, do_stride, b, h, m, T, D, True)
        delta = tl.sum(do.to(tl.float32) * _load(O, o_stride, b, h, m, T, D, True).to(tl.float32), 1)
        tl.store(DELTA + (b * H + h) * T + m, delta, mask=m < T)                        # for _dkdv_kernel, which runs next
        lse = tl.load(LSE + (b * H + h) * T + m, mask=m < T, other=0.0)
        dq = tl.zeros([BLOCK_M, D], tl.float32)
        phases = _key_phases(STARTS + b * T, m0, T, BLOCK_M, BLOCK_N)
        for phase in tl.static_range(3):
            for n0 in range(phases[phase], phases[phase + 1], BLOCK_N):
                n = n0 + tl.arange(0, BLOCK_N)
                k = _load(K, k_stride, b, h // GROUP, n, T, D, phase != 1)
                v = _load(V, v_stride, b, h // GROUP, n, T, D, phase != 1)
                p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])
                if phase != 1:
                    p = tl.where((start[:, None] <= n[None, :]) & (n[None, :] <= m[:, None]), p, 0.0)
                ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        _store(DQ, dq_stride, b, h, m, T, D, dq * (scale * 0.6931471805599453))         # scale without its log2(e)

    @triton.jit
    def _dkdv_kernel(Q, K, V, DO, DK, DV, LSE, DELTA, ENDS, q_stride, k_stride, v_stride, do_stride, dk_stride, dv_stride, scale, T, H, GROUP,
                     D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        n0 = tl.program_id(0) * BLOCK_N
        KV = H // GROUP
        b, kv = tl.program_id(1).to(tl.int64) // KV, tl.program_id(1).to(tl.int64) % KV
        n = n0 + tl.arange(0, BLOCK_N)
        end = tl.load(ENDS + b * T + n, mask=n < T, other=0)
        k = _load(K, k_stride, b, kv, n, T, D, True)
        v = _load(V, v_stride, b, kv, n, T, D, True)
        dk = tl.zeros([BLOCK_N, D], tl.float32)
        dv = tl.zeros([BLOCK_N, D], tl.float32)
        phases = _query_phases(ENDS + b * T, n0, T, BLOCK_M, BLOCK_N)
        for h in range(kv * GROUP, kv * GROUP + GROUP):         # the query heads that this key head serves
            for phase in tl.static_range(3):
                for m0 in range(phases[phase], phases[phase + 1], BLOCK_M):
                    m = m0 + tl.arange(0, BLOCK_M)
                    q = _load(Q, q_stride, b, h, m, T, D, phase != 1)
                    do = _load(DO, do_stride, b, h, m, T, D, phase != 1)
                    lse = tl.load(LSE + (b * H + h) * T + m, mask=m < T, other=0.0)
                    delta = tl.load(DELTA + (b * H + h) * T + m, mask=m < T, other=0.0)
                    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :])    # transposed: (BLOCK_N, BLOCK_M)
                    if phase != 1:
                        p = tl.where((n[:, None] <= m[None, :]) & (m[None, :] <= end[:, None]), p, 0.0)
                    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
                    ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
                    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        _store(DK, dk_stride, b, kv, n, T, D, dk * (scale * 0.6931471805599453))
        _store(DV, dv_stride, b, kv, n, T, D, dv)


def _tiles(D, dtype):
    """Tiles of the three kernels, (rows of the accumulator, rows per step of the loop) and how they are launched."""
    if dtype == torch.float32:                                  # exact products, no tensor cores: small tiles for the registers
        return [(32, 32, dict(num_warps=8, num_stages=1))] * 3
    if D <= 64:
        return (128, 64, dict(num_warps=4, num_stages=3)), (128, 64, dict(num_warps=8, num_stages=3)), (128, 64, dict(num_warps=8, num_stages=3))
    return (128, 64, dict(num_warps=8, num_stages=3)), (128, 64, dict(num_warps=8, num_stages=2)), (128, 64, dict(num_warps=8, num_stages=2))


class _FlashAttention(torch.autograd.Function):
    """The three kernels as one function; the backward pass makes each tile of scores again from q, k and the saved log-sum-exp."""

    @staticmethod
    def forward(ctx, q, k, v, starts):
        (B, H, T, D), GROUP = q.shape, q.shape[1] // k.shape[1]
        BLOCK_M, BLOCK_N, launch = _tiles(D, q.dtype)[0]
        o, lse = torch.empty_like(q), q.new_empty(B, H, T, dtype=torch.float32)         # lse: log2 of the sum of the rows' exponentials
        _forward_kernel[triton.cdiv(T, BLOCK_M), B * H](q, k, v, o, lse, starts, q.stride(), k.stride(), v.stride(), o.stride(), math.log2(math.e) * D ** -0.5, T, H, GROUP,
                                                        D, BLOCK_M, BLOCK_N, **launch)
        ctx.save_for_backward(q, k, v, o, lse, starts)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse, starts = ctx.saved_tensors
        (B, H, T, D), KV, scale = q.shape, k.shape[1], math.log2(math.e) * q.shape[-1] ** -0.5
        dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
        _, (BLOCK_M, BLOCK_N, launch), (BLOCK_K, BLOCK_Q, launch_kv) = _tiles(D, q.dtype)
        _dq_kernel[triton.cdiv(T, BLOCK_M), B * H](q, k, v, o, do, dq, lse, delta, starts, q.stride(), k.stride(), v.stride(), o.stride(), do.stride(), dq.stride(),
                                                   scale, T, H, H // KV, D, BLOCK_M, BLOCK_N, **launch)
        t = torch.arange(T, dtype=torch.int32, device=q.device).repeat(B, 1)
        ends = torch.searchsorted(starts, t, right=True, out_int32=True) - 1            # (B, T): the last query that sees each key
        _dkdv_kernel[triton.cdiv(T, BLOCK_K), B * KV](q, k, v, do, dk, dv, lse, delta, ends, q.stride(), k.stride(), v.stride(), do.stride(), dk.stride(), dv.stride(),
                                                      scale, T, H, H // KV, D, BLOCK_Q, BLOCK_K, **launch_kv)
        return dq, dk, dv, None


def flash_attention(q, k, v, starts=None):
    """Causal attention without a (T, T) matrix, q (B, H, T, D), k and v (B, KV, T, D) -> (B, H, T, D); D is 16, 32, 64 or 128.

    Each key head serves H / KV query heads. starts (B, T), int32, nondecreasing, starts[b, t] <= t: the first position that t sees,
    where its conversation begins in a packed stream; None: 0 everywhere.
    """
    if triton is None:
        raise UserError("--attention triton needs a CUDA GPU and the package triton (pip install triton); TRITON_INTERPRET=1 runs it on a CPU, slowly")
    if q.shape[-1] not in (16, 32, 64, 128) or q.shape[1] % k.shape[1]:
        raise UserError(f"--attention triton: q {tuple(q.shape)}, k {tuple(k.shape)}: needs a head size of 16, 32, 64 or 128 and H a multiple of KV")
    if starts is None:
        starts = torch.zeros(q.shape[0], q.shape[2], dtype=torch.int32, device=q.device)
    return _FlashAttention.apply(q, k, v, starts.contiguous())


# --- layers -------------------------------------------------------------------------------------------------------------

class _BlockedAttention(torch.autograd.Function):
    """Causal attention in blocks of 128 queries, all heads at once, for bfloat16 on a CPU: half the time of torch's at 512 positions, the same at 1,024; more beyond.

    Keeps q, k and v alone; a block's probabilities are made again in the backward pass. q, k, v (N, T, D) with N = B · heads; starts as in `attention`.
    """

    @staticmethod
    def blocks(q, k, starts):
        """Yield (queries, keys, probabilities (N, m, n)) of each block; the scores are rounded to the precision of q, their softmax is made in float32."""
        N, T, D = q.shape
        for at in range(0, T, 128):
            rows, seen = slice(at, min(at + 128, T)), slice(0, min(at + 128, T))
            p = torch.baddbmm(q.new_zeros(()), q[:, rows], k[:, seen].transpose(1, 2), beta=0, alpha=D ** -0.5)
            p[:, :, rows].masked_fill_(torch.ones(p.shape[1], p.shape[1], dtype=torch.bool, device=q.device).triu_(1), -torch.inf)
            if starts is not None:
                p.view(len(starts), -1, *p.shape[1:]).masked_fill_(torch.arange(seen.stop, device=q.device) < starts[:, None, rows, None], -torch.inf)
            yield rows, seen, p.softmax(-1)

    @staticmethod
    def forward(ctx, q, k, v, starts):
        o = torch.empty_like(q)
        for rows, seen, p in _BlockedAttention.blocks(q, k, starts):
            torch.bmm(p, v[:, seen], out=o[:, rows])
        ctx.save_for_backward(q, k, v, starts)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, starts = ctx.saved_tensors
        dq, scale = torch.empty_like(q), q.shape[-1] ** -0.5
        dk, dv = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))         # sums over blocks
        for rows, seen, p in _BlockedAttention.blocks(q, k, starts):
            dv[:, seen] += p.transpose(1, 2) @ do[:, rows]
            ds = torch._softmax_backward_data(do[:, rows] @ v[:, seen].transpose(1, 2), p, -1, p.dtype)
            torch.bmm(ds, k[:, seen], out=dq[:, rows])
            dk[:, seen] += ds.transpose(1, 2) @ q[:, rows]
        return dq.mul_(scale), dk.mul_(scale).to(k.dtype), dv.to(v.dtype), None


class Linear(nn.Linear):
    """y = x Wᵀ + b in the precision of x: the float32 master weight is cast on the way, its gradient comes back in float32."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class _RMSNorm(torch.autograd.Function):
    """y = g x / rms(x) on a CPU, keeping x and 1 / rms(x) alone: torch's is a chain of operations there that keeps several float32 copies of x."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        x32 = x.float()
        scale = (x32.square().mean(-1, keepdim=True) + eps).rsqrt_()                        # (…, 1)
        ctx.save_for_backward(x, weight, scale)
        return (x32 * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, scale = ctx.saved_tensors
        unit = x * scale                                                                    # float32: scale is
        d = dy * unit
        dw = d.flatten(0, -2).sum(0).to(weight.dtype)
        mean = d.mul_(weight).mean(-1, keepdim=True)
        return (dy * weight).sub_(unit.mul_(mean)).mul_(scale).to(x.dtype), dw, None


class Norm(nn.Module):
    """RMSNorm (x / rms(x) · g; Zhang & Sennrich 2019) or LayerNorm ((x − mean) / std · g + b), in float32 whatever the precision of x."""

    def __init__(self, c):
        super().__init__()
        self.kind, self.eps = c.norm, c.norm_eps
        self.weight = nn.Parameter(torch.ones(c.n_embd))
        self.bias = nn.Parameter(torch.zeros(c.n_embd)) if c.norm == "layer" else None

    def forward(self, x):
        if self.kind == "layer":
            return F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), self.bias.float(), self.eps).to(x.dtype)
        if x.is_cuda:                                                                       # where torch has a kernel of its own for this
            return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)


def rotary_frequencies(c):
    """The angle that each pair of a head's coordinates turns per position, (head_dim / 2,); Su et al. 2021, θ^(−2i/d).

    LLaMA 3 stretches the slow ones so that a longer context stays within the angles of pre-training.
    """
    frequency = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, dtype=torch.float32, device="cpu") / c.head_dim)
    if c.rope_scaling:
        s = dict(c.rope_scaling)
        turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)          # in the original context
        mix = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        frequency = frequency * (mix + (1 - mix) / s["factor"])
    return frequency


def rotate(x, cos, sin):
    """Rotary positions, x (B, H, T, D), cos and sin (…, T, D / 2).

    Coordinate i turns with i + D/2, the "half-split" layout of Hugging Face checkpoints. Meta's files pair 2i with 2i + 1:
    their q and k rows are permuted when they are read.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attention(q, k, v, path="sdpa", starts=None):
    """Causal attention, q (B, H, T, D), k and v (B, KV, T, D) -> (B, H, T, D); each key head serves H / KV query heads.

    starts (B, T), int32: the first position that each position sees, where its conversation begins; None: 0 everywhere.
    `eager` is the reference, `sdpa` torch's, `blocked` ours for short rows on a CPU, `triton` the kernel above, which skips what `starts` hides.
    """
    if path == "triton":
        return flash_attention(q, k, v, starts)
    if path == "sdpa" and starts is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    if path != "sdpa" and (repeat := q.shape[1] // k.shape[1]) > 1:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    if path == "blocked":
        return _BlockedAttention.apply(*(x.flatten(0, 1) for x in (q, k, v)), starts).view(q.shape)
    t = torch.arange(q.shape[2], device=q.device)
    visible = (t <= t[:, None])[None] if starts is None else (t <= t[:, None]) & (t >= starts[:, :, None])       # (B or 1, T, T)
    if path == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], enable_gqa=q.shape[1] != k.shape[1])
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5                        # (B, H, T, T)
    return scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1).to(q.dtype) @ v


def pick_attention(name, device, compute, length, doc_mask):
    """auto: on a GPU the kernel where it pays, for conversation boundaries; on a CPU blocks where they pay, for short rows in bfloat16; else torch's."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "triton" if doc_mask and triton else "sdpa"
    return "blocked" if compute == torch.bfloat16 and length <= 1024 else "sdpa"


def fused(*layers):
    """One linear layer that computes several of the same input: fewer, larger products where each costs little (inference alone)."""
    with torch.device("meta"):
        one = Linear(layers[0].in_features, sum(layer.out_features for layer in layers), bias=layers[0].bias is not None)
    one.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    if one.bias is not None:
        one.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    one.parts = [layer.out_features for layer in layers]
    return one


class PackedLinear(nn.Module):
    """A linear layer of bfloat16 weights on a CPU, in oneDNN's blocked layout: put in order once, not anew at every product (inference alone).

    The two operators are those that torch.compile itself calls; twice as fast as F.linear at 16 rows.
    """

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias, self.parts = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 16), getattr(layer, "bias", None), getattr(layer, "parts", None)

    @staticmethod
    def fits(weight):
        return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class RowParallel(Linear):
    """A linear layer whose inputs are shared out: the ranks' partial sums are added, the bias once, behind the sum."""

    def __init__(self, n_in, n_out, bias, tp):
        super().__init__(n_in, n_out, bias=bias)
        self.tp = tp

    def forward(self, x):
        y = self.tp.reduce(F.linear(x, self.weight.to(x.dtype)))
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention over this rank's heads; `attend(q, k, v)` is the attention itself, `rotary` (cos, sin) or None. x (B, T, C)."""

    def __init__(self, c, tp):
        super().__init__()
        self.head_dim = c.head_dim
        kv = len(tp.part(c.n_kv_head)) * c.head_dim                                         # this rank's heads
        self.q = Linear(c.n_embd, kv * (c.n_head // c.n_kv_head), bias=c.bias)
        self.k = Linear(c.n_embd, kv, bias=c.bias)
        self.v = Linear(c.n_embd, kv, bias=c.bias)
        self.o = RowParallel(kv * (c.n_head // c.n_kv_head), c.n_embd, c.bias, tp)
        self.qkv = None

    def forward(self, x, rotary, attend):
        B, T, _ = x.shape
        parts = (layer(x) for layer in (self.q, self.k, self.v)) if self.qkv is None else self.qkv(x).split(self.qkv.parts, -1)
        q, k, v = (y.view(B, T, -1, self.head_dim).transpose(1, 2) for y in parts)                                  # (B, heads, T, D)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return self.o(attend(q, k, v).transpose(1, 2).reshape(B, T, -1))                                           # (B, T, C)


class _SwiGLU(torch.autograd.Function):
    """silu(a) · b, keeping a and b alone."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return F.silu(a).mul_(b)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        a, b = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * b, a), F.silu(a).mul_(dy)


class MLP(nn.Module):
    """down(silu(gate x) · up x) for LLaMA (Shazeer 2020), down(gelu(up x)) for GPT-2; the rank holds some of the hidden units."""

    def __init__(self, c, tp):
        super().__init__()
        width = len(tp.part(c.mlp_dim))
        self.gate = Linear(c.n_embd, width, bias=c.bias) if c.mlp == "swiglu" else None
        self.up = Linear(c.n_embd, width, bias=c.bias)
        self.down = RowParallel(width, c.n_embd, c.bias, tp)
        self.gate_up = None

    def forward(self, x):
        if self.gate_up is not None:
            gate, up = self.gate_up(x).chunk(2, -1)
            return self.down(_SwiGLU.apply(gate, up))
        if self.gate is not None:
            return self.down(_SwiGLU.apply(self.gate(x), self.up(x)))
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). `recompute`: keep the input alone and compute the rest again in the backward pass (Chen et al. 2016)."""
    recompute = False

    def __init__(self, c, tp):
        super().__init__()
        self.tp = tp
        self.attention_norm, self.attention = Norm(c), Attention(c, tp)
        self.mlp_norm, self.mlp = Norm(c), MLP(c, tp)

    def forward(self, x, rotary, attend):
        if self.recompute and torch.is_grad_enabled():                                      # inside the module: fully_shard's hooks stay outside
            return checkpoint(self._forward, x, rotary, attend, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x, rotary, attend)

    def _forward(self, x, rotary, attend):
        x = x + self.attention(self.tp.copy(self.attention_norm(x)), rotary, attend)
        return x + self.mlp(self.tp.copy(self.mlp_norm(x)))


class Embedding(nn.Embedding):
    """A token's vector; a rank holds some rows of the vocabulary, and the sum over ranks has every token's."""

    def __init__(self, c, tp):
        rows = len(tp.part(c.vocab_size))
        super().__init__(rows, c.n_embd, _weight=torch.empty(rows, c.n_embd))               # torch would fill it: normal_ of a meta tensor imports the compiler, 1.5 s
        self.tp, self.first = tp, tp.part(c.vocab_size).start

    def forward(self, ids):
        if self.tp.size == 1:
            return super().forward(ids)
        ids = ids - self.first
        mine = (ids >= 0) & (ids < self.num_embeddings)
        return self.tp.reduce(super().forward(ids.where(mine, 0)) * mine[..., None])


class Transformer(nn.Module):
    """The decoder. `compute` is the precision of activations; parameters may be float32 masters beside it."""

    def __init__(self, c, compute=torch.float32, attention_path="sdpa", tp=TensorParallel()):
        super().__init__()
        if tp.size > c.n_kv_head:
            raise UserError(f"tensor parallelism over {tp.size} ranks needs as many key-value heads; the model has {c.n_kv_head}")
        self.config, self.compute, self.attention_path, self.tp = c, compute, attention_path, tp
        self.embedding = Embedding(c, tp)
        self.position = nn.Embedding(c.context, c.n_embd, _weight=torch.empty(c.context, c.n_embd)) if c.position == "learned" else None
        self.blocks = nn.ModuleList(Block(c, tp) for _ in range(c.n_layer))
        self.norm = Norm(c)
        self.packed_head = None
        self.head = None if c.tied else Linear(c.n_embd, len(tp.part(c.vocab_size)), bias=False)
        self.register_buffer("frequency", rotary_frequencies(c) if c.position == "rotary" else None, persistent=False)

    @torch.no_grad()
    def initialize(self, seed):
        """GPT-2's initialisation: normal 0.02, the two projections into the residual stream divided by √(2 · layers); the same however the model is spread.

        For `train.py --init` alone: the paper starts from published weights.
        """
        generator, shapes = torch.Generator().manual_seed(seed), whole_shapes(self.config)
        for name, p in self.named_parameters():
            tensor = torch.full(shapes[name], float(name.endswith("norm.weight")))
            if tensor.dim() == 2:
                tensor.normal_(0, 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith(("attention.o.weight", "mlp.down.weight")) else 0.02, generator=generator)
            local(p).copy_(tensor[held(p, tensor.shape, self.tp.cut(self.config, name))])
        return self

    def fuse(self):
        """For inference: q, k, v become one product, gate and up another, packed where that pays. The parameters lose their published names."""
        pack = PackedLinear if PackedLinear.fits(self.output_weight) and self.tp.size == 1 else lambda layer: layer
        for block in self.blocks:
            a, m = block.attention, block.mlp
            a.qkv, a.o = pack(fused(a.q, a.k, a.v)), pack(a.o)
            del a.q, a.k, a.v
            if m.gate is not None:
                m.gate_up = pack(fused(m.gate, m.up))
                del m.gate, m.up
            else:
                m.up = pack(m.up)
            m.down = pack(m.down)
        if pack is PackedLinear:
            self.packed_head, self.head = pack(self.embedding if self.head is None else self.head), None
        return self

    def project(self, h):
        """Logits (…, V) of normed states (…, C), in their precision."""
        return self.packed_head(h) if self.packed_head else F.linear(h, self.output_weight.to(h.dtype))

    @property
    def output_weight(self):
        return self.embedding.weight if self.head is None else self.head.weight             # (V, C), or this rank's rows of it

    def hidden(self, ids, positions=None, attend=None, starts=None):
        """ids (B, T) -> the last layer's normed states (B, T, C). `attend(layer, q, k, v)` replaces causal attention (the cache)."""
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.embedding(ids).to(self.compute)                                            # (B, T, C)
        rotary = None
        if self.position is not None:
            x = x + self.position(positions).to(self.compute)
        else:
            angle = positions[..., None].float() * self.frequency                           # (T, D / 2) or (B, T, D / 2)
            angle = angle if angle.dim() == 2 else angle[:, None]                           # one for all heads
            rotary = angle.cos().to(self.compute), angle.sin().to(self.compute)
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, (lambda q, k, v, i=i: attend(i, q, k, v)) if attend else (lambda q, k, v: attention(q, k, v, self.attention_path, starts)))
        return self.norm(x)

    def logits(self, ids):
        """(B, T, V) in float32: for tests and small inputs; training and generation never build it."""
        return self.project(self.hidden(ids)).float()

    def forward(self, ids, targets, weights, starts=None, base=None, kl=0.0):
        """Σ weights · cross-entropy over the positions with weight > 0 (§4.1: the model outputs); ids, targets, weights and starts (see `attention`) (B, T).

        The loss is made inside forward, where DDP's and fully_shard's hooks see it. targets None: the states of those positions
        instead, (N, C). With `base`, the original model's (states, output weight, vocabulary): (loss + kl · KL, KL).
        """
        keep = weights > 0
        h = self.hidden(ids, starts=starts)[keep]
        if targets is None:
            return h
        return cross_entropy(self.tp.copy(h), self.output_weight, targets[keep], weights[keep], tp=self.tp, first=self.embedding.first, base=base, beta=kl)


def n_parameters(c):
    """Parameters of a Config, an output head that is the embedding counted once."""
    return sum(math.prod(shape) for shape in whole_shapes(c).values())


def flops_per_token(c, length):
    """Multiply-adds × 2 of one token's forward pass at a context of `length`; a training step costs three times as much."""
    matrices = n_parameters(c) - (0 if c.tied else c.vocab_size * c.n_embd) - (c.context * c.n_embd if c.position == "learned" else 0)
    return 2 * matrices + 2 * c.n_layer * length * c.n_head * c.head_dim                    # causal: half of the T × T scores, q·k and p·v


# --- loss -----------------------------------------------------------------------------------------------------------------

def log_softmax(z, tp):
    """Of rows that may be cut into the ranks' columns: no rank ever sees all of one."""
    if tp.size == 1:
        return z.log_softmax(-1)
    highest = z.amax(-1, keepdim=True)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=tp.group)
    z = z - highest
    total = z.exp().sum(-1, keepdim=True)
    dist.all_reduce(total, group=tp.group)
    return z.sub_(total.log_())


class _CrossEntropy(torch.autograd.Function):
    """loss = Σ w (log Σ exp z − z_target), z = h Wᵀ in chunks; the gradient is made while a chunk's logits are at hand.

    dz = softmax z − onehot, dh = w dz W, dW = dzᵀ (w h): three products and no (positions, vocabulary) tensor beyond one chunk.
    With a base model's p: + β Σ w KL(p‖softmax z), over the base's own vocabulary; its dz is β (softmax z − p) there.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, w, chunk, tp, first, base, beta):
        need_h, need_w = ctx.needs_input_grad[:2]
        matrix = weight.to(h.dtype)
        loss, kl = torch.zeros(2, device=h.device)
        dh = torch.zeros_like(h) if need_h else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if need_w else None
        for at in range(0, len(h), chunk):
            piece = slice(at, at + chunk)
            z, scale = log_softmax((h[piece] @ matrix.T).float(), tp), w[piece, None]       # (chunk, V); it becomes dz in place
            target = targets[piece, None] - first
            mine = ((target >= 0) & (target < len(matrix))).float()                         # is the target among this rank's rows?
            target = target.clamp(0, len(matrix) - 1)
            loss -= (scale * mine * z.gather(1, target)).sum()
            if base:
                states, base_weight, vocabulary = base
                known = max(0, min(vocabulary - first, len(matrix)))                        # this rank's rows that the base has
                log_m, log_b = log_softmax(z[:, :known], tp), log_softmax((states[piece] @ base_weight[:known].T).float(), tp)
                kl += (scale * log_b.exp() * (log_b - log_m)).sum()
            z.exp_().scatter_add_(1, target, -mine)
            if base:
                z[:, :known] += beta * (log_m.exp_() - log_b.exp_())
            if need_h or need_w:
                z = z.to(h.dtype)
            if need_h:
                torch.mul(z @ matrix, scale, out=dh[piece])
            if need_w:
                dw += z.T @ (h[piece] * scale).to(h.dtype)
            del z                                                                           # before the next chunk's
        if tp.size > 1:
            dist.all_reduce(loss, group=tp.group)
            dist.all_reduce(kl, group=tp.group)
        ctx.save_for_backward(dh, dw)
        ctx.mark_non_differentiable(kl)
        return loss + beta * kl, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        return *(x if x is None else x.mul_(g) for x in ctx.saved_tensors), *[None] * 7


LOGITS = 1 << 26                    # that are in memory at once on a GPU; a CPU gains nothing by more than a quarter


def cross_entropy(h, weight, targets, w, chunk=4096, tp=TensorParallel(), first=0, base=None, beta=0.0):
    """Σ w · cross-entropy of softmax(h weightᵀ) against targets; h (N, C), weight (V, C), targets and w (N,).

    Under tensor parallelism `weight` is this rank's rows of the vocabulary, from row `first` on, and dh its share of the gradient.
    base: (states (N, C), output weight (V, C) or this rank's rows, vocabulary) of a model to stay close to; then (loss + β · KL, KL)
    with KL = Σ w · KL(base‖model).
    """
    loss, kl = _CrossEntropy.apply(h, weight, targets, w, max(1, min(chunk, LOGITS // (1 if h.is_cuda else 4) // weight.shape[0])), tp, first, base, beta)
    return (loss, kl) if base else loss


# --- checkpoints ------------------------------------------------------------------------------------------------------------

LLAMA = {"embedding": "model.embed_tokens", "blocks": "model.layers", "attention_norm": "input_layernorm", "attention": "self_attn", "mlp_norm": "post_attention_layernorm",
         "norm": "model.norm", "head": "lm_head", **{name: f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}}
GPT2 = {"embedding": "transformer.wte", "position": "transformer.wpe", "blocks": "transformer.h", "attention_norm": "ln_1", "attention": "attn", "mlp_norm": "ln_2",
        "norm": "transformer.ln_f", "head": "lm_head", **dict.fromkeys("qkv", "c_attn"), "up": "c_fc", **dict.fromkeys(("o", "down"), "c_proj")}


def published_names(c):
    """{tensor of the published checkpoint: (our parameters that make it up, transposed?)}; a parameter that a fork adds keeps its own name.

    LLaMA maps one to one. GPT-2 keeps q, k and v in one c_attn and stores its linear layers as (in, out), "Conv1D".
    """
    names, published = {}, GPT2 if c.family == "gpt2" else LLAMA
    for ours in whole_shapes(c):
        theirs = ".".join(published.get(part, part) for part in ours.split("."))
        names.setdefault(theirs, ([], theirs.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))))[0].append(ours)
    return names


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
SHARD_BYTES = 5 * 10**9


class Safetensors:
    """A .safetensors file, memory-mapped: 8 bytes of header length, a JSON header, raw little-endian tensors.

    Everything the header claims is checked before a tensor is touched: sizes, dtypes, offsets inside the file, no overlap.
    """

    def __init__(self, path):
        self.path = path
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, 100_000_000):
                raise UserError(f"{path}: truncated or not a safetensors file ({size} bytes, header of {length})")
            try:
                header = json.loads(f.read(length))
                header.pop("__metadata__", None)
                self.entries = {name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"]) for name, entry in header.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise UserError(f"{path}: malformed safetensors header ({type(e).__name__}: {e})")
            data, end_before = size - 8 - length, 0
            for name, (dtype, shape, start, end) in sorted(self.entries.items(), key=lambda item: (item[1][2], item[1][3])):
                if dtype not in DTYPES:
                    raise UserError(f"{path}: tensor {name!r} has unknown dtype {dtype!r}")
                if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)) or end - start != math.prod(shape) * DTYPES[dtype].itemsize:
                    raise UserError(f"{path}: tensor {name!r} claims shape {list(shape)} {dtype} but bytes {start}:{end}")
                if start < end_before:
                    raise UserError(f"{path}: tensor {name!r} overlaps the one before it (starts at {start}, before {end_before})")
                if end > data:
                    raise UserError(f"{path}: truncated: tensor {name!r} ends at byte {end} of {data}")
                end_before = end
            self.data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
            self.base = 8 + length

    def get(self, name):
        """A tensor, its values still in the file until they are looked at."""
        dtype, shape, start, end = self.entries[name]
        if start == end:
            return torch.empty(shape, dtype=DTYPES[dtype])
        return torch.frombuffer(self.data, dtype=DTYPES[dtype], count=math.prod(shape), offset=self.base + start).view(shape)


def write_safetensors(path, tensors):
    """Write {name: tensor or function that makes it, with its dtype and shape} atomically.

    `tensors` is [(name, dtype, shape, get)]: `get()` is called when its turn comes, so that one tensor is in memory at a time.
    Returns [size, SHA-256] of the file.
    """
    header, at = {"__metadata__": {"format": "pt"}}, 0
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, dtype, shape, _ in tensors:
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path, "wb") as f:
        checksum = hashlib.sha256(head := len(text).to_bytes(8, "little") + text)
        f.write(head)
        for name, dtype, shape, get in tensors:
            tensor = get().detach().to("cpu", dtype).contiguous()
            assert tensor.shape == torch.Size(shape), (name, tensor.shape, shape)
            raw = tensor.view(-1).view(torch.uint8).numpy()
            checksum.update(raw)
            f.write(raw)
    return [8 + len(text) + at, checksum.hexdigest()]


class Weights:
    """The tensors of a Hugging Face folder: model.safetensors, or shards named by model.safetensors.index.json."""

    def __init__(self, folder):
        folder = Path(folder)
        index = folder / "model.safetensors.index.json"
        if (folder / "model.safetensors").is_file():
            files = {"model.safetensors"}
        elif index.is_file():
            files = set(read_json(index).get("weight_map", {}).values())
            bad = [f for f in files if "/" in f or not (folder / f).is_file()]
            if bad or not files:
                raise UserError(f"{index}: names shards that are not there: {', '.join(sorted(bad)) or 'none named'}")
        else:
            raise UserError(f"{folder}: no weights there (no model.safetensors, no model.safetensors.index.json)")
        self.where = {}
        for file in (Safetensors(folder / f) for f in sorted(files)):
            for name in file.entries:
                if name in self.where:
                    raise UserError(f"{file.path}: tensor {name!r} stands in two shards")
                self.where[name] = file

    def shape(self, name):
        return self.where[name].entries[name][1]

    def dtype(self):
        """The dtype in which most of the parameters are stored."""
        bytes_of = {}
        for name, file in self.where.items():
            dtype, shape, *_ = file.entries[name]
            bytes_of[dtype] = bytes_of.get(dtype, 0) + math.prod(shape)
        return DTYPES[max(bytes_of, key=bytes_of.get)]

    def get(self, name):
        return self.where[name].get(name)

    def release(self):
        """Give the pages read so far back: a tensor of which a slice was copied does not stay in memory."""
        for file in set(self.where.values()):
            file.data.madvise(mmap.MADV_DONTNEED)


class MetaWeights:
    """Meta's layout under the published names: params.json, and consolidated.NN.pth files that each hold a slice of every tensor.

    Rows of q and k are put into the half-split order of `rotate`. Pickles are read with weights_only: code in one is refused.
    """

    def __init__(self, folder):
        folder = Path(folder)
        self.shards = []
        for path in sorted(folder.glob("consolidated.*.pth")):
            try:
                self.shards.append(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
            except Exception as e:                         # a truncated zip, a pickle with code in it, no pickle at all
                raise UserError(f"{path}: not a checkpoint of plain tensors ({type(e).__name__}: {str(e).splitlines()[0][:150]})")
        if not self.shards:
            raise UserError(f"{folder}: no weights there (no consolidated.00.pth beside params.json)")
        p = read_json(folder / "params.json")
        try:
            self.config = self._config(p, self.shards[0])
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"{folder}: params.json and consolidated.00.pth are not a LLaMA's ({type(e).__name__}: {e})")
        theirs = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
                  "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
                  "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers"}
        self.where = {}
        for name in published_names(self.config):
            meta = name
            for ours, key in theirs.items():
                meta = meta.replace(ours, key)
            if all(meta in shard for shard in self.shards):
                self.where[name] = meta
        known = {*self.where.values(), "rope.freqs", *(["output.weight"] if self.config.tied else [])}
        self.where |= {name: name for name in self.shards[0] if name not in known}       # shown to load_weights as unexpected

    def _config(self, p, first):
        n, dim = len(self.shards), p["dim"]
        embedding, output = first["tok_embeddings.weight"], first.get("output.weight")
        vocab = embedding.shape[0] * (n if embedding.shape[1] == dim and n > 1 else 1)
        scaling = {"factor": p.get("rope_scale_factor", 8), "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192} if p.get("use_scaled_rope") else {}
        return llama(p["n_layers"], p["n_heads"], dim, first["layers.0.feed_forward.w1.weight"].shape[0] * n, n_kv_head=p.get("n_kv_heads") or p["n_heads"], vocab_size=vocab,
                     context=p.get("max_seq_len", 2048), norm_eps=p.get("norm_eps", 1e-5), rope_theta=float(p.get("rope_theta", 10000.0)), rope_scaling=tuple(sorted(scaling.items())),
                     tied=output is None or n == 1 and output.shape == embedding.shape and torch.equal(output, embedding))

    def dtype(self):
        return self.shards[0]["tok_embeddings.weight"].dtype

    def shape(self, name):
        return self.get(name).shape

    def get(self, name):
        meta = self.where[name]
        pieces = [shard[meta] for shard in self.shards]
        if len(pieces) == 1 or pieces[0].dim() == 1:       # norms stand in every file
            tensor = pieces[0]
        else:                                              # row-parallel layers are cut along their inputs, LLaMA 1's embedding along its width
            along_inputs = meta.endswith(("wo.weight", "w2.weight")) or meta == "tok_embeddings.weight" and pieces[0].shape[1] != self.config.n_embd
            tensor = torch.cat(pieces, int(along_inputs))
        if meta.endswith(("wq.weight", "wk.weight")):
            rows, width = tensor.shape
            tensor = tensor.view(-1, self.config.head_dim // 2, 2, width).transpose(1, 2).reshape(rows, width)
        return tensor

    def release(self):
        """torch's own mapping is given back with the shards."""


def open_weights(folder):
    """The tensors of a checkpoint folder, in either layout."""
    return MetaWeights(folder) if is_meta(folder) else Weights(folder)


def is_meta(folder):
    """Is it in Meta's layout?"""
    return (Path(folder) / "params.json").is_file() and not (Path(folder) / "config.json").is_file()


@functools.cache
def whole_shapes(c):
    """{our parameter name: shape of the whole tensor} of a Config."""
    with torch.device("meta"):
        return {n: p.shape for n, p in Transformer(c).named_parameters()}


def published_shape(shapes, parts, transposed):
    """Shape of the published tensor that our parameters `parts` make up, one behind the other along their outputs."""
    shape = (sum(shapes[p][0] for p in parts), *shapes[parts[0]][1:])
    return shape[::-1] if transposed else shape


def load_weights(model, weights, config, where):
    """Fill `model` from the published tensors of a checkpoint of Config `config`, each rank reading its own slice.

    Where the model has more rows of vocabulary than the checkpoint (§4.1's special tokens), the new ones are the mean of the old
    (not stated in the paper; Hewitt 2021).
    A missing, unexpected or misshapen tensor is an error that names it.
    """
    ours, shapes, grown, names = dict(model.named_parameters()), whole_shapes(config), whole_shapes(model.config), published_names(config)
    prefix = "" if any(n in weights.where for n in names) else "transformer."      # the original GPT-2 files lack the prefix
    ignorable = {"lm_head.weight"} if config.tied else set()
    unexpected = [n for n in weights.where if prefix + n not in names and n not in ignorable and not n.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq"))]
    missing = [n for n in names if n.removeprefix(prefix) not in weights.where]
    for kind, list_ in (("missing", missing), ("unexpected", unexpected)):
        if list_:
            raise UserError(f"{where}: {kind} tensor {list_[0]!r}" + (f" and {len(list_) - 1} more" if list_[1:] else ""))
    with torch.no_grad():
        for name, (parts, transposed) in names.items():
            tensor = weights.get(name.removeprefix(prefix))
            want = published_shape(shapes, parts, transposed)
            if tensor.shape != want:
                raise UserError(f"{where}: tensor {name!r} has shape {list(tensor.shape)}, the config wants {list(want)}")
            tensor = tensor.T if transposed else tensor
            for part, piece in zip(parts, tensor.split([shapes[p][0] for p in parts])):
                p, mine = ours[part], local(ours[part])
                at = held(p, grown[part], model.tp.cut(model.config, part))
                old = min(max(0, len(piece) - at[0].start), len(mine))                      # rows of this process that the checkpoint has
                mine[:old] = piece[at]
                if old < len(mine):
                    mine[old:] = piece.mean(0, dtype=torch.float32).to(mine)
            weights.release()


def checkpoint_folder(name):
    """A folder as it is; the name of a preset that is no folder stands for weights/NAME."""
    return f"weights/{name}" if name in PRESETS and not Path(name).is_dir() else name


def read_config(folder):
    """(Config, config.json as a dict) of a checkpoint folder; Meta's layout has no such dict."""
    path = Path(folder) / "config.json"
    if is_meta(folder):
        return MetaWeights(folder).config, {}
    if not path.is_file():
        raise UserError(f"{folder}: no checkpoint there (no config.json)" + (f"; get it with: python data.py fetch {Path(folder).name}" if Path(folder).name in PRESETS else f"; presets are {', '.join(PRESETS)}"))
    d = read_json(path)
    return config_from_hf(d, path), d


def empty_model(config, device, dtype, compute, attention_path="sdpa", tp=TensorParallel(), mesh=None):
    """A Transformer of parameters in `dtype` that nothing has been written into yet, spread over `mesh` where there is one; nothing is allocated twice."""
    with torch.device("meta"):
        model = Transformer(config, compute, attention_path, tp).to(dtype)
    if mesh:
        shard(model, mesh)
    model = model.to_empty(device=device)
    if config.position == "rotary":
        model.frequency = rotary_frequencies(config).to(device)                             # a buffer, emptied like the rest
    return model


def load(folder, device="cpu", dtype=None):
    """A checkpoint as a model for inference; dtype None keeps the one in which it is stored."""
    config, weights = read_config(folder)[0], open_weights(folder)
    dtype = dtype or weights.dtype()
    model = empty_model(config, device, dtype, dtype)
    load_weights(model, weights, config, folder)
    return model.eval().requires_grad_(False)


def save_checkpoint(folder, config, get, dtype, tokenizer=None, template=None, writes=True):
    """Write the Hugging Face layout; `get(our parameter name)` returns the whole tensor, and is called once each in one order.

    config.json is written last: a folder with one is complete. Under parallelism every rank calls this, one `writes`.
    """
    if not writes:
        for parts, _ in published_names(config).values():
            for p in parts:
                get(p)
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def published(parts, transposed):
        tensor = torch.cat([get(p) for p in parts])
        return tensor.T if transposed else tensor
    shapes = whole_shapes(config)
    tensors = [(name, dtype, published_shape(shapes, *made), functools.partial(published, *made)) for name, made in published_names(config).items()]
    shards, size = [[]], 0
    for entry in tensors:
        n = math.prod(entry[2]) * dtype.itemsize
        if size + n > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += n
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0])
    else:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        for file, shard in zip(files, shards):
            write_safetensors(folder / file, shard)
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": sum(math.prod(e[2]) for e in tensors) * dtype.itemsize},
                                                             "weight_map": {e[0]: file for file, shard in zip(files, shards) for e in shard}})
    if tokenizer:
        tokenizer.export(folder, template)
    write_json(folder / "config.json", {**config_to_hf(config), "torch_dtype": str(dtype).removeprefix("torch."), **({"template": template} if template else {})})


# --- generation -----------------------------------------------------------------------------------------------------------------
# Rows live in slots of one cache. The prefix that all prompts share is computed once and never copied; when rows end,
# waiting prompts take their slots. Live rows are always slots 0 … n−1, so that every step works on a contiguous view.
# What would break it: a causal mask that is not aligned bottom-right behind a past; stale keys of a former row (harmless:
# they are overwritten before any query may see them); a refill that moves a row without its last token and position.

class Cache:
    """Keys and values: a shared prefix (KV, P, D) and `slots` rows of `capacity` positions behind it, per layer."""

    def __init__(self, model, slots, capacity):
        c, weight = model.config, model.embedding.weight
        self.k, self.v = (torch.zeros(c.n_layer, slots, c.n_kv_head, capacity, c.head_dim, dtype=model.compute, device=weight.device) for _ in range(2))
        self.prefix = [None] * c.n_layer
        self.new = [None] * c.n_layer

    def share(self, model, prefix):
        """Compute `prefix` (ids) once, for all rows."""
        if prefix:
            model.hidden(torch.tensor([prefix], device=self.k.device), attend=self.attend_prefill)
            self.prefix = [(k[0], v[0]) for k, v in self.new]

    def attend_prefill(self, i, q, k, v):
        """Prompts behind the prefix, right-padded: causality alone hides the padding."""
        self.new[i] = k, v
        if self.prefix[i] is None:
            return attention(q, k, v)
        (KV, P, D), T = self.prefix[i][0].shape, q.shape[2]
        causal = torch.ones(T, P + T, dtype=torch.bool, device=q.device).tril(P)            # aligned bottom-right
        rows = max(1, (1 << 26) // (KV * (P + T) * D))                                      # bounds the copies of the prefix, which the fused kernel is worth

        def part(r):
            k_, v_ = (torch.cat([p.expand(len(x), -1, -1, -1), x], 2) for p, x in zip(self.prefix[i], (k[r:r + rows], v[r:r + rows])))
            return F.scaled_dot_product_attention(q[r:r + rows], k_, v_, attn_mask=causal, enable_gqa=q.shape[1] != KV)
        return torch.cat([part(r) for r in range(0, len(q), rows)])

    def attend_step(self, at, length):
        """One token for each of the first len(at) rows, written at `at` (n,) behind the prefix; `length` ≥ max(at) + 1."""
        n = len(at)
        rows, mask = torch.arange(n, device=at.device), (torch.arange(length, device=at.device) <= at[:, None])[:, None]     # (n, 1, S)

        def attend(i, q, k, v):
            self.k[i][rows, :, at], self.v[i][rows, :, at] = k[:, :, 0], v[:, :, 0]
            return attend_with_prefix(q, self.k[i, :n, :, :length], self.v[i, :n, :, :length], mask, self.prefix[i])
        return attend


def attend_with_prefix(q, k, v, mask, prefix):
    """Attention over [prefix, own]: q (B, H, T, D), k and v (B, KV, S, D), mask (B or 1, T, S), prefix two of (KV, P, D) or None.

    The queries of all rows are folded into one product with the prefix's keys, which are read once for the whole batch.
    """
    B, H, T, D = q.shape
    KV, S, P = k.shape[1], k.shape[2], 0 if prefix is None else prefix[0].shape[1]
    q = (q * D ** -0.5).reshape(B, KV, -1, D)                                               # (B, KV, R·T, D)
    scores = (q @ k.transpose(-1, -2)).float().view(B, KV, H // KV, T, S).masked_fill(~mask[:, None, None], -torch.inf).view(B, KV, -1, S)
    if P:
        folded = q.transpose(0, 1).reshape(KV, -1, D)                                       # (KV, B·R·T, D)
        scores = torch.cat([(folded @ prefix[0].transpose(-1, -2)).float().view(KV, B, -1, P).transpose(0, 1), scores], -1)
    p = scores.softmax(-1).to(q.dtype)
    y = p[..., P:] @ v
    if P:
        y = y + (p[..., :P].transpose(0, 1).reshape(KV, -1, P) @ prefix[1]).view(KV, B, -1, D).transpose(0, 1)
    return y.reshape(B, H, T, D)


def shared_prefix(prompts):
    """How many first ids all prompts share, each keeping one of its own; 0 where they are too few to be worth a second product."""
    P = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1) if len(prompts) > 1 else 0
    return P if P >= 16 else 0


def uniform(seed, step):
    """A number in [0, 1) that depends on the row's seed and step alone, not on what else is in the batch (splitmix64)."""
    x = (seed * 0x9E3779B97F4A7C15 + (step + 1) * 0xD1B54A32D192ED03) & (1 << 64) - 1
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & (1 << 64) - 1
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & (1 << 64) - 1
    return (x ^ x >> 31) / 2**64


def sample(logits, temperature, top_k, top_p, u):
    """Next ids (n,) from logits (n, V): greedy at temperature 0, else the inverse CDF at u (n,), after top-k, then top-p."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits / temperature).softmax(-1).sort(-1, descending=True)                 # one sort serves all three
    if top_k:
        p[:, top_k:] = 0
    if top_p < 1:
        p[p.cumsum(-1) - p >= top_p * p.sum(-1, keepdim=True)] = 0
    total = p.cumsum(-1)
    pick = (total <= u.to(p)[:, None] * total[:, -1:]).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
    return order.gather(1, pick)[:, 0]


@torch.inference_mode()
def generate(model, prompts, max_new, *, temperature=0.0, top_k=0, top_p=1.0, seeds=None, eos=(), stop=None, slots=0, done=None):
    """New ids of each prompt (lists of ids), the ending EOS left out.

    `seeds`: one a prompt; the same prompt with the same seed gives the same sample whatever else is asked for (up to
    floating point). `stop(index, new_ids)` is asked after each token and ends the row when true. `done(index, new_ids)` is
    told of each finished row. `slots`: rows computed together; 0 takes what a cache of about 1 GiB (CPU) or half of the
    free memory (CUDA) holds. A prompt must be shorter than the context; it ends there at the latest.
    """
    c, device = model.config, model.embedding.weight.device
    if not prompts:
        return []
    for prompt in prompts:
        if not 0 < len(prompt) < c.context:
            raise UserError(f"a prompt of {len(prompt)} tokens does not fit the context of {c.context} tokens")
    seeds = seeds or [0] * len(prompts)
    eos = set(eos)
    P = shared_prefix(prompts)
    limit = [min(max_new, c.context - len(p)) for p in prompts]
    capacity = max(len(p) - P + n for p, n in zip(prompts, limit))
    if not slots:
        row = 2 * c.n_layer * c.n_kv_head * c.head_dim * capacity * model.compute.itemsize
        budget = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 1 << 30
        slots = max(1, min(budget // row, 256 if device.type == "cuda" else 64))
    slots = min(slots, len(prompts))
    cache = Cache(model, slots, capacity)

    def choose(h, rows):
        u = torch.tensor([uniform(seeds[r], len(new[r])) for r in rows], dtype=torch.float64) if temperature else None
        return sample(model.project(h).float(), temperature, top_k, top_p, None if u is None else u.to(device))

    cache.share(model, prompts[0][:P])
    queue = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]), reverse=True)     # popped from the end: short ones first, twins together
    new = [[] for _ in prompts]
    live, last, at = [], [], []                                                             # prompt, last token, position behind the prefix, per slot

    def settle(index, token):
        """Take a new token for prompt `index`; True when the row has ended."""
        if token in eos:
            ended = True
        else:
            new[index].append(token)
            ended = len(new[index]) >= limit[index] or (stop is not None and stop(index, new[index]))
        if ended and done:
            done(index, new[index])
        return ended

    while queue or live:
        free = slots - len(live)
        if queue and (free >= max(1, slots // 4) or not live):
            rows = [queue.pop() for _ in range(min(free, len(queue)))]
            unique = {}
            source = [unique.setdefault(tuple(prompts[r][P:]), len(unique)) for r in rows]
            T = max(map(len, unique))
            ids = torch.tensor([[*u, *[0] * (T - len(u))] for u in unique], device=device)
            h = model.hidden(ids, torch.arange(P, P + T, device=device), cache.attend_prefill)
            index, n = torch.tensor(source, device=device), len(live)
            for i, (k, v) in enumerate(cache.new):
                cache.k[i, n:n + len(rows), :, :T], cache.v[i, n:n + len(rows), :, :T] = k[index], v[index]
            ends = torch.tensor([len(u) - 1 for u in unique], device=device)
            tokens = choose(h[torch.arange(len(unique), device=device), ends][index], rows).tolist()
            live += rows
            at += [len(prompts[r]) - P - 1 for r in rows]
            last += tokens
            fresh = range(n, n + len(rows))
        else:
            idle = [0] * (min(slots, -(-len(live) // 8) * 8) - len(live))                   # few batch sizes: oneDNN compiles for each
            position = torch.tensor(at + idle, device=device)
            length = min(capacity, -(-(max(at) + 1) // 64) * 64)
            h = model.hidden(torch.tensor(last + idle, device=device)[:, None], (position + P)[:, None], cache.attend_step(position, length))
            last = choose(h[:len(live), 0], live).tolist()
            fresh = range(len(live))
        for slot in reversed(fresh):
            at[slot] += 1
            if settle(live[slot], last[slot]):                                              # the last live row moves into the hole
                end = len(live) - 1
                if slot != end:
                    filled = at[end]
                    cache.k[:, slot, :, :filled], cache.v[:, slot, :, :filled] = cache.k[:, end, :, :filled], cache.v[:, end, :, :filled]
                    live[slot], last[slot], at[slot] = live[end], last[end], at[end]
                live.pop(), last.pop(), at.pop()
    return new


@torch.inference_mode()
def last_states(model, prompts, batch=2048):
    """Yield (indices, normed states (n, C) behind the last ids of those prompts), about `batch` ids of theirs at a time.

    What the prompts share is computed once: five-shot multiple choice costs its questions alone. Prompts fill the context at most.
    """
    device, P = model.embedding.weight.device, shared_prefix(prompts)
    cache = Cache(model, 0, 0)
    cache.share(model, prompts[0][:P])
    queue = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)        # neighbours of one length need little padding
    while queue:
        T = len(prompts[queue[0]]) - P
        rows, queue = queue[:max(1, batch // T)], queue[max(1, batch // T):]
        ids = torch.tensor([[*prompts[r][P:], *[0] * (P + T - len(prompts[r]))] for r in rows], device=device)
        h = model.hidden(ids, torch.arange(P, P + T, device=device), cache.attend_prefill)
        yield rows, h[torch.arange(len(rows), device=device), torch.tensor([len(prompts[r]) - P - 1 for r in rows], device=device)]


# --- devices, the program -------------------------------------------------------------------------------------------------------------

def pick_device(name):
    """auto: a GPU where there is one; under torchrun each rank its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA GPU that torch can use")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


def pick_dtype(name, device):
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    return {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def prompt_ids(messages, tokenizer, template):
    """Ids behind which the answer is generated; `plain` is the bare text of the turns, for base models."""
    if template == "plain":
        return [*[tokenizer.bos] * adds_bos(tokenizer.folder), *tokenizer.encode("\n\n".join(m["content"] for m in messages))]
    missing = [s for s in SPECIAL[template] if s not in tokenizer.added]
    if missing:
        raise UserError(f"{tokenizer.folder}: template {template!r} needs {', '.join(missing)} in the vocabulary; this checkpoint was not trained with it (--template plain)")
    return render(messages, tokenizer, template, answer=True)[0]


def template_of(folder, asked):
    """The template asked for, else the one in the checkpoint's config, else plain."""
    return asked or read_config(folder)[1].get("template", "plain")


def fit_context(prompt, context, max_new):
    """The prompt's last tokens, as many as leave room for `max_new` new ones, or for half the context where that is less."""
    return prompt[-(context - min(max_new, context // 2)):]


def reply(model, tokenizer, conversations, template, args, seeds):
    """Answers to conversations: [(text, "stop" or "length", tokens that the prompt lost from the left)]; a bare text gets a line break before its continuation."""
    end = "\n" if template == "plain" else ""
    whole = [prompt_ids([*m[:-1], {**m[-1], "content": m[-1]["content"] + end}], tokenizer, template) for m in conversations]
    prompts = [fit_context(p, model.config.context, args.max_new) for p in whole]
    with tqdm(total=len(prompts), desc="generate", unit=" replies", disable=None) as bar:
        out = generate(model, prompts, args.max_new, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seeds=seeds,
                       eos=[tokenizer.eos], done=lambda i, ids: bar.update(), stop=stop_rule(tokenizer, args.stop) if args.stop else None)
    return [(cut(continuation(tokenizer, p, ids), args.stop), "length" if len(ids) == min(args.max_new, model.config.context - len(p)) else "stop", len(w) - len(p)) for w, p, ids in zip(whole, prompts, out)]


def chat(model, tokenizer, template, args):
    """Talk to a checkpoint: replies are streamed, Ctrl-C stops one, Ctrl-D ends. Only whole characters are printed, and no control characters."""
    messages, turn = [], 0
    while True:
        try:
            messages.append({"role": "user", "content": input("> ")})
        except (EOFError, KeyboardInterrupt):
            return print()
        while len(prompt := prompt_ids(messages, tokenizer, template)) + args.max_new > model.config.context and len(messages) > 2:
            messages = messages[2:]                        # the oldest turn leaves the context
        prompt, shown = fit_context(prompt, model.config.context, args.max_new), ""

        def stream(_, new):
            nonlocal shown
            text = continuation(tokenizer, prompt, new).rstrip("\ufffd")      # a character whose last bytes are still to come
            print(visible(text[len(shown):]), end="", flush=True)
            shown = text
            return any(s in text for s in args.stop)
        with contextlib.suppress(KeyboardInterrupt):
            generate(model, [prompt], args.max_new, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seeds=[args.seed + turn], eos=[tokenizer.eos], stop=stream)
        print()
        messages.append({"role": "assistant", "content": cut(shown, args.stop)})
        turn += 1


def info(name):
    """Print the shape, size and cost of a preset or checkpoint."""
    config = PRESETS[name] if name in PRESETS else read_config(name)[0]
    rows = [[key, value] for key, value in vars(config).items()]
    rows += [["parameters", f"{n_parameters(config):,}"], ["forward GFLOPs a token at full context", f"{flops_per_token(config, config.context) / 1e9:.2f}"],
             ["training GFLOPs a token", f"{3 * flops_per_token(config, config.context) / 1e9:.2f}"]]
    print_table([["field", name], *rows])
    print_table([["tensor", "shape"]] + [[n, " × ".join(map(str, shape))] for n, shape in whole_shapes(config).items() if ".0." in n or "blocks" not in n])


def export(folder, out, dtype):
    """Write a checkpoint of either layout in that of Hugging Face."""
    if Path(out).exists():
        raise UserError(f"--out {out} exists already; choose another folder")
    (config, d), weights = read_config(folder), open_weights(folder)
    model = empty_model(config, "cpu", weights.dtype(), weights.dtype())
    load_weights(model, weights, config, folder)
    state = dict(model.named_parameters())
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as e:
        tokenizer = print(f"{e}: exported without a tokenizer", file=sys.stderr)
    save_checkpoint(out, config, lambda n: state[n], weights.dtype() if dtype == "auto" else getattr(torch, dtype), tokenizer, d.get("template"))
    print(f"{out}: {n_parameters(config):,} parameters")


def main():
    parser = Parser(description="Shapes of a model, and text from one.", example="python model.py info llama7b")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    p = commands.add_parser("info", help="shapes, parameters and FLOPs of a preset or checkpoint", example="python model.py info gpt2-xl")
    p.add_argument("model", help=f"a checkpoint folder, or {', '.join(PRESETS)}")
    for name, text in (("generate", "a checkpoint's answers to a file of prompts"), ("chat", "talk to a checkpoint")):
        files = " --prompts heldout.jsonl --out replies.jsonl" if name == "generate" else ""
        p = commands.add_parser(name, help=text, example=f"python model.py {name} --model runs/llama7b{files}")
        p.add_argument("--model", required=True, metavar="DIR", help="a checkpoint folder, or a preset whose files lie in weights/")
        if files:
            p.add_argument("--prompts", required=True, metavar="FILE", help="JSON lines with messages, or with a prompt")
            p.add_argument("--out", required=True, metavar="FILE")
            p.add_argument("--samples", type=positive, default=1, help="replies a prompt")
        p.add_argument("--template", choices=list(SPECIAL), help="None takes the checkpoint's own, else plain")
        p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end a reply before this text; may be given several times")
        p.add_argument("--temperature", type=real, default=0.7, help="0 is greedy; not stated in the paper, this and --max-new are Vicuna's")
        p.add_argument("--top-p", type=real, default=1.0, help="sample from the likeliest tokens that make up this share; 1 is off")
        p.add_argument("--top-k", type=natural, default=0, help="sample from so many of the likeliest tokens; 0 is off")
        p.add_argument("--max-new", type=positive, default=512, help="tokens of a reply at most")
        p.add_argument("--seed", type=natural, default=0, help="of the sampling")
        add_device_flags(p)
    p = commands.add_parser("export", help="write a checkpoint of either layout in that of Hugging Face", example="python model.py export --model llama-2-7b --out llama-2-7b-hf")
    p.add_argument("--model", required=True, metavar="DIR")
    p.add_argument("--out", required=True, metavar="DIR")
    p.add_argument("--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto", help="auto keeps the stored one")
    args = parser.parse_args()
    if args.command == "info":
        return info(args.model)
    if args.command == "export":
        return export(checkpoint_folder(args.model), args.out, args.dtype)
    args.model = checkpoint_folder(args.model)
    prompts, device = read_prompts(args.prompts) if args.command == "generate" else None, pick_device(args.device)
    template, tokenizer = template_of(args.model, args.template), load_tokenizer(args.model)
    model = load(args.model, device, pick_dtype(args.dtype, device)).fuse()
    if args.command == "chat":
        return chat(model, tokenizer, template, args)
    if args.samples > 1:
        prompts = [{**p, "id": f"{p['id']}/{k}"} for p in prompts for k in range(args.samples)]
    answers = reply(model, tokenizer, [p["messages"] for p in prompts], template, args, [int(digest(args.seed, p["id"]), 16) & (1 << 63) - 1 for p in prompts])
    write_jsonl(args.out, ({"id": p["id"], "source": str(args.model), **({"category": p["category"]} if "category" in p else {}),
                            "messages": [*p["messages"], {"role": "assistant", "content": text}], "finish": finish, **({"lost_tokens": lost} if lost else {})} for p, (text, finish, lost) in zip(prompts, answers)))
    cut_off, too_long = sum(finish == "length" for _, finish, _ in answers), sum(lost > 0 for *_, lost in answers)
    print(f"{args.out}: {len(answers)} replies, {cut_off} cut off at {args.max_new} tokens" + f"; {too_long} prompts were too long for the context and lost their beginning" * bool(too_long))


if __name__ == "__main__":
    run(main)
