"""The report's page as a document: whole, self-contained, with words and numbers for every plot. No browser needed."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import io
import re
import xml.etree.ElementTree as ET
from urllib.parse import unquote

import pytest
import report_records as made

from copra_llm.errors import InputError
from copra_llm.estimates import Estimate, exact
from copra_llm.report import write_report
from copra_llm.report.markup import el, slug
from copra_llm.report.records import Found, find_records
from copra_llm.report.sections.overview import KINDS, overview_section
from copra_llm.report.tables import csv_text, html_table, markdown, table
from copra_llm.report.write import SECTIONS, report_page
from copra_llm.results import Result, write_result

EVERYTHING = made.everything()
HOSTILE = "</style></script><script>alert(1)</script>\"'&<img src=x onerror=alert(1)>\u202e\x00\ud800|\n=1+1"


def page_of(records) -> str:
    return report_page(Found(list(records), 0))


def parsed(text: str) -> ET.Element:
    """The document as a tree: it is well-formed, so every tag is closed and every name escaped."""
    without = re.sub(r"<(style|script)>.*?</\1>", "", text, flags=re.S)
    return ET.fromstring(without.removeprefix("<!doctype html>\n"))


@pytest.fixture(scope="module")
def text():
    return page_of(EVERYTHING)


@pytest.fixture(scope="module")
def page(text):
    return parsed(text)


# --- the document -----------------------------------------------------------------------------------------


def test_nothing_is_loaded_from_anywhere(text, page):
    """Every address is a place in the page or data inside it, and the page's policy allows no other."""
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"data:text/csv[^\"]*", "", text))
    addresses = [v for node in page.iter() for k, v in node.attrib.items() if k in ("src", "href", "srcset", "data")]
    assert addresses and all(a.startswith(("#", "data:text/csv")) for a in addresses)
    policy = page.find(".//meta[@http-equiv]").get("content")
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy


def test_the_policy_names_the_pages_own_style_and_script(text, page):
    policy = page.find(".//meta[@http-equiv]").get("content")
    for name in ("style", "script"):
        (own,) = re.findall(f"<{name}>(.*?)</{name}>", text, flags=re.S)
        assert f"{name}-src 'sha256-{base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()}'" in policy
    assert not [node for node in page.iter() for k in node.attrib if k == "style" or k.startswith("on")]


def test_ids_are_unique_and_what_is_referred_to_is_there(page):
    ids = [node.get("id") for node in page.iter() if node.get("id")]
    assert len(ids) == len(set(ids))
    for node in page.iter():
        for name in ("aria-labelledby", "aria-describedby", "aria-details"):
            assert set(node.get(name, "").split()) <= set(ids), (node.tag, name)
        if node.get("href", "").startswith("#"):
            assert node.get("href")[1:] in ids


def test_every_plot_has_its_words(page):
    """Its label says more than its title: it has numbers in it. What is no plot is hidden from a screen reader."""
    plots = [node for node in page.iter("svg") if node.get("aria-hidden") != "true"]
    assert len(plots) > 30
    for plot in plots:
        assert plot.get("role") == "img" and plot.get("viewBox")
        words = plot.get("aria-label").split(": ", 1)[1]
        assert len(re.findall(r"\d", words)) >= 2, words
    assert all(node.get("class", "").startswith("c") for node in page.iter("svg") if node not in plots)


def test_every_figure_has_a_heading_its_words_and_a_table_with_csv(page):
    figures = list(page.iter("figure"))
    assert len(figures) > 15
    for figure in figures:
        assert figure.find("figcaption/h3").text
        details = figure.find("details")
        assert details.find("summary").text in ("In words", "In words and numbers")
        assert len(details.findall("p")) == len(figure.findall(".//svg[@role]"))
        assert figure.find(".//table") is not None and figure.find(".//a[@download]") is not None


