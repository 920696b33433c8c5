#!/usr/bin/python3
"""Stands for programs that Debian does not have, in the pods of their charts (tests/testbed/charts.sh): stand-in.py grafana | spark

It needs what the original needs from its pod (configuration, secrets, volumes, addresses, signals) and answers in its place.
"""

import base64
import configparser
import http.server
import json
import os
import pathlib
import signal
import socket
import sys


class Grafana(http.server.BaseHTTPRequestHandler):
    """/api/health for everybody; /api/datasources, which the chart provisions, for the administrator."""

    def do_GET(self):
        if self.path == "/api/health":
            return self.answer(200, {"database": "ok", "starts": self.server.starts})
        user, password = os.environ["GF_SECURITY_ADMIN_USER"], os.environ["GF_SECURITY_ADMIN_PASSWORD"]
        wanted = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        if self.headers.get("Authorization") != wanted:
            return self.answer(401, {"message": "Unauthorized"})
        if self.path == "/api/datasources":
            provisioned = pathlib.Path(os.environ["GF_PATHS_PROVISIONING"], "datasources", "datasources.yaml")
            return self.answer(200, {"provisioned": provisioned.read_text()})
        return self.answer(404, {"message": "Not found"})

    def answer(self, status, body):
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def grafana():
    """Counts its starts in its data folder, where the original has its database."""
    configuration = configparser.ConfigParser()
    configuration.read("/etc/grafana/grafana.ini")
    starts = pathlib.Path(os.environ["GF_PATHS_DATA"], "starts")
    count = int(starts.read_text()) + 1 if starts.exists() else 1
    starts.write_text(str(count))
    server = http.server.ThreadingHTTPServer(("", configuration.getint("server", "http_port")), Grafana)
    server.starts = count
    print("listening, start", count, flush=True)
    server.serve_forever()


def spark():
    """Writes a block to the folder that Spark was given, and serves it at the port of the block manager until it is told to stop."""
    if sys.argv[2:] != ["executor"]:
        sys.exit(f"unknown command {sys.argv[2:]}")
    executor = {name: value for name, value in os.environ.items() if name.startswith("SPARK_")}
    properties = pathlib.Path(executor["SPARK_CONF_DIR"], "spark.properties").read_text()
    port = int(dict(line.split("=", 1) for line in properties.split())["spark.blockManager.port"])
    block = pathlib.Path(executor["SPARK_LOCAL_DIRS"], "block")
    block.write_text("block of executor " + executor["SPARK_EXECUTOR_ID"])
    address = executor["SPARK_EXECUTOR_POD_IP"]
    server = socket.create_server(("", port))
    print("executor", executor["SPARK_EXECUTOR_ID"], "of", executor["SPARK_APPLICATION_ID"], "at", address, flush=True)
    while True:
        connection, _ = server.accept()
        with connection, connection.makefile("rw") as stream:
            if stream.readline().strip() == "stop":
                stream.write("stopped\n")
                break
            stream.write(block.read_text() + "\n")
    print("driver commanded a shutdown", flush=True)


# As PID 1, a program ends at a signal only if it handles it.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
{"grafana": grafana, "spark": spark}[sys.argv[1]]()
