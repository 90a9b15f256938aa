"""Run the notebooks of the docs and store their outputs in them, without times and machine names.

    python scripts/notebooks.py [docs/notebooks/eval_accuracy.ipynb …]

Needs nbclient, nbformat and ipykernel, which are in [notebooks].
"""

import sys
from pathlib import Path

import nbclient
import nbformat

ROOT = Path(__file__).resolve().parents[1]


def main():
    paths = [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
    for path in paths:
        book = nbformat.read(path, as_version=4)
        nbclient.NotebookClient(book, timeout=120, record_timing=False).execute()
        book.metadata = {"kernelspec": book.metadata.kernelspec, "language_info": {"name": "python"}}
        nbformat.write(book, path)
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
