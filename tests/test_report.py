"""Records survive JSON; reports show what records say, escape everything and need neither network nor display."""

import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from normscope import records
from normscope.errors import DependencyError
from normscope.report import figures, html, terminal

HOSTILE = "<script>alert('1')</script>&[bold]"


def make_run(rate, normalized):
    level = 0.5 + 0.4 * normalized
    return records.TrainingRun(
        normalized=normalized,
        learning_rate=rate,
        accuracy=records.Curve((0, 50, 100), (0.1, level / 2, level)),
        final=records.Interval(level, level - 0.03, level + 0.02, "fraction"),
        bands=records.Bands(3, (15.0, 50.0, 85.0), (50, 100), (-1.0, -2.0), (0.0, 0.5), (1.0, 1.5)),
        drift=(0.5, math.nan, math.inf),
        seconds=1.5,
    )


def make_record(words="digits"):
    return records.Figure1(
        title=words,
        data=records.DataCard("digits", words, 1437, 360, (8, 8), 10, words, words),
        settings=((words, words),),
        differences=(words,),
        runs=tuple(make_run(rate, normalized) for rate in (10.0, 0.1) for normalized in (False, True)),
        shown_rate=0.1,
        target=0.8,
        statements=(records.Statement(words, words, "agrees"), records.Statement(words, "the opposite", "contradicts")),
        caveat=words,
        command=words,
        seed=7,
        started="2015-02-11T00:00:00+00:00",
        seconds=12.5,
        machine=records.Machine(words, 2, words, "3.10.0", ((words, words),)),
    )


def strict(name):
    raise AssertionError(f"{name} is no JSON")


@pytest.fixture(scope="module")
def panels():
    return figures.figure1_panels(make_record())


@pytest.fixture(scope="module")
def page(panels):
    return html.figure1_page(make_record(), panels)


