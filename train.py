"""Fine-tuning on imitation data (paper §4.1; the optimizer is that of the training code the paper names, EasyLM).

    torchrun --nproc_per_node=8 train.py --model llama7b --data data/sharegpt-mix/llama7b --out runs/llama7b

In this file:
    recipe         flags and their defaults, the learning-rate schedule
    data order     which blocks make up a step; each token's weight in the loss
    optimizer      update scaled by the magnitude of each weight; AdamW
    checkpoints    float32 master and both moments as whole tensors; what resuming needs
    training       the loop, the program
"""
import json
import math
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import (Failure, Packed, Parser, UserError, atomic_dir, count, file_hash, fingerprint, load_tokenizer, locked, natural, positive, read_json, real, run, same_settings, tokenizer_files,
                  write_json)
from model import (PRESETS, Safetensors, Transformer, add_device_flags, config_from_hf, empty_model, is_meta, load_weights, n_parameters, open_weights, pick_attention, pick_device, pick_dtype,
                   published_names, read_config, save_checkpoint, write_safetensors)


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
    p.add_argument("--tokens", type=count, metavar="N", help="use the first N tokens of the stream (20M, 80M, 150M in §4.1); None is all")
    p.add_argument("--epochs", type=positive, default=1, help="§4.1: one")
    p.add_argument("--block", type=positive, default=2048, help="tokens a block (§4.1); the model's context where that is shorter")
    p.add_argument("--batch", type=positive, default=32, metavar="BLOCKS", help="blocks a step (§4.1)")
    p.add_argument("--micro-batch", type=natural, default=0, metavar="BLOCKS", help="blocks computed at once on a device; 0 is all of the device's share")
    p.add_argument("--one-per-row", action="store_true", help="one conversation a row instead of one stream cut into blocks")
    p.add_argument("--optimizer", choices=["scaled", "adamw"], default="scaled", help="scaled: updates re-scaled by the magnitude of each weight (§4.1)")
    p.add_argument("--lr", type=real, default=2e-3, help="§4.1; for `scaled` a step relative to each tensor's RMS")
    p.add_argument("--warmup", type=natural, default=1000, metavar="STEPS", help="linear from 0 (§4.1)")
    p.add_argument("--decay", choices=["constant", "cosine", "linear"], default="constant", help="after the warm-up; not stated in the paper")
    p.add_argument("--end-lr", type=real, default=0.0, help="where --decay cosine or linear ends")
    p.add_argument("--weight-decay", type=real, default=1e-4, help="decoupled; not stated in the paper, EasyLM's default")
    p.add_argument("--clip", type=real, default=1.0, help="global gradient norm; not stated in the paper, EasyLM's default")
    p.add_argument("--attention", choices=["auto", "eager", "sdpa", "triton"], default="auto", help="auto is torch's sdpa, and the Triton kernel for --doc-mask on a GPU")
    p.add_argument("--doc-mask", action="store_true", help="no attention across conversations in a block; off in the paper's code")
    p.add_argument("--loss-norm", choices=["row", "token"], default="row", help="row: mean over blocks of each block's mean (EasyLM); token: mean over loss tokens")
    p.add_argument("--seed", type=natural, default=0, help="of the order of blocks, and of the weights with --init")
    p.add_argument("--save-every", type=natural, default=250, metavar="STEPS", help="resumable state; 0 only at the end")
    p.add_argument("--keep", type=positive, default=2, help="resumable states kept")
    p.add_argument("--dp", choices=["ddp"], default="ddp", help="data parallelism under torchrun")
    add_device_flags(p)
    args = p.parse_args()
    name = Path(args.model or args.init).name.removesuffix(".json")
    args.data = args.data or f"data/sharegpt-mix/{name}"
    args.out = args.out or f"runs/{name}"
    args.base = str(Path(args.weights) / args.model) if args.model in PRESETS else args.model
    return args


def learning_rate(args, step, steps):
    """Linear warm-up from 0 at step 0 (as optax's schedules), then constant or decayed to end_lr at the last step."""
    if step < args.warmup:
        return args.lr * step / args.warmup
    if args.decay == "constant":
        return args.lr
    x = (step - args.warmup) / max(1, steps - args.warmup)
    fall = (1 + math.cos(math.pi * x)) / 2 if args.decay == "cosine" else 1 - x
    return args.end_lr + (args.lr - args.end_lr) * fall


