"""The actors: the service, its VMs, and what lives under each VM's supervisor."""
