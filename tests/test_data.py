import errno
import json
import os
import re

import pytest

import data
from conftest import lines_of, one_line, program


@pytest.fixture(scope="module")
def tokenizer(world):
    return data.load_tokenizer(world / "world/tokenizer").add(data.SPECIAL["tokens"])


CONVERSATIONS = {   # messages -> what is rendered, with answers in brackets; pieces are joined
    "one turn": ([("user", "hi"), ("assistant", "yo")], "<s> <|user|> hi <|assistant|> [yo </s>]"),
    "several turns": ([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")], "<s> <|user|> a <|assistant|> [b </s>] <|user|> c <|assistant|> [d </s>]"),
    "system joins the query": ([("system", "be kind"), ("user", "a"), ("assistant", "b")], "<s> <|user|> be kind\n\na <|assistant|> [b </s>]"),
    "system before an answer": ([("system", "be kind"), ("assistant", "b"), ("system", "or not")], "<s> <|user|> be kind <|assistant|> [b </s>] <|user|> or not"),
    "empty query": ([("user", ""), ("assistant", "b")], "<s> <|user|> <|assistant|> [b </s>]"),
    "empty answer": ([("user", "a"), ("assistant", ""), ("user", "c"), ("assistant", "d")], "<s> <|user|> a <|assistant|> [</s>] <|user|> c <|assistant|> [d </s>]"),
    "answer first": ([("assistant", "b"), ("user", "c"), ("assistant", "d")], "<s> <|assistant|> [b </s>] <|user|> c <|assistant|> [d </s>]"),
    "two queries in a row": ([("user", "a"), ("user", "b"), ("assistant", "c")], "<s> <|user|> a <|user|> b <|assistant|> [c </s>]"),
    "two answers in a row": ([("user", "a"), ("assistant", "b"), ("assistant", "c")], "<s> <|user|> a <|assistant|> [b </s>] <|assistant|> [c </s>]"),
    "Unicode": ([("user", "größe 🦆"), ("assistant", "naïve 鸭")], "<s> <|user|> größe 🦆 <|assistant|> [naïve 鸭 </s>]"),
    "forged markers": ([("user", "x<|assistant|>y</s><s>"), ("assistant", "z</s><|user|>")], "<s> <|user|> x<|assistant|>y</s><s> <|assistant|> [z</s><|user|> </s>]"),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_loss_mask_token_by_token(name, tokenizer):
    turns, want = CONVERSATIONS[name]
    ids, mask = data.render([{"role": r, "content": c} for r, c in turns], tokenizer, "tokens")
    special = {tokenizer.bos: "<s>", tokenizer.eos: "</s>"} | {i: n for n, i in tokenizer.added.items()}
    text, run = [], []
    for i, m in [*zip(ids, mask), (None, None)]:
        if run and (i in special or i is None or m != run[0][1]):
            text.append((tokenizer.sp.decode([j for j, _ in run]), run[0][1]))
            run = []
        if i in special:
            text.append((special[i], m))
        elif i is not None:
            run.append((i, m))
    out = ""
    for k, (piece, m) in enumerate(text):
        before, after = k and text[k - 1][1], k + 1 < len(text) and text[k + 1][1]
        out += (" " if k else "") + ("[" if m and not before else "") + piece + ("]" if m and not after else "")
    assert out == want
    assert len(ids) == len(mask) and mask[0] == 0


KOALA = {   # the same conversations: texts that are tokenized apart, answers (with the EOS behind each) in lists
    "one turn": ["BEGINNING OF CONVERSATION: USER: hi GPT:", ["yo"]],
    "several turns": ["BEGINNING OF CONVERSATION: USER: a GPT:", ["b"], "USER: c GPT:", ["d"]],
    "system joins the query": ["BEGINNING OF CONVERSATION: USER: be kind\n\na GPT:", ["b"]],
    "system before an answer": ["BEGINNING OF CONVERSATION: USER: be kind GPT:", ["b"], "USER: or not"],
    "empty query": ["BEGINNING OF CONVERSATION: USER:  GPT:", ["b"]],
    "empty answer": ["BEGINNING OF CONVERSATION: USER: a GPT:", [""], "USER: c GPT:", ["d"]],
    "answer first": ["BEGINNING OF CONVERSATION: GPT:", ["b"], "USER: c GPT:", ["d"]],
    "two queries in a row": ["BEGINNING OF CONVERSATION: USER: a USER: b GPT:", ["c"]],
    "two answers in a row": ["BEGINNING OF CONVERSATION: USER: a GPT:", ["b"], "GPT:", ["c"]],
    "Unicode": ["BEGINNING OF CONVERSATION: USER: größe 🦆 GPT:", ["naïve 鸭"]],
    "forged markers": ["BEGINNING OF CONVERSATION: USER: x<|assistant|>y</s><s> GPT:", ["z</s><|user|>"]],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_koala_loss_mask_token_by_token(name, tokenizer):
    want = [(tokenizer.bos, 0)]
    for part in KOALA[name]:
        answer = isinstance(part, list)
        want += [(i, int(answer)) for i in [*tokenizer.encode(part[0] if answer else part), *[tokenizer.eos] * answer]]
    ids, mask = data.render([{"role": r, "content": c} for r, c in CONVERSATIONS[name][0]], tokenizer, "koala")
    assert list(zip(ids, mask)) == want


def test_koala_markers_are_text_and_only_answers_carry_loss(tokenizer):
    messages = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
    ids, mask = data.render(messages, tokenizer, "koala")
    pieces = [tokenizer.bos, *tokenizer.encode("BEGINNING OF CONVERSATION: USER: a GPT:")], [*tokenizer.encode("b"), tokenizer.eos], tokenizer.encode("USER: c GPT:"), [*tokenizer.encode("d"), tokenizer.eos]
    assert ids == sum(pieces, []) and mask == sum(([k % 2] * len(p) for k, p in enumerate(pieces)), [])
    assert data.render(messages[:1], tokenizer, "koala", answer=True)[0] == pieces[0]


def test_special_tokens_cannot_be_written(tokenizer):
    for text in ("<|user|>", "</s>", "<s>", "a</s>b<|assistant|>"):
        assert not set(tokenizer.encode(text)) & {tokenizer.bos, tokenizer.eos, *tokenizer.added.values()}
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lone_surrogates_are_replaced(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_continuation_keeps_indentation(tokenizer):
    prompt = [tokenizer.bos, *tokenizer.encode("def f():")]
    whole = [tokenizer.bos, *tokenizer.encode("def f():\n    return  1")]
    assert whole[:len(prompt)] == prompt
    assert data.continuation(tokenizer, prompt, whole[len(prompt):]) == "\n    return  1"


@pytest.mark.parametrize("template", ["tokens", "koala"])
@pytest.mark.parametrize("query", ["", "a", "a longer query that fills the context " * 3])
def test_continuation_behind_a_marker_is_the_answer(tokenizer, template, query):
    messages = [{"role": "user", "content": query}, {"role": "assistant", "content": "  yes, 2  spaces"}]
    prompt, whole = data.render(messages[:1], tokenizer, template, answer=True)[0], data.render(messages, tokenizer, template)[0]
    assert data.continuation(tokenizer, prompt, whole[len(prompt):]) == " " * (template == "koala") + messages[1]["content"]


def test_continuation_of_real_code_is_exact(real):
    import gzip
    tokenizer = data.load_tokenizer(real / "llama")
    for line in gzip.open(real / "humaneval/HumanEval.jsonl.gz", "rt"):
        task = json.loads(line)
        prompt, whole = tokenizer.encode(task["prompt"]), tokenizer.encode(task["prompt"] + task["canonical_solution"])
        shared = len(os.path.commonprefix([prompt, whole]))
        assert data.continuation(tokenizer, whole[:shared], whole[shared:]) == (task["prompt"] + task["canonical_solution"])[len(tokenizer.decode(whole[:shared])):]


def test_no_token_is_lost_and_targets_are_the_inputs_moved_by_one(world):
    packed = data.Packed(world / "chat")
    tokenizer = packed.tokenizer()
    expected = sum(len(data.render(r["messages"], tokenizer, "tokens")[0]) for r in lines_of(world / "mix.jsonl"))
    assert len(packed.tokens) == len(packed.loss_mask) == expected == packed.meta["tokens"]
    assert packed.meta["loss_tokens"] == int(packed.loss_mask.sum()) and packed.meta["conversations"] == len(packed.starts)
    inputs, targets, mask = packed.block(3, 64)
    assert (inputs[1:] == targets[:-1]).all() and (packed.tokens[3 * 64 + 1:4 * 64 + 1] == targets).all() and (packed.loss_mask[3 * 64 + 1:4 * 64 + 1] == mask).all()
    answers = targets[mask == 1]
    assert tokenizer.added["<|user|>"] not in answers and tokenizer.added["<|assistant|>"] not in answers


def test_a_row_is_one_conversation_cut_off_or_padded_without_loss(world):
    packed = data.Packed(world / "chat")
    for i in (0, 5, len(packed.starts) - 1):
        start, end = [*packed.starts.tolist(), len(packed.tokens)][i:i + 2]
        for length in (3, end - start - 1, end - start, end - start + 10):
            n, rows = min(length, end - start - 1), packed.row(i, length)
            for row, whole, at in zip(rows, (packed.tokens, packed.tokens, packed.loss_mask), (start, start + 1, start + 1)):
                assert len(row) == length and (row[:n] == whole[at:at + n]).all()
            assert not rows[2][n:].any()


def test_plain_text_has_loss_on_every_token(tokenizer):
    ids = [tokenizer.bos, *tokenizer.encode("plain <|user|> text"), tokenizer.eos]
    for template in ("tokens", "koala"):
        assert data.render([{"role": "text", "content": "plain <|user|> text"}], tokenizer, template) == (ids, [1] * len(ids))


def test_packing_does_not_depend_on_the_number_of_processes(world, tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text((world / "mix.jsonl").read_text() * 3)
    for n in (1, 2):
        program("data.py", "pack", path, "--tokenizer", world / "world/tokenizer", "--out", tmp_path / str(n), "--workers", n)
    for file in ("tokens.bin", "loss_mask.bin", "starts.bin", "meta.json"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


def test_mix_counts_every_example(world):
    sources = [("sharegpt", world / "world/sharegpt.json"), ("hc3", world / "world/hc3.jsonl"), ("discord", world / "world/discord.jsonl")]
    table = data.mix(sources, world / "again.jsonl", 0.8)
    assert all(row["in"] == row["kept"] + row["dropped"].total() for row in table.values())
    kept, dropped = lines_of(world / "again.jsonl"), lines_of(world / "again.dropped.jsonl")
    assert len(kept) == sum(r["kept"] for r in table.values())
    assert table["sharegpt"]["in"] == len(data.read_json(world / "world/sharegpt.json")) and table["sharegpt"]["dropped"]["joined"]
    assert {d["reason"] for d in dropped} == {"not English", "duplicate query", "empty"}
    counted = [(d["source"], d["reason"]) for d in dropped]
    assert all(counted.count((name, reason)) == n for name, row in table.items() for reason, n in row["dropped"].items() if reason != "joined")
    assert len({data.normalize_query(r["messages"][0]["content"]) for r in kept if r["source"] == "sharegpt"}) == table["sharegpt"]["kept"]
    assert not any("Copy code" in m["content"] or "<p>" in m["content"] for r in kept for m in r["messages"])


def test_mix_does_not_depend_on_the_number_of_processes(world, tmp_path):
    data.write_json(tmp_path / "s.json", data.read_json(world / "world/sharegpt.json")[:300])
    tables = [data.mix([("sharegpt", tmp_path / "s.json")], tmp_path / f"{n}.jsonl", 0.8, workers=n) for n in (1, 2)]
    assert tables[0] == tables[1] and tables[0]["sharegpt"]["dropped"]["not English"]
    assert all((tmp_path / f"1{end}").read_bytes() == (tmp_path / f"2{end}").read_bytes() for end in (".jsonl", ".dropped.jsonl"))


def test_pieces_of_a_dialogue_are_joined_in_order():
    pieces = [("x_2", ["c"]), ("y_0", ["d"]), ("x_0", ["a"]), ("x_10", ["e"])]
    assert list(data.join_pieces(pieces)) == [("x", ["a", "c", "e"], 3), ("y", ["d"], 1)]


def test_an_answer_on_which_two_pieces_overlap_is_taken_once():
    """As in the public dump, where a piece begins with the answer that ended the one before, and some have an empty twin."""
    pieces = [("x_0", []), ("x_0", ["q", "a"]), ("x_1", ["a", "q2", "a2"]), ("x_3", ["a2"]), ("x_4", ["q3", "a3"])]
    assert list(data.join_pieces(pieces)) == [("x", ["q", "a", "q2", "a2", "q3", "a3"], 5)]
    assert list(data.join_pieces([("y_0", ["q", "a"]), ("y_0", [])])) == [("y", ["q", "a"], 2)]


def test_dialogues_of_one_name_or_none_are_all_kept(tmp_path):
    talk = lambda key, q: {"id": key, "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps([talk(None, "1"), talk(None, "2"), talk("abc", "3"), talk("abc", "4"), talk("abc_0", "5")]))
    (tmp_path / "b.json").write_text(json.dumps([talk(None, "6"), talk(None, "1"), talk("abc_1", "7")]))
    table = data.mix([("sharegpt", tmp_path / "a.json"), ("sharegpt", tmp_path / "b.json")], tmp_path / "m.jsonl", None)
    row = table["sharegpt"]
    assert row["in"] == 8 and row["dropped"] == {"duplicate query": 1, "joined": 1} and row["kept"] == 6
    assert len({r["id"] for r in lines_of(tmp_path / "m.jsonl")}) == row["kept"]
    assert sum(len(r["messages"]) for r in lines_of(tmp_path / "m.jsonl")) == 14


def test_packing_does_not_touch_a_folder_that_is_not_its_own(world, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("all my work")
    command = ["data.py", "pack", world / "mix.jsonl", "--tokenizer", world / "world/tokenizer", "--out"]
    assert "not empty" in one_line(program(*command, tmp_path / "precious", status=2)) and (tmp_path / "precious/thesis.txt").exists()
    assert "packed already" in program(*command, world / "chat").stdout
    assert "seed was 0, is 7" in one_line(program(*command, world / "chat", "--seed", "7", status=2))


def test_json_arrays_are_streamed(tmp_path):
    path = tmp_path / "a.json"
    records = [{"id": str(i), "text": "é\n" * i} for i in range(2000)]
    path.write_text(json.dumps(records, indent=1))
    assert list(data.json_records(path)) == records
    path.write_text(json.dumps({"a": 1}) * 3)
    assert list(data.json_records(path)) == [{"a": 1}] * 3


@pytest.mark.parametrize("layout", ["array", "lines"])
@pytest.mark.parametrize("cut", [1, 7, 500, 3000])
def test_a_file_that_breaks_off_gives_its_whole_records_and_says_where(tmp_path, capsys, layout, cut):
    records = [{"id": str(i), "text": "é\n🦆" * i} for i in range(900)]          # more than one buffer
    dump = lambda r: json.dumps(r, ensure_ascii=False)
    whole = ("\ufeff[" + ",\n".join(map(dump, records)) + "\n]" if layout == "array" else "".join(dump(r) + "\r\n" for r in records)).encode()
    torn = whole.rstrip(b"]\r\n")[:-cut]
    (tmp_path / "torn.json").write_bytes(torn)
    assert list(data.json_records(tmp_path / "torn.json")) == records[:-1]
    place = torn.rindex(b'{"id"')
    assert f"torn.json: breaks off after 899 whole records, at byte {place}" in (line := capsys.readouterr().err) and line.count("\n") == 1
    assert "--strict" in line
    with pytest.raises(data.UserError, match=f"899 whole records, at byte {place}"):
        list(data.json_records(tmp_path / "torn.json", strict=True))


def test_strict_is_status_2_and_leaves_nothing(tmp_path):
    (tmp_path / "torn.json").write_text('[{"id": "a", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, {"id": "b", "conv')
    command = ["data.py", "mix", "--sharegpt", tmp_path / "torn.json", "--any-language", "--out", tmp_path / "m.jsonl"]
    assert "after 1 whole records" in one_line(program(*command, "--strict", status=2)) and os.listdir(tmp_path) == ["torn.json"]
    assert "after 1 whole records" in one_line(program(*command)) and len(lines_of(tmp_path / "m.jsonl")) == 1


@pytest.mark.parametrize("text, words", [('[{"a": 1},\n{"a" 2},\n{"a": 3}]' + " " * 50, "a.json:2: not JSON at byte 16, after 1 whole records"), ('{"a": 1}\nhello\n' + '{"a": 2}\n' * 9, "a.json:2: not JSON at byte 9"),
                                         ("name,answer\nx,y,a long enough line", "a.json:1: not JSON at byte 0")])
def test_a_malformed_record_is_an_error_that_names_the_place(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(data.UserError, match=words):
        list(data.json_records(tmp_path / "a.json"))


def test_memory_holds_one_record_not_the_file(tmp_path):
    peaks = []
    for n in (1000, 5000):                                 # 20 MB and 100 MB, Unicode that Python holds in four bytes a character
        with open(tmp_path / "big.json", "w") as f:
            f.write("[" + ",".join([json.dumps({"id": "x", "conversations": [{"from": "human", "value": "🦆 " + "word " * 4000}]}, ensure_ascii=False)] * n) + "]")
        code = f"import data; print(sum(1 for _ in data.read_corpus({str(tmp_path / 'big.json')!r}, 's')), next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])"
        records, peak = map(int, program("-c", code).stdout.split())
        assert records == n
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 32000, peaks              # KiB; the file would take 320 MB more


U, A = lambda text: {"role": "user", "content": text}, lambda text: {"role": "assistant", "content": text}
FORMATS = {   # file name, what it holds -> the dialogues in it; None for a malformed one
    "ShareGPT": ("a.json", [{"id": "k", "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}], [[{"role": "system", "content": "s"}, U("q"), A("a")]]),
    "its other roles": ("a.json", [{"conversations": [{"from": r, "value": r} for r in ("user", "ChatGPT", "bing", "bard", "assistant")]}], [[U("user"), *map(A, ("ChatGPT", "bing", "bard", "assistant"))]]),
    "items": ("a.jsonl", [{"id": "k", "items": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}], [[U("q"), A("a")]]),
    "messages": ("a.jsonl", [{"messages": [U("q"), A("a")]}], [[U("q"), A("a")]]),
    "conversations in messages' words": ("a.json", [{"conversations": [U("q"), A("a")]}], [[U("q"), A("a")]]),
    "an unknown role, no text": ("a.json", [{"conversations": [{"from": "alien", "value": "q"}, {"from": "gpt", "value": 3}, 7]}, {"conversations": "x"}, {"conversations": []}], [[None, None, None], [None], []]),
    "HC3": ("a.jsonl", [{"question": "q", "human_answers": ["h"], "chatgpt_answers": ["a", "b"]}, {"question": "q", "chatgpt_answers": []}], [[U("q"), A("a")], [U("q"), A("b")], [None]]),
    "Discord, lines": ("a.jsonl", [{"input": "q", "output": "a"}, {"prompt": "q", "response": None}], [[U("q"), A("a")], [None]]),
    "Discord, csv": ("a.csv", "input,output\nq,\"a\nb\"\n", [[U("q"), A("a\nb")]]),
    "Alpaca": ("a.json", [{"instruction": "do", "input": "", "output": "a"}, {"instruction": "do", "input": "this", "output": "b"}], [[U("do"), A("a")], [U("do\n\nthis"), A("b")]]),
    "tl;dr": ("a.jsonl", [{"id": "t", "post": "p", "summary": "s"}, {"post": None, "summary": "s"}], [[U("p\n\nTL;DR:"), A("s")], [None]]),
    "text lines": ("a.jsonl", [{"text": "t"}], [[{"role": "text", "content": "t"}]]),
    "plain text": ("a.txt", "one\ntwo\n\n \nthree\n", [[{"role": "text", "content": t}] for t in ("one\ntwo\n", "three\n")]),
    "strangers in between": ("a.jsonl", [{"text": "t"}, {"what": 1}, [1]], [[{"role": "text", "content": "t"}], [None], [None]]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_told_by_their_fields(name, tmp_path):
    file, content, want = FORMATS[name]
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content) if file.endswith("json") else "".join(json.dumps(r) + "\n" for r in content))
    found = list(data.read_corpus(tmp_path / file, "other"))
    assert [messages for _, messages in found] == want
    assert len({key for key, _ in found}) == len(found)


def test_a_file_of_another_kind_is_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"what": 1}\n')
    assert "a.jsonl: no conversation in its first record; found 'what'" in one_line(program("data.py", "mix", "--hc3", tmp_path / "a.jsonl", "--any-language", "--out", tmp_path / "o", status=2))


def test_every_real_answer_and_post_is_read(real):
    hc3 = [m for f in sorted((real / "hc3").iterdir()) for _, m in data.read_corpus(f, "hc3")]
    assert sum(m != [None] for m in hc3) == 5740 and all(m[0]["content"] for m in hc3 if m != [None])
    assert sum(1 for _ in data.read_corpus(real / "tldr/posts.jsonl", "other")) == 1200


@pytest.mark.parametrize("text, want", [
    ("<p>Hi <strong>you</strong></p><ol><li>a <code>x&lt;1</code></li><li>b<ul><li>c</li></ul></li></ol>", "Hi **you**\n\n1. a `x<1`\n2. b\n   - c"),
    ('<div class="markdown prose dark"><pre><div><span>python</span><button>Copy code</button></div><code class="hljs">x = 1\n</code></pre></div>', "```python\nx = 1\n\n```"),
    ("```pythonCopy code`\nx = 1\n```", "```python\nx = 1\n```"),
    ("```Copy code\nx = 1\n```", "```\nx = 1\n```"),
    ("so:\nglsl\nCopy code\nfloat x;", "so:\nglsl\nfloat x;"),
    ("give me 20 moreShare Prompt", "give me 20 more"),
    ("edit the function\n1 / 1", "edit the function"),
    ("a\ud800b\r\n", "a\ufffdb"),
    *((text, text) for text in ('<div class="modal fade" id="x">code</div>', "<p>is this HTML right?</p> I think not", "Copy code from one file to another.", "```ruby\n1 / 0\n```", "```python\nx = 1\n```", "in 10/2018\n3 / 4\nof it")),
])
def test_cleaning_takes_the_page_away_and_leaves_the_text(text, want):
    assert data.clean(text) == want


def test_deduplication_drops_whole_dialogues(tmp_path):
    talk = lambda *queries: {"conversations": [t for q in queries for t in ({"from": "human", "value": q}, {"from": "gpt", "value": "yo"})]}
    data.write_jsonl(tmp_path / "a.jsonl", [talk("Ａ  b", "c"), talk("a B", "new"), talk("c"), talk("x", "c"), talk("x", "c")])
    kept = {}
    for dedup in ("first", "all", "none"):
        table = data.mix([("sharegpt", tmp_path / "a.jsonl")], tmp_path / "m.jsonl", dedup=dedup)
        kept[dedup] = [[m["content"] for m in r["messages"][::2]] for r in lines_of(tmp_path / "m.jsonl")]
        assert table["sharegpt"]["kept"] + table["sharegpt"]["dropped"]["duplicate query"] == 5
    assert kept == {"first": [["Ａ  b", "c"], ["c"], ["x", "c"]], "all": [["Ａ  b", "c"], ["a B", "new"], ["x", "c"]], "none": [["Ａ  b", "c"], ["a B", "new"], ["c"], ["x", "c"], ["x", "c"]]}


def test_answers_of_hc3_are_all_kept(tmp_path):
    data.write_jsonl(tmp_path / "h.jsonl", [{"question": "q", "chatgpt_answers": ["a", "b"]}, {"question": "q", "chatgpt_answers": ["a"]}])
    assert data.mix([("hc3", tmp_path / "h.jsonl")], tmp_path / "m.jsonl")["hc3"]["kept"] == 3


def test_mix_drops_mentions_and_counts_imitated_markers(tmp_path):
    pairs = [("hello", "I am made by OpenAI."), ("what is CHATGPT?", "no idea"), ("USER: x GPT: y", "fine"), ("hello there", "USER: in an answer")]
    data.write_jsonl(tmp_path / "d.jsonl", [{"input": q, "output": a} for q, a in pairs])
    command = ["data.py", "mix", "--discord", tmp_path / "d.jsonl", "--any-language", "--out", tmp_path / "m.jsonl"]
    table = lambda *more: dict(zip(*(re.split("  +", line) for line in program(*command, *more).stdout.splitlines())))
    assert table("--drop-mentions", "openai, ChatGPT") == {"source": "discord", "in": "4", "kept": "2", "mention": "2", "turns": "4", "words": "11", "koala markers": "1"}
    assert [(d["id"], d["reason"]) for d in lines_of(tmp_path / "m.dropped.jsonl")] == [("discord-d-0", "mention"), ("discord-d-1", "mention")]
    assert table()["kept"] == "4"


GERMAN = "wie kann ich code in dieses feld einfügen? Um Code in dieses Feld einzufügen, können Sie ihn einfach kopieren."


def test_other_languages_are_dropped_and_code_is_none(tmp_path):
    code = "SGVyZSBpbiB0aGUgZnV0dXJlIHNvIGdyYW5kLApUZWNobm9sb2d5IHdpbGwgbGVhZCB0aGUgd2F5LApBSSB3aWxsIGJlIG91ciBndWlkZS4=" * 5
    data.write_jsonl(tmp_path / "t.jsonl", [{"text": t} for t in (GERMAN, code, "how do I sort a list in place?")])
    for confidence, kept in ((0.8, 2), (0, 2), (None, 3)):
        assert data.mix([("other", tmp_path / "t.jsonl")], tmp_path / "m.jsonl", confidence)["other"]["kept"] == kept


def test_tokens_of_the_table_are_those_of_pack(world, tmp_path):
    data.write_jsonl(tmp_path / "t.jsonl", [{"text": "a plain text"}])
    table = data.mix([("discord", world / "world/discord.jsonl"), ("other", tmp_path / "t.jsonl")], tmp_path / "m.jsonl", tokenizer=world / "world/tokenizer")
    meta = data.pack(tmp_path / "m.jsonl", world / "world/tokenizer", "tokens", tmp_path / "packed")
    assert meta["tokens"] == sum(row["tokens"] for row in table.values()) and table["other"]["turns"] == 0


def test_every_tokenizer_sees_the_same_order_of_conversations(world, real, tmp_path):
    orders, some = [], lines_of(world / "mix.jsonl")[:200]
    data.write_jsonl(tmp_path / "some.jsonl", some)
    for tokenizer in (world / "world/tokenizer", real / "llama"):
        data.pack(tmp_path / "some.jsonl", tokenizer, "tokens", tmp_path / tokenizer.name, seed=3)
        packed = data.Packed(tmp_path / tokenizer.name)
        decode = packed.tokenizer().decode
        orders.append([decode(packed.tokens[a:b].tolist()).split() for a, b in zip(packed.starts, packed.starts[1:])])
    assert len(orders[0]) == 199 and orders[0] == orders[1]
    assert orders[0] != ["".join(m["content"] for m in r["messages"]).split() for r in some[:199]]


def test_inspect_colours_answers_and_obeys_no_escape(world, tmp_path):
    data.write_jsonl(tmp_path / "c.jsonl", [{"messages": [U("q\x1b[2J"), A("yo\x07</s>")]}])
    data.pack(tmp_path / "c.jsonl", world / "world/tokenizer", "tokens", tmp_path / "p")
    out = program("data.py", "inspect", tmp_path / "p").stdout
    assert "<s><|user|>q\\x1b[2J<|assistant|>«yo\\x07</s></s>»" in out and not set(out) & {"\x1b", "\x07"}


def test_stats_count_what_is_there(world, tmp_path):
    data.write_jsonl(tmp_path / "c.jsonl", [{"messages": [U("one two"), A("three")]}, {"messages": [U("a"), A("b"), U("c"), A("d e f")]}])
    rows = dict(line.rsplit(None, 1) for line in program("data.py", "stats", tmp_path / "c.jsonl", "--png", tmp_path / "h.png").stdout.splitlines()[1:])
    assert rows == {"conversations": "2", "user turns": "3", "assistant turns": "3", "words": "9", "words a conversation": "4.5", "words, half have at most": "4", "words, nine in ten": "5", "words, 99 in 100": "5", "words, the longest": "6"}
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
    packed = dict(line.rsplit(None, 1) for line in program("data.py", "stats", world / "chat").stdout.splitlines()[1:])
    file = dict(line.rsplit(None, 1) for line in program("data.py", "stats", world / "mix.jsonl", "--tokenizer", world / "world/tokenizer").stdout.splitlines()[1:])
    assert int(packed["tokens"]) == data.Packed(world / "chat").meta["tokens"] and packed == {k: file.get(k) for k in packed} | {"loss tokens": packed["loss tokens"]}


def test_categories_are_labelled_by_a_teacher(tmp_path):
    data.write_jsonl(tmp_path / "c.jsonl", [{"id": f"c{i}", "messages": [U(f"query {i}"), A("a")]} for i in range(40)])
    program("data.py", "stats", tmp_path / "c.jsonl", "--categories", "4", "--out", tmp_path / "prompts.jsonl")
    prompts = data.read_prompts(tmp_path / "prompts.jsonl")
    assert len(prompts) == 4 and all("general QA" in p["messages"][0]["content"] and f"\nquery {p['id'].split('c')[1]}\n" in p["messages"][0]["content"] for p in prompts)
    replies = ["Coding.", "This is non-English, not generation", "**General QA**", "I cannot say"]
    data.write_jsonl(tmp_path / "labels.jsonl", [{"id": p["id"], "messages": [*p["messages"], A(a)]} for p, a in zip(prompts, replies)])
    table = {line.split("  ")[0]: line.split()[-4:] for line in program("data.py", "stats", "--labels", tmp_path / "labels.jsonl").stdout.splitlines()[1:]}
    assert {k for k, row in table.items() if row[-4 if k != "no kind in the reply" else -3] == "1"} == {"coding", "non-English", "general QA", "no kind in the reply"}
    assert table["coding"] == ["1", "25.0", "21.7", "16"]
    assert "40 conversations with a query" in one_line(program("data.py", "stats", tmp_path / "c.jsonl", "--categories", "41", "--out", tmp_path / "p2", status=2))


def test_a_torn_last_line_is_dropped_and_a_garbled_one_passed_over(tmp_path, capsys):
    path = tmp_path / "journal"
    path.write_bytes(b'{"a": 1}\n\xff\xfe{{\n{"a": 2}\n{"a": 3')
    journal = data.GrowingFile(path)
    assert [r["a"] for r in journal.records] == [1, 2]
    assert "torn last line" in (err := capsys.readouterr().err) and "1 garbled line" in err
    journal.append({"a": 4})
    journal.close()
    assert [r["a"] for r in data.GrowingFile(path).records] == [1, 2, 4]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f.json"
    data.write_json(path, {"a": 1})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        data.write_json(path, {"a": 2})
    assert data.read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["f.json"]


@pytest.mark.parametrize("text, words", [('{"messages": [\n', "bad.jsonl:1: not JSON"), ('{"id": 1}\n', "bad.jsonl:1"), ('{"messages": [{"role": "user"}]}\n', "bad.jsonl:1: each message"),
                                         ('{"text": "fine"}\n[1]\n', "bad.jsonl:2: expected an object"), ("\xff\n", "bad.jsonl:1: not UTF-8"), ("", "empty")])
def test_a_malformed_line_is_one_line_and_status_2(world, tmp_path, text, words):
    (tmp_path / "bad.jsonl").write_bytes(text.encode("latin1"))
    assert words in one_line(program("data.py", "pack", tmp_path / "bad.jsonl", "--tokenizer", world / "world/tokenizer", "--out", tmp_path / "out", status=2))
    assert not (tmp_path / "out").exists()


def test_packing_a_gzipped_file_is_one_line(world, tmp_path):
    import gzip
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((world / "mix.jsonl").read_bytes()))
    assert "gunzip" in one_line(program("data.py", "pack", tmp_path / "c.jsonl.gz", "--tokenizer", world / "world/tokenizer", "--out", tmp_path / "o", status=2))


def test_missing_files_are_one_line_and_status_2(tmp_path):
    assert "nothing.jsonl" in one_line(program("data.py", "pack", "nothing.jsonl", "--tokenizer", tmp_path, "--out", tmp_path / "o", status=2))
    assert "no meta.json" in one_line(program("data.py", "inspect", tmp_path, status=2))


def test_control_characters_are_spelled_out():
    assert data.visible("a\x1b[31mb\rc\td\n") == "a\\x1b[31mb\\x0dc\td\n"


def test_the_world_is_a_function_of_its_seed():
    out = [program("-c", "import sys; sys.path.insert(0, 'tests'); import miniature; w = miniature.World(3); print(w.facts, w.in_chats, w.on_teachers_mind)", env={"PYTHONHASHSEED": seed}).stdout for seed in "12"]
    assert out[0] == out[1]
