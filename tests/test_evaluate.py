import json
import math
import shutil
import sys

import numpy as np
import pytest

import evaluate as E
from conftest import lines_of, one_line, program, torchrun


@pytest.mark.parametrize("a, b", [("The Saint Lawrence River", "saint lawrence river"), ("A  Tale, of Two Cities!", "tale of two cities"), ("U.S.", "us"), ("rock-n-roll", "rocknroll"), ("an apple", "apple"),
                                  ("581 ( second edition )", "581 second edition"), ("“quoted”", "“quoted”"), ("theatre", "theatre"), ("the the", ""), ("O'Brien", "obrien"), ("İstanbul", "i\u0307stanbul"),
                                  ("Beyonc\u00e9", "beyonce\u0301"), ("Beyonce\u0301", "beyonce\u0301"), ("\u00e0 la carte", "\u0300 la carte"), ("a.k.a. A", "aka"), ("the-a", "thea"), ("An\tA\nThe x", "x"),
                                  ("14 , 15%", "14 15"), ("A1", "a1"), ("“The” end", "“ ” end"), ("…", "…"), ("\u00a0x\u2003y", "x y"), ("Straße", "straße"), ("$1,000", "1000"), ("", "")])
def test_answers_are_normalised_as_in_the_official_evaluation(a, b):
    assert E.normalize_answer(a) == b


def test_exact_and_contains_match():
    assert E.exact_match("The Beatles.", ["beatles"]) and not E.exact_match("The Beatles, of course", ["beatles"])
    assert E.contains_match("It was the Beatles, of course", ["Queen", "beatles"]) and not E.contains_match("Beatlesque", ["beatles"])
    assert not E.exact_match("", ["x"]) and not E.contains_match("anything", ["the"])


def test_the_prompt_is_that_of_lm_evaluation_harness():
    assert "".join(E.nq_prompt("who is x", [("a b", "c"), ("d?", "e")])) == "Answer these questions:\n\nQ: a b?\nA: c\nQ: d?\nA: e\nQ: who is x?\nA:"
    assert E.nq_prompt("who is x", []) == ["Answer these questions:\n\nQ: who is x?\nA:"]


def test_stop_rules_cut_the_answer():
    assert E.cut(" Paris\nQ: next", E.STOPS["newline"]) == " Paris" and E.cut(" Paris, France. Yes", E.STOPS["sentence"]) == " Paris"


def test_standard_error_is_that_of_a_mean():
    p = E.proportion([1, 0, 0, 1, 1])
    assert p["score"] == 0.6 and math.isclose(p["stderr"], np.std([1, 0, 0, 1, 1], ddof=1) / math.sqrt(5)) and p["n"] == 5
    assert E.proportion([]) == {"score": None, "stderr": None, "n": 0} and E.proportion([1])["stderr"] is None


LISTS = [("- a\n- b", True), ("1. a\n2. b", True), ("1) a\n2) b", True), ("* a\ntext\n* b", True), ("• a\n• b", True), ("Steps:\n  - a\n  - b\n", True), ("(1) a\n(2) b", True), ("– a\n– b", True),
         ("one - two - three", False), ("- only one", False), ("3.5 is a number\n4.5 too", False), ("In 1999. A year.", False), ("a\nb\nc", False), ("--\n--", False), ("-5\n-6", False), ("1999. x\n2000. y", False)]
SUMMARIES = [("a\n\nIn summary, b.", True), ("a\n\nOverall, b", True), ("- a\n- b\n\nIn conclusion, c", True), ("a\n\nUltimately, it depends.", True), ("a\n\nBy following these steps, you will.", True), ("a\n\nto sum up: b", True),
             ("In summary, b.", False), ("In summary, a.\n\nb", False), ("a\nOverall, b", False), ("a\n\nOveralls are trousers", False), ("a\n\nb\n\nc", False), ("a\n\n- Overall, a list item", False), ("", False), ("a\n\n\n", False)]


@pytest.mark.parametrize("text, wanted", LISTS)
def test_lists_are_detected(text, wanted):
    assert E.has_list(text) == wanted


@pytest.mark.parametrize("text, wanted", SUMMARIES)
def test_closing_summaries_are_detected(text, wanted):
    assert E.has_summary(text) == wanted