def test_tables_have_captions_scopes_and_a_region_for_the_keyboard(page):
    tables = list(page.iter("table"))
    assert len(tables) > 20
    for t in tables:
        assert "".join(t.find("caption").itertext())
        assert all(th.get("scope") == "col" for th in t.findall("thead/tr/th"))
        for row in t.findall("tbody/tr"):
            assert row[0].tag == "th" and {cell.get("scope") for cell in row if cell.tag == "th"} == {"row"}
            assert len(row) == len(t.findall("thead/tr/th"))
    regions = [node for node in page.iter("div") if node.get("class") == "scroll"]
    assert all(r.get("tabindex") == "0" and r.get("role") == "group" and r.get("aria-labelledby") for r in regions)
    assert len(regions) == len(tables)


def test_landmarks_headings_and_language(page):
    assert page.get("lang") == "en" and len(list(page.iter("h1"))) == len(list(page.iter("main"))) == 1
    levels = [int(node.tag[1]) for node in page.iter() if re.fullmatch("h[1-6]", node.tag)]
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    first = next(node for node in page.iter("a"))
    assert first.get("class") == "skip" and first.get("href") == "#results"
    links = [a.get("href")[1:] for a in page.find(".//nav").iter("a")]
    assert links == [section.get("id") for section in page.iter("section")]


def test_no_number_is_shown_that_is_none(page):
    """A word of Python's never reaches a reader."""
    shown = " ".join("".join(node.itertext()) for node in page.iter("body"))
    assert not re.search(r"\b(None|nan|NaN|inf|Estimate|Infinity)\b", shown)


# --- numbers ----------------------------------------------------------------------------------------------


def test_csv_holds_what_the_table_shows(page):
    """Every cell of every table on the page is the CSV's value, rounded; so are both ends of its interval."""
    compared = 0
    for block in (node for node in page.iter("div") if node.get("class") == "table"):
        link = block.find(".//a[@download]")
        head, *lines = csv.reader(io.StringIO(unquote(link.get("href").split(",", 1)[1])))
        headings = ["".join(th.itertext()) for th in block.findall(".//thead/tr/th")]
        rows = block.findall(".//tbody/tr")
        assert link.text == f"CSV, {len(lines)} row{'s' if len(lines) != 1 else ''}"
        assert len(rows) == len(lines)
        for row, line in zip(rows, lines, strict=True):
            held = dict(zip(head, line, strict=True))
            for name, cell in zip(headings, row, strict=True):
                shown = "".join(cell.itertext())
                parts = re.fullmatch(r"(\S+) \[(\S+), (\S+)\]", shown)
                if parts:
                    assert all(map(agree, parts.groups(), (held[name], held[f"{name}, low"], held[f"{name}, high"])))
                else:
                    assert agree(shown, held[name]), (name, shown, held[name])
                compared += 1
    assert compared > 5000


def agree(shown: str, held: str) -> bool:
    """The same text, or the same number as far as its digits are shown."""
    shown = shown.replace(",", "") if re.fullmatch(r"[\d,]+", shown) else shown
    if shown in (held, "–") or held == f"'{shown}":
        return shown != "–" or held in ("", "–")
    digits = re.fullmatch(r"-?\d+(?:\.(\d+))?(?:e([+-]\d+))?", shown)
    return abs(float(shown) - float(held)) <= 0.5000001 * 10.0 ** (int(digits[2] or 0) - len(digits[1] or ""))


def test_csv_keeps_every_digit_and_both_ends():
    rows = [("a", Estimate(1 / 3, -0.1, 2 / 3), 3), ("b", None, 1), ("c", exact(2.0), 2)]
    t = table("T", [("name",), ("value", ".1f"), ("n", "d")], rows)
    head, *rows = csv.reader(io.StringIO(csv_text(t)))
    assert head == ["name", "value", "value, low", "value, high", "n"]
    assert rows == [["a", repr(1 / 3), "-0.1", repr(2 / 3), "3"], ["b", "", "", "", "1"], ["c", "2.0", "", "", "2"]]
    assert [[c.split(" [")[0] for c in line.strip("| \n").split(" | ")] for line in markdown(t).splitlines()[2:]] == [
        ["a", "0.3", "3"], ["b", "–", "1"], ["c", "2.0", "2"]]  # fmt: skip


