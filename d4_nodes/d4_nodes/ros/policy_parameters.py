"""Parameters of the policy node: names, defaults, meanings with units, ranges."""

from __future__ import annotations

from d4_nodes.parameters import Parameter

PARAMETERS = (
    Parameter("contract", "", "robot.yaml that the policy was trained with", fixed="configured"),
    Parameter("socket", "", "socket of the inference server; empty: where d4-serve listens by default",
              fixed="configured"),
    Parameter("server_wait_s", 60.0, "how long configuring waits for the inference server, s", (0, 3600),
              fixed="configured"),
    Parameter("task", "", "a task of the contract; empty: its first", fixed="never"),
    Parameter("shadow", False, "compute and report everything, send nothing"),
    Parameter("allow_slow", False, "activate although decisions take longer than the contract's latency_ms"),
    Parameter("allow_rivals", False, "activate although another policy or guard node commands the robot"),
    Parameter("guard", True, "check every command; without it only the emergency stop works"),
    Parameter("max_misses", 2, "so many late answers in a row end in the safety action", (1, 100)),
    Parameter("recover_after", 5, "answers in a row in time until commands flow again", (1, 1000)),
    Parameter("commands_per_tick", 1, "commands per tick, interpolated towards the next", (1, 100)),
    Parameter("frozen_frames", 2, "a camera that repeats a picture so often is frozen; 0: never", (0, 1000)),
    Parameter("ahead_ms", 20.0, "a stamp so far ahead of the clock is wrong, ms", (0, 10_000)),
    Parameter("watchdog_ms", 0.0, "oldest sign of life of the server, ms; 0: 1.5 periods", (0, 10_000)),
    Parameter("dead_man_button", -1, "button of `joy` to be held for commands to pass; -1: none", (-1, 63),
              fixed="configured"),
    Parameter("dead_man_ms", 500.0, "it counts as released if `joy` is silent so long, ms", (1, 10_000)),
    Parameter("priority", 0, "SCHED_FIFO priority of the loop's thread; 0: the usual scheduler", (0, 99)),
    Parameter("cores", [-1], "run the loop's thread on these cores only; [-1]: on any"),
    Parameter("lock_memory", False, "keep the process in memory"),
    Parameter("command_frame_id", "", "frame_id of commands that have a header", fixed="configured"),
    Parameter("image_decoder", "auto", "auto, opencv or cv_bridge; auto: cv_bridge where both agree",
              fixed="configured"),
    Parameter("observation_deadline_ms", 0.0, "deadline requested of observations, ms; 0: none. From a "
              "camera that offers none nothing is received if one is requested", (0, 60_000),
              fixed="configured"),
    Parameter("report_folder", "", "where reports go; empty: the ROS log folder", fixed="never"),
    Parameter("missed_warn", 0.01, "share of late answers from which diagnostics warn", (0, 1)),
    Parameter("missed_error", 0.1, "share of late answers from which diagnostics are in error", (0, 1)),
    Parameter("rate_warn", 0.9, "diagnostics warn if a camera has less of the contract's rate", (0, 1)),
)  # fmt: skip
