"""The same inside a trio program, several VMs at once, with everything that happens on one subscription.

python examples/in_trio.py build/guest/vm.json 3
"""

import sys

import trio

from vmactor import Died, VirtualizationService, load_config


async def main(path: str, count: int) -> None:
    """Boot some guests, let each end by itself or be killed by the service's end."""
    async with VirtualizationService() as service:
        vms = []
        for _ in range(count):
            with load_config(path) as config:
                vms.append(await service.create_vm(config))
        with service.subscribe() as events:
            async with trio.open_nursery() as nursery:
                for vm in vms:
                    nursery.start_soon(vm.start)
            ready = 0
            async for event in events:
                print(f"{event.seq:4} CID {event.cid} {event.kind}")
                ready += event.kind == "payload_ready"
                if isinstance(event, Died) or ready == count:
                    break


if __name__ == "__main__":
    trio.run(main, sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 2)
