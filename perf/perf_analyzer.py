"""The ensemble alone, without the gateway, as NVIDIA's perf_analyzer measures it.

    .venv-test/bin/python perf/perf_analyzer.py

Starts the server, and sends it the paragraphs of perf/texts.json over gRPC, one a request and 64, at each of
--concurrency. The program comes from PyPI and is built for glibc 2.38; on an older system it runs on the
libraries of Debian 13, which apt-get fetches and which stay in build/perf, beside the system's own. Rows
go to perf/results/perf_analyzer.csv.
"""

import csv
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import load
import server
from recording import CACHE, ROOT, append, spread

VERSION = "2.60.0"
NEEDS_GLIBC = (2, 38)
SUITE = "trixie"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PACKAGES = ("libc6", "libstdc++6", "libgcc-s1", "libssl3t64", "libzstd1", "zlib1g")
TEXTS = ROOT / "perf" / "texts.json"


def command() -> list[str]:
    """The program, fetched where it is missing, behind a newer loader where the system is too old."""
    folder = CACHE / f"perf_analyzer-{VERSION}"
    program = folder / "perf_analyzer" / "bin" / "perf_analyzer"
    if not program.exists():
        # By its platform's name: pip refuses it by itself on a system that is too old.
        wanted = ["--platform", "manylinux_2_38_x86_64", "--only-binary", ":all:", "--no-deps"]
        pip = [sys.executable, "-m", "pip", "download", *wanted, "--dest", folder]
        subprocess.run([*pip, f"perf-analyzer=={VERSION}"], check=True)
        (wheel,) = folder.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(folder)
        program.chmod(0o755)
    found = tuple(map(int, platform.libc_ver()[1].split(".")[:2]))
    if found >= NEEDS_GLIBC:
        return [str(program)]
    libraries = newer_libraries() / "usr" / "lib"
    path = ":".join(str(libraries / name) for name in ("x86_64-linux-gnu", "."))
    return [str(next(libraries.rglob("ld-linux-x86-64.so.2"))), "--library-path", path, str(program)]


def newer_libraries() -> Path:
    """Where Debian's packages are unpacked; nothing of it is installed."""
    root = CACHE / f"debian-{SUITE}"
    if (root / "ready").exists():
        return root
    if not KEYRING.exists():
        sys.exit(
            f"error: glibc here is older than 2.38, and {KEYRING} is missing to fetch Debian's newer one"
        )
    for name in ("state/lists/partial", "cache/archives/partial"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "state" / "status").touch()
    source = f"deb [signed-by={KEYRING}] http://deb.debian.org/debian {SUITE} main\n"
    (root / "sources.list").write_text(source)
    settings = {
        "Dir::Etc::SourceList": root / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State": root / "state",
        "Dir::State::status": root / "state" / "status",
        "Dir::Cache": root / "cache",
        "APT::Sandbox::User": "",
    }
    apt = ["apt-get", *(f"-o{name}={value}" for name, value in settings.items())]
    subprocess.run([*apt, "update"], check=True, cwd=root)
    subprocess.run([*apt, "download", *PACKAGES], check=True, cwd=root)
    for package in root.glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", package, root], check=True)
    (root / "ready").touch()
    return root


def measure(program: list[str], grpc: str, size: int, concurrency: int, seconds: int) -> dict[str, str]:
    """A row of what it writes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.csv"
        flags = ["-m", server.NAME, "-i", "grpc", "-u", grpc, "--concurrency-range", str(concurrency)]
        flags += ["--input-data", str(TEXTS), "-b", str(size)]
        flags += ["--request-parameter", "truncation:right:string"]
        # Three windows, which it always needs; 999 % lets noisy ones stand, and rounds are counted here.
        flags += ["--measurement-interval", str(1000 * seconds), "-s", "999", "-f", str(file)]
        environment = {**os.environ, "LC_ALL": "C"}
        done = subprocess.run([*program, *flags], capture_output=True, text=True, env=environment)
        if not file.exists():
            sys.exit(f"error: perf_analyzer ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        with file.open(newline="") as stream:
            return next(csv.DictReader(stream))


def main() -> None:
    parser = load.arguments(__doc__, rounds=3)
    server.add_arguments(parser)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 64], help="of one request")
    parser.add_argument("--seconds", type=int, default=5, help="of one of three windows")
    given = parser.parse_args()
    program = command()
    rows = []
    with server.ours(given) as serving:
        for size in given.texts:
            for concurrency in given.concurrency:
                found = [
                    measure(program, serving.grpc, size, concurrency, given.seconds)
                    for _ in range(given.rounds)
                ]
                rates = [float(one["Inferences/Second"]) for one in found]
                waits = [
                    spread([float(one[f"{percent} latency"]) / 1000 for one in found], 1)[0]
                    for percent in ("p50", "p90", "p99")
                ]
                rows.append([size, concurrency, *spread(rates, 1), *waits, len(found)])
                values = " ".join(f"{value:>8}" for value in rows[-1][2:])
                print(f"{size:>3} texts at {concurrency:>3}: {values}")
    header = ["texts", "concurrency", "texts/s", "min", "max", "p50 ms", "p90 ms", "p99 ms", "rounds"]
    append("perf_analyzer.csv", header, rows, peers=[f"perf_analyzer {VERSION}"])


if __name__ == "__main__":
    main()
