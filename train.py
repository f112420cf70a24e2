"""Fine-tuning on imitation data (paper §4.1; what it leaves open is read in EasyLM, the training code it names).

    torchrun --nproc_per_node=8 train.py --model llama7b --data data/sharegpt-mix/llama7b --out runs/llama7b

Parameters, moments and the update are float32, the rest is computed in --dtype (not stated in the paper). NQ-synthetic has a recipe
of its own, which is ours: its 0.3M tokens would be 4.6 packed steps, so each of the 6,000 pairs is a row, 188 steps with a warm-up
of six: --one-per-row --warmup 3%.

In this file:
    recipe         flags and their defaults, the learning-rate schedule
    data order     which blocks make up a step, replayed text among them; each token's weight in the loss
    ranks          data-parallel × tensor-parallel processes
    plan           bytes, FLOPs and hours of a run before anything is loaded; what would fit
    optimizer      update scaled by the magnitude of each weight; AdamW
    checkpoints    float32 master and both moments as whole tensors; what resuming needs
    training       the loop, the program
"""
import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import (Failure, Packed, Parser, UserError, add_device_flags, atomic_dir, count, file_hash, fingerprint, load_tokenizer, locked, natural, positive, print_table, read_json, real, run,
                  same_settings, tokenizer_files, write_json)
from model import (LOGITS, PRESETS, Safetensors, TensorParallel, Transformer, config_from_hf, empty_model, flops_per_token, held, is_meta, load_weights, local, n_parameters,
                   open_weights, pick_attention, pick_device, pick_dtype, published_names, read_config, region, save_checkpoint, whole, whole_shapes, write_safetensors)


# --- recipe ---------------------------------------------------------------------------------------------------------------

def parse_args():
    p = Parser(description="Fine-tune a base model on packed conversations. The same command continues a run that was killed.",
               example="torchrun --nproc_per_node=8 train.py --model llama7b --tokens 20M")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help=f"the base: a checkpoint folder, or {', '.join(PRESETS)}")
    what.add_argument("--init", metavar="CONFIG.json", help="train from random weights of this shape (vocab_size is the tokenizer's)")
    p.add_argument("--weights", default="weights", metavar="DIR", help="where presets' checkpoints lie: DIR/llama7b")
    p.add_argument("--data", metavar="DIR", help="packed data; None is data/sharegpt-mix/MODEL")
    p.add_argument("--out", metavar="DIR", help="None is runs/MODEL")
    p.add_argument("--tokens", type=count, metavar="N", help="use the first N tokens of the stream (Table 2 and the figures: 20M, 80M, 150M); None is all")
    p.add_argument("--epochs", type=positive, default=1, help="§4.1: one")
    p.add_argument("--block", type=positive, default=2048, help="tokens a block (§4.1); the model's context where that is shorter")
    p.add_argument("--batch", type=positive, default=32, metavar="BLOCKS", help="blocks a step (§4.1)")
    p.add_argument("--batch-tokens", type=count, metavar="N", help="tokens a step instead of --batch: 65536 holds the paper's step where the context is shorter than 2048 (GPT-2; not stated in the paper)")
    p.add_argument("--micro-batch", type=natural, default=0, metavar="BLOCKS", help="blocks computed at once on a device; 0 is what fits of the device's share")
    p.add_argument("--one-per-row", action="store_true", help="one conversation a row instead of one stream cut into blocks; ours, for NQ-synthetic")
    p.add_argument("--optimizer", choices=["scaled", "adamw"], default="scaled", help="scaled: updates re-scaled by the magnitude of each weight (§4.1), EasyLM's Adafactor")
    p.add_argument("--lr", type=real, default=2e-3, help="§4.1; for `scaled` a step relative to each tensor's RMS")
    p.add_argument("--warmup", type=steps_or_share, default=1000, metavar="STEPS", help="linear from 0 (§4.1); 3%% is that share of the run")
    p.add_argument("--decay", choices=["constant", "cosine", "linear"], default="constant", help="after the warm-up; not stated in the paper, and at 20M tokens nothing comes after it. EasyLM's is cosine")
    p.add_argument("--end-lr", type=real, default=0.0, help="where --decay cosine or linear ends; not stated in the paper")
    p.add_argument("--weight-decay", type=real, default=1e-4, help="decoupled; not stated in the paper, EasyLM's default")
    p.add_argument("--clip", type=real, default=1.0, help="global gradient norm; not stated in the paper, EasyLM's default")
    p.add_argument("--attention", choices=["auto", "eager", "sdpa", "blocked", "triton"], default="auto",
                   help="auto is torch's sdpa, but the Triton kernel for --doc-mask on a GPU, and blocks of queries for short rows in bfloat16 on a CPU")
    p.add_argument("--doc-mask", action="store_true", help="no attention across conversations in a block; off in EasyLM")
    p.add_argument("--loss-norm", choices=["row", "token"], default="row", help="row: mean over blocks of each block's mean (EasyLM); token: mean over loss tokens")
    p.add_argument("--seed", type=natural, default=0, help="of the order of blocks (not stated in the paper), and of the weights with --init")
    p.add_argument("--save-every", type=natural, default=250, metavar="STEPS", help="resumable state; 0 only at the end")
    p.add_argument("--keep", type=positive, default=2, help="resumable states kept")
    p.add_argument("--replay", type=share_of_blocks, default=0.0, metavar="FRACTION", help="share of the blocks that is pre-training text from --replay-data, on top of the imitation data: the paper's open question")
    p.add_argument("--replay-data", metavar="DIR", help="packed {\"text\"} lines")
    p.add_argument("--kl", type=real, default=0.0, metavar="BETA", help="weight of KL(base‖model) on the positions that carry loss: the same question")
    p.add_argument("--eval-data", metavar="DIR", help="packed data whose loss is logged")
    p.add_argument("--eval-every", type=positive, default=250, metavar="STEPS")
    p.add_argument("--dp", choices=["auto", "ddp", "fsdp"], default="auto", help="data parallelism under torchrun: replicas, or parameters spread over the ranks (§4.1); auto is ddp where that fits")
    p.add_argument("--tp", type=positive, default=1, metavar="N", help="ranks that share one model (§4.1); they multiply with the data-parallel ones")
    p.add_argument("--recompute", action="store_true", help="activation checkpointing: keep each block's input, compute the rest again in the backward pass")
    p.add_argument("--compile", action="store_true", help="torch.compile each block (GPU)")
    p.add_argument("--plan", action="store_true", help="print memory, FLOPs and hours of the run, and stop; needs no weights, no data, no GPU")
    p.add_argument("--world", type=positive, metavar="N", help="ranks of --plan; None is torchrun's")
    add_device_flags(p)
    args = p.parse_args()
    name = Path(args.model or args.init).name.removesuffix(".json")
    args.data = args.data or f"data/sharegpt-mix/{name}"
    args.out = args.out or f"runs/{name}"
    args.base = str(Path(args.weights) / args.model) if args.model in PRESETS else args.model
    if bool(args.replay) != bool(args.replay_data):
        p.error("--replay FRACTION and --replay-data DIR belong together")
    if args.kl and args.init:
        p.error("--kl: a model from random weights has no base to stay close to; it goes with --model")
    return args


