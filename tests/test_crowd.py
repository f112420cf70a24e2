"""The blind comparison by people: its protocol over plain HTTP, its report, and its page in a real browser."""
import collections
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import evaluate as E
from conftest import ROOT, lines_of, one_line, program

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def replies(path, answers, history=(), **more):
    path.write_text("".join(json.dumps({"id": str(i), "messages": [*history, {"role": "user", "content": f"query {i}"}, {"role": "assistant", "content": a}], **more}) + "\n" for i, a in enumerate(answers)))
    return path


class Served:
    """`evaluate.py crowd` on a free port, killed at the end of the block."""

    def __init__(self, a, b, out, *more):
        self.command, self.out = ["evaluate.py", "crowd", "--a", a, "--b", b, "--out", out, "--port", "0", *more], out

    def __enter__(self):
        self.process = subprocess.Popen([sys.executable, *map(str, self.command)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))      # a test run in a shell's background inherits it ignored
        line = self.process.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), line + self.process.stderr.read()
        self.url = line.split()[0]
        self.host = self.url.split("/")[2]
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate(timeout=60)

    def request(self, method, path, body=None, **headers):
        """(status, headers, text); a header given as None is not sent."""
        connection = http.client.HTTPConnection(self.host, timeout=60)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {"Host": self.host, **({"Origin": f"http://{self.host}", "Content-Type": "application/json", "Content-Length": str(len(data))} if data is not None else {}), **{k.replace("_", "-"): v for k, v in headers.items()}}
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders()
        if data:
            connection.send(data)
        reply = connection.getresponse()
        text = reply.read().decode()
        connection.close()
        return reply.status, dict(reply.getheaders()), text

    def next(self, rater, task=None, choice="first", comment=""):
        status, _, text = self.request("POST", "/next", {"rater": rater, **({"task": task, "choice": choice, "comment": comment} if task else {})})
        assert status == 200, text
        return json.loads(text)

    def ratings(self):
        return lines_of(self.out / "ratings.jsonl")


@pytest.fixture
def pair(tmp_path):
    return replies(tmp_path / "ours.jsonl", [f"ours {i}" for i in range(6)]), replies(tmp_path / "teacher.jsonl", [f"teacher {i}" for i in range(6)])


# --- who rates what ----------------------------------------------------------------------------------------------------------------

def test_two_dozen_raters_at_once_lose_nothing(tmp_path):
    a, b = (replies(tmp_path / f"{n}.jsonl", [f"{n} {i}" for i in range(30)]) for n in "ab")
    saved = collections.defaultdict(set)

    def work(server, rater):
        state = server.next(rater)
        while state["left"]:
            if "task" not in state:                                      # what is left is on other screens
                time.sleep(0.02)
                state = server.next(rater)
                continue
            saved[rater].add(state["turns"][0][1])
            state = server.next(rater, state["task"], "first" if state["answers"][0].startswith("a ") else "second", f"{rater} on {state['turns'][0][1]}")
    with Served(a, b, tmp_path / "o") as server:
        threads = [threading.Thread(target=work, args=(server, f"rater {k}")) for k in range(24)]
        [t.start() for t in threads]
        [t.join(60) for t in threads]
        ratings = server.ratings()
    assert {(r["rater"], f"query {r['example']}") for r in ratings} == {(rater, q) for rater, queries in saved.items() for q in queries}
    assert len({(r["rater"], r["example"]) for r in ratings}) == len(ratings) == 90 and set(collections.Counter(r["example"] for r in ratings).values()) == {3}
    assert all(r["comment"] == f"{r['rater']} on query {r['example']}" for r in ratings)
    assert {E.VERDICTS[0]} == {r["verdict"] for r in E.read_ratings(tmp_path / "o", {str(i) for i in range(30)})}          # order and choice together name --a


