"""docs/claims.md and docs/advice.md, read as a reader reads them, against the stored runs, judged again."""

import json
import math
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from normscope.lab import registry
from normscope.lab.advice import SITUATIONS
from normscope.lab.catalogue import CATALOGUE
from normscope.lab.claims import CLAIMS
from normscope.lab.contradictions import CONTRADICTIONS
from normscope.lab.experiment import Measured, Results, Task
from normscope.lab.samples import assuming

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "lab" / "results"
DOCUMENT = ROOT / "docs" / "claims.md"
ADVICE = ROOT / "docs" / "advice.md"

pytestmark = pytest.mark.skipif(not RESULTS.is_dir(), reason="only in a checkout")


def stored(path):
    """Profile, judgements and minutes of an exported file, without the code that writes and reads the ledger."""
    head, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    runs = [
        Measured(Task(head["experiment"], tuple(settings.items()), tuple(seeds)), numbers_of(numbers), seconds)
        for settings, seeds, seconds, numbers in rows
    ]
    experiment, results = registry.load(head["experiment"]), Results(runs)
    with assuming({settings["data"] for settings, *_ in rows if "data" in settings} or {"mnist"}):
        planned = experiment.tasks(head["profile"], head["seeds"], results)
    assert len(planned) == len(rows) == len(results), f"{path.name} is not complete"
    quick = head["profile"] == "quick" and not path.name.startswith("A")
    said = [
        {
            "claims": j.claims, "question": j.question, "verdict": "UNDECIDED" if quick else j.verdict,
            "effect": j.effect, "seeds": j.seeds,
        }
        for j in experiment.judge(results)
    ]  # fmt: skip
    return {
        "profile": head["profile"], "runs": len(rows), "judgements": said, "minutes": sum(row[2] for row in rows) / 60
    }  # fmt: skip


def numbers_of(numbers):
    return {name: [float(v) for v in value] if isinstance(value, list) else float(value)
            for name, value in numbers.items()}  # fmt: skip


@pytest.fixture(scope="module")
def records():
    return {path.stem: stored(path) for path in sorted(RESULTS.glob("*.jsonl"))}


@pytest.fixture(scope="module")
def document():
    return DOCUMENT.read_text(encoding="utf-8")


# --- what the document says -------------------------------------------------------------------------------------------

NUMBER = r"(-?[\d,]+(?:\.\d+)?(?:e[+-]\d+)?|inf|-inf|nan|undetermined)"
ROW = re.compile(r"^\| \*\*(\d{3}-\d+)\*\* .*? \| ([A-Za-z]+) \| (.*) \| (< 0\.1|[\d,]+\.\d|) \|$", re.MULTILINE)
COUNT = re.compile(r"^\| ([A-Za-z]+) \| (\d+) \| ", re.MULTILINE)


def rows_of(document):
    """Claim → verdict, what was measured, minutes."""
    found = {claim: rest for claim, *rest in ROW.findall(document.replace("\\|", "¦"))}
    assert list(found) == [claim.id for claim in CLAIMS]
    return found


def number(text):
    return math.nan if text == "undetermined" else float(text.replace(",", ""))


def close(text, value):
    """Three digits are written, half of the third being 0.5 % at most; two where an exponent is."""
    found, known = number(text), 0.051 if "e-" in text else 0.0051
    return math.isnan(value) if math.isnan(found) else found == pytest.approx(value, rel=known, abs=0)


def take_judgement(text, name, said):
    """Read one judgement from the beginning of a row and compare it; returns the rest of the row."""
    start = f"{name}: {said['question']} {said['verdict']}".replace("|", "¦")
    assert text.startswith(start), f"{start!r} is not what {text[:120]!r} says"
    return take_effect(text[len(start) :], name, said).removeprefix("; ")


def take_effect(text, name, said):
    """Effect, interval, unit and seeds."""
    effect = said["effect"]
    if effect is not None:
        match = re.match(rf", {NUMBER}(?: \({NUMBER} to {NUMBER}\))?", text)
        assert match, f"no effect in {text[:80]!r}"
        assert close(match[1], effect.value), (name, match[0], effect)
        assert (match[2] is None) == (effect.low == effect.high), (name, match[0], effect)
        if match[2]:
            assert close(match[2], effect.low), (name, match[0], effect)
            assert close(match[3], effect.high), (name, match[0], effect)
        text = text[match.end() :]
        unit = f" {effect.unit}".rstrip().replace("|", "¦")
        assert text.startswith(unit)
        text = text[len(unit) :]
    if said["seeds"]:
        told = f", {said['seeds']} seed{'s' * (said['seeds'] > 1)}"
        assert text.startswith(told), (name, told, text[:40])
        text = text[len(told) :]
    return text


