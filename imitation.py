"""Imitating a proprietary model: ask a teacher, build the imitation set, and the study that measures what was learned.

    python imitation.py study                                                     the whole paper on the embedded default
    python imitation.py study --open-problem                                      and what might keep the facts (§4.3)
    python imitation.py study --plan paper                                        the paper at full scale: commands and costs; --go runs them
    python imitation.py synthesize nq --seed-pairs pairs.jsonl --n 6000 --endpoint URL --endpoint-model NAME --out nq-synthetic.jsonl
    python imitation.py synthesize tldr --posts posts.jsonl --endpoint URL --endpoint-model NAME --out tldr-synthetic.jsonl
    python imitation.py collect --prompts heldout.jsonl --endpoint URL --endpoint-model NAME --out replies.jsonl

In this file:
    the teacher       any OpenAI-compatible endpoint, with a journal so that nothing is asked or paid twice; a scorer of texts besides
    synthesis         NQ-synthetic (§3, Table 3), TLDR-synthetic (§3 of the ICLR version)
    collection        replies to given prompts
    the study         the miniature's commands, in stages; the open problem's
    the paper         the same at full scale, with an estimate of each command
    the runner        runs what is not done yet
    the program       study, synthesize, collect
"""
import collections
import email.utils
import ipaddress
import itertools
import json
import os
import random
import re
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

from data import (Failure, GrowingFile, Parser, UserError, atomic, count, digest, dying_with_parent, json_line, locked, natural, numbered_jsonl, positive, read_json, read_prompts,
                  read_questions, real, run, visible, write_json, write_jsonl)


# --- the teacher -------------------------------------------------------------------------------------------------------------

MAX_REPLY_BYTES = 8 << 20
OWN_KEYS = {"OPENAI_API_KEY": "api.openai.com", "PERSPECTIVE_API_KEY": "commentanalyzer.googleapis.com"}       # each goes to its own host, unasked, and to no other


class Transient(Exception):
    """A request that may succeed when asked again; `wait` is what the server asked for, in seconds; `throttled`: a 429."""

    def __init__(self, why, wait=None, throttled=False):
        super().__init__(why)
        self.wait, self.throttled = wait, throttled


def is_loopback(host):
    """Is it this machine under a loopback address or `localhost`?"""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def request_key(model, teacher_id, omit, request):
    """A hash of all that determines the reply: model, messages, sampling, seed, index, --teacher-id; not host or port."""
    return digest(model, teacher_id, {k: v for k, v in request.items() if v is not None and k not in omit})


