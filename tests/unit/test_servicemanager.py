"""The stand-in over its own sockets: what clients are told, what is recorded, who is cut off."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from tests.unit.servicemanager_client import (
    MANAGER,
    NGINX,
    ROOT,
    TIMEOUT_S,
    UNITS,
    WANTS,
    Client,
    Served,
)

from ouassister.shadow.events import Event, Outcome, read_events
from ouassister.shadow.servicemanager.server import RECORD_PIPE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NO_SUCH_UNIT = "org.freedesktop.systemd1.NoSuchUnit"
UNKNOWN_METHOD = "org.freedesktop.DBus.Error.UnknownMethod"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    one = Served(tmp_path)
    yield one
    one.stop()


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    one = Client(served.private)
    yield one
    one.socket.close()


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """For questions alone."""
    served = Served(tmp_path_factory.mktemp("guest"))
    one = Client(served.private)
    yield one
    one.socket.close()
    served.stop()


def recorded(served: Served) -> list[tuple[Outcome, tuple[str, ...]]]:
    served.stop()
    return [(event.outcome, event.words) for event in read_events(served.records)]


def deferred(*words: str) -> tuple[Outcome, tuple[str, ...]]:
    return Outcome.DEFERRED, ("systemctl", *words)


# --- what is told of the guest ---


@pytest.mark.parametrize(
    ("unit", "load", "active", "sub"),
    [
        ("nginx_2eservice", "loaded", "active", "running"),
        ("web_2eservice", "loaded", "active", "running"),
        ("setup_2eservice", "loaded", "active", "exited"),
        ("plain_2eservice", "loaded", "inactive", "dead"),
        ("at_40x_2eservice", "loaded", "inactive", "dead"),
        ("hidden_2eservice", "masked", "inactive", "dead"),
        ("empty_2eservice", "masked", "inactive", "dead"),
        ("old_2eservice", "loaded", "inactive", "dead"),
        ("nothere_2eservice", "not-found", "inactive", "dead"),
        ("multi_2duser_2etarget", "loaded", "active", "active"),
        ("default_2etarget", "loaded", "active", "active"),
        ("network_2etarget", "loaded", "active", "active"),
        ("nightly_2etimer", "loaded", "active", "waiting"),
        ("unused_2etimer", "loaded", "inactive", "dead"),
        ("dbus_2esocket", "loaded", "active", "listening"),
        ("held_2esocket", "loaded", "active", "listening"),
        ("other_2esocket", "loaded", "inactive", "dead"),
        ("_2d_2emount", "loaded", "active", "mounted"),
        ("system_2eslice", "loaded", "active", "active"),
    ],
)
def test_states_are_those_that_memory_tells(
    reader: Client, unit: str, load: str, active: str, sub: str
) -> None:
    found = [
        reader.property(unit, "Unit", name) for name in ("LoadState", "ActiveState", "SubState")
    ]
    assert found == [load, active, sub]


def test_service_tells_its_processes_and_settings(client: Client) -> None:
    service = {
        name: client.property("nginx_2eservice", "Service", name)
        for name in ("MainPID", "Type", "PIDFile", "TasksCurrent", "ControlGroup", "Restart")
    }
    assert service == {
        "MainPID": 385, "Type": "forking", "PIDFile": "/run/nginx.pid", "TasksCurrent": 2,
        "ControlGroup": "/system.slice/nginx.service", "Restart": "always",
    }  # fmt: skip
    (start,) = client.property("nginx_2eservice", "Service", "ExecStart")
    assert start[:3] == ("/usr/sbin/nginx", ["/usr/sbin/nginx", "-g", "daemon on;"], False)
    (reload,) = client.property("nginx_2eservice", "Service", "ExecReload")
    assert reload[2] is True
    assert client.call("GetUnitProcesses", "s", "nginx.service")[0][0] == (
        "/system.slice/nginx.service", 385, "nginx: master process",
    )  # fmt: skip
    assert client.call("GetUnitByPID", "u", 390) == (f"{ROOT}/unit/nginx_2eservice",)
    assert client.call("GetUnitByPID", "u", 1234)[0] == "org.freedesktop.systemd1.NoUnitForPID"
    assert client.property("at_40a_2db_2eservice", "Unit", "Description") == "At a/b"


def test_pid_file_names_the_main_process(served: Served, client: Client) -> None:
    (served.private.parents[1] / "nginx.pid").write_text("390\n")
    assert client.property("nginx_2eservice", "Service", "MainPID") == 390
    (served.private.parents[1] / "nginx.pid").write_text("1\n")
    assert client.property("nginx_2eservice", "Service", "MainPID") == NGINX.pid


def test_units_are_listed_by_state_and_pattern(client: Client) -> None:
    (all_units,) = client.call("ListUnits")
    names = {row[0] for row in all_units}
    assert names >= {"nginx.service", "setup.service", "-.mount", "multi-user.target"}
    assert "plain.service" not in names
    (running,) = client.call("ListUnitsByPatterns", "asas", ["running"], ["*.service"])
    assert running == [
        ("nginx.service", "A web server", "loaded", "active", "running", "",
         f"{ROOT}/unit/nginx_2eservice", 0, "", "/"),
    ]  # fmt: skip
    (named,) = client.call("ListUnitsByNames", "as", ["plain.service", "../x", "nothere.service"])
    assert [row[:5:2] for row in named] == [
        ("plain.service", "loaded", "dead"),
        ("nothere.service", "not-found", "dead"),
    ]
    assert client.call("GetUnit", "s", "plain.service")[0] == NO_SUCH_UNIT
    assert client.call("LoadUnit", "s", "plain.service") == (f"{ROOT}/unit/plain_2eservice",)


def test_all_properties_of_a_unit_are_given_at_once(client: Client) -> None:
    asked = {"path": f"{ROOT}/unit/nginx_2eservice",
             "interface": "org.freedesktop.DBus.Properties"}  # fmt: skip
    (found,) = client.call("GetAll", "s", "", **asked)
    assert found["Id"] == ("s", "nginx.service")
    assert found["MainPID"] == ("u", 385)
    assert found["UnitFileState"] == ("s", "enabled")
    assert found["DropInPaths"] == ("as", ["/etc/systemd/system/nginx.service.d/local.conf"])
    (manager,) = client.call("GetAll", "s", MANAGER, interface="org.freedesktop.DBus.Properties")
    assert manager["SystemState"] == ("s", "running")


# --- what is recorded, and told back ---


def test_jobs_are_recorded_done_and_told_back(served: Served, client: Client) -> None:
    assert client.call("Reload") == ()
    assert client.call("StartUnit", "ss", "plain.service", "replace") == (f"{ROOT}/job/1",)
    assert client.property("plain_2eservice", "Unit", "ActiveState") == "active"
    client.call("StopUnit", "ss", "web.service", "replace")
    assert client.property("nginx_2eservice", "Unit", "ActiveState") == "inactive"
    assert client.property("nginx_2eservice", "Service", "MainPID") == 0
    client.call("RestartUnit", "ss", "nginx.service", "fail")
    assert client.property("nginx_2eservice", "Unit", "SubState") == "running"
    client.call("StartUnit", "ss", "once.service", "replace")
    assert client.property("once_2eservice", "Unit", "ActiveState") == "inactive"
    client.call("TryRestartUnit", "ss", "setup.service", "replace")
    client.call("KillUnit", "ssi", "nginx.service", "main-fail", 1)
    client.call("ResetFailedUnit", "s", "nginx.service")
    client.call("Restart", "s", "replace", path=f"{ROOT}/unit/at_40x_2eservice",
                interface="org.freedesktop.systemd1.Unit")  # fmt: skip
    client.call("Reexecute")
    assert recorded(served) == [
        deferred("daemon-reload"),
        deferred("start", "plain.service"),
        deferred("stop", "nginx.service"),
        deferred("restart", "--job-mode=fail", "nginx.service"),
        deferred("start", "once.service"),
        deferred("try-restart", "setup.service"),
        deferred("kill", "--fail", "--kill-who=main", "--signal=1", "nginx.service"),
        deferred("reset-failed", "nginx.service"),
        deferred("restart", "at@x.service"),
        deferred("daemon-reexec"),
    ]


def test_signals_of_a_job_follow_its_answer(client: Client) -> None:
    client.send("StartUnit", "ss", "plain.service", "replace")
    found = [client.receive() for _ in range(3)]
    kinds = [message.header.message_type.name for message in found]
    assert kinds == ["method_return", "signal", "signal"]
    assert found[1].body == (1, f"{ROOT}/job/1", "plain.service")
    assert found[2].body == (1, f"{ROOT}/job/1", "plain.service", "done")


def test_reload_of_what_does_not_run_is_invalid_and_not_recorded(
    served: Served, client: Client
) -> None:
    client.call("StopUnit", "ss", "nginx.service", "replace")
    for _ in range(2):
        client.receive()
    client.send("ReloadUnit", "ss", "nginx.service", "replace")
    assert [client.receive().body[-1] for _ in range(3)][2] == "invalid"
    assert recorded(served) == [deferred("stop", "nginx.service")]


@pytest.mark.parametrize(
    ("member", "unit", "error"),
    [
        ("StartUnit", "nothere.service", NO_SUCH_UNIT),
        ("StopUnit", "nothere.service", NO_SUCH_UNIT),
        ("RestartUnit", "hidden.service", "org.freedesktop.systemd1.UnitMasked"),
        ("StartUnit", "by-other.service", "org.freedesktop.systemd1.OnlyByDependency"),
        ("ReloadUnit", "plain.service", "org.freedesktop.systemd1.JobTypeNotApplicable"),
        ("StartUnit", "at@.service", "org.freedesktop.DBus.Error.InvalidArgs"),
        ("StartUnit", "../../etc/passwd", "org.freedesktop.DBus.Error.InvalidArgs"),
        ("StartUnit", "x;reboot.service", "org.freedesktop.DBus.Error.InvalidArgs"),
    ],
)
def test_job_that_systemd_refuses_is_refused_and_not_recorded(
    served: Served, client: Client, member: str, unit: str, error: str
) -> None:
    assert client.call(member, "ss", unit, "replace")[0] == error
    assert recorded(served) == []


def test_what_would_end_the_guest_is_withheld(served: Served, client: Client) -> None:
    client.call("StartUnit", "ss", "reboot.target", "replace-irreversibly")
    client.call("StartUnit", "ss", "multi-user.target", "isolate")
    client.call("PowerOff")
    assert client.property("reboot_2etarget", "Unit", "ActiveState") == "inactive"
    assert recorded(served) == [
        (Outcome.WITHHELD, ("systemctl", "start", "reboot.target")),
        (Outcome.WITHHELD, ("systemctl", "start", "multi-user.target")),
        (Outcome.WITHHELD, ("systemctl", "poweroff")),
    ]


def test_dependencies_are_added_by_the_guests_own_systemctl(served: Served, client: Client) -> None:
    words = (["nginx.service"], "multi-user.target")
    assert client.call("AddDependencyUnitFiles", "asssbb", *words, "Wants", False, False) == (
        [("symlink", f"{WANTS}/nginx.service", f"{UNITS}/nginx.service")],
    )
    assert served.systemctl.asked[-1][1:] == (
        "add-wants", "--", "multi-user.target", "nginx.service",
    )  # fmt: skip
    refused = client.call("AddDependencyUnitFiles", "asssbb", *words, "After", False, False)
    assert refused[0].endswith("InvalidArgs")
    assert recorded(served) == [
        (Outcome.DONE, ("systemctl", "add-wants", "multi-user.target", "nginx.service")),
    ]


def test_unit_files_are_changed_by_the_guests_own_systemctl(served: Served, client: Client) -> None:
    link = "/etc/systemd/system/multi-user.target.wants/nginx.service"
    target = "/usr/lib/systemd/system/nginx.service"
    assert client.call("EnableUnitFiles", "asbb", ["nginx.service"], False, True) == (
        True, [("symlink", link, target)],
    )  # fmt: skip
    assert served.systemctl.asked[-1] == ("systemctl", "enable", "--force", "--", "nginx.service")
    assert client.call("EnableUnitFilesWithFlags", "ast", ["plain.service"], 0) == (False, [])
    gone = "/etc/systemd/system/x.wants/nginx.service"
    assert client.call("DisableUnitFiles", "asb", ["nginx.service"], False) == (
        [("unlink", gone, "")],
    )
    failed = client.call("EnableUnitFiles", "asbb", ["nothere.service"], False, False)
    assert failed[1] == "Unit file nothere.service does not exist."
    client.call("DisableUnitFiles", "asb", ["nginx.service"], True)
    assert client.call("EnableUnitFiles", "asbb", ["a b"], False, False)[0].endswith("InvalidArgs")
    assert recorded(served) == [
        (Outcome.DONE, ("systemctl", "enable", "--force", "nginx.service")),
        (Outcome.DONE, ("systemctl", "disable", "nginx.service")),
        (Outcome.REFUSED, ("systemctl", "enable", "nothere.service")),
        (Outcome.DEFERRED, ("systemctl", "disable", "--runtime", "nginx.service")),
    ]


def test_file_states_are_asked_once_until_a_file_changes(served: Served, client: Client) -> None:
    assert client.call("GetUnitFileState", "s", "nginx.service") == ("enabled",)
    assert client.call("GetUnitFileState", "s", "at@x.service") == ("enabled",)
    assert client.call("GetUnitFileState", "s", "at@x.service") == ("enabled",)
    assert client.call("GetUnitFileState", "s", "nothere.service")[0].endswith("FileNotFound")
    before = len(served.systemctl.asked)
    assert before == 6  # paths; one; an instance, twice; one that is not there, twice
    assert served.systemctl.asked[0] == ("systemd-analyze", "unit-paths")
    (served.records.parent / "usr/lib/systemd/system/new.service").write_text("[Service]\n")
    client.call("GetUnitFileState", "s", "nginx.service")
    assert len(served.systemctl.asked) == before + 1
    assert client.call("ListUnitFilesByPatterns", "asas", ["static"], []) == (
        [("/usr/lib/systemd/system/plain.service", "static")],
    )
    (generated,) = client.call("ListUnitFilesByPatterns", "asas", ["generated"], [])
    assert ("/run/systemd/generator.late/old.service", "generated") in generated


def test_changed_unit_file_wants_a_reload(served: Served, client: Client) -> None:
    def outdated() -> object:
        return client.property("nginx_2eservice", "Unit", "NeedDaemonReload")

    assert outdated() is False
    path = served.records.parent / "usr/lib/systemd/system/nginx.service"
    deadline = time.monotonic() + TIMEOUT_S
    while outdated() is False:  # file systems count time in ticks
        assert time.monotonic() < deadline
        path.write_text(path.read_text() + "#\n")
    while outdated() is True:
        assert time.monotonic() < deadline
        client.call("Reload")


def test_unit_whose_file_went_is_not_found(served: Served, client: Client) -> None:
    client.call("StopUnit", "ss", "nginx.service", "replace")
    (served.records.parent / "usr/lib/systemd/system/nginx.service").unlink()
    assert client.property("nginx_2eservice", "Unit", "LoadState") == "not-found"
    assert client.call("StartUnit", "ss", "nginx.service", "replace")[0] == NO_SUCH_UNIT


def test_unit_that_came_meanwhile_was_not_active_when_the_guest_fell_asleep(
    served: Served, client: Client
) -> None:
    folder = served.records.parent / "usr/lib/systemd/system"
    (folder / "multi-user.target.wants").mkdir()
    (folder / "late.timer").write_text("[Timer]\nOnCalendar=daily\n")
    (folder / "multi-user.target.wants" / "late.timer").symlink_to("../late.timer")
    assert client.property("multi_2duser_2etarget", "Unit", "Wants")[-1] == "late.timer"
    assert client.property("nightly_2etimer", "Unit", "ActiveState") == "active"
    assert client.property("late_2etimer", "Unit", "ActiveState") == "inactive"


# --- what is refused, loudly ---


def test_what_is_in_no_table_is_an_error_and_recorded(served: Served, client: Client) -> None:
    assert client.call("Dump")[0] == UNKNOWN_METHOD
    assert client.call("Introspect", path="/x", interface="a.b")[0] == UNKNOWN_METHOD
    unknown = client.property("nginx_2eservice", "Service", "OOMPolicy")
    assert unknown[0] == "org.freedesktop.DBus.Error.UnknownProperty"
    variant: Any = ("Description", ("s", "x"))
    refused = client.call(
        "StartTransientUnit", "ssa(sv)a(sa(sv))", "a.service", "fail", [variant], []
    )
    assert refused[0] == "org.freedesktop.DBus.Error.NotSupported"
    assert client.call("StartUnit", "s", "nginx.service")[0].endswith("InvalidArgs")
    assert recorded(served) == [
        (Outcome.UNKNOWN, (f"{MANAGER}.Dump", ROOT)),
        (Outcome.UNKNOWN, ("a.b.Introspect", "/x")),
        (Outcome.UNKNOWN, ("org.freedesktop.systemd1.Service.OOMPolicy",
                           f"{ROOT}/unit/nginx_2eservice")),
        (Outcome.REFUSED, ("StartTransientUnit",)),
    ]  # fmt: skip


def test_system_bus_leads_to_systemd_and_tells_of_other_daemons(served: Served) -> None:
    client = Client(served.bus, bus=True)
    driver = {"path": "/org/freedesktop/DBus", "interface": "org.freedesktop.DBus",
              "to": "org.freedesktop.DBus"}  # fmt: skip
    assert client.name == ":1.1"
    assert client.call("GetNameOwner", "s", "org.freedesktop.systemd1", **driver) == (":1.0",)
    assert client.call("NameHasOwner", "s", "org.freedesktop.PolicyKit1", **driver) == (False,)
    assert client.call("AddMatch", "s", "type='signal'", **driver) == ()
    assert client.call("RequestName", "su", "org.x", 0, **driver)[0].endswith("AccessDenied")
    assert client.call("ReloadConfig", **driver) == ()
    assert client.call("StartServiceByName", "su", "org.freedesktop.systemd1", 0, **driver) == (2,)
    client.send("RestartUnit", "ss", "nginx.service", "replace", to="org.freedesktop.systemd1")
    assert [client.receive().header.message_type.name for _ in range(3)] == [
        "method_return", "signal", "signal",
    ]  # fmt: skip
    foreign = client.call("Reboot", "b", True, to="org.freedesktop.login1",
                          interface="org.freedesktop.login1.Manager")  # fmt: skip
    assert foreign[0] == "org.freedesktop.DBus.Error.ServiceUnknown"
    inhibit = client.call("Inhibit", "ssss", *"abcd", to="org.freedesktop.login1")
    assert inhibit == foreign
    client.socket.close()
    assert recorded(served) == [
        (Outcome.REFUSED, ("RequestName", "org.x")),
        deferred("reload", "dbus.service"),
        deferred("restart", "nginx.service"),
        (Outcome.FOREIGN, ("org.freedesktop.login1", "org.freedesktop.login1.Manager.Reboot")),
    ]


def test_call_before_hello_ends_the_connection(served: Served) -> None:
    client = Client(served.bus)
    client.send("ListUnits", to="org.freedesktop.systemd1")
    with pytest.raises(ConnectionResetError):
        client.receive()
    client.socket.close()


# --- recorders ---


def test_recorders_lines_stand_between_the_calls_in_their_order(
    served: Served, client: Client
) -> None:
    pipe = served.records.parent / RECORD_PIPE[1:]
    client.call("StartUnit", "ss", "plain.service", "replace")
    with pipe.open("w") as file:
        file.write("nginx\tpostinst\tupdate-grub\n")
    client.call("StopUnit", "ss", "plain.service", "replace")
    with pipe.open("wb") as raw:
        raw.write(b"\t\tsysctl\t-w\ta=1\n\t\trm\t-rf\t/\nnonsense\n" + b"x" * 9000)
    served.stop()
    events = read_events(served.records)
    assert events[:4] == (
        Event(Outcome.DEFERRED, ("systemctl", "start", "plain.service")),
        Event(Outcome.DEFERRED, ("update-grub",), "nginx", "postinst"),
        Event(Outcome.DEFERRED, ("systemctl", "stop", "plain.service")),
        Event(Outcome.DEFERRED, ("sysctl", "-w", "a=1")),
    )
    assert {event.outcome for event in events[4:]} == {Outcome.REFUSED}
    assert len(events) >= 7
