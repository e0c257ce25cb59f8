"""Print what the named extras of pyproject.toml require, one line each, without our own package.

    python requirements.py critic-transformers

An image installs these in a layer of its own, which a change of our code does not rebuild.
"""

import re
import sys
import tomllib


def requirements(project: dict, extras: list[str]) -> list[str]:
    """The dependencies of ``project`` and of ``extras``, with extras that name further ones followed."""
    found = list(project["dependencies"])
    for extra in extras:
        for requirement in project["optional-dependencies"][extra]:
            own = re.fullmatch(rf"{project['name']}\[(.+)]", requirement)
            found += requirements(project, own[1].split(",")) if own else [requirement]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    with open("pyproject.toml", "rb") as file:
        print("\n".join(requirements(tomllib.load(file)["project"], sys.argv[1:])))
