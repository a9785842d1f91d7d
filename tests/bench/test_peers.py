from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from persimmon.bench import peers
from persimmon.bench.peers import CommandPeer, ScriptPeer, fill_in, peer_of, read_result
from persimmon.errors import InputError, UnavailableError

LLAMA_BENCH = json.dumps(
    [
        {
            "build_commit": "0c1e570",
            "n_threads": 2,
            "n_prompt": 0,
            "n_gen": 32,
            "avg_ts": 3.4,
            "samples_ts": [3.3, 3.5, 3.5],
        }
    ]
)

COUNTING_SCRIPT = """
import json, os, sys
settings = json.loads(sys.argv[1])
print(json.dumps({"ready": {"versions": {"fake": "1"}}}), flush=True)
for number, _ in enumerate(sys.stdin):
    if settings.get("fail") == number:
        sys.exit("out of luck")
    print(json.dumps({"tokens_per_second": settings["rate"] + number, "pid": os.getpid()}), flush=True)
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "counting.py").write_text(COUNTING_SCRIPT)
    monkeypatch.setattr(peers, "_PEERS", tmp_path)
    return "counting.py"


def python(program: str) -> str:
    return f"{shlex.quote(sys.executable)} -c {shlex.quote(program)}"


def test_a_script_stays_and_answers_run_by_run(script: str) -> None:
    peer = ScriptPeer(script, {"rate": 5.0, "dtype": "float32", "directory": "somewhere"})
    assert [peer.run(), peer.run()] == [5.0, 6.0]
    first = peer.facts["pid"]
    assert peer.facts == {
        "script": script, "dtype": "float32", "weights": "the same", "versions": {"fake": "1"}, "pid": first,
    }  # fmt: skip
    peer.close()


def test_a_script_can_be_started_anew_for_every_run(script: str) -> None:
    peer = ScriptPeer(script, {"rate": 5.0}, restart=True)
    assert peer.run() == 5.0
    first = peer.facts["pid"]
    assert peer.run() == 5.0 and peer.facts["pid"] != first
    peer.close()


def test_a_script_that_ends_says_why(script: str) -> None:
    peer = ScriptPeer(script, {"rate": 5.0, "fail": 1})
    peer.run()
    with pytest.raises(UnavailableError, match="out of luck"):
        peer.run()
    peer.close()


def test_peers_need_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_PEERS", tmp_path)
    with pytest.raises(UnavailableError, match="checkout of the repository"):
        peer_of("transformers", "transformers_decode.py", {})


def test_llama_bench_is_read() -> None:
    rate, facts = read_result("llama-bench", LLAMA_BENCH)
    assert rate == 3.5
    assert facts == {"build_commit": "0c1e570", "n_threads": 2, "n_prompt": 0, "n_gen": 32}


def test_a_last_line_of_json_is_read() -> None:
    rate, facts = read_result(
        "ours", 'ceiling: 28 GB/s\n{"tokens_per_second": 6.5, "model": "8b-p44", "bench": "decode"}\n'
    )
    assert (rate, facts) == (6.5, {"model": "8b-p44"})


@pytest.mark.parametrize("output", ["", "hello", "[]", "{}", json.dumps([json.loads(LLAMA_BENCH)[0]] * 2)])
def test_anything_else_is_refused(output: str) -> None:
    with pytest.raises(UnavailableError, match="printed neither"):
        read_result("peer", output)


def test_commands_get_their_settings() -> None:
    settings = {"tokens": 32, "threads": 2, "config": {"a": 1}}
    assert fill_in("bench -n {tokens} -t {threads} 'a b'", settings) == ["bench", "-n", "32", "-t", "2", "a b"]
    with pytest.raises(InputError, match="--against needs"):
        fill_in("", settings)


def test_a_command_runs_anew_for_every_measurement(tmp_path: Path) -> None:
    program = "import sys; print('{\"tokens_per_second\": ' + sys.argv[1] + '}')"
    peer = CommandPeer(python(program) + " {tokens} /some/where/model.gguf", {"tokens": 7})
    assert peer.run() == 7.0 and peer.name == Path(sys.executable).name
    assert peer.facts["command"].endswith("7 model.gguf") and "/some" not in peer.facts["command"]
    assert peer.facts["peak_rss_bytes"] > 1_000_000


def test_commands_that_fail_say_why() -> None:
    with pytest.raises(UnavailableError, match="cannot be started"):
        CommandPeer("no-such-program-here", {}).run()
    with pytest.raises(UnavailableError, match=r"failed \(3\): sorry"):
        CommandPeer(python("import sys; print('sorry', file=sys.stderr); sys.exit(3)"), {}).run()


def test_modules_are_named_by_their_package() -> None:
    assert CommandPeer("/usr/bin/python3 -m persimmon.cli.main bench decode", {}).name == "persimmon"
    assert CommandPeer("/opt/llama-bench -m /models/a.gguf", {}).name == "llama-bench"
