"""Recipes on the Hugging Face hub: one small JSON file under one name, in a repository of its own or beside weights.

Functions on huggingface_hub's HfApi and hf_hub_download instead of its ModelHubMixin: the mixin has to be a base class,
so `fitprune --help` would import huggingface_hub; it sets attributes on every instance, which a frozen dataclass
refuses; and it writes a config.json and a README.md wherever it saves, which beside a model's weights would replace the
model's own. This file knows names, bytes and errors of the hub, and nothing of recipes. It imports huggingface_hub only
where it uses the hub.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fitprune._support.messages import short

RECIPE_FILE = "fitprune_recipe.json"
CARD_FILE = "README.md"

_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)


def split_name(name: str) -> tuple[str, str | None] | None:
    """Read "owner/name" or "owner/name@revision"; None where `name` cannot be a hub name, as of a JSON file."""
    matched = _NAME.fullmatch(name)
    if matched is None or matched["repo"].endswith(".json"):
        return None
    return matched["repo"], matched["revision"]


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Download the recipe file of a repository, through huggingface_hub's cache.

    Args:
        repo_id: "owner/name".
        revision: branch, tag or commit; by default the main branch.
        token: access token; True or None for the one that is logged in, False for none.
        cache_dir: instead of huggingface_hub's own cache.
        local_files_only: look into the cache alone.
        force_download: download it though the cache has it.

    Raises:
        FileNotFoundError: no such repository, revision, or recipe in it.
        PermissionError: the repository is gated.
        ConnectionError: the hub is out of reach, and the cache has no such file.
        OSError: the hub answers with another error.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    cache_dir = None if cache_dir is None else os.fspath(cache_dir)
    with _explained(repo_id, revision, local_files_only=local_files_only):
        cached = try_to_load_from_cache(repo_id, RECIPE_FILE, cache_dir, revision)
        if not local_files_only and (force_download or not isinstance(cached, str)):
            # One request: where the hub is out of reach, hf_hub_download would go on asking for 20 seconds.
            HfApi(token=token).model_info(repo_id, revision=revision, timeout=10)
        path = hf_hub_download(
            repo_id,
            RECIPE_FILE,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
    return Path(path)


def pin(repo_id: str, revision: str | None = None, *, token: str | bool | None = None) -> str:
    """Find the commit of a model's revision: by one request, or in the cache where the hub is out of reach.

    Args:
        repo_id: "owner/name".
        revision: branch, tag or commit; by default the main branch.
        token: as for `download`.

    Returns:
        huggingface_hub's ResolvedRevision: the revision, with the commit as `resolved`.

    Raises:
        OSError: as for `download`.
    """
    from huggingface_hub import HfApi

    with _explained(repo_id, revision, "config.json"):
        pinned: str = HfApi(token=token).resolve_revision(repo_id, revision=revision)
    return pinned


@dataclasses.dataclass(frozen=True)
class Repository:
    """A repository that can be written to, and what is in it.

    Attributes:
        repo_id: "owner/name".
        revision: the branch; None for main.
        names: the files and folders at its top.
        card: its README.md; None where it has none.
        api: the HfApi that found it, with its token.
    """

    repo_id: str
    revision: str | None
    names: tuple[str, ...]
    card: str | None
    api: Any

    @classmethod
    def open(
        cls, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, revision: str | None = None
    ) -> Repository:
        """Make a model repository and its branch where they are missing, and list what is in it.

        Args:
            repo_id: "owner/name", or "name" for one's own.
            private: whether a new repository is private; None for the owner's default.
            token: as for `download`, with the right to write.
            revision: branch; by default main.

        Raises:
            OSError: as for `download`.
            ValueError: `repo_id` or `revision` is no name.
        """
        from huggingface_hub import HfApi, hf_hub_download

        if split_name(repo_id if "/" in repo_id else f"me/{repo_id}") is None or "@" in repo_id:
            raise ValueError(f"{short(repo_id)}: must be a hub name, owner/name, or your own repository's name")
        if revision == "":
            raise ValueError("revision='': must be the name of a branch; leave it out for main")
        api = HfApi(token=token)
        with _explained(repo_id, revision, writing=True):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            names = tuple(entry.path for entry in api.list_repo_tree(repo_id, revision=revision))
            card = None
            if CARD_FILE in names:
                path = hf_hub_download(repo_id, CARD_FILE, revision=revision, token=token)
                card = Path(path).read_text(encoding="utf-8", errors="replace")
        return cls(repo_id, revision, names, card, api)

    def commit(self, texts: Mapping[str, str], message: str, *, create_pr: bool = False) -> str:
        """Write files in one commit: all of them or none.

        Args:
            texts: file name -> text.
            message: the commit's.
            create_pr: propose the commit as a pull request instead.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            OSError: as for `download`.
        """
        from huggingface_hub import CommitOperationAdd

        operations = [CommitOperationAdd(name, text.encode()) for name, text in texts.items()]
        with _explained(self.repo_id, self.revision, writing=True):
            commit = self.api.create_commit(
                self.repo_id, operations, commit_message=message, revision=self.revision, create_pr=create_pr
            )
        return str(commit.pr_url or commit.commit_url)


@contextlib.contextmanager
def _explained(
    repo_id: str,
    revision: str | None,
    file: str = RECIPE_FILE,
    *,
    writing: bool = False,
    local_files_only: bool = False,
) -> Iterator[None]:
    """Turn the hub's errors into Python's own, with name, place and remedy."""
    from huggingface_hub import constants, errors

    at = "" if revision is None else f" at revision {revision!r}"
    log_in = "log in with 'hf auth login' or pass token="
    try:
        yield
    except errors.GatedRepoError:
        raise PermissionError(f"{repo_id} is gated on the hub: ask for access on its page, and {log_in}") from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{repo_id}: no such folder here and no such repository on the hub; check the name, and for a private one "
            f"{log_in}"
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{repo_id} on the hub has no revision {revision!r}: check the name") from None
    except errors.RemoteEntryNotFoundError:
        raise FileNotFoundError(f"{repo_id} on the hub has no {file}{at}") from None
    except errors.HfHubHTTPError as error:
        message = f"{repo_id}: the hub refuses: {' '.join(str(error).split())}"
        if error.response is not None and error.response.status_code in (401, 403):
            raise PermissionError(f"{message}; {log_in}") from error
        raise OSError(message) from error
    except Exception as error:
        # A hub out of reach shows in several errors: not in the cache (and why), offline mode, and those of the HTTP
        # client, which differs between releases of huggingface_hub.
        client = type(error).__module__.partition(".")[0].startswith("httpx")
        known = (errors.LocalEntryNotFoundError, errors.RevisionResolutionError, ConnectionError, TimeoutError)
        if not client and not isinstance(error, known):
            raise
        why, remedy = "no connection to the hub", "connect"
        if local_files_only:
            why, remedy = "local_files_only=True", "leave that out"
        elif constants.HF_HUB_OFFLINE:
            why, remedy = "offline mode (HF_HUB_OFFLINE)", "unset it"
        if writing:
            raise ConnectionError(
                f"{repo_id} on the hub cannot be written to: {why}; {remedy}, or save to a folder"
            ) from error
        raise ConnectionError(
            f"{repo_id}{at} on the hub cannot be asked: {why}, and the cache has no {file} of it; "
            f"{remedy}, or name a folder or file"
        ) from error