def test_reloading_and_sending_twice_count_once(pair, tmp_path):
    with Served(*pair, tmp_path / "o") as server:
        first = server.next("ann")
        assert server.next("ann") == first and server.next(" Ann ") == first             # the same name, written otherwise
        second = server.next("ann", first["task"], "equal")
        assert server.next("ann", first["task"], "first") == second and second["done"] == 1 and second["task"] != first["task"]
        assert [r["choice"] for r in server.ratings()] == ["equal"]


def test_a_study_killed_in_the_middle_of_a_line_goes_on_where_it_stopped(pair, tmp_path):
    with Served(*pair, tmp_path / "o") as server:
        state = server.next("ann")
        for _ in range(3):
            state = server.next("ann", state["task"])
        before = server.ratings()
        server.process.send_signal(signal.SIGKILL)
    with open(tmp_path / "o/ratings.jsonl", "ab") as f:
        f.write(b'{"rater": "ann", "exam')
    with Served(*pair, tmp_path / "o") as server:
        assert server.ratings() == before
        late = server.next("ann", state["task"])                        # the page that was open all the while
        assert late["done"] == 4 and server.ratings()[-1]["seconds"] is None
        assert one_line(program(*server.command, status=2)).endswith("is in use by another process; wait for it or choose another name")
    changed = one_line(program(*server.command, "--ratings", "2", status=2))
    assert "ratings was 3, is 2" in changed


