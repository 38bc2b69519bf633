"""What anybody on the LAN can claim by multicast: mDNS records as libp2p programs send them, of any peer at any port.

A record is a PTR of `_p2p._udp.local` and, behind it, TXT strings `dnsaddr=/ip4/A/tcp/P/p2p/ID`. Whoever hears it
takes the IP address from the packet, so each claim is one about the sender's own machine.
"""

import socket
import struct

from net import Lan

GROUP, PORT = "224.0.0.251", 5353
SERVICE = b"\x04_p2p\x04_udp\x05local\x00"
BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
# What comes before the 32 bytes of an Ed25519 key in a peer id: an identity hash of 36 bytes of protobuf.
PEER_PREFIX = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])
CLASS_IN, FLUSH, PTR, TXT = 1, 0x8000, 12, 16
TTL_S = 120
# Names of one packet, so that it fits into one frame.
NAMES_PER_PACKET = 6


def peer_id(key: bytes) -> str:
    """What libp2p calls a machine with this Ed25519 key."""
    number, digits = int.from_bytes(PEER_PREFIX + key, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        digits = BASE58[digit] + digits
    # A leading zero byte is a leading 1.
    return BASE58[0] + digits


def packet(claims: list[tuple[bytes, str, int]]) -> bytes:
    """A response with these claims: key, address, TCP port."""
    answers, texts = b"", b""
    for number, (key, address, port) in enumerate(claims):
        label = f"peer{number}x{port}".encode()
        name = bytes([len(label)]) + label + b"\x00"
        answers += SERVICE + struct.pack("!HHIH", PTR, CLASS_IN, TTL_S, len(name)) + name
        text = f"dnsaddr=/ip4/{address}/tcp/{port}/p2p/{peer_id(key)}".encode()
        texts += name + struct.pack("!HHIH", TXT, FLUSH | CLASS_IN, TTL_S, len(text) + 1) + bytes([len(text)]) + text
    return struct.pack("!HHHHHH", 0, 0x8400, 0, len(claims), 0, len(claims)) + answers + texts


class Speaker:
    """A machine that says what it wants to 224.0.0.251."""

    def __init__(self, lan: Lan, machine: str) -> None:
        self.address = lan.address[machine]
        with lan.at(machine):
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(self.address))
        self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)

    def claim(self, claims: list[tuple[bytes, int]]) -> int:
        """Claims that these keys are here, at these TCP ports; how many packets that took."""
        packets = 0
        for at in range(0, len(claims), NAMES_PER_PACKET):
            some = [(key, self.address, port) for key, port in claims[at : at + NAMES_PER_PACKET]]
            self.socket.sendto(packet(some), (GROUP, PORT))
            packets += 1
        return packets

    def close(self) -> None:
        self.socket.close()
