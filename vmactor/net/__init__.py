"""The host's side of VMs' networks: taps, bridges, routes, NAT and rate limits. Knows no actor.

``plan`` decides, purely; ``links`` tells the kernel, by netlink; ``nat`` tells nftables; ``networks`` puts it
together for a service and is the only one with which the rest of vmactor speaks.
"""
