"""Archives with any entries, also those that no honest one has."""

import io
import tarfile

from speed_core.runner import replay


def write_tar(path, entries, mode="w"):
    """A tar of (name, bytes, or a type of tar as text) entries at `path`; a link or device points to /etc/passwd."""
    with tarfile.open(path, mode) as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            else:
                info.type, info.linkname = content.encode(), "/etc/passwd"
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def read_archive(source):
    """(manifest, {name: bytes}) of an export, which is checked."""
    manifest = replay.check_archive(source)
    return manifest, {name: stream.read() for name, stream in replay.members(source) if name != replay.CONTENTS}
