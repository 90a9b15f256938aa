"""`assert_healthy`: what a failing test tells, and how a project's settings and a call's options go together."""

import pytest
import torch
from torch import nn

import normscope as ns
from normscope.doctor.configuration import Configuration
from normscope.errors import ArgumentError, DataError


def loader(count=12):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, 6, generator=generator) for _ in range(count)]


def model(sigmas=0.0):
    """Statistics of the data, moved by so many σ; the linear layer's bias is a hint (NRM401) in any case."""
    made = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
    ns.recalibrate(made, loader(), progress=False)
    made[1].running_mean += sigmas * made[1].running_var.sqrt()
    return made.eval()


def loss(output, batch):
    """A loss that feels a shift of the output."""
    return output.square().mean(1)


@pytest.fixture(autouse=True)
def _away(tmp_path, monkeypatch):
    """Without the settings of this project."""
    monkeypatch.chdir(tmp_path)


def test_the_failure_names_finding_layers_cost_and_command():
    with pytest.raises(ns.UnhealthyError) as caught:
        ns.assert_healthy(model(1.0), loader(), loss=loss)
    lines = str(caught.value).splitlines()
    finding = caught.value.report.findings[0]
    assert lines[0].startswith("Sequential is not healthy: 1 finding at E or above, evaluation loses ")
    assert "E NRM103 stale-statistics in 1" in lines[1]
    assert finding.message in lines[2]
    assert finding.remedies[0].text in lines[3]
    assert lines[4].split("$ ")[1].startswith("normscope fix")
    assert "ignore=['NRM103']" in lines[-1]
    assert isinstance(caught.value, AssertionError)


def test_only_findings_at_the_level_are_listed():
    with pytest.raises(ns.UnhealthyError) as caught:
        ns.assert_healthy(model(1.0), loader(), loss=loss, fail_on="I")
    report = caught.value.report
    assert {f.severity for f in report.findings} == {"E", "I"}
    assert [f.code for f in report.failures("I")] == [f.code for f in report.findings]
    assert [f.code for f in report.failures("E")] == ["NRM103"]
    assert all(f.code in str(caught.value) for f in report.findings)


def test_a_healthy_model_gives_its_report():
    assert ns.assert_healthy(model(), loader(), loss=loss, fail_on="W").passed("W")


def test_a_wrong_level_is_refused():
    with pytest.raises(ArgumentError, match="fail_on 'X' is no severity"):
        ns.assert_healthy(model(), loader(), fail_on="X")


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="treshold"):
        ns.assert_healthy(model(), loader(), treshold=1)


def test_what_a_baseline_knows_is_allowed(tmp_path):
    report = ns.check(model(1.0), loader(), loss=loss)
    report.to_json(tmp_path / "known.json")
    for baseline in (report.record, tmp_path / "known.json", str(tmp_path / "known.json")):
        assert not ns.assert_healthy(model(1.0), loader(), loss=loss, baseline=baseline).passed()
    with pytest.raises(DataError, match="is no JSON of a check"):
        ns.assert_healthy(model(), loader(), baseline=tmp_path / "absent.json")


SETTINGS = '[tool.normscope]\nignore = ["NRM103"]\n'


def test_the_next_pyproject_upwards_holds(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text(SETTINGS)
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path / "tests")
    report = ns.assert_healthy(model(1.0), loader(), loss=loss)
    assert "NRM103" not in [v.code for v in report.verdicts]
    with pytest.raises(ns.UnhealthyError, match="NRM401"):  # an ignore of the call adds to it
        ns.assert_healthy(model(1.0), loader(), loss=loss, ignore="NRM407", fail_on="I")


def test_a_named_file_holds_instead(tmp_path):
    (tmp_path / "other.toml").write_text(SETTINGS)
    with pytest.raises(ns.UnhealthyError, match="NRM103"):
        ns.assert_healthy(model(1.0), loader(), loss=loss)
    ns.assert_healthy(model(1.0), loader(), loss=loss, config=tmp_path / "other.toml")


def test_settings_and_options_go_together():
    thresholds = ns.Thresholds(cost_error=2.0)
    project = Configuration(
        select=("NRM1",), ignore=("NRM101",), intent=("supernet",), module_ignores={"a.*": ("NRM103",)},
        thresholds=thresholds,
    )  # fmt: skip
    made = project.joined(
        {"ignore": "NRM2", "intent": ["split-bn"], "module_ignores": {"a.*": "NRM104", "b": ["NRM1"]}}
    )
    assert made["ignore"] == ("NRM101", "NRM2")
    assert made["intent"] == ("supernet", "split-bn")
    assert made["module_ignores"] == {"a.*": ("NRM103", "NRM104"), "b": ("NRM1",)}
    assert made["select"] == ("NRM1",)
    assert made["thresholds"] is thresholds
    mine = ns.Thresholds()
    other = project.joined({"select": "NRM2", "thresholds": mine, "budget": 5})
    assert other["select"] == "NRM2"
    assert other["thresholds"] is mine
    assert other["budget"] == 5
    assert Configuration().joined({})["select"] is None
