"""What the guest is asked behind the closed gate, and what is made of its answers."""

from __future__ import annotations

import dataclasses
import json

import pytest
from tests.unit.test_changeset_archive import build

from ouassister.model import Action, Changeset, PackageChange, Restart, Staged, Verdict
from ouassister.reflect import applier_protocol, verify
from ouassister.restart.reach import Parts

SINCE_MS = 50_000.0


def changeset() -> Changeset:
    return build(
        changes=(
            PackageChange("nginx", "amd64", "1", "2"),
            PackageChange("libc6", "amd64", "1", "2"),
        ),
        restarts=(
            Restart("nginx.service", Verdict.RESTART, "", ()),
            Restart("dbus.service", Verdict.ADVISE, "", ()),
        ),
    )


GOOD = ("v marker clean", "v audit 0", "v units 0", "v attested 0")


def judged(*lines: str) -> verify.Verification:
    return verify.judge(changeset(), SINCE_MS, "".join(f"{line}\n" for line in lines).encode())


def test_good_answers_are_verified_and_nothing_else() -> None:
    assert judged("0 0", *GOOD) == verify.Verification(
        (),
        (
            "completion marker of this change set",
            "dpkg --audit names no package of this change set",
            "no restarted unit has failed",
        ),
        (),
    )


def test_unit_that_is_restarted_later_is_not_looked_at_yet_and_the_attestation_says_so() -> None:
    later = (Action(("systemctl", "try-restart", "nginx.service")),)
    answers = "\n".join((*GOOD, "v unit nginx.service")).encode()
    assert verify.judge(changeset(), SINCE_MS, answers).problems != ()
    told = verify.judge(changeset(), SINCE_MS, answers, later)
    assert told.problems == ()
    assert "no restarted unit has failed" not in told.verified
    parts = Parts(later, 0, (7, 9), ())
    *_, script, _name, words = verify.begin_command(changeset(), parts)
    assert "\nunits=''\n" in script
    assert json.loads(words + '"x":1}')["to_follow"] == ["systemctl try-restart nginx.service"]
    assert "to_follow" not in verify.command(changeset(), later)[-1]
    assert "to_follow" not in verify.follow_command(changeset(), parts, 12)[-1]


def test_units_that_nobody_asked_for_are_not_verified() -> None:
    told = judged(GOOD[0], GOOD[1], GOOD[3])
    assert told.problems == ()
    assert "no restarted unit has failed" not in told.verified


def test_silence_is_a_problem() -> None:
    told = judged()
    assert [problem.partition(" ")[0] for problem in told.problems] == ["the", "dpkg"]
    assert told.verified == ()
    assert told.notes == ("the guest could not write its attestation",)


def test_marker_of_another_is_a_problem() -> None:
    (problem,) = judged("v marker not clean", *GOOD[1:]).problems
    assert "marker" in problem


def audit(*lines: str) -> verify.Verification:
    return judged("v marker clean", "v audit 0", *(f"v audit: {line}" for line in lines),
                  "v units 0", "v attested 0")  # fmt: skip


HEAD = "The following packages are only half configured, probably due to problems"


def test_package_of_the_change_set_that_dpkg_names_is_a_problem() -> None:
    told = audit(HEAD, "configuring them the first time:", " nginx                small web server")
    assert told.problems == ("dpkg --audit names nginx",)
    assert not [words for words in told.verified if "audit" in words]
    assert audit(HEAD, " nginx:amd64").problems == ("dpkg --audit names nginx",)


def test_package_of_nobodys_that_dpkg_names_is_told() -> None:
    told = audit(HEAD, " other                not ours")
    assert told.problems == ()
    assert "other" in told.notes[0]


@pytest.mark.parametrize(
    "lines",
    [
        ("v audit 127", "v audit: sh: dpkg: not found"),
        ("v audit 2",),
        ("v audit x\x1b[2J",),
        ("v audit 0", "v audit: words that name no package"),
    ],
)
def test_audit_that_says_something_else_is_a_problem(lines: tuple[str, ...]) -> None:
    (problem,) = judged("v marker clean", *lines, "v units 0", "v attested 0").problems
    assert problem.startswith("dpkg --audit ended with")
    assert problem.isprintable()


