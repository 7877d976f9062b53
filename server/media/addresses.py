"""Tell public addresses from those of this machine and its networks."""

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

# Of all IPv6, what is routed on the public internet.
GLOBAL_UNICAST = IPv6Network("2000::/3")


def is_public(text: str) -> bool:
    """Return whether `text` is an address that anybody on the internet has: whoever fetches from it reaches no more.

    IPv6 that carries an IPv4 address in it (mapped, 6to4, Teredo, NAT64) is not: who translates it may be inside.
    """
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, IPv4Address):
        return address.is_global and not address.is_multicast
    return _is_public_6(address)


def _is_public_6(address: IPv6Address) -> bool:
    carries_ipv4 = address.ipv4_mapped or address.sixtofour or address.teredo
    return address.is_global and address in GLOBAL_UNICAST and not address.is_multicast and not carries_ipv4
