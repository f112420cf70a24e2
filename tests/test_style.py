"""Table 2: the detectors on texts labelled by hand, the measures, the table with its upper bound, the tone."""
import json
import math
import random

import numpy as np
import pytest

import evaluate as E
from conftest import lines_of, one_line, program

FENCE = "Use this:\n\n```yaml\n- a\n- b\n- c\n```\n\nIt works."
# 40 texts labelled by hand: (text, is there a list?, does a summary close it?)
LABELLED = [
    ("Paris is the capital of France.", False, False),
    ("Here are some tips:\n\n1. Drink water.\n2. Sleep well.\n3. Walk.\n\nIn summary, small habits help.", True, True),
    ("- eggs\n- milk\n- flour", True, False),
    ("* **Rest**: sleep.\n* **Food**: eat.\n\nOverall, be kind to yourself.\n\nI hope this helps!", True, True),
    ("You could try yoga, swimming - or running - and then rest.", False, False),
    ("Overall, I liked the film.", False, False),
    ("The film is long.\n\nThe actors are good.\n\nOverall, I liked the film.", False, True),
    ("1) Open the lid\n2) Pour\n3) Close it", True, False),
    ("Steps:\n  • mix\n  • bake\n  • eat\n\nBy following these steps, you will have a cake.", True, True),
    ("In 1999. A year to remember.\nIn 2000. Another one.", False, False),
    ("1999. The album came out.\n2000. They toured.", False, False),
    ("3.5 is larger than 3.\n4.5 is larger still.", False, False),
    ("-5\n-6\n-7", False, False),
    ("She said:\n\nI will not go there again, whatever you may think of it or of me, and that is my last word.\n\nThen she left, and nobody has ever heard of her again in this town.", False, False),
    ("Common causes include:\n\nStress: it raises the pulse.\n\nCoffee: so does caffeine.\n\nIt is important to see a doctor.", True, False),
    ("The members are:\n\nColin Cooper - vocals\nDerek Holt - guitar\nThe band formed in 1968.", True, False),
    ("English is spoken in many countries, such as:\n\nBelize\nCanada\nGrenada\nMalta", True, False),
    ("It can be put as a problem of the form:\n\nGiven a function f(x), find the x that minimizes f(x).\n\nThere are two types of such problems.", False, False),
    (FENCE, False, False),
    ("Here is a dialogue:\n\nAnn: Hello!\nAnn: Is anybody there?", False, False),
    ("Roses are red,\nviolets are blue,\nsugar is sweet,\nand so are you.", False, False),
    ("Here is a poem:\n\nRoses are red,\nViolets are blue,\nSugar is sweet,\nAnd so are you.", False, False),
    ("The novel opens in 1805.\n\nIt ends in 1820.\n\n## Conclusion\nWar and Peace is about both.", False, True),
    ("The novel opens in 1805.\n\nIt ends in 1820.\n\n**Conclusion**\n\nIt is about war, and about peace.", False, True),
    ("The tax rose.\n\nTrade fell.\n\nTo sum up: a bad year.", False, True),
    ("Tea has caffeine.\n\nUltimately, the choice is yours.", False, True),
    ("Tea has caffeine.\n\nIn conclusion of the talks, they shook hands.", False, False),
    ("Tea has caffeine.\n\nOveralls are trousers with a bib.", False, False),
    ("In summary, tea is nice.\n\nCoffee is nice too.", False, False),
    ("Tea is nice. In summary, drink it.", False, False),
    ("Tea is nice.\n\n- Overall, it is cheap\n- In short, it is hot", True, False),
    ("Tea is nice.\n\nIn short, drink it.\n\nLet me know if you have any other questions!", False, True),
    ("Sorry, I can't help with that.", False, False),
    ("", False, False),
    ("\n\n\n", False, False),
    ("(1) first\n(2) second", True, False),
    ("1. **Plan**\n   Think first.\n\n2. **Do**\n   Then act.\n\nWith these two steps, you are done.", True, True),
    ("| a | b |\n|---|---|\n| 1 | 2 |", False, False),
    ("First, open it. Second, pour. Third, close it.\n\nAll in all, it is easy.", False, True),
    ("– links\n– rechts", True, False),
]