def test_restarted_unit_that_failed_is_a_problem_whenever_it_did() -> None:
    told = judged(*GOOD, "v unit nginx.service", "v since 3")
    assert told.problems == ("nginx.service ran at suspend and failed when restarted",)


def test_other_failed_units_are_told_when_they_failed_since() -> None:
    told = judged(*GOOD, "v unit old.service", "v unit new.service", "v since 49999999",
                  "v since 50000000")  # fmt: skip
    assert (told.problems, told.notes) == ((), ("failed since the resume: new.service",))
    told = judged(*GOOD, "v unit old.service", "v unit new.service", "v since 49999999")
    assert told.notes == ("failed now, and perhaps at suspend: new.service, old.service",)
    told = judged(*GOOD, "v unit old.service", "v since \u0663")
    assert told.notes == ("failed now, and perhaps at suspend: old.service",)


def test_service_manager_that_does_not_answer_is_told() -> None:
    told = judged("v marker clean", "v audit 0", "v units 1", "v attested 0")
    assert told.problems == ()
    assert told.notes == ("the guest's service manager does not tell which units have failed",)


def test_names_of_a_hostile_guest_are_few_and_escaped() -> None:
    units = [f"v unit \x1b[2J{number}{'x' * 4000}.service" for number in range(100)]
    (note,) = judged(*GOOD, *units).notes
    assert "\x1b" not in note
    assert "and 92 more" in note
    assert len(note) < 3000


def test_attestation_begins_as_an_object_and_is_cut_into_words_that_fit() -> None:
    many = tuple(PackageChange(f"package-{n}", "amd64", "1.0", "2.0") for n in range(3000))
    made = dataclasses.replace(changeset(), changes=many)
    shell, option, script, name, *words = verify.command(made, (Action(("systemctl", "x'y")),))
    assert (shell, option, name) == ("/bin/sh", "-c", "ouassister-reflect")
    assert len(words) > 1
    assert all(0 < len(word) <= 1 << 16 for word in words)
    value = json.loads("".join(words) + '"end":1}')
    assert [one["name"] for one in value["packages"]] == [one.name for one in many]
    assert value["changeset"] == made.changeset_id
    assert "package-7" not in script
    assert script.startswith(f"id={made.changeset_id}\nserviced=yes\nunits=nginx.service\n")
    assert script.endswith("\nfinish")


@pytest.mark.parametrize(
    ("outcome", "phases", "attested"),
    [
        ("applied", {"attest": 1.0, "marker": 1.0}, True),
        ("applied", {"marker": 1.0}, False),  # it took up another run
        ("already-applied", {}, False),
        ("already-applied", {"attest": 1.0}, False),
    ],
)
def test_applier_that_saw_every_byte_and_attested_is_enough(
    outcome: str, phases: dict[str, float], attested: bool
) -> None:
    said = {"event": "result", "result": outcome, "code": "", "path": "", "reason": "",
            "files": 1, "bytes": 1, "phases": phases, "ms": 1.0}  # fmt: skip
    result = applier_protocol.parse_output(json.dumps(said).encode() + b"\n")
    assert verify.is_attested(result) is attested


def test_applier_attests_only_where_nothing_is_done_after_it() -> None:
    alone = dataclasses.replace(changeset(), actions=())
    begun = verify.for_applier(alone)
    assert json.loads(begun + '"result":"verified"}')["changeset"] == alone.changeset_id
    assert verify.for_applier(changeset()) == ""
    staged = (Staged("x", "amd64", "", "1", "", 0, "", False, "x"),)
    assert verify.for_applier(dataclasses.replace(changeset(), actions=(), staged=staged)) == ""


def test_nothing_is_asked_of_the_service_manager_when_nothing_was_done() -> None:
    assert "\nserviced=''\n" in verify.command(changeset(), ())[2].replace("=\n", "=''\n")