class Elements(HTMLParser):
    """Collects every start tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_json_keeps_everything():
    record = make_record(HOSTILE)
    text = records.to_json(record)
    json.loads(text, parse_constant=strict)
    again = records.from_json(records.Figure1, text)
    assert records.to_json(again) == text
    assert math.isnan(again.runs[0].drift[1])
    assert again.runs[0].drift[2] == math.inf
    whole = dataclasses.replace(record.runs[0], drift=(0.1, -math.inf, 5e-324, 1.7976931348623157e308))
    assert records.from_json(records.TrainingRun, records.to_json(whole)) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"record": "Curve"}, "does not hold a Interval"),
        ({"value": "abc"}, r"Interval\.value: expected .*float.*'abc'"),
        ({"value": True}, r"Interval\.value"),
        ({"unit": 3}, r"Interval\.unit"),
        ({"surplus": 1}, "expected the fields"),
    ],
)
def test_json_of_another_form_is_refused(change, message):
    body = json.loads(records.to_json(records.Interval(1.0, 0.0, 2.0, "s")))
    with pytest.raises(ValueError, match=message):
        records.from_json(records.Interval, json.dumps(body | change))


@pytest.mark.parametrize(
    ("steps", "message"),
    [(3, "expected a list"), ([1.5], r"steps\[0\]"), ([None], r"steps\[0\]"), (["1"], r"steps\[0\]")],
)
def test_json_tuples_are_checked(steps, message):
    text = json.dumps({"record": "Curve", "steps": steps, "values": [1]})
    with pytest.raises(ValueError, match=message):
        records.from_json(records.Curve, text)


def test_json_fixed_tuples_have_their_length():
    body = json.loads(records.to_json(make_run(1.0, True).bands))
    body["percentiles"] = [15, 85]
    with pytest.raises(ValueError, match=r"percentiles: expected 3 items, got 2"):
        records.from_json(records.Bands, json.dumps(body))


def test_json_refuses_what_is_no_record():
    with pytest.raises(TypeError, match="not a record"):
        records.to_json({"a": 1})


def test_machine_describes_this_one():
    machine = records.Machine.measure(("torch", "no-such-package"))
    assert machine.cpu
    assert machine.cores >= 1
    assert machine.python == ".".join(map(str, sys.version_info[:3]))
    assert machine.versions[0][1].startswith("2.")
    assert machine.versions[1] == ("no-such-package", "not installed")


def test_first_reaching():
    curve = records.Curve((0, 10, 20), (0.1, 0.5, 0.4))
    assert (curve.first_reaching(0.4), curve.first_reaching(0.6)) == (10, None)


def test_figure_files(tmp_path):
    png, svg = figures.save_figure1(make_record(), tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG\r\n")
    assert ET.parse(svg).getroot().tag.endswith("svg")


def test_figure_draws_the_record():
    record = make_record()
    left, right = figures.draw_figure1(record).subfigs
    for axes, rate in zip(left.axes, (0.1, 10.0), strict=True):
        curves = {line.get_linestyle(): line for line in axes.lines if len(line.get_xdata()) == 3}
        assert list(curves["-"].get_ydata()) == [100 * v for v in record.run(rate, normalized=True).accuracy.values]
        assert list(curves["--"].get_ydata()) == [100 * v for v in record.run(rate, normalized=False).accuracy.values]
        texts = [text.get_text() for text in axes.texts]
        assert {f"learning rate {rate:g}", "with BN  90.0%", "without BN  50.0%"} <= set(texts)
    assert [axes.get_title(loc="left") for axes in right.axes] == ["without BN", "with BN"]
    assert right.axes[0].get_ylim() == right.axes[1].get_ylim()


def test_figure_without_a_finite_number(tmp_path):
    nothing = (math.nan, math.nan)
    runs = [
        dataclasses.replace(run, bands=dataclasses.replace(run.bands, low=nothing, middle=nothing, high=nothing))
        for run in make_record().runs
    ]
    figures.save_figure1(dataclasses.replace(make_record(), runs=tuple(runs)), tmp_path)


def test_panels_take_the_pages_colours(panels):
    assert len(panels) == 4
    for panel in panels:
        assert "var(--ink)" in panel.svg
        assert not set(figures.CSS_COLOURS) & set(re.findall(r"#[0-9a-f]{6}", panel.svg))
    assert "at the end 90.0% with BN, 50.0% without BN" in panels[0].caption


def test_labels_at_the_end_do_not_overlap():
    assert figures._spread([0.0, 0.1, 5.0], gap=1.0) == [-0.9, 0.1, 5.0]


def test_page_escapes_every_word(panels):
    text = html.figure1_page(make_record(HOSTILE), panels)
    assert not [tag for tag, _ in Elements(text).found if tag in ("script", "bold")]
    # Every word of the record but the classes of the verdicts is hostile, and all of them are shown.
    assert text.count("&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;&amp;[bold]") >= 15


def test_figures_escape_every_word(tmp_path):
    _, svg = figures.save_figure1(make_record(HOSTILE), tmp_path)
    tags = {element.tag.rpartition("}")[2] for element in ET.parse(svg).iter()}
    assert "path" in tags
    assert "script" not in tags


def test_page_needs_no_network_and_no_script(page):
    elements = Elements(page).found
    assert not [tag for tag, _ in elements if tag in ("script", "link", "iframe", "img", "object")]
    assert not [attrs for tag, attrs in elements if any(name.startswith("on") for name in attrs)]
    loading = [(tag, attrs.get(name, "#")) for tag, attrs in elements for name in ("src", "href", "xlink:href")]
    assert all(target.startswith("#") for tag, target in loading if tag != "a")
    assert "url(http" not in page
    assert "@import" not in page


def test_page_identifiers_are_unique_and_resolve(page):
    elements = Elements(page).found
    names = [attrs["id"] for _, attrs in elements if "id" in attrs]
    assert len(names) == len(set(names))
    used = set(re.findall(r"url\(#([^)]+)\)", page))
    used |= {attrs["xlink:href"][1:] for _, attrs in elements if "xlink:href" in attrs}
    used |= {attrs["aria-labelledby"] for _, attrs in elements if "aria-labelledby" in attrs}
    assert used
    assert used <= set(names)


def test_page_shows_the_numbers(page):
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    for shown in ("90.0% 87.0 – 92.0", "never", "contradicts", "12.5 seconds", "1,437 training", "8 × 8"):
        assert shown in text


def test_terminal_shows_the_numbers_and_no_markup_is_read():
    out = io.StringIO()
    terminal.print_figure1(make_record("[bold]x[/bold]"), Console(file=out, width=100))
    text = out.getvalue()
    assert "[bold]x[/bold]" in text
    assert "90.0% (87.0 – 92.0)" in text
    assert "never" in text
    assert "contradicts" in text


def test_missing_matplotlib_names_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DependencyError, match="figures need matplotlib") as caught:
        figures.require_matplotlib()
    assert caught.value.cure == "pip install 'normscope[lab]'"


def test_imports_are_light():
    code = """if True:
        import sys, normscope
        rooms = {m.split(".")[1] for m in sys.modules if m.startswith("normscope.")}
        assert "functional" in rooms
        assert not rooms & {"cli", "report", "lab", "data"}, rooms
        import normscope.cli, normscope.report.figures, normscope.report.html, normscope.report.terminal
        import normscope.lab.figure1, normscope.data
        assert "matplotlib" not in sys.modules
        assert "sklearn" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)
