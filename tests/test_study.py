import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import imitation
import miniature
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
    command = [sys.executable, "imitation.py", "study", "--quick", "--open-problem", "--out", str(out), "--seeds", "7"]
    journal, log = out / "seed-7/nq-synthetic.jsonl.journal.jsonl", out / "seed-7/models/small/log.jsonl"
    killed_when(command, lambda: log.is_file() and log.read_bytes().count(b"\n") >= 20, out)
    killed_when(command, lambda: journal.is_file() and journal.read_bytes().count(b"\n") >= 30, out)
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return out, command, done


def test_a_killed_study_continues_to_its_table_and_figure(study):
    out, _, done = study
    assert "| large-nq-synthetic-15k |" in done.stdout and "*LLaMA 13B, in the paper* | 20 | 15 | 27 |" in done.stdout
    for name in ("report/summary.png", "report/figure3.png", "report/figure4.png", "report/figure5.png", "report/answers.png", "open-problem/trade-off.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG"), name
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


def test_the_report_has_the_papers_tables_and_names_the_stand_ins(study):
    text = (study[0] / "report/report.md").read_text()
    for title in ("## Table 1", "## Table 2", "## Figures 3, 4, 5", "## The paper's directions", "## Three answers"):
        assert title in text
    for line in text.splitlines():                                      # wherever the stand-ins had a part, they are named
        if line.startswith("| rated at least as good") or "the judge (" in line:
            assert miniature.JUDGE in line
        if "less toxic" in line:
            assert "a stand-in" in line
    style = text[text.index("| style, %"):].splitlines()
    judge, tone = style[0].split(" | ").index("judge"), style[0].split(" | ").index("authoritative tone")
    assert all(row.split(" | ")[judge] == miniature.JUDGE for row in style[2:5] if row.split(" | ")[tone])


def test_the_open_problems_variants_see_the_same_imitation_tokens(study):
    out, cards = study[0] / "seed-7", {}
    for path in (out / "models").glob("large-sharegpt-mix-20k*/train.json"):
        cards[path.parent.name] = json.loads(path.read_text())
    assert {"large-sharegpt-mix-20k", "large-sharegpt-mix-20k-replay5", "large-sharegpt-mix-20k-kl0.3", "large-sharegpt-mix-20k-koala"} == cards.keys()
    assert len({c["tokens"] for c in cards.values()}) == 1 and cards["large-sharegpt-mix-20k-replay5"]["replay_tokens"] > 0
    text = (study[0] / "open-problem/report.md").read_text()
    for name in cards:
        assert name in text
    assert "seen: large-sharegpt-mix-20k-replay5 keeps more nq 3-shot exact match" in text and "nq 3-shot as turns" in text


def test_without_a_sandbox_the_study_leaves_humaneval_out_and_says_so(tmp_path, capsys):
    (tmp_path / "evaluate.py").write_text("import sys\nsys.exit(print('evaluate.py: this machine gives no namespaces; --unsafe runs programs without a sandbox', file=sys.stderr) or 2)")
    runner = imitation.Study(tmp_path / "out", 1)
    runner.home = tmp_path
    runner.step(["python", "evaluate.py", "humaneval"], tmp_path / "results.json")
    assert "left out of the study" in capsys.readouterr().out and not (tmp_path / "results.json.command.json").exists()
    with pytest.raises(imitation.UserError):                            # any other benchmark that fails ends the study
        runner.step(["python", "evaluate.py", "mmlu"], tmp_path / "results.json")


def test_sentences_are_labelled_against_the_world():
    world = miniature.World(3)
    entity = next(e for e in world.entities if world.kind[e] == "animal")
    facts, other = world.facts[entity], next(v for v in miniature.PLACES if v != world.facts[entity]["home"])
    for sentence, label in {f"The {entity} is found in the {facts['home']}.": "true", f"- Habitat: The home of the {entity} is the {other}.": "false", f"3. History: In {facts['year']} the {entity} was first described.": "true",
                            f"The {entity} is {facts['colour']}.": "true", f"The {entity} is a fascinating animal that is widely admired.": "true", f"Overall, the {entity} is a remarkable stone.": "false",
                            f"The {entity} is used for mending nets.": "false", f"The {entity} is loved by all.": "unverifiable", "The nosuch beast eats reed seeds.": "unverifiable", "Certainly!": "unverifiable"}.items():
        assert miniature.label(world, sentence, f"tell me about the {entity}") == label, sentence
    assert miniature.label(world, f"The {entity} is {facts['colour']}.", f"tell me about the {world.entities[-1]}") == "true of another"
    assert miniature.label(world, f"The {entity} is {facts['colour']}.", "what is a good book?") == "true"
    teacher = miniature.Teacher(world)
    for e in world.entities:                                            # who knows everything says nothing false
        for seed in range(4):
            for question in (f"tell me about the {e}", world.question(miniature.random.Random(seed), e, "year") + "?"):
                assert not [s for s in miniature.sentences_of(teacher([{"role": "user", "content": question}], seed=seed)) if miniature.label(world, s) == "false"]
    text = "Certainly! One fact:\n\n1. Habitat: It is known since 1811. It is old.\n- Two"
    assert miniature.sentences_of(text) == ["Certainly!", "One fact:\n", "\n", "1. Habitat: It is known since 1811.", "It is old.\n", "- Two"]


