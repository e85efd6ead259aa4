"""Commands of this project, made from the values in the MindSpeed-MM guide's files."""

import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from experiments.migration import field_rules
from experiments.migration.expansion import Open
from experiments.migration.field_rules import DTYPES, Line, refuse, same
from lumina_fn.features import foreign
from lumina_fn.formats import mindspeed

PROMPT = "a lighthouse at dusk"
TOOLS = "mindspeed_mm/tools/tools.json"
_NUMBER = re.compile("[0-9]+")
_ADDRESS = re.compile("[A-Za-z0-9][A-Za-z0-9.:_-]*")


class Variable(str):
    """A word of a shell that takes a variable's value when commands.sh runs. Its text is made here, of names alone."""

    __slots__ = ()


class Command(NamedTuple):
    """A command of commands.sh, with what it does and its environment variables."""

    what: str
    environment: dict[str, str]
    words: list[str]
    active: bool = True  # False: written as a comment


def make(
    folders: tuple[Path, Path], found: dict[str, dict[str, Any]], environments: list[dict[str, str]], lines: list[Line]
) -> list[Command]:
    """The equivalent commands, in their order; appends notes and refusals to `lines`. `folders` are those that the extraction and the
    training work in.

    Raises KeyError for a missing field that is required, ValueError or TypeError for a value that cannot be used.
    """
    at, at_training = (lambda value, folder=folder: os.path.normpath(folder / value) for folder in folders)
    basic, mapped = "dataset_param.basic_parameters.data_config.path", found["pretrain.sh flags"]
    data, vq = (
        at(found["feature_extract/data.json"][basic]),
        at(found["feature_extract/model.json"]["ae.from_pretrained"]),
    )
    model = at(found["feature_extract/data.json"]["dataset_param.tokenizer_config.from_pretrained"])
    size = _whole(found["feature_extract/data.json"]["dataset_param.preprocess_parameters.target_size"])
    theirs = Path(at_training(found["feature_data.json"][basic])).parent
    if found[TOOLS]:
        extracted = at(found[TOOLS]["sorafeature.save_path"])
    else:
        extracted = str(theirs)
        lines.append(Line(TOOLS, "sorafeature.save_path", "", "note", f"no such file: features go to where feature_data.json reads them, {extracted}"))  # fmt: skip
    load, out = at_training(mapped["--load"]), _fresh(at_training(mapped["--save"]))
    for what, path in (
        ("DATA.json", data),
        ("the MoVQGAN", vq),
        ("the Hugging Face folder", model),
        ("the weights", load),
    ):
        if not Path(path).exists():
            lines.append(Line(what, "path", path, "note", "is not there (yet)"))
    if (Path(load) / mindspeed.ITERATION).is_file() and not (Path(load) / "release").is_dir():
        lines.append(
            Line("pretrain.sh", "--load", load, "note", "a run's own checkpoint: weights only, steps count from 0")
        )
    have = bool(theirs.is_dir() and foreign.indexes(theirs))
    if not have and str(theirs) != extracted:
        refuse(lines, "feature_data.json", basic, theirs, f"tools.json has features written to {extracted}, and there are none here: name one folder in both")  # fmt: skip
    features = _fresh(str(theirs))
    devices = [_devices(found[f"{name} launch"]) for name in ("feature_extraction.sh", "pretrain.sh")]
    pretokenize = ["-m", "experiments.pretokenize", data, features, "--model", model, "--vq", vq, "--size", str(size), "--image-root", str(folders[0])]  # fmt: skip
    run = ["--model", load, "--features", features, "--out", out, *_training(found, devices[1], lines)]
    migrate = ["python", "-m", "experiments.migrate", str(theirs), "--out", features, "--model", model, "--size", str(size)]  # fmt: skip
    commands = [Command("the features that were extracted already", {}, migrate)] if have else []
    commands += [
        Command("features from the pictures", environments[0], _launched(pretokenize, devices[0]), active=not have),
        _finetune(run, devices[1], environments[1]),
    ]
    if load != model:
        beside = [f"{model}/tokenizer.json", f"{model}/tokenizer_config.json"]
        commands.append(Command("the converted weights came without their tokenizer", {}, ["cp", *beside, f"{out}/model/"]))  # fmt: skip
    tuned, side = f"{out}/model", str(size)
    commands += [
        Command("pictures", environments[1], ["python", "-m", "experiments.sample", "--model", tuned, "--vq", vq, "--prompt", PROMPT, "--width", side, "--height", side, "--out", f"{out}-pictures"]),
        Command("the result for other tools", {}, ["python", "-m", "lumina_fn.convert", tuned, f"{out}-hf", "--to", "hf"]),
        Command("the result for MindSpeed-MM", {}, ["python", "-m", "lumina_fn.convert", tuned, f"{out}-mindspeed", "--to", "mindspeed"]),
    ]  # fmt: skip
    return commands


