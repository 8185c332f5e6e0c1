"""URLs of tables and redirects: as they are sent, stored, shown and refused."""

from __future__ import annotations

from contextlib import suppress

from yarl import URL

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.fetch.urls import as_sent
from capstan.pipeline.secrets import public_text, public_url, refuse_secrets

SUFFIXES = (".url",)
WORDS = [
    b"http://",
    b"https://",
    b"//",
    b"%2e%2e/",
    b"/../",
    b"\\",
    b"@",
    b":80",
    b"[::1]",
    b"xn--",
    b"%zz",
    b"#",
    b"?",
]
WORDS += [b"&X-Amz-Signature=", b"token=", b"\xff\xfe", b"\xc2\xad", "。".encode(), "ß".encode(), b"\t", b"\0"]
LONGEST = 1 << 14
_BASE = URL("https://user:pw@a.example:8443/b/c.jpg?d=e", encoded=True)


def seeds() -> list[bytes]:
    texts = [
        "http://a.org/x%27y é.jpg?q=%7e&r=a b#part",
        "//a.org/b.jpg",
        "../up/./and/../down.jpg?x=%",
        "https://user:pw@bücher.example:443/%2E%2e/x.jpg",
        "http://[::ffff:127.0.0.1]:80/a",
        "http://0x7f.1/\\b",
        "https://a.org/x.jpg?w=1&X-Amz-Signature=2f1c&u=http%3A%2F%2Fb.org%2F%3Ftoken%3Dabc#top",
        "data:image/png;base64,AAAA",
        "http://a.org" + "/.." * 200 + "/%E2%82%ACx" * 200,
        "see https://me:pw@a.org/x?sig=1 and http://b.org",
    ]
    return [text.encode() for text in texts]


def check(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")  # as of a header; a table's text is UTF-8
    for base in (None, _BASE):
        with suppress(ValueError, TypeError):  # the row fails as bad_url
            url = as_sent(text, base)
            assert url.scheme in ("http", "https")
            assert url.host
            sent = url.raw_path_qs
            assert sent.isascii()
            assert sent.startswith("/")
            assert not set(sent) & {" ", "\r", "\n", "\t", "\0"}, sent
            assert str(as_sent(str(url))) == str(url), url
            str(url.origin())
    plain = data.decode("utf-8", "replace")
    shown = public_url(plain)
    assert public_url(shown) == shown, (plain, shown)
    public_text(plain)
    with suppress(RecipeError):
        refuse_secrets({"url": plain, "list": [plain]}, "recipe")
