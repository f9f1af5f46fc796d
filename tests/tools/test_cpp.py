"""The C++ library: CMake builds it, C++ programs find it, and its results are those of Python."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import ROOT, output_of

import moe_ext
from moe_ext import build
from moe_ext.ops import registry

CPP = ROOT / "examples" / "cpp"


def cmake(*command: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which("cmake", path=path)
    assert program, "cmake is in the extra `test`"
    done = subprocess.run([program, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def run_cpp(source: Path, binary: Path, prefix: str) -> subprocess.CompletedProcess:
    """Build the example's CMake project in `source` and run its program."""
    shutil.copy(CPP / "CMakeLists.txt", source)
    cmake("-S", str(source), "-B", str(binary), f"-DCMAKE_PREFIX_PATH={prefix}")
    cmake("--build", str(binary))
    return subprocess.run([binary / "layer"], capture_output=True, text=True)


def test_the_cpp_example_computes_what_python_computes(tmp_path):
    """The program is built against the installed package. A call that needs a gradient raises."""
    shutil.copy(CPP / "layer.cpp", tmp_path / "example.cpp")
    (tmp_path / "layer.cpp").write_text("""
#define main example_main
#include "example.cpp"
#undef main
int main() {
  example_main();
  const at::Tensor tokens = at::ones({2, 3}).requires_grad_(), ids = at::zeros({2, 1}, at::kInt);
  const auto plan = moe_ext::make_plan(ids, 2, 1);
  try {
    moe_ext::dispatch(tokens, plan);
  } catch (const c10::NotImplementedError& error) {
    std::cerr << error.what_without_backtrace();
  }
  const at::NoGradGuard guard;
  const at::Tensor rows = moe_ext::dispatch(tokens, plan);
  std::cout << moe_ext::route_dot(tokens, rows, plan) << "\\n";
  std::cout << moe_ext::mask_weights(at::ones({2, 1}), plan) << "\\n";
}
""")
    run = run_cpp(tmp_path, tmp_path / "build", build.cmake_prefix_path())
    assert run.returncode == 0, run.stderr
    assert run.stderr == (
        "moe_ext::dispatch has no gradient in a program without Python; call it under "
        "c10::InferenceMode or at::NoGradGuard"
    )
    torch.manual_seed(0)
    tokens, router = torch.randn(16, 32), torch.randn(4, 32)
    up, down = torch.randn(4, 128, 32), torch.randn(4, 32, 64)
    weights, experts, *_ = moe_ext.gate(tokens @ router.T, 2, normalize=True)
    gate, value = torch.einsum("th,efh->tef", tokens, up).chunk(2, dim=-1)
    dense = torch.einsum("tef,ehf->teh", torch.nn.functional.silu(gate) * value, down)
    chosen = dense.gather(1, experts.long()[..., None].expand(-1, -1, 32))
    expected = (weights[..., None] * chosen).sum((1, 2))
    numbers = list(map(float, re.findall(r"^ *(-?[\d.]+)$", run.stdout, re.MULTILINE)))
    torch.testing.assert_close(torch.tensor(numbers[:16]), expected, rtol=1e-4, atol=1e-2)
    assert numbers[16:] == [3, 0, 1, 0]


def test_the_cpp_header_has_every_public_operator():
    header = Path(moe_ext.__file__).with_name("include") / "moe_ext.h"
    found = set(re.findall(r'find\("moe_ext::(\w+)"\)', header.read_text()))
    assert found == {name for name in registry.NAMES if name in moe_ext.__all__} | {"plan"}


