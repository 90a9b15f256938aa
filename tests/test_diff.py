"""Two checks side by side: what is new, what is gone and why, what changed, and the exit code."""

import dataclasses
import json
import re

import pytest
from check_records import make_check, make_finding, make_row
from click.testing import CliRunner

from normscope import cli, records
from normscope.records import Interval, Threshold
from normscope.report import html, words
from normscope.report.comparison import compare, read_check


def half_frozen(**changes):
    return make_finding("NRM203", **changes)


def stale(severity="E", **changes):
    return make_finding("NRM103", severity, "stale-statistics", **changes)


def verdict(code, status, reason="because"):
    return records.Verdict(code, "a-rule", status, reason)


def codes(findings):
    return [finding.code for finding in findings]


def test_a_check_does_not_differ_from_itself():
    same = compare(make_check(), make_check(seconds=1.0, notes=("another",)))
    assert (same.new, same.gone, same.changed, same.unchecked, same.layers, same.circumstances) == ((),) * 6
    assert codes(same.same) == codes(make_check().findings)
    assert same.worse == ()
    assert words.compared_verdict(same) == "Nothing changed: 4 findings as before."


def test_new_and_gone():
    before, after = make_check((stale(),)), make_check((half_frozen(),))
    before = dataclasses.replace(before, verdicts=(*before.verdicts, verdict("NRM203", "pass")))
    after = dataclasses.replace(after, verdicts=(*after.verdicts, verdict("NRM103", "pass", "all is well")))
    found = compare(before, after)
    assert codes(found.new) == ["NRM203"]
    assert [(gone.finding.code, gone.over, gone.reason) for gone in found.gone] == [("NRM103", True, "all is well")]
    assert codes(found.worse) == ["NRM203"]


@pytest.mark.parametrize("status", ["needs-input", "could-not-check", "not-applicable", "intentional", None])
def test_what_did_not_pass_is_not_over(status):
    after = make_check(())
    if status is not None:
        after = dataclasses.replace(after, verdicts=(verdict("NRM103", status),))
    (gone,) = compare(make_check((stale(),)), after).gone
    assert not gone.over
    assert gone.status == (status or "not run")


@pytest.mark.parametrize(
    ("before", "after", "told", "worse"),
    [
        ({"severity": "W"}, {"severity": "E"}, "warning → error", True),
        ({"severity": "E"}, {"severity": "I"}, "error → hint", False),
        ({"layers": ("a.bn",)}, {"layers": ("a.bn", "b.bn")}, "also in b.bn", True),
        ({"layers": ("a.bn", "b.bn")}, {"layers": ("b.bn",)}, "no longer in a.bn", False),
        ({}, {"cost": Interval(9, 8, 10, "pp")}, "costs 9.0 pp [8.0, 10.0], was 5.5 pp [4.6, 6.4]", True),
        ({}, {"cost": Interval(1, 0.5, 1.5, "pp")}, "costs 1.0 pp [0.5, 1.5], was 5.5 pp [4.6, 6.4]", False),
    ],
)
def test_what_changed_and_what_is_worse(before, after, told, worse):
    (changed,) = compare(make_check((stale(**before),)), make_check((stale(**after),))).changed
    assert changed.changes == (told,)
    assert changed.worse is worse


@pytest.mark.parametrize(
    "cost",
    [Interval(6.9, 6.3, 7.5, "pp"), Interval(0.01, 0, 0.02, "loss"), None],
    ids=["overlaps", "another unit", "none"],
)
def test_what_a_cost_cannot_tell_is_no_change(cost):
    found = compare(make_check((stale(),)), make_check((stale(cost=cost, message="another text"),)))
    assert codes(found.same) == ["NRM103"]


def test_normalizers_that_appear_vanish_or_change():
    before, after = make_check(()), make_check(())
    rows = (make_row("layer0.bn"), dataclasses.replace(make_row("layer1.bn"), kind="GroupNorm"), make_row("", 1))
    found = compare(before, dataclasses.replace(after, layers=rows)).layers
    shown = {row.name: (row.before, row.after) for row in found}
    assert "layer0.bn" not in shown
    assert shown["layer1.bn"] == ("BatchNorm2d, train, 1 call", "GroupNorm, eval, 1 call")
    assert shown["(the model itself)"] == ("", "BatchNorm2d, train, 1 call")
    assert shown["layer5.bn"] == ("BatchNorm2d, train, 1 call", "")


