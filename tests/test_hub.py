"""To the Hub and back, through huggingface_hub itself, on a hub of this machine's own; and what a refusal says."""

from __future__ import annotations

import pytest
from examples import deltas_loaded_by_peft, peft_adapter, save_run
from huggingface_hub import constants

from copra_llm import hub
from copra_llm.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from copra_llm.adapters import adapter_folder, load_adapter_weights
from copra_llm.cli import main
from copra_llm.config import RunConfig, dump_yaml
from copra_llm.errors import InputError
from copra_llm.hub import HubId, parse_id
from copra_llm.saved_runs import read_run

REPO = "someone/adapter"


@pytest.fixture
def files(tmp_path) -> dict[str, bytes]:
    """An adapter's files, as PEFT writes them."""
    peft_adapter(tmp_path / "saved")
    return {name: (tmp_path / "saved" / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}


@pytest.fixture
def folder(tmp_path, files):
    """The same in a folder."""
    (tmp_path / "ready").mkdir()
    for name, content in files.items():
        (tmp_path / "ready" / name).write_bytes(content)
    return tmp_path / "ready"


# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, meant",
    [
        ("a/b", HubId("a/b")),
        ("a/b.c-d_e@v1.0", HubId("a/b.c-d_e", "v1.0")),
        ("a/b@refs/pr/1", HubId("a/b", "refs/pr/1")),
        ("a/b/c", None),
        ("a", None),
        ("./a", None),
        ("../a", None),
        ("/a/b", None),
        ("a/..", None),
        ("a/b@", None),
    ],
)
def test_which_texts_are_hub_ids(text, meant):
    assert parse_id(text) == meant


def test_a_folder_that_is_there_wins(model_hub, files, tmp_path, monkeypatch):
    """Without a request; `owner/name` is what most relative paths look like."""
    monkeypatch.chdir(tmp_path)
    model_hub.add("saved/here", files)
    peft_adapter(tmp_path / "saved" / "here", seed=5)
    assert adapter_folder("saved/here").resolve() == tmp_path / "saved" / "here"
    (tmp_path / "saved" / "empty").mkdir()
    with pytest.raises(InputError, match="saved/empty holds no adapter_config.json"):
        adapter_folder("saved/empty")
    assert not model_hub.seen


# --- fetching ---------------------------------------------------------------------------------------------


def test_an_adapter_by_its_id_is_what_peft_saved(model_hub, files, tmp_path):
    """Everywhere a folder is taken; fetched once, and the other files of the repository not at all."""
    junk = {
        "adapter_model.bin": b"1",
        "training_args.bin": b"2",
        "run.py": b"3",
        "optimizer.safetensors": b"4",
        "a/config.yaml": b"",
    }
    model_hub.add(REPO, files | junk)
    expected = deltas_loaded_by_peft(tmp_path / "saved")
    weights = load_adapter_weights(REPO)
    assert weights.source == REPO
    for name, delta in expected.items():
        # PEFT's product is in float32.
        assert weights.factors[name].delta_weight().float().allclose(delta.float()), name
    asked = len(model_hub.seen)
    assert {p.name for p in adapter_folder(REPO).iterdir()} == files.keys()
    assert read_run(REPO).label == REPO
    assert len(model_hub.seen) == asked and not model_hub.requests(".bin")


def test_a_merge_takes_ids_and_folders(model_hub, files, tmp_path, capsys):
    model_hub.add(REPO, files)
    assert main(["merge", REPO, str(tmp_path / "saved"), "--output", str(tmp_path / "merged")]) == 0
    (name, factors), *_ = load_adapter_weights(tmp_path / "merged").factors.items()
    assert factors.delta_weight().allclose(load_adapter_weights(tmp_path / "saved").factors[name].delta_weight())


def test_a_revision_is_another_state(model_hub, files, tmp_path):
    model_hub.add(REPO, files)
    peft_adapter(tmp_path / "other", seed=7)
    other = {name: (tmp_path / "other" / name).read_bytes() for name in files}
    model_hub.repositories[REPO].branches["later"] = [other]
    for name, expected in ((REPO, files), (f"{REPO}@later", other)):
        assert (adapter_folder(name) / WEIGHTS_FILE).read_bytes() == expected[WEIGHTS_FILE]
    with pytest.raises(InputError, match=f"{REPO} has no such revision|{REPO}@never has no such revision"):
        adapter_folder(f"{REPO}@never")


