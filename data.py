"""Data: tokenizers, conversations and their loss mask, the corpora, cleaning, packing (paper §3, §4.1, Table 5).

    python data.py mix --sharegpt sharegpt.json --hc3 hc3.jsonl --discord discord.jsonl --out sharegpt-mix.jsonl
    python data.py pack sharegpt-mix.jsonl --tokenizer weights/llama7b --template tokens --out data/sharegpt-mix/llama7b
    python data.py inspect data/sharegpt-mix/llama7b

In this file, in the order in which text becomes training data:
    errors, files, command lines     what every program shares: one-line errors, flags, atomic writes, JSON lines, locks, worker processes, scores, figures
    tokenizers                       text <-> ids: SentencePiece, GPT-2's BPE by hand, any tokenizer.json; special tokens are never parsed out of text
    conversations -> ids             the two templates and the loss mask; files of conversations, prompts, replies and questions, read and checked
    corpora                          ShareGPT, HC3, Discord, Alpaca, messages, tl;dr, plain text
    mix                              ShareGPT-Mix: cleaning, deduplication, language filter, and who was dropped why
    BLEU between queries             an exact index of similar queries: diversity, held-out prompts
    pack                             one memory-mapped stream of tokens; blocks; inspect
    stats                            lengths, and kinds of query (Table 5)
    fetch                            public sets and base models
    the program                      mix, diversity, heldout, pack, inspect, stats, fetch
"""
import argparse
import collections
import contextlib
import csv
import errno
import fcntl
import functools
import glob
import gzip
import hashlib
import heapq
import html
import html.parser
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
import traceback
import unicodedata
import warnings
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm


# --- errors, files, command lines ---------------------------------------------------------------------------------------

class UserError(Exception):
    """A mistake that the user can mend; `run` prints each argument as one line and exits with `status`."""
    status = 2


class Failure(UserError):
    """A failure that is not the user's (a teacher that is down, a full disk): the same one line, exit status 1."""
    status = 1


def visible(text):
    """`text` with control characters spelled out, so that text from a model or a corpus cannot drive the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", lambda m: f"\\x{ord(m[0]):02x}", text)


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
        more = "; nothing finished is lost: free some space and run the same command again" if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
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
    """Say each message in a line on stderr; returns the status."""
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


def natural(text, least=0):
    """An argparse type: a whole number that is not negative; seeds, shots, steps."""
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}")
    return int(text)


positive = functools.partial(natural, least=1)


def real(text):
    """An argparse type: a finite number that is not negative; rates, temperatures, seconds."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value


def add_device_flags(parser):
    """The flags of every program that runs a model; model.py's pick_device and pick_dtype read them."""
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the computation; auto is bfloat16 on a GPU, float32 on a CPU")


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
    """Write a JSON file atomically."""
    with atomic(path) as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.write("\n")


def read_json(path):
    """The value of a JSON file; UserError where it is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not JSON ({e})")


def read_lines(path):
    """Yield (line number, text) of a UTF-8 file, gzipped where its name ends in .gz; bytes that are not UTF-8 are an error that names the line."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as f:
            for number, line in enumerate(f, 1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as e:
                    raise UserError(f"{path}:{number}: not UTF-8 ({e.reason})")
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path}: not a whole gzip file ({e})")


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


def json_line(record):
    """A record as a line of a JSON-lines file."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def write_jsonl(path, records):
    """Write a JSON-lines file atomically."""
    with atomic(path) as f:
        f.writelines(map(json_line, records))


def digest(*parts):
    """A short stable hash of JSON values; keys of requests, seeds of prompts, fingerprints of settings."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:24]


def file_hash(path):
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fingerprint(folder):
    """A short hash that tells checkpoints apart: names and sizes of the files, the first and the last MiB of each."""
    parts = []
    for path in sorted(p for p in Path(folder).iterdir() if p.suffix in (".safetensors", ".pth", ".model", ".json", ".txt", ".bpe") and p.name != "train.json"):
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
    """JSON lines appended one by one, from any thread; a line is on disk when `append` returns, or, without `flush`, when `flush` does.

    When the file is opened, a line torn by a kill is cut off and garbled ones are moved to PATH.garbled; both are said on stderr.
    `take(record, at)` meets each sound line and its place (for `read`), and calls one garbled by a ValueError, KeyError or
    TypeError; without it the lines gather in `records`.
    """

    def __init__(self, path, take=None):
        self.path, self.records, self.lock = Path(path), [], threading.RLock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open()
        take, self.size, garbled = take or (lambda record, at: self.records.append(record)), 0, []
        for number, line in enumerate(self.reader):
            if not line.endswith(b"\n"):
                print(f"{self.path}: a torn last line ({len(line)} bytes) was dropped", file=sys.stderr)
                self.file.truncate(self.reader.tell() - len(line))
                break
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError
                take(record, self.size)
                self.size += len(line)                     # places in the file as it is once repaired
            except (ValueError, KeyError, TypeError, RecursionError):
                garbled.append(number)
        if garbled:
            self._set_aside(set(garbled))
        self.flushed = self.size

    def _open(self):
        self.file = open(self.path, "ab+", buffering=0)    # unbuffered: nothing half written waits for another try
        self.reader = open(self.path, "rb")

    def _set_aside(self, garbled):
        aside = f"{self.path}.garbled"
        self.reader.seek(0)
        with atomic(self.path, "wb") as good, open(aside, "ab") as bad:
            for number, line in enumerate(self.reader):
                (bad if number in garbled else good).write(line)
        print(f"{self.path}: {len(garbled)} garbled line{'s'[:len(garbled) > 1]} moved to {aside}", file=sys.stderr)
        self.close()
        self._open()

    def append(self, *records, flush=True):
        """Write lines together; the place of the first."""
        lines = "".join(map(json_line, records)).encode("utf-8", "backslashreplace")
        with self.lock:
            at, rest = self.size, lines
            try:
                while rest:
                    rest = rest[self.file.write(rest):]
            except OSError as e:                           # a full disk: leave no half line behind
                e.filename = str(self.path)
                with contextlib.suppress(OSError):
                    self.file.truncate(at)
                raise
            self.size += len(lines)
        if flush:
            self.flush()
        return at

    def flush(self):
        """Return when all that was appended is on disk."""
        if self.flushed < (size := self.size):
            os.fdatasync(self.file.fileno())
            self.flushed = size

    def read(self, at):
        """The record at a place that `take` or `append` gave."""
        with self.lock:
            self.reader.seek(at)
            return json.loads(self.reader.readline())

    def close(self):
        for f in (self.file, self.reader):
            with contextlib.suppress(OSError):
                f.close()


_work = None                                               # what this worker process does with each item


def _start_worker(make):
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)           # the parent's to handle
    _work = make()


def _do_work(item):
    return _work(item)


@contextlib.contextmanager
def in_order(make, items, workers, start="spawn"):
    """An iterator of make()(item) in the order of `items`; each of `workers` processes calls make() once, and so does this one, to meet mistakes first."""
    work = make()
    if workers == 1:
        yield map(work, items)
    else:
        with multiprocessing.get_context(start).Pool(workers, _start_worker, (make,)) as pool:
            yield pool.imap(_do_work, items, 32)


def dying_with_parent():
    """A preexec_fn: the child is killed when its parent is (Linux), so that no orphan goes on writing its files."""
    if sys.platform != "linux":
        return None
    import ctypes
    libc = ctypes.CDLL(None)                               # loaded before the fork, where it is safe
    return lambda: libc.prctl(1, signal.SIGKILL)           # PR_SET_PDEATHSIG


def proportion(values):
    """{"score", "stderr", "n"} of the mean of numbers, stderr = sample standard deviation / √n, which the paper's bands seem to be too."""
    values = np.asarray(values, float)
    n = len(values)
    return {"score": float(values.mean()) if n else None, "stderr": float(values.std(ddof=1) / n ** 0.5) if n > 1 else None, "n": n}


def pyplot():
    """matplotlib's pyplot, drawing to files only; None, and a line on stderr, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return print("figures need matplotlib: pip install matplotlib", file=sys.stderr)
    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False         # a `$` in a name is a dollar
    warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for what the font lacks
    from matplotlib import pyplot
    return pyplot


def save_figure(plt, fig, path):
    """Write a figure as PNG and close it."""
    with atomic(path, "wb") as f:
        fig.savefig(f, dpi=150, format="png")
    plt.close(fig)


# --- tokenizers ---------------------------------------------------------------------------------------------------------

# §4.1: special tokens mark the start of each query and of each output. Their names are not stated in the paper; these are ours.
SPECIAL = {"tokens": ("<|user|>", "<|assistant|>"), "koala": (), "plain": ()}    # added to the vocabulary, per template


class Tokenizer:
    """What the three kinds share: `n_base` ids of their own, `bos`, `eos`, how they are called (`ends`), and `added`, {name: id} of the tokens that templates add.

    encode() treats its argument as ordinary text: neither control tokens (`</s>`, `<|endoftext|>`) nor the added ones are ever
    parsed out of it, so that text cannot forge a turn. Lone surrogates, which no UTF-8 text can hold, become U+FFFD.
    """
    silent = frozenset()                                   # ids without text, beside bos, eos and the added ones

    def add(self, names):
        """Add tokens to the vocabulary, behind those it has; returns itself."""
        for name in names:
            self.added.setdefault(name, self.vocab_size)
        return self

    @property
    def vocab_size(self):
        """Rows that an embedding needs."""
        return 1 + max([self.n_base - 1, *self.added.values()])

    @property
    def dtype(self):
        """The integers that hold its ids in packed data."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @property
    def names(self):
        """{id: name} of the special tokens that `render` puts between texts."""
        return {self.bos: self.ends["bos_token"], self.eos: self.ends["eos_token"]} | {i: name for name, i in self.added.items()}

    @property
    def hash(self):
        """Of the vocabulary with its added tokens: the ids of packed data depend on it."""
        return digest(self.base_hash, self.added)

    @functools.cached_property
    def space(self):
        """What makes a text that is encoded apart stand behind a space: nothing where encode() puts one there itself."""
        return "" if self.encode("a b") == self.encode("a") + self.encode("b") else " "

    def encode(self, text):
        """Ids of a text, without BOS and EOS."""
        return self._encode(text if text.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", text))

    def write_config(self, folder, template, tokens, **more):
        """tokenizer_config.json, as transformers, vLLM and llama.cpp's converter read it, with the chat template; `tokens` is tokenizer.json's added_tokens.

        transformers' LlamaTokenizer class takes tokenizer.json otherwise than it is: PreTrainedTokenizerFast does not.
        """
        more |= {"chat_template": CHAT_TEMPLATES[template]} if template in CHAT_TEMPLATES else {}
        write_json(Path(folder) / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", **self.ends, "clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"], **more,
            "added_tokens_decoder": {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in tokens}})

    def decode(self, ids):
        """Text of `ids`; special and added tokens have none, and the text between them is decoded piece by piece."""
        silent = {*self.names, *self.silent}
        runs = itertools.groupby(map(int, ids), lambda i: i < self.n_base and i not in silent)
        return "".join(self._decode(list(run)) for has_text, run in runs if has_text)


