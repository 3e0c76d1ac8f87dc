"""The half of test_extract.py that runs inside a user and mount namespace, as its root.

Usage: ``python extract_inside.py JSON``. It needs the standard library alone: the interpreter of
the tests may be out of reach for the namespace's root.
"""

# Guest paths are bytes, which pathlib does not take.
# ruff: noqa: PTH101, PTH102, PTH104, PTH106, PTH108, PTH114, PTH115, PTH120, PTH123, PTH208, PTH211

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

NOBODY = 2**32 - 1
# linux/posix_acl_xattr.h: version, then tag, permissions and id of each entry.
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in [
        (1, 6, NOBODY),
        (2, 4, 1000),
        (4, 4, NOBODY),
        (16, 4, NOBODY),
        (32, 4, NOBODY),
    ]
)
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # cap_net_raw=ep
NAMES = [b"a", b"b", b"c d", b"new\nline", b"\xff\xfe", b"\xc3\xa9", b"x" * 255, b"back\\slash"]


def main() -> None:
    request = json.loads(sys.argv[1])
    os.chdir(request["work"])
    os.umask(0o022)
    sys.exit({"build": build, "update": update, "extract": extract}[request["do"]](request))


def build(request: dict[str, Any]) -> int:
    """Make the lower tree; and say what this kernel sees of it."""
    root = os.fsencode(request["root"])
    build_tree(root, random.Random(request["seed"]), 60)  # noqa: S311 - reproducible
    for line in request["script"]:
        exec(line, {"os": os, "ACL": ACL, "CAPABILITY": CAPABILITY})  # noqa: S102
    Path("built.json").write_text(json.dumps(snapshot(root)))
    return 0


def build_tree(root: bytes, rng: random.Random, count: int) -> None:
    directories = [root]
    files: list[bytes] = []
    for number in range(count):
        path = rng.choice(directories) + b"/" + rng.choice(NAMES)[:250] + b"%d" % number
        match rng.randrange(8):
            case 0 | 1:
                os.mkdir(path, rng.choice([0o755, 0o700, 0o1777, 0o2755]))
                directories.append(path)
            case 2:
                os.symlink(rng.choice([b"/etc/passwd", b"../..", b"dangling\n"]), path)
            case 3 if files:
                os.link(rng.choice(files), path)
            case 4:
                os.mkfifo(path, 0o640)
            case _:
                write(path, rng)
                files.append(path)
                if rng.random() < 0.2:
                    os.setxattr(path, "user.color", rng.randbytes(9))
        os.lchown(path, rng.choice([0, 0, 33, 1000, 65534]), rng.choice([0, 0, 42, 65534]))
        if not os.path.islink(path):
            os.chmod(path, rng.choice([0o644, 0o755, 0o4755, 0o600, 0o2711]))
        stamp(path, rng)


def write(path: bytes, rng: random.Random) -> None:
    with open(path, "wb") as file:
        if rng.random() < 0.2:
            file.seek(rng.randrange(1 << 20))  # a hole
        file.write(rng.randbytes(rng.choice([0, 1, 511, 512, 513, 70_000])))


def stamp(path: bytes, rng: random.Random) -> None:
    when = rng.randrange(-(10**9), 4 * 10**9) * 10**9 + rng.randrange(10**9)
    os.utime(path, ns=(when, when), follow_symlinks=False)


def update(request: dict[str, Any]) -> int:
    """Mount the union, change it, say what is seen in it, extract."""
    lower = "lower"
    if request["image"]:
        lower = "mounted"
        Path(lower).mkdir()
        subprocess.run([request["program"], request["image"], lower], check=True)
    for name in ("upper", "scratch", "merged"):
        Path(name).mkdir()
    options = f"lowerdir={lower},upperdir=upper,workdir=scratch,userxattr,volatile,xino=off"
    subprocess.run(["mount", "-t", "overlay", "o", "-o", options, "merged"], check=True)
    Path("before.json").write_text(json.dumps(snapshot(os.fsencode(lower))))
    for line in request["script"]:
        exec(line, {"os": os, "ACL": ACL, "CAPABILITY": CAPABILITY})  # noqa: S102
    if request["operations"]:
        rng = random.Random(request["seed"])  # noqa: S311
        operate(b"merged", rng, request["operations"])
    subprocess.run(["umount", "merged"], check=True)
    # Mounted afresh: the first mount shows lower inode numbers for what was copied up, even
    # between names of one file. The kernel refuses to mount again after "volatile".
    remove(b"scratch/work/incompat")
    subprocess.run(["mount", "-t", "overlay", "o", "-o", options, "merged"], check=True)
    Path("after.json").write_text(json.dumps(snapshot(b"merged")))
    subprocess.run(["umount", "merged"], check=True)
    for line in request["upper_script"]:
        exec(line, {"os": os})  # noqa: S102
    status = extract(request, lower)
    if request["image"]:
        subprocess.run(["umount", lower], check=True)
    return status