def test_a_pair_left_alone_goes_to_others_when_its_lease_ends_and_a_late_choice_still_counts(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(E.time, "monotonic", lambda: now[0])
    study = E.CrowdStudy({"x": {"turns": [], "a": "1", "b": "2"}}, [], E.GrowingFile(tmp_path / "r"), 1, 100, "secret")
    task = study.deal("ann")["task"]
    now[0] = 99
    assert study.deal("ben") == {"done": 0, "left": 1}                   # it is on ann's screen
    now[0] = 101
    other = study.deal("ben")["task"]
    now[0] = 121
    assert study.rate("ben", other, "first", "") and study.rate("ann", task, "second", "")
    assert [(r["rater"], r["seconds"]) for r in lines_of(tmp_path / "r")] == [("ben", 20), ("ann", 121)]
    assert study.deal("eve") == {"done": 0, "left": 0}


def test_requests_at_the_same_moment_neither_overbook_nor_count_twice(tmp_path):
    class Slow(E.GrowingFile):                                           # every step long enough for another thread to come between
        def append(self, record):
            time.sleep(0.02)
            super().append(record)

    class SlowStudy(E.CrowdStudy):
        def draw(self, *what):
            time.sleep(0.002)
            return super().draw(*what)
    study, got = SlowStudy({"x": {"turns": [], "a": "1", "b": "2"}}, [], Slow(tmp_path / "r"), 3, 100, "secret"), {}

    def at_once(work):
        threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    at_once(lambda k: got.update({f"r{k}": study.deal(f"r{k}").get("task")}))
    rater, task = next((r, t) for r, t in got.items() if t)
    assert sum(t is not None for t in got.values()) == 3
    at_once(lambda k: study.rate(rater, task, "first", ""))
    assert len(lines_of(tmp_path / "r")) == 1


def test_the_fewest_ratings_come_first_and_nobody_rates_twice(tmp_path):
    study = E.CrowdStudy({str(i): {"turns": [], "a": "1", "b": "2"} for i in range(8)}, [], E.GrowingFile(tmp_path / "r"), 3, 100, "secret")
    for k in range(16):
        study.rate(f"r{k}", study.deal(f"r{k}")["task"], "first", "")
        assert max(study.counts.values()) - min(study.counts[str(i)] for i in range(8)) <= 1
    for _ in range(8):
        study.rate("all", study.deal("all")["task"], "first", "")
    assert "task" not in study.deal("all") and set(study.counts.values()) == {3}


# --- blind ------------------------------------------------------------------------------------------------------------------------

def test_the_order_is_drawn_per_rater_and_example_and_nothing_else_tells_the_two_apart(tmp_path):
    a, b = replies(tmp_path / "ours.jsonl", ["left"] * 200, source="model-of-ours", category="zoology"), replies(tmp_path / "teacher.jsonl", ["right"] * 200, source="gpt", category="zoology")
    with Served(a, b, tmp_path / "o") as server:
        secret = json.loads((tmp_path / "o/study.json").read_text())["secret"]
        traffic, orders = [], {}
        for rater in ("ann", "ben"):
            state, orders[rater] = server.next(rater), {}
            for _ in range(200):
                assert set(state) == {"done", "left", "task", "turns", "answers"} and sorted(state["answers"]) == ["left", "right"]
                traffic.append(json.dumps({**state, "answers": None, "turns": None}))
                orders[rater][state["turns"][0][1]] = state["answers"][0]
                state = server.next(rater, state["task"])
        status, headers, page = server.request("GET", "/")
    for rater in orders:
        assert 70 < list(orders[rater].values()).count("left") < 130                      # 100 ± 7
    assert 70 < sum(orders["ann"][q] == orders["ben"][q] for q in orders["ann"]) < 130
    for word in ("ours", "teacher", "gpt", "zoology", secret, "reference", "ratings.jsonl"):
        assert word not in "".join(traffic) + page + str(headers)
    assert {("left", "right")[r["order"] == "ba"] for r in E.read_ratings(tmp_path / "o", {str(i) for i in range(200)}) if orders[r["rater"]][f"query {r['example']}"] == "left"} == {"left"}
    study = E.CrowdStudy({"x": {"turns": [], "a": "1", "b": "2"}}, [], E.GrowingFile(tmp_path / "r"), 3, 100, "another")
    assert study.draw("task", "ann", "0") not in "".join(traffic)                         # who does not know the secret cannot compute a task, nor its order


def test_pairs_join_by_id_or_by_prompt_and_show_the_whole_conversation(tmp_path):
    history = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    a, b = replies(tmp_path / "a", ["a0", "a1"], history), replies(tmp_path / "b", ["b0", "b1", "b2"], history)
    b.write_text(re.sub(r'"id": "(\d)"', r'"id": "other \1"', b.read_text()))
    with Served(a, b, tmp_path / "o") as server:
        state = server.next("ann")
        k = state["turns"][-1][1][-1]
        assert state["turns"] == [["system", "be kind"], ["user", "hello"], ["assistant", "hi"], ["user", f"query {k}"]] and sorted(state["answers"]) == [f"a{k}", f"b{k}"] and state["left"] == 2
        server.process.send_signal(signal.SIGINT)
        assert "1 replies have no partner" in server.process.communicate(timeout=60)[1]
    b.write_text(b.read_text().replace("other ", "").replace("query 1", "another"))
    assert "'1' answers another prompt" in one_line(program("evaluate.py", "crowd", "--a", a, "--b", b, "--out", tmp_path / "p", status=2))


# --- strangers ----------------------------------------------------------------------------------------------------------------------

def test_requests_of_other_pages_and_names_are_refused(pair, tmp_path):
    with Served(*pair, tmp_path / "o") as server:
        port = server.host.split(":")[1]
        good = {"rater": "ann"}
        assert server.request("POST", "/next", good)[0] == 200
        assert server.request("POST", "/next", good, Host=f"localhost:{port}", Origin=f"http://localhost:{port}")[0] == 200
        for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": None}, {"Origin": "http://127.0.0.1:1"}, {"Origin": f"https://{server.host}"}, {"Content_Type": "text/plain"}, {"Content_Type": None},
                        {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"}, {"Host": f"127.0.0.1.evil.example:{port}", "Origin": f"http://127.0.0.1.evil.example:{port}"}, {"Host": None}):
            status, got, _ = server.request("POST", "/next", {"rater": "mallory"}, **headers)
            assert status == 403 and "Access-Control-Allow-Origin" not in got, headers
        assert server.request("GET", "/", Host="evil.example")[0] == 403 and server.request("GET", "/", Host=None)[0] == 403
        assert server.request("GET", "/ratings.jsonl")[0] == 404 and server.request("GET", "/../study.json")[0] == 404 and server.request("POST", "/other", good)[0] == 403
        assert "mallory" not in (tmp_path / "o/ratings.jsonl").read_text()


def test_oversized_and_garbled_bodies_are_refused(pair, tmp_path):
    with Served(*pair, tmp_path / "o") as server:
        for headers in ({"Content_Length": "100000"}, {"Content_Length": "99999999999"}, {"Content_Length": None}, {"Content_Length": "-1"}, {"Content_Length": "x"}, {"Content_Length": None, "Transfer_Encoding": "chunked"}):
            assert server.request("POST", "/next", b"", **headers)[0] == 413, headers
        for body in (b"", b"{", b"[]", b"5", b"null", b"\xff", b'{"rater": 5}', b'{"rater": null}', b"[" * 50000, b'{"task": "x"}'):
            assert server.request("POST", "/next", body)[0] == 400, body
        task = server.next("ann")["task"]
        for wrong in ({"choice": "a"}, {"choice": None}, {"choice": ["first"]}, {"choice": "first", "comment": "x" * 4001}, {"choice": "first", "comment": 5}):
            assert server.request("POST", "/next", {"rater": "ann", "task": task, **wrong})[0] == 400, wrong
        for other in ("x", 5, ["x"], server.next("ben")["task"]):                          # a task is its rater's alone
            assert server.request("POST", "/next", {"rater": "ann", "task": other, "choice": "first"})[0] == 409, other
        assert server.ratings() == [] and server.next("ann", task, "first", "\ud800 \u202e \x1b[31m <b>")["done"] == 1
        assert server.ratings()[0]["comment"] == "\ud800 \u202e \x1b[31m <b>"


def test_a_rating_that_could_not_be_written_is_not_counted(tmp_path, capsys):
    class Full(E.GrowingFile):
        def append(self, record):
            if not full:
                return super().append(record)
            raise OSError(28, "No space left on device")
    server = E.CrowdServer(("127.0.0.1", 0), E.CrowdHandler)
    server.study = E.CrowdStudy({"x": {"turns": [], "a": "1", "b": "2"}}, [], Full(tmp_path / "r"), 3, 100, "secret")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client, full = type("Client", (Served,), {"__init__": lambda self: setattr(self, "host", f"127.0.0.1:{server.server_port}")})(), True
    task = client.next("ann")["task"]
    status, _, text = client.request("POST", "/next", {"rater": "ann", "task": task, "choice": "first"})
    assert status == 500 and "could not be written" in text and "No space left" in capsys.readouterr().err and client.next("ann")["done"] == 0
    full = False
    assert client.next("ann", task)["done"] == 1 and len(lines_of(tmp_path / "r")) == 1
    server.shutdown()


@pytest.mark.parametrize("name", ["", " ", "../x", "a/b", "a\\b", "..", ".hidden", "a\x00b", "a\nb", "C:", "~root", "x" * 41, "-rf", "<b>", "\ud800", "a\u202eb"])
def test_rater_names_with_path_characters_are_refused(name, shared_server):
    status, _, text = shared_server.request("POST", "/next", {"rater": name})
    assert status == 400 and "a name has" in text


@pytest.mark.parametrize("name", ["Ann", "ann b.", "Zoë", "李雷", "a@b.example", "A1-B_2"])
def test_ordinary_names_are_not(name, shared_server):
    assert shared_server.next(name)["left"] == 6


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crowd")
    with Served(replies(folder / "a", ["x"] * 6), replies(folder / "b", ["y"] * 6), folder / "o", "--ratings", "99") as server:
        yield server


def test_the_server_listens_on_loopback_alone_and_its_page_may_speak_to_nobody_else(shared_server):
    port = int(shared_server.host.split(":")[1])
    listening = [line.split() for line in open("/proc/net/tcp") if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")]
    assert [line[1].split(":")[0] for line in listening] == ["0100007F"]
    status, headers, page = shared_server.request("GET", "/")
    policy = headers["Content-Security-Policy"]
    assert status == 200 and "default-src 'none'" in policy and "unsafe" not in policy and "connect-src 'self'" in policy and "http" not in re.sub(r"sha256-\S+", "", policy)
    assert "://" not in page and "innerHTML" not in page and not re.search(r"\b(src|href|style|on\w+)\s*=", page.split("<script>")[0])


def test_a_port_that_is_taken_and_missing_files_are_one_line(shared_server, pair, tmp_path):
    port = shared_server.host.split(":")[1]
    assert f"--port {port}" in one_line(program("evaluate.py", "crowd", "--a", pair[0], "--b", pair[1], "--out", tmp_path / "o", "--port", port, status=2))
    assert "--port 70000" in one_line(program("evaluate.py", "crowd", "--a", pair[0], "--b", pair[1], "--out", tmp_path / "o", "--port", "70000", status=2))
    assert "--a FILE and --b FILE" in one_line(program("evaluate.py", "crowd", "--out", tmp_path / "o", status=2))
    assert "no study.json" in one_line(program("evaluate.py", "crowd", "report", "--out", tmp_path / "q", status=2))


# --- the report --------------------------------------------------------------------------------------------------------------------

FLEISS_1971 = [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1], [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]


def test_kappa_of_a_worked_example_and_of_differing_numbers_of_ratings():
    assert E.fleiss_kappa(FLEISS_1971) == pytest.approx(0.2099, abs=1e-4)
    assert E.fleiss_kappa([*FLEISS_1971, [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]) == E.fleiss_kappa(FLEISS_1971)       # one rating agrees with nobody
    assert E.fleiss_kappa([[3, 0, 0], [0, 3, 0]]) == 1 and E.fleiss_kappa([[2, 0, 0], [0, 0, 4]]) == 1           # complete agreement stays complete
    # agreement (1 + 1/3) / 2, chance (5² + 1²) / 6²
    assert E.fleiss_kappa([[3, 0], [2, 1]]) == pytest.approx(((1 + 1 / 3) / 2 - 26 / 36) / (1 - 26 / 36))
    # 2 and 4 ratings: agreement (0 + 1/2) / 2, chance (4² + 2²) / 6²
    assert E.fleiss_kappa([[1, 1], [3, 1]]) == pytest.approx(((0 + 1 / 2) / 2 - 20 / 36) / (1 - 20 / 36))
    assert E.fleiss_kappa([[3, 0], [3, 0]]) is None and E.fleiss_kappa([]) is None and E.fleiss_kappa([[1, 0]]) is None


def test_a_majority_has_the_most_votes_and_splits_are_equal():
    votes = lambda *v: dict(zip(E.VERDICTS, v))
    assert [E.majority(votes(*v)) for v in ((2, 1, 0), (0, 0, 3), (1, 2, 0), (1, 1, 1), (1, 0, 1), (0, 2, 2), (2, 1, 1))] == [
        ("better", False), ("worse", False), ("equal", False), ("equal", True), ("equal", True), ("equal", True), ("better", False)]


def test_the_report_counts_as_by_hand(tmp_path):
    folder = tmp_path / "o"
    folder.mkdir()
    #          rater, example, order, choice, seconds, comment;  verdicts for --a: 0 better better worse | 1 one of each | 2 worse worse | 3 nothing
    ratings = [("x", "0", "ab", "first", 2.0, ""), ("y", "0", "ba", "second", 4.0, "nice"), ("z", "0", "ab", "second", 6.0, ""), ("x", "1", "ab", "first", 8.0, ""), ("y", "1", "ab", "equal", None, ""),
               ("z", "1", "ba", "first", 10.0, ""), ("x", "2", "ba", "first", 12.0, ""), ("y", "2", "ab", "second", 14.0, ""), ("y", "2", "ab", "first", 1.0, "a line that stands twice counts once")]
    (folder / "ratings.jsonl").write_text("".join(json.dumps(dict(zip(("rater", "example", "order", "choice", "seconds", "comment"), r))) + "\n" for r in ratings) + '{"rater": "torn')
    E.write_json(folder / "study.json", {"settings": {"a": "A", "b": "B", "ratings": 3}, "model": {"name": "A"}, "secret": "", "examples": {"0": "k\ud800 | $x_$ \x1b[31m", "1": "", "2": "two", "3": "two"}})
    done = program("evaluate.py", "crowd", "report", "--out", folder)
    result = json.loads((folder / "results.json").read_text())
    score = {k: m["score"] for k, m in result["metrics"].items()}
    assert result["task"] == "crowd" and result["model"] == {"name": "A"} and result["settings"]["data_hash"] == E.file_hash(folder / "ratings.jsonl")
    assert score["majority_at_least_as_good"] == pytest.approx(2 / 3) and score["split"] == score["majority_equal"] == score["majority_better"] == score["majority_worse"] == pytest.approx(1 / 3)
    shares = [2 / 3, 2 / 3, 0]
    assert score["at_least_as_good"] == pytest.approx(np.mean(shares)) and result["metrics"]["at_least_as_good"]["stderr"] == pytest.approx(np.std(shares, ddof=1) / 3 ** 0.5)
    assert score["at_least_as_good/two"] == 0 and result["metrics"]["at_least_as_good/two"]["n"] == 1
    assert score["first_minus_second"] == pytest.approx(np.mean([(1 - 1 - 1) / 3, (1 + 0 + 1) / 3, 0])) and score["seconds_median"] == 8
    votes = [[2, 0, 1], [1, 1, 1], [0, 0, 2]]
    assert score["fleiss_kappa"] == pytest.approx(E.fleiss_kappa(votes))
    jackknife = [E.fleiss_kappa([v for j, v in enumerate(votes) if j != k]) for k in range(3)]
    assert result["metrics"]["fleiss_kappa"]["stderr"] == pytest.approx((2 / 3 * sum((k - np.mean(jackknife)) ** 2 for k in jackknife)) ** 0.5)
    assert "8 ratings by 3 raters; of 4 examples 3 have a rating and 2 the 3 wanted" in done.stdout and "\x1b" not in done.stdout
    assert lines_of(folder / "samples.jsonl")[0]["comments"] == ["nice"] and (folder / "crowd.png").read_bytes()[:4] == b"\x89PNG"
    for line, broken in enumerate(("5", "{", '{"rater": "x"}', json.dumps({**dict(zip(("rater", "example", "order", "choice", "seconds"), ratings[0])), "example": "9"})), 1):
        (folder / "ratings.jsonl").write_text("".join(json.dumps(dict(zip(("rater", "example", "order", "choice", "seconds"), r))) + "\n" for r in ratings[:line - 1]) + broken + "\n")
        assert f"ratings.jsonl:{line}: not a rating" in one_line(program("evaluate.py", "crowd", "report", "--out", folder, status=2))


# --- the page in a browser -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM or not DRIVER:
        pytest.skip("no browser: chromium and chromedriver (Debian's packages chromium, chromium-driver) are not installed")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (tests/requirements.txt)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1280,900", "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER, env={**os.environ, "HOME": str(tmp_path_factory.mktemp("home"))}))
    yield driver
    driver.quit()


class Page:
    """What a rater does at the page: look, click, press keys."""

    def __init__(self, driver, url):
        self.driver = driver
        driver.get_log("browser"), driver.get_log("performance")
        driver.get(url)

    def __call__(self, script):
        return self.driver.execute_script("return " + script)

    def until(self, script, seconds=60):
        end = time.time() + seconds
        while not (value := self(script)):
            assert time.time() < end, f"never: {script}; the page shows {self('document.body.innerText')}"
            time.sleep(0.02)
        return value

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def keys(self, *keys):
        from selenium.webdriver import ActionChains
        ActionChains(self.driver).send_keys(*keys).perform()

    def begin(self, name):
        self.until("!start.hidden")
        self.find("#name").send_keys(name)
        self.find("#start button").click()
        self.shown(0)

    def shown(self, done):
        """Until so many are rated, and the page takes a choice."""
        self.until(f"document.getElementById('progress').textContent.includes(': {done} of ')")
        time.sleep(0.65)

    def texts(self):
        return self("[...document.querySelectorAll('main .text')].map(e => e.textContent)")


def test_a_rater_works_by_mouse_and_keyboard_reloads_and_returns(browser, pair, tmp_path):
    from selenium.webdriver import ActionChains
    with Served(*pair, tmp_path / "o") as server:
        page = Page(browser, server.url)
        assert page("help.open") and not page.find("#work").is_displayed()
        page.begin("Ann")
        before = page.texts()
        assert re.fullmatch(r"query (\d)", before[0]) and {t.split()[0] for t in before[1:]} == {"ours", "teacher"}
        page.driver.refresh()                                             # the same pair in the same order, nothing counted
        page.shown(0)
        assert page.texts() == before and server.ratings() == []
        page.find("nav [value=second]").click()
        page.shown(1)
        page.find("#comment").send_keys("1 and 2 are\nkeys")              # typed into the comment they choose nothing
        page.keys("\ue00c")                                               # Escape leaves the field
        page("new MutationObserver(() => document.body.dispatchEvent(new KeyboardEvent('keydown', {key: '2', bubbles: true}))).observe(progress, {childList: true})")
        page.keys("1")                                                    # and a key the very moment each next pair appears, before anybody can have read it
        page.shown(2)
        page.keys("0")
        page.shown(3)
        ActionChains(browser).double_click(page.find("nav [value=first]")).perform()
        page.shown(4)
        page.keys("22")                                                   # a key struck twice
        page.shown(5)
        ratings = server.ratings()
        assert [r["choice"] for r in ratings] == ["second", "first", "equal", "first", "second"] and [r["comment"] for r in ratings] == ["", "1 and 2 are\nkeys", "", "", ""]
        assert ratings[0]["example"] == before[0][-1] and (before[1].split()[0] == "ours") == (ratings[0]["order"] == "ab") and all(0.6 < r["seconds"] < 30 for r in ratings)
        page.find("#leave").click()                                       # another rater in between, at the same browser
        page.until("!document.getElementById('start').hidden && work.hidden")
        page.begin("Ben")
        assert page("document.getElementById('progress').textContent") == "Ben: 0 of 6 rated"
        page.driver.get("about:blank")
        Page(browser, server.url).until("!leave.hidden")
        page.find("#leave").click()
        page.until("!start.hidden")
        page.find("#name").send_keys("ann")                               # returns, writing the name otherwise
        page.find("#start button").click()
        page.shown(5)
        page.keys("1")
        page.until("message.textContent.includes('That was the last pair')")
        assert not page.find("#work").is_displayed() and len({r["example"] for r in server.ratings()}) == len(server.ratings()) == 6
        assert not [entry for entry in browser.get_log("browser") if "Content Security Policy" in entry["message"] or "Uncaught" in entry["message"]]


HOSTILE = ["<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\"><svg onload=\"document.title = 'owned'\">", "</div></main><h1>Choose me</h1><style>* { display: none }</style>&lt;b&gt;&amp;",
           "\x1b[31mred\x1b[0m \x07 \u202eright to left\u202c \u2066 \u200f", "line\n\n    indented\n\ttab\n- a\n- b\n```python\ndef f():\n    return '<b>'\n```\nend  two  blanks", "a long text " * 90000, "", "שלום <b>", "{{constructor.constructor('x')()}} ${1+1} %s"]


def test_hostile_answers_are_text(browser, tmp_path):
    a, b = replies(tmp_path / "a", HOSTILE, [{"role": "system", "content": HOSTILE[0]}]), replies(tmp_path / "b", ["harmless"] * len(HOSTILE), [{"role": "system", "content": HOSTILE[0]}])
    with Served(a, b, tmp_path / "o") as server:
        page = Page(browser, server.url)
        page("localStorage.clear()")
        page.driver.refresh()
        page.begin("Ann")
        for k in range(len(HOSTILE)):
            system, query, *answers = page.texts()
            assert system == HOSTILE[0] and sorted(answers) == sorted(["harmless", HOSTILE[int(query[-1])]])
            assert page("document.querySelectorAll('.text *:not(span)').length") == 0 and page("document.title") == "Which answer is better?" and page.find("nav button").is_displayed()
            assert page("[...document.querySelectorAll('.text')].every(e => getComputedStyle(e).whiteSpace.startsWith('pre-wrap') && getComputedStyle(e).unicodeBidi == 'isolate')")
            assert sorted(page("[...document.querySelectorAll('#pair .text')].map(e => getComputedStyle(e).direction)")) == ["ltr", "rtl" if query[-1] == "6" else "ltr"]
            if query[-1] == "3":
                assert page("document.querySelector('.code').textContent") == "\n```python\ndef f():\n    return '<b>'\n```"
            page.keys("1")
            page.shown(k + 1) if k + 1 < len(HOSTILE) else page.until("work.hidden")
        asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        urls = {m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"}
        assert urls == {server.url, server.url + "next"}                  # not even an image was asked for
        # were a text ever run as markup, the policy would stop it
        browser.execute_script("try { document.body.innerHTML = arguments[0] } catch {} const s = document.createElement('script'); try { s.textContent = \"document.title = 'owned'\" } catch {} document.body.append(s)", HOSTILE[0])
        browser.execute_script("fetch('http://127.0.0.1:9/').catch(() => { window.stopped = true })")
        page.until("window.stopped")
        assert page("document.title") == "Which answer is better?" and any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_lone_surrogates_arrive_as_text(browser, tmp_path):
    with Served(replies(tmp_path / "a", ["x \ud800 y"]), replies(tmp_path / "b", ["\udfff"]), tmp_path / "o") as server:
        page = Page(browser, server.url)
        page("localStorage.clear()")
        page.driver.refresh()
        page.begin("Ann")
        assert page("[...document.querySelectorAll('#pair .text')].map(e => [...e.textContent].map(c => c.codePointAt(0).toString(16)).join(' ')).sort()") == ["78 20 d800 20 79", "dfff"]


def test_a_choice_that_was_not_saved_can_be_made_again(browser, pair, tmp_path):
    with Served(*pair, tmp_path / "o") as server:
        page = Page(browser, server.url)
        page("localStorage.clear()")
        page.driver.refresh()
        page.begin("Ann")
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        page.keys("1")
        page.until("message.textContent.startsWith('Your choice was not saved')")
        assert page.find("#pair").is_displayed()
        port = server.host.split(":")[1]
        with Served(*pair, tmp_path / "o", "--port", port) as again:
            page.keys("1")
            page.shown(1)
            assert len(again.ratings()) == 1


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window(width, browser, tmp_path):
    code = "Here:\n\n```python\n" + "x = " + "very_long_name + " * 40 + "1\n```\n" + "w" * 3000
    with Served(replies(tmp_path / "a", [code]), replies(tmp_path / "b", ["- one\n- two"]), tmp_path / "o") as server:
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500})
        try:
            page = Page(browser, server.url)
            page("localStorage.clear()")
            page.driver.refresh()
            page.begin("Ann")
            first, second = (page.find(f"#{n}").rect for n in ("first", "second"))
            assert (first["y"] == second["y"]) == (width > 500) and page("document.documentElement.scrollWidth") <= width
            assert page("[...document.querySelectorAll('.text span')].every(e => e.getBoundingClientRect().right <= innerWidth)")                              # long lines are broken, not cut off
            assert page("(box => box.bottom <= innerHeight && box.right <= innerWidth)(document.querySelector('nav').getBoundingClientRect())")        # the choices are always in sight
        finally:
            browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
