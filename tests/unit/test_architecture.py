"""The rules of the tree that a reader cannot check by eye: sizes, import direction, effects.

Imports point one way: cli -> demo, pipeline -> sleeping, reflect, packages -> changeset, shadow ->
disk, kernel -> memory -> state -> the base (model, errors, codec, text). The provider drives QEMU
and knows nothing of what a guest contains; the store keeps records and knows nobody.
"""

from __future__ import annotations

import ast
import os
import re
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]
SOURCE: Final = ROOT / "src" / "ouassister"
MODULES: Final = sorted(SOURCE.rglob("*.py"))
MAX_LINES: Final = 500

BASE: Final = frozenset(
    ("access", "durable", "errors", "guest_model", "partial_model", "restart_model", "model",
     "text", "codec")
)  # fmt: skip
ALLOWED: Final[dict[str, frozenset[str]]] = {
    "access": frozenset(),
    "durable": frozenset(),
    "errors": frozenset(),
    "text": frozenset(),
    "guest_model": frozenset(),
    "restart_model": frozenset(("guest_model",)),
    "partial_model": frozenset(),
    "model": frozenset(("access", "guest_model", "partial_model", "restart_model")),
    "codec": frozenset(("text",)),
    "timeline": BASE,
    "interrupts": BASE,
    "store": BASE,
    "state": BASE,
    "memory": BASE | {"state"},
    "kernel": BASE | {"state", "memory"},
    "disk": BASE | {"state", "memory", "kernel"},
    "shadow": BASE | {"state", "memory", "kernel", "disk"},
    "changeset": BASE | {"state", "memory", "kernel", "disk"},
    "packages": BASE | {"state", "memory", "kernel", "disk", "shadow", "changeset", "timeline"},
    "restart": BASE | {"disk", "kernel", "memory", "shadow", "state"},
    "partial": BASE | {"changeset", "packages", "restart", "shadow"},
    "provider": BASE | {"state"},
    "reflect": BASE | {"changeset", "provider", "restart", "state", "store", "timeline"},
    "snapshots": BASE | {"provider", "state"},
    "looking": BASE | {"kernel", "memory", "provider", "state"},
    "sleeping": BASE | {"disk", "kernel", "memory", "packages", "provider", "state"},
    "beside": BASE | {"shadow"},
    "guest_shadow": BASE
    | {
        "beside",
        "disk",
        "interrupts",
        "kernel",
        "provider",
        "restart",
        "shadow",
        "sleeping",
        "state",
    }
    | {"store", "timeline"},
    "reaching": BASE | {"guest_shadow", "provider", "shadow"},
    "staging": BASE
    | {"changeset", "disk", "guest_shadow", "kernel", "memory", "packages", "restart", "shadow"}
    | {"timeline"},
    "offline": BASE
    | {
        "changeset",
        "guest_shadow",
        "packages",
        "partial",
        "reaching",
        "restart",
        "shadow",
        "staging",
        "state",
    }
    | {"store", "timeline"},
    "pipeline": BASE
    | {"changeset", "disk", "guest_shadow", "kernel", "memory", "packages", "provider", "reflect"}
    | {
        "partial",
        "offline",
        "reaching",
        "restart",
        "shadow",
        "sleeping",
        "snapshots",
        "state",
        "store",
    }
    | {"timeline"},
    "doctor": BASE | {"disk", "provider", "shadow", "store"},
    "testing": BASE | {"disk", "kernel", "memory", "provider", "state"},
    "demo": BASE
    | {"changeset", "disk", "doctor", "pipeline", "provider", "sleeping", "store", "testing"}
    | {"timeline"},
    "cli": BASE
    | {
        "changeset",
        "demo",
        "doctor",
        "interrupts",
        "looking",
        "packages",
        "pipeline",
        "provider",
        "shadow",
        "sleeping",
        "snapshots",
    }
    | {"state", "store", "timeline"},
    "__main__": frozenset(("cli",)),
    "__init__": frozenset(),
}
# To be moved, each out of the folder where it is now.
THIRD_PARTY: Final[dict[str, frozenset[str]]] = {
    "kernel": frozenset(("drgn",)),
    "provider": frozenset(("qemu",)),
    "shadow": frozenset(("jeepney", "mfusepy")),
}
# Where a process of its own begins or ends, besides the command line's.
PROCESSES: Final = frozenset(
    (
        "__main__.py",
        "beside.py",
        "changeset/extract.py",
        "shadow/fetch/proxy.py",
        "shadow/host_mounts.py",
        "shadow/keeper.py",
        "shadow/remove.py",
        "shadow/programs.py",
        "shadow/runner.py",
        "shadow/served/server.py",
        "shadow/servicemanager/guestctl.py",
        "shadow/servicemanager/process.py",
        "shadow/supervisor.py",
        "shadow/trees/serve.py",
    )
)
STORY: Final = "timeline.py"  # tells the story of a run on standard error
CITES: Final = re.compile(
    r"\bSource\b|\bcommit\b|Documentation/|\b[\w/{},-]+\.(?:c|h|rst|tbl|txt)\b|\b\w+\([2-8]\)"
)