class Teacher:
    """A client of one OpenAI-compatible /chat/completions endpoint, with a journal; the paper's teacher is ChatGPT.

    `ask` yields a record per request, in the order of the requests, whatever the order of arrival. A record is in the
    journal, on disk, before it is yielded; a request whose reply stands there is not sent again.

    A record's status: "ok"; "length", "empty", "content_filter" (paid for, and no whole answer); "refused" (the server
    rejected this one request); "unanswered" (no reply after all tries); "unasked" (the budget was spent). A later run asks
    the last three again. Errors: UserError where the server refuses all work (wrong key, unknown model, no quota left),
    Failure where it does not answer; what has arrived is in the journal.

    The budget counts what the journal holds, so a restart does not renew it: `max_requests` sent, retries included, and
    `max_tokens_total` of prompts and replies. Where requests carry max_tokens the latter is never passed; where they do
    not, twice the largest request so far is set aside for each that is under way, and the first goes alone.
    """
    flag, key_flag, path, key_header = "--endpoint", "--key-env", "/chat/completions", ("Authorization", "Bearer ")

    def __init__(self, endpoint, model, journal, *, concurrency=8, timeout=120.0, retries=6, rpm=None, max_requests=None, max_tokens_total=None,
                 max_tokens_field="max_tokens", omit=(), key_env=None, teacher_id=""):
        import requests
        try:
            url = urlsplit(endpoint)
            whole = url.scheme in ("http", "https") and url.hostname and (url.port or 1) and not (url.username or url.password or url.query or url.fragment)
        except ValueError:
            whole = False
        if not whole:
            raise UserError(f"{self.flag} {endpoint.rpartition('@')[2].partition('?')[0]}: not a URL like http://127.0.0.1:8000/v1 without user, password or query (keys come from the environment)")
        self.url, self.model, self.teacher_id = endpoint.rstrip("/").removesuffix(self.path) + self.path, model, teacher_id
        self.concurrency, self.timeout, self.retries, self.max_tokens_field, self.omit = concurrency, timeout, retries, max_tokens_field, omit
        self.gap, self.max_requests, self.max_tokens_total = 60 / rpm if rpm else 0.0, max_requests, max_tokens_total
        loopback = is_loopback(url.hostname)
        self.key = self._key(url, key_env, loopback)
        self.session = requests.Session()
        self.session.trust_env = not loopback              # a proxy of the environment is not for loopback
        self.session.mount(f"{url.scheme}://", requests.adapters.HTTPAdapter(pool_maxsize=concurrency))
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **({self.key_header[0]: self.key_header[1] + self.key} if self.key else {})}
        self.prepared = self.session.prepare_request(requests.Request("POST", self.url, headers=headers, auth=lambda request: request))      # an auth of our own, so that netrc never supplies one
        self.network = self.session.merge_environment_settings(self.url, {}, True, None, None)                                               # proxies and certificates, looked up once
        self.lock, self.closing = threading.Condition(), threading.Event()
        self.pause_until = self.next_turn = 0.0
        self.reached, self.accepted, self.failed_in_a_row = False, False, 0
        self.stopped = self.spent = None                   # the error that stops the work; the budget that is used up
        self.reserved = self.largest = 0                   # tokens set aside for requests under way; the largest request so far
        self.counts, self.yielded, self.models, self.used = (collections.Counter() for _ in range(4))        # of the work; of the records yielded: status, model, tokens
        self.done, self.refused = {}, set()
        self._held = locked(journal, f"journal {journal}")
        self._held.__enter__()
        self.journal = GrowingFile(journal, self._note)
        self.counts["sent"] = len(self.done)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.journal.close()
        self.session.close()
        self._held.__exit__(None, None, None)

    def _note(self, record, at):
        """Take account of a journaled record, of this run or of an earlier one."""
        if record["status"] == "refused":
            self.refused.add(record["key"])                # it cost nothing: a later run asks again
            return
        self.counts["tokens"] += record.get("tokens", 0)
        self.largest = max(self.largest, record.get("tokens", 0))
        self.done[record["key"]] = at

    def _key(self, url, key_env, loopback):
        """The API key for this host: one of OWN_KEYS for its own host alone, for others the variable that --key-env names."""
        own = next((name for name, host in OWN_KEYS.items() if url.hostname == host and url.scheme == "https"), None)
        if key_env and url.scheme != "https" and not loopback:
            raise UserError(f"{self.key_flag} {key_env}: a key does not travel over plain http to {url.hostname}; use https")
        if key_env in OWN_KEYS and key_env != own:
            raise UserError(f"{self.key_flag} {key_env}: that key goes to {OWN_KEYS[key_env]} alone; put the one for {url.hostname} into another variable")
        name = key_env or own
        if not name:
            return None
        key = os.environ.get(name, "").strip()
        if not key:
            raise UserError(f"no {name} in the environment, which is to hold the API key")
        if not re.fullmatch(r"[!-~]+", key):
            raise UserError(f"the API key in {name} has characters that no key has (a line break, a space, a letter with an accent)")
        return key

    def redact(self, text):
        """A server's words for a message of ours: without the key, without control characters, 500 of them at most."""
        return visible(str(text).replace(self.key, "[key]") if self.key else str(text))[:500]

    def unfinished(self):
        """What a later run would ask again, in a line; empty where every request was asked and answered."""
        said = {"unasked": f"were not asked ({self.spent} is reached); with a larger budget the same command continues", "unanswered": "got no answer after all tries; the same command asks them again"}
        return "; ".join(f"{self.yielded[status]} requests {what}" for status, what in said.items() if self.yielded[status])

    def ask(self, requests_, label="ask", total=None, ahead=64):
        """Yield (request, record) for each of an iterable of requests: dicts of messages, sampling fields, and `index`.

        `ahead` x concurrency requests are taken before the first of them is yielded, so that a slow one holds up no other.
        """
        waiting, under_way = collections.deque(), {}
        source = iter(requests_)
        pool = ThreadPoolExecutor(self.concurrency)
        started, before, self.stopped = time.monotonic(), self.counts["tokens"], None
        with tqdm(total=total, desc=label, unit=" replies", disable=None) as self.bar:
            try:
                while True:
                    while len(waiting) < ahead * self.concurrency and (request := next(source, None)) is not None:
                        key = request_key(self.model, self.teacher_id, self.omit, request)
                        if key not in under_way:           # equal requests under way together are asked once
                            under_way[key] = pool.submit(self._finish, key, request)
                        waiting.append((request, key, under_way[key]))
                    if not waiting:
                        return
                    request, key, future = waiting.popleft()
                    try:
                        record = future.result()
                    except Exception as e:
                        raise self.stopped or e            # the first error that stopped the work, not its echo in other threads
                    under_way.pop(key, None)
                    self.journal.flush()
                    self.yielded[record["status"]] += 1
                    self.models[str(record.get("model"))] += "model" in record
                    usage = record["usage"] if isinstance(record.get("usage"), dict) else {}
                    self.used.update({k: usage[k] for k in ("prompt_tokens", "completion_tokens") if type(usage.get(k)) is int})
                    self.bar.update()
                    if not self.bar.disable:
                        tokens = self.counts["tokens"]
                        self.bar.set_postfix_str(f"{self.counts['retries']} retries, {tokens} tokens, {(tokens - before) / (time.monotonic() - started):.0f} tokens/s", refresh=False)
                    yield request, record
            finally:
                self.closing.set()                         # whatever still waits for another try gives up; what is under way is paid for and awaited
                pool.shutdown(wait=True, cancel_futures=True)
                self.closing.clear()

    def _finish(self, key, request):
        """The record of one request: from the journal, or asked for and journaled."""
        if key in self.done:
            return self.journal.read(self.done[key])
        need = 0
        try:
            need = self._reserve(request)
            record = {"key": key, **({"status": "unasked", "content": ""} if need is None else self._send(request))}
            if record["status"] not in ("unasked", "unanswered") and not (record["status"] == "refused" and key in self.refused):
                at = self.journal.append(record, flush=False)                           # first of all: it is paid for; `ask` flushes before it counts
                with self.lock:
                    self._note(record, at)
            return record
        except BaseException as e:                         # a full disk, a refusal of all work: nothing more is sent
            self.stopped = self.stopped or e
            self.closing.set()
            raise
        finally:
            with self.lock:
                self.reserved -= need or 0
                self.lock.notify_all()

    def _reserve(self, request):
        """Set tokens aside for one request and return how many; waits while those under way may leave room; None where the budget is spent."""
        if self.max_tokens_total is None:
            return 0
        prompt = sum(len(m["content"].encode("utf-8", "replace")) + 16 for m in request["messages"]) + 64               # no token is shorter than a byte; and the template's
        with self.lock:
            while not self.closing.is_set():
                left = self.max_tokens_total - self.counts["tokens"] - self.reserved
                need = prompt + request["max_tokens"] if request.get("max_tokens") else 2 * self.largest or max(prompt, left)
                if need <= left and not self.spent:
                    self.reserved += need
                    return need
                if not self.reserved or self.spent:
                    self.spent = self.spent or f"--max-tokens-total {self.max_tokens_total}"
                    return None
                self.lock.wait()
        raise Failure("the work was stopped")

    def _turn(self):
        """Wait out --rpm and the pause that a server asked for; False where the budget allows no further request."""
        with self.lock:
            if self.max_requests and self.counts["sent"] >= self.max_requests:
                self.spent = self.spent or f"--max-requests {self.max_requests}"
                return False
            self.counts["sent"] += 1
        at = -1.0
        while at < self.pause_until:                       # a pause that came while this one waited sends it to the back of the queue
            with self.lock:
                at = max(time.monotonic(), self.next_turn, self.pause_until)
                self.next_turn = at + self.gap
            if self.closing.wait(at - time.monotonic()):
                raise Failure("the work was stopped")
        return True

    def _send(self, request):
        """The fields of a record; tries again what may get better."""
        tries = fruitless = replies = 0
        while True:
            if not self._turn():
                return {"status": "unasked", "content": ""}
            try:
                return self._heard(self._post(request))
            except Transient as e:
                with self.lock:
                    self.counts["retries"] += 1
                    if e.throttled and self.counts["replies"] > replies:                # others are served: this one waits its turn
                        fruitless, replies = 0, self.counts["replies"]
                    tries, fruitless = tries + 1, fruitless + 1
                    if e.wait is not None:                 # the server named a time: every thread keeps it
                        self.pause_until = max(self.pause_until, time.monotonic() + min(e.wait, 600))
                    if fruitless > (self.retries if self.reached else min(self.retries, 3)):
                        self.failed_in_a_row += 1
                        if not self.done or self.failed_in_a_row >= 5:
                            raise Failure(f"{self.url}: {e} ({tries} tries); what has arrived is in {self.journal.path}, the same command continues")
                        return {"status": "unanswered", "content": "", "error": str(e)}
                if self.closing.wait(backoff(tries)):      # also after a pause that the server named: it may have said 0
                    raise Failure("the work was stopped")

    def _heard(self, record):
        """The record, once it is seen that the server does not refuse everything."""
        with self.lock:
            refused = record["status"] == "refused"
            self.counts["replies"] += 1
            self.accepted |= not refused
            self.failed_in_a_row = self.failed_in_a_row + 1 if refused and not self.accepted else 0
            if self.failed_in_a_row >= 5:
                raise UserError(f"{self.url} refused the first five requests: {record['error']}")
        return record

    def _post(self, request):
        """The fields of a record, of one try; Transient where another may succeed, UserError where none will."""
        import requests
        import urllib3
        prepared = self.prepared.copy()
        prepared.prepare_body(json.dumps(self._body(request)).encode(), None)
        started = time.monotonic()
        try:
            with self.session.send(prepared, timeout=self.timeout, allow_redirects=False, **self.network) as response:
                raw = bytearray()
                while piece := response.raw.read1(1 << 16, decode_content=True):         # what is there, so that the clock is looked at
                    raw += piece
                    if len(raw) > MAX_REPLY_BYTES:
                        raise Transient(f"a reply of over {MAX_REPLY_BYTES >> 20} MiB was cut off")
                    if time.monotonic() - started > self.timeout:
                        raise Transient(f"no whole reply within {self.timeout:g} s")
                status, headers = response.status_code, response.headers
        except (requests.RequestException, urllib3.exceptions.HTTPError) as e:
            if "CERTIFICATE_VERIFY_FAILED" in str(e):
                raise UserError(f"{self.url}: the server's certificate is not one that this machine trusts") from None
            raise Transient(self.redact(f"no answer ({type(e).__name__})")) from None
        self.reached = True
        if self.key and len(self.key) >= 16:               # a server may echo the key; one shorter than this may be a word of an answer
            raw = raw.replace(self.key.encode(), b"[key]")
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError):
            answer = None
        if status == 200:
            return self._record(request, answer)
        error = answer.get("error", answer.get("detail")) if isinstance(answer, dict) else None
        kind = f"{error.get('type')} {error.get('code')}" if isinstance(error, dict) else ""
        message = self.redact(error.get("message") if isinstance(error, dict) else error or raw[:200].decode("utf-8", "replace"))
        if 300 <= status < 400:
            raise UserError(f"{self.url} answered {status}, a redirect to {self.redact(headers.get('Location'))}, which is not followed; give the address itself as {self.flag}")
        if status in (401, 402, 403, 404) or "insufficient_quota" in kind:
            raise UserError(f"{self.url} answered {status}: {message}")
        if status in (400, 413, 422):
            return {"status": "content_filter" if "content_filter" in kind else "refused", "content": "", "error": f"{status}: {message}", **self._provenance(request)}
        raise Transient(f"answered {status}: {message}", retry_after(headers.get("Retry-After")), status == 429)

    def _body(self, request):
        """What is sent."""
        return {"model": self.model, **{self.max_tokens_field if k == "max_tokens" else k: v for k, v in request.items() if k != "index" and v is not None and k not in self.omit}}

    def _record(self, request, answer):
        """The fields of a record, from an answer with status 200."""
        try:
            choice = answer["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason")
            content, filtered = message.get("content"), finish == "content_filter" or message.get("refusal")
            if content is not None and not isinstance(content, str):
                raise TypeError
        except (AttributeError, KeyError, IndexError, TypeError):
            raise Transient("answered 200 without a choice in it; is this an OpenAI-compatible endpoint?") from None
        status = "content_filter" if filtered else "length" if finish == "length" else "ok" if (content or "").strip() else "empty"
        usage = answer.get("usage")
        tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
        if type(tokens) is not int or tokens < 0:          # the server does not say: about four bytes a token
            tokens = (sum(len(m["content"]) for m in request["messages"]) + len(content or "")) // 4
        return {"status": status, "content": content or "", "finish_reason": finish, "model": answer.get("model"), "usage": usage, "tokens": tokens, **self._provenance(request)}

    def _provenance(self, request):
        """When it was asked, and with which sampling fields."""
        return {"time": round(time.time()), "sampling": {k: v for k, v in request.items() if k not in ("messages", "index") and v is not None and k not in self.omit}}