def _whole(value: Any) -> int:
    return int(str(value))  # raises for 256.5 and for true


def _devices(launch: dict[str, Any]) -> dict[str, str]:
    """torchrun's flags for machines and devices: an address, and whole numbers, or variables for those that are open. Raises
    ValueError for other values."""
    if not isinstance(launch["--master-addr"], Variable) and not _ADDRESS.fullmatch(str(launch["--master-addr"])):
        raise ValueError(f"--master-addr {launch['--master-addr']!r}")
    return {
        flag: value if isinstance(value, Variable) else str(value if flag == "--master-addr" else _whole(value))
        for flag, value in launch.items()
    }


def carried(flag: str, value: Open | None) -> Variable:
    """The variable that this flag of torchrun's becomes where its value is open. `value` is that value, if it is no more than one."""
    name = field_rules.LAUNCH[flag].flag
    source, default = (value.source, value.default) if value else (None, None)
    if default is not None and (_ADDRESS if flag == "--master-addr" else _NUMBER).fullmatch(default):
        return Variable(f"${{{name}:-{default}}}")
    needed = f"{source or name}:?known only when the scripts of the guide run: give it, as in {source or name}=... bash commands.sh"
    return Variable(f"${{{needed}}}" if source in (None, name) else f"${{{name}:-${{{needed}}}}}")


def _alone(devices: dict[str, str]) -> bool:
    """Whether there is one process; not where that is open."""
    return devices["--nproc-per-node"] == devices["--nnodes"] == "1"


def _fresh(place: str) -> str:
    """The folder itself, or one named PLACE-lumina if the folder holds files of MindSpeed-MM."""
    folder = Path(place)
    used = folder.is_dir() and (
        foreign.indexes(folder) or any(folder.glob("iter_*")) or (folder / mindspeed.ITERATION).exists()
    )
    return f"{place}-lumina" if used else place


def _launched(words: list[str], devices: dict[str, str]) -> list[str]:
    if _alone(devices):
        return ["python", *words]
    if (
        devices["--nnodes"] == "1"
    ):  # at any free port, and without a look-up of the machine's name, which a container may not have
        return [
            "torchrun",
            "--standalone",
            "--local-addr",
            "127.0.0.1",
            "--nproc-per-node",
            devices["--nproc-per-node"],
            *words,
        ]
    where = [word for flag, value in devices.items() for word in (flag, value)]
    return ["torchrun", *where, *words]


def _finetune(run: list[str], devices: dict[str, str], environment: dict[str, str]) -> Command:
    if _alone(devices):
        return Command("training", environment, ["python", "-m", "experiments.finetune", *run])
    nodes = devices["--nnodes"]
    what, script = "training", "experiments/launch/ascend_1x8.sh"
    if nodes != "1":
        count = "as many" if isinstance(nodes, Variable) else nodes
        what = f"training, on each of {count} machines: with NODE_RANK=1 and so on for the others"
        script = "experiments/launch/ascend_2x8.sh"
    names = {
        field_rules.LAUNCH[flag].flag: value
        for flag, value in devices.items()
        # On one machine its number and address decide nothing: where they are open they are left to the script.
        if nodes != "1" or flag in ("--nproc-per-node", "--nnodes") or not isinstance(value, Variable)
    }
    return Command(what, environment | names, ["bash", script, *run])