class WordCache(dict):
    """word -> its ids, from `encode` where it is missing; emptied at half a million words and without long ones, so that memory stays bounded."""

    def __init__(self, encode):
        self.encode = encode

    def __missing__(self, word):
        if len(self) >= 1 << 19:
            self.clear()
        ids = self.encode(word)
        return self.setdefault(word, ids) if len(word) <= 64 else ids

    def ids(self, words):
        return list(itertools.chain.from_iterable(map(self.__getitem__, words)))


class SentencePieceTokenizer(Tokenizer):
    """LLaMA's tokenizer: SentencePiece BPE with byte fallback; tokens added to the vocabulary follow its own pieces."""

    def __init__(self, folder):
        import sentencepiece
        self.folder = Path(folder)
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(self.folder / "tokenizer.model"))
            self.n_base, self.bos, self.eos = self.sp.vocab_size(), self.sp.bos_id(), self.sp.eos_id()
            self.ends = {"bos_token": self.sp.id_to_piece(self.bos), "eos_token": self.sp.id_to_piece(self.eos)}
        except (OSError, RuntimeError, IndexError) as e:
            raise UserError(f"{self.folder}/tokenizer.model: not a SentencePiece model, or without a token that begins or ends a text ({e})")
        added = self.folder / "added_tokens.json"
        self.added = read_json(added) if added.is_file() else {}
        if sorted(self.added.values()) != list(range(self.n_base, self.n_base + len(self.added))):
            raise UserError(f"{added}: ids of added tokens must follow the {self.n_base} pieces of tokenizer.model")
        by_words = not sentencepiece_oddity(self.sp)[0] and not any(re.search("[^▁]▁", self.sp.id_to_piece(i)) for i in range(self.n_base))
        self.words = WordCache(lambda word: self.sp.encode(word[1:]) or [self.sp.piece_to_id("▁")]) if by_words else None       # encode() puts the space back

    @property
    def base_hash(self):
        """Of the vocabulary without added tokens: says whether a checkpoint and packed data speak the same ids."""
        return digest(file_hash(self.folder / "tokenizer.model"))

    def _encode(self, text):
        if self.words is None or not text or "▁" in text:
            return self.sp.encode(text)
        return self.words.ids(re.findall(" *[^ ]+| +", " " + text))      # no piece reaches into the next word, so no merge does

    def _decode(self, ids):
        return self.sp.decode(ids)

    def save(self, folder):
        """Write what load_tokenizer reads back."""
        shutil.copyfile(self.folder / "tokenizer.model", Path(folder) / "tokenizer.model")
        write_json(Path(folder) / "added_tokens.json", self.added)

    def export(self, folder, template):
        """Write the model's own file and what other programs read beside it: tokenizer.json, since transformers reads a bare tokenizer.model differently."""
        self.save(folder)
        special = {i: self.sp.id_to_piece(i) for i in range(self.n_base) if self.sp.is_control(i) or self.sp.is_unknown(i)} | {i: name for name, i in self.added.items()}
        tokens = [{"id": i, "content": name, **SPECIAL_FLAGS} for i, name in sorted(special.items())]
        try:
            write_json(Path(folder) / "tokenizer.json", tokenizer_json(self.sp, tokens))
        except ValueError as e:
            print(f"{folder}: no tokenizer.json written, transformers may read tokenizer.model differently: {e}", file=sys.stderr)
        self.write_config(folder, template, tokens, unk_token=self.sp.id_to_piece(self.sp.unk_id()), add_bos_token=True, add_eos_token=False, add_prefix_space=True)


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


def sentencepiece_oddity(sp):
    """(what sets a SentencePieceProcessor apart from LLaMA's kind or None, the types of its pieces)."""
    message = list(_protobuf_fields(sp.serialized_model_proto()))
    trainer, normal, denormal = (dict(_protobuf_fields(dict(message).get(number, b""))) for number in (2, 3, 5))
    types = [dict(_protobuf_fields(value)).get(3, 1) for number, value in message if number == 1]
    return next((why for wrong, why in (
        (trainer.get(3, 1) != 2, "the model is not BPE"),
        (normal.get(2) or denormal.get(2), "it normalises text"),
        (not normal.get(3, 1) or trainer.get(24), "it has no dummy prefix"),
        (normal.get(4, 1), "it removes extra white space"),
        (not normal.get(5, 1), "it does not escape white space"),
        (set(types) - {1, 2, 3, 6}, "it has user-defined or unused pieces")) if wrong), None), types


def tokenizer_json(sp, added):
    """The tokenizer.json that gives a BPE SentencePieceProcessor's ids; `added`: its added_tokens, the model's own special ones among them.

    ValueError names what such a file cannot express. Each text between special tokens gets the dummy prefix, as encode() gives it.
    """
    oddity, types = sentencepiece_oddity(sp)
    pieces = [sp.id_to_piece(i) for i in range(len(types))]
    scores = {piece: sp.get_score(i) for i, (piece, kind) in enumerate(zip(pieces, types)) if kind == 1}
    ranked = sorted((score, piece) for piece, score in scores.items() if len(piece) > 1)
    for wrong, why in (
            (oddity, oddity),
            ({p for p, t in zip(pieces, types) if t == 6} != {f"<0x{b:02X}>" for b in range(256)}, "it has no byte fallback"),
            (not set("".join(scores)) <= scores.keys(), "a piece has a character that is no piece"),         # sentencepiece merges those too, a BPE over a vocabulary cannot
            (any(a == b and len(set(p + q)) > 1 for (a, p), (b, q) in zip(ranked, ranked[1:])), "two scores are equal")):     # it merges the leftmost of equals
        if wrong:
            raise ValueError(why)
    merges = [[p[:i], p[i:]] for p in scores for i in range(1, len(p)) if p[:i] in scores and p[i:] in scores]
    merges.sort(key=lambda m: (-scores[m[0] + m[1]], -len(m[0] + m[1]), -len(m[0])))      # runs of spaces, all of one score, grow from the left
    bos = pieces[sp.bos_id()]
    first, second = ([{"SpecialToken": {"id": bos, "type_id": n}}, {"Sequence": {"id": "AB"[n], "type_id": n}}] for n in (0, 1))
    return {"version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None,
            "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "post_processor": {"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": {bos: {"id": bos, "ids": [sp.bos_id()], "tokens": [bos]}}},
            "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": None, "unk_token": pieces[sp.unk_id()], "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
                      "ignore_merges": False, "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges}}


def ends_of(files, names):
    """{"bos_token": name, "eos_token": name}, those that the files of a checkpoint name or give the ids of; `names`: {name: id} of the vocabulary."""
    by_id, ends = {i: name for name, i in names.items()}, {}
    for values, end in itertools.product(files, ("bos_token", "eos_token")):
        name, i = values.get(end), values.get(f"{end}_id")
        name, i = name.get("content") if isinstance(name, dict) else name, i[0] if isinstance(i, list) and i else i      # LLaMA 3 lists several
        if found := name if name in names else by_id.get(i):
            ends.setdefault(end, found)
    return ends


class JSONTokenizer(Tokenizer):
    """A tokenizer.json (LLaMA 3, SmolLM2) through the `tokenizers` package.

    The package parses every added token out of text. Here only those that are white space (GPT-NeoX's runs of spaces, trained
    as ordinary pieces) still are; the others count as special, and special tokens as text.
    """

    def __init__(self, folder, spec):
        self.folder, self.spec, listed = folder, spec, spec["added_tokens"]
        names = {**spec["model"]["vocab"], **{t["content"]: t["id"] for t in listed}}
        if len(set(names.values())) < len(names) or not all(isinstance(i, int) and i >= 0 for i in names.values()):
            raise ValueError("ids must be whole numbers, each of one token")
        self.added = {t["content"]: t["id"] for t in listed if t["content"] in SPECIAL["tokens"]}
        self.silent = frozenset(t["id"] for t in listed if t["special"])
        self.n_base = 1 + max(i for name, i in names.items() if name not in self.added)
        files = {name: read_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json") if (folder / name).is_file()}
        ends = ends_of(files.values(), names)
        ends.setdefault("eos_token", "<|endoftext|>")      # GPT-2's files do not say
        ends.setdefault("bos_token", ends["eos_token"])
        if ends["eos_token"] not in names:
            raise UserError(f"{folder}: no file says which token ends a text; put {{\"eos_token\": \"…\"}} into {folder}/tokenizer_config.json")
        self.bos, self.eos, self.ends = names[ends["bos_token"]], names[ends["eos_token"]], ends
        own = files.get("tokenizer_config.json", {})
        self.own = {k: own[k] for k in ("unk_token", "pad_token", "model_max_length", "chat_template") if own.get(k)}
        if (folder / "chat_template.jinja").is_file():
            self.own["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        self.build(spec)

    def build(self, spec):
        """Make ready to encode what the tokenizer.json `spec` describes."""
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"{self.folder}/tokenizer.json is read through the tokenizers package: pip install tokenizers")
        tokens = [{**t, "special": t["special"] or not t["content"].isspace()} for t in spec["added_tokens"]]
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps({**spec, "truncation": None, "padding": None, "added_tokens": tokens}))
        except Exception as e:                             # the package raises nothing narrower
            raise UserError(f"{self.folder}/tokenizer.json: not a tokenizer ({e})")
        self.tokenizer.encode_special_tokens = True        # as text

    @functools.cached_property
    def base_hash(self):
        return digest(*(self.spec["model"][k] for k in ("vocab", "merges")), *(self.spec.get(k) for k in ("normalizer", "pre_tokenizer")))

    def _encode(self, text):
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if not self.silent.isdisjoint(ids):
            raise UserError(f"{self.folder}/tokenizer.json reads a special token out of plain text; such a tokenizer is not supported")
        return ids

    def _decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def export(self, folder, template=None):
        """Write tokenizer.json with the added tokens in it, and tokenizer_config.json."""
        known = {t["content"] for t in self.spec["added_tokens"]}
        tokens = self.spec["added_tokens"] + [{"id": i, "content": name, **SPECIAL_FLAGS} for name, i in self.added.items() if name not in known]
        write_json(Path(folder) / "tokenizer.json", {**self.spec, "added_tokens": tokens})
        self.write_config(folder, template, tokens, **self.own)

    save = export


@functools.cache
def gpt2_words(last):
    """The function that cuts text of code points up to `last` into GPT-2's words: 's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

    Letters and numbers are Python's: a character younger than its Unicode is neither. White space is Unicode's: re's \\s has U+001C to U+001F too.
    """
    categories = "".join(map(unicodedata.category, map(chr, range(last + 1))))                       # two letters each
    letters, numbers = ("".join(f"\\U{m.start() // 2:08x}-\\U{m.end() // 2 - 1:08x}" for m in re.finditer(f"(?:{kind}.)+", categories)) for kind in "LN")
    space = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    return re.compile(f"'(?:[stmd]|re|ve|ll)| ?[{letters}]+| ?[{numbers}]+| ?[^{space}{letters}{numbers}]+|[{space}]+(?![^{space}])|[{space}]+").findall


class GPT2Tokenizer(JSONTokenizer):
    """GPT-2's byte-level BPE by hand: a pattern cuts text into words, and the bytes of each are merged pair by pair, lowest rank first."""

    def build(self, spec):
        vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
        printable, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, itertools.count(256)
        byte_of = {chr(b if b in printable else next(others)): b for b in range(256)}                # how the files spell a byte
        if missing := byte_of.keys() - vocab.keys():
            raise UserError(f"{self.folder}: the vocabulary has no token for byte {min(map(byte_of.get, missing))}")
        for number, pair in enumerate(merges, 1):
            if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
                raise UserError(f"{self.folder}: merge {number} ({' '.join(pair)}) does not make two tokens of the vocabulary a third")
        if unmade := [t for t in vocab.keys() - {a + b for a, b in merges} - byte_of.keys() if not re.fullmatch(r"<.*>|\[.*\]", t)]:       # those are special tokens
            raise UserError(f"{self.folder}: no merge makes {len(unmade)} tokens of the vocabulary, such as {min(unmade)!r}; a file is cut off, or the two do not belong together")
        self.start = [vocab[symbol] for symbol in byte_of]
        self.rules = [(vocab[a], vocab[b], vocab[a + b]) for a, b in merges]
        self.ranks = {(a, b): rank for rank, (a, b, _) in enumerate(self.rules)}
        self.bytes = {i: bytes(map(byte_of.get, token)) if byte_of.keys() >= set(token) else token.encode() for token, i in vocab.items()}
        self.words = WordCache(self.merge)

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
            h, k = left[i], right[j]
            ids[i], ids[j], right[i], left[k] = new, None, k, i
            for at, pair in ((h, (ids[h], new)), (i, (new, ids[k]))):
                if (rank := get(pair)) is not None:
                    heapq.heappush(heap, rank * n + at)
        return [i for i in ids if i is not None]

    def _encode(self, text):
        astral = not text.isascii() and re.search("[\U00010000-\U0010ffff]", text)                   # classes beyond 16 bits slow re down
        return self.words.ids(gpt2_words(0x10FFFF if astral else 0xFFFF)(text))

    def _decode(self, ids):
        return b"".join(self.bytes.get(i, b"") for i in ids).decode("utf-8", "replace")


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
TOKENIZER_FILES = ("tokenizer.model",), ("tokenizer.json",), ("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")


def tokenizer_files(folder):
    """The files of a tokenizer that lie in `folder`, the first kind found; () where there are none."""
    return next((names for names in TOKENIZER_FILES if all((Path(folder) / name).is_file() for name in names)), ())


def gpt2_spec(vocab, merges):
    """The tokenizer.json of a vocabulary beside the file `merges`."""
    added = merges.with_name("added_tokens.json")
    added = {name: vocab[name] for name in ("<|endoftext|>",) if name in vocab} | (read_json(added) if added.is_file() else {})
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [{"id": i, "content": name, **SPECIAL_FLAGS} for name, i in added.items()],
            "normalizer": None, "pre_tokenizer": BYTE_LEVEL, "post_processor": None, "decoder": BYTE_LEVEL,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                      "merges": [line for number, line in read_lines(merges) if line and not (number == 1 and line.startswith("#version"))]}}


