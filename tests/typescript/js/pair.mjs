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
const timer = setTimeout(() => {
	// Before the test that has started it loses patience, which doesn't know why.
	console.error(`no end within 90 s; ${io.dropped} messages dropped`)
	process.exit(1)
}, 90000)
await Promise.all(
	Array.from({ length: 12 }, async (_, n) => {
		assert.equal(await api.add(n, 1), n + 1)
		const steps = []
		assert.equal(await api.withProgress(3, (step) => steps.push(step)), 3)
		assert.deepEqual(steps, [1, 2, 3])
		const items = []
		for await (const item of await api.countTo(n)) items.push(item)
		assert.equal(items.length, n)
		for await (const item of await api.countTo(100000)) if (item === 3) break
	}),
)
clearTimeout(timer)
io.close()
process.exit(0)