def test_a_spreadsheet_finds_no_formula():
    """A text that begins like one is quoted; a negative number stays a number."""
    t = table("T", [("name",), ("value", ".1f")], [("=HYPERLINK(1)", -1.5), ("+1", 2.0), ("@x", 3.0), ("-", 4.0)])
    _, *rows = csv.reader(io.StringIO(csv_text(t)))
    assert rows == [["'=HYPERLINK(1)", "-1.5"], ["'+1", "2.0"], ["'@x", "3.0"], ["'-", "4.0"]]


def test_a_long_table_says_what_it_leaves_out():
    t = table("T", [("name",), ("value", ".1f")], [(f"row {i}", float(i)) for i in range(5000)])
    tree = ET.fromstring(html_table(t, "t"))
    assert len(tree.findall(".//tbody/tr")) == 2000
    assert "The first 2000 of 5000 rows; the CSV has all." in "".join(tree.itertext())
    assert unquote(tree.find(".//a").get("href")).count("\n") == 5001


def test_columns_without_values_are_left_out():
    t = table("T", [("name",), ("empty", ".1f"), ("none",), ("value", "d")], [("a", None, "", 1), ("b", None, None, 2)])
    assert [c.name for c in t.columns] == ["name", "value"]


# --- what is in the page ----------------------------------------------------------------------------------


def test_every_known_protocol_has_a_section_and_an_unknown_one_is_named(page):
    titles = [h.text for h in page.iter("h2")][1:]
    assert len(titles) == len(SECTIONS) + 1 and titles[0] == "What was run"
    body = "".join(page.find(".//main").itertext())
    for what in [*KINDS.values(), "brand_new_protocol (1)", "test/sst2/novelty"]:
        assert what in body, what


@pytest.mark.parametrize("protocol", sorted(KINDS))
def test_a_section_appears_only_when_its_records_are_there(protocol):
    """One protocol alone makes a page, and no other section."""
    records = [r for r in EVERYTHING if r.protocol == protocol]
    titles = [h.text for h in parsed(page_of(records)).iter("h2")]
    assert titles[:2] == ["Contents", "What was run"] and "Other records" not in titles
    extra = ["Learning rate and steps", "Schedules"] if protocol in ("train", "interpolation") else []
    assert len(titles) == 3 + len(extra) and set(extra) <= set(titles)


def test_one_record_of_each_protocol_makes_a_page():
    """No seeds to average over, no partner to compare with: no interval is invented, and nothing breaks."""
    records = {r.protocol: r for r in EVERYTHING}
    page = parsed(page_of(records.values()))
    (single,) = [t for t in page.iter("table") if t.find("caption").text == "Single runs"]
    assert "[" not in "".join(single.find("tbody").itertext())


def test_copies_of_a_record_count_once(tmp_path):
    """The same files named twice, and the same record in two files: no seed more."""
    records = made.runs(("lora",), ("sst2",))
    for i, record in enumerate(records):
        write_result(tmp_path / "first" / f"{i}.json", record)
        write_result(tmp_path / "again" / f"{i}.json", record)
    found = find_records([tmp_path / "first", tmp_path / "first" / "0.json", tmp_path / "again"])
    assert (found.results, found.copies) == (records, 3)
    assert "3 files held a copy of another record and are left out." in report_page(found)


def test_one_base_model_has_one_name(tmp_path):
    """As the command line and a protocol name it: told apart by the hash of its weights, not by its name."""
    records = made.runs(("lora",), ("sst2",))
    for i, record in enumerate(records):
        name = "minilm" if i else "sentence-transformers/all-MiniLM-L6-v2"
        write_result(
            tmp_path / f"{i}.json", dataclasses.replace(record, config=record.config | {"model_name_or_path": name})
        )
    found = find_records([tmp_path])
    assert {r.config["model_name_or_path"] for r in found.results} == {"minilm"}
    told = overview_section(found).text
    assert "minilm is also called sentence-transformers/all-MiniLM-L6-v2 in some records" in told
    other = dataclasses.replace(records[0], environment={"base_fingerprint": "another"})
    write_result(
        tmp_path / "3.json", dataclasses.replace(other, config=other.config | {"model_name_or_path": "its own"})
    )
    assert {r.config["model_name_or_path"] for r in find_records([tmp_path]).results} == {"minilm", "its own"}


