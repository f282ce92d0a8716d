"""What pyproject.toml asks for, as pip takes it.

python tests/support/requirements.py EXTRA...            of the package and of these extras
python tests/support/requirements.py --floors EXTRA...   each in the lowest version that is accepted
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def requirements(*extras: str) -> list[Requirement]:
    """Of the package, and of these extras with the extras that they name."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    lines, waiting = list(project["dependencies"]), list(extras)
    for extra in waiting:
        for line in project["optional-dependencies"][extra]:
            requirement = Requirement(line)
            if requirement.name == project["name"]:
                waiting += sorted(requirement.extras - set(waiting))
            else:
                lines.append(line)
    return [Requirement(line) for line in dict.fromkeys(lines)]


def floors(*extras: str) -> dict[str, Version]:
    """The lowest version of each that is accepted.

    Raises:
        ValueError: A package has none.
    """
    found = {}
    for requirement in requirements(*extras):
        lowest = [Version(each.version) for each in requirement.specifier if each.operator in (">=", "==", "~=")]
        if not lowest:
            raise ValueError(
                f"pyproject.toml says no lowest version of {requirement.name}: write {requirement.name}>=..."
            )
        found[requirement.name] = max(lowest)
    return found


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "--floors" in arguments:
        arguments.remove("--floors")
        print(*(f"{name}=={version}" for name, version in floors(*arguments).items()), sep="\n")
    else:
        print(*requirements(*arguments), sep="\n")
