"""Measurements, as ratios against a peer in the same run: machines are noisy, so nothing here is a test.

    python tests/bench.py generation            tokens a second and peak memory beside transformers' generate()
    python tests/bench.py attention             the Triton kernel beside torch's, forward and backward, on a GPU
    python tests/bench.py loading               peak memory of one tensor-parallel rank of 8 that loads llama7b
    python tests/bench.py eval --model DIR --peer PYTHON      MMLU and NQ beside lm-evaluation-harness, which that interpreter has
"""
import csv
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


def main():
    parser = Parser(description="Measurements beside a peer in the same run.", example="python tests/bench.py generation")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, text in (("generation", "beside transformers' generate()"), ("attention", "the kernel beside torch's, on a GPU"), ("loading", "memory of one rank of 8")):
        p = commands.add_parser(name, help=text)
        p.add_argument("--runs", type=int, default=3, help="the run of the median ratio is shown")
    p = commands.add_parser("eval", help="MMLU and NQ beside lm-evaluation-harness's hf backend")
    p.add_argument("--model", required=True, metavar="DIR")
    p.add_argument("--peer", required=True, metavar="PYTHON", help="an interpreter that has lm_eval 0.4")
    p.add_argument("--questions", type=int, help="the first so many of each of five MMLU subjects; None takes all")
    p.add_argument("--nq", type=int, default=200, help="the first so many NQ questions")
    p.add_argument("--batch", type=int, nargs="+", default=[8, 16, 32], help="batch sizes of lm-eval; its best is shown")
    p.add_argument("--runs", type=int, default=3, help="the run of the median ratio is shown")
    args = parser.parse_args()
    {"generation": generation, "attention": attention, "loading": loading, "eval": evaluation}[args.command](args)


if __name__ == "__main__":
    run(main)
