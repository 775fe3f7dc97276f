"""Build what is uploaded to PyPI: `python tools/dist.py --url https://github.com/OWNER/convexhead --out dist`

The README has relative links, which are true wherever the repository lies. PyPI shows the page elsewhere, so a copy
with absolute links is built: to the tag of this version under the URL. Needs git, and the extra `release`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


def absolute(text: str, url: str, version: str) -> str:
    """The page with links to the files of the tag ``v<version>`` under ``url``; pictures as they are, and not shown."""

    def link(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        return f"{picture}[{words}]({url.rstrip('/')}/{'raw' if picture else 'blob'}/v{version}/{target})"

    return LINK.sub(link, text)


def main() -> None:
    """Build and check; the files of earlier builds in the folder stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="where the repository can be read")
    parser.add_argument("--out", type=Path, default=Path("dist"))
    given = parser.parse_args()
    if not given.url.startswith("https://"):
        parser.error("--url: say where the repository can be read, as in https://github.com/OWNER/convexhead")
    version = re.findall(r'^__version__ = "(.+)"', (ROOT / "src" / "convexhead" / "_version.py").read_text(), re.M)[0]
    out = given.out.resolve()
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        readme = Path(folder) / "README.md"
        readme.write_text(absolute(readme.read_text(), given.url, version))
        subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), folder], check=True)
    files = [str(path) for path in sorted(out.glob(f"convexhead-{version}*"))]
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True)


if __name__ == "__main__":
    main()
