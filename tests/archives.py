"""Archives with any entries, also those that no honest one has."""

import io
import tarfile


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
