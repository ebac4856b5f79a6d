"""The kernels compile for a GPU, which the interpreter does not show: it takes what the compiler refuses."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"


def _jitted(path: Path) -> list[ast.FunctionDef]:
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    ]


def test_only_compile_time_arguments_are_annotated() -> None:
    # Triton's compiler evaluates annotations and may see no module's globals but its own.
    wrong = [
        f"{path.name}: {kernel.name}({ast.unparse(arg)})"
        for path in KERNELS.glob("*.py")
        for kernel in _jitted(path)
        for arg in [*kernel.args.args, *([ast.arg("->", kernel.returns)] if kernel.returns else [])]
        if arg.annotation is not None and ast.unparse(arg.annotation) != "tl.constexpr"
    ]
    assert not wrong


COMPILE = """
import importlib
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {"codes_ptr": "*i8", "sq_codes_ptr": "*u8", "target_ptr": "*i64",
            "q_ptr": "*u8", "bits_ptr": "*u8"}
LOW = ("x_ptr", "weight_ptr", "out_ptr", "grad_ptr", "grad_x_ptr", "gate_ptr", "up_ptr", "logits_ptr", "cos_ptr",
       "sin_ptr", "grad_gate_ptr", "grad_up_ptr")
FLOATS = ("step_size", "decay", "one_minus_beta1", "one_minus_beta2", "beta1", "beta2", "inverse_bias2_sqrt", "eps",
          "grad_factor", "offset", "largest")
KERNELS = [
    ("l2_norm", "_partial_kernel", dict(BLOCK_SIZE=128)),
    ("l2_norm", "_finish_kernel", dict(BLOCK_SIZE=128)),
    ("rms_norm", "_forward_kernel", dict(HAS_WEIGHT=True, ROUND_FIRST=True, BLOCK_SIZE=128)),
    ("rms_norm", "_backward_kernel", dict(HAS_WEIGHT=True, BLOCK_SIZE=128)),
    ("swiglu", "_forward_kernel", dict(BLOCK_SIZE=128)),
    ("swiglu", "_backward_kernel", dict(BLOCK_SIZE=128)),
    ("rotary", "_rotary_kernel", dict(BACKWARD=True, BLOCK_HEADS=8, BLOCK_HALF=64)),
    ("linear_cross_entropy", "_rows_kernel", dict(HAS_FACTOR=True, WRITE_GRAD=True, BLOCK_SIZE=128)),
    ("fused_adamw", "_fused_adamw_kernel", dict(HAS_OUT=True, BLOCK_SIZE=128)),
    ("adamw8bit", "_adamw8bit_kernel", dict(HAS_OUT=True, ROWS=4, BLOCK_SIZE=256)),
    ("quantize", "_quantize_kernel", dict(FP8=True, BLOCK_SIZE=256)),
    ("quantize", "_dequantize_kernel", dict(FP8=True, BLOCK_SIZE=256)),
    ("onebit", "_pack_kernel", dict(FEEDBACK=True, OWN_SCALE=True, BLOCK_SIZE=1024)),
    ("onebit", "_unpack_kernel", dict(ONE_SCALE=False, TILE=1024)),
]


def kind(name):
    if name.endswith("_ptr"):
        return POINTERS.get(name, "*bf16" if name in LOW else "*fp32")
    return "fp32" if name in FLOATS else "i32"


for module, name, constants in KERNELS:
    kernel = getattr(importlib.import_module(f"distui.kernels.{module}"), name)
    signature = {arg: "constexpr" if arg in constants else kind(arg) for arg in kernel.arg_names}
    places = {(kernel.arg_names.index(arg),): value for arg, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"], name
    print(name)
"""


def test_every_kernel_compiles_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia")
    # Another process: this one interprets.
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(KERNELS.parent)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) == 14