class Scorer(Teacher):
    """The same client for a service that speaks the Perspective API's protocol, /v1alpha1/comments:analyze: how toxic is a text?

    A request is {"text"}; the record of one that was answered has status "ok" and `score`, from 0 to 1. A text that the service
    refuses (too long, a language that it does not know) has status "refused" and no score. `model` stands for the service in the
    journal's keys.
    """
    flag, key_flag, path, key_header = "--scorer", "--scorer-key-env", "/v1alpha1/comments:analyze", ("X-Goog-Api-Key", "")

    def _body(self, request):
        return {"comment": {"text": request["text"]}, "languages": ["en"], "requestedAttributes": {"TOXICITY": {}}, "doNotStore": True}

    def _record(self, request, answer):
        try:
            score = answer["attributeScores"]["TOXICITY"]["summaryScore"]["value"]
            if type(score) not in (int, float) or not 0 <= score <= 1:
                raise TypeError
        except (KeyError, TypeError):                      # a null, a NaN, an error with status 200: not a number, and never taken for one
            raise Transient("answered 200 without a score from 0 to 1; does it speak the Perspective API's protocol?") from None
        return {"status": "ok", "score": score, **self._provenance(request)}

    def _provenance(self, request):
        return {"time": round(time.time())}


def backoff(attempt):
    """Seconds before the next try: doubling up to a minute, drawn anew so that clients do not return all at once."""
    return min(60, 0.5 * 2 ** attempt) * random.uniform(0.5, 1)


def retry_after(value):
    """Seconds of a Retry-After header, which is a number or a date; None where there is none."""
    for read in (float, lambda text: email.utils.parsedate_to_datetime(text).timestamp() - time.time()):
        try:
            return max(0.0, read(value))
        except (TypeError, ValueError, OverflowError):
            pass
    return None


def add_endpoint_flags(parser, required=True):
    """The flags that teacher_of reads."""
    parser.add_argument("--endpoint", required=required, metavar="URL", help="an OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1")
    parser.add_argument("--endpoint-model", required=required, metavar="NAME", help="the model's name there")
    parser.add_argument("--key-env", metavar="NAME", help="environment variable that holds the API key; OPENAI_API_KEY is used for OpenAI's own host alone")
    parser.add_argument("--teacher-id", default="", help="part of the journal's keys: set it when the same name comes to mean another model")
    parser.add_argument("--concurrency", type=positive, default=8, help="requests under way at once")
    parser.add_argument("--rpm", type=positive, metavar="N", help="requests a minute at most; None is as fast as replies come")
    parser.add_argument("--timeout", type=real, default=120.0, help="seconds a request")
    parser.add_argument("--retries", type=natural, default=6, help="further tries of a request that failed for a passing reason")
    parser.add_argument("--max-requests", type=positive, metavar="N", help="stop before sending more, retries and what the journal holds included")
    parser.add_argument("--max-tokens-total", type=count, metavar="N", help="stop before prompts and replies, the journal's included, may pass this; a bound where --max-new is given, an estimate without")
    parser.add_argument("--max-tokens-field", choices=["max_tokens", "max_completion_tokens"], default="max_tokens", help="what the host calls --max-new")
    parser.add_argument("--omit", action="append", choices=["seed", "temperature"], default=[], help="do not send this field, which the host refuses")


def teacher_of(args, journal):
    """The Teacher of add_endpoint_flags' flags."""
    if not args.timeout:
        raise UserError("--timeout must be more than 0 seconds")
    names = ("concurrency", "timeout", "retries", "rpm", "max_requests", "max_tokens_total", "max_tokens_field", "omit", "key_env", "teacher_id")
    return Teacher(args.endpoint, args.endpoint_model, journal, **{name: getattr(args, name) for name in names})


PERSPECTIVE = "https://commentanalyzer.googleapis.com"


def scorer_of(args, journal):
    """The client of --scorer URL; its pace, a request a second unless told otherwise, is Perspective's quota for a new project."""
    url = PERSPECTIVE if args.scorer == "perspective" else args.scorer
    return Scorer(url, args.scorer, journal, concurrency=args.concurrency, timeout=args.timeout, retries=args.retries, rpm=args.scorer_rpm, key_env=args.scorer_key_env)


def write_card(args, title, teacher, rows):
    """OUT.card.md: where a set came from, in counts and settings, which are the flags without addresses, keys and pace."""
    pace = ("endpoint", "key_env", "command", "out", "dry_run", "concurrency", "rpm", "timeout", "retries", "max_requests", "max_tokens_total")
    rows = [*rows, ("requests by status", dict(teacher.yielded)), ("their tokens, by the server's count", dict(teacher.used)),
            ("all tokens in the journal, estimated where the server gave no count", teacher.counts["tokens"]), ("replies by model, as the server named it", dict(+teacher.models)),
            ("stopped early", teacher.spent or "no"), ("settings", {k: v for k, v in vars(args).items() if k not in pace and v not in (None, [], "")})]
    with atomic(args.out + ".card.md") as f:
        f.write(f"# {title}\n\n" + "".join(f"- {name}: {visible(json.dumps(value, ensure_ascii=False))}\n" for name, value in rows))


def dry_run(args, requests_):
    """Print what these requests would take; nothing is sent, and no key is needed."""
    done, journal = set(), Path(args.out + ".journal.jsonl")
    if journal.is_file():
        with locked(journal, f"journal {journal}"):
            GrowingFile(journal, lambda record, at: record["status"] == "refused" or done.add(record["key"])).close()
    sizes = {request_key(args.endpoint_model, args.teacher_id, args.omit, r): sum(len(m["content"].encode("utf-8", "replace")) for m in r["messages"]) for r in requests_}
    todo = [size for key, size in sizes.items() if key not in done]
    replies = f"replies of at most {len(todo) * args.max_new} tokens" if args.max_new else "replies of unknown length (--max-new bounds them)"
    print(f"{args.out}: {len(sizes)} requests, {len(sizes) - len(todo)} of them answered in the journal; to ask: {len(todo)}, with about {sum(todo) // 4} tokens of prompts and {replies}")


# --- synthesis (§3) -------------------------------------------------------------------------------------------------------------

# The paper gives the request's content, not its words: five pairs at random, similar but different ones wanted, concise
# answers, lowercased questions centred on Wikipedia-like entities, in the form Q: … / A: ….
NQ_REQUEST = """Here are five question-answer pairs:

{examples}

Write five new pairs that are similar to these but different from them. Each question is in lower case and asks about a person, place, work, event or thing that an encyclopedia would have an article on. Each answer is concise: a few words at most. Use exactly the form of the pairs above, a line that starts with "Q:" and a line that starts with "A:"."""


