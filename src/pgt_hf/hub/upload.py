"""Uploads to the Hub: checks access, commits a folder at once, refuses secrets."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError

from ..limits import RepoId, checked
from .safetensors_layout import read_header

_TEXT = (".json", ".jsonl", ".md", ".html", ".txt")


def check_repo_id(repo_id: str) -> None:
    """Raises TypeError or ValueError unless it is a name, or owner/name, as the Hub allows them."""
    RepoId().check("repo_id", repo_id)


@checked
def check_push_access(repo_id: str, token: str | None = None, *, private: bool | None = None) -> str:
    """Checks that the token may write to the repository, and returns its full "owner/name".

    Only creating the repository shows that, so it is created if it does not exist.

    Raises:
        ValueError: ``repo_id`` is not the form of a name.
        PermissionError: There is no token, it is not valid, or it may not write there.
        ConnectionError: The Hub could not be asked.
    """
    api = HfApi(token=token)
    advice = "make a token with write access at https://huggingface.co/settings/tokens and run `hf auth login`"
    if token is None and get_token() is None:
        raise PermissionError(f"no Hugging Face token was found for pushing to {repo_id!r}; {advice}")
    try:
        found = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(found, write=True)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 402, 403, 404):
            reason = "is not valid" if status == 401 else f"may not write to {repo_id!r} (HTTP {status})"
            raise PermissionError(f"the Hugging Face token {reason}; {advice}") from error
        raise ConnectionError(f"the Hub at {constants.ENDPOINT} answered HTTP {status}") from error
    except ValueError:
        raise
    except Exception as error:  # the transport's own errors are huggingface_hub's to choose
        raise ConnectionError(f"the Hub at {constants.ENDPOINT} could not be reached: {error}") from error
    return found


@checked
def push_release(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload model",
) -> CommitInfo:
    """Uploads what ``prepare_release`` wrote in one commit: a failed push leaves the repository unchanged.

    Args:
        folder: The files.
        repo_id: "name" or "owner/name"; created if it does not exist.
        token: A token with write access; by default that of ``hf auth login`` or ``HF_TOKEN``.
        private: Whether a new repository is private.
        revision: A branch, created if it does not exist; by default "main".
        message: The commit's title.

    Raises:
        PermissionError, ConnectionError, ValueError: As ``check_push_access``.
        OSError: The upload failed or was refused.
    """
    api = HfApi(token=token)
    repo_id = check_push_access(repo_id, token, private=private)
    try:
        if revision not in (None, constants.DEFAULT_REVISION) and not str(revision).startswith("refs/"):
            api.create_branch(repo_id, branch=str(revision), exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id, folder_path=Path(folder), commit_message=message, revision=revision, ignore_patterns=[]
        )
    except ValueError:
        raise
    except Exception as error:  # the upload threads wrap what they met in a RuntimeError
        reason = " ".join(str(error.__cause__ or error).split())
        raise OSError(f"the push to {repo_id!r} failed: {reason}") from error


def refuse_leaks(folder: Path, private_paths: Sequence[str] = ()) -> None:
    """Raises ValueError, naming the file, if a text file or a safetensors header holds a token or a local path."""
    tokens = {get_token(), os.environ.get("HF_TOKEN")}
    tokens |= {value for name, value in os.environ.items() if re.search(r"(TOKEN|SECRET|PASSWORD|API_KEY)$", name)}
    secrets = {"a token or password": [token for token in tokens if token and len(token) >= 8]}
    secrets["a path of this machine"] = [path for path in {str(Path.home()), *private_paths} if len(path) > 1]
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            text = json.dumps(read_header(path))
        elif path.suffix in _TEXT:
            text = path.read_text(encoding="utf-8", errors="replace")
        else:
            continue
        for what, values in secrets.items():
            if any(value in text for value in values):
                raise ValueError(f"{path.relative_to(folder)} holds {what}, so nothing was published")
