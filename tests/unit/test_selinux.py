"""A guest with an SELinux policy is told from one whose kernel merely has SELinux built in."""

from __future__ import annotations

import pytest
from tests.unit.fake_guest import SIZE, FakeGuest

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.kernel.selinux import STATE, has_policy


def guest(**members: int) -> FakeGuest:
    """As Linux 6.1 lays it out."""
    fake = FakeGuest()
    fake.struct(STATE, ("enforcing", "B"), ("checkreqprot", "B"), ("initialized", "B"), ("ss", "p"))
    fake.variables[STATE] = fake.put(STATE, **members)
    return fake


def test_kernel_without_selinux_has_no_policy() -> None:
    assert has_policy(FakeGuest().kernel) is False


def test_kernel_that_never_loaded_a_policy_has_none() -> None:
    assert has_policy(guest(enforcing=1).kernel) is False


def test_loaded_policy_is_seen_whether_enforced_or_not() -> None:
    for enforcing in (0, 1):
        assert has_policy(guest(enforcing=enforcing, initialized=1).kernel) is True


def test_state_that_is_laid_out_otherwise_is_refused() -> None:
    fake = FakeGuest()
    fake.struct(STATE, ("enforcing", "B"))
    fake.variables[STATE] = 0x1000
    with pytest.raises(UnsupportedGuestError, match="laid out otherwise"):
        has_policy(fake.kernel)


def test_state_that_is_nowhere_is_corrupt() -> None:
    fake = guest()
    fake.variables[STATE] = SIZE + 1
    with pytest.raises(CorruptGuestError, match="leads nowhere"):
        has_policy(fake.kernel)