def extract(request: dict[str, Any], lower: str = "lower") -> int:
    sys.path.insert(0, request["source"])
    from ouassister.changeset.extract import main as extract_main

    argument = {
        "trees": [
            {
                "upper": "upper",
                "lower": lower,
            }
        ],
        "layer": f"{request['output']}/layer.tar",
        "record": f"{request['output']}/record.json",
    }
    return extract_main([json.dumps(argument)])


def operate(root: bytes, rng: random.Random, count: int) -> None:
    """Do what updaters do, and worse, to a tree."""
    for number in range(count):
        everything = [root, *walk(root)]
        path = rng.choice(everything[1:])
        status = os.lstat(path)
        kind = stat.S_IFMT(status.st_mode)
        directory = path if kind == stat.S_IFDIR else os.path.dirname(path)
        fresh = directory + b"/n%d" % number + rng.choice(NAMES)[:200]
        match rng.randrange(18):
            case 0:
                remove(path)
            case 1 if kind == stat.S_IFDIR:  # opaque, when it was a lower one
                remove(path)
                os.mkdir(path)
                write(path + b"/inside", rng)
                os.mkdir(path + b"/deeper")
            case 2 if kind == stat.S_IFDIR:
                remove(path)
                os.symlink(b"elsewhere", path)
            case 3 if kind != stat.S_IFDIR:
                remove(path)
                build_sub(path, rng)
            case 4 if kind == stat.S_IFREG:
                with open(path, "ab") as file:
                    file.write(b"more")
            case 5 if kind == stat.S_IFREG:  # as dpkg replaces
                write(fresh + b".dpkg-new", rng)
                os.rename(fresh + b".dpkg-new", path)
            case 6:
                os.lchown(path, rng.choice([0, 7, 65534]), rng.choice([0, 8, 65534]))
            case 7 if kind != stat.S_IFLNK:
                os.chmod(path, rng.choice([0o600, 0o4755, 0o2750, 0o1755]))
            case 8:
                stamp(path, rng)
            case 9 if kind == stat.S_IFREG:
                os.link(path, fresh)
            case 10 if kind == stat.S_IFREG:
                os.setxattr(path, "security.capability", CAPABILITY)
            case 11 if kind in (stat.S_IFREG, stat.S_IFDIR):
                os.setxattr(path, "system.posix_acl_access", ACL)
                if kind == stat.S_IFDIR:
                    os.setxattr(path, "system.posix_acl_default", ACL)
            case 12 if kind in (stat.S_IFREG, stat.S_IFDIR):
                os.setxattr(path, "user.note", rng.randbytes(20))
            case 13 if kind != stat.S_IFDIR:  # a rename; of directories it is EXDEV here
                os.rename(path, fresh)
            case 14:
                os.mkdir(fresh)
                write(fresh + b"/one", rng)
                os.link(fresh + b"/one", fresh + b"/two")
                os.rename(fresh, fresh + b"-moved")
            case 15:
                os.mkfifo(fresh, 0o600)
            case 16 if kind == stat.S_IFREG and status.st_nlink == 1:  # a copy-up, no change
                os.close(os.open(path, os.O_RDWR))
            case _:
                write(fresh, rng)


def build_sub(path: bytes, rng: random.Random) -> None:
    os.mkdir(path, 0o750)
    build_tree(path, rng, 4)


def remove(path: bytes) -> None:
    if stat.S_ISDIR(os.lstat(path).st_mode):
        for name in os.listdir(path):
            remove(path + b"/" + name)
        os.rmdir(path)
    else:
        os.unlink(path)


def walk(root: bytes) -> list[bytes]:
    found = []
    for name in sorted(os.listdir(root)):
        path = root + b"/" + name
        found.append(path)
        if stat.S_ISDIR(os.lstat(path).st_mode):
            found += walk(path)
    return found


def snapshot(root: bytes) -> dict[str, dict[str, Any]]:
    """Everything that can be seen of a tree, by path in hex."""
    seen = {}
    groups: dict[int, list[str]] = {}
    for path in walk(root):
        status = os.lstat(path)
        mode = status.st_mode
        key = path[len(root) :].hex()
        item: dict[str, Any] = {
            "mode": mode,
            "uid": status.st_uid,
            "gid": status.st_gid,
            "mtime_ns": status.st_mtime_ns,
            "ctime_ns": status.st_ctime_ns,
            "ino": status.st_ino,
            "size": status.st_size,
            "target": os.readlink(path).hex() if stat.S_ISLNK(mode) else "",
            "sha256": "",
            "xattrs": {},
            "links": [key],
        }
        if stat.S_ISREG(mode):
            with open(path, "rb") as file:
                item["sha256"] = hashlib.sha256(file.read()).hexdigest()
        for name in os.listxattr(path, follow_symlinks=False):
            try:
                value = os.getxattr(path, name, follow_symlinks=False)
            except OSError:  # what a FUSE mount in a user namespace hides
                continue
            item["xattrs"][name] = value.hex()
        if not stat.S_ISDIR(mode) and status.st_nlink > 1:
            group = groups.setdefault(status.st_ino, [])
            group.append(key)
            item["links"] = group
        seen[key] = item
    return seen


if __name__ == "__main__":
    main()
