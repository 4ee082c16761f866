"""Who may talk to whom: the NetworkPolicies of rendered manifests, evaluated as Kubernetes defines them."""

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

from manifests import NAMESPACE, Manifest, matches, of_kind, part, pods


@dataclass(frozen=True)
class End:
    """A pod (labels, namespace) or an address outside."""

    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = NAMESPACE
    address: str = "10.0.0.1"
    is_pod: bool = True


DNS = End({"k8s-app": "kube-dns"}, "kube-system")
PROMETHEUS = End({"app.kubernetes.io/name": "prometheus"}, "monitoring")
STRANGER = End({"app": "other"})
"""Another application's pod in the same namespace."""
INTERNET = End(address="93.184.216.34", is_pod=False)
METADATA_SERVICE = End(address="169.254.169.254", is_pod=False)


def ends(found: list[Manifest]) -> dict[str, End]:
    """The release's pods by part; the workers of a LeaderWorkerSet have the same labels as its leaders."""
    return {part(template): End(template["metadata"]["labels"]) for _, template in pods(found)}


def admits(found: list[Manifest], source: End, target: End, port: int, protocol: str = "TCP") -> bool:
    """Whether the policies let `source` open a connection to `port` of `target`."""
    policies = of_kind(found, "NetworkPolicy")
    return _passes(policies, source, target, port, protocol, "Egress") and _passes(
        policies, target, source, port, protocol, "Ingress"
    )


def _passes(policies: list[Manifest], subject: End, other: End, port: int, protocol: str, direction: str) -> bool:
    """Policies are of one namespace; a pod that none selects for a direction is open in it."""
    if not subject.is_pod or subject.namespace != NAMESPACE:
        return True
    binding = [
        policy["spec"]
        for policy in policies
        if direction in policy["spec"]["policyTypes"] and matches(policy["spec"]["podSelector"], subject.labels)
    ]
    rules = [rule for spec in binding for rule in spec.get(direction.lower(), None) or []]
    side = "to" if direction == "Egress" else "from"
    return not binding or any(_rule_admits(rule, side, other, port, protocol) for rule in rules)


def _rule_admits(rule: dict[str, Any], side: str, other: End, port: int, protocol: str) -> bool:
    # An empty list admits as much as none: everybody, every port.
    if rule.get(side) and not any(_is_peer(peer, other) for peer in rule[side]):
        return False
    ports = rule.get("ports")
    return not ports or any(p["port"] == port and p["protocol"] == protocol for p in ports)


def _is_peer(peer: dict[str, Any], end: End) -> bool:
    if "ipBlock" in peer:
        # Addresses of pods are private; the policies mean what is outside.
        address = ip_address(end.address)
        block = peer["ipBlock"]
        return address in ip_network(block["cidr"]) and not any(
            address in ip_network(hole) for hole in block.get("except", [])
        )
    if not end.is_pod:
        return False
    if "namespaceSelector" in peer:
        if not matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": end.namespace}):
            return False
    elif end.namespace != NAMESPACE:
        return False
    return matches(peer.get("podSelector", {}), end.labels)
