"""This host's addresses, and sockets that listen on one of them."""

import fcntl
import hashlib
import ipaddress
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path

LOOPBACK = "127.0.0.1"  # ranks of one machine listen here: it cannot be reached over a network
SELF = 5.0  # seconds to reach this host itself
_GET_ADDRESS = 0x8915  # Linux's SIOCGIFADDR


def own_address(launcher: str, many_hosts: bool) -> str:
    """This host's address on the network that leads to the launcher. Sets GLOO_SOCKET_IFNAME to its interface, unless it is set.

    Without that variable gloo takes the address that the host's name resolves to. Raises RuntimeError if there are many hosts and the
    address is a loopback address.
    """
    interfaces = _interfaces()
    told = os.environ.get("GLOO_SOCKET_IFNAME")
    if told in interfaces:
        return interfaces[told]
    found = socket.getaddrinfo(launcher, 1, type=socket.SOCK_DGRAM)
    family, kind, _, _, where = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    with socket.socket(family, kind) as probe:
        probe.connect(where)  # sends nothing: the socket is UDP
        own = probe.getsockname()[0]
    if many_hosts and ipaddress.ip_address(own).is_loopback:
        raise RuntimeError(f"{launcher} means {own} on this host, where others do not find it; set GLOO_SOCKET_IFNAME")
    for name in [name for name, address in interfaces.items() if address == own]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    return own


def this_host() -> bytes:
    """16 bytes that are the same for all processes that share this machine's start, its name and its network, and for no others.

    Containers and pods have a network or a name of their own, and number the devices that they were given from 0: each is a host.
    """
    facts = [socket.gethostname(), Path("/proc/sys/kernel/random/boot_id").read_text()]
    with suppress(OSError):  # the kernel does not show it
        facts.append(str(Path("/proc/self/ns/net").readlink()))
    return hashlib.sha256("\n".join(facts).encode()).digest()[:16]


def _interfaces() -> dict[str, str]:
    """The IPv4 address of each network interface that has one."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # this interface has no IPv4 address
                answer = fcntl.ioctl(any_socket, _GET_ADDRESS, struct.pack("256s", name.encode()))
                addresses[name] = socket.inet_ntoa(answer[20:24])
    return addresses


def listening(host: str, port: int, many_hosts: bool) -> socket.socket:
    """A socket that listens only at the launcher's address on this host; on one machine, only at the loopback address.

    Port 0 takes one that is free. Raises OSError if the address belongs to another machine, is not reached or the port is taken,
    RuntimeError if other hosts cannot reach the address.
    """
    address = LOOPBACK
    if many_hosts:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        address = min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0]
        if ipaddress.ip_address(
            address
        ).is_loopback:  # on its own host, a host's name may resolve to a loopback address
            address = own_address(host, many_hosts)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # If the interface is down, such as the loopback of a new network namespace, PyTorch would wait for minutes.
    with socket.create_server((address, 0), family=family) as probe:
        socket.create_connection(probe.getsockname()[:2], SELF).close()
    return socket.create_server((address, port), family=family)


def reason(error: Exception) -> str:
    """The operating system's own words for a failed connection, or the error's."""
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno and error.errno > 0 else str(error)
