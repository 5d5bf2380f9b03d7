# SPDX-License-Identifier: MIT
"""From a name to an open chain of layers, top first.

Owns: which format a file is, the walk from an image to its base, loop detection by identity, the
bound on depth. Every rule here treats names inside images as input from a stranger.

Never: moves data, interprets a header (the formats do).

Formats: a file that begins with a known magic is that format or an error; any other file is raw.
What an image records about its base holds. Where it can record nothing, the base is raw, unless
it begins with a known magic: then the open is refused, and the text names both ways out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mmcow.errors import ChainError, LockedError, StorageError, UsageError
from mmcow.formats import registry
from mmcow.formats.opening import Access, Opener
from mmcow.storage import names
from mmcow.storage.file import Cache

if TYPE_CHECKING:
    from mmcow.formats.driver import Driver
    from mmcow.storage.host import Host, Identity

HEAD = 4096
# Deeper chains are a mistake or an attack; QEMU's users hit trouble long before.
DEPTH_MOST = 256


class Layer(NamedTuple):
    """One open layer. ``probed``: nobody said what format it is."""

    driver: Driver
    format: str
    probed: bool


class ChainOptions(NamedTuple):
    """How to open a chain; see ``mmcow.image.open_image``."""

    format: str | None = None
    write: bool = False
    cache: Cache = Cache.AUTO
    base_caches: tuple[Cache, ...] = (Cache.AUTO,)  # from the first base down; the last goes on
    share: bool = False
    backing: bool = True
    backing_format: str | None = None


def probe_file(host: Host, path: str) -> str:
    """The format whose magic ``path`` carries, "raw" if none. Takes no lock."""
    handle = host.open(path, write=False, direct=False)
    try:
        return registry.probe(handle.read_at(0, HEAD))
    finally:
        handle.close()


def open_chain(opener: Opener, path: str, options: ChainOptions) -> list[Layer]:
    """Open ``path`` and everything below it. Nothing stays open after an error."""
    layers: list[Layer] = []
    seen: dict[Identity, str] = {}
    access = Access(options.write, True, options.share, options.cache)
    caches = options.base_caches
    try:
        layer = _open_layer(opener, path, options.format, access)
        layers.append(layer)
        if options.write and options.cache is not Cache.UNSAFE:
            names.confirm(opener.host, path)
        _note_identities(opener, layer, seen)
        while options.backing and layer.driver.info.has_backing:
            cache = caches[min(len(layers), len(caches)) - 1]
            below = access._replace(write=False, top=False, cache=cache)
            try:
                layer = _open_backing(opener, layer, below, options.backing_format, len(layers))
            except LockedError as error:
                _explain_own_lock(opener, layer, seen, error)
                raise
            layers.append(layer)
            _check_changed_base(opener, layers[-2], layer)
            _note_identities(opener, layer, seen)
    except BaseException:
        close_layers(layers)
        raise
    return layers


def close_layers(layers: list[Layer]) -> None:
    """Close every layer; the first error is raised after all were closed."""
    first: Exception | None = None
    for layer in layers:
        try:
            layer.driver.close()
        except Exception as error:  # noqa: BLE001 - all are closed, the first is raised
            first = first or error
    if first is not None:
        raise first


def _open_layer(opener: Opener, path: str, format_: str | None, access: Access) -> Layer:
    probed = format_ is None
    name = probe_file(opener.host, path) if format_ is None else format_
    driver = registry.get(name).open(opener, path, access)
    return Layer(driver, name, probed)


def _open_backing(
    opener: Opener, above: Layer, access: Access, override: str | None, depth: int
) -> Layer:
    """Open what ``above`` names as its base, layer number ``depth``. Errors tell who named it."""
    backing = above.driver.backing
    assert backing is not None
    name = backing[0]
    if depth >= DEPTH_MOST:
        problem = f"the chain is deeper than {DEPTH_MOST} layers"
        raise ChainError(above.driver.path, "backing file", name, problem)
    resolved, format_ = find_backing(opener, above.driver.path, above.format, backing, override)
    try:
        layer = _open_layer(opener, resolved, format_, access)
    except LockedError:
        raise
    except StorageError as error:
        problem = f"{error.what}: {error.strerror}"
        raise ChainError(above.driver.path, "backing file", name, problem) from error
    except UsageError as error:
        raise ChainError(above.driver.path, "backing file", name, str(error)) from error
    return layer


def find_backing(
    opener: Opener,
    path: str,
    format_: str,
    backing: tuple[str, str | None],
    override: str | None = None,
) -> tuple[str, str]:
    """Path and format of the base that image ``path``, itself a ``format_``, records.

    Asks the policy. Where the image cannot record it, a base without a known magic is raw, and
    ``override`` is the format of one with a magic: a chain may need it for one of its layers only.
    """
    name, recorded = backing
    resolved = opener.permitted(path, "backing file", name)
    if recorded is not None:
        return resolved, recorded
    try:
        found = probe_file(opener.host, resolved)
    except StorageError as error:
        raise ChainError(path, "backing file", name, f"{error.what}: {error.strerror}") from error
    if found == "raw":
        return resolved, found
    if override is not None:
        return resolved, override
    raise ChainError(
        path,
        "backing file",
        name,
        f"begins like {found}, but {format_} cannot record the format of its base: say it "
        f"when opening (-F {found}, or -F raw if it is a raw disk whose guest wrote that)",
    )


def _check_changed_base(opener: Opener, above: Layer, base: Layer) -> None:
    """Ask a format that records its base's state whether the base is still the same."""
    mtime = opener.host.stat(base.driver.path).mtime
    text = above.driver.base_changed(mtime, base.driver.info.size)
    if text is not None:
        opener.warnings.append(text)


def _note_identities(opener: Opener, layer: Layer, seen: dict[Identity, str]) -> None:
    """Refuse a chain in which one file plays two parts, whatever it is called."""
    driver = layer.driver
    parts = {driver.data.handle.identity: driver.data.path}
    parts.setdefault(opener.host.stat(driver.path).identity, driver.path)
    for identity, path in parts.items():
        if identity in seen:
            raise ChainError(
                seen[identity], "backing file", path, "is already part of this chain (a loop)"
            )
    seen.update(parts)


def _explain_own_lock(
    opener: Opener, above: Layer, seen: dict[Identity, str], error: LockedError
) -> None:
    """A file that is locked because this very chain holds it already: a loop, not a user."""
    try:
        first = seen.get(opener.host.stat(error.path).identity)
    except StorageError:
        return
    if first is not None:
        backing = above.driver.backing
        assert backing is not None
        problem = f"leads back to {first}, which is already part of this chain (a loop)"
        raise ChainError(above.driver.path, "backing file", backing[0], problem) from error


def describe_chain(layers: list[Layer]) -> str:
    """One line for logs: "top.acow (add-cow) -> base.raw (raw)"."""
    return " -> ".join(f"{layer.driver.path} ({layer.format})" for layer in layers)
