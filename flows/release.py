"""The flow: put a candidate beside the champion, and promote it if it is better and nowhere worse.

Wiring only. What better means stands in `fedcoe/release.py`.
"""

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger

from fedcoe.errors import FedCoEError
from fedcoe.release import Difference, compare, promotes
from tasks.registry import use_default_stores
from tasks.release import aliased, grade_model, move_alias, publish_verdict, registered


@flow(name="release", validate_parameters=False)
def release(root: str = ".", version: str | None = None) -> dict[str, Any]:
    """Promote a registered mixture to champion, or refuse to.

    Args:
        root: folder of params.yaml, data/ and partitions/.
        version: of the registered model `fedcoe`; default: its alias `candidate`.

    Returns:
        version, champion (before), promoted, verdict, and the table of headline figures.

    Raises:
        FedCoEError: nothing to release, or the champion changed in the meantime.
    """
    folder = Path(root).resolve()
    use_default_stores(folder)
    version = version or aliased("candidate")
    if version is None:
        raise FedCoEError("there is no candidate; train one: `dvc repro` or `fedcoe train`")
    champion, candidate = aliased("champion"), registered(version)
    if version == champion:
        raise FedCoEError(f"version {version} is the champion already")
    differences: list[Difference] = []
    if champion is not None:
        for name in ("data_hash", "partition_fingerprint"):
            if registered(champion).tags.get(name) != candidate.tags.get(name):
                get_run_logger().warning(
                    "champion and candidate differ in %s: one may have trained on images that "
                    "are graded here",
                    name,
                )
        differences = compare(grade_model(folder, champion), grade_model(folder, version))
    promoted = champion is None or promotes(differences)
    verdict = "promoted" if promoted else "refused"
    if promoted:
        try:
            move_alias("champion", version, champion)
        except FedCoEError:
            publish_verdict(version, champion, "superseded", differences)
            raise
    publish_verdict(version, champion, verdict, differences)
    return {
        "version": version,
        "champion": champion,
        "promoted": promoted,
        "verdict": verdict,
        "table": [difference.row() for difference in differences],
    }
