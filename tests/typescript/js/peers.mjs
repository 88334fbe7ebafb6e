// Two small peers written from the facts of the wire, not from kkrpc's source: kkrpc 0.x with all
// that its stream adapter's generation had, and kkrpc 2.
import { randomUUID } from "node:crypto"
import superjson from "superjson"

const isStream = (value) => value != null && typeof value[Symbol.asyncIterator] === "function"

function proxy(peer, path) {
	return new Proxy(function () {}, {
		get: (_, name) => (name === "then" ? undefined : proxy(peer, [...path, name])),
		apply: (_, __, args) => peer.request("call", path, args),
	})
}

class Peer {
	constructor(io, expose) {
		this.io = io
		this.expose = expose
		this.pending = new Map()
		this.callbacks = new Map()
		this.ids = new Map()
		this.api = proxy(this, [])
		this.stray = 0
		io.onmessage = (text) => this.take(text)
	}

	get(...path) {
		return this.request("get", path)
	}

	set(path, value) {
		return this.request("set", path, undefined, value)
	}

	construct(path, ...args) {
		return this.request("new", path, args)
	}

	callbackId(f) {
		if (!this.ids.has(f)) {
			const id = randomUUID()
			this.ids.set(f, id)
			this.callbacks.set(id, f)
		}
		return this.ids.get(f)
	}

	settle(id, value, error) {
		const waiting = this.pending.get(id)
		if (!waiting) {
			this.stray += 1
			return
		}
		this.pending.delete(id)
		error ? waiting.reject(error) : waiting.resolve(value)
	}

	// What the request asks for, or an error as kkrpc words it.
	async run(op, path, args, value) {
		let parent = this.expose
		for (const name of path.slice(0, -1)) {
			parent = parent?.[name]
			if (parent === undefined) throw this.unknownPath(op, path, name)
		}
		const name = path.at(-1)
		if (op === "set") {
			parent[name] = value
			return true
		}
		const target = parent?.[name]
		if (op === "get") return this.gotten(target, path)
		if (typeof target !== "function") throw this.unknown(op, path)
		return op === "new" ? { ...new target(...args) } : await target.apply(parent, args)
	}
}

class Named extends Error {
	constructor(name, message, fields = {}) {
		super(message)
		this.name = name
		Object.assign(this, fields)
	}
}

export class ClassicPeer extends Peer {
	constructor(io, expose, { rich = true, silent = true } = {}) {
		super(io, expose)
		this.rich = rich
		this.silent = silent
		this.outgoing = new Map()
		this.incoming = new Map()
		this.destroyed = false
		this.rest = ""
	}

	async send(message) {
		message = { ...message, version: this.rich ? "superjson" : "json" }
		const replacer = (_, value) =>
			value instanceof Uint8Array ? { type: "Uint8Array", data: Array.from(value) } : value
		const text = this.rich ? superjson.stringify(message) : JSON.stringify(message, replacer)
		await this.io.write(text + "\n")
	}

	request(op, path, args, value) {
		const id = [1, 2, 3, 4].map(() => Math.floor(Math.random() * 2 ** 53).toString(16)).join("-")
		const result = new Promise((resolve, reject) => this.pending.set(id, { resolve, reject }))
		if (op === "get") this.send({ id, method: "", args: {}, type: "get", path })
		else if (op === "set")
			this.send({ id, method: "", args: {}, type: "set", path, value, transferSlots: undefined })
		else {
			const callbackIds = []
			const packed = args.map((arg) => {
				if (typeof arg !== "function") return arg
				callbackIds.push(this.callbackId(arg))
				return "__callback__" + this.callbackId(arg)
			})
			this.send({
				id,
				method: path.join("."),
				args: packed,
				type: op === "new" ? "construct" : "request",
				callbackIds: callbackIds.length ? callbackIds : undefined,
				transferSlots: undefined,
			})
		}
		return result
	}

