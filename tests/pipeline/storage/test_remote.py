"""Files on web servers of every kind: with a stated size or without one, with ranges or without."""

import io
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capstan.pipeline.config import Recipe
from capstan.pipeline.source import SourceReader

URLS = ["http://a.example/1.jpg", "http://a.example/2.jpg"]


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"url": URLS, "caption": ["one", "two"]}), file)
    return file.getvalue()


FILES = {"/rows.parquet": parquet(), "/rows.csv": f"url,caption\n{URLS[0]},one\n{URLS[1]},two\n".encode()}


class Sized(BaseHTTPRequestHandler):
    """States the size, and knows no ranges."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(FILES[self.path])))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(FILES[self.path])

    def log_message(self, *_: object) -> None:
        pass


class Chunked(Sized):
    """Does not say in advance how much comes."""

    def do_HEAD(self) -> None:
        self.send_response(405)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        data = FILES[self.path]
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))


@pytest.fixture
def serve() -> Iterator[Callable[[type[Sized]], str]]:
    servers: list[ThreadingHTTPServer] = []

    def start(kind: type[Sized]) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("kind", [Sized, Chunked])
@pytest.mark.parametrize("path", FILES)
def test_tables_are_read_from_servers_without_ranges(
    serve: Callable[[type[Sized]], str], kind: type[Sized], path: str
) -> None:
    source = {"path": f"{serve(kind)}{path}"}
    tables = list(SourceReader(Recipe.model_validate({"dataset": "unused", "source": source})).tables())
    assert sorted(pa.concat_tables(tables)["url"].to_pylist()) == URLS
