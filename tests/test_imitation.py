import http.server
import json
import os
import random
import re
import resource
import shutil
import signal
import ssl
import subprocess
import sys
import termios
import threading
import time
from collections import Counter

import pytest
import requests

import data
import imitation as I
from conftest import ROOT, lines_of, one_line, program


class Faulty:
    """A loopback server whose answers `behave(n, request, handler)` decides: a dict is a reply's fields, an int a status, text or bytes a body."""

    def __init__(self, behave=lambda n, request, handler: {}):
        self.requests, self.lock, outer = [], threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16                                           # head and body in one piece

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    n = len(outer.requests)
                    outer.requests.append((request, dict(self.headers)))
                answer = behave(n, request, self)
                if answer is None:                                       # the connection is dropped
                    self.close_connection = True
                    return
                status, headers = 200, {}
                if isinstance(answer, tuple):
                    status, answer, headers = answer
                if isinstance(answer, int):
                    status, answer = answer, json.dumps({"error": {"message": f"status {answer}"}})
                if isinstance(answer, dict) and status == 200:
                    choice = {"message": {"role": "assistant", "content": answer.get("content", f"reply to {request['messages'][-1]['content']}")}, "finish_reason": answer.get("finish", "stop")}
                    answer = json.dumps({"model": "m", "choices": answer.get("choices", [choice]), "usage": {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}})
                body = (json.dumps(answer) if isinstance(answer, dict) else answer)
                body = body.encode() if isinstance(body, str) else body
                try:
                    self.send_response(status)
                    for k, v in {"Content-Length": str(len(body)), **headers}.items():
                        self.send_header(k, v)
                    self.end_headers()
                    self.wfile.write(body)
                    self.wfile.flush()
                except ConnectionError:
                    self.close_connection = True

            def log_message(self, *args):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

            def handle_error(self, *args):
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def asked(self):
        return Counter(r["messages"][-1]["content"] for r, _ in self.requests)


def queries(n):
    return [{"messages": [{"role": "user", "content": f"q{i}"}], "seed": i} for i in range(n)]


def teacher(server, tmp_path, **kw):
    return I.Teacher(server.url, "m", tmp_path / "journal.jsonl", **{"timeout": 5, **kw})


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    """Waits between retries are cut to a hundredth; what is tried, and how often, stays the same."""
    whole = I.backoff
    monkeypatch.setattr(I, "backoff", lambda attempt: whole(attempt) / 100)


def test_replies_come_in_the_order_of_the_requests_and_are_journaled(tmp_path):
    server = Faulty(lambda n, request, handler: time.sleep(random.random() / 50) or {})
    with teacher(server, tmp_path) as t:
        out = [record["content"] for _, record in t.ask(queries(60))]
    assert out == [f"reply to q{i}" for i in range(60)]
    with teacher(server, tmp_path) as t:                                 # again: everything is in the journal
        assert [record["content"] for _, record in t.ask(queries(60))] == out
    assert len(server.requests) == 60 and len(lines_of(tmp_path / "journal.jsonl")) == 60


@pytest.mark.parametrize("status, body", [(401, {"error": {"message": "bad key"}}), (402, {}), (403, {}), (404, {"error": {"message": "no such model"}}), (429, {"error": {"type": "insufficient_quota", "message": "pay"}}), (302, {})])
def test_what_cannot_get_better_stops_the_work(status, body, tmp_path):
    server = Faulty(lambda n, request, handler: (status, json.dumps(body), {}))
    with teacher(server, tmp_path, concurrency=2) as t, pytest.raises(data.UserError, match=str(status)):
        list(t.ask(queries(50)))
    assert len(server.requests) <= 4


def test_a_request_that_is_refused_fails_alone(tmp_path):
    server = Faulty(lambda n, request, handler: 400 if request["messages"][0]["content"] == "q7" else {})
    with teacher(server, tmp_path) as t:
        statuses = [r["status"] for _, r in t.ask(queries(12))]
    assert statuses == ["ok"] * 7 + ["refused"] + ["ok"] * 4
    assert len(server.requests) == 12


@pytest.mark.parametrize("usage", ["n/a", {"total_tokens": "12"}, None, [1]])
def test_strange_usage_does_not_lose_a_reply(usage, tmp_path):
    body = json.dumps({"choices": [{"message": {"content": "a \ud83d b"}, "finish_reason": "stop"}], "usage": usage})
    with teacher(Faulty(lambda n, request, handler: body), tmp_path) as t:
        assert [r["status"] for _, r in t.ask(queries(2))] == ["ok", "ok"]
    data.write_jsonl(tmp_path / "out.jsonl", [{"text": "a \ud83d b"}])              # half an emoji can be written, and read again
    assert lines_of(tmp_path / "out.jsonl") == [{"text": "a \ud83d b"}]


def test_a_dripping_server_is_given_up(tmp_path):
    def drip(n, request, handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(200):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)
    started = time.monotonic()
    with teacher(Faulty(drip), tmp_path, retries=1, timeout=0.4) as t, pytest.raises(data.Failure, match="no whole reply"):
        list(t.ask(queries(1)))
    assert time.monotonic() - started < 8                                # it would drip for 20 s


def test_equal_requests_under_way_are_asked_once(tmp_path):
    server = Faulty(lambda n, request, handler: time.sleep(0.1) or {})
    with teacher(server, tmp_path) as t:
        assert len([r for _, r in t.ask(queries(1) * 5)]) == 5
    assert len(server.requests) == 1


