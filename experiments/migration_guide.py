"""The MindSpeed-MM guide's folder as the commands that do the same here."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments import ascend_env, migration_fields, migration_shell
from experiments.migration_fields import DTYPES, Line, same
from experiments.migration_shell import Script
from lumina_fn import dataset, imported, sources
from lumina_fn.errors import InputError

EXAMPLE = "examples/lumina/mgpt2"
PROMPT = "a lighthouse at dusk"
_KEPT = (
    "ASCEND_",
    "HCCL_",
    "GLOO_",
    "ACL",
    "NPU_",
    "TORCH_",
    "PYTORCH_",
    "OMP_",
    "TOKENIZERS_",
    "HF_",
)  # read by who reads them here
_NEEDLESS = {"CUDA_DEVICE_MAX_CONNECTIONS": "Megatron's own check", "NON_MEGATRON": "there is no Megatron"}


class Command(NamedTuple):
    what: str
    environment: dict[str, str]
    words: list[str]
    active: bool = True  # or a comment


class Guide(NamedTuple):
    root: Path  # the working directory of its scripts
    lines: list[Line]
    commands: list[Command]  # none where a line is refused
    set_env: list[str]


class _Part(NamedTuple):
    """A script and the flags it gives."""

    name: str
    script: Script
    launch: dict[str, Any]
    program: str
    flags: dict[str, Any]


def read(folder: Path) -> Guide:
    """The commands and a line for each field. Raises InputError for a folder that is not the guide's."""
    root, base = _places(folder)
    extraction = base / "feature_extract/feature_extraction.sh"
    lines: list[Line] = []
    parts = [_part(root, path, lines) for path in (extraction, base / "pretrain.sh")]
    extract, train = parts
    _check_program(extract, "get_lumina_feature.py", lines)
    _check_program(train, "pretrain_lumina.py", lines)
    files = [
        (extract, "--mm-data", "feature_extract/data.json", migration_fields.DATA),
        (extract, "--mm-model", "feature_extract/model.json", migration_fields.AE),
        (extract, "--mm-tool", "mindspeed_mm/tools/tools.json", migration_fields.TOOLS),
        (train, "--mm-data", "feature_data.json", migration_fields.FEATURE_DATA),
        (train, "--mm-model", "model.json", migration_fields.MODEL),
    ]
    tables = [(name, rules, _json(root, base, part, flag, name)) for part, flag, name, rules in files]
    sizes = _sizes(root, train)
    found: dict[str, dict[str, Any]] = {}
    for name, rules, values in tables:
        judged, found[name] = migration_fields.judge(name, rules, values, sizes)
        lines += judged
    for part, rules in ((extract, migration_fields.EXTRACT_FLAGS), (train, migration_fields.TRAIN_FLAGS)):
        for kind, table, values in (("launch", migration_fields.LAUNCH, part.launch), ("flags", rules, part.flags)):
            judged, found[f"{part.name} {kind}"] = migration_fields.judge(part.name, table, values, {})
            lines += judged
    environments = [_environment(part, lines) for part in parts]
    commands: list[Command] = []
    try:
        commands = _commands(root, found, environments, lines)
    except (KeyError, ValueError, TypeError) as error:
        refuse(lines, "the guide's files", str(error).strip("'"), "", "is missing or not a usable value; give it" if isinstance(error, KeyError) else "not a usable value")  # fmt: skip
    if any(line.kind == "refused" for line in lines):
        commands = []
    return Guide(root, lines, commands, sorted({p.script.set_env for p in parts if p.script.set_env}))


def refuse(lines: list[Line], file: str, field: str, value: Any, why: str) -> None:
    lines.append(Line(file, field, str(value), "refused", why))


