"""Writes what the programs are made of: a CycloneDX list of their crates, and the licence texts of these.

    python3 packaging/sbom.py OUTPUT-FOLDER

Uses only the standard library and `cargo metadata`; the output is reproducible. What is listed is what the three programs are built from by
their ordinary dependencies on x86-64 Linux: tests, benchmarks and build scripts are left out."""

import argparse
import collections
import hashlib
import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAMS = ["knoc-agent", "knoc-kubelet", "knocctl"]
TARGET = "x86_64-unknown-linux-musl"
LICENCE_FILE = re.compile(r"^(LICEN[CS]E|COPYING|COPYRIGHT|NOTICE|UNLICENSE)", re.IGNORECASE)
LONGEST = 1 << 20  # bytes of a licence text


def metadata():
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform", TARGET]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)


def used(data):
    """The packages that the programs are built from, sorted by name and version."""
    packages = {package["id"]: package for package in data["packages"]}
    nodes = {node["id"]: node for node in data["resolve"]["nodes"]}
    waiting = [key for key, package in packages.items() if package["name"] in PROGRAMS and package["source"] is None]
    found = set()
    while waiting:
        key = waiting.pop()
        if key in found:
            continue
        found.add(key)
        for dependency in nodes[key]["deps"]:
            if any(kind["kind"] is None for kind in dependency["dep_kinds"]):
                waiting.append(dependency["pkg"])
    return sorted((packages[key] for key in found), key=lambda package: (package["name"], package["version"]))


def checksums():
    """The digests of the crates' archives by name and version, from Cargo.lock."""
    text = (ROOT / "Cargo.lock").read_text()
    blocks = (dict(re.findall(r'^(\w+) = "(.*)"$', block, re.MULTILINE)) for block in text.split("[[package]]"))
    return {(block["name"], block["version"]): block["checksum"] for block in blocks if "checksum" in block}


def component(package, digests):
    name, version = package["name"], package["version"]
    entry = {"type": "library", "bom-ref": f"pkg:cargo/{name}@{version}", "name": name, "version": version,
             "purl": f"pkg:cargo/{name}@{version}"}
    if package["license"]:
        # The old form of Cargo for a choice between licences is no SPDX expression.
        entry["licenses"] = [{"expression": package["license"].replace("/", " OR ")}]
    if (name, version) in digests:
        entry["hashes"] = [{"alg": "SHA-256", "content": digests[(name, version)]}]
    return entry


def licence_files(package):
    folder = pathlib.Path(package["manifest_path"]).parent
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and LICENCE_FILE.match(path.name)]
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name.upper() == "LICENSES"]
    files += [path for inner in folders for path in sorted(inner.iterdir()) if path.is_file()]
    return [path.read_bytes()[:LONGEST].decode("utf-8", "replace").replace("\r\n", "\n").strip() for path in files]


def licences(packages):
    """All licence texts, each once, with the crates that have it."""
    texts = collections.OrderedDict()
    without = []
    for package in packages:
        title = f'{package["name"]} {package["version"]} ({package["license"] or "no licence named"})'
        found = licence_files(package)
        if not found:
            without.append(title)
        for text in found:
            texts.setdefault(hashlib.sha256(text.encode()).hexdigest(), (text, []))[1].append(title)
    out = ["The programs of KNoC contain the crates of this list, each under its own licence. They also contain the standard library of Rust",
           "(MIT OR Apache-2.0, https://www.rust-lang.org) and the C library musl (MIT, https://musl.libc.org).", ""]
    if without:
        out += ["These crates come without a text of their licence:", ""] + [f"  {title}" for title in without] + [""]
    for text, titles in texts.values():
        out += ["=" * 100] + titles + ["-" * 100, text, ""]
    return "\n".join(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=pathlib.Path)
    output = parser.parse_args().output
    data = metadata()
    packages = used(data)
    foreign = [package for package in packages if package["source"] is not None]
    if len(foreign) < 50:
        sys.exit(f"only {len(foreign)} crates were found, which cannot be all")
    digests = checksums()
    version = next(package["version"] for package in packages if package["name"] == "knoc-agent")
    bom = {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
           "metadata": {"component": {"type": "application", "bom-ref": "knoc", "name": "knoc", "version": version}},
           "components": [component(package, digests) for package in foreign]}
    output.mkdir(parents=True, exist_ok=True)
    (output / f"knoc-{version}.cdx.json").write_text(json.dumps(bom, indent=1) + "\n")
    (output / "THIRD-PARTY-LICENSES.txt").write_text(licences(foreign))


main()
