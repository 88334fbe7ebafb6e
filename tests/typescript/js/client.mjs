// A TypeScript peer that calls what Python serves, and checks what comes back.
import assert from "node:assert/strict"
import { RedisIo, StdioIo } from "./io.mjs"
import { ClassicPeer, CompactPeer } from "./peers.mjs"

const [dialect, id, to, mode, where, stream] = process.argv.slice(2)
const compact = dialect === "kkrpc-2"
const rich = dialect === "kkrpc-0-superjson"
const io = where === "stdio" ? new StdioIo() : new RedisIo(where, stream, id, { sessionId: !compact })
const own = { hello: (name) => `hi ${name}`, fails: () => { throw new TypeError("of the client") } }
const peer = compact
	? new CompactPeer(io, own, { id, to: to === "-" ? undefined : to, bus: where !== "stdio" })
	: new ClassicPeer(io, own, { rich })
await io.start()
const { api } = peer
const collect = async (stream) => {
	const items = []
	for await (const item of await stream) items.push(item)
	return items
}
const fails = async (promise) => {
	try {
		await promise
	} catch (error) {
		return { name: error.name, message: error.message, ...error }
	}
	assert.fail("did not fail")
}
const within = (promise, ms, otherwise) =>
	Promise.race([promise, new Promise((resolve) => setTimeout(() => resolve(otherwise), ms).unref())])

