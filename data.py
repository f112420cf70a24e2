"""Data: tokenizers, conversations and their loss mask, the corpora, cleaning, packing (paper §3.1, §4.1, appendix A).

    python data.py mix --sharegpt sharegpt.json --hc3 hc3.jsonl --discord discord.jsonl --out sharegpt-mix.jsonl
    python data.py pack sharegpt-mix.jsonl --tokenizer weights/llama7b --template tokens --out data/sharegpt-mix/llama7b
    python data.py inspect data/sharegpt-mix/llama7b

In this file, in the order in which text becomes training data:
    errors, files, command lines     one-line errors, atomic writes, JSON lines (shared by every program)
    tokenizers                       text <-> ids: SentencePiece, GPT-2's BPE by hand, any tokenizer.json; special tokens are never parsed out of text
    conversations -> ids             the two templates and the loss mask
    corpora                          ShareGPT, HC3, Discord, Alpaca, messages, plain text
    mix                              cleaning, deduplication, language filter, and who was dropped why
    pack                             one memory-mapped stream of tokens; blocks; inspect
"""
import argparse
import contextlib
import csv
import errno
import fcntl
import functools
import hashlib
import heapq
import html
import html.parser
import itertools
import json
import mmap
import multiprocessing
import os
import re
import shutil
import signal
import sys
import traceback
import unicodedata
from pathlib import Path

import numpy as np


# --- errors, files, command lines ---------------------------------------------------------------------------------------

class UserError(Exception):
    """A mistake that the user can mend; `run` prints each argument as one line and exits with `status`."""
    status = 2


class Failure(UserError):
    """A failure that is not the user's (a teacher that is down, a full disk): the same one line, exit status 1."""
    status = 1


def visible(text):
    """`text` with control characters spelled out, so that text from a model or a corpus cannot drive the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", lambda m: f"\\x{ord(m[0]):02x}", text)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, no abbreviated flags, an example in --help and every default shown."""

    def __init__(self, *args, example="", **kw):
        kw.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(*args, epilog=f"example: {example}" if example else None, allow_abbrev=False, **kw)

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def run(main):
    """Run a program's main(): a user's mistake ends with one line and status 2, a failure of the world with status 1."""
    program = Path(sys.argv[0]).name
    try:
        status = main() or 0
        sys.stdout.flush()
    except UserError as e:
        status = complain(program, e.status, *e.args)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, FileExistsError) as e:
        status = complain(program, 2, f"{e.filename}: {e.strerror}")
    except BrokenPipeError:                                # the reader of our output went away (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 0
    except OSError as e:
        more = "; nothing finished is lost: free some space and run the same command again" if e.errno == errno.ENOSPC else ""
        status = complain(program, 1, f"{e.filename + ': ' if e.filename else ''}{e.strerror or e}{more}")
    except RecursionError:
        status = complain(program, 2, "a JSON value is nested too deeply to read")
    except Exception as e:                                 # a bug of ours: where it is, and how to see all of it
        if os.environ.get("TRACE"):
            raise
        at = traceback.extract_tb(e.__traceback__)[-1]
        status = complain(program, 1, f"{type(e).__name__}: {e} (at {Path(at.filename).name}:{at.lineno}; with TRACE=1 in the environment the whole trace is shown)")
    except KeyboardInterrupt:
        status = complain(program, 130, "interrupted; the same command continues")
    sys.exit(status)


def complain(program, status, *messages):
    if os.environ.get("RANK", "0") == "0":                 # under torchrun one rank speaks for all
        for message in messages:
            print(f"{program}: {visible(' '.join(str(message).split()))}", file=sys.stderr)
    return status


def count(text):
    """'20M' -> 20_000_000; K, M and B are decimal."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KkMmBb]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number like 500, 20K, 1.5M")
    return round(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[match[2].lower()])


def natural(text):
    """An argparse type: a whole number that is not negative; seeds, shots, steps."""
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def positive(text):
    """An argparse type: a whole number of at least 1."""
    if not natural(text):
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def real(text):
    """An argparse type: a finite number that is not negative; rates, temperatures, seconds."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value


def same_settings(path, field, now):
    """True where the JSON file `path` records `now` under `field`; False where there is no file; other settings are an error that names them."""
    path = Path(path)
    if not path.is_file():
        return False
    before, now = read_json(path), json.loads(json.dumps(now))
    before = before.get(field, {}) if isinstance(before, dict) else {}
    differ = [f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
    if differ:
        raise UserError(f"{path.parent} was made with other settings ({'; '.join(differ)}); choose another --out or delete it")
    return True


@contextlib.contextmanager
def atomic(path, mode="w"):
    """Write a file under a temporary name and rename it over `path` once whole and on disk; on an error nothing is left."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"})) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_dir(path):
    """The same for a folder: it appears under its name only when everything in it is written. A folder with something in it is left alone."""
    path = Path(path).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not empty; choose another --out or delete it")
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, path)                        # also over an empty folder
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_json(path, value):
    with atomic(path) as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.write("\n")


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not JSON ({e})")


def read_lines(path):
    """Yield (line number, text) of a UTF-8 file; bytes that are not UTF-8 are an error that names the line."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as e:
                raise UserError(f"{path}:{number}: not UTF-8 ({e.reason})")


def read_jsonl(path, *fields):
    """Yield the objects of a JSON-lines file; a malformed line, or one without `fields`, is an error that names it."""
    return (record for _, record in numbered_jsonl(path, *fields))


def numbered_jsonl(path, *fields):
    """The same with the number of the line."""
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}:{number}: not JSON ({e})")
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: expected an object, found {type(record).__name__}")
        for field in fields:
            if field not in record:
                raise UserError(f"{path}:{number}: no field {field!r}; found {', '.join(map(repr, record)) or 'none'}")
        yield number, record


def write_jsonl(path, records):
    with atomic(path) as f:
        for record in records:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")


