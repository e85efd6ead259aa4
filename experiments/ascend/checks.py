"""The checks of `experiments.npu_check`, and the lines that report them."""

import importlib.util
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.utils._pytree as pytree
from torch import Tensor

import ops  # noqa: F401  (it registers torch.ops.lumina)
from experiments import devices
from experiments.launching import processes
from kernels import benchmark, cases, npu
from lumina_fn import decode, model, train
from lumina_fn.config import ModelConfig
from lumina_fn.programs import graphs
from lumina_fn.train import Batch, Packed
from ops import collectives

CFG = ModelConfig(vocab=96, width=128, layers=2, heads=2, kv_heads=1, hidden=96, max_positions=64, masked_ids=(7, 11))
OPT = train.AdamW(lr=1e-3, decay=0.1, clip=1.0)
B, T, SLOTS = 2, 12, 16
WAIT = timedelta(minutes=5)  # limit of a wait for the other device


class Check(NamedTuple):
    """A check and its name."""

    name: str
    run: Callable[[], None]  # raises where something is wrong


class Wrong(Exception):
    """What was found, and what was expected."""


def run(checks: Sequence[Check], say: Callable[[str], None] = print) -> int:
    """Run the checks and print a line for each; returns the number that failed. Any error fails its check and stops no other."""
    failed = 0
    for name, check in checks:
        try:
            check()
            say(f"{name}: ok")
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            say(f"{name}: FAILED: {reason if isinstance(error, Wrong) else f'{type(error).__name__}: {reason}'}")
            failed += 1
    say(f"rung 7: RAN {len(checks)} checks, {failed} FAILED")
    return failed


def of_ops(device: torch.device) -> list[Check]:
    """Checks of every op in every dtype that the device takes."""
    sides = {"registered": torch.ops.lumina}
    if npu.triton_ascend():
        sides["triton"] = benchmark.triton_kernels()
    return [
        Check(f"{op}, {str(dtype).removeprefix('torch.')}, {side}", partial(_op, case, kernels, dtype, device))
        for side, kernels in sides.items()
        for op, case in cases.cases(cases.SIZES["tiny"]).items()
        for dtype in case.dtypes
        if all(hasattr(kernels, call.kernel) for call in case.calls)
    ]


def _op(case: cases.Case, kernels: Any, dtype: torch.dtype, device: torch.device) -> None:
    results = case.run(kernels, case.inputs(dtype, device))
    for got, wanted in zip(results, cases.expected(case, dtype), strict=True):
        for output, found, eager, bound in cases.errors(got, wanted):
            _within(output, found, eager, bound)


def _within(what: str, found: float, eager: float, bound: float) -> None:
    if not found <= bound:
        raise Wrong(f"{what}: off by {found:.1e}, expected at most {bound:.1e} (the CPU's is off by {eager:.1e})")


def of_the_model(device: torch.device) -> list[Check]:
    """Checks of training steps of all kinds, and of decoding."""
    float32, bfloat16 = torch.float32, torch.bfloat16
    kinds = {
        "a step": (batch(), float32, {}),
        "a step with packed documents": (batch(packed=True), float32, {}),
        "a step with remat": (batch(), float32, {"remat": True}),
        "a step that donates its state": (batch(), float32, {"donate": True}),
        "a step in bfloat16": (batch(), bfloat16, {"dtype": bfloat16}),
        "a step in bfloat16 with packed documents": (batch(packed=True), bfloat16, {"dtype": bfloat16}),
    }
    steps = [
        Check(name, partial(_same, partial(_stepped, options, rows), dtype, float32, device))
        for name, (rows, dtype, options) in kinds.items()
    ]
    decodings = [
        Check(f"decoding, {str(dtype).removeprefix('torch.')}", partial(_same, _decoded, dtype, dtype, device))
        for dtype in (float32, bfloat16)
    ]
    return [*steps, *decodings]


def params() -> model.Params:
    """Random parameters, whose gains and biases are not 1 and 0."""
    generator = torch.Generator().manual_seed(0)
    return pytree.tree_map(lambda x: x + 0.02 * torch.randn(x.shape, generator=generator), model.init(CFG))


