"""Publishing to a stand-in for the Hub, with the real client: one commit, resumable, and the token is nowhere."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import READER, TOKEN, HubServer, hub_server

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.publish.hub import Hub, parse
from capstan.pipeline.publish.job import publish
from capstan.pipeline.storage import Storage

NAME = "hf://datasets/me/birds"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in speaks LFS
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def run(source: Storage, dest: str = NAME, *, create: bool = False, **options: Any) -> dict[str, Any]:
    return publish(source, Hub(dest, create=create), dest, progress=False, **options)


def test_one_commit_shows_a_copy_that_verifies(hub: HubServer, dataset: Storage, tmp_path: Path) -> None:
    summary = run(dataset, create=True)
    repo = hub.repos["me/birds"]
    assert len(repo.commits) == 2  # the Hub's own first one, and ours
    assert summary["sent"] == len(repo.files)
    assert summary["commit"].startswith(hub.url)
    for name, data in repo.files.items():
        path = tmp_path / "downloaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert verify(Storage(str(tmp_path / "downloaded"))) == []
    assert f"{hub.url}/datasets/me/birds/discussions" in repo.files["README.md"].decode()
    assert not [name for name, data in repo.files.items() if TOKEN.encode() in data]
    assert run(dataset)["sent"] == 0
    assert len(repo.commits) == 2


def test_an_interrupted_upload_shows_nothing_and_is_not_sent_again(
    hub: HubServer, dataset: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    hub.fail_after = 3
    with pytest.raises(CapstanError) as caught:
        run(dataset, create=True)
    repo = hub.repos["me/birds"]
    assert repo.files == {}
    assert "s3cr3t" not in f"{caught.value}{caplog.text}"
    first, hub.fail_after = list(hub.sent), None
    assert len(first) == 3
    run(dataset)
    assert len(hub.sent) == len(set(hub.sent))  # none of the three was sent twice
    assert "dataset.json" in repo.files


def test_a_smaller_dataset_removes_what_it_no_longer_has(hub: HubServer, dataset: Storage) -> None:
    run(dataset, create=True, layers=["mine"])
    repo = hub.repos["me/birds"]
    assert "captions/mine/recipe.json" in repo.files
    summary = run(dataset)
    assert summary["removed"] == 1 + len(Dataset(dataset).shard_names)
    assert not [name for name in repo.files if name.startswith("captions/")]


def test_a_change_by_somebody_else_in_between_is_not_overwritten(
    hub: HubServer, dataset: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(dataset, create=True)
    repo, destination = hub.repos["me/birds"], Hub(NAME)
    card = destination.card

    def meanwhile() -> str:
        text = card()
        repo.commits.append({**repo.files, "README.md": b"theirs"})
        return text

    monkeypatch.setattr(destination, "card", meanwhile)
    with pytest.raises(CapstanError, match="changed while it was published"):
        publish(dataset, destination, NAME, contact="new@example.org", progress=False)
    assert repo.files["README.md"] == b"theirs"


def test_a_dry_run_sends_nothing(hub: HubServer, dataset: Storage) -> None:
    assert run(dataset, create=True, dry_run=True)["sent"] > 0
    assert hub.repos == {}


def test_what_a_person_can_mend_is_exit_code_2(
    hub: HubServer, dataset: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match=r"no dataset me/birds .*--create"):
        run(dataset)
    run(dataset, create=True)
    with pytest.raises(RecipeError, match="no branch 'dev'"):
        run(dataset, f"{NAME}@dev")
    hub.repos["me/birds"].commits.append({"thesis.tex": b"..."})
    with pytest.raises(RecipeError, match="holds other files"):
        run(dataset)
    hub.repos["me/birds"].commits.append({})
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(RecipeError, match=r"may not write to me/birds \(403") as caught:
        run(dataset)
    assert READER not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(RecipeError, match="does not accept the token") as caught:
        run(dataset)
    assert "hf_wrong" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RecipeError, match=r"no token .*HF_TOKEN"):
        run(dataset)


@pytest.mark.parametrize(
    "url", ["hf://datasets/birds", "hf://me/birds", "hf://datasets/me/a b", "hf://datasets/me/a//b"]
)
def test_names_that_are_none(url: str) -> None:
    with pytest.raises(RecipeError, match=r"hf://datasets/USER/NAME"):
        parse(url)


def test_a_branch_may_be_named() -> None:
    assert parse("hf://datasets/me/birds@dev") == ("me/birds", "dev")


def test_a_hub_that_does_not_answer_is_no_mistake_of_the_user(dataset: Storage, hub: HubServer) -> None:
    destination = Hub(NAME)
    destination._api.endpoint = "http://127.0.0.1:9"
    with pytest.raises(CapstanError, match="not sent again") as caught:
        publish(dataset, destination, NAME, progress=False)
    assert caught.value.exit_code == 1
