"""Does what the project says of itself hold: the README's tables, its tree, its links?"""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_tables_are_what_the_records_say():
    """`eval/readme.py --check` makes every table anew from the committed records."""
    done = subprocess.run(
        [sys.executable, ROOT / "eval" / "readme.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"run `make tables`\n{done.stderr}"


def test_a_changed_record_would_show(tmp_path):
    """The check can fail: a figure changed in the README is found."""
    sys.path.insert(0, str(ROOT / "eval"))
    import readme

    first = re.search(r"\| LoRA \|[^|]*\| (\d+\.\d)", README)
    changed = README[: first.start(1)] + "12.3" + README[first.end(1) :]
    assert readme.filled(README) == README
    assert readme.filled(changed) != changed


def test_settings_that_were_not_tuned_are_in_another_table():
    """Lines of three points are eval/mtl15's: they change its table, and no figure of eval/interpolation's."""
    sys.path.insert(0, str(ROOT / "eval"))
    import readme

    records = readme.records_of("interpolation")
    whole = next(r for r in records if r.protocol == "interpolation" and len(r.data["alpha"]) > 3)
    data = {key: whole.data[key][:: len(whole.data["alpha"]) // 2] for key in ("alpha", "accuracy", "loss", "correct")}
    config = whole.config | {"task": "yahoo", "learning_rate": 0.004, "max_steps": 300, "seeds": [7, 8]}
    metrics = {name.replace(whole.config["task"], "yahoo"): value for name, value in whole.metrics.items()}
    more = [*records, dataclasses.replace(whole, config=config, metrics=metrics, data=data)]
    assert readme.tuned_table(more) == readme.tuned_table(records)
    assert readme.planned_suite(more) != readme.planned_suite(records)


def test_the_tree_names_every_module():
    """A module added to the package must get its line."""
    tree = README.split("## Where things are")[1].split("\n## ")[0]
    for module in sorted((ROOT / "copra_llm").rglob("*.py")):
        if module.name != "__init__.py":
            assert module.name in tree, f"README.md's tree lacks {module.relative_to(ROOT)}"


PAGES = [ROOT / "README.md", *sorted(p for d in ("docs", "eval", "data") for p in (ROOT / d).rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    """Of the README and of the pages that it leads to; a part of a page is one of its headings."""
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target, part in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", prose):
        place = (page.parent / target) if target else page
        assert place.exists(), target
        if part:
            headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), flags=re.M)
            assert part in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], part
