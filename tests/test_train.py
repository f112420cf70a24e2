import argparse
import ctypes
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import model as M
import train as T
from conftest import ROOT, lines_of, one_line, program, torchrun


def weights_of(folder):
    file = M.Safetensors(folder / "model.safetensors")
    return {n: file.get(n).clone() for n in file.entries}


def assert_close(a, b, tolerance):
    a, b = weights_of(a), weights_of(b)
    assert a.keys() == b.keys()
    for n in a:
        assert (a[n] - b[n]).abs().max() <= tolerance, n


def finetune(world, out, *more, **kw):
    return ["train.py", "--model", world / "base", "--data", world / "chat", "--out", out, "--tokens", "4k", "--block", "64", "--batch", "8", "--warmup", "3", *more]


# --- the loss ---------------------------------------------------------------------------------------------------------------

UNEVEN = np.array([[1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0, 0, 0]], np.uint8)


def test_loss_weights_are_the_two_normalisations():
    losses = np.random.default_rng(0).random(UNEVEN.shape)
    rows = [l[m == 1].mean() if m.any() else 0.0 for l, m in zip(losses, UNEVEN)]
    assert np.isclose((T.loss_weights(UNEVEN, "row") * losses).sum(), np.mean(rows))
    assert np.isclose((T.loss_weights(UNEVEN, "token") * losses).sum(), losses[UNEVEN == 1].mean())


@pytest.mark.parametrize("norm", ["row", "token"])
def test_accumulation_and_ranks_share_one_batch_exactly(norm, world):
    """Very uneven masks: averaging the means of micro-batches or ranks (the known mistake) gives another gradient."""
    model = M.Transformer(M.llama(1, 2, 16, 24, vocab_size=50, context=16)).initialize(0)
    ids, targets = torch.randint(0, 50, (4, 8)), torch.randint(0, 50, (4, 8))
    weights = torch.from_numpy(T.loss_weights(UNEVEN, norm))

    def gradient(parts):
        model.zero_grad()
        for p in parts:
            model(ids[p], targets[p], weights[p]).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    whole = gradient([slice(0, 4)])
    assert torch.allclose(whole, gradient([slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4)]), atol=1e-6)
    model.zero_grad()
    for r in range(4):                                                  # the mistake
        own = torch.from_numpy(T.loss_weights(UNEVEN[r:r + 1], norm)) / 4
        model(ids[r:r + 1], targets[r:r + 1], own).backward()
    mistaken = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert norm == "row" or not torch.allclose(whole, mistaken, atol=1e-4)

    args = type("Args", (), dict(seed=0, batch=8, micro_batch=2, loss_norm=norm, doc_mask=False))
    blocks = T.Blocks(world / "chat", 64, 4000)
    one, counts = T.share(args, blocks, 3, 0, 1)
    both = [T.share(args, blocks, 3, r, 3) for r in range(3)]
    assert all(c == counts for _, c in both) and len({len(m) for m, _ in both}) == 1
    total = lambda parts: sorted((int(i.sum()), round(float(w.sum()), 6)) for ids_, _, ws, *_ in parts for i, w in zip(ids_, ws) if w.any())
    assert total(one) == total([b for m, _ in both for b in m])


def test_loss_ignores_user_tokens():
    model = M.Transformer(M.llama(1, 2, 16, 24, vocab_size=50, context=16)).initialize(0)
    ids, targets, weights = torch.randint(0, 50, (1, 8)), torch.randint(0, 50, (1, 8)), torch.tensor([[0, 0, 0, .5, .5, 0, 0, 0]])
    loss = model(ids, targets, weights)
    other = torch.where(weights > 0, targets, (targets + 1) % 50)
    assert model(ids, other, weights) == loss
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(model.logits(ids)[0, 3:5], targets[0, 3:5]), atol=1e-6)


