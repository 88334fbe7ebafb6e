// A server of kkrpc 0.2.2 that says where it listens.
import { RPCChannel, WebSocketServerIO } from "kkrpc"
import { WebSocketServer } from "ws"

const server = new WebSocketServer({ host: "127.0.0.1", port: 0, perMessageDeflate: true })
server.on("connection", (socket) => {
	const channel = new RPCChannel(new WebSocketServerIO(socket), {
		expose: {
			add: (a, b) => a + b,
			echo: (value) => value,
			math: { multiply: (a, b) => a * b },
			steps: (count, onStep) => {
				for (let step = 1; step <= count; step += 1) onStep(step)
				return count
			},
			askBack: (name) => channel.getAPI().hello(name),
		},
	})
})
server.on("listening", () => console.log(server.address().port))
