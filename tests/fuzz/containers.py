"""Files of tensors with other insides under lengths and checksums that are right, so that a reader looks at what is inside."""

import io
import random
import zipfile
from collections.abc import Sequence

import torch

from tests.fuzz import pickles
from tests.fuzz.mutate import mutated


def mutated_safetensors(seeds: Sequence[bytes], words: Sequence[str], pick: random.Random) -> bytes:
    """A safetensors file with another header, its length set right in most cases."""
    whole = pick.choice(seeds)
    length = int.from_bytes(whole[:8], "little")
    if pick.random() < 0.3:
        return mutated(seeds, pick)
    header = mutated([whole[8 : 8 + length]], pick, words, 0.8)
    said = len(header) if pick.random() < 0.95 else pick.choice((0, 1, 2**63, 2**64 - 1, 16 << 20, length))
    return said.to_bytes(8, "little") + header + whole[8 + length :]


def mutated_torch_file(seeds: Sequence[bytes], pick: random.Random) -> bytes:
    """A torch file with other bytes, or with another pickle under a right checksum."""
    whole = pick.choice(seeds)
    if pick.random() < 0.4:
        return mutated([whole], pick)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            body = old.read(info)
            if info.filename.endswith("data.pkl"):
                body = pickles.mutated_pickle([body], pick)
            elif pick.random() < 0.02:
                body = body[: pick.randrange(len(body) + 1)]
            new.writestr(info.filename, body)
            if pick.random() < 0.01:
                new.writestr(pick.choice(("x/data.pkl", "../../outside/new", "data/0", "/etc/new")), body)
    return out.getvalue() if pick.random() < 0.9 else mutated([out.getvalue()], pick)


def saved(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()
