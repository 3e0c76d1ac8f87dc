"""Why a guest was not built, from what the tools print."""

from __future__ import annotations

from ouassister.testing.guest import failure

# mmdebstrap 1.3.5 with a key ring that lacks the suite's keys; shortened.
UNKNOWN_KEY = """I: running apt-get update...
Err:1 http://m.example/debian trixie InRelease
  The following signatures couldn't be verified because the public key is not available: \
NO_PUBKEY 0E98404D386FA1D9
W: GPG error: http://m.example/debian trixie InRelease: The following signatures couldn't be ver...
E: The repository 'http://m.example/debian trixie InRelease' is not signed.
E: apt-get update --error-on=any -oAPT::Status-Fd=<$fd> -oDpkg::Use-Pty=false failed
I: main() received signal PIPE: waiting for setup...
E: mmdebstrap failed to run
"""
NOT_FOUND = """Err:81 http://m.example/debian bullseye/main amd64 linux-image-amd64 amd64 5.10.262-1
  404  Not Found [IP: 203.0.113.80 80]
E: Failed to fetch http://m.example/debian/pool/linux-image-amd64_5.10.262-1_amd64.deb  404
E: mmdebstrap failed to run
"""


def test_suite_signed_with_unknown_keys_asks_for_the_key_ring() -> None:
    error = failure("mmdebstrap", 25, UNKNOWN_KEY)
    assert "trixie InRelease" in error.message
    assert "debian-archive-keyring" in error.hint


def test_package_that_the_mirror_lacks_is_named() -> None:
    error = failure("mmdebstrap", 25, NOT_FOUND)
    assert "linux-image-amd64" in error.message
    assert "mirrors" in error.hint


def test_tool_without_marked_errors_is_quoted_from_its_end() -> None:
    error = failure("mke2fs", 1, "one\ntwo\nthree\nno room\n")
    assert error.message == "mke2fs ended with status 1: two; three; no room"