def _training(found: dict[str, dict[str, Any]], devices: dict[str, str], lines: list[Line]) -> list[str]:
    """The flags of finetune, except paths."""
    flags, fields = found["pretrain.sh flags"], found["model.json"]
    known = [
        1 if isinstance(devices[flag], Variable) else _whole(devices[flag]) for flag in ("--nproc-per-node", "--nnodes")
    ]
    processes = math.prod(known)  # where it is open: of what is known
    micro = _whole(flags["--micro-batch-size"])
    batch = _whole(flags.get("--global-batch-size", micro * processes))
    if micro < 1 or processes < 1 or batch < 1 or batch % (micro * processes):
        refuse(lines, "pretrain.sh", "--global-batch-size", batch, f"no multiple of {micro} x {processes} devices")
    clip = float(flags["--clip-grad"])
    words = {
        "--steps": _whole(flags["--train-iters"]), "--batch": batch, "--micro-batch": micro, "--lr": float(flags["--lr"]),
        "--warmup": _whole(flags["--lr-warmup-iters"]), "--schedule": _schedule(flags, lines), "--weight-decay": float(flags["--weight-decay"]),
        "--clip": clip if clip > 0 else math.inf, "--z-weight": float(fields["z_loss_weight"]), "--caption-drop": 0.1,
        "--dtype": _dtype("dtype", fields["dtype"], lines), "--log-every": _whole(flags["--log-interval"]),
        "--last": "drop" if same(found["feature_data.json"]["dataloader_param.drop_last"], True) else "partial",
    }  # fmt: skip
    words |= {ours: _whole(flags[theirs]) for theirs, ours in (("--save-interval", "--save-every"), ("--seed", "--seed")) if theirs in flags}  # fmt: skip
    if words["--warmup"]:
        lines.append(Line("pretrain.sh", "--lr-warmup-iters", str(words["--warmup"]), "note", "step k of W, from 0, has the rate lr (k + 1) / W"))  # fmt: skip
    out = [word for flag, value in words.items() for word in (flag, str(value))]
    return out if _alone(devices) else out + _sharding(fields, lines)


def _schedule(flags: dict[str, Any], lines: list[Line]) -> str:
    style, steps = flags["--lr-decay-style"], flags["--train-iters"]
    if style == "cosine" and same(flags["--min-lr"], 0) and same(flags.get("--lr-decay-iters", steps), steps):
        return "cosine"
    if style != "constant":
        refuse(lines, "pretrain.sh", "--lr-decay-style", style, "constant, or cosine that ends at --min-lr 0 after --train-iters, are offered")  # fmt: skip
    return "constant"


def _dtype(field: str, value: Any, lines: list[Line]) -> str:
    if value not in DTYPES:
        refuse(lines, "model.json", field, value, "bf16 and fp32 are offered; fp16 needs loss scaling, which is not")
    elif value == "tf32":
        lines.append(Line("model.json", field, value, "note", "float32: torch.float there, too"))
    return DTYPES.get(value, "float32")


def _sharding(fields: dict[str, Any], lines: list[Line]) -> list[str]:
    fsdp = {key.split(".")[-1]: value for key, value in fields.items() if key.startswith("patch.use_fsdp1.")}
    if not fsdp:
        return ["--strategy", "no"]
    get = lambda name, default: fsdp.get(name, default)  # with MindSpeed-MM's default
    strategy, backward = get("sharding_strategy", "fsdp"), get("backward_prefetch", "backward_pre")
    if strategy not in ("fsdp", "sdp", "no", "hybrid", "hybrid_zero2"):
        refuse(lines, "model.json", "sharding_strategy", strategy, "expected fsdp, sdp, no, hybrid or hybrid_zero2")
    if backward not in ("backward_pre", "backward_post"):
        refuse(lines, "model.json", "backward_prefetch", backward, "expected backward_pre or backward_post")
    out = ["--strategy", str(strategy)]
    for name, default in (("param_dtype", "bf16"), ("reduce_dtype", "fp32")):
        out += [f"--{name.replace('_', '-')}", _dtype(name, get(name, default), lines)]
    forward = same(get("forward_prefetch", False), True)
    return [*out, "--forward-prefetch" if forward else "--no-forward-prefetch", "--backward-prefetch"]
