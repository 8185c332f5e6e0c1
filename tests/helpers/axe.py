"""axe-core 4.14.1 (vendor/, MPL-2.0, from the npm package axe-core): what is hard to use on a page."""

from __future__ import annotations

import hashlib
from pathlib import Path

_VENDOR = Path(__file__).with_name("vendor")
_RULES = "['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice']"


def source() -> str:
    """The library as an expression to evaluate in a page. It must be the file whose sum is noted."""
    code = (_VENDOR / "axe.min.js").read_bytes()
    noted = dict(reversed(line.split()) for line in (_VENDOR / "SHA256SUMS").read_text().splitlines())
    assert hashlib.sha256(code).hexdigest() == noted["axe.min.js"]
    return code.decode() + "; true"


# Expression: serious and critical findings as "rule: where", contrast of all texts included.
FINDINGS = f"""axe.run(document, {{ runOnly: {_RULES}, resultTypes: ['violations'] }}).then(found => found.violations
    .filter(one => ['serious', 'critical'].includes(one.impact))
    .flatMap(one => one.nodes.map(node =>
        one.id + ': ' + node.target.join(' ') + ' ' + (node.any[0]?.message ?? ''))))"""
# Expression: no part of the page lies beside the screen.
FITS = "document.documentElement.scrollWidth <= innerWidth"
