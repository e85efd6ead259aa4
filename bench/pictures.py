"""MoVQGAN's encoder and decoder, 270M, against diffusers' VQModel with spatial norms and the same weights."""

from collections.abc import Iterator

import torch

from bench import peers
from bench.harness import Bench, Row, Runs, in_turn, speed_row, speeds
from lumina_fn import vq
from lumina_fn.config import MOVQGAN_270M

CFG = MOVQGAN_270M
LIMIT = "1.08 GB of weights and activations of 268 MB at 512 px, of which a block holds three, are most of both sides' memory"


def pictures(side: int, count: int) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1


def codes(side: int, count: int) -> torch.Tensor:
    cells = side // CFG.downsampling
    return torch.randint(CFG.codes, (count, cells, cells), generator=torch.Generator().manual_seed(4))


def our_encoder(side: int, count: int) -> Bench:
    params, given = vq.init(CFG), pictures(side, count)
    run = torch.no_grad()(lambda: vq.encode(params, given, CFG))
    return Bench(lambda: _some(torch.no_grad()(vq.latent)(params, given[:1], CFG)), run)


def their_encoder(side: int, count: int) -> Bench:
    module, given = peers.movq(vq.init(CFG), CFG), pictures(side, count)
    run = torch.no_grad()(lambda: module.quantize(module.encode(given).latents)[2][2])
    return Bench(lambda: _some(torch.no_grad()(module.encode)(given[:1]).latents), run)


def our_decoder(side: int, count: int) -> Bench:
    params, given = vq.init(CFG), codes(side, count)
    draw = torch.no_grad()(lambda of: vq.decode(params, of, CFG))
    return Bench(lambda: _some(draw(given[:1])), lambda: draw(given))


def their_decoder(side: int, count: int) -> Bench:
    module, given = peers.movq(vq.init(CFG), CFG), codes(side, count)

    @torch.no_grad()
    def draw(of: torch.Tensor) -> torch.Tensor:
        quantized = module.quantize.get_codebook_entry(of.flatten(), (*of.shape, CFG.embed))
        return module.decode(quantized, force_not_quantize=True).sample

    return Bench(lambda: _some(draw(given[:1])), lambda: draw(given))


def _some(x: torch.Tensor) -> list[float]:
    return x.flatten()[:: max(1, x.numel() // 499)].tolist()


def rows(quick: bool) -> Iterator[Row]:
    """One picture at a time, and four at once, which quick leaves out."""
    for side, pairs in ((256, 1),) if quick else ((256, 2), (512, 1)):
        for what, sides in (("encode", (our_encoder, their_encoder)), ("decode", (our_decoder, their_decoder))):
            one = _compared(sides, side, 1, pairs)
            target = {"wall_ratio": ">= 1.08", "rss_ratio": ">= 1.25"}
            measured = {"pictures_per_s": 1 / one[0].wall}
            if not quick:
                four = _compared(sides, side, 4, 1)
                wall, cpu = speeds(*four)
                target |= {"wall_ratio_of_4": ">= 1.08", "rss_ratio_of_4": ">= 1.25"}
                measured |= {
                    "pictures_per_s_of_4": 4 / four[0].wall, "cpu_ratio_of_4": cpu.median, "wall_ratio_of_4": wall.median,
                    "rss_ratio_of_4": four[1].peak / four[0].peak,
                }  # fmt: skip
            yield speed_row(f"vq_{what}_{side}", target, *one, measured=measured, limit=LIMIT if side == 512 else "")


def _compared(sides: tuple, side: int, count: int, pairs: int) -> tuple[Runs, Runs]:
    found = in_turn(dict(zip(("ours", "theirs"), ((fn, side, count) for fn in sides), strict=True)), pairs)
    return found["ours"], found["theirs"]
