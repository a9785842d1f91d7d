"""Comparison tables, figure and verbs on made-up runs, and the published numbers' bookkeeping."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from evals.oracles import ScriptedModel, guesses, knows
from persimmon.cli import compare as compare_verb
from persimmon.cli import eval as eval_verb
from persimmon.cli.main import Parser
from persimmon.errors import InputError, NotFoundError
from persimmon.evals import compare, figure, published, report, results
from persimmon.evals.data import read_records
from persimmon.evals.runner import Settings, prepare, run_task
from persimmon.evals.tasks import TASKS


def make_run(data: Path, directory: Path, model_of: object, label: str) -> compare.Run:
    done = []
    for name in ("arc_easy", "mmlu", "winogrande"):
        task = TASKS[name]
        assert task.source is not None
        examples = read_records(task.examples, data) if task.examples else []
        for style in task.styles:
            items = prepare(task, style, read_records(task.source, data), examples, Settings())
            model: ScriptedModel = knows(items, style) if model_of == "knows" else guesses()
            done.append(run_task(task, style, items, model, Settings()))
    results.write(directory, done, results.document(done, {"model": label}, {"limit": None}))
    return compare.load(directory)


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[compare.Run]:
    directory = tmp_path_factory.mktemp("runs")
    return [make_run(data, directory / name, name, name) for name in ("guesses", "knows")]


def test_scores_and_differences(runs: list[compare.Run]) -> None:
    score = runs[1].find("mmlu", "adept")
    assert score is not None
    assert (score.value, score.shots, score.num_questions, score.unparsed, score.chance) == (100.0, 1, 60, 0, 25.0)
    difference = compare.against_run(runs[1], runs[0], "mmlu", "adept")
    assert difference is not None and difference.num_questions == 60
    assert 50 < difference.low < difference.value < difference.high <= 100 and difference.p_value < 0.01
    gap = compare.against_published(score, "persimmon-8b-chat")
    assert gap is not None and gap[0] == pytest.approx(58.8)
    loglikelihood = runs[1].find("mmlu", "loglikelihood")
    assert loglikelihood is not None and compare.against_published(loglikelihood, "persimmon-8b-chat") is None


def test_tables(runs: list[compare.Run]) -> None:
    text = report.comparison(runs)
    for expected in ("Llama 2 7B (1-shot)", "41.2 ✓", "36.5 ?", "9.2 ??", "minus guesses", published.RELEASE, "45.2"):
        assert expected in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    for line in lines:
        assert line.endswith("|")
    one = report.run_table(runs[0])
    assert len({len(line) for line in one.splitlines()}) == 1
    assert "at chance" in one
    assert "# Evaluation of guesses" in report.run_report(runs[0])


def test_figure(runs: list[compare.Run], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = [tmp_path / "f.png", tmp_path / "f.svg"]
    figure.draw(runs, paths)
    assert paths[0].read_bytes().startswith(b"\x89PNG") and paths[0].stat().st_size > 20_000
    text = paths[1].read_text()
    ElementTree.fromstring(text)
    for label in ("knows", "guesses", "chance", "MMLU", "Persimmon-8B FT, 1-shot (published)"):
        assert label in text
    figure.draw(runs, [tmp_path / "again.svg"])
    assert (tmp_path / "again.svg").read_text() == text


def test_compare_verb(runs: list[compare.Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    parser = Parser()
    compare_verb.add_arguments(parser)
    given = [f"first={runs[0].path}", str(runs[1].path.parent)]
    assert compare_verb.run(parser.parse_args([*given, "--out", str(tmp_path), "--json", "--quiet"])) == 0
    document = json.loads(capsys.readouterr().out)
    assert [run["label"] for run in document["runs"]] == ["first", "knows"]
    assert len(document["published"]) == 25
    assert {"value", "low", "high", "against"} <= document["differences"][0].keys()
    names = ["comparison.json", "comparison.md", "comparison.png", "comparison.svg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert compare_verb.run(parser.parse_args([])) == 0
    assert "51.4 ?" in capsys.readouterr().out
    with pytest.raises(InputError, match="same name"):
        compare_verb.run(parser.parse_args([str(runs[0].path)] * 2))
    with pytest.raises(NotFoundError, match="nowhere"):
        compare_verb.run(parser.parse_args(["nowhere"]))


def test_a_file_of_lm_eval_is_read(tmp_path: Path) -> None:
    content = {
        "results": {
            "arc_easy": {"acc,none": 0.5, "acc_stderr,none": 0.01, "alias": "arc_easy"},
            "piqa": {"acc,none": 1},
        },
        "n-shot": {"arc_easy": 0},
        "n-samples": {"arc_easy": {"original": 2376, "effective": 2376}},
        "model_name": "adept/persimmon-8b-base",
    }
    (tmp_path / "results_2026.json").write_text(json.dumps(content))
    run = compare.load(tmp_path)
    assert run.label == "persimmon-8b-base"
    (score,) = run.scores
    assert (score.task, score.style, score.value, score.stderr, score.num_questions) == (
        "arc_easy", "loglikelihood", 50.0, 1.0, 2376,
    )  # fmt: skip


def test_published_numbers_carry_their_standing() -> None:
    assert len({(p.task, p.model, p.style) for p in published.PUBLISHED}) == len(published.PUBLISHED)
    for number in published.PUBLISHED:
        assert number.source.startswith("https://") and 0 < number.percent < 100 and number.task in TASKS
    verified = {(p.task, p.percent) for p in published.PUBLISHED if p.verified}
    assert verified == {("mmlu", 41.2), ("mmlu", 45.2)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "x"], "NAME:KEY=VALUE"),
        (["--variant", "a b:dtype=bfloat16"], "NAME:KEY=VALUE"),
        (["--limit", "0"], "limit"),
        (["--tasks", "mlu"], "'mlu'"),
        (["--instructions", "nowhere.json"], "nowhere"),
        (["--url", "http://127.0.0.1:1/v1", "--variant", "a:dtype=bfloat16"], "--url"),
    ],
)
def test_bad_arguments_of_eval(arguments: list[str], message: str) -> None:
    parser = Parser()
    eval_verb.add_arguments(parser)
    with pytest.raises((InputError, NotFoundError), match=message):
        eval_verb.run(parser.parse_args(arguments))


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from persimmon.cli import eval, compare; from persimmon.cli.main import Parser\n"
        "eval.add_arguments(Parser()); compare.add_arguments(Parser())\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