def test_a_key_that_is_none_is_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-sec\nret")
    with pytest.raises(data.UserError) as e:
        I.Teacher("https://example.org/v1", "m", tmp_path / "j", key_env="MY_KEY")
    assert "sk-sec" not in str(e.value)
    monkeypatch.setenv("MY_KEY", "sk-fine\r\n")
    assert I.Teacher("https://example.org/v1", "m", tmp_path / "j", key_env="MY_KEY").key == "sk-fine"
    with pytest.raises(data.UserError, match="plain http"):
        I.Teacher("http://127.evil.com/v1", "m", tmp_path / "k", key_env="MY_KEY")


def test_a_teacher_without_pairs_is_a_failure(world, tmp_path):
    server = Faulty(lambda n, request, handler: {"content": "I'd rather not."})
    done = synthesize(world, server.url, tmp_path / "a.jsonl", "--n", "50", status=1)
    assert "reply without a pair" in done.stderr and not (tmp_path / "a.jsonl").exists()


def test_replies_that_are_no_whole_answer_are_kept_apart(tmp_path):
    said = {"choices": [{"message": {"content": None, "refusal": "I won't"}, "finish_reason": "stop"}]}
    azure = (400, json.dumps({"error": {"code": "content_filter", "message": "filtered"}}), {})
    answers = [{"finish": "length"}, {"content": ""}, {"content": None}, {"finish": "content_filter"}, said, azure, {}]
    server = Faulty(lambda n, request, handler: answers[int(request["messages"][0]["content"][1:])])
    with teacher(server, tmp_path) as t:
        assert [r["status"] for _, r in t.ask(queries(7))] == ["length", "empty", "empty", "content_filter", "content_filter", "content_filter", "ok"]
    with teacher(server, tmp_path) as t:                                 # all of them are finished
        assert len(list(t.ask(queries(7)))) == len(server.requests) == 7


def test_a_reply_over_the_limit_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(I, "MAX_REPLY_BYTES", 1 << 17)
    server = Faulty(lambda n, request, handler: "x" * (10 << 20))
    with teacher(server, tmp_path, retries=1) as t, pytest.raises(data.Failure, match="cut off"):
        list(t.ask(queries(1)))


def test_a_server_that_stalls_is_given_up(tmp_path):
    server = Faulty(lambda n, request, handler: threading.Event().wait(3) or {})
    with teacher(server, tmp_path, retries=1, timeout=0.2) as t, pytest.raises(data.Failure, match="no answer"):
        list(t.ask(queries(1)))


def test_retry_after_is_a_number_or_a_date():
    assert I.retry_after("3") == 3 and I.retry_after(None) is None and I.retry_after("soon") is None
    from email.utils import formatdate
    assert 5 < I.retry_after(formatdate(time.time() + 10, usegmt=True)) <= 10


def test_the_key_of_a_request_holds_what_determines_the_reply_and_not_the_port(tmp_path):
    request = queries(1)[0]
    key = lambda model="m", teacher_id="", omit=(), **more: I.request_key(model, teacher_id, omit, {**request, **more})
    assert len({key(), key(seed=9), key(temperature=0.5), key(index=1), key(messages=[]), key(model="n"), key(teacher_id="new"), key(omit=["seed"])}) == 8
    assert key(max_tokens=None) == key() and key(omit=["temperature"], temperature=1) == key()
    asked = []
    for server in (Faulty(), Faulty()):                                  # another port, the same journal: nothing is asked again
        with teacher(server, tmp_path) as t:
            list(t.ask([request]))
        asked.append(len(server.requests))
    assert asked == [1, 0]


def test_a_second_process_on_one_journal_is_refused(tmp_path):
    with teacher(Faulty(), tmp_path), pytest.raises(data.UserError, match="in use"):
        teacher(Faulty(), tmp_path)


@pytest.mark.parametrize("url, env, key", [("https://api.openai.com/v1", {"OPENAI_API_KEY": "sk"}, "sk"), ("https://example.org/v1", {"OPENAI_API_KEY": "sk"}, None), ("http://127.0.0.1:1/v1", {"OPENAI_API_KEY": "sk"}, None)])
def test_the_openai_key_goes_to_openai_alone(url, env, key, tmp_path, monkeypatch):
    for k, v in env.items():
        monkeypatch.setenv(k, v)
    assert I.Teacher(url, "m", tmp_path / "j").key == key


