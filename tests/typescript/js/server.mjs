// A TypeScript peer that serves: server.mjs DIALECT ID URL STREAM, or DIALECT ID stdio.
import { makeApi } from "./api.mjs"
import { RedisIo, StdioIo } from "./io.mjs"
import { ClassicPeer, CompactPeer } from "./peers.mjs"

const [dialect, id, where, stream] = process.argv.slice(2)
const classic = dialect !== "kkrpc-2"
const io = where === "stdio" ? new StdioIo() : new RedisIo(where, stream, id, { sessionId: classic })
let peer
const api = makeApi(() => peer)
if (classic) {
	peer = new ClassicPeer(io, api, { rich: dialect === "kkrpc-0-superjson", silent: where !== "stdio" })
	peer.ondestroy = () => {
		process.stdout.write("destroyed\n")
		process.exit(0)
	}
} else peer = new CompactPeer(io, api, { id, bus: where !== "stdio" })
api.dropped = () => io.dropped
api.signalDestroy = () => peer.signalDestroy()
await io.start()
if (where !== "stdio") process.stdout.write("ready\n")