def test_the_reader_is_told_what_must_be_known():
    records = made.lines(("lora",), ("sst2",), init_seed=7) + made.runs(("lora",), ("sst2",))
    assert "In 3 of them the seed of the initialisation is pinned" in overview_section(Found(records, 0)).text
    assert "Adapters that are merged differ" in overview_section(Found(made.lines(), 0)).text
    other = Result("train", records[0].config, {}, environment={"base_fingerprint": "another"})
    told = overview_section(Found([*records, other], 0)).text
    assert "The weights of minilm are not the same in all records: 2 fingerprints." in told


# --- bad input --------------------------------------------------------------------------------------------


def test_hostile_names_stay_text():
    """Every name of every record is markup, script, a formula, a control character: the page is whole, and shows it."""
    text = page_of(made.hostile(HOSTILE))
    page = parsed(text)
    assert len(re.findall("<script", text)) == len(re.findall("</script", text)) == 1
    assert not [node for node in page.iter() if node.tag in ("img", "b", "iframe")]
    assert "</style></script><script>alert(1)</script>" in "".join(page.find(".//main").itertext())
    for link in page.iter("a"):
        if link.get("download"):
            assert re.fullmatch(r"[a-z0-9-]+\.csv", link.get("download"))
            for line in csv.reader(io.StringIO(unquote(link.get("href").split(",", 1)[1]), newline="")):
                assert not [cell for cell in line if cell.startswith(("=", "@"))]


def test_an_element_escapes_its_text_and_attributes():
    assert el("p", "<b>", el("i", "&"), title='"x"', class_="a", hidden=True, open=False, x=1.0, y=0.125) == (
        '<p title="&quot;x&quot;" class="a" hidden="" x="1" y="0.12">&lt;b&gt;<i>&amp;</i></p>'
    )
    assert slug("a/../b", "Ü", 3) == "a-b-3" and slug("***") == "x"


@pytest.mark.parametrize(
    "protocol, change, said",
    [
        ("pruning", {"data": {}}, "a record of protocol pruning lacks data.rows"),
        ("shapley", {"data": {"players": ["a"], "values": [1.0, 2.0]}}, "data.players has 1 entries, data.values 2"),
        ("interpolation", {"config": {"task": "sst2"}}, "lacks config.method"),
    ],
)
def test_a_record_that_is_not_whole_is_named(protocol, change, said, tmp_path):
    (record, *_) = [r for r in EVERYTHING if r.protocol == protocol]
    fields = {"config": record.config, "metrics": {}, "data": record.data} | change
    write_result(tmp_path / "bad.json", Result(protocol, **fields))
    with pytest.raises(InputError, match="bad.json: ") as error:
        write_report([tmp_path], tmp_path / "report.html")
    assert said in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_values_that_are_not_finite_leave_gaps():
    """A run that diverged is shown as such; its plots are drawn without it."""
    records = made.lines(("lora", "copra"), ("sst2",)) + made.prunings(("lora",)) + made.runs(("lora",), ("sst2",))
    for r in records:
        if r.protocol == "interpolation" and r.config["method"] == "lora":
            r.data["loss"][5] = None
            r.metrics["test/sst2/loss@0.5"] = float("nan")
        if r.protocol == "train":
            r.metrics["test/sst2/loss"] = float("nan")
        if r.protocol == "pruning":
            r.data["rows"][3]["loss"] = None
    text = page_of(records)
    assert not re.search(r'(?:d|x|y|width)="[^"]*nan', text)
    assert "with points that were not finite" in text and ">nan<" in text
