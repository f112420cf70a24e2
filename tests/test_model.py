import dataclasses
import json
import os
import random

import pytest
import torch
import torch.nn.functional as F
import transformers

import data
import model as M
from conftest import one_line, program, torchrun

transformers.logging.set_verbosity_error()
torch.manual_seed(0)

SHAPES = {
    "llama": dict(kind="llama", n_layer=2, n_head=4, n_kv_head=4, n_embd=32, mlp_dim=56, tied=False),
    "llama, grouped queries": dict(kind="llama", n_layer=2, n_head=6, n_kv_head=2, n_embd=48, mlp_dim=80, tied=True),
    "llama, own head size": dict(kind="llama", n_layer=1, n_head=4, n_kv_head=1, n_embd=32, mlp_dim=40, head_dim=16, tied=False),
    "llama 3 positions": dict(kind="llama", n_layer=1, n_head=2, n_kv_head=1, n_embd=32, mlp_dim=40, tied=True, rope_theta=500000.0,
                              rope_scaling=(("factor", 8.0), ("high_freq_factor", 4.0), ("low_freq_factor", 1.0), ("original_max_position_embeddings", 32))),
    "gpt2": dict(kind="gpt2", n_layer=3, n_head=4, n_embd=32),
    "gpt2, odd": dict(kind="gpt2", n_layer=1, n_head=5, n_embd=35),
}


