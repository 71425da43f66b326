// What ../multiserv.ts uses of Deno, with the meaning it has there.
import {
  getRequestListener,
  type HttpBindings,
  RequestError,
} from "@hono/node-server";
import { once } from "node:events";
import { createServer, type ServerResponse } from "node:http";
import type { AddressInfo, Socket } from "node:net";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";

/** Of a process of its own, the command may replace Request and Response. */
export const options = { overrideGlobalObjects: false };

/**
 * Whether a `Request` can have this URL: none has a host like a.1, or a user's
 * name. Hono's makes it late, and would throw inside the handler.
 */
const isPossible = (url: string) =>
  URL.canParse(url) && !/^https?:\/\/[^/?#]*@/.test(url);

/** Answers for a handler that throws, or a request that cannot reach it. */
function errorHandler(error: unknown): Response {
  if (error instanceof RequestError) return new Response(null, { status: 400 });
  console.error(error);
  return new Response("Internal Server Error", { status: 500 });
}

type ServeOptions = Pick<Deno.ServeTcpOptions, "hostname" | "port">;
type Fetch = (
  request: Request,
  env: HttpBindings,
) => Response | Promise<Response>;

/** `Deno.serve`, but that it returns a promise: resolves once it listens. */
async function serve({ hostname, port }: ServeOptions, fetch: Fetch) {
  if (hostname === "") throw new TypeError("invalid empty host"); // to Node, all
  const listener = getRequestListener(
    (request, env) => {
      if (!isPossible(request.url)) throw new RequestError("Invalid URL");
      return fetch(request, env as HttpBindings);
    },
    { ...options, hostname: "localhost", errorHandler },
  );
  /** The latest answer of each connection. */
  const latest = new Map<Socket, ServerResponse | undefined>();
  const server = createServer((incoming, outgoing) => {
    latest.set(incoming.socket, outgoing);
    return listener(incoming, outgoing);
  });
  server.on("connection", (socket) => {
    latest.set(socket, undefined);
    socket.once("close", () => latest.delete(socket));
  });
  // close() calls it, and it takes an answer that is not written yet for sent.
  server.closeIdleConnections = () => {};
  const closed = new Promise<void>((resolve) => server.once("close", resolve));

  server.listen({ host: hostname, port });
  await once(server, "listening");
  server.on("error", () => {}); // a client it could not accept; it goes on
  const { address, port: itsPort } = server.address() as AddressInfo;

  /** Closes a connection after its latest answer, which comes after the others. */
  async function closeAfter(
    answer: ServerResponse | undefined,
    socket: Socket,
  ) {
    if (answer && !answer.closed) {
      await new Promise((written) => answer.once("close", written));
    }
    // A reset would cost the answer, while the library still reads the upload.
    if (answer && !answer.req.complete) {
      const signal = AbortSignal.timeout(500); // as long as it does
      await once(answer.req, "close", { signal }).catch(() => {});
    }
    socket.destroySoon();
  }
  let closing: Promise<void> | undefined;
  async function close() {
    await sleep(10); // to read the requests that have been sent
    server.close();
    for (const [socket, answer] of latest) closeAfter(answer, socket);
    await closed;
  }
  return {
    addr: { hostname: address, port: itsPort },
    finished: closed,
    shutdown: () => closing ??= close(),
  };
}

export const Deno = {
  addSignalListener: process.on.bind(process),
  removeSignalListener: process.off.bind(process),
  permissions: { async request() {} }, // Node asks nobody
  serve,
};
