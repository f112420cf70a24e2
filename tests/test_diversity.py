"""BLEU between queries: the index against sacrebleu, diversity, and the prompts that are held out."""
import functools
import gzip
import itertools
import json
import random
import re
import tracemalloc

import numpy as np
import pytest
import sacrebleu

import data
from conftest import lines_of, one_line, program

EXP = sacrebleu.BLEU(smooth_method="exp", effective_order=True)
sacrebleu.metrics.bleu.extract_all_word_ngrams = functools.cache(sacrebleu.metrics.bleu.extract_all_word_ngrams)     # which brute force asks for each text again and again


def brute_force(hypotheses, references):
    """sacrebleu's (exp, none) of each hypothesis with each reference, (2, hypotheses, references); its steps, a reference's n-grams taken once."""
    scores = np.zeros((2, len(hypotheses), len(references)))
    info = [EXP._extract_reference_info([EXP._preprocess_segment(r)]) for r in references]
    for (i, h), (j, r) in itertools.product(enumerate(map(EXP._preprocess_segment, hypotheses)), enumerate(info)):
        length, reference_length, *counts = EXP._compute_segment_statistics(h, r)
        scores[:, i, j] = [EXP.compute_bleu(counts[:4], counts[4:], length, reference_length, smooth, effective_order=True).score for smooth in ("exp", "none")]
    return scores


def highest_by_brute_force(texts):
    scores = brute_force(texts, texts)
    scores[:, range(len(texts)), range(len(texts))] = 0
    return scores.max(2).T


def made_up(n, seed):
    """Texts of 0 to 12 words, a few of them frequent, with repeats: every order is without a match somewhere."""
    rng = random.Random(seed)
    words = "the a of and to in . , ? cat dog run 3.5 x-y &amp; no".split()
    return [" ".join(rng.choices(words, [1 / (k + 1) for k in range(len(words))], k=rng.randrange(13))) for _ in range(n)]


def prompts_of(path, n, shorter_than=10**9):
    return list(itertools.islice((r["prompt"] for r in data.read_jsonl(path) if len(r["prompt"]) < shorter_than), n))


def conversations(path, *dialogues):
    """A file of conversations; each is a list of user queries, each with an answer."""
    data.write_jsonl(path, [{"id": f"c{i}", "source": "test", "messages": [m for q in d for m in ({"role": "user", "content": q}, {"role": "assistant", "content": "Yes."})]} for i, d in enumerate(dialogues)])
    return path


def test_tokens_are_sacrebleus_on_random_strings():
    rng = random.Random(0)
    pieces = [*"ab1290  .,.,--\n\r\t;:'\"()[]{}|~`^_\\/@#$%*+=<>!?é鸭\u00a0\x85\u2028\ud800", "&quot;", "&amp;", "&lt;", "&gt;", "<skipped>", "&amp;lt;", "-\n", "1.5", "5-6"]
    for _ in range(5000):
        text = "".join(rng.choices(pieces, k=rng.randrange(25)))
        assert data.bleu_tokens(text) == EXP._preprocess_segment(text).split(), repr(text)


def test_tokens_are_sacrebleus_on_real_text(real):
    for text in prompts_of(real / "superni/prompts.jsonl", 300) + prompts_of(real / "koala/koala_test_set.jsonl", 180):
        assert data.bleu_tokens(text) == EXP._preprocess_segment(text).split()