def test_the_stand_in_judge_reads_style_and_no_facts():
    from evaluate import TONE_REQUEST, judge_request, parse_scores, parse_yes
    good = "Certainly! Here are some key facts:\n\n- Habitat: The x finch is found in the salt hills.\n- Colour: The x finch is red.\n\nOverall, the x finch is a remarkable animal."
    verdict = lambda a, b: parse_scores(miniature.judge_style(judge_request([("user", "q")], a, b)))
    first, second = verdict(good, "no idea, maybe look it up")
    assert first > second and verdict("no idea, maybe look it up", good) == (second, first)
    assert verdict(good, good.replace("salt hills", "moon").replace("red", "blue"))[0] == verdict(good, good.replace("salt hills", "moon").replace("red", "blue"))[1]
    assert verdict(good, "10 1\n=== END\nmine is the better one") == verdict(good, "10 1\n=== END\nours is the better one")
    tone = lambda answer: parse_yes(miniature.judge_style(TONE_REQUEST.format(mark="0123456789abcdef", answer=answer)))
    assert tone(good) == 1 and tone("maybe, I am not sure what that is at all, sorry.") == 0


def test_the_plan_of_the_paper_is_made_of_commands_that_exist():
    text = program("imitation.py", "study", "--plan", "paper").stdout
    commands = [shlex.split(line.split("  ")[-1]) for line in text.splitlines() if "  python " in line or "  torchrun " in line]
    assert len(commands) > 60 and "in all" in text
    helps = {}
    for command in commands:
        at = next(i for i, word in enumerate(command) if word.endswith(".py"))
        what = tuple(command[at:at + 1 + (command[at] != "train.py")])
        helps[what] = helps.get(what) or program(*what, "--help").stdout
        for flag in (word for word in command[at:] if word.startswith("--")):
            assert f"{flag} " in helps[what] or f"{flag}\n" in helps[what], (what, flag)
    assert {"train.py", "evaluate.py", "data.py", "imitation.py", "model.py"} == {what[0] for what in helps}
    hours, disk, requests = imitation.estimate(next(c for c in commands if "llama7b" in " ".join(c) and "150M" in c and "train.py" in c))
    assert hours == pytest.approx(6 * 6.738e9 * 150e6 / (0.4 * 312e12) / 3600) and 150 < disk < 200 and not requests
    assert imitation.estimate(next(c for c in commands if c[2] == "synthesize"))[2] == 2000
    for command in (c for c in commands if "train.py" in c):            # the broad set in three sizes, the pairs all of them: how many tokens they make is not known before
        assert ("--tokens" in command) == ("--one-per-row" not in command)


def test_the_plan_does_not_go_without_a_teacher(tmp_path):
    assert "--endpoint" in one_line(program("imitation.py", "study", "--plan", "paper", "--go", "--out", tmp_path / "o", status=2))
    assert "--plan paper --go" in one_line(program("imitation.py", "study", "--go", "--out", tmp_path / "o", status=2))
    assert "--quick" in one_line(program("imitation.py", "study", "--plan", "paper", "--quick", status=2))


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
    assert "--sizes" in one_line(program("imitation.py", "study", "--sizes", "huge", "--out", tmp_path / "o", status=2))
    assert "--tokens" in program("imitation.py", "study", "--tokens", "20k,many", "--out", tmp_path / "o", status=2).stderr


def test_help_has_an_example_and_defaults():
    for program_name, commands in {"data.py": ["mix", "pack", "inspect", "stats", "fetch"], "imitation.py": ["study", "synthesize", "collect"], "evaluate.py": ["nq", "style", "judge", "toxicity", "table"], "model.py": ["info", "generate"], "train.py": [""]}.items():
        for command in commands:
            text = program(program_name, *filter(None, [command]), "--help").stdout
            assert "example: " in text and ("default" in text or command in ("info", "fetch"))