def pair_of(name, tmp_path):
    """Our model of a shape, and transformers' reading of the checkpoint that we wrote."""
    shape = dict(SHAPES[name])
    make = M.llama if shape.pop("kind") == "llama" else M.gpt2
    torch.manual_seed(0)
    ours = M.Transformer(make(**shape, vocab_size=101, context=64, bos=1, eos=2)).initialize(0)
    with torch.no_grad():
        for p in ours.parameters():                                     # norms and biases too, or a wrong one would go unseen
            p.add_(torch.randn_like(p) * 0.1)
    state = dict(ours.named_parameters())
    M.save_checkpoint(tmp_path, ours.config, lambda n: state[n], torch.float32)
    return ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("T", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("conversations", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_attention_in_blocks_is_masked_softmax(T, conversations, dtype):
    g = torch.Generator().manual_seed(T)
    exact = [torch.randn(2, T, heads, 16, generator=g).double().transpose(1, 2).requires_grad_() for heads in (6, 2, 2)]
    do = torch.randn(2, 6, T, 16, generator=g).double()
    starts = torch.stack([torch.arange(T) // n * n for n in (50, 1000)]).int() if conversations else None

    def results(path, dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
        o = M.attention(*inputs, path, starts)
        return [o.detach(), *torch.autograd.grad(o, inputs, do.to(dtype))]
    t = torch.arange(T)
    visible = (t <= t[:, None]) & (t >= (torch.zeros(2, T) if starts is None else starts)[..., None])            # (2, T, T)
    k, v = (x.repeat_interleave(3, 1) for x in exact[1:])
    o = (exact[0] @ k.transpose(2, 3) / 4).masked_fill(~visible[:, None], -torch.inf).softmax(-1) @ v
    wanted = [o.detach(), *torch.autograd.grad(o, exact, do)]

    def errors(path):
        return [((a.double() - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(results(path, dtype), wanted)]
    assert max(errors("blocked")) <= {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2 * max(errors("sdpa"))}[dtype]


def test_attention_is_picked_by_device_and_precision():
    def pick(device, compute, length, doc_mask=False):
        return M.pick_attention("auto", torch.device(device), compute, length, doc_mask)
    assert pick("cpu", torch.bfloat16, 512) == "blocked" and pick("cpu", torch.bfloat16, 2048) == pick("cpu", torch.float32, 512) == pick("cuda", torch.bfloat16, 512) == "sdpa"
    assert M.pick_attention("eager", torch.device("cpu"), torch.bfloat16, 512, False) == "eager"


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("path", ["sdpa", "eager", "blocked"])
def test_logits_and_gradients_are_those_of_transformers(name, path, tmp_path):
    ours, theirs = pair_of(name, tmp_path)
    ours.attention_path = path
    ids = torch.randint(0, 101, (3, 50))
    logits, reference = ours.logits(ids), theirs(ids).logits
    assert (logits - reference).abs().max() <= 1e-4
    logits.square().mean().backward()
    reference.square().mean().backward()
    gradients, wanted = {n: p.grad for n, p in ours.named_parameters()}, {n: p.grad for n, p in theirs.named_parameters()}
    for published, (parts, transposed) in M.published_names(ours.config).items():
        grad = torch.cat([gradients[p] for p in parts])
        assert torch.allclose(grad.T if transposed else grad, wanted[published], atol=1e-5, rtol=1e-3), published


@pytest.mark.parametrize("name", SHAPES)
def test_a_checkpoint_comes_back_as_it_was(name, tmp_path):
    ours, _ = pair_of(name, tmp_path)
    again = M.load(tmp_path)
    assert again.config == ours.config
    for (n, p), (_, q) in zip(ours.named_parameters(), again.named_parameters()):
        assert torch.equal(p, q), n


def test_sharded_checkpoints_are_written_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr(M, "SHARD_BYTES", 20000)
    ours, theirs = pair_of("llama", tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    ids = torch.randint(0, 101, (1, 9))
    assert torch.equal(M.load(tmp_path).logits(ids), ours.logits(ids)) and (theirs(ids).logits - ours.logits(ids)).abs().max() < 1e-4


def test_published_sizes():
    assert M.n_parameters(M.PRESETS["llama7b"]) == 6_738_415_616
    assert M.n_parameters(M.PRESETS["gpt2-xl"]) == 1_557_611_200
    assert "6,738,415,616" in program("model.py", "info", "llama7b").stdout


def test_a_real_model_speaks_as_its_authors_say(real):
    folder = real / "stories260k/hf"
    model, tokenizer = M.load(folder), data.load_tokenizer(folder)
    new = M.generate(model, [[tokenizer.bos]], 70)[0]
    assert data.continuation(tokenizer, [tokenizer.bos], new).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. She wanted to play with it, but it was too high.")
    ids = torch.randint(3, 512, (2, 100))
    assert (transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits - model.logits(ids)).abs().max() < 1e-4


def greedy(model, prompt, n, eos):
    ids = list(prompt)
    while len(ids) < min(len(prompt) + n, model.config.context):
        token = model.logits(torch.tensor([ids]))[0, -1].argmax().item()
        if token == eos:
            break
        ids.append(token)
    return ids[len(prompt):]


@pytest.mark.parametrize("prefix", [0, 30])
@pytest.mark.parametrize("name", ["llama, grouped queries", "gpt2", "real"])
def test_generation_with_slots_prefix_and_refill_equals_uncached_greedy_decoding(name, prefix, tmp_path, request):
    if name == "real":
        model, vocabulary = M.load(request.getfixturevalue("real") / "stories260k/hf"), 512
    else:
        model, vocabulary = pair_of(name, tmp_path)[0], 101
    rng = random.Random(1)
    shared = [1] + [rng.randrange(3, vocabulary) for _ in range(prefix)]
    prompts = [shared + [rng.randrange(3, vocabulary) for _ in range(rng.randint(1, 20))] for _ in range(17)]
    prompts += prompts[:2]                                              # twins share one prefill
    eos = greedy(model, prompts[0], 6, None)[-1]                        # a token that does end some rows early
    with torch.no_grad():
        wanted = [greedy(model, p, 25, eos) for p in prompts]
    assert len({len(w) for w in wanted}) > 1
    told = {}
    assert M.generate(model, prompts, 25, eos=[eos], slots=5, done=told.__setitem__) == wanted
    assert told == dict(enumerate(wanted))


@pytest.mark.parametrize("n, shared, batch", [(7, 40, 64), (7, 0, 2048), (1, 40, 8), (3, 16, 1)])
def test_last_states_behind_a_shared_prefix_are_those_of_each_prompt_alone(n, shared, batch):
    model = M.Transformer(M.llama(2, 4, 32, 64, n_kv_head=2, vocab_size=100, context=128)).initialize(0)
    rng = random.Random(n)
    prompts = [[3] * shared + [rng.randrange(100) for _ in range(rng.randint(1, 20))] for _ in range(n)]
    found = {i: h for rows, states in M.last_states(model, prompts, batch) for i, h in zip(rows, states)}
    assert sorted(found) == list(range(n))
    for i, h in found.items():
        assert torch.allclose(h, model.hidden(torch.tensor([prompts[i]]))[0, -1], atol=1e-5)


def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours(tmp_path):
    model = pair_of("llama", tmp_path)[0]
    prompts, seeds = [[1, 5, 6], [1, 7], [1, 5, 6], [1, 9, 9, 9]], [11, 12, 13, 14]
    together = M.generate(model, prompts, 12, temperature=1.0, seeds=seeds, slots=2)
    assert together == [M.generate(model, [p], 12, temperature=1.0, seeds=[s])[0] for p, s in zip(prompts, seeds)]
    assert together[0] != together[2]


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    u = (torch.arange(2000) + 0.5) / 2000
    share = lambda **kw: torch.bincount(M.sample(logits.expand(2000, -1), kw.get("t", 1.0), kw.get("k", 0), kw.get("p", 1.0), u), minlength=4) / 2000
    assert torch.allclose(share(), logits[0].softmax(-1), atol=1e-3)
    assert torch.allclose(share(t=2.0), (logits[0] / 2).softmax(-1), atol=1e-3)
    assert torch.allclose(share(k=2)[:2], logits[0, :2].softmax(-1), atol=1e-3) and share(k=2)[2:].sum() == 0
    assert share(p=0.5).tolist() == [1, 0, 0, 0] and share(p=0.7)[1] > 0 and share(p=0.7)[2] == 0


def test_generation_stops_where_the_caller_says(tmp_path):
    model = pair_of("llama", tmp_path)[0]
    free = M.generate(model, [[1, 4], [1, 8, 8]], 20)
    assert M.generate(model, [[1, 4], [1, 8, 8]], 20, stop=lambda i, new: len(new) == 3 + i) == [free[0][:3], free[1][:4]]


@pytest.mark.parametrize("n", [0, 1, 50])
@pytest.mark.parametrize("chunk", [7, 4096])
def test_fused_cross_entropy_and_its_gradients(n, chunk):
    h, weight = torch.randn(n, 16, requires_grad=True), torch.randn(70, 16, requires_grad=True)
    targets, w = torch.randint(0, 70, (n,)), torch.rand(n)
    reference = (w * F.cross_entropy(h @ weight.T, targets, reduction="none")).sum()
    wanted = torch.autograd.grad(3 * reference, [h, weight])
    loss = M.cross_entropy(h, weight, targets, w, chunk)
    got = torch.autograd.grad(3 * loss, [h, weight])
    assert torch.allclose(loss, reference, atol=1e-5) and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, wanted))


def test_new_rows_are_the_mean_of_the_old(tmp_path):
    ours, _ = pair_of("llama", tmp_path)
    model = M.empty_model(dataclasses.replace(ours.config, vocab_size=103), "cpu", torch.float32, torch.float32)
    M.load_weights(model, M.Weights(tmp_path), ours.config, tmp_path)
    for old, new in ((ours.embedding.weight, model.embedding.weight), (ours.head.weight, model.head.weight)):
        assert torch.equal(new[:101], old) and torch.allclose(new[101:], old.mean(0).expand(2, -1), atol=1e-6)
    assert model.logits(torch.tensor([[102]])).shape[-1] == 103


@pytest.mark.parametrize("name, size", [("llama", 2), ("llama", 4), ("llama, grouped queries", 2), ("gpt2, odd", 2), ("gpt2, odd", 5)])
def test_each_rank_reads_its_own_slice_and_together_they_are_the_whole(name, size, tmp_path):
    ours, _ = pair_of(name, tmp_path)
    wanted, config = dict(ours.named_parameters()), dataclasses.replace(ours.config, vocab_size=104)
    slices = []
    for rank in range(size):
        model = M.empty_model(config, "cpu", torch.float32, torch.float32, tp=M.TensorParallel(rank, size))
        M.load_weights(model, M.Weights(tmp_path), ours.config, tmp_path)
        slices.append(dict(model.named_parameters()))
    for n, p in wanted.items():
        cut = M.TensorParallel(0, size).cut(config, n)
        joined = slices[0][n] if cut is None else torch.cat([s[n] for s in slices], cut[0])
        assert torch.equal(joined[:len(p)], p), n
        assert len(joined) == (104 if "embedding" in n or "head" in n else len(p)) and torch.allclose(joined[len(p):], p.mean(0), atol=1e-6)


TP_SCRIPT = """
import sys; sys.path.insert(0, '.')
import torch, torch.distributed as dist, model as M
dist.init_process_group("gloo")
folder, tp = sys.argv[1], M.TensorParallel(dist.get_rank(), dist.get_world_size())
config = M.read_config(folder)[0]
model = M.empty_model(config, "cpu", torch.float32, torch.float32, tp=tp)
M.load_weights(model, M.open_weights(folder), config, folder)
torch.manual_seed(0)
ids, targets, w = torch.randint(0, config.vocab_size, (3, 20)), torch.randint(0, config.vocab_size, (3, 20)), torch.rand(3, 20) * (torch.rand(3, 20) > 0.4)
loss = model(ids, targets, w)
loss.backward()
whole = M.load(folder).requires_grad_(True)
reference = whole(ids, targets, w)
reference.backward()
assert torch.allclose(loss, reference, rtol=1e-5), (loss, reference)
ours = dict(model.named_parameters())
for n, p in whole.named_parameters():
    cut = tp.cut(config, n)
    g = p.grad if cut is None else p.grad.narrow(cut[0], cut[1].start, len(cut[1]))
    assert torch.allclose(ours[n].grad, g, atol=1e-5, rtol=1e-3), (n, (ours[n].grad - g).abs().max())
"""


@pytest.mark.parametrize("name, size", [("llama, grouped queries", 2), ("gpt2, odd", 2), ("real", 4)])
def test_tensor_parallel_loss_and_gradients_are_those_of_one_process(name, size, tmp_path, request):
    folder = request.getfixturevalue("real") / "stories260k/hf" if name == "real" else tmp_path
    if name != "real":
        pair_of(name, tmp_path)
    (tmp_path / "script.py").write_text(TP_SCRIPT)
    torchrun(size, tmp_path / "script.py", folder)


def broken(tmp_path, change):
    """A whole checkpoint whose safetensors file was changed: change(header dict, data bytes) -> file bytes."""
    pair_of("llama", tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    (tmp_path / "model.safetensors").write_bytes(change(json.loads(raw[8:8 + n]), raw[8 + n:]))


def joined(header, body):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


NAME = "model.layers.1.mlp.up_proj.weight"
DAMAGE = {
    "truncated": (lambda h, b: joined(h, b[:-100]), "truncated"),
    "no header": (lambda h, b: b"\xff" * 20, "not a safetensors file"),
    "garbled header": (lambda h, b: (40).to_bytes(8, "little") + b"{" * 40 + b, "malformed"),
    "missing tensor": (lambda h, b: joined({k: v for k, v in h.items() if k != NAME}, b), f"missing tensor '{NAME}'"),
    "unexpected tensor": (lambda h, b: joined({**h, "extra": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, b), "unexpected tensor 'extra'"),
    "wrong shape": (lambda h, b: joined({**h, NAME: {**h[NAME], "shape": h[NAME]["shape"][::-1]}}, b), NAME),
    "wrong size": (lambda h, b: joined({**h, NAME: {**h[NAME], "shape": [1, 1]}}, b), NAME),
    "unknown dtype": (lambda h, b: joined({**h, NAME: {**h[NAME], "dtype": "F7"}}, b), "'F7'"),
    "overlap": (lambda h, b: joined({**h, NAME: {**h[NAME], "data_offsets": [o - 4 for o in h[NAME]["data_offsets"]]}}, b), "overlaps"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named(name, tmp_path):
    change, words = DAMAGE[name]
    broken(tmp_path, change)
    with pytest.raises(data.UserError, match=".*" + __import__("re").escape(words)):
        M.load(tmp_path)


@pytest.mark.parametrize("field, value", [("model_type", "mistral"), ("hidden_act", "gelu"), ("attention_bias", True), ("rope_scaling", {"rope_type": "yarn", "factor": 2}), ("num_key_value_heads", 3), ("hidden_size", "64")])
def test_a_config_of_another_architecture_names_the_field(field, value, tmp_path):
    pair_of("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    assert field in one_line(program("model.py", "info", tmp_path, status=2))


@pytest.mark.parametrize("field, value, named", [("num_key_value_heads", [1], ""), ("head_dim", 0.5, ""), ("rms_norm_eps", [1], ""), ("rope_theta", "x", ""), ("rope_theta", float("nan"), ""), ("tie_word_embeddings", {}, ""),
                                                 ("bos_token_id", "<s>", ""), ("eos_token_id", [[2]], ""), ("rope_scaling", [1], ""), ("rope_scaling", {"rope_type": "llama3", "factor": 8}, "high_freq_factor"), ("rope_parameters", "x", "")])
def test_a_senseless_value_in_a_config_is_named(field, value, named):
    shape = M.llama(2, 4, 32, 56, rope_scaling=SHAPES["llama 3 positions"]["rope_scaling"])
    config = M.config_to_hf(shape)
    assert M.config_from_hf(config) == shape and M.config_from_hf({**config, "eos_token_id": [7, 8]}).eos == 7
    with pytest.raises(data.UserError, match=named or field):
        M.config_from_hf({**config, field: value})


def test_an_unknown_model_is_one_line(tmp_path):
    assert "llama7b" in one_line(program("model.py", "info", "llama8b", status=2))


def test_generate_writes_replies(world, tmp_path):
    program("model.py", "generate", "--model", world / "base", "--prompts", world / "world/heldout.jsonl", "--max-new", "8", "--out", tmp_path / "r.jsonl")
    replies = data.read_replies(tmp_path / "r.jsonl")
    prompts = data.read_prompts(world / "world/heldout.jsonl")
    assert list(replies) == [p["id"] for p in prompts] and all(replies[p["id"]][0] == p["prompt"] for p in prompts)


def test_a_prompt_longer_than_the_context_loses_its_beginning_and_is_counted(world, tmp_path):
    context = M.read_config(world / "base")[0].context
    long = " ".join(f"word{i}" for i in range(context))
    data.write_jsonl(tmp_path / "p.jsonl", [{"id": "long", "prompt": long}, {"id": "end", "prompt": long[-1500:]}, {"id": "short", "prompt": "tell me about the moon"}])
    done = program("model.py", "generate", "--model", world / "base", "--prompts", tmp_path / "p.jsonl", "--max-new", "8", "--temperature", "0", "--out", tmp_path / "r.jsonl")
    long_, end, short = data.read_jsonl(tmp_path / "r.jsonl")
    assert "2 prompts were too long" in done.stdout and long_["lost_tokens"] > end["lost_tokens"] > 0 and "lost_tokens" not in short
    assert long_["messages"][0]["content"] == long and long_["messages"][1] == end["messages"][1]        # whole in the file; asked alike, because the same tokens were kept
    ids = list(range(100))
    assert M.fit_context(ids, 100, 8) == ids[8:] and M.fit_context(ids, 200, 8) == ids and M.fit_context(ids, 100, 512) == ids[50:]


@pytest.fixture(params=["llama", "stories260k/hf", "miniature"])
def exported(request, tmp_path):
    """(our tokenizer, transformers' reading of the exported folder)."""
    folder = request.getfixturevalue("world") / "world/tokenizer" if request.param == "miniature" else request.getfixturevalue("real") / request.param
    ours = data.load_tokenizer(folder).add(data.SPECIAL["tokens"])
    ours.export(tmp_path, "tokens")
    M.write_json(tmp_path / "config.json", M.config_to_hf(M.llama(1, 1, 8, 8, vocab_size=ours.vocab_size)))
    return ours, transformers.AutoTokenizer.from_pretrained(tmp_path)


def test_transformers_reads_the_same_ids_from_an_exported_tokenizer(exported, real):
    import gzip
    ours, theirs = exported
    texts = ["", " ", "  two  spaces ", "\n\n\t x", "naïve größe 鸭 🦆\u200d", "a\x00b", "12345 67"]
    texts += [t for line in gzip.open(real / "humaneval/HumanEval.jsonl.gz", "rt") for t in (json.loads(line)["prompt"], json.loads(line)["canonical_solution"])]
    for file, field in (("hc3/wiki_csai.jsonl", "chatgpt_answers"), ("nq/NQ-open.dev.jsonl", "question")):
        texts += [t for line in list(open(real / file, encoding="utf-8"))[:800] for t in ([json.loads(line)[field]] if field == "question" else json.loads(line)[field])]
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == [ours.bos, *ids], text
        assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == ours.decode(ids)


CHATS = [[("user", "hello there"), ("assistant", "hi!")], [("user", "a"), ("assistant", "b\n- c"), ("user", " d ")], [("system", "be brief"), ("user", "größe?"), ("assistant", ""), ("user", "x")], [("assistant", "first"), ("user", "")]]


@pytest.mark.parametrize("template", ["tokens", "koala"])
def test_the_exported_chat_template_renders_the_same_ids(exported, template):
    ours, theirs = exported
    for turns in CHATS:
        messages = [{"role": r, "content": c} for r, c in turns]
        for answer in (False, True):
            got = theirs.apply_chat_template(messages, chat_template=data.CHAT_TEMPLATES[template], add_generation_prompt=answer, tokenize=True, return_dict=False)
            assert got == data.render(messages, ours, template, answer=answer)[0], (messages, answer)


def test_meta_and_hugging_face_layouts_give_identical_logits(real):
    ids = torch.randint(3, 512, (2, 60))
    a, b = M.load(real / "stories260k/hf"), M.load(real / "stories260k/meta")
    assert a.config == b.config and torch.equal(a.logits(ids), b.logits(ids))


def to_meta(model, folder, n):
    """Write `model` as Meta does, in `n` files."""
    c = model.config
    state = dict(model.named_parameters())
    theirs = {"attention.q": "attention.wq", "attention.k": "attention.wk", "attention.v": "attention.wv", "attention.o": "attention.wo", "mlp.gate": "feed_forward.w1", "mlp.down": "feed_forward.w2",
              "mlp.up": "feed_forward.w3", "attention_norm": "attention_norm", "mlp_norm": "ffn_norm", "embedding": "tok_embeddings", "norm": "norm", "head": "output"}
    shards = [{} for _ in range(n)]
    for name, p in state.items():
        key = name.removeprefix("blocks.").removesuffix(".weight")
        layer, _, part = key.partition(".") if key[0].isdigit() else ("", "", key)
        p = p.detach()
        if part in ("attention.q", "attention.k"):                      # half-split rows back to Meta's pairs
            p = p.view(-1, 2, c.head_dim // 2, c.n_embd).transpose(1, 2).reshape(p.shape)
        dim = 1 if part in ("attention.o", "mlp.down", "embedding") else 0
        for shard, piece in zip(shards, [p] * n if p.dim() == 1 else p.chunk(n, dim)):
            shard[(f"layers.{layer}." if layer else "") + theirs[part] + ".weight"] = piece.clone()
    folder.mkdir()
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    (folder / "params.json").write_text(json.dumps({"dim": c.n_embd, "n_layers": c.n_layer, "n_heads": c.n_head, "n_kv_heads": c.n_kv_head, "vocab_size": -1, "multiple_of": 8, "norm_eps": c.norm_eps, "max_seq_len": c.context}))


@pytest.mark.parametrize("n", [1, 2])
def test_meta_checkpoints_split_over_files_are_joined(n, tmp_path):
    ours, _ = pair_of("llama", tmp_path / "hf")
    to_meta(ours, tmp_path / "meta", n)
    again = M.load(tmp_path / "meta")
    assert again.config == ours.config
    for (name, p), (_, q) in zip(ours.named_parameters(), again.named_parameters()):
        assert torch.equal(p, q), name


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {BOMB}",)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path):
    global BOMB
    BOMB = tmp_path / "ran"
    (tmp_path / "meta").mkdir()
    torch.save({"tok_embeddings.weight": Bomb()}, tmp_path / "meta/consolidated.00.pth")
    (tmp_path / "meta/params.json").write_text("{}")
    assert "consolidated.00.pth: not a checkpoint of plain tensors" in one_line(program("model.py", "info", tmp_path / "meta", status=2))
    assert not BOMB.exists()


def test_chat_streams_whole_characters_and_remembers(real):
    out = program("model.py", "chat", "--model", real / "stories260k/hf", "--temperature", "0", "--max-new", "12", input="Once upon a time\nThe dog\n").stdout
    assert out.startswith("> , there was a little girl named Lily.") and out.count("> ") == 3


def test_streamed_text_never_takes_a_character_back(real):
    """Token by token, also inside a character made of several byte tokens, as chat prints it."""
    tokenizer = data.load_tokenizer(real / "stories260k/hf")
    prompt, whole = [tokenizer.bos, *tokenizer.encode("He said:")], [tokenizer.bos, *tokenizer.encode("He said: größe 鸭 🦆👩‍🚀 end")]
    new, shown = whole[len(prompt):], ""
    assert whole[:len(prompt)] == prompt and len(new) > 25
    for n in range(1, len(new) + 1):
        text = data.continuation(tokenizer, prompt, new[:n]).rstrip("\ufffd")
        assert text.startswith(shown) and "\ufffd" not in text
        shown = text
    assert shown == " größe 鸭 🦆👩‍🚀 end"


def test_generation_ends_at_a_stop_text_cut_across_tokens(real):
    folder = real / "stories260k/hf"
    model, tokenizer = M.load(folder), data.load_tokenizer(folder)
    for stop in ("little girl", "named L", "y. She", "ily"):
        new = M.generate(model, [[tokenizer.bos]], 60, stop=data.stop_rule(tokenizer, [stop]))[0]
        text = data.continuation(tokenizer, [tokenizer.bos], new)
        assert stop in text and stop not in data.continuation(tokenizer, [tokenizer.bos], new[:-1])


@pytest.mark.parametrize("name", ["llama, grouped queries", "gpt2"])
def test_fused_products_change_nothing(name, tmp_path):
    ours, _ = pair_of(name, tmp_path)
    ids = torch.randint(0, 101, (2, 20))
    assert torch.allclose(M.load(tmp_path).fuse().logits(ids), ours.logits(ids), atol=1e-5)


@pytest.mark.parametrize("name", ["llama, grouped queries", "llama", "gpt2"])
def test_packed_bfloat16_products_are_as_good_as_plain_ones(name, tmp_path):
    ours, _ = pair_of(name, tmp_path)
    plain, packed = M.load(tmp_path, dtype=torch.bfloat16), M.load(tmp_path, dtype=torch.bfloat16).fuse()
    if not M.PackedLinear.fits(plain.output_weight):
        pytest.skip("this CPU has no bfloat16 products in oneDNN")
    for shape in ((1, 1), (3, 20)):
        ids = torch.randint(0, 101, shape)
        error = lambda m: (m.logits(ids) - ours.logits(ids)).abs().max()
        assert packed.packed_head is not None and error(packed) < 1.5 * error(plain) + 0.02


@pytest.mark.parametrize("config", [M.llama(2, 2, 16, 24, vocab_size=50, context=16), M.gpt2(2, 2, 16, vocab_size=50, context=16)], ids=["llama", "gpt2"])
def test_a_parameter_that_a_fork_adds_is_saved_and_loaded(config, tmp_path, monkeypatch):
    class Scaled(M.Norm):
        def __init__(self, c):
            super().__init__(c)
            self.alpha = torch.nn.Parameter(torch.empty(1))

        def forward(self, x):
            return super().forward(x) * self.alpha
    monkeypatch.setattr(M, "Norm", Scaled)
    model = M.Transformer(config).initialize(0)
    state = dict(model.named_parameters())
    for n, p in state.items():
        p.data += torch.randn(p.shape) if n.endswith("alpha") else 0
    M.save_checkpoint(tmp_path, config, lambda n: state[n], torch.float32)
    ids = torch.arange(10)[None]
    assert torch.equal(M.load(tmp_path).logits(ids), model.logits(ids))
    assert any(name.endswith("alpha") for name in M.Weights(tmp_path).where)


def test_meta_checkpoints_are_exported_for_transformers(real, tmp_path):
    program("model.py", "export", "--model", real / "stories260k/meta", "--out", tmp_path / "hf")
    ids = torch.randint(3, 512, (1, 30))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert (theirs(ids).logits - M.load(real / "stories260k/hf").logits(ids)).abs().max() < 1e-4
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")("Once upon a time")["input_ids"] == [1, *data.load_tokenizer(real / "stories260k/hf").encode("Once upon a time")]
    assert "exists already" in one_line(program("model.py", "export", "--model", real / "stories260k/meta", "--out", tmp_path / "hf", status=2))