def unit(path: Path) -> str:
    """The folder of a module, or its name where it lies at the top."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def name(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(path.read_text(), str(path))))


def imports(path: Path) -> Iterator[str]:
    """Every imported module, wherever the import stands."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: write imports in full"
            assert node.module is not None
            if node.module == "ouassister":
                yield from (f"ouassister.{alias.name}" for alias in node.names)
            else:
                yield node.module


def docstring(path: Path) -> str:
    module = nodes(path)[0]
    assert isinstance(module, ast.Module)
    return ast.get_docstring(module) or ""


def calls(path: Path) -> Iterator[str]:
    """Every called name, as it is spelled."""
    for node in nodes(path):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def texts() -> Iterator[tuple[Path, str]]:
    """Every text file of the project but what is built or downloaded."""
    skipped = {".git", ".venv", "build", "__pycache__", "bin"}
    for folder, below, files in os.walk(ROOT):
        below[:] = [
            one for one in below if one not in skipped and not one.endswith((".egg-info", "_cache"))
        ]
        for file in set(files) - {".git"}:  # in a work tree of git(1) it is a file
            path = Path(folder, file)
            data = path.read_bytes()
            if b"\0" not in data:
                yield path, data.decode("utf-8", "replace")


@pytest.mark.parametrize("folder", ["src", "tests", "guest"])
def test_modules_stay_readable(folder: str) -> None:
    paths = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".c", ".h")]
    assert paths
    long = {
        str(path.relative_to(ROOT)): lines
        for path in paths
        if (lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert long == {}


def test_every_folder_stands_in_the_table_of_imports() -> None:
    assert {unit(path) for path in MODULES} == ALLOWED.keys()


def test_table_of_imports_has_no_cycle() -> None:
    remaining = dict(ALLOWED)
    while remaining:
        free = [one for one, needs in remaining.items() if not needs & remaining.keys()]
        assert free, f"a cycle among {sorted(remaining)}"
        for one in free:
            del remaining[one]


def test_imports_point_one_way() -> None:
    wrong = [
        f"{name(path)} imports {module}"
        for path in MODULES
        for module in imports(path)
        if module.startswith("ouassister.")
        and module.split(".")[1] not in ALLOWED[unit(path)] | {unit(path)}
    ]
    assert wrong == []


def test_dependencies_stay_where_they_belong() -> None:
    known = sys.stdlib_module_names | {"ouassister"}
    wrong = [
        f"{name(path)} imports {module}"
        for path in MODULES
        for module in imports(path)
        if (top := module.split(".")[0]) not in known and top not in THIRD_PARTY.get(unit(path), ())
    ]
    assert wrong == []


def test_raw_system_calls_are_in_one_file() -> None:
    users = {name(path) for path in MODULES if "ctypes" in imports(path)}
    assert users == {"disk/libext2fs.py", "shadow/raw.py"}


def test_only_the_command_line_prints_and_exits() -> None:
    exits = {"sys.exit", "os._exit", "exit", "quit", "SystemExit", "os.abort"}
    exits |= {"sys.stdout.write", "sys.stderr.write"}
    others = [path for path in MODULES if unit(path) != "cli"]
    assert {name(path) for path in others if "print" in calls(path)} <= {STORY}
    assert {name(path) for path in others if exits & set(calls(path))} <= PROCESSES


def test_no_failure_is_swallowed_unseen() -> None:
    wrong = [
        f"{name(path)}:{node.lineno}"
        for path in MODULES
        for node in nodes(path)
        if swallows(node) and isinstance(node, ast.ExceptHandler | ast.Call)
    ]
    assert wrong == []


def swallows(node: ast.AST) -> bool:
    """A bare except, a broad one that does nothing, or a broad suppress()."""
    broad = {"Exception", "BaseException"}
    if isinstance(node, ast.ExceptHandler):
        kind = ast.unparse(node.type) if node.type is not None else ""
        does_nothing = all(isinstance(step, ast.Pass) for step in node.body)
        return not kind or (kind in broad and does_nothing)
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
        return bool({ast.unparse(one) for one in node.args} & broad)
    return False


def test_layouts_cite_their_source() -> None:
    layouts = [p for p in MODULES if unit(p) in ("state", "kernel") and p.stem != "__init__"]
    assert len(layouts) > 15
    silent = [name(path) for path in layouts if not CITES.search(docstring(path))]
    assert silent == []


def test_no_text_names_a_registry_or_a_mirror() -> None:
    hosts = [
        ".".join(parts)
        for parts in (
            ("pypi", "org"),
            ("python" + "hosted", "org"),
            ("crates", "io"),
            ("npmjs", "org"),
            ("npmjs", "com"),
            ("rubygems", "org"),
            ("proxy", "golang", "org"),
            ("docker", "io"),
            ("ghcr", "io"),
            ("quay", "io"),
            ("debian", "org"),
            ("archive", "ubuntu", "com"),
        )
    ]
    named = re.compile("|".join(map(re.escape, hosts)), re.IGNORECASE)
    found = {str(path.relative_to(ROOT)): named.findall(text) for path, text in texts()}
    assert {path: hosts for path, hosts in found.items() if hosts} == {}


def test_no_text_names_a_path_of_one_machine() -> None:
    places = {str(ROOT), "/" + "work/", "/" + "tmp/v/", "/" + "tmp/sample"}
    if not sys.prefix.startswith("/usr"):
        places.add(sys.prefix)
    pattern = "|".join(map(re.escape, sorted(places)))
    named = re.compile(rf"(?<![\w.$}}])(?:{pattern}|/home/[a-z])")
    found = {str(path.relative_to(ROOT)): named.findall(text) for path, text in texts()}
    assert {path: places for path, places in found.items() if places} == {}


# --- the guards of this tier fire ---


def test_a_unit_test_cannot_start_a_program() -> None:
    with pytest.raises(BaseException, match="starts a program"):
        subprocess.run(["true"], check=False)
    with pytest.raises(BaseException, match="starts a program"):
        os.fork()
    with pytest.raises(BaseException, match="starts a program"):
        os.system("true")  # noqa: S605


def test_a_unit_test_cannot_reach_the_network() -> None:
    for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_VSOCK):
        with pytest.raises(BaseException, match="opens a socket"):
            socket.socket(family, socket.SOCK_STREAM)
    with pytest.raises(BaseException, match="looks up a name"):
        socket.getaddrinfo("mirror.example", 80)
    socket.socket(socket.AF_UNIX).close()
    for end in socket.socketpair():
        end.close()


def test_a_unit_test_has_no_privilege(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0)
    with pytest.raises(PermissionError):
        secret.read_text()
    with pytest.raises(PermissionError):
        os.chown(secret, os.geteuid() + 1, -1)
    with pytest.raises(PermissionError):
        os.chroot(tmp_path)


def loaded_with(path: Path) -> set[str]:
    """Every module of ours that is there once this one is imported."""
    found: set[str] = set()
    left = [path]
    while left:
        tree = nodes(left.pop())[0]
        assert isinstance(tree, ast.Module)
        for node in tree.body:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            for module in names:
                parts = module.split(".")
                if parts[0] != "ouassister" or module in found:
                    continue
                places = SOURCE.joinpath(*parts[1:])
                for place in (places.with_suffix(".py"), places / "__init__.py"):
                    if place.exists():
                        found.add(module)
                        left.append(place)
    return found


def test_inspect_waits_for_nothing_that_it_does_not_need() -> None:
    """Importing is half of what a short command takes; disks and QEMU's protocol come with much."""
    found = loaded_with(SOURCE / "cli" / "inspect_verb.py")
    assert {"ouassister.kernel.tasks", "ouassister.memory.save", "ouassister.cli.common"} <= found
    assert not found & {
        "ouassister.changeset.extract",
        "ouassister.pipeline",
        "ouassister.provider.qemu",
        "ouassister.provider.qmp",
        "ouassister.sleeping",
        "ouassister.state.expand",
        "ouassister.store.database",
    }
