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
# OWNER/NAME, a revision, and a file or folder of the repository, such as ai-forever/MoVQGAN/movqgan_270M.ckpt.
_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*?)(?:@(refs/[\w-]+/[\w.-]+|[\w.-]+))?((?:/[\w-][\w.-]*)*)")


def local(path: Path, download: bool = False) -> Path:
    """The folder or file on this machine that a path or a Hub's name stands for; a path that exists is itself.

    A repository's folder in the Hub's cache (models--OWNER--NAME) stands for its main revision. Any other path that does not exist comes
    back as it is. Raises InputError for a name that is not in the cache, unless `download` is set, and for one that cannot be fetched.
    """
    try:
        if path.exists():
            return _main(path) if _is_repository(path) else path
    except OSError:  # such as a name too long: who reads it reports that
        return path
    name = _NAME.fullmatch(str(path))
    if name is None:
        return path
    repository, revision, inner = name[1], name[2], name[3].lstrip("/")
    try:
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise InputError(
            f"{path} does not exist here; to look for it in the Hub's cache: pip install 'lumina-fn[hub]'"
        ) from error
    wanted = [inner, f"{inner}/*"] if inner else None
    at = f" --revision {revision}" if revision else ""
    files = inner and (f" {inner}" if Path(inner).suffix else f" --include '{inner}/*'")
    command = f"hf download {repository}{files}{at}"
    try:
        found = huggingface_hub.snapshot_download(
            repository, revision=revision, local_files_only=not download, allow_patterns=wanted
        )
    except HFValidationError:  # no name on the Hub can be like this
        return path
    except Exception as error:  # of the cache; of the network, or of the Hub: no such model, no right to read it
        if download:
            why = f"{str(error).splitlines()[0]:.300}" if str(error) else type(error).__name__
            raise InputError(printable(f"{path} cannot be fetched from the Hub: {why}")) from error
        if not isinstance(error, LocalEntryNotFoundError):
            raise InputError(printable(f"{path} cannot be looked up in the Hub's cache: {error!r:.300}")) from error
        if (partial := getattr(error, "snapshot_path", None)) is None:
            raise InputError(
                f"{path} does not exist here, nor in the Hub's cache: give a folder, or --download to fetch it, or run: {command}"
            ) from error
        found = partial  # a part of the repository may be all that is needed: who reads it says what is not there
    there = Path(found, inner)
    if not there.exists():
        raise InputError(
            f"{path}: {inner} is not in the cache's copy of {repository}: --download fetches it, or run: {command}"
            if not download
            else f"{path}: {repository} has no {inner}; look up its name on the Hub"
        )
    return there


def here(run: Any, *names: str) -> Any:
    """The settings of a command with these paths as `local` finds them; `run.download` says whether they may be fetched."""
    given = {name: getattr(run, name) for name in names}
    return replace(run, **{name: local(path, run.download) for name, path in given.items() if path is not None})


def _is_repository(path: Path) -> bool:
    """Whether a folder is a repository's in the Hub's cache, whatever its name: one may link to it."""
    return any((path / name).is_dir() for name in ("snapshots", "blobs")) and not (path / "config.json").exists()


def _main(folder: Path) -> Path:
    """The snapshot of the main revision in a repository's folder of the Hub's cache, or the only one where none is main."""
    from lumina_fn.disk import reading

    ref, snapshots = folder / "refs" / "main", sorted((folder / "snapshots").glob("*"))
    if ref.exists():
        main = reading.text(ref, 1 << 10, "the name of a revision").strip()
        snapshots = [snapshot for snapshot in snapshots if snapshot.name == main]
    if len(snapshots) == 1:
        return snapshots[0]
    name = folder.resolve().name.removeprefix("models--").replace("--", "/")
    raise InputError(
        printable(
            f"{folder} has {len(snapshots)} revisions, and none of them is its main one; give one of its snapshots/REVISION"
            if snapshots
            else f"{folder} has not the files of its main revision; fetch them: hf download {name}"
        )
    )
