"""What stands below a picture in small letters: what it is of, and what its shades mean."""

from __future__ import annotations

from fitprune.pictures.example import Example
from fitprune.pictures.views import views_of


def notes(example: Example, *, views_named: bool = False) -> list[str]:
    """Say which model and budget a picture is of, what its shades mean, and what its views are.

    Args:
        example: what is drawn.
        views_named: whether each view has its name beside it.

    Raises:
        ValueError: it is not known where in the picture the tokens lie.
    """
    views = views_of(example.kept, *example.picture.size)
    shades = ["bright: enters the layer", "dark: has left"]
    shades += [] if all(view.is_covered for view in views) else ["pale: no token sees it"]
    lines = [example.origin] if example.origin else []
    lines.append("; ".join(shades))
    if len(views) > 1 and not views_named:
        lines.append(f"from left: {', '.join(view.name for view in views)}")
    cells = {token for view in views for grid, _ in view.grids for token in grid.tokens.flatten().tolist()}
    if placeless := len(example.kept.entered) - len(cells):
        lines.append(
            f"{placeless} of {len(example.kept.entered)} tokens, such as ends of rows, lie on no part of the picture"
        )
    return lines