def _places(folder: Path) -> tuple[Path, Path]:
    """The working directory of the guide's scripts, and the folder that has pretrain.sh."""
    root = Path(os.path.realpath(folder))
    if not str(root).isprintable():
        raise InputError(f"{folder}: its name has control characters, which commands.sh cannot name; rename it")
    if root.as_posix().endswith(EXAMPLE) and (root.parents[2] / "mindspeed_mm").is_dir():
        root = root.parents[2]
    for base in (root / EXAMPLE, root):
        if (base / "pretrain.sh").is_file():
            return root, base
    raise InputError(
        f"{folder} holds neither the guide's files ({EXAMPLE}/pretrain.sh or pretrain.sh) nor extracted features "
        f"({', '.join(imported.INDEXES)}); give a MindSpeed-MM checkout or a folder of features"
    )


def _part(root: Path, path: Path, lines: list[Line]) -> _Part:
    path = dataset.find(os.path.relpath(path, root), [root])
    script = migration_shell.read(path)
    launch, at = {}, 0
    while at < len(script.command) and script.command[at].startswith("-"):
        flag, equals, value = script.command[at].partition("=")
        if not equals:
            at += 1
            value = script.command[at] if at < len(script.command) else ""
        launch[flag.replace("_", "-")] = value
        at += 1
    program, words = "".join(script.command[at : at + 1]), script.command[at + 1 :]
    flags: dict[str, Any] = {}
    open_flag = None  # one that may still get its value
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            flags[flag] = value
            open_flag = None if equals else flag
        elif open_flag is not None:
            flags[open_flag] = word
            open_flag = None
        else:
            refuse(lines, path.name, word, "", "a word that belongs to no flag")
    return _Part(path.name, script, launch, program, flags)


def _check_program(part: _Part, name: str, lines: list[Line]) -> None:
    if Path(part.program).name != name:
        refuse(lines, part.name, "program", part.program, f"expected {name}")


def _json(root: Path, base: Path, part: _Part, flag: str, name: str) -> dict[str, Any]:
    """The fields of the file that the script names, looked for under the guide's root, or of the one in its usual place."""
    given = part.flags.get(flag)
    candidates = [str(given)] if isinstance(given, str) else []
    usual = [base / name, root / name, root / Path(name).name] if name.endswith("tools.json") else [base / name]
    candidates += [os.path.relpath(path, root) for path in usual if path.is_file()]
    problem = InputError(f"{part.script.path} gives no {flag}")
    for candidate in candidates:
        try:
            return dict(migration_fields.flat(sources.read_json(dataset.find(candidate, [root]))))
        except InputError as error:
            problem = InputError(f"{name}, as {part.name}'s {flag} {candidate}: {error}")
            if root.joinpath(candidate).exists():
                raise problem from error
    raise problem


def _sizes(root: Path, train: _Part) -> Mapping[str, Any]:
    """What config.json in the folder of the weights says, where there is one."""
    load = train.flags.get("--load")
    config = root / load / "config.json" if isinstance(load, str) else root / "config.json"
    return sources.read_json(config) if isinstance(load, str) and config.exists() else {}


