// What kkrpc 0.2.2's own client does over a WebSocket: on Node, and in a page.
export async function check({ RPCChannel, WebSocketClientIO }, url, expose) {
	const io = new WebSocketClientIO({ url })
	const channel = new RPCChannel(io, { expose })
	const api = channel.getAPI()
	const equal = (found, wanted) => {
		const [a, b] = [found, wanted].map((value) => JSON.stringify(value))
		if (a !== b) throw new Error(`${a} is not ${b}`)
	}
	equal(await api.add(7, 8), 15)
	equal(await api.math.grade1.add(5, 3), 8)
	const value = { text: "héllo ✓ 🚀 \n", list: [1, 2.5, null, true], date: new Date(0) }
	equal(await api.echo(value), value)
	const sums = await Promise.all(Array.from({ length: 200 }, (_, i) => api.add(i, 1)))
	equal(sums, Array.from({ length: 200 }, (_, i) => i + 1))
	const large = "ü".repeat(1 << 19)
	equal((await api.echo(large)).length, large.length)
	const steps = []
	equal(await api.withProgress(3, (step) => steps.push(step)), 3)
	equal(steps, [1, 2, 3])
	equal(await api.callPeer("hello", "bob"), "hi bob")
	const refused = await api.nope(1).then(() => null, (error) => error.message)
	equal(refused, "Method nope is not a function")
	io.destroy()
	return "ok"
}
