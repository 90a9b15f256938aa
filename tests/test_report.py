"""Records survive JSON; reports show what records say, escape everything and need neither network nor display."""

import base64
import dataclasses
import hashlib
import io
import itertools
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest
from check_records import make_channels, make_check, make_finding, make_fix, make_row
from rich.console import Console

from normscope import records
from normscope.errors import DependencyError
from normscope.report import charts, comparison, figures, html, modules, scatter, terminal, words

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


# --- the report of a check --------------------------------------------------------------------------------------------


def printed(show, *args, encoding="utf-8", **options):
    """What a terminal of 80 columns gets."""
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding, errors="replace")
    show(*args[:1], Console(file=out, width=80), *args[1:], **options)
    out.flush()
    return raw.getvalue().decode(encoding)


def plain(page):
    """The text of a page as it is read."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.partition("<script")[0]))


def many(count, layers=20):
    paths = [f"backbone.layer{k // 4}.{k % 4}.bn1" for k in range(layers)]
    return make_check(tuple(make_finding(f"NRM{100 + k}", "E", f"trouble-{k}", paths) for k in range(count)), layers)


@pytest.mark.parametrize("record", [make_check(), make_fix()], ids=["check", "fix"])
def test_records_of_the_doctor_survive_json(record):
    text = records.to_json(record)
    json.loads(text, parse_constant=strict)
    assert records.from_json(type(record), text) == record


def test_records_of_the_doctor_survive_json_with_odd_numbers():
    record = make_check(noise_floor=math.nan, cost=records.Interval(math.inf, -math.inf, math.nan, "loss"))
    text = records.to_json(record)
    assert records.to_json(records.from_json(records.CheckRecord, text)) == text


@pytest.mark.parametrize(
    "record",
    [
        make_check(),
        make_check(()),
        make_check(scores=(), cost=None),
        many(1),
        many(7),
        many(40, 200),
        make_check(words="x" * 300),
        make_check((make_finding(words="y" * 200, message="word " * 400),)),
    ],
    ids=["usual", "healthy", "unpriced", "one", "seven", "forty", "long words", "long message"],
)
def test_the_short_report_fits_a_screen(record):
    lines = printed(terminal.print_check, record).splitlines()
    assert len(lines) <= 25
    # A command stays whole, so that it can be copied.
    assert max(len(line) for line in lines if not line.startswith("next:")) <= 80


def test_the_short_report_says_it_all():
    text = printed(terminal.print_check, make_check())
    for shown in (
        "normscope 0.1.0   SegNet: 6 normalizers (6 BatchNorm)",
        "1,920 samples   38.4 s   seed 0   cpu   model restored: yes (hash 9f3c1a2b)",
        "accuracy                         71.4%           76.9%   5.5 pp [4.6, 6.4]",
        "loss                             0.930           0.710\n",
        "E NRM203 half-frozen  encoder.bn1, encoder.bn2            explains 93% of 5.5 pp\n",
        "fix: measure the statistics again [S1: statistics and flags, no weights]",
        "└ consequence: NRM103 stale-statistics in encoder.bn2",
        "W NRM301 too-few-values  head.bn                               cost not measured\n",
        "I 1 more: NRM106 momentum-out-of-convention",
        "passed 10   not applicable 1   needs input 1   could not check 1",
        "next: normscope fix SegNet --data SegNet -o fixed.pt",
    ):
        assert shown in text
    assert text.index("NRM203") < text.index("NRM103") < text.index("NRM301")


def test_the_short_report_counts_what_it_leaves_out():
    text = printed(terminal.print_check, many(7))
    assert text.count("E NRM10") == 3
    assert "… 4 more troubles: --verbose or the page shows them" in text


def test_the_short_report_of_a_healthy_model():
    text = printed(terminal.print_check, make_check(()))
    assert "No normalization trouble was found: 10 rules passed, 2 not checked." in text
    assert "next:" not in text


def test_the_short_report_without_a_cost():
    text = printed(terminal.print_check, make_check(scores=(), cost=None))
    assert "cost not measured: pass --metric or --loss" in text


def test_a_terminal_without_unicode_gets_ascii():
    record = make_check(reading="δ ≥ 0.25 σ – “μ” × 2 → ρ’s ±1 …")
    for verbose in (False, True):
        text = printed(terminal.print_check, record, encoding="ascii", verbose=verbose)
        assert "?" not in text
        assert "` consequence:" in text


def test_nothing_is_read_as_markup():
    for verbose in (False, True):
        text = printed(terminal.print_check, make_check(words="[bold]x[/bold]"), verbose=verbose)
        assert "[bold]x[/bold]: 6 normalizers" in text


def test_the_long_report_leaves_nothing_out():
    record = many(9)
    text = printed(terminal.print_check, record, verbose=True)
    for finding in record.findings:
        assert f"{finding.severity} {finding.code} {finding.name}" in text
    assert all(f"layer {row.name}" in text for row in record.layers)
    assert "freeze the statistics, too [S3: your code]\n      ns.freeze(model.encoder)" in text
    assert "NRM208 SegNet: needs input: SegNet" in text


def test_the_repair_in_the_terminal():
    text = printed(terminal.print_fix, make_fix(), make_check())
    for shown in (
        "applied NRM103 recal [S1]  encoder.bn1  +5.4 pp [4.5, 6.3]",
        "skipped NRM304 code [S3]  encoder.bn1\n    an edit of your code",
        "accuracy on split B, which chose the remedies:  71.4% → 76.9%",
        "gain on split C, which chose nothing:  +5.1 pp [4.2, 6.0] (99%)  confirmed",
    ):
        assert shown in text
    assert "not confirmed" in printed(terminal.print_fix, make_fix(confirmed=False))
    assert "not verified: pass" in printed(terminal.print_fix, make_fix(before=None, after=None, gain=None))
    assert "nothing to repair" in printed(terminal.print_fix, make_fix(applied=(), skipped=()))


@pytest.fixture(scope="module")
def report():
    return html.render_check(make_check(), make_fix())


def test_check_page_shows_the_numbers(report):
    text = plain(report)
    for shown in (
        "Normalization trouble costs 5.5 pp [4.6, 6.4] of accuracy; the first cause is NRM203 half-frozen",
        "71.4% now, 76.9% recalibrated",
        "On split B, which chose the remedies: 71.4% before, 76.9% after. On split C, which chose nothing: "
        "+5.1 pp [4.2, 6.0] , confirmed",
        "error NRM203 half-frozen",
        "It explains 93% of 5.5 pp.",
        "1 consequence of it: NRM103 stale-statistics",
        "warning NRM301 too-few-values",
        "1 hint: no measured harm, worth knowing",
        "moved 0.410 median over channels, σ",
        "10 passed",
        "1 could not check",
        "split A (diagnose) 640, B (verify) 640, C (confirm) 640",
    ):
        assert shown in text
    assert text.index("NRM203 half-frozen") < text.index("NRM301 too-few-values") < text.index("NRM106")


def test_check_page_escapes_every_word():
    hostile = "</script><script>alert('1')</script>&[bold]"
    finding = make_finding(
        "NRM103", words=hostile, layers=(hostile,), message=hostile,
        facts=(records.Fact(hostile, None, hostile),),
        remedies=(records.Remedy(hostile, "S1", hostile, hostile),),
    )  # fmt: skip
    child = make_finding("NRM104", words=hostile, layers=(hostile,), explained_by="NRM103")
    channels = (make_channels(hostile),)
    record = make_check(
        (finding, child), words=hostile, device=hostile, reading=hostile, before=hostile, channels=channels
    )
    treatment = records.Treatment(hostile, finding.remedies[0], (hostile,), None, hostile)
    page = html.render_check(record, make_fix(applied=(treatment,), skipped=(treatment,)))
    found = Elements(page).found
    scripts = [attrs for tag, attrs in found if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "record"}, {}]
    assert not [tag for tag, _ in found if tag == "bold"]
    assert not [attrs for _, attrs in found if any(name.startswith("on") for name in attrs)]
    assert page.count("&lt;/script&gt;&lt;script&gt;") >= 25
    # Channels that are not finite are unequal to themselves.
    assert records.to_json(comparison.read_check(page)) == records.to_json(record)


def test_comparison_page_escapes_every_word():
    hostile = "</script><script>alert('1')</script>&[bold]"
    old, new, same = (
        make_finding(code, words=hostile, layers=(hostile,), message=hostile) for code in ("NRM103", "NRM203", "NRM301")
    )
    before = make_check((old, same), words=hostile)
    page = html.render_comparison(comparison.compare(before, make_check((same, new), words=hostile, samples=1)))
    scripts = [attrs for tag, attrs in Elements(page).found if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "comparison"}, {}]
    assert page.count("&lt;/script&gt;&lt;script&gt;") >= 8


def test_check_page_carries_its_record(report):
    assert comparison.read_check(report) == make_check()


def test_check_page_needs_no_network_and_runs_no_other_script(report):
    found = Elements(report).found
    assert not [tag for tag, _ in found if tag in ("link", "iframe", "img", "object")]
    assert not [attrs for tag, attrs in found if tag == "script" and "src" in attrs]
    assert all(attrs.get(name, "#").startswith("#") for _, attrs in found for name in ("src", "href", "xlink:href"))
    assert "url(" not in report
    assert "@import" not in report
    policy = next(attrs["content"] for tag, attrs in found if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    ours = base64.b64encode(hashlib.sha256(re.search("<script>(.*?)</script>", report, re.S)[1].encode()).digest())
    assert f"script-src 'sha256-{ours.decode()}'" in policy


def test_check_page_is_accessible(report):
    found = Elements(report).found
    names = [attrs["id"] for _, attrs in found if "id" in attrs]
    assert len(names) == len(set(names))
    used = {attrs["aria-labelledby"] for _, attrs in found if "aria-labelledby" in attrs}
    used |= {attrs["href"][1:] for tag, attrs in found if tag == "a"}
    assert {"NRM203", "NRM103"} <= used <= set(names)
    assert all("scope" in attrs for tag, attrs in found if tag == "th")
    assert sum(tag == "table" for tag, _ in found) == sum(tag == "caption" for tag, _ in found)
    # Pictures repeat what stands beside them as a number.
    assert all(attrs.get("aria-hidden") == "true" for tag, attrs in found if tag == "svg")
    levels = [int(tag[1]) for tag, _ in found if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    for need in ("prefers-color-scheme: dark", "@media print", "@media (max-width"):
        assert need in report


def test_check_page_is_small():
    record = many(5, 200)
    wide = records.ChannelStatistics("", 512, *[tuple(1.2345 * k - 37 for k in range(64))] * 4)
    channels = tuple(dataclasses.replace(wide, layer=row.name) for row in record.layers[:6])
    assert len(html.render_check(dataclasses.replace(record, channels=channels), make_fix()).encode()) <= 300_000


def test_check_page_says_what_to_type():
    def header(record):
        return plain(html.render_check(record).partition("</header>")[0])

    typed = "normscope fix SegNet --data SegNet -o fixed.pt"
    assert typed in header(make_check())
    assert "normscope fix" not in header(make_check(()))
    manual = make_finding(remedies=(records.Remedy("code", "S3", "shuffle", "DataLoader(..., shuffle=True)"),))
    assert "normscope fix" not in header(make_check((manual,)))


def test_check_page_puts_the_verified_gain_beside_the_cause(report):
    rows = re.search(r"<table class=\"list stack decisions\">.*?</table>", report, re.DOTALL)[0].split("<tr>")[2:]
    # NRM103 was treated; it follows from NRM203, which is a row of its own.
    assert "NRM203" in rows[0]
    assert "+5.4 pp [4.5, 6.3]" in rows[0]
    assert "pp" not in rows[1].partition("what helps")[2]
    assert "verified gain" not in html.render_check(make_check())


def test_check_page_draws_no_figure_twice():
    layers = ["encoder.bn1", "encoder.bn2"]
    twice = (make_finding("NRM103", layers=layers), make_finding("NRM104", words="other", layers=layers))
    page = html.render_check(make_check(twice, channels=(make_channels("encoder.bn1"),)))
    assert page.count('<figure class="channel">') == 1
    assert page.count("Running statistics against the data") == 1
    assert 'stand under <a href="#NRM103">' in page


def test_the_tree_of_modules():
    names = ["", "stem.bn", "a.0.n1", "a.0.n2", "a.1.n1", "a.1.n2", "b.deep.one.n", "b.deep.two.n", "b.deep.two.m"]
    findings = (make_finding("NRM103", "W", layers=["a.1.n2"]), make_finding("NRM203", "E", layers=["a.1.n2"]),
                make_finding("NRM106", "I", layers=["stem.bn"]))  # fmt: skip
    codes = {name: [f.code for f in findings if name in f.layers] for name in names}
    rows = [make_row(name, k, codes[name]) for k, name in enumerate(names)]
    rows[3] = dataclasses.replace(rows[3], calls=0)
    tree = modules.tree_of(dataclasses.replace(make_check(findings), layers=tuple(rows)))
    assert [(leaf.label, leaf.severity) for leaf in tree.leaves] == [("(the model itself)", ""), ("stem.bn", "I")]
    a, b = tree.branches
    assert (a.label, a.total, a.found, [inner.label for inner in a.branches]) == ("a", 4, 1, ["0", "1"])
    assert [(leaf.label, leaf.index, leaf.reached) for leaf in a.branches[0].leaves] == [
        ("n1", 2, True),
        ("n2", 3, False),
    ]
    assert [leaf.severity for leaf in a.branches[1].leaves] == ["", "E"]
    # What holds one thing only joins its name.
    assert (b.label, [leaf.label for leaf in b.leaves], b.branches[0].label) == ("b.deep", ["one.n"], "two")
    assert [a.folded, b.folded] == [False, False]


def test_a_large_branch_without_trouble_is_folded():
    record = make_check((make_finding("NRM106", "I", layers=["sick.0.n"]),))
    rows = [make_row(f"{part}.{k}.n", k) for part in ("well", "sick") for k in range(70)]
    rows[70] = dataclasses.replace(rows[70], codes=("NRM106",))
    folded = [branch.folded for branch in modules.tree_of(dataclasses.replace(record, layers=tuple(rows))).branches]
    assert folded == [True, True]
    record = make_check((make_finding("NRM106", "E", layers=["sick.0.n"]),))
    folded = [branch.folded for branch in modules.tree_of(dataclasses.replace(record, layers=tuple(rows))).branches]
    assert folded == [True, False]


def test_channels_lie_where_their_numbers_are():
    record = make_check(channels=(make_channels("encoder.bn1"), make_channels("head.bn")))
    (figure,) = scatter.channel_figures(record, make_finding(layers=["encoder.bn1"]))
    mean, var = figure.scatters
    # Of five channels, by hand: means 0|0, 1|1.05 and 0.5|1.5 σ, 0|0, and one NaN; variances 1, 4, 4, 1|4, 1.
    assert mean.summary == "1 of 4 channels off by more than 0.25 σ, 1 too far off to be drawn, or not finite"
    assert var.summary == "1 of 5 channels off by more than a factor of 1.5"
    low, high = (float(end) for end in mean.ends)
    dots = [(float(x), float(y)) for x, y in re.findall(r"M([\d.]+) ([\d.]+)h0", mean.healthy)]
    expected = [(0.0, 0.0), (1.0, 1.05), (0.0, 0.0)]
    for (x, y), (data, running) in zip(dots, expected, strict=True):
        assert x == pytest.approx(scatter.SIDE * (data - low) / (high - low), abs=1)  # ends are rounded to 3 digits
        assert y == pytest.approx(scatter.SIDE * (1 - (running - low) / (high - low)), abs=1)
    assert mean.beyond.count("M") == 1
    assert mean.band == pytest.approx(scatter.SIDE * 0.25 / (high - low), rel=0.01)
    assert figure.note == ""
    (figure,) = scatter.channel_figures(make_check(channels=(make_channels("a", 99),)), make_finding(layers=["a"]))
    assert figure.note == "5 of 99 channels, from the least to the most drifted"


def test_channels_stay_inside_their_frame():
    odd = (math.nan, math.inf, -math.inf, 1e308, -1e308, 0.0, 3.0)
    grid = list(itertools.product(odd, repeat=4))
    channels = records.ChannelStatistics("encoder.bn1", len(grid), *zip(*grid, strict=True))
    (figure,) = scatter.channel_figures(make_check(channels=(channels,)), make_finding(layers=["encoder.bn1"]))
    for drawn in figure.scatters:
        places = [float(v) for v in re.findall(r"[^Mh l]+", re.sub(r"[hl][^M]*", "", drawn.healthy + drawn.beyond))]
        assert places
        assert all(-2 <= place <= scatter.SIDE for place in places)


def test_an_average_forgets_its_beginning():
    facts = (records.Fact("momentum", 0.1), records.Fact("batches seen", 22.0))
    decay = scatter.decay_of(make_finding("NRM104", facts=facts))
    # 0.9⁴⁴ is the first power below 1 %.
    assert decay.batches == (22.0, 44)
    assert decay.weight == pytest.approx(0.9**22)
    assert decay.now == (pytest.approx(120 * 22 / (1.05 * 44), abs=0.1), pytest.approx(120 * (1 - 0.9**22), abs=0.1))
    assert scatter.decay_of(make_finding("NRM103", facts=facts)) is None
    assert "10% after 22; 1% would take 44" in html.render_check(make_check((make_finding("NRM104", facts=facts),)))


def test_charts_of_many_normalizers_show_the_worst():
    names = [f"layer{k}.bn" for k in range(40)]
    finding = make_finding("NRM103", layers=names)
    chart = charts.chart_of(make_check((finding,), 40), finding)
    assert [bars[0].label for bars in chart.rows] == names[-charts.MOST_ROWS :]
    few = make_finding("NRM301", layers=names)
    # Here fewer is worse: values fall from layer to layer.
    chart = charts.chart_of(make_check((few,), 40), few)
    assert [bars[0].label for bars in chart.rows] == names[-charts.MOST_ROWS :]


def test_check_page_without_trouble_or_normalizers():
    assert "no trouble found" in html.render_check(make_check(()))
    page = html.render_check(make_check((), layers=0, scores=(), cost=None))
    assert "The model has no normalizers that normscope knows: nothing was checked." in page


def test_charts_stay_inside_their_frame():
    odd = (math.nan, math.inf, -3.0, 0.0, 1e308, None)
    rows = tuple(
        dataclasses.replace(row, delta=value, rho=value, explains=value, values=value)
        for row, value in zip(make_check().layers, odd, strict=True)
    )
    finding = make_finding("NRM103", layers=[row.name for row in rows])
    record = make_check((finding,))
    record = dataclasses.replace(record, layers=rows)
    for chart in (charts.chart_of(record, finding), charts.shares_chart(record, finding)):
        for bar in (bar for row in chart.rows for bar in row):
            assert all(0 <= p <= 100 for p in (bar.start, bar.end, bar.low, bar.high) if p is not None)
    html.render_check(record)


def test_charts_show_thresholds_and_flags():
    record = make_check()
    chart = charts.chart_of(record, record.findings[0])
    assert [bars[0].alarm for bars in chart.rows] == [True, True, False, False, False, False]
    assert [bars[0].text for bars in chart.rows][:3] == ["0", "0.100", "0.200"]
    place, meaning = chart.marks[0]
    assert place == 50.0  # the scale ends at twice the threshold, and no layer is beyond
    assert meaning == "at most 0.250 is healthy"
    assert charts.chart_of(record, make_finding("NRM902", layers=())) is None


def test_costs_are_drawn_from_zero():
    bar = charts.cost_bar(records.Interval(5.0, 4.0, 10.0, "pp"))
    assert (bar.start, bar.low < bar.end < bar.high) == (0.0, True)
    assert bar.text == "5.0 pp [4.0, 10.0]"
    both = charts.cost_bar(records.Interval(0.0, -1.0, 1.0, "pp"))
    assert both.low < both.start == both.end < both.high


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.250"), (12.345, "12.3"), (99.99, "100.0"), (1234.5, "1,234"), (2e-5, "2.0e-05"),
     (math.nan, "nan"), (-0.5, "-0.500"), (3e9, "3.00e+09")],
)  # fmt: skip
def test_numbers_in_words(value, text):
    assert words.number(value) == text


@pytest.mark.parametrize(
    ("names", "width", "text"),
    [
        (("a.bn",), 40, "a.bn"),
        (("",), 40, "(the model itself)"),
        (("a.b1", "a.b2"), 40, "a.b1, a.b2"),
        (tuple(f"enc.block.{k}.bn" for k in range(30)), 40, "enc.block.* (30 layers)"),
        (tuple(f"block{k}.norm" for k in range(30)), 40, "block0.norm, … (30 layers)"),
        (tuple(f"block{k}.norm" for k in range(30)), 20, "30 layers"),
        (("a" * 60,), 20, "…" + "a" * 19),
    ],
)
def test_layers_in_few_words(names, width, text):
    assert words.fold_layers(names, width) == text
    assert len(text) <= width


def test_a_remedys_command_has_the_users_arguments():
    remedy = records.Remedy("recal", "S1", "again", "normscope fix MODEL --data DATA --rule NRM103 -o fixed.pt")
    record = make_check(settings=(("command", "normscope check m.py:f --data g --metric h"),))
    assert words.command(record, remedy) == "normscope fix m.py:f --data g --metric h --rule NRM103 -o fixed.pt"
    assert words.command(make_check(settings=()), remedy) == remedy.command