def digest(*parts):
    """A short stable hash of JSON values; keys of requests, seeds of prompts, fingerprints of settings."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:24]


def file_hash(path):
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            h.update(piece)
    return h.hexdigest()


def fingerprint(folder):
    """A short hash that tells checkpoints apart: names and sizes of the files, the first and the last MiB of each."""
    parts = []
    for path in sorted(p for p in Path(folder).iterdir() if p.suffix in (".safetensors", ".pth", ".model", ".json") and p.name != "train.json"):
        size = path.stat().st_size
        with open(path, "rb") as f:
            h = hashlib.sha256(f.read(1 << 20))
            f.seek(max(0, size - (1 << 20)))
            h.update(f.read())
        parts.append((path.name, size, h.hexdigest()))
    return digest(parts)


@contextlib.contextmanager
def locked(path, what):
    """Hold an exclusive lock on `path`.lock; a second process is refused with a line, and a killed one holds nothing."""
    path = Path(path).resolve()
    path = path.with_name(path.name + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{what} is in use by another process; wait for it or choose another name")
        yield


class GrowingFile:
    """JSON lines appended one by one, each on disk before `append` returns.

    A line torn by a kill is cut off when the file is opened, a garbled one is passed over; both are said on stderr.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "ab+")
        self.records = []
        self.file.seek(0)
        whole = garbled = 0
        for line in self.file:
            if not line.endswith(b"\n"):
                print(f"{self.path}: a torn last line ({len(line)} bytes) was dropped", file=sys.stderr)
                self.file.truncate(whole)
                break
            whole += len(line)
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError
                self.records.append(record)
            except (ValueError, RecursionError):
                garbled += bool(line.strip())
        if garbled:
            print(f"{self.path}: {garbled} garbled line{'s'[:garbled > 1]} passed over", file=sys.stderr)

    def append(self, *records):
        start = self.file.seek(0, os.SEEK_END)
        try:
            self.file.write(b"".join(json.dumps(r, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n" for r in records))
            self.file.flush()
            os.fdatasync(self.file.fileno())
        except OSError:                                    # a full disk: leave no half line behind
            with contextlib.suppress(OSError):
                self.file.truncate(start)
            raise

    def close(self):
        with contextlib.suppress(OSError):
            self.file.close()


def dying_with_parent():
    """A preexec_fn: the child is killed when its parent is (Linux), so that no orphan goes on writing its files."""
    if sys.platform != "linux":
        return None
    import ctypes
    libc = ctypes.CDLL(None)                               # loaded before the fork, where it is safe
    return lambda: libc.prctl(1, signal.SIGKILL)           # PR_SET_PDEATHSIG


# --- tokenizers ----------------------------------------------------------------------------------------------------------

SPECIAL = {"tokens": ("<|user|>", "<|assistant|>"), "koala": (), "plain": ()}    # added to the vocabulary, per template


class Tokenizer:
    """What the three kinds share: `n_base` ids of their own, `bos`, `eos`, and `added`, {name: id} of the tokens that templates add.

    encode() treats its argument as ordinary text: neither control tokens (`</s>`, `<|endoftext|>`) nor the added ones are ever
    parsed out of it, so that text cannot forge a turn. Lone surrogates, which no UTF-8 text can hold, become U+FFFD.
    """
    silent = frozenset()                                   # ids without text, beside bos, eos and the added ones

    def add(self, names):
        for name in names:
            self.added.setdefault(name, self.vocab_size)
        return self

    @property
    def vocab_size(self):
        return 1 + max([self.n_base - 1, *self.added.values()])

    @property
    def hash(self):
        return digest(self.base_hash, self.added)

    def decode(self, ids):
        """Text of `ids`; special and added tokens have none, and the text between them is decoded piece by piece."""
        text, run_, silent = [], [], {self.bos, self.eos, *self.added.values(), *self.silent}
        for i in (*ids, self.eos):
            if i < self.n_base and i not in silent:
                run_.append(int(i))
            elif run_:
                text.append(self.decode_run(run_))
                run_ = []
        return "".join(text)


def well_formed(text):
    return text if text.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", text)


class SentencePieceTokenizer(Tokenizer):
    """LLaMA's tokenizer: SentencePiece BPE with byte fallback; tokens added to the vocabulary follow its own pieces."""

    def __init__(self, folder):
        import sentencepiece
        self.folder = Path(folder)
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(self.folder / "tokenizer.model"))
        except (OSError, RuntimeError) as e:
            raise UserError(f"{self.folder}/tokenizer.model: not a SentencePiece model ({e})")
        self.n_base = self.sp.vocab_size()
        self.bos, self.eos = self.sp.bos_id(), self.sp.eos_id()
        added = self.folder / "added_tokens.json"
        self.added = read_json(added) if added.is_file() else {}
        if sorted(self.added.values()) != list(range(self.n_base, self.n_base + len(self.added))):
            raise UserError(f"{added}: ids of added tokens must follow the {self.n_base} pieces of tokenizer.model")

    @property
    def base_hash(self):
        """Of the vocabulary without added tokens: says whether a checkpoint and packed data speak the same ids."""
        return digest(file_hash(self.folder / "tokenizer.model"))

    def encode(self, text):
        return self.sp.encode(well_formed(text))

    def decode_run(self, ids):
        return self.sp.decode(ids)

    def save(self, folder):
        shutil.copyfile(self.folder / "tokenizer.model", Path(folder) / "tokenizer.model")
        write_json(Path(folder) / "added_tokens.json", self.added)

    def export(self, folder, template):
        """Write what transformers, vLLM and llama.cpp's converter read beside the model's own file: tokenizer.json, tokenizer_config.json.

        transformers reads a bare tokenizer.model differently, and its LlamaTokenizer class too: PreTrainedTokenizerFast takes the
        JSON as it is. llama.cpp finds the added tokens in added_tokens_decoder.
        """
        self.save(folder)
        special = {p: i for p, i in ((self.sp.id_to_piece(i), i) for i in range(self.n_base)) if self.sp.is_control(i) or self.sp.is_unknown(i)} | self.added
        try:
            write_json(Path(folder) / "tokenizer.json", tokenizer_json(self.sp, self.added))
        except ValueError as e:
            print(f"{folder}: no tokenizer.json written, transformers may read tokenizer.model differently: {e}", file=sys.stderr)
        write_json(Path(folder) / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": self.sp.id_to_piece(self.bos), "eos_token": self.sp.id_to_piece(self.eos), "unk_token": self.sp.id_to_piece(self.sp.unk_id()),
            "add_bos_token": True, "add_eos_token": False, "add_prefix_space": True, "clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"],
            "added_tokens_decoder": {str(i): {"content": p, **SPECIAL_FLAGS} for p, i in special.items()}, **({"chat_template": CHAT_TEMPLATES[template]} if template in CHAT_TEMPLATES else {})})


SPECIAL_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def _protobuf_fields(message):
    """(number, value) pairs of a protobuf message: reading them by hand saves a dependency."""
    rest = iter(message)

    def varint(byte):
        return byte if byte < 128 else byte - 128 + 128 * varint(next(rest))
    for byte in rest:
        number, wire = divmod(varint(byte), 8)
        size = {1: 8, 5: 4}.get(wire) or varint(next(rest))
        yield number, bytes(itertools.islice(rest, size)) if wire else size