def load_tokenizer(folder):
    """The tokenizer of a checkpoint or of packed data, from the files found in `folder` (or of one of them given by name)."""
    folder = Path(folder)
    folder = folder.parent if folder.is_file() else folder
    files = tokenizer_files(folder)
    if not files:
        raise UserError(f"{folder}: {'no tokenizer in it' if folder.is_dir() else 'no such folder'}; give one with {', or '.join(' and '.join(names) for names in TOKENIZER_FILES)}")
    if files == ("tokenizer.model",):
        return SentencePieceTokenizer(folder)
    spec = read_json(folder / files[0])
    try:
        spec = gpt2_spec(spec, folder / files[1]) if len(files) == 2 else spec
        model, words = spec["model"], spec.get("pre_tokenizer") or {}
        if model.get("type", "BPE") != "BPE":
            raise UserError(f"{folder}/tokenizer.json: a tokenizer of type {model['type']!r}; only BPE is read")
        model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        if words.get("type") == "ByteLevel" and not words.get("add_prefix_space", True) and words.get("use_regex", True) and not spec.get("normalizer") and not any(
                model.get(k) for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")):
            return GPT2Tokenizer(folder, {**spec, "pre_tokenizer": BYTE_LEVEL})       # one spelling, so that GPT-2's tokenizer has one hash
        return JSONTokenizer(folder, spec)
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


# --- conversations -> ids -----------------------------------------------------------------------------------------------

def turns_of(messages):
    """(role, content) with a system message joined to the query that follows it: neither template has a place for one (not stated in the paper)."""
    turns, system = [], ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "system":
            system += content + "\n\n"
        elif role == "user":
            turns.append((role, system + content))
            system = ""
        else:
            turns += [("user", system.rstrip("\n"))] * bool(system) + [(role, content)]       # straight before an answer it is the query
            system = ""
    return turns + [("user", system.rstrip("\n"))] * bool(system)


def render(messages, tokenizer, template, answer=False):
    """A conversation as (ids, loss_mask); mask[i] = 1 where ids[i] is to be predicted: answers (§4.1) and the EOS that ends each (EasyLM).

    tokens: <s> (<|user|> query <|assistant|> answer </s>)*        §4.1: special tokens mark queries and outputs
    koala:  <s> "BEGINNING OF CONVERSATION: USER: q GPT:" a </s> ("USER: q GPT:" a </s>)*      Koala's plain-text markers
    Query and answer are tokenized apart, as in Koala. With `answer` the ids end where the model's answer begins.
    """
    if messages[0]["role"] == "text":                      # pre-training and replay, which the paper only suggests: loss on every token
        ids = [tokenizer.bos, *tokenizer.encode(messages[0]["content"]), tokenizer.eos]
        return ids, [1] * len(ids)
    ids, mask = [tokenizer.bos], [0]

    def put(new, loss=0):
        ids.extend(new)
        mask.extend([loss] * len(new))

    if template == "tokens":
        for role, content in turns_of(messages):
            put([tokenizer.added[f"<|{role}|>"]])
            put(tokenizer.encode(content), int(role == "assistant"))
            if role == "assistant":
                put([tokenizer.eos], 1)
        if answer:
            put([tokenizer.added["<|assistant|>"]])
    else:
        context = ["BEGINNING OF CONVERSATION:"]           # what the next answer is put behind, all in one piece
        for role, content in turns_of(messages):
            if role == "user":
                context.append(f"USER: {content}")
            else:
                put(tokenizer.encode(" ".join([*context, "GPT:"])))
                put([*tokenizer.encode(tokenizer.space * bool(content) + content), tokenizer.eos], 1)       # "GPT: answer"
                context = []
        if context := context + ["GPT:"] * answer:
            put(tokenizer.encode(" ".join(context)))
    return ids, mask


CHAT_TEMPLATES = {   # `render` once more in Jinja, for transformers and vLLM; text is parsed there, so that it can forge special tokens
    "tokens": "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}{% set ns.system = ns.system + m['content'] + '\n\n' %}"
              "{% elif m['role'] == 'user' %}{{ '<|user|>' + ns.system + m['content'] }}{% set ns.system = '' %}{% else %}{{ '<|assistant|>' + m['content'] + eos_token }}{% endif %}"
              "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    "koala": "{{ bos_token }}{% set ns = namespace(text='BEGINNING OF CONVERSATION:', system='') %}{% for m in messages %}{% if m['role'] == 'system' %}{% set ns.system = ns.system + m['content'] + '\n\n' %}"
             "{% elif m['role'] == 'user' %}{% set ns.text = ns.text + (' ' if ns.text else '') + 'USER: ' + ns.system + m['content'] %}{% set ns.system = '' %}"
             "{% else %}{{ ns.text + (' ' if ns.text else '') + 'GPT:' + (' ' if m['content'] else '') + m['content'] + eos_token }}{% set ns.text = '' %}{% endif %}{% endfor %}{{ ns.text }}{% if add_generation_prompt %}{{ (' ' if ns.text else '') + 'GPT:' }}{% endif %}",
}


def check_messages(record, where, text=False):
    """The messages of a record, validated; `where` names the line in errors. With `text`, a {"text"} record is one message of the role "text"."""
    if text and isinstance(record.get("text"), str):
        return [{"role": "text", "content": record["text"]}]
    messages = record.get("messages")
    if messages is None and isinstance(record.get("prompt"), str):       # a bare prompt is a conversation of one turn
        messages = [{"role": "user", "content": record["prompt"]}]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: no field 'messages' (nor 'prompt')")
    for m in messages:
        if not isinstance(m, dict) or m.get("role") not in ("user", "assistant", "system") or not isinstance(m.get("content"), str):
            raise UserError(f"{where}: each message needs a role (user, assistant, system) and a text content")
    return messages


def conversations(path, *fields, text=False):
    """Yield (line number, record, messages) of a file of conversations, prompts or, with `text`, plain texts."""
    for number, record in numbered_jsonl(path, *fields):
        yield number, record, check_messages(record, f"{path}:{number}", text)


def queries_of(messages):
    """The user turns' texts."""
    return [m["content"] for m in messages if m["role"] == "user"]


def read_prompts(path):
    """Prompts file (`messages`, or a bare `prompt`) as [{"id", "messages", …}]; ids must be unique."""
    prompts = {}
    for number, record, messages in conversations(path):
        key = str(record.get("id", f"{Path(path).stem}-{number}"))
        if key in prompts:
            raise UserError(f"{path}:{number}: id {key!r} stands twice; ids must be unique")
        prompts[key] = {**record, "id": key, "messages": messages}
    if not prompts:
        raise UserError(f"{path}: no prompts in it")
    return list(prompts.values())


def read_replies(path):
    """Replies file as {id: (query, answer, record)}; the last message is the answer."""
    replies = {}
    for number, record, messages in conversations(path, "id"):
        if messages[-1]["role"] != "assistant":
            raise UserError(f"{path}:{number}: the last message is not an answer; replies come from `imitation.py collect` or `model.py generate`")
        if not isinstance(record["id"], str) or record["id"] in replies:
            raise UserError(f"{path}:{number}: id {record['id']!r} must be a text that stands once")
        replies[record["id"]] = (queries_of(messages) or [""])[-1], messages[-1]["content"], record
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


# --- corpora ------------------------------------------------------------------------------------------------------------

def json_records(path, strict=False):
    """The records of a JSON array or of JSON lines, streamed: memory holds one record and a buffer, not the file.

    A file that breaks off gives its whole records and one line on stderr with their number and the byte where the torn one begins;
    with `strict` that line is an error, as a malformed record always is.
    """
    decoder, blank = json.JSONDecoder(), re.compile(r"[\s,]*")
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as f:      # every byte keeps its length, so that places can be told in bytes
        buffer, n, line, before = f.read(1 << 20), 0, 1, 0
        at = re.match(r"\ufeff?\s*\[?", buffer).end()
        array = buffer[:at].endswith("[")
        while True:
            at = blank.match(buffer, at).end()
            if array and buffer[at:at + 1] == "]":
                return
            try:
                record, end = decoder.raw_decode(buffer, at)
            except RecursionError:
                raise UserError(f"{path}: record {n + 1} is nested too deeply to read")
            except json.JSONDecodeError as e:
                place = lambda i: before + len(buffer[:i].encode("utf-8", "surrogateescape"))
                if e.pos < len(buffer) - 10 and not e.msg.startswith("Unterminated string"):           # not the end of the buffer's doing
                    raise UserError(f"{path}:{line + buffer.count(chr(10), 0, e.pos)}: not JSON at byte {place(e.pos)}, after {n} whole records ({e.msg})")
                if piece := f.read(max(1 << 20, len(buffer) - at)):                                     # a giant record is tried again at each doubling only
                    before, line = place(at), line + buffer.count("\n", 0, at)
                    buffer, at = buffer[at:] + piece, 0
                    continue
                if at == len(buffer) and not array:
                    return
                message = f"{path}: breaks off after {n} whole records, at byte {place(at)}"
                if strict:
                    raise UserError(message)
                return print(f"{message}; what follows is lost (--strict makes this an error)", file=sys.stderr)
            at, n = end, n + 1
            yield record


def corpus_records(path, strict=False):
    """The records of a corpus file: csv with a header, plain text (.txt: a document a paragraph), else JSON."""
    if Path(path).suffix not in (".csv", ".txt"):
        yield from json_records(path, strict)
        return
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as f:
        if Path(path).suffix == ".txt":
            yield from ({"text": "".join(lines)} for full, lines in itertools.groupby(f, lambda line: bool(line.strip())) if full)
            return
        csv.field_size_limit(1 << 30)
        try:
            yield from csv.DictReader(f)
        except csv.Error as e:
            raise UserError(f"{path}: not csv ({e})")


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "assistant": "assistant", "system": "system"}
PAIR_FIELDS = (("input", "output"), ("prompt", "response"), ("question", "answer"), ("user", "bot"))      # Discord bots' logs


