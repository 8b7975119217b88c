"""Boot a guest, talk to it, wait for its end: the simple case.

python examples/boot.py build/guest/vm.json [asyncio|trio]
"""

import sys

import anyio

from vmactor import VirtualizationService, load_config


async def main(path: str) -> None:
    """Run one VM from its configuration file."""
    async with VirtualizationService() as service:
        with load_config(path) as config:
            vm = await service.create_vm(config)
        async with vm:  # leaving this block kills the VM
            events = vm.events()
            await vm.start()
            async for event in events:
                print(event.kind)
                if event.kind == "payload_ready":
                    async with await vm.connect_vsock(5000) as stream:
                        await stream.send(b"finished 0\npoweroff\n")
                        await stream.receive()
            died = await vm.wait()
            print(died.reason.name if died else "never started")


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], backend=sys.argv[2] if len(sys.argv) > 2 else "asyncio")