def tokenizer_json(sp, added):
    """The tokenizer.json that gives a BPE SentencePieceProcessor's ids, with {text: id} tokens added behind its vocabulary.

    ValueError names what such a file cannot express. Each text between special tokens gets the dummy prefix, as encode() gives it.
    """
    message = list(_protobuf_fields(sp.serialized_model_proto()))
    trainer, normal, denormal = (dict(_protobuf_fields(dict(message).get(number, b""))) for number in (2, 3, 5))
    types = [dict(_protobuf_fields(value)).get(3, 1) for number, value in message if number == 1]
    pieces = [sp.id_to_piece(i) for i in range(len(types))]
    scores = {piece: sp.get_score(i) for i, (piece, kind) in enumerate(zip(pieces, types)) if kind == 1}
    ranked = sorted((score, piece) for piece, score in scores.items() if len(piece) > 1)
    for wrong, why in (
            (trainer.get(3, 1) != 2, "the model is not BPE"),
            (normal.get(2) or denormal.get(2), "it normalises text"),
            (not normal.get(3, 1) or trainer.get(24), "it has no dummy prefix"),
            (normal.get(4, 1), "it removes extra white space"),
            (not normal.get(5, 1), "it does not escape white space"),
            (set(types) - {1, 2, 3, 6}, "it has user-defined or unused pieces"),
            ({p for p, t in zip(pieces, types) if t == 6} != {f"<0x{b:02X}>" for b in range(256)}, "it has no byte fallback"),
            (not set("".join(scores)) <= scores.keys(), "a piece has a character that is no piece"),         # sentencepiece merges those too, a BPE over a vocabulary cannot
            (any(a == b and len(set(p + q)) > 1 for (a, p), (b, q) in zip(ranked, ranked[1:])), "two scores are equal")):     # it merges the leftmost of equals
        if wrong:
            raise ValueError(why)
    merges = [[p[:i], p[i:]] for p in scores for i in range(1, len(p)) if p[:i] in scores and p[i:] in scores]
    merges.sort(key=lambda m: (-scores[m[0] + m[1]], -len(m[0] + m[1]), -len(m[0])))      # runs of spaces, all of one score, grow from the left
    special = [(i, p) for i, p in enumerate(pieces) if types[i] in (2, 3)] + sorted((i, p) for p, i in added.items())
    bos = pieces[sp.bos_id()]
    first, second = ([{"SpecialToken": {"id": bos, "type_id": n}}, {"Sequence": {"id": "AB"[n], "type_id": n}}] for n in (0, 1))
    return {"version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None,
            "added_tokens": [{"id": i, "content": text, **SPECIAL_FLAGS} for i, text in special],
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "post_processor": {"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": {bos: {"id": bos, "ids": [sp.bos_id()], "tokens": [bos]}}},
            "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": None, "unk_token": pieces[sp.unk_id()], "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
                      "ignore_merges": False, "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges}}


class JSONTokenizer(Tokenizer):
    """A tokenizer.json (LLaMA 3, SmolLM2) through the `tokenizers` package.

    The package parses every added token out of text. Here only those that are white space (GPT-NeoX's runs of spaces, trained
    as ordinary pieces) still are; the others count as special, and special tokens as text.
    """

    def __init__(self, folder, spec):
        self.folder, self.spec = folder, spec
        names = {**spec["model"]["vocab"], **{t["content"]: t["id"] for t in spec["added_tokens"]}}
        self.added = {t["content"]: t["id"] for t in spec["added_tokens"] if t["content"] in SPECIAL["tokens"]}
        self.silent = frozenset(t["id"] for t in spec["added_tokens"] if t["special"])
        if len(set(names.values())) < len(names) or not all(isinstance(i, int) and i >= 0 for i in names.values()):
            raise ValueError("ids must be whole numbers, each of one token")
        self.n_base = 1 + max(i for name, i in names.items() if name not in self.added)
        self.read_config(names)
        self.build(spec)

    def read_config(self, names):
        """bos and eos as the files of the checkpoint state them, by name or else by id; where none does, GPT-2's token. What else goes along in tokenizer_config.json."""
        files = {name: read_json(self.folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json") if (self.folder / name).is_file()}
        by_id, ends = {i: name for name, i in names.items()}, {}
        for end in ("bos", "eos"):
            for d in files.values():
                name, i = d.get(f"{end}_token"), d.get(f"{end}_token_id")
                name, i = name.get("content") if isinstance(name, dict) else name, i[0] if isinstance(i, list) and i else i      # LLaMA 3 lists several
                ends.setdefault(end, name if name in names else by_id[i]) if name in names or i in by_id else None
        eos = ends.get("eos", "<|endoftext|>")
        if eos not in names:
            raise UserError(f"{self.folder}: no file says which token ends a text; put {{\"eos_token\": \"…\"}} into {self.folder}/tokenizer_config.json")
        bos = ends.get("bos", eos)
        self.bos, self.eos = names[bos], names[eos]
        own = files.get("tokenizer_config.json", {})
        if (self.folder / "chat_template.jinja").is_file():
            own["chat_template"] = (self.folder / "chat_template.jinja").read_text(encoding="utf-8")
        self.config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "clean_up_tokenization_spaces": False,
                       "model_input_names": ["input_ids", "attention_mask"], **{k: own[k] for k in ("unk_token", "pad_token", "model_max_length", "chat_template") if own.get(k)}}

    def build(self, spec):
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"{self.folder}/tokenizer.json is read through the tokenizers package: pip install tokenizers")
        text = json.dumps({**spec, "truncation": None, "padding": None, "added_tokens": [{**t, "special": t["special"] or not t["content"].isspace()} for t in spec["added_tokens"]]})
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as e:                             # the package raises nothing narrower
            raise UserError(f"{self.folder}/tokenizer.json: not a tokenizer ({e})")
        self.tokenizer.encode_special_tokens = True        # as text

    @functools.cached_property
    def base_hash(self):
        return digest(*(self.spec["model"][k] for k in ("vocab", "merges")), *(self.spec.get(k) for k in ("normalizer", "pre_tokenizer")))

    def encode(self, text):
        ids = self.tokenizer.encode(well_formed(text), add_special_tokens=False).ids
        if not self.silent.isdisjoint(ids):
            raise UserError(f"{self.folder}/tokenizer.json reads a special token out of plain text; such a tokenizer is not supported")
        return ids

    def decode_run(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def export(self, folder, template=None):
        """Write tokenizer.json with the added tokens in it, and a tokenizer_config.json with the chat template: what transformers, vLLM and llama.cpp's converter read."""
        known = {t["content"] for t in self.spec["added_tokens"]}
        tokens = self.spec["added_tokens"] + [{"id": i, "content": name, **SPECIAL_FLAGS} for name, i in self.added.items() if name not in known]
        write_json(Path(folder) / "tokenizer.json", {**self.spec, "added_tokens": tokens})
        write_json(Path(folder) / "tokenizer_config.json", {
            **self.config, "added_tokens_decoder": {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in tokens}, **({"chat_template": CHAT_TEMPLATES[template]} if template in CHAT_TEMPLATES else {})})

    save = export


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@functools.cache
def gpt2_words(last=0x10FFFF):
    """GPT-2's pre-tokenizer, 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+, for text of code points up to `last`.

    Letters and numbers are Python's: a character younger than its Unicode is neither. White space is Unicode's: re's \s has U+001C to U+001F too.
    """
    categories = "".join(map(unicodedata.category, map(chr, range(last + 1))))                       # two letters each
    letters, numbers = ("".join(f"\\U{m.start() // 2:08x}-\\U{m.end() // 2 - 1:08x}" for m in re.finditer(f"(?:{kind}.)+", categories)) for kind in "LN")
    space = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    return re.compile(f"'(?:[stmd]|re|ve|ll)| ?[{letters}]+| ?[{numbers}]+| ?[^{space}{letters}{numbers}]+|[{space}]+(?![^{space}])|[{space}]+").findall


class GPT2Tokenizer(JSONTokenizer):
    """GPT-2's byte-level BPE by hand: words are cut off by a pattern, each word's bytes merged pair by pair, lowest rank first."""

    def build(self, spec):
        vocab, shown = spec["model"]["vocab"], {*range(33, 127), *range(161, 173), *range(174, 256)}
        others = itertools.count(256)
        symbols = [chr(b if b in shown else next(others)) for b in range(256)]       # how the files spell a byte
        if missing := [b for b, symbol in enumerate(symbols) if symbol not in vocab]:
            raise UserError(f"{self.folder}: the vocabulary has no token for byte {missing[0]} ({symbols[missing[0]]!r})")
        self.start, byte_of = [vocab[symbol] for symbol in symbols], {symbol: b for b, symbol in enumerate(symbols)}
        for number, (a, b) in enumerate(spec["model"]["merges"], 1):
            if unknown := [s for s in (a, b, a + b) if s not in vocab]:
                raise UserError(f"{self.folder}: merge {number}, {a} {b}: {unknown[0]!r} is not in the vocabulary")
        self.rules = [(vocab[a], vocab[b], vocab[a + b]) for a, b in spec["model"]["merges"]]
        unmade = vocab.keys() - {a + b for a, b in spec["model"]["merges"]} - byte_of.keys()
        if unmade := sorted(t for t in unmade if not re.fullmatch(r"<.*>|\[.*\]", t)):           # those are special tokens
            raise UserError(f"{self.folder}: no merge makes {len(unmade)} tokens of the vocabulary ({unmade[0]!r}, …); a file is cut off, or the two do not belong together")
        self.ranks = {(a, b): rank for rank, (a, b, _) in enumerate(self.rules)}
        self.bytes = {i: bytes(byte_of[c] for c in token) if byte_of.keys() >= set(token) else token.encode() for token, i in vocab.items()}
        self.words = _Words(self.merge)

    def merge(self, word):
        """Ids of a word. The leftmost pair of lowest rank is merged until none is left; a heap over linked neighbours, so that a megabyte without a space takes n log n."""
        ids, get = [*map(self.start.__getitem__, word.encode()), None], self.ranks.get              # None ends the word on either side: ids[-1]
        n = len(ids)
        left, right = list(range(-1, n - 1)), list(range(1, n + 1))
        heap = [rank * n + i for i, rank in enumerate(map(get, zip(ids, ids[1:]))) if rank is not None]
        heapq.heapify(heap)
        while heap:
            rank, i = divmod(heapq.heappop(heap), n)
            a, b, new = self.rules[rank]
            j = right[i]
            if ids[i] != a or ids[j] != b:                 # one of the two is merged meanwhile
                continue
            ids[i], ids[j], right[i] = new, None, right[j]
            h, k = left[i], right[i]
            left[k] = i
            for at, pair in ((h, (ids[h], new)), (i, (new, ids[k]))):
                if (rank := get(pair)) is not None:
                    heapq.heappush(heap, rank * n + at)
        return tuple(i for i in ids if i is not None)

    def encode(self, text):
        text = well_formed(text)
        words = gpt2_words() if not text.isascii() and re.search("[\U00010000-\U0010ffff]", text) else gpt2_words(0xFFFF)       # classes beyond 16 bits make re slow
        return list(itertools.chain.from_iterable(map(self.words.__getitem__, words(text))))

    def decode_run(self, ids):
        return b"".join(self.bytes.get(i, b"") for i in ids).decode("utf-8", "replace")


class _Words(dict):
    """word -> ids, computed where it is missing; emptied at half a million words, so that memory stays bounded."""

    def __init__(self, merge):
        self.merge = merge

    def __missing__(self, word):
        ids = self.merge(word)
        if len(self) >= 1 << 19:
            self.clear()
        if len(word) <= 64:
            self[word] = ids
        return ids


TOKENIZER_FILES = ("tokenizer.model",), ("tokenizer.json",), ("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")


def tokenizer_files(folder):
    """The files of a tokenizer that lie in `folder`, the first kind found; () where there are none."""
    return next((names for names in TOKENIZER_FILES if all((Path(folder) / name).is_file() for name in names)), ())


def load_tokenizer(folder):
    """The tokenizer of a checkpoint or of packed data, from the files found in `folder` (or of one of them given by name)."""
    folder = Path(folder)
    folder = folder.parent if folder.is_file() else folder
    kinds = ", or ".join(" and ".join(names) for names in TOKENIZER_FILES)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such tokenizer folder; give one that holds {kinds}")
    files = tokenizer_files(folder)
    if not files:
        raise UserError(f"{folder}: no tokenizer in it; expected {kinds}")
    if files == ("tokenizer.model",):
        return SentencePieceTokenizer(folder)
    spec = read_json(folder / files[0])
    try:
        if len(files) == 2:
            merges = [line.split(" ") for number, line in read_lines(folder / files[1]) if line and not (number == 1 and line.startswith("#version"))]
            added = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").is_file() else {}
            tokens = [{"id": i, "content": name, **SPECIAL_FLAGS} for name, i in ({name: spec[name] for name in ("<|endoftext|>",) if name in spec} | added).items()]
            spec = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens, "normalizer": None, "pre_tokenizer": BYTE_LEVEL, "post_processor": None, "decoder": BYTE_LEVEL,
                    "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": spec, "merges": merges}}
        model, cut_ = spec["model"], spec.get("pre_tokenizer") or {}
        if model.get("type", "BPE") != "BPE":
            raise UserError(f"{folder}/tokenizer.json: a tokenizer of type {model['type']!r}; only BPE is read")
        model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        if any(len(m) != 2 for m in model["merges"]):
            raise UserError(f"{folder / files[-1]}: merge {next(n for n, m in enumerate(model['merges'], 1) if len(m) != 2)} is not two symbols")
        by_hand = cut_.get("type") == "ByteLevel" and not cut_.get("add_prefix_space", True) and cut_.get("use_regex", True) and not spec.get("normalizer") and not any(
            model.get(k) for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"))
        if by_hand:
            spec["pre_tokenizer"] = BYTE_LEVEL             # one spelling, so that GPT-2's tokenizer has one hash
        return (GPT2Tokenizer if by_hand else JSONTokenizer)(folder, spec)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{folder / files[0]}: not the vocabulary of a tokenizer ({type(e).__name__}: {e})")


@functools.cache
def adds_bos(folder):
    """Whether the checkpoint's own tokenizer puts its BOS before a text: a SentencePiece model does, a tokenizer.json says so in its post-processor, GPT-2's does not."""
    if (Path(folder) / "tokenizer.model").is_file():
        return True
    path = Path(folder) / "tokenizer.json"
    post = read_json(path).get("post_processor") or {} if path.is_file() else {}
    return any("SpecialToken" in step for p in post.get("processors", [post]) for step in p.get("single", [])[:1])


def continuation(tokenizer, prompt, new):
    """Text that `new` ids add behind `prompt` ids: decode(prompt + new) minus decode(prompt).

    Decoding `new` alone would be wrong: SentencePiece drops the space at the start, and code without its indentation fails.
    """
    tail = list(prompt[-16:])                              # enough context for a space or a character cut in the middle
    while tail and tail[0] >= tokenizer.n_base:            # never start on an added token: what follows it starts afresh
        tail.pop(0)
    before = tokenizer.decode(tail).rstrip("\ufffd")
    return tokenizer.decode(tail + list(new))[len(before):]


def stop_rule(tokenizer, stops):
    """A function (index, new ids) -> True when one of the strings `stops` has just been completed, however tokens cut it."""
    reach = max((len(s.encode()) for s in stops), default=0) + 1         # a token holds a byte at least; one more for the lost space
    return lambda index, new: any(s in tokenizer.decode(new[-reach:]) for s in stops)


def cut(text, stops):
    """`text` up to the first of `stops`."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


# --- conversations -> ids ------------------------------------------------------------------------------------------------

def turns_of(messages):
    """(role, content) with a system message joined to the query that follows it: neither template has a place for one."""
    turns, system = [], ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "system":
            system += content + "\n\n"
            continue
        if role == "user" and system:
            content, system = system + content, ""
        elif system:                                       # a system message straight before an answer is its query
            turns.append(("user", system.rstrip("\n")))
            system = ""
        turns.append((role, content))
    return turns + ([("user", system.rstrip("\n"))] if system else [])


def render(messages, tokenizer, template, answer=False):
    """A conversation as (ids, loss_mask); mask[i] = 1 where ids[i] is to be predicted: answers and the EOS that ends each.

    tokens: <s> (<|user|> query <|assistant|> answer </s>)*        §4.1: special tokens mark queries and outputs
    koala:  <s> "BEGINNING OF CONVERSATION: USER: q GPT:" a </s> ("USER: q GPT:" a </s>)*      EasyLM's Koala, plain text
    Query and answer are tokenized apart. With `answer` the ids end where the model's answer begins.
    """
    ids, mask = [tokenizer.bos], [0]

    def put(new, loss):
        ids.extend(new)
        mask.extend([loss] * len(new))

    turns = turns_of(messages)
    if template == "tokens":
        for role, content in turns:
            put([tokenizer.added["<|user|>" if role == "user" else "<|assistant|>"]], 0)
            put(tokenizer.encode(content), int(role == "assistant"))
            if role == "assistant":
                put([tokenizer.eos], 1)
        if answer:
            put([tokenizer.added["<|assistant|>"]], 0)
    elif template == "koala":
        context = ["BEGINNING OF CONVERSATION:"]
        for role, content in turns:
            if role == "user":
                context.append(f"USER: {content}")
            else:
                put(tokenizer.encode(" ".join([*context, "GPT:"])), 0)
                put([*tokenizer.encode(content), tokenizer.eos], 1)
                context = []
        if answer:
            context.append("GPT:")
        if context:
            put(tokenizer.encode(" ".join(context)), 0)
    else:
        raise UserError(f"unknown template {template!r}; there are tokens and koala")
    return ids, mask


CHAT_TEMPLATES = {   # `render` once more in Jinja, for transformers and vLLM; text is parsed there, so that it can forge special tokens
    "tokens": "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}{% set ns.system = ns.system + m['content'] + '\n\n' %}"
              "{% elif m['role'] == 'user' %}{{ '<|user|>' + ns.system + m['content'] }}{% set ns.system = '' %}{% else %}{{ '<|assistant|>' + m['content'] + eos_token }}{% endif %}"
              "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    "koala": "{{ bos_token }}{% set ns = namespace(text='BEGINNING OF CONVERSATION:', system='') %}{% for m in messages %}{% if m['role'] == 'system' %}{% set ns.system = ns.system + m['content'] + '\n\n' %}"
             "{% elif m['role'] == 'user' %}{% set ns.text = ns.text + (' ' if ns.text else '') + 'USER: ' + ns.system + m['content'] %}{% set ns.system = '' %}"
             "{% else %}{{ ns.text + (' ' if ns.text else '') + 'GPT:' + (' ' if m['content'] else '') + m['content'] + eos_token }}{% set ns.text = '' %}{% endif %}{% endfor %}{{ ns.text }}{% if add_generation_prompt %}{{ (' ' if ns.text else '') + 'GPT:' }}{% endif %}",
}


def check_messages(record, where):
    """The messages of a record, validated; `where` names the line in errors."""
    messages = record.get("messages")
    if messages is None and isinstance(record.get("prompt"), str):       # a bare prompt is a conversation of one turn
        messages = [{"role": "user", "content": record["prompt"]}]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: no field 'messages' (nor 'prompt')")
    for m in messages:
        if not isinstance(m, dict) or m.get("role") not in ("user", "assistant", "system") or not isinstance(m.get("content"), str):
            raise UserError(f"{where}: each message needs a role (user, assistant, system) and a text content")
    return messages


def read_prompts(path):
    """Prompts file (`messages`, or a bare `prompt`) as [{"id", "messages", …}]; ids must be unique."""
    prompts, seen = [], set()
    for number, record in numbered_jsonl(path):
        record = {**record, "messages": check_messages(record, f"{path}:{number}")}
        record["id"] = str(record.get("id", f"{Path(path).stem}-{number}"))
        if record["id"] in seen:
            raise UserError(f"{path}:{number}: id {record['id']!r} stands twice; ids must be unique")
        seen.add(record["id"])
        prompts.append(record)
    if not prompts:
        raise UserError(f"{path}: no prompts in it")
    return prompts


def read_replies(path):
    """Replies file as {id: (query, answer, record)}; the last message is the answer."""
    replies = {}
    for number, record in numbered_jsonl(path, "id"):
        messages = check_messages(record, f"{path}:{number}")
        if messages[-1]["role"] != "assistant":
            raise UserError(f"{path}:{number}: the last message is not an answer; replies come from `imitation.py collect` or `model.py generate`")
        if not isinstance(record["id"], str) or record["id"] in replies:
            raise UserError(f"{path}:{number}: id {record['id']!r} must be a text that stands once")
        query = next((m["content"] for m in reversed(messages[:-1]) if m["role"] == "user"), "")
        replies[record["id"]] = (query, messages[-1]["content"], record)
    return replies


def read_questions(path):
    """Question file (NQ-open's layout) as [{"question", "answer": [texts], …}]."""
    rows = []
    for number, row in numbered_jsonl(path, "question", "answer"):
        answers = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
        if not isinstance(row["question"], str) or not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
            raise UserError(f"{path}:{number}: question must be text, answer a text or a list of texts")
        if not isinstance(row.get("category", ""), str):
            raise UserError(f"{path}:{number}: category must be a text")
        rows.append({**row, "answer": answers})
    if not rows:
        raise UserError(f"{path}: no questions in it")
    return rows


# --- corpora -------------------------------------------------------------------------------------------------------------
# Each reader yields (id, messages) of a file in the format in which the public set is spread.

def json_records(path):
    """The records of a JSON array or of JSON lines, streamed: memory holds one record and a buffer, not the file."""
    decoder = json.JSONDecoder()
    with open(path, encoding="utf-8-sig", errors="replace") as f:      # a byte that is not UTF-8 spoils its character, not the file
        head = f.read(1)
        while head and head.isspace():
            head = f.read(1)
        if head != "[":
            yield from read_jsonl(path)
            return
        buffer, position, n = "", 0, 0
        while True:
            while position < len(buffer) and buffer[position] in " \t\r\n,":
                position += 1
            if position < len(buffer) and buffer[position] == "]":
                return
            try:
                if position == len(buffer):
                    raise ValueError
                record, end = decoder.raw_decode(buffer, position)
            except RecursionError:
                raise UserError(f"{path}: record {n + 1} is nested too deeply to read")
            except ValueError:
                piece = f.read(1 << 20)
                if not piece:
                    raise UserError(f"{path}: the JSON array breaks off or is malformed after {n} whole records")
                buffer, position = buffer[position:] + piece, 0
                continue
            position, n = end, n + 1
            yield record


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
         "assistant": "assistant", "system": "system"}


def read_sharegpt(path):
    """ShareGPT: [{"id", "conversations": [{"from": "human"|"gpt", "value"}]}] or the same as JSON lines."""
    for number, record in enumerate(json_records(path)):
        turns = record.get("conversations", record.get("items")) if isinstance(record, dict) else None
        messages = []
        for turn in turns if isinstance(turns, list) else ():
            role = ROLES.get(str(turn.get("from", turn.get("role"))).lower()) if isinstance(turn, dict) else None
            text = turn.get("value", turn.get("content")) if role else None
            messages.append({"role": role, "content": text} if isinstance(text, str) else None)
        key = record.get("id") if isinstance(record, dict) else None
        yield f"{Path(path).stem}-{number}" if key is None else str(key), messages


def read_hc3(path):
    """HC3, the ChatGPT side (§3.1): every answer of every question an example of its own."""
    for number, record in enumerate(read_jsonl(path, "question", "chatgpt_answers")):
        question, answers = record["question"], record["chatgpt_answers"]
        for k, answer in enumerate(answers if isinstance(answers, list) and answers else [None]):
            whole = isinstance(question, str) and isinstance(answer, str)
            yield f"hc3-{Path(path).stem}-{number}-{k}", [{"role": "user", "content": question}, {"role": "assistant", "content": answer}] if whole else None


PAIR_FIELDS = (("input", "output"), ("prompt", "response"), ("question", "answer"), ("user", "bot"))


def read_discord(path):
    """Discord bots: input-output pairs, JSON lines or csv with a header."""
    if str(path).endswith(".csv"):
        csv.field_size_limit(1 << 30)
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as f:
            records = list(csv.DictReader(f))
    else:
        records = read_jsonl(path)
    for number, record in enumerate(records):
        fields = next((p for p in PAIR_FIELDS if p[0] in record and p[1] in record), None)
        if not fields:
            raise UserError(f"{path}:{number + 1}: no pair of fields such as input and output; found {', '.join(record)}")
        yield f"discord-{Path(path).stem}-{number}", [{"role": role, "content": record[field]} if isinstance(record[field], str) else None
                                                      for role, field in zip(("user", "assistant"), fields)]


READERS = {"sharegpt": read_sharegpt, "hc3": read_hc3, "discord": read_discord}


# --- mix: ShareGPT-Mix (§3.1, appendix A) ---------------------------------------------------------------------------------

class _Markdown(html.parser.HTMLParser):
    """The text of a ShareGPT page: line breaks, lists and code kept, every other tag dropped."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.out = []

    def handle_starttag(self, tag, attrs):
        self.out.append({"br": "\n", "p": "\n\n", "li": "\n- ", "pre": "\n```\n", "tr": "\n", "ul": "\n", "ol": "\n"}.get(tag, ""))

    def handle_endtag(self, tag):
        self.out.append({"pre": "\n```\n", "p": "\n\n"}.get(tag, ""))

    def handle_data(self, data):
        self.out.append(data)


def clean(text):
    """Text of a turn without the residue of the web page it was copied from: HTML, "Copy code" buttons, rating widgets."""
    if re.search(r"</(p|div|pre|li|ul|ol|span|code)>|<br ?/?>", text) and re.match(r"\s*<(p|div|pre|ul|ol|span)\b", text):
        parser = _Markdown()
        parser.feed(text)
        parser.close()
        text = re.sub(r"\n{3,}", "\n\n", "".join(parser.out))
    text = re.sub(r"(?m)^(```)?[ \t]*([\w+#-]*)Copy code[ \t]*`?", lambda m: f"{m[1]}{m[2]}\n" if m[1] else "", text)
    text = re.sub(r"(?m)^[ \t]*\d+ ?/ ?\d+[ \t]*$\n?", "", text) if "\n1 / 1" in text else text
    return text.replace("\r\n", "\n").strip()


def normalize_query(text):
    """What query-level deduplication compares: case, width and white space set aside."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def join_pieces(dialogues):
    """ShareGPT dumps cut long dialogues into pieces ID_0, ID_1, …; put each dialogue together again, in order."""
    pieces = {}
    for key, messages in dialogues:
        match = re.fullmatch(r"(.+)_(\d+)", key)
        stem, number = (match[1], int(match[2])) if match else (key, 0)
        while number in pieces.get(stem, ()):              # another dialogue of the same name stays one of its own
            stem += "'"
        pieces.setdefault(stem, {}).setdefault(number, messages)
    for stem, parts in pieces.items():
        yield stem, [m for number in sorted(parts) for m in parts[number]], len(parts)


def language_filter(confidence):
    """A function text -> True where another language than English is identified with at least `confidence`."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError("the language filter needs py3langid: pip install py3langid, or pass --any-language")
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def foreign(text):
        language, probability = identifier.classify(text[:5000])
        return language != "en" and probability >= confidence
    return foreign


def keep_or_reason(messages, seen, foreign):
    """(cleaned messages, None) or (None, reason); `seen` gathers the first queries met so far, None to allow repeats."""
    if not messages or any(m is None or m["role"] is None for m in messages):
        return None, "malformed"
    messages = [{**m, "content": clean(m["content"])} for m in messages]
    messages = [m for m in messages if m["content"]]                      # an empty turn says nothing and ends nothing
    while messages and messages[-1]["role"] != "assistant":               # a query nobody answered teaches nothing
        messages.pop()
    query = next((m["content"] for m in messages if m["role"] == "user"), None)
    if not messages or query is None:
        return None, "empty"
    if foreign and foreign("\n".join(m["content"] for m in messages)):
        return None, "not English"
    if seen is not None:
        key = normalize_query(query)
        if key in seen:
            return None, "duplicate query"
        seen.add(key)
    return messages, None


def mix(sources, out, foreign):
    """Write ShareGPT-Mix and `dropped.jsonl` beside it; return {source: {"in", "kept", reason: n, …, "turns"}}.

    `sources` is [(name, path)]. Deduplication is by the first query of a dialogue, within ShareGPT: HC3 has several answers
    to one question on purpose.
    """
    table, kept, dropped = {}, [], []
    for name in dict.fromkeys(name for name, _ in sources):
        row = table.setdefault(name, {"in": 0, "kept": 0, "turns": 0})
        records = (record for other, path in sources if other == name for record in READERS[name](path))      # the files of a source are one
        seen = set() if name == "sharegpt" else None
        for key, messages, pieces in join_pieces(records) if name == "sharegpt" else ((key, m, 1) for key, m in records):
            row["in"] += pieces
            if pieces > 1:
                row["joined to another"] = row.get("joined to another", 0) + pieces - 1
            messages, reason = keep_or_reason(messages, seen, foreign)
            if reason:
                row[reason] = row.get(reason, 0) + 1
                dropped.append({"id": key, "source": name, "reason": reason})
                continue
            row["kept"] += 1
            row["turns"] += len(messages)
            kept.append({"id": key, "source": name, "messages": messages})
    write_jsonl(out, kept)
    write_jsonl(Path(out).with_name(Path(out).name.removesuffix(".jsonl") + ".dropped.jsonl"), dropped)
    return table


def print_table(rows, file=None):
    """Rows of strings as aligned columns; the first row is the header."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(str(cell).ljust(w) if i == 0 else str(cell).rjust(w) for i, (cell, w) in enumerate(zip(row, widths))), file=file)


# --- pack ------------------------------------------------------------------------------------------------------------------

_packer = None                                              # (tokenizer, template) of this worker process


def _start_packer(folder, template):
    global _packer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _packer = load_tokenizer(folder).add(SPECIAL[template]), template


def _pack_line(line):
    """One JSON line -> (ids as bytes, mask as bytes, None) or (None, None, (id, reason))."""
    tokenizer, template = _packer
    record = json.loads(line.decode("utf-8-sig"))
    if isinstance(record.get("text"), str):                                    # pre-training and replay: loss on every token
        ids = [tokenizer.bos, *tokenizer.encode(record["text"]), tokenizer.eos]
        mask = [1] * len(ids)
    else:
        ids, mask = render(check_messages(record, "line"), tokenizer, template)
    if not any(mask):
        return None, None, (record.get("id"), "no answer to learn from")
    return np.array(ids, _token_dtype(tokenizer.vocab_size)).tobytes(), np.array(mask, np.uint8).tobytes(), None


def _token_dtype(vocab_size):
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def pack(path, tokenizer_folder, template, out, seed=0, workers=None):
    """Pack conversations or {"text"} lines into one token stream (§4.1); returns the meta.json that it wrote.

    The order of conversations is a permutation drawn from `seed` alone, the same for every tokenizer, so that a prefix of
    the stream is a nested subset. Bytes do not depend on the number of `workers`.
    """
    for number, record in numbered_jsonl(path):   # a malformed line is found before anything is written
        if not isinstance(record.get("text"), str):
            check_messages(record, f"{path}:{number}")
    tokenizer = load_tokenizer(tokenizer_folder).add(SPECIAL[template])
    settings = {"template": template, "seed": seed, "source_hash": file_hash(path), "tokenizer_hash": tokenizer.hash}
    if same_settings(Path(out) / "meta.json", "settings", settings):
        print(f"{out}: packed already")
        return read_json(Path(out) / "meta.json")
    with open(path, "rb") as f, contextlib.ExitStack() as stack:
        if not os.fstat(f.fileno()).st_size:
            raise UserError(f"{path}: empty, nothing to pack")
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        offsets, at = [], 0
        while at < len(data):
            end = data.find(b"\n", at) + 1 or len(data)
            if data[at:end].strip():
                offsets.append((at, end))
            at = end
        order = np.random.default_rng(seed).permutation(len(offsets))
        lines = (data[slice(*offsets[i])] for i in order)
        workers = min(workers or os.cpu_count(), 1 + len(offsets) // 2000)
        if workers > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(workers, _start_packer, (str(tokenizer.folder), template)))
            packed = pool.imap(_pack_line, lines, chunksize=64)
        else:
            signal_before = signal.getsignal(signal.SIGINT)
            _start_packer(tokenizer.folder, template)
            signal.signal(signal.SIGINT, signal_before)
            packed = map(_pack_line, lines)
        folder = stack.enter_context(atomic_dir(out))
        tokens = stack.enter_context(open(folder / "tokens.bin", "wb"))
        masks = stack.enter_context(open(folder / "loss_mask.bin", "wb"))
        width, starts, dropped, n_tokens, n_loss = np.dtype(_token_dtype(tokenizer.vocab_size)).itemsize, [], [], 0, 0
        from tqdm import tqdm
        for ids, mask, drop in tqdm(packed, total=len(offsets), desc="pack", unit=" conv", disable=None):
            if drop:
                dropped.append({"id": drop[0], "reason": drop[1]})
                continue
            starts.append(n_tokens)
            n_tokens += len(mask)
            n_loss += mask.count(1)
            tokens.write(ids)
            masks.write(mask)
        if not starts:
            raise UserError(f"{path}: no conversation with an answer to learn from, nothing to pack")
        tokens.flush(), masks.flush()
        np.array(starts, np.int64).tofile(folder / "starts.bin")
        write_jsonl(folder / "dropped.jsonl", dropped)
        (folder / "tokenizer").mkdir()
        tokenizer.save(folder / "tokenizer")
        meta = {"name": Path(path).name.removesuffix(".jsonl"), "template": template, "seed": seed, "vocab_size": tokenizer.vocab_size, "bytes_per_token": width,
                "tokenizer_hash": tokenizer.hash, "tokenizer_base_hash": tokenizer.base_hash, "source_hash": settings["source_hash"], "settings": settings,
                "conversations": len(starts), "tokens": n_tokens, "loss_tokens": n_loss, "dropped": {"no answer to learn from": len(dropped)}}
        write_json(folder / "meta.json", meta)
    return meta


class Packed:
    """Packed data, memory-mapped: `tokens` and `loss_mask` (loss_mask[i] belongs to tokens[i] as a target), `starts`, `meta`."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / "meta.json").is_file():
            raise UserError(f"{folder}: no packed data there (no meta.json); make it with: python data.py pack FILE --tokenizer DIR --out {folder}")
        self.meta = read_json(self.folder / "meta.json")
        try:
            dtype = {2: np.uint16, 4: np.uint32}[self.meta["bytes_per_token"]]
            self.tokens = np.memmap(self.folder / "tokens.bin", dtype, "r")
            self.loss_mask = np.memmap(self.folder / "loss_mask.bin", np.uint8, "r")
            self.starts = np.fromfile(self.folder / "starts.bin", np.int64)
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{folder}: damaged packed data ({type(e).__name__}: {e}); pack again")
        if not len(self.tokens) == len(self.loss_mask) == self.meta["tokens"]:
            raise UserError(f"{folder}: tokens.bin and loss_mask.bin do not have the {self.meta['tokens']} tokens of meta.json; pack again")

    def tokenizer(self):
        return load_tokenizer(self.folder / "tokenizer")

    def block(self, i, length):
        """Block i: (inputs, targets, loss_mask), each (length,); targets are the inputs moved by one."""
        piece = slice(i * length, (i + 1) * length + 1)
        tokens, mask = self.tokens[piece], self.loss_mask[piece]
        return tokens[:-1], tokens[1:], mask[1:]

    def row(self, i, length):
        """Conversation i alone: (inputs, targets, loss_mask) of (length,), cut off or padded with zeros without loss."""
        end = self.starts[i + 1] if i + 1 < len(self.starts) else len(self.tokens)
        tokens, mask = np.zeros(length + 1, self.tokens.dtype), np.zeros(length + 1, np.uint8)
        n = min(length + 1, end - self.starts[i])
        tokens[:n] = self.tokens[self.starts[i]:self.starts[i] + n]
        mask[:n] = self.loss_mask[self.starts[i]:self.starts[i] + n]
        return tokens[:-1], tokens[1:], mask[1:]


def inspect(folder, n_blocks, length):
    """Print blocks as text: tokens with loss in colour (in «» where stdout is no terminal), control characters spelled out."""
    data = Packed(folder)
    tokenizer = data.tokenizer()
    names = {i: name for name, i in tokenizer.added.items()} | {tokenizer.bos: "<s>", tokenizer.eos: "</s>"}
    on, off = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("«", "»")
    for b in range(min(n_blocks, max(1, (len(data.tokens) - 1) // length))):
        tokens, mask = data.tokens[b * length:(b + 1) * length], data.loss_mask[b * length:(b + 1) * length]
        print(f"--- block {b}: {len(tokens)} tokens, {int(mask.sum())} with loss")
        cut = [0, *np.flatnonzero(np.diff(mask)) + 1, len(tokens)]
        for start, end in zip(cut, cut[1:]):
            text, at = "", start
            for i in range(start, end + 1):                 # special tokens by name, the text between them decoded whole
                if i == end or int(tokens[i]) in names:
                    text += visible(tokenizer.decode(tokens[at:i])) + (names[int(tokens[i])] if i < end else "")
                    at = i + 1
            print(f"{on}{text}{off}" if mask[start] else text, end="")
        print()


# --- the program -------------------------------------------------------------------------------------------------------------

def main():
    parser = Parser(description="Corpora in, packed tokens out.", example="python data.py pack chats.jsonl --tokenizer weights/llama7b --out data/chats")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    p = commands.add_parser("mix", help="ShareGPT-Mix from its sources", example="python data.py mix --sharegpt sg.json --hc3 all.jsonl --discord bots.csv --out mix.jsonl")
    for name in READERS:
        p.add_argument(f"--{name}", metavar="FILE", action="append", default=[], help=f"{name} file; may be given several times")
    p.add_argument("--out", required=True, help="conversations, JSON lines; FILE.dropped.jsonl is written beside it")
    p.add_argument("--any-language", action="store_true", help="keep dialogues that are not English")
    p.add_argument("--language-confidence", type=real, default=0.8, help="drop a dialogue when another language is this probable; not stated in the paper")

    p = commands.add_parser("pack", help="conversations or {text} lines into one token stream", example="python data.py pack mix.jsonl --tokenizer weights/llama7b --out data/mix")
    p.add_argument("file")
    p.add_argument("--tokenizer", required=True, metavar="DIR", help="folder with tokenizer.model, tokenizer.json, or GPT-2's encoder.json and vocab.bpe")
    p.add_argument("--template", choices=["tokens", "koala"], default="tokens", help="tokens: special tokens around turns (§4.1); koala: plain-text markers, which a query can imitate")
    p.add_argument("--out", required=True, metavar="DIR")
    p.add_argument("--seed", type=natural, default=0, help="of the order of conversations")
    p.add_argument("--workers", type=positive, help="tokenizing processes; None is one per core")

    p = commands.add_parser("inspect", help="blocks as text, loss tokens coloured", example="python data.py inspect data/mix --blocks 3")
    p.add_argument("dir")
    p.add_argument("--blocks", type=positive, default=2)
    p.add_argument("--block", type=positive, default=512, help="tokens a block")
    args = parser.parse_args()

    if args.command == "mix":
        sources = [(name, path) for name in READERS for path in getattr(args, name)]
        if not sources:
            parser.error("mix needs at least one of --" + ", --".join(READERS))
        table = mix(sources, args.out, None if args.any_language else language_filter(args.language_confidence))
        reasons = sorted({k for row in table.values() for k in row} - {"in", "kept", "turns"})
        columns = ["in", "kept", *reasons, "turns"]
        print_table([["source", *columns]] + [[name, *(row.get(c, 0) for c in columns)] for name, row in table.items()])
    elif args.command == "pack":
        meta = pack(args.file, args.tokenizer, args.template, args.out, args.seed, args.workers)
        print(f"{args.out}: {meta['conversations']} conversations, {meta['tokens']} tokens, {meta['loss_tokens']} with loss, "
              f"{sum(meta['dropped'].values())} dropped")
    else:
        inspect(args.dir, args.blocks, args.block)


if __name__ == "__main__":
    run(main)
