"""Every layout of ranks trains the same model: gloo on a CPU, two and four processes, both families."""
import argparse

import pytest
import torch

import model as M
import train as T
from conftest import one_line, program, torchrun
from data import UserError

LAYOUTS = {"ddp2": 2, "fsdp2": 2, "tp2": 2, "tp2 ddp2": 4, "tp2 fsdp2": 4, "tp4": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    """{(model, layout, kl): what came out}, one launch for each number of processes."""
    folder = tmp_path_factory.mktemp("layouts")
    shapes = {"gpt2": M.gpt2(2, 5, 30, vocab_size=101, context=16, bos=1, eos=2),                    # odd heads, odd vocabulary, tied
              "llama": M.llama(2, 6, 24, 37, n_kv_head=3, head_dim=6, vocab_size=97, context=16)}    # grouped-query 1 + 2, odd everything
    for name, config in shapes.items():
        state = dict(M.Transformer(config).initialize(3).named_parameters())
        for p in state.values():                                        # as if trained: biases and norms of their own, large weights
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        M.save_checkpoint(folder / name, config, lambda n: state[n], torch.float32)
    folders = [folder / name for name in shapes]
    try:
        folders.append(request.getfixturevalue("real") / "stories260k/hf")
    except pytest.skip.Exception:
        pass
    out = {}
    for world in (1, 2, 4):
        command = ["tests/layouts.py", folder / f"{world}.pt", folder / "states", *folders]
        program(*command) if world == 1 else torchrun(world, *command)
        out |= torch.load(folder / f"{world}.pt", weights_only=True)
    return out


def cases():
    return [pytest.param(model, layout, id=f"{model}-{layout.replace(' ', '-')}") for model in ("gpt2", "llama", "hf") for layout in LAYOUTS if layout != "tp4" or model == "hf"]


def compared(runs, model, layout, kl):
    if (model, "one", 0.0) not in runs:
        pytest.skip("the folder of real data (../shared/data) is absent")
    return runs[model, "one", 0.0 if kl == "continued" else kl], runs[model, layout, kl]


def assert_same(a, b, tolerance):
    assert a.keys() == b.keys()
    for n in a:
        if n.endswith("attention.k.bias"):          # its true gradient is zero: the optimizer's 1e-30 makes whole steps of rounding noise
            continue
        assert (a[n] - b[n]).abs().max() <= tolerance, n


@pytest.mark.parametrize("model, layout", cases())
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_a_layout_trains_as_one_process_does(runs, model, layout, kl):
    """Losses, gradients after reduction, gradient norms and weights after five steps; with KL to the base and recomputed activations too."""
    one, many = compared(runs, model, layout, kl)
    assert torch.allclose(torch.tensor(many["losses"]), torch.tensor(one["losses"]), rtol=1e-5, atol=1e-6)
    assert torch.allclose(torch.tensor(many["norms"]), torch.tensor(one["norms"]), rtol=1e-4)
    assert_same(one["gradients"], many["gradients"], 5e-6)
    assert_same(one["weights"], many["weights"], 2e-4)
    assert kl == 0 or one["losses"][-1][1] > 1e-4 and one["losses"][0][1] < 1e-6       # zero at the base, then above


@pytest.mark.parametrize("model, layout", cases())
def test_a_layout_continues_what_another_saved(runs, model, layout):
    one, many = compared(runs, model, layout, "continued")
    assert torch.allclose(torch.tensor(many["losses"]), torch.tensor(one["losses"][3:]), rtol=1e-5, atol=1e-6)
    assert_same(one["weights"], many["weights"], 2e-4)


@pytest.mark.parametrize("model, layout", cases())
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_the_plan_has_the_bytes_of_the_fullest_rank_exactly(runs, model, layout, kl):
    held, planned, gradients = compared(runs, model, layout, kl)[1]["bytes"]
    assert held == planned and gradients == held[0]


@pytest.mark.parametrize("config", [M.llama(3, 6, 96, 200, n_kv_head=2, head_dim=16, vocab_size=500, context=64), M.gpt2(3, 4, 64, vocab_size=500, context=64)], ids=["llama", "gpt2"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("path", ["sdpa", "eager", "blocked"])
def test_the_plan_has_the_bytes_that_autograd_saves(config, compute, path):
    args = argparse.Namespace(tp=1, dp="ddp", batch=4, micro_batch=2, block=64, kl=0.0, recompute=False)
    model = M.Transformer(config, compute, path).initialize(0)
    ids, weights = torch.randint(0, 500, (2, 64)), torch.zeros(2, 64)
    weights[:, ::2] = 0.01
    saved = T.saved_bytes(lambda: model(ids, ids, weights), model.parameters())
    assert T.plan(args, config, 1, compute, path, loss_share=0.5)["activations"] == pytest.approx(saved, rel=0.1)


def test_recomputing_keeps_the_blocks_inputs_alone():
    config = M.llama(8, 4, 64, 170, vocab_size=500, context=64)
    args = argparse.Namespace(tp=1, dp="ddp", batch=4, micro_batch=4, block=64, kl=0.0, recompute=True)
    lean = T.plan(args, config, 1, torch.float32, "sdpa")["activations"]
    args.recompute = False
    full = T.plan(args, config, 1, torch.float32, "sdpa")["activations"]
    assert full - lean > 8 * 4 * 64 * 64 * 4 * 5


def test_five_steps_move_the_weights_by_far_more_than_the_tolerance(runs):
    for n, gradient in runs["llama", "one", 0.0]["gradients"].items():
        assert gradient.abs().max() > 1e-4, n
    far, near = (runs["llama", "one", kl]["weights"] for kl in (0.0, 0.3))
    assert max((far[n] - near[n]).abs().max() for n in far) > 2e-3


def test_kl_is_the_divergence_over_the_bases_vocabulary():
    torch.manual_seed(0)
    h, weight, states, base_weight = torch.randn(5, 8, requires_grad=True), torch.randn(13, 8, requires_grad=True), torch.randn(5, 8), torch.randn(13, 8)
    targets, w = torch.randint(0, 13, (5,)), torch.rand(5)
    log_m, log_b = (h @ weight.T)[:, :11].log_softmax(-1), (states @ base_weight.T)[:, :11].log_softmax(-1)
    kl = (w * (log_b.exp() * (log_b - log_m)).sum(-1)).sum()
    wanted = (w * torch.nn.functional.cross_entropy(h @ weight.T, targets, reduction="none")).sum() + 0.7 * kl
    gradients = torch.autograd.grad(wanted, (h, weight))
    loss, ours = M.cross_entropy(h, weight, targets, w, chunk=2, base=(states, base_weight, 11), beta=0.7)
    assert torch.allclose(loss, wanted, atol=1e-5) and torch.allclose(ours, kl, atol=1e-5)
    for a, b in zip(torch.autograd.grad(loss, (h, weight)), gradients):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_world_that_does_not_fit_is_an_error_before_anything_is_loaded(world, tmp_path):
    line = one_line(program("train.py", "--model", world / "base", "--data", world / "chat", "--out", tmp_path / "r", "--block", "64", "--tp", "2", status=2))
    assert "--tp 2: does not divide the 1 ranks" in line and not (tmp_path / "r/log.jsonl").exists()
    with pytest.raises(UserError, match="only 2 key-value heads"):
        T.check_world(argparse.Namespace(tp=4), M.llama(1, 4, 16, 24, n_kv_head=2), 4)
