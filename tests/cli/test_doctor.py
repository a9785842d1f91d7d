from __future__ import annotations

import dataclasses
import json

import pytest

from persimmon import engines, machine
from persimmon.cli import doctor
from persimmon.cli.main import main


@pytest.fixture(autouse=True)
def small_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_BANDWIDTH_BYTES", 8 << 20)


def test_the_report_says_what_will_run_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    page = capsys.readouterr().out
    lines = {line[:13].strip(): line[13:] for line in page.splitlines()}
    assert max(map(len, page.splitlines())) <= 100 and "8b float32 " in page
    assert "on cpu, " in lines["will run"] and "asked for" in lines["because"]
    assert "GB/s" in lines["reads"] and "threads" in lines["processor"]


def test_json_has_the_same_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert set(findings) == {"versions", "cpu", "memory", "gpus", "models", "engine"}
    assert findings["memory"]["read_bandwidth_gb_s"] > 0
    assert findings["cpu"]["threads"] == machine.cpu_threads() >= 1
    assert findings["engine"]["name"] in findings["engine"]["installed"]
    total, available = findings["memory"]["total"], findings["memory"]["available"]
    assert total is None or 0 < available <= total


def test_an_engine_that_was_not_built_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unbuilt = dataclasses.replace(engines.ENGINES["cpu"], why_unavailable=lambda: "not built; install it again")
    monkeypatch.setitem(engines.ENGINES, "cpu", unbuilt)
    assert main(["doctor", "--device", "cpu"]) == 0
    page = capsys.readouterr().out
    assert "reference on cpu" in page and "not built; install it again" in page
    assert main(["doctor", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engine"]["missing"]["cpu"] == "not built; install it again"


def test_a_device_that_is_not_there_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cuda:99"]) == 1
    assert "not available" in capsys.readouterr().err


def test_unknown_facts_are_none_and_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_key_values", lambda file: iter(()))
    monkeypatch.setattr(machine, "_cgroup", lambda *names: None)
    monkeypatch.setattr(machine, "_output", lambda *command: "")
    assert machine.memory_total() is None and machine.memory_available() is None
    assert machine.cpu_features() == (["neon"] if machine.platform.machine() == "arm64" else [])


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"MemTotal": 16 << 30, "MemAvailable": 12 << 30}
    monkeypatch.setattr(machine, "_meminfo", facts.get)
    monkeypatch.setattr(machine, "_cgroup", lambda *names: (4 << 30) if "max" in names[0] else (1 << 30))
    assert (machine.memory_total(), machine.memory_available()) == (4 << 30, 3 << 30)
