"""Parameters of the guard node: names, defaults, meanings with units, ranges."""

from __future__ import annotations

from d4_nodes.parameters import Parameter

PARAMETERS = (
    Parameter("contract", "", "robot.yaml: what may be sent, and which streams must be there",
              fixed="configured"),
    Parameter("input_prefix", "policy", "what the policy wants is received on this, then the command topic",
              fixed="configured"),
    Parameter("shadow", False, "check and report everything, send nothing"),
    Parameter("allow_rivals", False, "activate although another policy or guard node commands the robot"),
    Parameter("guard", True, "check every command; without it only the emergency stop works, and silence "
              "ends in the safety action"),
    Parameter("recover_after", 5, "good commands in a row until they pass again, after silence, or a camera "
              "or command that was not to be trusted", (1, 1000)),
    Parameter("frozen_frames", 2, "a camera that repeats a picture so often is frozen; 0: never", (0, 1000)),
    Parameter("ahead_ms", 20.0, "a stamp so far ahead of the clock is wrong, ms", (0, 10_000)),
    Parameter("alive_topic", "", "any topic of the other process, such as policy/status: silence there means "
              "that it is dead; empty: no process is watched", fixed="configured"),
    Parameter("alive_type", "d4_interfaces/msg/PolicyStatus", "type of alive_topic", fixed="configured"),
    Parameter("watchdog_ms", 1500.0, "longest silence on alive_topic, ms; a policy node's status comes every "
              "500 ms", (1, 60_000)),
    Parameter("dead_man_button", -1, "button of `joy` to be held for commands to pass; -1: none", (-1, 63),
              fixed="configured"),
    Parameter("dead_man_ms", 500.0, "it counts as released if `joy` is silent so long, ms", (1, 10_000)),
    Parameter("priority", 0, "SCHED_FIFO priority of the relay's thread; 0: the usual scheduler", (0, 99)),
    Parameter("cores", [-1], "run the relay's thread on these cores only; [-1]: on any"),
    Parameter("lock_memory", False, "keep the process in memory"),
    Parameter("command_frame_id", "", "frame_id of commands that have a header", fixed="configured"),
    Parameter("observation_deadline_ms", 0.0, "deadline requested of observations, ms; 0: none. From a "
              "camera that offers none nothing is received if one is requested", (0, 60_000),
              fixed="configured"),
    Parameter("report_folder", "", "where reports go; empty: the ROS log folder", fixed="never"),
    Parameter("missed_warn", 0.01, "share of commands not in time from which diagnostics warn", (0, 1)),
    Parameter("missed_error", 0.1, "share of commands not in time from which they are in error", (0, 1)),
    Parameter("rate_warn", 0.9, "diagnostics warn if a camera has less of the contract's rate", (0, 1)),
)  # fmt: skip
