"""Numbers as people read them: times, bytes, losses."""


def duration(seconds: float) -> str:
    """Return seconds as a clock shows them: 0:07, 12:34, 1:02:03, 3 d 4:05:06."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    short = f"{minutes}:{rest:02d}" if not (hours or days) else f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{days} d {short}" if days else short


def ago(seconds: float) -> str:
    """Return how long something is past, in one unit."""
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name} ago"
    return f"{seconds:.0f} seconds ago"


def number(value: float) -> str:
    """Return a loss: four places, or its order where these would be zeros."""
    return f"{value:.1e}" if 0 < abs(value) < 0.001 or abs(value) >= 1e6 else f"{value:.4f}"


def brief(seconds: float) -> str:
    """Return a short time with three figures."""
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{1e3 * seconds:.3g} ms"


def size(count: float) -> str:
    """Return bytes in KB, MB or GB, three figures or more."""
    name, unit = ("GB", 1e9) if count >= 999.5e6 else ("MB", 1e6) if count >= 999.5e3 else ("KB", 1e3)
    return f"{count / unit:.3g} {name}" if count < 999.5 * unit else f"{count / unit:.0f} {name}"