def verdict_of(verdicts):
    """How the page on the lab says that verdicts are put together."""
    kinds = set(verdicts)
    agree = kinds & {"CONFIRMED", "EXACT"}
    if len(kinds) == 1:
        return kinds.pop()
    if "CONDITIONAL" in kinds or (agree and "REFUTED" in kinds):
        return "CONDITIONAL"
    return "CONFIRMED" if kinds == agree else "UNDECIDED"


def check(document, records):
    """Every claim and experiment of the document against the records."""
    rows, counts = rows_of(document), dict.fromkeys([m[0] for m in COUNT.findall(document)], 0)
    for claim in CLAIMS:
        verdict, measured, minutes = rows[claim.id]
        counts[verdict] += 1
        behind = [name for name in records if any(claim.id in j["claims"] for j in records[name]["judgements"])]
        said = [(name, j) for name in behind for j in records[name]["judgements"] if claim.id in j["claims"]]
        for name, judgement in said:
            measured = take_judgement(measured, name, judgement)
        undone = [name for name in claim.experiments if name not in records]
        rest = [claim.record] * bool(claim.record) + [f"not run: {', '.join(undone)}"] * bool(undone)
        assert measured == "; ".join(rest).replace("|", "¦"), claim.id
        if claim.record:
            assert (verdict, minutes) == ("RECORD", ""), claim.id
        elif not said:
            # Open is a claim with no stored run at all, and none other.
            assert (verdict, minutes) == ("open", ""), claim.id
            assert undone == list(claim.experiments), claim.id
        else:
            assert verdict == verdict_of([j["verdict"] for _, j in said]), claim.id
            spent = sum(records[name]["minutes"] for name in behind)
            assert minutes == "< 0.1" if spent < 0.05 else number(minutes) == pytest.approx(spent, abs=0.051), claim.id
    assert {v: int(n) for v, n in COUNT.findall(document)} == counts
    check_experiments(document, records)
    check_contradictions(document, records)
    return counts


