"""The platform tag that a compiled library deserves: which systems have all that it asks of them.

Linux only. A tag manylinux_2_N promises to run wherever the C library is 2.N or later, together with the C++ and
compiler libraries that came with such systems (PEP 600, PEP 599). What a library needs stands in its ELF headers, which
`readelf` of binutils shows.
"""

import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

Version = tuple[int, ...]

# Highest version of symbols -> N of the first systems with glibc 2.N that have it, as in auditwheel's policies.
SYSTEMS_WITH: dict[str, dict[str, int]] = {
    "GLIBCXX": {"3.4.19": 17, "3.4.22": 24, "3.4.24": 27, "3.4.28": 31, "3.4.29": 34, "3.4.30": 35, "3.4.33": 39},
    "CXXABI": {"1.3.7": 17, "1.3.9": 24, "1.3.11": 27, "1.3.12": 31, "1.3.13": 34, "1.3.15": 39},
    "GCC": {"4.8.0": 17, "7.0.0": 27, "12.0.0": 35, "14.0.0": 39},
}
OLDEST_GLIBC = 17
ALLOWED = re.compile(
    r"(libtorch_cpu|libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|ld-linux-[\w-]+)\.so(\.\d+)?"
)
"""What a library may be linked with: systems bring it, or torch, which is loaded before."""


def needed_versions(library: Path) -> dict[str, Version]:
    """The highest version of symbols that a library takes from each of the system's libraries, by their prefix."""
    highest: dict[str, Version] = {}
    for family, text in re.findall(r"\b(GLIBCXX|GLIBC|CXXABI|GCC)_([0-9.]+)\b", _readelf("--version-info", library)):
        highest[family] = max(highest.get(family, ()), _version(text))
    return highest


def check_links(library: Path) -> None:
    """See that a library finds what it needs on any machine.

    Raises:
        ValueError: it has a path to search in, or is linked with something that systems do not bring.
    """
    shown = _readelf("--dynamic", library)
    paths = re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", shown)
    if paths:
        raise ValueError(f"{library.name} searches in {', '.join(paths)}, which holds on one machine alone")
    foreign = [name for name in re.findall(r"\(NEEDED\).*\[(.*)\]", shown) if not ALLOWED.fullmatch(name)]
    if foreign:
        raise ValueError(f"{library.name} is linked with {', '.join(foreign)}, which systems do not bring")


def glibc_minor(versions: dict[str, Version]) -> int:
    """The N of manylinux_2_N for these versions of symbols.

    Raises:
        ValueError: one is higher than any system that is known here has.
    """
    minors = [OLDEST_GLIBC, versions.get("GLIBC", (2, 0))[1]]
    for family, known in SYSTEMS_WITH.items():
        needed = versions.get(family, ())
        fits = [minor for highest, minor in known.items() if needed <= _version(highest)]
        if not fits:
            shown = ".".join(map(str, needed))
            raise ValueError(f"{family}_{shown} is newer than what is known here; extend SYSTEMS_WITH")
        minors.append(fits[0])
    return max(minors)


def platform_tag(libraries: Iterable[Path]) -> str:
    """The lowest honest tag of a wheel with these libraries.

    Raises:
        ValueError: as `check_links` and `glibc_minor`.
    """
    minor = OLDEST_GLIBC
    for library in libraries:
        check_links(library)
        minor = max(minor, glibc_minor(needed_versions(library)))
    return f"manylinux_2_{minor}_{platform.machine().lower()}"


def _version(text: str) -> Version:
    return tuple(int(part) for part in text.split("."))


def _readelf(option: str, library: Path) -> str:
    command = ["readelf", "--wide", option, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"}).stdout
