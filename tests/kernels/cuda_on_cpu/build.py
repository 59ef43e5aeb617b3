"""Compile the CUDA sources of mamba-ssm and causal-conv1d for a CPU: `python build.py FOLDER`, with their sdists in it.

The kernels' code is taken as it is, but for the brackets of a launch and the declarations of shared memory, which are
no C++. What mambascope never asks for is left out, and says so when it is called: complex weights, channels last, B or
C that stay the same over a sequence (`static_switch.h`). The two modules go where the packages would have put them.
"""

import re
import sys
import sysconfig
import tarfile
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

HERE = Path(__file__).resolve().parent
SOURCES = {"selective_scan_cuda": "mamba_ssm-*/csrc/selective_scan", "causal_conv1d_cuda": "causal_conv1d-*/csrc"}
HEADERS = {  # of CUDA, cub and torch: what stands for them here
    "device.h": (
        "cub/config.cuh cub/util_ptx.cuh cub/util_type.cuh cub/block/block_load.cuh cub/block/block_store.cuh "
        "cub/block/block_scan.cuh cub/block/block_reduce.cuh cub/block/block_raking_layout.cuh cuda/std/type_traits "
        "cuda_bf16.h cuda_fp16.h c10/cuda/CUDAException.h ATen/cuda/Atomic.cuh"
    ),
    "host.h": "torch/extension.h torch/python.h c10/cuda/CUDAGuard.h c10/cuda/CUDAStream.h",
    "static_switch.h": "static_switch.h",
}


def translate(text: str) -> str:
    """CUDA's C++ into C++."""
    text = re.sub(r"(\w+)<<<(.*?)>>>\(", r"gpu::launch(\1, \2, ", text)
    text = text.replace("extern __shared__", "extern").replace("__shared__", "static")
    text = re.sub(r"^template void .*(complex_t>|channellast).*$", "", text, flags=re.M)
    missing = 'TORCH_CHECK(false, "this is not compiled here");'
    text = re.sub(r"(void causal_conv1d_channellast_\w+\([^()]*\));", rf"\1 {{ {missing} }}", text)
    return re.sub(r"(using weight_t = c10::complex<float>;[\s\\]*)__VA_ARGS__\(\);", rf"\1{missing}", text)


def write(path: Path, text: str) -> None:
    """Only what is new, so that nothing is compiled twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def build(name: str, source: Path, to: Path) -> Path:
    """The module `name` from the folder `source`, compiled in the folder `to`."""
    for header, stood_for in HEADERS.items():
        for path in stood_for.split():
            write(to / "include" / path, f'#include "{HERE / header}"\n')
    files = []
    for file in sorted(source.iterdir()):
        if "complex" in file.name or file.name == "static_switch.h":
            continue
        out = to / (f"{file.name}.cpp" if file.suffix == ".cu" else file.name)
        write(out, translate(file.read_text()))
        if out.suffix == ".cpp":
            files.append(str(out))
    flags = ["-O1", "-w", "-fpermissive"]
    load(name, files, extra_include_paths=[str(to / "include")], extra_cflags=flags, build_directory=str(to))
    return to / f"{name}.so"


def pretended(to: Path) -> Path:
    """The library of `pretended.cpp`, which finds torch's by itself."""
    to.mkdir(exist_ok=True)
    flags = {"extra_cflags": ["-O1", "-w"], "extra_ldflags": [f"-Wl,-rpath,{Path(torch.__file__).parent / 'lib'}"]}
    load("pretended_cuda", [str(HERE / "pretended.cpp")], build_directory=str(to), is_python_module=False, **flags)
    return to / "pretended_cuda.so"


def main(folder: Path) -> None:
    for sdist in folder.glob("*.tar.gz"):
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
    for name, pattern in SOURCES.items():
        put(build(name, next(folder.glob(pattern)), folder / name))
    if not torch.backends.cuda.is_built():  # else torch has hooks of its own
        put(pretended(folder / "pretended"))


def put(built: Path) -> None:
    (Path(sysconfig.get_path("purelib")) / built.name).write_bytes(built.read_bytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
