"""Quality of service: the profiles, what may be overridden, and what is said when two sides do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rclpy.duration import Duration
from rclpy.qos import DurabilityPolicy, HistoryPolicy, LivelinessPolicy, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions, QoSPolicyKind

try:
    from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
except ImportError:  # Humble
    from rclpy.qos_event import PublisherEventCallbacks, SubscriptionEventCallbacks

EVENT = QoSProfile(depth=10)  # tasks, starts, stops: none may be lost
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
# a stop is heard from whoever says it: reliably where that is offered, also what was said before the node
# began, and the last profile fits every publisher
STOP = (EVENT, LATCHED, QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT))
_PERIODS = 2


def sensor(deadline_ms: float = 0.0) -> QoSProfile:
    """Observations: the newest counts, whatever the publisher offers."""
    profile = QoSProfile(depth=1, history=HistoryPolicy.KEEP_LAST, reliability=ReliabilityPolicy.BEST_EFFORT)
    if deadline_ms > 0:
        profile.deadline = Duration(nanoseconds=round(deadline_ms * 1e6))
    return profile


def command(period_ns: int | None) -> QoSProfile:
    """Commands: the newest only; one that is two periods old dies on its way, and whoever receives them can
    ask for a deadline and for signs of life. Without a period (simulated time) there are no such promises.
    """
    profile = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
    if period_ns is not None:
        span = Duration(nanoseconds=_PERIODS * period_ns)
        profile.lifespan = profile.deadline = profile.liveliness_lease_duration = span
        profile.liveliness = LivelinessPolicy.MANUAL_BY_TOPIC
    return profile


def overrides(is_publisher: bool = False) -> QoSOverridingOptions:
    """What `qos_overrides.<topic>....` may change."""
    kinds = [
        QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY, QoSPolicyKind.DURABILITY,
        QoSPolicyKind.DEADLINE, QoSPolicyKind.LIVELINESS, QoSPolicyKind.LIVELINESS_LEASE_DURATION,
    ]  # fmt: skip
    return QoSOverridingOptions([*kinds, QoSPolicyKind.LIFESPAN] if is_publisher else kinds)


def subscription_events(topic: str, complain: Callable[[str], None]) -> Any:
    """Says when nobody's offer fits, when a deadline passed and when the publisher shows no life."""
    return SubscriptionEventCallbacks(
        incompatible_qos=lambda e: complain(
            f"{topic}: a publisher does not offer the quality of service asked for ({_policy(e)}): "
            "nothing is received from it; see qos_overrides"
        ),
        deadline=lambda e: complain(f"{topic}: deadline missed {e.total_count} times"),
        liveliness=lambda e: _died(topic, e, complain),
    )


def silent() -> Any:
    """Says nothing: for one of several subscriptions, which need not fit every publisher."""
    return SubscriptionEventCallbacks(use_default_callbacks=False)


def offer_events(topic: str, complain: Callable[[str], None], **more: Any) -> Any:
    """Says when a subscriber asks for more than is offered."""
    return PublisherEventCallbacks(
        incompatible_qos=lambda e: complain(
            f"{topic}: a subscriber asks for a quality of service that is not offered ({_policy(e)}): "
            "it gets nothing; see qos_overrides"
        ),
        **more,
    )


def publisher_events(topic: str, complain: Callable[[str], None]) -> Any:
    """The same, and when an own promise was broken."""
    return offer_events(
        topic,
        complain,
        deadline=lambda e: complain(f"{topic}: own deadline missed {e.total_count} times"),
        liveliness=lambda e: complain(f"{topic}: own liveliness lost {e.total_count} times"),
    )


def _died(topic: str, event: Any, complain: Callable[[str], None]) -> None:
    """A publisher that comes is no news worth a warning; one that shows no life any more is."""
    if event.alive_count_change < 0:
        complain(f"{topic}: a publisher shows no life any more, {event.alive_count} left")


def _policy(event: Any) -> str:
    return str(event.last_policy_kind).rsplit(".", 1)[-1].lower()
