"""What rows are read from: tables, captions beside pictures, tars and Parquet; and colour profiles in pictures."""

import io
import random
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import ImageCms

from experiments.pretokenizing import folder
from experiments.pretokenizing.rows import Recipe, prepare
from lumina_fn import data, prompt
from lumina_fn.errors import InputError
from lumina_fn.features import shards
from lumina_fn.rows import opened
from lumina_fn.rows.row import How, Item, Row
from tests.fuzz import pictures
from tests.fuzz.law import CANARY
from tests.fuzz.mutate import NUMBERS, WORDS, mutated
from tests.fuzz.playground import Format, Ground, roads
from tests.support import archives, colour_profiles, folders, odd
from tests.support.small_run import CODES


def _reader(at: Ground, source: Path, how: How = How()) -> Callable[[], object]:  # noqa: B008
    """Reads all rows, and pictures of the first ones, as pretokenize does."""
    model = at.outside.parent / "model"
    model.mkdir()
    ids = folders.write_tokenizer(model, CODES)
    tokenizer = prompt.load_tokenizer(model)
    origin = shards.Origin(64, 0, ids, tokenizer.fingerprint, "vq")
    secret = data.hashlib.sha256((at.outside / "secret.png").read_bytes()).digest()

    def read() -> object:
        found = opened.opened(source, how)
        folder.plan(found, origin, 1024)
        recipe = Recipe(found.roots, tokenizer, 64, 0)
        told = [prepare(i, item, recipe) for i, item in enumerate(found.items(range(min(found.count, 8)), True))]
        return [CANARY if getattr(t, "sha256", None) == secret else getattr(t, "reason", "") for t in told]

    return read


def table(at: Ground) -> Format:
    (at.folder / "linked").symlink_to(at.outside)
    (at.folder / "a.png").write_bytes(archives.drawn(0))
    words = [
        word.encode("utf-8", "surrogatepass")
        for word in (*WORDS, *roads(at, "secret.png"), '"', '""', ",", ";", "\r", "a.png")
    ]
    seeds = [
        b'file,prompt\na.png,a cat\na.png,"a, b ""c""\nd"\n\nlinked/secret.png,x\n',
        b"\xef\xbb\xbfimage;text;x\r\na.png;ein M\xc3\xa4nnchen;1\r\n",
        "file\tcaption\n../outside/secret.png\t猫\n".encode("utf-16"),
        b'file,prompt\na.png,"open\n' + b"b,c\n" * 40,
    ]

    def mutate(pick: random.Random) -> bytes:
        found = mutated(seeds, pick)
        for _ in range(pick.choice((0, 1, 2))):
            begin = pick.randrange(len(found) + 1)
            found = found[:begin] + pick.choice(words) + found[begin:]
        return found

    return Format(seeds, mutate, (at.folder / "data.csv").write_bytes, _reader(at, at.folder / "data.csv"))


def caption(at: Ground) -> Format:
    """A caption, of which the first byte says whether it is a file, or a link that leads outside."""
    (at.folder / "a.png").write_bytes(archives.drawn(0))
    file = at.folder / "a.txt"
    seeds = [
        b"\0a cat",
        "\0ein Männchen\r\n".encode(),
        b"\0" + "猫".encode("utf-16"),
        b"\0it\x92s",
        b"\0",
        b"\1",
        b"\0" + b"x" * (1 << 21),
    ]

    def place(content: bytes) -> None:
        file.unlink(missing_ok=True)
        if content[:1] == b"\1":
            file.symlink_to(at.outside / "secret.json")
        else:
            file.write_bytes(content[1:])

    return Format(seeds, lambda pick: mutated(seeds, pick), place, _reader(at, at.folder))


