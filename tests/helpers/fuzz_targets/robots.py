"""robots.txt, and the header X-Robots-Tag."""

from __future__ import annotations

from capstan.pipeline.fetch import robots

SUFFIXES = ()
WORDS = [b"User-agent: ", b"Disallow: /", b"Allow: /", b"*", b"$", b"%2F", b"#", b"capstan", b"\r\n", b"\xef\xbb\xbf"]
WORDS += [b"noai, ", b"otherbot: ", b"unavailable_after: ", b"\x0b", b"\xe2\x80\xa8"]
LONGEST = 512_000  # what is read of a file


def seeds() -> list[bytes]:
    plain = (
        b"# hello\nUser-agent: *\nDisallow: /private\nAllow: /private/*.jpg$\n\nUser-Agent: capstan\nDisallow: /*?s=\n"
    )
    many = b"User-agent: *\n" + b"".join(b"Disallow: /%d*a\n" % number for number in range(3000))
    stars = b"User-agent: *\nDisallow: /" + b"a*" * 4000 + b"b$\n"
    agents = b"".join(b"user-agent: bot%d\n" % number for number in range(3000)) + b"Disallow: /\n"
    tag = b"nofollow, noai\notherbot: noai, noindex\nmax-snippet: 3, none"
    return [plain, many, stars, agents, tag, b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r"), b""]


def check(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    rules = robots.parse(text, "capstan")
    assert rules.size <= 2 * 9 * len(text) + 8, "each character is escaped at most, and kept twice"
    last = text.rpartition("/")[2][:2000]
    for path in ("/", f"/{last}", "/private/a.jpg", "/" + "a" * 8000, "/é%zz%2f?a=b"):
        rules.allows(path)
    robots.forbidden_by(text.split("\n"), "capstan")
    robots.product_token(text)