def message_of(turn):
    """A turn of ShareGPT's or the OpenAI tools' as a message of ours; None where it is malformed."""
    role, text = (ROLES.get(str(turn.get("from", turn.get("role"))).lower()), turn.get("value", turn.get("content"))) if isinstance(turn, dict) else (None, None)
    return {"role": role, "content": text} if role and isinstance(text, str) else None


def pair_of(query, answer):
    """A dialogue of one query and its answer; [None] where one of them is no text."""
    return [{"role": "user", "content": query}, {"role": "assistant", "content": answer}] if isinstance(query, str) and isinstance(answer, str) else [None]


def dialogues_of(record):
    """The dialogues of a record, told by its fields: [messages], several for HC3; None where it has none of these.

    {"conversations" or "items": [{"from", "value"}]}    ShareGPT       {"messages": [{"role", "content"}]}      ours and the OpenAI tools'
    {"question", "chatgpt_answers"}: the ChatGPT side alone (§3), every answer an example of its own             HC3
    {"instruction", "input", "output"}                   Alpaca         {"post", "summary"}                      Reddit tl;dr
    a pair of PAIR_FIELDS                                Discord        {"text"}, as one message of role "text"  pre-training, replay
    In place of a malformed message stands None.
    """
    if not isinstance(record, dict):
        return None
    for field in ("messages", "conversations", "items"):
        if field in record:
            return [[message_of(turn) for turn in record[field]] if isinstance(record[field], list) else [None]]
    if "chatgpt_answers" in record:
        answers = record["chatgpt_answers"]
        return [pair_of(record.get("question"), answer) for answer in (answers if isinstance(answers, list) and answers else [None])]
    if "instruction" in record:
        return [pair_of("\n\n".join(t for t in (record["instruction"], record.get("input")) if isinstance(t, str) and t), record.get("output"))]
    if "post" in record and "summary" in record:
        return [pair_of(isinstance(record["post"], str) and f"{record['post']}\n\nTL;DR:", record["summary"])]       # not stated in the paper; GPT-2's words for it
    for query, answer in PAIR_FIELDS:
        if query in record and answer in record:
            return [pair_of(record[query], record[answer])]
    return [[{"role": "text", "content": record["text"]}]] if isinstance(record.get("text"), str) else None


def read_corpus(path, source, strict=False):
    """Yield (id, messages) of a corpus file in any of the formats of `dialogues_of`."""
    for number, record in enumerate(corpus_records(path, strict)):
        dialogues = dialogues_of(record)
        if dialogues is None and number == 0:
            raise UserError(f"{path}: no conversation in its first record; found {', '.join(map(repr, record)) if isinstance(record, dict) else type(record).__name__}, see python data.py mix --help")
        key = record.get("id") if isinstance(record, dict) else None
        key = f"{source}-{Path(path).stem}-{number}" if key is None else str(key)
        for k, messages in enumerate(dialogues or [[None]]):
            yield (f"{key}-{k}" if dialogues and len(dialogues) > 1 else key), messages


SOURCES = {"sharegpt": "ShareGPT: JSON array or JSON lines of {id, conversations or items: [{from, value}]}", "hc3": "HC3: JSON lines of {question, chatgpt_answers}",
           "discord": "Discord bots: pairs of input and output, JSON lines or csv with a header",
           "other": "any other set, told by its fields: messages, instruction/input/output (Alpaca), post/summary (tl;dr), text; or plain text, .txt, a document a paragraph"}


# --- mix: ShareGPT-Mix (§3) ---------------------------------------------------------------------------------------------
# The paper: ~90k ShareGPT dialogues, deduplicated by query and without what is not English, leave ~50k; with them HC3's ~27k ChatGPT
# answers and 10k pairs of Discord bots. How a page became text, what counts as the same query, and the detector are not stated.

class _Markdown(html.parser.HTMLParser):
    """The text of a ShareGPT page as Markdown: line breaks, headings, lists, bold and code kept, every other tag dropped."""
    MARKS = {"br": "\n", "p": "\n\n", "/p": "\n\n", "pre": "\n```\n", "/pre": "\n```\n", "code": "`", "/code": "`", "strong": "**", "/strong": "**", "tr": "\n", "td": " | ", "th": " | ",
             "/ul": "\n", "/ol": "\n", **{f"h{n}": "\n\n" + "#" * n + " " for n in range(1, 7)}, **{f"/h{n}": "\n\n" for n in range(1, 7)}}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.out, self.lists, self.pre = [], [], False       # of each open list the number of its next item, 0 where it has none
        self.handle_data, self.handle_endtag = self.out.append, lambda tag: self.handle_starttag("/" + tag, ())

    def handle_starttag(self, tag, attrs):
        self.pre = tag == "pre" or self.pre and tag != "/pre"
        if tag in ("ul", "ol"):
            self.lists.append(int(tag == "ol"))
        elif tag in ("/ul", "/ol"):
            self.lists = self.lists[:-1]
        elif tag == "li":
            n = self.lists[-1] if self.lists else 0
            self.out.append("\n" + "   " * (len(self.lists) - 1) + (f"{n}. " if n else "- "))
            self.lists[-1:] = [n + bool(n)]
        self.out.append("" if self.pre and tag.endswith("code") else self.MARKS.get(tag, ""))


PAGE = re.compile(r'\s*<(p|pre|ul|ol|table|h[1-6]|blockquote)>|\s*<div class="[^"]*\b(markdown|prose)\b')     # code that someone pasted has no such start and end


def clean(text):
    """Text of a turn without the residue of the web page it was copied from: HTML, buttons ("Copy code", "Share Prompt"), pagers ("2 / 2").

    Lone surrogates, which no UTF-8 text can hold, become U+FFFD.
    """
    text = re.sub("[\ud800-\udfff]", "\ufffd", text).replace("\r\n", "\n").strip()
    if PAGE.match(text) and re.search(r"</\w+>\Z", text):
        parser = _Markdown()
        parser.feed(text)
        parser.close()
        text = re.sub(r"\n{3,}", "\n\n", "".join(parser.out)).strip()
    text = re.sub(r"(?m)^(?:(```)\n?)?[ \t]*(?:([\w+#-]+)Copy code|Copy code(?![ \t]+\S))[ \t]*`?\n?", lambda m: f"{m[1]}{m[2] or ''}\n" if m[1] else "", text)
    text = re.sub(r"\A\d+ / \d+\n|\n\d+ / \d+\Z", "", text.removesuffix("Share Prompt").strip())
    return text.strip()


