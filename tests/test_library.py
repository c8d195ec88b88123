"""The script of docs/library.md, as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

WITHOUT_THE_STACK = """
import sys
for name in ("prefect", "mlflow", "dvc", "optuna", "matplotlib"):
    sys.modules[name] = None
"""


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(script)
    return subprocess.run(
        [sys.executable, "script.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_script_of_the_documentation_trains_evaluates_exports_and_predicts(
    tmp_path: Path,
) -> None:
    page = (REPOSITORY / "docs" / "library.md").read_text(encoding="utf-8")
    [script] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    done = run(WITHOUT_THE_STACK + script, tmp_path)
    assert done.returncode == 0, done.stderr
    *rounds, figures, predicted = done.stdout.splitlines()
    assert [line.split(":")[0] for line in rounds] == ["round 1", "round 2", "round 3"]
    assert "'personalized': 0." in figures and "'labels': 0." in figures
    assert len(predicted.strip("[]").split()) == 5


def test_a_script_without_the_guard_is_told_so_by_its_workers(tmp_path: Path) -> None:
    script = """
from pathlib import Path
from fedcoe.engine.pool import Engine, Site
with Engine(Site(Path("data"), Path("partitions"), Path("own"), "gn_cnn"), workers=2) as engine:
    engine.run(print)
"""
    done = run(script, tmp_path)
    assert done.returncode != 0
    assert 'open the Engine under `if __name__ == "__main__":`, or with workers=1' in done.stderr
