"""Text to ids: the tokenizer in the model's folder, and the sentence around a caption."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers

from lumina_fn.disk import reading, untrusted_folder
from lumina_fn.errors import InputError
from lumina_fn.process import tokenizer_trial
from lumina_fn.process.ranges import LONGEST_CAPTION
from lumina_fn.state import runs
from lumina_fn.vocab import (
    END_TEXT,
    LUMINA_CODE0,
    LUMINA_CODES,
    LUMINA_END,
    LUMINA_NEWLINE,
    LUMINA_START,
    LUMINA_VOCAB,
    NEWLINE_TEXT,
    SEP_TEXT,
    START_TEXT,
    Ids,
    size_text,
)

LARGEST_SIZE = 99  # patches: `<reserved088NN>` has two digits
CONTROL = re.compile(r"<racm3:break>|<eoss>|<\|image\|>|<reserved\d{5}>")  # refused in any caption
PATCH = 32  # pixels
LARGEST_ID = 1 << 20  # far above any vocabulary; bounds the size of sets of ids


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a model's folder, with the special ids."""

    encode: Callable[[str], list[int]]  # adds no bos or eos
    bos: int
    eos: int
    ids: Ids
    sizes: frozenset[int]  # patches of 32 pixels that have a size token
    control: frozenset[int]  # ids that no caption may produce
    fingerprint: str  # hash of everything that determines the ids of a caption


def prompt_text(caption: str, width: int, height: int, with_size: bool) -> str:
    """The sentence that the model expects around a caption; `with_size` adds the picture's size in pixels."""
    size = f" of {width}x{height}" if with_size else ""
    return f"Generate an image{size} according to the following prompt:\n{caption}"


def prompt_ids(tokenizer: Tokenizer, caption: str, width: int, height: int, with_size: bool = True) -> list[int]:
    """The ids `[bos] enc(prompt + sep)` for a picture of width x height pixels; the image's `start` comes next."""
    return [tokenizer.bos, *tokenizer.encode(prompt_text(caption, width, height, with_size) + SEP_TEXT)]


def check_size(tokenizer: Tokenizer, width: int, height: int) -> None:
    """Raises InputError unless width and height (pixels) are multiples of 32 that have a size token."""
    for name, pixels in (("width", width), ("height", height)):
        if pixels % PATCH or pixels < PATCH:
            raise InputError(f"{name} {pixels}: expected a positive multiple of {PATCH} pixels")
        if pixels // PATCH not in tokenizer.sizes:
            raise InputError(
                f"{name} {pixels}: this model's tokenizer has no size token {size_text(pixels // PATCH)}; "
                f"its largest picture side is {PATCH * max(tokenizer.sizes)} pixels"
            )


def caption_problem(tokenizer: Tokenizer, caption: str, longest: int = LONGEST_CAPTION) -> str | None:
    """The reason why a caption cannot be used: more than `longest` characters, text of a control token, or no valid Unicode. None if
    it can be used."""
    if len(caption) > longest:  # first: the tokenizer takes minutes for 40 MB, and ends the process for 300
        return f"the prompt has {len(caption)} characters, more than {longest}"
    try:
        caption.encode()
    except UnicodeEncodeError:
        return "the prompt holds half of a surrogate pair, which is no Unicode text"
    if found := CONTROL.search(caption):
        return f"the prompt holds the control token {found[0]}"
    if hit := tokenizer.control.intersection(tokenizer.encode(caption)):
        return f"the prompt holds the text of a control token (id {min(hit)})"
    return None


