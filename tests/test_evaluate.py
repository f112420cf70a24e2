import json
import math

import numpy as np
import pytest

import evaluate as E
from conftest import lines_of, one_line, program


@pytest.mark.parametrize("a, b", [("The Saint Lawrence River", "saint lawrence river"), ("A  Tale, of Two Cities!", "tale of two cities"), ("U.S.", "us"), ("rock-n-roll", "rocknroll"), ("an apple", "apple"),
                                  ("581 ( second edition )", "581 second edition"), ("“quoted”", "“quoted”"), ("theatre", "theatre"), ("the the", ""), ("O'Brien", "obrien"), ("İstanbul", "i̇stanbul")])
def test_answers_are_normalised_as_squad_does(a, b):
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


def test_style_counts_only_where_the_reference_has_it():
    rows = np.array([[1, 1, 0, 1, .5, 10, 10], [0, 1, 1, 1, .5, 20, 20], [1, 0, 1, 0, .5, 30, 30]], float)
    m = E.style_metrics(rows)
    assert (m["list"], m["summary"], m["unigram_intersection"]) == (0.5, 0.5, 0.5) and m["length_correlation"] == pytest.approx(1) and m["style_similarity"] == pytest.approx(0.625)


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
        (tmp_path / name).write_text(json.dumps({"id": key, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}) + "\n")
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
    result = lambda score, **card: {"model": {"name": "x", **card}, "metrics": {"exact_match": {"score": score, "stderr": 0.01, "n": 100}}}
    cards = {"small": {"name": "small", "base": "small", "parameters": 1, "tokens": 1}, "chat": {"name": "chat", "base": "small", "parameters": 1, "data": "sharegpt-mix", "tokens": 5}}
    for score, word in ((0.9, "NOT seen"), (0.2, "seen")):
        found = {("nq 3-shot", "small"): [result(0.3)], ("nq 3-shot", "chat"): [result(score)]}
        assert any(line.startswith(f"- {word}: small, nq 3-shot: ShareGPT-Mix does not raise") for line in E.directions(found, cards))