const checks = {
	async calls() {
		assert.equal(await api.add(7, 8), 15)
		assert.equal(await api.math.grade1.add(5, 3), 8)
		const value = { a: [1, 2.5, null, true, "", [], {}], "k.e y": { "d\\ot.": 1 }, "héllo ✓ 🚀": "\n \"quoted\" 👩‍👩‍👧" }
		assert.deepEqual(await api.echo(value), value)
		assert.strictEqual(await api.nothing(), undefined)
		assert.strictEqual(await api.same(null), null)
		const large = "ü".repeat(1 << 19)
		assert.equal(await api.echo(large), large)
	},
	async undefineds() {
		if (!compact && !rich) return
		assert.strictEqual(await api.same(undefined), undefined)
		assert.equal(await api.greet(undefined, "hi"), "hi you")
		assert.equal(await api.greet("ada", undefined), "hello ada")
	},
	async concurrent() {
		const sums = await Promise.all(Array.from({ length: 200 }, (_, i) => api.add(i, 1)))
		assert.deepEqual(sums, Array.from({ length: 200 }, (_, i) => i + 1))
	},
	async properties() {
		assert.equal(await peer.get("settings", "theme"), "light")
		assert.equal(await peer.set(["settings", "theme"], "dark"), true)
		assert.equal(await peer.get("settings", "theme"), "dark")
		assert.equal(await peer.set(["settings", "theme"], "light"), true)
		assert.deepEqual(await peer.construct(["Counter"], 5), { value: 5 })
	},
	async callbacks() {
		const steps = []
		const onStep = (step) => steps.push(step)
		assert.equal(await api.withProgress(3, onStep), 3)
		assert.equal(await api.withProgress(1, onStep), 1)
		assert.deepEqual(steps, [1, 2, 3, 1])
	},
	async streams() {
		assert.deepEqual(await collect(api.countTo(0)), [])
		assert.deepEqual(await collect(api.countTo(40)), Array.from({ length: 40 }, (_, i) => i + 1))
		const before = await api.closed()
		for await (const item of await api.countTo(1e6)) if (item === 5) break
		while ((await api.closed()) === before) await new Promise((resolve) => setTimeout(resolve, 5))
		const items = []
		const error = await fails((async () => {
			for await (const item of await api.failStream(2)) items.push(item)
		})())
		assert.deepEqual(items, [1, 2])
		assert.match(error.message, compact ? /^CustomError: stream broke$/ : /^stream broke$/)
		if (!compact) assert.equal(error.code, 7)
		if (compact) {
			async function* numbers() {
				for (let i = 1; i <= 50; i += 1) yield i
			}
			assert.equal(await api.sum(numbers()), 1275)
		}
	},
	async longStream() {
		// Where this process isn't given the time to read it drops some, however they are paced.
		let items
		for (let attempt = 0; attempt < 5; attempt += 1) {
			const before = io.dropped
			items = await collect(api.countTo(1500))
			if (io.dropped === before) break
			items = []
		}
		assert.equal(items.length, 1500)
	},
	async errors() {
		const custom = await fails(api.throwCustom())
		assert.equal(custom.name, "CustomError")
		assert.equal(custom.message, "This is a custom error\nof two lines 🚀")
		assert.equal(custom.code, 418)
		const caused = await fails(api.throwWithCause())
		assert.equal(caused.message, "outer")
		if (!compact) assert.equal(caused.cause.message, "inner")
	},
	async unknown() {
		if (compact) {
			assert.deepEqual(await fails(api.nope(1)), { name: "Error", message: "nope is not a function" })
			assert.equal((await fails(api.nope.deep(1))).message, "Cannot access deep on undefined")
			assert.equal((await fails(api.math.nope(1))).message, "nope is not a function")
			assert.deepEqual(await fails(peer.construct(["Nope"])), { name: "TypeError", message: "undefined is not a constructor" })
			assert.equal(await peer.get("nope"), undefined)
		} else if (mode === "broadcast") {
			assert.equal(await within(api.nope(1), 300, "silence"), "silence")
		} else {
			assert.equal((await fails(api.nope(1))).message, "Method nope is not a function")
			assert.equal((await fails(api.nope.deep(1))).message, "Method path nope.deep not found at nope")
			assert.equal((await fails(peer.get("nope"))).message, "Property path nope not found at nope")
			assert.equal((await fails(peer.construct(["Nope"]))).message, "Nope is not a constructor function")
			assert.equal((await fails(peer.set(["nope", "x"], 1))).message, "Property path nope.x not found at nope")
		}
	},
	async reverse() {
		assert.equal(await api.callPeer("hello", "bob"), "hi bob")
		assert.match((await fails(api.callPeer("fails"))).message, /of the client/)
	},
	async metadata() {
		if (!compact) return
		peer.meta = { requestId: "r-1", traceparent: "00-1-2-01" }
		assert.deepEqual(await api.metadata(), peer.meta)
		peer.meta = undefined
	},
	async types() {
		if (compact) return
		const bytes = Uint8Array.from([1, 2, 255])
		assert.deepEqual(await api.echo(bytes), bytes)
		assert.equal(await api.typeName(bytes), "bytes")
		if (!rich) return
		const loop = { name: "loop" }
		loop.self = loop
		const shared = { v: 1 }
		const values = [
			new Date(1707019506789), 12345678901234567890n, 5n, NaN, Infinity, -Infinity, -0,
			new Map([["k", 1], [2, { n: 3 }]]), new Map([["only", "text"]]), new Map([[{ not: "hashable" }, 1]]),
			new Set([1, "two", null]), /x+y/gi, /(?<year>\d{4})/u, new URL("http://example.com/a?b=c"),
			bytes, Int16Array.from([-1, 300]), Float64Array.from([1.5, -2]), loop,
			{ m: new Map([["d", [new Date(0), new Set([1n])]]]), "dotted.key": { "back\\slash": new Date(1) }, list: [[new Date(2)]] },
			{ x: shared, y: [shared] },
		]
		for (const value of values) {
			const back = await api.echo(value)
			if (value instanceof Map && typeof [...value.keys()][0] === "object") assert.deepEqual(back, [...value])
			else assert.deepEqual(back, value)
		}
		const back = await api.echo({ x: shared, y: [shared] })
		assert.equal(back.x, back.y[0])
		const error = await api.echo(new RangeError("boom", { cause: "why" }))
		assert.equal(error.constructor, Error)
		assert.deepEqual([error.name, error.message, error.cause], ["RangeError", "boom", "why"])
		const names = { Date: "datetime", bigint: "BigInt", Set: "set", Map: "Map", URL: "URL", RegExp: "Pattern" }
		assert.equal(await api.typeName(new Date(0)), names.Date)
		assert.equal(await api.typeName(1n), names.bigint)
		assert.equal(await api.typeName(new Set([1])), names.Set)
		assert.equal(await api.typeName(/x/), names.RegExp)
		assert.equal(await api.typeName(undefined), "UnsetType")
		assert.equal(await api.typeName(null), "NoneType")
		assert.equal(await api.typeName(Buffer.from("ab")), "bytes")
		assert.deepEqual(await api.echo({ u: undefined, n: null }), { u: undefined, n: null })
	},
	async destroy() {
		if (!compact && where !== "stdio") await peer.signalDestroy()
	},
}

for (const [name, check] of Object.entries(checks)) {
	let timer
	const limit = new Promise((_, reject) => {
		timer = setTimeout(() => reject(new Error("no end within 90 s")), 90000)
	})
	try {
		await Promise.race([check(), limit])
	} catch (error) {
		console.error(`${name}: ${error.stack}`)
		process.exit(1)
	} finally {
		clearTimeout(timer)
	}
	if (where !== "stdio") process.stdout.write(`${name} ok\n`)
}
if (peer.invalid) {
	console.error(`${peer.invalid} invalid messages`)
	process.exit(1)
}
if (where === "stdio") process.stderr.write("all ok\n")
io.close()
process.exit(0)
