"""The tool that wraps the pages: prose only, and nothing is lost."""

from wrap_pages import wrapped


def test_prose_is_wrapped_and_the_rest_stays() -> None:
    words = "word " * 40
    table = "| " + words + "|"
    code = "```sh\n" + words + "\n```"
    page = "\n".join(["# Title", "", words, "", f"- item {words}", "- next", "", table, "", code])
    lines = wrapped(page).split("\n")
    assert table in lines
    assert words in lines
    prose = [line for line in lines if line not in (table, words)]
    assert max(map(len, prose)) <= 100
    assert "- next" in prose
    assert wrapped("\n".join(lines)) == "\n".join(lines)
    assert " ".join(wrapped(page).split()) == " ".join(page.split())


def test_code_is_not_broken() -> None:
    line = "word " * 18 + "`capstan build recipe.yaml` end"
    assert "`capstan build recipe.yaml`" in wrapped(line)
