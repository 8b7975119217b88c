// Neovim's own MessagePack-RPC transport as a client of the daemon: node foreign_rpc.js MODULES SOCKET METHOD [JSON]...
const net = require("net");
const [, , modules, path, ...calls] = process.argv;
const { Transport } = require(`${modules}/neovim/lib/utils/transport`);

const socket = net.createConnection(path);
const transport = new Transport();
transport.attach(socket, socket, {});
const ask = (method, params) =>
  new Promise((resolve, reject) =>
    transport.request(method, params, (error, result) => (error ? reject(error) : resolve(result))),
  );

(async () => {
  for (let at = 0; at < calls.length; at += 2) {
    console.log(JSON.stringify(await ask(calls[at], JSON.parse(calls[at + 1]))));
  }
  process.exit(0);
})().catch((error) => {
  console.log(JSON.stringify({ error }));
  process.exit(1);
});