def load_tokenizer(folder: str | Path, *, tried: bool = False) -> Tokenizer:
    """The tokenizer of a model folder, or of the model that a run began with, from tokenizer.json and tokenizer_config.json.

    tokenizer.json is first loaded in a process of its own (see tokenizer_trial), once for each content, unless the caller has done so (`tried`).

    Special ids are compared with `ids` in the folder's config.json, or with the released model's fixed ids if there are none
    or if the vocabulary is the released one. Raises InputError for a missing or different special token.
    """
    folder = Path(folder)
    saved = runs.checkpoint(folder)
    folder = saved.origin if saved else folder
    spec = _read_json(folder / "tokenizer.json")
    names = _read_json(folder / "tokenizer_config.json")
    config = _read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if saved:
        config = {"ids": saved.meta()["model"].get("ids"), "model": saved.meta()["model"]}
    text = json.dumps(spec)
    if not tried:
        with _library(f"{folder / 'tokenizer.json'}: not a tokenizer"):  # half of a surrogate pair, say
            data = text.encode()
        tokenizer_trial.check(data, folder / "tokenizer.json", tokenizer_trial.known_folder())
    with _library(f"{folder / 'tokenizer.json'}: not a tokenizer"):
        model = tokenizers.Tokenizer.from_str(text)
    model.no_truncation()
    model.no_padding()

    def encode(text: str) -> list[int]:
        with _library(f"{folder / 'tokenizer.json'}: {text!r:.80} cannot be encoded"):
            return model.encode(text, add_special_tokens=False).ids

    def special(text: str) -> int | None:
        """The id of a token, if the tokenizer finds it in running text: being in the vocabulary is not enough."""
        token = model.token_to_id(text)
        return token if encode(text) == [token] else None

    ids, sizes = _special_ids(special, config, folder)
    eos, bos = _named(model, names, "eos_token", folder), _named(model, names, "bos_token", folder)
    if eos is None:
        raise InputError(f"{folder / 'tokenizer_config.json'}: no eos_token; expected the name of a token")
    bos = eos if bos is None else bos
    unknown = spec.get("model", {}).get("unk_token")
    control = {t["id"] for t in spec.get("added_tokens") or [] if t["content"] != unknown}
    control |= {ids.start, ids.end, ids.newline, ids.sep, *(ids.size0 + n for n in sizes)}
    control |= set(range(ids.code0, ids.code0 + ids.codes))
    what = json.dumps([spec, bos, eos, asdict(ids)], sort_keys=True)
    return Tokenizer(
        encode=encode,
        bos=bos,
        eos=eos,
        ids=ids,
        sizes=sizes,
        control=frozenset(control),
        fingerprint=hashlib.sha256(what.encode()).hexdigest(),
    )


@contextmanager
def _library(what: str) -> Iterator[None]:
    """Turn errors of the tokenizers library into InputError: it raises Exception itself, and a BaseException where it panics."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what}: {error}") from error


def _read_json(path: Path) -> dict:
    rest = "" if path.exists() else untrusted_folder.completed_by(path.parent)
    return reading.json_object(path, f"a model folder with its tokenizer's files{rest}", tokenizer_trial.MAX_BYTES)


def _named(model: tokenizers.Tokenizer, names: dict, key: str, folder: Path) -> int | None:
    """The id of the token under `key` in tokenizer_config.json, a string or {"content": ...}; None if there is none."""
    token = names.get(key)
    text = token.get("content") if isinstance(token, dict) else token
    if text is None:
        return None
    found = None
    if isinstance(text, str):
        with suppress(UnicodeEncodeError):  # half of a surrogate pair: no token has it
            found = model.token_to_id(text)
    if found is None:
        raise InputError(f"{folder / 'tokenizer_config.json'}: {key} {text!r} is not in tokenizer.json")
    return found


def _special_ids(lookup: Callable[[str], int | None], config: dict, folder: Path) -> tuple[Ids, frozenset[int]]:
    """The model's ids, and the picture sides (in patches) that have a size token."""
    own, sizes = (value if isinstance(value, dict) else {} for value in (config.get("ids"), config.get("model")))
    expected = {
        "start": LUMINA_START,
        "end": LUMINA_END,
        "newline": LUMINA_NEWLINE,
        "code0": LUMINA_CODE0,
        "codes": LUMINA_CODES,
    }
    if config.get("vocab_size", sizes.get("vocab")) != LUMINA_VOCAB:
        expected |= own
    if not all(type(v) is int and 0 <= v <= LARGEST_ID for v in expected.values()):
        raise InputError(f"{folder / 'config.json'}: ids must be whole numbers up to {LARGEST_ID}, found {own}")

    path = folder / "tokenizer.json"
    found = {}
    for name, text in (("start", START_TEXT), ("end", END_TEXT), ("newline", NEWLINE_TEXT), ("sep", SEP_TEXT)):
        found[name] = lookup(text)
        wanted = expected.get(name)
        if found[name] is None or wanted not in (None, found[name]):
            have = "is missing" if found[name] is None else f"has id {found[name]}"
            want = "a token of that text" if wanted is None else f"id {wanted}"
            raise InputError(
                f"{path}: {text} {have}, expected {want}; is this the tokenizer of a Lumina-mGPT 2.0 model?"
            )
    at = {n: i for n in range(1, LARGEST_SIZE + 1) if (i := lookup(size_text(n))) is not None}
    if not at:
        raise InputError(f"{path}: {size_text(1)} and all other size tokens are missing")
    size0 = expected.get("size0", min(i - n for n, i in at.items()))
    for n, i in at.items():
        if i != size0 + n:
            raise InputError(
                f"{path}: {size_text(n)} has id {i}, expected id {size0 + n}: size tokens must follow each other"
            )
    ids = Ids(**found, size0=size0, code0=expected["code0"], codes=expected["codes"])
    return ids, frozenset(at)
