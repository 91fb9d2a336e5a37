"""Upload a model to the Hugging Face hub: `Model.push_to_hub`. Needs the extra `hub`.

One commit holds the whole model, so that no reader ever sees half of one: parts of an earlier model that the new one
does not have are removed in it.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from scldm.api.arguments import Arguments
from scldm.api.hub.download import COMMIT, INDEX, REPOSITORY, SCHEME, client, reason
from scldm.api.hub.model_card import UNKNOWN_LICENCE, DescribedModel
from scldm.api.hub.pretrained import PARTS, write_pretrained
from scldm.errors import CheckpointError

OTHERS = (".gitattributes", "README.md")  # files of a repository that the hub or a person made
LICENCE_LINE = re.compile(r"^license: *(.+?) *$", re.MULTILINE)


def push(
    model: DescribedModel, repository: Any, *, revision: Any = None, private: Any = None, token: Any = None,
    commit_message: Any = None,
) -> str:  # fmt: skip
    """Upload a model; return its name with the commit, `hf://org/name@<commit>`.

    Raises:
        ArgumentError: Arguments cannot be used; all are listed.
        CheckpointError: The repository holds something else, or the hub refuses; nothing was committed.
    """
    given = Arguments()
    check_arguments(given, repository, revision, private, token, commit_message)
    given.raise_problems()
    api = client()
    try:
        with tempfile.TemporaryDirectory(prefix="scldm-push-") as place:
            folder = write_pretrained(model, Path(place) / "model", title=repository)
            return _upload(api, folder, repository, revision, private, token, commit_message)
    except CheckpointError:
        raise
    except Exception as error:  # of the client library, of its HTTP library, or of the system
        raise CheckpointError(f"{repository} cannot be written ({reason(error)})") from error


def check_arguments(given: Arguments, repository: Any, revision: Any, private: Any, token: Any, message: Any) -> None:
    """Collect problems of the arguments of `push_to_hub`."""
    if not isinstance(repository, str) or not re.fullmatch(REPOSITORY, repository):
        given.problems.append(f"repository must be 'org/name' or 'user/name'; got {repository!r}")
    if isinstance(revision, str) and re.fullmatch(COMMIT, revision):
        given.problems.append(f"revision is the branch that is written to, and {revision} is a commit")
    given.text("revision", revision)
    given.text("commit_message", message)
    if private is not None:
        given.flag("private", private)
    if not isinstance(token, (str, bool, type(None))):
        given.problems.append(f"token must be a text, True, False or None; got a {type(token).__name__}")


def _upload(
    api: Any, folder: Path, repository: str, revision: str | None, private: bool | None, token: Any, message: str | None
) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api.create_repo(repository, private=private, exist_ok=True, token=token)
    if revision is not None:
        api.create_branch(repository, branch=revision, exist_ok=True, token=token)
    there = set(api.list_repo_files(repository, revision=revision, token=token))
    if INDEX not in there and (foreign := sorted(there - set(OTHERS))):
        raise CheckpointError(
            f"{repository} holds {', '.join(foreign[:3])} and no model of scldm, and is left as it is: push to "
            "another name"
        )
    if "README.md" in there:
        _keep_licence(
            folder / "README.md", Path(api.hf_hub_download(repository, "README.md", revision=revision, token=token))
        )
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    gone = [name for name in sorted(there - set(files)) if name.split("/")[0] in PARTS or name == "evaluation.json"]
    operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    operations += [CommitOperationDelete(name) for name in gone]
    done = api.create_commit(
        repository, operations, revision=revision, token=token, commit_message=message or "Upload a model of scldm"
    )
    return f"{SCHEME}{repository}@{done.oid}"


def _keep_licence(card: Path, earlier: Path) -> None:
    """Take over the licence that a person stated in the head of an earlier card."""
    stated = LICENCE_LINE.search(earlier.read_text(errors="replace").split("\n---", 1)[0])
    if stated is not None:
        card.write_text(card.read_text().replace(f"license: {UNKNOWN_LICENCE}\n", f"license: {stated[1]}\n", 1))
