"""The Python client library on the command line; README.md has the contract."""

import json
import os
import sys
import threading

from kubernetes import client, config
from kubernetes.stream import portforward, stream

CHUNK = 1 << 16


def feed(send, finish):
    """Passes standard input on, then says that it has ended."""
    while chunk := os.read(0, CHUNK):
        send(chunk)
    finish()


def code_of(status):
    """The exit code that a status carries."""
    if status.get("status") == "Success":
        return 0
    for cause in (status.get("details") or {}).get("causes") or []:
        if cause.get("reason") == "ExitCode":
            return int(cause["message"])
    print(status.get("message", status), file=sys.stderr)
    return 125


def tell_size(session):
    """Tells the other side how large our terminal is; the library has only the channel for it."""
    size = os.get_terminal_size(0)
    session.write_channel(4, json.dumps({"Width": size.columns, "Height": size.lines}).encode())


def relay(session, stdin, tty):
    """Streams of a session to ours until it ends; answers its exit code."""
    if tty:
        tell_size(session)
    if stdin:
        end = lambda: session.close_channel(0)  # only v5 can; the library does nothing otherwise
        threading.Thread(target=feed, args=(session.write_stdin, end), daemon=True).start()
    while session.is_open():
        session.update(timeout=1)
        for channel, sink in ((1, sys.stdout.buffer), (2, sys.stderr.buffer)):
            if session.peek_channel(channel):
                sink.write(session.read_channel(channel))
                sink.flush()
    for channel, sink in ((1, sys.stdout.buffer), (2, sys.stderr.buffer)):
        sink.write(session.read_channel(channel) or b"")
    status = session.read_channel(3)
    return code_of(json.loads(status)) if status else 0


def execute(api, namespace, pod, container, command, stdin=False, tty=False):
    session = stream(
        api.connect_get_namespaced_pod_exec, pod, namespace, container=container, command=command,
        stdin=stdin, stdout=True, stderr=not tty, tty=tty, _preload_content=False, binary=True,
    )
    return relay(session, stdin, tty)


def attach(api, namespace, pod, container):
    session = stream(
        api.connect_get_namespaced_pod_attach, pod, namespace, container=container,
        stdin=True, stdout=True, stderr=True, tty=False, _preload_content=False, binary=True,
    )
    return relay(session, True, False)


def forward(api, namespace, pod, port):
    ports = portforward(api.connect_get_namespaced_pod_portforward, pod, namespace, ports=port)
    socket = ports.socket(int(port))
    socket.setblocking(True)
    threading.Thread(target=feed, args=(socket.sendall, lambda: None), daemon=True).start()
    while chunk := socket.recv(CHUNK):
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
    if error := ports.error(int(port)):
        print(error, file=sys.stderr)
        return 125
    return 0


def logs(api, namespace, pod, container):
    answer = api.read_namespaced_pod_log(pod, namespace, container=container, follow=True, _preload_content=False)
    while chunk := answer.read1(CHUNK):
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
    return 0


def main(verb, namespace, pod, what, *command):
    config.load_kube_config()
    api = client.CoreV1Api()
    if verb == "exec":
        return execute(api, namespace, pod, what, list(command))
    if verb == "exec-stdin":
        return execute(api, namespace, pod, what, list(command), stdin=True)
    if verb == "exec-tty":
        return execute(api, namespace, pod, what, list(command), stdin=True, tty=True)
    verbs = {"attach": attach, "port-forward": forward, "logs": logs}
    return verbs[verb](api, namespace, pod, what)


try:
    code = main(*sys.argv[1:])
except Exception as error:  # whatever the library throws is what the table shows
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    code = 125
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # a thread may still read standard input
