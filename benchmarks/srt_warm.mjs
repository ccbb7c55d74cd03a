// The library of Anthropic's sandbox-runtime, kept warm: reads "start" or "run", a line each, from standard input.
import { spawnSync } from 'node:child_process'
import { createInterface } from 'node:readline'

const { SandboxManager } = await import(process.argv[2])
for await (const line of createInterface({ input: process.stdin })) {
  if (line === 'start') {
    await SandboxManager.initialize({
      network: { allowedDomains: [], deniedDomains: [] },
      filesystem: { denyRead: [], allowWrite: ['.'], denyWrite: [] },
    })
    console.log('ready')
  } else {
    const started = performance.now()
    const wrapped = await SandboxManager.wrapWithSandbox('true')
    const done = spawnSync(wrapped, { shell: true })
    if (done.status !== 0) throw new Error(`status ${done.status}: ${done.stderr}`)
    console.log(performance.now() - started)
  }
}