def tar(at: Ground) -> Format:
    names = [
        *roads(at, "secret.png"),
        "a.png",
        "a.txt",
        "a.json",
        "b.jpg",
        "x" * 300 + ".png",
        "._a.png",
        "é.png",
        "a.tar.png",
    ]
    kinds = [tarfile.REGTYPE] * 6 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME]  # fmt: skip

    def made(pick: random.Random, lawful: bool = False) -> bytes:
        """A tar whose headers are whole, with any names, kinds and sizes."""
        out = io.BytesIO()
        with tarfile.open(
            fileobj=out, mode="w", format=pick.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
        ) as archive:
            for i in range(pick.choice((1, 2, 4, 9))):
                content = (
                    archives.drawn(i) if i % 2 == 0 else pick.choice((b"a cat", b'{"caption": ["a", "b"]}', b"\x92"))
                )
                about = tarfile.TarInfo(f"{i // 2}.{'txt' if i % 2 else 'png'}" if lawful else pick.choice(names))
                about.type, about.linkname = (
                    (tarfile.REGTYPE if lawful else pick.choice(kinds)),
                    str(at.outside / "secret.png"),
                )
                about.size = len(content)
                if not lawful and pick.random() < 0.1:
                    about.size = pick.choice([n for n in NUMBERS if isinstance(n, int) and 0 <= n < 8**11])
                if not lawful and pick.random() < 0.1:
                    about.pax_headers = {
                        pick.choice(("path", "size", "GNU.sparse.map", "GNU.sparse.major", "x")): str(
                            pick.choice(NUMBERS)
                        )
                    }
                try:
                    header = about.tobuf(archive.format)
                except ValueError:  # a name that is too long for this kind of header
                    continue
                out.write(header + content + bytes(-len(content) % 512))
        return out.getvalue() + bytes(1024)

    seeds = [made(random.Random(i), lawful=True) for i in range(3)]
    mutate = lambda pick: made(pick) if pick.random() < 0.4 else mutated(seeds, pick)
    return Format(seeds, mutate, (at.folder / "x.tar").write_bytes, _reader(at, at.folder / "x.tar"))


def parquet(at: Ground) -> Format:
    import pyarrow
    from pyarrow.parquet import write_table

    (at.folder / "linked").symlink_to(at.outside)

    def made(columns: dict, **options: object) -> bytes:
        out = io.BytesIO()
        write_table(pyarrow.table(columns), out, row_group_size=2, **options)
        return out.getvalue()

    hub = archives.hub_columns(3)
    paths = {"file_name": roads(at, "secret.png"), "text": [["a", "b"]] * len(roads(at, "secret.png"))}
    seeds = [
        made(hub), made(hub, compression="NONE", use_dictionary=False), made(hub, compression="ZSTD", data_page_version="2.0"),
        made(paths, compression="GZIP"), made({"jpg": hub["image"][0]["bytes"] and [hub["image"][0]["bytes"]] * 5, "caption": ["x"] * 5}),
        made({"image": [bytes(1 << 22)] * 4, "text": ["zeros"] * 4}),
    ]  # fmt: skip

    def mutate(pick: random.Random) -> bytes:
        """Mostly the footer, which says where everything is."""
        seed = pick.choice(seeds)
        at_footer = len(seed) - 8 - int.from_bytes(seed[-8:-4], "little")
        if pick.random() < 0.5:
            footer = mutated([seed[at_footer:-8]], pick)
            return seed[:at_footer] + footer + len(footer).to_bytes(4, "little") + b"PAR1"
        if pick.random() < 0.5:
            return mutated([seed[:at_footer]], pick)[:at_footer].ljust(at_footer, b"\0") + seed[at_footer:]
        return mutated(seeds, pick)

    return Format(seeds, mutate, (at.folder / "x.parquet").write_bytes, _reader(at, at.folder / "x.parquet"))


def profile(at: Ground) -> Format:
    """A colour profile in a picture of some format, which its first byte chooses."""
    folders.write_tokenizer(at.folder, CODES)
    recipe = Recipe([at.folder], prompt.load_tokenizer(at.folder), 64, 0)
    rgb = pictures.colours()
    profiles = [
        colour_profiles.rgb(colour_profiles.ADOBE, 2.2),
        colour_profiles.gray(1.8),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
    ]
    seeds = [bytes([i]) + content for i in range(6) for content in profiles]

    def with_profile(form: str, mode: str = "RGB") -> Callable[[bytes], bytes]:
        def saved(content: bytes) -> bytes:
            out = io.BytesIO()
            rgb.convert(mode).save(out, form, icc_profile=content)
            return out.getvalue()

        return saved

    forms = [
        with_profile("PNG"),
        with_profile("PNG", "L"),
        with_profile("JPEG"),
        with_profile("TIFF"),
        partial(odd.bmp_with_profile, rgb),
        partial(odd.jp2_with_profile, rgb),
    ]

    def place(content: bytes) -> None:
        (at.folder / "x").write_bytes(forms[content[0] % len(forms) if content else 0](content[1:] or b"0"))

    def read() -> object:
        told = prepare(0, Item(Row("x", "a picture"), None), recipe)
        if isinstance(told, shards.Rejected):
            raise InputError(told.reason)
        return told.notes

    return Format(seeds, lambda pick: mutated(seeds, pick), place, read)