def test_there_are_40_labelled_texts():
    assert len(LABELLED) == len({text for text, _, _ in LABELLED}) == 40


@pytest.mark.parametrize("text, lists, summary", LABELLED)
def test_the_detectors_agree_with_the_labels(text, lists, summary):
    assert (E.has_list(text), E.has_summary(text)) == (lists, summary)


def test_hostile_texts_are_searched_in_no_time():
    for text in ("a:\n" * 50_000, "- " * 100_000, "```" * 50_000, "\n" * 100_000, "x:" * 50_000 + "\n", "*_#> " * 30_000, "scores " * 30_000, "1 " * 50_000):
        E.has_list(text), E.has_summary(text), E.parse_scores(text), E.parse_yes(text)          # what grows with the square would take minutes


def test_lists_of_real_answers(real):
    """HC3's lists have no marks: of medicine's ChatGPT answers about a quarter have one, of the people's none."""
    rows = lines_of(real / "hc3/medicine.jsonl")
    share = lambda side: np.mean([E.has_list(a) for r in rows for a in r[side]])
    assert 0.2 < share("chatgpt_answers") < 0.4 and share("human_answers") == 0


def test_unigram_intersection_and_correlation():
    assert E.unigram_intersection("a b c", "B c d") == pytest.approx(2 / 3) and E.unigram_intersection("", "x") == 0
    assert E.pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1) and E.pearson([1, 1, 1], [1, 2, 3]) == 0


def test_lexical_diversity_does_not_fall_with_length():
    rng = random.Random(0)
    text = lambda n: " ".join(f"w{int(rng.paretovariate(1)) % 500}" for _ in range(n))
    assert E.lexical_diversity("a b " * 25) == 0.04 and E.lexical_diversity("a b c " * 100) == pytest.approx(3 / 50) and math.isnan(E.lexical_diversity("a b c")) and math.isnan(E.lexical_diversity("… !"))
    assert E.lexical_diversity(text(3000)) == pytest.approx(np.mean([E.lexical_diversity(text(100)) for _ in range(30)]), abs=0.02)


def test_style_counts_only_where_the_reference_has_it():
    rows = np.array([[1, 1, 0, 1, .5, 10, 10, .9, 1], [0, 1, 1, 1, .5, 20, 20, .7, 0], [1, 0, 1, 0, .5, 30, 30, np.nan, np.nan]], float)
    m = E.style_metrics(rows)
    assert (m["list"], m["summary"], m["unigram_intersection"]) == (0.5, 0.5, 0.5) and m["length_correlation"] == pytest.approx(1) and m["style_similarity"] == pytest.approx(0.625)
    assert m["authoritative_tone"] == 0.5 and m["lexical_diversity"] == pytest.approx(0.8) and m["words"] == 20


def write(path, answers, **fields):
    path.write_text("".join(json.dumps({"id": f"i{k}", **fields, "messages": [{"role": "user", "content": f"q{k}"}, {"role": "assistant", "content": a}]}) + "\n" for k, a in enumerate(answers)))
    return path


def judge_server(reply):
    """An endpoint whose reply to a request's last message `reply(text, n)` writes."""
    from test_imitation import Faulty
    return Faulty(lambda n, request, handler: (lambda said: said if isinstance(said, (int, tuple)) else {"content": said})(reply(request["messages"][-1]["content"], n)))


