// The members of Deno that ../multiserv.ts uses, with the meaning they have in
// Deno, and no others: the types say how much of each.
import {
  getRequestListener,
  type HttpBindings,
  RequestError,
} from "@hono/node-server";
import { lookup } from "node:dns/promises";
import { once } from "node:events";
import {
  createServer,
  type IncomingMessage,
  type ServerResponse,
} from "node:http";
import type { AddressInfo, Socket } from "node:net";
import process from "node:process";
import type { Writable } from "node:stream";
import { finished } from "node:stream/promises";

/** What a handler learns about a request, looked up when it asks. */
class Info implements Deno.ServeHandlerInfo<Deno.NetAddr> {
  #incoming: IncomingMessage;
  #outgoing: ServerResponse;
  constructor(incoming: IncomingMessage, outgoing: ServerResponse) {
    this.#incoming = incoming;
    this.#outgoing = outgoing;
  }
  get remoteAddr(): Deno.NetAddr {
    const { remoteAddress = "", remotePort = 0 } = this.#incoming.socket;
    return { transport: "tcp", hostname: remoteAddress, port: remotePort };
  }
  get completed(): Promise<void> {
    return finished(this.#outgoing);
  }
}

/**
 * Looks a host name up once: a thousand servers have the same one, and where
 * they use up the open files there is none left to look it up again.
 */
const addresses = new Map<string, Promise<string>>();
function addressOf(hostname: string): Promise<string> {
  let address = addresses.get(hostname);
  if (!address) {
    const bare = hostname.replace(/^\[(.*:.*)\]$/, "$1");
    // To lookup no name is no fault, and to listen it means all addresses.
    const found = bare ? lookup(bare) : Promise.reject(new Error("no name"));
    address = found.then(({ address }) => address, (cause) => {
      addresses.delete(hostname);
      if (outOfFiles.includes(cause.code)) throw cause;
      const message = "failed to lookup address information";
      throw new Error(`${message}: ${cause.message}`, { cause });
    });
    addresses.set(hostname, address);
  }
  return address;
}
const outOfFiles = ["EMFILE", "ENFILE", "EBUSY"];

/**
 * Closes a connection after the answers it owes. Which one it is at, only
 * `_httpMessage` knows; to count requests and answers takes 6 % more time each.
 */
function closeWhenIdle(socket: Socket & { _httpMessage?: ServerResponse }) {
  const response = socket._httpMessage;
  if (response) response.once("close", () => closeWhenIdle(socket));
  else socket.destroySoon();
}

/**
 * Lets an upload go on after its answer, however long. Node reads and drops
 * what is left, but Hono would hang up half a second later if it saw that.
 */
function letUploadGoOn(incoming: IncomingMessage) {
  Object.defineProperty(incoming, "readableEnded", { value: true });
}

/** Answers for a handler that throws, or a request that cannot reach it. */
function errorHandler(error: unknown): Response {
  if (error instanceof RequestError) return new Response(null, { status: 400 });
  console.error(error);
  return new Response("Internal Server Error", { status: 500 });
}

type ServeOptions = Required<
  Pick<Deno.ServeTcpOptions, "hostname" | "port" | "onListen">
>;
type HttpServer = Pick<Deno.HttpServer<Deno.NetAddr>, "finished" | "shutdown">;

/** `Deno.serve`, but that a failed start rejects `finished` instead of throwing. */
function serve(
  { hostname, port, onListen }: ServeOptions,
  handler: Deno.ServeHandler<Deno.NetAddr>,
): HttpServer {
  function fetch(request: Request, env: unknown) {
    const { incoming, outgoing } = env as HttpBindings;
    if (request.method !== "GET") {
      outgoing.once("finish", () => letUploadGoOn(incoming));
    }
    return handler(request, new Info(incoming, outgoing));
  }
  // As on Deno, a request need not say which host it is for.
  const server = createServer(
    { requireHostHeader: false },
    getRequestListener(fetch, { hostname: "localhost", errorHandler }),
  );

  const sockets = new Set<Socket>();
  server.on("connection", (socket) => {
    sockets.add(socket);
    socket.once("close", () => sockets.delete(socket));
  });

  const closed = new Promise<void>((resolve) => server.once("close", resolve));
  async function listen() {
    server.listen({ host: await addressOf(hostname), port });
    await once(server, "listening");
    server.on("error", () => {}); // a client it could not accept; it goes on
    const { address, port: itsPort } = server.address() as AddressInfo;
    onListen({ transport: "tcp", hostname: address, port: itsPort });
  }
  return {
    finished: listen().then(() => closed),
    async shutdown() {
      const closed = new Promise((resolve) => server.close(resolve));
      // Without this it would wait for clients that keep their connection.
      for (const socket of sockets) closeWhenIdle(socket);
      await closed;
    },
  };
}

type Output = Pick<typeof Deno.stdout, "isTerminal" | "writable">;

/** Where Node writes to, as Deno has it. */
function output(stream: Writable & { isTTY?: boolean }): Output {
  return {
    isTerminal: () => stream.isTTY === true,
    writable: new WritableStream({
      write: (bytes) =>
        new Promise((resolve, reject) => {
          stream.write(bytes, (error) => error ? reject(error) : resolve());
        }),
    }),
  };
}

/** What the program uses of `Deno`. */
type Used =
  & Pick<typeof Deno, "addSignalListener" | "args" | "exit">
  & {
    permissions: Pick<typeof Deno.permissions, "querySync" | "requestSync">;
    serve: typeof serve;
    stdout: Output;
    stderr: Output;
  };

/** Node asks nobody. */
const granted = Object.assign(
  new EventTarget(),
  { state: "granted", partial: false, onchange: null } as const,
);

const used: Used = {
  addSignalListener: (signal, handler) => void process.on(signal, handler),
  args: process.argv.slice(2),
  exit: (code) => process.exit(code),
  permissions: { querySync: () => granted, requestSync: () => granted },
  serve,
  stdout: output(process.stdout),
  stderr: output(process.stderr),
};

Object.assign(globalThis, { Deno: used });
