"""Every kernel compiles for a GPU, with the blocks that its launcher chooses. No GPU is needed for that."""

import re
import subprocess
import sys

from tests.conftest import ROOT

# In a process of its own: this one may interpret kernels. A launch is replaced by a compilation for Hopper.
CODE = """
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import language

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}

def launch(kernel, programs, *arguments, num_warps, num_stages=3, **options):
    given = dict(zip(kernel.arg_names, arguments)) | options
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = given[parameter.name]
        if parameter.is_constexpr:
            constants[parameter.name] = value
            signature[parameter.name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(kernel, signature, constants)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.asm["cubin"] and made.metadata.shared <= 227 * 1024, (kernel, made.metadata.shared)
    print(kernel.__name__, "wgmma" * ("wgmma" in made.asm["ptx"]))

language.launch = launch
from kernels import attention_plan, gated_activation, max_sim, residual_norm, rotary
from kernels import segment_pooling, sparse_max, varlen_attention

def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(*shape, dtype=dtype)

odd = {"window": 64, "softcap": 5.0}
for size, length, options in [(64, 16, {}), (128, 256, {"causal": True}), (72, 256, odd)]:
    q, k, v = zeros(length, 6, size).split(2, 1)
    plan = attention_plan.make_plan([length], device=q.device)
    varlen_attention.varlen_attention(q, k, v, plan, **options)
residual_norm.add_rms_norm(zeros(4, 128), zeros(4, 128), zeros(128), 1e-6)
residual_norm.layer_norm(zeros(4, 1024), zeros(1024), zeros(1024), 1e-6)
for activation in gated_activation.ACTIVATIONS:
    gated_activation.gated_activation(zeros(4, 256), activation=activation)
gated_activation.bias_activation(zeros(4, 256), zeros(256), activation="gelu")
rotary.rotate_(zeros(2, 4, 64), zeros(2, 2, 64), zeros(2, 64), zeros(2, 64))
for mode in ("mean", "cls"):
    segment_pooling.pool(zeros(4, 128), [4], mode, normalizes=mode == "cls")
max_sim.max_sim(zeros(32, 128), [32], zeros(50, 128), [50])
for pooling in sparse_max.POOLINGS:
    sparse_max.splade(zeros(4, 300), [4], pooling=pooling)
ids = zeros(4, dtype=torch.int64)
sparse_max.lexical_weights(zeros(4), ids, [4], ids)
"""


def test_every_kernel_compiles_for_hopper():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    made = [line.strip() for line in done.stdout.splitlines()]
    written = {
        name
        for file in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    assert {line.split()[0] for line in made} == written
    assert made.count("_attention_kernel wgmma") == 2, "long sequences are multiplied by warp groups"
