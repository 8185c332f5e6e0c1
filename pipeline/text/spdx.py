"""What sources write about licences → SPDX license expressions

The identifiers are those of the SPDX License List (https://spdx.org/licenses). A text that is not recognised becomes a
`LicenseRef-` of its own, so that every value is a valid expression and none claims more than the source does: "CC BY"
without a version is not CC-BY-4.0.
"""

from __future__ import annotations

import functools
import re
from typing import Final

UNKNOWN: Final = "NOASSERTION"  # SPDX's word for "nothing is said"
VERSION: Final = 1  # rises if a text would become another identifier

_NOTHING: Final = {"", "-", "?", "n/a", "na", "nan", "none", "null", "unknown", "noassertion", "not specified"}
_IDS: Final = {
    identifier.lower(): identifier
    for identifier in (
        *("0BSD", "AFL-3.0", "Apache-2.0", "Artistic-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "ISC", "MIT"),
        *("CC0-1.0", "CC-PDDC", "CC-PDM-1.0", "CDLA-Permissive-1.0", "CDLA-Permissive-2.0", "CDLA-Sharing-1.0"),
        *("DL-DE-BY-2.0", "DL-DE-ZERO-2.0", "etalab-2.0", "FAL-1.3", "GFDL-1.1-or-later", "GFDL-1.2-only"),
        *("GFDL-1.2-or-later", "GFDL-1.3-only", "GFDL-1.3-or-later", "GPL-2.0-only", "GPL-2.0-or-later"),
        *("GPL-3.0-only", "GPL-3.0-or-later", "MPL-2.0", "NLOD-2.0", "ODbL-1.0", "ODC-By-1.0", "OGL-UK-1.0"),
        *("OGL-UK-2.0", "OGL-UK-3.0", "PDDL-1.0", "Unlicense", "WTFPL", "Zlib"),
    )
}
_SPELLINGS: Final = {  # in lower case, words separated by one space
    "apache": "LicenseRef-Apache",
    "apache 2": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache software 2.0": "Apache-2.0",
    "bsd 2 clause": "BSD-2-Clause",
    "bsd 3 clause": "BSD-3-Clause",
    "cc 0": "CC0-1.0",
    "cc zero": "CC0-1.0",
    "cc zero 1.0": "CC0-1.0",
    "cc0": "CC0-1.0",
    "cc0 1.0": "CC0-1.0",
    "cc0 1.0 universal": "CC0-1.0",
    "expat": "MIT",
    "free art 1.3": "FAL-1.3",
    "odbl": "ODbL-1.0",
    "odc by": "ODC-By-1.0",
    "open government 3.0": "OGL-UK-3.0",
    "pddl": "PDDL-1.0",
    "pdm": "CC-PDM-1.0",
    "pdm 1.0": "CC-PDM-1.0",
    "public domain mark": "CC-PDM-1.0",
    "public domain mark 1.0": "CC-PDM-1.0",
}
_PAGES: Final = {  # hosts and paths of licences' own pages, without www. and the last slash
    "apache.org/licenses/license-2.0": "Apache-2.0",
    "creativecommons.org/publicdomain/certification/1.0/us": "CC-PDDC",
    "creativecommons.org/publicdomain/mark/1.0": "CC-PDM-1.0",
    "creativecommons.org/publicdomain/zero/1.0": "CC0-1.0",
    "opendatacommons.org/licenses/by/1-0": "ODC-By-1.0",
    "opendatacommons.org/licenses/odbl/1-0": "ODbL-1.0",
    "opendatacommons.org/licenses/pddl/1-0": "PDDL-1.0",
}
_URL: Final = re.compile(r"(?:https?:)?//(?:www\.)?(?P<page>[^\s?#]+)")
_CC_PAGE: Final = re.compile(
    r"creativecommons\.org/licenses/(?P<terms>[a-z-]+)/(?P<version>\d\.\d)(?:/(?P<port>[a-z]+))?"
)
_CC_WORDS: Final = re.compile(
    r"cc (?P<terms>(?:by|nc|nd|sa)(?: (?:by|nc|nd|sa))*) v?(?P<version>\d(?:\.\d)?)(?: (?P<port>[a-z]{2,3}))?"
)
_WORDS: Final = [  # a spelling → the one that the patterns above expect
    (re.compile(r"[^a-z0-9.]+"), " "),
    (re.compile(r"\bcreative commons\b"), "cc"),
    (re.compile(r"\bcc (?=cc)"), ""),
    (re.compile(r"\battribution\b"), "by"),
    (re.compile(r"\bnon ?commercial\b"), "nc"),
    (re.compile(r"\bshare ?alike\b"), "sa"),
    (re.compile(r"\bno ?deriv(?:ative)?s?(?: works?)?\b"), "nd"),
    (re.compile(r"\b(?:licen[cs]ed?|international|unported|generic|version|the|under|public licen[cs]e)\b"), " "),
    (re.compile(r" +"), " "),
]
_PORTS: Final = {"igo": {"3.0"}, "at": {"3.0"}, "au": {"2.5", "3.0"}, "de": {"3.0"}, "nl": {"3.0"}, "us": {"3.0"}}
_LONGEST: Final = 60  # characters of a LicenseRef


@functools.lru_cache(maxsize=1 << 14)
def spdx(text: str) -> str:
    """Return the SPDX expression for what a source writes about a licence.

    >>> spdx("https://creativecommons.org/licenses/by-sa/4.0/deed.en"), spdx("CC BY-NC 2.0"), spdx("cc0")
    ('CC-BY-SA-4.0', 'CC-BY-NC-2.0', 'CC0-1.0')
    >>> spdx("Creative Commons Attribution 3.0 Unported"), spdx("cc-by"), spdx("© Acme"), spdx("")
    ('CC-BY-3.0', 'LicenseRef-cc-by', 'LicenseRef-Acme', 'NOASSERTION')
    """
    plain = text.strip()[:500]
    lower = plain.lower()
    if lower in _NOTHING:
        return UNKNOWN
    if known := _IDS.get(lower):
        return known
    return _of_page(lower) or _of_words(lower) or _reference(plain)


def _of_page(lower: str) -> str:
    """Return the licence whose own page this URL is; "" if it is none."""
    if not (url := _URL.match(lower)):
        return ""
    page = url["page"]
    if found := _CC_PAGE.match(page):
        return _creative_commons(found["terms"].split("-"), found["version"], found["port"] or "")
    page = re.sub(r"/(?:deed|legalcode)(?:\.[a-z_-]+)?$|\.(?:html?|txt|php)$|/$", "", page).rstrip("/")
    if page.startswith(("opensource.org/", "spdx.org/licenses/")):
        return _IDS.get(page.rpartition("/")[2], "")
    return _PAGES.get(page, "")


def _of_words(lower: str) -> str:
    """Return the licence that is spelled out; "" if it is not recognised."""
    words = lower
    for pattern, short in _WORDS:
        words = pattern.sub(short, words)
    words = words.strip()
    if found := _CC_WORDS.fullmatch(words):
        return _creative_commons(found["terms"].split(), found["version"], found["port"] or "")
    return _SPELLINGS.get(words, "")


def _creative_commons(terms: list[str], version: str, port: str) -> str:
    """Return the identifier of a Creative Commons licence; "" for terms or a version that do not exist."""
    version = version if "." in version else f"{version}.0"
    wanted = [term for term in ("by", "nc", "nd", "sa") if term in terms]
    known = set(terms) <= {"by", "nc", "nd", "sa"} and "by" in terms and not {"nd", "sa"} <= set(terms)
    if not known or version not in ("1.0", "2.0", "2.5", "3.0", "4.0"):
        return ""
    name = "-".join(["CC", *(term.upper() for term in wanted), version])
    if not port or port in ("deed", "legalcode"):
        return name
    return f"{name}-{port.upper()}" if version in _PORTS.get(port, ()) else f"LicenseRef-{name}-{port.upper()}"


def _reference(plain: str) -> str:
    """Return a LicenseRef for a text that is no known licence (SPDX 2.3, annex D)."""
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", plain.removeprefix("LicenseRef-")).strip("-.")[:_LONGEST].rstrip("-.")
    return f"LicenseRef-{slug}" if slug else "LicenseRef-other"