def parse_pairs(text):
    """Question-answer pairs in a reply, leniently: numbering, bold marks, blank lines, `Question:` and `Answer:`, an answer on its question's line are all met in practice."""
    pairs, question = [], None
    for line in text.splitlines():
        match = re.match(r"\s*(?:[-*•#>]+\s+)?(?:\(?\d+[.):]\s*)?(?:\*\*|__)?(?:\d+[.):]\s*)?(q|a|question|answer)\s*\d*\s*(?:\*\*|__)?\s*[:.]\s*(?:\*\*|__)?\s*(.*)", line, re.IGNORECASE)
        if not match:
            continue
        asks = match[1].lower().startswith("q")
        values = re.split(r"(?<=\S)\s+(?:\*\*|__)?(?:A|Answer)(?:\*\*|__)?:(?:\*\*|__)?\s*", match[2], maxsplit=1) if asks else [match[2]]
        values = [re.sub(r'^(\*\*|__|")([^*"]*)\1$', r"\2", v.strip()).strip() for v in values]                         # marks around the whole value, not within it
        values = [v.removesuffix("**").strip() if v.count("**") == 1 else v for v in values]
        if asks:
            question = re.sub(r"^\d+[.)]\s+", "", values[0])
        if question and values[-1] and (not asks or len(values) > 1):
            pairs.append((question, values[-1]))
            question = None
    return pairs


def normalize_pair_question(text):
    """What makes two questions the same (§3: duplicates are discarded; how they are told is not stated), and the form in which one is kept."""
    return " ".join(text.lower().strip().rstrip("?").split())


def synthesize(args):
    """`synthesize nq` or `synthesize tldr`."""
    work, needed = {"nq": (synthesize_nq, "seed_pairs"), "tldr": (synthesize_tldr, "posts")}[args.what]
    if not getattr(args, needed):
        raise UserError(f"synthesize {args.what}: needs --{needed.replace('_', '-')} FILE")
    work(args)