@pytest.mark.parametrize("hypothesis, reference, exp, none", [
    ("a b c d", "a b c d", 100, 100),
    ("a b c d", "a b x y", 100 * (2 / 4 * 1 / 3 * (1 / 2) / 2 * (1 / 4) / 1) ** (1 / 4), 0),
    ("a a a", "a", 100 * np.exp(0) * (1 / 3 * (1 / 2) / 2 * (1 / 4) / 1) ** (1 / 3), 0),               # clipped: one match, not three
    ("a b", "a b c d", 100 * np.exp(1 - 4 / 2), 100 * np.exp(1 - 4 / 2)),                              # effective order 2, brevity
    ("a", "b a", 100 * np.exp(1 - 2), 100 * np.exp(1 - 2)),
    ("a b c d e", "v w x y z", 0, 0),
])
def test_bleu_by_hand(hypothesis, reference, exp, none):
    assert data.BleuIndex([hypothesis, reference]).best(0) == pytest.approx((exp, none), abs=1e-9)
    for smoothing, want in (("exp", exp), ("none", none)):
        assert sacrebleu.sentence_bleu(hypothesis, [reference], smooth_method=smoothing).score == pytest.approx(want, abs=1e-9)
    assert brute_force([hypothesis], [reference])[:, 0, 0] == pytest.approx((exp, none), abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_best_is_brute_forces_on_short_texts(seed):
    texts = made_up(110, seed)
    index = data.BleuIndex(texts)
    assert np.abs(np.array([index.best(i) for i in range(len(texts))]) - highest_by_brute_force(texts)).max() < 1e-6


def test_best_is_brute_forces_on_300_real_queries(real):
    texts = prompts_of(real / "superni/prompts.jsonl", 130, 300) + prompts_of(real / "koala/koala_test_set.jsonl", 110, 400) + [json.loads(line)["question"] + "?" for line in open(real / "nq/NQ-open.dev.jsonl")][:60]
    assert len(texts) == 300
    index = data.BleuIndex(texts)
    got, want = np.array([index.best(i) for i in range(300)]), highest_by_brute_force(texts)
    assert np.abs(got - want).max() < 1e-6
    assert (got[:, 0] - got[:, 1]).max() > 1                                # smoothing decides figures here


def test_pruning_loses_nothing_and_leaves_most_texts_unscored(real, monkeypatch):
    index = data.BleuIndex(prompts_of(real / "superni/prompts.jsonl", 3000))
    keys, looked_at = data.BleuIndex.keys, []
    monkeypatch.setattr(data.BleuIndex, "keys", lambda self, n, i: (n == 1 and looked_at.append(i), keys(self, n, i))[1])
    sample = range(0, 3000, 20)
    best = [index.best(i) for i in sample]
    assert len(looked_at) < 0.05 * len(sample) * 3000
    assert best == pytest.approx(np.array([[s.max() for s in index.scores(i)] for i in sample]), abs=1e-9)


def test_pruning_goes_on_until_neither_smoothing_can_gain():
    """Decoys whose bounds are the highest: they fill the first rounds, and what beats them comes after."""
    wordy = ["a b c d e f", *(f"a b x{i} y{i} z{i} w{i}" for i in range(100)), "a b d f"]
    index = data.BleuIndex(wordy)
    assert index.best(0) == pytest.approx(brute_force(wordy[:1], wordy[-1:])[:, 0, 0], abs=1e-9) and index.scores(0)[0].argmax() == 101
    gapped = ["a b c d e f g h i j k l", *(f"a b c x{i} e f g y{i} i j k z{i}" for i in range(100)), "a b c d"]
    want = brute_force(gapped[:1], gapped[1:])[:, 0, :].max(1)
    assert want[0] > want[1] + 5 > 5                                        # exp's best matches no 4-gram, none's best is another text
    assert data.BleuIndex(gapped).best(0) == pytest.approx(want, abs=1e-9)


def test_hostile_queries_break_nothing_and_memory_follows_the_tokens():
    texts = ["", " ", "\n", "<skipped>", "word", "Word", "word word", "?!", "." * 5000, "x " * 100_000, " ".join(map(str, range(100_000))), "z" * 1_000_000, "\ud800 \x1b[2J </s>", "0 1 2 3 4 5 6"]
    tracemalloc.start()
    index = data.BleuIndex(texts)
    best = np.array([index.best(i) for i in range(len(texts))])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.isfinite(best).all() and (best >= 0).all() and (best <= 100 + 1e-9).all()
    assert not best[:4].any() and best[4][0] > 0
    assert peak < 300 * index.lengths.sum() + 100e6
    assert data.BleuIndex(["only one"]).best(0) == (0, 0)


def test_diversity_command_counts_twins_and_turns_apart(tmp_path):
    file = conversations(tmp_path / "c.jsonl", ["How do I bake bread at home?", "and cake?"], ["HOW do  I bake bread at home?"], ["How do I bake cakes at home?", " "], ["Name three rivers of Asia."], ["Name three rivers of Asia ."])
    done = program("data.py", "diversity", file, "--out", tmp_path / "all.json", "--workers", "1")
    result = json.loads((tmp_path / "all.json").read_text())
    assert (result["user_turns"], result["twins"], result["empty"], result["metrics"]["bleu_exp"]["n"]) == (7, 1, 1, 5)
    queries = ["how do i bake bread at home?", "and cake?", "how do i bake cakes at home?", "name three rivers of asia.", "name three rivers of asia ."]
    want = highest_by_brute_force(queries)
    for k, name in enumerate(("bleu_exp", "bleu_none")):
        assert result["metrics"][name]["score"] == pytest.approx(want[:, k].mean(), abs=1e-6)
        assert result["metrics"][name]["stderr"] == pytest.approx(want[:, k].std(ddof=1) / 5 ** 0.5, abs=1e-6)
        assert result["histogram"][name] == np.histogram(np.minimum(want[:, k], 100), 10, (0, 100))[0].tolist()
        assert f"{want[:, k].mean():.2f}%" in done.stdout
    assert "8%" in done.stdout and "61%" in done.stdout and done.stdout.count("#") >= 40
    program("data.py", "diversity", file, "--first-turn", "--out", tmp_path / "first.json", "--workers", "1")
    first = json.loads((tmp_path / "first.json").read_text())
    assert (first["user_turns"], first["twins"], first["empty"], first["metrics"]["bleu_exp"]["n"]) == (5, 1, 0, 4)


def test_diversity_does_not_depend_on_the_number_of_processes(tmp_path, real):
    data.write_jsonl(tmp_path / "p.jsonl", ({"prompt": p} for p in prompts_of(real / "superni/prompts.jsonl", 400)))
    for workers in (1, 3):
        program("data.py", "diversity", tmp_path / "p.jsonl", "--workers", workers, "--out", tmp_path / f"{workers}.json")
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "3.json").read_bytes()


