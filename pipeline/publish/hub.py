"""A dataset repository of the Hugging Face Hub as a destination: files first, then one commit that shows them all

Large files are stored by the Hub before they are committed, and are not sent again by a run that follows. Readers see
the copy of the commit before until the new one is there. The token comes from the environment or the login of
huggingface_hub, and is never printed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from capstan.pipeline import extras
from capstan.pipeline.dataset.croissant import PUBLISHED
from capstan.pipeline.dataset.shards import MANIFEST
from capstan.pipeline.errors import CapstanError, RecipeError, StorageError, first_line
from capstan.pipeline.publish.card import NAME as CARD
from capstan.pipeline.publish.contents import PublishedFile, fetch
from capstan.pipeline.secrets import public_text
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import scratch

PREFIX: Final = "hf://"
_URL: Final = re.compile(r"hf://datasets/(?P<name>[^@\s]+?)(?:@(?P<revision>[^\s@]+))?/?\Z")
_OWN: Final = ("shards/", "ledger/", "captions/", ".nv-meta/")
_AT_ONCE: Final = 16  # files,
_BYTES_AT_ONCE: Final = 2 << 30  # or bytes on this machine's disk, between two requests
_SMALL: Final = 4 << 20  # bytes: files that a commit may hold itself
_RESUME: Final = "run the same command again: what was sent is not sent again"
_TOKEN: Final = "set HF_TOKEN to a token that may write to the dataset, or run `hf auth login`"

Sent = Callable[[PublishedFile], None]


def parse(url: str) -> tuple[str, str]:
    """Return the name of the dataset and its branch. Raises RecipeError for a URL that does not name a dataset."""
    found = _URL.match(url)
    hint = "write hf://datasets/USER/NAME, or hf://datasets/USER/NAME@BRANCH"
    if found is None:
        raise RecipeError("DEST", f"{url} does not name a dataset of the Hugging Face Hub", hint)
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(found["name"])
    except HFValidationError as error:
        raise RecipeError("DEST", f"{found['name']!r} is not a dataset's name ({first_line(error)})", hint) from None
    if "/" not in found["name"]:
        raise RecipeError("DEST", f"{found['name']!r} does not say whose dataset it is", hint)
    return found["name"], found["revision"] or "main"


class Hub:
    """A destination on the Hub. `create`: make the repository if there is none, `private` or not."""

    def __init__(self, url: str, *, create: bool = False, private: bool = False) -> None:
        extras.require("hub", "DEST")
        self.name, self._branch = parse(url)
        self._create, self._private = create, private
        from huggingface_hub import HfApi, constants
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs URLs, which may hold signatures
        self._endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
        self._api = HfApi(endpoint=self._endpoint)
        self.url = f"{self._endpoint}/datasets/{self.name}"
        self._there: dict[str, tuple[int, str, str]] = {}  # name → size, SHA-256 or "", git's sum
        self._head: str | None = None

    def check(self, source: Storage) -> None:
        """Read what the repository holds. Raises RecipeError if there is no token, no right, or no repository."""
        from huggingface_hub import get_token
        from huggingface_hub.errors import RepositoryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        if not get_token():
            raise RecipeError("DEST", f"no token for {self._endpoint}", _TOKEN)
        with self._explained("read"):
            try:
                info = self._api.repo_info(self.name, repo_type="dataset", revision=self._branch)
            except RepositoryNotFoundError:
                if not self._create:
                    raise
                return
            self._head = info.sha
            listed = self._api.list_repo_tree(self.name, repo_type="dataset", revision=self._branch, recursive=True)
            for file in listed:
                if isinstance(file, RepoFile):
                    self._there[file.path] = (file.size, file.lfs.sha256 if file.lfs else "", file.blob_id)
        self._refuse_others()

    def _refuse_others(self) -> None:
        """Raise RecipeError if the repository holds something that is not an earlier copy."""
        if MANIFEST in self._there:
            with contextlib.suppress(ValueError, AttributeError):
                if PUBLISHED in json.loads(self._read(MANIFEST)).get("recipe", {}):
                    return
            raise RecipeError("DEST", f"{self.name} holds another dataset", "choose another name")
        other = sorted(name for name in self._there if name != CARD and not name.startswith(".git"))
        if other:
            raise RecipeError("DEST", f"{self.name} holds other files, e.g. {other[0]}", "choose another name")

    def card(self) -> str:
        """Return the card that is there, or ""."""
        return self._read(CARD).decode("utf-8", "replace") if CARD in self._there else ""

    def _read(self, name: str) -> bytes:
        with self._explained("read"), scratch() as folder:
            path = self._api.hf_hub_download(
                self.name, name, repo_type="dataset", revision=self._head, local_dir=str(folder)
            )
            return Path(path).read_bytes()

    def has(self, source: Storage, file: PublishedFile) -> bool:
        """Return whether the repository has this file with this sum."""
        size, sha256, git = self._there.get(file.name, (-1, "", ""))
        if size != file.size:
            return False
        if sha256:
            return sha256 == file.sha256
        data = file.data if file.data is not None else source.read(file.name)
        return git == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()

    def stale(self, wanted: Sequence[PublishedFile]) -> list[str]:
        """Return the files of an earlier copy that are not in this one."""
        names = {file.name for file in wanted}
        return sorted(name for name in self._there if name.startswith(_OWN) and name not in names)

    def write(
        self,
        source: Storage,
        files: Sequence[PublishedFile],
        send: Sequence[PublishedFile],
        stale: Sequence[str],
        sent: Sent,
    ) -> dict[str, Any]:
        """Send what differs, then commit everything at once. Returns the commit's URL."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        with self._explained("write to"):
            if self._head is None:
                self._api.create_repo(self.name, repo_type="dataset", private=self._private, exist_ok=True)
        operations: list[Any] = []
        for batch in _batches(send):
            with scratch() as folder:
                added = []
                for number, file in enumerate(batch):
                    path = folder / str(number)
                    fetch(source, file, path)
                    content = path.read_bytes() if file.size <= _SMALL else str(path)
                    added.append(CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=content))
                with self._explained("write to"):
                    self._api.preupload_lfs_files(
                        self.name, additions=added, repo_type="dataset", revision=self._branch
                    )
                self._refuse_strays(added)
            operations += added
            for file in batch:
                sent(file)
        operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
        with self._explained("write to"):
            commit = self._api.create_commit(
                self.name,
                operations,
                commit_message="Publish with Capstan",
                repo_type="dataset",
                revision=self._branch,
                parent_commit=self._head,
            )
        return {"commit": str(commit.commit_url)}

    def _refuse_strays(self, added: Sequence[Any]) -> None:
        """Raise CapstanError for a large file that the Hub wants inside the commit: it would not fit."""
        for operation in added:
            if not operation._is_uploaded and operation.upload_info.size > _SMALL:
                hint = f"track {Path(operation.path_in_repo).suffix} with LFS in the repository's .gitattributes"
                raise CapstanError(f"the Hub does not store {operation.path_in_repo} as a large file. Fix: {hint}")

    @contextlib.contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        """Turn errors of the client into errors that say what to do; no token and no signature is in any of them."""
        import httpx2
        from huggingface_hub.errors import (
            HfHubHTTPError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            yield
        except RevisionNotFoundError:
            hint = "create it in the repository, or publish to main"
            raise RecipeError("DEST", f"{self.name} has no branch {self._branch!r}", hint) from None
        except RepositoryNotFoundError:
            problem = f"there is no dataset {self.name} at {self._endpoint}, or the token may not see it"
            raise RecipeError("DEST", problem, "check the name and the token, or add --create") from None
        except OfflineModeIsEnabled:
            raise RecipeError("DEST", "HF_HUB_OFFLINE is set, so the Hub is not asked", "unset it") from None
        except HfHubHTTPError as error:
            raise self._of_status(action, error) from None
        except (httpx2.HTTPError, OSError) as error:
            problem = f"{type(error).__name__}: {public_text(first_line(error))}"
            raise StorageError(f"{action} {self.url}", problem, _RESUME) from None
        except RuntimeError as error:  # an upload that failed in a thread or in Xet
            why = "" if error.__cause__ is None else f" {public_text(first_line(error.__cause__))}"
            raise StorageError(f"{action} {self.url}", f"{public_text(first_line(error))}{why}", _RESUME) from None
        except ValueError as error:  # an answer that the client refuses
            raise CapstanError(f"{self.url}: {public_text(str(error))}") from None

    def _of_status(self, action: str, error: Any) -> CapstanError:
        status = error.response.status_code
        said = public_text(first_line(error.server_message or error))
        if status == 401:
            return RecipeError("DEST", f"{self._endpoint} does not accept the token (401)", _TOKEN)
        if status == 403:
            return RecipeError(
                "DEST", f"the token may not {action} {self.name} (403: {said.removeprefix('403 Forbidden: ')})", _TOKEN
            )
        if status in (409, 412):
            problem = f"{self.name} changed while it was published (HTTP {status})"
            return StorageError(f"{action} {self.url}", problem, _RESUME)
        return StorageError(f"{action} {self.url}", f"HTTP {status}: {said}", _RESUME)


def _batches(files: Sequence[PublishedFile]) -> Iterator[list[PublishedFile]]:
    """Yield groups of files that fit on this machine's disk for a while."""
    held: list[PublishedFile] = []
    for file in files:
        held.append(file)
        if len(held) == _AT_ONCE or sum(one.size for one in held) >= _BYTES_AT_ONCE:
            yield held
            held = []
    if held:
        yield held
