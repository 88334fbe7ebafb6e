// Where lines come from and go to: Redis Streams, as kkrpc writes them, or this process' stdio.
import { createInterface } from "node:readline"
import Redis from "ioredis"

const QUEUE = 1000 // kkrpc 0.x drops the oldest of what one read brings beyond this

export class RedisIo {
	name = "redis-streams-io"
	dropped = 0

	constructor(url, stream, id, { sessionId = false } = {}) {
		this.stream = stream
		this.id = id
		this.fields = sessionId ? ["sessionId", id] : []
		this.publisher = new Redis(url)
		this.subscriber = new Redis(url)
		this.onmessage = () => {}
		this.closed = false
	}

	async start() {
		const [last] = await this.publisher.xrevrange(this.stream, "+", "-", "COUNT", 1)
		this.last = last ? last[0] : "0-0"
		this.loop = this.read()
	}

	async read() {
		while (!this.closed) {
			let reply
			try {
				reply = await this.subscriber.xread("BLOCK", 5000, "STREAMS", this.stream, this.last)
			} catch (error) {
				if (this.closed) return
				throw error
			}
			if (!reply) continue
			let entries = reply[0][1]
			this.last = entries.at(-1)[0]
			if (this.fields.length && entries.length > QUEUE) {
				this.dropped += entries.length - QUEUE
				entries = entries.slice(-QUEUE)
			}
			for (const [, fields] of entries) {
				const at = fields.indexOf("data")
				if (at < 0) continue
				const from = fields.indexOf("sessionId")
				if (this.fields.length && from >= 0 && fields[from + 1] === this.id) continue
				this.onmessage(fields[at + 1])
			}
		}
	}

	async write(text) {
		await this.publisher.xadd(this.stream, "*", "data", text, ...this.fields)
	}

	close() {
		this.closed = true
		this.publisher.disconnect()
		this.subscriber.disconnect()
	}
}

export class StdioIo {
	name = "stdio"
	dropped = 0

	async start() {
		this.lines = createInterface({ input: process.stdin })
		this.lines.on("line", (line) => this.onmessage(line + "\n"))
		this.lines.on("close", () => process.exit(0))
	}

	async write(text) {
		process.stdout.write(text.endsWith("\n") ? text : text + "\n")
	}

	close() {
		this.lines.close()
	}
}