def steps_or_share(text):
    """An argparse type: '1000' -> 1000 steps, '3%' -> 0.03, a share of the run's."""
    return real(text[:-1]) / 100 if text.endswith("%") else natural(text)


def share_of_blocks(text):
    """An argparse type: a fraction below 1."""
    if not (value := real(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction below 1")
    return value


def learning_rate(args, step, steps):
    """Linear warm-up from 0 at step 0 (§4.1; as optax's schedules), then constant or decayed to end_lr at the last step."""
    if step < args.warmup:
        return args.lr * step / args.warmup
    if args.decay == "constant":
        return args.lr
    x = (step - args.warmup) / max(1, steps - args.warmup)
    fall = (1 + math.cos(math.pi * x)) / 2 if args.decay == "cosine" else 1 - x
    return args.end_lr + (args.lr - args.end_lr) * fall


# --- data order -------------------------------------------------------------------------------------------------------------

class Blocks:
    """The blocks of a run (§4.1) and their order: a permutation per epoch, a function of (seed, epoch, step) alone.

    `replay`, Blocks of pre-training text: as many of them are mixed in as make up `fraction` of all, in an order drawn once.
    """

    def __init__(self, folder, block, tokens=None, one_per_row=False, replay=None, fraction=0.0, seed=0):
        self.packed, self.block, self.one_per_row, self.replay = Packed(folder), block, one_per_row, replay
        total = len(self.packed.tokens)
        if tokens is not None and tokens > total:
            raise UserError(f"--tokens {tokens}: {folder} holds only {total} tokens")
        self.n_tokens = total if tokens is None else tokens
        if one_per_row:                                                # conversations that lie in the prefix
            ends = np.append(self.packed.starts[1:], total)
            self.n = int(np.searchsorted(ends, self.n_tokens, "right"))
            self.cut_off = int((np.diff(np.append(self.packed.starts, total))[:self.n] > block + 1).sum())
        else:
            self.n = (min(self.n_tokens + 1, total) - 1) // block
        if not self.n:
            raise UserError(f"{folder}: {self.n_tokens} tokens do not fill one {'row' if one_per_row else 'block'} of {block}; use a smaller --block or more data")
        self.n_replay = round(self.n * fraction / (1 - fraction)) if replay else 0
        self.replayed = np.resize(np.random.default_rng([seed, 1 << 32]).permutation(replay.n), self.n_replay) if replay else None

    def rows_of_step(self, seed, step, batch):
        """Indices of the blocks of a step, replayed ones from n on; the last step of an epoch takes what is left."""
        total = self.n + self.n_replay
        epoch, at = divmod(step, -(-total // batch))
        return np.random.default_rng([seed, epoch]).permutation(total)[at * batch:(at + 1) * batch]

    def read(self, rows):
        """(inputs, targets, loss_mask) of blocks, each (rows, block)."""
        def one(i):
            if i >= self.n:
                return self.replay.packed.block(self.replayed[i - self.n], self.block)
            return self.packed.row(i, self.block) if self.one_per_row else self.packed.block(i, self.block)
        return tuple(np.stack(x) for x in zip(*map(one, rows))) if len(rows) else tuple(np.zeros((0, self.block), np.uint8) for _ in range(3))

    def count(self, rows):
        """Tokens of blocks, imitation and replayed ones; padding is none."""
        own = rows[rows < self.n]
        replayed = (len(rows) - len(own)) * self.block
        if not self.one_per_row:
            return len(own) * self.block, replayed
        ends = np.append(self.packed.starts, len(self.packed.tokens))
        return int(np.minimum(ends[own + 1] - ends[own], self.block).sum()), replayed

    def conversation_starts(self, rows):
        """For each position of each block, where its conversation begins in the block: (rows, block), int32."""
        out = np.zeros((len(rows), self.block), np.int32)
        for row, i in zip(out, rows):
            packed, i = (self.packed, i) if i < self.n else (self.replay.packed, self.replayed[i - self.n])
            if packed is self.packed and self.one_per_row:
                continue
            starts = packed.starts[slice(*np.searchsorted(packed.starts, [i * self.block, (i + 1) * self.block]))] - i * self.block
            row[starts] = starts
            np.maximum.accumulate(row, out=row)
        return out


def loss_weights(mask, norm):
    """Weight of each target so that Σ weights · loss is the batch's loss; mask (rows, block) of the GLOBAL batch.

    row: the mean over blocks of each block's mean over its loss tokens; a block without loss tokens counts as 0 (EasyLM).
    token: the sum over all loss tokens divided by their number.
    """
    mask = mask.astype(np.float32)
    if norm == "token":
        return mask / max(1.0, mask.sum())
    return mask / np.maximum(mask.sum(1, keepdims=True), 1) / len(mask)


def share(args, blocks, step, rank, world):
    """Part `rank` of `world` of a step: a list of micro-batches (ids, targets, weights, with --doc-mask starts), and the global counts (imitation tokens, replayed, with loss).

    Every rank gets equally many micro-batches of equally many rows; where rows run out, rows of weight 0 stand in.
    """
    rows = blocks.rows_of_step(args.seed, step, args.batch)
    mine = rows[rank::world]
    ids, targets, mask = blocks.read(rows)                             # all of the batch: its mask decides each rank's weights
    ids, targets, weights = (x[rank::world] for x in (ids, targets, loss_weights(mask, args.loss_norm)))
    each = -(-len(rows) // world)
    micro = min(args.micro_batch or each, each)
    padding = -(-each // micro) * micro - len(mine)
    arrays = [ids.astype(np.int64), targets.astype(np.int64), weights, *([blocks.conversation_starts(mine)] if args.doc_mask else [])]
    tensors = [torch.from_numpy(np.pad(x, ((0, padding), (0, 0)))) for x in arrays]
    return list(zip(*(t.split(micro) for t in tensors))), (*blocks.count(rows), int(mask.sum()))


# --- ranks ----------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Ranks:
    """This process among dp × tp: every `tp` ranks in a row share one model, the data goes by the dp coordinate."""
    rank: int = 0
    world: int = 1
    dp: int = 0
    dp_size: int = 1
    dp_group: object = None
    mesh: object = None                                                # of the data-parallel ranks, where parameters are spread over them
    tp: TensorParallel = TensorParallel()

    def gather(self, value):
        """The values of all ranks, in order of rank."""
        if self.world == 1:
            return [value]
        out = [None] * self.world
        dist.all_gather_object(out, value)
        return out


def start_ranks(args, device):
    """This process's Ranks under torchrun, process groups started; the default ones without it."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return Ranks()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    mesh = dist.init_device_mesh(device.type, (world // args.tp, args.tp), mesh_dim_names=("dp", "tp"))
    dp, tp = mesh["dp"], mesh["tp"]
    return Ranks(rank, world, dp.get_local_rank(), dp.size(), dp.get_group(), dp if args.dp == "fsdp" and dp.size() > 1 else None,
                 TensorParallel(tp.get_local_rank(), args.tp, tp.get_group() if args.tp > 1 else None))


# --- plan -----------------------------------------------------------------------------------------------------------------------

PEAK_FLOPS = {"B200": 2.25e15, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}       # dense bfloat16, from the makers' sheets


def saved_bytes(forward, parameters):
    """Bytes that autograd keeps of a forward pass, each storage once and the parameters left out; meta tensors do."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage()._cdata, t) is None or t, lambda t: t):
        forward()
    for p in parameters:
        kept.pop(p.untyped_storage()._cdata, None)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@functools.cache
def activation_bytes(config, tp_size, rows, block, compute, path, spread):
    """(the first and last parts of the model, one block) of what autograd keeps; measured on meta tensors for models of one and of two blocks."""
    def flash(_, q, k, v):                                             # keeps q, k, v, the output and one number a row, as every fused kernel does
        repeat = q.shape[1] // k.shape[1]
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), 0.0, True)[0]
    sizes = []
    for n_layer in (1, 2):
        with torch.device("meta"):
            model = Transformer(replace(config, n_layer=n_layer), compute, path, TensorParallel(tp_size - 1, tp_size)).to("meta", compute if spread else torch.float32)
        for module in model.modules():
            if hasattr(module, "tp"):                                  # its shapes without its communication
                module.tp = TensorParallel()
        ids = torch.zeros(rows, block, dtype=torch.int64, device="meta")
        sizes.append(saved_bytes(lambda: model.hidden(ids, attend=flash if path in ("sdpa", "triton") else None), model.parameters()))
    return 2 * sizes[0] - sizes[1], sizes[1] - sizes[0]


@functools.cache
def trained_names(config):
    """The parameters that take gradients."""
    with torch.device("meta"):
        return [n for n, p in Transformer(config).named_parameters() if p.requires_grad]


def plan(args, config, world, compute, path, loss_share=1.0):
    """{what: bytes} on the fullest rank of `world`; config with the vocabulary as trained; loss_share: of positions with loss."""
    tp, size = args.tp, compute.itemsize
    shards = world // tp if args.dp == "fsdp" else 1
    shapes = whole_shapes(config)

    def numel(t, shards, names):
        return sum(math.prod(s.stop - s.start for s in region(shapes[n], TensorParallel(t, tp).cut(config, n), 0, shards)) for n in names)
    mine, moved = (max(numel(t, shards, names) for t in range(tp)) for names in (shapes, trained_names(config)))
    rows = args.micro_batch or -(-args.batch // (world // tp))
    ends, block = activation_bytes(config, tp, rows, args.block, compute, path, shards > 1)
    vocabulary, n_loss = -(-config.vocab_size // tp), round(rows * args.block * loss_share)
    loss = n_loss * (config.n_embd * size + 16) + 4 * vocabulary * config.n_embd                               # gradients of the states and of the output projection
    chunk = min(4096, n_loss, LOGITS // vocabulary) * vocabulary * (8 + size)                                  # one chunk's logits, their softmax, its gradient
    root = [n for n in shapes if not n.startswith("blocks.")]
    root, one = numel(tp - 1, 1, root), numel(tp - 1, 1, [n for n in shapes if n.startswith("blocks.0.")])
    out = {"weights": 4 * mine, "gradients": 4 * moved, "optimizer": 8 * moved, "frozen base": size * mine if args.kl else 0,
           "gathered": (root + 2 * one) * size + (root + one) * (size + 4) if shards > 1 else 0,               # two blocks under way, one block's and the root's gradients
           "activations": ends + loss + (config.n_layer * rows * args.block * config.n_embd * size if args.recompute else config.n_layer * block),
           "working": max(chunk, block)}                                                                       # one block's gradients, or its recomputed activations
    step = min(4 * moved, 1 << 30)                                     # the optimizer's one temporary, when the activations are gone
    out["peak"] = out["weights"] + out["gradients"] + out["optimizer"] + out["frozen base"] + max(out["gathered"] + out["activations"] + out["working"], step)
    return out


def settle(args, config, world, compute, path, memory, loss_share=1.0):
    """Choose --dp auto and --micro-batch 0 so that the plan fits `memory` bytes a device; the plan, which may not fit."""
    check_world(args, config, world)
    share = -(-args.batch // (world // args.tp))
    sizes = [args.micro_batch] if args.micro_batch else sorted({-(-share // n) for n in range(1, share + 1)}, reverse=True)
    for dp in ["ddp", "fsdp"] if args.dp == "auto" else [args.dp]:
        for micro in sizes:
            args.dp, args.micro_batch = dp, micro
            if (found := plan(args, config, world, compute, path, loss_share))["peak"] <= memory:
                return found
    return found


def check_world(args, config, world):
    """UserError where so many ranks cannot share models of this shape by --tp."""
    if world % args.tp or args.tp > config.n_kv_head:
        raise UserError(f"--tp {args.tp}: " + (f"does not divide the {world} ranks" if world % args.tp else f"the model has only {config.n_kv_head} key-value heads to share out")
                        + "; torchrun --nproc_per_node sets the number of ranks, a multiple of --tp")


def smallest_fit(args, config, compute, path, memory):
    """The flags of the fewest ranks on which the run fits."""
    for world in (1, 2, 4, 8, 16, 32, 64, 128):
        for recompute in (False, True):
            for tp in (1, 2, 4, 8):
                trial = argparse.Namespace(**{**vars(args), "dp": "fsdp", "tp": tp, "recompute": recompute, "micro_batch": 1})
                if tp <= min(world, config.n_kv_head) and plan(trial, config, world, compute, path)["peak"] <= memory:
                    return f"--nproc_per_node={min(world, 8)}" + (f" --nnodes={world // 8}" if world > 8 else "") + " --dp fsdp" + f" --tp {tp}" * (tp > 1) + " --recompute" * recompute
    return "no number of ranks up to 128; take a smaller --block or model"


def device_memory(device):
    """Bytes that a run may take on its device: all but what CUDA, NCCL and fragmentation want; on a CPU the machine's memory over its ranks."""
    if device.type == "cuda":
        return int(0.92 * torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def show_plan(args):
    """Print the plan of a run for devices of 80 GB, or of the GPU that is here; data and weights are looked at where they exist."""
    world, gpu = args.world or int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.is_available()
    if args.init:
        config = config_from_hf({"vocab_size": 32000, **read_json(args.init)}, args.init)
    else:
        config = read_config(args.base)[0] if (Path(args.base) / "config.json").is_file() or is_meta(args.base) else PRESETS.get(args.model)
    if config is None:
        raise UserError(f"{args.base}/: no checkpoint; --model takes a checkpoint folder or one of {', '.join(PRESETS)}")
    args.block = min(args.block, config.context)
    args.batch = args.batch_tokens // args.block or 1 if args.batch_tokens else args.batch
    loss_share, tokens = 1.0, args.tokens or 150_000_000
    if (Path(args.data) / "meta.json").is_file():
        packed = Packed(args.data)
        tokens, loss_share = args.tokens or len(packed.tokens), packed.meta["loss_tokens"] / packed.meta["tokens"]
        config = replace(config, vocab_size=max(config.vocab_size, packed.tokenizer().vocab_size))
    else:
        config = replace(config, vocab_size=config.vocab_size + 2)     # <|user|>, <|assistant|>
    compute = torch.float32 if args.dtype == "float32" else torch.bfloat16
    path = "sdpa" if args.attention == "auto" else args.attention
    memory = device_memory(torch.device("cuda", 0)) if gpu else int(0.92 * 80e9)
    found = settle(args, config, world, compute, path, memory, loss_share)
    per_token = 3 * flops_per_token(config, args.block)
    hours = tokens * args.epochs * per_token / (world * 0.4 * PEAK_FLOPS["A100"]) / 3600
    print_table([[f"{Path(args.model or args.init).name}: {world} ranks, --dp {args.dp} --tp {args.tp}" + " --recompute" * args.recompute, "GB a rank"],
                 *([name, f"{n / 1e9:.2f}"] for name, n in found.items() if n)])
    print(f"{n_parameters(config):,} parameters, blocks of {args.block}, {args.micro_batch} at once, {-(-args.batch // (world // args.tp) // args.micro_batch)} to accumulate; "
          f"positions with loss: {100 * loss_share:.0f}%{'' if loss_share < 1 else ' assumed'}")
    print(f"{tokens / 1e6:.1f}M tokens: {tokens * args.epochs * per_token:.2e} FLOPs, {hours:.1f} hours at 40% of the 312 TFLOP/s of {world} A100")
    print("fits " if found["peak"] <= memory else "DOES NOT FIT ", f"in {memory / 1e9:.0f} GB, 92% of {'this GPU' if gpu else 'a GPU of 80 GB'}",
          "" if found["peak"] <= memory else f"; what fits: {smallest_fit(args, config, compute, path, memory)}", sep="")


# --- optimizer ----------------------------------------------------------------------------------------------------------------

class Optimizer:
    """`scaled`, the optimizer of §4.1 ("gradients re-scaled by the magnitude of each weight"), or AdamW.

    scaled is EasyLM's: an unfactored Adafactor (Shazeer & Stern 2018). With g the gradient after clipping the global norm, t from 0:
        v ← d v + (1 − d)(g² + 1e-30),   d = 1 − (t + 1)^−0.95
        u = g / √v · lr(t) · max(RMS(p), 1e-3)          one RMS per tensor of the published checkpoint
        m ← 0.9 m + 0.1 u                               no bias correction
        p ← p − m − lr(t) · weight_decay · p
    So its learning rate is relative: 2e-3 moves weights of RMS 0.02 by 4e-5.
    `groups`: lists of the parameters that make up one published tensor (GPT-2's q, k, v are one). `complete` turns sums over
    the parts of the parameters that lie in this process, one a parameter, into sums over the whole tensors.
    """

    def __init__(self, kind, groups, weight_decay, clip, complete=lambda sums: sums):
        self.kind, self.weight_decay, self.clip, self.groups, self.complete = kind, weight_decay, clip, groups, complete
        self.params = [p for group in groups for p in group]
        self.m, self.v = ([torch.zeros_like(p, requires_grad=False) for p in self.params] for _ in range(2))
        self.numel = complete(torch.tensor([local(p).numel() for p in self.params], dtype=torch.float64, device=self.params[0].device)).tolist()

    @torch.no_grad()
    def step(self, t, lr):
        """One update from the gradients, which are freed; returns the global gradient norm before clipping."""
        p, m, v, g = ([local(x) for x in xs] for xs in (self.params, self.m, self.v, [x.grad for x in self.params]))
        norm = math.sqrt(sum(self.squares(g)))
        if not math.isfinite(norm):
            return norm
        clip, scales = min(1.0, self.clip / norm) if norm else 1.0, self.magnitudes(p) if self.kind == "scaled" else [1.0] * len(p)
        for *piece, scale in self.pieces(p, m, v, g, scales):
            self.update(*piece, scale, clip, t, lr)
        for x in self.params:
            x.grad = None
        return norm

    def pieces(self, p, m, v, g, scales):
        """Lists of tensors to be updated together: on a GPU some whole ones, on a CPU slices that stay in its cache from one operation to the next (half the time of whole ones)."""
        if p[0].device.type == "cpu":
            for *tensors, scale in zip(p, m, v, g, scales):
                flat = *(x.view(-1) for x in tensors[:3]), tensors[3].reshape(-1)             # only a gradient may be a copy
                for piece in zip(*(x.split(1 << 20) for x in flat)):
                    yield *([x] for x in piece), [scale]
        else:
            at = 0
            while at < len(p):
                end = at + 1
                while end < len(p) and sum(x.numel() for x in p[at:end + 1]) < 1 << 28:      # bounds the one temporary
                    end += 1
                yield tuple(xs[at:end] for xs in (p, m, v, g, scales))
                at = end

    def update(self, p, m, v, g, scale, clip, t, lr):
        """The formulas above, g not yet clipped."""
        d = 1 - (t + 1) ** -0.95 if self.kind == "scaled" else 0.95
        torch._foreach_mul_(v, d)
        torch._foreach_addcmul_(v, g, g, (1 - d) * clip**2)
        if self.kind == "scaled":
            torch._foreach_add_(v, (1 - d) * 1e-30)
            torch._foreach_mul_(m, 0.9)
            torch._foreach_addcdiv_(m, g, torch._foreach_sqrt(v), [0.1 * clip * lr * x for x in scale])
            torch._foreach_mul_(p, 1 - lr * self.weight_decay)
            torch._foreach_sub_(p, m)
        else:                                                          # Loshchilov & Hutter 2019; betas 0.9, 0.95 as in EasyLM
            torch._foreach_mul_(m, 0.9)
            torch._foreach_add_(m, g, alpha=0.1 * clip)
            root = torch._foreach_sqrt(v)
            torch._foreach_div_(root, math.sqrt(1 - 0.95 ** (t + 1)))
            torch._foreach_add_(root, 1e-8)
            torch._foreach_mul_(p, 1 - lr * self.weight_decay)
            torch._foreach_addcdiv_(p, m, root, -lr / (1 - 0.9 ** (t + 1)))

    def squares(self, tensors):
        """Σ x² of each whole tensor."""
        return self.complete(torch.stack(torch._foreach_norm(tensors)).double().square()).tolist()

    def magnitudes(self, p):
        """max(RMS, 1e-3) of each parameter's published tensor."""
        squares, scales, at = self.squares(p), [], 0
        for group in self.groups:
            rms = math.sqrt(sum(squares[at:at + len(group)]) / sum(self.numel[at:at + len(group)]))
            scales += [max(rms, 1e-3)] * len(group)
            at += len(group)
        return scales


# --- checkpoints ---------------------------------------------------------------------------------------------------------------
# The state on disk is whole tensors, shared out over files, one a rank: any layout of ranks continues any other's.

@dataclass
class State:
    """What resuming needs: `tensors` {name: parameter or moment, spread as they are}, `layout` {parameter: (shape of the whole, cut)}."""
    tensors: dict
    layout: dict
    ranks: Ranks = Ranks()

    def of(self, name):
        """(shape, cut) of the tensor "m.NAME"."""
        return self.layout[name.split(".", 1)[1]]

    def wholes(self):
        """Yield this rank's share of the whole tensors; every rank must run through it, for tensors are put together by all."""
        for i, (name, tensor) in enumerate(self.tensors.items()):
            value = whole(tensor.detach(), *self.of(name), self.ranks.tp)
            if i % self.ranks.world == self.ranks.rank:
                yield value

    def save(self, folder, step, totals, keep):
        """Write folder/step-N, its done.json with sizes and checksums last; drop older states beyond `keep`. All ranks see one disk."""
        path = (Path(folder) / f"step-{step:07}").resolve()
        with atomic_dir(path) if self.ranks.rank == 0 else contextlib.nullcontext(path.with_name(path.name + ".tmp")) as new:
            self.ranks.gather(None)                                    # the folder is there
            mine, coming = list(self.tensors)[self.ranks.rank::self.ranks.world], self.wholes()
            file = f"state-{self.ranks.rank:05}.safetensors"
            facts = write_safetensors(new / file, [(n, torch.float32, self.of(n)[0], lambda: next(coming)) for n in mine])
            next(coming, None)                                         # the tensors after this rank's last
            facts = dict(self.ranks.gather((file, facts)))
            if self.ranks.rank == 0:
                write_json(new / "done.json", {"step": step, "totals": totals, "files": facts})
        if self.ranks.rank == 0:
            for old in sorted(Path(folder).glob("step-???????"))[:-keep]:
                shutil.rmtree(old)

    def restore(self, folder):
        """Continue from the newest whole state in `folder`; returns (step, totals), (0, {}) where there is none. A damaged one is named and removed."""
        doomed, rank, world = [], self.ranks.rank, self.ranks.world
        for state in sorted(Path(folder).glob("step-???????"), reverse=True):
            try:
                done = read_json(state / "done.json")
                damaged = [n for n, (size, sha) in sorted(done["files"].items())[rank::world] if not (state / n).is_file() or (state / n).stat().st_size != size or file_hash(state / n) != sha]
            except (UserError, OSError, KeyError, ValueError, TypeError, AttributeError):
                damaged = ["done.json"]
            damaged = sorted(set(sum(self.ranks.gather(damaged), [])))
            if not damaged:
                break
            if rank == 0:
                print(f"{state}: damaged ({', '.join(damaged)}); using the state before it", file=sys.stderr)
            doomed.append(state)
        else:
            state, done = None, {"step": 0, "totals": {}}
        if state:
            where = {name: file for file in (Safetensors(state / n) for n in done["files"]) for name in file.entries}
            with torch.no_grad():
                for name, tensor in self.tensors.items():
                    local(tensor).copy_(where[name].get(name)[held(tensor, *self.of(name))])
        self.ranks.gather(None)                                        # nobody reads any more
        if rank == 0:
            for state in doomed:
                shutil.rmtree(state, ignore_errors=True)
        return done["step"], done["totals"]


# --- training --------------------------------------------------------------------------------------------------------------------

def check_files(args):
    """Stop with the list of what is missing and the commands that make it."""
    missing = []
    name = Path(args.model or args.init).name
    if args.init and not Path(args.init).is_file():
        missing.append(f"{args.init}: no such config; it is a Hugging Face config.json, e.g. one from a checkpoint of that shape")
    if args.model and not (Path(args.base) / "config.json").is_file() and not is_meta(args.base):
        known = args.model in PRESETS
        missing.append(f"{args.base}/: no checkpoint" + (f"; get it with: python data.py fetch {name} (into weights/{name}), or name a folder of Hugging Face files with --model DIR" if known
                                                         else f"; --model takes a checkpoint folder or one of {', '.join(PRESETS)}"))
    if not (Path(args.data) / "meta.json").is_file():
        missing.append(f"{args.data}/: no packed data; make it with: python data.py mix --sharegpt sharegpt.json --hc3 hc3.jsonl --discord discord.jsonl --out data/sharegpt-mix.jsonl "
                       f"&& python data.py pack data/sharegpt-mix.jsonl --tokenizer {args.base or 'DIR'} --out {args.data}")
    if missing:
        raise UserError(*missing)


def open_blocks(args, config, say):
    """The run's blocks, replay among them; --block and --batch as they are carried out."""
    if args.block > config.context:
        say(f"--block {args.block}: the model's context is {config.context} tokens; using blocks of {config.context}" + (
            "" if args.batch_tokens else " (--batch-tokens 65536 would hold the paper's tokens a step)"), file=sys.stderr)
        args.block = config.context
    if args.batch_tokens:
        args.batch = max(1, args.batch_tokens // args.block)
    replay = Blocks(args.replay_data, args.block) if args.replay_data else None
    blocks = Blocks(args.data, args.block, args.tokens, args.one_per_row, replay, args.replay, args.seed)
    for folder in (args.replay_data, args.eval_data):
        if folder and Packed(folder).tokenizer().base_hash != blocks.packed.tokenizer().base_hash:
            raise UserError(f"{folder} was packed with another tokenizer than {args.data}")
    if blocks.n_replay and blocks.n_replay > replay.n:
        say(f"--replay {args.replay}: {blocks.n_replay} blocks of text are wanted, {args.replay_data} has {replay.n}; they are repeated", file=sys.stderr)
    if args.one_per_row and blocks.cut_off:
        say(f"{blocks.cut_off} of {blocks.n} conversations are longer than a row and were cut off at {args.block} tokens", file=sys.stderr)
    return blocks


def run_config(args):
    """Config of the base, or of --init before its vocabulary is known."""
    return config_from_hf({"vocab_size": 1, **read_json(args.init)}, args.init) if args.init else read_config(args.base)[0]


def trained_config(args, config, tokenizer):
    """Config with the vocabulary of the packed data, which must be the base's own plus added tokens."""
    if args.init:
        return replace(config, vocab_size=tokenizer.vocab_size, bos=tokenizer.bos, eos=tokenizer.eos)
    if tokenizer_files(args.base):
        base = load_tokenizer(args.base)
        if base.base_hash != tokenizer.base_hash:
            raise UserError(f"{args.data} was packed with another tokenizer than {args.base} has; pack it again with --tokenizer {args.base}")
        if lost := [n for n, i in base.added.items() if tokenizer.added.get(n) != i]:
            raise UserError(f"{args.data} was packed without {', '.join(lost)}, tokens that {args.base} has added to its vocabulary; pack it again with --tokenizer {args.base}")
    if tokenizer.n_base > config.vocab_size:
        raise UserError(f"{args.data} was packed with a vocabulary of {tokenizer.n_base}, {args.base} has {config.vocab_size}; pack it with the base model's tokenizer")
    return replace(config, vocab_size=max(config.vocab_size, tokenizer.vocab_size), bos=tokenizer.bos, eos=tokenizer.eos)      # LLaMA 3 names several eos; one was trained


def settings_of(args, meta):
    """Everything that moves the result, for a run that is continued to be the same run; the layout of ranks is free."""
    free = ("out", "weights", "device", "dp", "tp", "micro_batch", "recompute", "compile", "plan", "world", "save_every", "keep", "model", "eval_data", "eval_every", "batch_tokens")
    settings = {k: v for k, v in vars(args).items() if k not in free}
    settings |= {"data_name": meta["name"], "data_hash": meta["source_hash"], "template": meta["template"], "tokenizer": meta["tokenizer_hash"], "packing_seed": meta["seed"]}
    settings |= {"init_hash": file_hash(args.init)} if args.init else {"base_fingerprint": fingerprint(args.base)}
    if args.replay_data:
        settings["replay_data"] = Packed(args.replay_data).meta["source_hash"]
    return settings


def keep_freed_memory():
    """Have malloc keep what is freed: glibc's gives the pages of every large tensor back and waits for new, zeroed ones at the next, a tenth of a step on a CPU.

    The price is a heap that holds gaps: 3 to 8% more at the peak.
    """
    with contextlib.suppress(AttributeError):                          # only glibc has mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)                                            # M_MMAP_MAX: no pages of their own for large blocks
        libc.mallopt(-1, -1)                                           # M_TRIM_THRESHOLD: never shrink the heap


class Trainer:
    """The model as this process holds it, the frozen base of --kl, and one step of training."""

    def __init__(self, args, config, base_config, ranks, device, compute, path):
        self.args, self.ranks, self.device = args, ranks, device
        if device.type == "cpu":
            keep_freed_memory()
        if args.init:
            self.model = empty_model(config, device, torch.float32, compute, path, ranks.tp, ranks.mesh).initialize(args.seed)
            self.dtype = torch.float32                                 # in which the final weights are written
        else:
            weights = open_weights(args.base)
            self.model = empty_model(config, device, torch.float32, compute, path, ranks.tp, ranks.mesh)
            load_weights(self.model, weights, base_config, args.base)
            self.dtype = weights.dtype()
        self.frozen = None
        if args.kl:
            self.frozen, self.vocabulary = empty_model(config, device, compute, compute, path, ranks.tp, ranks.mesh), base_config.vocab_size
            load_weights(self.frozen, weights, base_config, args.base)
            self.frozen.requires_grad_(False)
        for block in self.model.blocks:
            block.recompute = args.recompute
            if args.compile:
                block._forward = torch.compile(block._forward)
        self.parameters, shapes = dict(self.model.named_parameters()), whole_shapes(config)
        self.layout = {n: (shapes[n], ranks.tp.cut(config, n)) for n in self.parameters}
        groups = [parts for parts, _ in published_names(config).values() if self.parameters[parts[0]].requires_grad]
        self.names = [n for parts in groups for n in parts]
        self.optimizer = Optimizer(args.optimizer, [[self.parameters[n] for n in parts] for parts in groups], args.weight_decay, args.clip, self.complete)
        self.state = State({f"{part}.{n}": t for part, tensors in (("master", self.optimizer.params), ("m", self.optimizer.m), ("v", self.optimizer.v)) for n, t in zip(self.names, tensors)},
                           self.layout, ranks)
        self.wrapped = self.model
        if ranks.dp_size > 1 and not ranks.mesh:
            self.wrapped = torch.nn.parallel.DistributedDataParallel(self.model, process_group=ranks.dp_group, gradient_as_bucket_view=True)

    def complete(self, sums):
        """Sums over this process's parts of the parameters -> over the whole tensors; what every rank holds is counted once."""
        if self.ranks.mesh:
            dist.all_reduce(sums, group=self.ranks.dp_group)
        if self.ranks.tp.size > 1:
            cut = torch.tensor([i for i, n in enumerate(self.names) if self.layout[n][1]], device=sums.device)
            part = sums[cut]
            dist.all_reduce(part, group=self.ranks.tp.group)
            sums[cut] = part
        return sums

    def gradients(self, micro_batches, stop=False):
        """Forward and backward of a step; (loss, KL, does any rank want to stop?) of the global batch."""
        total = torch.zeros(3, device=self.device)
        total[2] = float(stop)
        for i, batch in enumerate(micro_batches):
            batch = [x.to(self.device, non_blocking=True) for x in batch]
            if self.wrapped is not self.model:                         # DDP sums gradients over ranks once a step
                self.wrapped.require_backward_grad_sync = i == len(micro_batches) - 1
            if self.frozen:
                ids, _, weights, *starts = batch
                with torch.no_grad():
                    states = self.frozen(ids, None, weights, *starts)
                loss, kl = self.wrapped(*batch[:3], *(starts or [None]), base=(states, self.frozen.output_weight, self.vocabulary), kl=self.args.kl)
                total[1] += kl
                self.reshard(self.frozen)
            else:
                loss = self.wrapped(*batch)
            (loss * self.ranks.dp_size).backward()                     # DDP and fully_shard average; our weights already sum to one batch
            total[0] += loss.detach()
        if self.ranks.world > 1:
            total[:2] /= self.ranks.tp.size                            # the ranks that share a model have the same
            dist.all_reduce(total)
        loss, kl, stop = total.tolist()
        return loss, kl, stop > 0

    def reshard(self, model):
        """After a forward pass without a backward one the root's parameters would stay gathered."""
        if self.ranks.mesh:
            model.reshard()

    @torch.no_grad()
    def eval_loss(self, blocks):
        """Mean loss over the loss tokens of all blocks."""
        n, total = self.args.micro_batch, torch.zeros(2, device=self.device)
        each = -(-blocks.n // self.ranks.dp_size)
        for at in range(0, each, n):
            rows = np.arange(self.ranks.dp, blocks.n, self.ranks.dp_size)[at:at + n]
            ids, targets, mask = (torch.from_numpy(np.pad(x.astype(np.int64), ((0, n - len(rows)), (0, 0)))).to(self.device) for x in blocks.read(rows))
            starts = [torch.from_numpy(np.pad(blocks.conversation_starts(rows), ((0, n - len(rows)), (0, 0)))).to(self.device)] if self.args.doc_mask else []
            total[0] += self.model(ids, targets, mask.float(), *starts)
            total[1] += mask.sum()
        self.reshard(self.model)
        if self.ranks.dp_size > 1:
            dist.all_reduce(total, group=self.ranks.dp_group)
        return (total[0] / total[1]).item()

    def parameter(self, name):
        """A whole parameter; all ranks ask together."""
        return whole(self.parameters[name].detach(), *self.layout[name], self.ranks.tp)


def train(args):
    """A run from its files to its checkpoint, on every rank alike; continues one that was killed."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    say = print if rank == 0 else lambda *a, **k: None
    check_files(args)
    device, out = pick_device(args.device), Path(args.out)
    base_config = run_config(args)
    blocks = open_blocks(args, base_config, say)
    steps = args.epochs * -(-(blocks.n + blocks.n_replay) // args.batch)
    args.warmup = round(args.warmup * steps) if isinstance(args.warmup, float) else args.warmup
    meta, tokenizer = blocks.packed.meta, blocks.packed.tokenizer()
    settings = settings_of(args, meta)
    record = read_json(out / "train.json") if same_settings(out / "train.json", "settings", settings) else None
    if not record and any((out / name).exists() for name in ("config.json", "model.safetensors", "params.json")):
        raise UserError(f"--out {out}: holds a checkpoint that this command did not make; choose another folder")
    if record and record.get("finished"):
        say(f"{out}: finished already, {record['steps']} steps")
        return
    config = trained_config(args, base_config, tokenizer)
    compute, memory = pick_dtype(args.dtype, device), device_memory(device)
    path = pick_attention(args.attention, device, compute, args.block, args.doc_mask)
    if (needed := settle(args, config, world, compute, path, memory, meta["loss_tokens"] / meta["tokens"])["peak"]) > memory:
        raise UserError(f"{Path(args.model or args.init).name} needs {needed / 1e9:.1f} GB on each of {world} ranks (--dp {args.dp} --tp {args.tp}, --micro-batch {args.micro_batch}), "
                        f"a device has {memory / 1e9:.1f} GB for it; what fits: {smallest_fit(args, config, compute, path, memory)}")
    ranks = start_ranks(args, device)
    trainer = Trainer(args, config, base_config, ranks, device, compute, path)
    optimizer = trainer.optimizer
    out.mkdir(parents=True, exist_ok=True)
    start, totals = trainer.state.restore(out / "trainer")
    totals = {"tokens": 0, "loss_tokens": 0, **({"replay_tokens": 0} if args.replay else {}), **totals}
    if rank == 0 and not record:
        write_json(out / "train.json", {"settings": settings})
    eval_blocks = Blocks(args.eval_data, args.block, one_per_row=args.one_per_row) if args.eval_data else None

    say(f"{out}: {n_parameters(config):,} parameters, {blocks.n} {'rows' if args.one_per_row else 'blocks'} of {args.block}" + (f" and {blocks.n_replay} replayed" if blocks.n_replay else "")
        + f", {steps} steps" + (f", continuing at step {start}" if start else ""))
    if args.warmup >= steps:
        say(f"warm-up of {args.warmup} steps outlasts the run of {steps}: the learning rate ends at {learning_rate(args, steps - 1, steps):.2e} of {args.lr:.2e}", file=sys.stderr)

    log = cut_log(out / "log.jsonl", start) if rank == 0 else None
    peak = next((flops for name, flops in PEAK_FLOPS.items() if device.type == "cuda" and name in torch.cuda.get_device_name(device)), None)
    stop, save_seconds, bad, loss = [], 0.0, 0, float("nan")
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    bar = tqdm(total=steps, initial=start, desc="train", unit=" steps", disable=None if rank == 0 else True)

    def write(**entry):
        if log:
            log.write(json.dumps(entry) + "\n")
            log.flush()

    with ThreadPoolExecutor(1) as ahead:                               # the next batch is read while this one computes
        coming = ahead.submit(share, args, blocks, start, ranks.dp, ranks.dp_size)
        for step in range(start, steps):
            if eval_blocks and step % args.eval_every == 0:
                write(step=step, eval_loss=trainer.eval_loss(eval_blocks))
            began = time.perf_counter()
            micro_batches, (n_tokens, n_replayed, n_loss) = coming.result()
            if step + 1 < steps:
                coming = ahead.submit(share, args, blocks, step + 1, ranks.dp, ranks.dp_size)
            lr = learning_rate(args, step, steps)
            loss, kl, stopping = trainer.gradients(micro_batches, bool(stop))
            norm = optimizer.step(step, lr) if math.isfinite(loss) else float("nan")
            if math.isfinite(loss) and math.isfinite(norm):
                bad = 0
            else:
                bad += 1
                for p in optimizer.params:
                    p.grad = None
                say(f"step {step}: loss {loss}, gradient norm {norm}; step skipped (blocks {' '.join(map(str, blocks.rows_of_step(args.seed, step, args.batch)))})", file=sys.stderr)
                if bad > 10:
                    raise Failure(f"more than 10 steps in a row without a finite loss; the last state is in {out}/trainer")
            totals["tokens"] += n_tokens
            totals["loss_tokens"] += n_loss
            if args.replay:
                totals["replay_tokens"] += n_replayed
            seconds, n_tokens = time.perf_counter() - began, n_tokens + n_replayed
            write(step=step, **totals, loss=loss, **({"kl": kl} if args.kl else {}), lr=lr, grad_norm=norm, tokens_per_s=round(n_tokens / seconds),
                  **({"mfu": round(3 * flops_per_token(config, args.block) * n_tokens / seconds / world / peak, 4)} if peak else {}),
                  memory=torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", tok_s=round(n_tokens / seconds), refresh=False)
            if step + 1 < steps and (stopping and save_seconds < 25 or args.save_every and (step + 1) % args.save_every == 0):     # torchrun kills 30 s after SIGTERM
                began = time.perf_counter()
                trainer.state.save(out / "trainer", step + 1, totals, args.keep)
                save_seconds = time.perf_counter() - began
            if stopping and step + 1 < steps:                          # after the last step the run is over anyway
                say(f"stopped by SIGTERM after step {step + 1}; the same command continues from the last state in {out}/trainer", file=sys.stderr)
                sys.exit(143)
    bar.close()
    if eval_blocks:
        write(step=steps, eval_loss=trainer.eval_loss(eval_blocks))
    save_checkpoint(out, config, trainer.parameter, trainer.dtype, tokenizer, meta["template"] if not args.init else None, writes=rank == 0)
    if rank == 0:
        write_json(out / "train.json", {"settings": settings, "finished": True, "steps": steps, **totals, "final_loss": loss, "parameters": n_parameters(config),
                                        "size": Path(args.init).stem if args.init else Path(args.base).name})
        shutil.rmtree(out / "trainer", ignore_errors=True)
        log.close()
    say(f"{out}: finished, {steps} steps, {totals['tokens']:,} tokens, {totals['loss_tokens']:,} with loss, final loss {loss:.4f}")
    if world > 1:
        dist.destroy_process_group()


def cut_log(path, step):
    """log.jsonl open for appending, cut back to the entries before `step`."""
    whole = 0
    if path.is_file():
        with open(path, "rb+") as f:
            for line in f:
                try:
                    entry = json.loads(line)
                    if entry["step"] >= step or not line.endswith(b"\n"):
                        break
                except (ValueError, KeyError, TypeError):
                    break
                whole += len(line)
            f.truncate(whole)
    return open(path, "a")


def main():
    args = parse_args()
    if args.plan:
        return show_plan(args)
    if int(os.environ.get("RANK", 0)):
        return train(args)
    if not Path(args.out).is_dir():                                    # the bare command on a fresh clone leaves nothing behind
        check_files(args)
    with locked(args.out, args.out):
        train(args)


if __name__ == "__main__":
    run(main)