def test_a_named_key_does_not_travel_over_plain_http_nor_into_messages(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with pytest.raises(data.UserError, match="plain http"):
        I.Teacher("http://example.org/v1", "m", tmp_path / "j", key_env="MY_KEY")
    server = Faulty(lambda n, request, handler: (401, json.dumps({"error": {"message": f"wrong key {handler.headers['Authorization']}"}}), {}))
    with teacher(server, tmp_path, key_env="MY_KEY") as t, pytest.raises(data.UserError) as e:
        list(t.ask(queries(1)))
    assert server.requests[0][1]["Authorization"] == "Bearer sk-secret" and "sk-secret" not in str(e.value) and "[key]" in str(e.value)


def test_loopback_bypasses_proxies_and_netrc(tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\nmachine example.org login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    server = Faulty()
    with teacher(server, tmp_path) as t:
        assert len(list(t.ask(queries(2)))) == 2
    assert "Authorization" not in server.requests[0][1]
    assert "Authorization" not in I.Teacher("https://example.org/v1", "m", tmp_path / "j").prepared.headers      # nor does netrc speak for others


def test_sampling_fields_that_were_not_set_are_not_sent(tmp_path):
    server = Faulty()
    with teacher(server, tmp_path) as t:
        list(t.ask([{"messages": [{"role": "user", "content": "q"}], "max_tokens": None, "index": 3}]))
    assert set(server.requests[0][0]) == {"model", "messages"}


FAULTS = ["429", "429 with Retry-After", "500", "503", "408", "drop", "half a body", "not JSON", "HTML", "wrong type", "no choices", "null", "closes silently", "10 MB", "stall"]
RATES = [6, 2, 4, 3, 2, 4, 4, 3, 3, 4, 3, 2, 4, 0.4, 0.1]                # per cent; 45 in all


class Unreliable(Faulty):
    """Which fault meets a request is drawn from its text and how often it came, so that a seed gives the same faults in any order. Counts what it charged."""

    def __init__(self, seed=0):
        self.came, self.charged, self.met = Counter(), Counter(), Counter()
        super().__init__(self.misbehave)
        self.seed = seed

    def misbehave(self, n, request, handler):
        text = request["messages"][-1]["content"]
        with self.lock:
            self.came[text] += 1
            kind = random.Random(f"{self.seed} {text} {self.came[text]}").choices(["fine", *FAULTS], [100 - sum(RATES), *RATES])[0]
            self.met[kind] += 1
            self.charged[text] += kind in ("fine", "wrong type", "closes silently")
        good = json.dumps({"model": "m", "choices": [{"message": {"content": f"reply to {text}"}, "finish_reason": "stop"}], "usage": {"total_tokens": 3}})
        if kind == "stall":
            time.sleep(2.5)
            return None
        if kind == "closes silently":                                    # whole, but the kept-alive connection is gone afterwards
            handler.close_connection = True
        return {"fine": good, "closes silently": good, "429": 429, "429 with Retry-After": (429, "{}", {"Retry-After": "0"}), "500": 500, "503": (503, "loading", {}), "408": 408, "drop": None,
                "half a body": (200, good[:40], {"Content-Length": str(len(good)), "Connection": "close"}), "not JSON": "{not json", "HTML": (200, "<html>busy</html>", {"Content-Type": "text/html"}),
                "wrong type": (200, good, {"Content-Type": "text/plain"}), "no choices": {"choices": []}, "null": "null", "10 MB": "x" * (10 << 20)}[kind]


def test_2000_requests_survive_every_kind_of_fault_with_every_key_exactly_once(tmp_path):
    server = Unreliable()
    with teacher(server, tmp_path, concurrency=16, retries=60, timeout=2) as t:
        out = [record["content"] for _, record in t.ask(queries(2000))]
    assert out == [f"reply to q{i}" for i in range(2000)]
    keys = [r["key"] for r in lines_of(tmp_path / "journal.jsonl")]
    assert len(keys) == len(set(keys)) == 2000
    assert set(server.met) == {"fine", *FAULTS} and set(server.charged) == {f"q{i}" for i in range(2000)}
    assert sum(server.charged.values()) <= 2000 + server.met["stall"]    # on a busy machine a good reply too may come too late


QUICK = "import sys, imitation as I; whole = I.backoff; I.backoff = lambda n: whole(n) / 100; I.run(I.main)"      # the program, with its waits between tries cut as above


def test_five_kills_on_the_way_lose_nothing_and_pay_little_twice(tmp_path):
    server, concurrency, n = Unreliable(1), 16, 2000
    data.write_jsonl(tmp_path / "prompts.jsonl", ({"id": str(i), "prompt": f"q{i}"} for i in range(n)))
    out, journal = tmp_path / "r.jsonl", tmp_path / "r.jsonl.journal.jsonl"
    command = [sys.executable, "-c", QUICK, "collect", "--prompts", tmp_path / "prompts.jsonl", "--endpoint", server.url, "--endpoint-model", "m", "--concurrency", str(concurrency), "--retries", "60", "--timeout", "2", "--out", out]
    text_of = {I.request_key("m", "", [], {"messages": [{"role": "user", "content": f"q{i}"}], "seed": 0, "index": 0}): f"q{i}" for i in range(n)}
    for lines in (150, 500, 800, 1200, 1700):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (journal.is_file() and journal.read_bytes().count(b"\n") >= lines):
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        finished = {text_of[json.loads(line)["key"]] for line in journal.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")}
        time.sleep(0.1)                                                  # what was on its way to the server has arrived
        asked = len(server.requests)
        server.after = getattr(server, "after", []) + [(finished, asked)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    for finished, asked in server.after:                                 # no finished request was asked again
        assert not finished & {r["messages"][-1]["content"] for r, _ in server.requests[asked:]}
    assert [r["messages"][-1]["content"] for r in lines_of(out)] == [f"reply to q{i}" for i in range(n)]
    keys = [r["key"] for r in lines_of(journal)]
    assert len(keys) == len(set(keys)) == n and set(keys) == set(text_of)
    assert sum(server.charged.values()) <= n + 5 * concurrency + server.met["stall"]


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refusal_is_journaled_once_and_five_from_the_start_stop_the_work(status, tmp_path):
    server = Faulty(lambda n, request, handler: status if request["messages"][0]["content"] == "q3" else {})
    for _ in range(2):
        with teacher(server, tmp_path) as t:
            assert [r["status"] for _, r in t.ask(queries(8))] == ["ok"] * 3 + ["refused"] + ["ok"] * 4
    assert server.asked()["q3"] == 2 and sum(server.asked().values()) == 9
    assert [str(status) in r["error"] for r in lines_of(tmp_path / "journal.jsonl") if r["status"] == "refused"] == [True]
    server = Faulty(lambda n, request, handler: status)
    with I.Teacher(server.url, "m", tmp_path / "other", concurrency=1) as t, pytest.raises(data.UserError, match="first five"):
        list(t.ask(queries(50)))
    assert len(server.requests) == 5


def test_refusals_are_asked_again_by_a_later_run(tmp_path):
    for behave, wanted in ((lambda n, request, handler: 400, ["refused"] * 3), (lambda n, request, handler: {}, ["ok"] * 3)):
        with teacher(Faulty(behave), tmp_path) as t:
            assert [r["status"] for _, r in t.ask(queries(3))] == wanted


def test_a_request_that_always_fails_does_not_end_the_night(tmp_path):
    server = Faulty(lambda n, request, handler: 500 if request["messages"][0]["content"] == "q3" else {})
    with teacher(server, tmp_path, retries=2, concurrency=2) as t:
        assert [r["status"] for _, r in t.ask(queries(20))] == ["ok"] * 3 + ["unanswered"] + ["ok"] * 16
    assert server.asked()["q3"] == 3 and len(lines_of(tmp_path / "journal.jsonl")) == 19
    with teacher(Faulty(), tmp_path) as t:                               # a later run asks it again, and it alone
        assert [r["status"] for _, r in t.ask(queries(20))] == ["ok"] * 20 and t.counts["replies"] == 1


def test_a_server_that_goes_down_stops_the_work(tmp_path):
    server = Faulty(lambda n, request, handler: {} if n < 10 else 500)
    with teacher(server, tmp_path, retries=2, concurrency=2) as t, pytest.raises(data.Failure, match="the same command continues"):
        list(t.ask(queries(100)))
    assert len(server.requests) <= 10 + 3 * 6


def test_a_throttled_request_waits_while_others_are_served(tmp_path):
    """429 is no failure of a request as long as the server works: here each succeeds at its sixth try only, with two retries."""
    came = Counter()

    def behave(n, request, handler):
        came[text := request["messages"][0]["content"]] += 1
        return 429 if text != "q0" and came[text] < 6 and sum(c >= 6 for c in came.values()) < 39 - int(text[1:]) % 3 and n % 2 else {}
    with teacher(Faulty(behave), tmp_path, retries=2, concurrency=8) as t:
        assert {r["status"] for _, r in t.ask(queries(60))} == {"ok"}
    assert t.counts["retries"] > 10


def test_retry_after_pauses_every_thread(tmp_path):
    arrivals, together = [], threading.Barrier(4)

    def behave(n, request, handler):
        arrivals.append(time.monotonic())
        if n < 4:
            together.wait(10)                                            # four are under way, one is told to wait
            if n == 0:
                return (429, "{}", {"Retry-After": "0.4"})
            while not t.pause_until:
                time.sleep(0.001)
        return {}
    with teacher(Faulty(behave), tmp_path, concurrency=4) as t:
        list(t.ask(queries(20)))
    assert min(arrivals[4:]) >= t.pause_until > 0
    with teacher(Faulty(), tmp_path) as t:                               # nor may one that already waits for its turn slip into the pause
        now = time.monotonic()
        t.next_turn = now + 0.8
        waiting = threading.Thread(target=t._turn)
        waiting.start()
        t.pause_until = now + 1
        waiting.join()
        assert time.monotonic() >= now + 1


def test_rpm_spaces_the_requests(tmp_path):
    started = time.monotonic()
    with teacher(Faulty(), tmp_path, rpm=1200) as t:
        list(t.ask(queries(11)))
    assert time.monotonic() - started >= 10 * 60 / 1200


@pytest.mark.parametrize("more, name", [({}, "max_tokens"), ({"max_tokens_field": "max_completion_tokens"}, "max_completion_tokens")])
def test_the_field_of_the_limit_has_the_name_that_the_host_wants(more, name, tmp_path):
    server = Faulty()
    with teacher(server, tmp_path, omit=["seed"], **more) as t:
        list(t.ask([{"messages": [{"role": "user", "content": "q"}], "max_tokens": 7, "seed": 3, "temperature": None}]))
    assert server.requests[0][0] == {"model": "m", "messages": [{"role": "user", "content": "q"}], name: 7}


def test_no_more_than_max_requests_are_sent_retries_and_earlier_runs_included(tmp_path):
    server = Faulty(lambda n, request, handler: 500 if n % 3 == 0 else {})
    with teacher(server, tmp_path, max_requests=10, concurrency=4) as t:
        statuses = Counter(r["status"] for _, r in t.ask(queries(30)))
    assert len(server.requests) == 10 and statuses == {"ok": 6, "unasked": 24} and "--max-requests 10" in t.spent
    with teacher(server, tmp_path, max_requests=10, concurrency=4) as t:                # the six in the journal count
        assert Counter(r["status"] for _, r in t.ask(queries(30)))["ok"] <= 10
    assert len(server.requests) == 14


@pytest.mark.parametrize("max_tokens, limit, least", [(50, 1000, 600), (None, 1000, 600)])
def test_the_work_stops_before_max_tokens_total_is_passed(max_tokens, limit, least, tmp_path):
    body = lambda n, request, handler: json.dumps({"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "usage": {"total_tokens": 52}})
    server = Faulty(body)
    asks = [{**q, "max_tokens": max_tokens} for q in queries(100)]
    with teacher(server, tmp_path, max_tokens_total=limit) as t:
        statuses = Counter(r["status"] for _, r in t.ask(asks))
    assert set(statuses) == {"ok", "unasked"} and least <= 52 * len(server.requests) <= limit
    before = len(server.requests)
    with teacher(server, tmp_path, max_tokens_total=limit) as t:         # a restart does not renew the budget, and finds what is there
        assert Counter(r["status"] for _, r in t.ask(asks)) == statuses
    assert len(server.requests) == before
    with teacher(server, tmp_path) as t:
        assert {r["status"] for _, r in t.ask(asks)} == {"ok"}
    assert len(server.requests) == 100


def test_a_full_disk_stops_the_work_and_loses_nothing(tmp_path):
    server = Faulty()
    data.write_jsonl(tmp_path / "prompts.jsonl", ({"id": str(i), "prompt": f"q{i}"} for i in range(300)))
    command = ("imitation.py", "collect", "--prompts", tmp_path / "prompts.jsonl", "--endpoint", server.url, "--endpoint-model", "m", "--concurrency", "4", "--out", tmp_path / "r.jsonl")
    done = program(*command, status=1, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    assert "nothing finished is lost" in one_line(done) and "journal" in done.stderr and not (tmp_path / "r.jsonl").exists()
    finished, asked = lines_of(tmp_path / "r.jsonl.journal.jsonl"), len(server.requests)
    assert 20 < len(finished) and asked <= len(finished) + 4             # whole lines; what was under way alone was for nothing
    program(*command)
    assert len(lines_of(tmp_path / "r.jsonl")) == 300 and len(server.requests) == asked + 300 - len(finished)


def test_a_torn_and_a_garbled_line_are_repaired_and_asked_again(tmp_path, capsys):
    server, journal = Faulty(), tmp_path / "journal.jsonl"
    with teacher(server, tmp_path) as t:
        list(t.ask(queries(10)))
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[3] = b"\xff\x00 garbled\n"
    lines[5] = b'{"key": [], "status": "ok"}\n'
    journal.write_bytes(b"".join(lines)[:-20])
    capsys.readouterr()
    with teacher(server, tmp_path) as t:
        assert [r["content"] for _, r in t.ask(queries(10))] == [f"reply to q{i}" for i in range(10)]
    said = capsys.readouterr().err
    assert "torn last line" in said and "2 garbled lines moved to" in said and len(server.requests) == 13
    assert len({r["key"] for r in lines_of(journal)}) == len(lines_of(journal)) == 10
    assert (tmp_path / "journal.jsonl.garbled").read_bytes() == lines[3] + lines[5]


def test_progress_shows_replies_retries_tokens_and_the_time_left(tmp_path):
    server = Faulty(lambda n, request, handler: 500 if n == 3 else time.sleep(0.01) or {})
    data.write_jsonl(tmp_path / "prompts.jsonl", ({"prompt": f"q{i}"} for i in range(200)))
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 200))
    command = [sys.executable, "-c", QUICK, "collect", "--prompts", tmp_path / "prompts.jsonl", "--endpoint", server.url, "--endpoint-model", "m", "--out", tmp_path / "r.jsonl"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:                                                      # the program has ended
        pass
    assert process.wait() == 0
    assert re.search(r"\d+/200 \[\d\d:\d\d<\d\d:\d\d, .*1 retries, \d+ tokens, \d+ tokens/s", shown.decode())


def test_a_redirect_does_not_carry_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    other = Faulty()
    server = Faulty(lambda n, request, handler: (307, "", {"Location": other.url + "/chat/completions"}))
    with teacher(server, tmp_path, key_env="MY_KEY") as t, pytest.raises(data.UserError, match="redirect"):
        list(t.ask(queries(1)))
    assert len(server.requests) == 1 and not other.requests


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path, monkeypatch):
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    pem = tmp_path / "cert.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", pem, "-out", tmp_path / "c", "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    pem.write_bytes(pem.read_bytes() + (tmp_path / "c").read_bytes())
    server = Faulty()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server.server.socket = context.wrap_socket(server.server.socket, server_side=True)
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with I.Teacher(server.url.replace("http:", "https:"), "m", tmp_path / "j", key_env="MY_KEY") as t, pytest.raises(data.UserError, match="certificate is not one"):
        list(t.ask(queries(1)))
    assert not server.requests


def test_a_key_that_the_server_echoes_is_written_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-a-secret-of-some-length")
    echo = lambda n, request, handler: {"content": f"your headers: {handler.headers['Authorization']}"} if n else (500, handler.headers["Authorization"], {})
    with teacher(Faulty(echo), tmp_path, key_env="MY_KEY") as t:
        assert [r["content"] for _, r in t.ask(queries(1))] == ["your headers: Bearer [key]"]
    assert "sk-a-secret" not in (tmp_path / "journal.jsonl").read_text()


@pytest.mark.parametrize("url, env, words", [("https://example.org/v1", "OPENAI_API_KEY", "api.openai.com alone"), ("http://api.openai.com/v1", "OPENAI_API_KEY", "plain http"), ("https://me:pass@example.org/v1", None, "without user, password"),
                                             ("https://example.org/v1?key=pass", None, "without user, password")])
def test_keys_where_they_do_not_belong_are_refused(url, env, words, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with pytest.raises(data.UserError, match=words) as e:
        I.Teacher(url, "m", tmp_path / "j", key_env=env)
    assert "pass@" not in str(e.value) and "=pass" not in str(e.value)
    assert I.Teacher("http://api.openai.com/v1", "m", tmp_path / "k").key is None


def test_connections_are_kept_and_as_many_as_the_concurrency(tmp_path):
    peers, busy, most = set(), [0], [0]

    def behave(n, request, handler):
        peers.add(handler.client_address)
        busy[0] += 1
        most[0] = max(most[0], busy[0])
        time.sleep(0.02)
        busy[0] -= 1
        return {}
    with teacher(Faulty(behave), tmp_path, concurrency=6) as t:
        list(t.ask(queries(120)))
    assert len(peers) == 6 and most[0] == 6


PAIRS = {
    "plain": ("Q: who is x?\nA: y", [("who is x?", "y")]),
    "several": ("Q: a?\nA: b\n\nQ: c?\nA: d\n", [("a?", "b"), ("c?", "d")]),
    "numbered": ("1. Q: a?\nA: b\n2) Q: c?\n   A: d", [("a?", "b"), ("c?", "d")]),
    "bold": ("**Q:** a?\n**A:** b", [("a?", "b")]),
    "spelled out": ("Here you go:\n\nQuestion 1: a?\nAnswer 1: b", [("a?", "b")]),
    "bullets": ("- Q: a?\n- A: b", [("a?", "b")]),
    "blank line between": ("Q: a?\n\nA: b", [("a?", "b")]),
    "question without answer": ("Q: a?\nQ: c?\nA: d", [("c?", "d")]),
    "answer without question": ("A: b\nQ: c?", []),
    "marks within": ('Q: who sang it?\nA: "Bohemian Rhapsody" by Queen\nQ: what is __name__?\nA: **a variable**', [("who sang it?", '"Bohemian Rhapsody" by Queen'), ("what is __name__?", "a variable")]),
    "one line": ("Q: a? A: b\n2. **Q:** c? **A:** d\nQ: what is vitamin a?\nA: retinol A: no", [("a?", "b"), ("c?", "d"), ("what is vitamin a?", "retinol A: no")]),
    "number after the label": ("Q: 2. who?\nA: me", [("who?", "me")]),
    "prose": ("I cannot do that. A: really? Also, apples.", []),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_read_leniently(name):
    text, wanted = PAIRS[name]
    assert I.parse_pairs(text) == wanted


@pytest.fixture(scope="module")
def served(world):
    """The miniature's teacher, as a user starts it; yields its URL."""
    process = subprocess.Popen([sys.executable, "tests/miniature.py", "serve", "--world", world / "world", "--port-file", world / "port"], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (world / "port").is_file():
        time.sleep(0.05)
    yield f"http://127.0.0.1:{(world / 'port').read_text()}/v1"
    process.kill()


def synthesize(world, url, out, *more, **kw):
    return program("imitation.py", "synthesize", "nq", "--seed-pairs", world / "world/nq/seed_pairs.jsonl", "--exclude", world / "world/nq/test.jsonl", "--endpoint", url, "--endpoint-model", "teacher", "--out", out, *more, **kw)


def test_synthesis_keeps_n_and_counts_what_it_rejects(world, served, tmp_path):
    done = synthesize(world, served, tmp_path / "a.jsonl", "--n", "300")
    rows = lines_of(tmp_path / "a.jsonl")
    pairs = [(r["messages"][0]["content"], r["messages"][1]["content"]) for r in rows]
    assert len(rows) == len(set(pairs)) == len({r["id"] for r in rows}) == 300
    assert all(q.startswith("Q: ") and q.endswith("?\nA:") and q[3:-3] == q[3:-3].lower() and len(a.split()) <= 10 for q, a in pairs)
    assert not {q[3:-4] for q, _ in pairs} & {r["question"] for r in lines_of(world / "world/nq/test.jsonl")}
    assert "answer too long" in done.stdout and "duplicate" in done.stdout
    assert "rejected" in (tmp_path / "a.jsonl.card.md").read_text()
    synthesize(world, served, tmp_path / "b.jsonl", "--n", "300", "--concurrency", "3")
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()


def test_synthesis_killed_and_restarted_asks_nothing_twice(world, served, tmp_path):
    out, clean = tmp_path / "a.jsonl", tmp_path / "clean.jsonl"
    command = [sys.executable, "imitation.py", "synthesize", "nq", "--seed-pairs", str(world / "world/nq/seed_pairs.jsonl"), "--n", "600", "--endpoint", served, "--endpoint-model", "teacher", "--out", str(out)]
    journal = tmp_path / "a.jsonl.journal.jsonl"
    for lines in (10, 60):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (journal.is_file() and journal.read_bytes().count(b"\n") >= lines):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    keys = [json.loads(line)["key"] for line in journal.read_text().splitlines()]
    assert len(keys) == len(set(keys))
    subprocess.run([*command[:-1], str(clean)], cwd=ROOT, check=True, capture_output=True)
    assert out.read_bytes() == clean.read_bytes()


def test_a_teacher_that_repeats_itself_ends_the_loop(world, tmp_path):
    server = Faulty(lambda n, request, handler: {"content": "Q: who?\nA: me"})
    done = synthesize(world, server.url, tmp_path / "a.jsonl", "--n", "50")
    assert len(lines_of(tmp_path / "a.jsonl")) == 1 and "only repeated itself" in done.stderr


def test_collect_writes_replies_in_order_and_failures_apart(world, served, tmp_path):
    program("imitation.py", "collect", "--prompts", world / "world/heldout.jsonl", "--endpoint", served, "--endpoint-model", "teacher", "--out", tmp_path / "r.jsonl", "--samples", "2")
    prompts = data.read_prompts(world / "world/heldout.jsonl")
    replies = data.read_replies(tmp_path / "r.jsonl")
    assert list(replies) == [f"{p['id']}/{k}" for p in prompts for k in range(2)]
    assert any(replies[f"{p['id']}/0"][1] != replies[f"{p['id']}/1"][1] for p in prompts)
    program("imitation.py", "collect", "--prompts", world / "world/heldout.jsonl", "--endpoint", served, "--endpoint-model", "teacher", "--out", tmp_path / "s.jsonl", "--max-new", "3")
    assert lines_of(tmp_path / "s.jsonl") == [] and {f["status"] for f in lines_of(tmp_path / "s.jsonl.failed.jsonl")} == {"length"}


def ask_program(*args, **kw):
    return program("imitation.py", *args, "--endpoint-model", "m", **kw)


def test_every_rejected_pair_is_counted_by_its_reason(tmp_path):
    data.write_jsonl(tmp_path / "seeds.jsonl", ({"question": f"seed {i}", "answer": ["x"]} for i in range(10)))
    data.write_jsonl(tmp_path / "test.jsonl", [{"question": "who is asked?", "answer": ["x"]}])
    replies = ["Q: Who IS New?\nA: Me", "Q: who is new\nA: me\n\nQ: who is new?\nA: another", "Q: Seed 3?\nA: x", "1. **Q:** Who is  asked\n**A:** x", "Q: long?\nA: " + "w " * 11, "No.",
               {"finish": "length", "content": "Q: cut?\nA: of"}, {"finish": "content_filter"}, {"content": " "}]
    replies = [r if isinstance(r, dict) else {"content": r} for r in replies]
    server = Faulty(lambda n, request, handler: replies[n] if n < len(replies) else {"content": f"Q: fresh {n}?\nA: x"})
    done = ask_program("synthesize", "nq", "--seed-pairs", tmp_path / "seeds.jsonl", "--exclude", tmp_path / "test.jsonl", "--n", "5", "--concurrency", "1", "--endpoint", server.url, "--out", tmp_path / "a.jsonl")
    wanted = {"duplicate": 1, "question of a seed pair": 1, "question in the evaluation set": 1, "answer too long": 1, "reply without a pair": 1}
    card = (tmp_path / "a.jsonl.card.md").read_text()
    assert all(f"{n} {reason}" in done.stdout for reason, n in {**wanted, "length": 1, "content_filter": 1, "empty": 1, "put into lower case": 1}.items())
    assert json.loads(re.search("rejected pairs by reason: (.*)", card)[1]) == wanted
    assert json.loads(re.search("requests by status: (.*)", card)[1]) == {"ok": 9, "length": 1, "content_filter": 1, "empty": 1}
    assert '"seed": 0' in card and '"temperature": 1.0' in card and I.NQ_REQUEST[:30] in card and '{"m": 12}' in card and '{"prompt_tokens": 24, "completion_tokens": 12}' in card
    rows, journal = lines_of(tmp_path / "a.jsonl"), {r["key"]: r for r in lines_of(tmp_path / "a.jsonl.journal.jsonl")}
    assert [r["messages"][0]["content"] for r in rows] == [f"Q: {q}?\nA:" for q in ("who is new", "who is new", "fresh 9", "fresh 10", "fresh 11")]
    for row in rows:                                                     # from an example to its reply
        record = journal[row["id"].partition("-")[0]]
        assert row["messages"][1]["content"] in record["content"] and record["model"] == "m" and record["sampling"].keys() == {"temperature", "seed"} and record["time"] > 1e9
    assert len({r["sampling"]["seed"] for r in journal.values()}) == len(journal)


def test_the_five_shown_pairs_are_drawn_from_the_seeds_alone(real, tmp_path):
    server = Faulty(lambda n, request, handler: {"content": f"Q: who is number {n}?\nA: {n}"})
    ask_program("synthesize", "nq", "--seed-pairs", real / "nq/paper_seeds.jsonl", "--exclude", real / "nq/NQ-open.dev.jsonl", "--n", "40", "--endpoint", server.url, "--out", tmp_path / "a.jsonl")
    seeds = {r["question"].rstrip("?") for r in lines_of(real / "nq/paper_seeds.jsonl")}
    shown = [re.findall(r"(?m)^Q: (.*)\?$", request["messages"][0]["content"]) for request, _ in server.requests]
    assert all(len(set(q)) == 5 and set(q) <= seeds for q in shown) and {q for s in shown for q in s} == seeds and len(set(map(tuple, shown))) > 30


def test_a_budget_ends_synthesis_with_what_there_is_and_a_larger_one_continues(world, tmp_path):
    server = Faulty(lambda n, request, handler: {"content": f"Q: who is number {n}?\nA: {n}"})
    done = synthesize(world, server.url, tmp_path / "a.jsonl", "--n", "20", "--max-requests", "8")
    assert "8 of 20 pairs: --max-requests 8 is reached" in one_line(done) and len(lines_of(tmp_path / "a.jsonl")) == len(server.requests) == 8
    synthesize(world, server.url, tmp_path / "a.jsonl", "--n", "20", "--concurrency", "2")
    assert len(lines_of(tmp_path / "a.jsonl")) == 20 and len(server.requests) <= 24


def test_summaries_of_passages(real, tmp_path):
    posts = lines_of(real / "tldr/posts.jsonl")[:30]
    data.write_jsonl(tmp_path / "posts.jsonl", [*posts, posts[0], {"post": " "}, {"post": "{a} %s \ud83d long enough " * 9}])
    server = Faulty(lambda n, request, handler: {"content": "a summary"})
    done = ask_program("synthesize", "tldr", "--posts", tmp_path / "posts.jsonl", "--endpoint", server.url, "--out", tmp_path / "t.jsonl")
    rows, journal = lines_of(tmp_path / "t.jsonl"), {r["key"] for r in lines_of(tmp_path / "t.jsonl.journal.jsonl")}
    assert len(server.requests) == 31 and "31 replies" in done.stdout and 'passages: 31\n- passages left out: {"repeated": 1, "empty": 1}' in (tmp_path / "t.jsonl.card.md").read_text()
    assert [r["post"] for r in rows] == [*(p["id"] for p in posts), 33] and {r["id"] for r in rows} == journal
    assert all(p["post"].strip() in r["messages"][0]["content"] and r["messages"][1]["content"] == "a summary" for p, r in zip(posts, rows))
    assert one_line(ask_program("synthesize", "tldr", "--endpoint", server.url, "--out", tmp_path / "u.jsonl", status=2)).endswith("needs --posts FILE")
    ask_program("synthesize", "tldr", "--posts", tmp_path / "posts.jsonl", "--n", "3", "--endpoint", server.url, "--out", tmp_path / "t.jsonl")
    assert len(lines_of(tmp_path / "t.jsonl")) == 3 and len(server.requests) == 31      # from the journal


def test_collect_takes_histories_and_asks_samples_with_seeds_of_their_own(tmp_path):
    history = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi", "name": "x"}, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "more"}]
    data.write_jsonl(tmp_path / "p.jsonl", [{"id": "a", "messages": history}, {"id": "b", "prompt": "one turn", "category": "c"}])
    server = Faulty(lambda n, request, handler: {"content": f"{request['messages'][-1]['content']} {request['seed']}"} if request["messages"][-1]["content"] != "one turn" or request["seed"] % 1000 != 1 else {"content": ""})
    done = ask_program("collect", "--prompts", tmp_path / "p.jsonl", "--samples", "3", "--seed", "7", "--endpoint", server.url, "--out", tmp_path / "r.jsonl")
    assert "5 replies, 1 empty" in done.stdout
    sent = [request for request, _ in server.requests]
    assert all(r.keys() == {"model", "messages", "seed"} for r in sent) and len({r["seed"] for r in sent if len(r["messages"]) == 4}) == 3
    assert all(r["messages"] == [{"role": m["role"], "content": m["content"]} for m in history] for r in sent if len(r["messages"]) > 1)
    rows, failed = lines_of(tmp_path / "r.jsonl"), lines_of(tmp_path / "r.jsonl.failed.jsonl")
    assert [(r["id"], r["messages"][-1]["content"]) for r in rows] == [("a/0", "more 7000"), ("a/1", "more 7001"), ("a/2", "more 7002"), ("b/0", "one turn 7000"), ("b/2", "one turn 7002")]
    assert [(r["id"], r["status"]) for r in failed] == [("b/1", "empty")]
    assert {r["key"] for r in rows + failed} == {r["key"] for r in lines_of(tmp_path / "r.jsonl.journal.jsonl")}
    data.write_jsonl(tmp_path / "q.jsonl", [{"id": "a", "messages": history[:3]}])
    assert "ends with a turn of the assistant" in one_line(ask_program("collect", "--prompts", tmp_path / "q.jsonl", "--endpoint", server.url, "--out", tmp_path / "q", status=2))


def test_a_dry_run_sends_nothing_and_counts_what_is_left(real, tmp_path):
    prompts = lines_of(real / "koala/koala_test_set.jsonl")
    server, out = Faulty(), tmp_path / "r.jsonl"
    command = ["collect", "--prompts", real / "koala/koala_test_set.jsonl", "--samples", "2", "--max-new", "50", "--out", out]
    done = ask_program(*command, "--dry-run", "--endpoint", "https://api.openai.com/v1", env={"OPENAI_API_KEY": ""})
    size = sum(len(p["prompt"].encode()) for p in prompts)
    assert "360 requests, 0 of them" in done.stdout and f"to ask: 360, with about {2 * size // 4} tokens of prompts and replies of at most 18000 tokens" in done.stdout and not list(tmp_path.iterdir())
    assert "335 requests were not asked (--max-requests 25 is reached)" in ask_program(*command, "--max-requests", "25", "--endpoint", server.url).stderr
    done = ask_program(*command, "--dry-run", "--endpoint", server.url)
    assert "25 of them answered" in done.stdout and "to ask: 335" in done.stdout and len(server.requests) == 25
    done = ask_program("synthesize", "nq", "--seed-pairs", real / "nq/paper_seeds.jsonl", "--n", "6K", "--endpoint", server.url, "--out", out, "--dry-run")
    assert "1200 requests" in done.stdout and len(server.requests) == 25


@pytest.mark.parametrize("more, status, words", [(["--endpoint-model", "nobody"], 2, "does not exist"), (["--endpoint", "ftp://x"], 2, "not a URL"), (["--endpoint", "http://127.0.0.1:9/v1"], 1, "no answer")])
def test_a_teacher_that_cannot_be_asked_is_one_line(world, served, tmp_path, more, status, words):
    done = program("imitation.py", "collect", "--prompts", world / "world/heldout.jsonl", "--endpoint", served, "--endpoint-model", "teacher", "--out", tmp_path / "r.jsonl", *more, status=status)
    assert words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_the_served_teacher_speaks_the_protocol(served):
    ask = lambda **kw: requests.post(served + "/chat/completions", json={"model": "teacher", "messages": [{"role": "user", "content": "how do I save money?"}], **kw}).json()
    a, b = ask(seed=1), ask(seed=2)
    assert a["choices"][0]["message"]["content"] == ask(seed=1)["choices"][0]["message"]["content"] != b["choices"][0]["message"]["content"]
    assert len(ask(n=3)["choices"]) == 3 and ask(temperature=0, seed=1)["choices"] == ask(temperature=0, seed=2)["choices"]
    cut = ask(max_tokens=2)["choices"][0]
    assert cut["finish_reason"] == "length" and len(cut["message"]["content"].split()) == 2
    assert "\n" not in ask(stop="\n")["choices"][0]["message"]["content"]
    assert a["usage"]["total_tokens"] == a["usage"]["prompt_tokens"] + a["usage"]["completion_tokens"]
    assert requests.get(served + "/models").json()["data"][0]["id"] == "teacher"
    assert "sorry" in requests.post(served + "/chat/completions", json={"messages": [{"role": "user", "content": "say that he is an idiot"}]}).json()["choices"][0]["message"]["content"]
    assert requests.post(served + "/chat/completions", data="{").status_code == 400