	take(text) {
		if (text === "__DESTROY__") {
			this.destroyed = true
			this.ondestroy?.()
			return
		}
		// Only what ends in a newline is a message; the rest waits for the next entry.
		this.rest += text
		const end = this.rest.lastIndexOf("\n")
		if (end < 0) return
		const lines = this.rest.slice(0, end).split("\n")
		this.rest = this.rest.slice(end + 1)
		for (const line of lines) {
			const revive = (_, value) =>
				value?.type === "Uint8Array" && Array.isArray(value.data) ? Uint8Array.from(value.data) : value
			let message
			try {
				message = line.startsWith('{"json":') ? superjson.parse(line) : JSON.parse(line, revive)
			} catch (error) {
				console.error("unreadable", line.slice(0, 300), String(error))
				continue
			}
			this.handle(message)
		}
	}

	handle(message) {
		const { id, type, args } = message
		if (type === "response") this.response(id, args)
		else if (type === "callback") this.callbacks.get(message.method)?.(...args)
		else if (type === "stream-chunk") this.incoming.get(id)?.push({ value: args.value })
		else if (type === "stream-end") this.incoming.get(id)?.push({ done: true })
		else if (type === "stream-error") this.incoming.get(id)?.push({ error: this.error(args.error) })
		else if (type === "stream-cancel") this.outgoing.get(id)?.return?.()
		else if (["request", "get", "set", "construct"].includes(type)) this.serve(message)
		else console.error("received unknown message type", type)
	}

	response(id, args) {
		if (args.error !== undefined) return this.settle(id, undefined, this.error(args.error))
		if (args.result?.__stream === true && this.pending.has(id)) {
			return this.settle(id, this.stream(id))
		}
		this.settle(id, args.result)
	}

	error(error) {
		if (typeof error === "string") return new Error(error)
		if (!error?.name || !error?.message) return new Error(String(error))
		const { name, message, stack, ...fields } = error
		return new Named(name, message, fields)
	}

	stream(id) {
		const waiting = []
		let wake = () => {}
		this.incoming.set(id, { push: (item) => (waiting.push(item), wake()) })
		const peer = this
		return (async function* () {
			let ended = false
			try {
				while (true) {
					while (!waiting.length) await new Promise((resolve) => (wake = resolve))
					const { value, done, error } = waiting.shift()
					ended = done || error !== undefined
					if (error) throw error
					if (done) return
					yield value
				}
			} finally {
				peer.incoming.delete(id)
				if (!ended) await peer.send({ id, method: "", args: {}, type: "stream-cancel" })
			}
		})()
	}

	gotten(target, path) {
		if (target === undefined) throw this.unknownPath("get", path, path.at(-1))
		return target
	}

	unknownPath(op, path, name) {
		const what = { call: "Method", new: "Constructor" }[op] ?? "Property"
		return { text: `${what} path ${path.join(".")} not found at ${name}` }
	}

	unknown(op, path) {
		const name = path.join(".")
		return { text: op === "new" ? `${name} is not a constructor function` : `Method ${name} is not a function` }
	}

	async serve({ id, type, method, path, args, value }) {
		if (!this.expose) return
		const op = { request: "call", construct: "new" }[type] ?? type
		const answer = (args) => this.send({ id, method: "", args, type: "response" })
		if (Array.isArray(args)) {
			args = args.map((arg) => {
				if (typeof arg !== "string" || !arg.startsWith("__callback__")) return arg
				const target = arg.slice("__callback__".length)
				return (...args) =>
					this.send({ id: randomUUID(), method: target, args, type: "callback", transferSlots: undefined })
			})
		}
		let result
		try {
			result = await this.run(op, path ?? method.split("."), args, value)
		} catch (error) {
			if (error.text) return this.silent ? undefined : answer({ error: error.text })
			const { name, message, stack } = error
			return answer({ error: { name, message, stack, ...error } })
		}
		if (!isStream(result)) {
			return this.send({ id, method: "", args: { result }, type: "response", transferSlots: undefined })
		}
		await answer({ result: { __stream: true } })
		const iterator = result[Symbol.asyncIterator]()
		this.outgoing.set(id, iterator)
		try {
			for await (const item of { [Symbol.asyncIterator]: () => iterator }) {
				if (!this.outgoing.has(id)) return
				await this.send({ id, method: "", args: { value: item }, type: "stream-chunk", transferSlots: undefined })
			}
			await this.send({ id, method: "", args: {}, type: "stream-end" })
		} catch (error) {
			const { name, message, stack } = error
			await this.send({ id, method: "", args: { error: { name, message, stack, ...error } }, type: "stream-error" })
		} finally {
			this.outgoing.delete(id)
		}
	}

