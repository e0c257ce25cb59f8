"""Each extra brings the distributions that the code of its processes imports, by the metadata of this checkout."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPO = Path(__file__).parents[2]
RUN = ["shared/stepalign", "shared/stepalign_run"]
CRITIC = "services/critic/stepalign_critic"
DECODING = [f"{CRITIC}/decoding/{name}.py" for name in ("drafted", "tokens")]
LATE = [*(f"{CRITIC}/backends/{name}.py" for name in ("openai", "transformers", "vllm", "weights")), *DECODING]
# A critic's backend is imported once it is chosen, and has an extra of its own. So have what reads Parquet and the hub.
PARQUET = "shared/stepalign/problems/parquet.py"
HUB = "shared/stepalign_run/data/hub.py"
# A program of its own, which the extra `math` is for.
JUDGE = "shared/stepalign/graders/worker.py"
ROOMS = {
    "data": [PARQUET],
    "hub": [HUB],
    "math": [JUDGE],
    "report": [*RUN, "services/report"],
    "queue": RUN,
    "critic": [*RUN, CRITIC],
    "critic-openai": [f"{CRITIC}/backends/openai.py"],
    "critic-transformers": [f"{CRITIC}/backends/transformers.py", "shared/stepalign_models/devices.py"],
    "solver": [*RUN, "shared/stepalign_models", "services/solver"],
    "trainer": [*RUN, "shared/stepalign_models", "trainer"],
    "lab": [*RUN, "shared/stepalign_models", "services", "trainer", "lab"],
}
READERS = [PARQUET, HUB]
# In `lab` are all backends but vLLM's, which brings a torch of its own, and no llama.cpp.
LEFT_OUT = {
    "critic": [*LATE, *READERS],
    "data": [],
    "hub": [],
    "queue": [*READERS, JUDGE],
    "report": [*READERS, JUDGE],
    "lab": [f"{CRITIC}/backends/vllm.py", "lab/stepalign_lab/llama_server.py", *READERS],
}


def brought_by(extra: str) -> set[str]:
    """Distributions of an extra, with all that they require themselves."""
    found: set[str] = set()
    waiting: list[tuple[str, frozenset[str]]] = [("stepalign", frozenset({extra}))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found.add(name)
        try:
            requirements = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:
            continue
        waiting += [
            (one.name.lower().replace("_", "-"), frozenset(one.extras))
            for one in requirements
            if one.marker is None or any(one.marker.evaluate({"extra": chosen}) for chosen in extras or {""})
        ]
    return found


def imported_by(places: list[str], left_out: list[str]) -> set[str]:
    """Top-level modules of other distributions; those of the standard library and of this repository are left out."""
    names: set[str] = set()
    for place in places:
        path = REPO / place
        for file in [path] if path.suffix else path.rglob("*.py"):
            if str(file.relative_to(REPO)) in left_out:
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
                    names.add(node.module.split(".")[0])
    return {name for name in names if name not in sys.stdlib_module_names and not name.startswith("stepalign")}


@pytest.mark.parametrize("extra", ROOMS)
def test_an_extra_brings_the_imports_of_its_rooms(extra: str) -> None:
    owners = packages_distributions()
    imported = imported_by(ROOMS[extra], LEFT_OUT.get(extra, READERS))
    assert imported, "the rooms of the extra import nothing"
    brought = brought_by(extra)
    missing = {
        name for name in imported if not {owner.lower().replace("_", "-") for owner in owners.get(name, [])} & brought
    }
    assert missing == set()
