// A client of vmactor's daemon in JavaScript: MessagePack-RPC over a unix socket, with @msgpack/msgpack.
//
//   node vmactor.mjs SOCKET list        lists the VMs
//   node vmactor.mjs SOCKET stop CID    stops one
//   node vmactor.mjs SOCKET events      prints what happens, until interrupted
//
// docs/protocol.md describes the protocol. This client passes no files, so it cannot create VMs: Node.js has
// no way to send a descriptor over such a socket.

import net from "node:net";
import { decodeMultiStream, encode } from "@msgpack/msgpack";

export class VmactorError extends Error {
  constructor([code, message, data]) {
    super(message);
    this.code = code;
    this.data = data;
  }
}

export class Client {
  #socket;
  #waiting = new Map();
  #last = 0;

  /** @param onNotification called with a method's name and its parameters */
  constructor(path, onNotification = () => {}) {
    this.#socket = net.createConnection(path);
    this.closed = this.#read(onNotification);
  }

  /** Calls a method; many calls may be under way, and are answered in any order. */
  call(method, ...params) {
    const id = (this.#last = (this.#last + 1) >>> 0);
    this.#socket.write(encode([0, id, method, params]));
    return new Promise((resolve, reject) => this.#waiting.set(id, { resolve, reject }));
  }

  close() {
    this.#socket.end();
  }

  async #read(onNotification) {
    try {
      for await (const [kind, ...rest] of decodeMultiStream(this.#socket)) {
        if (kind === 1) {
          const [id, error, result] = rest;
          const { resolve, reject } = this.#waiting.get(id);
          this.#waiting.delete(id);
          if (error === null) resolve(result);
          else reject(new VmactorError(error));
        } else if (kind === 2) {
          onNotification(...rest);
        }
      }
    } finally {
      for (const { reject } of this.#waiting.values()) reject(new Error("the daemon closed the connection"));
    }
  }
}

// -- The command line ---------------------------------------------------------------------------------

const [, , path, command, cid] = process.argv;
const client = new Client(path, (method, params) => console.log(method, JSON.stringify(params)));
try {
  if (command === "list") {
    for (const vm of await client.call("listVms")) console.log([vm.cid, vm.name, vm.state].join("\t"));
  } else if (command === "stop") {
    const { vm } = await client.call("openVm", Number(cid));
    await client.call("stop", vm);
    console.log(`${cid} stopped`);
  } else if (command === "events") {
    await client.call("subscribe", { snapshot: true });
    await client.closed;
  } else {
    throw new Error("usage: vmactor.mjs SOCKET list|stop|events [CID]");
  }
} catch (error) {
  console.error(error.message);
  process.exitCode = 1;
} finally {
  client.close();
}
