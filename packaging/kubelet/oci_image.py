"""Writes an OCI image of one static binary, as a layout and as an archive, optionally with a layer of further files. Uses only the
standard library; the output is reproducible."""

import argparse
import gzip
import hashlib
import io
import json
import os
import pathlib
import shutil
import tarfile
import time

USER = 65532  # "nonroot", as in distroless images


def entry(archive, name, data, mode, epoch):
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), mode, epoch
    archive.addfile(info, io.BytesIO(data))


def tar(files, epoch):
    """An uncompressed tar of (name, data, mode) in the given order, owned by root."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data, mode in files:
            entry(archive, name, data, mode, epoch)
    return out.getvalue()


def tree(folder, epoch):
    """An uncompressed tar of all files and links below a folder, sorted by name and owned by root."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(pathlib.Path(folder).rglob("*")):
            info = archive.gettarinfo(str(path), str(path.relative_to(folder)))
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            info.mtime = epoch
            info.mode = 0o755 if path.is_dir() or info.mode & 0o100 else 0o644
            if info.isreg():
                with path.open("rb") as file:
                    archive.addfile(info, file)
            else:
                archive.addfile(info)
    return out.getvalue()


def digest(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def encode(document):
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def descriptor(media_type, data, **more):
    return {"mediaType": media_type, "digest": digest(data), "size": len(data), **more}


def config(version, layer_tars, created):
    return {
        "architecture": "amd64",
        "os": "linux",
        "created": created,
        "config": {
            "User": f"{USER}:{USER}",
            "Entrypoint": ["/knoc-kubelet"],
            "WorkingDir": "/",
            "ExposedPorts": {"10250/tcp": {}},
            "Labels": {
                "org.opencontainers.image.title": "knoc-kubelet",
                "org.opencontainers.image.description": "Cluster side of KNoC: a virtual node on an HPC cluster.",
                "org.opencontainers.image.licenses": "Apache-2.0",
                "org.opencontainers.image.version": version,
            },
        },
        "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in layer_tars]},
        "history": [{"created": created, "created_by": "packaging/kubelet/oci_image.py"} for _ in layer_tars],
    }


def build(binary, licence, version, epoch, further=None):
    """The files of the OCI layout, by path."""
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch))
    layer_tars = [tar([("LICENSE", licence, 0o644), ("knoc-kubelet", binary, 0o755)], epoch)]
    if further:
        layer_tars.append(tree(further, epoch))
    layers = [gzip.compress(layer, 9, mtime=0) for layer in layer_tars]
    image_config = encode(config(version, layer_tars, created))
    manifest = encode({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", image_config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar+gzip", layer) for layer in layers],
    })
    index = encode({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            descriptor(
                "application/vnd.oci.image.manifest.v1+json",
                manifest,
                platform={"architecture": "amd64", "os": "linux"},
                annotations={"org.opencontainers.image.ref.name": version},
            )
        ],
    })
    blobs = {"blobs/sha256/" + digest(data).split(":")[1]: data for data in (image_config, *layers, manifest)}
    return {"oci-layout": encode({"imageLayoutVersion": "1.0.0"}), "index.json": index, **blobs}, digest(manifest)


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    for name in ("binary", "license", "version", "output"):
        arguments.add_argument(f"--{name}", required=True)
    arguments.add_argument("--files", help="a folder whose files become a second layer")
    arguments.add_argument("--suffix", default="", help="is added to the image's version and to the names of the output")
    given = arguments.parse_args()
    given.version += given.suffix
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
    read = lambda path: pathlib.Path(path).read_bytes()
    files, manifest = build(read(given.binary), read(given.license), given.version, epoch, given.files)

    output = pathlib.Path(given.output)
    layout, fresh = output / f"knoc-kubelet{given.suffix}-oci", output / f"knoc-kubelet{given.suffix}-oci.new"
    for folder in (layout, fresh):
        shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        (fresh / name).write_bytes(data)
    fresh.rename(layout)
    archive = output / f"knoc-kubelet-{given.version}.oci.tar"
    archive.write_bytes(tar([(name, data, 0o644) for name, data in sorted(files.items())], epoch))
    print(f"{layout}:{given.version} and {archive} ({archive.stat().st_size} bytes) {manifest}")


if __name__ == "__main__":
    main()
