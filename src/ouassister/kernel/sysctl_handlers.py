"""Which function prints which kind of value below /proc/sys; a table, no code.

Listed are the plain ones and those around them that act only when a value is written. A function
that is not listed computes what it prints.

Source: Linux v6.1 and v6.12, at each function: ``kernel/sysctl.c`` (``proc_do*``),
``mm/page-writeback.c``, ``mm/page_alloc.c``, ``mm/util.c``, ``net/ipv4/devinet.c``,
``net/core/neighbour.c``, ``net/ipv6/addrconf.c``, ``net/ipv4/sysctl_net_ipv4.c``,
``net/core/sysctl_net_core.c``, ``kernel/hung_task.c``, ``kernel/utsname_sysctl.c``,
``drivers/char/random.c``.
"""

from __future__ import annotations

from enum import Enum
from typing import Final


class Kind(Enum):
    """How a value is kept, and shown."""

    INT = "int"
    UINT = "unsigned int"
    LONG = "unsigned long"
    BOOL = "bool"
    U8 = "u8"
    STRING = "text"
    UUID = "16 bytes"
    JIFFIES = "int, ticks shown as seconds"
    MS_JIFFIES = "int, ticks shown as milliseconds"
    USER_JIFFIES = "int, ticks shown as hundredths of a second"


_BY_KIND: Final = {
    Kind.INT: """
        addrconf_sysctl_addr_gen_mode addrconf_sysctl_disable addrconf_sysctl_disable_policy
        addrconf_sysctl_force_forwarding addrconf_sysctl_forward
        addrconf_sysctl_ignore_routes_with_linkdown addrconf_sysctl_mtu addrconf_sysctl_proxy_ndp
        bpf_unpriv_handler compaction_proactiveness_sysctl_handler
        devinet_conf_proc devinet_sysctl_forward dirty_background_ratio_handler dirty_ratio_handler
        dirty_writeback_centisecs_handler dirtytime_interval_handler flow_limit_table_len_sysctl
        ftrace_enable_sysctl ipv4_doint_and_flush lowmem_reserve_ratio_sysctl_handler
        min_free_kbytes_sysctl_handler neigh_proc_dointvec_zero_intmax overcommit_policy_handler
        overcommit_ratio_handler percpu_pagelist_high_fraction_sysctl_handler
        perf_cpu_time_max_percent_handler perf_event_max_sample_rate_handler
        perf_event_max_stack_handler perf_proc_update_handler proc_do_dev_weight proc_do_rointvec
        proc_dointvec proc_dointvec_minmax proc_dointvec_minmax_bpf_enable
        proc_dointvec_minmax_bpf_restricted proc_dointvec_minmax_coredump
        proc_dointvec_minmax_sysadmin proc_dointvec_minmax_warn_RT_change proc_ipc_dointvec
        proc_ipc_dointvec_minmax proc_ipc_dointvec_minmax_orphans proc_tfo_blackhole_detect_timeout
        sched_rr_handler sched_rt_handler stack_trace_sysctl
        sysctl_min_slab_ratio_sysctl_handler sysctl_min_unmapped_ratio_sysctl_handler
        timer_migration_handler tracepoint_printk_sysctl watermark_scale_factor_sysctl_handler
        yama_dointvec_minmax""",
    Kind.UINT: "proc_dopipe_max_size proc_douintvec proc_douintvec_minmax"
    " proc_fib_multipath_hash_fields proc_rt6_multipath_hash_fields",
    Kind.LONG: """
        dirty_background_bytes_handler dirty_bytes_handler mmap_min_addr_handler
        overcommit_kbytes_handler proc_dohung_task_timeout_secs proc_dolongvec_minmax_bpf_restricted
        proc_doulongvec_minmax proc_ipc_doulongvec_minmax""",
    Kind.BOOL: "proc_dobool",
    Kind.U8: "ipv4_fwd_update_priority proc_dou8vec_minmax proc_fib_multipath_hash_policy"
    " proc_rt6_multipath_hash_policy",
    Kind.STRING: "devkmsg_sysctl_set_loglvl proc_do_uts_string proc_dostring"
    " proc_dostring_coredump",
    Kind.UUID: "proc_do_uuid",
    Kind.JIFFIES: "laptop_mode_handler neigh_proc_dointvec_jiffies proc_dointvec_jiffies",
    Kind.MS_JIFFIES: "neigh_proc_dointvec_ms_jiffies neigh_proc_dointvec_ms_jiffies_positive"
    " proc_dointvec_ms_jiffies proc_dointvec_ms_jiffies_minmax",
    Kind.USER_JIFFIES: "neigh_proc_dointvec_userhz_jiffies proc_dointvec_userhz_jiffies",
}
HANDLERS: Final = {name: kind for kind, names in _BY_KIND.items() for name in names.split()}

# Values that a function takes from a variable its table does not name.
VARIABLES: Final = {
    "kernel.tainted": ("tainted_mask", Kind.LONG, 8),
    "kernel.threads-max": ("max_threads", Kind.INT, 4),
}
