"""What several test files share: the project's programs as a user runs them, a small world, the folder of real data."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")                      # before triton is imported: its kernels run on the CPU


def program(*args, status=0, env=None, **kw):
    """Run `python ARGS` in the project's folder; the exit status is checked, the finished process returned."""
    done = subprocess.run([sys.executable, *map(str, args)], text=True, capture_output=True, env={**os.environ, **(env or {})}, **{"cwd": ROOT, "timeout": 240, **kw})
    assert done.returncode == status, f"{args} ended with {done.returncode}, not {status}\n{done.stdout}\n{done.stderr}"
    return done


def one_line(done):
    """The single line of an error; a traceback or a usage text fails."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    return lines[0]


def torchrun(n, *args, **kw):
    return program("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *args, **kw)


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def real():
    """Real data made by others; a test that needs it is skipped where the folder is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of real data (../shared/data) is absent")
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small miniature world, its corpora packed, and a base model of a few thousand parameters trained for some steps."""
    folder = tmp_path_factory.mktemp("world")
    program("tests/miniature.py", "build", "--out", folder / "world", "--seed", "5", "--pretraining-tokens", "40000", "--questions", "40")
    program("data.py", "mix", "--sharegpt", folder / "world/sharegpt.json", "--hc3", folder / "world/hc3.jsonl", "--discord", folder / "world/discord.jsonl", "--out", folder / "mix.jsonl")
    program("data.py", "pack", folder / "world/pretraining.jsonl", "--tokenizer", folder / "world/tokenizer", "--template", "koala", "--out", folder / "pretraining")
    program("data.py", "pack", folder / "mix.jsonl", "--tokenizer", folder / "world/tokenizer", "--out", folder / "chat")
    (folder / "tiny.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 64,
                                                  "max_position_embeddings": 256, "tie_word_embeddings": True}))
    program("train.py", "--init", folder / "tiny.json", "--data", folder / "pretraining", "--out", folder / "base", "--tokens", "10k", "--block", "128", "--batch", "8", "--optimizer", "adamw", "--warmup", "2")
    return folder