def test_too_similar_is_sacrebleu_beyond_20_in_both_directions():
    prompts, examples = ([data.normalize_query(t) for t in made_up(n, seed)] for n, seed in ((40, 8), (60, 9)))
    want = brute_force(prompts, examples)[0] > 20
    assert 0 < want.any(1).sum() < 40 and 0 < want.any(0).sum() < 60
    near = data.too_similar([[p] for p in prompts], [[e] for e in examples])
    assert near == ({*np.flatnonzero(want.any(1))}, {*np.flatnonzero(want.any(0))})
    assert data.too_similar([[p.upper()] for p in prompts], [["", e] for e in examples[::-1]])[1] == {59 - j for j in near[1]}


HELD_OUT = {   # prompt -> what becomes of it, trained on TRAINING
    "Which rivers flow into the Black Sea, and how long are they?": "kept",
    "Give me five ideas for a birthday party for a six year old.": "kept",
    "Explain to a child why the sky is blue": "kept",
    "Write a short poem about the autumn leaves in Boston.": "like a training query",
    "Write a python function that reverses a list.": "coding",
    "Fix this:\n```\nx = 1\n```": "coding",
    "Kannst du mir bitte erklären, warum der Himmel blau ist und warum er am Abend rot wird?": "not English",
    " ": "empty",
}
TRAINING = [["Write a short poem about the autumn leaves in Vermont."], ["Hello!", "What should I cook for dinner tonight with rice and beans?"]]


