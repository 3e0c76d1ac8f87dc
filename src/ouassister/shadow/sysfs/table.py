"""The support table of /sys and /dev: what a shadow shows, in part or not at all, and why.

All names, kinds, modes, owners, numbers and links of /sys are the guest's. What is told here is
which files say what they say in the guest; every other one is there, and reading it is an error
(EIO) that the report names.
"""

from __future__ import annotations

from typing import Final

from ouassister.shadow.procfs.table import Row, Shown

_BY_FUNCTION: Final = "computed by functions of the kernel that are not known here"
_COUNTERS: Final = "counters of the kernel that are not read from memory"

TABLE: Final[tuple[Row, ...]] = (
    Row("/sys/**", Shown.FULL, "names, types, modes, owners, inode numbers, sizes, links"),
    Row("/sys/kernel/slab/*, /sys/module/*/sections/*, notes/*", Shown.ABSENT,
        "the folders are empty: thousands of counters, and addresses"),
    Row("/sys/fs/cgroup, bpf, pstore, fuse/connections; /sys/kernel/debug, tracing, config; "
        "/sys/firmware/efi/efivars", Shown.ABSENT,
        "file systems of their own; the folders are empty"),
    Row("/sys/kernel/security", Shown.PARTIAL,
        "names, types, modes, owners; lsm, and of AppArmor features, profiles, .stacked, .ns_*; a "
        "policy that apparmor_parser writes to .load or .replace is loaded in the guest, by the "
        "same call, before services start; what is written elsewhere is recorded"),
    Row("/sys/devices/**/dev", Shown.FULL, ""),
    Row("/sys/devices/**/uevent", Shown.PARTIAL,
        "of PCI, virtio, platform, ACPI, SCSI, processors, block, network, input, DMI and of what "
        "adds nothing of its own; not of USB, power supplies and others"),
    Row("/sys/devices/**/modalias", Shown.PARTIAL,
        "of PCI, virtio, platform, ACPI, SCSI, processors, input and DMI; not of USB, HID"),
    Row("/sys/class/input/input*", Shown.PARTIAL,
        "name, phys, uniq, id, capabilities, properties"),
    Row("/sys/class/block/*: size, ro, removable, hidden, range, start, partition, "
        "alignment_offset, discard_alignment, diskseq, dm/name, dm/uuid", Shown.FULL, ""),
    Row("/sys/class/block/*/queue", Shown.PARTIAL,
        "sizes, limits, rotational, write_cache, fua, dax, zoned, read_ahead_kb, nr_requests and "
        "flags; not scheduler, io_poll, wbt_lat_usec"),
    Row("/sys/class/block/*: stat, inflight, events, ext_range, capability, serial, integrity, mq, "
        "trace", Shown.ABSENT, _COUNTERS),
    Row("/sys/class/net/*", Shown.PARTIAL,
        "type, address, broadcast, ifindex, iflink of real interfaces, mtu, flags, operstate, "
        "carrier, tx_queue_len and their like; not speed, duplex, statistics, queues"),
    Row("/sys/class/dmi/id, /sys/firmware/dmi/tables", Shown.FULL, "as root reads it"),
    Row("/sys/bus/pci/devices/*", Shown.PARTIAL,
        "vendor, device, subsystem_*, class, revision, irq without MSI, resource, enable, "
        "dma_mask_bits, numa_node, driver_override where none; not config, which the device has"),
    Row("/sys/bus/virtio/devices/*", Shown.PARTIAL,
        "vendor, device, features; not status, which the device has"),
    Row("/sys/bus/scsi/devices/*", Shown.PARTIAL,
        "vendor, model, rev, type, scsi_level; nothing where SCSI is a module of Linux 5.10"),
    Row("/sys/module/*: coresize, initsize, initstate, refcnt, taint, version, srcversion",
        Shown.FULL, ""),
    Row("/sys/module/*/parameters", Shown.PARTIAL,
        "numbers, booleans, texts and arrays of them; not what functions of a module print"),
    Row("/sys/devices/system/cpu: online, possible, present, offline, kernel_max, cpu*/online, "
        "cpu*/topology, cpu*/cache", Shown.PARTIAL, "not clusters"),
    Row("/sys/devices/system/cpu: vulnerabilities, smt, isolated, cpufreq, cpuidle", Shown.ABSENT,
        _BY_FUNCTION),
    Row("/sys/devices/system/node", Shown.PARTIAL, "which nodes and processors there are"),
    Row("/sys/kernel: uevent_seqnum, fscaps, kexec_loaded, kexec_crash_loaded, profiling, rcu_*; "
        "mm/transparent_hugepage: enabled, use_zero_page, hpage_pmd_size", Shown.FULL, ""),
    Row("/sys/power, /sys/fs/*, /sys/firmware/acpi, /sys/bus/*/drivers_autoprobe, */power, "
        "other files", Shown.ABSENT, _BY_FUNCTION),
    Row("/sys/**, written", Shown.PARTIAL,
        "a value is recorded where the mode lets it be written, and changes nothing; an event "
        "(uevent) is triggered in the guest; chmod and chown are refused (EROFS)"),
    Row("/dev/**", Shown.FULL,
        "all nodes and links of the guest, with type, number, mode and owner; "
        "opening a device fails (EACCES)"),
    Row("/dev: null, zero, full, random, urandom, tty", Shown.OWN,
        "the host's, owned by nobody; they reach nothing"),
    Row("/dev/pts, /dev/ptmx", Shown.OWN, "an instance of the shadow's"),
    Row("/dev/**, written", Shown.PARTIAL,
        "files, folders, links, sockets and pipes can be made, and end with the run; a node that "
        "mknod(2) makes is an empty file and recorded"),
)  # fmt: skip