def normalize_query(text):
    """What query-level deduplication (§3) compares: case, width and white space set aside, which is ours."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def join_pieces(dialogues):
    """Yield (id, messages, number of pieces): ShareGPT dumps cut long dialogues into pieces ID_0, ID_1, …; they are put together again, in order.

    A piece often begins with the answer that ended the one before: it is taken once. As any piece may be the last of its dialogue,
    all wait, compressed, until the file is read.
    """
    waiting, counts = {}, collections.Counter()
    for key, messages in dialogues:
        match = re.fullmatch(r"(.+)_(\d+)", key)
        stem, number = (match[1], int(match[2])) if match else (key, 0)
        while messages and waiting.get(stem, {}).get(number):                  # another dialogue of the same name stays one of its own
            stem += "'"
        counts[stem] += 1
        parts = waiting.setdefault(stem, {})
        parts[number] = zlib.compress(json.dumps(messages).encode(), 1) if messages else parts.get(number)
    for stem, parts in waiting.items():
        whole = []
        for number in sorted(parts):
            messages = json.loads(zlib.decompress(parts[number])) if parts[number] else []
            whole += messages[bool(whole and messages and messages[0] == whole[-1]):]
        yield stem, whole, counts[stem]


def language_filter(confidence):
    """A function text -> True where another language than English is identified with at least `confidence` (§3); None lets all pass.

    The detector is not stated in the paper; py3langid, since it is small and its model comes with it.
    """
    if confidence is None:
        return lambda text: False
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError("the language filter needs py3langid: pip install py3langid, or pass --any-language")
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def foreign(text):
        language, probability = identifier.classify(text[:5000])
        return language not in ("en", "zxx") and probability >= confidence            # zxx: no language, which is code or numbers
    return foreign


def keep_or_reason(messages, foreign, mentions):
    """(cleaned messages, None) or (None, reason); `mentions` is a pattern that no turn may match."""
    if None in messages:
        return None, "malformed"
    messages = [{**m, "content": clean(m["content"])} for m in messages]
    messages = [m for m in messages if m["content"]]                      # an empty turn says nothing and ends nothing
    while messages and messages[-1]["role"] not in ("assistant", "text"):               # a query nobody answered teaches nothing
        messages.pop()
    if not any(m["role"] in ("user", "text") for m in messages):
        return None, "empty"
    if mentions and any(mentions.search(m["content"]) for m in messages):
        return None, "mention"
    if foreign("\n".join(m["content"] for m in messages)):
        return None, "not English"
    return messages, None


def mixer(confidence, mentions):
    """What each process of `mix` does with a dialogue."""
    foreign = language_filter(confidence)

    def judge(dialogue):
        name, key, messages, pieces = dialogue
        return name, key, pieces, *keep_or_reason(messages, foreign, mentions)
    return judge


def measure(tokenizer):
    """(unit, messages -> length): tokens as `pack` makes them with the template `tokens`; words where no tokenizer folder is given."""
    if tokenizer is None:
        return "words", lambda messages: sum(len(m["content"].split()) for m in messages)
    tokenizer = load_tokenizer(tokenizer).add(SPECIAL["tokens"])
    return "tokens", lambda messages: len(render(messages, tokenizer, "tokens")[0])


KOALA_MARKERS = re.compile(r"\b(USER|GPT):|BEGINNING OF CONVERSATION:")


def dropped_path(out):
    """Where it is said what was dropped from the file `out`, and why."""
    return Path(out).with_name(Path(out).name.removesuffix(".jsonl") + ".dropped.jsonl")


def mix(sources, out, confidence=None, dedup="first", mentions=None, tokenizer=None, strict=False, held_out=None, workers=None):
    """Write ShareGPT-Mix and `dropped.jsonl` beside it, streaming; return {source: {"in", "kept", "dropped": {reason: n}, "turns", …}}.

    `sources` is [(name, path)]; in = kept + the sum of dropped, where a piece that was joined to another counts as "joined". With dedup
    `first` a dialogue is dropped whose first query began another, with `all` one whose every query has been met: whole dialogues, and
    within ShareGPT alone, since HC3 has several answers to one question on purpose. The paper says "query level" and no more.
    `confidence` None keeps all languages.
    `held_out`: a file of prompts; dialogues with a query like one of them are dropped (ours).
    """
    unit, length = measure(tokenizer)
    table = {name: {"in": 0, "kept": 0, "dropped": collections.Counter(), "turns": 0, unit: 0, "koala markers": 0} for name, _ in sources}
    workers = workers or (os.cpu_count() if sum(os.stat(path).st_size for _, path in sources) > 20 << 20 else 1)      # the language filter is most of the work

    def dialogues():
        for name in table:
            records = (record for other, path in sources if other == name for record in read_corpus(path, name, strict))      # the files of a source are one
            for key, messages, pieces in join_pieces(records) if name == "sharegpt" else ((key, messages, 1) for key, messages in records):
                yield name, key, messages, pieces
    met = set()
    with in_order(functools.partial(mixer, confidence, mentions), dialogues(), workers) as mixed, atomic(out) as keep, atomic(dropped_path(out)) as drop:
        mixed = without_held_out(mixed, held_out) if held_out else mixed
        for name, key, pieces, messages, reason in tqdm(mixed, desc="mix", unit=" dialogues", disable=None):
            row = table[name]
            row["in"] += pieces
            row["dropped"].update({"joined": pieces - 1} if pieces > 1 else ())
            if not reason and name == "sharegpt" and dedup != "none":
                queries = {normalize_query(q) for q in queries_of(messages)[:1 if dedup == "first" else None]}
                reason = "duplicate query" if queries <= met else None
                met |= queries if not reason else set()
            if reason:
                row["dropped"][reason] += 1
                drop.write(json_line({"id": key, "source": name, "reason": reason}))
                continue
            row["kept"] += 1
            row[unit] += length(messages)
            row["turns"] += sum(m["role"] != "text" for m in messages)
            row["koala markers"] += sum(bool(KOALA_MARKERS.search(q)) for q in queries_of(messages))
            content = {"text": messages[0]["content"]} if messages[0]["role"] == "text" else {"messages": messages}
            keep.write(json_line({"id": key, "source": name, **content}))
    return table


def print_table(rows):
    """Rows of cells as aligned columns; the first row is the header."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(str(cell).ljust(w) if i == 0 else str(cell).rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))


def print_mix(table):
    """What `mix` returns, a row a source, and all together where there are several."""
    if len(table) > 1:
        rows = list(table.values())
        table["all"] = {k: sum((row[k] for row in rows), type(v)()) for k, v in rows[0].items()}
    reasons = sorted({reason for row in table.values() for reason in row["dropped"]})
    others = [k for k in next(iter(table.values())) if k not in ("in", "kept", "dropped")]
    print_table([["source", "in", "kept", *reasons, *others],
                 *([name, row["in"], row["kept"], *(row["dropped"][r] for r in reasons), *(row[k] for k in others)] for name, row in table.items())])


# --- BLEU between queries: diversity (§3), held-out prompts (§4) --------------------------------------------------------