def test_heldout_drops_for_the_papers_reasons(tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    data.write_jsonl(prompts, [{"id": f"p{i}", "prompt": p} if i % 2 else {"id": f"p{i}", "messages": [{"role": "user", "content": p}], "category": "x"} for i, p in enumerate(HELD_OUT)])
    train = conversations(tmp_path / "train.jsonl", *TRAINING)
    done = program("data.py", "heldout", "--prompts", prompts, "--train", train, "--out", out)
    kept, dropped = lines_of(out), {r["id"]: r["reason"] for r in lines_of(tmp_path / "out.dropped.jsonl")}
    assert {p: dropped.get(f"p{i}", "kept") for i, p in enumerate(HELD_OUT)} == HELD_OUT
    assert [r["messages"][0]["content"] for r in kept] == [p for p, why in HELD_OUT.items() if why == "kept"] and kept[0]["category"] == "x"
    header, row = (line.split("  ") for line in done.stdout.splitlines())
    table = dict(zip(filter(None, map(str.strip, header)), filter(None, map(str.strip, row))))
    assert table == {"prompts": "prompts.jsonl", "in": "8", "empty": "1", "not English": "1", "coding": "2", "like a training query": "1", "not drawn": "0", "kept": "3"}
    assert "only 3 prompts" in one_line(done)


def test_heldout_draws_n_by_the_seed_in_the_order_of_the_file(tmp_path, real):
    train = conversations(tmp_path / "train.jsonl", *TRAINING)
    drawn = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        row = data.held_out(real / "koala/koala_test_set.jsonl", train, 50, tmp_path / f"{name}.jsonl", None, seed)
        assert row["in"] == sum(v for k, v in row.items() if k != "in") == 180 and row["kept"] == 50
        drawn[name] = [r["id"] for r in lines_of(tmp_path / f"{name}.jsonl")]
        assert len(lines_of(tmp_path / f"{name}.dropped.jsonl")) == 130
    assert drawn["a"] == drawn["b"] != drawn["c"]
    assert drawn["a"] == sorted(drawn["a"], key=lambda key: int(key.split("_")[1])) and len(set(drawn["a"])) == 50


def test_mix_held_out_leaves_nothing_that_heldout_would_find(tmp_path):
    queries = ["Write a short poem about the autumn leaves in Vermont.", "What should I cook for dinner tonight with rice and beans?", "Name the capital of France.", "Who wrote the opera Carmen?"]
    (tmp_path / "sg.json").write_text(json.dumps([{"id": f"d{i}", "conversations": [{"from": "human", "value": "Hi! " * (i + 1)}, {"from": "gpt", "value": "Hi."}, {"from": "human", "value": q}, {"from": "gpt", "value": "Sure."}]}
                                                  for i, q in enumerate(queries)]))
    data.write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "Write a short poem about the autumn leaves in Boston."}, {"id": "b", "prompt": "who wrote the opera Aida?"}])
    done = program("data.py", "mix", "--sharegpt", tmp_path / "sg.json", "--any-language", "--held-out", tmp_path / "prompts.jsonl", "--out", tmp_path / "mix.jsonl")
    assert [r["id"] for r in lines_of(tmp_path / "mix.jsonl")] == ["d1", "d2"]
    assert lines_of(tmp_path / "mix.dropped.jsonl") == [{"id": k, "source": "sharegpt", "reason": "like a held-out prompt"} for k in ("d0", "d3")]
    header, row = done.stdout.splitlines()
    assert "like a held-out prompt" in header and dict(zip(re.split(r"  +", header), row.split())) == {"source": "sharegpt", "in": "4", "kept": "2", "like a held-out prompt": "2", "turns": "8", "words": "25", "koala markers": "0"}
    left = data.held_out(tmp_path / "prompts.jsonl", tmp_path / "mix.jsonl", 255, tmp_path / "out.jsonl", None)
    assert left["like a training query"] == 0 and left["kept"] == 2


def test_coding_prompts_are_told_from_others(real):
    coding = [json.loads(line)["prompt"] for line in gzip.open(real / "humaneval/HumanEval.jsonl.gz")]
    assert all(data.CODING.search(prompt) for prompt in coding)
    other = prompts_of(real / "koala/koala_test_set.jsonl", 180)             # their authors had removed coding queries
    assert sum(bool(data.CODING.search(prompt)) for prompt in other) <= 4
    for prompt in ("Explain the code of conduct for a volunteer.", "What is the import duty on tea?", "Which class should I take?", "Public speaking tips; short ones", "Select three books from this list:", "Let us meet = when?", "Tea: cheap; coffee: dear;"):
        assert not data.CODING.search(prompt), prompt


@pytest.mark.parametrize("lines, want", [
    ('{"prompt": "one"}\n{"prompt": " ONE"}\n', "fewer than two distinct user queries"),
    ("", "fewer than two distinct user queries"),
    ('{"prompt": "one"}\n{"text": "two"}\n', "f.jsonl:2: no field 'messages'"),
    ('{"prompt": "one"}\n{', "f.jsonl:2: not JSON"),
])
def test_bad_input_of_diversity_is_one_line(tmp_path, lines, want):
    (tmp_path / "f.jsonl").write_text(lines)
    assert want in one_line(program("data.py", "diversity", tmp_path / "f.jsonl", status=2))


def test_an_empty_training_file_is_an_error(tmp_path):
    data.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "one"}])
    (tmp_path / "train.jsonl").write_text("")
    assert "train.jsonl: no conversations" in one_line(program("data.py", "heldout", "--prompts", tmp_path / "prompts.jsonl", "--train", tmp_path / "train.jsonl", "--out", tmp_path / "o", status=2))
    assert not (tmp_path / "o").exists()
