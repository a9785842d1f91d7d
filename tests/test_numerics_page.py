"""docs/numerics.md cites tests; every one of them must exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_cited_test_exists() -> None:
    page = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    cited = set(re.findall(r"`(test_\w+)`", page))
    assert len(cited) > 20
    assert sorted(name for name in cited if f"def {name}(" not in sources) == []
    paths = re.findall(r"`(tests/[\w/.]+)`", page)
    assert [path for path in paths if not (ROOT / path).exists()] == []
