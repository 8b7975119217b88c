"""RPC Binder: Android's binder calls over stream sockets, as libbinder speaks it since Android 13.

Knows nothing of VMs. ``parcel`` and ``wire`` are the bytes, ``server`` is what a server's side has to keep in
mind (sessions, reference counts, the order of one-way calls) without doing any I/O, ``client`` is a small
blocking client. Standard library only; all but ``server`` run on Python 3.8, since guests get a copy.
"""