def _environment(part: _Part, lines: list[Line]) -> dict[str, str]:
    """The exports that whoever reads them reads here too."""
    kept, variables = {}, {v.name for v in ascend_env.TABLE}
    for name in sorted(part.script.exports - {"NPUS_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}):
        try:
            value = part.script.value(name)
        except migration_shell.Unknown as error:
            refuse(lines, part.name, name, "", f"{error}; write what it comes to")
            continue
        if not value.isprintable():
            refuse(lines, part.name, name, value, "has control characters")
        elif problem := ascend_env.problems({name: value}):
            refuse(lines, part.name, name, value, problem[0])
        elif name in variables or name.startswith(_KEPT):
            kept[name] = value
            lines.append(Line(part.name, name, value, "mapped", "the same variable"))
        elif name in _NEEDLESS:
            lines.append(Line(part.name, name, value, "not needed", _NEEDLESS[name]))
        else:
            refuse(
                lines, part.name, name, value, "an export that is not known here: set it yourself, and remove the line"
            )
    return kept


def _commands(
    root: Path, found: dict[str, dict[str, Any]], environments: list[dict[str, str]], lines: list[Line]
) -> list[Command]:
    """Raises KeyError for a field that must be given and is not, ValueError or TypeError for a value that is none."""
    at = lambda value: os.path.normpath(root / value)
    basic, mapped = "dataset_param.basic_parameters.data_config.path", found["pretrain.sh flags"]
    data, vq = (
        at(found["feature_extract/data.json"][basic]),
        at(found["feature_extract/model.json"]["ae.from_pretrained"]),
    )
    model = at(found["feature_extract/data.json"]["dataset_param.tokenizer_config.from_pretrained"])
    size = _whole(found["feature_extract/data.json"]["dataset_param.preprocess_parameters.target_size"])
    extracted = at(found["mindspeed_mm/tools/tools.json"]["sorafeature.save_path"])
    theirs = Path(at(found["feature_data.json"][basic])).parent
    load, out = at(mapped["--load"]), _fresh(at(mapped["--save"]))
    for what, path in (
        ("DATA.json", data),
        ("the MoVQGAN", vq),
        ("the Hugging Face folder", model),
        ("the weights", load),
    ):
        if not Path(path).exists():
            lines.append(Line(what, "path", path, "note", "is not there (yet)"))
    have = bool(theirs.is_dir() and imported.indexes(theirs))
    if not have and str(theirs) != extracted:
        refuse(lines, "feature_data.json", basic, theirs, f"tools.json has features written to {extracted}, and there are none here: name one folder in both")  # fmt: skip
    features = _fresh(str(theirs))
    devices = [{key: str(value) for key, value in found[f"{name} launch"].items()} for name in ("feature_extraction.sh", "pretrain.sh")]  # fmt: skip
    pretokenize = ["-m", "experiments.pretokenize", data, features, "--model", model, "--vq", vq, "--size", str(size), "--image-root", str(root)]  # fmt: skip
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
    return int(str(value))  # not of 256.5, not of true


def _fresh(place: str) -> str:
    """The place itself, or one beside it where it holds what MindSpeed-MM wrote."""
    folder = Path(place)
    used = folder.is_dir() and (
        imported.indexes(folder) or any(folder.glob("iter_*")) or (folder / sources.ITERATION).exists()
    )
    return f"{place}-lumina" if used else place


def _launched(words: list[str], devices: dict[str, str]) -> list[str]:
    count, nodes = _whole(devices["--nproc-per-node"]), _whole(devices["--nnodes"])
    if count * nodes == 1:
        return ["python", *words]
    where = [
        word for flag, value in devices.items() if nodes > 1 or flag == "--nproc-per-node" for word in (flag, value)
    ]
    return ["torchrun", *where, *words]


def _finetune(run: list[str], devices: dict[str, str], environment: dict[str, str]) -> Command:
    count, nodes = _whole(devices["--nproc-per-node"]), _whole(devices["--nnodes"])
    if count * nodes == 1:
        return Command("training", environment, ["python", "-m", "experiments.finetune", *run])
    what = "training" if nodes == 1 else f"training, on each of {nodes} machines with its own NODE_RANK"
    names = {migration_fields.LAUNCH[flag].flag: value for flag, value in devices.items()}
    script = "experiments/launch/ascend_1x8.sh" if nodes == 1 else "experiments/launch/ascend_2x8.sh"
    return Command(what, environment | names, ["bash", script, *run])


def _training(found: dict[str, dict[str, Any]], devices: dict[str, str], lines: list[Line]) -> list[str]:
    """The flags of finetune, but for paths."""
    flags, fields = found["pretrain.sh flags"], found["model.json"]
    processes = _whole(devices["--nproc-per-node"]) * _whole(devices["--nnodes"])
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
    return out + (_sharding(fields, lines) if processes > 1 else [])


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
    get = lambda name, default: fsdp.get(name, default)  # theirs
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