def batch(packed: bool = False) -> Batch | Packed:
    """Random tokens and labels, as rows or as packed documents."""
    tokens, labels = torch.randint(12, CFG.vocab, (2, B, T), generator=torch.Generator().manual_seed(1))
    labels[0, :3] = -100
    return Packed(tokens, labels, torch.tensor([[0] * 5 + [5] * 7, [0] * T])) if packed else Batch(tokens, labels)


def _on(device: torch.device | str, tree: Any, dtype: torch.dtype | None = None) -> Any:
    """The tree copied to the device: copied, since a donated state is overwritten."""
    return pytree.tree_map(lambda x: x.to(device, dtype if x.is_floating_point() else None, copy=True), tree)


def _stepped(options: dict[str, Any], rows: Batch | Packed, params: model.Params, exact: bool) -> dict[str, Any]:
    """The loss and the moments after a step. Its parameters are left out: AdamW's first step magnifies the rounding of tiny gradients."""
    device = params.embed.device
    options = {name: value for name, value in options.items() if not (exact and name == "dtype")}
    state, metrics = train.make_train_step(CFG, OPT, **options)(train.init_state(params, OPT), _on(device, rows))
    return {"loss": metrics["loss"], "gradients": state.mu, "their squares": state.nu}


def _decoded(params: model.Params, exact: bool) -> dict[str, Any]:
    """The results of decoding: prompts of two lengths, then twice one more token in each row."""
    device = params.embed.device
    ids = lambda *some: torch.tensor(some, device=device)
    cache = decode.empty_cache(params, CFG, 2, SLOTS)
    prefilled = decode.prefill(params, [ids(13, 14, 15), ids(16, 17, 18, 19, 20)], cache, CFG)
    extended = decode.extend(params, ids([17], [19]), [3, 5], cache, CFG)
    logits, cache = decode.step(params, ids(21, 22), ids(4, 6), cache, CFG)
    visible = [i for i in range(CFG.vocab) if i not in CFG.masked_ids]
    return {"prefill": prefilled, "extend": extended, "logits": logits[:, visible], "cache": cache}


def _same(
    make: Callable[[model.Params, bool], dict[str, Any]], dtype: torch.dtype, of_params: torch.dtype, device: torch.device
) -> None:  # fmt: skip
    """Raises Wrong unless the device's result is as near to float64 as the CPU's in this dtype; `of_params` is the parameters' dtype."""
    given = _on("cpu", params(), of_params)
    found = _on("cpu", make(_on(device, given), False))
    _nearby(found, make(_on("cpu", given), False), make(_on("cpu", given, torch.float64), True), dtype)


def _nearby(found: Any, eager: Any, exact: Any, dtype: torch.dtype) -> None:
    """Raises Wrong unless every leaf of `found` is off from `exact` by at most twice the distance of `eager`, plus one rounding.

    For a bias of few numbers the distance of `eager` may be small by chance, so the median over the output's leaves counts if larger.
    """
    far = lambda x, true: ((x.double() - true).norm() / true.norm()).item()
    for output, tree in exact.items():
        paths, _ = pytree.tree_flatten_with_path(tree)
        trees = map(pytree.tree_leaves, (found[output], eager[output]))
        off = [(path, far(got, true), far(other, true)) for (path, true), got, other in zip(paths, *trees, strict=True)]
        usual = statistics.median(other for _, _, other in off)
        for path, got, other in off:
            name = output + pytree.keystr(path)
            _within(name, got, other, 2 * max(other, usual) + torch.finfo(dtype).eps)


def of_the_graph(device: torch.device) -> list[Check]:
    """Checks of exported steps, compiled as a whole."""
    return [
        Check(f"the exported step{' with packed documents' * packed}, compiled", partial(_compiled, device, packed))
        for packed in (False, True)
    ]


