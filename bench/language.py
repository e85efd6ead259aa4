"""The language model's forward and backward against transformers' Chameleon, its step against the machine, and how both grow.

348M parameters in float32, one sequence. The peer is eager, with PyTorch's fused attention (sdpa): its own default, and faster
than its attention written out. It is spared what training does not ask for: its mask over picture ids, and the copy of the
logits that its own loss makes.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.nn import functional as F

from bench import peers
from bench.ceilings import FLOPS, SIDE, sgemm
from bench.harness import GB, Bench, Row, Runs, in_turn, row, speed_row, working
from bench.step import of_first_step
from experiments.launching import processes
from lumina_fn import model, train
from lumina_fn.config import ModelConfig
from lumina_fn.costs import cost, footprint
from lumina_fn.costs.cost import Setup
from lumina_fn.gradients import Walk, block_pair, seams, walk
from lumina_fn.loss import Batch, predicted

CFG = ModelConfig(width=768, layers=12, heads=12, kv_heads=12, hidden=2048)
Z_WEIGHT = 1e-5


def batch_of(cfg: ModelConfig, tokens: int) -> Batch:
    ids = torch.randint(cfg.vocab, (1, tokens), generator=torch.Generator().manual_seed(1))
    return Batch(ids, ids)


def ours(cfg: ModelConfig, tokens: int, remat: bool) -> Bench:
    """Loss and gradients as the step has them, before AdamW."""
    params, batch, seam = model.init(cfg), batch_of(cfg, tokens), seams(None, None)
    pair, count = block_pair(cfg, compiled=True, keep_inputs=remat), predicted(batch.labels, cfg)
    run = lambda: walk(Walk(cfg, seam, pair, Z_WEIGHT, seam.scatter), params, batch, count)

    def check() -> list[float]:
        grads, terms = run()
        return _told(terms[0], grads.embed, grads.blocks[0].q, grads.blocks[-1].down, grads.head.unembed)

    return Bench(check, run)


def theirs(cfg: ModelConfig, tokens: int) -> Bench:
    module = peers.chameleon(model.init(cfg), cfg)
    ids = batch_of(cfg, tokens).tokens

    def run() -> torch.Tensor:
        module.zero_grad(set_to_none=True)
        logits = module.lm_head(module.model(input_ids=ids, use_cache=False).last_hidden_state)[0, :-1].float()
        loss = F.cross_entropy(logits, ids[0, 1:]) + Z_WEIGHT * logits.logsumexp(-1).square().mean()
        loss.backward()
        return loss.detach()

    def check() -> list[float]:
        loss, layers = run(), module.model.layers
        leaves = module.model.embed_tokens, layers[0].self_attn.q_proj, layers[-1].mlp.down_proj, module.lm_head
        return _told(loss, *(leaf.weight.grad for leaf in leaves))

    return Bench(check, run)


def _told(loss: torch.Tensor, *grads: torch.Tensor) -> list[float]:
    """The loss, each gradient's length, and some of its numbers as multiples of their root mean square."""
    told = [float(loss)]
    for grad in grads:
        length = grad.norm()
        some = grad.flatten()[:: max(1, grad.numel() // 97)] * (grad.numel() ** 0.5 / length)
        told += [float(length.log()), *some.tolist()]
    return told


def step(cfg: ModelConfig, tokens: int) -> Bench:
    """The whole step, its state written over."""
    run_step = train.make_train_step(cfg, train.AdamW(), compile="blocks", donate=True)
    state, batch = train.init_state(model.init(cfg), train.AdamW()), batch_of(cfg, tokens)

    def run() -> float:
        nonlocal state
        state, metrics = run_step(state, batch)
        return float(metrics["loss"])

    return Bench(lambda: [run()], run)


def flops(cfg: ModelConfig, tokens: int) -> int:
    """The model's FLOPs of a step, by the convention of lumina_fn.costs.cost."""
    return tokens * cost.flops(cfg, tokens)


def rows(quick: bool) -> Iterator[Row]:
    yield from training_rows(1024, {"cpu_ratio": ">= 1.4", "wall_ratio": ">= 1.45"}, None, 2 if quick else 5)
    if quick:
        return
    yield from training_rows(
        2048, {"cpu_ratio": ">= 1.4", "wall_ratio": ">= 1.45", "rss_ratio": ">= 2.38"},
        {"cpu_ratio": ">= 1.1", "wall_ratio": ">= 1.1", "rss_ratio": ">= 2.7"}, 3,
    )  # fmt: skip
    yield from step_rows(2048, 5)
    yield growth_row()


def training_rows(tokens: int, target: dict[str, str], of_remat: dict[str, str] | None, pairs: int) -> Iterator[Row]:
    sides = {"ours": (ours, CFG, tokens, False), "theirs": (theirs, CFG, tokens)}
    if of_remat:
        sides["remat"] = (ours, CFG, tokens, True)
    found = in_turn(sides, pairs)
    rate = lambda runs: {"tokens_per_cpu_s": tokens / runs.cpu, "tokens_per_s": tokens / runs.wall}
    yield speed_row(f"train_348m_t{tokens}", target, found["ours"], found["theirs"], measured=rate(found["ours"]))
    if of_remat:
        name = f"train_348m_t{tokens}_remat"
        yield speed_row(name, of_remat, found["remat"], found["theirs"], measured=rate(found["remat"]))


def step_rows(tokens: int, rounds: int) -> Iterator[Row]:
    """The whole step's memory against its state's, and its speed against a product's."""
    with working((step, CFG, tokens), (sgemm,)) as (ours, ceiling):
        ours.check()
        ceiling.check()
        samples, products = zip(*((ours.run(), ceiling.run()) for _ in range(rounds)), strict=True)
        runs, products = Runs(list(samples), ours.peak(), ours.imported), Runs(list(products), 0, 0)
    moments = footprint.memory(CFG, Setup(tokens=tokens, compiled=True))
    fullest = max(moments.values(), key=lambda labels: labels.total())
    state = (footprint.PARAMETERS, footprint.MOMENTS, footprint.GRADIENTS)
    activations = sum(size for label, size in fullest.items() if label not in state)
    weights = 4 * 4 * cost.parameters(CFG)
    above = runs.peak - runs.imported
    measured = {"peak_gb": above / GB, "weights_x4_gb": weights / GB, "activations_gb": activations / GB}
    yield row(
        "step_state", "peak memory above what is imported / (4 x weights + the activations of experiments.plan)",
        {"of_predicted": "<= 1.1"}, measured={"of_predicted": above / (weights + activations), **measured},
    )  # fmt: skip
    share = lambda of: (flops(CFG, tokens) / getattr(runs, of)) / (FLOPS / getattr(products, of))
    measured = {
        "gflops": flops(CFG, tokens) / runs.wall / 1e9, "sgemm_gflops": FLOPS / products.wall / 1e9,
        "wall_s": runs.wall, "cpu_s": runs.cpu, "model_tflop": flops(CFG, tokens) / 1e12,
    }  # fmt: skip
    yield row(
        "sgemm_fraction", f"the step's model FLOPs a second (causal attention) / those of a product of {SIDE} x {SIDE} matrices",
        {"of_product": ">= 0.76"}, measured={"of_product": share("cpu"), "of_product_wall": share("wall"), **measured},
    )  # fmt: skip


def growth_row() -> Row:
    """How time grows with tokens, compile time with layers, and memory with the vocabulary."""
    per_token, more = {}, {}
    for tokens in (512, 1024, 2048, 4096, 8192):
        with working((ours, CFG, tokens, False)) as [worker]:
            worker.check()
            per_token[str(tokens)] = worker.run().wall / tokens * 1e3
    tokens, small = 2048, replace(CFG, vocab=CFG.vocab // 8)
    for cfg in (small, CFG):
        with working((ours, cfg, tokens, False)) as [worker]:
            worker.check()
            more[cfg.vocab] = worker.peak() - 2 * 4 * cost.parameters(cfg)  # beside parameters and gradients
    logits = 4 * tokens * (CFG.vocab - small.vocab)
    few, many = (processes.run(1, of_first_step, layers)[0] for layers in (4, 32))
    return row(
        "growth", "the first step's time, 32 layers / 4", {"of_few_layers": "<= 1.3", "of_logits": "<= 0.5"},
        measured={
            "of_few_layers": many / few,
            "ms_per_token": per_token, "first_step_s": {"4": few, "32": many},
            "beside_parameters_gb": {str(vocab): size / GB for vocab, size in more.items()},
            "of_logits": (more[CFG.vocab] - more[small.vocab]) / logits,
        },
    )  # fmt: skip