def test_unigram_intersection_and_correlation():
    assert E.unigram_intersection("a b c", "B c d") == pytest.approx(2 / 3) and E.unigram_intersection("", "x") == 0
    assert E.pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1) and E.pearson([1, 1, 1], [1, 2, 3]) == 0


def test_nq_scores_splits_and_records(world, tmp_path):
    rows = lines_of(world / "world/nq/test.jsonl")
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({**r, "category": "ab"[i % 2]}) + "\n" for i, r in enumerate(rows)))
    command = ["evaluate.py", "nq", "--model", world / "base", "--data", tmp_path / "q.jsonl", "--shots", "3", "--few-shot", world / "world/nq/fewshot.jsonl", "--out", tmp_path / "r", "--max-new", "8"]
    program(*command)
    result, samples = json.loads((tmp_path / "r/base/results.json").read_text()), lines_of(tmp_path / "r/base/samples.jsonl")
    assert result["metrics"]["exact_match"]["score"] == np.mean([E.exact_match(s["output"], r["answer"]) for s, r in zip(samples, rows)])
    assert result["metrics"]["exact_match/a"]["n"] == result["metrics"]["exact_match/b"]["n"] == 20
    assert result["settings"]["shots"] == 3 and result["settings"]["template"] == "plain" and result["settings"]["stop"] == "newline"
    assert "finished already" in program(*command).stdout
    assert "max_new was 8, is 9" in one_line(program(*command[:-1], "9", status=2))


def test_more_shots_than_examples_is_an_error(world, tmp_path):
    line = one_line(program("evaluate.py", "nq", "--model", world / "base", "--data", world / "world/nq/test.jsonl", "--shots", "99", "--few-shot", world / "world/nq/fewshot.jsonl", "--out", tmp_path, status=2))
    assert "99" in line


def test_style_needs_replies_to_the_same_prompts(tmp_path):
    for name, key in (("a", "1"), ("b", "2")):
        (tmp_path / name).write_text(json.dumps({"id": key, "messages": [{"role": "user", "content": f"query {key}"}, {"role": "assistant", "content": "r"}]}) + "\n")
    assert "no id in common" in one_line(program("evaluate.py", "style", "--a", tmp_path / "a", "--b", tmp_path / "b", "--out", tmp_path / "o", status=2))


def test_the_mean_over_seeds_and_its_error():
    results = [{"metrics": {"m": {"score": s, "stderr": 0.5, "n": 9}}} for s in (0.1, 0.2, 0.6)]
    mean, error, n = E.pooled(results, "m")
    assert mean == pytest.approx(0.3) and error == pytest.approx(np.std([.1, .2, .6], ddof=1) / math.sqrt(3)) and n == 3
    assert E.pooled(results[:1], "m") == (0.1, 0.5, 1) and E.pooled(results, "other") is None


def test_results_of_other_settings_are_not_pooled_as_seeds(tmp_path):
    for name, stop in (("a", "newline"), ("b", "newline"), ("c", "sentence")):
        E.write_results(tmp_path / name, "nq", {"name": "m"}, {"exact_match": {"score": 0.5, "stderr": 0.1, "n": 4}}, {"shots": 0, "stop": stop, "data_hash": name}, [])
    assert len(E.gather([tmp_path / "a", tmp_path / "a", tmp_path / "b"])["nq 0-shot", "m"]) == 2
    with pytest.raises(E.UserError, match="stop"):
        E.gather([tmp_path])


def test_a_failed_request_is_counted_and_not_scored(world, tmp_path):
    from test_imitation import Faulty
    server = Faulty(lambda n, request, handler: 400 if n % 2 else {"content": "nothing"})
    done = program("evaluate.py", "nq", "--endpoint", server.url, "--endpoint-model", "m", "--data", world / "world/nq/test.jsonl", "--out", tmp_path / "r", "--concurrency", "1")
    result = json.loads((tmp_path / "r/m/results.json").read_text())
    assert result["metrics"]["exact_match"]["n"] == 20 and result["counts"]["failed"] == 20 and "20 of 40" in done.stderr


