import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT, lines_of, one_line, program


def processes_under(folder):
    """Command lines of live processes that name `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (path.parent / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if str(folder) in line and state != "Z" and path.parent.name != str(os.getpid()):
            found.append(line)
    return found


def killed_when(command, moment, folder):
    """Run the study until `moment()` is true, kill it with SIGKILL, and see that its commands and its teacher end too."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 240
    while not moment():
        assert process.poll() is None and time.time() < deadline, "the study was over before the moment came"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.time() + 10
    while processes_under(folder) and time.time() < deadline:
        time.sleep(0.1)
    assert not processes_under(folder)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The quick study, killed while a base is trained and while pairs are synthesized, then run to its end."""
    out = tmp_path_factory.mktemp("study") / "out"
    command = [sys.executable, "imitation.py", "study", "--quick", "--out", str(out), "--seeds", "7"]
    journal, log = out / "seed-7/nq-synthetic.jsonl.journal.jsonl", out / "seed-7/models/small/log.jsonl"
    killed_when(command, lambda: log.is_file() and log.read_bytes().count(b"\n") >= 20, out)
    killed_when(command, lambda: journal.is_file() and journal.read_bytes().count(b"\n") >= 30, out)
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return out, command, done


def test_a_killed_study_continues_to_its_table_and_figure(study):
    out, _, done = study
    assert "| large-nq-synthetic-15k |" in done.stdout and "In the paper" in done.stdout
    assert (out / "report/summary.png").read_bytes().startswith(b"\x89PNG")
    assert "miniature.py build" not in done.stdout                      # finished before the kills, so not run again


def test_no_finished_request_is_repeated(study):
    keys = [r["key"] for r in lines_of(study[0] / "seed-7/nq-synthetic.jsonl.journal.jsonl")]
    assert len(keys) == len(set(keys))


def test_a_second_run_skips_what_is_finished(study):
    out, command, _ = study
    again = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=100)
    assert again.returncode == 0 and [line for line in again.stdout.splitlines() if line.startswith("$")] == [line for line in again.stdout.splitlines() if "evaluate.py table" in line]


def test_each_step_is_a_command_that_can_be_typed(study):
    out, _, done = study
    lines = [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert len(lines) > 10 and all(line[0] == "python" and (ROOT / line[1]).is_file() for line in lines)
    style = next(line for line in lines if "style" in line)
    folder = Path(style[style.index("--out") + 1])
    before = (folder / "teacher-2/results.json").read_bytes()
    for file in folder.glob("*/results.json"):
        file.unlink()
    program(*style[1:])
    assert (folder / "teacher-2/results.json").read_bytes() == before


def test_another_command_for_the_same_output_is_refused(study):
    out, command, _ = study
    record = out / "seed-7/data/sharegpt-mix.command.json"
    before = record.read_text()
    record.write_text(json.dumps({"command": ["python", "data.py", "pack", "other"]}))
    try:
        done = program("imitation.py", "study", "--quick", "--out", out, "--seeds", "7", status=2)
        assert "made by another command" in done.stderr
    finally:
        record.write_text(before)


def test_the_questions_split_into_covered_and_not_covered(study):
    rows = lines_of(study[0] / "seed-7/nq-test.jsonl")
    assert {r["category"] for r in rows} == {"covered", "not covered"}


def test_unknown_stages_and_seeds_are_one_line(tmp_path):
    assert "the stages are world" in one_line(program("imitation.py", "study", "--only", "nothing", "--out", tmp_path / "o", status=2))
    assert "--seeds" in one_line(program("imitation.py", "study", "--seeds", "a", "--out", tmp_path / "o", status=2))


def test_help_has_an_example_and_defaults():
    for program_name, commands in {"data.py": ["mix", "pack", "inspect", "stats", "fetch"], "imitation.py": ["study", "synthesize", "collect"], "evaluate.py": ["nq", "style", "judge", "toxicity", "table"], "model.py": ["info", "generate"], "train.py": [""]}.items():
        for command in commands:
            text = program(program_name, *filter(None, [command]), "--help").stdout
            assert "example: " in text and ("default" in text or command in ("info", "fetch"))