# --- data order -------------------------------------------------------------------------------------------------------------

class Blocks:
    """The blocks of a run and their order: a permutation per epoch, a function of (seed, epoch, step) alone."""

    def __init__(self, folder, block, tokens=None, one_per_row=False):
        self.packed, self.block, self.one_per_row = Packed(folder), block, one_per_row
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

    def rows_of_step(self, seed, step, batch):
        """Indices of the blocks of a step; the last step of an epoch takes what is left."""
        per_epoch = -(-self.n // batch)
        epoch, at = divmod(step, per_epoch)
        return np.random.default_rng([seed, epoch]).permutation(self.n)[at * batch:(at + 1) * batch]

    def read(self, rows):
        """(inputs, targets, loss_mask) of blocks, each (rows, block)."""
        pieces = [(self.packed.row if self.one_per_row else self.packed.block)(i, self.block) for i in rows]
        return tuple(np.stack(x) for x in zip(*pieces)) if pieces else tuple(np.zeros((0, self.block), np.uint8) for _ in range(3))

    def count(self, rows):
        """Tokens of blocks; padding is none."""
        if not self.one_per_row:
            return len(rows) * self.block
        ends = np.append(self.packed.starts, len(self.packed.tokens))
        return int(np.minimum(ends[rows + 1] - ends[rows], self.block).sum())

    def conversation_starts(self, rows):
        """For each position of each block, where its conversation begins in the block: (rows, block), int32."""
        out = np.zeros((len(rows), self.block), np.int32)
        if not self.one_per_row:
            for row, i in zip(out, rows):
                starts = self.packed.starts[slice(*np.searchsorted(self.packed.starts, [i * self.block, (i + 1) * self.block]))] - i * self.block
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
    """This rank's part of a step: a list of micro-batches (ids, targets, weights, with --doc-mask starts), and the global counts of tokens.

    Every rank gets equally many micro-batches of equally many rows; where rows run out, rows of weight 0 stand in.
    """
    rows = blocks.rows_of_step(args.seed, step, args.batch)
    mine = rows[rank::world]
    mask = blocks.read(rows)[2] if world > 1 else None
    ids, targets, own = blocks.read(mine)
    mask = own if mask is None else mask
    weights = loss_weights(mask, args.loss_norm)[rank::world]
    each = -(-len(rows) // world)
    micro = min(args.micro_batch or each, each)
    padding = -(-each // micro) * micro - len(mine)
    arrays = [ids.astype(np.int64), targets.astype(np.int64), weights, *([blocks.conversation_starts(mine)] if args.doc_mask else [])]
    tensors = [torch.from_numpy(np.pad(x, ((0, padding), (0, 0)))) for x in arrays]
    return list(zip(*(t.split(micro) for t in tensors))), blocks.count(rows), int(mask.sum())


# --- optimizer ----------------------------------------------------------------------------------------------------------------

class Optimizer:
    """`scaled`, the optimizer of §4.1 ("gradients re-scaled by the magnitude of each weight"), or AdamW.

    scaled is EasyLM's: an unfactored Adafactor. With g the gradient after clipping the global norm, t from 0:
        v ← d v + (1 − d)(g² + 1e-30),   d = 1 − (t + 1)^−0.95
        u = g / √v · lr(t) · max(RMS(p), 1e-3)          one RMS per tensor of the published checkpoint
        m ← 0.9 m + 0.1 u                               no bias correction
        p ← p − m − lr(t) · weight_decay · p
    So its learning rate is relative: 2e-3 moves weights of RMS 0.02 by 4e-5.
    `groups`: lists of the parameters that make up one published tensor (GPT-2's q, k, v are one).
    """

    def __init__(self, kind, groups, weight_decay, clip):
        self.kind, self.weight_decay, self.clip = kind, weight_decay, clip
        self.groups = groups
        self.params = [p for group in groups for p in group]
        self.m, self.v = ([torch.zeros_like(p) for p in self.params] for _ in range(2))

    @torch.no_grad()
    def step(self, t, lr):
        """One update from the gradients, which are freed; returns the global gradient norm before clipping."""
        p, m, v, g = self.params, self.m, self.v, [x.grad for x in self.params]
        norm = torch.stack(torch._foreach_norm(g)).norm().item()
        if not math.isfinite(norm):
            return norm
        if norm > self.clip:
            torch._foreach_mul_(g, self.clip / norm)
        if self.kind == "scaled":
            d = 1 - (t + 1) ** -0.95
            torch._foreach_mul_(v, d)
            torch._foreach_addcmul_(v, g, g, 1 - d)
            torch._foreach_add_(v, (1 - d) * 1e-30)
            torch._foreach_div_(g, torch._foreach_sqrt(v))
            torch._foreach_mul_(g, [lr * scale for scale in self.magnitudes()])
            torch._foreach_lerp_(m, g, 0.1)
            torch._foreach_mul_(p, 1 - lr * self.weight_decay)
            torch._foreach_sub_(p, m)
        else:                                                          # Loshchilov & Hutter 2019; betas 0.9, 0.95
            torch._foreach_lerp_(m, g, 0.1)
            torch._foreach_mul_(v, 0.95)
            torch._foreach_addcmul_(v, g, g, 0.05)
            root = torch._foreach_sqrt(v)
            torch._foreach_div_(root, math.sqrt(1 - 0.95 ** (t + 1)))
            torch._foreach_add_(root, 1e-8)
            torch._foreach_mul_(p, 1 - lr * self.weight_decay)
            torch._foreach_addcdiv_(p, m, root, -lr / (1 - 0.9 ** (t + 1)))
        for x in p:
            x.grad = None
        return norm

    def magnitudes(self):
        """max(RMS, 1e-3) of each parameter's published tensor."""
        squares = torch.stack(torch._foreach_norm(self.params)).square().tolist()
        scales, at = [], 0
        for group in self.groups:
            rms = math.sqrt(sum(squares[at:at + len(group)]) / sum(x.numel() for x in group))
            scales += [max(rms, 1e-3)] * len(group)
            at += len(group)
        return scales


# --- checkpoints ---------------------------------------------------------------------------------------------------------------

def save_state(folder, step, totals, names, optimizer, keep):
    """Write trainer/step-N (master, m, v as whole tensors; done.json with sizes and checksums last), drop older ones beyond `keep`."""
    with atomic_dir(folder / f"step-{step:07}") as new:
        for part, tensors in (("master", optimizer.params), ("m", optimizer.m), ("v", optimizer.v)):
            write_safetensors(new / f"{part}.safetensors", [(n, t.dtype, t.shape, lambda t=t: t) for n, t in zip(names, tensors)])
        write_json(new / "done.json", {"step": step, "totals": totals, "files": {f.name: [f.stat().st_size, file_hash(f)] for f in sorted(new.glob("*.safetensors"))}})
    for old in sorted(folder.glob("step-???????"))[:-keep]:
        shutil.rmtree(old)


def restore_state(folder, names, optimizer):
    """Continue from the newest whole state in `folder`; returns (step, totals), (0, {}) where there is none. A damaged one is named and removed."""
    doomed = []
    for state in sorted(folder.glob("step-???????"), reverse=True):
        try:
            done = read_json(state / "done.json")
            damaged = [n for n, (size, sha) in done["files"].items() if not (state / n).is_file() or (state / n).stat().st_size != size or file_hash(state / n) != sha]
        except (UserError, OSError, KeyError, ValueError):
            damaged = ["done.json"]
        if damaged:
            print(f"{state}: damaged ({', '.join(damaged)}); using the state before it", file=sys.stderr)
            doomed.append(state)
            continue
        with torch.no_grad():
            for part, tensors in (("master", optimizer.params), ("m", optimizer.m), ("v", optimizer.v)):
                file = Safetensors(state / f"{part}.safetensors")
                for n, t in zip(names, tensors):
                    t.copy_(file.get(n))
        break
    else:
        done = {"step": 0, "totals": {}}
    if int(os.environ.get("RANK", 0)) == 0:
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
        missing.append(f"{args.base}/: no checkpoint" + (f"; put there the Hugging Face files of {name} (config.json, *.safetensors, tokenizer files), or name their folder with --model DIR" if known
                                                         else f"; --model takes a checkpoint folder or one of {', '.join(PRESETS)}"))
    if not (Path(args.data) / "meta.json").is_file():
        missing.append(f"{args.data}/: no packed data; make it with: python data.py mix --sharegpt sharegpt.json --hc3 hc3.jsonl --discord discord.jsonl --out data/sharegpt-mix.jsonl "
                       f"&& python data.py pack data/sharegpt-mix.jsonl --tokenizer {args.base or 'DIR'} --out {args.data}")
    if missing:
        raise UserError(*missing)


def build(args, blocks, device):
    """The model (float32 masters), its tokenizer, and the dtype in which its final weights are written."""
    tokenizer, where = blocks.packed.tokenizer(), Path(args.data)
    compute, path = pick_dtype(args.dtype, device), pick_attention(args.attention, device, args.doc_mask)
    if args.init:
        config = config_from_hf({**read_json(args.init), "vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}, args.init)
        return Transformer(config, compute, path).initialize(args.seed).to(device), tokenizer, torch.float32
    config, _ = read_config(args.base)
    base = load_tokenizer(args.base) if tokenizer_files(args.base) else None
    if base and base.base_hash != tokenizer.base_hash:
        raise UserError(f"{where} was packed with another tokenizer than {args.base} has; pack it again with --tokenizer {args.base}")
    if base:
        lost = [n for n, i in base.added.items() if tokenizer.added.get(n) != i]
        if lost:
            raise UserError(f"{where} was packed without {', '.join(lost)}, tokens that {args.base} has added to its vocabulary; pack it again with --tokenizer {args.base}")
    if tokenizer.n_base > config.vocab_size:
        raise UserError(f"{where} was packed with a vocabulary of {tokenizer.n_base}, {args.base} has {config.vocab_size}; pack it with the base model's tokenizer")
    weights = open_weights(args.base)
    model = empty_model(replace(config, vocab_size=max(config.vocab_size, tokenizer.vocab_size), bos=tokenizer.bos, eos=tokenizer.eos), device, torch.float32, compute, path)
    load_weights(model, weights, config, args.base)
    return model, tokenizer, weights.dtype()


def train(args):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    say = print if rank == 0 else lambda *a, **k: None
    check_files(args)
    device, out = pick_device(args.device), Path(args.out)
    context = config_from_hf({**read_json(args.init), "vocab_size": 1}, args.init).context if args.init else read_config(args.base)[0].context
    if args.block > context:
        say(f"--block {args.block}: the model's context is {context} tokens; using blocks of {context}", file=sys.stderr)
        args.block = context
    blocks = Blocks(args.data, args.block, args.tokens, args.one_per_row)
    steps = args.epochs * -(-blocks.n // args.batch)
    meta = blocks.packed.meta
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "weights", "device", "dp", "micro_batch", "save_every", "keep", "model")}
    settings |= {"data_name": meta["name"], "data_hash": meta["source_hash"], "template": meta["template"], "tokenizer": meta["tokenizer_hash"], "packing_seed": meta["seed"]}
    if args.init:
        settings["init_hash"] = file_hash(args.init)
    else:
        settings["base_fingerprint"] = fingerprint(args.base)
    record = read_json(out / "train.json") if same_settings(out / "train.json", "settings", settings) else None
    if not record and any((out / name).exists() for name in ("config.json", "model.safetensors", "params.json")):
        raise UserError(f"--out {out}: holds a checkpoint that this command did not make; choose another folder")
    if record and record.get("finished"):
        say(f"{out}: finished already, {record['steps']} steps")
        return
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model, tokenizer, dtype = build(args, blocks, device)
    config = model.config
    parameters = dict(model.named_parameters())
    groups = [parts for parts, _ in published_names(config).values()]
    names = [n for parts in groups for n in parts]
    optimizer = Optimizer(args.optimizer, [[parameters[n] for n in parts] for parts in groups], args.weight_decay, args.clip)
    out.mkdir(parents=True, exist_ok=True)
    start, totals = restore_state(out / "trainer", names, optimizer)
    totals = {"tokens": 0, "loss_tokens": 0, **totals}
    if rank == 0 and not record:
        write_json(out / "train.json", {"settings": settings})
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model

    say(f"{out}: {n_parameters(config):,} parameters, {blocks.n} {'rows' if args.one_per_row else 'blocks'} of {args.block}, {steps} steps" + (f", continuing at step {start}" if start else ""))
    if blocks.one_per_row and blocks.cut_off:
        say(f"{blocks.cut_off} of {blocks.n} conversations are longer than a row and were cut off at {args.block} tokens", file=sys.stderr)
    if args.warmup >= steps:
        say(f"warm-up of {args.warmup} steps outlasts the run of {steps}: the learning rate ends at {learning_rate(args, steps - 1, steps):.2e} of {args.lr:.2e}", file=sys.stderr)

    log = cut_log(out / "log.jsonl", start) if rank == 0 else None
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    from tqdm import tqdm
    bar = tqdm(total=steps, initial=start, desc="train", unit=" steps", disable=None if rank == 0 else True)
    bad, loss = 0, float("nan")
    with ThreadPoolExecutor(1) as ahead:                               # the next batch is read while this one computes
        coming = ahead.submit(share, args, blocks, start, rank, world)
        for step in range(start, steps):
            began = time.perf_counter()
            micro_batches, n_tokens, n_loss = coming.result()
            if step + 1 < steps:
                coming = ahead.submit(share, args, blocks, step + 1, rank, world)
            total = torch.zeros((), device=device)
            for i, batch in enumerate(micro_batches):
                if world > 1:                                          # gradients are summed over ranks once a step
                    wrapped.require_backward_grad_sync = i == len(micro_batches) - 1
                part = wrapped(*(x.to(device, non_blocking=True) for x in batch))
                (part * world).backward()                              # DDP averages; our weights already sum to one batch
                total += part.detach()
            if world > 1:
                dist.all_reduce(total)
            lr, loss = learning_rate(args, step, steps), total.item()
            norm = optimizer.step(step, lr) if math.isfinite(loss) else float("nan")
            if not math.isfinite(loss) or not math.isfinite(norm):
                bad += 1
                for p in optimizer.params:
                    p.grad = None
                say(f"step {step}: loss {loss}, gradient norm {norm}; step skipped (blocks {' '.join(map(str, blocks.rows_of_step(args.seed, step, args.batch)))})", file=sys.stderr)
                if bad > 10:
                    raise Failure(f"more than 10 steps in a row without a finite loss; the last state is in {out}/trainer")
            else:
                bad = 0
            totals["tokens"] += n_tokens
            totals["loss_tokens"] += n_loss
            seconds = time.perf_counter() - began
            if log:
                entry = {"step": step, **totals, "loss": loss, "lr": lr, "grad_norm": norm, "tokens_per_s": round(n_tokens / seconds)}
                entry |= {"memory": torch.cuda.max_memory_allocated()} if device.type == "cuda" else {}
                log.write(json.dumps(entry) + "\n")
                log.flush()
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", tok_s=round(n_tokens / seconds), refresh=False)
            if rank == 0 and step + 1 < steps and (stop or args.save_every and (step + 1) % args.save_every == 0):
                save_state(out / "trainer", step + 1, totals, names, optimizer, args.keep)
            if stop and step + 1 < steps:                          # after the last step the run is over anyway
                say(f"stopped by SIGTERM after step {step + 1}; the same command continues", file=sys.stderr)
                sys.exit(143)
    bar.close()
    if rank == 0:
        save_checkpoint(out, config, lambda n: parameters[n].detach(), dtype, tokenizer, meta["template"] if not args.init else None)
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
    if int(os.environ.get("RANK", 0)):
        return train(args)
    if not Path(args.out).is_dir():                                    # the bare command on a fresh clone leaves nothing behind
        check_files(args)
    with locked(args.out, args.out):
        train(args)


if __name__ == "__main__":
    run(main)