def test_another_checkpoint_of_the_same_name_is_not_finished_already(world, tmp_path):
    import shutil
    shutil.copytree(world / "base", tmp_path / "base")
    command = ["evaluate.py", "nq", "--data", world / "world/nq/test.jsonl", "--out", tmp_path / "r", "--max-new", "2", "--limit", "5", "--model"]
    program(*command, tmp_path / "base")
    raw = bytearray((tmp_path / "base/model.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "base/model.safetensors").write_bytes(raw)
    assert "checkpoint was" in one_line(program(*command, tmp_path / "base", status=2))


def test_a_claim_that_does_not_hold_is_said_not_to():
    result = lambda name, score: {"model": cards[name], "settings": {}, "metrics": {"exact_match": {"score": score, "stderr": 0.01, "n": 100}}}
    cards = {"small": {"name": "small", "base": "small", "parameters": 1, "tokens": 1}, "chat": {"name": "chat", "base": "small", "parameters": 1, "data": "sharegpt-mix", "tokens": 5}}
    for score, word in ((0.9, "NOT seen"), (0.2, "seen")):
        found = {("nq 3-shot", "small"): [result("small", 0.3)], ("nq 3-shot", "chat"): [result("chat", score)]}
        assert f"- {word}: small, nq 3-shot: ShareGPT-Mix does not raise" in E.directions(E.Results(found))


def test_replay_that_keeps_knowledge_at_the_same_style_is_said_to(tmp_path):
    base = {"name": "large", "base": "large", "parameters": 9, "tokens": 1}
    cards = {"large": base, **{name: {**base, "name": name, "data": "sharegpt-mix", "tokens": 5, **more} for name, more in
                               {"plain": {}, "plain-replay5": {"replay": 0.05}, "plain-kl1": {"kl": 1.0}, "plain-adamw": {}}.items()}}
    score = {"large": (0.40, 0.05), "plain": (0.10, 0.60), "plain-replay5": (0.30, 0.59), "plain-kl1": (0.35, 0.20), "plain-adamw": (0.10, 0.6)}
    cell = lambda value: {"score": value, "stderr": 0.01, "n": 100}
    for name, (facts, style) in score.items():
        E.write_results(tmp_path / "nq" / name, "nq", cards[name], {"exact_match": cell(facts)}, {"shots": 3}, [])
        E.write_results(tmp_path / "style" / name, "style", cards[name], {"style_similarity": cell(style)}, {}, [])
    text = program("evaluate.py", "table", tmp_path, "--baseline", "plain", "--out", tmp_path / "t", "--print").stdout
    assert "- seen: plain-replay5 keeps more nq 3-shot exact match than plain at no less style (+20.0 ± 1.4*, 67% of what was lost" in text
    assert "- NOT seen: plain-kl1 keeps more nq 3-shot exact match than plain" in text and "plain-adamw keeps" not in text
    assert "| **plain** | 10.0 ± 1.0 |  | 60.0 ± 1.0 |  |" in text and "| plain-adamw | 10.0 ± 1.0 | +0.0 ± 1.4* |" in text
    assert (tmp_path / "t/trade-off.png").read_bytes().startswith(b"\x89PNG")
    assert "there are large, plain" in one_line(program("evaluate.py", "table", tmp_path, "--baseline", "plane", "--out", tmp_path / "t", status=2))


@pytest.mark.parametrize("task, settings, metric", [("nq", {"shots": 5}, "exact_match"), ("mmlu", {"shots": 5}, "accuracy"), ("humaneval", {"shots": 0}, "pass@1")])
def test_every_benchmark_that_was_run_has_its_claims(task, settings, metric, tmp_path):
    small = {"name": "small", "base": "small", "parameters": 1, "tokens": 1}
    for card in (small, {**small, "name": "chat", "data": "sharegpt-mix", "tokens": 5}):
        E.write_results(tmp_path / card["name"], task, card, {metric: {"score": 0.2, "stderr": 0.01, "n": 100}}, settings, [])
    claims = E.directions(E.Results(E.gather([tmp_path])))
    assert claims.count("seen:") == 1 and f"ShareGPT-Mix does not raise {metric.replace('_', ' ')}" in claims


# --- asking, MMLU

def ask(monkeypatch, *args):
    """The program in this process: its errors are exceptions."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
    E.main()


def result_of(folder):
    return json.loads((folder / "results.json").read_text())


SUBJECTS = ("anatomy", "formal_logic")


@pytest.fixture(scope="module")
def choices(tmp_path_factory):
    """Two subjects of MMLU in small: questions of uneven length, three shots and eleven questions each."""
    folder = tmp_path_factory.mktemp("mmlu")
    for subject in SUBJECTS:
        for part, n in (("dev", 3), ("test", 11)):
            (folder / part).mkdir(exist_ok=True)
            rows = [f'"What is {subject[:3]} {"very " * (i % 4) * 8}{part} {i}?",red,"blue, or so",{i},none,{"ABCD"[i % 4]}' for i in range(n)]
            (folder / part / f"{subject}_{part}.csv").write_text("\n".join(rows) + "\n")
    return folder


def mmlu_args(choices, *more):
    return ["mmlu", "--data", choices, "--subjects", *SUBJECTS, "--shots", "3", *more]


@pytest.fixture(scope="module")
def koala(world, tmp_path_factory):
    """The base again, as an imitation checkpoint that names its template."""
    folder = tmp_path_factory.mktemp("koala") / "chat"
    shutil.copytree(world / "base", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "template": "koala"}))
    return folder


def test_the_prompt_of_mmlu():
    shots = [("Is it so? ", "yes", "no", "1.0", "none of these", "B")]
    assert "".join(E.mmlu_prompt("high_school_us_history", (" Why?", "a", "b", "c", "d"), shots)) == (
        "The following are multiple choice questions (with answers) about high school us history.\n\n"
        "Is it so?\nA. yes\nB. no\nC. 1.0\nD. none of these\nAnswer: B\n\nWhy?\nA. a\nB. b\nC. c\nD. d\nAnswer:")


def test_shots_are_text_inside_one_turn_or_turns():
    pieces = E.nq_prompt("who", [("a", "b")])
    assert E.messages_of(pieces, "text") == [{"role": "user", "content": "Answer these questions:\n\nQ: a?\nA: b\nQ: who?\nA:"}]
    assert E.messages_of(pieces, "turns") == [{"role": "user", "content": "Answer these questions:\n\nQ: a?\nA:"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "Q: who?\nA:"}]


def test_a_long_prompt_loses_whole_shots_first_then_tokens_and_both_from_the_left():
    example = {"prompt": lambda lost: ["h", *["abcd"[lost:]], "question"], "shots": 4}
    encode = lambda pieces: list("".join(pieces))
    for room, text, *lost in ((13, "habcdquestion", 0, 0), (12, "hbcdquestion", 1, 0), (9, "hquestion", 4, 0), (8, "question", 4, 1), (3, "ion", 4, 6)):
        ids, said = E.fit(example, room, encode)
        assert ("".join(ids), said["lost_shots"], said["lost_tokens"]) == (text, *lost)


def test_57_subjects_in_four_categories():
    assert len(E.CATEGORY) == 57 and [len(s.split()) for s in E.MMLU.values()] == [19, 13, 12, 13]
    assert (E.CATEGORY["econometrics"], E.CATEGORY["professional_law"], E.CATEGORY["management"], E.CATEGORY["high_school_statistics"]) == ("social sciences", "humanities", "other", "STEM")


def test_the_real_mmlu_is_read_whole(real):
    rows = {s: [E.read_choices(real / "mmlu" / part / f"{s}_{part}.csv") for part in ("dev", "test")] for s in E.CATEGORY}
    assert sum(len(test) for _, test in rows.values()) == 14042 and all(len(dev) == 5 for dev, _ in rows.values())


TOKENIZERS = ["gpt2", "llama", "stories260k", "json"]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request, real, tmp_path):
    if request.param == "gpt2":
        return E.load_tokenizer(real / "gpt2_bpe")
    if request.param != "json":
        return E.load_tokenizer(real / {"llama": "llama", "stories260k": "stories260k/hf"}[request.param])
    pytest.importorskip("tokenizers")
    E.load_tokenizer(real / "llama").export(tmp_path, "plain")
    (tmp_path / "tokenizer.model").unlink()
    return E.load_tokenizer(tmp_path)


def test_the_letters_are_what_each_tokenizer_puts_behind_the_prompt(tokenizer, real):
    dev, test = (E.read_choices(real / f"mmlu/{part}/anatomy_{part}.csv") for part in ("dev", "test"))
    _, spaced = E.answer_ids(tokenizer, "ABCD", "Answer: ")
    for text in ("".join(E.mmlu_prompt("anatomy", row, dev)) for row in test[:20]):
        whole = [tokenizer.encode(text + " " + letter) for letter in "ABCD"]
        rest = whole[0][:-len(spaced[0])]
        assert whole == [[*rest, *ids] for ids in spaced] and tokenizer.decode(rest).rstrip(" ").endswith("Answer:")
    before, bare = E.answer_ids(tokenizer, "ABCD", "")
    assert [tokenizer.encode(letter) for letter in "ABCD"] == [[*before, *ids] for ids in bare]


def test_one_id_a_letter_where_the_vocabulary_has_it(real):
    for name, space, ids in (("gpt2_bpe", "Ġ", [(317,), (347,), (327,), (360,)]), ("llama", "▁", [(319,), (350,), (315,), (360,)])):
        assert E.answer_ids(E.load_tokenizer(real / name), "ABCD", "Answer: ")[1] == ids
    assert {len(ids) for ids in E.answer_ids(E.load_tokenizer(real / "stories260k/hf"), "ABCD", "Answer: ")[1]} == {1, 2}


def test_bos_stands_where_the_checkpoint_s_own_tokenizer_puts_it(real, tmp_path):
    import model as M
    start = lambda folder: M.prompt_ids([{"role": "user", "content": "hello there"}], E.load_tokenizer(folder), "plain")
    assert start(real / "llama") == [1, 22172, 727] and start(real / "gpt2_bpe") == [31373, 612]
    pytest.importorskip("tokenizers")
    E.load_tokenizer(real / "llama").export(tmp_path, "plain")
    (tmp_path / "tokenizer.model").unlink()
    assert start(tmp_path) == [1, 22172, 727]


def likelihoods(model, prompt, answers):
    """log p of each answer (ids) behind the prompt: one whole forward pass each."""
    import torch
    out = []
    for answer in answers:
        logp = model.logits(torch.tensor([[*prompt, *answer]]))[0].log_softmax(-1)
        out.append(sum(float(logp[len(prompt) + i - 1, token]) for i, token in enumerate(answer)))
    return out


def test_choices_are_those_of_the_whole_log_likelihood(world, koala, real, choices, tmp_path, monkeypatch, capsys):
    import model as M
    short = shutil.copytree(world / "base", tmp_path / "short")                            # too short for some prompts, and for some questions alone
    bare = [len(E.load_tokenizer(short).encode("".join(E.mmlu_prompt(s, row, [])))) for s in SUBJECTS for row in E.read_choices(choices / f"test/{s}_test.csv")]
    (short / "config.json").write_text(json.dumps({**json.loads((short / "config.json").read_text()), "max_position_embeddings": max(bare) - 2}))
    gpt2 = shutil.copytree(real / "gpt2_tiny", tmp_path / "gpt2", dirs_exist_ok=True)       # which has a token for "A" and another for " A"
    for file in (real / "gpt2_bpe").iterdir():
        shutil.copy(file, gpt2)
    models = [(world / "base", "plain"), (koala, "koala"), (real / "stories260k/hf", "plain"), (gpt2, "plain"), (short, "plain")]        # stories260k spells some letters with two ids
    ask(monkeypatch, *mmlu_args(choices, "--model", *(folder for folder, _ in models), "--out", tmp_path))
    lost = set()
    for folder, template in models:
        result, samples = result_of(tmp_path / folder.name), lines_of(tmp_path / folder.name / "samples.jsonl")
        model, tokenizer = M.load(folder), E.load_tokenizer(folder)
        assert result["settings"]["template"] == template and result["settings"]["shots_as"] == "text" and len(samples) == 22
        for s in samples:
            dev, test = (E.read_choices(choices / part / f"{s['subject']}_{part}.csv") for part in ("dev", "test"))
            text = "".join(E.mmlu_prompt(s["subject"], test[s["index"] % 11], dev[s["lost_shots"]:]))
            prompt = M.prompt_ids([{"role": "user", "content": text}], tokenizer, template)
            whole = [tokenizer.encode(text + " " + letter)[len(tokenizer.encode(text)):] if template == "plain" else tokenizer.encode(letter) for letter in "ABCD"]
            truth = likelihoods(model, prompt[s["lost_tokens"]:], whole)
            lost.add(s["lost_shots"])
            assert s["log_likelihoods"] == pytest.approx(truth, abs=1e-4)
            assert s["choice"] == "ABCD"[int(np.argmax(truth))] and s["accuracy"] == (s["choice"] == s["answer"])
        scores = [s["accuracy"] for s in samples]
        assert result["metrics"]["accuracy"]["score"] == pytest.approx(np.mean(scores)) and result["metrics"]["accuracy/STEM"]["score"] == np.mean(scores[:11])
        errors = [np.std(part, ddof=1) / math.sqrt(11) for part in (scores[:11], scores[11:])]
        assert result["metrics"]["accuracy_macro"]["stderr"] == pytest.approx(math.hypot(*errors) / 2)
    counts = result["counts"]                                                           # of the short one
    assert 22 >= counts["lost_shots"] == sum(s["lost_shots"] > 0 for s in samples) > counts["lost_tokens"] == sum(s["lost_tokens"] > 0 for s in samples) > 0 and {0, 1, 3} <= lost
    assert f"short: {counts['lost_shots']} of 22 lost shots, {counts['lost_tokens']} of 22 lost tokens" in capsys.readouterr().err


def test_a_sample_is_seeded_and_marked(world, choices, tmp_path, monkeypatch):
    drawn = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ask(monkeypatch, *mmlu_args(choices, "--model", world / "base", "--limit", 7, "--seed", seed, "--out", tmp_path / name))
        result = result_of(tmp_path / name / "base")
        drawn[name] = [s["question"] for s in lines_of(tmp_path / name / "base/samples.jsonl")]
        assert result["settings"] | {"limit": 7, "seed": seed, "of": 22} == result["settings"] and result["metrics"]["accuracy"]["n"] == 7
    assert drawn["a"] == drawn["b"] != drawn["c"]
    ask(monkeypatch, "table", tmp_path / "a", "--out", tmp_path / "t")
    assert "| sample of |" in (tmp_path / "t/report.md").read_text()


@pytest.mark.parametrize("task", ["nq", "mmlu"])
def test_a_killed_run_continues_and_two_ranks_score_as_one(task, world, choices, tmp_path, monkeypatch):
    """As a kill leaves it: some lines on disk, one of them torn, written by two ranks. Marks show which lines are not computed anew."""
    nq = ["nq", "--data", world / "world/nq/test.jsonl", "--shots", "2", "--few-shot", world / "world/nq/fewshot.jsonl", "--max-new", "8"]
    command = [*(nq if task == "nq" else mmlu_args(choices)), "--model", world / "base", "--out"]
    ask(monkeypatch, *command, tmp_path / "one")
    whole, samples, folder = result_of(tmp_path / "one/base"), lines_of(tmp_path / "one/base/samples.jsonl"), tmp_path / "two/base"
    folder.mkdir(parents=True)
    (folder / "unfinished.json").write_text(json.dumps({"settings": whole["settings"]}))
    kept = [{**s, "mark": 1} for s in samples]
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in kept[:3]) + json.dumps(kept[3])[:20])
    (folder / "samples.2.jsonl").write_text('{"no index": 1}\n{"index": "x"}\n')
    (folder / "samples.1.jsonl").write_text("".join(json.dumps(s) + "\n" for s in kept[-2:]))
    torchrun(2, "evaluate.py", *command, tmp_path / "two")
    again = lines_of(folder / "samples.jsonl")
    assert [s.pop("mark", 0) for s in again] == [1, 1, 1, *[0] * (len(samples) - 5), 1, 1]
    for a, b in zip(samples, again):
        assert a.pop("log_likelihoods", []) == pytest.approx(b.pop("log_likelihoods", []), abs=1e-4) and a == b
    assert result_of(folder) == whole and sorted(p.name for p in folder.iterdir()) == ["results.json", "samples.2.jsonl.garbled", "samples.jsonl", "samples.lock"]


def test_ranks_take_parts_that_make_up_the_whole(monkeypatch, choices, world, tmp_path):
    """Each rank's examples, seen before any is asked."""
    taken = []
    for rank in range(3):
        monkeypatch.setattr(E, "RANK", rank), monkeypatch.setattr(E, "WORLD", 3)
        monkeypatch.setattr(E, "from_all", lambda value: [{}, None, None])
        monkeypatch.setattr(E, "ask_checkpoint", lambda *a: lambda examples, took, **kw: taken.append([e["sample"]["question"] for e in examples]))
        try:
            ask(monkeypatch, *mmlu_args(choices, "--model", world / "base", "--out", tmp_path))
        except TypeError:                                                               # rank 0 has nothing to sum up
            pass
    rows = [row[0] for s in SUBJECTS for row in E.read_choices(choices / f"test/{s}_test.csv")]
    assert sum(taken, []) == rows and all(4 <= len(part) <= 10 for part in taken)


def test_lines_of_other_settings_are_not_continued(world, choices, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/unfinished.json").write_text(json.dumps({"settings": {"shots": 0}}))
    (tmp_path / "base/samples.jsonl").write_text('{"index": 0}\n')
    with pytest.raises(E.UserError, match="shots was 0, is 3"):
        ask(monkeypatch, *mmlu_args(choices, "--model", world / "base", "--out", tmp_path))
    (tmp_path / "base/samples.jsonl").write_text("")                                        # it ended before its first line
    ask(monkeypatch, *mmlu_args(choices, "--model", world / "base", "--out", tmp_path))
    assert result_of(tmp_path / "base")["metrics"]["accuracy"]["n"] == 22


def test_a_flag_that_was_wrong_can_be_mended(world, tmp_path):
    command = ["evaluate.py", "nq", "--model", world / "base", "--data", world / "world/nq/test.jsonl", "--limit", "3", "--out", tmp_path, "--max-new"]
    assert "context of 256" in one_line(program(*command, "256", status=2))
    program(*command, "2")


SAID = [("B", "B"), (" b", None), ("B.", "B"), ("(C)", "C"), ("**D**", "D"), ("A) red", "A"), ("A: red", "A"), ("A", "A"), ("A\n\nBecause", "A"), ("The answer is B.", "B"), ("The correct answer is (D) none of these.", "D"),
        ("Answer: C", "C"), ("answer: **A**", "A"), ("D is correct", "D"), ("A red thing", None), ("I do not know", None), ("", None), ("A blue one, though B is near", None), ("Apple", None), ("Both A and B", None),
        ("The answer is a matter of taste", None), ("The best answer would be option B", "B"), ("I'd choose\nAnswer: D", "D"), ("The answer is A good deal", None), ("E", None), ("ABCD", None), ("C'est", None)]


@pytest.mark.parametrize("text, letter", SAID)
def test_a_letter_is_read_out_of_words(text, letter):
    assert E.parse_letter(text) == letter


def test_an_endpoint_answers_in_text_and_what_is_no_letter_is_wrong(choices, tmp_path, monkeypatch):
    from test_imitation import Faulty
    server = Faulty(lambda n, request, handler: 400 if n == 7 else {"content": "hm" if n % 2 else "The answer is A."})
    ask(monkeypatch, *mmlu_args(choices, "--shots-as", "turns", "--endpoint", server.url, "--endpoint-model", "m/x", "--out", tmp_path, "--concurrency", 1))
    result, samples = result_of(tmp_path / "m_x"), lines_of(tmp_path / "m_x/samples.jsonl")
    assert result["counts"] == {"failed": 1, "missing": 0, "unparsed": 10, "lost_shots": 0, "lost_tokens": 0} and result["metrics"]["accuracy"]["n"] == 21
    assert result["metrics"]["accuracy"]["score"] == pytest.approx(sum(s["answer"] == "A" for s in samples if s.get("choice")) / 21)
    messages = server.requests[0][0]["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 3 + ["user"] and messages[1]["content"] == "A" and result["settings"]["shots_as"] == "turns"


def test_a_refused_question_is_asked_again_when_the_run_continues(choices, tmp_path, monkeypatch):
    from test_imitation import Faulty
    server = Faulty(lambda n, request, handler: {"content": "A"})
    args = mmlu_args(choices, "--endpoint", server.url, "--endpoint-model", "m", "--out", tmp_path)
    ask(monkeypatch, *args)
    folder = tmp_path / "m"
    whole, lines = result_of(folder), lines_of(folder / "samples.jsonl")
    (folder / "unfinished.json").write_text(json.dumps({"settings": whole["settings"]}))
    (folder / "results.json").unlink()
    (folder / "samples.jsonl").write_text("".join(json.dumps({"index": s["index"], "failed": True} if s["index"] < 2 else s) + "\n" for s in lines))
    ask(monkeypatch, *args)
    assert result_of(folder) == whole and len(server.requests) == 22                    # from the journal: nothing is paid for twice


@pytest.mark.parametrize("content, said", [("q,a,b,c,d,E\n", ":1: expected question"), ('q,a,b,c,d,A\n"q\nq",a,b,A\n', ":3: expected question"), ("", "no questions"), ("q,a,b,c,d,A\n" * 2, "2 examples, --shots asks for 3"),
                                           (b"q,a,b,c,d,A\n\xff", "utf-8")])
def test_a_faulty_csv_is_named(content, said, choices, tmp_path, monkeypatch):
    shutil.copytree(choices, tmp_path / "data")
    path = tmp_path / "data/dev/formal_logic_dev.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(E.UserError, match=said) as e:
        ask(monkeypatch, *mmlu_args(tmp_path / "data", "--model", "x", "--out", tmp_path / "r"))
    assert str(path) in str(e.value)


def test_what_does_not_go_together_is_said(world, choices, tmp_path, monkeypatch):
    for more, said in ((["--model", world / "base", "--shots-as", "turns"], "the template plain has no turns"), (["--endpoint", "http://127.0.0.1:9", "--endpoint-model", "m", "--template", "koala"], "leave out --template"),
                       ([], "--model DIR"), (["--model", world / "base", "--template", "tokens"], "was not trained with it"), (["--model", world / "base", choices], "no checkpoint there")):
        with pytest.raises(E.UserError, match=said):
            ask(monkeypatch, *mmlu_args(choices, "--out", tmp_path, *more))
    assert "anatomy_dev.csv" in one_line(program("evaluate.py", "mmlu", "--data", tmp_path, "--subjects", "anatomy", "--model", world / "base", "--out", tmp_path, status=2))


def test_differences_are_paired_where_the_examples_are_the_same(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, 60)
    chat = np.where(rng.random(60) < 0.1, 1 - base, base)                              # nearly the same answers: a small error of the difference
    for name, scores, data in (("base", base, "x"), ("chat", chat, "x"), ("other", chat, "y")):
        lines = [{"index": i, "accuracy": int(s), "category": "STEM"} for i, s in enumerate(scores)]
        E.write_results(tmp_path / name, "mmlu", {"name": name}, E.by_category("accuracy", lines), {"shots": 5, "data_hash": data}, lines)
    found = E.gather([tmp_path])
    each = chat - base
    for metric in ("accuracy", "accuracy/STEM"):
        d = E.difference(found, "mmlu 5-shot", metric, "chat", "base")
        assert d == (pytest.approx(each.mean()), pytest.approx(each.std(ddof=1) / math.sqrt(60)), True)
    mean, error, paired = E.difference(found, "mmlu 5-shot", "accuracy", "other", "base")
    assert not paired and mean == pytest.approx(each.mean()) and error == pytest.approx(math.hypot(*(s.std(ddof=1) / math.sqrt(60) for s in (base, chat))))
    text = program("evaluate.py", "table", tmp_path, "--out", tmp_path / "t", "--print").stdout
    assert f"| chat − base | {100 * each.mean():+.1f} ± {100 * each.std(ddof=1) / math.sqrt(60):.1f} |" in text and "*" in next(line for line in text.splitlines() if line.startswith("| other − base"))
    assert "47.5 · 33.7 · 33.9 · 34.1 · 67.9" in text and f"| base | {100 * base.mean():.1f} ±" in text
