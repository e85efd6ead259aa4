"""The sizes of a MoVQGAN: checks, and inference from its tensors."""

from collections.abc import Mapping
from pathlib import Path

from lumina_fn.config import VQConfig
from lumina_fn.errors import InputError, listed
from lumina_fn.formats.hf_config import LARGEST


def whole(values: object, least: int) -> bool:
    """Whether the value is a tuple of whole numbers from `least` to LARGEST."""
    return type(values) is tuple and all(type(i) is int and least <= i <= LARGEST for i in values)


def problems(sizes: Mapping) -> list[str]:
    """What is wrong with a VQConfig's sizes."""
    lists = {"multipliers": 1, "attn_levels": 0}
    wrong = [
        f"{name} must be a list of whole numbers" for name, least in lists.items() if not whole(sizes[name], least)
    ]
    wrong += [f"{n} must be a positive whole number" for n, v in sizes.items() if n not in lists and not whole((v,), 1)]
    if not wrong and not sizes["multipliers"]:
        wrong.append("multipliers must not be empty")
    if not wrong and sizes["channels"] * max(sizes["multipliers"]) > LARGEST:
        wrong.append(f"channels times multipliers must not exceed {LARGEST}")
    if not wrong and any(sizes["channels"] * m % sizes["groups"] for m in sizes["multipliers"]):
        wrong.append(f"channels must be divisible by the {sizes['groups']} groups of the norms")
    return wrong


def of_shapes(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> VQConfig:
    """The sizes inferred from a MoVQGAN's tensors; the number of groups cannot be inferred and is the reference's 32."""
    count = lambda pattern: next(i for i in range(len(shapes) + 1) if pattern.format(i) not in shapes)
    levels = max(1, count("encoder.down.{}.block.0.conv1.weight"))
    first = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(levels)]
    tell = ("encoder.conv_in.weight", "encoder.conv_out.weight", "quant_conv.weight", "quantize.embedding.weight")
    if missing := [key for key in (*tell, *first) if len(shapes.get(key, ())) < 2]:
        raise InputError(
            f"{file} is no MoVQGAN: tensors that tell its sizes are missing or misshapen: {listed(missing)}"
        )
    channels = max(1, shapes[tell[0]][0])
    sizes = {
        "channels": channels,
        "multipliers": tuple(max(1, shapes[key][0] // channels) for key in first),
        "res_blocks": count("encoder.down.0.block.{}.conv1.weight"),
        "attn_levels": tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in shapes),
        "latent": shapes[tell[1]][0], "embed": shapes[tell[2]][0], "codes": shapes[tell[3]][0], "groups": 32,
    }  # fmt: skip
    if wrong := problems(sizes):
        raise InputError(f"{file} is no MoVQGAN, as its tensors tell: {'; '.join(wrong)}")
    return VQConfig(**sizes)