def test_what_a_fork_freezes_stays_as_it_was_and_costs_no_memory(tmp_path, monkeypatch):
    config = M.llama(1, 2, 16, 24, vocab_size=50, context=16)
    state = dict(M.Transformer(config).initialize(0).named_parameters())
    M.save_checkpoint(tmp_path, config, lambda n: state[n], torch.float32)
    args = argparse.Namespace(init=None, base=tmp_path, seed=0, dp="ddp", tp=1, kl=0.0, recompute=False, compile=False, optimizer="scaled", weight_decay=1e-4, clip=1.0, batch=4, micro_batch=4, block=8)
    all_of_it, built = T.plan(args, config, 1, torch.float32, "sdpa"), M.Transformer.__init__

    def freezing(self, *a, **kw):
        built(self, *a, **kw)
        self.embedding.requires_grad_(False)
    monkeypatch.setattr(M.Transformer, "__init__", freezing)
    T.trained_names.cache_clear()
    T.activation_bytes.cache_clear()
    less = T.plan(args, config, 1, torch.float32, "sdpa")
    assert {n: all_of_it[n] - less[n] for n in ("weights", "gradients", "optimizer")} == {"weights": 0, "gradients": 4 * 50 * 16, "optimizer": 8 * 50 * 16}
    trainer = T.Trainer(args, config, config, T.Ranks(), torch.device("cpu"), torch.float32, "sdpa")
    trainer.gradients([(torch.randint(0, 50, (4, 8)), torch.randint(0, 50, (4, 8)), torch.full((4, 8), 1 / 32))])
    trainer.optimizer.step(5, 1e-2)
    assert {n for n, p in trainer.parameters.items() if torch.equal(p, state[n])} == {"embedding.weight"}
    assert "master.embedding.weight" not in trainer.state.tensors and "master.head.weight" in trainer.state.tensors


# --- the optimizer --------------------------------------------------------------------------------------------------------------

def test_scaled_optimizer_is_the_formula_of_the_docstring():
    """Written out once more, slowly, in float64; q, k and v of GPT-2 are one tensor for the RMS."""
    torch.manual_seed(0)
    groups = [[torch.nn.Parameter(torch.randn(3, 4) * s) for s in (0.1, 2.0)], [torch.nn.Parameter(torch.full((5,), 1e-6))]]
    optimizer = T.Optimizer("scaled", groups, 1e-4, 1.0)
    p = [x.detach().double().numpy().copy() for g in groups for x in g]
    m, v = [np.zeros_like(x) for x in p], [np.zeros_like(x) for x in p]
    for t in range(20):
        lr = 2e-3 * t / 5 if t < 5 else 2e-3
        g = [torch.randn(x.shape) * 3 for x in p]
        for x, grad in zip(optimizer.params, g):
            x.grad = grad.clone()
        norm = optimizer.step(t, lr)
        wanted = math.sqrt(sum(float((x.double() ** 2).sum()) for x in g))
        assert math.isclose(norm, wanted, rel_tol=1e-5)
        rms = [max(math.sqrt(np.concatenate([p[0].ravel(), p[1].ravel()]).__pow__(2).mean()), 1e-3)] * 2 + [max(math.sqrt((p[2] ** 2).mean()), 1e-3)]
        for i in range(3):
            grad = g[i].double().numpy() * min(1, 1 / wanted)
            d = 1 - (t + 1) ** -0.95
            v[i] = d * v[i] + (1 - d) * (grad ** 2 + 1e-30)
            m[i] = 0.9 * m[i] + 0.1 * grad / np.sqrt(v[i]) * lr * rms[i]
            p[i] = p[i] - m[i] - lr * 1e-4 * p[i]
    for x, want in zip(optimizer.params, p):
        assert np.allclose(x.detach().numpy(), want, atol=1e-6)