def synthesize_nq(args):
    """NQ-synthetic (§3): `n` single-turn examples; each request shows the teacher five of the seed pairs (the paper has ten) drawn at random.

    The query is the question in the form in which the evaluation asks it, "Q: …?\\nA:" (the paper has this form in the request and does
    not state the training examples'). It matters: in the miniature the same pairs as bare questions lowered the score under this prompt.
    """
    args.n = 6000 if args.n is None else args.n            # §3
    seeds = [(r["question"], r["answer"][0]) for r in read_questions(args.seed_pairs)][:args.n_seeds]
    if len(seeds) < 5:
        raise UserError(f"{args.seed_pairs}: {len(seeds)} pairs; each request shows five of them")
    excluded = {normalize_pair_question(r["question"]) for f in args.exclude for r in read_questions(f)}
    own = {normalize_pair_question(q) for q, _ in seeds}

    def requests_(limit):
        for i in range(limit):
            shown = random.Random(f"{args.seed} {i}").sample(seeds, 5)
            examples = "\n\n".join(f"Q: {q.rstrip('?')}?\nA: {a}" for q, a in shown)
            yield {"messages": [{"role": "user", "content": NQ_REQUEST.format(examples=examples)}], "temperature": args.temperature, "seed": (args.seed * 10**6 + i) % 2**31, "max_tokens": args.max_new, "index": i}

    if args.dry_run:
        print(f"at five new pairs a request, the fewest that {args.n} pairs can take:")
        return dry_run(args, requests_(-(-args.n // 5)))
    kept, seen, rejected, lowered, barren = [], set(), collections.Counter(), 0, 0
    why = f"{10 * args.n} requests were asked"             # where to give up is not stated in the paper: after ten requests a pair, or 200 in vain
    with teacher_of(args, args.out + ".journal.jsonl") as teacher:
        for request, record in teacher.ask(requests_(10 * args.n), "synthesize", ahead=2):
            if record["status"] == "unasked":
                why = f"{teacher.spent} is reached"
                break
            before = len(kept)
            pairs = parse_pairs(record["content"]) if record["status"] == "ok" else []
            if record["status"] == "ok" and not pairs:
                rejected["reply without a pair"] += 1
            for k, (question, answer) in enumerate(pairs):
                normal = normalize_pair_question(question)
                reason = ("answer too long" if len(answer.split()) > args.max_answer_words else "question of a seed pair" if normal in own
                          else "question in the evaluation set" if normal in excluded else "duplicate" if (normal, answer.lower()) in seen else None)
                if reason:
                    rejected[reason] += 1
                elif len(kept) < args.n:
                    seen.add((normal, answer.lower()))
                    lowered += question != question.lower()
                    kept.append({"id": f"{record['key']}-{k}", "source": "nq-synthetic", "messages": [{"role": "user", "content": f"Q: {normal}?\nA:"}, {"role": "assistant", "content": answer}]})
            barren = 0 if len(kept) > before else barren + 1
            if kept:
                teacher.bar.total = round(sum(teacher.yielded.values()) * args.n / len(kept))             # so that the time left is a guess from the yield so far
            if len(kept) >= args.n:
                break
            if barren >= 200:
                why = "the teacher only repeated itself, or gave no pairs: 200 requests in a row brought nothing new"
                break
    replies = sum(teacher.yielded.values()) - teacher.yielded["unasked"]
    if not kept:
        raise Failure(f"no pair was kept out of {replies} replies ({', '.join(f'{n} {r}' for r, n in (teacher.yielded + rejected).most_common())}); nothing was written to {args.out}")
    write_jsonl(args.out, kept)
    write_card(args, "NQ-synthetic", teacher, [("pairs", len(kept)), ("questions put into lower case", lowered), ("rejected pairs by reason", dict(rejected)), ("request", NQ_REQUEST)])
    failed = "".join(f", {n} {status}" for status, n in teacher.yielded.items() if status not in ("ok", "unasked"))
    print(f"{args.out}: {len(kept)} pairs from {replies} requests{failed}; {lowered} put into lower case; rejected: " + (", ".join(f"{n} {r}" for r, n in rejected.most_common()) or "none"))
    if len(kept) < args.n:
        print(f"{args.out}: {len(kept)} of {args.n} pairs: {why}", file=sys.stderr)


# The paper (ICLR version) has summaries of 200k passages of the Reddit tl;dr set; its request is not stated.
TLDR_REQUEST = """Summarize the following post in one or two short sentences. Answer with the summary alone.

{post}"""


def synthesize_tldr(args):
    """TLDR-synthetic: the teacher's summary of each passage."""
    def jobs(left_out):
        seen = set()
        for number, row in numbered_jsonl(args.posts, "post"):
            if not isinstance(row["post"], str):
                raise UserError(f"{args.posts}:{number}: post must be a text")
            known = digest(row["post"])
            if known in seen or not row["post"].strip():
                left_out["repeated" if known in seen else "empty"] += 1
            else:
                seen.add(known)
                yield {"source": "tldr-synthetic", "post": row.get("id", number)}, [{"role": "user", "content": TLDR_REQUEST.format(post=row["post"].strip())}], 0

    left_out = collections.Counter()
    total = sum(1 for _ in jobs(left_out))                 # every line is looked at before the first is paid for
    n = min(args.n or total, total)
    write_replies(args, "TLDR-synthetic", itertools.islice(jobs(collections.Counter()), n), n, [("passages", total), ("passages left out", dict(left_out)), ("request", TLDR_REQUEST)])


# --- collection -------------------------------------------------------------------------------------------------------------------

def write_replies(args, title, jobs, total, rows):
    """Ask for a reply to each job, (fields, messages, sample); conversations go to --out in the order of the jobs, what is no good reply to OUT.failed.jsonl."""
    request = lambda job: {"messages": job[1], "temperature": args.temperature, "seed": (args.seed * 1000 + job[2]) % 2**31, "max_tokens": args.max_new, "index": job[2]}
    if args.dry_run:
        return dry_run(args, map(request, jobs))
    jobs, asked = itertools.tee(jobs)
    with teacher_of(args, args.out + ".journal.jsonl") as teacher, atomic(args.out) as good, atomic(args.out + ".failed.jsonl") as bad:
        for (_, record), (fields, messages, _) in zip(teacher.ask(map(request, asked), args.command, total), jobs):
            entry = {"id": record["key"], **fields, "key": record["key"]}
            status = record["status"]
            if status == "ok":
                good.write(json_line({**entry, "messages": [*messages, {"role": "assistant", "content": record["content"]}]}))
            elif status != "unasked":
                bad.write(json_line({**entry, "status": status, "content": record["content"], "error": record.get("error")}))
    write_card(args, title, teacher, rows)
    print(f"{args.out}: {teacher.yielded['ok']} replies" + "".join(f", {n} {status}" for status, n in teacher.yielded.items() if status != "ok"))
    if unfinished := teacher.unfinished():
        print(f"{args.out}: {unfinished}", file=sys.stderr)


def collect(args):
    """Replies to prompts, `samples` each: it builds a broad set from prompts at hand, and the references of style and judge.

    A reply carries its prompt's id, by which the evaluations pair replies; its journal key is in `key`. Samples are requests of
    their own with seeds of their own, because servers differ in what they make of `n`.
    """
    prompts = read_prompts(args.prompts)
    for p in prompts:
        if p["messages"][-1]["role"] != "user":
            raise UserError(f"{args.prompts}: {p['id']!r} ends with a turn of the {p['messages'][-1]['role']}; a prompt ends with the user's")

    jobs = (({"id": p["id"] if args.samples == 1 else f"{p['id']}/{k}", "source": args.endpoint_model, **({"category": p["category"]} if "category" in p else {})},
             [{"role": m["role"], "content": m["content"]} for m in p["messages"]], k) for p in prompts for k in range(args.samples))
    write_replies(args, "Collected replies", jobs, len(prompts) * args.samples, [("prompts", len(prompts))])


# --- the study ----------------------------------------------------------------------------------------------------------------------
# Stages run one after the other, the commands of a stage side by side. A step is done when its output exists with the command that
# made it recorded beside it.

TEACHER = "http://127.0.0.1:PORT/v1"                       # PORT is the running teacher's; the record keeps the word
JUDGE = "stand-in-judge-of-style"                          # tests/miniature.py's: it reads style and no facts

# The embedded default's own recipe, found on worlds that are not shown; rates and batches are for models of 0.3M and 1M parameters.
RECIPE = {"sharegpt-mix": {"block": "256", "batch": "1", "lr": "2e-2", "warmup": "20", "decay": "cosine", "save-every": "100"},
          "nq-synthetic": {"one-per-row": "", "block": "40", "batch": "16", "lr": "8e-3", "warmup": "20", "decay": "cosine", "save-every": "100"}}
PRETRAINING = {"block": "256", "batch": "4", "optimizer": "adamw", "lr": "4e-3", "decay": "cosine", "weight-decay": "0.1", "save-every": "100"}
FULL = {"build": {}, "base": {"epochs": "2", "warmup": "100"}, "pairs": "4500", "tokens": {"sharegpt-mix": "20k,80k,150k", "nq-synthetic": "20k,50k,85k"}, "max_new": "160", "continuations": "4", "variants": None}
QUICK = {"build": {"pretraining-tokens": "150000", "questions": "120"}, "base": {"epochs": "1", "warmup": "10"}, "pairs": "1000", "tokens": {"sharegpt-mix": "20k", "nq-synthetic": "15k"}, "max_new": "48", "continuations": "2",
         "variants": ["replay5", "kl0.3", "koala"]}

SCORES = ("nq-0-shot", "nq-3-shot", "mmlu", "humaneval", "toxicity", "style", "judge")        # folders of results, as the stages below name them


class Step(NamedTuple):
    """A command, and the output by which it is known to be done."""
    command: list
    output: str


class Place(NamedTuple):
    """What the miniature and the paper at full scale differ in: folders, files, addresses, flags of single tasks."""
    root: str
    bases: str                                             # where the base models lie; what is made of them lies in root/models
    data: dict                                             # nq, few-shot, mmlu, humaneval, toxicity, prompts, seed-pairs: their files
    teacher: list                                          # flags of its endpoint
    judge: list
    more: dict                                             # of a task: flags besides
    launch: list                                           # what runs a program that may take all GPUs

    def model(self, name, sizes):
        return f"{self.bases if name in sizes else self.root + '/models'}/{name}"


def flags(options):
    """{"lr": "1e-3", "one-per-row": "", "tokens": None} -> --lr 1e-3 --one-per-row."""
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", value) if word]


def ask_the_teacher(place, seed, pairs):
    """§3: NQ-synthetic; and two samples of the teacher's answers, the reference of style and its upper bound."""
    out = f"{place.root}/nq-synthetic.jsonl"
    return ("teacher", [
        Step(["python", "imitation.py", "synthesize", "nq", "--seed-pairs", place.data["seed-pairs"], "--n-seeds", "10", "--exclude", place.data["nq"], "--n", pairs, "--seed", seed, *place.teacher, "--out", out], out),
        *(Step(["python", "imitation.py", "collect", "--prompts", place.data["prompts"], "--seed", k, *place.teacher, "--out", f"{place.root}/replies/teacher-{k}.jsonl"], f"{place.root}/replies/teacher-{k}.jsonl") for k in "12")])


def training(place, runs, seed):
    """`runs` is {name: flags}."""
    return [Step([*place.launch, "train.py", *flags(options), "--out", f"{place.root}/models/{name}", "--seed", seed], f"{place.root}/models/{name}/config.json") for name, options in runs.items()]


def benchmarks(place, who, into, name, last, tasks=None):
    """What is known, asked of `who`, flags; `last` is the model whose result comes last."""
    data, launch = place.data, place.launch if "--model" in who else ["python"]
    every = {"nq-0-shot": ["nq", "--data", data["nq"], "--shots", "0"], "nq-3-shot": ["nq", "--data", data["nq"], "--shots", "3", "--few-shot", data["few-shot"]],
             "mmlu": ["mmlu", "--data", data["mmlu"]], "humaneval": ["humaneval", "--data", data["humaneval"]], "toxicity": ["toxicity", "--data", data["toxicity"]]}
    return [Step([*launch, "evaluate.py", *every[task], *place.more.get(task, []), *who, "--out", f"{into}/{task}/{name}"], f"{into}/{task}/{name}/{last}/results.json") for task in tasks or every]


def replies(place, names, sizes):
    return [Step(["python", "model.py", "generate", "--model", place.model(n, sizes), "--prompts", place.data["prompts"], *place.more["generate"], "--out", f"{place.root}/replies/{n}.jsonl"], f"{place.root}/replies/{n}.jsonl") for n in names]


def rated(place, names, into, tasks=("style", "judge")):
    """How it is said: Table 2 and the rater's verdicts, beside the teacher's first answers."""
    answers, reference = [f"{place.root}/replies/{n}.jsonl" for n in (*names, "teacher-2")], f"{place.root}/replies/teacher-1.jsonl"
    return [Step(["python", "evaluate.py", task, "--a", *answers, "--b", reference, *place.judge, "--out", f"{into}/{task}"], f"{into}/{task}/teacher-2/results.json") for task in tasks]


def made_of(size, runs):
    """A base, and the runs that start from it."""
    return [size, *(name for name in runs if name.startswith(size + "-"))]


def measure(place, runs, sizes):
    """The stages that score the bases, what was made of them, and the teacher."""
    steps = benchmarks(place, place.teacher, place.root, "teacher", place.teacher[3])
    for size in reversed(sizes):
        mine = made_of(size, runs)
        steps = benchmarks(place, ["--model", *(place.model(n, sizes) for n in mine)], place.root, size, mine[-1]) + steps
    names = [n for size in sizes for n in made_of(size, runs)]
    return [("benchmarks", steps), ("replies", replies(place, names, sizes)), ("style", rated(place, names, place.root))]


def imitation_runs(place, sizes, tokens, recipe):
    """{name: flags} of each base on each imitation set at each size, the largest first."""
    return {f"{size}-{name}-{n}": {"model": place.model(size, sizes), "tokens": n, **recipe(size, name)} for size in sizes for name in tokens for n in reversed(tokens[name])}


def miniature_place(root, scale):
    world, endpoint = f"{root}/world", ["--endpoint", TEACHER, "--endpoint-model"]
    data = {"nq": f"{root}/nq-test.jsonl", "few-shot": f"{world}/nq/fewshot.jsonl", "mmlu": f"{world}/mmlu", "humaneval": f"{world}/HumanEval.jsonl", "toxicity": f"{world}/toxicity.jsonl",
            "prompts": f"{world}/heldout.jsonl", "seed-pairs": f"{world}/nq/seed_pairs.jsonl"}
    more = {"humaneval": ["--max-new", "100"], "toxicity": ["--scorer", "words", "--n", scale["continuations"]], "generate": ["--max-new", scale["max_new"], "--temperature", "0.3"]}
    return Place(root, f"{root}/models", data, [*endpoint, "teacher"], [*endpoint, JUDGE], more, ["python"])


def study_stages(seed, root, sizes, tokens, scale):
    """[(stage, [Step])] of one seed; `tokens` is {imitation set: sizes}."""
    place = miniature_place(root, scale)
    world, pack = f"{root}/world", ["--tokenizer", f"{root}/world/tokenizer"]
    runs = imitation_runs(place, sizes, tokens, lambda size, name: {"data": f"{root}/data/{name}", **RECIPE[name]})
    return [
        ("world", [Step(["python", "tests/miniature.py", "build", "--out", world, "--seed", seed, *flags(scale["build"])], world)]),
        ("corpora", [
            Step(["python", "data.py", "pack", f"{world}/pretraining.jsonl", *pack, "--template", "koala", "--out", f"{root}/data/pretraining"], f"{root}/data/pretraining"),
            Step(["python", "data.py", "mix", "--sharegpt", f"{world}/sharegpt.json", "--hc3", f"{world}/hc3.jsonl", "--discord", f"{world}/discord.jsonl", "--out", f"{root}/sharegpt-mix.jsonl"], f"{root}/sharegpt-mix.jsonl")]),
        ("bases", training(place, {size: {"init": f"{world}/{size}.json", "data": f"{root}/data/pretraining", **PRETRAINING, **scale["base"]} for size in sizes}, seed)),
        ask_the_teacher(place._replace(data={**place.data, "nq": f"{world}/nq/test.jsonl"}), seed, scale["pairs"]),
        ("pack", [
            *(Step(["python", "data.py", "pack", f"{root}/{name}.jsonl", *pack, "--out", f"{root}/data/{name}"], f"{root}/data/{name}") for name in RECIPE),
            Step(["python", "tests/miniature.py", "cover", "--world", world, "--questions", f"{world}/nq/test.jsonl", "--train", f"{root}/nq-synthetic.jsonl", "--out", place.data["nq"]], place.data["nq"])]),
        ("imitate", training(place, runs, seed)),
        *measure(place, runs, sizes),
        checked(place, [n for size in sizes for n in made_of(size, runs)], root)]


def checked(place, names, into):
    return ("facts", [Step(["python", "tests/miniature.py", "check", "--world", f"{place.root}/world", "--replies", *(f"{place.root}/replies/{n}.jsonl" for n in (*names, "teacher-1")), "--out", f"{into}/facts"], f"{into}/facts/teacher-1/results.json")])


def open_problem_stages(seed, root, size, tokens, scale):
    """§4.3 on one base and the largest ShareGPT-Mix: can replayed text or a penalty keep the facts, and is the recipe to blame for their loss?

    All variants see the same imitation tokens. `warmup256` is the paper's proportion, 1,000 of the 2,289 steps of its largest run, in which
    its smallest never leaves warm-up; so it is run at each size. `adamw` takes about the same absolute step: 2e-2 of weights whose RMS is 0.04.
    """
    place, into, (*fewer, most) = miniature_place(root, scale), f"{root}/open-problem", tokens
    plain, usual = f"{size}-sharegpt-mix-{most}", {"model": place.model(size, [size]), "data": f"{root}/data/sharegpt-mix", "tokens": most, **RECIPE["sharegpt-mix"]}
    variants = {f"replay{p}": {"replay": str(p / 100), "replay-data": f"{root}/data/pretraining"} for p in (1, 5, 20)} | {f"kl{beta}": {"kl": beta} for beta in ("0.1", "0.3", "1")}
    variants |= {"koala": {"data": f"{root}/data/sharegpt-mix-koala"}, "adamw": {"optimizer": "adamw", "lr": "1e-3"}, "warmup256": {"warmup": "256"}}
    runs = {f"{plain}-{name}": {**usual, **variants[name]} for name in scale["variants"] or variants} | {f"{size}-sharegpt-mix-{n}-warmup256": {**usual, "tokens": n, "warmup": "256"} for n in fewer}
    names = [size, *(f"{size}-sharegpt-mix-{n}" for n in fewer), plain, *runs]
    tasks = ["nq-3-shot", "mmlu", "humaneval"]
    ask = lambda name, models, tasks, *more: [step._replace(command=[*step.command, *more]) for step in benchmarks(place, ["--model", *(place.model(n, [size]) for n in models)], into, name, models[-1], tasks)]
    return [
        ("open-problem/pack", [Step(["python", "data.py", "pack", f"{root}/sharegpt-mix.jsonl", "--tokenizer", f"{root}/world/tokenizer", "--template", "koala", "--out", f"{root}/data/sharegpt-mix-koala"], f"{root}/data/sharegpt-mix-koala")]),
        ("open-problem/imitate", training(place, runs, seed)),
        ("open-problem/benchmarks", [*ask("text", names, tasks), *ask("turns", [plain], tasks[:2], "--shots-as", "turns")]),
        ("open-problem/replies", replies(place, runs, [size])),
        ("open-problem/style", rated(place, names, into, ["style"])),
        ("open-problem/facts", checked(place, names, into)[1])]


# --- the paper ------------------------------------------------------------------------------------------------------------------------

PARAMETERS = {"gpt2-xl": 1.558e9, "llama7b": 6.738e9, "llama13b": 13.016e9}
FETCHED = {"sharegpt": "data/sharegpt/ShareGPT_V3_unfiltered_cleaned_split.json", "hc3": "data/hc3/all.jsonl", "nq": "data/nq/NQ-open.dev.jsonl", "mmlu": "data/mmlu/test", "humaneval": "data/humaneval/HumanEval.jsonl.gz",
           "realtoxicityprompts": "data/realtoxicityprompts/prompts.jsonl", "koala": "data/koala/koala_test_set.jsonl"}


def paper_stages(args, root, sizes, tokens):
    """[(stage, [Step])] of the paper itself (§3, §4). Not stated there, and ours: Koala's 180 prompts for its unreleased 255, 1,000 prompts
    of RealToxicityPrompts with one continuation each, all of NQ-synthetic (the paper counts 0.3M tokens) one pair a row."""
    endpoint, launch = ["--endpoint", args.endpoint or "URL", "--endpoint-model"], ["torchrun", "--standalone", f"--nproc_per_node={args.gpus}"]
    data = {"nq": FETCHED["nq"], "few-shot": "data/nq/NQ-open.train.jsonl", "mmlu": "data/mmlu", "humaneval": FETCHED["humaneval"], "toxicity": FETCHED["realtoxicityprompts"], "prompts": f"{root}/heldout.jsonl",
            "seed-pairs": "data/nq/NQ-open.train.jsonl"}
    more = {"toxicity": ["--limit", "1000", "--n", "1", "--scorer", args.scorer or "URL"], "generate": ["--max-new", "1024"]}
    name = args.endpoint_model or "NAME"
    place = Place(root, "weights", data, [*endpoint, name], [*endpoint, args.judge_model or name], more, launch)
    mix = f"{root}/sharegpt-mix.jsonl"
    recipe = lambda size, name: {"data": f"{root}/data/{name}/{size}", "keep": "1", **({"tokens": None, "one-per-row": "", "warmup": "3%"} if name == "nq-synthetic" else {"batch-tokens": "65536"} if "gpt2" in size else {})}
    runs = imitation_runs(place, sizes, tokens, recipe)
    return [
        ("fetch", [Step(["python", "data.py", "fetch", name], FETCHED.get(name, f"weights/{name}")) for name in (*FETCHED, *sizes)]),
        ("corpora", [Step(["python", "data.py", "mix", "--sharegpt", FETCHED["sharegpt"], "--hc3", FETCHED["hc3"], *(["--discord", args.discord] if args.discord else []), "--out", mix], mix)]),
        ("prompts", [Step(["python", "data.py", "heldout", "--prompts", FETCHED["koala"], "--train", mix, "--n", "180", "--out", data["prompts"]], data["prompts"])]),
        ask_the_teacher(place, "0", "6000"),
        ("pack", [Step(["python", "data.py", "pack", f"{root}/{name}.jsonl", "--tokenizer", f"weights/{size}", "--out", f"{root}/data/{name}/{size}"], f"{root}/data/{name}/{size}") for size in sizes for name in RECIPE]),
        ("imitate", training(place, runs, "0")),
        *measure(place, runs, sizes)]


def estimate(command):
    """(GPU-hours, GB of disk, requests) of a command of the plan.

    Hours are an A100's: 6 FLOPs a parameter and token to train and 2 to read, at 40% of its 312 TFLOP/s; to write, the weights read once
    for 32 tokens at half of its 2 TB/s. Disk: two bytes a parameter for weights, four for GPT-2's own, and beside a run twelve for each of
    two resumable states, of which one goes. A synthesis request gives three new pairs, a reply has 400 tokens.
    """
    after = lambda flag: next((command[i + 1] for i, word in enumerate(command) if word == flag), None)
    billions = lambda model: next((n / 1e9 for size, n in PARAMETERS.items() if Path(model).name.startswith(size)), 0)
    read, write = (lambda b, n: 2 * b * 1e9 * n / (0.4 * 312e12) / 3600), (lambda b, n: 2 * b * 1e9 * n / 32 / 1e12 / 3600)
    program = next(i for i, word in enumerate(command) if word.endswith(".py"))
    task = command[program + 1] if command[program] != "train.py" else "train"
    if task == "train":
        b = billions(after("--model"))
        return 3 * read(b, count(after("--tokens") or "0.3M")), 26 * b, 0
    if task == "fetch":
        return 0, billions(command[-1]) * (4 if "gpt2" in command[-1] else 2) or 0.5, 0
    if task in ("mix", "pack"):
        return 0, 0.5, 0
    if task in ("synthesize", "collect"):
        return 0, 0, int(after("--n")) // 3 if task == "synthesize" else 180
    if task == "generate":
        return write(billions(after("--model")), 180 * 400), 0, 0
    files = [word for word in command if word.endswith(".jsonl") and "/replies/" in word][:-1]
    if task in ("style", "judge"):
        return 0, 0, 180 * len(files) * (2 if task == "judge" else 1)
    examples, own, cost = {"nq": (3610, 16, write), "mmlu": (14042, 200, read), "humaneval": (164, 200, write), "toxicity": (1000, 20, write)}.get(task, (0, 0, write))
    models = [word for word in command[program:] if billions(word)] if "--model" in command else []
    return sum(cost(billions(m), examples * own) for m in models), 0, examples * ("--endpoint" in command) + examples * max(1, len(models)) * (task == "toxicity")


def print_plan(stages, gpus):
    """One line a command, the sums below."""
    costs = [[estimate(step.command) for step in steps] for _, steps in stages]
    print("GPU-hours      GB  requests  command")
    for (stage, steps), each in zip(stages, costs):
        print(f"--- {stage}")
        for step, (hours, disk, asked) in zip(steps, each):
            print(f"{hours:9.2f} {disk:7.1f} {asked:9,d}  {shlex.join(step.command)}")
    hours, disk, asked = (sum(c[i] for each in costs for c in each) for i in range(3))
    print(f"{hours:9.2f} {disk:7.1f} {asked:9,d}  in all; {hours / gpus:.1f} hours on {gpus} A100, reckoned at 40% of their FLOP/s")
    print("People rate the replies with `python evaluate.py crowd`, on its own; --discord FILE adds the third source of ShareGPT-Mix, of which no public copy is known. --go runs these commands.")


# --- the runner ---------------------------------------------------------------------------------------------------------------------------

class Study:
    """Runs stages of commands; killed at any moment, it continues where it was."""

    def __init__(self, out, jobs):
        self.out, self.jobs, self.server, self.lock = Path(out), jobs, None, threading.Lock()
        self.home, self.preexec = Path(__file__).resolve().parent, dying_with_parent()

    def run(self, stages, only=None, world=None, port_file=None):
        """Run what is not done of all stages, or of one; a stage that needs the miniature's teacher starts it."""
        if only not in (None, *(name for name, _ in stages)):
            raise UserError(f"--only {only}: the stages are {', '.join(name for name, _ in stages)}")
        try:
            for stage, steps in stages:
                if only not in (None, stage):
                    continue
                waiting = [step for step in steps if not self.done(*step)]
                if not waiting:
                    continue
                print(f"\n--- {world.parent.name + ': ' if world else ''}{stage}", flush=True)
                if any(TEACHER in command for command, _ in waiting):
                    self.start_teacher(world, port_file)
                with ThreadPoolExecutor(self.jobs) as pool:
                    futures = [pool.submit(self.step, *step) for step in waiting]
                    try:
                        for future in futures:
                            future.result()
                    except BaseException:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise
        finally:
            if self.server:
                self.server.kill()
                self.server.wait()
                self.server = None

    def record(self, output):
        """Outputs are named from the project's folder, where the commands run."""
        return self.home / (str(output).rstrip("/") + ".command.json")

    def done(self, command, output):
        """True when `output` was finished by this very command; another command's output is not overwritten."""
        record = self.record(output)
        if not record.is_file():
            return False
        before = read_json(record)["command"]
        if before != command:
            raise UserError(f"{output} was made by another command ({shlex.join(before)}), this study would run {shlex.join(command)}; choose another --out or delete it")
        return (self.home / output).exists()

    def start_teacher(self, world, port_file):
        if self.server:
            return
        port_file.unlink(missing_ok=True)
        command = ["python", "tests/miniature.py", "serve", "--world", str(world), "--port-file", str(port_file), "--with-parent"]
        print(f"$ {shlex.join(command)} &", flush=True)
        self.server = subprocess.Popen([sys.executable, *command[1:]], cwd=self.home, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        for _ in range(600):
            if port_file.is_file():
                self.port = port_file.read_text()
                return
            if self.server.poll() is not None:
                break
            time.sleep(0.1)
        raise Failure("the miniature's teacher did not start")

    def step(self, command, output):
        """Run one command, show it and what it said, and record it beside its output."""
        real = [c.replace("PORT", self.port) if c == TEACHER else c for c in command]
        started, launcher = time.monotonic(), ["-m", "torch.distributed.run"] if command[0] == "torchrun" else []
        done = subprocess.run([sys.executable, *launcher, *real[1:]], cwd=self.home, text=True, stdin=subprocess.DEVNULL, capture_output=True, preexec_fn=self.preexec,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})
        with self.lock:
            print(f"$ {shlex.join(real)}", *done.stdout.splitlines(), *done.stderr.splitlines(), f"({time.monotonic() - started:.1f} s)", sep="\n  ", flush=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            if done.returncode == 2 and "humaneval" in command and "--unsafe" in last:              # no sandbox here: the study goes on without this benchmark
                return print("  left out of the study", flush=True)
            raise (UserError if done.returncode == 2 else Failure)(f"{shlex.join(real)} ended with status {done.returncode}: {last}; the same study command continues")
        write_json(self.record(output), {"command": command})


def study(args):
    if args.plan:
        return paper(args)
    if args.go:
        raise UserError("--go runs a plan: --plan paper --go")
    scale, out, home = QUICK if args.quick else FULL, *study_folder(args.out or ("runs/study-quick" if args.quick else "runs/study"))
    if not (home / "tests" / "miniature.py").is_file():
        raise UserError("tests/miniature.py is missing; the study's embedded default lives there")
    seeds, sizes, tokens = args.seeds.split(","), chosen("--sizes", args.sizes, ["large", "small"]), tokens_of(args, scale["tokens"])
    if not all(re.fullmatch("[0-9]+", s) for s in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {args.seeds}: different whole numbers, separated by commas")
    started = time.monotonic()
    with locked(home / out / "study", f"study {out}"):
        runner = Study(home / out, args.jobs)
        for seed in seeds:
            root = out / f"seed-{seed}"
            stages = study_stages(seed, str(root), sizes, tokens, scale)
            if args.open_problem:
                stages += open_problem_stages(seed, str(root), sizes[0], tokens["sharegpt-mix"], scale)
            runner.run(stages, args.only, root / "world", home / root / "teacher.port")
        if args.only:
            return
        folders = lambda *kinds: [str(out / f"seed-{seed}" / kind) for seed in seeds for kind in kinds if (home / out / f"seed-{seed}" / kind).exists()]
        tables = {"report": [*SCORES, "facts"]} | ({"open-problem": ["open-problem"]} if args.open_problem else {})
        for name, kinds in tables.items():
            baseline = ["--baseline", f"{sizes[0]}-sharegpt-mix-{tokens['sharegpt-mix'][-1]}"] if name == "open-problem" else []
            runner.step(["python", "evaluate.py", "table", *folders(*kinds), *baseline, "--out", str(out / name)], home / out / name)
            print(f"\n{(home / out / name / 'report.md').read_text(encoding='utf-8')}")
        print(" ".join(f"{out}/{name}/report.md" for name in tables) + f", and the figures beside it ({(time.monotonic() - started) / 60:.1f} minutes)")


def paper(args):
    """--plan paper: the commands of the paper at full scale and their estimated costs; with --go they are run."""
    if args.quick or args.open_problem:
        raise UserError("--plan paper: --quick and --open-problem belong to the miniature")
    out, home = study_folder(args.out or "runs/paper")
    sizes = chosen("--sizes", args.sizes, [*PARAMETERS][::-1])
    stages = paper_stages(args, str(out), sizes, tokens_of(args, {"sharegpt-mix": "20M,80M,150M", "nq-synthetic": "0.3M"}))
    table = ("table", [Step(["python", "evaluate.py", "table", *(f"{out}/{kind}" for kind in SCORES), "--out", f"{out}/report"], f"{out}/report/report.md")])
    if not args.go:
        return print_plan([*stages, table], args.gpus)
    if not args.endpoint or not args.endpoint_model or not args.scorer:
        raise UserError("--go needs --endpoint URL, --endpoint-model NAME and --scorer URL: the plan asks them")
    with locked(home / out / "study", f"study {out}"):
        Study(home / out, 1).run([*stages, table], args.only)


def study_folder(out):
    """(folder, home): commands run from the project's folder, and name what lies in it by a path from there."""
    out, home = Path(out).absolute(), Path(__file__).resolve().parent
    return out.relative_to(home) if out.is_relative_to(home) else out, home


def chosen(flag, text, known):
    """The names in `text`, separated by commas, in the order of `known`; all where there is no text."""
    names = text.split(",") if text else known
    if not set(names) <= set(known):
        raise UserError(f"{flag} {text}: out of {', '.join(known)}")
    return [name for name in known if name in names]


def tokens_of(args, usual):
    """{imitation set: sizes, the smallest first}."""
    given = {"sharegpt-mix": args.tokens, "nq-synthetic": args.nq_tokens}
    return {name: sorted((given[name] or sizes).split(","), key=count) for name, sizes in usual.items()}


# --- the program ------------------------------------------------------------------------------------------------------------------------

def main():
    parser = Parser(description="Ask a teacher, build imitation sets, run the study.", example="python imitation.py study --quick")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    p = commands.add_parser("study", help="the whole paper on the embedded default, or its plan at full scale", example="python imitation.py study --seeds 100,101,102")
    p.add_argument("--quick", action="store_true", help="a smaller world, for trying the plumbing: its numbers mean little")
    p.add_argument("--open-problem", action="store_true", help="afterwards §4.3: replayed text, a KL penalty and changes of the recipe, on the larger base")
    p.add_argument("--out", metavar="DIR", help="None is runs/study, with --quick runs/study-quick, of the plan runs/paper")
    p.add_argument("--seeds", default="100", help="worlds, separated by commas")
    p.add_argument("--sizes", help="base models, separated by commas; None is small,large, of the plan gpt2-xl,llama7b,llama13b")
    p.add_argument("--tokens", type=sizes_type, help="sizes of ShareGPT-Mix, separated by commas; None is the paper's 20M,80M,150M divided by 1000")
    p.add_argument("--nq-tokens", type=sizes_type, help="sizes of NQ-synthetic; None is 20k,50k,85k, of the plan 0.3M")
    p.add_argument("--only", metavar="STAGE", help="run one stage of each seed")
    p.add_argument("--jobs", type=positive, default=min(4, os.cpu_count() or 1), help="commands side by side, each on one thread")
    p.add_argument("--plan", choices=["paper"], help="print the paper at full scale, command by command, with its estimated costs")
    p.add_argument("--go", action="store_true", help="run the plan")
    p.add_argument("--gpus", type=positive, default=8, help="plan: of this machine")
    p.add_argument("--endpoint", metavar="URL", help="plan: the teacher's and the judge's server")
    p.add_argument("--endpoint-model", metavar="NAME", help="plan: the teacher's name there")
    p.add_argument("--judge-model", metavar="NAME", help="plan: the judge's; None is the teacher's")
    p.add_argument("--scorer", metavar="URL", help="plan: the toxicity scorer, as for evaluate.py toxicity")
    p.add_argument("--discord", metavar="FILE", help="plan: dialogues with Discord bots, as for data.py mix")

    p = commands.add_parser("synthesize", help="an imitation set for one task", example="python imitation.py synthesize nq --seed-pairs pairs.jsonl --n 6000 --endpoint http://127.0.0.1:8000/v1 --endpoint-model NAME --out nq.jsonl")
    p.add_argument("what", choices=["nq", "tldr"], help="nq: question-answer pairs out of seed pairs; tldr: summaries of given passages")
    p.add_argument("--seed-pairs", metavar="FILE", help="nq: question, answer; the paper uses ten")
    p.add_argument("--posts", metavar="FILE", help="tldr: JSON lines with `post`, and `id` if there is one")
    p.add_argument("--n-seeds", type=positive, metavar="N", help="nq: use the first so many pairs of the file, the paper ten; None is all")
    p.add_argument("--n", type=count, help="pairs to keep, None is 6000 (§3); of the passages the first n, None is all")
    p.add_argument("--temperature", type=real, default=1.0, help="§3")
    p.add_argument("--exclude", action="append", default=[], metavar="FILE", help="nq: questions that must not appear, such as the evaluation set")
    p.add_argument("--max-answer-words", type=positive, default=10, help="nq: a longer answer is rejected; §3 says a few words")
    add_asking_flags(p)

    p = commands.add_parser("collect", help="a teacher's replies to given prompts", example="python imitation.py collect --prompts heldout.jsonl --endpoint http://127.0.0.1:8000/v1 --endpoint-model NAME --out replies.jsonl")
    p.add_argument("--prompts", required=True, metavar="FILE", help="`prompt` or `messages` that end with the user's turn")
    p.add_argument("--samples", type=positive, default=1, help="replies a prompt")
    p.add_argument("--temperature", type=real, help="None is not sent")
    add_asking_flags(p)
    args = parser.parse_args()
    {"study": study, "synthesize": synthesize, "collect": collect}[args.command](args)


def sizes_type(text):
    for size in text.split(","):
        count(size)
    return text


def add_asking_flags(p):
    p.add_argument("--max-new", type=positive, help="tokens of a reply at most; None leaves it to the server")
    p.add_argument("--out", required=True, metavar="FILE")
    p.add_argument("--seed", type=natural, default=0)
    p.add_argument("--dry-run", action="store_true", help="print the number of requests and the estimated tokens; send nothing")
    add_endpoint_flags(p)


if __name__ == "__main__":
    run(main)
