"""Write the source code of Python's standard library as data: code.jsonl, and code-val.jsonl to hold out.

python experiments/code_data.py FOLDER

One record {"text": …, "path": …} for each .py file of `sysconfig.get_path("stdlib")`, without tests and
installed packages. A file is held out if the first byte of its path's SHA-256 is below 13, about one in
twenty. The version of Python is printed, because another one has other files.
"""

import argparse
import json
import platform
import sysconfig
from hashlib import sha256
from pathlib import Path

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
HELD_OUT_BELOW = 13


def main() -> None:
    """Write both files, and say what is in them."""
    parser = argparse.ArgumentParser(description="Write Python's standard library as training data.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    root = Path(sysconfig.get_path("stdlib"))
    parts: dict[str, list[dict[str, str]]] = {"code": [], "code-val": []}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if LEFT_OUT.isdisjoint(path.parts):
            text = file.read_text(encoding="utf-8", errors="replace")
            held_out = sha256(path.as_posix().encode()).digest()[0] < HELD_OUT_BELOW
            if text.strip():
                parts["code-val" if held_out else "code"].append({"text": text, "path": path.as_posix()})
    for name, records in parts.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        characters = sum(len(record["text"]) for record in records)
        print(f"{name}.jsonl: {len(records)} files, {characters:,} characters")
    print(f"Python {platform.python_version()}")


if __name__ == "__main__":
    main()
