// Node 20 has no WebSocket of its own; browsers and later versions have.
import { WebSocket } from "ws"

globalThis.WebSocket ??= WebSocket
