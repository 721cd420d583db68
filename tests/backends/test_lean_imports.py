"""Imports of torch and transformers in processes of their own, as each stage does them."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

BEGIN = """
import json, sys
if {is_lean}:
    from backends import lean_imports
    lean_imports.install()
import torch
"""
ASKED = """
from transformers.models.llama import modeling_llama
import transformers.masking_utils
names = ["sympy", "torch._dynamo.guards", "torch.distributed.tensor", "torch._decomp.decompositions"]
print(json.dumps([name for name in names if name in sys.modules]))
"""
# The frequencies of this kind of RoPE are made of torch.where, also where tensors have no data.
LLAMA = """
from transformers import AutoModel, LlamaConfig, LlamaModel
rope = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=16)
torch.manual_seed(0)
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
LlamaModel(LlamaConfig(**sizes, rope_parameters=rope)).save_pretrained("{folder}")
def load():
    return AutoModel.from_pretrained("{folder}")
"""


def run(code, *, is_lean=True, **names):
    """What the code prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", (BEGIN + code).format(is_lean=is_lean, **names)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_left_out():
    assert run(ASKED) == []
    assert len(run(ASKED, is_lean=False)) == 4, "else there is nothing to leave out"


def test_a_model_that_needs_kernels_which_were_left_out(tmp_path):
    tell = "print(json.dumps(made(torch.arange(9)[None]).last_hidden_state.flatten().tolist()))"
    fails = """
try:
    load()
except NotImplementedError as error:
    assert "aten::where" in str(error)
else:
    raise AssertionError("nothing was missing")
made = lean_imports.with_meta_kernels(load)
"""
    lean = run(LLAMA + fails + tell, folder=tmp_path / "lean")
    plain = run(LLAMA + "made = load()\n" + tell, is_lean=False, folder=tmp_path / "plain")
    assert lean == plain


def test_an_error_of_the_model_itself_is_raised_once():
    assert run("""
calls = []
def make():
    calls.append(hasattr(sys.modules["torch._meta_registrations"], "__file__"))
    raise NotImplementedError
for _ in range(2):
    try:
        lean_imports.with_meta_kernels(make)
    except NotImplementedError:
        pass
print(json.dumps(calls))
""") == [False, True, True]


COMPILER = [
    "torch.compile(lambda x: x + 1, backend='aot_eager')(torch.ones(2))",
    "import torch._dynamo.config; assert torch._dynamo.config is sys.modules['torch._dynamo.config']",
    "import torch._dynamo.backends.debugging as found; assert found.aot_eager",
    "from torch._dynamo import guards; assert guards.GuardBuilder",
    "from transformers.masking_utils import TransformGetItemToIndex as C; C(); import torch._dynamo",
]
KERNELS = [
    "assert torch.vmap(lambda x: x.sum())(torch.ones(2, 3)).tolist() == [3, 3]",
    "torch.func.jvp(torch.nn.functional.gelu, (torch.ones(2),), (torch.ones(2),))",
    "import torch._refs; assert torch._refs.exp(torch.zeros(1)) == 1",
    "import torch._decomp; assert torch._decomp.core_aten_decompositions()",
    "from torch._meta_registrations import pooling_output_shape",
    "assert torch._meta_registrations.pooling_output_shape",
    "lean_imports.undo(); torch.where(torch.empty(1, device='meta') > 0, 1, 2)",
    "import importlib.util; assert importlib.util.find_spec('torch._dynamo')",
]
CHECK = """
from transformers.models.bert import modeling_bert
import os, traceback
def check_compiler():
    compiler = sys.modules["torch._dynamo"]
    assert compiler.guards is sys.modules["torch._dynamo.guards"]
    assert torch._dynamo is compiler and compiler.__file__
    assert torch._meta_registrations.__file__
def ends_well(use, is_compiler=False):
    child = os.fork()
    if child == 0:
        try:
            exec(use, dict(globals()))
            if is_compiler:
                check_compiler()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0
"""


def test_who_asks_for_the_compiler_gets_it_whole():
    """Before the stage is loaded and after, each in a copy of a process that has imported transformers."""
    assert run(f"""{CHECK}
assert "torch._dynamo.guards" not in sys.modules and not ends_well("pass", True)
uses = {COMPILER}
found = [ends_well(use, True) for use in uses]
lean_imports.finish()
print(json.dumps(found + [ends_well(use, True) for use in uses[:1]]))
""") == [True] * (len(COMPILER) + 1)


def test_what_needs_the_kernels_finds_them():
    found = run(f"""{CHECK}
uses = {KERNELS}
assert not ends_well("torch.where(torch.empty(1, device='meta') > 0, 1, 2)")
found = [ends_well(use) for use in uses]
lean_imports.finish()
print(json.dumps(found + [ends_well(use) for use in uses]))
""")
    assert found == [True] * 2 * len(KERNELS)


@pytest.mark.parametrize(
    ("one", "other", "end"),
    [
        ("sympy", "torch._dynamo.config", ""),
        ("torch._meta_registrations", "torch._dynamo", "lean_imports.finish()"),
    ],
)
def test_threads_that_import_at_once_do_not_wait_for_each_other(one, other, end):
    assert (
        run(f"""
import importlib, threading
{end}
begun = threading.Event()
def first():
    begun.set()
    importlib.import_module("{one}")
thread = threading.Thread(target=first)
thread.start()
begun.wait()
assert importlib.import_module("{other}").__file__
thread.join()
print(json.dumps(torch._dynamo.guards.__name__))
""")
        == "torch._dynamo.guards"
    )


def test_a_checkpoints_own_code_finds_all_as_torch_has_it():
    assert run("""
lean_imports.undo()
from transformers.utils import import_utils
print(json.dumps([import_utils.is_torch_distributed_available(), bool(torch._meta_registrations.__file__)]))
""") == [True, True]
    assert (
        run("""
from transformers.utils import import_utils
print(json.dumps(import_utils.is_torch_distributed_available()))
""")
        is False
    )


def test_decorators_of_the_compiler_do_nothing():
    assert run("""
def function(): return 1
found = [torch.compiler.disable(function) is function,
         torch._dynamo.disable(recursive=False)(function) is function,
         torch._dynamo.allow_in_graph(function)()]
from torch._dynamo import assume_constant_result
found += [assume_constant_result(function)(), "torch._dynamo.guards" in sys.modules]
lean_imports.finish()
found += [torch.compiler.disable(function) is function, "torch._dynamo.guards" in sys.modules]
print(json.dumps(found))
""") == [True, True, 1, 1, False, False, True]


def test_a_process_that_has_torch_stays_as_it_is():
    assert run(
        """
from backends import lean_imports
before = set(sys.modules), list(sys.meta_path)
lean_imports.install()
lean_imports.finish()
is_real = hasattr(torch._meta_registrations, "__file__")
print(json.dumps([before == (set(sys.modules), sys.meta_path), is_real]))
""",
        is_lean=False,
    ) == [True, True]
