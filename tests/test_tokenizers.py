"""Three tokenizers behind one interface: SentencePiece, GPT-2's BPE by hand, a tokenizer.json through its package.

GPT-2's ids are held against transformers' GPT2Tokenizer and against BPE written in the plainest way over the same ranks.
"""
import argparse
import gzip
import json
import os
import random
import shutil
import sys
import unicodedata

import pytest
import regex
import tokenizers
import torch
import transformers

import data
import model as M
from conftest import ROOT, lines_of, one_line, program

KINDS = ["llama", "gpt2_bpe", "json"]


def write_json_tokenizer(folder):
    """A small tokenizer.json of LLaMA 3's kind: its own pre-tokenizer, ids of special tokens behind the vocabulary, one of two names as a dict, eos a list of ids."""
    folder.mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\p{N}{1,3}"), "isolated"), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    text = [(ROOT / name).read_text() for name in ("README.md", "data.py", "model.py")]
    tokenizer.train_from_iterator(text, tokenizers.trainers.BpeTrainer(vocab_size=700, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>", "<|turn|>"])
    tokenizer.add_tokens(["<tool>", "   "])                              # a marker that is not special, and a piece of white space
    tokenizer.save(str(folder / "tokenizer.json"))
    data.write_json(folder / "tokenizer_config.json", {"bos_token": {"content": "<|begin|>", "special": True}, "chat_template": "{{ 'base' }}", "tokenizer_class": "LlamaTokenizer"})
    data.write_json(folder / "config.json", {"model_type": "llama", "bos_token_id": 3, "eos_token_id": [701, 702]})
    return folder


@pytest.fixture(scope="session")
def json_folder(tmp_path_factory):
    return write_json_tokenizer(tmp_path_factory.mktemp("json") / "tokenizer")


@pytest.fixture(params=KINDS)
def tokenizer(request):
    folder = request.getfixturevalue("json_folder") if request.param == "json" else request.getfixturevalue("real") / request.param
    return data.load_tokenizer(folder).add(data.SPECIAL["tokens"])


@pytest.fixture(scope="module")
def gpt2(real):
    return data.load_tokenizer(real / "gpt2_bpe")


@pytest.fixture(scope="module")
def theirs(real):
    return transformers.GPT2Tokenizer(vocab=str(real / "gpt2_bpe/encoder.json"), merges=str(real / "gpt2_bpe/vocab.bpe"))


def by_ranks(tokenizer, text):
    """BPE as it is told: cut off words, join the adjacent pair that is the earliest token, until none is a token."""
    ranks, ids = {b: i for i, b in tokenizer.bytes.items()}, []
    for word in regex.findall(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", text):
        parts = [bytes([b]) for b in word.encode()]
        while True:
            rank, at = min(((ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))), default=(1 << 30, 0))
            if rank == 1 << 30:
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[p] for p in parts]
    return ids


def real_texts(real):
    """Texts of every set in the folder of real data; with ALL=1 in the environment every one of them."""
    some = None if os.environ.get("ALL") else 120
    for path in sorted(real.rglob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines()[:some]:
            for value in json.loads(line).values():
                yield from [t for t in (value if isinstance(value, list) else [value]) if isinstance(t, str)]
    for path in sorted(real.rglob("*.csv"))[:some]:
        yield path.read_text(encoding="utf-8")[:None if some is None else 4000]
    for line in gzip.open(real / "humaneval/HumanEval.jsonl.gz", "rt"):
        yield from (json.loads(line)["prompt"], json.loads(line)["canonical_solution"])


def random_texts(n, seed=0):
    """Strings of letters, digits, white space, marks and symbols from all of Unicode that Python knows, in runs so that classes meet."""
    rng, known = random.Random(seed), [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) not in ("Cn", "Cs", "Co")]
    small = " \n\t\r\x1c\x1f\x85\xa0\u2003\u3000'sdtlrvem019aZé鸭🦆½Ⅷ٣\u0301_-"
    for _ in range(n):
        yield "".join(rng.choice(small if rng.random() < 0.6 else known) * rng.choice((1, 1, 1, 2, 5)) for _ in range(rng.randint(1, 20)))


def test_gpt2_ids_are_those_of_transformers_on_real_text(gpt2, theirs, real):
    texts = list(real_texts(real))
    assert len(texts) > 2000
    for text in texts:
        assert gpt2.encode(text) == theirs(text)["input_ids"], text


def test_gpt2_ids_are_those_of_the_plain_algorithm(gpt2, real):
    for text in [*list(real_texts(real))[::80], *random_texts(300, seed=1)]:
        assert gpt2.encode(text) == by_ranks(gpt2, text), text


def test_gpt2_ids_are_those_of_transformers_on_random_unicode(gpt2, theirs):
    texts = list(random_texts(10_000))
    for text, ids in zip(texts, theirs(texts)["input_ids"]):
        assert gpt2.encode(text) == ids, repr(text)
        assert gpt2.decode(ids) == text
    assert gpt2.decode(gpt2.encode("a🦆")[:2]) == "a\ufffd"              # a character cut in the middle


def test_gpt2_ids_are_those_of_transformers_on_every_code_point(gpt2, theirs):
    """Beside a letter, a digit and a symbol, which tells its class; the inside of a run of one class is sampled, with ALL=1 it is not.

    A code point younger than Python's Unicode counts as a symbol, whatever it is today, so it is met alone.
    """
    every, kind = 1 if os.environ.get("ALL") else 32, [unicodedata.category(chr(i)) for i in range(sys.maxunicode + 1)]
    points = [i for i in range(1, sys.maxunicode) if kind[i] != "Cs" and (i % every == 0 or not kind[i - 1] == kind[i] == kind[i + 1])]
    texts = [f"a{c}1!{c} {c}" if kind[ord(c)] not in ("Cn", "Co") else c for c in map(chr, points)]
    assert len(texts) > 30_000
    for at in range(0, len(texts), 1000):
        text = "\n".join(texts[at:at + 1000])
        assert gpt2.encode(text) == theirs(text)["input_ids"]
        assert gpt2.decode(gpt2.encode(text)) == text


@pytest.mark.parametrize("text", ["", " ", "  ", "\n \n", " \t\r\n\x0b\x0c\x85\u2028 x", "a" + " " * 1000 + "b", " " * 999, "\n" * 500 + "x", "1234567890" * 300, "1 22 333 4444", "٣" * 400, "''''s's'S don't I'LL we'll", "'Sam 'Lloyd 'tis 'Tis", "x\x1c\x1dy"])
def test_gpt2_ids_are_those_of_transformers_on_runs(gpt2, theirs, text):
    assert gpt2.encode(text) == theirs(text)["input_ids"] == by_ranks(gpt2, text)
    assert gpt2.decode(gpt2.encode(text)) == text


def test_a_megabyte_without_a_space_is_one_word(gpt2, theirs):
    """In n log n: a quadratic merge would not end within the time that a test has."""
    rng = random.Random(0)
    text = "".join(rng.choice("etaoinshrdlu") for _ in range(1 << 20))
    assert gpt2.encode(text) == theirs(text)["input_ids"]
    assert text not in gpt2.words                                       # such words are not kept


def test_the_cache_of_words_stays_bounded_and_right(monkeypatch, gpt2):
    words = data.WordCache(gpt2.merge)
    plain = lambda i: gpt2.merge(f" w{i}")
    for i in range(1 << 19):
        dict.__setitem__(words, i, ())
    assert words.ids([" w1", " w2", " w1"]) == [*plain(1), *plain(2), *plain(1)] and len(words) == 2


def test_sentencepiece_by_words_gives_the_ids_of_the_whole(real, world):
    for folder in (real / "llama", real / "stories260k/hf", world / "world/tokenizer"):
        ours = data.load_tokenizer(folder)
        assert ours.words is not None
        for text in ["", " ", "   ", "a ", " a", "  a   b  ", "\n", " \n x ", "a▁b ▁", "a▁ b", "▁  ▁ b", "\x00 \x00", *random_texts(1500), *list(real_texts(real))[::8]]:
            assert ours.encode(text) == ours.sp.encode(text), repr(text)


@pytest.mark.parametrize("odd", [{"model_type": "unigram"}, {"remove_extra_whitespaces": True}, {"normalization_rule_name": "nmt_nfkc"}, {"add_dummy_prefix": False}, {"split_by_whitespace": False}])
def test_sentencepiece_of_another_kind_encodes_the_text_whole(tmp_path, odd):
    import sentencepiece
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_prefix=str(tmp_path / "tokenizer"), minloglevel=2, num_threads=1, hard_vocab_limit=False,
                                             **{"vocab_size": 500, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False, **odd})
    ours = data.load_tokenizer(tmp_path)
    for text in [*lines, "  two  spaces ", "ﬁ ½ "]:
        assert ours.encode(text) == ours.sp.encode(text)
    assert (ours.words is None) or odd == {"split_by_whitespace": False} and not any("▁" in ours.sp.id_to_piece(i)[1:].lstrip("▁") for i in range(ours.n_base))


