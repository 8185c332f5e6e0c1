"""Plots of means with intervals: whole drawings, in a page and alone, whatever they are given."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

from capstan.pipeline.html.interval_plots import COLOURS, bands, forest, key, standalone

NAN = math.nan
LINES = {
    "a<b": [(100.0, 0.2, 0.1, 0.3), (200.0, 0.5, 0.4, 0.6)],
    "second": [(100.0, 0.1, NAN, NAN), (200.0, NAN, NAN, NAN)],
}


def test_lines_stand_in_their_bands() -> None:
    plot = bands("followed", LINES)
    assert plot.count("<polyline") == 1  # one point is no line
    polygon = re.search(r'<polygon [^>]*points="([^"]+)"', plot)
    assert polygon is not None
    assert len(polygon[1].split()) == 4
    assert "a&lt;b" in plot
    assert "nan" not in plot


def test_an_interval_that_excludes_zero_is_seen() -> None:
    plot = forest("d", [("a − b", 0.2, 0.1, 0.3), ("c − d", 0.0, -0.1, 0.1), ("e", 0.1, NAN, NAN)])
    colours = re.findall(r'<circle fill="(#\w+)"', plot)
    assert colours == [COLOURS[2], COLOURS[0], COLOURS[0]]
    assert len(re.findall(r"<line stroke=", plot)) == 2


def test_a_file_is_whole_and_needs_nothing_else() -> None:
    data = standalone([("one", bands("x", LINES)), ("two", forest("y", [("r", 0.1, 0.0, 0.2)]))], list(LINES))
    root = ElementTree.fromstring(data)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = " ".join(root.itertext())
    assert all(word in text for word in ("one", "two", "a<b", "second"))
    assert b"var(" not in data
    assert b"href" not in data


def test_nothing_to_draw_is_said() -> None:
    assert "no values" in bands("x", {"a": []})
    assert "no values" in forest("x", [("a", NAN, NAN, NAN)])
    ElementTree.fromstring(standalone([("x", bands("x", {"a": [(1.0, 0.5, 0.4, 0.6)]}))]))
    assert key(["<b>"]).count("&lt;b&gt;") == 1


def test_labels_of_the_horizontal_axis_do_not_overlap() -> None:
    uneven = {
        "a": [(0.38, 0.2, 0.1, 0.3), (0.745, 0.5, 0.4, 0.6)],
        "b": [(0.49, 0.2, 0.1, 0.3), (0.778, 0.5, 0.4, 0.6)],
    }
    for lines in (uneven, LINES):
        places = sorted(
            float(place)
            for place in re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle"', bands("x", lines))
        )
        assert len(places) > 1 or lines is LINES
        assert all(after - before > 25 for before, after in itertools.pairwise(places))
    assert ">200<" in bands("x", LINES)  # where they fit, the points' own
