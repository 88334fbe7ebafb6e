import "./websocket_global.mjs"
import { RPCChannel, WebSocketClientIO } from "kkrpc"
import { check } from "./websocket.mjs"

console.log(await check({ RPCChannel, WebSocketClientIO }, process.argv[2], { hello: (name) => `hi ${name}` }))
process.exit(0)
