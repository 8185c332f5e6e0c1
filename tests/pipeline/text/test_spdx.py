"""What sources write about licences becomes SPDX expressions, and never claims more than was written."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.pipeline.text.spdx import UNKNOWN, spdx

EXPRESSION = re.compile(r"NOASSERTION|LicenseRef-[A-Za-z0-9.-]+|[A-Za-z0-9.-]+")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("https://creativecommons.org/licenses/by/2.0/", "CC-BY-2.0"),
        ("http://creativecommons.org/licenses/by-nc-sa/2.0/deed.en", "CC-BY-NC-SA-2.0"),
        ("//creativecommons.org/licenses/by-nc-nd/4.0/legalcode", "CC-BY-NC-ND-4.0"),
        ("https://creativecommons.org/licenses/by/3.0/igo/", "CC-BY-3.0-IGO"),
        ("https://creativecommons.org/licenses/by-sa/3.0/xx/", "LicenseRef-CC-BY-SA-3.0-XX"),
        ("https://creativecommons.org/publicdomain/zero/1.0/", "CC0-1.0"),
        ("https://creativecommons.org/publicdomain/mark/1.0/deed.de", "CC-PDM-1.0"),
        ("https://opensource.org/licenses/MIT", "MIT"),
        ("https://www.apache.org/licenses/LICENSE-2.0.html", "Apache-2.0"),
        ("https://opendatacommons.org/licenses/odbl/1-0/", "ODbL-1.0"),
        ("CC BY-SA 4.0", "CC-BY-SA-4.0"),
        ("cc_by_nc_2.5", "CC-BY-NC-2.5"),
        ("CC-BY-SA-NC 3.0", "CC-BY-NC-SA-3.0"),
        ("Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International", "CC-BY-NC-SA-4.0"),
        ("Creative Commons Attribution-NoDerivs 3.0 Unported License", "CC-BY-ND-3.0"),
        ("CC BY 4", "CC-BY-4.0"),
        ("CC0 1.0 Universal", "CC0-1.0"),
        ("cc0-1.0", "CC0-1.0"),
        ("Apache License, Version 2.0", "Apache-2.0"),
        ("mit", "MIT"),
        ("  ", UNKNOWN),
        ("Unknown", UNKNOWN),
    ],
)
def test_common_spellings_and_pages_are_recognised(written: str, meant: str) -> None:
    assert spdx(written) == meant


@pytest.mark.parametrize(
    "written",
    [
        "CC BY",  # no version
        "CC BY 9.0",
        "CC BY-ND-SA 4.0",  # there is no such licence
        "public domain",  # a claim, not a licence
        "https://example.org/licenses/by/4.0/",
        "https://evil.example/?creativecommons.org/licenses/by/4.0/",
        "All rights reserved",
        "not CC BY 4.0",
    ],
)
def test_nothing_is_claimed_that_was_not_written(written: str) -> None:
    assert spdx(written).startswith("LicenseRef-")


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_a_valid_expression_and_a_fixed_point(text: str) -> None:
    found = spdx(text)
    assert EXPRESSION.fullmatch(found)
    assert spdx(found) == found
