"""A model that is named as on the Hugging Face Hub: found in this machine's cache, and fetched only if the user says so."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from lumina_fn.errors import InputError, printable

Download = Annotated[
    bool,
    "fetch a model named OWNER/NAME or OWNER/NAME@REVISION from the Hugging Face Hub; without it this machine's cache alone is looked at",
]
# OWNER/NAME, a revision, and a file of the repository, such as ai-forever/MoVQGAN/movqgan_270M.ckpt.
_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*?)(?:@([\w.-]+))?((?:/[\w-][\w.-]*)*)")


def local(path: Path, download: bool = False) -> Path:
    """The folder or file on this machine that a path or a Hub's name stands for; a path that exists is itself.

    A folder of the Hub's cache (models--OWNER--NAME) stands for its main revision. Any other path that does not exist comes back as it
    is. Raises InputError for a name that is not in the cache, unless `download` is set, and for one that cannot be fetched.
    """
    if path.exists():
        return _main(path) if path.name.startswith("models--") else path
    name = _NAME.fullmatch(str(path))
    if name is None:
        return path
    repository, revision, inner = name[1], name[2], name[3].lstrip("/")
    try:
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise InputError(
            f"{path} does not exist here; to look for it in the Hub's cache: pip install 'lumina-fn[hub]'"
        ) from error
    try:
        found = huggingface_hub.snapshot_download(
            repository, revision=revision, local_files_only=not download, allow_patterns=[inner] if inner else None
        )
    except LocalEntryNotFoundError as error:
        at = f" --revision {revision}" if revision else ""
        raise InputError(
            f"{path} does not exist here, and no model {repository} is in the Hub's cache: give a folder, or --download to fetch it, "
            f"or run: hf download {' '.join(filter(None, (repository, inner)))}{at}"
        ) from error
    except Exception as error:  # of the network, or of the Hub: no such model, no right to read it
        raise InputError(
            printable(f"{path} cannot be fetched from the Hub: {str(error).splitlines()[0]:.300}")
        ) from error
    there = Path(found, inner)
    if not there.exists():
        raise InputError(f"{path}: {inner} is not in the cache's copy of {repository}; --download fetches it")
    return there


def here(run: Any, *names: str) -> Any:
    """The settings of a command with these paths as `local` finds them; `run.download` says whether they may be fetched."""
    given = {name: getattr(run, name) for name in names}
    return replace(
        run, **{name: local(path, getattr(run, "download", False)) for name, path in given.items() if path is not None}
    )


def _main(folder: Path) -> Path:
    """The snapshot of the main revision in a repository's folder of the Hub's cache."""
    snapshots = sorted((folder / "snapshots").glob("*"))
    main = [snapshot for snapshot in snapshots if snapshot.name == _text(folder / "refs" / "main")]
    if len(main or snapshots) != 1:
        raise InputError(
            f"{folder}: {len(snapshots)} revisions, and none of them is its main one; give one of its snapshots/REVISION"
        )
    return (main or snapshots)[0]


def _text(path: Path) -> str:
    from lumina_fn.disk import reading

    return reading.text(path, 1 << 10, "the name of a revision").strip() if path.exists() else ""