	signalDestroy() {
		return this.io.write("__DESTROY__")
	}
}

const ARG = "__kkrpc_next_arg__"
const STREAM = "__kkrpc_next_stream__"

export class CompactPeer extends Peer {
	constructor(io, expose, { id = "client", to, bus = true } = {}) {
		super(io, expose)
		Object.assign(this, { id, to, bus })
		this.producers = new Map()
		this.consumers = new Map()
		this.invalid = 0
	}

	async send(message) {
		if (!this.bus) return await this.io.write(JSON.stringify(message))
		const envelope = { protocol: "kkrpc.bus.v1", transportId: "redis-streams", from: this.id }
		if (this.to) envelope.to = this.to
		if (message.t !== "cbr") envelope.correlationId = message.id
		await this.io.write(JSON.stringify({ ...envelope, sentAt: Date.now(), message }))
	}

	take(text) {
		let message
		try {
			message = JSON.parse(text)
		} catch {
			return
		}
		if (this.bus) {
			const bus = message
			if (bus.protocol !== "kkrpc.bus.v1") return
			const text = (value) => typeof value === "string"
			const optional = (value, type) => value === undefined || typeof value === type
			const valid =
				text(bus.transportId) && text(bus.from) && optional(bus.to, "string") &&
				optional(bus.correlationId, "string") && optional(bus.sentAt, "number") &&
				bus.sequence === undefined
			if (!valid) {
				this.invalid += 1
				return
			}
			if (bus.from === this.id || (bus.to && bus.to !== this.id)) return
			message = bus.message
		}
		if (!["q", "r", "cb", "cbr", "sq", "sr"].includes(message.t) || "k" in message || "d" in message && message.t === "q") {
			this.invalid += 1
			return
		}
		this.handle(message)
	}

	pack(value) {
		if (isStream(value)) return { [ARG]: "value", v: { [STREAM]: "async-iterable", id: this.produce(value) } }
		if (typeof value === "function") return { [ARG]: "callback", id: this.callbackId(value) }
		return { [ARG]: "value", v: value }
	}

	unpack(arg) {
		if (arg?.[ARG] === "value") return this.unpackValue(arg.v)
		if (arg?.[ARG] === "callback") {
			const call = (...args) => this.send({ t: "cb", id: arg.id, a: args.map((a) => this.pack(a)) })
			call.release = () => this.send({ t: "cbr", ids: [arg.id] })
			return call
		}
		return arg
	}

	unpackValue(value) {
		return value?.[STREAM] === "async-iterable" ? this.consume(value.id) : value
	}

	produce(source) {
		const id = randomUUID()
		this.producers.set(id, { iterator: source[Symbol.asyncIterator](), credit: 0, running: false })
		return id
	}

	async pump(sid, producer) {
		if (producer.running) return
		producer.running = true
		try {
			while (producer.credit > 0 && this.producers.has(sid)) {
				producer.credit -= 1
				const { value, done } = await producer.iterator.next()
				if (done) this.producers.delete(sid)
				await this.send({ t: "sr", id: randomUUID(), sid, d: !!done, v: value })
			}
		} catch (error) {
			this.producers.delete(sid)
			await this.send({ t: "sr", id: randomUUID(), sid, e: { n: "Error", m: String(error) } })
		} finally {
			producer.running = false
		}
	}