def test_pull_writes_a_copy(model_hub, files, tmp_path, capsys):
    model_hub.add(REPO, files | {"README.md": b"# card", "adapter_model.bin": b""})
    assert main(["pull", REPO, "--output", str(tmp_path / "pulled")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'pulled'}\n"
    written = {p.name: p.read_bytes() for p in (tmp_path / "pulled").iterdir()}
    assert written == files | {"README.md": b"# card"}
    assert not any(p.is_symlink() for p in (tmp_path / "pulled").iterdir())


@pytest.mark.parametrize(
    "there, reason",
    [
        ({CONFIG_FILE: b"{}", "adapter_model.bin": b"\x80"}, "pickled ones can run code"),
        ({CONFIG_FILE: b"{}"}, f"no weights in {WEIGHTS_FILE}"),
        ({"config.json": b"{}", "model.safetensors": b"0" * 100}, f"holds no {CONFIG_FILE}"),
    ],
)
def test_what_is_no_adapter_in_safetensors_is_not_fetched(model_hub, there, reason):
    """Said before a byte of it is fetched: a model has gigabytes."""
    model_hub.add(REPO, there)
    with pytest.raises(InputError, match=reason):
        adapter_folder(REPO)
    assert not model_hub.requests("/resolve/")


def test_names_cannot_leave_the_folder(model_hub, files, tmp_path):
    """A hub that lists other places: nothing is fetched from them, and nothing is written there."""
    model_hub.add(
        REPO, files | {"../../../../tokenizer.json": b"1", "/tokenizer.json": b"2", "..\\tokenizer.json": b"3"}
    )
    before = {p for p in tmp_path.rglob("*") if "hub-cache" not in p.parts}
    assert {p.name for p in adapter_folder(REPO).iterdir()} == files.keys()
    assert {p for p in tmp_path.rglob("*") if "hub-cache" not in p.parts} == before
    assert not list(tmp_path.rglob("*tokenizer.json"))


def test_somebody_elses_settings_run_no_code(model_hub, files, tmp_path, capsys):
    """By its id, and in a folder that it was pulled to; a run of one's own keeps what it was given."""
    settings = dump_yaml(RunConfig().replace(trust_remote_code=True, attn_implementation="evil/kernel", lora_r=3))
    model_hub.add(REPO, files | {"config.yaml": settings.encode()})
    assert main(["pull", REPO, "--output", str(tmp_path / "pulled")]) == 0
    for place in (REPO, tmp_path / "pulled"):
        model = read_run(place).config.model
        assert (model.trust_remote_code, model.attn_implementation) == (False, None), place
        assert read_run(place).config.lora.lora_r == 3
    own = save_run(tmp_path / "own", "copra", 0, trust_remote_code=True)
    assert read_run(own).config.model.trust_remote_code and read_run(own / "adapter").config.model.trust_remote_code


def test_a_file_cut_in_the_middle_is_fetched_to_its_end(model_hub, files):
    model_hub.add(REPO, files)
    model_hub.fail("GET", f"/{WEIGHTS_FILE}", None)
    assert (adapter_folder(REPO) / WEIGHTS_FILE).read_bytes() == files[WEIGHTS_FILE]
    assert model_hub.requests(f"GET /{REPO}/resolve") == len(files) + 1


def test_out_of_reach_what_was_fetched_before_is_there(model_hub, files, monkeypatch, capsys):
    model_hub.add(REPO, files)
    fetched = adapter_folder(REPO)
    for change in ({"HF_HUB_OFFLINE": True}, {"ENDPOINT": "http://127.0.0.1:9"}):
        with monkeypatch.context() as patch:
            for name, value in change.items():
                patch.setattr(constants, name, value)
            hub.download.cache_clear()
            assert adapter_folder(REPO) == fetched
            assert "note: the Hub is out of reach" in capsys.readouterr().err
            with pytest.raises(InputError, match="unset HF_HUB_OFFLINE|connection to the Hub failed"):
                adapter_folder("someone/unknown")


# --- pushing ----------------------------------------------------------------------------------------------


def test_a_push_is_one_commit_and_comes_back_byte_for_byte(model_hub, folder, files):
    pushed = hub.upload(folder, "tester/new", message="words")
    repository = model_hub.repositories["tester/new"]
    assert model_hub.files("tester/new") == files and repository.messages == ["words"]
    assert not repository.private and pushed.commit in pushed.url
    assert list(model_hub.objects.values()) == [files[WEIGHTS_FILE]], "safetensors go through LFS"
    assert (adapter_folder("tester/new") / WEIGHTS_FILE).read_bytes() == files[WEIGHTS_FILE]


def test_pushing_again_changes_only_what_changed(model_hub, folder, files):
    """The same files: no commit. Fewer: what is this package's own and not pushed again goes, the rest stays."""
    (folder / "result.json").write_text("{}")
    hub.upload(folder, "tester/new")
    hub.upload(folder, "tester/new")
    repository = model_hub.repositories["tester/new"]
    assert len(repository.messages) == 1
    repository.branches["main"][-1]["LICENSE"] = b"mine"
    (folder / "result.json").unlink()
    hub.upload(folder, "tester/new")
    assert model_hub.files("tester/new").keys() == {*files, "LICENSE"} and len(repository.messages) == 2


def test_a_branch_is_made_and_main_stays(model_hub, folder, files):
    hub.upload(folder, "tester/new", revision="try-1")
    assert model_hub.files("tester/new", "try-1") == files and model_hub.files("tester/new") == {}
    hub.upload(folder, "tester/new", revision="try-1")


def test_private_is_private_or_nothing(model_hub, folder):
    hub.upload(folder, "tester/hidden", private=True)
    assert model_hub.repositories["tester/hidden"].private
    model_hub.add("tester/open", {})
    with pytest.raises(InputError, match="tester/open is there already, and public"):
        hub.upload(folder, "tester/open", private=True)
    assert model_hub.files("tester/open") == {}


def test_a_name_without_an_owner_is_the_tokens(model_hub, monkeypatch):
    assert hub.full_name("mine") == "tester/mine"
    assert hub.full_name("team/mine") == "team/mine"
    with pytest.raises(InputError, match="can be no repository's name"):
        hub.full_name("a/b/c")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(InputError, match="hf auth login"):
        hub.full_name("team/mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="unset it"):
        hub.full_name("team/mine")


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step", ["/api/repos/create", "/api/validate-yaml", "/preupload/", "/objects/batch", "/commit/"]
)
@pytest.mark.parametrize("status, headers", [(503, {}), (429, {"Retry_After": 7})])
def test_a_passing_refusal_is_waited_out(model_hub, folder, files, step, status, headers):
    """At every request of a push, by the client or by this package: the commit is there, once."""
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    model_hub.fail("POST", step, status, body=b"<html>busy</html>" if status == 503 else b"{}", **headers)
    hub.upload(folder, "tester/new")
    assert model_hub.files("tester/new").keys() == {*files, "README.md"}
    assert len(model_hub.repositories["tester/new"].messages) == 1
    assert model_hub.waits and (status == 503 or model_hub.waits[0] in (7, 8))  # the client adds one second


def test_a_commit_whose_answer_is_lost_is_not_made_twice(model_hub, folder, files):
    """The connection breaks after the Hub has done it: asked again, it finds nothing to do."""
    model_hub.lose_answer = "/commit/"
    hub.upload(folder, "tester/new")
    repository = model_hub.repositories["tester/new"]
    assert model_hub.files("tester/new") == files and len(repository.messages) == 1
    assert model_hub.requests("/commit/") == 1


@pytest.mark.parametrize(
    "part, status, headers, said",
    [
        ("/commit/", 401, {}, "hf auth login"),
        ("/commit/", 403, {}, "with a token that has the right"),
        ("/commit/", 409, {}, "changed by somebody else"),
        ("/commit/", 412, {}, "changed by somebody else"),
        ("/commit/", 429, {"Retry_After": 3600}, "try again in 3600 s"),
        ("/commit/", 500, {}, "could not do it for tester/new (500: because); try again later"),
        ("/commit/", 400, {}, "could not do it for tester/new (400: because); mend what it names"),
        ("/commit/", None, {}, "connection to the Hub failed"),
        ("/api/repos/create", 403, {}, "with a token that has the right"),
        ("/lfs/", 403, {}, "with a token that has the right"),
    ],
)
def test_what_a_refused_push_says(model_hub, folder, part, status, headers, said):
    """One sentence, no token, and no commit."""
    for method in ("POST", "PUT"):
        model_hub.fail(method, part, status, times=100, body=b'{"error": "because"}', **headers)
    with pytest.raises(InputError) as refused:
        hub.upload(folder, "tester/new")
    assert said in str(refused.value) and "\n" not in str(refused.value) and "hf_a" not in str(refused.value)
    assert status in (None, 429) or "because" in str(refused.value)
    assert sum(model_hub.waits) <= 60, "the wait is bounded"
    assert not model_hub.repositories.get("tester/new") or model_hub.files("tester/new") == {}


def test_what_a_push_says_that_xet_is_refused(model_hub, folder, monkeypatch):
    """Xet's own client transfers large files where it is installed; it raises errors of other kinds."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    model_hub.fail("GET", "/xet-write-token/", 401, times=100)
    with pytest.raises(InputError, match=r"the Hub has no tester/new, or not for you \(401\).*hf auth login"):
        hub.upload(folder, "tester/new")
    assert model_hub.files("tester/new") == {}


@pytest.mark.parametrize(
    "status, headers, said",
    [
        (401, {}, "hf auth login"),
        (403, {}, "with a token that has the right"),
        (403, {"X_Error_Code": "GatedRepo"}, "ask for access on its page"),
        (404, {"X_Error_Code": "RepoNotFound"}, "the Hub has no someone/adapter"),
        (429, {"Retry_After": 3600}, "try again in 3600 s"),
        (502, {}, "try again later"),
    ],
)
def test_what_a_refused_fetch_says(model_hub, files, capsys, status, headers, said):
    model_hub.add(REPO, files)
    model_hub.fail("GET", "/api/models/", status, times=100, **headers)
    assert main(["pull", REPO]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("error: ") == 1 and printed.out == ""


def test_pull_wants_an_id(capsys):
    assert main(["pull", "adapter"]) == 2
    assert "give owner/name" in capsys.readouterr().err
    assert main(["pull", "a/b@c", "--revision", "d"]) == 2
    assert "both name a revision" in capsys.readouterr().err