def test_the_table_has_the_upper_bound_beside_the_models(tmp_path):
    listed, plain = "Here:\n\n- a\n- b\n\nIn summary, c.", "Some words."
    rng = random.Random(1)
    teacher = [rng.choice([listed, plain]) + " word" * rng.randrange(30) for _ in range(40)]
    a, b, again = (write(tmp_path / f"{name}.jsonl", answers) for name, answers in (("human", [plain] * 40), ("teacher", teacher), ("again", teacher)))
    command = ["evaluate.py", "style", "--a", a, "--b", b, "--upper", again, "--out", tmp_path / "s", "--bootstrap", "200"]
    done = program(*command)
    assert "| again (upper bound) |" in done.stdout and "| list | 0.0 ± 0.0 | 100.0 ± 0.0 |" in done.stdout and done.stdout == (tmp_path / "s/report.md").read_text()
    metrics = json.loads((tmp_path / "s/again/results.json").read_text())["metrics"]
    assert metrics["list"]["n"] == sum(t.startswith(listed) for t in teacher) < 40 and metrics["length_correlation"]["score"] == pytest.approx(1) and "authoritative_tone" not in metrics
    assert (tmp_path / "s/style.png").read_bytes()[:4] == b"\x89PNG"
    assert program(*command).stdout.count("finished already") == 2


def test_the_bootstrap_gives_the_standard_error_of_a_mean(tmp_path):
    rng = random.Random(2)
    b = write(tmp_path / "b.jsonl", ["- x\n- y"] * 200)
    a = write(tmp_path / "a.jsonl", ["- x\n- y" if rng.random() < 0.3 else "x" for _ in range(200)])
    program("evaluate.py", "style", "--a", a, "--b", b, "--out", tmp_path / "s", "--bootstrap", "2000")
    cell = json.loads((tmp_path / "s/a/results.json").read_text())["metrics"]["list"]
    assert cell["stderr"] == pytest.approx(math.sqrt(cell["score"] * (1 - cell["score"]) / 200), rel=0.1)


def test_the_tone_is_the_judges_and_what_it_mumbles_is_counted_apart(tmp_path):
    a, b = write(tmp_path / "a.jsonl", ["sure", "maybe", "mumble", "grumble", "Answer: yes"]), write(tmp_path / "b.jsonl", ["x"] * 5)
    seen = []

    def reply(text, n):
        answer = text.splitlines()[3]
        seen.append(answer)
        return {"sure": "Yes.", "maybe": "**no**, it hedges", "mumble": "Hm" if seen.count("mumble") < 2 else "yes", "grumble": "It depends", "Answer: yes": "No"}[answer]
    server = judge_server(reply)
    done = program("evaluate.py", "style", "--a", a, "--b", b, "--out", tmp_path / "s", "--endpoint", server.url, "--endpoint-model", "m", "--concurrency", "1", "--bootstrap", "50")
    result = json.loads((tmp_path / "s/a/results.json").read_text())
    assert result["metrics"]["authoritative_tone"]["score"] == 0.5 and result["metrics"]["authoritative_tone"]["n"] == 4 and result["counts"] == {"unparsed": 1}
    assert seen.count("grumble") == seen.count("mumble") == 2 and seen.count("sure") == 1 and "1 of 5" in done.stderr
    assert result["settings"]["judge"] == "m" and [s["authoritative_tone"] for s in lines_of(tmp_path / "s/a/samples.jsonl")] == [1, 0, 1, None, 0]


def test_two_files_of_one_name_are_refused(tmp_path):
    (tmp_path / "other").mkdir()
    a, b = write(tmp_path / "a.jsonl", ["x"]), write(tmp_path / "other/a.jsonl", ["y"])
    assert "two files are named a" in one_line(program("evaluate.py", "style", "--a", a, "--upper", b, "--b", a, "--out", tmp_path / "s", status=2))


def test_style_needs_a_model_where_it_has_an_endpoint(tmp_path):
    a = write(tmp_path / "a.jsonl", ["x"])
    assert "--endpoint-model" in one_line(program("evaluate.py", "style", "--a", a, "--b", a, "--out", tmp_path / "s", "--endpoint", "http://127.0.0.1:9", status=2))