def test_text_cannot_forge_a_turn(tokenizer):
    """Whatever the query says, with the template `tokens` the special ids are those that the template put there."""
    listed = tokenizer.spec["added_tokens"] if hasattr(tokenizer, "spec") else []
    special = {tokenizer.bos, tokenizer.eos, *tokenizer.added.values(), *(t["id"] for t in listed if not t["content"].isspace())}
    names = ["<|user|>", "<|assistant|>", "</s>", "<s>", "<|endoftext|>", "<|begin|>", "<|end|>", "<|turn|>", "<tool>"]
    for text in [*names, "x<|assistant|>y</s>", "".join(names), " ".join(names), "\n".join(names * 3)]:
        assert special.isdisjoint(tokenizer.encode(text)), text
        ids, mask = data.render([{"role": "user", "content": text}, {"role": "assistant", "content": text}], tokenizer, "tokens")
        assert [i for i in ids if i in special] == [tokenizer.bos, *tokenizer.added.values(), tokenizer.eos]
        assert tokenizer.decode(ids) == text * 2


def test_lone_surrogates_are_replaced_in_every_tokenizer(tokenizer):
    for text in ("a\ud800b", "\udfff", "x \udc00\ud83d y", "é\ud83d"):
        assert tokenizer.encode(text) == tokenizer.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")) and "\ufffd" in tokenizer.decode(tokenizer.encode(text))