@pytest.mark.parametrize("pieces", [1, 3])
def test_scaled_optimizer_is_optaxs(pieces):
    """EasyLM's composition in optax 0.2, 20 steps (optimizer.json says how it was made); also where a tensor lies in three parts, as fused or cut ones do."""
    golden = json.loads((ROOT / "tests/optimizer.json").read_text())
    tensors = {n: torch.tensor(golden["initial"][n]).view(s) for n, s in golden["shapes"].items()}
    groups = [[torch.nn.Parameter(x.clone()) for x in t.tensor_split(pieces, -1) if x.numel()] for t in tensors.values()]
    optimizer, checked = T.Optimizer("scaled", groups, 1e-4, 1.0), 0
    for t, gradients in enumerate(golden["gradients"]):
        for group, (n, shape) in zip(groups, golden["shapes"].items()):
            for p, g in zip(group, torch.tensor(gradients[n]).view(shape).tensor_split(pieces, -1)):
                p.grad = g.clone()
        optimizer.step(t, 2e-2 * min(1, t / 5))
        for group, (n, shape) in zip(groups, golden["shapes"].items()):
            if wanted := golden["after"].get(str(t + 1)):
                assert (torch.cat([p.detach() for p in group], -1) - torch.tensor(wanted[n]).view(shape)).abs().max() <= 1e-6, (t, n)
                checked += 1
    assert checked == 5 * 4


