"""Folders to the Hugging Face hub, by huggingface_hub: with the token of `hf auth login`, or of HF_TOKEN."""

from __future__ import annotations

import re
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


def check_token() -> None:
    """Raises ValueError unless there is a token that can be sent: errors about one that can't would show it."""
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise ValueError("no token of the hub: log in by `hf auth login`, or set HF_TOKEN to one that may write")
    if not re.fullmatch("[!-~]+", token):
        raise ValueError(
            "the hub's token (of HF_TOKEN, else of `hf auth login`) has spaces or signs beyond ASCII, which no token "
            "has; copy it again"
        )


def push(
    folder: str | Path, name: str, kind: Literal["model", "dataset"], private: bool, files: Sequence[str] = ("*",)
) -> str:
    """Upload those files of a folder (patterns as of fnmatch) to a repository, which is made if it isn't there.

    name: OWNER/NAME, or NAME of whoever is logged in. private: of a repository that is made; False: as its owner's
    default is. Returns its address. What is there already and the same is not sent again, so that the same call goes on
    after one that was cut off. Raises ValueError as `check_repository` and `check_token` do, OSError where the hub
    refuses or can't be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_repository(name)
    check_token()
    api = HfApi()
    try:
        address = api.create_repo(name, repo_type=kind, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, repo_type=kind, allow_patterns=list(files),
            commit_message="Upload by granvit",
        )  # fmt: skip
    except (OSError, *HfHubHTTPError.__bases__) as error:  # one is of the HTTP library, which releases change
        raise OSError(f"the hub did not take {name}: {error}") from error
    return str(address)
