"""Five steps of training in each layout of ranks, for test_layouts.py: every rank runs this, rank 0 writes what came out.

    torchrun --standalone --nproc_per_node=4 tests/layouts.py OUT.pt STATES MODEL_DIR…
"""
import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
import model as M
import train as T

LAYOUTS = {1: [("one", "ddp", 1)], 2: [("ddp2", "ddp", 1), ("fsdp2", "fsdp", 1), ("tp2", "ddp", 2)], 4: [("tp2 ddp2", "ddp", 2), ("tp2 fsdp2", "fsdp", 2), ("tp4", "ddp", 4)]}
STEPS, SAVED = 5, 3


class Rows:
    """Stands for Blocks: five rows a step with very uneven masks, a row without loss tokens among them."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def rows_of_step(self, seed, step, batch):
        return np.arange(step * batch, (step + 1) * batch)

    def read(self, rows):
        if not len(rows):
            return tuple(np.zeros((0, 12), np.uint8) for _ in range(3))
        tokens = np.stack([np.random.default_rng(i).integers(0, self.vocab_size, 13) for i in rows])
        masks = np.stack([np.random.default_rng(i).random(12) < (0.0, 0.1, 0.5, 1.0, 1.0)[i % 5] for i in rows])
        return tokens[:, :-1], tokens[:, 1:], masks.astype(np.uint8)

    def count(self, rows):
        return len(rows) * 12, 0


def run(folder, dp, tp, kl, states, saved):
    """Train `folder`'s model; continue at SAVED the state of `states` where there is one, else begin, and save one to `saved`."""
    base = M.read_config(folder)[0]
    config = T.replace(base, vocab_size=base.vocab_size + 2)
    args = argparse.Namespace(init=None, base=folder, seed=0, dp=dp, tp=tp, kl=kl, recompute=kl > 0, compile=False, optimizer="scaled", weight_decay=1e-4, clip=1.0,
                              batch=5, micro_batch=2, block=12, loss_norm="row", doc_mask=False)
    ranks = T.start_ranks(args, torch.device("cpu"))
    trainer = T.Trainer(args, config, base, ranks, torch.device("cpu"), torch.float32, "sdpa")
    start = trainer.state.restore(states)[0] if states else 0
    held = sum(M.local(p).numel() * 4 for p in trainer.optimizer.params), sum(M.local(t).numel() * 4 for t in trainer.optimizer.m + trainer.optimizer.v), sum(M.local(p).numel() * 4 for p in trainer.frozen.parameters()) if kl else 0
    planned = T.plan(args, config, ranks.world, torch.float32, "sdpa")
    out = {"losses": [], "norms": [], "bytes": [list(map(max, zip(*ranks.gather(held)))), [planned["weights"], planned["optimizer"], planned["frozen base"]], planned["gradients"]]}
    for step in range(start, STEPS):
        batches, _ = T.share(args, Rows(config.vocab_size), step, ranks.dp, ranks.dp_size)
        loss, divergence, _ = trainer.gradients(batches)
        if step == 0:
            out["gradients"] = {n: M.whole(p.grad, *trainer.layout[n], ranks.tp).clone() for n, p in trainer.model.named_parameters()}
        out["losses"].append((loss, divergence))
        out["norms"].append(trainer.optimizer.step(step, 0.05))
        if saved and step + 1 == SAVED:
            trainer.state.save(saved, SAVED, {"tokens": 7}, 1)
    out["weights"] = {n: trainer.parameter(n).clone() for n in trainer.names}
    return out


def main():
    out, states, *folders = sys.argv[1:]
    world, results, states = int(os.environ.get("WORLD_SIZE", 1)), {}, Path(states)
    for folder in folders:
        name = Path(folder).name
        before = sorted(states.glob(f"{name} *"), key=lambda p: p.stat().st_mtime)[-1:]
        for layout, dp, tp in LAYOUTS[world]:
            if tp > M.read_config(folder)[0].n_kv_head:
                continue
            saved = states / f"{name} {layout}"
            for kl in (0.0, 0.3):
                results[name, layout, kl] = run(folder, dp, tp, kl, None, saved if not kl else None)
            if before:
                results[name, layout, "continued"] = run(folder, dp, tp, 0.0, before[0], None)
            before = [saved]
            if dist.is_initialized():
                dist.barrier()
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(results, out)


if __name__ == "__main__":
    main()
