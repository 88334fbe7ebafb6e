// kkrpc 0.2.2 itself, from the registry: released.mjs DIALECT ROLE WHERE [STREAM], in which
// ROLE is server or client, and WHERE is stdio or the URL of a Redis server.
import assert from "node:assert/strict"
import { NodeIo, RPCChannel } from "kkrpc"
import { RedisIo } from "./io.mjs"

const [dialect, role, where, stream] = process.argv.slice(2)
const version = dialect === "kkrpc-0-superjson" ? "superjson" : "json"

// What 0.2.2 reads from and writes to: here entries of a stream, one read each.
class StreamIo {
	name = "redis-streams-io"

	constructor(redis) {
		this.redis = redis
		this.queue = []
		this.waiting = null
		redis.onmessage = (text) => {
			if (this.waiting) {
				this.waiting(text)
				this.waiting = null
			} else this.queue.push(text)
		}
	}

	async read() {
		if (this.queue.length) return this.queue.shift()
		return await new Promise((resolve) => (this.waiting = resolve))
	}

	write(text) {
		return this.redis.write(text)
	}
}

let io
if (where === "stdio") io = new NodeIo(process.stdin, process.stdout)
else {
	const redis = new RedisIo(where, stream, `released-${role}`, { sessionId: true })
	await redis.start()
	io = new StreamIo(redis)
}
const served = {
	add: (a, b) => a + b,
	math: { grade1: { add: (a, b) => a + b } },
	echo: (value) => value,
	nothing: () => undefined,
	greet: (name = "you") => `hello ${name}`,
	hello: (name) => `hi ${name}`,
	withProgress: async (n, onStep) => {
		for (let step = 1; step <= n; step += 1) await onStep(step)
		return n
	},
	fail: () => {
		throw new Error("of 0.2.2")
	},
	callPeer: (name, ...args) => channel.getAPI()[name](...args),
}
const channel = new RPCChannel(io, { expose: served, serialization: { version } })

if (role === "client") {
	const api = channel.getAPI()
	try {
		assert.equal(await api.add(7, 8), 15)
		assert.equal(await api.math.grade1.add(5, 3), 8)
		const value = { a: [1, null, "héllo 🚀"], "k.e y": {} }
		assert.deepEqual(await api.echo(value), value)
		const steps = []
		assert.equal(await api.withProgress(3, (step) => steps.push(step)), 3)
		assert.deepEqual(steps, [1, 2, 3])
		assert.equal(await api.callPeer("hello", "bob"), "hi bob")
		const sums = await Promise.all(Array.from({ length: 200 }, (_, i) => api.add(i, 1)))
		assert.deepEqual(sums, Array.from({ length: 200 }, (_, i) => i + 1))
		const large = "x".repeat(1 << 20)
		assert.equal(await api.echo(large), large)
		await assert.rejects(api.throwCustom())
		assert.strictEqual(await api.nothing(), undefined)
		assert.strictEqual(await api.same(null), null)
		if (version === "superjson") {
			const rich = { d: new Date(0), m: new Map([[1, new Set([2n])]]), b: 2n ** 70n }
			assert.deepEqual(await api.echo(rich), rich)
			assert.strictEqual(await api.same(undefined), undefined)
			assert.equal(await api.greet(undefined, "hi"), "hi you")
			assert.deepEqual(await api.same({ u: [undefined, null] }), { u: [undefined, null] })
		}
	} catch (error) {
		console.error(error.stack)
		process.exit(1)
	}
	process.stderr.write("all ok\n")
	process.exit(0)
} else if (where !== "stdio") process.stdout.write("ready\n")