def check_experiments(document, records):
    """Every stored experiment has a section with its profile, runs and minutes; what is not run is named so."""
    sections = dict(re.findall(r"^### ([A-H]\d\d) .*?\n(.*?)(?=^##)", document, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(records)
    for name, text in sections.items():
        told = re.search(r"^- Profile (\w+): ([\d,]+) of ([\d,]+) runs?, (.+?) minutes of", text, re.MULTILINE)
        record = records[name]
        assert told[1] == record["profile"]
        assert number(told[2]) == number(told[3]) == record["runs"]
        if record["minutes"] >= 0.05:
            assert number(told[4]) == pytest.approx(record["minutes"], abs=0.051), name
        for j in record["judgements"]:
            assert f"- **{j['verdict']}** {j['question']}" in text, (name, j)


def check_contradictions(document, records):
    """Every contradiction names what each of its experiments said about its claims, and which are still to run."""
    rows = re.findall(r"^\| (X\d+) \| (.*?) \| (decided|in part|open) \| (.+) \|$", document.replace("\\|", "¦"), re.M)
    assert [row[0] for row in rows] == [pair.code for pair in CONTRADICTIONS] == [f"X{k}" for k in range(1, 24)]
    for (_, _, state, told), pair in zip(rows, CONTRADICTIONS, strict=True):
        verdicts = []
        for name in pair.experiments:
            for judgement in records[name]["judgements"] if name in records else ():
                if claims := [claim for claim in judgement["claims"] if claim in pair.claims]:
                    told = take_judgement(told, f"{name} on {', '.join(claims)}", judgement).removeprefix(".").lstrip()
                    verdicts.append(judgement["verdict"])
        undone = [name for name in pair.experiments if name not in records]
        sure = [verdict for verdict in verdicts if verdict != "UNDECIDED"]
        if undone:
            assert told == f"Not run: {', '.join(undone)}.", pair.code
        else:
            assert ("could not decide" in told) == (state == "open"), pair.code
        whole = not undone and len(sure) == len(verdicts)
        assert state == ("open" if not sure else "decided" if whole else "in part"), pair.code


# --- the tests --------------------------------------------------------------------------------------------------------


def test_every_claim_says_what_the_stored_runs_say(document, records, record_property):
    counts = check(document, records)
    assert sum(counts.values()) == 118
    record_property("open claims", counts["open"])
    # None is open once everything is published.
    if set(records) == set(CATALOGUE):
        assert counts["open"] == 0
        assert "not run" not in document


def test_all_corrections_are_told(document):
    assert re.findall(r"^\| (R\d+) \| \d{3}-\d+.*?: .+ \| .+ \|$", document, re.MULTILINE) == [
        f"R{k}" for k in range(1, 21)
    ]


def changed(document, pattern, change, nth=0):
    """The document with the nth match of a pattern changed."""
    match = list(re.finditer(pattern, document, re.MULTILINE))[nth]
    text = change(match)
    assert text != match[0]
    return document[: match.start()] + text + document[match.end() :]


EFFECT = r"CONFIRMED, )(-?0\.\d+) \((-?0\.\d+)"


@pytest.mark.parametrize(
    ("pattern", "change"),
    [
        (r"^(\| \*\*000-10\*\* .*?) \| \w+ \|", lambda m: f"{m[1]} | CONFIRMED |"),
        (r"^(\| \*\*000-10\*\* .*?\?) REFUTED", lambda m: f"{m[1]} CONFIRMED"),
        (rf"^(\| \*\*.*?{EFFECT}", lambda m: f"{m[1]}{float(m[2]) * 1.02:.4f} ({m[3]}"),  # an effect
        (rf"^(\| \*\*.*?{EFFECT}", lambda m: f"{m[1]}{m[2]} ({float(m[3]) * 0.98:.4f}"),  # an end of its interval
        (r"^(\| \*\*.*?CONFIRMED, .*?), 6 seeds", lambda m: f"{m[1]}, 5 seeds"),
        (rf"^(\| X1 \|.*?{EFFECT}", lambda m: f"{m[1]}{float(m[2]) * 1.02:.4f} ({m[3]}"),
        (r"^(\| X1 \|.*?) \| in part \|", lambda m: f"{m[1]} | decided |"),
        (r"^(\| \*\*000-10\*\* .*) \| [\d.]+ \|$", lambda m: f"{m[1]} | 1.0 |"),  # minutes
        (r"^\| \*\*003-7\*\*.*\n", lambda m: ""),
        (r"^\| REFUTED \| (\d+)", lambda m: f"| REFUTED | {int(m[1]) + 1}"),
        (r"^### B07 .*\n", lambda m: ""),
        (r"(- Profile cpu: )(\d+)( of)", lambda m: f"{m[1]}{int(m[2]) + 1}{m[3]}"),
        (r"^(\| \*\*000-10\*\* .*?) \| \w+ \| .*", lambda m: f"{m[1]} | open | not run: B07 |  |"),
    ],
)
def test_a_changed_document_is_noticed(document, records, pattern, change):
    with pytest.raises(AssertionError):
        check(changed(document, pattern, change), records)


def test_a_changed_number_among_the_results_is_noticed(document, records, tmp_path):
    path = tmp_path / "B07.jsonl"
    lines = (RESULTS / "B07.jsonl").read_text(encoding="utf-8").splitlines()
    for k, line in enumerate(lines[1:], 1):
        settings, seeds, seconds, numbers = json.loads(line)
        if settings["activation"] == "sigmoid" and settings["norm"] == "BN" and settings["stage"] == "test":
            numbers["test"] = [value + 0.01 for value in numbers["test"]]
        lines[k] = json.dumps([settings, seeds, seconds, numbers])
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(AssertionError):
        check(document, records | {"B07": stored(path)})


COUNTS = {
    r"(\d+) claims about Batch Normalization": len(CLAIMS), r"Five texts make (\d+) claims": len(CLAIMS),
    r"(\d+) 条说法": len(CLAIMS), r"(\d+) experiments": len(CATALOGUE), r"(\d+) 个实验": len(CATALOGUE),
}  # fmt: skip


@pytest.mark.parametrize("name", ["README.md", "README.zh.md", "docs/lab.md", "docs/claims.md"])
def test_counts_of_claims_and_experiments_are_those_of_the_registry(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    told = [(int(found), count) for pattern, count in COUNTS.items() for found in re.findall(pattern, text)]
    assert told
    assert all(found == count for found, count in told), (name, told)


# --- advice -----------------------------------------------------------------------------------------------------------

SIGNS = {"✓": "for", "✗": "against", "·": "note", "?": "unknown"}


def check_advice(advice, document, records):
    """Every sentence of the page: its experiment, verdict, figures, and that it says what the verdict allows."""
    # GitHub keeps letters and decimal digits of a heading: of γ₀ the γ.
    letters = (
        "".join(c for c in heading.lower() if c in "-_ " or (c.isalnum() and unicodedata.category(c) != "No"))
        for heading in re.findall(r"^#+ (.*)$", document, re.MULTILINE)
    )
    anchors = {heading.replace(" ", "-") for heading in letters}
    parts = re.split(r"^## ", advice.replace("\\|", "¦"), flags=re.MULTILINE)[1:-1]
    assert [part.split("\n")[0] for part in parts] == [situation.title for situation in SITUATIONS]
    counts = Counter()
    for part, situation in zip(parts, SITUATIONS, strict=True):
        rows = re.findall(r"^\| ([✓✗·?]) \| (.*?) \| (.*) \|$", part, re.MULTILINE)
        assert len(rows) == len(situation.asked)
        for (sign, sentence, evidence), asked in zip(rows, situation.asked, strict=True):
            counts[check_sentence(sign, sentence, evidence, asked, records, anchors)] += 1
        for line in situation.call:
            assert f">>> {line}\n" in part
    told = re.search(r"of (\d+), (\d+) are decided, (\d+) are measured and not decided, (\d+) are not run", advice)
    assert list(map(int, told.groups())) == [
        counts.total(), counts["decided"], counts["undecided"], counts["not run"]
    ]  # fmt: skip
    return counts


def check_sentence(sign, sentence, evidence, asked, records, anchors):
    clauses = [f"{clause[:1].upper()}{clause[1:]}." for clause in (asked.yes, asked.no, asked.mixed)]
    if asked.experiment not in records:
        assert (sign, evidence) == ("?", f"{asked.experiment} is not run")
        assert sentence == f"Not measured: whether {asked.yes}."
        return "not run"
    (said,) = [j for j in records[asked.experiment]["judgements"] if j["question"] == asked.question]
    link = re.match(rf"\[{asked.experiment}\]\(claims\.md#([^)]+)\): {said['verdict']}", evidence)
    assert link, (evidence, said)
    assert link[1] in anchors
    rest = take_effect(evidence[link.end() :], asked.experiment, said)
    assert rest.startswith("; ")
    if said["verdict"] == "UNDECIDED":
        assert (sign, sentence) == ("?", f"Not decided: whether {asked.yes}.")
        return "undecided"
    expected = {"CONFIRMED": 0, "EXACT": 0, "REFUTED": 1, "CONDITIONAL": 2}[said["verdict"]]
    assert sentence == clauses[expected]
    stance = "for" if said["verdict"] in (asked.supports, "CONDITIONAL") else "against"
    assert SIGNS[sign] == ("note" if asked.supports is None else stance)
    return "decided"


@pytest.fixture(scope="module")
def advice():
    return ADVICE.read_text(encoding="utf-8")


def test_every_sentence_of_the_advice_rests_on_a_stored_verdict(advice, document, records, record_property):
    counts = check_advice(advice, document, records)
    record_property("sentences not run", counts["not run"])
    if set(records) == set(CATALOGUE):
        assert counts["not run"] == 0


@pytest.mark.parametrize(
    ("pattern", "change"),
    [
        (r"^\| ✓ \|", lambda m: "| ✗ |"),
        (rf"(: {EFFECT}", lambda m: f"{m[1]}{float(m[2]) * 1.02:.4f} ({m[3]}"),
        (r"\)\: CONFIRMED", lambda m: "): REFUTED"),
        (r"^(\| ✓ \| )(.*?)(\. \|)", lambda m: f"{m[1]}{m[2]} always{m[3]}"),
        (r"are decided, (\d+)", lambda m: f"are decided, {int(m[1]) + 1}"),
        (r"claims\.md#c01-the", lambda m: "claims.md#c01-a"),
        (r"^>>> report = ns\.freeze.*$", lambda m: ">>> report = ns.frieze(network())"),
        (r"^\| \? \| Not measured: .*\n", lambda m: ""),
    ],
)
def test_a_changed_advice_is_noticed(advice, document, records, pattern, change):
    if not re.search(pattern, advice, re.MULTILINE):
        pytest.skip("no such line: all is measured")
    with pytest.raises(AssertionError):
        check_advice(changed(advice, pattern, change), document, records)
