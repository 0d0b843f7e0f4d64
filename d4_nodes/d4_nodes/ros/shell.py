"""What all nodes share: how they start and end, how parameters are declared, how types are found."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import rclpy
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from rosidl_runtime_py.utilities import get_message

from d4_datasets.errors import UserError
from d4_nodes.parameters import Parameter


def declare(node: Node, parameters: Sequence[Parameter]) -> None:
    """Declare parameters with descriptions and ranges."""
    for p in parameters:
        descriptor = ParameterDescriptor(description=p.about, read_only=p.read_only)
        if p.span is not None and isinstance(p.default, float):
            descriptor.floating_point_range = [
                FloatingPointRange(from_value=float(p.span[0]), to_value=float(p.span[1]))
            ]
        elif p.span is not None:
            descriptor.integer_range = [
                IntegerRange(from_value=int(p.span[0]), to_value=int(p.span[1]), step=1)
            ]
        node.declare_parameter(p.name, p.default, descriptor)


class RosTypes:
    """Messages of rclpy, as `d4_nodes.codec.Types`."""

    def new(self, name: str) -> Any:
        """A zero-filled message; raises UserError if its package is not built here."""
        return message_class(name)()

    def element(self, msg: Any, attribute: str) -> Any:
        """A zero-filled element for an array of messages."""
        kind = msg.get_fields_and_field_types()[attribute]
        return get_message(kind.removeprefix("sequence<").split(">")[0].split(",")[0].split("[")[0])()


def message_class(name: str) -> Any:
    """The class of a message type such as geometry_msgs/msg/Twist."""
    try:
        return get_message(name)
    except (AttributeError, ModuleNotFoundError, ValueError) as error:
        raise UserError(
            f"the message type {name} is not installed here ({error}); source its package"
        ) from None


def local(topic: str) -> str:
    """A contract's topic as a relative name: without a namespace it is the same, with one it moves there."""
    return topic.lstrip("/")


def clock_of(node: Node) -> Callable[[], int]:
    """The node's clock, ns: the system's, or the simulation's with `use_sim_time`."""
    if node.get_parameter("use_sim_time").value:
        clock = node.get_clock()
        return lambda: clock.now().nanoseconds
    return time.time_ns


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# set by SIGINT and SIGTERM: whoever waits in a callback looks at it
INTERRUPTED = threading.Event()


def _spin_once(executor: SingleThreadedExecutor, node: Node) -> None:
    """One round; what a stranger's wrong call raises (a transition that is none now) is no end."""
    try:
        executor.spin_once(timeout_sec=0.1)
    except ExternalShutdownException:
        raise
    except Exception as error:
        node.get_logger().error(f"a callback failed: {error}")


def spin(make: Callable[[], Node], args: list[str] | None = None) -> int:
    """Run a node until SIGINT, SIGTERM or SIGHUP, or until it sets its own `ended`; returns the exit code.
    Its `secure` is called before anything is torn down.

    rclpy's own signal handlers would shut the middleware down first, and the last safety action could not be
    sent any more.
    """
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    INTERRUPTED.clear()
    for number in _SIGNALS:
        signal.signal(number, lambda *_: INTERRUPTED.set())
    try:
        node = make()
    except (UserError, InvalidParameterTypeException, InvalidParameterValueException) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        rclpy.try_shutdown()
        return 2
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    own_end = getattr(node, "ended", threading.Event())
    try:
        while not INTERRUPTED.is_set() and not own_end.is_set() and rclpy.ok():
            _spin_once(executor, node)
    except ExternalShutdownException:
        pass
    finally:
        secure = getattr(node, "secure", None)
        if secure is not None:
            secure()
        executor.remove_node(node)
        node.destroy_node()
        rclpy.try_shutdown()
        for number in _SIGNALS:  # a second Ctrl-C must not make an orderly end look like a death
            signal.signal(number, signal.SIG_IGN)
    return int(getattr(node, "failed", False))
