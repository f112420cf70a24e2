"""`data.py fetch` against a server on the loopback that fails in the ways servers fail."""
import hashlib
import io
import json
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests

import data
from conftest import one_line, program

BODY = bytes(i * i % 251 for i in range(300_000))


class Server(ThreadingHTTPServer):
    """Serves `files` {path: bytes}; `log` gathers (path, Range header, status); `faults` are what the next answers do."""
    daemon_threads = True

    def __init__(self):
        self.files, self.log, self.faults, self.headers, self.etag = {"/a/f.bin": BODY}, [], [], {}, '"one"'
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, body, asked = self.server, self.server.files.get(self.path), self.headers["Range"]
        fault = server.faults.pop(0) if server.faults else None
        start = int(asked.split("=")[1].rstrip("-")) if asked and fault != "ignore the range" else 0
        status = fault if isinstance(fault, int) else 404 if body is None else 416 if start and start >= len(body) else 206 if asked and fault != "ignore the range" else 200
        server.log.append((self.path, asked, status))
        piece = body[start - 7 * (fault == "another part"):] if status in (200, 206) else b"<html>sorry</html>"
        self.send_response(status)
        for name, value in {"Content-Length": len(piece), "ETag": server.etag, **server.headers}.items():
            self.send_header(name, str(value))
        if status == 206:
            self.send_header("Content-Range", f"bytes {len(body) - len(piece)}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(piece[:100_000] if fault == "drop" else piece)


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(data.time, "sleep", lambda s: None)
    session = requests.Session()
    session.trust_env = False
    return lambda sha256=None, path="/a/f.bin": data.download(session, server.url + path, tmp_path / "f.bin", sha256)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_dropped_connection_is_continued_where_it_broke(server, download, tmp_path):
    server.faults = ["drop", "drop"]
    download(hashlib.sha256(BODY).hexdigest())
    assert (tmp_path / "f.bin").read_bytes() == BODY and names(tmp_path) == ["f.bin"]
    assert [(r, s) for _, r, s in server.log] == [(None, 200), ("bytes=100000-", 206), ("bytes=200000-", 206)]


def test_a_later_command_continues_too(server, download, tmp_path):
    server.faults = ["drop", 503, 503, 503, 503, 503]
    with pytest.raises(data.Failure, match="answered 503.*the same command continues"):
        download()
    assert names(tmp_path)[0].endswith(".part") and len(names(tmp_path)) == 1
    download()
    assert (tmp_path / "f.bin").read_bytes() == BODY and server.log[-1][1] == "bytes=100000-"


@pytest.mark.parametrize("fault", ["ignore the range", "another part", 416])
def test_a_server_that_does_not_send_the_part_asked_for(server, download, tmp_path, fault):
    server.faults = ["drop", fault]
    download()
    assert (tmp_path / "f.bin").read_bytes() == BODY and names(tmp_path) == ["f.bin"]
    assert len(server.log) == (2 if fault == "ignore the range" else 3)


def test_two_versions_of_a_file_are_never_mixed(server, download, tmp_path):
    server.faults = ["drop", 503, 503, 503, 503, 503]
    with pytest.raises(data.Failure):
        download()
    server.files["/a/f.bin"], server.etag = BODY[::-1], '"two"'
    download()
    assert (tmp_path / "f.bin").read_bytes() == BODY[::-1] and names(tmp_path) == ["f.bin"]


@pytest.mark.parametrize("known", ["in the table", "in the hub's header"])
def test_a_wrong_checksum_leaves_nothing(server, download, tmp_path, known):
    right, wrong = hashlib.sha256(BODY).hexdigest(), "0" * 64
    server.headers = {} if known == "in the table" else {"X-Linked-Etag": f'"{wrong}"'}
    with pytest.raises(data.Failure, match="does not have the SHA-256 0000"):
        download(wrong if known == "in the table" else None)
    assert names(tmp_path) == []
    server.headers = {} if known == "in the table" else {"X-Linked-Etag": f'"{right}"'}
    download(right if known == "in the table" else None)
    assert (tmp_path / "f.bin").read_bytes() == BODY


@pytest.mark.parametrize("status, words", [(403, "wants a permission"), (404, "not there any more")])
def test_what_the_server_refuses_is_said_once(server, download, tmp_path, status, words):
    server.faults = [status]
    with pytest.raises(data.UserError, match=words):
        download()
    assert names(tmp_path) == [] and len(server.log) == 1


def command(server, tmp_path, *args, status=0):
    return program(data.__file__, "fetch", *args, status=status, cwd=tmp_path, env={"HF_ENDPOINT": server.url, "NO_PROXY": "127.0.0.1"})


def test_a_base_model_is_fetched_with_the_shards_of_its_index(server, tmp_path):
    hub = "/huggyllama/llama-7b/resolve/main/"
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors", "c": "../../evil.safetensors"}}
    server.files = {hub + "config.json": b"{}", hub + "tokenizer.model": b"not the real one", hub + "model.safetensors.index.json": json.dumps(index).encode(),
                    hub + "model-1-of-2.safetensors": BODY, hub + "model-2-of-2.safetensors": BODY[::-1]}
    done = command(server, tmp_path, "llama7b", status=1)
    assert "licence" in done.stderr and "tokenizer.model: what came does not have the SHA-256 9e556afd" in done.stderr
    folder = tmp_path / "weights/llama7b"
    (folder / "tokenizer.model").write_bytes(b"put there by hand")             # what is there is not asked for
    server.log.clear()
    assert command(server, tmp_path, "llama7b").stdout == "weights/llama7b\n"
    assert names(folder) == ["config.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    assert (folder / "model-2-of-2.safetensors").read_bytes() == BODY[::-1] and len(server.log) == 3
    command(server, tmp_path, "llama7b")
    assert len(server.log) == 3


def test_an_unknown_name_is_one_line_with_the_names_there_are(server, tmp_path):
    assert "llama7b" in one_line(command(server, tmp_path, "llama8b", status=2)) and not server.log


def test_mmlu_is_unpacked_to_where_its_evaluation_looks(server, tmp_path, monkeypatch):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name in ("data/dev/law_dev.csv", "data/test/law_test.csv", "data/auxiliary_train/big.csv", "data/dev/../../../evil.csv", "data/README.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"a,b"))
    server.files["/data.tar"] = packed.getvalue()
    monkeypatch.setitem(data.FETCH, "mmlu", ("data/mmlu", server.url, {"data.tar": hashlib.sha256(packed.getvalue()).hexdigest()}, "MIT"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    data.fetch("mmlu")
    data.fetch("mmlu")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == ["data/mmlu.lock", "data/mmlu/dev/law_dev.csv", "data/mmlu/test/law_test.csv"] and len(server.log) == 1
