"""Folders to the Hugging Face hub, by huggingface_hub: with the token of `hf auth login`, or of HF_TOKEN."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal


def check_repository(name: str) -> None:
    """Raises ValueError unless `name` can be a repository's: NAME, or OWNER/NAME."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name!r} can't be a repository's name: {error}") from error


def push(
    folder: str | Path, name: str, kind: Literal["model", "dataset"], private: bool, files: Sequence[str] = ("*",)
) -> str:
    """Upload those files of a folder (patterns as of fnmatch) to a repository, which is made if it isn't there.

    name: OWNER/NAME, or NAME of whoever is logged in. private: of a repository that is made. Returns its address. What
    is there already and the same is not sent again, so that the same call goes on after one that was cut off. Raises
    ValueError without a token and for a name that can't be, OSError where the hub refuses or can't be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    check_repository(name)
    if not get_token():
        raise ValueError("no token of the hub: log in by `hf auth login`, or set HF_TOKEN to one that may write")
    api = HfApi()
    try:
        address = api.create_repo(name, repo_type=kind, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, repo_type=kind, allow_patterns=list(files),
            commit_message="Upload by granvit",
        )  # fmt: skip
    except (OSError, *HfHubHTTPError.__bases__) as error:  # one is of the HTTP library, which releases change
        raise OSError(f"the hub did not take {name}: {error}") from error
    return str(address)
