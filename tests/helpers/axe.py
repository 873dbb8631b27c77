"""Faults for people with disabilities that axe-core finds in a page."""

from axe_playwright_python.sync_playwright import Axe


def serious(page):
    """List what axe-core calls serious or critical: how bad, which rule, and the elements."""
    return [
        (each["impact"], each["id"], [node["html"][:200] for node in each["nodes"]])
        for each in Axe().run(page).response["violations"]
        if each["impact"] in ("serious", "critical")
    ]
