// One of several clients of several workers: what belongs together must reach the same worker.
import assert from "node:assert/strict"
import { RedisIo } from "./io.mjs"
import { ClassicPeer, CompactPeer } from "./peers.mjs"

const [dialect, id, to, , url, stream] = process.argv.slice(2)
const compact = dialect === "kkrpc-2"
const io = new RedisIo(url, stream, id, { sessionId: !compact })
const peer = compact ? new CompactPeer(io, undefined, { id, to }) : new ClassicPeer(io, undefined, { rich: dialect === "kkrpc-0-superjson" })
await io.start()
const { api } = peer
const doing = Array(12).fill("")
const timer = setTimeout(() => {
	// Before the test that has started it loses patience, which doesn't know why.
	console.error(`no end within 90 s of ${doing.filter(Boolean)}; ${io.dropped} messages dropped`)
	process.exit(1)
}, 90000)
await Promise.all(
	doing.map(async (_, n) => {
		doing[n] = `call ${n}`
		assert.equal(await api.add(n, 1), n + 1)
		doing[n] = `callbacks ${n}`
		const steps = []
		assert.equal(await api.withProgress(3, (step) => steps.push(step)), 3)
		assert.deepEqual(steps, [1, 2, 3])
		doing[n] = `stream ${n}`
		const items = []
		for await (const item of await api.countTo(n)) items.push(item)
		assert.equal(items.length, n)
		doing[n] = `stream that is left ${n}`
		// Not as fast as can be: kkrpc 0.x sends on until it hears that nobody reads, to all peers.
		for await (const item of await api.slowCount(100000, 20)) if (item === 3) break
		doing[n] = ""
	}),
)
clearTimeout(timer)
io.close()
process.exit(0)
