"""The transcript of the example, replayed: the same commands, the same report, the same numbers within a tolerance."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from normscope import cli

ROOT = Path(__file__).parents[1]
TRANSCRIPT = ROOT / "examples" / "transcript.txt"
# Another CPU adds in another order, and a few samples of 120 fall on the other side: 1 sample is 0.8 points.
TOLERANCE = 12.0
# The bounds of intervals move with the seconds digit of their centre and with the samples: twice that.
BOUND_TOLERANCE = 2 * TOLERANCE
NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?")


def sessions():
    """(command, lines) of every command of the transcript."""
    parts = re.split(r"^\$ normscope ", TRANSCRIPT.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return [(part.splitlines()[0], part.rstrip().splitlines()[1:]) for part in parts]


def shape(line):
    """The words of a line without its numbers; the order of layers may differ where two are equally bad."""
    line = re.sub(r"\(hash [0-9a-f]+\)", "", line)
    line = re.sub(r"^normscope [\d.]+", "normscope", line)
    return sorted(re.findall(r"[^\s,]+", NUMBER.sub("#", line)))


def numbers(line):
    """Percentages and points as (value, whether it is the bound of an interval)."""
    found = []
    for match in NUMBER.finditer(line):
        before, after = line[: match.start()], line[match.end() :]
        bound = before.count("[") > before.count("]")
        if bound or after.startswith(("%", " pp")):
            found.append((float(match[0].replace(",", "")), bound))
    return found


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transcript")
    shutil.copytree(ROOT / "examples", folder / "examples")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        results = [CliRunner().invoke(cli.main, shlex.split(command)) for command, _ in sessions()]
    torch.set_num_threads(threads)
    sys.modules.pop("broken_model")
    return results


def test_the_exit_codes_are_broken_repaired_healthy(replayed):
    assert [result.exit_code for result in replayed] == [1, 0, 0], "\n".join(result.output for result in replayed)


@pytest.mark.parametrize("k", range(3))
def test_the_output_is_the_transcripts(replayed, k):
    written, now = sessions()[k][1], replayed[k].stdout.rstrip().splitlines()
    assert [shape(line) for line in now] == [shape(line) for line in written]
    for ours, theirs in zip(now, written, strict=True):
        for (a, bound), (b, _) in zip(numbers(ours), numbers(theirs), strict=True):
            assert abs(a - b) <= (BOUND_TOLERANCE if bound else TOLERANCE), (ours, theirs)


def test_a_changed_transcript_is_noticed():
    line = sessions()[0][1][4]
    assert line.split()[0] == "accuracy"
    assert numbers(line) != numbers(NUMBER.sub("1.0", line))
    assert shape(line) != shape(line.replace("accuracy", "loss"))


def test_the_readme_shows_this_transcript():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if "normscope check examples/broken_model.py" not in readme:
        pytest.skip("the README has no transcript yet")
    for command, lines in sessions()[:2]:
        assert "\n".join([f"$ normscope {command}", *lines]) in readme
