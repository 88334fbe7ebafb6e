// What the TypeScript side serves in the tests.
export class CustomError extends Error {
	constructor(message, code) {
		super(message)
		this.name = "CustomError"
		this.code = code
	}
}

export class Counter {
	constructor(start) {
		this.value = start
	}
}

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms))

export function makeApi(peer) {
	const state = { closed: 0 }
	return {
		add: (a, b) => a + b,
		math: { grade1: { add: (a, b) => a + b } },
		"dotted.name": () => "dotted",
		echo: (value) => value,
		nothing: () => undefined,
		greet: (name = "you", greeting = "hello") => `${greeting} ${name}`,
		has: (value) => `${"u" in value} ${value.list[0]}`,
		typeOf: (value) => (value === null ? "null" : value?.constructor?.name ?? typeof value),
		counter: 42,
		settings: { theme: "light" },
		Counter,
		throwSimple: () => {
			throw new Error("This is a simple error")
		},
		throwCustom: () => {
			throw new CustomError("This is a custom error\nof two lines 🚀", 418)
		},
		withProgress: async (n, onStep) => {
			for (let step = 1; step <= n; step += 1) await onStep(step)
			return n
		},
		hold: async (f) => {
			state.held = f
			return true
		},
		letGo: async () => {
			await state.held.release?.()
			return true
		},
		countTo: async function* (n) {
			try {
				for (let i = 1; i <= n; i += 1) yield i
			} finally {
				state.closed += 1
			}
		},
		slowCount: async function* (n, ms) {
			try {
				for (let i = 1; i <= n; i += 1) {
					yield i
					await sleep(ms)
				}
			} finally {
				state.closed += 1
			}
		},
		failStream: async function* (n) {
			for (let i = 1; i <= n; i += 1) yield i
			throw new CustomError("stream broke", 7)
		},
		sum: async (numbers) => {
			let total = 0
			for await (const number of numbers) total += number
			return total
		},
		closed: () => state.closed,
		meta: () => peer().lastMeta,
		callPeer: (name, ...args) => peer().api[name](...args),
		sameObject: (value) => value.x === value.y[0],
	}
}
