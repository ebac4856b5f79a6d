"""The certificate of one job, by which those who call its supervisor know it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from distui.core.errors import UserError
from distui.launcher.node.link import SERVER_NAME


def new_certificate() -> tuple[bytes, bytes]:
    """Return the certificate and key of one job, made by openssl; nothing of them stays on the disk.

    Raises: UserError without openssl.
    """
    openssl = shutil.which("openssl")
    if openssl is None:
        raise UserError("no certificate can be made", "the openssl command is not installed", "install openssl")
    with tempfile.TemporaryDirectory(prefix="distui-") as folder:
        key, certificate = Path(folder) / "key.pem", Path(folder) / "cert.pem"
        words = ["req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "365"]
        words += ["-subj", f"/CN={SERVER_NAME}", "-addext", f"subjectAltName=DNS:{SERVER_NAME}"]
        words += ["-keyout", str(key), "-out", str(certificate)]
        done = subprocess.run([openssl, *words], capture_output=True, text=True, umask=0o077, check=False)
        if done.returncode:
            why = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise UserError("openssl could not make a certificate", why[0], "look at the installation of openssl")
        return certificate.read_bytes(), key.read_bytes()