def test_rules_that_answered_once_and_what_else_differs():
    before = dataclasses.replace(make_check(()), verdicts=(verdict("NRM901", "pass"), verdict("NRM902", "pass")))
    after = dataclasses.replace(
        make_check((), samples=7, settings=(("metric", "f1"), ("command", "typed"))),
        verdicts=(verdict("NRM901", "could-not-check"),),
        thresholds=(Threshold("drift_mean", 9.0, "why"),),
    )
    found = compare(before, after)
    assert [(row.name[:6], row.before, row.after) for row in found.unchecked] == [
        ("NRM901", "passed", "could not check"),
        ("NRM902", "passed", "not run"),
    ]
    differ = {row.name: (row.before, row.after) for row in found.circumstances}
    assert differ == {
        "samples": ("1,920", "7"),
        "metric": ("accuracy", "f1"),
        "threshold drift_mean": ("0.250", "9"),
        "threshold drift_var": ("0.405", ""),
    }


def test_scores_of_both_runs():
    found = compare(make_check(), make_check(scores=(), cost=None))
    assert [(row.name, row.before, row.after) for row in words.score_rows(found)] == [
        ("accuracy", "71.4% [68.0, 75.0]", "–"),
        ("loss", "0.930 [0.850, 1.01]", "–"),
        ("cost of the trouble", "5.5 pp [4.6, 6.4]", "–"),
    ]


def test_the_record_survives_json():
    found = compare(make_check((stale(),)), make_check((half_frozen(),)))
    assert records.from_json(records.Comparison, records.to_json(found)) == found


def test_an_older_record_can_be_read():
    body = json.loads(records.to_json(make_check()))
    del body["channels"]
    assert read_check(json.dumps(body)) == make_check()
    del body["layers"]
    with pytest.raises(ValueError, match="expected the fields"):
        read_check(json.dumps(body))


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def diff(tmp_path):
    def diff(before, after, *options):
        (tmp_path / "before.json").write_text(records.to_json(before), encoding="utf-8")
        (tmp_path / "after.html").write_text(html.render_check(after), encoding="utf-8")
        names = [str(tmp_path / name) for name in ("before.json", "after.html")]
        return CliRunner().invoke(cli.main, ["diff", *names, *options])

    return diff


@pytest.mark.parametrize(
    ("severity", "fail_on", "code"),
    [("E", "E", 1), ("W", "E", 0), ("W", "W", 1), ("I", "W", 0), ("I", "I", 1), ("E", "never", 0)],
)
def test_the_exit_code_is_about_what_is_new(diff, severity, fail_on, code):
    assert diff(make_check(()), make_check((stale(severity),)), "--fail-on", fail_on).exit_code == code


def test_what_is_old_or_gone_is_no_failure(diff):
    assert diff(make_check(), make_check()).exit_code == 0
    assert diff(make_check(), make_check(())).exit_code == 0
    assert diff(make_check((stale("W"),)), make_check((stale("E"),))).exit_code == 1


def test_the_text_tells_everything(diff):
    after = dataclasses.replace(make_check((stale("W", layers=("x.bn",)),)), verdicts=(verdict("NRM301", "pass"),))
    result = diff(make_check((stale(), make_finding("NRM301", "W", "too-few-values"))), after, "--fail-on", "never")
    text = " ".join(result.output.split())
    for shown in (
        "Findings: 1 worse, 1 over.",
        "accuracy 71.4% [68.0, 75.0] → 71.4% [68.0, 75.0]",
        "worse W NRM103 stale-statistics in x.bn, costs 5.5 pp [4.6, 6.4]",
        "error → warning also in x.bn no longer in encoder.bn1, encoder.bn2",
        "gone W NRM301 too-few-values in encoder.bn1, encoder.bn2",
        "passed: because",
        "encoder.bn1: gone, was BatchNorm2d, eval, 1 call",
    ):
        assert shown in text
    assert all(len(line) <= 80 for line in result.output.splitlines())


def test_page_and_json(diff, tmp_path):
    page = tmp_path / "diff.html"
    result = diff(make_check((stale(),)), make_check((half_frozen(),)), "--format", "json", "--html", str(page))
    found = records.from_json(records.Comparison, result.stdout)
    assert codes(found.new) == ["NRM203"]
    text = " ".join(re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8").partition("<main>")[2]).split())
    for shown in (
        "SegNet worse Findings: 1 new, 1 gone without a pass.",
        "new error NRM203 half-frozen encoder.bn1, encoder.bn2 5.5 pp [4.6, 6.4] The weights are frozen",
        "gone error NRM103 stale-statistics encoder.bn1, encoder.bn2 5.5 pp [4.6, 6.4] not run: the rule did not run",
        "accuracy 71.4% [68.0, 75.0] 71.4% [68.0, 75.0]",
    ):
        assert shown in text


@pytest.mark.parametrize("text", ["", "{}", "<!doctype html><p>no check</p>", '{"record": "FixRecord"}'])
def test_what_is_no_check_is_a_usage_error(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    result = CliRunner().invoke(cli.main, ["diff", str(path), str(path)])
    assert result.exit_code == 2
    assert "no JSON or page of a check" in result.output
    assert CliRunner().invoke(cli.main, ["diff", str(tmp_path / "none"), str(path)]).exit_code == 2