@pytest.mark.parametrize(
    ("registers", "optimize", "also"), [(16, "-O1", "-DMOE_EXT_EMULATES_TILES"), (32, "-O2", "")]
)
def test_cmake_builds_the_same_library(tmp_path, registers, optimize, also):
    """Also for CPUs with narrower registers and without instructions for 16 bits, or with tiles."""
    cmake(
        *("-S", str(ROOT), "-B", str(tmp_path), f"-DPython3_EXECUTABLE={sys.executable}"),
        "-DCMAKE_CXX_FLAGS=-DMOE_EXT_WIDEN_16BIT -DMOE_EXT_OWN_PRODUCTS "
        f"-DMOE_EXT_REGISTERS={registers} {also}",
        f"-DCMAKE_CXX_FLAGS_RELEASE={optimize}",  # the first builds in half the time
    )
    cmake("--build", str(tmp_path), "--parallel", "2")
    (library,) = tmp_path.glob("libmoe_ext.*")
    # The program loads the library without the package. 16-bit products are float32 ones.
    code = f"""
import itertools, torch
torch.ops.load_library({str(library)!r})
experts = torch.tensor([[1, 0], [1, 2]], dtype=torch.int32)
print(torch.ops.moe_ext.plan(experts, None, 3, None, "choice", 1)[0].tolist())
experts = torch.tensor([0] * 5 + [2] * 600 + [3] * 40, dtype=torch.int32).unsqueeze(1)
_, _, offsets, load = torch.ops.moe_ext.plan(experts, None, 4, None, "choice", 1)
groups = (offsets, load, None)
torch.manual_seed(0)
logits = torch.randn(130, 70)
weights, ids, probs, sums = torch.ops.moe_ext.gate(logits, None, 5, "softmax", False, 1.0)
torch.testing.assert_close(probs, logits.softmax(-1))
torch.testing.assert_close(sums, logits.softmax(-1).sum(0))
assert torch.equal(ids, logits.sort(dim=-1, descending=True, stable=True).indices[:, :5].int())
slots, sources, _, _ = torch.ops.moe_ext.plan(ids, None, 70, None, "token", 1)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    tokens, grad = torch.randn(2, 130, 77).to(dtype)
    rows = torch.ops.moe_ext.dispatch(tokens, slots, sources, None)
    assert torch.equal(rows, tokens[(sources // 5).long()])
    scaled, dots = torch.ops.moe_ext.combine_backward(grad, rows, slots, sources, weights)
    w = weights.flatten()[sources.long(), None]
    torch.testing.assert_close(scaled, (w * grad[(sources // 5).long()].float()).to(dtype))
    exact = (grad.double() * tokens.double()).sum(-1, keepdim=True).expand(-1, 5)
    torch.testing.assert_close(dots.double(), exact, rtol=1e-5, atol=1e-4)
    out = torch.ops.moe_ext.combine(rows, slots, sources, weights)
    exact = weights.double().sum(-1, keepdim=True) * tokens.double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=2 * eps, atol=2 * eps)
    pre_activation = torch.randn(650, 2 * 37).to(dtype)
    active = torch.ops.moe_ext.activate(pre_activation, slots, sources, None, "swiglu")
    gate, up = pre_activation.float().chunk(2, dim=-1)
    exact = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(active.float(), exact, rtol=4 * eps, atol=4 * eps)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    rows, weights = torch.randn(645, 300).to(dtype), torch.randn(4, 530, 300).to(dtype)
    bias = torch.randn(4, 530).to(dtype)
    strided = weights.transpose(1, 2).contiguous().transpose(1, 2)
    for w in (weights, strided):
        out = torch.ops.moe_ext.grouped_mm(rows, w, bias, *groups)
        outer = torch.ops.moe_ext.grouped_outer(out, rows, *groups)
        for e in range(4):
            mine = slice(int(offsets[e]), int(offsets[e + 1]))
            x, y = rows[mine].double(), out[mine].double()
            eps = torch.finfo(dtype).eps
            exact = x @ weights[e].double().T + bias[e].double()
            torch.testing.assert_close(out[mine].double(), exact, rtol=eps, atol=1e-4)
            torch.testing.assert_close(outer[e].double(), y.T @ x, rtol=eps, atol=1e-2)
codes = torch.randint(256, (1, 37, 320), dtype=torch.uint8)
scales = (torch.rand(1, 37, 20) + 0.5).bfloat16()
halves = torch.stack([codes % 16, codes // 16], -1).view(37, 20, 32)
weights = {{
    "int4": (scales, ((halves - 8.0) * scales.view(37, 20, 1).float()).view(37, 640)),
    "int8": (scales[..., :1].float(), codes[0].view(torch.int8) * scales[0, :, :1].float()),
}}
for (format, (scale, numbers)), n in itertools.product(weights.items(), (1, 3, 7, 20, 40)):
    _, _, offsets, load = torch.ops.moe_ext.plan(torch.zeros(n, 1).int(), None, 1, None, "token", 1)
    for dtype, transposed in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        number = numbers if transposed else numbers.T
        rows, eps = torch.randn(n, len(number)).to(dtype), torch.finfo(dtype).eps
        rest = (offsets, load, format, transposed, False, None)
        out = torch.ops.moe_ext.quantized_mm(rows, codes, scale, None, None, *rest)
        exact = rows.double() @ number.double()
        assert (out.double() - exact).norm() < 8 * eps * exact.norm()
"""
    assert output_of("-c", code) == "[[1, 0], [2, 3]]\n"
    if registers == 32:
        check_installation(tmp_path)


def check_installation(built: Path) -> None:
    """A program that finds an installation of CMake links with the library."""
    cmake("--install", str(built), "--prefix", str(built / "installed"))
    source = built / "program"
    source.mkdir()
    (source / "layer.cpp").write_text("""
#if !__has_include(<moe_ext.h>)
#error no moe_ext.h
#endif
extern "C" void moe_ext_library();
int main() { moe_ext_library(); }
""")
    prefix = f"{built / 'installed'};{torch.utils.cmake_prefix_path}"
    run = run_cpp(source, built / "program-built", prefix)
    assert run.returncode == 0, run.stderr
