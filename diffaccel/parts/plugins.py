"""Parts of other packages: their entry points, read so that a broken package stops nothing else."""

from importlib.metadata import Distribution, EntryPoint, distributions, entry_points

from diffaccel.text.escape import printable


def installed(group: str) -> tuple[list[EntryPoint], dict[str, str]]:
    """Return the entry points of a group, and why those of other packages can't be read: package -> reason."""
    broken: dict[str, str] = {}
    try:
        found = list(entry_points(group=group))
    except Exception:  # the metadata of a package are broken, so that packages are read one by one
        found = [plugin for package in distributions() for plugin in _entry_points(package, group, broken)]
    # A package in two places of the path is counted once.
    return list({(plugin.name, origin(plugin)): plugin for plugin in found}.values()), broken


def _entry_points(package: Distribution, group: str, broken: dict[str, str]) -> list[EntryPoint]:
    try:
        return [plugin for plugin in package.entry_points if plugin.group == group]
    except Exception as error:
        reason = f"its entry points can't be read ({printable(repr(error)):.200})"
        broken[f"package {package.metadata['Name']!r}"] = reason
        return []


def origin(plugin: EntryPoint) -> str:
    """Return the name of a plugin with its package, for messages."""
    package = getattr(getattr(plugin, "dist", None), "name", None)
    said = f"plugin {plugin.name!r} ({getattr(plugin, 'value', '?')})"
    return printable(f"{said} of package {package!r}" if package else said)
