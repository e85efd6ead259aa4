"""Build the stand-in for CANN that an installed torch_npu is loaded over."""

import re
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("cann_stub.c")
# CANN's libraries that torch_npu links against. The loader tells files by inode: links to one file are one library.
NAMESAKES = ("hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "atb", "fmk_parser", "ascend_protobuf")
CANN_SYMBOL = re.compile(r"(acl|rt[A-Z]|Msprof|Hccl)\w+")  # plain C; CANN's C++ is linked by parts nobody loads here


def build(torch_npu: Path, lib64: Path) -> int:
    """Make libascendcl.so and its namesakes in lib64 for the package at torch_npu; how many symbols it looks for."""
    lib64.mkdir(parents=True, exist_ok=True)
    library, wanted = lib64 / "libascendcl.so", undefined(torch_npu)
    with tempfile.TemporaryDirectory() as scratch:
        ours, rest = Path(scratch, "ours.o"), Path(scratch, "rest.c")
        compiler = ["gcc", "-fPIC", "-O1", "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror"]
        run(*compiler, "-I", torch_npu / "include", "-c", SOURCE, "-o", ours)
        missing = sorted(wanted - symbols("--defined-only", ours))
        rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in missing))
        run(*compiler, "-shared", "-Wl,-soname,libascendcl.so", ours, rest, "-o", library)
    for name in NAMESAKES:
        link = lib64 / f"lib{name}.so"
        link.unlink(missing_ok=True)
        link.symlink_to(library.name)
    return len(wanted)


def undefined(torch_npu: Path) -> set[str]:
    """The functions of CANN that `import torch_npu` needs: all of them at once, since its libraries are bound at load."""
    return symbols("--undefined-only", *torch_npu.glob("_C*.so"), *torch_npu.glob("lib/*.so"))


def symbols(which: str, *files: Path) -> set[str]:
    listed = run("nm", "--format=posix", *(["--dynamic"] if files[0].suffix == ".so" else []), which, *files)
    return {words[0] for line in listed.splitlines() if (words := line.split()) and CANN_SYMBOL.fullmatch(words[0])}


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr}")
    return done.stdout
