// kkrpc 0.2.2 with a stream adapter, which that version lacks, in front of Redis.
import { NodeIo, RPCChannel } from "kkrpc"
import { RedisIo } from "./io.mjs"

class RedisStreamsIO {
	name = "redis-streams-io"

	constructor({ url, stream }) {
		this.redis = new RedisIo(url, stream, `ts-${process.pid}`, { sessionId: true })
		this.queue = []
		this.redis.onmessage = (text) => {
			if (this.waiting) this.waiting(text)
			else this.queue.push(text)
			this.waiting = null
		}
		this.started = this.redis.start()
		this.started.then(() => process.stderr.write("ready\n"))
	}

	async read() {
		await this.started
		if (this.queue.length) return this.queue.shift()
		return await new Promise((resolve) => (this.waiting = resolve))
	}

	async write(text) {
		await this.started
		await this.redis.write(text)
	}
}

export { NodeIo, RedisStreamsIO, RPCChannel }
