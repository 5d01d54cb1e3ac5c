"""Line charts: where points land, which values are labelled, what is read aloud."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from tools import charts
from tools.charts import line_chart


def parse(curves, **options):
    return ElementTree.fromstring(line_chart(curves, x="epoch", y="loss", **options))


def points(chart):
    lines = [line.get("points") for line in chart.iter("polyline")]
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]


def test_points_span_the_axes_and_higher_values_lie_higher():
    first, second = points(parse({"a": [(1, 10.0), (3, 20.0)], "b": [(2, 15.0)]}))
    assert first == [(charts.LEFT, charts.HEIGHT - charts.BOTTOM), (charts.WIDTH - charts.RIGHT, charts.TOP)]
    assert second == [(sum(x for x, _ in first) / 2, sum(y for _, y in first) / 2)]


def test_labels_rules_and_marks_lie_at_their_values():
    chart = parse({"a": [(1, 300.0), (9, 100.0)]})
    places = {text.text: (float(text.get("x")), float(text.get("y"))) for text in chart.iter("text") if text.get("x")}
    middle = (charts.TOP + charts.HEIGHT - charts.BOTTOM) / 2
    assert places["200"][1] - 4 == middle and places["300"][1] - 4 == charts.TOP
    assert places["4"][0] == charts.LEFT + 3 / 8 * (charts.WIDTH - charts.RIGHT - charts.LEFT)
    rules = {float(line.get(end)) for line in chart.iter("line") for end in ("y1", "y2")}
    assert rules >= {middle} and max(rules) == charts.HEIGHT - charts.BOTTOM and min(rules) == charts.TOP
    mark = chart.find(".//circle")
    assert (float(mark.get("cx")), float(mark.get("cy"))) == points(chart)[0][-1]


def test_only_round_values_inside_the_range_are_labelled():
    chart = parse({"a": [(1, 21.4), (16, 36.5)]})
    texts = [text.text for text in chart.iter("text")]
    assert texts == ["25", "30", "35", "5", "10", "15", "epoch", "loss"]


def test_the_last_or_the_highest_point_is_marked_and_named():
    curves = {"a<b": [(0.05, 2.0), (0.15, 9.0), (0.25, 9.0), (0.35, 1.5)]}
    last, peak = parse(curves), parse(curves, peak=True)
    assert [li.text for li in last.iter("li")] == ["a<b 1.5"]
    assert [li.text for li in peak.iter("li")] == ["a<b 9 at 0.15"]
    assert float(peak.find(".//circle").get("cx")) == points(peak)[0][1][0]
    assert "last: a<b 1.5" in last.find("svg").get("aria-label")


def test_values_that_are_not_finite_are_left_out_and_nothing_gives_nothing():
    assert len(points(parse({"a": [(1, float("nan")), (2, 1.0), (3, 2.0), (4, float("inf"))]}))[0]) == 2
    assert line_chart({}, x="x", y="y") == "" and line_chart({"a": [(1, float("nan"))]}, x="x", y="y") == ""


def test_one_point_and_a_flat_line_have_axes_too():
    for curves in ({"a": [(1, 5.0)]}, {"a": [(1, 0.0), (2, 0.0)]}, {"a": [(1, 1e17)]}):
        for x, y in points(parse(curves))[0]:
            assert charts.LEFT <= x <= charts.WIDTH and charts.TOP <= y <= charts.HEIGHT


def test_more_curves_than_colours_use_them_again():
    chart = line_chart({str(n): [(1, n), (2, n)] for n in range(charts.COLOURS + 1)}, x="x", y="y")
    colours = [f"c{n}" for n in range(charts.COLOURS)] + ["c0"]
    assert re.findall(r'polyline class="(c\d+)"', chart) == re.findall(r'li class="(c\d+)"', chart) == colours
