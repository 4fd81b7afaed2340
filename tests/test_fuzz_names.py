"""Names from outside, of files, tasks and revisions: none of them is written outside its folder."""

from __future__ import annotations

from pathlib import Path

from examples import peft_adapter
from fuzzing import ODD_TEXTS, copra, drawn, efforts, refused, tree
from hypothesis import example, given
from hypothesis import strategies as st

from copra_llm.adapter_files import PUBLIC
from copra_llm.config import RunConfig
from copra_llm.hub import parse_id
from copra_llm.paths import is_below
from copra_llm.train import run_folder

names = st.one_of(st.sampled_from(ODD_TEXTS), st.text("./~\\a\x00@ ", max_size=10), st.text(max_size=8))


@efforts(300)
def test_names_below_a_folder(examples, tmp_path):
    """What `is_below` lets through is where it says, however the system reads it."""

    @drawn(examples)
    @given(name=names)
    @example(name="a/../../b")
    def check(name):
        if is_below(name):
            assert (tmp_path / name).resolve().is_relative_to(tmp_path.resolve())

    check()


@efforts(300)
def test_any_task_name(examples, tmp_path):
    """A task of one's own names a folder of the run's output: right below it, and no other."""

    @drawn(examples)
    @given(tasks=st.lists(names, min_size=1, max_size=2))
    @example(tasks=["../../outside"])
    @example(tasks=["/etc"])
    @example(tasks=[".."])
    def check(tasks):
        def place() -> None:
            config = RunConfig().replace(tasks=tasks, output_dir=str(tmp_path))
            assert run_folder(config, tasks).resolve().parent == tmp_path.resolve()

        refused(place)

    check()


@efforts(300)
def test_any_hub_id(examples):
    """Whatever follows the @ is one of git's names: the Hub's cache keeps a file under it."""

    @drawn(examples)
    @given(name=names, revision=names)
    @example(name="owner/name", revision="../../../outside")
    @example(name="owner/name", revision="/etc/passwd")
    def check(name, revision):
        for text in (name, f"{name}@{revision}", f"owner/name@{revision}"):
            found = parse_id(text)
            if found is not None:
                assert is_below(found.repo) and found.repo.count("/") == 1
                assert found.revision is None or is_below(found.revision)

    check()


def test_what_a_repository_calls_its_files_stays_there(model_hub, tmp_path):
    """Of names that lead elsewhere none is fetched; the copy holds an adapter's own files, and nothing beside it."""
    peft_adapter(tmp_path / "adapter")
    own = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir() if path.is_file()}
    strange = dict.fromkeys(("../outside", "../../outside", "/outside", "sub/../../outside", "..\\outside", "run.py",
                             "sub/adapter_config.json", "adapter_model.bin", "archive.zip"), b"evil")  # fmt: skip
    model_hub.add("owner/name", own | strange)
    output, before = tmp_path / "pulls" / "copy", set(tree(tmp_path))
    works = copra(["pull", "owner/name", "--output", str(output)], output)
    written = {Path(name) for name in set(tree(tmp_path)) - before}
    assert all(path.parts[0] in ("pulls", "hub-cache") for path in written)
    if works:
        assert {path.name for path in output.iterdir()} <= set(PUBLIC)
    assert b"evil" not in tree(tmp_path).values()


def test_a_revision_that_goes_upwards_is_refused(model_hub, tmp_path):
    for argv in (["owner/name@../../outside"], ["owner/name", "--revision", "../../outside"]):
        assert not copra(["pull", *argv, "--output", str(tmp_path / "copy")], tmp_path / "copy")
    assert not model_hub.seen
