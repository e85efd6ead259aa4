"""ICC profiles written byte by byte from published colorimetry, and what their colours are in sRGB, computed without a colour library."""

import struct

import numpy as np

# Primaries adapted to D50 (columns X, Y, Z of red, green, blue): Adobe RGB (1998) and Display P3, as Lindbloom and Apple's profiles give them.
ADOBE = np.array([[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]])
P3 = np.array([[0.51512, 0.24120, -0.00105], [0.29198, 0.69225, 0.04189], [0.15710, 0.06657, 0.78407]])
SRGB = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]])
D50 = (0.96420, 1.0, 0.82491)


def _s15(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(65536 * v)) for v in values)


def _profile(space: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    table, data, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, body in tags.items():
        body += bytes(-len(body) % 4)
        table += name + struct.pack(">II", offset + len(data), len(body))
        data += body
    size = offset + len(data)
    header = struct.pack(">I4sI4s4s4s", size, b"none", 0x02400000, kind, space, b"XYZ ") + struct.pack(
        ">6H", 2024, 1, 1, 0, 0, 0
    )
    header += b"acsp" + bytes(28) + _s15(*D50) + bytes(48)
    return header[:128] + struct.pack(">I", len(tags)) + table + data


def _text(text: bytes) -> bytes:
    return b"desc" + bytes(4) + struct.pack(">I", len(text) + 1) + text + bytes(1 + 4 + 4 + 2 + 1 + 67)


def _gamma(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma))


def _common(name: bytes, white: tuple[float, float, float] = D50) -> dict[bytes, bytes]:
    return {b"desc": _text(name), b"wtpt": b"XYZ " + bytes(4) + _s15(*white), b"cprt": b"text" + bytes(4) + b"none\0"}


def rgb(primaries: np.ndarray, gamma: float) -> bytes:
    """A profile of three primaries and one gamma."""
    colours = {
        name: b"XYZ " + bytes(4) + _s15(*xyz) for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)
    }
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _gamma(gamma))
    return _profile(b"RGB ", b"mntr", _common(b"three primaries") | colours | curves)


def gray(gamma: float, white: tuple[float, float, float] = D50) -> bytes:
    """A profile of a gray with this gamma, on paper of this white."""
    return _profile(b"GRAY", b"scnr", _common(b"a gray", white) | {b"kTRC": _gamma(gamma)})


def _encoded(linear: np.ndarray) -> np.ndarray:
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def rgb_in_srgb(values: np.ndarray, primaries: np.ndarray, gamma: float) -> np.ndarray:
    """Bytes [..., 3] of such a profile in sRGB's levels, as floats."""
    return _encoded((values / 255.0) ** gamma @ primaries @ np.linalg.inv(SRGB))


def gray_in_srgb(values: np.ndarray, gamma: float) -> np.ndarray:
    """Bytes of such a gray in sRGB's levels, as floats."""
    return _encoded((values / 255.0) ** gamma)