def _compiled(device: torch.device, packed: bool) -> None:
    from kernels import ascend_graph  # only where torch_npu is installed

    function = graphs.step(CFG, OPT, batch=B, tokens=T, dtype=torch.float32, packed=packed)
    state, rows = train.init_state(params(), OPT), batch(packed)
    inputs = graphs.StepInputs(state, rows, torch.tensor(OPT.lr))
    found = ascend_graph.compiled(graphs.export(function, graphs.NPU).program)(*_leaves(device, inputs))
    told = lambda made: {"loss": made["metrics"]["loss"], "mu": made["state"].mu, "nu": made["state"].nu}
    eager = _on("cpu", function.fn(*_on(device, inputs)))
    found = pytree.tree_unflatten(_on("cpu", list(found)), pytree.tree_structure(eager))
    exact = function.fn(*_on("cpu", inputs, torch.float64))
    _nearby(told(found), told(eager), told(exact), torch.float32)


def _leaves(device: torch.device, tree: Any) -> list[Tensor]:
    return pytree.tree_leaves(_on(device, tree))


def of_two_devices(kind: str) -> list[Check]:
    """Checks of collectives of two ranks, each with a device of its own."""
    return [Check("collectives of 2 ranks", partial(_together, kind, 2))]


def of_a_restart(kind: str, ranks: int, pause: float = devices.LET_GO) -> list[Check]:
    """Checks of ranks on devices whose last processes were killed `pause` seconds before, as torchrun --max-restarts starts them."""
    return [Check(f"{ranks} ranks, {pause:g} s after others were killed", partial(_again, kind, ranks, pause))]


def _together(kind: str, ranks: int) -> None:
    if faults := [fault for some in processes.run(ranks, collectives_faults, kind) for fault in some]:
        raise Wrong("; ".join(faults))


def _again(kind: str, ranks: int, pause: float) -> None:
    try:
        processes.run(ranks, killed, kind)
    except mp.ProcessExitedException as ended:
        if ended.exit_code != -signal.SIGKILL:
            raise
    time.sleep(pause)
    _together(kind, ranks)


def killed(rank: int, size: int, kind: str) -> None:
    """Use a device together with the other ranks, then die at once, as by kill -9."""
    collectives_faults(rank, size, kind)
    time.sleep(1)  # until the others are through, so that none fails before it is killed
    os.kill(os.getpid(), signal.SIGKILL)


def collectives_faults(rank: int, size: int, kind: str) -> list[str]:
    """A line for each collective with a wrong result on this rank."""
    device = torch.device(kind, rank) if kind != "cpu" else torch.device(kind)
    if kind != "cpu":
        torch.accelerator.set_device_index(rank)
    whole = dist.new_group(backend=dist.get_default_backend_for_device(device), timeout=WAIT)
    group = whole.group_name, size
    part = lambda r: torch.arange(6.0) + 10 * r
    own, total = part(rank).to(device), sum(part(r) for r in range(size))
    pairs = {
        "all_gather": (collectives.all_gather(own, group), torch.cat([part(r) for r in range(size)])),
        "reduce_scatter": (collectives.reduce_scatter(own, group), total.chunk(size)[rank]),
        "all_reduce": (collectives.all_reduce(own, group), total),
    }
    return [
        f"{name} on rank {rank}: {got.tolist()}, expected {wanted.tolist()}"
        for name, (got, wanted) in pairs.items()
        if not torch.equal(got.cpu(), wanted)
    ]


def missing() -> str | None:
    """The reason why nothing can be checked here; None if there is an NPU."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is not None and found.type == "npu" else "no NPU is available"


def checks() -> Iterator[Check]:
    """All checks on this machine's NPUs; prints a line if there is only one and collectives are skipped."""
    device = torch.device("npu", torch.accelerator.current_device_index())
    yield from (*of_ops(device), *of_the_model(device), *of_the_graph(device))
    yield from of_a_restart("npu", min(2, torch.accelerator.device_count()))
    if torch.accelerator.device_count() >= 2:
        yield from of_two_devices("npu")
    else:
        print("collectives: SKIPPED: one NPU is here, and they need two")
