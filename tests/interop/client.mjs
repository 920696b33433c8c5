// The JavaScript client library as a command line program; README.md describes the contract.
import { createRequire } from 'node:module';
import path from 'node:path';
import { PassThrough } from 'node:stream';
import { pathToFileURL } from 'node:url';

// The library is in the folder where interop.sh installed it, not next to this file.
const installed = createRequire(path.join(process.env.KNOC_NODE_MODULES, 'any.js'));
const k8s = await import(pathToFileURL(installed.resolve('@kubernetes/client-node')));

const kc = new k8s.KubeConfig();
kc.loadFromDefault();
const [verb, namespace, pod, what, ...rest] = process.argv.slice(2);

/** The exit code that a status carries. */
function codeOf(status) {
    if (status.status === 'Success') return 0;
    const cause = status.details?.causes?.find((one) => one.reason === 'ExitCode');
    if (cause) return Number(cause.message);
    console.error(status.message);
    return 125;
}

/** Until the connection is closed. Then nothing of ours keeps the process but what is still to be written. */
async function closed(socket) {
    await new Promise((resolve) => socket.addEventListener('close', resolve));
    process.stdin.destroy();
}

async function exec({ stdin = null, tty = false } = {}) {
    process.exitCode = 125;
    const socket = await new k8s.Exec(kc).exec(
        namespace, pod, what, rest, process.stdout, tty ? null : process.stderr, stdin, tty,
        (status) => { process.exitCode = codeOf(status); },
    );
    await closed(socket);
}

async function attach() {
    const attached = new k8s.Attach(kc);
    await closed(await attached.attach(namespace, pod, what, process.stdout, process.stderr, process.stdin, false));
}

async function forward() {
    const forwarder = new k8s.PortForward(kc);
    // The end of the input would end the whole connection: the protocol has no half-close, so the library closes the connection.
    const input = process.stdin.pipe(new PassThrough(), { end: false });
    await closed(await forwarder.portForward(namespace, pod, [Number(what)], process.stdout, process.stderr, input));
}

async function logs() {
    await new k8s.Log(kc).log(namespace, pod, what, process.stdout, { follow: true });
}

// The library's promises of cp resolve before the copy is complete; its socket keeps the process alive until then.
async function copyTo([local, remote]) {
    await new k8s.Cp(kc).cpToPod(namespace, pod, what, local, remote);
}

async function copyFrom([remote, local, name]) {
    await new k8s.Cp(kc).cpFromPod(namespace, pod, what, name, local, remote);
}

const verbs = {
    exec: () => exec(),
    'exec-stdin': () => exec({ stdin: process.stdin }),
    'exec-tty': () => exec({ stdin: process.stdin, tty: true }),
    attach, 'port-forward': forward, logs,
    'cp-to': () => copyTo(rest),
    'cp-from': () => copyFrom(rest),
};
try {
    await verbs[verb]();
} catch (error) {
    console.error(error?.message ?? error);
    process.exit(125);
}
