"""Files about heads on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..files import json_text
from ..version import __version__


# The file that a head set has in a folder or a Hub repository, that of an adapter included.
HEADS_NAME = "p2d_heads.json"
# The file beside it with the scores that the heads were chosen by.
HEAD_SCORES_NAME = "p2d_head_scores.json"


def find_file(name_or_path: str | Path, filename: str, subfolder: str | None, hub_kwargs: dict[str, Any]) -> Path:
    """
    Find a file in a folder or, if there is no such folder, in a Hub repository, from where it is downloaded.

    Args:
        name_or_path (`str` or `Path`): The folder or the repository's id.
        filename (`str`): The file.
        subfolder (`str`, *optional*): Where in the folder or the repository the file is.
        hub_kwargs (`dict[str, Any]`): Goes to [`~huggingface_hub.hf_hub_download`].

    Raises:
        `ValueError`: if `subfolder` leads out of the folder.
        `FileNotFoundError`: if the folder or the repository has no such file. What the Hub says otherwise (no such
            repository or revision, no access, no connection) is raised as it is.
    """
    if subfolder is not None and ".." in Path(subfolder).parts:
        raise ValueError(f"`subfolder`='{subfolder}' leads out of '{name_or_path}'; name that folder itself.")
    path = Path(name_or_path, subfolder or "", filename)
    if path.is_file():
        return path
    missing = f"'{name_or_path}' has no '{f'{subfolder}/' if subfolder else ''}{filename}'"
    if Path(name_or_path).is_dir():
        raise FileNotFoundError(f"The folder {missing}.")
    try:
        return Path(
            hf_hub_download(
                str(name_or_path),
                filename,
                subfolder=subfolder,
                library_name="p2d_peft",
                library_version=__version__,
                **hub_kwargs,
            )
        )
    except LocalEntryNotFoundError:  # no connection: the repository may well have it
        raise
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"The Hub repository {missing}.") from error


def push_json(
    data: Any, filename: str, repo_id: str, *, private: bool | None, token: str | bool | None, **upload_kwargs: Any
) -> CommitInfo:
    """
    Upload plain JSON types as a file to a model repository of the Hub, which is made if there is none. What else is given
    goes to [`~huggingface_hub.HfApi.upload_file`].
    """
    api = HfApi(token=token, library_name="p2d_peft", library_version=__version__)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_file(
        path_or_fileobj=json_text(data).encode(),
        path_in_repo=filename,
        repo_id=repo_id,
        **upload_kwargs,
    )