def test_adamw_is_torchs():
    torch.manual_seed(0)
    a, b = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    ours, theirs = T.Optimizer("adamw", [[a]], 0.1, 1e9), torch.optim.AdamW([b], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for t in range(10):
        a.grad = torch.randn(4, 3)
        b.grad = a.grad.clone()
        ours.step(t, 1e-2)
        theirs.step()
    assert torch.allclose(a, b, atol=1e-6)


def test_learning_rate_rises_from_zero_and_stays():
    args = type("Args", (), dict(lr=2e-3, warmup=1000, decay="constant", end_lr=0.0))
    assert [T.learning_rate(args, s, 3000) for s in (0, 500, 1000, 2999)] == [0, 1e-3, 2e-3, 2e-3]
    args.decay = "cosine"
    assert T.learning_rate(args, 2000, 3000) == pytest.approx(1e-3) and T.learning_rate(args, 3000, 3000) == pytest.approx(0)


# --- runs ----------------------------------------------------------------------------------------------------------------------------

def test_the_order_of_blocks_is_a_permutation_and_subsets_are_nested(world):
    blocks = T.Blocks(world / "chat", 64, 4000)
    rows = [r for step in range(-(-blocks.n // 8)) for r in blocks.rows_of_step(1, step, 8)]
    assert sorted(rows) == list(range(blocks.n)) and rows != sorted(rows)
    assert blocks.n == 62 and T.Blocks(world / "chat", 64, 8000).n == 125
    assert (blocks.read([0, 1])[0].ravel() == blocks.packed.tokens[:128]).all()                # the stream's beginning, as it lies
    assert (blocks.read([61])[0] == T.Blocks(world / "chat", 64, 8000).read([61])[0]).all()


def test_conversation_starts_are_those_of_the_stream(world):
    blocks = T.Blocks(world / "chat", 64, 4000)
    starts = set(blocks.packed.starts.tolist())
    for i, row in zip((0, 7, 61), blocks.conversation_starts([0, 7, 61])):
        want = [max([0] + [s - i * 64 for s in range(i * 64, i * 64 + t + 1) if s in starts]) for t in range(64)]
        assert row.tolist() == want


def test_one_conversation_a_row(world):
    blocks = T.Blocks(world / "chat", 32, 3000, one_per_row=True)
    tokenizer = blocks.packed.tokenizer()
    inputs, targets, mask = blocks.read([0, 1, 2])
    assert (inputs[:, 0] == tokenizer.bos).all() and ((inputs == tokenizer.bos).sum(1) == 1).all()
    assert blocks.packed.starts[blocks.n] <= 3000 < blocks.packed.starts[blocks.n + 1]
    lengths = np.diff(blocks.packed.starts)[:3]
    assert blocks.count(np.array([0, 1, 2])) == (np.minimum(lengths, 32).sum(), 0)               # padding is not counted


def written_out(world, blocks, beta=0.0):
    """A run as the paper has it: whole logits, whole batches, plain autograd; the log's numbers, and the model behind them."""
    config = M.read_config(world / "base")[0]
    model, base = (M.empty_model(replace(config, vocab_size=1538), "cpu", torch.float32, torch.float32) for _ in range(2))
    for m in (model, base):
        M.load_weights(m, M.open_weights(world / "base"), config, "base")
    optimizer, log = T.Optimizer("scaled", [[p] for p in model.parameters()], 1e-4, 1.0), []
    for step in range(-(-(blocks.n + blocks.n_replay) // 8)):
        ids, targets, mask = (torch.from_numpy(x.astype(np.int64)) for x in blocks.read(blocks.rows_of_step(0, step, 8)))
        mean = lambda x: sum(l[m == 1].mean() for l, m in zip(x, mask) if m.any()) / len(mask)
        z, b = model.logits(ids), base.logits(ids)[..., :1536].detach().log_softmax(-1)           # over the vocabulary that the base has learned
        kl = mean((b.exp() * (b - z[..., :1536].log_softmax(-1))).sum(-1))
        loss = mean(torch.nn.functional.cross_entropy(z.transpose(1, 2), targets, reduction="none")) + beta * kl
        loss.backward()
        log.append((loss.item(), kl.item(), optimizer.step(step, 2e-3 * min(1, step / 3))))
    return log, model


def assert_is_the_run(folder, log, model):
    found = [e for e in lines_of(folder / "log.jsonl") if "loss" in e]
    assert np.allclose([(e["loss"], e["grad_norm"]) for e in found], [(loss, norm) for loss, _, norm in log], rtol=1e-4)
    assert "kl" not in found[0] or np.allclose([e["kl"] for e in found], [kl for _, kl, _ in log], rtol=1e-3, atol=1e-7)
    for n, p in M.load(folder).named_parameters():
        assert (p - dict(model.named_parameters())[n]).abs().max() <= 2e-5, n


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "reference"
    program(*finetune(world, out))
    return out


def test_a_run_leaves_a_checkpoint_a_log_and_a_record(world, reference):
    log, record = lines_of(reference / "log.jsonl"), data.read_json(reference / "train.json")
    assert [e["step"] for e in log] == list(range(8)) and record["finished"] and log[-1]["loss_tokens"] == record["loss_tokens"]
    packed = data.Packed(world / "chat")
    assert record["loss_tokens"] == int(packed.loss_mask[1:62 * 64 + 1].sum())
    model = M.load(reference)
    assert model.config.vocab_size == 1538 and data.read_json(reference / "config.json")["template"] == "tokens"


def test_a_run_is_the_recipe_written_out(world, reference):
    assert_is_the_run(reference, *written_out(world, T.Blocks(world / "chat", 64, 4000)))


def test_training_lowers_the_loss(world):
    losses = [e["loss"] for e in lines_of(world / "base/log.jsonl")]
    assert abs(losses[0] - math.log(1536)) < 0.2 and losses[-1] < losses[0] - 0.3


def test_a_finished_run_is_not_run_again(world, reference):
    before = (reference / "model.safetensors").stat().st_mtime_ns
    assert "finished already" in program(*finetune(world, reference)).stdout
    assert (reference / "model.safetensors").stat().st_mtime_ns == before


def test_other_settings_in_the_same_folder_are_refused_and_named(world, reference):
    line = one_line(program(*finetune(world, reference), "--lr", "1e-3", "--seed", "3", status=2))
    assert "lr was 0.002, is 0.001" in line and "seed was 0, is 3" in line


def test_micro_batches_make_the_same_run(world, reference, tmp_path):
    program(*finetune(world, tmp_path / "r", "--micro-batch", "3"))
    assert_close(reference, tmp_path / "r", 2e-5)
    assert np.allclose(*([e["grad_norm"] for e in lines_of(f / "log.jsonl")] for f in (reference, tmp_path / "r")), rtol=1e-4)      # the weights alone are blind to a constant factor


def test_two_ddp_processes_make_the_same_run(world, reference, tmp_path):
    torchrun(2, *finetune(world, tmp_path / "r", "--micro-batch", "2", "--eval-data", world / "chat"))
    assert_close(reference, tmp_path / "r", 2e-5)
    log = lines_of(tmp_path / "r/log.jsonl")
    assert np.allclose(*([(e["loss"], e["grad_norm"]) for e in entries if "loss" in e] for entries in (lines_of(reference / "log.jsonl"), log)), rtol=1e-4)
    assert log[-1]["eval_loss"] == pytest.approx(held_out_loss(world / "chat", tmp_path / "r"), abs=1e-4)


@pytest.mark.parametrize("moment", [0.0, 0.5, 1.0])
def test_killed_and_restarted_is_bit_identical(moment, world, reference, tmp_path):
    command = [sys.executable, *map(str, finetune(world, tmp_path / "r", "--save-every", "1"))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    states = tmp_path / "r/trainer"
    deadline = time.time() + 60
    while time.time() < deadline and process.poll() is None:            # the moment is counted from a saved state, up to during the next save
        if moment == 0.0 and states.is_dir() and any(states.glob("*.tmp")):
            break
        if moment and states.is_dir() and len(list(states.glob("step-???????"))) >= 1:
            time.sleep(moment * random.Random(moment).random() * 0.1)
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    again = program(*finetune(world, tmp_path / "r", "--save-every", "1"))
    assert (tmp_path / "r/model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    assert [e["step"] for e in lines_of(tmp_path / "r/log.jsonl")] == list(range(8)), again.stdout
    assert data.read_json(tmp_path / "r/train.json")["loss_tokens"] == data.read_json(reference / "train.json")["loss_tokens"]


def test_a_damaged_state_is_named_and_the_one_before_it_used(tmp_path, capsys):
    tensors = {f"{part}.{n}": torch.full((3,), float(i)) for part in ("master", "m", "v") for i, n in enumerate("ab")}
    state = T.State(tensors, {n: (torch.Size([3]), None) for n in "ab"})
    for step in (10, 20, 30):
        tensors["master.a"].fill_(step)
        state.save(tmp_path, step, {"tokens": step}, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000020", "step-0000030"]
    file = tmp_path / "step-0000030/state-00000.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert state.restore(tmp_path) == (20, {"tokens": 20}) and tensors["master.a"][0] == 20 and not file.exists()
    assert "step-0000030: damaged (state-00000.safetensors)" in capsys.readouterr().err


def test_a_run_that_never_leaves_warm_up_says_so(world, tmp_path):
    assert "outlasts" in program(*finetune(world, tmp_path / "r", "--warmup", "100")).stderr


def test_a_base_is_never_written_over(world, tmp_path):
    shutil.copytree(world / "base", tmp_path / "base")
    (tmp_path / "base/train.json").unlink()
    before = (tmp_path / "base/model.safetensors").read_bytes()
    line = one_line(program("train.py", "--model", tmp_path / "base", "--data", world / "chat", "--block", "64", "--tokens", "4k", "--out", tmp_path / "base", status=2))
    assert "did not make" in line and (tmp_path / "base/model.safetensors").read_bytes() == before


def test_another_shape_does_not_continue_a_run(world, tmp_path):
    config = json.loads((world / "tiny.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps(config))
    command = ["train.py", "--init", tmp_path / "c.json", "--data", world / "pretraining", "--out", tmp_path / "r", "--tokens", "4k", "--block", "128", "--warmup", "1"]
    program(*command)
    (tmp_path / "c.json").write_text(json.dumps({**config, "rope_theta": 500.0}))
    assert "init_hash" in one_line(program(*command, status=2))


@pytest.mark.parametrize("flag, value", [("--micro-batch", "-5"), ("--lr", "nan"), ("--tokens", "0"), ("--seed", "-1"), ("--block", "0"), ("--warmup", "-3")])
def test_senseless_numbers_are_one_line(flag, value, world, tmp_path):
    one_line(program(*finetune(world, tmp_path / "r"), f"{flag}={value}", status=2))


def test_replay_adds_blocks_of_text_to_the_same_imitation_blocks(world):
    text = T.Blocks(world / "pretraining", 64)
    alone, mixed = T.Blocks(world / "chat", 64, 4000), T.Blocks(world / "chat", 64, 4000, replay=text, fraction=0.2, seed=3)
    assert mixed.n == alone.n == 62 and mixed.n_replay == 16                               # 16 of 78 blocks: a fifth
    rows = np.concatenate([mixed.rows_of_step(3, step, 8) for step in range(10)])
    assert sorted(rows) == list(range(78)) and mixed.count(rows) == (62 * 64, 16 * 64)
    ids, _, mask = mixed.read(rows[rows >= 62])
    assert mask.all()                                                                      # loss on every token of the text
    assert len(set(mixed.replayed)) == 16 and (ids[0] == text.packed.block(mixed.replayed[rows[rows >= 62][0] - 62], 64)[0]).all()
    assert (mixed.read([5])[0] == alone.read([5])[0]).all()
    starts = mixed.conversation_starts([62])[0]
    at = mixed.replayed[0] * 64
    assert set(np.unique(starts)) - {0} == {s - at for s in text.packed.starts if at < s < at + 64}


def test_replay_and_kl_make_a_run_of_their_own(world, tmp_path):
    program(*finetune(world, tmp_path / "r", "--replay", "0.2", "--replay-data", world / "pretraining", "--kl", "0.5"))
    log, record = lines_of(tmp_path / "r/log.jsonl"), data.read_json(tmp_path / "r/train.json")
    assert record["tokens"] == 62 * 64 and record["replay_tokens"] == 16 * 64 and len(log) == 10
    assert log[0]["kl"] < 1e-6 < log[-1]["kl"]
    assert_is_the_run(tmp_path / "r", *written_out(world, T.Blocks(world / "chat", 64, 4000, replay=T.Blocks(world / "pretraining", 64), fraction=0.2), 0.5))
    assert "belong together" in program(*finetune(world, tmp_path / "s", "--replay", "0.2"), status=2).stderr


def test_a_strong_kl_keeps_the_model_at_its_base(world, reference, tmp_path):
    program(*finetune(world, tmp_path / "r", "--kl", "100"))
    base = weights_of(world / "base")
    moved = [sum((weights_of(f)[n][:len(t)] - t).square().sum().item() for n, t in base.items()) for f in (reference, tmp_path / "r")]
    divergence = lines_of(tmp_path / "r/log.jsonl")[-1]["kl"]
    assert divergence < 0.05 and moved[1] != moved[0]


def held_out_loss(packed, folder):
    blocks, model = T.Blocks(packed, 64), M.load(folder)
    ids, targets, mask = (torch.from_numpy(x.astype(np.int64)) for x in blocks.read(range(blocks.n)))
    with torch.no_grad():
        return sum(model(ids[i:i + 50], targets[i:i + 50], mask[i:i + 50].float()) for i in range(0, blocks.n, 50)).item() / mask.sum().item()


def test_held_out_loss_is_the_models_own_and_moves_nothing(world, reference, tmp_path):
    few = tmp_path / "few.jsonl"                                        # so few that each row is seen in the mean
    few.write_text("".join((world / "mix.jsonl").read_text().splitlines(keepends=True)[:20]))
    program("data.py", "pack", few, "--tokenizer", world / "world/tokenizer", "--out", tmp_path / "few")
    program(*finetune(world, tmp_path / "r", "--eval-data", tmp_path / "few", "--eval-every", "4"))
    found = {e["step"]: e["eval_loss"] for e in lines_of(tmp_path / "r/log.jsonl") if "eval_loss" in e}
    assert sorted(found) == [0, 4, 8] and found[8] < found[0]
    assert found[8] == pytest.approx(held_out_loss(tmp_path / "few", tmp_path / "r"), abs=1e-4)
    assert (tmp_path / "r/model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()


def test_batch_tokens_hold_the_paper_s_step_and_warm_up_takes_a_share(world, tmp_path):
    done = program(*finetune(world, tmp_path / "r", "--batch-tokens", "1024", "--warmup", "50%"))
    log = lines_of(tmp_path / "r/log.jsonl")
    assert len(log) == 4 and log[0]["tokens"] == 16 * 64 and [round(e["lr"] / 2e-3, 3) for e in log] == [0, 0.5, 1, 1], done.stderr


def test_sigterm_saves_and_the_same_command_goes_on(world, reference, tmp_path):
    command = [sys.executable, *map(str, finetune(world, tmp_path / "r", "--save-every", "0"))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "r/log.jsonl").is_file() or not (tmp_path / "r/log.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143 and "the same command continues" in stderr
    assert len(list((tmp_path / "r/trainer").glob("step-???????"))) == 1
    program(*finetune(world, tmp_path / "r", "--save-every", "0"))
    assert (tmp_path / "r/model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="malloc is not glibc's")
def test_freed_memory_is_kept_while_training():
    """Pages that the kernel has to give for five tensors of 64 MB, one after the other, when the heap has found its shape; each would be 16,384."""
    work = "train.keep_freed_memory(); again(30); before = faults(); again(5); print(faults() - before)"
    done = subprocess.run([sys.executable, "-c", f"import resource, torch, train\nfaults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\nagain = lambda n: any(torch.ones(1 << 24) is None for _ in range(n))\n{work}"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000


@pytest.mark.parametrize("seconds, saved", [(24, [3, 5]), (26, [3])])
def test_sigterm_begins_no_save_that_would_not_end_in_time(seconds, saved, world, tmp_path, monkeypatch, capsys):
    gradients, save, steps, late, calls = T.Trainer.gradients, T.State.save, [], [0.0], []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:                                            # seen by the step after it
            os.kill(os.getpid(), signal.SIGTERM)
        return gradients(*args)

    def slow(self, folder, step, *args):
        save(self, folder, step, *args)
        steps.append(step)
        late[0] += seconds
    monkeypatch.setattr(T.Trainer, "gradients", interrupted)
    monkeypatch.setattr(T.State, "save", slow)
    monkeypatch.setattr(T, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + late[0]))
    monkeypatch.setattr(sys, "argv", list(map(str, finetune(world, tmp_path / "r", "--save-every", "3"))))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            T.main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert end.value.code == 143 and steps == saved and len(calls) == 5
    assert "stopped by SIGTERM after step 5; the same command continues" in capsys.readouterr().err


def test_a_step_without_a_finite_loss_is_skipped_and_named(world, tmp_path):
    shutil.copytree(world / "base", tmp_path / "base")
    file = M.Safetensors(tmp_path / "base/model.safetensors")
    tensors = {n: file.get(n).clone() for n in file.entries}
    tensors["model.norm.weight"][0] = float("nan")
    M.write_safetensors(tmp_path / "base/model.safetensors", [(n, t.dtype, t.shape, lambda t=t: t) for n, t in tensors.items()])
    done = program("train.py", "--model", tmp_path / "base", "--data", world / "chat", "--out", tmp_path / "r", "--tokens", "8k", "--block", "64", "--batch", "8", status=1)
    skipped = [line for line in done.stderr.splitlines() if "step skipped (blocks" in line]
    assert len(skipped) == 11 and skipped[0].startswith("step 0: loss nan") and "more than 10 steps in a row" in done.stderr and "Traceback" not in done.stderr


def test_one_bad_step_changes_no_weight_and_no_moment_and_the_run_goes_on(world, tmp_path, monkeypatch, capsys):
    gradients, states = T.Trainer.gradients, []

    def spoiled(self, *args):
        found = gradients(self, *args)
        states.append([t.detach().clone() for t in self.state.tensors.values()])
        if len(states) == 3:
            self.optimizer.params[0].grad[0, 0] = math.inf
        return found
    monkeypatch.setattr(T.Trainer, "gradients", spoiled)
    monkeypatch.setattr(sys, "argv", list(map(str, finetune(world, tmp_path / "r"))))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        T.main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    moved = [any((a != b).any() for a, b in zip(*pair)) for pair in zip(states, states[1:])]
    assert moved == [True, True, False, True, True, True, True]
    assert [math.isfinite(e["grad_norm"]) for e in lines_of(tmp_path / "r/log.jsonl")] == [True, True, False, True, True, True, True, True]
    assert "gradient norm inf; step skipped (blocks " in capsys.readouterr().err


def test_a_run_too_large_for_the_device_stops_before_loading_and_says_what_fits(world, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 80, "num_attention_heads": 64, "hidden_size": 8192, "intermediate_size": 22016, "max_position_embeddings": 2048}))
    line = one_line(program("train.py", "--init", tmp_path / "c.json", "--data", world / "pretraining", "--out", tmp_path / "r", "--block", "2048", status=2))
    assert "GB on each of 1 ranks" in line and "--dp fsdp" in line and not (tmp_path / "r/config.json").exists()


def test_the_plan_needs_neither_weights_nor_a_gpu(tmp_path):
    done = program("train.py", "--model", "llama13b", "--dp", "fsdp", "--tp", "2", "--world", "8", "--kl", "0.1", "--plan", "--data", tmp_path, "--weights", tmp_path)
    rows = {line.rsplit(None, 1)[0].strip(): line.split()[-1] for line in done.stdout.splitlines()}
    assert "13,015,884,800 parameters" in done.stdout and (rows["weights"], rows["optimizer"]) == ("6.51", "13.02") and "fits in 74 GB" in done.stdout
    parts = ("weights", "gradients", "optimizer", "frozen base", "gathered", "activations", "working")
    assert float(rows["peak"]) == pytest.approx(sum(float(rows[part]) for part in parts), abs=0.05)
    assert "DOES NOT FIT" in program("train.py", "--model", "llama7b", "--plan", "--data", tmp_path, "--weights", tmp_path).stdout


def test_the_bare_command_lists_what_is_missing(tmp_path):
    done = program("train.py", "--model", "llama7b", "--weights", tmp_path, "--out", tmp_path / "out", "--data", tmp_path / "data", status=2)
    assert str(tmp_path / "llama7b") in done.stderr and "data.py pack" in done.stderr and "data.py fetch llama7b" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_more_tokens_than_there_are_is_an_error(world, tmp_path):
    assert "holds only" in one_line(program(*finetune(world, tmp_path / "r"), "--tokens", "1B", status=2))


def test_data_of_another_tokenizer_is_refused(world, real, tmp_path):
    line = one_line(program("train.py", "--model", real / "stories260k/hf", "--data", world / "chat", "--block", "128", "--out", tmp_path / "r", status=2))
    assert "another tokenizer" in line


def test_a_real_checkpoint_is_fine_tuned(real, tmp_path):
    chats = [{"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["chatgpt_answers"][0]}]} for r in lines_of(real / "hc3/open_qa.jsonl")[:60] if r["chatgpt_answers"]]
    data.write_jsonl(tmp_path / "c.jsonl", chats)
    program("data.py", "pack", tmp_path / "c.jsonl", "--tokenizer", real / "stories260k/hf", "--out", tmp_path / "packed")
    program("train.py", "--model", real / "stories260k/hf", "--data", tmp_path / "packed", "--out", tmp_path / "r", "--block", "128", "--batch", "16", "--warmup", "2")
    log = lines_of(tmp_path / "r/log.jsonl")
    assert log[-1]["loss"] < log[0]["loss"] and M.load(tmp_path / "r").config.vocab_size == 514