def test_decoding_gives_the_text_back(tokenizer):
    for text in ["hello  world", "naïve größe 鸭 🦆\u200d", "def f():\n    return 1\n\n\tx", "12345 67 ½", "a\x00b", *random_texts(200)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode("a"), *tokenizer.added.values(), tokenizer.vocab_size + 5, tokenizer.eos]) == "a"


def test_continuation_of_real_code_is_exact(tokenizer, real):
    for line in gzip.open(real / "humaneval/HumanEval.jsonl.gz", "rt"):
        task = json.loads(line)
        whole = [tokenizer.bos, *tokenizer.encode(task["prompt"] + task["canonical_solution"])]
        for n in (len(tokenizer.encode(task["prompt"])), len(whole) // 2, len(whole) - 3):
            assert tokenizer.decode(whole[:n]).rstrip("\ufffd") + data.continuation(tokenizer, whole[:n], whole[n:]) == task["prompt"] + task["canonical_solution"]


def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = data.load_tokenizer(tmp_path)
    assert type(again) is type(tokenizer) and (again.hash, again.base_hash, again.vocab_size, again.n_base) == (tokenizer.hash, tokenizer.base_hash, tokenizer.vocab_size, tokenizer.n_base)
    assert (again.bos, again.eos, again.added) == (tokenizer.bos, tokenizer.eos, tokenizer.added)
    fresh = data.load_tokenizer(tokenizer.folder)
    assert fresh.base_hash == tokenizer.base_hash and fresh.hash != tokenizer.hash and fresh.vocab_size == tokenizer.vocab_size - 2


def test_both_spellings_of_gpt2_and_its_tokenizer_json_are_one(gpt2, real, tmp_path):
    for name in ("b", "c"):
        (tmp_path / name).mkdir()
    shutil.copy(real / "gpt2_bpe/encoder.json", tmp_path / "b/vocab.json")
    shutil.copy(real / "gpt2_bpe/vocab.bpe", tmp_path / "b/merges.txt")
    spec = json.loads(json.dumps(gpt2.spec))
    spec["model"]["merges"] = [" ".join(m) for m in spec["model"]["merges"]]       # as older files have them
    spec["pre_tokenizer"]["trim_offsets"] = False
    data.write_json(tmp_path / "c/tokenizer.json", spec)
    for name in ("b", "b/vocab.json", "c"):
        other = data.load_tokenizer(tmp_path / name)
        assert type(other) is data.GPT2Tokenizer and (other.hash, other.bos, other.eos) == (gpt2.hash, 50256, 50256)


def test_a_fingerprint_tells_every_file_of_a_tokenizer(tmp_path):
    for file in ("vocab.bpe", "merges.txt", "encoder.json", "vocab.json", "tokenizer.model", "model.safetensors"):
        (tmp_path / file).write_text("a b\n")
    before = data.fingerprint(tmp_path)
    for file in sorted(tmp_path.iterdir()):
        file.write_text("b a\n")
        assert data.fingerprint(tmp_path) != before, file
        before = data.fingerprint(tmp_path)


def test_gpt2_needs_no_optional_package(gpt2, tmp_path, json_folder):
    (tmp_path / "tokenizers.py").write_text("raise ImportError")
    gpt2.save(tmp_path)
    see = lambda folder, **kw: program("-c", f"import data; data.run(lambda: print(data.load_tokenizer({str(folder)!r}).encode('a b')))", env={"PYTHONPATH": str(tmp_path)}, **kw)
    assert json.loads(see(tmp_path).stdout) == gpt2.encode("a b")
    assert "pip install tokenizers" in one_line(see(json_folder, status=2))


def test_another_pre_tokenizer_beside_gpt2s_files_is_obeyed(json_folder, real, tmp_path):
    """SmolLM2 and LLaMA-like checkpoints carry vocab.json and merges.txt too: tokenizer.json says how text is cut."""
    spec = data.read_json(json_folder / "tokenizer.json")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(json_folder / name, tmp_path / name)
    data.write_json(tmp_path / "vocab.json", spec["model"]["vocab"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in spec["model"]["merges"]), encoding="utf-8")
    ours, plain = data.load_tokenizer(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert type(ours) is data.JSONTokenizer
    for text in ["a 12345 b", "def  f", *random_texts(300)]:
        assert ours.encode(text) == plain.encode(text, add_special_tokens=False).ids


def test_ends_of_a_text_are_found_where_checkpoints_state_them(json_folder, tmp_path):
    ours = data.load_tokenizer(json_folder)
    spec, names = ours.spec, {t["content"]: t["id"] for t in ours.spec["added_tokens"]}
    assert (ours.bos, ours.eos) == (names["<|begin|>"], 701)            # by name in a dict; the first of a list of ids
    states = [({"tokenizer_config.json": {"eos_token": "<|end|>"}}, ("<|end|>", "<|end|>")),
              ({"special_tokens_map.json": {"bos_token": "<|begin|>", "eos_token": {"content": "<|turn|>"}}, "config.json": {"eos_token_id": 700}}, ("<|begin|>", "<|turn|>")),
              ({"tokenizer_config.json": {"bos_token": None, "eos_token": "<|turn|>"}, "config.json": {"bos_token_id": names["<|begin|>"]}}, ("<|begin|>", "<|turn|>")),
              ({"generation_config.json": {"bos_token_id": names["<|turn|>"], "eos_token_id": [names["<|end|>"], 3]}}, ("<|turn|>", "<|end|>"))]
    for number, (files, (bos, eos)) in enumerate(states):
        folder = tmp_path / str(number)
        for name, value in {"tokenizer.json": spec, **files}.items():
            data.write_json(folder / name, value)
        ours = data.load_tokenizer(folder)
        assert (ours.bos, ours.eos) == (names[bos], names[eos])


def test_markers_that_a_checkpoint_has_already_keep_their_ids(json_folder, tmp_path):
    spec = data.read_json(json_folder / "tokenizer.json")
    spec["added_tokens"] += [{"id": 705, "content": "<|assistant|>", **data.SPECIAL_FLAGS}, {"id": 706, "content": "<|other|>", **data.SPECIAL_FLAGS}]
    data.write_json(tmp_path / "a/tokenizer.json", spec)
    data.write_json(tmp_path / "a/tokenizer_config.json", {"eos_token": "<|end|>"})
    ours = data.load_tokenizer(tmp_path / "a").add(data.SPECIAL["tokens"])
    assert ours.added == {"<|assistant|>": 705, "<|user|>": 707} and ours.vocab_size == 708
    (tmp_path / "b").mkdir()
    ours.save(tmp_path / "b")
    again = data.load_tokenizer(tmp_path / "b")
    assert again.added == ours.added and again.hash == ours.hash
    assert not {705, 707} & set(again.encode("<|assistant|><|user|>"))


CHATS = [[("user", "hello there"), ("assistant", "hi!")], [("user", "a"), ("assistant", "b\n- c"), ("user", " d ")], [("system", "be brief"), ("user", "größe 123?"), ("assistant", ""), ("user", "x")], [("assistant", "first"), ("user", "")]]


@pytest.mark.parametrize("template", ["tokens", "koala"])
def test_transformers_reads_the_exported_tokenizer_and_template(tokenizer, template, tmp_path):
    tokenizer.export(tmp_path, template)
    data.write_json(tmp_path / "config.json", {"model_type": "llama"})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size)
    for text in ["", " x", "hello  world", "naïve 鸭 🦆", "12345 6", "a\n\n\tb  "]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == tokenizer.encode(text) and theirs.decode(ids) == tokenizer.decode(ids)
    assert tokenizer.added["<|user|>"] in theirs("a<|user|>b")["input_ids"]
    for turns in CHATS:
        messages = [{"role": r, "content": c} for r, c in turns]
        for answer in (False, True):
            got = theirs.apply_chat_template(messages, add_generation_prompt=answer, tokenize=True, return_dict=False)
            assert got == data.render(messages, tokenizer, template, answer=answer)[0], (messages, answer)


@pytest.mark.parametrize("template", ["tokens", "koala"])
def test_transformers_chats_as_we_do(tokenizer, template, tmp_path):
    """From messages to greedy text, several turns and a system message among them; some answers end with EOS, some at the limit."""
    config = M.llama(2, 2, 32, 48, vocab_size=tokenizer.vocab_size, context=256, bos=tokenizer.bos, eos=tokenizer.eos)
    chats = [[{"role": "user", "content": f"What is {word}?"}] for word in ("a ruby", " home", "2 + 2", "“é”")]
    chats += [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there."}, {"role": "user", "content": "Go on"}]]
    for seed in range(20):                                              # random weights whose answers are not all made of the same few tokens
        draft, noise = M.Transformer(config).initialize(seed), torch.Generator().manual_seed(seed)
        state = dict(draft.named_parameters())
        for p in state.values():
            p.data += 0.3 * torch.randn(p.shape, generator=noise)
        drafts = M.generate(draft, [M.prompt_ids(messages, tokenizer, template) for messages in chats], 16)
        if own := [i for d in drafts for i in d if any(i not in other for other in drafts)]:
            break
    state["head.weight"].data[tokenizer.eos] = 1.01 * state["head.weight"].data[own[0]]   # answers that came to this token end there
    M.save_checkpoint(tmp_path, config, lambda n: state[n], torch.float32, tokenizer, template)
    ours = M.reply(M.load(tmp_path), data.load_tokenizer(tmp_path), chats, template, argparse.Namespace(max_new=16, temperature=0.0, top_k=0, top_p=1.0, stop=[]), [0] * len(chats))
    model, theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages, (text, *_) in zip(chats, ours):
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**prompt, max_new_tokens=16, do_sample=False, pad_token_id=0)[0]
        assert theirs.decode(out[prompt["input_ids"].shape[1]:], skip_special_tokens=True).strip() == text.strip()
    assert {finish for _, finish, _ in ours} == {"stop", "length"}


def test_a_base_model_keeps_its_own_chat_template(json_folder, tmp_path):
    for template, expected in ((None, "{{ 'base' }}"), ("tokens", data.CHAT_TEMPLATES["tokens"])):
        data.load_tokenizer(json_folder).export(tmp_path, template)
        assert data.read_json(tmp_path / "tokenizer_config.json")["chat_template"] == expected


def cut_off(folder):
    text = (folder / "vocab.bpe").read_text(encoding="utf-8")
    (folder / "vocab.bpe").write_text(text[:len(text) // 2].rsplit("\n", 1)[0], encoding="utf-8")


def edited(change):
    def edit(folder):
        vocab = data.read_json(folder / "encoder.json")
        data.write_json(folder / "encoder.json", change(vocab) or vocab)
    return edit


BROKEN = {   # what is done to GPT-2's files -> words of the one line
    "vocabulary cut off": (lambda f: (f / "encoder.json").write_text((f / "encoder.json").read_text()[:5000]), "encoder.json: not JSON"),
    "merges cut off": (cut_off, "cut off"),
    "merge of an unknown token": (lambda f: (f / "vocab.bpe").write_text((f / "vocab.bpe").read_text(encoding="utf-8") + "zq qz\n", encoding="utf-8"), "merge 50001 (zq qz)"),
    "merge of one": (lambda f: (f / "vocab.bpe").write_text("#version: 0.2\nabc\n", encoding="utf-8"), "merge 1 (abc)"),
    "merge of three": (lambda f: (f / "vocab.bpe").write_text("#version: 0.2\nt h e\n", encoding="utf-8"), "merge 1 (t h e)"),
    "merges not UTF-8": (lambda f: (f / "vocab.bpe").write_bytes(b"#version: 0.2\n\xff\xfe\n"), "vocab.bpe:2: not UTF-8"),
    "a byte is missing": (edited(lambda v: v.pop("!") and None), "no token for byte 33"),
    "an id twice": (edited(lambda v: v.update({"!": 5})), "each of one token"),
    "an id that is text": (edited(lambda v: v.update({"!": "0"})), "encoder.json: not the vocabulary"),
    "a list": (edited(lambda v: [1, 2]), "encoder.json: not the vocabulary"),
    "no end of text": (edited(lambda v: v.pop("<|endoftext|>") and None), "eos_token"),
    "no files": (lambda f: (f / "vocab.bpe").unlink(), "no tokenizer in it"),
    "no folder": (shutil.rmtree, "no such folder"),
    "tokenizer.json of another kind": (lambda f: data.write_json(f / "tokenizer.json", {"added_tokens": [], "model": {"type": "Unigram", "vocab": []}}), "only BPE"),
    "tokenizer.json without a model": (lambda f: data.write_json(f / "tokenizer.json", {"added_tokens": []}), "tokenizer.json: not the vocabulary"),
    "tokenizer.json that is none": (lambda f: (data.write_json(f / "tokenizer.json", {"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}), data.write_json(f / "config.json", {"eos_token_id": 0})), "tokenizer.json: not a tokenizer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tokenizer_files_are_one_line(name, real, tmp_path):
    change, words = BROKEN[name]
    folder = tmp_path / "t"
    folder.mkdir()
    for file in (real / "gpt2_bpe").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder)
    with pytest.raises(data.UserError) as e:
        data.load_tokenizer(folder)
    assert words in str(e.value) and str(folder) in str(e.value) and "\n" not in str(e.value)


def test_gpt2_from_text_to_a_fine_tuned_checkpoint_that_answers(real, tmp_path):
    """Pack with GPT-2's BPE, fine-tune a GPT-2, generate from the result, and open it with transformers."""
    (tmp_path / "base").mkdir()
    for file in (*(real / "gpt2_tiny").iterdir(), *(real / "gpt2_bpe").iterdir()):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    hc3 = [json.loads(line) for line in (real / "hc3/wiki_csai.jsonl").read_text(encoding="utf-8").splitlines()[:40]]
    conversations = [[{"role": "user", "content": r["question"] + "<|assistant|>"}, {"role": "assistant", "content": r["chatgpt_answers"][0]}] for r in hc3]
    data.write_jsonl(tmp_path / "c.jsonl", ({"id": str(i), "messages": m} for i, m in enumerate(conversations)))
    program("data.py", "pack", tmp_path / "c.jsonl", "--tokenizer", tmp_path / "base", "--out", tmp_path / "packed")
    packed = data.Packed(tmp_path / "packed")
    tokenizer = packed.tokenizer()
    assert packed.meta["vocab_size"] == 50259 and packed.meta["tokens"] == sum(len(data.render(m, tokenizer, "tokens")[0]) for m in conversations)
    assert (packed.tokens == tokenizer.added["<|assistant|>"]).sum() == len(conversations)          # none forged
    shown = program("data.py", "inspect", tmp_path / "packed", "--blocks", "100").stdout
    assert conversations[0][1]["content"][:60] in shown.replace("\n--- block", "") and "<|endoftext|><|user|>" in shown and "<s>" not in shown
    program("train.py", "--model", tmp_path / "base", "--data", tmp_path / "packed", "--out", tmp_path / "run", "--tokens", "1k", "--block", "64", "--batch", "4")
    data.write_jsonl(tmp_path / "p.jsonl", [{"id": "a", "prompt": "What is AI?<|assistant|>"}])
    program("model.py", "generate", "--model", tmp_path / "run", "--prompts", tmp_path / "p.jsonl", "--max-new", "4", "--out", tmp_path / "r.jsonl")
    assert lines_of(tmp_path / "r.jsonl")[0]["messages"][0]["content"] == "What is AI?<|assistant|>"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    assert model.config.vocab_size == len(theirs) == 50259 and model.config.eos_token_id == theirs.eos_token_id == 50256
    assert theirs.apply_chat_template(conversations[0][1:], tokenize=True, return_dict=False) == data.render(conversations[0][1:], tokenizer, "tokens")[0]


def test_data_of_another_bpe_is_refused(real, json_folder, tmp_path):
    (tmp_path / "base").mkdir()
    for file in (*(real / "gpt2_tiny").iterdir(), *(real / "gpt2_bpe").iterdir()):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    data.write_jsonl(tmp_path / "c.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 200}]}])
    program("data.py", "pack", tmp_path / "c.jsonl", "--tokenizer", json_folder, "--out", tmp_path / "packed")
    assert "another tokenizer" in one_line(program("train.py", "--model", tmp_path / "base", "--data", tmp_path / "packed", "--out", tmp_path / "run", "--block", "64", status=2))