def bleu_tokens(text):
    """sacrebleu's default tokenization, 13a (NIST's mteval-v13a): punctuation stands apart, except inside numbers."""
    text = text.rstrip()
    for old, new in (("<skipped>", ""), ("-\n", ""), ("\n", " "), ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(old, new)
    for pattern, spaced in ((r"([{-~[-` -&(-+:-@/])", r" \1 "), (r"([^0-9])([.,])", r"\1 \2 "), (r"([.,])([^0-9])", r" \1 \2"), (r"([0-9])(-)", r"\1 \2 ")):
        text = re.sub(pattern, spaced, f" {text} ")
    return text.split()


def bleu(matches, length, reference_lengths):
    """Sentence-BLEU in percent as (exp, none), each (references,), of a hypothesis of `length` tokens, from its clipped matches, (orders, references).

    Up to 4-grams, effective order: min(4, length) rows. Orders that match nothing get 1/2, 1/4, … of a match under exp; with none BLEU is 0.
    """
    matched = matches > 0
    precision = np.where(matched, matches, 0.5 ** np.cumsum(~matched, 0)) / (length - np.arange(len(matches)))[:, None]
    score = 100 * np.exp(np.minimum(0, 1 - reference_lengths / length) + np.log(precision).mean(0))       # the first term is the brevity penalty
    return np.where(matched[0], score, 0), np.where(matched[-1], score, 0)


class BleuIndex:
    """Sentence-BLEU of each text (the hypothesis) with each other (the one reference): exact, sacrebleu's figures.

    How it works. The k-th occurrence of an n-gram in a text is a key of its own, so that a clipped match, min(count, count), is a
    key in common, and a text's matches with all others are a histogram of its keys' posting lists. Orders 2 to 4 have short lists
    and are counted so. Words have long ones: at first as many as the lengths allow are taken to match, which bounds BLEU from above;
    they are counted from the highest bound down, while a bound exceeds the best score met. All texts without a pair of words in
    common are under one bound; where the best is too (short texts), the words of all are counted.
    It rests on this: more matches never lower BLEU, and an order without matches has none above it. What would break it is the time,
    not the result: it grows with the square of the texts that share one long passage. Memory: 250 bytes a token while it is built, 32 after.
    """

    def __init__(self, texts):
        words = {}
        tokens = [np.array([words.setdefault(w, len(words)) for w in bleu_tokens(text)], np.int64) for text in texts]
        self.lengths, tokens = np.array([len(t) for t in tokens], np.int64), np.concatenate([np.zeros(0, np.int64), *tokens])
        owner = np.repeat(np.arange(len(self.lengths)), self.lengths)
        left = np.repeat(np.cumsum(self.lengths), self.lengths) - np.arange(len(tokens))       # tokens from here to the end of the text
        self.orders, at, grams = [], np.arange(len(tokens)), tokens
        for n in range(1, 5):
            if n > 1:                                      # an n-gram: the (n-1)-gram it begins with, and its last token
                fits = left[at] >= n
                at = at[fits]
                grams = np.unique(grams[fits] * len(words) + tokens[at + n - 1], return_inverse=True)[1]
            order = np.argsort(grams, kind="stable")       # by n-gram, then by text
            gram, text, place = grams[order], owner[at[order]], np.arange(len(at))
            first = (np.diff(gram, prepend=-1) != 0) | (np.diff(text, prepend=-1) != 0)
            occurrence = place - np.maximum.accumulate(np.where(first, place, 0))
            _, key, shared = np.unique(gram * (occurrence.max(initial=0) + 1) + occurrence, return_inverse=True, return_counts=True)
            kept = shared[key] > 1                         # what one text alone has matches nothing
            key, text = (np.cumsum(shared > 1) - 1)[key[kept]], text[kept]
            self.orders.append((text[np.argsort(key, kind="stable")].astype(np.int32), np.cumsum([0, *shared[shared > 1]]),
                                key[np.argsort(text, kind="stable")].astype(np.int32), np.cumsum([0, *np.bincount(text, minlength=len(self.lengths))])))

    def keys(self, n, i):
        _, _, keys, start = self.orders[n - 1]
        return keys[start[i]:start[i + 1]]

    def matches(self, i, orders):
        """Clipped matches of text i with every text, (orders, texts); with itself 0."""
        rows = np.zeros((len(orders), len(self.lengths)), np.int64)
        for row, n in zip(rows, orders):
            texts, start, _, _ = self.orders[n - 1]
            lists = [texts[start[k]:start[k + 1]] for k in self.keys(n, i)]
            row += np.bincount(np.concatenate([texts[:0], *lists]), minlength=len(row))
        rows[:, i] = 0
        return rows

    def scores(self, i):
        """(exp, none) of text i with every text, each (texts,); with itself 0."""
        length = self.lengths[i]
        return bleu(self.matches(i, range(1, min(4, length) + 1)), length, self.lengths) if length else np.zeros((2, len(self.lengths)))

    def best(self, i):
        """(exp, none): the highest of scores(i), most of which are never computed."""
        length, exp, none = self.lengths[i], 0.0, 0.0
        if length > 1:
            matches = self.matches(i, range(2, min(4, length) + 1))
            others = np.flatnonzero(matches[0])
            lengths = self.lengths[others]
            matches = np.vstack([np.minimum(length, lengths), matches[:, others]])
            bound, mine = bleu(matches, length, lengths)[0], np.zeros(len(self.orders[0][1]), bool)
            mine[self.keys(1, i)] = True
            while len(open_ := np.flatnonzero((bound > exp) | (bound > none) & (matches[-1] > 0))):
                top = open_[np.argpartition(-bound[open_], min(32, len(open_) - 1))[:32]]
                matches[0, top] = [np.count_nonzero(mine[self.keys(1, j)]) for j in others[top]]
                found = bleu(matches[:, top], length, lengths[top])
                exp, none, bound[top] = max(exp, found[0].max()), max(none, found[1].max()), -1
        if length and exp < bleu(np.array([[length], [0], [0], [0]])[:length], length, length)[0]:
            exp, none = (s.max() for s in self.scores(i))
        return float(exp), float(none)


def diversity(path, first_turn=False, workers=None):
    """§3's measure of a data set, as results.json's content: BLEU, in percent, of each user query to the most similar other, averaged.

    Not stated in the paper: the variant of BLEU, and what a query is. Ours: the distinct normalised user turns, or first turns;
    their exact twins are only counted.
    """
    turns = [normalize_query(q) for _, _, messages in conversations(path) for q in queries_of(messages)[:1 if first_turn else None]]
    queries = list(dict.fromkeys(filter(None, turns)))
    if len(queries) < 2:
        raise UserError(f"{path}: fewer than two distinct user queries, nothing to compare")
    index = BleuIndex(queries)
    with in_order(lambda: index.best, range(len(queries)), workers or os.cpu_count(), "fork") as best:      # by fork the processes share the index
        best = np.array(list(tqdm(best, total=len(queries), desc="diversity", unit=" queries", disable=None)))
    scores = dict(zip(("bleu_exp", "bleu_none"), best.T))
    return {"task": "diversity", "model": Path(path).stem,
            "metrics": {k: proportion(s) for k, s in scores.items()},
            "settings": {"source_hash": file_hash(path), "first_turn": first_turn, "order": 4, "tokenization": "13a", "effective_order": True},
            "user_turns": len(turns), "empty": turns.count(""), "twins": len(turns) - turns.count("") - len(queries),
            "histogram": {k: np.bincount(np.minimum(s // 10, 9).astype(int), minlength=10).tolist() for k, s in scores.items()}}


def show_diversity(result):
    """Print what `diversity` returns, with the paper's figures (§3) and a histogram."""
    (exp, none), bars = result["metrics"].values(), list(zip(*result["histogram"].values()))
    print(f"{exp['n']} distinct queries of {result['user_turns']} user turns; set aside: {result['twins']} exact twins, {result['empty']} empty")
    print(f"BLEU to the most similar other query, mean: {exp['score']:.2f}% with smoothing exp, {none['score']:.2f}% with none (paper: ShareGPT-Mix 8%, Super-NaturalInstructions 61%)")
    print_table([["BLEU", "exp", "none", "exp"]] + [[f"{10 * i}-{10 * i + 10}", *pair, f"{'#' * -(-40 * pair[0] // max(bars)[0]):40}"] for i, pair in enumerate(bars)])


def too_similar(prompts, examples, limit=20.0):
    """(indices of prompts, indices of examples) with BLEU > `limit` percent (§4: 20) to one of the other side; both are lists of lists of queries.

    Not stated in the paper: the variant. Ours: the hypothesis is the prompt, the reference the training query, both normalised;
    smoothing is exp, under which more is similar.
    """
    sides = [[(i, normalize_query(q)) for i, queries in enumerate(side) for q in queries] for side in (prompts, examples)]
    index, near = BleuIndex([q for side in sides for _, q in side]), (set(), set())
    for h, (i, _) in enumerate(sides[0]):
        found = np.flatnonzero(index.scores(h)[0][len(sides[0]):] > limit)
        if len(found):
            near[0].add(i)
        near[1].update(sides[1][k][0] for k in found)
    return near


def without_held_out(mixed, prompts):
    """Pass (name, id, pieces, messages, reason) on, with a reason where a query is too similar to a prompt of the file `prompts`."""
    prompts, mixed = [queries_of(p["messages"]) for p in read_prompts(prompts)], iter(mixed)
    while batch := list(itertools.islice(mixed, 5000)):
        near = too_similar(prompts, [[] if reason else queries_of(messages) for *_, messages, reason in batch])[1]
        yield from ((*dialogue, "like a held-out prompt" if i in near else reason) for i, (*dialogue, reason) in enumerate(batch))


CODING = re.compile(   # code itself (a fence, statements, closing tags, calls), a language by name, or a wish for code
    r"```|^[ \t]*(?:def \w+\(|class \w+[:({]|import [\w.]+[ \t]*(?:;|as |$)|from [\w.]+ import |#include|#!/|(?:public|private|static) [\w <>\[\]]*(?:\w\(|[{=;][ \t]*$)|(?:const|let|var) \w+ = |(?:async )?function\*? \w*\(|(?-i:SELECT .+ FROM) )"
    r"|[;{][ \t]*\r?\n[ \t]*\S.*[;}{][ \t]*$|</(?!p>|b>|i>|em>)[a-z]\w*>|=> ?[({]|\w\(\)"
    r"|(?<![.\w])(?:python|javascript|typescript|java|golang|php|sql|html|css|regex|bash|powershell|matlab|vba|django|pytorch|numpy|kubernetes|leetcode|c\+\+|c#|node\.?js|react(?:js| native| component))(?!\w)"
    r"|\b(?:source|following|this|that|my|some|sample|example|write|the|of|in|your) code\b(?! of)|\b(?:pseudo-?code|codebase|debug|refactor|programming language|unit tests?|write an? (?:\w+ )?(?:function|program|algorithm))\b", re.I | re.M)


def held_out(prompts, train, n, out, confidence, seed=0):
    """The prompts of the human evaluation (§4): empty, non-English, coding and similar ones dropped, `n` of the rest drawn; {"in", reason: n, …, "kept"}.

    Writes them in the order of the file, as conversations, and `dropped.jsonl` beside them. Not stated in the paper: how coding was told.
    """
    records = read_prompts(prompts)
    queries, examples = [queries_of(r["messages"]) for r in records], [queries_of(messages) for _, _, messages in conversations(train)]
    if not examples:
        raise UserError(f"{train}: no conversations in it, nothing to hold the prompts against")
    near, foreign = too_similar(queries, examples)[0], language_filter(confidence)

    def reason(i, text):
        return ("empty" if not text.strip() else "not English" if foreign(text) else "coding" if CODING.search(text) else
                "like a training query" if i in near else "kept")
    reasons = [reason(i, "\n".join(q)) for i, q in enumerate(queries)]
    for i in np.random.default_rng(seed).permutation([i for i, why in enumerate(reasons) if why == "kept"])[n:]:
        reasons[i] = "not drawn"
    write_jsonl(out, [r for r, why in zip(records, reasons) if why == "kept"])
    write_jsonl(dropped_path(out), [{"id": r["id"], "reason": why} for r, why in zip(records, reasons) if why != "kept"])
    return {"in": len(records), **{why: reasons.count(why) for why in ("empty", "not English", "coding", "like a training query", "not drawn", "kept")}}


# --- pack ---------------------------------------------------------------------------------------------------------------
# §4.1: conversations are cut into blocks of 2048 tokens. How is read in EasyLM: one stream of all of them, cut wherever a block ends.

def packer(folder, template):
    """What each process of `pack` does with a JSON line: (id, ids as bytes, loss mask as bytes)."""
    tokenizer = load_tokenizer(folder).add(SPECIAL[template])

    def tokenize(line):
        record = json.loads(line.decode("utf-8-sig"))
        ids, mask = render(check_messages(record, "line", text=True), tokenizer, template)
        return record.get("id"), np.array(ids, tokenizer.dtype).tobytes(), bytes(mask)
    return tokenize


def pack(path, tokenizer_folder, template, out, seed=0, workers=None):
    """Pack conversations or {"text"} lines into one token stream (§4.1); returns the meta.json that it wrote.

    The order of conversations (not stated in the paper) is a permutation drawn from `seed` alone, the same for every tokenizer, so
    that a prefix of the stream is a nested subset: 20M inside 80M inside 150M. Bytes do not depend on the number of `workers`.
    """
    for _ in conversations(path, text=True):               # a malformed line is found before anything is written
        pass
    tokenizer = load_tokenizer(tokenizer_folder).add(SPECIAL[template])
    settings = {"template": template, "seed": seed, "source_hash": file_hash(path), "tokenizer_hash": tokenizer.hash}
    if same_settings(Path(out) / "meta.json", "settings", settings):
        print(f"{out}: packed already")
        return read_json(Path(out) / "meta.json")
    if str(path).endswith(".gz"):
        raise UserError(f"{path}: pack reads lines in another order than the file's; unpack it first with: gunzip {path}")
    with open(path, "rb") as f, contextlib.ExitStack() as stack:
        places, at = [], 0
        for line in f:
            if line.strip():
                places.append((len(line), at))
            at += len(line)
        if not places:
            raise UserError(f"{path}: empty, nothing to pack")
        lines = (os.pread(f.fileno(), *places[i]) for i in np.random.default_rng(seed).permutation(len(places)))
        workers = min(workers or os.cpu_count(), 1 + len(places) // 2000)
        packed = stack.enter_context(in_order(functools.partial(packer, tokenizer.folder, template), lines, workers))
        folder = stack.enter_context(atomic_dir(out))
        starts, dropped, n_tokens, n_loss = [], [], 0, 0
        with open(folder / "tokens.bin", "wb") as tokens, open(folder / "loss_mask.bin", "wb") as masks:
            for key, ids, mask in tqdm(packed, total=len(places), desc="pack", unit=" conv", disable=None):
                if 1 not in mask:                          # never without a counted reason
                    dropped.append({"id": key, "reason": "no answer to learn from"})
                    continue
                starts.append(n_tokens)
                n_tokens += len(mask)
                n_loss += mask.count(1)
                tokens.write(ids)
                masks.write(mask)
        if not starts:
            raise UserError(f"{path}: no conversation with an answer to learn from, nothing to pack")
        np.array(starts, np.int64).tofile(folder / "starts.bin")
        write_jsonl(folder / "dropped.jsonl", dropped)
        (folder / "tokenizer").mkdir()
        tokenizer.save(folder / "tokenizer")
        meta = {"name": Path(path).name.removesuffix(".jsonl"), **settings, "vocab_size": tokenizer.vocab_size, "bytes_per_token": tokenizer.dtype.itemsize, "tokenizer_base_hash": tokenizer.base_hash,
                "settings": settings, "conversations": len(starts), "tokens": n_tokens, "loss_tokens": n_loss, "dropped": {"no answer to learn from": len(dropped)}}
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
        start, end = [*self.starts[i:i + 2], len(self.tokens)][:2]
        tokens, mask = np.zeros(length + 1, self.tokens.dtype), np.zeros(length + 1, np.uint8)
        n = min(length + 1, end - start)
        tokens[:n], mask[:n] = self.tokens[start:start + n], self.loss_mask[start:start + n]
        return tokens[:-1], tokens[1:], mask[1:]


def inspect(folder, n_blocks, length):
    """Print blocks as text: tokens with loss in colour (in «» where stdout is no terminal), control characters spelled out."""
    data = Packed(folder)
    tokenizer = data.tokenizer()
    names = tokenizer.names
    on, off = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("«", "»")
    for b in range(min(n_blocks, max(1, (len(data.tokens) - 1) // length))):
        tokens, mask = data.tokens[b * length:(b + 1) * length], data.loss_mask[b * length:(b + 1) * length]
        print(f"--- block {b}: {len(tokens)} tokens, {int(mask.sum())} with loss")
        for loss, run in itertools.groupby(zip(tokens.tolist(), mask.tolist()), lambda pair: pair[1]):
            texts = itertools.groupby((i for i, _ in run), names.__contains__)         # special tokens by name, what is between them decoded whole
            text = "".join("".join(map(names.get, ids)) if special else visible(tokenizer.decode(ids)) for special, ids in texts)
            print(f"{on}{text}{off}" if loss else text, end="")
        print()


# --- stats: what is in a set --------------------------------------------------------------------------------------------

def stats(path, tokenizer=None, png=None):
    """Print conversations, turns and lengths of a file of conversations or text, or of packed data; draw the lengths into `png`."""
    if Path(path).is_dir():
        packed = Packed(path)
        unit, lengths, rows = "tokens", np.diff([*packed.starts, len(packed.tokens)]), [["loss tokens", packed.meta["loss_tokens"]]]
    else:
        unit, length = measure(tokenizer)
        lengths, turns = [], collections.Counter(user=0, assistant=0)
        for _, _, messages in conversations(path, text=True):
            turns.update(m["role"] for m in messages)
            lengths.append(length(messages))
        rows = [["plain texts" if role == "text" else f"{role} turns", n] for role, n in turns.items()]
    if not len(lengths):
        raise UserError(f"{path}: nothing in it")
    quantiles = [[f"{unit}, {name}", int(np.quantile(lengths, q))] for name, q in (("half have at most", 0.5), ("nine in ten", 0.9), ("99 in 100", 0.99), ("the longest", 1))]
    print_table([[path, ""], ["conversations", len(lengths)], *rows, [unit, int(np.sum(lengths))], [f"{unit} a conversation", f"{np.mean(lengths):.1f}"], *quantiles])
    if png and (plt := pyplot()):
        fig, ax = plt.subplots(figsize=(6, 3.5))
        ax.hist(np.maximum(lengths, 1), bins=np.geomspace(1, max(max(lengths), 2), 50), color="#4477aa")
        ax.set(xscale="log", xlabel=f"{unit} a conversation", ylabel="conversations", title=visible(Path(path).name))
        if unit == "tokens":
            ax.axvline(2048, color="black", linewidth=1, linestyle=":")    # §4.1: the block
        fig.tight_layout()
        save_figure(plt, fig, png)


CATEGORIES = {"generation": 31, "general QA": 16, "coding": 16, "brainstorming": 8, "chat": 6, "summarization": 4, "rewriting": 2, "non-English": 14, "invalid": 2}      # Table 5: % of 50 queries, by hand

# The paper names the kinds and labelled them by hand; the words of the request are ours.
CATEGORY_REQUEST = """Which kind of query to a chat assistant is the text between the lines? Answer with one of these kinds and nothing else: {kinds}. Text in another language than English is non-English; text that asks for nothing intelligible is invalid.
----------
{query}
----------
Do not answer the query. Kind:"""


def category_prompts(path, n, out, seed=0):
    """Write prompts that have a teacher label the first queries of `n` conversations, drawn at random (Table 5)."""
    queries = [(record.get("id", number), queries_of(messages)[0]) for number, record, messages in conversations(path) if any(queries_of(messages)[:1])]
    if len(queries) < n:
        raise UserError(f"{path}: {len(queries)} conversations with a query, --categories asks for {n}")
    chosen = sorted(np.random.default_rng(seed).choice(len(queries), n, replace=False))
    write_jsonl(out, ({"id": f"{i}-{queries[i][0]}", "prompt": CATEGORY_REQUEST.format(kinds=", ".join(CATEGORIES), query=queries[i][1][:2000])} for i in chosen))


def category_table(path):
    """Rows of kind, number, share and its standard error, the paper's share; from a teacher's replies to `category_prompts`."""
    counts = collections.Counter()
    for _, answer, _ in read_replies(path).values():
        found = [(at, kind) for kind in CATEGORIES if (at := answer.lower().find(kind.lower())) >= 0]
        counts[min(found)[1] if found else "no kind in the reply"] += 1
    n = counts.total()
    if not n:
        raise UserError(f"{path}: no replies in it")
    share = lambda k: counts[k] / n
    return [["kind", "n", "%", "±", "paper %"], *([k, counts[k], f"{100 * share(k):.1f}", f"{100 * (share(k) * (1 - share(k)) / n) ** 0.5:.1f}", CATEGORIES.get(k, "")]
                                                  for k in {**CATEGORIES, **counts})]


# --- fetch: public sets and base models ---------------------------------------------------------------------------------

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")          # the hub's own variable for mirrors
GITHUB = "https://raw.githubusercontent.com"
FETCH = {                                                   # name: (folder, address, {file: SHA-256 where known}, whose and under what licence)
    "sharegpt": ("data/sharegpt", f"{HUB}/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered/resolve/main", {"ShareGPT_V3_unfiltered_cleaned_split.json": None}, "users' own dialogues with ChatGPT, a community's dump; OpenAI's terms"),
    "hc3": ("data/hc3", f"{HUB}/datasets/Hello-SimpleAI/HC3/resolve/main", {"all.jsonl": None}, "Hello-SimpleAI, CC BY-SA 4.0"),
    "nq": ("data/nq", f"{GITHUB}/google-research-datasets/natural-questions/master/nq_open", {"NQ-open.dev.jsonl": "f15567f38099f3615f5b8a685c0aef449c11ad90d3da3735e8d1b98115b40616", "NQ-open.train.jsonl": None}, "Google, CC BY-SA 3.0"),
    "mmlu": ("data/mmlu", "https://people.eecs.berkeley.edu/~hendrycks", {"data.tar": "bec563ba4bac1d6aaf04141cd7d1605d7a5ca833e38f994051e818489592989b"}, "Hendrycks et al., MIT"),
    "humaneval": ("data/humaneval", f"{GITHUB}/openai/human-eval/master/data", {"HumanEval.jsonl.gz": "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"}, "OpenAI, MIT"),
    "realtoxicityprompts": ("data/realtoxicityprompts", f"{HUB}/datasets/allenai/real-toxicity-prompts/resolve/main", {"prompts.jsonl": None}, "Allen Institute for AI, Apache-2.0"),
    "koala": ("data/koala", f"{GITHUB}/arnav-gudibande/koala-test-set/main", {"koala_test_set.jsonl": "c8cda5c53810dc30aad34fabbb828fe3eba0957119e00916650c971905d19886"}, "evaluation prompts of the authors, Apache-2.0"),
    "tldr": ("data/tldr", "https://openaipublic.blob.core.windows.net/summarize-from-feedback/datasets/tldr_3_filtered", {"train.jsonl": None}, "Reddit posts, filtered by OpenAI"),
    **{name: (f"weights/{name}", f"{HUB}/openai-community/{name}/resolve/main", dict.fromkeys(["config.json", "vocab.json", "merges.txt", "model.safetensors"]), "OpenAI, MIT") for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")},
    **{f"llama{size}": (f"weights/llama{size}", f"{HUB}/huggyllama/llama-{size}/resolve/main", {"config.json": None, "tokenizer.model": "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347", "model.safetensors.index.json": None},
                        "a community's conversion of Meta's LLaMA, whose licence (research, not commercial) binds you") for size in ("7b", "13b", "30b", "65b")},
}


def download(session, url, path, sha256=None):
    """Download `url` to `path`: continues where an earlier try broke off, and renames only what is whole and has the right checksum.

    UserError where the server has no such file or wants a permission, Failure where it does not answer after several tries, or sends
    something else than `sha256` (or the hub's own header) says. A part's name tells the version, so that two are never mixed.
    """
    import requests
    import urllib3
    tries = 0
    while True:
        old = next(path.parent.glob(f"{glob.escape(path.name)}.????????.part"), None)
        at = begin = old.stat().st_size if old else 0
        try:
            with session.get(url, headers={"Accept-Encoding": "identity", **({"Range": f"bytes={at}-"} if at else {})}, stream=True, timeout=60) as answer:
                status, head = answer.status_code, answer.headers
                if status in (401, 403, 404, 410):
                    raise UserError(f"{url} answered {status}: {'its owner wants a permission' if status < 404 else 'it is not there any more'}")
                if status not in (200, 206, 416):
                    raise requests.RequestException(f"answered {status}")
                at = begin = at if status == 206 else 0     # 200: the whole, whatever was asked for
                linked = next((r.headers["X-Linked-Etag"].strip('"') for r in (*answer.history, answer) if "X-Linked-Etag" in r.headers), "")
                sha256 = sha256 or (linked if re.fullmatch("[0-9a-f]{64}", linked) else None)
                total = at + int(head["Content-Length"]) if "Content-Length" in head else None
                part = path.with_name(f"{path.name}.{digest(linked or head.get('ETag', '').removeprefix('W/'), total)[:8]}.part")
                if old and (part != old or status == 416):
                    old.unlink()
                if at and part != old or status == 416:     # changed there since, or not the bytes asked for
                    raise requests.RequestException("sent another part than was asked for")
                with open(part, "ab" if at else "wb") as f, tqdm(total=total, initial=at, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
                    while piece := answer.raw.read1(1 << 20):           # raises where the connection ends before Content-Length
                        at += f.write(piece)
                        bar.update(len(piece))
                    f.flush()
                    os.fsync(f.fileno())
            break
        except (requests.RequestException, urllib3.exceptions.HTTPError) as e:
            tries = 1 if at > begin else tries + 1
            if tries > 5:
                raise Failure(f"{url}: {e if type(e) is requests.RequestException else type(e).__name__} (5 tries); the same command continues")
            time.sleep(2.0 ** tries / 4)
    if sha256 and file_hash(part) != sha256:
        part.unlink()
        raise Failure(f"{url}: what came does not have the SHA-256 {sha256}; it was deleted, the same command tries again")
    os.replace(part, path)


def fetch(name):
    """Download the files of FETCH[name] that are not there yet into its folder, with the shards that an index names; returns the folder."""
    import requests
    folder, address, files, licence = FETCH[name]
    print(f"{name}: {licence}; to {folder}/", file=sys.stderr)
    folder, waiting = Path(folder), dict(files)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, folder), requests.Session() as session:
        session.auth = lambda request: request              # nothing out of a netrc
        while waiting:
            file = next(iter(waiting))
            path, sha256 = folder / file, waiting.pop(file)
            if not path.exists() and not (file == "data.tar" and (folder / "test").exists()):
                download(session, f"{address}/{file}", path, sha256)
            if file.endswith(".index.json"):
                waiting |= dict.fromkeys(s for s in sorted(set(read_json(path)["weight_map"].values())) if re.fullmatch(r"[\w.-]+\.safetensors", s))
            elif file == "data.tar" and path.exists():      # MMLU: its data/dev becomes FOLDER/dev
                with tarfile.open(path) as tar:
                    wanted = [m.replace(name=m.name.removeprefix("data/")) for m in tar if re.fullmatch(r"data/(dev|test|val)/\w+\.csv", m.name)]
                    tar.extractall(folder, wanted, filter="data")
                path.unlink()
    return folder


# --- the program --------------------------------------------------------------------------------------------------------

def main():
    parser = Parser(description="Corpora in, packed tokens out.", example="python data.py pack chats.jsonl --tokenizer weights/llama7b --out data/chats")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    language = argparse.ArgumentParser(add_help=False)
    language.add_argument("--any-language", action="store_true", help="keep what is not English")
    language.add_argument("--language-confidence", type=real, default=0.8, help="drop what is another language with this probability (§3: non-English is dropped; the threshold is not stated)")

    p = commands.add_parser("mix", parents=[language], help="ShareGPT-Mix from its sources", example="python data.py mix --sharegpt sg.json --hc3 all.jsonl --discord bots.csv --out mix.jsonl")
    for name, text in SOURCES.items():
        p.add_argument(f"--{name}", metavar="FILE", action="append", default=[], help=text + "; may be given several times")
    p.add_argument("--out", required=True, help="conversations, JSON lines; FILE.dropped.jsonl beside it says what was dropped and why")
    p.add_argument("--strict", action="store_true", help="a file that breaks off is an error; without it, its whole records are used and the loss is said")
    p.add_argument("--dedup", choices=["first", "all", "none"], default="first", help="within ShareGPT: drop a dialogue whose first query another began with; whose every query has been met; none. §3 says query-level and no more")
    p.add_argument("--drop-mentions", metavar="WORDS", help="drop dialogues in which any of these, separated by commas, stands (openai,chatgpt); not stated in the paper, Koala did so")
    p.add_argument("--tokenizer", metavar="DIR", help="count tokens as pack would, with this tokenizer; without it the table has words")
    p.add_argument("--held-out", metavar="FILE", help="drop dialogues with a query to which one of these prompts has BLEU > 20%%; not the paper's way, which is `heldout`")

    p = commands.add_parser("diversity", help="BLEU of each user query to its most similar other, averaged", example="python data.py diversity mix.jsonl --first-turn --out diversity.json")
    p.add_argument("file", help="conversations or prompts, JSON lines")
    p.add_argument("--first-turn", action="store_true", help="the first query of each conversation only")
    p.add_argument("--out", metavar="FILE", help="write the result as JSON")
    p.add_argument("--workers", type=positive, help="processes; None is one per core")

    p = commands.add_parser("heldout", parents=[language], help="evaluation prompts chosen the paper's way", example="python data.py heldout --prompts F --train mix.jsonl --n 255 --out held-out.jsonl")
    p.add_argument("--prompts", required=True, metavar="FILE", help="`prompt` or messages, JSON lines")
    p.add_argument("--train", required=True, metavar="FILE", help="conversations; prompts with BLEU > 20%% to a user query of theirs are dropped (§4)")
    p.add_argument("--n", type=positive, default=255, help="prompts to keep (§4)")
    p.add_argument("--out", required=True, metavar="FILE", help="FILE.dropped.jsonl is written beside it")
    p.add_argument("--seed", type=natural, default=0, help="of the draw")

    p = commands.add_parser("pack", help="conversations or {text} lines into one token stream", example="python data.py pack mix.jsonl --tokenizer weights/llama7b --out data/mix")
    p.add_argument("file")
    p.add_argument("--tokenizer", required=True, metavar="DIR", help="folder with tokenizer.model, tokenizer.json, or GPT-2's encoder.json and vocab.bpe")
    p.add_argument("--template", choices=["tokens", "koala"], default="tokens", help="tokens: special tokens around turns (§4.1); koala: plain-text markers (the authors' Koala), which a query can imitate (mix counts those)")
    p.add_argument("--out", required=True, metavar="DIR")
    p.add_argument("--seed", type=natural, default=0, help="of the order of conversations")
    p.add_argument("--workers", type=positive, help="tokenizing processes; None is one per core")

    p = commands.add_parser("inspect", help="blocks as text, loss tokens coloured", example="python data.py inspect data/mix --blocks 3")
    p.add_argument("dir")
    p.add_argument("--blocks", type=positive, default=2)
    p.add_argument("--block", type=positive, default=512, help="tokens a block")

    p = commands.add_parser("stats", help="conversations, turns, lengths; kinds of query", example="python data.py stats mix.jsonl --tokenizer weights/llama7b --png lengths.png")
    p.add_argument("path", nargs="?", help="conversations, JSON lines, or a folder of packed data")
    p.add_argument("--tokenizer", metavar="DIR", help="count tokens; without it, words")
    p.add_argument("--png", metavar="FILE", help="histogram of the lengths")
    p.add_argument("--categories", type=positive, metavar="N", help="write to --out the prompts that have a teacher label N queries with the kinds of Table 5; `imitation.py collect` asks it")
    p.add_argument("--out", metavar="FILE", help="of --categories")
    p.add_argument("--labels", metavar="REPLIES", help="tally what it replied, beside the paper's figures")
    p.add_argument("--seed", type=natural, default=0, help="of the choice of queries")

    p = commands.add_parser("fetch", help="download a public set into data/ or a base model into weights/; their owners' licences apply", example="python data.py fetch hc3 llama7b")
    p.add_argument("names", nargs="+", choices=list(FETCH), metavar="NAME", help=", ".join(FETCH))
    args = parser.parse_args()

    confidence = None if getattr(args, "any_language", True) else args.language_confidence
    if args.command == "mix":
        sources = [(name, path) for name in SOURCES for path in getattr(args, name)]
        if not sources:
            parser.error("mix needs at least one of --" + ", --".join(SOURCES))
        words = "|".join(re.escape(w.strip()) for w in (args.drop_mentions or "").split(",") if w.strip())
        print_mix(mix(sources, args.out, confidence, args.dedup, re.compile(words, re.IGNORECASE) if words else None, args.tokenizer, args.strict, args.held_out))
    elif args.command == "diversity":
        result = diversity(args.file, args.first_turn, args.workers)
        show_diversity(result)
        if args.out:
            write_json(args.out, result)
    elif args.command == "heldout":
        row = held_out(args.prompts, args.train, args.n, args.out, confidence, args.seed)
        print_table([["prompts", *row], [Path(args.prompts).name, *row.values()]])
        if row["kept"] < args.n:
            print(f"{args.out}: only {row['kept']} prompts are left of the {args.n} asked for", file=sys.stderr)
    elif args.command == "pack":
        meta = pack(args.file, args.tokenizer, args.template, args.out, args.seed, args.workers)
        print(f"{args.out}: {meta['conversations']} conversations, {meta['tokens']} tokens, {meta['loss_tokens']} with loss, "
              f"{sum(meta['dropped'].values())} dropped")
    elif args.command == "inspect":
        inspect(args.dir, args.blocks, args.block)
    elif args.command == "fetch":
        for name in args.names:
            print(fetch(name))
    elif args.labels:
        print_table(category_table(args.labels))
    elif not args.path or bool(args.categories) != bool(args.out):
        parser.error("stats needs a file, --categories an --out")
    elif args.categories:
        category_prompts(args.path, args.categories, args.out, args.seed)
        print(f"{args.out}: now python imitation.py collect --prompts {args.out} --temperature 0 --endpoint URL --endpoint-model NAME --out labels.jsonl; then python data.py stats --labels labels.jsonl")
    else:
        stats(args.path, args.tokenizer, args.png)


if __name__ == "__main__":
    run(main)