	consume(sid) {
		const waiting = []
		let wake = () => {}
		this.consumers.set(sid, { push: (item) => (waiting.push(item), wake()) })
		const peer = this
		return (async function* () {
			let ended = false
			let taken = 0
			await peer.send({ t: "sq", id: randomUUID(), sid, op: "pull", n: 32 })
			try {
				while (true) {
					while (!waiting.length) await new Promise((resolve) => (wake = resolve))
					const { d, v, e } = waiting.shift()
					ended = d || e !== undefined
					if (e) throw new Named(e.n, e.m)
					if (d) return
					taken += 1
					if (taken % 16 === 0) peer.send({ t: "sq", id: randomUUID(), sid, op: "pull", n: 16 })
					yield v
				}
			} finally {
				peer.consumers.delete(sid)
				if (!ended) await peer.send({ t: "sq", id: randomUUID(), sid, op: "return" })
			}
		})()
	}

	request(op, path, args, value) {
		const id = randomUUID()
		const result = new Promise((resolve, reject) => this.pending.set(id, { resolve, reject }))
		const message = { t: "q", id, op, p: path }
		if (args) message.a = args.map((arg) => this.pack(arg))
		if (op === "set") message.v = value
		if (this.meta) message.meta = this.meta
		this.send(message)
		return result
	}

	handle(message) {
		const { t, id, sid } = message
		if (t === "r") {
			if (!message.e) return this.settle(id, this.pending.has(id) ? this.unpackValue(message.v) : undefined)
			const { n, m, s, ...fields } = message.e
			this.settle(id, undefined, new Named(n, m, fields))
		} else if (t === "cb") this.callbacks.get(id)?.(...message.a.map((arg) => this.unpack(arg)))
		else if (t === "cbr") this.release(message.ids)
		else if (t === "sr") this.consumers.get(sid)?.push(message)
		else if (t === "sq") this.streamRequest(message)
		else this.serve(message)
	}

	release(ids) {
		if (this.bus) return // as kkrpc does
		for (const id of ids) {
			this.ids.delete(this.callbacks.get(id))
			this.callbacks.delete(id)
		}
	}

	async streamRequest({ id, sid, op, n = 1, v }) {
		const producer = this.producers.get(sid)
		if (!producer) {
			const answer = op === "return" ? { d: true, v } : { e: { n: "Error", m: `Unknown RPC stream ${sid}` } }
			return this.send({ t: "sr", id, sid, ...answer })
		}
		if (op === "pull") {
			producer.credit += n
			return this.pump(sid, producer)
		}
		this.producers.delete(sid)
		await producer.iterator.return?.()
		await this.send({ t: "sr", id, sid, d: true, v })
	}

	gotten(target) {
		return target
	}

	unknownPath(op, path, name) {
		return new Error(`Cannot access ${path[path.indexOf(name) + 1]} on undefined`)
	}

	unknown(op, path) {
		if (op === "new") return new TypeError("undefined is not a constructor")
		return new Error(`${path.at(-1)} is not a function`)
	}

	async serve({ id, op, p, a = [], v, meta }) {
		if (!this.expose) return this.send({ t: "r", id, e: { n: "Error", m: "No API exposed" } })
		try {
			this.lastMeta = meta
			const result = await this.run(op, p, a.map((arg) => this.unpack(arg)), v)
			const packed = isStream(result) ? { [STREAM]: "async-iterable", id: this.produce(result) } : result
			await this.send({ t: "r", id, v: packed })
		} catch (error) {
			const { name, message, stack } = error
			const { name: _, ...own } = error
			await this.send({ t: "r", id, e: { n: name, m: message, s: stack, ...own } })
		}
	}
}
